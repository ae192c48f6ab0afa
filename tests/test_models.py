"""Loading, refusing and running: a sparse model can never be mistaken for a softmax model."""

import json
import logging
import shutil
from pathlib import Path

import families
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    AutoTokenizer,
    BertConfig,
    BloomConfig,
    Gemma2Config,
    GptOssConfig,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    Trainer,
    TrainingArguments,
    pipeline,
)

import hf_sparse_attention as hsa
from hf_sparse_attention import models

STORIES = Path(hsa.__file__).parent / "data" / "stories260K"


@pytest.fixture
def sparse():
    return families.stir(families.sparse_model(families.dense_model("llama"), "asentmax"))


@pytest.fixture
def dense_folder(tmp_path):
    families.dense_model("llama").save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


@pytest.fixture
def sparse_folder(tmp_path, sparse):
    sparse.save_pretrained(tmp_path / "sparse")
    return tmp_path / "sparse"


@torch.no_grad()
def logits(model, ids, **arguments):
    return model(ids, use_cache=False, **arguments).logits


@pytest.mark.parametrize("name", [name for name in hsa.MAPS if name != "ssmax"])
def test_the_public_checkpoint_at_alpha_one(name):
    dense = AutoModelForCausalLM.from_pretrained(STORIES)
    assert type(dense) is LlamaForCausalLM
    ids = torch.randint(3, 512, (2, 200), generator=torch.Generator().manual_seed(0))
    model = AutoModelForCausalLM.from_pretrained(STORIES, attn_implementation=name, sparse_attention={"alpha": 1.0})
    torch.testing.assert_close(logits(model, ids), logits(dense, ids), atol=1e-5, rtol=0)


def test_one_line_says_that_the_weights_were_trained_with_softmax(dense_folder, caplog):
    with caplog.at_level(logging.WARNING, logger="hf_sparse_attention"):
        AutoModelForCausalLM.from_pretrained(dense_folder, attn_implementation="asentmax")
    (record,) = [record for record in caplog.records if record.name.startswith("hf_sparse_attention")]
    assert "was trained with softmax and now runs asentmax" in record.message
    assert f"hf-sparse-attention train --model {dense_folder}" in record.message


@pytest.mark.parametrize("name", ["sdpa", "eager", "flex_attention", "flash_attention_2", "entmax", "nonsense"])
def test_another_attention_is_refused_everywhere(name, sparse, sparse_folder):
    message = f"computes asentmax and cannot run as '{name}'"
    with pytest.raises(ValueError, match=message):
        sparse.set_attn_implementation(name)
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(sparse_folder, attn_implementation=name)
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_config(sparse.config, attn_implementation=name)
    sparse.config._attn_implementation_internal = name
    with pytest.raises(ValueError, match=message):
        sparse(families.tokens(1, 3))


def test_its_own_attention_is_accepted(sparse, sparse_folder):
    sparse.set_attn_implementation("asentmax")
    again = AutoModelForCausalLM.from_pretrained(sparse_folder, attn_implementation="asentmax")
    assert again.config._attn_implementation == "asentmax"


def test_a_dense_class_under_our_names_is_refused(dense_folder):
    model = LlamaForCausalLM.from_pretrained(dense_folder, attn_implementation="entmax")
    with pytest.raises(ValueError, match="LlamaConfig is of a dense model"):
        model(families.tokens(1, 3))
    with pytest.raises(ValueError, match="belongs to a dense model"):
        model.model.layers[0].self_attn(torch.zeros(1, 3, 32), (torch.ones(1, 3, 8), torch.zeros(1, 3, 8)))


def test_a_family_outside_the_table_is_refused():
    """Its attention may read the missing mask of ours as no mask at all."""
    model = AutoModelForCausalLM.from_config(
        BloomConfig(vocab_size=64, hidden_size=32, n_layer=1, n_head=2), attn_implementation="asentmax"
    )
    with pytest.raises(ValueError, match="BloomConfig is of a dense model"):
        model(families.tokens(1, 5))


def test_a_dense_class_does_not_hide_a_sparse_model(dense_folder):
    """It would be saved as a dense model, and come back as softmax."""
    model = AutoModelForTokenClassification.from_pretrained(dense_folder, attn_implementation="entmax")
    assert not models.attention_layers(model)
    with pytest.raises(ValueError, match="of a dense model"):
        model(families.tokens(1, 5))


def test_a_sparse_folder_with_another_config_is_refused(sparse_folder, dense_folder):
    dense, ours = AutoConfig.from_pretrained(dense_folder), AutoConfig.from_pretrained(sparse_folder)
    with pytest.raises(ValueError, match="cannot be loaded with a dense config"):
        AutoModelForCausalLM.from_pretrained(sparse_folder, config=dense)
    model = LlamaForCausalLM.from_pretrained(sparse_folder, config=ours)
    with pytest.raises(ValueError, match="belongs to a dense model"):
        model(families.tokens(1, 5))


def test_no_implementation_at_all_is_refused(sparse):
    sparse.config._attn_implementation_internal = None
    with pytest.raises(ValueError, match="cannot run as 'eager'"):
        sparse(families.tokens(1, 5))


@pytest.mark.filterwarnings("ignore:Could not find a config file in .*convert it to a folder first:UserWarning")
def test_an_adapter_on_a_model_converted_while_loading_does_not_name_the_dense_base(dense_folder, tmp_path):
    from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model

    model = AutoModelForCausalLM.from_pretrained(dense_folder, attn_implementation="entmax")
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    with pytest.raises((OSError, ValueError), match="convert it to a folder first|import allowlist"):
        AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")


@pytest.mark.parametrize("name", ["llama", "mistral", "olmo2", "qwen2"])
def test_the_tokenizer_is_read_as_for_the_dense_model(name, tmp_path):
    dense = families.dense_model(name, vocab_size=512)
    dense.save_pretrained(tmp_path / "dense")
    families.sparse_model(dense, "entmax").save_pretrained(tmp_path / "sparse")
    for folder in ("dense", "sparse"):
        shutil.copy(STORIES / "tokenizer.json", tmp_path / folder)
        (tmp_path / folder / "tokenizer_config.json").write_text(
            '{"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}'
        )
    dense_one, sparse_one = (AutoTokenizer.from_pretrained(tmp_path / folder) for folder in ("dense", "sparse"))
    assert type(dense_one) is type(sparse_one)
    for text in ("Once upon a time", "Once upon</s> a time", "  two  spaces\n"):
        assert dense_one(text)["input_ids"] == sparse_one(text)["input_ids"]


def test_transformers_alone_does_not_know_the_type(sparse_folder):
    saved = json.loads((sparse_folder / "config.json").read_text())
    assert saved["model_type"] == "sparse_llama"
    assert saved["architectures"] == ["SparseLlamaForCausalLM"]
    assert saved["sparse_attention"]["map"] == "asentmax"
    assert saved["sparse_attention"]["version"] == hsa.__version__
    assert "attn_implementation" not in json.dumps(saved)


@pytest.mark.parametrize("name", families.NAMES)
def test_the_dense_class_cannot_load_a_sparse_folder(name, tmp_path):
    """Transformers takes a config of another model_type with a warning, and would compute softmax."""
    dense = families.dense_model(name)
    families.sparse_model(dense, "asentmax").save_pretrained(tmp_path)
    with pytest.raises(KeyError, match="pip install hf-sparse-attention"):
        type(dense).from_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    activations = {key: value for key, value in dense.config.to_dict().items() if key.startswith("hidden_act")}
    assert activations and all(getattr(again.config, key) == value for key, value in activations.items())


def test_a_sparse_checkpoint_without_its_parameters_is_refused(sparse_folder):
    from safetensors.torch import load_file, save_file

    weights = load_file(sparse_folder / "model.safetensors")
    kept = {name: value for name, value in weights.items() if not name.endswith("gamma_bias")}
    save_file(kept, sparse_folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks 2 of its parameters, first model.layers.0.self_attn.sparse_scale"):
        AutoModelForCausalLM.from_pretrained(sparse_folder)


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("map", "softmax", "map is 'softmax'; choose one of"),
        ("alpha", "x", "alpha is 'x'"),
        ("format", 99, "pip install --upgrade hf-sparse-attention"),
        ("sharpness", 2, "unknown fields sharpness"),
    ],
)
def test_a_tampered_config_is_refused(sparse_folder, field, value, message):
    config = json.loads((sparse_folder / "config.json").read_text())
    config["sparse_attention"][field] = value
    (sparse_folder / "config.json").write_text(json.dumps(config))
    with pytest.raises((ValueError, TypeError), match=message):
        AutoModelForCausalLM.from_pretrained(sparse_folder)


def test_a_config_without_its_block_is_refused(sparse_folder):
    config = json.loads((sparse_folder / "config.json").read_text())
    del config["sparse_attention"]
    (sparse_folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="nothing says which attention map"):
        AutoModelForCausalLM.from_pretrained(sparse_folder)


def test_options_of_a_saved_model(sparse_folder):
    model = AutoModelForCausalLM.from_pretrained(sparse_folder, sparse_attention={"alpha": 1.25})
    assert model.config.sparse_attention["alpha"] == 1.25
    assert model.config.sparse_attention["map"] == "asentmax"
    assert {layer.alpha for _, layer in models.attention_layers(model)} == {1.25}
    for options in ({"map": "entmax"}, {"position": "nape"}, {"layers": "full_attention"}):
        with pytest.raises(ValueError, match="the model was saved with"):
            AutoModelForCausalLM.from_pretrained(sparse_folder, sparse_attention=options)


def test_options_without_a_map_are_refused(dense_folder):
    with pytest.raises(ValueError, match="attn_implementation is 'entmax' but sparse_attention"):
        hsa.SparseLlamaForCausalLM.from_pretrained(
            dense_folder, attn_implementation="entmax", sparse_attention={"map": "sparsemax"}
        )
    with pytest.raises(ValueError, match="needs attn_implementation="):
        AutoModelForCausalLM.from_pretrained(dense_folder, sparse_attention={"alpha": 1.25})
    with pytest.raises(ValueError, match="attn_implementation is 'entmax' but sparse_attention"):
        AutoModelForCausalLM.from_pretrained(
            dense_folder, attn_implementation="entmax", sparse_attention={"map": "ssmax"}
        )


def test_the_sparse_class_converts_a_dense_folder_itself(dense_folder):
    model = hsa.SparseLlamaForCausalLM.from_pretrained(dense_folder, sparse_attention={"map": "entmax", "alpha": 1.0})
    ids = families.tokens(1, 9)
    torch.testing.assert_close(
        logits(model, ids), logits(AutoModelForCausalLM.from_pretrained(dense_folder), ids), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize(
    "config, message",
    [
        (Gemma2Config(), "gemma2 needs attention soft-capping"),
        (GptOssConfig(), "gpt_oss needs attention sinks"),
        (BertConfig(), "'bert' is not a supported decoder"),
        (T5Config(), "'t5' is not a supported decoder"),
        (LlamaConfig(is_causal=False), "attends in both directions"),
    ],
    ids=["gemma2", "gpt_oss", "bert", "t5", "bidirectional"],
)
def test_what_we_do_not_compute_is_refused_by_name(config, message):
    with pytest.raises(ValueError, match=message):
        hsa.sparse_config(config, hsa.SparseAttentionConfig())


def test_an_already_sparse_model_is_refused(sparse):
    with pytest.raises(ValueError, match="already sparse .*asentmax"):
        hsa.sparse_config(sparse.config, hsa.SparseAttentionConfig())


def test_attention_dropout_is_refused(sparse):
    for _, layer in models.attention_layers(sparse):
        layer.attention_dropout = 0.1
    with pytest.raises(ValueError, match="attention dropout is 0.1"):
        sparse.train()(families.tokens(1, 3))
    sparse.eval()(families.tokens(1, 3))


def test_explicit_kernels_without_a_gpu_raise(sparse):
    with hsa.implementation("triton"), pytest.raises(ValueError, match="need a GPU"):
        sparse(families.tokens(1, 3))
    with pytest.raises(ValueError, match="implementation is 'cuda'; choose one of"), hsa.implementation("cuda"):
        pass


def test_documents_given_as_lengths_alone_are_refused(sparse):
    with pytest.raises(ValueError, match="position_ids do not restart"):
        sparse(families.tokens(1, 9), cu_seq_lens_q=torch.tensor([0, 4, 9]), position_ids=torch.arange(9)[None])
    with pytest.raises(ValueError, match="documents would see each other"):
        sparse(families.tokens(1, 9), cu_seq_lens_q=torch.tensor([0, 4, 9]), use_cache=False)
    with pytest.raises(ValueError, match="seq_idx without position_ids"):
        sparse(families.tokens(1, 9), seq_idx=torch.tensor([[0] * 4 + [1] * 5]), use_cache=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_close(sparse_folder, dtype):
    ids = families.tokens(2, 19)
    full = logits(AutoModelForCausalLM.from_pretrained(sparse_folder), ids)
    model = AutoModelForCausalLM.from_pretrained(sparse_folder, dtype=dtype)
    assert {value.dtype for value in model.parameters()} == {dtype}
    half = logits(model, ids).float()
    assert (half - full).abs().max() < (0.06 if dtype is torch.bfloat16 else 0.01) * full.abs().max()


def test_device_map_loads_the_same_model(sparse, sparse_folder):
    model = AutoModelForCausalLM.from_pretrained(sparse_folder, device_map="cpu")
    ids = families.tokens(2, 9)
    assert torch.equal(logits(model, ids), logits(sparse, ids))


def test_layers_on_disk_need_a_converted_folder(tmp_path, sparse, sparse_folder, dense_folder):
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    places |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    with pytest.raises(ValueError, match="on disk.*hf-sparse-attention convert"):
        AutoModelForCausalLM.from_pretrained(
            dense_folder, attn_implementation="asentmax", device_map=places, offload_folder=tmp_path / "a"
        )
    model = AutoModelForCausalLM.from_pretrained(sparse_folder, device_map=places, offload_folder=tmp_path / "b")
    ids = families.tokens(2, 9)
    assert torch.equal(logits(model, ids), logits(sparse, ids))


def test_a_config_with_a_change_alone(sparse_folder):
    """The change reaches a model that has the rest of its settings, and is refused where nothing says the map."""
    config = AutoConfig.from_pretrained(sparse_folder, sparse_attention={"alpha": 1.25})
    with pytest.raises(ValueError, match="names no map"):
        AutoModelForCausalLM.from_config(config)
    model = AutoModelForCausalLM.from_pretrained(sparse_folder, config=config)
    assert (model.config.sparse_attention["map"], model.config.sparse_attention["alpha"]) == ("asentmax", 1.25)


def test_the_config_alone(sparse_folder, dense_folder):
    assert type(AutoConfig.from_pretrained(sparse_folder)) is hsa.SparseLlamaConfig
    assert type(AutoConfig.from_pretrained(dense_folder)) is LlamaConfig


def test_pipeline_generates_as_the_model_does(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(STORIES, attn_implementation="asentmax")
    model.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(STORIES / name, tmp_path)
    generator = pipeline("text-generation", model=str(tmp_path), device="cpu")
    prompt = "Once upon a time"
    (found,) = generator(prompt, max_new_tokens=12, do_sample=False)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    inputs = tokenizer(prompt, return_tensors="pt")
    expected = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert found["generated_text"] == tokenizer.decode(expected[0], skip_special_tokens=True)


@pytest.mark.parametrize("name", families.NAMES)
def test_trainer_takes_the_steps_of_a_plain_loop(name, tmp_path):
    import copy

    sparse = families.stir(families.sparse_model(families.dense_model(name), "asentmax"))
    rows = [{"input_ids": row, "labels": row} for row in families.tokens(4, 17)]
    plain = copy.deepcopy(sparse).train()
    before = [value.detach().clone() for value in plain.parameters()]
    arguments = TrainingArguments(
        output_dir=tmp_path, max_steps=2, per_device_train_batch_size=4, learning_rate=1e-2, weight_decay=0.0,
        lr_scheduler_type="constant", optim="adamw_torch", max_grad_norm=0.0, report_to=[], save_strategy="no",
        use_cpu=True, logging_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    Trainer(model=sparse, args=arguments, train_dataset=rows).train()
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2, weight_decay=0.0)
    ids = torch.stack([row["input_ids"] for row in rows])
    for _ in range(2):
        plain(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = [value - start for value, start in zip(sparse.parameters(), before, strict=True)]
    expected = [value - start for value, start in zip(plain.parameters(), before, strict=True)]
    # Of all parameters together: Adam's first step is the sign of a gradient, which is chance for a bias of the keys,
    # whose gradient is zero up to rounding.
    size = torch.stack([value.norm() for value in expected]).norm()
    error = torch.stack([(one - other).norm() for one, other in zip(moved, expected, strict=True)]).norm()
    assert error / size < 0.05


@pytest.mark.parametrize("name", ["mistral", "qwen2", "gemma3_text"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_beyond_a_sliding_window(name, cache):
    model = families.stir(families.sparse_model(families.dense_model(name), "asentmax"))
    ids = families.tokens(2, 9)
    how = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    if cache == "static":
        how |= {"cache_implementation": "static", "disable_compile": True}
    mask = torch.ones_like(ids)
    found = model.generate(ids, attention_mask=mask, **how)
    expected = ids
    for _ in range(12):
        expected = torch.cat([expected, logits(model, expected)[:, -1:].argmax(-1)], 1)
    assert torch.equal(found, expected)


def test_prefill_in_chunks(sparse):
    ids = families.tokens(2, 17)
    how = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    whole = sparse.generate(ids, attention_mask=mask, **how)
    assert torch.equal(whole, sparse.generate(ids, attention_mask=mask, prefill_chunk_size=6, **how))


def test_releases_that_drop_what_is_registered_for_their_own_configs(monkeypatch):
    """Transformers 5.17 is one: our maps would be asked of the dense class."""
    mapping = AutoModelForCausalLM._model_mapping
    monkeypatch.setattr(type(mapping), "register", lambda *arguments, **keywords: None)
    monkeypatch.delitem(mapping._extra_content, LlamaConfig)
    entry = models.registration.DenseEntry(hsa.FAMILIES["llama"], "ForCausalLM")
    models.registration._register_dense(AutoModelForCausalLM, LlamaConfig, entry)
    assert mapping[LlamaConfig] is entry

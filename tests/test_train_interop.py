"""Other trainers on a sparse model: Transformers' Trainer and TRL's SFTTrainer pack documents that do not see each
other, and the examples run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training_cases import STORIES, dense_folder
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorWithFlattening, Trainer, TrainingArguments

from hf_sparse_attention.models import new_parameter_names, set_alpha

pytest.importorskip("accelerate")
EXAMPLES = Path(__file__).parent.parent / "examples"
# Warnings that these libraries raise at each other.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`.*` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Padding-free training is enabled:UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
COMMON = {
    "max_steps": 1, "per_device_train_batch_size": 3, "learning_rate": 1e-3, "logging_steps": 1, "report_to": [],
    "save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "weight_decay": 0.0,
}  # fmt: skip


@pytest.fixture
def model(tmp_path):
    dense_folder(tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", attn_implementation="asentmax")
    set_alpha(model, 1.5)
    return model


def documents():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 500, (length,), generator=generator).tolist() for length in (9, 17, 5, 12, 20, 8)]


def watched(model):
    """What the trainer gives to the inner model, and what comes out of it, of the first call."""
    seen = []

    def keep(module, arguments, keywords, output):
        if not seen:
            seen.append((dict(keywords), output.last_hidden_state.detach().clone()))

    model.model.register_forward_hook(keep, with_kwargs=True)
    return seen


def check_apart(seen, before, logged):
    """Hidden states and the loss of the packed row are those of each document alone."""
    ((keywords, hidden),) = seen
    tokens, positions = keywords["input_ids"][0], keywords["position_ids"][0]
    assert keywords.get("attention_mask") is None
    starts = (positions == 0).nonzero().flatten().tolist()
    assert len(starts) > 1
    total = count = 0
    with torch.no_grad():
        for start, end in zip(starts, [*starts[1:], len(tokens)], strict=True):
            piece = tokens[None, start:end]
            alone = before.model(input_ids=piece, use_cache=False).last_hidden_state[0]
            torch.testing.assert_close(hidden[0, start:end], alone, atol=1e-5, rtol=1e-4)
            if end - start > 1:
                total += before(input_ids=piece, labels=piece, use_cache=False).loss.item() * (end - start - 1)
                count += end - start - 1
    assert logged == pytest.approx(total / count, rel=1e-4)


def copy_of(model, tmp_path):
    model.save_pretrained(tmp_path / "before")
    return AutoModelForCausalLM.from_pretrained(tmp_path / "before").eval()


def assert_trained(model, before):
    old = dict(before.named_parameters())
    new = new_parameter_names(model)
    assert len(new) == 10
    for name, parameter in model.named_parameters():
        assert not torch.equal(parameter, old[name]), name


def test_trainer_keeps_packed_documents_apart(model, tmp_path):
    before, seen = copy_of(model, tmp_path), watched(model)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(tmp_path / "out"), **COMMON),
        train_dataset=[{"input_ids": tokens} for tokens in documents()],
        data_collator=DataCollatorWithFlattening(),
    )
    trainer.train()
    check_apart(seen, before, trainer.state.log_history[0]["loss"])
    assert_trained(model, before)
    trainer.save_model(tmp_path / "saved")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert type(saved) is type(before) and saved.config.sparse_attention == model.config.sparse_attention


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split"])
def test_sft_trainer_keeps_packed_documents_apart(model, tmp_path, strategy):
    trl = pytest.importorskip("trl", reason="TRL is not installed")
    datasets = pytest.importorskip("datasets")
    tokenizer = AutoTokenizer.from_pretrained(STORIES)
    tokenizer.pad_token = tokenizer.eos_token
    before, seen = copy_of(model, tmp_path), watched(model)
    trainer = trl.SFTTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=datasets.Dataset.from_dict({"input_ids": documents()}),
        args=trl.SFTConfig(
            output_dir=str(tmp_path / "out"), max_length=32, packing=True, packing_strategy=strategy, bf16=False,
            **COMMON,
        ),
    )  # fmt: skip
    trainer.train()
    check_apart(seen, before, trainer.state.log_history[0]["loss"])
    assert_trained(model, before)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["full_with_trainer", "sft_with_packing", "lora_with_trainer", "load_and_generate"])
def test_examples_run(tmp_path, name):
    if name == "sft_with_packing":
        pytest.importorskip("trl", reason="TRL is not installed")
    words = [sys.executable, str(EXAMPLES / f"{name}.py")]
    words += [] if name == "load_and_generate" else [str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent), "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(words, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    if name != "load_and_generate":
        saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / ("merged" if "lora" in name else ""))
        assert saved.config.sparse_attention["map"] == "asentmax"


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_quantised_model_learns_in_its_map_and_adapters(tmp_path, model, kind):
    """8 bits of torchao, 4 of bitsandbytes: projections are quantised and stay, the map's parameters are neither."""
    from peft import LoraConfig, get_peft_model

    model.save_pretrained(tmp_path / "sparse")
    if kind == "int8":
        torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
        from transformers import TorchAoConfig

        quantization = TorchAoConfig(torchao.Int8WeightOnlyConfig())
    else:
        bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
        from transformers import BitsAndBytesConfig

        quantization = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32,
            llm_int8_skip_modules=["lm_head", "sparse_scale", "sparse_alpha"],
        )  # fmt: skip
    quantised = AutoModelForCausalLM.from_pretrained(
        tmp_path / "sparse", quantization_config=quantization, device_map="cpu"
    )
    layer = quantised.model.layers[0].self_attn
    assert type(layer.q_proj.weight).__name__ == {"int8": "Int8Tensor", "nf4": "Params4bit"}[kind]
    assert all(type(value.data) is torch.Tensor for value in layer.sparse_scale.parameters())
    ids = torch.tensor(documents()[1])[None]
    with torch.no_grad():
        if kind == "nf4":
            # 4 bits move this small model's logits as far as another map would: beside what they stand for. In eval
            # mode bitsandbytes packs weights for CPUs, which takes rows of 64.
            quantised.train()
            for name, module in quantised.named_modules():
                if type(module).__name__ == "Linear4bit":
                    whole = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
                    model.get_submodule(name).weight.copy_(whole)
        # 8 bits of weights move logits of size 1 by their rounding, another map would move them by their size.
        bound = {"int8": 0.05, "nf4": 1e-4}[kind]
        torch.testing.assert_close(quantised(ids).logits, model(ids).logits, atol=bound, rtol=bound)
    adapted = get_peft_model(quantised, LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["sparse_scale"]))
    adapted(ids, labels=ids).loss.backward()
    trained = {name for name, value in adapted.named_parameters() if value.grad is not None}
    assert trained and all("lora_" in name or "sparse_scale.modules_to_save" in name for name in trained)
    assert {name for name in trained if "delta_bias" in name}

"""Every family: the dense model at step 0, save and load, training, caches, padding, packing."""

import copy
import pickle

import families
import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

import hf_sparse_attention as hsa
from hf_sparse_attention import models
from hf_sparse_attention.train.distributed import checkpoint_activations

MAPS_AT_ALPHA_ONE = [name for name, row in hsa.MAPS.items() if not row.softmax]


@pytest.fixture(scope="module", params=families.NAMES)
def dense(request):
    return families.dense_model(request.param)


@pytest.fixture(scope="module")
def sparse(dense):
    return families.stir(families.sparse_model(dense, "asentmax"))


def assert_same(found, expected):
    """Equal up to the rounding of float32, in units of the largest logit."""
    torch.testing.assert_close(found, expected, atol=1e-5 * max(1.0, expected.abs().max().item()), rtol=0)


@torch.no_grad()
def logits(model, ids, **arguments):
    return model(ids, use_cache=False, **arguments).logits


def test_alpha_one_is_the_dense_model(dense):
    ids = families.tokens(2, 19)
    expected = logits(dense, ids)
    for name in MAPS_AT_ALPHA_ONE:
        model = families.sparse_model(dense, name, alpha=1.0)
        torch.testing.assert_close(logits(model, ids), expected, atol=1e-5, rtol=0)


def test_alpha_one_in_the_reference_is_the_dense_model(dense):
    ids = families.tokens(2, 19)
    with hsa.implementation("reference"):
        found = logits(families.sparse_model(dense, "asentmax", alpha=1.0), ids)
    torch.testing.assert_close(found, logits(dense, ids), atol=1e-5, rtol=0)


def test_neutral_factor_is_exactly_one(dense):
    ids = families.tokens(2, 19)
    entmax, scaled = families.sparse_model(dense, "entmax"), families.sparse_model(dense, "asentmax")
    assert torch.equal(logits(entmax, ids), logits(scaled, ids))
    assert not torch.allclose(logits(entmax, ids), logits(dense, ids), atol=1e-3)


def test_the_scale_reaches_the_scores(dense, sparse):
    ids = families.tokens(2, 19)
    assert not torch.allclose(logits(sparse, ids), logits(families.sparse_model(dense, "entmax"), ids), atol=1e-3)


def test_save_and_load_are_exact(sparse, tmp_path):
    sparse.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is type(sparse)
    assert again.config.sparse_attention == sparse.config.sparse_attention
    assert {name: value for name, value in again.config.to_dict().items() if name != "dtype"} == {
        name: value for name, value in AutoConfig.from_pretrained(tmp_path).to_dict().items() if name != "dtype"
    }
    for (name, value), (other, saved) in zip(sparse.state_dict().items(), again.state_dict().items(), strict=True):
        assert name == other and torch.equal(value, saved)
    ids = families.tokens(1, 11)
    assert torch.equal(logits(again, ids), logits(sparse, ids))


def test_dense_checkpoint_through_the_auto_class(dense, tmp_path):
    dense.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="asentmax")
    assert type(model) is getattr(hsa, f"Sparse{type(dense).__name__}")
    kept = model.state_dict()
    for name, value in dense.state_dict().items():
        assert torch.equal(kept[name], value), name
    for name in models.new_parameter_names(model):
        assert not kept[name].any(), name
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is type(dense) and again.config._attn_implementation == "sdpa"
    inner = AutoModel.from_pretrained(tmp_path, attn_implementation="asentmax")
    assert type(inner) is models.sparse_class(models.family_of(model.config), "Model")


def test_classes_are_found_by_name(sparse):
    for kind in (type(sparse), type(sparse.config)):
        assert pickle.loads(pickle.dumps(kind)) is kind
        assert getattr(hsa, kind.__name__) is kind


def test_two_steps_move_every_parameter(dense):
    for name, position in (("asentmax", "rope"), ("asentmax", "nape"), ("ssmax", "rope"), ("adaptive_entmax", "rope")):
        model = families.sparse_model(dense, name, position=position).train()
        before = {key: value.clone() for key, value in model.named_parameters()}
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
        ids = families.tokens(4, 33)
        for _ in range(2):
            model(ids, labels=ids, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        for key, value in model.named_parameters():
            if "embed_tokens" not in key and "expert" not in key:
                assert not torch.equal(before[key], value), f"{name}/{position}: {key} never trained"
            assert torch.isfinite(value).all(), key


def test_gradient_checkpointing_changes_nothing(sparse):
    ids = families.tokens(2, 17)

    def gradients(checkpointing):
        model = copy.deepcopy(sparse).train()
        if checkpointing:
            checkpoint_activations(model)
        torch.manual_seed(0)
        model(ids, labels=ids, use_cache=False).loss.backward()
        return {name: value.grad for name, value in model.named_parameters() if value.grad is not None}

    plain, checkpointed = gradients(False), gradients(True)
    assert plain.keys() == checkpointed.keys()
    for name, value in plain.items():
        torch.testing.assert_close(checkpointed[name], value, atol=1e-6, rtol=1e-5)


def test_prefill_and_decoding_equal_the_full_pass(sparse):
    ids = families.tokens(2, 17)
    expected = logits(sparse, ids)
    with torch.no_grad():
        step = sparse(ids[:, :9], use_cache=True)
        found = [step.logits]
        for index in range(9, 17):
            step = sparse(ids[:, index : index + 1], past_key_values=step.past_key_values, use_cache=True)
            found.append(step.logits)
    assert_same(torch.cat(found, 1), expected)


def test_left_padding_changes_nothing(sparse):
    ids = families.tokens(2, 13)
    expected = logits(sparse, ids[:1, 4:])
    padded = ids.clone()
    padded[0, :4] = 0
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    found = logits(sparse, padded, attention_mask=mask, position_ids=positions)
    assert_same(found[:1, 4:], expected)
    assert_same(found[1:], logits(sparse, ids[1:]))
    assert torch.isfinite(found).all()


def test_right_padding_changes_nothing(sparse):
    ids = families.tokens(2, 13)
    mask = torch.ones_like(ids)
    mask[0, 9:] = 0
    found = logits(sparse, ids, attention_mask=mask)
    assert_same(found[:1, :9], logits(sparse, ids[:1, :9]))


def test_a_mask_with_holes_hides_them(sparse):
    ids = families.tokens(1, 13)
    mask = torch.ones_like(ids)
    mask[0, 3] = 0
    positions = torch.arange(13)[None]
    found = logits(sparse, ids, attention_mask=mask, position_ids=positions)
    changed = ids.clone()
    changed[0, 3] = 5 if ids[0, 3] != 5 else 6
    other = logits(sparse, changed, attention_mask=mask, position_ids=positions)
    seen = torch.arange(13) != 3
    assert_same(found[:, seen], other[:, seen])


@pytest.mark.parametrize("how", ["no mask", "all-ones mask", "cache"])
def test_packed_documents_stay_apart(sparse, how):
    first, second = families.tokens(1, 11, seed=3), families.tokens(1, 8, seed=4)
    packed = torch.cat([first, second], 1)
    positions = torch.cat([torch.arange(11), torch.arange(8)])[None]
    arguments = {"use_cache": how == "cache"}
    if how == "all-ones mask":
        arguments["attention_mask"] = torch.ones_like(packed)
    with torch.no_grad():
        found = sparse(packed, position_ids=positions, **arguments).logits
    expected = torch.cat([logits(sparse, first), logits(sparse, second)], 1)
    assert_same(found, expected)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_batched_generation_equals_one_by_one(sparse, cache):
    ids = families.tokens(2, 9)
    mask = torch.ones_like(ids)
    ids[0, :3] = 0
    mask[0, :3] = 0
    how = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    if cache == "static":
        how["cache_implementation"] = "static"
        how["disable_compile"] = True
    found = sparse.generate(ids, attention_mask=mask, **how)
    alone = sparse.generate(ids[:1, 3:], attention_mask=mask[:1, 3:], **how)
    assert torch.equal(found[0, 3:], alone[0])
    full = ids[1:].clone()
    for _ in range(8):
        full = torch.cat([full, logits(sparse, full)[:, -1:].argmax(-1)], 1)
    assert torch.equal(found[1:], full)


def test_beams_equal_those_without_a_cache(sparse):
    ids = families.tokens(1, 7)
    how = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    mask = torch.ones_like(ids)
    cached = sparse.generate(ids, attention_mask=mask, **how)
    assert torch.equal(cached, sparse.generate(ids, attention_mask=mask, use_cache=False, **how))


def test_weights_are_returned_on_request(sparse):
    ids = families.tokens(2, 13)
    with torch.no_grad():
        attentions = sparse(ids, use_cache=False, output_attentions=True).attentions
    assert len(attentions) == 2
    for weights in attentions:
        assert weights.shape == (2, 4, 13, 13)
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 13), atol=1e-5, rtol=0)
        assert not weights.triu(1).any()
        assert (weights == 0).sum() > 2 * 4 * 13 * 12 / 2


def test_lora_round_trip(dense, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    def base():
        return families.sparse_model(dense, "asentmax")

    names = sorted({name.split(".")[-1] for name, module in base().named_modules()
                    if isinstance(module, torch.nn.Linear) and ("attn" in name or "attention" in name)})  # fmt: skip
    settings = LoraConfig(r=2, target_modules=names, modules_to_save=["sparse_scale"], init_lora_weights=False)
    model = get_peft_model(base(), settings).eval()
    trainable = [name for name, value in model.named_parameters() if value.requires_grad]
    assert any("sparse_scale" in name for name in trainable)
    for name, value in model.named_parameters():
        if value.requires_grad and "sparse_scale" in name:
            value.data += 0.3
    ids = families.tokens(2, 13)
    expected = logits(model, ids)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base(), tmp_path).eval()
    torch.testing.assert_close(logits(again, ids), expected, atol=1e-6, rtol=0)
    merged = again.merge_and_unload()
    assert type(merged) is type(base())
    torch.testing.assert_close(logits(merged, ids), expected, atol=1e-3, rtol=1e-3)


def test_sequence_classification(dense):
    family = models.FAMILIES[dense.config.model_type]
    kind = models.sparse_class(family, "ForSequenceClassification")
    assert (kind is None) == (family.dense("ForSequenceClassification") is None)
    if kind is None:
        pytest.skip("the dense family has none")
    config = families.dense_config(family.name, num_labels=3)
    model = AutoModelForSequenceClassification.from_config(config, attn_implementation="asentmax")
    assert type(model) is kind
    assert models.attention_layers(model)
    ids = families.tokens(2, 9)
    model(ids, labels=torch.tensor([0, 2])).loss.backward()

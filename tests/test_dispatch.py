"""What computes: the reference on the CPU, the kernels on a GPU, and the same numbers from both in a whole model."""

import copy
import logging

import families
import pytest
import torch

import hf_sparse_attention as hsa
from hf_sparse_attention import attention as room


@pytest.fixture
def announcements(caplog):
    room._announced.clear()
    with caplog.at_level(logging.INFO, logger="hf_sparse_attention"):
        yield caplog


def test_the_choice_is_said_once(announcements):
    model = families.sparse_model(families.dense_model("llama"), "entmax")
    for _ in range(2):
        model(families.tokens(1, 5))
    said = [record.message for record in announcements.records if "attention runs on" in record.message]
    assert said == [f"attention runs on the PyTorch reference: {said[0].partition(': ')[2]}"]
    assert "need a GPU" in said[0]


@pytest.mark.parametrize("name, alpha", [("asentmax", 1.0), ("ssmax", 1.0)])
def test_softmax_maps_compile_without_a_graph_break(name, alpha):
    model = families.sparse_model(families.dense_model("llama"), name, alpha=alpha)
    ids = families.tokens(2, 16)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits)
    # Another length makes the lengths symbols.
    ids = families.tokens(2, 11)
    torch.testing.assert_close(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_the_reference_compiles_with_a_graph_break():
    model = families.sparse_model(families.dense_model("llama"), "asentmax")
    ids = families.tokens(2, 16)
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits)


def gradients(model, ids, **arguments):
    model = copy.deepcopy(model).train()
    loss = model(ids, labels=ids, use_cache=False, **arguments).loss
    loss.backward()
    return loss.detach(), {name: value.grad for name, value in model.named_parameters() if value.grad is not None}


@pytest.mark.gpu
@pytest.mark.parametrize("position", ["rope", "nape"])
@pytest.mark.parametrize("name", ["entmax", "sparsemax", "asentmax", "adaptive_entmax"])
def test_kernels_and_reference_agree_in_a_model(name, position):
    dense = families.dense_model("qwen2", head_dim=32, hidden_size=128)
    model = families.stir(families.sparse_model(dense, name, position=position), 0.1).cuda()
    ids = families.tokens(2, 200).cuda()
    mask = torch.ones_like(ids)
    mask[0, :37] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    for arguments in ({}, {"attention_mask": mask, "position_ids": positions},
                      {"position_ids": torch.cat([torch.arange(90), torch.arange(110)])[None].cuda()}):  # fmt: skip
        with hsa.implementation("triton"):
            loss, found = gradients(model, ids, **arguments)
        with hsa.implementation("reference"):
            expected_loss, expected = gradients(model, ids, **arguments)
        torch.testing.assert_close(loss, expected_loss, atol=1e-4, rtol=1e-4)
        assert found.keys() == expected.keys()
        # Of all parameters together: a bias of the keys without positions has a gradient of zero up to rounding.
        size = torch.stack([value.norm() for value in expected.values()]).norm()
        error = torch.stack([(found[key] - value).norm() for key, value in expected.items()]).norm()
        # The gradient of sparsemax jumps where a key enters the support, which rounding decides.
        assert error / size < (5e-2 if name == "sparsemax" else 5e-3), f"{error / size:.1e}"


@pytest.mark.gpu
def test_a_model_trains_compiled_without_a_graph_break():
    model = families.stir(families.sparse_model(families.dense_model("llama", head_dim=32, hidden_size=128)), 0.1)
    model = model.cuda().to(torch.bfloat16).train()
    ids = families.tokens(2, 256).cuda()
    with hsa.implementation("triton"):
        expected, _ = gradients(model, ids)
        compiled = torch.compile(model, fullgraph=True)
        loss = compiled(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
    torch.testing.assert_close(loss.detach(), expected, atol=2e-2, rtol=2e-2)
    assert all(torch.isfinite(value.grad).all() for value in model.parameters() if value.grad is not None)


@pytest.mark.gpu
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_on_the_gpu_equals_the_reference(cache):
    model = families.stir(families.sparse_model(families.dense_model("llama")), 0.1).cuda()
    ids = families.tokens(2, 40).cuda()
    mask = torch.ones_like(ids)
    mask[0, :11] = 0
    how = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, "attention_mask": mask}
    if cache == "static":
        how |= {"cache_implementation": "static", "disable_compile": True}
    with hsa.implementation("reference"):
        expected = model.generate(ids, **how)
    assert torch.equal(model.generate(ids, **how), expected)

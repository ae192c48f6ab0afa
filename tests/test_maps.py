"""The maps' factors and alphas against the papers' formulas, and configs that say what a model is."""

import itertools
import math

import families
import pytest
import torch
from torch.nn import functional as F
from transformers import Trainer

import hf_sparse_attention as hsa
from hf_sparse_attention import maps, models
from hf_sparse_attention.config import SparseAttentionConfig


def random_module(module, seed=0):
    torch.manual_seed(seed)
    for parameter in module.parameters():
        parameter.data.normal_()
    return module


def test_asentmax_factor_is_the_papers():
    scale = random_module(maps.ASEntmaxScale(3, 5, 100)).double()
    hidden, lengths = torch.randn(2, 7, 5).double(), torch.arange(2, 9)[None]
    beta = F.softplus(hidden @ scale.beta_bias_weight.T + scale.beta_bias + math.log(math.expm1(0.05)))
    gamma = 2 * torch.tanh(hidden @ scale.gamma_bias_weight.T + scale.gamma_bias)
    expected = 0.95 + scale.delta_bias + beta * lengths[..., None].double().log() ** gamma
    found = scale(hidden, lengths)
    assert found.shape == (2, 3, 7, 1)
    torch.testing.assert_close(found[..., 0].transpose(1, 2).double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_neutral_factor_is_one_in_every_dtype(dtype):
    scale = maps.ASEntmaxScale(4, 8, 100).to(dtype)
    for lengths in ([2], [3], [1000], [10**6]):
        assert torch.equal(scale(torch.randn(1, 1, 8).to(dtype), torch.tensor([lengths])), torch.ones(1, 4, 1, 1))


@pytest.mark.parametrize("length", [1, 2, 7, 512])
def test_ssmax_starts_with_a_mean_factor_of_one(length):
    scale = maps.SSMaxScale(2, 8, length)
    factor = scale(torch.zeros(1, length, 8), torch.arange(2, length + 2)[None])
    torch.testing.assert_close(factor.mean(dim=2), torch.ones(1, 2, 1), atol=1e-5, rtol=1e-5)
    random_module(scale)
    expected = (length / sum(math.log(n) for n in range(2, length + 2)) + scale.scale_bias) * math.log(9)
    torch.testing.assert_close(scale(torch.zeros(1, 1, 8), torch.tensor([[9]])).flatten(), expected)


def test_ssmax_at_the_mean_length_is_the_dense_model(monkeypatch):
    dense = families.dense_model("llama")
    model = families.sparse_model(dense, "ssmax", train_length=64)
    mean = math.exp(sum(math.log(n) for n in range(2, 66)) / 64)
    monkeypatch.setattr(
        "hf_sparse_attention.models.layers.visible_lengths",
        lambda mask, hidden: torch.full((1, hidden.shape[1]), mean),
    )
    ids = families.tokens(2, 19)
    with torch.no_grad():
        torch.testing.assert_close(
            model(ids, use_cache=False).logits, dense(ids, use_cache=False).logits, atol=1e-5, rtol=0
        )


def test_adaptive_alpha_is_the_papers_and_anneals():
    alpha = random_module(maps.AdaptiveAlpha(3))
    torch.testing.assert_close(alpha(1.5), 1 + torch.sigmoid(alpha.alpha_bias))
    assert torch.equal(alpha(1.0), torch.ones(3))


@pytest.mark.parametrize("name", list(hsa.MAPS))
def test_trainer_does_not_decay_what_a_map_adds(name):
    model = families.sparse_model(families.dense_model("llama"), name)
    decayed = set(Trainer.get_decay_parameter_names(None, model))
    assert decayed and not decayed & set(models.new_parameter_names(model))


def test_nape_leaves_half_of_the_heads_without_positions():
    assert maps.alibi_slopes(4).tolist() == [0, 0, 1, 0.5]
    assert maps.alibi_slopes(5).tolist() == [0, 0] + [1.0, 0.5, pytest.approx(1 / 3)]
    model = families.sparse_model(families.dense_model("llama"), "asentmax", position="nape")
    (_, layer), *_ = models.attention_layers(model)
    assert layer.sparse_scale.delta_bias.shape == (2,)


def test_nape_is_shift_invariant_where_rope_is_replaced():
    """Without rotary positions, position_ids have no influence but through documents."""
    model = families.sparse_model(families.dense_model("llama"), "entmax", position="nape")
    ids = families.tokens(1, 9)
    with torch.no_grad():
        here = model(ids, position_ids=torch.arange(9)[None], use_cache=False).logits
        there = model(ids, position_ids=torch.arange(100, 109)[None], use_cache=False).logits
        nowhere = families.sparse_model(families.dense_model("llama"), "entmax", position="nope")(ids).logits
    assert torch.equal(here, there)
    assert not torch.allclose(here, nowhere, atol=1e-3)


def test_the_factor_may_multiply_the_scores_of_all_heads():
    """The same as on half of them while it is 1; then the heads with ALiBi differ too, by their scores alone."""
    dense = families.dense_model("llama")
    half, whole = (families.sparse_model(dense, "asentmax", position=name) for name in ("nape", "nape_scaled"))
    ids = families.tokens(1, 9)
    layer = models.attention_layers(whole)[0][1]
    assert layer.has_alibi and layer.sparse_scale.delta_bias.shape == (4,)
    seen = []
    with torch.no_grad():
        assert torch.equal(half(ids, use_cache=False).logits, whole(ids, use_cache=False).logits)
        for factor in (1.0, 3.0):
            layer.sparse_scale.delta_bias[3] = factor - 1
            with hsa.attention.record(lambda module, query, key, tau, **rest: seen.append((query, key, rest))):
                whole(ids, use_cache=False)
    (query, _, rest), *_, (other, _, changed), _ = seen
    torch.testing.assert_close(other[:, 3], 3 * query[:, 3])
    assert torch.equal(other[:, :3], query[:, :3])
    assert torch.equal(rest["slopes"], changed["slopes"]) and rest["slopes"].tolist() == [0, 0, 1, 0.5]
    with pytest.raises(ValueError, match="map 'entmax' has no factor: choose 'nape'"):
        families.sparse_model(dense, "entmax", position="nape_scaled")


@pytest.mark.parametrize(
    ("name", "position"),
    [*itertools.product(hsa.MAPS, ["nape", "nope"]), ("asentmax", "nape_scaled"), ("ssmax", "nape_scaled")],
)
def test_every_map_and_position_decodes_as_it_prefills(name, position):
    model = families.stir(families.sparse_model(families.dense_model("llama"), name, position=position))
    ids = families.tokens(2, 12)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        step = model(ids[:, :5], use_cache=True)
        found = [step.logits]
        for index in range(5, 12):
            step = model(ids[:, index : index + 1], past_key_values=step.past_key_values, use_cache=True)
            found.append(step.logits)
    torch.testing.assert_close(torch.cat(found, 1), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["smollm3", "cohere2", "exaone4"])
def test_layers_without_rotary_positions_keep_that(name):
    model = families.sparse_model(families.dense_model(name), "asentmax", position="nape")
    layers = dict(models.attention_layers(model))
    assert [layers[0].has_alibi, layers[1].has_alibi] == [True, False]
    assert [len(layers[0].scaled_heads), len(layers[1].scaled_heads)] == [2, 4]


def test_layers_that_stay_dense_compute_softmax():
    dense = families.dense_model("qwen2")
    model = families.sparse_model(dense, "asentmax", layers="full_attention")
    assert [layer for layer, _ in models.attention_layers(model)] == [1]
    assert all("layers.1." in name for name in models.new_parameter_names(model))
    only = families.sparse_model(dense, "entmax", layers=[1])
    ids = families.tokens(2, 19)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, only(ids).logits)
        hsa.set_alpha(model, 1.0)
        torch.testing.assert_close(model(ids).logits, dense(ids).logits, atol=1e-5, rtol=0)


def test_set_alpha_reaches_layers_and_config():
    model = families.sparse_model(families.dense_model("llama"), "entmax")
    hsa.set_alpha(model, 1.25)
    assert model.config.sparse_attention["alpha"] == 1.25
    assert {layer.alpha for _, layer in models.attention_layers(model)} == {1.25}
    for alpha in (0.9, 4.5, math.nan):
        with pytest.raises(ValueError, match="alpha"):
            hsa.set_alpha(model, alpha)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"map": "softmax"}, "map is 'softmax'; choose one of entmax"),
        ({"map": "entmax", "alpha": 0.5}, "alpha is 0.5"),
        ({"map": "entmax", "alpha": "x"}, "alpha is 'x'"),
        ({"map": "entmax", "alpha": True}, "alpha is True"),
        ({"map": "sparsemax", "alpha": 2.5}, "sparsemax takes 1 <= alpha <= 2"),
        ({"map": "ssmax", "alpha": 1.5}, "ssmax takes 1 <= alpha <= 1"),
        ({"map": "entmax", "position": "alibi"}, "position is 'alibi'; choose one of rope"),
        ({"map": "entmax", "layers": "some"}, "layers is 'some'"),
        ({"map": "entmax", "layers": []}, "layers is"),
        ({"map": "entmax", "layers": [-1]}, "layer numbers"),
        ({"map": "entmax", "train_length": 0}, "train_length is 0"),
        ({"map": "entmax", "window": 7}, "unknown fields window"),
        ({"map": "entmax", "format": 99, "version": "9.0"}, "written by hf-sparse-attention 9.0"),
        (["entmax"], "must be a dict"),
    ],
)
def test_a_config_that_says_something_else_is_refused(values, message):
    with pytest.raises((ValueError, TypeError), match=message):
        SparseAttentionConfig.from_dict(values)


def test_every_number_of_a_layer_must_exist():
    with pytest.raises(ValueError, match=r"names \[2\], but the model has layers 0 to 1"):
        hsa.sparse_config(families.dense_config("llama"), SparseAttentionConfig(layers=(0, 2)))
    with pytest.raises(ValueError, match="all 2 layers have a sliding window"):
        hsa.sparse_config(families.dense_config("mistral"), SparseAttentionConfig(layers="full_attention"))

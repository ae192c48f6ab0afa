"""Tiles of queries with few keys in reach, settled in one program: the same bounds as elsewhere, and none too many."""

import functools

import pytest
import torch

triton = pytest.importorskip("triton")

from bounds import check_against_reference, run  # noqa: E402
from kernel_cases import random_case  # noqa: E402
from test_kernels import CUDA, DEVICE, HALF, WHOLE_AND_CUT, check, poisoned, randn, same_products, tile_lists  # noqa: E402, F401

from hf_sparse_attention import reference  # noqa: E402
from hf_sparse_attention.kernels import entmax_attention, operators  # noqa: E402
from hf_sparse_attention.kernels.configurations import TILE, configured  # noqa: E402

# NumPy, which the interpreter computes with, warns where a masked score of -inf meets arithmetic; the GPU does not.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")


@pytest.fixture
def settled(monkeypatch):
    """What of every call of a test was settled, (B, H, N/TILE), or None."""
    found = []
    settle = operators.settle

    def spy(*arguments):
        near = settle(*arguments)
        found.append(None if near is None else near.counts.clone() < -1)
        return near

    monkeypatch.setattr(operators, "settle", spy)
    return found


def inputs(length, dim=16, heads=2, keys=None, dtype=HALF):
    """query, key, value and a gradient of the output."""
    return (
        randn(1, count, size, dim, seed=seed, dtype=dtype)
        for seed, (count, size) in enumerate(
            ((heads, length), (1, keys or length), (1, keys or length), (heads, length))
        )
    )


@pytest.mark.parametrize("seed", range(40) if CUDA else (0, 1))
@pytest.mark.parametrize("mask", ["slopes", "slopes_window"])
def test_random_calls(mask, seed, poisoned):  # noqa: F811
    changes = {"stray_limit": 16 * (seed % 2), "near_tiles": 2 << seed % 3, "near_columns": TILE >> seed % 2}
    with configured(stray_forward=True, **changes):
        check(random_case(seed, device=DEVICE, mask=mask, dtype=HALF))


@pytest.mark.parametrize("alpha, rows, strays", [(1.5, 2 * TILE, 16), (2.0, TILE, 0), (1.333, 2 * TILE, 0)])
def test_steep_heads_are_settled_and_flat_ones_are_not(rows, strays, alpha, poisoned, settled):  # noqa: F811
    query, key, value, gradient = inputs(200, heads=4)
    slopes = torch.tensor([1.0, 0.0, 0.3, 1e-4], device=DEVICE)
    with configured(threshold_rows=rows, stray_limit=strays, stray_forward=True):
        check_against_reference(entmax_attention, query, key, value, gradient, alpha=alpha, slopes=slopes)
        with torch.no_grad():
            assert entmax_attention(query, key, value, alpha=alpha, slopes=slopes)[0].isfinite().all()
    for one in settled:
        assert one[0, [0, 2]].all() and not one[0, [1, 3]].any()


@pytest.mark.parametrize("name", WHOLE_AND_CUT)
def test_visible_ranges(name, poisoned, settled):  # noqa: F811
    visible = WHOLE_AND_CUT[name]
    slopes = torch.tensor([0.5, 0.2], device=DEVICE)
    check_against_reference(entmax_attention, *inputs(visible.shape[1]), visible=visible, slopes=slopes)
    assert settled[0].float().mean() > 0.5


def test_fewer_queries_than_keys_and_a_mask(poisoned, settled):  # noqa: F811
    query, key, value, gradient = inputs(70, keys=300)
    arguments = {"slopes": torch.tensor([0.5, 0.2], device=DEVICE)}
    check_against_reference(entmax_attention, query, key, value, gradient, **arguments)
    assert settled[-1].all()
    # The nearest keys of some queries are hidden: how far those reach is not known.
    mask = torch.rand(1, 1, 70, 300, generator=torch.Generator().manual_seed(0)).to(DEVICE) < 0.7
    mask[:, :, 3, 150:] = False
    mask[:, :, 68] = False
    check_against_reference(entmax_attention, query, key, value, gradient, mask=mask, **arguments)


def test_a_far_key_that_outweighs_the_slope_is_found(poisoned, settled):  # noqa: F811
    query, key, value, gradient = inputs(400)
    key[:, :, 5] *= 40
    query[:, :, 390] = key[:, :, 5] / 40 * 8
    slopes = torch.tensor([0.2, 0.1], device=DEVICE)
    with configured(near_tiles=2):
        check_against_reference(entmax_attention, query, key, value, gradient, slopes=slopes)
    identity = torch.eye(400, dtype=torch.float64, device=DEVICE)[None, None]
    weights = reference.attention(query.double(), key.double(), identity, slopes=slopes)
    assert (weights[0][:, :, 390, 5] > 0.5).all(), "the case has such a key"
    assert not settled[0][:, :, 390 // TILE].any()


def test_a_key_that_is_just_in_reach_is_found(poisoned, settled):  # noqa: F811
    query, key, value, gradient = inputs(400)
    # Only the last dimension counts for one query, of which the keys next to it have nothing; one has all of it.
    key[..., -1] = 0.0
    key[:, :, 200] = 0.0
    key[:, :, 200, -1] = 8.0
    query[:, :, 390] = 0.0
    query[:, :, 390, -1] = 10.0
    slopes = torch.tensor([0.1, 0.1], device=DEVICE)
    check_against_reference(entmax_attention, query, key, value, gradient, slopes=slopes)
    assert settled[0][0, :, 390 // TILE].all()


def test_keys_of_one_class_that_all_hold_weight_are_not_settled(poisoned, settled):  # noqa: F811
    """The keys of a class are 64 apart: of these only one would count in the bound, and tau would be too low."""
    query, key, value, gradient = inputs(300)
    key[:] = key[:, :, :TILE].repeat(1, 1, 5, 1)[:, :, :300]
    slopes = torch.tensor([0.01, 1.0], device=DEVICE)
    check_against_reference(entmax_attention, 3 * query, key, value, gradient, slopes=slopes)
    assert settled[0][:, 1].all() and not settled[0][:, 0, 1:].any()


def test_the_same_bits_and_no_second_way(settled):
    query, key, value, gradient = inputs(200)
    slopes = torch.tensor([0.5, 0.03], device=DEVICE)
    call = functools.partial(run, entmax_attention, query, key, value, gradient, slopes=slopes)
    first, second = call(), call()
    for name in ("query", "key", "value"):
        assert torch.equal(first.gradients[name], second.gradients[name])
    assert torch.equal(first.out, second.out) and torch.equal(first.tau, second.tau)
    with configured(near_tiles=0):
        other = call()
    assert settled[0].any() and settled[-1] is None
    assert torch.allclose(first.out, other.out, atol=2e-2) and torch.allclose(first.tau, other.tau, atol=1e-4)
    run(entmax_attention, query.float(), key.float(), value.float(), slopes=slopes)
    run(entmax_attention, query, key, value)
    run(entmax_attention, query, key, value, alpha=3.0, slopes=slopes)
    assert settled[-3:] == [None, None, None], "float32, no slopes, alpha above 2"


def test_operators_are_registered_whole():
    query, key, value = (randn(1, heads, 70, 16, seed=heads).requires_grad_() for heads in (4, 2, 2))
    arguments = (query, key, value, 1.5, None, 0.25, True, None, torch.ones(4, device=DEVICE), None, True)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.hf_sparse_attention.entmax_forward.default, arguments, test_utils=tests)


def test_a_configuration_says_what_no_kernel_takes():
    for name, value in (("near_tiles", 3), ("near_columns", 48)):
        with pytest.raises(ValueError, match=f"{name} is {value}"), configured(**{name: value}):
            pass

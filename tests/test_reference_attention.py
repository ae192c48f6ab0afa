"""The specification's attention: against dense weights, and what masks, padding and packing must not change."""

import math
import subprocess
import sys

import pytest
import torch
from bounds import GRADIENT_FACTOR, OUTPUT_FACTOR, check_against_reference, run
from torch.utils.checkpoint import checkpoint

from hf_sparse_attention import reference
from hf_sparse_attention.reference import tiles as tiles_module
from hf_sparse_attention.visible import visible_range

ALPHAS = (1.0, 1.05, 1.25, 1.5, 1.8, 2.0, 3.0)
DOUBLE = torch.float64


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def inputs(batch=2, heads=4, key_heads=2, queries=21, keys=21, dim=8, value_dim=None, dtype=DOUBLE):
    query = 2 * torch.randn(batch, heads, queries, dim, dtype=DOUBLE)
    key = torch.randn(batch, key_heads, keys, dim, dtype=DOUBLE)
    value = torch.randn(batch, key_heads, keys, value_dim or dim, dtype=DOUBLE)
    return [tensor.to(dtype).requires_grad_() for tensor in (query, key, value)]


def dense(query, key, value, **arguments):
    """The attention through its dense weights and PyTorch's own gradients."""
    weights = reference.attention_weights(query, key, **arguments)
    return weights @ value.repeat_interleave(query.shape[1] // value.shape[1], 1), weights


def same(actual, expected, tolerance=1e-11):
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


def document_starts(lengths):
    return torch.tensor([sum(lengths[:i]) for i, length in enumerate(lengths) for _ in range(length)])[None]


STRUCTURES = {
    "causal": {},
    "full": {"causal": False},
    "longer cache": {"keys": 40},
    "more queries than keys": {"keys": 9},
    "left padding": {"visible": visible_range(21, 21, batch=2, first_key=torch.tensor([0, 6]))},
    "right padding": {"visible": visible_range(21, 21, batch=2, last_key=torch.tensor([21, 13]))},
    "packed": {"visible": visible_range(21, 21, document_starts=document_starts([4, 1, 16]))},
    "window": {"visible": visible_range(21, 21, window=5)},
    "slopes": {"slopes": torch.tensor([0.0, 1.0, 0.5, 0.1], dtype=DOUBLE)},
    "slopes and window": {
        "slopes": torch.tensor([0.0, 1.0, 0.5, 0.1], dtype=DOUBLE),
        "visible": visible_range(21, 21, batch=2, window=9, first_key=torch.tensor([3, 0])),
    },
    "mask": {"mask": torch.rand(2, 1, 21, 21, generator=torch.Generator().manual_seed(1)) < 0.6},
    "mask per head": {
        "mask": torch.rand(4, 21, 21, generator=torch.Generator().manual_seed(2)) < 0.3,
        "causal": False,
    },
    "scaling": {"scaling": 0.77},
    "out of range": {"visible": torch.tensor([[-5, 99], [7, 3], [30, 40]]).repeat(7, 1)[None]},
}


def call_of(name, **shape):
    arguments = dict(STRUCTURES[name])
    keys = arguments.pop("keys", 21)
    return inputs(keys=keys, **shape), arguments


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("name", STRUCTURES)
def test_output_and_gradients_are_those_of_the_dense_weights(name, alpha):
    (query, key, value), arguments = call_of(name, value_dim=5)
    arguments["alpha"] = alpha
    expected, weights = dense(query, key, value, **arguments)
    direction = torch.randn_like(expected)
    expected_gradients = torch.autograd.grad(expected, (query, key, value), direction)
    out, tau = reference.attention(query, key, value, **arguments)
    gradients = torch.autograd.grad(out, (query, key, value), direction)
    tolerance = 1e-7 if alpha > 2 else 1e-11
    same(out, expected, tolerance)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        same(gradient, expected_gradient, tolerance)

    empty = weights.sum(-1) == 0
    assert torch.equal(torch.isposinf(tau), empty) and (out[empty] == 0).all() and (gradients[0][empty] == 0).all()
    assert torch.equal(reference.support_size(query, key, tau, **arguments), (weights > 0).sum(-1).int())
    for block in (4, 21, 64):
        padded = torch.nn.functional.pad(weights > 0, (0, -key.shape[2] % block, 0, -21 % block))
        expected = padded.unflatten(-1, (-1, block)).any(-1).unflatten(-2, (-1, block)).any(-2)
        assert torch.equal(reference.block_occupancy(query, key, tau, block=block, **arguments), expected)


@pytest.mark.parametrize("name", STRUCTURES)
@pytest.mark.parametrize("budget", (1, 700, 2**22))
def test_the_size_of_a_tile_changes_nothing(name, budget, monkeypatch):
    (query, key, value), arguments = call_of(name)
    arguments["alpha"] = torch.tensor([1.0, 1.2, 1.5, 1.9], dtype=DOUBLE, requires_grad=True)
    direction = torch.randn_like(query)
    whole = run(reference.attention, query, key, value, direction, **arguments)
    monkeypatch.setattr(tiles_module, "TILE_SCORES", {"cpu": budget, "other": budget})
    tiled = run(reference.attention, query, key, value, direction, **arguments)
    same(tiled.out, whole.out)
    same(tiled.tau, whole.tau)
    for key_name, gradient in whole.gradients.items():
        same(tiled.gradients[key_name], gradient)


@pytest.mark.parametrize("name", ("causal", "more queries than keys", "packed", "slopes and window", "mask"))
@pytest.mark.parametrize("alpha", (1.0, 1.2, 1.5, 2.0, "heads"))
def test_gradcheck(name, alpha):
    arguments = {key: value for key, value in STRUCTURES[name].items() if key != "keys"}
    for argument in ("visible", "mask"):
        if argument in arguments:
            arguments[argument] = (
                arguments[argument][..., :7, :] if argument == "visible" else arguments[argument][..., :7, :7]
            )
    tensors = inputs(batch=2 if name != "packed" else 1, queries=7, keys=4 if "more" in name else 7, dim=3)
    if alpha == "heads":
        alpha = torch.tensor([1.05, 1.3, 1.5, 1.9], dtype=DOUBLE, requires_grad=True)

    def out(query, key, value, alpha):
        return reference.attention(query, key, value, alpha=alpha, **arguments)[0]

    assert torch.autograd.gradcheck(out, (*tensors, alpha), atol=1e-6, nondet_tol=1e-12)


def test_alpha_per_head_is_that_head_alone():
    query, key, value = inputs(heads=4, key_heads=4)
    alpha = torch.tensor([1.0, 1.01, 1.5, 2.5], dtype=DOUBLE)
    out, tau = reference.attention(query, key, value, alpha=alpha)
    for head in range(4):
        one = slice(head, head + 1)
        own = reference.attention(query[:, one], key[:, one], value[:, one], alpha=alpha[head].item())
        same(out[:, one], own[0], 1e-8)
        same(tau[:, one], own[1], 1e-8)
    same(
        tau[:, :1],
        (query @ key.mT * 8**-0.5).masked_fill(~torch.ones(21, 21).tril().bool(), -math.inf).logsumexp(-1)[:, :1],
    )


def test_gradient_in_alpha_at_exactly_one_is_finite_and_the_limit():
    query, key, value = inputs()
    direction = torch.randn_like(query)
    gradients = []
    for excess in (0.0, 1e-7):
        alpha = torch.full((4,), 1 + excess, dtype=DOUBLE, requires_grad=True)
        gradients.append(run(reference.attention, query, key, value, direction, alpha=alpha).gradients["alpha"])
    same(gradients[0], gradients[1], 1e-5)
    assert gradients[0].abs().min() > 1e-3


def test_softmax_is_that_of_pytorch():
    query, key, value = inputs()
    out, _ = reference.attention(query, key, value, alpha=1)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    same(out, expected)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_the_future_has_no_gradient(alpha):
    query, key, value = inputs()
    out, _ = reference.attention(query, key, value, alpha=alpha)
    for gradient in torch.autograd.grad(out[:, :, :10].sum(), (key, value), retain_graph=True):
        assert (gradient[:, :, 10:] == 0).all() and (gradient[:, :, :10] != 0).any()


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("slopes", (None, torch.tensor([0.0, 1.0, 0.5, 0.1], dtype=DOUBLE)))
@pytest.mark.parametrize("side", ("left", "right"))
def test_padding_changes_nothing(side, slopes, alpha):
    query, key, value = inputs()
    length = 13
    real = slice(21 - length, 21) if side == "left" else slice(0, length)
    ends = {"first_key": torch.tensor([0, 8])} if side == "left" else {"last_key": torch.tensor([21, length])}
    visible = visible_range(21, 21, batch=2, **ends)
    out, tau = reference.attention(query, key, value, alpha=alpha, visible=visible, slopes=slopes)
    alone = [tensor[1:, :, real] for tensor in (query, key, value)]
    expected, expected_tau = reference.attention(*alone, alpha=alpha, slopes=slopes)
    tolerance = 1e-8 if alpha > 2 else 1e-12
    same(out[1:, :, real], expected, tolerance)
    same(tau[1:, :, real], expected_tau, tolerance)
    if side == "left":
        assert (out[1, :, :8] == 0).all() and torch.isposinf(tau[1, :, :8]).all()
    # What stands at the padding reaches nothing, not even through a gradient.
    gradients = torch.autograd.grad(out[1:, :, real].sum(), (key, value))
    hidden = torch.ones(21, dtype=torch.bool)
    hidden[real] = False
    assert all((gradient[1][:, hidden] == 0).all() for gradient in gradients)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("slopes", (None, torch.tensor([0.0, 1.0, 0.5, 0.1], dtype=DOUBLE)))
def test_packed_documents_are_as_apart(slopes, alpha):
    lengths = [4, 1, 16]
    query, key, value = inputs(batch=1)
    visible = visible_range(21, 21, document_starts=document_starts(lengths))
    out, tau = reference.attention(query, key, value, alpha=alpha, visible=visible, slopes=slopes)
    start = 0
    for length in lengths:
        own = slice(start, start + length)
        alone = [tensor[:, :, own] for tensor in (query, key, value)]
        expected, expected_tau = reference.attention(*alone, alpha=alpha, slopes=slopes)
        same(out[:, :, own], expected, 1e-8 if alpha > 2 else 1e-12)
        same(tau[:, :, own], expected_tau, 1e-8 if alpha > 2 else 1e-12)
        start += length


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("window", (None, 6))
@pytest.mark.parametrize("slopes", (None, torch.tensor([0.0, 1.0, 0.5, 0.1], dtype=DOUBLE)))
def test_prefill_and_decoding_are_the_full_pass(slopes, window, alpha):
    query, key, value = inputs()
    arguments = {"alpha": alpha, "slopes": slopes}
    out, tau = reference.attention(query, key, value, visible=visible_range(21, 21, window=window), **arguments)
    for first, last in ((0, 15), (15, 18), *((i, i + 1) for i in range(18, 21))):
        # A static cache is longer than what is written; the offset says where the queries stand.
        for keys in (last, 21):
            visible = visible_range(last - first, keys, query_offset=first, window=window)
            part = [query[:, :, first:last], key[:, :, :keys], value[:, :, :keys]]
            part_out, part_tau = reference.attention(*part, visible=visible, **arguments)
            same(part_out, out[:, :, first:last], 1e-8 if alpha > 2 else 1e-12)
            same(part_tau, tau[:, :, first:last], 1e-8 if alpha > 2 else 1e-12)


@pytest.mark.parametrize("name", ("left padding", "right padding", "packed", "window", "out of range"))
def test_a_range_is_the_mask_it_stands_for(name):
    (query, key, value), arguments = call_of(name)
    visible = arguments["visible"]
    position = torch.arange(21)
    mask = (position >= visible[..., :1]) & (position < visible[..., 1:])
    by_range = run(reference.attention, query, key, value, torch.ones_like(query), visible=visible)
    by_mask = run(reference.attention, query, key, value, torch.ones_like(query), mask=mask[:, None], causal=False)
    same(by_range.out, by_mask.out)
    same(by_range.tau, by_mask.tau)
    for gradient_name, gradient in by_range.gradients.items():
        same(gradient, by_mask.gradients[gradient_name])
    if name == "window":
        band = torch.ones(21, 21).tril().triu(-4).bool()
        assert torch.equal(mask[0], band)


def test_slopes_are_alibi():
    query, key, value = inputs()
    slopes = torch.tensor([0.0, 1.0, 0.5, 0.1], dtype=DOUBLE)
    position = torch.arange(21, dtype=DOUBLE)
    bias = -slopes[:, None, None] * (position[:, None] - position)
    scores = query @ key.repeat_interleave(2, 1).mT * 8**-0.5 + bias
    weights = reference.entmax(scores.masked_fill(~torch.ones(21, 21).tril().bool(), -math.inf), 1.5)
    same(reference.attention(query, key, value, slopes=slopes)[0], weights @ value.repeat_interleave(2, 1))


def test_a_batch_of_empty_rows_is_zero():
    query, key, value = inputs()
    nothing = torch.zeros(2, 21, 2, dtype=torch.int64)
    for hidden in ({"visible": nothing}, {"mask": torch.zeros(1, 1, 1, 1, dtype=torch.bool)}):
        for alpha in (1.0, 1.3, 1.5, torch.full((4,), 1.4, dtype=DOUBLE, requires_grad=True)):
            results = run(reference.attention, query, key, value, torch.ones_like(query), alpha=alpha, **hidden)
            assert (results.out == 0).all() and torch.isposinf(results.tau).all()
            assert all((gradient == 0).all() for gradient in results.gradients.values())
            weights = reference.attention_weights(query, key, alpha=alpha, **hidden)
            assert (weights == 0).all()


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize(
    ("length", "dim"), [(1, 8), (63, 8), (63, 80), (111, 128), (111, 256), (1000, 64)], ids=lambda size: str(size)
)
def test_the_error_is_that_of_the_dtype(length, dim, dtype):
    query, key, value = inputs(1, 4, 2, queries=length, keys=length, dim=dim, dtype=dtype)
    direction = torch.randn(query.shape).to(dtype)
    for alpha in (1.0, 1.1, 1.5, 2.0):
        results = run(reference.attention, query, key, value, direction, alpha=alpha)
        exact = run(reference.attention, query.double(), key.double(), value.double(), direction.double(), alpha=alpha)
        assert results.out.dtype == dtype and results.tau.dtype == torch.float32
        # One rounding to the dtype at the end, plus float32's of scores that reach about 20 in sums of dim terms.
        eps = torch.finfo(dtype).eps + 60 * torch.finfo(torch.float32).eps
        same(results.tau.double(), exact.tau, 1e-5)
        assert (results.out - exact.out).abs().max() <= eps * exact.out.abs().max()
        for name, gradient in results.gradients.items():
            assert gradient.dtype == dtype and gradient.isfinite().all()
            bound = 4 * eps * max(exact.gradients[name].abs().max(), 1e-3)
            assert (gradient - exact.gradients[name]).abs().max() <= bound, (alpha, name)


def test_large_scores_in_half_precision_give_no_nan():
    query, key, value = inputs(dtype=torch.float16)
    for alpha in (1.0, 1.01, 1.5, 2.0):
        scaled = (query.detach() * 100).requires_grad_()
        results = run(reference.attention, scaled, key, value, torch.ones_like(query), alpha=alpha)
        assert results.out.isfinite().all() and all(g.isfinite().all() for g in results.gradients.values())


def test_the_reference_passes_its_own_bounds_and_a_worse_one_does_not():
    query, key, value = inputs(dtype=torch.bfloat16)
    alpha = torch.tensor([1.0, 1.2, 1.5, 1.9], requires_grad=True)
    direction = torch.randn(query.shape).to(torch.bfloat16)
    ratios = check_against_reference(reference.attention, query, key, value, direction, alpha=alpha)
    assert set(ratios) == {"tau", "out", "dquery", "dkey", "dvalue", "dalpha"}
    assert max(ratios.values()) <= 1 and OUTPUT_FACTOR == 2 and GRADIENT_FACTOR == 3

    def worse(query, key, value, **arguments):
        out, tau = reference.attention(query, key, value, **arguments)
        return out * 1.02, tau

    with pytest.raises(AssertionError, match="out: error"):
        check_against_reference(worse, query, key, value, direction, alpha=1.5)

    def coarse(query, key, value, **arguments):
        # Off by 2^-19, as if a score had lost the last four bits of float32.
        return reference.attention(query * (1 + 2.0**-19), key, value, **arguments)

    with pytest.raises(AssertionError, match="tau: error"):
        check_against_reference(coarse, query.float(), key.float(), value.float(), direction.float(), alpha=1.5)


def test_autocast_computes_in_float32():
    query, key, value = inputs(dtype=torch.float32)
    expected = run(reference.attention, query, key, value, torch.ones_like(query))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results = run(reference.attention, query, key, value, torch.ones_like(query))
        mixed, _ = reference.attention(query, key, value.bfloat16())
        weights = reference.attention_weights(query, key)
    assert torch.equal(results.out, expected.out) and mixed.dtype == torch.float32
    assert all(torch.equal(results.gradients[name], expected.gradients[name]) for name in expected.gradients)
    assert torch.equal(weights, reference.attention_weights(query, key))


# Dynamo looks at .grad of what leaves the graph break, and hides the warning that pytest has made an error by then.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_gradient_checkpointing_and_compile_change_nothing():
    query, key, value = inputs()
    alpha = torch.full((4,), 1.3, dtype=DOUBLE, requires_grad=True)

    def loss(query, key, value, alpha):
        return (reference.attention(query * 2, key, value, alpha=alpha)[0] ** 2).sum()

    tensors = (query, key, value, alpha)
    expected = torch.autograd.grad(loss(*tensors), tensors)
    for variant in (
        lambda *tensors: checkpoint(loss, *tensors, use_reentrant=False),
        torch.compile(loss, backend="aot_eager"),
    ):
        for gradient, expected_gradient in zip(torch.autograd.grad(variant(*tensors), tensors), expected, strict=True):
            same(gradient, expected_gradient)


def test_keys_may_come_as_views():
    query, key, value = inputs()
    expected, _ = reference.attention(query, key, value)
    views = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in (query, key, value)]
    assert torch.equal(reference.attention(*views)[0], expected)
    expanded = torch.randn(1, 1, 21, 8, dtype=DOUBLE).expand(2, 2, -1, -1)
    same(
        reference.attention(query, expanded, expanded)[0],
        reference.attention(query, expanded.clone(), expanded.clone())[0],
    )


def test_nothing_to_compute():
    query, key, value = inputs(queries=0)
    out, tau = reference.attention(query, key, value)
    assert out.shape == (2, 4, 0, 8) and tau.shape == (2, 4, 0)
    query, key, value = inputs(keys=0)
    out, tau = reference.attention(query, key, value)
    assert (out == 0).all() and torch.isposinf(tau).all()
    assert reference.attention_weights(query, key).shape == (2, 4, 21, 0)


Q, K, V = inputs()
BAD = {
    "3 query heads": ((Q[:, :3], K, V), {}, ValueError),
    "query has shape": ((Q[0], K, V), {}, ValueError),
    "batch and dim": ((Q, K[..., :4], V), {}, ValueError),
    "value has shape": ((Q, K, V[:, :, :5]), {}, ValueError),
    "key is torch.float32": ((Q, K.float(), V), {}, ValueError),
    "value is on meta": ((Q, K, V.to("meta")), {}, ValueError),
    "query is torch.int64": ((Q.long(), K, V), {}, TypeError),
    "alpha=0.5": ((Q, K, V), {"alpha": 0.5}, ValueError),
    "alpha=nan": ((Q, K, V), {"alpha": math.nan}, ValueError),
    r"alpha=\[1.5, 1.5, nan, 1.5\]": ((Q, K, V), {"alpha": torch.tensor([1.5, 1.5, math.nan, 1.5])}, ValueError),
    r"alpha has shape \(3,\)": ((Q, K, V), {"alpha": torch.full((3,), 1.5)}, ValueError),
    r"visible has shape \(21, 2\)": ((Q, K, V), {"visible": torch.zeros(21, 2, dtype=torch.int32)}, ValueError),
    "visible is torch.float32": ((Q, K, V), {"visible": torch.zeros(1, 21, 2)}, TypeError),
    "visible is on meta": (
        (Q, K, V),
        {"visible": torch.zeros(1, 21, 2, dtype=torch.int32, device="meta")},
        ValueError,
    ),
    "mask is torch.float32": ((Q, K, V), {"mask": torch.zeros(21, 21)}, TypeError),
    r"mask has shape \(20, 21\)": ((Q, K, V), {"mask": torch.zeros(20, 21, dtype=torch.bool)}, ValueError),
    "mask is on meta": ((Q, K, V), {"mask": torch.zeros(21, 21, dtype=torch.bool, device="meta")}, ValueError),
    r"slopes has shape \(2,\)": ((Q, K, V), {"slopes": torch.ones(2)}, ValueError),
    "slopes is torch.int64": ((Q, K, V), {"slopes": torch.ones(4, dtype=torch.int64)}, TypeError),
    "slopes requires a gradient": ((Q, K, V), {"slopes": torch.ones(4, requires_grad=True)}, ValueError),
    "slopes with causal=False": ((Q, K, V), {"slopes": torch.ones(4), "causal": False}, ValueError),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message):
    tensors, arguments, error = BAD[message]
    with pytest.raises(error, match=message):
        reference.attention(*tensors, **arguments)


def test_bad_tau_and_block_are_named():
    tau = reference.attention(Q, K, V)[1]
    with pytest.raises(ValueError, match="tau has shape"):
        reference.support_size(Q, K, tau[:, :2])
    with pytest.raises(ValueError, match="block=0"):
        reference.block_occupancy(Q, K, tau, block=0)


def test_visible_range_by_hand():
    assert visible_range(2, 5).tolist() == [[[0, 4], [0, 5]]]
    assert visible_range(2, 5, causal=False).tolist() == [[[0, 5], [0, 5]]]
    assert visible_range(2, 5, window=3).tolist() == [[[1, 4], [2, 5]]]
    assert visible_range(2, 5, query_offset=1).tolist() == [[[0, 2], [0, 3]]]
    assert visible_range(1, 5, batch=2, query_offset=torch.tensor([1, 3])).tolist() == [[[0, 2]], [[0, 4]]]
    assert visible_range(2, 2, batch=2, first_key=torch.tensor([0, 1])).tolist() == [
        [[0, 1], [0, 2]],
        [[1, 1], [1, 2]],
    ]
    assert visible_range(2, 2, document_starts=torch.tensor([[0, 1]])).tolist() == [[[0, 1], [1, 2]]]
    assert visible_range(3, 1).tolist() == [[[0, 0], [0, 0], [0, 1]]]
    assert visible_range(2, 5).dtype == torch.int32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"window": 0}, "window=0"),
        ({"window": 3, "causal": False}, "window needs causal=True"),
        ({"query_offset": 3, "causal": False}, "query_offset needs causal=True"),
        ({"first_key": torch.zeros(3, dtype=torch.int64), "batch": 2}, r"first_key has shape \(3,\)"),
        ({"last_key": torch.zeros(1)}, "last_key has dtype torch.float32"),
        ({"document_starts": torch.zeros(1, 3, dtype=torch.int64)}, r"document_starts has shape \(1, 3\)"),
        ({"batch": 0}, "batch=0"),
    ],
)
def test_bad_structures_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        visible_range(4, 4, **arguments)


def peak_memory(heads, length):
    """Gibibytes of a process at its peak after one forward and backward, and before it."""
    program = f"""
import resource, torch
from hf_sparse_attention import reference
torch.set_num_threads(1)
tensors = [torch.randn(1, {heads}, {length}, 64, requires_grad=True) for _ in range(3)]
reference.attention(*[tensor[:, :, :64] for tensor in tensors])[0].sum().backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
reference.attention(*tensors)[0].sum().backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    output = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    # ru_maxrss counts kilobytes on Linux, bytes on macOS.
    before, after = (int(line) / (2**30 if sys.platform == "darwin" else 2**20) for line in output.split())
    return before, after


@pytest.mark.skipif(sys.platform == "win32", reason="resource is a Unix module")
def test_memory_is_linear_in_the_keys():
    # One matrix of 8,192 x 8,192 scores alone is 0.25 GiB; the backward of a dense implementation holds several.
    before, after = peak_memory(1, 8192)
    assert after - before < 0.2


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="resource is a Unix module")
def test_four_heads_of_16384_tokens_fit_in_4_gibibytes():
    assert peak_memory(4, 16384)[1] < 4

"""Kernels that take sparse tiles apart: the same results as without, and every pair above the bound in one place."""

import dataclasses
import functools

import pytest
import torch

triton = pytest.importorskip("triton")

from bounds import check_against_reference, run  # noqa: E402
from kernel_cases import random_case  # noqa: E402
from test_kernels import (  # noqa: E402, F401
    CUDA,
    DEVICE,
    DTYPES,
    HALF,
    check,
    compiled_side_by_side,
    poisoned,
    randn,
    same_products,
    tile_lists,
)

from hf_sparse_attention import benchmark  # noqa: E402
from hf_sparse_attention.kernels import configurations, entmax_attention, gather, operators  # noqa: E402
from hf_sparse_attention.kernels.configurations import TILE, configured  # noqa: E402

# NumPy, which the interpreter computes with, warns where a masked score of -inf meets arithmetic; the GPU does not.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
LENGTHS = (63, 111, 129, 333, 1000, 2049) if CUDA else (63, 111, 200, 330)


@pytest.fixture(autouse=True)
def strays_in_every_call():
    with configured(stray_forward=True):
        yield


@pytest.fixture
def short_lists(monkeypatch):
    """Lists of one tile are taken apart too, two tiles at a time, and no queries are walked in pairs."""
    monkeypatch.setattr(gather, "FEWEST", 1)
    monkeypatch.setattr(gather, "SEGMENT", 2)
    with configured(threshold_rows=TILE):
        yield


@pytest.fixture
def collected(monkeypatch):
    """What the calls of a test took apart: (call, bound, lists before and after, strays)."""
    found = []

    def collect(call, bound, lists, save, *near):
        before = [(rows, tiles.clone(), counts.clone()) for rows, tiles, counts in lists.walks()]
        strays = gather.collect(call, bound, lists, save, *near)
        found.append((call, bound, before, lists, strays))
        return strays

    monkeypatch.setattr(operators, "collect", collect)
    return found


def strays_of(strays, head, row_tile, rows, queries):
    """(query, key) pairs and scores of a tile or pair of tiles of queries, in their order."""
    first = row_tile * rows
    count = strays.counts[0, head, first // TILE].item()
    places = torch.arange(count)
    at = (first + places // strays.room).to(strays.codes.device), (places % strays.room).to(strays.codes.device)
    codes, scores = strays.codes[0, head][at], strays.scores[0, head][at]
    return list(zip((first + (codes >> 21)).tolist(), (codes & 0x1FFFFF).tolist(), strict=True)), scores


@pytest.mark.parametrize("limit, inner", [(15, 64), (60, 64), (60, 32)])
def test_every_pair_above_the_bound_is_in_a_listed_tile_or_a_stray(limit, inner, short_lists, collected, poisoned):  # noqa: F811
    queries, heads = 330, 2
    query, key, value = (randn(1, count, queries, 32, seed=seed) for seed, count in enumerate((heads, 1, 1)))
    # One tile of keys that most queries want, so that lists keep tiles and lose tiles.
    query = 3 * query + 1.0
    key[:, :, 128:160] += 0.7
    with configured(stray_limit=limit, stray_room=16, inner=inner):
        entmax_attention(query.requires_grad_(), key, value, alpha=1.5)
    [(call, bound, before, lists, strays)] = collected
    x = 0.5 * (call.query.detach().double() @ call.key.double().transpose(-1, -2)) * 32**-0.5
    x = x.masked_fill(~torch.ones(queries, queries, dtype=torch.bool, device=DEVICE).tril(), -torch.inf)
    alive, moved, kept_total = x > bound[..., None], 0, 0
    for (rows, old_tiles, old_counts), (_, tiles, counts) in zip(before, lists.walks(), strict=True):
        assert torch.equal(old_counts < 0, counts < 0)
        for head, row_tile in (old_counts[0] >= 0).nonzero().tolist():
            old = old_tiles[0, head, row_tile, : old_counts[0, head, row_tile]].tolist()
            kept = tiles[0, head, row_tile, : counts[0, head, row_tile]].tolist()
            assert kept == sorted(set(kept)) and set(kept) <= set(old)
            pairs, scores = strays_of(strays, head, row_tile, rows, queries)
            assert len(set(pairs)) == len(pairs), "a pair is there once"
            first = row_tile * rows
            expected = alive[0, head, first : first + rows].nonzero()
            expected = {(first + row, column) for row, column in expected.tolist() if column // TILE not in kept}
            # A score may round to the other side of the bound; tau is farther away.
            assert all(
                (x[0, head, pair[0], pair[1]] - bound[0, head, pair[0]]).abs() < 1e-6 for pair in set(pairs) ^ expected
            )
            # By tile, word, query and bit: a word has the columns of 8 that stand at the same places, of one piece.
            words = [key % TILE // inner * (inner // 32) + key % 8 // (256 // inner) for _, key in pairs]
            bits = [(key % 8 // 2, key % inner // 8, key % 2) for _, key in pairs]
            order = [(pair[1] // TILE, word, pair[0], bit) for pair, word, bit in zip(pairs, words, bits, strict=True)]
            assert order == sorted(order), "the order hangs on nothing but the pairs"
            exact = torch.tensor([x[0, head, query, key] for query, key in pairs], dtype=torch.float64)
            assert torch.allclose(scores.double().cpu(), exact, atol=1e-5)
            moved, kept_total = moved + len(pairs), kept_total + len(kept)
            # The two maps, by tile of keys, that the key gradient walks.
            walked = lists.tile_map[0, head, :, first // TILE]
            assert (walked % 4).nonzero()[:, 0].tolist() == kept
            cells = torch.where(walked == 4, strays.tile_map[0, head, :, first // TILE], 0).tolist()
            for tile, cell in enumerate(cells):
                mine = [place for place, (_, key) in enumerate(pairs) if key // TILE == tile]
                assert cell & 255 == len(mine) <= limit * rows // TILE
                assert not mine or mine == list(range(cell >> 8, (cell >> 8) + len(mine)))
    assert moved > 0 and kept_total > 0, "the case has both"


# On the CPU 24 and 26, of alpha 3 and 4, miss the factors by the same with and without strays.
SEEDS = (
    # Alpha 4: out at 2.5 times on an H200. So is the reference in 16 of 20 other orders of its head dimension.
    (
        pytest.param(
            20, marks=pytest.mark.xfail(raises=AssertionError, reason="rounding decides, for the reference too")
        ),
        *range(21, 80),
    )
    if CUDA
    else (21, 22, 23, 25, 28, 29, 31, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (20, 27, 30)))
)


@pytest.mark.parametrize("seed", SEEDS)
def test_random_calls(seed, short_lists, poisoned):  # noqa: F811
    case = random_case(seed, device=DEVICE, lengths=LENGTHS, dtypes=DTYPES, budget=1 << (40 if CUDA else 17))
    # Pairs of rows as wide as these have no room in a multiprocessor's shared memory. Above alpha 2 they are float32.
    alpha = case.arguments["alpha"]
    size = 4 if not isinstance(alpha, torch.Tensor) and alpha > 2 else case.query.element_size()
    wide = size * case.query.shape[-1] > 256
    rows = TILE if wide else TILE * (1 + seed % 2)
    with configured(stray_limit=(64, 20)[seed % 3 > 0], stray_room=(24, 5)[seed % 4 > 1], threshold_rows=rows):
        check(case)


@pytest.mark.parametrize(
    "length, keys, head_dim", [(1, 1, 8), (1, 300, 256), (63, 63, 80), (130, 450, 64), (100, 70, 9)]
)
def test_lengths(length, keys, head_dim, short_lists, poisoned):  # noqa: F811
    query, gradient = (randn(1, 2, length, head_dim, seed=seed) for seed in range(2))
    key, value = (randn(1, 1, keys, head_dim, seed=seed) for seed in range(2, 4))
    with configured(stray_limit=64):
        check_against_reference(entmax_attention, 2 * query, key, value, gradient, alpha=1.5)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("seed", range(500, 700))
def test_many_random_calls(seed, compiled_side_by_side, poisoned):  # noqa: F811
    lengths = LENGTHS if seed % 4 else (111, 3000, 4097, 8191, 20000)
    with configured(stray_limit=(64, 16)[seed % 2], stray_stages=1 + seed % 3):
        check(random_case(seed, device=DEVICE, lengths=lengths, dtypes=DTYPES, budget=1 << 27))


def test_queries_that_share_their_tiles_are_walked_in_pairs_and_have_none(monkeypatch, collected, poisoned):  # noqa: F811
    monkeypatch.setattr(gather, "FEWEST", 1)
    query, key, value, gradient = (randn(1, heads, 384, 16, seed=heads) for heads in (2, 1, 1, 2))
    query[:, :, :128] *= 0.1
    query[:, :, 128:] *= 5
    with configured(stray_limit=60):
        check_against_reference(entmax_attention, query, key, value, gradient, alpha=1.5, causal=False)
    lists, strays = collected[0][-2:]
    together = lists.pair_counts.repeat_interleave(2, -1) >= 0
    assert together[..., :2].all() and not together[..., 2:].any() and torch.equal(together, lists.counts < 0)
    assert (strays.counts[together] == 0).all() and (strays.counts[~together] > 0).all()


@pytest.mark.parametrize("alpha", [1.333, 1.5, 2.0, 3.0])
def test_strays_at_every_alpha(alpha, short_lists, collected, poisoned):  # noqa: F811
    query, key, value, gradient = (randn(1, heads, 200, 16, dtype=torch.float32, seed=heads) for heads in (2, 1, 1, 2))
    with configured(stray_limit=255):
        check_against_reference(entmax_attention, 3 * query, key, value, gradient, alpha=alpha)
    assert (collected[0][-1].counts[..., ::2] > 0).any()


def test_alpha_per_head_has_its_gradient(short_lists, collected, poisoned):  # noqa: F811
    query, key, value, gradient = (randn(1, heads, 140, 16, seed=heads) for heads in (2, 1, 1, 2))
    alpha = torch.tensor([1.4, 2.0], device=DEVICE, requires_grad=True)
    attend = functools.partial(run, entmax_attention, 3 * query, key, value, gradient, alpha=alpha)
    plain = attend().gradients["alpha"]
    with configured(stray_limit=64):
        found = attend().gradients["alpha"]
    assert (collected[-1][-1].counts > 0).any() and torch.allclose(found, plain, rtol=1e-5)


def test_strays_can_be_left_to_calls_with_a_backward(short_lists, collected):
    query, key, value = (randn(1, heads, 210, 16, seed=heads) for heads in (2, 1, 1))
    with configured(stray_limit=64, stray_forward=False):
        entmax_attention(4 * query, key, value)
        entmax_attention((4 * query).requires_grad_(), key, value)
    alone, trained = (strays for *_, strays in collected)
    assert alone is None and (trained.counts > 0).any()


@pytest.mark.parametrize("head_dim", [8, 80, 128])
def test_without_a_backward_the_output_holds_the_strays(head_dim, short_lists, collected, poisoned):  # noqa: F811
    query, key, value = (randn(1, heads, 210, head_dim, seed=heads) for heads in (2, 1, 1))
    with configured(stray_limit=64, stray_room={8: 2, 80: 16, 128: 32}[head_dim]):
        out, tau = entmax_attention(4 * query, key, value)
        kept_out, kept_tau = entmax_attention((4 * query).requires_grad_(), key, value)
    with configured(stray_limit=0):
        plain, *_ = entmax_attention(4 * query, key, value)
    strays, kept, none = (strays for *_, strays in collected)
    assert strays.pool.data_ptr() == out.data_ptr() and kept.out is None and none is None
    assert torch.equal(strays.counts[..., ::2], kept.counts[..., ::2]) and (kept.counts[..., ::2] > 0).any()
    # Where a backward follows the last steps of the refinement are others.
    torch.testing.assert_close(tau, kept_tau, atol=2e-6, rtol=1e-6)
    # One rounding of the output.
    torch.testing.assert_close(out, kept_out, atol=1e-3, rtol=1e-2 if HALF is torch.bfloat16 else 2e-3)
    assert (out.double() - plain.double()).norm() < 4 * torch.finfo(HALF).eps * plain.double().norm()


def test_equal_scores_leave_the_tiles_in_their_lists(short_lists, collected, poisoned):  # noqa: F811
    query, key, value = torch.zeros_like(randn(1, 2, 300, 16)), randn(1, 1, 300, 16), randn(1, 1, 300, 16, seed=1)
    with configured(stray_limit=64):
        out, _ = entmax_attention(query, key, value)
    mean = value.float().cumsum(2) / torch.arange(1, 301, device=DEVICE)[:, None]
    assert (out.float() - mean).abs().max() < 4 * torch.finfo(HALF).eps
    [(_, _, before, lists, strays)] = collected
    assert all(torch.equal(old, new) for (_, _, old), (_, _, new) in zip(before, lists.walks(), strict=True))
    assert (strays.counts[..., ::2] == 0).all()


def test_short_lists_are_walked_as_they_are(collected):
    query, key, value = (randn(1, 1, 180, 16, seed=seed) for seed in range(3))
    with configured(stray_limit=64):
        entmax_attention(query, key, value)
        entmax_attention(*(tensor.repeat(1, 1, 2, 1) for tensor in (query, key, value)), causal=False)
    [(*_, none), (_, _, before, lists, strays)] = collected
    assert none is None and strays is not None
    assert sum(counts[counts > 0].numel() for _, _, counts in lists.walks()) > 0
    for (_, _, old), (_, _, new) in zip(before, lists.walks(), strict=True):
        assert torch.equal(old[old < 4], new[old < 4])


def test_the_search_stops_where_most_tiles_stay(monkeypatch, collected):
    monkeypatch.setattr(gather, "SEGMENT", 2)
    # Two tiles of keys that every query wants a little of, then one key each.
    queries, keys = 64, 64 * 8
    key = torch.zeros(1, 1, keys, 16, device=DEVICE, dtype=HALF)
    key[:, :, :128, 0] = 1.0
    key[:, :, 128::64, 0] = 1.02
    query = torch.full((1, 1, queries, 16), 1.0, device=DEVICE, dtype=HALF)
    with configured(stray_limit=64):
        found, _ = entmax_attention(query, key, key, causal=False)
    plain, _ = entmax_attention(query, key, key, causal=False)
    [(_, _, before, lists, strays), _] = collected
    assert max(counts.max() for _, _, counts in before) == 8
    assert max(counts.max() for _, _, counts in lists.walks()) == 8 and strays.counts[0, 0, 0] == 0
    assert torch.equal(found, plain)


def test_rows_that_see_nothing_are_zero(short_lists, poisoned):  # noqa: F811
    query, key, value = (randn(1, 2, 70, 16, dtype=torch.float32, seed=seed) for seed in range(3))
    visible = torch.stack([torch.zeros(70), torch.arange(70) * (torch.arange(70) % 3 > 0)], -1).to(DEVICE, torch.int32)
    with configured(stray_limit=64):
        results = run(entmax_attention, 3 * query, key, value, torch.ones_like(query), visible=visible[None])
    hidden = visible[:, 1] == 0
    assert (results.out[:, :, hidden] == 0).all() and (results.gradients["query"][:, :, hidden] == 0).all()
    assert torch.isposinf(results.tau[:, :, hidden]).all() and torch.isfinite(results.tau[:, :, ~hidden]).all()


def test_two_runs_give_the_same_bits(short_lists, poisoned):  # noqa: F811
    tensors = (randn(1, heads, 200, 16, seed=heads) for heads in (2, 1, 1, 2))
    attend = functools.partial(run, entmax_attention, *tensors)
    with configured(stray_limit=64):
        first, second = attend(), attend()
    assert torch.equal(first.out, second.out)
    assert all(torch.equal(first.gradients[name], second.gradients[name]) for name in first.gradients)


def test_a_graph_can_be_walked_twice_and_without_the_setting(short_lists):
    query, key, value = (3 * randn(1, heads, 140, 16, seed=heads).requires_grad_() for heads in (2, 1, 1))
    with configured(stray_limit=64):
        out, _ = entmax_attention(query, key, value)
        first = torch.autograd.grad(out.float().square().sum(), (query, key, value), retain_graph=True)
    # The forward decided what the backward walks.
    second = torch.autograd.grad(out.float().square().sum(), (query, key, value))
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


@pytest.mark.parametrize("stray_limit", [0, 64])
def test_whole_tiles_that_the_map_tells_give_the_causal_gradients(stray_limit, short_lists):
    query, key, value = (2 * randn(1, heads, 200, 16, seed=heads).requires_grad_() for heads in (2, 1, 1))
    ends = torch.arange(1, 201, device=DEVICE)
    visible = torch.stack([torch.zeros_like(ends), ends], -1)[None].int()
    with configured(stray_limit=stray_limit):
        causal, told = (
            torch.autograd.grad(
                entmax_attention(query, key, value, visible=ranges)[0].float().square().sum(), (query, key, value)
            )
            for ranges in (None, visible)
        )
    for one, two in zip(causal, told, strict=True):
        # The order of the sums over the tiles is another.
        assert (two.double() - one.double()).norm() < 4 * torch.finfo(HALF).eps * one.double().norm()


@pytest.mark.parametrize("length", [70, 260])
def test_the_operator_knows_the_shapes(length):
    query, key, value = (randn(1, heads, length, 16, seed=heads).requires_grad_() for heads in (2, 1, 1))
    arguments = (query, key, value, 1.5, None, 0.25, True, None, None, None, True)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    with configured(stray_limit=64):
        torch.library.opcheck(torch.ops.hf_sparse_attention.entmax_forward.default, arguments, test_utils=tests)


def test_configured_ends_with_its_block_and_no_row_is_on_unmeasured():
    device = torch.device("cpu")
    plain = configurations.configuration(device, 2, 128)
    with pytest.raises(KeyError), configured(stray_limit=7):
        assert configurations.configuration(device, 2, 128).stray_limit == 7
        raise KeyError
    assert configurations.configuration(device, 2, 128) == plain
    for changes in ({"stray_limits": 7}, {"stray_limit": -1}, {"stray_room": 0}, {"inner": 48}, {"pair_tenths": 11}):
        with pytest.raises(ValueError, match=next(iter(changes))), configured(**changes):
            pass
    with pytest.raises(ValueError, match="inner"), configured(inner=16), configured(stray_limit=64):
        pass
    assert all(configurations._default(size, 64).stray_limit == 0 for size in (2, 4))


@pytest.mark.parametrize("arguments", [{"changes": ["stray_limit"]}, {"changes": ["inner=32"], "tune": True}])
def test_changes_the_benchmark_cannot_time_are_refused(arguments):
    with pytest.raises(ValueError, match="changes"):
        benchmark.benchmark_attention(benchmark.BenchmarkArguments(**arguments))


def test_changes_go_on_top_of_the_rows_in_use():
    device = torch.device("cpu")
    ask = functools.partial(configurations.configuration, device, 2, 16)
    plain = ask()
    rows = {(configurations.device_name(device), 2, 16): dataclasses.replace(plain, stray_limit=9, stray_room=4)}
    with configurations.use(rows), configured(stray_limit=7):
        assert (ask().stray_limit, ask().stray_room) == (7, 4)
        # What was compiled for a configuration is found by the object.
        assert ask() is ask()
    with configured(stray_limit=7), configurations.use(rows):
        assert (ask().stray_limit, ask().stray_room) == (7, 4)
        with configured(stray_room=8):
            assert (ask().stray_limit, ask().stray_room) == (7, 8)
    assert ask() is plain
    for name, value in (("stray_limit", -1), ("collect_programs", 0), ("collect", 4), ("stray_stages", "2")):
        row = configurations.to_row("cpu", 2, 16, plain)["configuration"]
        with pytest.raises(ValueError, match=name):
            configurations.from_dict({**row, name: value})

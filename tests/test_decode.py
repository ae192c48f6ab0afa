"""Decoding kernels beside the reference: compiled on a GPU, else in Triton's interpreter."""

import functools
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")

import bounds  # noqa: E402
import families  # noqa: E402
from bounds import check_against_reference  # noqa: E402
from kernel_cases import random_case  # noqa: E402
from test_cache import check_balls  # noqa: E402
from test_kernels import CUDA, DEVICE, DTYPES, HALF, poisoned, randn, same_products  # noqa: E402, F401
from torch._inductor.utils import run_and_get_code  # noqa: E402
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache  # noqa: E402

import hf_sparse_attention as hsa  # noqa: E402
from hf_sparse_attention import attention, reference  # noqa: E402
from hf_sparse_attention.cache import BALL, PAGE, STATE  # noqa: E402
from hf_sparse_attention.kernels import decode, entmax_attention  # noqa: E402
from hf_sparse_attention.kernels.configurations import TILE, configured  # noqa: E402
from hf_sparse_attention.kernels.decode import bounds as bounds_kernel  # noqa: E402
from hf_sparse_attention.kernels.decode import launch, output, scores, threshold  # noqa: E402
from hf_sparse_attention.kernels.decode import pages as page_kernels  # noqa: E402
from hf_sparse_attention.train import TrainArguments, train_model  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

LENGTHS = (1, 64, 100, 333, 1000, 4097, 20000) if CUDA else (1, 63, 64, 130, 333, 700)
FEW = (1, 1, 1, 2, 5, 16)


@pytest.fixture(autouse=True)
def on_these_kernels():
    with decode.decoding(True):
        yield


def test_a_card_that_was_not_measured_runs_the_forward_of_training(monkeypatch):
    """Unless the cache has bounds of its pages, which is asking for these kernels."""
    ran = []

    def noticed(*arguments):
        ran.append("decode")
        return decode.entmax_decode(*arguments)

    monkeypatch.setattr("hf_sparse_attention.kernels.entmax_decode", noticed)
    query, key, value = randn(1, 4, 2, 16, seed=1), randn(1, 2, 130, 16, seed=2), randn(1, 2, 130, 16, seed=3)
    expected = entmax_attention(query, key, value)[0]
    assert ran == ["decode"]
    with decode.decoding(False):
        torch.testing.assert_close(entmax_attention(query, key, value)[0], expected, atol=2e-3, rtol=1e-2)
        assert ran == ["decode"]
        entmax_attention(query, key, value, pages=bounds_of(key))
        assert ran == ["decode", "decode"]


def bounds_of(key, length=None):
    """(lower, upper, codes, ball) of the whole pages by the kernel; one more page, which must not be read, is NaN."""
    length = key.shape[2] if length is None else length
    lower, upper = (key.new_full((*key.shape[:2], key.shape[2] // TILE + 1, key.shape[3]), torch.nan) for _ in "lu")
    codes = torch.full_like(lower, -128, dtype=torch.int8)
    ball = torch.full((*lower.shape[:3], BALL), torch.nan, device=key.device)
    bounds_kernel.update_bounds(key, lower, upper, codes, ball, None, 0, length)
    return lower, upper, codes, ball


def spy_on_scores(monkeypatch, name, fill, look):
    """Fills an argument of the first pass over the keys before each launch, unless None -> a list of what is seen."""
    kernel, seen = scores.scores_kernel, []

    class Spy:
        arg_names = kernel.arg_names

        def __getitem__(self, grid):
            def run(*arguments, **keywords):
                tensor = arguments[list(kernel.arg_names).index(name)]
                if fill is not None:
                    tensor.fill_(fill)
                kernel[grid](*arguments, **keywords)
                seen.append(look(tensor))

            return run

    monkeypatch.setattr(scores, "scores_kernel", Spy())
    return seen


def spied_pages(monkeypatch):
    """A list that comes to hold the pages each call reads for its first row tile, besides those that give a bound."""
    return spy_on_scores(monkeypatch, "list_ptr", -1, lambda lists: sorted(set(lists[0].tolist()) - {-1}))


@torch.no_grad()
def check(case, pages):
    def attend(query, key, value, **arguments):
        return entmax_attention(query, key, value, pages=bounds_of(key) if pages else None, **arguments)

    return check_against_reference(attend, case.query, case.key, case.value, **case.arguments)


# Seed 0 has alpha 4 and a key whose score is 4e-7 above tau: float32's rounding decides its weight, for both.
@pytest.mark.parametrize("seed", range(1, 60) if CUDA else (1, 2, 3, 4, 6))
@pytest.mark.parametrize("how", ["plain", "in small pieces", "pages"])
def test_random_calls(seed, how, poisoned, monkeypatch):  # noqa: F811
    if how == "in small pieces":
        # As with many tiles: the newest and the oldest keys come first, whatever is taken at once is not all, and some
        # rows of a program have few keys, others many.
        monkeypatch.setattr(scores, "LEAST_TILES", 1)
        monkeypatch.setattr(output, "AT_ONCE", 256)
        monkeypatch.setattr(scores, "AT_ONCE", 64)
        monkeypatch.setattr(threshold, "HELD", 2)
        monkeypatch.setattr(threshold, "SEARCHED", 4)
        monkeypatch.setattr(threshold, "SEARCH", 2)
        monkeypatch.setattr(threshold, "AT_ONCE", 128)
    check(
        random_case(
            seed + 1000, device=DEVICE, lengths=LENGTHS, few=FEW, dtypes=DTYPES, budget=1 << (20 if CUDA else 14)
        ),
        how == "pages",
    )


@pytest.fixture
def other_processes_share_the_card():
    """What this test's process keeps for itself it gives back: pytest -m slow -n 8 runs eight of them."""
    yield
    torch.cuda.empty_cache()


@pytest.mark.parametrize("head_dim", [160, 256])
@pytest.mark.parametrize("alpha", [3.0, (1.5, 2.5)])
def test_many_channels_above_alpha_two(head_dim, alpha, poisoned):  # noqa: F811
    """In half precision their products are added up in short sums, the last of them beyond the end of 160 channels."""
    query, key, value = (randn(1, heads, keys, head_dim, seed=keys) for heads, keys in ((2, 3), (1, 300), (1, 300)))
    alpha = torch.tensor(alpha, device=DEVICE) if isinstance(alpha, tuple) else alpha
    check_against_reference(entmax_attention, query, key, value, alpha=alpha)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.usefixtures("other_processes_share_the_card")
@pytest.mark.parametrize("seed", range(2000, 2300))
def test_many_random_calls(seed, poisoned):  # noqa: F811
    lengths = (1, 111, 4097, 20000) if seed % 3 else (65536, 131072, 200000)
    case = random_case(seed, device=DEVICE, lengths=lengths, few=FEW, dtypes=DTYPES, budget=1 << 23)
    check(case, pages=seed % 2 == 0)


@pytest.mark.parametrize("seed", range(20))
def test_what_large_calls_are_compared_with_is_the_same_in_pieces(seed, monkeypatch):
    case = random_case(seed, lengths=(63, 200), few=FEW, dtypes=DTYPES)
    tensors, whole = (case.query, case.key, case.value, None), []
    for most in (1 << 40, 1):
        monkeypatch.setattr(bounds, "PIECE", most)
        whole.append(bounds.rounded_terms(*tensors, case.arguments))
        named = dict(zip(("query", "key", "value", "gradient"), tensors, strict=True))
        whole[-1].append(bounds.reference_in_pieces(named, case.arguments, lambda name, piece, index: piece.double()))
    for one, other in zip(*whole, strict=True):
        torch.testing.assert_close(other.out, one.out, atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(other.tau, one.tau, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("path", ["decode", "short", "long"])
def test_a_step_beyond_every_key_is_not_taken_for_the_end(path, poisoned):  # noqa: F811
    """alpha 4: from -0.4995, where the first halving ends, Newton leads to 0.0003 right of the largest score."""
    key = torch.zeros(1, 1, 16, 16, device=DEVICE)
    key[0, 0, :, 0] = torch.tensor([24.8542522, 24.6948051, 24.5615394, 22.4494193] + [0.0] * 12)
    query, value = torch.zeros_like(key[:, :, :1]), torch.randn_like(key)
    query[..., 0] = 1 / 3
    arguments = {"alpha": 4.0, "scaling": 1.0}
    with decode.decoding(path == "decode"), configured(**({"short_keys": 0} if path == "long" else {})):
        _, tau = entmax_attention(query, key, value, **arguments)
    _, exact = reference.attention(query.double(), key.double(), value.double(), **arguments)
    torch.testing.assert_close(tau.double(), exact, atol=1e-4, rtol=0)


@pytest.mark.parametrize("alpha", [1.5, 2.0, 3.0])
def test_values_without_weight_are_not_read(alpha, poisoned):  # noqa: F811
    query, key, value = randn(1, 4, 1, 16, seed=1) * 3, randn(1, 2, 500, 16, seed=2), randn(1, 2, 500, 16, seed=3)
    expected, _ = entmax_attention(query, key, value, alpha=alpha)
    weights = reference.attention_weights(query.float(), key.float(), alpha=alpha)
    # Far enough from the threshold that rounding does not decide.
    hidden = (weights.unflatten(1, (2, 2)).amax((2, 3)) == 0)[..., None].expand_as(value)
    assert 0.5 < hidden.float().mean() < 1
    found, _ = entmax_attention(query, key, value.masked_fill(hidden, torch.nan), alpha=alpha)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("alpha", [1.2, 1.5, 2.0, 3.0])
def test_scores_below_a_bound_from_the_newest_keys_are_not_written(alpha, monkeypatch):
    """Nor read: what is there before would be the largest score of all."""
    written = spy_on_scores(
        monkeypatch, "scores_ptr", 1e4, lambda stored: (stored != 1e4).any(-1).float().mean().item()
    )
    query, key, value = randn(1, 1, 1, 16, seed=1), randn(1, 1, 1000, 16, seed=2), randn(1, 1, 1000, 16, seed=3)
    key[:, :, -20:] += query * 3
    expected = entmax_attention(query, key, value, alpha=alpha)
    monkeypatch.setattr(scores, "LEAST_TILES", 1)
    found = entmax_attention(query, key, value, alpha=alpha)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    assert written[0] > written[1] > 0


def test_pages_that_cannot_hold_weight_are_not_read(poisoned, monkeypatch):  # noqa: F811
    codes = randn(1, 1, 12, 16, seed=4) * 3
    key = (codes.repeat_interleave(TILE, 2) + randn(1, 1, 12 * TILE, 16, seed=5) * 0.1)[:, :, :-10]
    query, value = (codes[:, :, 3:4] / 2).repeat(1, 2, 1, 1), randn(*key.shape, seed=6)
    expected, expected_tau = entmax_attention(query, key, value)
    pages, read = bounds_of(key), spied_pages(monkeypatch)
    broken_key, broken_value = key.clone(), value.clone()
    for page in range(11):
        if page != 3:
            broken_key[:, :, page * TILE : (page + 1) * TILE] = torch.nan
            broken_value[:, :, page * TILE : (page + 1) * TILE] = torch.nan
    found, tau = entmax_attention(query, broken_key, broken_value, pages=pages)
    # The page aimed at, and the last one, which is not whole; seeds may be read elsewhere, but weigh nothing.
    assert read == [[3, 11]]
    assert torch.equal(found, expected) and torch.equal(tau, expected_tau)


@pytest.mark.parametrize("together", [2, 4])
def test_the_bound_of_tau_holds_whichever_pages_give_it(together, poisoned, monkeypatch):  # noqa: F811
    """Heads and queries that ask for the same pages, in another order, or for the newest one: no key counts twice."""
    monkeypatch.setattr(page_kernels, "SEEDS", together)
    bounds = spy_on_scores(monkeypatch, "bound_ptr", None, torch.clone)
    asked = [[1, 2], [2, 1], [5, 1], [5, 5], [0, 3]]
    for queries, heads, newest, alpha in ((1, 4, 0, 1.5), (1, 1, 30, 1.2), (3, 2, 0, 2.0)):
        codes = randn(1, 2, 6, 16, dtype=torch.float32, seed=queries) * 3
        key = (codes.repeat_interleave(TILE, 2) + randn(1, 2, 6 * TILE, 16, dtype=torch.float32, seed=9) * 0.2).to(
            HALF
        )
        key = key[:, :, : key.shape[2] - newest]
        rows = [codes[:, :, pages].mean(2) for pages in (asked * 3)[: queries * heads]]
        query = torch.stack(rows, 2).unflatten(2, (heads, queries)).flatten(1, 2).to(HALF)
        _, tau = entmax_attention(query, key, key, alpha=alpha)
        entmax_attention(query, key, key, alpha=alpha, pages=bounds_of(key))
        # Rows go query by query.
        found = bounds.pop().unflatten(1, (queries, heads)).mT.flatten(0, 1).reshape(tau.shape)
        assert torch.isfinite(found).all() and (found <= tau).all() and (found > tau - 0.6).all()


def test_bounds_rest_where_the_pages_they_save_take_less_time_than_they_do(monkeypatch):
    """Few pages: 7 of 8 are not read, and yet reading them all is faster."""
    monkeypatch.setattr(launch, "MOST_SPLITS", 1)
    codes = randn(1, 1, 8, 16, seed=4) * 3
    key = codes.repeat_interleave(TILE, 2) + randn(1, 1, 8 * TILE, 16, seed=5) * 0.1
    read = spied_pages(monkeypatch)
    for worth, left in ((launch.WORTH, page_kernels.REST), (0, 0)):
        monkeypatch.setattr(launch, "WORTH", worth)
        state = torch.zeros(STATE, dtype=torch.int32, device=DEVICE)
        entmax_attention(codes[:, :, 3:4] / 2, key, key, pages=(*bounds_of(key), state))
        assert read.pop() == [3] and state.tolist() == [left, 0, 0]


@pytest.mark.parametrize("pages", [[0, 2, 4, 6, 8, 10, 12], [0, 1, 2, 3, 4, 5, 6], [9, 10, 11, 12, 13, 14, 15]])
def test_pages_are_dealt_out_evenly_wherever_they_lie(pages, poisoned, monkeypatch):  # noqa: F811
    """A step lasts as long as its longest program, and the bounds rest by what that one reads."""
    monkeypatch.setattr(launch, "MOST_SPLITS", 2)
    monkeypatch.setattr(launch, "WORTH", 0)
    monkeypatch.setattr(scores, "AT_ONCE", 4)
    codes = torch.eye(16, device=DEVICE).to(HALF)[None, None] * 4
    key = codes.repeat_interleave(TILE, 2)
    query = codes[:, :, pages].sum(2, keepdim=True)
    expected = entmax_attention(query, key, key)
    read = spied_pages(monkeypatch)
    work = spy_on_scores(monkeypatch, "work_ptr", None, torch.Tensor.tolist)
    state = torch.zeros(STATE, dtype=torch.int32, device=DEVICE)
    found = entmax_attention(query, key, key, pages=(*bounds_of(key), state))
    assert read == [pages] and work == [[[[4, 8], [3, 8]]]] and state.tolist() == [0, 0, 0]
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_minimum_and_maximum_spare_pages_that_a_ball_lets_through(poisoned, monkeypatch):  # noqa: F811
    """Keys of a page that differ much in one channel, of which the query asks nothing."""
    codes = torch.eye(16, device=DEVICE)[None, None, :12].to(HALF) * 4
    key = codes.repeat_interleave(TILE, 2) + randn(1, 1, 12 * TILE, 16, seed=5) * 0.1
    key[..., 15] = randn(1, 1, 12 * TILE, seed=6) * 20
    query = (codes[:, :, 3:4] / 2).repeat(1, 2, 1, 1)
    query[..., 15] = 0
    pages, value = bounds_of(key), randn(*key.shape, seed=7)
    expected = entmax_attention(query, key, value)
    broken = torch.where(torch.arange(12 * TILE, device=DEVICE)[:, None] // TILE == 3, value, torch.nan)
    for most in (1, 128):
        monkeypatch.setattr(launch, "MOST_SPLITS", most)
        for asked, at_once, least in ((0, 4, 1), (0, 32, 1), (1000, 32, 12)):
            monkeypatch.setattr(launch, "ASKED", asked)
            monkeypatch.setattr(launch, "ASKED_AT_ONCE", at_once)
            assert decode.share_of_pages_read(query, key, pages) == least / 12
            found = entmax_attention(query, key, broken, pages=pages)
            assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_bounds_that_do_not_help_rest_and_are_tried_again(monkeypatch):
    monkeypatch.setattr(launch, "MOST_SPLITS", 1)
    monkeypatch.setattr(launch, "WORTH", 0)
    query, key, value = randn(1, 2, 1, 16, seed=1) / 10, randn(1, 1, 700, 16, seed=2), randn(1, 1, 700, 16, seed=3)
    state = torch.zeros(STATE, dtype=torch.int32, device=DEVICE)
    pages = bounds_of(key)
    expected = entmax_attention(query, key, value)[0]
    for left in (page_kernels.REST, page_kernels.REST - 1):
        found = entmax_attention(query, key, value, pages=(*pages, state))[0]
        if left < page_kernels.REST:
            # While they rest nothing is different.
            assert torch.equal(found, expected)
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
        assert state.tolist() == [left, 0, 0]
        # While they rest they are not read: wrong ones change nothing.
        pages = [torch.full_like(tensor, -9) for tensor in pages]
    state[0] = 1
    entmax_attention(query, key, value, pages=(*pages, state))
    assert state.tolist() == [0, 0, 0]
    # Keys of one page are far above the others: from then on the bounds are used.
    key[:, :, 64:128] += 4 * query[:, :1].sign()
    query = query[:, :1].repeat(1, 2, 1, 1) * 50
    for _ in range(2):
        entmax_attention(query, key, value, pages=(*bounds_of(key), state))
        assert state.tolist() == [0, 0, 0]


def test_every_program_arrives_also_those_of_rows_that_do_not_exist(monkeypatch, poisoned):  # noqa: F811
    """20 rows in tiles of 16: 12 programs of the second have no row. A counter that is left stops the next call."""
    monkeypatch.setattr(launch, "MOST_ROWS", 16)
    monkeypatch.setattr(launch, "REST", 0)
    query, key, value = randn(1, 4, 5, 16, seed=1) * 2, randn(1, 1, 400, 16, seed=2), randn(1, 1, 400, 16, seed=3)
    expected, expected_tau = entmax_attention(query, key, value)
    state = torch.zeros(STATE, dtype=torch.int32, device=DEVICE)
    first = None
    for _ in range(2):
        found, tau = entmax_attention(query, key, value, pages=(*bounds_of(key), state))
        assert state.tolist() == [0, 0, 0]
        torch.testing.assert_close(tau, expected_tau, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(found, expected, atol=2e-3, rtol=2e-3)
        first = found if first is None else first
        assert torch.equal(found, first)


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 64])
def test_who_waits_for_the_bounds_never_waits_for_ever(batch, monkeypatch):
    """Many more programs than a card runs at a time, and many calls one after the other: the same bits every time."""
    monkeypatch.setattr(launch, "REST", 0)
    codes = randn(batch, 8, 32, 64, seed=4) * 3
    key = codes.repeat_interleave(TILE, 2) + randn(batch, 8, 32 * TILE, 64, seed=5) * 0.1
    query = (codes[:, :, 3:4] / 2).repeat_interleave(4, 1)
    expected = entmax_attention(query, key, key)
    state, pages = torch.zeros(STATE, dtype=torch.int32, device=DEVICE), bounds_of(key)
    first = entmax_attention(query, key, key, pages=(*pages, state))
    for _ in range(500):
        found = entmax_attention(query, key, key, pages=(*pages, state))
    for one, again, full in zip(found, first, expected, strict=True):
        assert torch.equal(one, again)
        torch.testing.assert_close(one, full, atol=1e-2, rtol=1e-2)
    assert state.tolist() == [0, 0, 0]


# What keys could break a bound: heavy tails, one huge channel, equal keys, both signs of zero, flipped signs, the
# largest and the smallest numbers.
ADVERSARIES = {
    "random": lambda x: x,
    "heavy tails": lambda x: x / x.roll(1, 2).abs().clamp(min=1e-2),
    "one channel": lambda x: x * (1 + 100 * (torch.arange(x.shape[-1], device=x.device) == 2)),
    "constant": lambda x: x[:, :, :1].expand_as(x).contiguous(),
    "flipped": lambda x: x[:, :, :1] * torch.where(torch.arange(x.shape[2], device=x.device) % 2 > 0, 1, -1)[:, None],
    "zeros": lambda x: torch.where(x > 0, 0.0, -0.0).to(x.dtype),
    "huge": lambda x: x * 2000,
    "tiny": lambda x: x * 1e-6,
    "one of each page": lambda x: x * (torch.arange(x.shape[2], device=x.device) % TILE == 7)[:, None],
    "rounded": lambda x: (x * 8).round() / 8,
}


@pytest.mark.parametrize("name", ADVERSARIES)
def test_no_keys_break_the_bounds(name, poisoned):  # noqa: F811
    for seed in range(40 if CUDA else 2):
        dtype = DTYPES[seed % len(DTYPES)]
        shape = (1, 1, (200, 333, 129)[seed % 3], (16, 32, 24)[seed % 3])
        key = ADVERSARIES[name](randn(*shape, dtype=torch.float32, seed=seed)).to(dtype)
        query = (randn(1, 2, 1 + seed % 2, shape[-1], seed=seed + 50) * (0.3, 1, 5)[seed % 3]).to(dtype)
        value = randn(*shape, dtype=torch.float32, seed=seed + 90).to(dtype)
        for alpha in (1.5, 2.0, 1.2, 3.0) if CUDA else (1.5, 2.0, 1.2)[seed : seed + 1]:
            expected, expected_tau = entmax_attention(query, key, value, alpha=alpha)
            found, tau = entmax_attention(query, key, value, alpha=alpha, pages=bounds_of(key))
            torch.testing.assert_close(tau, expected_tau, atol=1e-6, rtol=1e-6)
            eps = torch.finfo(dtype).eps if alpha <= 2 else 1e-2
            torch.testing.assert_close(found, expected, atol=4 * eps, rtol=4 * eps)


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_numbers_whose_squares_vanish_or_overflow_keep_their_bounds(scale):
    query, key, value = (randn(1, 1, length, 16, dtype=torch.float32, seed=length) for length in (1, 450, 451))
    query, key = query * 3 / scale, key * scale
    expected = entmax_attention(query, key, value[:, :, :450])[0]
    found = entmax_attention(query, key, value[:, :, :450], pages=bounds_of(key))[0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_bound_that_is_too_tight_shows(monkeypatch):
    """What the search above looks for can be seen: bounds that hold for no key lose the keys."""
    query, key, value = randn(1, 1, 1, 16, seed=1) * 3, randn(1, 1, 400, 16, seed=2), randn(1, 1, 400, 16, seed=3)
    lower, upper, codes, ball = bounds_of(key)
    wrong = [torch.full_like(bounds, -9.0) * query[:, :, :1].sign() for bounds in (lower, upper)]
    expected = entmax_attention(query, key, value)[0]
    # Asked for of however few pages.
    monkeypatch.setattr(launch, "ASKED", 0)
    assert not torch.allclose(entmax_attention(query, key, value, pages=(*wrong, codes, ball))[0], expected, atol=1e-2)
    # A radius that is too short loses them alike.
    found = entmax_attention(query, key, value, pages=(lower, upper, codes, torch.zeros_like(ball)))[0]
    assert not torch.allclose(found, expected, atol=1e-2)


def test_keys_that_are_no_numbers_are_not_hidden():
    query, key, value = (randn(1, 1, length, 16, seed=length) for length in (1, 300, 300))
    key[0, 0, 70, 3] = torch.nan
    lower, upper, codes, ball = bounds_of(key)
    assert ball[0, 0, 1, 1].isnan() and not ball[0, 0, 0].isnan().any()
    assert lower[0, 0, 1, 3].isnan() and upper[0, 0, 1, 3].isnan() and not lower[0, 0, 0].isnan().any()
    with pytest.MonkeyPatch.context() as patch:
        read = spied_pages(patch)
        entmax_attention(query, key, value, pages=(lower, upper, codes, ball))
    assert 1 in read[0]


@pytest.mark.parametrize("static", [False, True])
def test_bounds_grow_with_the_keys(static):
    """By the kernel, in pieces of any length, as a growing or a static cache counts."""
    key = randn(2, 2, 400, 24, seed=7)
    lower, upper = (key.new_full((2, 2, 6, 24), torch.nan) for _ in "lu")
    codes, ball = torch.full_like(lower, -128, dtype=torch.int8), torch.full((2, 2, 6, BALL), torch.nan, device=DEVICE)
    length = 0
    for piece in (1, 62, 1, 64, 130, 5, 100, 1):
        length += piece
        now = torch.tensor(length, device=DEVICE)
        old, new = (0, piece) if static else (length - piece, length)
        bounds_kernel.update_bounds(key, lower, upper, codes, ball, now if static else None, old, new)
    whole = length // TILE
    pages = key[:, :, : whole * TILE].unflatten(2, (whole, TILE))
    assert torch.equal(lower[:, :, :whole], pages.amin(3)) and torch.equal(upper[:, :, :whole], pages.amax(3))
    assert all(bounds[:, :, whole:].isnan().all() for bounds in (lower, upper, ball))
    assert (codes[:, :, whole:] == -128).all()
    check_balls(pages, codes[:, :, :whole], ball[:, :, :whole])
    assert PAGE == TILE and STATE == page_kernels.STATE and BALL == bounds_kernel.BALL


def test_caches_of_any_strides_and_a_length_on_the_device(poisoned):  # noqa: F811
    """A static cache's tail is not read, whatever it holds, and the result is that of the written keys alone."""
    room = torch.full((2, 300, 2, 16), torch.nan, dtype=HALF, device=DEVICE).transpose(1, 2)
    key, value = room.clone(memory_format=torch.preserve_format), room
    key[:, :, :201], value[:, :, :201] = randn(2, 2, 201, 16, seed=1), randn(2, 2, 201, 16, seed=2)
    query = randn(2, 3, 4, 16, seed=3).transpose(1, 2)
    visible = torch.tensor([[[0, 199], [0, 200], [0, 201]], [[0, 0], [50, 51], [50, 201]]], device=DEVICE)
    found, tau = entmax_attention(query, key, value, visible=visible, pages=bounds_of(key, 201))
    expected, expected_tau = entmax_attention(query, key[:, :, :201], value[:, :, :201], visible=visible)
    assert torch.equal(found, expected) and torch.equal(tau, expected_tau)
    assert (found[1, :, 0] == 0).all() and torch.isposinf(tau[1, :, 0]).all()


def test_two_runs_give_the_same_bits(poisoned):  # noqa: F811
    case = random_case(1, device=DEVICE, lengths=(700,), few=(3,), dtypes=(HALF,), mask="packed")
    first, second = (entmax_attention(case.query, case.key, case.value, **case.arguments) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


def test_the_operator_is_registered_whole():
    query, key = randn(1, 4, 1, 16), randn(1, 2, 130, 16)
    state = torch.zeros(STATE, dtype=torch.int32, device=DEVICE)
    arguments = (query, key, key, 1.5, None, 0.25, True, None, None, None, *bounds_of(key), state)
    operator = torch.ops.hf_sparse_attention.entmax_decode.default
    torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


def test_wrong_bounds_are_refused():
    query, key = randn(1, 2, 1, 16), randn(1, 2, 200, 16)
    pages = bounds_of(key)
    for place, wrong, reason in (
        (0, pages[0][:, :, :2], r"lower bounds .* need \(1, 2, 3, 16\)"),
        (1, pages[1][:, :1], "upper bounds of pages have shape"),
        (0, pages[0].double(), "lower bounds of pages are torch.float64"),
        (2, pages[2].short(), "codes of pages are torch.int16 on .*, not torch.int8"),
        (2, pages[2][:, :, :2], r"codes .* need \(1, 2, 3, 16\)"),
        (3, pages[3][..., :2], r"balls .* need \(1, 2, 3, 3\)"),
        (3, pages[3].to("meta"), "balls of pages are torch.float32 on meta"),
    ):
        with pytest.raises(ValueError, match=reason):
            entmax_attention(query, key, key, pages=(*pages[:place], wrong, *pages[place + 1 :]))
    for wrong, reason in (
        (torch.zeros(1, dtype=torch.int32, device=DEVICE), r"int32 \(1,\), not contiguous int32 \(3,\)"),
        (torch.zeros(3, device=DEVICE), "float32"),
        (torch.zeros(6, dtype=torch.int32, device=DEVICE)[::2], "not contiguous"),
        (torch.zeros(3, dtype=torch.int32, device="meta"), "on meta"),
    ):
        with pytest.raises(ValueError, match=reason):
            entmax_attention(query, key, key, pages=(*pages, wrong))


@pytest.mark.slow
def test_every_configuration_compiles_for_hopper():
    """Without a GPU: what registers cannot hold would show as a stack, and shared memory has a limit."""
    calls = [
        "bfloat16:128:32:8:1:1.5:1:0:0", "float16:128:32:8:1:2.0:0:0:0", "bfloat16:128:32:8:16:1.5:1:0:0",
        "bfloat16:64:32:8:1:1.333:1:1:0", "float16:80:32:4:4:2.0:0:0:1", "float32:128:32:8:1:1.5:1:0:0",
        "bfloat16:256:8:1:16:1.5:0:0:0", "float16:8:2:2:1:3.0:1:0:0", "float32:256:8:2:16:0:1:1:1",
    ]  # fmt: skip
    script = Path(__file__).parent / "compile_without_gpu.py"
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(script.parents[1]), "TRITON_DEFAULT_FP_FUSION": "1"}
    lines = subprocess.run(
        [sys.executable, script, *calls], capture_output=True, text=True, check=True, env=environment
    ).stdout.splitlines()
    assert {line.split()[0] for line in lines} == set(calls)
    # A launch takes 1.6 us even of bounds that rest: none is to come unnoticed.
    passes = ["scores_kernel", "threshold_kernel", "output_kernel"]
    for call in calls:
        launched = [line.split()[1] for line in lines if line.split()[0] == call]
        assert launched == (["_bounds_kernel", *passes] if call.split(":")[6] == "1" else passes)
    for line in lines:
        numbers = {name: int(value) for name, value in (word.split("=") for word in line.split()[3:])}
        assert numbers["shared"] <= 227 * 1024, line
        # float32 pays for exact products, as in the training kernels; 64 rows of 256 channels are just too many.
        wide = "output_kernel" in line and ":256:" in line
        assert numbers["stack"] <= (8192 if "float32" in line else 256 if wide else 128), line


@pytest.mark.gpu
@pytest.mark.parametrize("pages", [False, True])
def test_a_cuda_graph_replays_as_the_cache_fills(pages):
    key, value = randn(2, 2, 5000, 64, seed=1), randn(2, 2, 5000, 64, seed=2)
    query = randn(2, 8, 1, 64, seed=3)
    visible = torch.tensor([[[0, 1000]], [[17, 1000]]], dtype=torch.int32, device=DEVICE)
    bounds = bounds_of(key) if pages else None

    def step():
        return entmax_attention(query, key, value, visible=visible, pages=bounds)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for length in (1001, 1024, 4999, 5000):
        visible[:, :, 1] = length
        query.copy_(randn(2, 8, 1, 64, seed=length))
        graph.replay()
        assert all(torch.equal(*pair) for pair in zip(captured, step(), strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_step_does_not_wait_for_the_device(kind):
    """Of a model, eagerly, with bounds: what a step needs to know of the cache is read on the device."""
    model = families.stir(
        families.sparse_model(families.dense_model("llama", max_position_embeddings=512), "asentmax")
    )
    model, ids = model.to(DEVICE), families.tokens(2, 140).to(DEVICE)
    cache = hsa.BoundedDynamicCache(model.config)
    if kind == "static":
        cache = hsa.BoundedStaticCache(model.config, max_cache_len=200)
    steps = [
        {
            "attention_mask": torch.tensor([[[[0, index + 1]]]], dtype=torch.int32, device=DEVICE).expand(2, 1, 1, 2),
            "position_ids": torch.full((2, 1), index, device=DEVICE),
        }
        for index in range(100, 140)
    ]
    with torch.no_grad(), hsa.implementation("triton"):
        model(ids[:, :100], past_key_values=cache)
        model(ids[:, 100:101], past_key_values=cache, **steps[0])
        torch.cuda.set_sync_debug_mode("error")
        try:
            for index, step in enumerate(steps[1:], 101):
                model(ids[:, index : index + 1], past_key_values=cache, **step)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["dynamic", "static", "bounded", "bounded static"])
@pytest.mark.parametrize("padded", [False, True])
def test_a_step_of_generate_does_not_wait_for_the_device(kind, padded, monkeypatch):
    """What comes of us in it: the masks, the model and the mask of the next step. Others ask whether to stop."""
    dense = families.dense_model("llama", max_position_embeddings=512)
    model = families.stir(families.sparse_model(dense, "asentmax")).to(DEVICE)
    ids, mask = families.tokens(2, 100).to(DEVICE), torch.ones(2, 100, dtype=torch.long, device=DEVICE)
    if padded:
        ids[0, :30] = mask[0, :30] = 0
    steps = []

    def quiet(name):
        ours = getattr(model, name)

        @functools.wraps(ours)
        def run(*args, **kwargs):
            if len(steps) > 2:
                torch.cuda.set_sync_debug_mode("error")
            steps.append(name)
            try:
                return ours(*args, **kwargs)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        monkeypatch.setattr(model, name, run)

    for name in ("forward", "create_masks_for_generate", "_update_model_kwargs_for_generation"):
        quiet(name)
    with hsa.implementation("triton"):
        model.generate(
            ids, attention_mask=mask, past_key_values=caches_of(model, 140)[kind](), max_new_tokens=40, pad_token_id=0,
            do_sample=False, eos_token_id=None, disable_compile=True,
        )  # fmt: skip
    assert steps.count("forward") == 40
    assert (steps.count("create_masks_for_generate") > 30) == ("static" in kind)


def caches_of(model, room):
    """Every kind of cache for a model, by name: what makes it."""
    return {
        "dynamic": lambda: DynamicCache(config=model.config),
        "bounded": lambda: hsa.BoundedDynamicCache(model.config),
        "static": lambda: StaticCache(config=model.config, max_cache_len=room),
        "bounded static": lambda: hsa.BoundedStaticCache(model.config, max_cache_len=room),
    }


@pytest.fixture
def kernels_everywhere(monkeypatch):
    """Models decode on the kernels also where these are interpreted."""
    monkeypatch.setattr(attention, "_kernels_refuse", lambda query, key, value, **arguments: None)


ROWS = [("qwen2", "rope", kind) for kind in ("dynamic", "static", "bounded", "bounded static")]


@pytest.mark.parametrize("family, position, kind", [*ROWS, ("llama", "nape", "bounded static")])
def test_a_model_decodes_on_the_kernels(family, position, kind, kernels_everywhere, poisoned):  # noqa: F811
    """Left padding, windows, ALiBi and grouped heads; steps of one token and of several, as in assisted generation."""
    model = families.stir(families.sparse_model(families.dense_model(family), "asentmax", position=position)).to(
        DEVICE
    )
    ids, mask = families.tokens(2, 140).to(DEVICE), torch.ones(2, 140, dtype=torch.long, device=DEVICE)
    ids[0, :70] = mask[0, :70] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache = caches_of(model, 200)[kind]()
    with torch.no_grad():
        with hsa.implementation("reference"):
            expected = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
            model(ids[:, :132], attention_mask=mask[:, :132], position_ids=positions[:, :132], past_key_values=cache)
        start = 132
        for piece in (6, 1) if kind == "bounded" else (1,):
            part, start = slice(start, start + piece), start + piece
            with hsa.implementation("triton"):
                found = model(
                    ids[:, part],
                    attention_mask=mask[:, :start],
                    position_ids=positions[:, part],
                    past_key_values=cache,
                ).logits
            torch.testing.assert_close(found, expected[:, part], atol=1e-4, rtol=1e-4)


def test_decoding_compiles_whole_and_once(kernels_everywhere):
    """One graph without a break for every step of a static cache with bounds, the kernels inside."""
    model = families.stir(families.sparse_model(families.dense_model("llama"), "asentmax")).to(DEVICE)
    ids = families.tokens(1, 66).to(DEVICE)
    cache = hsa.BoundedStaticCache(model.config, max_cache_len=128)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=False)
    with torch.no_grad():
        with hsa.implementation("reference"):
            expected = model(ids, use_cache=False).logits
            model(ids[:, :62], past_key_values=cache)
        # A page becomes whole on the way.
        for index in range(62, 66):
            visible = torch.tensor([[[[0, index + 1]]]], dtype=torch.int32, device=DEVICE)
            place = torch.tensor([[index]], device=DEVICE)
            with torch._dynamo.config.patch(error_on_recompile=index > 62):
                found = compiled(
                    ids[:, index : index + 1], attention_mask=visible, position_ids=place, past_key_values=cache
                ).logits
            torch.testing.assert_close(found[:, 0], expected[:, index], atol=1e-4, rtol=1e-4)
    # What a step found out the next ones know: so few pages do not pay, the bounds rest from the second step on.
    assert [layer.state.tolist() for layer in cache.layers] == [[page_kernels.REST - 3, 0, 0]] * 2


# Inductor's own, when it is imported.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.slow
@pytest.mark.skipif(CUDA or shutil.which("g++") is None, reason="reads what is compiled for a processor")
def test_what_is_compiled_copies_neither_keys_nor_bounds(kernels_everywhere):
    """Both operators get what the cache holds: copies of it would be made, and written back, every step."""
    model = families.stir(families.sparse_model(families.dense_model("llama"), "entmax"))
    ids, cache = families.tokens(1, 63), hsa.BoundedStaticCache(model.config, max_cache_len=128)
    visible, place = torch.tensor([[[[0, 63]]]], dtype=torch.int32), torch.tensor([[62]])
    with torch.no_grad():
        with hsa.implementation("reference"):
            model(ids[:, :62], past_key_values=cache)
        step = torch.compile(model, fullgraph=True, dynamic=False)
        arguments = {"attention_mask": visible, "position_ids": place, "past_key_values": cache}
        _, (code,) = run_and_get_code(step, ids[:, 62:], **arguments)
    names = {}
    for operator in ("update_page_bounds", "entmax_decode"):
        calls = [
            line.split("default(", 1)[1].rstrip(")") for line in code.splitlines() if f"{operator}.default(" in line
        ]
        names[operator] = [call.split(", ") for call in calls if not call.startswith("'")]
        assert len(names[operator]) == 2
    for updated, decoded in zip(*names.values(), strict=True):
        keys, *bounds = updated[:5]
        assert decoded[1] == keys and decoded[-5:-1] == bounds
        held = [*decoded[1:3], *decoded[-5:]]
        assert all(re.fullmatch(r"arg\d+_1", name) for name in held) and len(set(held)) == 7
        assert not any(f"copy_({name}" in code for name in held)
    assert [layer.state.tolist() for layer in cache.layers] == [[page_kernels.REST, 0, 0]] * 2


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_bounds_go_on_resting_while_a_model_generates(kind, kernels_everywhere, monkeypatch):
    """In a growing cache also where it makes new room."""
    monkeypatch.setattr("hf_sparse_attention.cache.LEAST_ROOM", 1)
    model = families.stir(families.sparse_model(families.dense_model("llama"), "entmax")).to(DEVICE)
    cache = hsa.BoundedDynamicCache(model.config)
    if kind == "static":
        cache = hsa.BoundedStaticCache(model.config, max_cache_len=128)
    ids = families.tokens(1, 125).to(DEVICE)
    with torch.no_grad():
        with hsa.implementation("reference"):
            model(ids[:, :120], past_key_values=cache)
        rooms = set()
        with hsa.implementation("triton"):
            for index in range(120, 128 if kind == "static" else 133):
                model(ids[:, :1], past_key_values=cache)
                rooms.add(cache.layers[0].lower.data_ptr())
                left = page_kernels.REST - (index - 120)
                assert [layer.state.tolist() for layer in cache.layers] == [[left, 0, 0]] * 2
    assert len(rooms) == (1 if kind == "static" else 2)


@pytest.fixture(scope="module")
def trained_folder(tmp_path_factory):
    """The embedded checkpoint after a short training with ASEntmax, which ends at alpha 1.5."""
    data, run = Path(hsa.__file__).parent / "data", tmp_path_factory.mktemp("trained") / "run"
    arguments = TrainArguments(
        model=str(data / "stories260K"), map="asentmax", output=str(run), block_size=256, batch_size=8, steps=120,
        train_data=[str(data / "tinystories" / "train.txt.xz")], learning_rate=2e-3, new_learning_rate=2e-2,
        alpha_share=0.5, statistics_blocks=1,
    )  # fmt: skip
    train_model(arguments)
    return run / "model"


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["dynamic", "bounded", "static", "bounded static"])
@pytest.mark.parametrize("which", ["random", "checkpoint", "trained"])
def test_long_greedy_generation_equals_the_reference(kind, which, request):
    if which == "random":
        dense = families.dense_model("llama", hidden_size=64, head_dim=16, max_position_embeddings=2048)
        model = families.stir(families.sparse_model(dense, "asentmax")).to(DEVICE)
    else:
        folder = Path(hsa.__file__).parent / "data" / "stories260K"
        if which == "trained":
            folder = request.getfixturevalue("trained_folder")
        model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="asentmax", dtype=torch.float32)
        model = model.to(DEVICE)
    ids, mask = families.tokens(2, 300).to(DEVICE), torch.ones(2, 300, dtype=torch.long, device=DEVICE)
    ids[0, :77] = mask[0, :77] = 0
    how = {"max_new_tokens": 512, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, "attention_mask": mask}
    with hsa.implementation("reference"):
        expected = model.generate(ids, **how)
    # Static caches are compiled, with CUDA graphs: by few processes, as starting many takes longer than such a model.
    with hsa.implementation("triton"), torch._inductor.config.patch(compile_threads=2):
        assert torch.equal(model.generate(ids, **how, past_key_values=caches_of(model, 812)[kind]()), expected)

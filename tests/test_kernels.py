"""The Triton kernels beside the reference: compiled on a GPU, else in the interpreter (float16 and float32)."""

import contextlib
import contextvars
import functools
import json
import os
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import pytest
import sanitize
import torch

triton = pytest.importorskip("triton")

from bounds import OUTPUT_FACTOR, check_against_reference, ratio, run  # noqa: E402
from kernel_cases import random_case  # noqa: E402

from hf_sparse_attention import reference  # noqa: E402
from hf_sparse_attention.benchmark import BenchmarkArguments  # noqa: E402
from hf_sparse_attention.benchmark.inputs import block_inputs  # noqa: E402
from hf_sparse_attention.benchmark.peers import sdpa  # noqa: E402
from hf_sparse_attention.benchmark.timing import calls, peak_mib  # noqa: E402
from hf_sparse_attention.kernels import (  # noqa: E402
    backward,
    compiling,
    configurations,
    entmax_attention,
    forward,
    gather,
    near,
    operators,
    refine,
    supports,
    threshold,
    transposition,
)

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
HALF = torch.bfloat16 if CUDA else torch.float16
DTYPES = (torch.bfloat16, torch.float16, torch.float32) if CUDA else (torch.float16, torch.float32)
# As it is before the tests change it.
MEASURED = compiling.MEASURED
LENGTHS = (1, 2, 63, 64, 65, 111, 129, 333, 1000, 2049) if CUDA else (1, 7, 63, 64, 65, 111, 130)

# NumPy, which the interpreter computes with, warns where a masked score of -inf meets arithmetic; the GPU does not.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")


def randn(*shape, dtype=HALF, seed=0):
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(*shape, generator=generator, device=DEVICE).to(dtype)


@pytest.fixture(autouse=not CUDA)
def same_products(monkeypatch):
    """NumPy's float32 products depend on a tile's shape and the number of threads, those of a GPU do not.

    Without this the backward's scores would differ from those that tau belongs to, by how much depends on the machine.
    """
    import numpy
    from triton.runtime import interpreter

    def create_dot(self, a, b, d, *_):
        product = numpy.matmul(a.data.astype(numpy.float64), b.data.astype(numpy.float64))
        return interpreter.TensorHandle((product + d.data).astype(d.data.dtype), d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


@pytest.fixture(autouse=True)
def tile_lists():
    """Calls of few keys take the kernels of tile lists too; those of `short/` have tests of their own."""
    with configurations.configured(short_keys=0):
        yield


@pytest.fixture
def poisoned():
    """torch.empty gives NaN, so that what a kernel does not write shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def check(case):
    arguments = dict(case.arguments)
    if isinstance(arguments["alpha"], torch.Tensor):
        arguments["alpha"] = arguments["alpha"].requires_grad_()
    return check_against_reference(entmax_attention, case.query, case.key, case.value, case.gradient, **arguments)


# 9, 14, 17 and 21 take as long as eight others under the interpreter.
SEEDS = range(60) if CUDA else [seed for seed in range(24) if seed not in (9, 14, 17, 21)]


@pytest.mark.parametrize("seed", SEEDS)
def test_random_calls(seed, poisoned):
    check(random_case(seed, device=DEVICE, lengths=LENGTHS, dtypes=DTYPES))


@pytest.fixture
def compiled_side_by_side(kernels_are_compiled_at_their_launch, monkeypatch):
    """As for a user: nearly every one of these calls has kernels of its own, and most of its time is their
    compilation."""
    monkeypatch.setattr(compiling, "MEASURED", MEASURED)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 500))
def test_many_random_calls(seed, compiled_side_by_side, poisoned):
    """With -n 20 --maxschedchunk 1 three minutes on an H200; a float32 call at head_dim 256 takes up to one."""
    lengths = LENGTHS if seed % 4 else (111, 3000, 4097, 8191, 20000)
    check(random_case(seed, device=DEVICE, lengths=lengths, dtypes=DTYPES, budget=1 << 27))


@pytest.mark.parametrize("head_dim", [8, 80, 128])
def test_fast_paths(head_dim, poisoned):
    for alpha in (1.5, 2.0):
        query, key, value, gradient = (randn(1, heads, 200, head_dim, seed=head_dim + heads) for heads in (4, 2, 2, 4))
        check_against_reference(entmax_attention, query, key, value, gradient, alpha=alpha)


def document_ranges(lengths, shift=0):
    """Causal ranges (1, N, 2) of packed documents; shifted back, their first queries see nothing."""
    starts = torch.cat([torch.full((length,), sum(lengths[:index])) for index, length in enumerate(lengths)])
    ends = torch.arange(len(starts)) + 1 + shift
    return torch.stack([starts, ends], -1)[None].to(DEVICE, torch.int32)


WHOLE_AND_CUT = {
    # Tiles of 64: a document that fills four, one that fills none, borders inside tiles and on them, keys to come.
    "documents": document_ranges([256, 64, 37, 3]),
    "shifted documents": document_ranges([100, 260], shift=-70),
    "window": torch.stack([torch.arange(330) - 200, torch.arange(330) + 1], -1)[None].to(DEVICE, torch.int32),
    "ahead": torch.stack([torch.arange(330) // 128 * 64, torch.arange(330) + 70], -1)[None].to(DEVICE, torch.int32),
}


@pytest.mark.parametrize("slopes", [False, True])
@pytest.mark.parametrize("name", WHOLE_AND_CUT)
def test_tiles_that_ranges_cut_and_tiles_they_do_not(name, slopes, poisoned):
    visible = WHOLE_AND_CUT[name]
    length = visible.shape[1]
    query, key, value, gradient = (
        randn(1, heads, length, 16, dtype=torch.float32, seed=heads) for heads in (2, 1, 1, 2)
    )
    # Weight sits where it must not be looked for: a tile taken for whole gives another result.
    arguments = {"slopes": torch.tensor([0.5, 0.0], device=DEVICE)} if slopes else {}
    check_against_reference(entmax_attention, query / 4, key, value, gradient, visible=visible, **arguments)


def test_no_queries_are_walked_together_without_pairs(monkeypatch, poisoned):
    walked = []
    attend = operators.attend
    monkeypatch.setattr(
        operators,
        "attend",
        lambda call, point, lists, *rest: walked.append(lists) or attend(call, point, lists, *rest),
    )
    tensors = [randn(1, heads, 200, 16, seed=heads) for heads in (2, 1, 1, 2)]
    for tenths in (7, 0):
        with configurations.configured(threshold_rows=128, pair_tenths=tenths, stray_limit=16):
            check_against_reference(entmax_attention, *tensors)
    assert (walked[0].counts < 0).any() and len(list(walked[0].walks())) == 2
    assert (walked[1].counts > 0).all() and len(list(walked[1].walks())) == 1


@pytest.mark.parametrize("alpha", [1.5, 2.0, 1.333, 1.75])
def test_a_forward_alone_divides_by_the_sum_of_the_weights(alpha, poisoned, monkeypatch):
    """So it is in bfloat16, of which the interpreter has no products: float16 is held to half of that rounding."""
    monkeypatch.setattr(operators.Call, "sums_means", lambda self, save: save)
    for size, length, strays in ((0.2, 250, 0), (1.0, 200, 60)):
        query, key, value = (randn(1, heads, length, 32, seed=heads, dtype=torch.float16) for heads in (2, 1, 1))
        query = size * query
        arguments = {"alpha": alpha}
        if strays:
            ends = torch.arange(1, length + 1, device=DEVICE) * (torch.arange(length, device=DEVICE) % 7 > 0)
            arguments["visible"] = torch.stack([(ends - 150).clamp(min=0), ends], -1)[None].int()
        with configurations.configured(stray_limit=strays, stray_forward=True), torch.no_grad():
            out, tau = entmax_attention(query, key, value, **arguments)
        _, own_tau = reference.attention(query, key, value, **arguments)
        exact, exact_tau = reference.attention(query.double(), key.double(), value.double(), **arguments)
        assert torch.equal(torch.isposinf(tau), torch.isposinf(exact_tau))
        seen = torch.isfinite(exact_tau)
        ratio("tau", tau[seen], own_tau[seen], exact_tau[seen], OUTPUT_FACTOR, scale=1.0)
        assert torch.isfinite(out).all() and (out[~seen] == 0).all()
        assert (out - exact).norm() <= 0.5 * (exact.bfloat16() - exact).norm()


@pytest.mark.skipif(CUDA, reason="a kernel is compiled with what this says")
def test_the_support_counted_one_by_one(poisoned, monkeypatch):
    """As on AMD and with Triton 3.7 and later; elsewhere it is a product."""
    monkeypatch.setattr(forward, "SMALL_PRODUCTS", triton.language.constexpr(False))
    tensors = [randn(1, heads, 130, 16, seed=heads) for heads in (2, 1, 1, 2)]
    with configurations.configured(short_keys=0):
        check_against_reference(entmax_attention, *tensors)


def test_pairs_with_a_backward_are_left_out_where_a_row_says_so():
    tensors = [torch.empty(1, 2, 300, 32, dtype=torch.bfloat16, device="meta")] * 3
    for both in (True, False):
        with configurations.configured(pair_backward=both):
            paired = [
                operators.describe(*tensors, 1.5, None, 0.1, True, None, None, None, save).configuration.paired
                for save in (False, True)
            ]
            kept = operators._forward_fake(*tensors, 1.5, None, 0.1, True, None, None, None, True)
        assert paired == [True, both] and (kept[5].numel() > 0) == both


def test_who_sums_the_values_under_u():
    def sums(dtype, alpha, save):
        tensors = [torch.empty(1, 2, 300, 32, dtype=dtype, device="meta")] * 3
        per_head = torch.empty(2, device="meta") if alpha == 0 else None
        return operators.describe(*tensors, alpha, per_head, 0.1, True, None, None, None).sums_means(save)

    for alpha in (1.5, 2.0, 1.333):
        assert not sums(torch.bfloat16, alpha, save=False) and sums(torch.bfloat16, alpha, save=True)
        assert sums(torch.float16, alpha, save=False) and sums(torch.float32, alpha, save=False)
    # Of an alpha per head nobody knows on the host that it is at most 2.
    assert sums(torch.bfloat16, 0, save=False)


def test_rows_that_see_nothing_are_zero(poisoned):
    query, key, value = (randn(1, 2, 70, 16, dtype=torch.float32, seed=seed) for seed in range(3))
    visible = torch.stack([torch.zeros(70), torch.arange(70) * (torch.arange(70) % 3 > 0)], -1).to(DEVICE, torch.int32)
    results = run(entmax_attention, query, key, value, torch.ones_like(query), visible=visible[None])
    hidden = visible[:, 1] == 0
    assert (results.out[:, :, hidden] == 0).all() and (results.gradients["query"][:, :, hidden] == 0).all()
    assert torch.isposinf(results.tau[:, :, hidden]).all() and torch.isfinite(results.tau[:, :, ~hidden]).all()


def test_the_future_has_no_gradient(poisoned):
    query, key, value = (randn(1, 1, 130, 16, dtype=torch.float32, seed=seed).requires_grad_() for seed in range(3))
    out, _ = entmax_attention(query, key, value)
    key_gradient, value_gradient = torch.autograd.grad(out[:, :, :70].sum(), (key, value))
    assert (key_gradient[:, :, 70:] == 0).all() and (value_gradient[:, :, 70:] == 0).all()


def test_two_runs_give_the_same_bits(poisoned):
    # An alpha per head, two heads a key.
    case = random_case(5, device=DEVICE, lengths=(200,) if CUDA else (70,), dtypes=(HALF,), mask="packed")
    attend = functools.partial(run, entmax_attention, case.query, case.key, case.value, case.gradient)
    first, second = attend(**case.arguments), attend(**case.arguments)
    assert torch.equal(first.out, second.out)
    assert all(torch.equal(first.gradients[name], second.gradients[name]) for name in first.gradients)


@pytest.mark.parametrize("strays", [16])
def test_however_many_heads_are_walked_at_once_the_bits_are_the_same(strays, poisoned, monkeypatch):
    """One head after the other, two key heads of three at a time, so that one is left, and all of them."""
    walked = []
    describe = operators.describe

    def noted(*arguments, **keywords):
        walked.append(describe(*arguments, **keywords))
        return walked[-1]

    monkeypatch.setattr(operators, "describe", noted)
    tensors = [randn(1, heads, 130, 16, seed=heads) for heads in (6, 3, 3, 6)]
    size = 2 * 130 * 16 * 2
    found = []
    for resident in (0, 2 * size, 32 << 20):
        with configurations.configured(resident=resident, stray_limit=strays, short_keys=0, threshold_rows=128):
            found.append(run(entmax_attention, *tensors))
    assert [(call.heads_at_once, call.groups_at_once) for call in walked[::2]] == [(1, 1), (4, 2), (6, 3)]
    for other in found[1:]:
        assert torch.equal(found[0].out, other.out) and torch.equal(found[0].tau, other.tau)
        assert all(torch.equal(found[0].gradients[name], other.gradients[name]) for name in other.gradients)


def test_compiles_without_a_graph_break():
    query, key, value = (randn(1, heads, 70, 16, seed=heads).requires_grad_() for heads in (4, 2, 2))

    def layer(query, key, value):
        return entmax_attention(query * 2, key, value)[0].square()

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(layer(query, key, value).sum(), (query, key, value))
    found = torch.autograd.grad(compiled(query, key, value).sum(), (query, key, value))
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def compiled_kernels(kind, folder):
    """Names of the kernels that calls of a kind compile ahead of their launch, where none is compiled at it."""
    if not hasattr(triton, "AsyncCompileMode"):
        pytest.skip("this Triton compiles one kernel after the other")
    program = Path(__file__).with_name("compile_without_gpu.py")
    environment = {name: text for name, text in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(folder), "CUDA_VISIBLE_DEVICES": ""}
    finished = subprocess.run(
        [sys.executable, str(program), f"ahead:{kind}"], env=environment, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr
    compiled = json.loads(finished.stdout.splitlines()[-1])
    # Other lengths compile nothing, and neither does the backward.
    assert compiled["late"] == []
    return sorted(compiled["ahead"])


@pytest.mark.parametrize(
    "ranges", ["causal", *(pytest.param(name, marks=pytest.mark.slow) for name in ("documents", "strays", "slopes"))]
)
def test_kernels_of_a_call_are_compiled_together_and_once(ranges, tmp_path):
    once = ["_threshold_kernel", "_transpose_kernel", "_key_gradient_kernel"]
    twice = ["_refine_kernel", "_forward_kernel", "_query_gradient_kernel"]
    expected = once + 2 * twice + (["_collect_kernel"] if ranges == "strays" else [])
    if ranges == "slopes":
        # No pairs, but settled tiles.
        expected = once + twice + ["_near_kernel", "_query_gradient_kernel"]
    assert compiled_kernels(ranges, tmp_path) == sorted(expected)


def test_launchers_are_built_by_threads_and_kept_by_one(monkeypatch):
    """Python hands out one module object for all of them: a thread read the launcher of another thread's kernel."""
    building, built, kept = [], [], []

    class Built:
        def __init__(self, name):
            self.src, self.metadata = name, None

        @property
        def run(self):
            assert not building and len(built) == 8 and threading.current_thread() is threading.main_thread()
            kept.append(self.src)

    class Planned:
        def warmup(self, name, grid):
            return Built(name)

    def launcher(name, metadata):
        building.append(name)
        time.sleep(0.01)
        built.append(name)
        building.remove(name)

    monkeypatch.setattr(
        triton, "AsyncCompileMode", lambda pool, ignore_errors: contextlib.nullcontext(), raising=False
    )
    monkeypatch.setattr(triton.runtime.driver, "_active", types.SimpleNamespace(launcher_cls=launcher))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    names = [f"kernel {number}" for number in range(8)]

    def plan():
        compiling._planned.get().extend((Planned(), (1,), (name,), {}) for name in names)

    contextvars.Context().run(compiling._compile, torch.device("cuda", 0), plan)
    assert kept == names and sorted(built) == names


@pytest.mark.slow
def test_products_do_not_wait_for_each_other_on_hopper():
    """ptxas says so of loops that it cannot see through or that lack registers: a third slower (kernels/NOTES.md)."""
    program = Path(__file__).with_name("compile_without_gpu.py")
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(program.parents[1]), "TRITON_DEFAULT_FP_FUSION": "1"}
    calls = ["training:0", "training:16", "training:16:64", "training:0:32", "training:0:128:0", "training:0:64:0"]
    lines = subprocess.run(
        [sys.executable, program, *calls],
        env=environment, capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    assert len(lines) == 6 + 7 + 7 + 6 + 5 + 3
    for line in lines:
        numbers = {name: int(value) for name, value in (word.split("=") for word in line.split()[3:])}
        # Three programs a processor have 168 registers, four have 128: enough with triton 3.6, with which both were
        # timed, not with 3.9.
        narrow = line.startswith(("training:16:64 _forward_kernel", "training:0:32 _forward_kernel"))
        tight = narrow and triton.__version__ >= "3.7"
        assert numbers["serialized"] <= tight, line
        assert numbers["shared"] <= 227 * 1024 and numbers["stack"] <= 512, line


def test_every_kernel_that_is_planned_can_be_noted_down():
    """One that is not would really be launched by the plan, on tensors without memory."""
    rooms = (near, threshold, gather, refine, forward, transposition, backward.queries, backward.keys)
    found = [value for room in rooms for name, value in vars(room).items() if name.endswith("_kernel")]
    assert len(found) == 8 and all(isinstance(value, compiling.Kernel) for value in found)


def test_operators_are_registered_whole():
    query, key, value = (randn(1, heads, 70, 16, seed=heads).requires_grad_() for heads in (4, 2, 2))
    alpha = torch.full((4,), 1.4, device=DEVICE, requires_grad=True)
    arguments = (query, key, value, 0.0, alpha, 0.25, True, None, None, None, True)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.hf_sparse_attention.entmax_forward.default, arguments, test_utils=tests)


def test_checkpointing_and_double_use():
    query, key, value = (randn(1, heads, 70, 16, seed=heads).requires_grad_() for heads in (4, 2, 2))

    def layer(query):
        return entmax_attention(query, key, value)[0]

    plain = torch.autograd.grad(layer(layer(query)).sum(), query)[0]
    remade = torch.utils.checkpoint.checkpoint(lambda x: layer(layer(x)), query, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(remade.sum(), query)[0], plain)


def test_refusals_name_the_reason():
    query = key = value = randn(1, 2, 8, 16)
    for arguments, reason in (
        ({"alpha": 1.0}, "alpha 1.0"),
        ({"alpha": 5.0}, "alpha 5.0"),
        ({"scaling": -1.0}, "scaling -1.0"),
    ):
        assert reason in supports(query, key, value, **arguments)
        with pytest.raises(ValueError, match=reason):
            entmax_attention(query, key, value, **arguments)
    assert "head_dim 512" in supports(*[randn(1, 1, 4, 512)] * 3)
    assert "float64" in supports(*[query.double()] * 3)
    with pytest.raises(ValueError, match="slopes need causal"):
        entmax_attention(query, key, value, causal=False, slopes=torch.ones(2, device=DEVICE))
    with pytest.raises(NotImplementedError, match="no vmap rule"):
        torch.func.vmap(lambda *tensors: entmax_attention(*tensors)[0])(query[None], key[None], value[None])


def test_under_autocast_inputs_of_several_dtypes_are_computed():
    """Rotary positions leave float32 queries and keys beside half precision values: no reason for the reference."""
    query, key, value = (randn(1, heads, 70, 16, seed=heads) for heads in (4, 2, 2))
    mixed = query.float(), key.float(), value
    assert "differ in dtype" in supports(*mixed)
    with torch.autocast(DEVICE, HALF):
        assert supports(*mixed) is None
        assert torch.equal(entmax_attention(*mixed)[0], entmax_attention(query, key, value)[0])


@pytest.mark.gpu
def test_cuda_graph_replays_on_new_inputs():
    query, key, value = (randn(1, heads, 1000, 64, seed=heads).requires_grad_() for heads in (4, 2, 2))

    def step():
        out, _ = entmax_attention(query, key, value)
        return out, *torch.autograd.grad(out.float().square().sum(), (query, key, value))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        query.copy_(randn(1, 4, 1000, 64, seed=9))
    graph.replay()
    assert all(torch.equal(*pair) for pair in zip(captured, step(), strict=True))


@pytest.mark.gpu
def test_bfloat16_autocast():
    query, key, value = (randn(1, heads, 70, 16, dtype=torch.float32, seed=heads) for heads in (4, 2, 2))
    with torch.autocast("cuda", torch.bfloat16):
        out, _ = entmax_attention(query, key, value)
    assert out.dtype == torch.bfloat16
    exact, _ = reference.attention(query, key, value)
    assert (out.float() - exact).norm() < 0.02 * exact.norm()


@pytest.mark.gpu
def test_a_training_call_takes_at_most_a_tenth_more_memory_than_softmax():
    arguments = BenchmarkArguments(lengths=[8192], noise=[0.9])
    tensors = block_inputs(arguments, 8192, 0.9)
    peaks = []
    for attention in (lambda *given: entmax_attention(*given)[0], sdpa("FLASH_ATTENTION")(arguments)):
        training = calls(attention, tensors)["training"]
        training()
        peaks.append(peak_mib(training, "cuda"))
    assert peaks[0] <= 1.1 * peaks[1], peaks


@pytest.mark.gpu
@pytest.mark.slow
def test_compute_sanitizer_finds_nothing():
    """`python tests/sanitize.py` by itself prints what it finds."""
    if sanitize.find_sanitizer() is None:
        pytest.skip("compute-sanitizer is not on this machine")
    run = subprocess.run([sys.executable, sanitize.__file__], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr

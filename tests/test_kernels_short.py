"""Calls of few keys, forward in one kernel, backward in two: beside the reference and beside the kernels of lists."""

import functools

import pytest
import torch

triton = pytest.importorskip("triton")

from bounds import check_against_reference, run  # noqa: E402
from kernel_cases import random_case  # noqa: E402
from test_kernels import CUDA, DEVICE, DTYPES, HALF, check, compiled_kernels, poisoned, randn, same_products  # noqa: E402, F401

from hf_sparse_attention import reference  # noqa: E402
from hf_sparse_attention.kernels import compiling, entmax_attention, operators, short, softmax_of_few_keys  # noqa: E402
from hf_sparse_attention.kernels.configurations import configured  # noqa: E402

# NumPy, which the interpreter computes with, warns where a masked score of -inf meets arithmetic; the GPU does not.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
LENGTHS = (1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 91, 111, 128, 131, 200, 255, 256)


@pytest.fixture(autouse=not CUDA)
def few_keys():
    """Wide float32 rows too, which would spill registers on a card."""
    with configured(short_keys=256):
        yield


@pytest.fixture
def taken(monkeypatch):
    """Which way the calls of a test went, there and back."""
    ways = []

    def spy(name):
        function = getattr(operators, name)
        monkeypatch.setattr(operators, name, lambda *arguments: ways.append(name) or function(*arguments))

    for name in ("attend", "attend_short", "gradients", "short_gradients"):
        spy(name)
    return ways


# Without those that take longest under the interpreter.
SEEDS = range(600, 720) if CUDA else [seed for seed in range(600, 615) if seed not in (601, 605, 608, 611)]


@pytest.mark.parametrize("seed", SEEDS)
def test_random_calls(seed, taken, poisoned):  # noqa: F811
    dtypes = DTYPES if CUDA else (torch.float16, torch.float32)
    case = random_case(seed, device=DEVICE, lengths=LENGTHS, dtypes=dtypes, budget=1 << (30 if CUDA else 15))
    check(case)
    if not CUDA:
        assert taken == ["attend_short", "short_gradients"]


@pytest.mark.parametrize(
    "alpha, head_dim", [(1.5, 8), (1.3, 16), (2.0, 64), *([] if CUDA else [(1.5, 80), (1.5, 256)])]
)
def test_both_ways_agree(alpha, head_dim, taken, poisoned):  # noqa: F811
    query, key, value, gradient = (
        randn(1, heads, 70, head_dim, dtype=torch.float32, seed=heads) for heads in (2, 1, 1, 2)
    )
    slopes = torch.tensor([0.0, 0.1], device=DEVICE)
    call = functools.partial(run, entmax_attention, query, key, value, gradient, alpha=alpha, slopes=slopes)
    found = call()
    with configured(short_keys=69):
        expected = call()
    assert taken == ["attend_short", "short_gradients", "attend", "gradients"]
    tolerance = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(found.tau, expected.tau, **tolerance)
    torch.testing.assert_close(found.out, expected.out, **tolerance)
    for name, tensor in expected.gradients.items():
        torch.testing.assert_close(found.gradients[name], tensor, **tolerance)


def test_the_limit_counts_keys_and_queries(taken):
    for queries, keys, short_way in ((20, 30, True), (30, 30, True), (31, 30, False), (30, 31, False)):
        with configured(short_keys=30):
            entmax_attention(randn(1, 1, queries, 16), randn(1, 1, keys, 16), randn(1, 1, keys, 16))
        assert taken.pop() == ("attend_short" if short_way else "attend")


def test_a_backward_goes_the_way_its_forward_went(taken):
    for first, second in ((256, 0), (0, 256)):
        tensors = [randn(1, 1, 70, 16, seed=seed).requires_grad_() for seed in range(3)]
        with configured(short_keys=first):
            out, _ = entmax_attention(*tensors)
        with configured(short_keys=second):
            torch.autograd.grad(out.sum(), tensors)
    assert taken == ["attend_short", "short_gradients", "attend", "gradients"]


def test_rows_that_see_nothing_are_zero(poisoned):  # noqa: F811
    query, key, value = (randn(2, 2, 70, 16, dtype=torch.float32, seed=seed) for seed in range(3))
    # Of the second sequence nobody sees anything.
    ends = torch.stack([torch.arange(70) * (torch.arange(70) % 3 > 0), torch.zeros(70, dtype=torch.long)])
    visible = torch.stack([torch.zeros_like(ends), ends], -1).to(DEVICE, torch.int32)
    for alpha in (1.5, 1.2, 3.0):
        results = run(entmax_attention, query, key, value, torch.ones_like(query), visible=visible, alpha=alpha)
        hidden = (visible[..., 1] == 0)[:, None].expand(2, 2, 70)
        assert (results.out[hidden] == 0).all() and (results.gradients["query"][hidden] == 0).all()
        assert torch.isposinf(results.tau[hidden]).all() and torch.isfinite(results.tau[~hidden]).all()
        assert all((results.gradients[name][1] == 0).all() for name in ("key", "value"))


def test_the_future_has_no_gradient(poisoned):  # noqa: F811
    query, key, value = (randn(1, 1, 130, 16, dtype=torch.float32, seed=seed).requires_grad_() for seed in range(3))
    out, _ = entmax_attention(query, key, value)
    key_gradient, value_gradient = torch.autograd.grad(out[:, :, :70].sum(), (key, value))
    assert (key_gradient[:, :, 70:] == 0).all() and (value_gradient[:, :, 70:] == 0).all()


def test_keys_that_nobody_sees_are_not_read(poisoned):  # noqa: F811
    """What lies behind a mask may be anything: the room of a cache, another document."""
    query, key, value = (randn(1, 1, 100, 16, dtype=torch.float32, seed=seed) for seed in range(3))
    visible = torch.tensor([10, 70], dtype=torch.int32, device=DEVICE).expand(1, 100, 2)
    expected, _ = entmax_attention(query, key, value, visible=visible)
    for tensor in (key, value):
        tensor[:, :, :10] = tensor[:, :, 70:] = 1e4
    assert torch.equal(entmax_attention(query, key, value, visible=visible)[0], expected)


def test_thresholds_are_exact_whatever_the_scores(poisoned):  # noqa: F811
    """Ties, one key far above the others, scores that hardly differ: sum p = 1 to float32's rounding."""
    queries, keys, dim = 32, 111, 16
    value = randn(1, 1, keys, dim, dtype=torch.float32)
    for size in (1e-3, 0.3, 30.0):
        key = (randn(1, 1, keys, dim, dtype=torch.float32, seed=1) * 2).round() / 2
        query = randn(1, 1, queries, dim, dtype=torch.float32, seed=2) * size
        for alpha in (1.05, 1.5, 2.0):
            check_against_reference(entmax_attention, query, key, value, causal=False, alpha=alpha)


@pytest.mark.parametrize("alpha, largest", [(2.5, 1e-6), (3.0, 1e-3)])
def test_above_alpha_2_tau_leans_to_no_side(alpha, largest, poisoned):  # noqa: F811
    """The lower end of the bracket is 1e-7 below on average: keys beside the threshold, whose slopes are the largest,
    then weigh too much. Values of one give the sum of p."""
    query, key = (randn(1, 2, 120, 16, dtype=torch.float32, seed=seed) for seed in range(2))
    out, tau = entmax_attention(query, key, torch.ones_like(key), alpha=alpha)
    exact = reference.attention(query.double(), key.double(), torch.ones_like(key).double(), alpha=alpha)[1]
    assert abs((tau - exact).mean().item()) < 4e-8
    assert (out - 1).abs().max() < largest


def test_two_runs_give_the_same_bits(poisoned):  # noqa: F811
    case = random_case(6, device=DEVICE, lengths=(120,) if CUDA else (40,), dtypes=(HALF,), mask="packed")
    attend = functools.partial(run, entmax_attention, case.query, case.key, case.value, case.gradient)
    first, second = attend(**case.arguments), attend(**case.arguments)
    assert torch.equal(first.out, second.out)
    assert all(torch.equal(first.gradients[name], second.gradients[name]) for name in first.gradients)


@pytest.mark.parametrize("save", [False, True])
def test_operators_are_registered_whole(save):
    query, key, value = (randn(1, heads, 70, 16, seed=heads).requires_grad_(save) for heads in (4, 2, 2))
    alpha = torch.full((4,), 1.4, device=DEVICE, requires_grad=save)
    arguments = (query, key, value, 0.0, alpha, 0.25, True, None, None, None, save)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.hf_sparse_attention.entmax_forward.default, arguments, test_utils=tests)
    if save:
        kept = torch.ops.hf_sparse_attention.entmax_forward.default(*arguments)
        given = [tensor.detach() for tensor in (kept[0], *arguments[:3])]
        backward = (*given, 0.0, alpha.detach(), *arguments[5:10], *kept[1:], True)
        gradients = torch.ops.hf_sparse_attention.entmax_backward.default
        torch.library.opcheck(gradients, backward, test_utils=("test_schema", "test_faketensor"))


def test_compiles_for_any_length(taken):
    """One graph for lengths on one side of the limit, another for those beyond it."""

    def layer(query, key, value):
        return entmax_attention(query * 2, key, value)[0].square()

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    with configured(short_keys=20):
        for length in (10, 17, 24, 30):
            tensors = [randn(1, heads, length, 16, seed=heads).requires_grad_() for heads in (2, 1, 1)]
            expected = torch.autograd.grad(layer(*tensors).sum(), tensors)
            found = torch.autograd.grad(compiled(*tensors).sum(), tensors)
            assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    assert taken == 4 * ["attend_short", "short_gradients"] + 4 * ["attend", "gradients"]
    torch._dynamo.reset()


@pytest.mark.parametrize("changes", [{}, {"short_keys": 20}], ids=["as it is", "configured"])
def test_softmax_of_few_keys_compiles_without_a_warning(changes, taken):
    """Whether a call is one of few keys is asked in the graph: warnings of the compiler are errors here."""

    def layer(query, key, value):
        return softmax_of_few_keys(query * 2, key, value).square()

    torch._dynamo.reset()
    tensors = [randn(1, heads, 10, 16, seed=heads).to(torch.float16).requires_grad_() for heads in (2, 1, 1)]
    with configured(**changes):
        expected = torch.autograd.grad(layer(*tensors).sum(), tensors)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        found = torch.autograd.grad(compiled(*tensors).sum(), tensors)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    assert taken == 2 * ["attend_short", "short_gradients"]
    torch._dynamo.reset()


def test_every_kernel_can_be_noted_down_and_every_launch_is_planned(monkeypatch):
    rooms = (short.output, short.gradients)
    kernels = [value for room in rooms for name, value in vars(room).items() if name.endswith("_kernel")]
    assert len(kernels) == 3 and all(isinstance(value, compiling.Kernel) for value in kernels)
    plans = []
    monkeypatch.setattr(operators, "compile_together", lambda variant, device, plan: plans.append(plan))
    entmax_attention(*[randn(1, 1, 70, 16).requires_grad_() for _ in range(3)])
    launches = []
    token = compiling._planned.set(launches)
    plans[0]()
    compiling._planned.reset(token)
    assert [function.__name__.split("_kernel")[0] for function, *_ in launches] == [
        "_short_forward", "_short_query_gradient", "_short_key_gradient"
    ]  # fmt: skip


@pytest.mark.slow
def test_kernels_of_a_call_are_compiled_together_and_once(tmp_path):
    assert compiled_kernels("short", tmp_path) == [
        "_short_forward_kernel", "_short_key_gradient_kernel", "_short_query_gradient_kernel"
    ]  # fmt: skip


def test_refused_configurations():
    for changes in ({"short_keys": -1}, {"short_rows": 48}, {"short_columns": 128}):
        with pytest.raises(ValueError, match=next(iter(changes))), configured(**changes):
            pass


@pytest.mark.gpu
def test_cuda_graph_replays_on_new_inputs():
    query, key, value = (randn(8, heads, 91, 32, seed=heads).requires_grad_() for heads in (4, 2, 2))

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
        query.copy_(randn(8, 4, 91, 32, seed=9))
    graph.replay()
    assert all(torch.equal(*pair) for pair in zip(captured, step(), strict=True))


SOFTMAX_SEEDS = range(800, 860) if CUDA else (800, 803, 805, 806, 809, 811)


@pytest.mark.parametrize("seed", SOFTMAX_SEEDS)
def test_softmax_of_few_keys(seed, taken, poisoned):  # noqa: F811
    dtypes = (torch.bfloat16, torch.float16) if CUDA else (torch.float16,)
    case = random_case(seed, device=DEVICE, lengths=LENGTHS, dtypes=dtypes, budget=1 << (30 if CUDA else 15))
    arguments = {name: value for name, value in case.arguments.items() if name != "alpha"}
    tensors = [tensor.requires_grad_() for tensor in (case.query, case.key, case.value)]
    # On a card wide heads take few keys the other way: then SDPA computes it.
    if not operators.takes_softmax(*tensors):
        assert CUDA and softmax_of_few_keys(*tensors, **arguments) is None
        return

    def softmax(query, key, value, **arguments):
        assert arguments.pop("alpha") == 1.0
        out = softmax_of_few_keys(query, key, value, **arguments)
        # Its threshold is not given away.
        with torch.no_grad():
            _, tau = reference.attention(query, key, value, alpha=1.0, **arguments)
        return out, tau

    check_against_reference(softmax, case.query, case.key, case.value, case.gradient, alpha=1.0, **arguments)
    assert taken == ["attend_short", "short_gradients"]


@pytest.mark.gpu
def test_softmax_layers_take_it_where_sdpa_would_read_a_matrix(taken):
    from hf_sparse_attention.attention import sparse_attention_forward

    tensors = [randn(2, heads, 70, 16, dtype=torch.bfloat16, seed=heads).requires_grad_() for heads in (4, 2, 2)]
    layer, slopes = torch.nn.Linear(1, 1), torch.tensor([0.0, 0.0, 1.0, 0.5], device=DEVICE)
    found = []
    for few in (256, 0):
        with configured(short_keys=few):
            out, _ = sparse_attention_forward(layer, *tensors, None, alpha=1.0, slopes=slopes)
            found.append([out, *torch.autograd.grad(out.float().square().sum(), tensors)])
    assert taken == ["attend_short", "short_gradients"]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0.05, atol=0.05)
    with torch.no_grad():
        sparse_attention_forward(layer, *tensors, None, alpha=1.0, slopes=slopes)
    # Without a matrix SDPA is as fast; float32 has its own digits.
    sparse_attention_forward(layer, *tensors, None, alpha=1.0)
    sparse_attention_forward(layer, *[tensor.float() for tensor in tensors], None, alpha=1.0, slopes=slopes)
    assert taken == ["attend_short", "short_gradients"]

"""entmax: the weights of one row of scores, against their definition, closed forms and the entmax package."""

import math

import pytest
import torch

from hf_sparse_attention.reference import entmax, weights_from_tau
from hf_sparse_attention.reference import threshold as threshold_module
from hf_sparse_attention.reference.threshold import Curve, bracketed_level, find_level, sorted_level

ALPHAS = (1.0, 1.0001, 1.01, 1.1, 1.25, 1.5, 1.75, 2.0, 2.5, 4.0)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def rows(kind: str, count: int, keys: int) -> torch.Tensor:
    """Scores of several characters: near-uniform rows have the largest supports, ties and outliers the oddest."""
    normal = torch.randn(count, keys, dtype=torch.float64)
    return {
        "flat": 0.01 * normal,
        "normal": normal,
        "sharp": 20 * normal,
        "shifted": normal + 1000,
        "ties": normal.round(),
        "equal": torch.zeros_like(normal),
        "outlier": normal + 1e4 * (torch.arange(keys) == 0),
        "heavy": normal / torch.randn(count, keys, dtype=torch.float64).abs().clamp_(min=1e-3),
    }[kind]


KINDS = ("flat", "normal", "sharp", "shifted", "ties", "equal", "outlier", "heavy")


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_a_distribution_that_satisfies_the_definition(kind, alpha):
    scores = rows(kind, 20, 130)
    weights = entmax(scores, alpha)
    # Where alpha > 2 a weight has a vertical tangent at the threshold, whose own rounding then shows.
    tolerance = 1e-12 if alpha <= 2 and kind != "shifted" else 1e-6 if alpha > 2 else 1e-9
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(20, dtype=torch.float64), atol=tolerance, rtol=0)
    if alpha == 1:
        torch.testing.assert_close(weights, scores.softmax(-1), atol=1e-14, rtol=1e-12)
        return
    # Every key of the support has the same tau; a key off it does not reach that tau, or its weight underflows.
    tau = (alpha - 1) * scores - weights ** (alpha - 1)
    own = torch.where(weights > 1e-3, tau, torch.nan).nanmean(-1, keepdim=True)
    rounding = 1e-9 * scores.abs().max().clamp(min=1)
    assert torch.where(weights > 1e-6, (tau - own).abs(), 0).amax() < rounding
    margin = ((alpha - 1) * scores - own)[weights == 0]
    assert ((margin <= rounding) | (margin.relu() ** (1 / (alpha - 1)) < 1e-300)).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("keys", (1, 2, 63, 64, 300))
def test_agrees_with_the_entmax_package(kind, keys):
    package = pytest.importorskip("entmax")
    scores = rows(kind, 10, keys)
    torch.testing.assert_close(entmax(scores, 1.5), package.entmax15(scores, -1), atol=1e-9, rtol=0)
    torch.testing.assert_close(entmax(scores, 2), package.sparsemax(scores, -1), atol=1e-9, rtol=0)
    for alpha in (1.1, 1.5, 1.9, 2.0):
        expected = package.entmax_bisect(scores, alpha, n_iter=100)
        torch.testing.assert_close(entmax(scores, alpha), expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("keys", (1, 5, 64, 111, 1000))
def test_every_solver_finds_the_same_threshold(alpha, keys):
    curve = Curve.of(alpha, torch.float64)
    for kind in ("flat", "normal", "sharp", "ties", "heavy"):
        scaled = rows(kind, 10, keys) * curve.factor
        level = find_level(scaled, curve)
        lowest = scaled.amax(-1, keepdim=True)
        if curve.kind != "softmax":
            highest = lowest - math.expm1(-curve.excess * math.log(keys))
            bracketed = bracketed_level(scaled, curve, lowest, highest)
            torch.testing.assert_close(bracketed, level, atol=1e-12 * curve.excess, rtol=1e-13)
        if curve.kind in ("square", "linear"):
            torch.testing.assert_close(sorted_level(scaled, curve, lowest), level, atol=1e-12, rtol=1e-13)


@pytest.mark.parametrize("alpha", (1.1, 1.5, 1.75, 2.0))
def test_rows_that_do_not_converge_are_solved_exactly(alpha, monkeypatch):
    scores = rows("heavy", 10, 200)
    expected = weights_from_tau(scores, Curve.of(alpha, scores.dtype).tau(find_level_of(scores, alpha)), alpha)
    monkeypatch.setattr(threshold_module, "MAXIMUM_STEPS", 0)
    level = find_level_of(scores, alpha)
    torch.testing.assert_close(
        weights_from_tau(scores, Curve.of(alpha, scores.dtype).tau(level), alpha), expected, atol=1e-12, rtol=0
    )


def find_level_of(scores, alpha):
    curve = Curve.of(alpha, scores.dtype)
    return find_level(scores * curve.factor, curve).squeeze(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_step_past_the_level_does_not_end_the_search(dtype):
    """Many keys just within reach of the largest make Halley's step lead to where only that one counts, from where the
    next leads back, exact for one key: it must not pass for the end, nor go to and fro."""
    scaled = torch.tensor([[1.0] + [0.85] * 19 + [0.001] * 43], dtype=dtype)
    for alpha in (1.5, 1.3):
        curve = Curve.of(alpha, dtype)
        for keys in (scaled, scaled.repeat(1, 40)[:, :-1], scaled.flip(-1)):
            weights, _ = curve.weights(keys.clone(), find_level(keys.clone(), curve))
            torch.testing.assert_close(weights.sum(-1), keys.new_ones(1), atol=1e-6, rtol=0)


def test_closed_forms():
    difference = torch.tensor([0.0, 0.3, 0.9, 1.5, 5.0], dtype=torch.float64)
    scores = torch.stack((difference, torch.zeros_like(difference)), -1)
    # Two scores, sparsemax: (1 + difference) / 2 up to one.
    torch.testing.assert_close(entmax(scores, 2)[:, 0], ((1 + difference) / 2).clamp(max=1))
    # Two scores, alpha 1.5: roots that differ by difference / 2 and whose squares sum to one.
    first = difference / 4 + (0.5 - (difference / 4) ** 2).clamp(min=0).sqrt()
    torch.testing.assert_close(entmax(scores, 1.5)[:, 0], torch.where(difference < 2, first.square(), 1))
    assert (entmax(scores, 2)[3:, 1] == 0).all() and (entmax(scores, 1.5)[4:, 1] == 0).all()
    # tau of alpha 1.5 is mean_S - sqrt((1 - sum_S (x - mean_S)^2) / |S|) of the halved scores.
    x = rows("normal", 5, 40) / 2
    support = entmax(2 * x, 1.5) > 0
    size = support.sum(-1, keepdim=True)
    mean = (x * support).sum(-1, keepdim=True) / size
    spread = ((x - mean).square() * support).sum(-1, keepdim=True)
    tau = mean - ((1 - spread) / size).sqrt()
    torch.testing.assert_close(entmax(2 * x, 1.5), torch.relu(x - tau).square())


@pytest.mark.parametrize("alpha", ALPHAS)
def test_a_shift_of_the_scores_changes_nothing(alpha):
    scores = rows("normal", 20, 77)
    torch.testing.assert_close(
        entmax(scores + 3, alpha), entmax(scores, alpha), atol=1e-8 if alpha > 2 else 1e-13, rtol=0
    )


def test_towards_alpha_one_it_becomes_softmax():
    scores = rows("normal", 20, 77)
    distances = [(entmax(scores, 1 + 10.0**-power) - scores.softmax(-1)).abs().max().item() for power in range(1, 15)]
    for power, distance in enumerate(distances, 1):
        assert distance < 2 * 10.0**-power + 1e-15


@pytest.mark.parametrize("alpha", (1.0, 1.01, 1.1, 1.3, 1.5, 1.7, 2.0))
@pytest.mark.parametrize("keys", (10, 1000, 50_000))
def test_float32_is_sound(alpha, keys):
    for kind in ("flat", "normal", "sharp"):
        scores = rows(kind, 4, keys).float()
        exact = entmax(scores.double(), alpha)
        weights = entmax(scores, alpha)
        assert (weights.double().sum(-1) - 1).abs().max() < 2e-5
        # Rounding of the scores themselves: relative in the weights, as in softmax.
        bound = 2e-6 * scores.abs().max().clamp(min=1).item()
        assert (weights - exact).abs().max() < bound
        # The attention's own solver reaches the same.
        level = find_level_of(scores, alpha)
        fast = weights_from_tau(scores, Curve.of(alpha, torch.float32).tau(level), alpha)
        assert (fast - exact).abs().max() < bound / min(alpha - 1 or 1, 0.2)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_half_precision_is_one_cast_of_float32(alpha, dtype):
    scores = (10 * torch.randn(8, 200)).to(dtype).requires_grad_()
    weights = entmax(scores, alpha)
    assert weights.dtype == dtype and weights.isfinite().all()
    torch.testing.assert_close(weights, entmax(scores.float(), alpha).to(dtype), atol=0, rtol=0)
    gradient = torch.autograd.grad(weights, scores, torch.randn(8, 200).to(dtype))[0]
    assert gradient.dtype == dtype and gradient.isfinite().all()


@pytest.mark.parametrize("alpha", ALPHAS)
def test_hidden_keys_weigh_nothing_and_empty_rows_are_zero(alpha):
    scores = rows("normal", 6, 70)
    hidden = torch.rand(6, 70) < 0.5
    hidden[2] = True
    leaf = scores.masked_fill(hidden, -math.inf).requires_grad_()
    weights = entmax(leaf, alpha)
    assert (weights[hidden] == 0).all()
    torch.testing.assert_close(weights[0, ~hidden[0]], entmax(scores[0, ~hidden[0]], alpha), atol=1e-9, rtol=0)
    gradient = torch.autograd.grad(weights, leaf, torch.randn_like(weights))[0]
    assert gradient.isfinite().all() and (gradient[hidden] == 0).all()


@pytest.mark.parametrize("alpha", (1.0, 1.05, 1.5, 1.8, 2.0, 3.0))
def test_gradient_in_the_scores(alpha):
    scores = torch.randn(3, 9, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda scores: entmax(scores, alpha), (scores,), atol=1e-6)


@pytest.mark.parametrize("dim", (0, 1, -1))
def test_gradient_in_alpha_along_any_dimension(dim):
    scores = torch.randn(4, 3, 5, dtype=torch.float64).requires_grad_()
    shape = [4, 3, 5]
    shape[dim] = 1
    alpha = (1.02 + torch.rand(shape, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda scores, alpha: entmax(scores, alpha, dim), (scores, alpha), atol=1e-6)
    one = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda scores, alpha: entmax(scores, alpha, dim), (scores, one), atol=1e-6)
    for index in range(4):
        at = alpha.expand(4, 3, 5)[index, 0, 0]
        if dim in (1, -1):
            row = entmax(scores[index], at if dim == -1 and shape[1] == 1 else alpha[index], dim if dim == -1 else 0)
            torch.testing.assert_close(row, entmax(scores, alpha, dim)[index])


def test_gradient_at_alpha_one_is_the_limit():
    scores = torch.randn(5, 20, dtype=torch.float64)
    direction = torch.randn(5, 20, dtype=torch.float64)
    gradients = []
    for value in (1.0, 1 + 1e-9, 1 + 1e-6):
        alpha = torch.full((5, 1), value, dtype=torch.float64, requires_grad=True)
        gradients.append(torch.autograd.grad(entmax(scores, alpha), alpha, direction)[0])
    step = 1e-6
    difference = ((entmax(scores, 1 + step) - entmax(scores, 1.0)) * direction).sum(-1, keepdim=True) / step
    torch.testing.assert_close(gradients[0], difference, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-7, rtol=1e-7)
    torch.testing.assert_close(gradients[0], gradients[2], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("alpha", (1.0, 1.001, 1.01, 1.1, 1.5))
def test_gradient_in_alpha_keeps_its_digits_in_float32(alpha):
    scores, direction = torch.randn(5, 300), torch.randn(5, 300)
    gradients = []
    for dtype in (torch.float32, torch.float64):
        leaf = torch.full((5, 1), alpha, dtype=dtype, requires_grad=True)
        gradients.append(torch.autograd.grad(entmax(scores.to(dtype), leaf), leaf, direction.to(dtype))[0].double())
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-4)


def test_odd_shapes():
    assert entmax(torch.tensor(3.0)) == 1
    assert entmax(torch.zeros(0, 4)).shape == (0, 4)
    assert entmax(torch.zeros(4, 0)).shape == (4, 0)
    scores = torch.randn(2, 6, 3, dtype=torch.float64)
    torch.testing.assert_close(entmax(scores, 1.5, 1), entmax(scores.transpose(1, 2), 1.5).transpose(1, 2))


def test_weights_from_tau_with_one_alpha_per_head():
    scores = torch.randn(2, 3, 4, 50, dtype=torch.float64)
    alpha = torch.tensor([1.0, 1.5, 2.0], dtype=torch.float64)
    curve = Curve.of(alpha[:, None, None], torch.float64)
    tau = curve.tau(find_level(scores * curve.factor, curve)).squeeze(-1)
    torch.testing.assert_close(tau[:, 0], scores[:, 0].logsumexp(-1))
    weights = weights_from_tau(scores, tau, alpha[:, None, None])
    for head in range(3):
        torch.testing.assert_close(weights[:, head], entmax(scores[:, head], alpha[head].item()))
        torch.testing.assert_close(
            weights[:, head], weights_from_tau(scores[:, head], tau[:, head], alpha[head].item())
        )
    assert (weights_from_tau(scores, torch.full_like(tau, math.inf), 1.5) == 0).all()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.zeros(3), 0.9), ValueError, "alpha=0.9"),
        ((torch.zeros(3), math.nan), ValueError, "alpha=nan"),
        ((torch.zeros(3), math.inf), ValueError, "alpha=inf"),
        ((torch.zeros(3), "1.5"), TypeError, "alpha='1.5'"),
        ((torch.zeros(3), True), TypeError, "alpha=True"),
        ((torch.zeros(3), torch.tensor([0.5])), ValueError, r"alpha=\[0.5\]"),
        ((torch.zeros(3), torch.tensor([math.nan])), ValueError, r"alpha=\[nan\]"),
        ((torch.zeros(3), torch.tensor([2])), TypeError, "torch.int64"),
        ((torch.zeros(3), torch.full((3,), 1.5)), ValueError, r"\(3,\) does not broadcast to \(1,\)"),
        ((torch.zeros(3, dtype=torch.int64),), TypeError, "torch.int64"),
        (([0.0, 1.0],), TypeError, "list"),
    ],
)
def test_bad_input_is_named(arguments, error, message):
    with pytest.raises(error, match=message):
        entmax(*arguments)


def test_a_nan_ends():
    scores = torch.randn(3, 100)
    scores[1, 5] = math.nan
    for alpha in ALPHAS:
        weights = entmax(scores, alpha)
        assert weights[1].isnan().all() and weights[[0, 2]].isfinite().all()

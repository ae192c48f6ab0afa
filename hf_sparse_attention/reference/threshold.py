"""Scores and alpha -> the threshold tau at which the weights sum to one, and the weights at that threshold.

Peters, Niculae, Martins 2019 (arXiv 1905.05702). Solved for is level = tau + 1: with scaled = (alpha-1) scores, a
weight is exp(log1p(scaled - level) / (alpha-1)), exact also as alpha -> 1, where level/(alpha-1) -> logsumexp.
"""

import dataclasses
import math

import torch

# An alpha-entmax with alpha - 1 this small differs from softmax by less than rounding, so alpha = 1 needs no branch.
SMALLEST_EXCESS = {torch.float32: 1e-12, torch.float64: 1e-20}
# What a step may leave to go, in units of a score, for the error of a row's sum to be of the order of rounding.
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-13}
SAMPLE_STEPS = 2
MAXIMUM_STEPS = 40
# On a CPU exp2 is several times faster than exp, which slows down further where it underflows.
_LOG2_E = 1 / math.log(2)
# (e^y - 1 - y) / y^2 as a series in y, lowest power first; for y <= 0.5 to double precision, 8 terms to single.
_SERIES = [1 / math.factorial(power + 2) for power in range(14)]


def check_alpha(alpha) -> float | torch.Tensor:
    """alpha as a float or floating tensor whose values are all finite and >= 1, else ValueError or TypeError."""
    if isinstance(alpha, torch.Tensor):
        if not alpha.is_floating_point():
            raise TypeError(f"alpha has dtype {alpha.dtype}; a tensor alpha is floating-point")
        if not bool(((alpha >= 1) & (alpha < math.inf)).all()):
            raise ValueError(f"alpha={alpha.detach().flatten()[:8].tolist()}: every alpha is a number >= 1")
        return alpha
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
        raise TypeError(f"alpha={alpha!r} is a {type(alpha).__name__}; alpha is a float or a floating tensor")
    if not 1 <= alpha < math.inf:
        raise ValueError(f"alpha={alpha}: alpha is a number >= 1 (1 is softmax, 2 is sparsemax)")
    return float(alpha)


@dataclasses.dataclass(frozen=True)
class Curve:
    """The function from a scaled score to a weight that one alpha, or a tensor of them, stands for.

    kind: "softmax" (alpha 1), "square" (1.5), "linear" (2) for a float; "general" for the rest and for tensors.
    excess: alpha - 1, at least SMALLEST_EXCESS. factor: what scores are multiplied by to become scaled scores.
    convex: every alpha is <= 2, where Newton's steps from below never overshoot. smooth: every alpha is <= 1.5.
    """

    kind: str
    excess: float | torch.Tensor
    factor: float | torch.Tensor
    convex: bool
    smooth: bool
    exactly_one: torch.Tensor | None = None

    @classmethod
    def of(cls, alpha: float | torch.Tensor, dtype: torch.dtype) -> "Curve":
        if isinstance(alpha, torch.Tensor):
            alpha = alpha.detach().to(dtype)
            excess = (alpha - 1).clamp_(min=SMALLEST_EXCESS[dtype])
            return cls("general", excess, excess, bool((alpha <= 2).all()), bool((alpha <= 1.5).all()), alpha == 1)
        if alpha == 1:
            return cls("softmax", SMALLEST_EXCESS[dtype], 1.0, True, True)
        excess = max(alpha - 1, SMALLEST_EXCESS[dtype])
        return cls({1.5: "square", 2.0: "linear"}.get(alpha, "general"), excess, excess, alpha <= 2, alpha <= 1.5)

    def of_heads(self, heads: slice) -> "Curve":
        """The part for some of the heads, where alpha is one per head: (key heads, heads per key head, 1, 1)."""
        if not isinstance(self.excess, torch.Tensor):
            return self
        excess = self.excess[heads]
        return dataclasses.replace(self, excess=excess, factor=excess, exactly_one=self.exactly_one[heads])

    def weights(self, scaled: torch.Tensor, level: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The weights p and their slopes u = p^(2-alpha) (0 off the support): Jacobian diag(u) - u u^T / sum(u)."""
        return self._weights(scaled, level)[:2]

    def _weights(self, scaled, level):
        if self.kind == "softmax":
            weight = (scaled - level).mul_(_LOG2_E).exp2_()
            return weight, weight, None
        if self.kind == "general":
            below = torch.clamp_(scaled - level, min=-1)
            weight = torch.log1p(below).mul_(_LOG2_E / self.excess).exp2_()
            # Off the support the weight is exactly 0, whatever positive number stands for the margin.
            margin = below.add_(1).clamp_(min=torch.finfo(scaled.dtype).tiny)
            return weight, weight / margin, margin
        margin = torch.relu_(scaled - (level - 1))
        if self.kind == "linear":
            return margin, margin.sign(), margin
        return margin * margin, margin, margin

    def step(self, scaled: torch.Tensor, level: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Towards f = sum(p)^(alpha-1) - 1 = 0 from level (..., 1): a step, Newton's, and what the first leaves to go.

        f + 1 is the 1/(alpha-1)-norm of the margins: convex for alpha <= 2, and a line where all margins are equal.
        With s, u, v the sums of p, of its slopes and of their slopes p^(3-2 alpha): f' = -s^(alpha-2) u and
        f''/-f' = (1/(alpha-1) - 1) (v/u - u/s). Halley's step where v is finite, alpha <= 1.5, and Newton's elsewhere.
        What is left is an estimate for the keys that count at level: true of a step to the right, which none joins.
        """
        if self.kind == "square":
            margin = torch.relu_(scaled - (level - 1))
            s = torch.linalg.vector_norm(margin, dim=-1, keepdim=True)
            u = margin.sum(-1, keepdim=True)
            v = margin.sign_().sum(-1, keepdim=True)
            newton = s * (s - 1) / u
            share = 0.5 * newton * (v / u - u / s.square_())
        else:
            weight, slope, margin = self._weights(scaled, level)
            s, u = weight.sum(-1, keepdim=True), slope.sum(-1, keepdim=True)
            newton = s / u * -torch.expm1(-self.excess * torch.log(s))
            if not self.smooth:
                return newton, newton, 1e3 * (newton / self.excess).square_()
            v = slope.div_(margin).sum(-1, keepdim=True)
            share = (0.5 / self.excess - 0.5) * newton * (v / u - u / s)
        step = newton / (1 - share).clamp_(min=0.5)
        left = torch.where(step < 0, step, share * step)
        return step, newton, (left / self.excess).abs_()

    def alpha_slopes(self, scaled, level, weight, slope) -> torch.Tensor:
        """dp/dalpha with the threshold's own movement left out: g_j in dp_j/dalpha = g_j - u_j/sum(u) * sum_k g_k.

        With y = -(alpha-1) log p it is -(u - p - p y) / (alpha-1)^2, which cancels for small y: a series there.
        """
        # Off the support y is infinite and the weight 0; any finite bound above -log of the smallest number is exact.
        y = torch.log1p(torch.clamp_(scaled - level, min=-1)).neg_().clamp_(max=1000)
        bounded = y.clamp(max=0.5)
        terms = _SERIES[:8] if y.dtype == torch.float32 else _SERIES
        series = torch.full_like(y, terms[-1])
        for coefficient in reversed(terms[:-1]):
            series.mul_(bounded).add_(coefficient)
        near = (y / self.excess).square_().mul_(series).mul_(weight)
        far = (slope - weight - weight * y) / self.excess / self.excess
        return torch.where(y < 0.5, near, far).neg_()

    def tau(self, level: torch.Tensor) -> torch.Tensor:
        if self.kind == "softmax":
            return level
        tau = level - 1
        return tau if self.exactly_one is None else torch.where(self.exactly_one, level / self.excess, tau)

    def level(self, tau: torch.Tensor) -> torch.Tensor:
        if self.kind == "softmax":
            return tau
        level = tau + 1
        return level if self.exactly_one is None else torch.where(self.exactly_one, tau * self.excess, level)


def weights_from_tau(scores: torch.Tensor, tau: torch.Tensor, alpha: float | torch.Tensor) -> torch.Tensor:
    """p_ij = [(alpha-1) score_ij - tau_i]_+ ^ (1/(alpha-1)); for alpha = 1 exp(score_ij - tau_i). tau = inf: zeros.

    scores (..., keys), float32 or float64; tau (...); alpha a float or a tensor that broadcasts to scores with one key
    (per head: alpha[:, None, None]).
    """
    curve = Curve.of(check_alpha(alpha), scores.dtype)
    return curve.weights(scores * curve.factor, curve.level(tau.to(scores.dtype).unsqueeze(-1)))[0]


def find_level(scaled: torch.Tensor, curve: Curve) -> torch.Tensor:
    """The level (..., 1) of scaled scores (..., keys), to rounding; +inf for a row of -inf. Few passes, no sorting.

    Every subset of the keys has a lower level than all of them: the maxima of a few groups of keys give the start.
    """
    if curve.kind == "softmax":
        level = torch.logsumexp(scaled, -1, keepdim=True)
        return level.masked_fill_(level == -math.inf, math.inf)
    sample = _group_maxima(scaled)
    lowest = sample.amax(-1, keepdim=True)
    empty = lowest == -math.inf
    lowest.masked_fill_(empty, 0)
    # tau <= max - keys^(1-alpha): below that bound the sum of the weights is never zero.
    highest = lowest - torch.expm1(torch.full_like(lowest, -math.log(scaled.shape[-1])) * curve.excess)
    level = _iterate(scaled, sample, lowest, highest, curve) if curve.convex else None
    if level is None:
        if curve.kind == "general":
            level = bracketed_level(scaled, curve, lowest, highest)
        else:
            level = sorted_level(scaled, curve, lowest)
    return level.masked_fill_(empty, math.inf)


def _iterate(scaled, sample, lowest, highest, curve: Curve) -> torch.Tensor | None:
    """Steps on the sample, then on all keys, until every row's error is of the order of rounding; else None."""
    level = lowest
    if sample is not scaled:
        for _ in range(SAMPLE_STEPS):
            level = torch.minimum(level + curve.step(sample, level)[0], highest)
    tolerance, rounding = TOLERANCE[scaled.dtype], 4 * torch.finfo(scaled.dtype).eps
    # Asking a GPU whether it is done is a wait, so it is not asked every time.
    interval = 1 if scaled.device.type == "cpu" else 3
    for count in range(1, MAXIMUM_STEPS + 1):
        step, newton, error = curve.step(scaled, level)
        # Halley's step may pass the level, Newton's does not: it is taken where the other would come to where it was.
        highest = torch.where(step < 0, torch.minimum(level, highest), highest)
        passes = (step > 0) & (level + step >= highest)
        level = torch.where(passes, torch.minimum(level + newton, highest), level + step)
        if count % interval == 0 and not bool(((error > tolerance) & (step.abs() > rounding * level.abs())).any()):
            return level
    return None


def _group_maxima(scaled: torch.Tensor) -> torch.Tensor:
    keys = scaled.shape[-1]
    if keys < 64:
        return scaled
    groups = max(32, keys // 32)
    rows = keys // groups
    body, rest = scaled[..., : rows * groups], scaled[..., rows * groups :]
    return torch.cat((body.unflatten(-1, (rows, groups)).amax(-2), rest), dim=-1)


def sorted_level(scaled: torch.Tensor, curve: Curve, highest: torch.Tensor) -> torch.Tensor:
    """The level by the closed forms over sorted scores, for alpha 1.5 and 2. highest (..., 1) is the row's maximum."""
    # tau >= highest - 1, so scores below that bound can be raised to it; then no sum is large.
    x = (scaled - highest).clamp_(min=-1).sort(dim=-1, descending=True).values
    count = torch.arange(1, x.shape[-1] + 1, device=x.device, dtype=x.dtype)
    mean = x.cumsum(-1) / count
    if curve.kind == "linear":
        tau = mean - 1 / count
    else:
        spread = (x.square().cumsum(-1) - count * mean.square()).clamp_(min=0)
        tau = mean - ((1 - spread) / count).clamp_(min=0).sqrt_()
    size = (tau <= x).sum(-1, keepdim=True).clamp_(min=1)
    level = tau.gather(-1, size - 1) + 1 + highest
    # The running sums' rounding grows with the row; one of Newton's steps, at the right support exact, takes it out.
    return level + curve.step(scaled, level)[0].nan_to_num_(nan=0)


def bracketed_level(scaled: torch.Tensor, curve: Curve, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """The level by steps kept inside a bracket (low, high), halved at least every third time, for any alpha > 1."""
    level = low
    eps = torch.finfo(scaled.dtype).eps
    for count in range(3 * round(-math.log2(eps)) + 10):
        step = curve.step(scaled, level)[0]
        upward = step >= 0
        low, high = torch.where(upward, level, low), torch.where(upward, high, level)
        done = (step.abs() <= eps * level.abs()) | (high - low <= eps * high.abs()) | step.isnan()
        if (scaled.device.type == "cpu" or count % 8 == 7) and bool(done.all()):
            break
        stepped = level + step
        inside = (stepped >= low) & (stepped <= high) & (count % 3 != 2)
        level = torch.where(done, level, torch.where(inside, stepped, low + (high - low) / 2))
    return level

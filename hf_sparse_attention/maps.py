"""Attention maps: how scores become weights. Enters a layer's hidden states and the number of keys each query sees,
leave a factor on the query and an alpha. Formulas: Peters et al. 2019 (arXiv 1905.05702), Correia et al. 2019
(1909.00015), Nakanishi 2025 (2501.19399), Vasylenko et al. 2025 (2506.16640)."""

from __future__ import annotations

from dataclasses import dataclass
from math import atanh, expm1, lgamma, log

import torch
from torch import nn
from torch.nn import functional as F

from .config import SPECIFICATIONS

# Shapes: B batch, H heads, N queries, E hidden size.

# Every new parameter's name holds "bias": trainers that tell by the name what to decay (Transformers' Trainer) leave
# biases alone, and decay would pull these towards the dense model.

# beta of ASEntmax at the neutral start, and its bias softplus^-1(beta).
NEUTRAL_BETA = 0.05
NEUTRAL_BETA_BIAS = log(torch.expm1(torch.tensor(NEUTRAL_BETA, dtype=torch.float64)).item())


@dataclass(frozen=True)
class AttentionMap:
    """One row of `MAPS`.

    Args:
        name: the `attn_implementation` it is chosen by.
        formula: the weights of one query over the keys it sees.
        paper: where it comes from.
        scale: module of the factor on the query, or None.
        learned_alpha: whether each head learns its alpha.
        softmax: whether the weights are always a softmax, so that SDPA computes them.
    """

    name: str
    formula: str
    paper: str
    scale: type[nn.Module] | None = None
    learned_alpha: bool = False
    softmax: bool = False

    @property
    def alpha(self) -> float:
        """The alpha the map is trained towards."""
        return SPECIFICATIONS[self.name].alpha

    @property
    def has_parameters(self) -> bool:
        """Whether it adds any to the dense model's."""
        return self.scale is not None or self.learned_alpha


class SSMaxScale(nn.Module):
    """The factor `s_h log(n_i)` of SSMax (arXiv 2501.19399), `s_h = 1 / mean(log n) + scale_bias_h`.

    A bias of 0 is the neutral start: over a training context the mean factor is 1, so the attention is on average
    as sharp as the dense model's.

    Args:
        heads: number of heads that are scaled.
        hidden_size: unused by this map; every scale is built from the same three.
        train_length: tokens in a training context, at most the layer's sliding window if it has one.
    """

    def __init__(self, heads: int, hidden_size: int, train_length: int):
        super().__init__()
        self.scale_bias = nn.Parameter(torch.zeros(heads))
        # n runs from 2 (the first token) to train_length + 1, and log 2 + ... + log(t + 1) = log((t + 1)!).
        self.neutral = train_length / lgamma(train_length + 2)

    def forward(self, hidden_states: torch.Tensor, lengths_BN: torch.Tensor) -> torch.Tensor:
        """hidden_states (B, N, E), lengths (B or 1, N) -> factor (B or 1, H, N, 1) in float32."""
        slope_H = self.neutral + self.scale_bias.float()
        return (slope_H[:, None] * lengths_BN.float().log()[:, None, :])[..., None]


class ASEntmaxScale(nn.Module):
    """The factor `delta_h + beta_ih (log n_i)^gamma_ih` of ASEntmax (arXiv 2506.16640), with
    `beta = softplus(w_beta . x + b_beta)` and `gamma = 2 tanh(w_gamma . x + b_gamma)`.

    Every parameter is stored as its distance from the neutral start `delta = 0.95, b_beta = softplus^-1(0.05)`, all
    else 0: with zeros the factor is exactly 1 in every dtype, and the model equals the dense one.

    Args:
        heads: number of heads that are scaled.
        hidden_size: size of the hidden state that enters the attention layer.
        train_length: unused by this map; every scale is built from the same three.
    """

    def __init__(self, heads: int, hidden_size: int, train_length: int):
        super().__init__()
        self.delta_bias = nn.Parameter(torch.zeros(heads))
        # Not nn.Linear: quantisers and "all-linear" adapters would take these small maps for projections.
        self.beta_bias_weight = nn.Parameter(torch.zeros(heads, hidden_size))
        self.beta_bias = nn.Parameter(torch.zeros(heads))
        self.gamma_bias_weight = nn.Parameter(torch.zeros(heads, hidden_size))
        self.gamma_bias = nn.Parameter(torch.zeros(heads))

    def forward(self, hidden_states: torch.Tensor, lengths_BN: torch.Tensor) -> torch.Tensor:
        """hidden_states (B, N, E), lengths (B or 1, N) -> factor (B, H, N, 1) in float32."""
        # One product for both: fewer launches, and one gradient of the hidden states instead of two.
        weight = torch.cat([self.beta_bias_weight, self.gamma_bias_weight])
        bias = torch.cat([self.beta_bias, self.gamma_bias])
        beta_BNH, gamma_BNH = F.linear(hidden_states, weight, bias).float().chunk(2, -1)
        beta_BNH = F.softplus(NEUTRAL_BETA_BIAS + beta_BNH)
        power_BNH = torch.exp(2 * gamma_BNH.tanh() * lengths_BN.float().log().log()[..., None])
        factor_BNH = 1 + self.delta_bias.float() + (beta_BNH * power_BNH - NEUTRAL_BETA)
        if torch.compiler.is_compiling():
            # Inductor would compute it anew for every number it multiplies; what is given strides it keeps.
            factor_BNH = factor_BNH.as_strided(factor_BNH.shape, factor_BNH.stride())
        return factor_BNH.transpose(1, 2)[..., None]

    @torch.no_grad()
    def start_normal(self, generator: torch.Generator | None = None) -> None:
        """The paper's start instead of the neutral one: delta 1, w_beta and w_gamma from N(0, 0.02), biases 0, a
        median factor of about 1.7; in the distances that are stored."""
        self.delta_bias.fill_(NEUTRAL_BETA)
        nn.init.normal_(self.beta_bias_weight, std=0.02, generator=generator)
        nn.init.normal_(self.gamma_bias_weight, std=0.02, generator=generator)
        self.beta_bias.fill_(-NEUTRAL_BETA_BIAS)
        self.gamma_bias.zero_()

    @torch.no_grad()
    def start_beta(self) -> None:
        """delta 0 and beta 1 instead of 0.95 and 0.05: 1 as well, to the rounding of the parameters, but all of it is
        beta's, which can fall for a token as well as rise."""
        self.delta_bias.fill_(NEUTRAL_BETA - 1)
        self.beta_bias.fill_(log(expm1(1)) - NEUTRAL_BETA_BIAS)

    @torch.no_grad()
    def start_logarithm(self, train_length: int) -> None:
        """SSMax's factor `log(n) / mean(log n)`, which grows beyond the training length before anything is learned:
        delta 0, gamma 1 and beta the same for all, in the distances that are stored."""
        slope = train_length / lgamma(train_length + 2)
        self.delta_bias.fill_(NEUTRAL_BETA - 1)
        self.beta_bias_weight.zero_()
        self.beta_bias.fill_(log(expm1(slope)) - NEUTRAL_BETA_BIAS)
        self.gamma_bias_weight.zero_()
        # 2 tanh of it is 1.
        self.gamma_bias.fill_(atanh(0.5))


class AdaptiveAlpha(nn.Module):
    """One learned alpha per head, `alpha_h = 1 + 2 (alpha - 1) sigmoid(alpha_bias_h)` (arXiv 1909.00015).

    A bias of 0 gives every head the config's alpha; at alpha = 1.5 this is the paper's `1 + sigmoid(alpha_bias_h)`,
    and at alpha = 1 every head is softmax.
    """

    def __init__(self, heads: int):
        super().__init__()
        self.alpha_bias = nn.Parameter(torch.zeros(heads))

    def forward(self, alpha: float | torch.Tensor) -> torch.Tensor:
        """The config's alpha, or while it rises (H,) of it -> alpha (H,) in float32."""
        return 1 + 2 * (alpha - 1) * self.alpha_bias.float().sigmoid()


_ENTMAX = "[(alpha-1) z - tau]_+ ^ (1/(alpha-1))"
MAPS = {
    row.name: row
    for row in (
        AttentionMap("entmax", f"{_ENTMAX}, alpha = 1.5", "Peters et al. 2019, arXiv 1905.05702"),
        AttentionMap("sparsemax", "[z - tau]_+", "Martins & Astudillo 2016, arXiv 1602.02068"),
        AttentionMap(
            "asentmax",
            "entmax((delta + beta (log n)^gamma) z), alpha = 1.5",
            "Vasylenko et al. 2025, arXiv 2506.16640",
            scale=ASEntmaxScale,
        ),
        AttentionMap(
            "ssmax", "softmax(s log(n) z)", "Nakanishi 2025, arXiv 2501.19399", scale=SSMaxScale, softmax=True
        ),
        AttentionMap(
            "adaptive_entmax",
            f"{_ENTMAX}, alpha = 1 + sigmoid(a) learned per head",
            "Correia et al. 2019, arXiv 1909.00015",
            learned_alpha=True,
        ),
    )
}
if set(MAPS) != set(SPECIFICATIONS):
    raise RuntimeError(f"maps.MAPS and config.SPECIFICATIONS differ: {set(MAPS) ^ set(SPECIFICATIONS)}")

# Modules whose parameters the dense model does not have; all of them start at zero.
NEW_MODULES = (SSMaxScale, ASEntmaxScale, AdaptiveAlpha)


def alibi_slopes(heads: int, device: torch.device | None = None) -> torch.Tensor:
    """Slopes (heads,) of NAPE (arXiv 2506.16640): 0 for the first half of the heads, then 1, 1/2, 1/3, ...

    Computed on the device, where a buffer would be lost on Transformers' way from the meta device.
    """
    index_H = torch.arange(heads, device=device)
    plain = scaled_heads("nape", heads)
    return torch.where(index_H < plain, 0.0, 1.0 / (index_H - plain + 1).clamp(min=1))


def scaled_heads(position: str, heads: int) -> int:
    """How many heads, from the first, the map's factor multiplies: with `nape` only those without ALiBi."""
    return heads // 2 if position == "nape" else heads

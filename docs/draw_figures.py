"""Draws the figures of mathematics.md with the package's own functions: python docs/draw_figures.py [folder]"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from hf_sparse_attention import entmax
from hf_sparse_attention.figures import COLOURS, ZERO
from hf_sparse_attention.maps import ASEntmaxScale, SSMaxScale, alibi_slopes
from hf_sparse_attention.reference import attention, attention_weights, weights_from_tau

# The row of scores that mathematics.md speaks of.
SCORES = (2.2, 1.8, 1.1, 0.4, 0.1, -0.3, -0.9, -1.6)
ALPHAS = {"softmax": 1.0, "entmax 1.5": 1.5, "sparsemax": 2.0}


def _plain(*all_axes) -> None:
    for axes in all_axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(True, color="#e4e4e4", linewidth=0.7)
        axes.set_axisbelow(True)


def maps() -> Figure:
    """The weights of one row of scores under three maps; an exact zero is hatched."""
    scores = torch.tensor(SCORES, dtype=torch.float64)
    figure = Figure(figsize=(9, 2.9), layout="constrained")
    for axes, (name, alpha), colour in zip(figure.subplots(1, 3, sharey=True), ALPHAS.items(), COLOURS, strict=False):
        weights = entmax(scores, alpha).numpy()
        axes.bar(range(len(scores)), weights, color=colour)
        for key in range(len(scores)):
            if weights[key] == 0:
                axes.bar(key, 0.03, width=0.8, **ZERO)
            else:
                axes.annotate(
                    f"{weights[key]:.2f}", (key, weights[key]), xytext=(0, 2), textcoords="offset points",
                    ha="center", fontsize=7.5,
                )  # fmt: skip
        axes.set_title(f"{name}: {int((weights > 0).sum())} of {len(scores)} keys", fontsize=10)
        axes.set_xticks(range(len(scores)), [f"{score:g}" for score in SCORES], fontsize=8)
        axes.set(xlabel="score of the key", ylim=(0, 0.8))
        _plain(axes)
    figure.axes[0].set_ylabel("weight")
    figure.legend(handles=[Patch(label="exactly 0", **ZERO)], loc="outside lower right", frameon=False, fontsize=8)
    return figure


def threshold() -> Figure:
    """Left: the sum of the weights falls through 1 at tau. Right: which part of each score stands above tau."""
    scores = torch.tensor(SCORES, dtype=torch.float64)
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for (name, alpha), colour in zip(list(ALPHAS.items())[1:], COLOURS[1:], strict=False):
        highest = (alpha - 1) * scores.max()
        low, high = float(highest - 1), float(highest - len(scores) ** (1 - alpha))
        tau = torch.linspace(low - 0.15, high + 0.15, 200, dtype=torch.float64)
        sums = weights_from_tau(scores.expand(len(tau), -1), tau, alpha).sum(-1)
        left.plot(tau.numpy(), sums.numpy(), color=colour, label=name)
        left.axvspan(low, high, color=colour, alpha=0.1, linewidth=0)
        root = float(_tau(scores, alpha))
        left.plot([root], [1], "o", color=colour, markersize=6)
        left.annotate(f"tau = {root:.3f}", (root, 1), xytext=(6, 5), textcoords="offset points", fontsize=8)
    left.axhline(1, color="#666666", linewidth=0.8, linestyle=":")
    left.set(xlabel="tau", ylabel="sum of the weights", ylim=(0, 3))
    left.legend(frameon=False, fontsize=8)
    left.set_title("one tau makes the sum 1; it lies in the shaded range", fontsize=10)
    alpha = ALPHAS["entmax 1.5"]
    scaled, root = (alpha - 1) * scores, float(_tau(scores, alpha))
    colours = [COLOURS[1] if score > root else "#c8c8c8" for score in scaled]
    right.vlines(range(len(scores)), root, scaled.numpy(), color=colours, linewidth=6)
    right.plot(range(len(scores)), scaled.numpy(), "_", color="#333333", markersize=12)
    right.axhline(root, color="#333333", linewidth=1)
    right.annotate("tau", (len(scores) - 0.7, root), xytext=(0, 3), textcoords="offset points", fontsize=9)
    right.set(xlabel="key", ylabel="(alpha - 1) score")
    right.set_title("entmax 1.5: the weight is the square of the coloured part", fontsize=10)
    _plain(left, right)
    return figure


def _tau(scores: torch.Tensor, alpha: float) -> torch.Tensor:
    """tau of one row through the attention itself: one-dimensional keys that are the scores, a query of 1."""
    key = scores.view(1, 1, -1, 1)
    _, tau = attention(torch.ones_like(key[:, :, :1]), key, key, alpha=alpha, scaling=1.0)
    return tau.squeeze()


def factor() -> Figure:
    """The factor on the query against n: ASEntmax for some beta and gamma, and SSMax at its start."""
    lengths = torch.logspace(1, 20, 200, base=2.0)
    figure = Figure(figsize=(7.5, 3.4), layout="constrained")
    axes = figure.subplots()
    axes.plot(
        lengths.numpy(), _asentmax(lengths, None, 0.0), color="#333333", linewidth=2, label="ASEntmax at its start"
    )
    for (beta, gamma), colour in zip(((0.5, 0.5), (0.5, 1.0), (0.5, 1.5), (0.5, -1.0)), COLOURS, strict=False):
        axes.plot(
            lengths.numpy(), _asentmax(lengths, beta, gamma), color=colour, label=f"beta {beta:g}, gamma {gamma:g}"
        )
    neutral = SSMaxScale(1, 1, 2048)
    with torch.no_grad():
        ssmax = neutral(torch.zeros(1, 1, 1), lengths[None]).flatten()
    axes.plot(
        lengths.numpy(), ssmax.numpy(), color=COLOURS[4], linestyle="--", label="SSMax at its start, 2,048 tokens"
    )
    axes.set_xscale("log", base=2)
    axes.set_xticks([2**4, 2**8, 2**12, 2**16, 2**20], ["16", "256", "4,096", "65,536", "1,048,576"])
    axes.set(xlabel="n, visible keys plus one", ylabel="factor on the query", ylim=(0, 12))
    axes.legend(frameon=False, fontsize=8)
    _plain(axes)
    return figure


def _asentmax(lengths: torch.Tensor, beta: float | None, gamma: float) -> np.ndarray:
    """The factor of a head whose beta and gamma do not depend on the token; beta None is the start."""
    scale = ASEntmaxScale(1, 1, 2048).double()
    with torch.no_grad():
        if beta is not None:
            # Parameters are stored as the distance from the start.
            start = torch.expm1(torch.tensor(0.05, dtype=torch.float64)).log()
            scale.beta_bias += torch.expm1(torch.tensor(beta, dtype=torch.float64)).log() - start
        scale.gamma_bias += torch.atanh(torch.tensor(gamma / 2, dtype=torch.float64))
        hidden = torch.zeros(1, len(lengths), 1, dtype=torch.float64)
        return scale(hidden, lengths.double()[None]).flatten().numpy()


def nape() -> Figure:
    """Eight heads under NAPE. Left: the bias by distance. Right: the weights of equal scores, and their hard end."""
    heads, keys = 8, 24
    slopes = alibi_slopes(heads)
    blank = torch.zeros(1, heads, keys, 1, dtype=torch.float64)
    weights = attention_weights(blank[:, :, :1], blank, slopes=slopes.double(), alpha=1.5)[0, :, 0].flip(-1).numpy()
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    distance = np.arange(keys)
    for head in range(heads // 2 - 1, heads):
        slope = float(slopes[head])
        name = f"heads 0 to {head}: no position" if slope == 0 else f"head {head}: slope 1/{1 / slope:.0f}"
        colour = "#333333" if slope == 0 else COLOURS[head - heads // 2]
        left.plot(distance, -slope * distance, color=colour, label=name)
        seen = weights[head] > 0
        right.plot(distance[seen], weights[head][seen], "o-", color=colour, markersize=3.5, linewidth=1)
    left.set(xlabel="distance i - j", ylabel="bias on the score", ylim=(-12, 0.6))
    left.legend(frameon=False, fontsize=8, loc="lower left")
    right.set(xlabel="distance i - j", ylabel="weight (keys with none: no point)")
    right.set_title("equal scores, alpha 1.5", fontsize=10)
    _plain(left, right)
    return figure


def dispersion() -> Figure:
    """The largest weight of one key that stands out by 5 over n - 2 others, as n grows."""
    lengths = [2**power for power in range(4, 17)]
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(lengths[-1], generator=generator, dtype=torch.float64)
    rows = {"softmax": (1.0, 0.0), "entmax 1.5": (1.5, 0.0), "ASEntmax, beta 0.1, gamma 1": (1.5, 1.0)}
    figure = Figure(figsize=(7.5, 3.2), layout="constrained")
    axes = figure.subplots()
    for (name, (alpha, gamma)), colour in zip(rows.items(), COLOURS, strict=False):
        largest = []
        for length in lengths:
            scores = noise[: length - 1].clone()
            scores[0] = 5.0
            scale = _asentmax(torch.tensor([float(length)]), 0.1, gamma).item() if gamma else 1.0
            largest.append(float(entmax(scores * scale, alpha)[0]))
        axes.plot(lengths, largest, "o-", color=colour, markersize=4, label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks([2**4, 2**8, 2**12, 2**16], ["16", "256", "4,096", "65,536"])
    axes.set(xlabel="n, visible keys plus one", ylabel="weight of the key that stands out", ylim=(0, 1.05))
    axes.legend(frameon=False, fontsize=8)
    _plain(axes)
    return figure


FIGURES = (maps, threshold, factor, nape, dispersion)


def draw(folder: Path) -> list[Path]:
    """Writes every figure as SVG, the same bytes every time, and returns the files."""
    written = []
    with matplotlib.rc_context({"svg.hashsalt": "hf-sparse-attention", "svg.fonttype": "none", "font.size": 9}):
        for figure in FIGURES:
            written.append(folder / f"{figure.__name__}.svg")
            figure().savefig(written[-1], facecolor="white", metadata={"Date": None})
    return written


if __name__ == "__main__":
    for file in draw(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "figures"):
        print(file)

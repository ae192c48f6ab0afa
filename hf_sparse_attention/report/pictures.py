"""The numbers of a report and the attention over a prompt -> matplotlib figures for papers."""

from __future__ import annotations

import numpy as np

from .. import figures
from .measures import TILE
from .prompt import SMALLEST, PromptAttention


def figures_of(
    report: dict, prompt: PromptAttention, dense: PromptAttention | None, heads: list[tuple[int, int]]
) -> dict:
    """Figures by name.

    Args:
        report: the content of report.json.
        prompt, dense: every weight of the first tokens of a prompt, of the sparse and of the dense model or None.
        heads: (layer, head) of those whose attention is drawn.
    """
    return {
        "heads": head_figure(report),
        "positions": position_figure(report),
        "attention": attention_figure(report, prompt, dense, heads),
    }


def _title(report: dict) -> str:
    settings = report["sparse_attention"]
    return f"{settings['map']}, alpha {settings['alpha']:g}"


def head_figure(report: dict):
    """Support, exact zeros and empty tiles of every head; factor and alpha where they differ between heads."""
    layers = [row["layer"] for row in report["layers"]]
    panels = [("support, keys", "support", "{:.0f}", True), ("exact zeros", "zeros", "{:.2f}", False),
              (f"empty {TILE} x {TILE} tiles", "block_sparsity", "{:.2f}", False)]  # fmt: skip
    for name, shown in (("scale", "factor on the query"), ("alpha", "alpha")):
        values = [value for row in report["layers"] for value in row[name]]
        if max(values) - min(values) > 1e-6:
            panels.append((shown, name, "{:.2f}", False))
    content = [
        (shown, np.array([row[name] for row in report["layers"]]), pattern, logarithmic)
        for shown, name, pattern, logarithmic in panels
    ]
    return figures.heads(content, layers, title=_title(report))


def position_figure(report: dict):
    """Support and factor by the query's position, a line per layer, with the range of its heads."""
    curves = []
    for row in report["layers"]:
        ranges = row["positions"]
        middle = np.array([np.sqrt(item["start"] * (item["end"] - 1)) for item in ranges])
        visible = np.array([item["visible"] for item in ranges])
        parts = {name: np.array([item[name] for item in ranges]) for name in ("support", "scale")}
        curves.append((f"layer {row['layer']}", middle, visible, parts["support"], parts["scale"]))
    return figures.positions(curves, title=_title(report))


def attention_figure(
    report: dict, prompt: PromptAttention, dense: PromptAttention | None, heads: list[tuple[int, int]]
):
    """The attention of some heads over the tokens, the dense model's below."""
    maps = []
    for looked, of in ((prompt, ""), (dense, "dense, ")) if dense is not None else ((prompt, ""),):
        for layer, head in heads:
            weights, visible = looked.matrix(layer, head)
            # A softmax weight that a float rounds to 0 is not kept, but it is no exact zero either.
            weights = np.where(np.isnan(weights), SMALLEST, weights)
            maps.append((f"{of}layer {layer}, head {head}", weights, visible))
    shown = len(prompt.tokens)
    cut = f", the first {shown} of {prompt.total:,} tokens" if shown < prompt.total else ""
    columns = len(heads) if dense is not None else None
    return figures.attention(maps, prompt.tokens, title=f"attention of {_title(report)}{cut}", columns=columns)

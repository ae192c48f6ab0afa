"""Numbers of evaluate and report -> matplotlib figures. Colours are told apart by the colour-blind; an exact zero is
hatched, never a colour of the scale."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence

import numpy as np

try:
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm, Normalize
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch, Rectangle
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator
except ImportError as error:
    raise ImportError(
        'pictures need matplotlib: pip install "hf-sparse-attention[viz]", or leave them out with --no_figure'
    ) from error

# Okabe and Ito's eight colours without black and yellow, which are hard to see as lines.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = "osD^vPX"
ZERO = {"facecolor": "#f1f1f1", "edgecolor": "#b4b4b4", "hatch": "////", "linewidth": 0}
# Most tokens of a prompt that are written at the axes of an attention picture.
LABELLED_TOKENS = 64
# Tokens before a predicted one from which on a curve by position is drawn.
FIRST_POSITION = 8


def picture(figure: Figure, kind: str = "png", *, dots_per_inch: int = 150) -> bytes:
    """The figure as the content of a file of a kind matplotlib knows: png, svg, pdf."""
    content = io.BytesIO()
    with warnings.catch_warnings():
        # Tokens may hold characters the font lacks; a box stands for them.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(content, format=kind, dpi=dots_per_inch, facecolor="white")
    return content.getvalue()


def losses(results: dict, marks: Sequence[tuple[int, str]] = ()) -> Figure:
    """Loss by position in each model's longest windows, and by context length, of the content of results.json; with a
    line at each marked length, (length, what it is)."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    by_position, by_length = figure.subplots(1, 2, sharey=True)
    handles, names, lengths_seen = [], [], set()
    for index, model in enumerate(results["models"]):
        style = {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)], "markersize": 4}
        cells = [cell for cell in results["cells"] if cell["model"] == model["label"] and cell.get("loss") is not None]
        if not cells:
            continue
        longest = max(cells, key=lambda cell: cell["length"])
        lengths_seen.add(longest["length"])
        # The first tokens of a window are a guess for any model, and would flatten what comes after.
        buckets = [bucket for bucket in longest["positions"] if bucket["start"] >= FIRST_POSITION]
        buckets = buckets or longest["positions"]
        middle = [np.sqrt(bucket["start"] * (bucket["end"] - 1)) for bucket in buckets]
        loss, error = _values(buckets, "loss"), _values(buckets, "standard_error")
        by_position.fill_between(middle, loss - error, loss + error, color=style["color"], alpha=0.18, linewidth=0)
        handles += by_position.plot(middle, loss, linewidth=1.8, **style)
        names.append(model["label"])
        lengths = [cell["length"] for cell in cells]
        mean, error = _values(cells, "loss"), _values(cells, "standard_error")
        by_length.errorbar(lengths, mean, yerr=error, capsize=3, linewidth=1.8, **style)
        by_length.plot(lengths, _values(cells, "last_quarter"), linestyle=(0, (4, 2)), linewidth=1.1, **style)
    shown = " or ".join(f"{length:,}" for length in sorted(lengths_seen))
    by_position.set(xlabel=f"tokens before the predicted one (from {FIRST_POSITION})", ylabel="loss, nats per token")
    by_position.set_title(f"by position in windows of {shown} tokens", fontsize=11)
    by_length.set(xlabel="window length, tokens")
    by_length.set_title("by length: mean (solid), last quarter (dashed)", fontsize=11)
    measured = sorted({cell["length"] for cell in results["cells"] if cell.get("loss") is not None})
    for axes in (by_position, by_length):
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.grid(True, color="#e4e4e4", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.yaxis.set_tick_params(labelleft=True)
        for length, what in marks:
            if measured and length < measured[-1]:
                mark_length(axes, length, f"{what} {length:,}")
    by_length.set_xticks(measured)
    if len(measured) > 5:
        by_length.tick_params(axis="x", labelrotation=35)
    columns = min(4, max(1, len(names)))
    _unmathed(figure.legend(handles, names, loc="outside lower center", ncols=columns, frameon=False))
    return figure


def mark_length(axes, length: int, text: str, *, at_top: bool = True) -> None:
    """A dotted line at a length, with a text along it."""
    axes.axvline(length, color="#888888", linewidth=1, linestyle=":")
    axes.annotate(
        text, (length, 0.99 if at_top else 0.03), xycoords=("data", "axes fraction"), xytext=(-3, 0),
        textcoords="offset points", rotation=90, ha="right", va="top" if at_top else "bottom", fontsize=7.5,
        color="#666666",
    )  # fmt: skip


def _values(rows: list[dict], name: str) -> np.ndarray:
    return np.array([0.0 if row[name] is None else row[name] for row in rows])


def _unmathed(legend) -> None:
    """A name with a dollar sign is a name, not a formula."""
    for text in legend.get_texts():
        text.set_parse_math(False)


def heads(panels: Sequence[tuple[str, np.ndarray, str, bool]], layers: Sequence[int], *, title: str) -> Figure:
    """Layers x heads, one panel per (title, values (layers, heads), number format, whether the scale is logarithmic).

    A value of exactly 0 is hatched; NaN, no value, is blank.
    """
    rows, columns = panels[0][1].shape
    cell = 0.52 if columns <= 16 else 9 / columns
    width, height = max(3.4, columns * cell + 1.5), max(2.3, rows * min(cell, 0.4) + 1.4)
    across = max(1, min(len(panels), int(15 // width)))
    down = -(-len(panels) // across)
    figure = Figure(figsize=(width * across, height * down + 0.6), layout="constrained")
    grid = figure.subplots(down, across, squeeze=False)
    any_zero = False
    for axes, (name, values, number, logarithmic) in zip(grid.flat, panels, strict=False):
        shown = np.ma.masked_where((values == 0) | np.isnan(values), values)
        any_zero |= bool((values == 0).any())
        norm = _norm(shown, logarithmic)
        image = axes.imshow(shown, cmap="viridis", norm=norm, aspect="auto", interpolation="nearest")
        _hatch(axes, values == 0)
        if rows * columns <= 512 and cell >= 0.4:
            for (layer, head), value in np.ndenumerate(values):
                if not np.isnan(value):
                    level = 1.0 if value == 0 else float(image.norm(value))
                    colour = "#333333" if level > 0.55 else "white"
                    axes.text(head, layer, _shown(value, number), ha="center", va="center", fontsize=7, color=colour)
        bar = figure.colorbar(image, ax=axes, pad=0.02)
        if logarithmic:
            for axis_format in (bar.ax.yaxis.set_major_formatter, bar.ax.yaxis.set_minor_formatter):
                axis_format(FuncFormatter(lambda value, _: f"{value:g}"))
        bar.ax.tick_params(which="both", labelsize=7)
        axes.set_title(name, fontsize=10)
        axes.set(xlabel="head", ylabel="layer")
        axes.set_yticks(range(rows)) if rows <= 40 else axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        if rows <= 40:
            axes.set_yticklabels([str(layer) for layer in layers])
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=min(columns, 16)))
        axes.tick_params(labelsize=8)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    figure.suptitle(title, fontsize=11, parse_math=False)
    if any_zero:
        figure.legend(handles=[Patch(label="exactly 0", **ZERO)], loc="outside lower right", frameon=False, fontsize=8)
    return figure


def _shown(value: float, number: str) -> str:
    """The number rounded, but never to 0 or 1 if it is not: exactly 0 is another thing than nearly 0."""
    text = number.format(value)
    if value == float(text) or float(text) not in (0, 1):
        return text
    step = 10.0 ** -len(text.partition(".")[2])
    if float(text) == 0:
        return f"<{number.format(step)}"
    return f">{number.format(1 - step)}" if 1 - step < value < 1 and step < 1 else text


def _norm(values: np.ma.MaskedArray, logarithmic: bool) -> Normalize:
    if not values.count():
        return Normalize(0, 1)
    low, high = float(values.min()), float(values.max())
    if logarithmic:
        return LogNorm(low, high if high > low else low * 1.01)
    return Normalize(low, high if high > low else low + 1e-9 + abs(low) * 0.01)


def _hatch(axes, where: np.ndarray) -> None:
    """Hatches the cells of an image that are true."""
    for row, column in np.argwhere(where):
        axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, **ZERO))


def positions(curves: Sequence[tuple[str, np.ndarray, np.ndarray, np.ndarray, np.ndarray]], *, title: str) -> Figure:
    """Support and factor by position, a line per (name, positions (P,), visible keys (P,), support (P, heads), factor
    (P, heads)): the mean over heads, in a band from the least head to the largest."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    few = len(curves) <= len(COLOURS)
    shades = colormaps["viridis"](np.linspace(0, 0.92, len(curves)))
    for index, (name, position, visible, support, factor) in enumerate(curves):
        colour = COLOURS[index] if few else shades[index]
        for axes, values in ((left, support), (right, factor)):
            axes.plot(position, values.mean(1), color=colour, linewidth=1.6, label=name)
            # Bands of many layers would hide each other.
            if few:
                axes.fill_between(position, values.min(1), values.max(1), color=colour, alpha=0.12, linewidth=0)
        if not any(np.array_equal(visible, other[2]) for other in curves[:index]):
            shown = "all visible keys: softmax" if index == 0 else None
            left.plot(position, visible, color="#777777", linewidth=1.1, linestyle=(0, (4, 2)), label=shown)
    left.set_yscale("log", base=2)
    left.set(xlabel="position of the query", ylabel="keys that carry weight")
    right.set(xlabel="position of the query", ylabel="factor on the query")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.grid(True, color="#e4e4e4", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    left.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    handles, names = left.get_legend_handles_labels()
    # Of many layers the first, the last and some between.
    step = max(1, -(-len(handles) // 10))
    shown = [item for item in range(len(handles)) if item % step == 0 or item == len(handles) - 1]
    handles, names = [handles[item] for item in shown], [names[item] for item in shown]
    figure.legend(handles, names, loc="outside lower center", ncols=min(6, len(names)), frameon=False, fontsize=8)
    figure.suptitle(f"{title}: mean over heads" + (", least to largest head" if few else ""), parse_math=False)
    return figure


def attention(
    maps: Sequence[tuple[str, np.ndarray, np.ndarray]],
    tokens: Sequence[str],
    *,
    title: str,
    columns: int | None = None,
) -> Figure:
    """One picture per (title, weights (queries, keys), visible (queries, keys)), `columns` (default 3) in a row.

    Colour is the weight on a logarithmic scale; an exact zero is hatched grey; a key that a query cannot see is blank.
    """
    across = min(columns or 3, len(maps))
    down = -(-len(maps) // across)
    side = 5.2 if len(tokens) <= LABELLED_TOKENS else 4.6
    figure = Figure(figsize=(side * across + 0.9, side * down + 0.9), layout="constrained")
    grid = figure.subplots(down, across, squeeze=False)
    smallest = min((weights[weights > 0].min() for _, weights, _ in maps if (weights > 0).any()), default=1e-4)
    # A softmax weight can be as small as 1e-38; below the floor all are drawn alike, as small but not zero.
    floor = float(np.clip(10 ** np.floor(np.log10(smallest)), 1e-6, 1e-2))
    image = None
    for axes, (name, weights, visible) in zip(grid.flat, maps, strict=False):
        axes.patch.set(**ZERO)
        axes.patch.set_linewidth(0)
        image = axes.imshow(
            np.ma.masked_where(weights == 0, np.maximum(weights, floor)), cmap="plasma_r", norm=LogNorm(floor, 1),
            interpolation="nearest",
        )  # fmt: skip
        hidden = np.zeros((*visible.shape, 4))
        hidden[~visible] = 1
        axes.imshow(hidden, interpolation="nearest")
        share = 1 - (weights > 0).sum() / visible.sum()
        axes.set_title(f"{name}: {share:.1%} exact zeros", fontsize=9, parse_math=False)
        axes.set(xlabel="key", ylabel="query")
        _name_tokens(axes, tokens)
    for axes in grid.flat[len(maps) :]:
        axes.set_visible(False)
    bar = figure.colorbar(image, ax=grid, shrink=0.75, pad=0.01)
    alike = f" (smaller than {floor:g} drawn as that)" if smallest < floor else ""
    bar.set_label(f"attention weight{alike}", fontsize=9)
    figure.suptitle(title, fontsize=11, parse_math=False)
    legend = [
        Patch(label="weight exactly 0", **ZERO),
        Patch(label="not visible to the query", facecolor="white", edgecolor="#999999", linewidth=0.8),
    ]
    figure.legend(handles=legend, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return figure


def _name_tokens(axes, tokens: Sequence[str]) -> None:
    if len(tokens) > LABELLED_TOKENS:
        return
    size = 7.5 if len(tokens) <= 40 else 5.5
    names = [token.replace("\n", "\\n").replace(" ", "\u2423") for token in tokens]
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=size)
    axes.set_yticks(range(len(names)), names, fontsize=size)
    for label in (*axes.get_xticklabels(), *axes.get_yticklabels()):
        label.set_parse_math(False)

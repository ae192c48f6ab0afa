"""The content of results.json -> the pictures beside it: loss by position and length, with and without overlapping
windows, exact match by length, and by length and depth. A picture is drawn for what was measured, and no other."""

from __future__ import annotations

import numpy as np

from ..config import SPECIFICATIONS
from ..figures import COLOURS, MARKERS, Figure, FuncFormatter, NullLocator, losses, mark_length, picture
from ..results import mean_over_depths, reach_of

# Colours of the share of right answers, from 0 to 1, told apart by the colour-blind.
_SHARES = "cividis"
_DASHES = (0, (4, 2))
# Of more models than there are colours for.
_FURTHER_DASHES = (_DASHES, (0, (1, 1)), (0, (6, 1, 1, 1)), (0, (9, 3)))
NAMES = ("results.png", "context.png", "depth.png", "exact_match.png")
# Letters that a line of a legend is long.
_LINE = 4.5
# Every map has its own colour in every picture.
_MAPS = ("softmax", *SPECIFICATIONS)


def draw(results: dict) -> dict[str, bytes]:
    """PNG files by name: results.png (perplexity), context.png (overlapping windows), depth.png (needles),
    exact_match.png (synthetic tasks, needles)."""
    cells = [cell for cell in results["cells"] if not cell.get("missing")]
    found = {}
    of_loss = [cell for cell in cells if cell["task"] == "perplexity"]
    if of_loss or not cells:
        found["results.png"] = picture(losses({**results, "cells": of_loss}, _marks(results)))
    if any(cell["task"] == "sliding_perplexity" for cell in cells):
        found["context.png"] = picture(by_context(results, cells))
    exact = [cell for cell in cells if cell.get("exact_match") is not None]
    if any(cell.get("depth") is not None for cell in exact):
        found["depth.png"] = picture(by_depth(results, [cell for cell in exact if cell.get("depth") is not None]))
    # A mean over the depths that have a number is not the mean over depths.
    lost = {_place(cell) for cell in results["cells"] if cell.get("missing")}
    if whole := [cell for cell in exact if _place(cell) not in lost]:
        found["exact_match.png"] = picture(by_length(results, whole))
    return found


def _marks(results: dict) -> list[tuple[int, str]]:
    """The lengths beyond which models' numbers are marked, and what they are."""
    return sorted({reach for model in results["models"] if (reach := reach_of(model))[0] is not None})


def _of_task(results: dict, task: str) -> dict:
    """The same of the models that were measured on a task."""
    names = {cell["model"] for cell in results["cells"] if cell["task"] == task}
    return {"models": [model for model in results["models"] if model["label"] in names]}


def _place(cell: dict) -> tuple:
    return cell["model"], cell["task"], cell["length"]


def by_context(results: dict, cells: list[dict]) -> Figure:
    """Loss by window length, a line per model and way of cutting: solid, windows that overlap by half, where a token
    has at least half a window before it; dashed, windows one behind the other, where the first ones have little."""
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.subplots()
    ways = (("sliding_perplexity", "-", "overlapping"), ("perplexity", _DASHES, "one behind the other"))
    for index, model in enumerate(results["models"]):
        for task, dashes, words in ways:
            own = [cell for cell in cells if (cell["model"], cell["task"]) == (model["label"], task)]
            if own:
                own.sort(key=lambda cell: cell["length"])
                axes.errorbar(
                    [cell["length"] for cell in own], [cell["loss"] for cell in own],
                    yerr=[cell["standard_error"] or 0.0 for cell in own], capsize=3, markersize=4, linestyle=dashes,
                    color=COLOURS[index % len(COLOURS)], marker=MARKERS[index % len(MARKERS)],
                    label=f"{model['label']}, {words}",
                )  # fmt: skip
    lengths = sorted({cell["length"] for cell in cells if cell["task"] in ("perplexity", "sliding_perplexity")})
    axes.set(xlabel="window length, tokens", ylabel="loss, nats per token")
    _length_axis(axes, lengths)
    # Long enough to show its dashes.
    for text in axes.legend(frameon=False, fontsize=8, handlelength=_LINE).get_texts():
        text.set_parse_math(False)
    return figure


def _length_axis(axes, lengths: list[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(lengths)
    axes.tick_params(axis="x", labelrotation=35 if len(lengths) > 5 else 0, labelsize=8)
    axes.grid(True, color="#e4e4e4", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def by_depth(results: dict, cells: list[dict]) -> Figure:
    """A panel per model and task: length to the right, depth downwards, the share of right answers as colour and
    number; what was not measured is blank."""
    labels = [model["label"] for model in results["models"] if any(cell["model"] == model["label"] for cell in cells)]
    tasks = list(dict.fromkeys(cell["task"] for cell in cells))
    lengths = sorted({cell["length"] for cell in cells})
    depths = sorted({cell["depth"] for cell in cells})
    width, height = max(3.0, 0.62 * len(lengths) + 1.6), max(2.2, 0.36 * len(depths) + 1.3)
    figure = Figure(figsize=(width * len(tasks) + 0.8, height * len(labels)), layout="constrained")
    grid = figure.subplots(len(labels), len(tasks), squeeze=False)
    image = None
    for row, label in enumerate(labels):
        for column, task in enumerate(tasks):
            axes = grid[row, column]
            values = np.full((len(depths), len(lengths)), np.nan)
            for cell in cells:
                if (cell["model"], cell["task"]) == (label, task):
                    values[depths.index(cell["depth"]), lengths.index(cell["length"])] = cell["exact_match"]
            image = axes.imshow(values, cmap=_SHARES, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
            for (depth, length), value in np.ndenumerate(values):
                if not np.isnan(value):
                    colour = "black" if value > 0.5 else "white"
                    axes.text(length, depth, f"{100 * value:.0f}", ha="center", va="center", fontsize=8, color=colour)
            axes.set_title(f"{label}: {task}", fontsize=9, parse_math=False)
            axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], rotation=35, fontsize=8)
            axes.set_yticks(range(len(depths)), [f"{100 * depth:g} %" for depth in depths], fontsize=8)
            axes.set(xlabel="length, tokens", ylabel="depth")
    bar = figure.colorbar(image, ax=grid, shrink=0.8, pad=0.01)
    bar.set_label("answers without a mistake", fontsize=9)
    return figure


def styles(models: list[dict]) -> dict[str, dict]:
    """Colour, marker and dashes by label: the first model of a map has the map's colour, the others one that is free
    and dashes; if they are more than the free ones, each the colour of its map and dashes of its own while there are
    any, then of any colour. A model of alpha 1 is softmax."""
    maps = {model["label"]: "softmax" if model.get("alpha") == 1 else model.get("map") for model in models}
    found = {}
    for label, name in maps.items():
        if name in _MAPS and _MAPS.index(name) not in found.values():
            found[label] = _MAPS.index(name)
    others = [label for label in maps if label not in found]
    free = [index for index in range(len(COLOURS)) if index not in found.values()]
    dashes = {}
    if len(others) <= len(free):
        found |= dict(zip(others, free, strict=False))
        dashes = dict.fromkeys(others, _DASHES)
    else:
        left = []
        for label in others:
            left = left or [(colour, dash) for dash in _FURTHER_DASHES for colour in range(len(COLOURS))]
            own = [pair for pair in left if maps[label] in _MAPS and pair[0] == _MAPS.index(maps[label])]
            found[label], dashes[label] = pair = (own or left)[0]
            left.remove(pair)
    return {
        label: {
            "color": COLOURS[found[label]], "marker": MARKERS[index % len(MARKERS)],
            "linestyle": dashes[label] if label in others and maps[label] in _MAPS else "-",
        }
        for index, label in enumerate(maps)
    }  # fmt: skip


def by_length(
    results: dict, cells: list[dict], *, others: list[dict] = (), marks: dict[str, list[tuple[int, str]]] | None = None
) -> Figure:
    """A panel per task: the share of right answers by length, mean over depths, a line per model; with error bars.

    Args:
        others: cells of further runs of the models, each with the `run` it is of: a pale thin line a run.
        marks: (length, what it is) by task, where a line stands; those beyond which numbers are marked by default.
    """
    tasks = list(dict.fromkeys(cell["task"] for cell in (*cells, *others)))
    across = min(3, len(tasks))
    down = -(-len(tasks) // across)
    labels = [model["label"] for model in results["models"]]
    # A letter is a twelfth of an inch wide, a line a fifth high.
    columns = max(1, min(4, len(labels), int(4.4 * across / (0.7 + max(map(len, labels)) / 12))))
    height = 3.4 * down + 0.2 * -(-len(labels) // columns) + 0.2
    figure = Figure(figsize=(4.4 * across, height), layout="constrained")
    grid = figure.subplots(down, across, squeeze=False)
    handles, shown = {}, styles(results["models"])
    for axes, task in zip(grid.flat, tasks, strict=False):
        lengths = sorted({cell["length"] for cell in (*cells, *others) if cell["task"] == task})
        for length, what in _marks(_of_task(results, task)) if marks is None else marks.get(task, []):
            if lengths[0] <= length < lengths[-1]:
                # At its training length a model is mostly right.
                mark_length(axes, length, f"{what} {length:,}", at_top=False)
        runs: dict[tuple, list[dict]] = {}
        for cell in others:
            if cell["task"] == task:
                runs.setdefault((cell["model"], cell["run"]), []).append(cell)
        for (label, _), own in runs.items():
            own.sort(key=lambda cell: cell["length"])
            at, shares = [cell["length"] for cell in own], [100 * cell["exact_match"] for cell in own]
            axes.plot(at, shares, color=shown[label]["color"], linewidth=0.8, alpha=0.35, zorder=1)
        for model in results["models"]:
            points = []
            for length in lengths:
                own = [cell for cell in cells if (cell["model"], cell["task"], cell["length"]) == (
                    model["label"], task, length)]  # fmt: skip
                if own:
                    mean = mean_over_depths(own)
                    # Where the samples tell no error, no bar stands.
                    error = mean["standard_error"]
                    points.append((length, 100 * mean["exact_match"], np.nan if error is None else 100 * error))
            if points:
                at, shares, errors = zip(*points, strict=True)
                style = shown[model["label"]]
                line = axes.errorbar(at, shares, yerr=errors, capsize=3, linewidth=1.8, markersize=4, **style)
                handles.setdefault(model["label"], line)
        axes.set_title(task, fontsize=10, parse_math=False)
        axes.set(xlabel="length", ylabel="exact match, %", ylim=(-4, 104))
        _length_axis(axes, lengths)
    for axes in grid.flat[len(tasks) :]:
        axes.set_visible(False)
    legend = figure.legend(
        list(handles.values()), list(handles), loc="outside lower center", ncols=columns, frameon=False,
        handlelength=_LINE,
    )  # fmt: skip
    for text in legend.get_texts():
        text.set_parse_math(False)
    return figure

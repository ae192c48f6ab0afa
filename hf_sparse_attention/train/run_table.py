"""Runs of `train` -> a table of them beside the softmax control of the same text, tokens and held-out blocks, and
tables of what `evaluate` measured of their models by length. Runs that differ in the seed alone stand together, with
their mean. Every number is read from the files of a run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import mean, stdev

from .. import tables
from .run_measured import Measured, read_measured
from .run_record import Run

_HEADER = ["run", "map", "rate", "seed", "held-out loss", "to the control", "zeros", "tokens", "minutes", "remark"]


@dataclass(frozen=True)
class _Row:
    """A line of a table: a run, or several that differ in the seed alone."""

    label: str
    runs: list[Run]

    @property
    def first(self) -> list[str]:
        """Its run, rate and seed."""
        seed = str(self.runs[0].seed) if len(self.runs) == 1 else f"mean of {len(self.runs)}"
        return [self.label, self.runs[0].rates, tables.MISSING if seed == "None" else seed]

    def shown(self, cells: list[str]) -> list[str]:
        """The cells, in bold if it is a mean."""
        return [f"**{cell}**" if cell else cell for cell in cells] if len(self.runs) > 1 else cells


def blocks_of(runs: list[Run], files: list[str]) -> tuple[list[str], list[str], list[dict]]:
    """(Markdown, text for the terminal, a dict for each run).

    Args:
        files: results.json files, or their folders, beside those in the runs' own `evaluation` folders.

    Raises:
        OSError: if a results.json is missing or damaged.
    """
    rows = _rows(runs)
    controls = _controls(rows)
    softmax = [run for row in controls.values() for run in row.runs]
    remarks = {
        id(run): "; ".join(filter(None, [run.remark, run.why_not_compared(softmax)]))
        for row in rows
        for run in row.runs
    }
    table = [
        row.shown([row.label, row.runs[0].map, *row.first[1:], *_numbers(row.runs, _control(row, controls)),
                   remarks[id(row.runs[0])] if len(row.runs) == 1 else ""])
        for row in rows
    ]  # fmt: skip
    found = [
        {"run": row.label, "folder": str(run.folder), "map": run.map, "rates": run.rates, "seed": run.seed,
         "loss": run.loss, "to_control": _excess(run, _control(row, controls)), "zeros": run.zeros,
         "remark": remarks[id(run)]}
        for row in rows if len(row.runs) == 1 for run in row.runs
    ]  # fmt: skip
    named = dict.fromkeys(f"{row.label} at {row.first[1]}" for row in controls.values())
    said = (
        "Held-out loss in nats a token at the end of the run. To the control: perplexity beyond that of the softmax "
        "run of the same dense weights, text, number of tokens and held-out blocks, at the rate that is best for it "
        f"({'; '.join(named) or 'there is none here'}). Zeros: visible keys without weight, %. Minutes: of all "
        "devices together." + (" ±: standard deviation over seeds." if any(len(row.runs) > 1 for row in rows) else "")
    )
    markdown = ["## Runs of train", said, tables.markdown(_HEADER, table)]
    plain = ["train", _plain(_HEADER, table)]
    for measured in read_measured(runs, files):
        header, lines, control = _by_length(measured, rows)
        markdown += [f"## {measured.title}", control + measured.remark, tables.markdown(header, lines)]
        plain += ["", measured.title, _plain(header, lines)]
    return markdown, plain, found


def _plain(header: list[str], rows: list[list[str]]) -> str:
    """Bold is Markdown's."""
    return tables.plain(header, [[cell[2:-2] if cell.startswith("**") else cell for cell in row] for row in rows])


def _rows(runs: list[Run]) -> list[_Row]:
    """Every run, after those of a recipe and rate their mean; controls first, then by name."""
    found: dict[tuple, list[Run]] = {}
    for run in runs:
        found.setdefault((run.recipe, run.rates), []).append(run)
    order = sorted(found.values(), key=lambda own: (not own[0].is_control, own[0].name, own[0].rates))
    rows = []
    for own in order:
        rows += [_Row(_label(run, runs), [run]) for run in sorted(own, key=lambda run: run.seed or 0)]
        if len(ended := [run for run in own if run.summary]) > 1:
            rows.append(_Row(_label(ended[0], runs), ended))
    return rows


def _label(run: Run, runs: list[Run]) -> str:
    """The recipe's name; where another recipe has the same, the folder's."""
    for name in (lambda item: item.name, lambda item: item.folder.name):
        if all(other.recipe == run.recipe for other in runs if name(other) == name(run) and other.summary):
            return name(run)
    return str(run.folder)


def _controls(rows: list[_Row]) -> dict[str, _Row]:
    """By held-out blocks: the softmax run of the lowest loss; of those with several seeds their mean counts."""
    found: dict[str, _Row] = {}
    alone = {id(run) for row in rows if len(row.runs) > 1 for run in row.runs}
    for row in rows:
        if not row.runs[0].is_control or None in (losses := [run.loss for run in row.runs]):
            continue
        if len(row.runs) == 1 and id(row.runs[0]) in alone:
            continue
        best = found.get(row.runs[0].held_out)
        if best is None or mean(losses) < mean(run.loss for run in best.runs):
            found[row.runs[0].held_out] = row
    return found


def _control(row: _Row, controls: dict[str, _Row]) -> list[Run] | None:
    run = row.runs[0]
    found = controls.get(run.held_out) if run.summary else None
    return None if found is None or run in found.runs else found.runs


def _excess(run: Run, control: list[Run] | None) -> float | None:
    """How much higher its perplexity is than the control's, %."""
    if control is None or run.loss is None:
        return None
    return 100 * (math.exp(run.loss - mean(item.loss for item in control)) - 1)


def _numbers(runs: list[Run], control: list[Run] | None) -> list[str]:
    tokens = runs[0].summary["tokens"] if runs[0].summary else None
    return [
        _over_seeds([run.loss for run in runs], 4),
        _over_seeds([_excess(run, control) for run in runs], 2, sign="+", unit=" %"),
        _over_seeds([run.zeros for run in runs], 1),
        tables.MISSING if tokens is None else f"{tokens / 1e6:.1f} M",
        _over_seeds([run.minutes for run in runs], 1),
    ]


def _over_seeds(values: list[float | None], digits: int, *, sign: str = "", unit: str = "") -> str:
    """The number, or mean ± standard deviation of several; nothing if one of them is missing."""
    if None in values:
        return tables.MISSING
    value = mean(values)
    text = f"{value:{sign}.{digits}f}" if abs(value) < 10_000 else f"{value:{sign}.2e}"
    return text + (f" ±{tables.number(stdev(values), digits)}" if len(values) > 1 else "") + unit


def _by_length(measured: Measured, rows: list[_Row]) -> tuple[list[str], list[list[str]], str]:
    """A line for each model that is none of the runs', for each run, and for each mean; what the control is."""
    named = ""
    header = ["run", "rate", "seed", *(f"{length:,}" for length in measured.lengths)]
    shown = [[label, *[tables.MISSING] * 2, *_values(measured, [key])] for key, label in measured.others.items()]
    # Of several seeds those that were measured: what is a mean of one has a line of its own.
    kept = [_Row(row.label, [run for run in row.runs if measured.has(run)]) for row in rows]
    own = [one for one, row in zip(kept, rows, strict=True) if len(one.runs) > 1 or one.runs == row.runs]
    shown += [row.shown([*row.first, *_values(measured, [_key(run) for run in row.runs])]) for row in own]
    if measured.task == "perplexity":
        header.append(f"{measured.lengths[0]:,} to the control")
        lowest = _lowest(measured, own)
        names = dict.fromkeys(f"{_label(found[0], found)} at {found[0].rates}" for found in lowest.values())
        named = (
            "To the control: beyond the perplexity of the softmax run of the same text and tokens that is lowest here "
            f"({'; '.join(names) or 'there is none'}). "
        )
        cells = [tables.MISSING] * len(measured.others)
        for row in own:
            control = lowest.get(row.runs[0].base)
            values = [_at_first(measured, run) for run in row.runs]
            if control is not None and None not in values and row.runs[0] not in control:
                perplexity = mean(_at_first(measured, run) for run in control)
                excess = [100 * (value / perplexity - 1) for value in values]
                cells.append(row.shown([_over_seeds(excess, 2, sign="+", unit=" %")])[0])
            else:
                cells.append(tables.MISSING)
        shown = [[*line, cell] for line, cell in zip(shown, cells, strict=True)]
    return header, shown, named


def _key(run: Run) -> str:
    return run.summary["fingerprint"]


def _values(measured: Measured, fingerprints: list[str]) -> list[str]:
    return [
        _over_seeds([measured.number(key, length) for key in fingerprints], measured.digits,
                    unit="*" if any(measured.is_beyond(key, length) for key in fingerprints) else "")
        for length in measured.lengths
    ]  # fmt: skip


def _at_first(measured: Measured, run: Run) -> float | None:
    return measured.number(_key(run), measured.lengths[0])


def _lowest(measured: Measured, rows: list[_Row]) -> dict[str, list[Run]]:
    """By dense weights, text and tokens: the softmax runs with the lowest perplexity at the shortest length."""
    found: dict[str, list[Run]] = {}
    # Of several seeds their mean, which comes behind them.
    grouped = {(row.runs[0].recipe, row.runs[0].rates): row.runs for row in rows if row.runs[0].is_control}
    for own in grouped.values():
        if None in (values := [_at_first(measured, run) for run in own]):
            continue
        best = found.get(own[0].base)
        if best is None or mean(values) < mean(_at_first(measured, run) for run in best):
            found[own[0].base] = own
    return found

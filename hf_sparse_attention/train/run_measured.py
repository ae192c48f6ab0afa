"""What `evaluate` wrote of the models of several runs -> the same number of all of them by length, one table for what
was measured on the same text in the same way. A model is known by its fingerprint, whatever it was called."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .. import results as evaluated
from .run_record import Run

# What may differ between two calls of `evaluate` whose numbers stand in one table.
_FREE = {"models", "tasks", "lm_eval", "lm_eval_folder", "batch_tokens", "device"}


@dataclass(frozen=True)
class Measured:
    """One number of several models by length.

    Args:
        cells: what evaluate wrote, by fingerprint of the model and length; of several depths their mean.
        others: labels of models that are none of the runs', by fingerprint.
        get: the number of a cell, or None.
    """

    title: str
    remark: str
    task: str
    lengths: list[int]
    cells: dict[tuple[str, int], dict]
    others: dict[str, str]
    get: Callable[[dict], float | None]
    digits: int

    def has(self, run: Run) -> bool:
        """Whether there is anything of a run's model."""
        return run.summary is not None and any(key == run.summary["fingerprint"] for key, _ in self.cells)

    def number(self, fingerprint: str, length: int) -> float | None:
        cell = self.cells.get((fingerprint, length))
        return None if cell is None else self.get(cell)

    def is_beyond(self, fingerprint: str, length: int) -> bool:
        """Whether the length is beyond the model's positions, and there is a number."""
        cell = self.cells.get((fingerprint, length))
        return bool(cell and cell["note"]) and self.get(cell) is not None


def _percent(name: str) -> Callable[[dict], float | None]:
    return lambda cell: None if cell.get(name) is None else 100 * cell[name]


# What is shown of a task: title, number of a cell, decimals.
_SHOWN = (
    ("{task} by length", lambda cell: cell.get("perplexity"), 2),
    ("{task}: exact match in %", _percent("exact_match"), 1),
    ("{task}: right tokens in %", _percent("token_accuracy"), 1),
)


def read_measured(runs: list[Run], files: list[str]) -> list[Measured]:
    """Everything that was measured of the models of these runs, in their folders and in `files`.

    Raises:
        OSError: if a file is missing or damaged.
    """
    same: dict[str, list[dict]] = {}
    for file in _results_files(runs, files):
        content = _read(file)
        kept = {key: value for key, value in content["arguments"].items() if key not in _FREE}
        # With a limit the text is drawn by the longest length, without one each length has all of it.
        kept |= {} if kept.get("limit") else {"lengths": None}
        kept["data"] = content["data"].get("sha256")
        same.setdefault(json.dumps(kept, sort_keys=True), []).append(content)
    own = {run.summary["fingerprint"] for run in runs if run.summary}
    named = {name for run in runs for name in (run.name, run.folder.name)}
    found = []
    for contents in same.values():
        labels = {model["fingerprint"]: model["label"] for content in contents for model in content["models"]}
        others = {
            # As of a run that was trained anew since.
            key: f"{label} (other weights)" if label in named else label
            for key, label in labels.items()
            if key not in own
        }
        cells = _cells(contents)
        for task in dict.fromkeys(task for _, task, _ in cells):
            of_task = {(key, length): cell for (key, name, length), cell in cells.items() if name == task}
            lengths = sorted({length for _, length in of_task})
            for title, get, digits in _SHOWN:
                if any(get(cell) is not None for cell in of_task.values()):
                    remark = _remark(contents, task, of_task)
                    title = title.format(task=task.replace("_", " ").capitalize())
                    found.append(Measured(title, remark, task, lengths, of_task, others, get, digits))
            if (pieces := _by_position(of_task, lengths)) and len(lengths) > 1:
                longest = {place: cell for place, cell in of_task.items() if place[1] == lengths[-1]}
                title = f"Loss by position in windows of {lengths[-1]:,} tokens"
                remark = "Nats a token between the length before and this one. " + _remark(contents, task, longest)
                found.append(
                    Measured(title, remark, "positions", lengths, pieces, others, lambda cell: cell["loss"], 3)
                )
    return found


def _by_position(cells: dict[tuple[str, int], dict], lengths: list[int]) -> dict[tuple[str, int], dict]:
    """Of the longest windows the mean loss of the positions from the length before to each length, by fingerprint and
    length; nothing if a length is no end of a range that was measured."""
    found = {}
    for (fingerprint, length), cell in cells.items():
        ranges = cell.get("positions") if length == lengths[-1] else None
        for first, end in zip([0, *lengths], lengths, strict=False) if ranges else ():
            inside = [item for item in ranges if first <= item["start"] and item["end"] <= end]
            if not inside or inside[-1]["end"] != end:
                return {}
            counts = [item["end"] - item["start"] for item in inside]
            loss = sum(item["loss"] * count for item, count in zip(inside, counts, strict=True)) / sum(counts)
            short = cells.get((fingerprint, end))
            found[fingerprint, end] = {"loss": loss, "note": short and short["note"]}
    return found


def _results_files(runs: list[Run], files: list[str]) -> list[Path]:
    named = [Path(name).expanduser() for name in files]
    named = [file / "results.json" if file.is_dir() else file for file in named]
    for file in named:
        if not file.is_file():
            raise FileNotFoundError(f"results names {file}, which is not there")
    own = [run.folder / "evaluation" / "results.json" for run in runs]
    return list({file.resolve(): file for file in [*named, *own] if file.is_file()}.values())


def _read(file: Path) -> dict:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        # Tried here, where the file can be named.
        evaluated.remarks(content)
        _cells([content])
        return content
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise OSError(f"{file} is not a results.json of this version ({type(error).__name__}: {error})") from error


def _cells(contents: list[dict]) -> dict[tuple[str, str, int], dict]:
    """By fingerprint of the model, task and length; what has no length is left out."""
    found: dict[tuple, dict] = {}
    for content in contents:
        fingerprints = {model["label"]: model["fingerprint"] for model in content["models"]}
        several: dict[tuple, list[dict]] = {}
        for cell in content["cells"]:
            if cell["length"] is not None:
                several.setdefault((fingerprints[cell["model"]], cell["task"], cell["length"]), []).append(cell)
        for place, cells in several.items():
            shown = evaluated.mean_over_depths(cells) if any("exact_match" in cell for cell in cells) else cells[0]
            # A model that was measured beside every run, as the dense one is, counts once.
            found.setdefault(place, shown)
    return found


def _remark(contents: list[dict], task: str, cells: dict[tuple[str, int], dict]) -> str:
    """What a reader of the table must know."""
    text = [line for line in evaluated.remarks(contents[0]) if line.startswith("Text:")]
    # Needles are hidden in sentences of the package, or in the text.
    by_text = (
        any("perplexity" in cell for cell in cells.values()) or contents[0]["arguments"].get("haystack") == "data"
    )
    said = text if by_text else []
    depths = {cell["depth"] for content in contents for cell in content["cells"]
              if cell["task"] == task and cell.get("depth") is not None}  # fmt: skip
    said += [f"Mean over {len(depths)} depths."] if depths else []
    if samples := {cell["samples"] for cell in cells.values() if cell.get("samples")}:
        said.append(f"{' or '.join(f'{count:,}' for count in sorted(samples))} samples a length and depth.")
    said += ["\\* beyond the positions that the model has."] if any(cell["note"] for cell in cells.values()) else []
    tokens: dict[int, set] = {}
    for (_, length), cell in cells.items():
        tokens.setdefault(length, set()).add(cell["tokens_sha256"])
    if differ := [f"{length:,}" for length, found in sorted(tokens.items()) if len(found) > 1]:
        said.append(f"Not all models saw the same tokens at {', '.join(differ)}.")
    lacking = dict.fromkeys(cell for content in contents for cell in evaluated.lacking(content))
    said += [f"Not finished: {', '.join(lacking)}."] if lacking else []
    return " ".join(said)

"""A folder that `train` wrote, finished or not -> what run.json, summary.json and metrics.jsonl say of the run: what
it was trained with, what it shares with others, how it ended."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from .. import tables
from .run import FREE, device_seconds

# What may differ between two runs of a recipe; and where something lies, which their fingerprints stand for.
_NO_RECIPE = FREE | {
    "learning_rate", "new_learning_rate", "seed", "model", "train_data", "eval_data", "revision", "dense_weights"
}  # fmt: skip
# Rate and seed behind the name of a recipe: -lr3e-4-s0, -3e-4, -s0.
_TAG = re.compile(r"(-(lr)?[\d.]+e-?\d+|-lr[\d.]+|-s\d+)+$")


@dataclass(frozen=True)
class Run:
    """A run of `train`, of one stage or several.

    Args:
        folder: where it lies.
        parts: what run.json says of each stage that was begun.
        summary: what it left at its end, or None.
        remark: why it has no summary, or what happened on its way.
    """

    folder: Path
    parts: list[dict]
    summary: dict | None
    remark: str

    @property
    def name(self) -> str:
        """The folder's name without rate and seed."""
        return _TAG.sub("", self.folder.name) or self.folder.name

    @property
    def seed(self) -> int | None:
        return self.parts[0]["seed"] if self.parts else None

    @property
    def rates(self) -> str:
        """Peak learning rates, those of new parameters where they differ, stage by stage."""
        found = []
        for part in self.parts:
            rate, new = part["learning_rate"], part.get("new_learning_rate")
            found.append(f"{rate:g}" + (f" (new {new:g})" if new not in (None, rate) else ""))
        return found[0] if len(set(found)) == 1 else ", ".join(found) or tables.MISSING

    @property
    def recipe(self) -> str:
        """Everything that its numbers follow from, but rates and seed."""
        kept = []
        for number, part in enumerate(self.parts):
            values = {key: value for key, value in part.items() if key not in _NO_RECIPE and value is not None}
            # A later stage starts from what the one before has learned.
            values |= {"weights": None} if number else {}
            values["distill"] = Path(part["distill"]).name if part.get("distill") else None
            values["data"] = _files(part)
            # Of runs from before it is not known what accelerate was told.
            values["mixed_precision"] = None if part.get("mixed_precision") == "no" else part.get("mixed_precision")
            kept.append({key: value for key, value in values.items() if value is not None})
        return json.dumps(kept, sort_keys=True)

    @property
    def base(self) -> str:
        """What a control must share with it: the dense weights, the text and the number of tokens."""
        first = self.parts[0]
        return json.dumps([first.get("dense_weights") or first["weights"], self._work])

    @property
    def held_out(self) -> str:
        """What a control must share with it besides, for the same held-out loss: the blocks."""
        return json.dumps([self.base, self._blocks])

    @property
    def _work(self) -> list:
        """Text and number of tokens."""
        return [_text(self.parts[-1]), self.summary["tokens"]]

    @property
    def _blocks(self) -> list:
        sizes = self.parts[-1]["block_size"]
        return [self.parts[-1].get("eval_blocks"), sizes if isinstance(sizes, int) else sizes[-1][0]]

    def why_not_compared(self, controls: list[Run]) -> str:
        """If only its weights keep it from being compared with these softmax runs: why; else nothing."""
        if self.is_control or self.loss is None:
            return ""
        alike = [run for run in controls if (run._work, run._blocks) == (self._work, self._blocks)]
        if not alike or any(run.base == self.base for run in alike):
            return ""
        if self.parts[0].get("dense_weights", "") is None:
            return "not compared: the model it began with does not name its dense weights"
        return "not compared: no softmax run here records the weights it began with"

    @property
    def is_control(self) -> bool:
        return bool(self.parts) and all(part["map"] == "none" for part in self.parts)

    @property
    def map(self) -> str:
        """The map, its positions and its alpha where they are not the usual ones."""
        if self.is_control:
            return "softmax"
        if self.summary is None:
            return next((part["map"] for part in self.parts if part["map"]), tables.MISSING)
        block = self.summary["sparse_attention"]
        words = [block["map"]] + ([block["position"]] if block["position"] != "rope" else [])
        return ", ".join(words + (["alpha 1"] if block["alpha"] == 1 and block["map"] != "ssmax" else []))

    @property
    def loss(self) -> float | None:
        """Held-out loss at the end, nats a token."""
        losses = (self.summary or {}).get("eval_loss")
        return losses[-1][1] if losses else None

    @property
    def zeros(self) -> float | None:
        """Share of the visible keys without weight, %."""
        share = ((self.summary or {}).get("attention") or {}).get("zeros")
        return None if share is None else 100 * share

    @property
    def minutes(self) -> float | None:
        """Minutes of all its devices together."""
        if self.summary is None:
            return None
        return device_seconds(self.summary) / 60


def is_training(file: Path) -> bool:
    """Whether a run.json is one that `train` writes: of a run, or of several stages."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return (
        isinstance(content, dict)
        and "identity" not in content
        and ("blocks_per_step" in content or "stages" in content)
    )


def read_runs(files: list[Path]) -> list[Run]:
    """The runs of these run.json files, in the order of their folders; a stage is a part of its run, not one itself.

    Raises:
        ValueError: if two are the same run.
        OSError: if a file is damaged.
    """
    folders = {file.parent.resolve(): file.parent for file in files if not _is_stage(file)}
    runs = [_read_run(folder) for folder in folders.values()]
    found: dict[tuple, Run] = {}
    for run in runs:
        if run.summary is not None:
            other = found.setdefault((run.recipe, run.rates, run.seed), run)
            if other is not run:
                raise ValueError(
                    f"{other.folder} and {run.folder} are the same run, trained twice: leave one of them out"
                )
    return runs


def _is_stage(file: Path) -> bool:
    above = file.parent.parent
    return above.name == "stages" and (above.parent / "run.json").is_file()


def _read_run(folder: Path) -> Run:
    try:
        content = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        places = [folder]
        if "blocks_per_step" not in content:
            places = [place for name in content["stages"] if (place := folder / "stages" / name).is_dir()]
        places = [place for place in places if (place / "run.json").is_file()]
        parts = [json.loads((place / "run.json").read_text(encoding="utf-8")) for place in places]
        summary = None
        if (folder / "summary.json").is_file():
            summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        run = Run(folder, parts, summary, "")
        # Looked at here, where the file can be named.
        _ = run.rates, run.recipe, run.seed, run.map, run.is_control, run.loss, run.zeros, run.minutes
        if summary is not None:
            _ = run.held_out, summary["fingerprint"]
            skipped = summary["skipped_steps"]
            remarks = [f"{skipped} steps left out"] if skipped else []
            remarks += ["held-out loss not finite"] if summary.get("eval_loss") and run.loss is None else []
            return Run(folder, parts, summary, "; ".join(remarks))
        return Run(folder, parts, None, _how_far(places, parts))
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise OSError(
            f"{folder} is damaged ({type(error).__name__}: {error}): leave it out, or train it anew"
        ) from error


def _how_far(places: list[Path], parts: list[dict]) -> str:
    """Where a run without an end is, and why, if that was written."""
    if not places:
        return "not begun"
    lines, metrics = [], places[-1] / "metrics.jsonl"
    for text in metrics.read_text(encoding="utf-8").splitlines() if metrics.is_file() else ():
        try:
            lines.append(json.loads(text))
        except ValueError:
            # Cut off with the process that wrote it.
            continue
    where = f"{places[-1].name}, " if places[-1].parent.name == "stages" else ""
    if lines and lines[-1]["kind"] == "failed":
        return f"failed: {where}{lines[-1]['reason']}"
    step = max((line["step"] for line in lines), default=0)
    return f"not finished: {where}step {step:,} of {parts[-1]['steps']:,}"


def _text(part: dict) -> list:
    """A run's text: its files, and what of them is read as which documents."""
    names = ("text_column", "train_split", "eval_split", "blank_lines")
    # What a run from before does not know was off.
    return [_files(part), *(part.get(name) or None for name in names)]


def _files(part: dict) -> list:
    """The files of a run's text by name and content."""
    return [[Path(name).name, fingerprint] for name, fingerprint in part["data"]]

"""What is kept of a run of train-task, read by all who look at runs: what it is, how good it is, how that is shown."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path

from .. import tables
from .task_arguments import MAPS, TrainTaskArguments, may_learn_factor_while_softmax

# Options that may differ between the runs of a folder, and when one goes on: they change what is looked at or how
# fast it goes, not what is trained.
FREE = {
    "output", "learning_rates", "seeds", "device", "compile", "cuda_graph", "together", "log_every",
    "validate_every", "validation_lengths", "validation_samples", "test_lengths", "test_precision", "test_samples",
    "tested", "batch_tokens", "checkpoint_every", "resume", "overwrite",
}  # fmt: skip


# What `best_of` does, in words.
TIES = (
    "Of runs that are equal in it the one with the most right tokens is the best, then the one with the lowest loss."
)


def identity_of(arguments: TrainTaskArguments) -> dict:
    """What must be the same for runs to be compared, and for one to go on."""
    values = {name: value for name, value in asdict(arguments).items() if name not in FREE}
    # Later versions of a task have other samples.
    version = arguments.chosen_task().version
    return json.loads(json.dumps(values | ({"task_version": version} if version > 1 else {})))


def rank(lines: list[dict]) -> tuple[float, float, float]:
    """What validations at the same lengths are compared by: means of exact answers, right tokens and -loss."""
    means = [sum(line[name] for line in lines) / len(lines) for name in ("exact_match", "token_accuracy", "loss")]
    return means[0], means[1], -means[2]


def best_of(runs: list[dict]) -> dict | None:
    """The run with the most exact answers, then right tokens, then the lowest loss, mean over validation lengths; None
    if there is none with a number for each."""
    sound = [run for run in runs if not run["failed"] and not any("missing" in line for line in run["validation"])]
    return max(sound, key=lambda run: rank(run["validation"]), default=None)


def share(line: dict | None) -> str:
    """Exact match in %, with its standard error where that is not 0.0."""
    if line is None or "missing" in line:
        return tables.MISSING
    error = tables.number(100 * line["standard_error"], 1)
    return tables.number(100 * line["exact_match"], 1) + ("" if error == "0.0" else f" ±{error}")


def whole_run(record: dict) -> dict:
    """A record, or what a checkpoint says of its run, with what earlier versions did and had no option for."""
    before = {"optimizer": "adamw", "softmax_share": 0.0, "new_learning_rate_share": 1.0}
    identity = {**before, **record["identity"]}
    factor = "learned" if may_learn_factor_while_softmax(identity) else "held"
    return {**record, "identity": {"factor_while_softmax": factor, **identity}}


def read_record(folder: Path) -> dict:
    """What is in a run's run.json.

    Raises:
        OSError: if it cannot be read as one.
    """
    file = folder / "run.json"
    try:
        saved = json.loads(file.read_text(encoding="utf-8"))
        needed = ("learning_rate", "seed", "finished")
        needed += ("name", "steps", "seconds", "failed", "validation") if saved["finished"] else ()
        if lost := [key for key in needed if key not in saved]:
            raise ValueError(f"it has no {', '.join(lost)}")
        if saved["identity"]["map"] not in MAPS:
            raise ValueError(f"map is {saved['identity']['map']!r}")
        if saved["finished"] and not saved["failed"] and not saved["validation"]:
            raise ValueError("it has no lines of validation")
        _check_lines(saved.get("validation", []))
        return whole_run(saved)
    except (ValueError, KeyError, TypeError) as error:
        raise OSError(f"{file} is damaged ({error}): train this run anew with --overwrite") from error


def read_tests(folder: Path) -> list[dict]:
    """What is in a run's test.json, nothing if it has none.

    Raises:
        OSError: if it cannot be read as one.
    """
    file = folder / "test.json"
    if not file.is_file():
        return []
    try:
        lines = json.loads(file.read_text(encoding="utf-8"))
        _check_lines(lines)
        return lines
    except (ValueError, KeyError, TypeError) as error:
        raise OSError(f"{file} is damaged ({error}): remove it, and test the run again with --resume auto") from error


def _check_lines(lines: list[dict]) -> None:
    """Raises an error unless every length is there once, with a share of exact answers or the reason why not."""
    lengths = [line["length"] for line in lines]
    if any(type(length) is not int for length in lengths) or len(set(lengths)) < len(lengths):
        raise ValueError(f"its lengths are {lengths}")
    for line in lines:
        if "missing" not in line and not (0 <= line["exact_match"] <= 1 and 0 <= line["standard_error"] <= 1):
            raise ValueError(f"exact match at length {line['length']} is {line['exact_match']}")
        for name in ("token_accuracy", "loss"):
            if "missing" not in line and not math.isfinite(line.get(name, 0.0)):
                raise ValueError(f"{name} at length {line['length']} is {line[name]}")

"""Small models from scratch on a synthetic task: a run per learning rate and seed, one after another or side by side,
the best by validation, their tests. (Vasylenko et al. 2025, arXiv 2506.16640, train so; see examples/reproduction.)

hf-sparse-attention train-task --config examples/reproduction/copy.yaml --map asentmax --output runs/copy-asentmax
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Generator
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from .. import tables
from ..checkpoint import choose_device
from ..config import VERSION
from ..files import write_json, write_text
from ..lock import sole_writer
from ..tasks.exact_match import score
from ..tasks.samples import SyntheticTask
from .task_arguments import TrainTaskArguments, check_task_arguments
from .task_model import new_model
from .task_options import has_option
from .task_record import TIES, best_of, identity_of, read_record, read_tests, share
from .task_run import train_run
from .task_step import working_precision


def train_task(arguments: TrainTaskArguments) -> dict:
    """Trains every run of the grid, and returns what is in summary.json: the runs, the best, the tests by run.

    A run lies in `output/rate-0.001-seed-0/`: model/ (with task.json), metrics.jsonl, checkpoint.pt, run.json,
    test.json.

    Raises:
        ValueError: for arguments that do not fit together, before anything is written; for runs in output that were
            trained otherwise.
        FileExistsError: if a run of the grid is there and is neither to go on nor to be replaced, or if another
            process trains into output.
    """
    check_task_arguments(arguments)
    task = arguments.chosen_task()
    device = choose_device(arguments.device)
    if arguments.cuda_graph and device.type != "cuda":
        raise ValueError(f"cuda_graph needs a CUDA device; the device is {device.type}")
    # Raises for sizes that cannot be.
    new_model(arguments, task, 0)
    output = Path(arguments.output).expanduser()
    grid = [(rate, seed) for rate in sorted(set(arguments.learning_rates)) for seed in sorted(set(arguments.seeds))]
    with sole_writer(output):
        return _train_grid(arguments, task, device, output, grid)


def _train_grid(
    arguments: TrainTaskArguments, task: SyntheticTask, device: torch.device, output: Path, grid: list
) -> dict:
    """The runs of a grid [(rate, seed)] and their tests."""
    names = {place: f"rate-{place[0]!r}-seed-{place[1]}" for place in grid}
    _check_output(output, arguments, names)
    if arguments.overwrite:
        # Killed now, they would be of runs that are no more.
        for name in ("summary.json", "summary.md"):
            (output / name).unlink(missing_ok=True)
    with tqdm(
        total=len(grid) * arguments.steps, desc=task.name, unit="step", dynamic_ncols=True,
        mininterval=0.5 if sys.stderr.isatty() else 10,
    ) as bar:  # fmt: skip
        ways = [train_run(output / names[place], arguments, task, device, *place, bar) for place in grid]
        runs = _side_by_side(ways, arguments.together)
    best = best_of(runs)
    summary = {
        "task": task.name,
        "task_settings": asdict(task),
        "identity": identity_of(arguments),
        "version": VERSION,
        "runs": runs,
        "best": best and best["name"],
        "tests": {},
    }
    write_json(output / "summary.json", summary)
    chosen = [run["name"] for run in runs if not run["failed"] and (arguments.tested == "all" or run is best)]
    for name in chosen if arguments.test_lengths else ():
        summary["tests"][name] = _test(output / name, arguments, task, device)
        write_json(output / "summary.json", summary)
    text = f"{_trained_with(summary['identity'])}\n\n{_shown(summary, tables.markdown)}"
    write_text(output / "summary.md", f"# {task.name}, {arguments.map}, {arguments.position}\n\n{text}\n")
    print(_shown(summary, tables.plain))
    return summary


def _side_by_side(runs: list[Generator[None, None, dict]], together: int) -> list[dict]:
    """Takes a step of each of `together` runs in turn; when one ends the next begins. What they return, in order."""
    results, waiting, active = {}, deque(enumerate(runs)), deque()
    try:
        while waiting or active:
            while waiting and len(active) < together:
                active.append(waiting.popleft())
            number, run = active.popleft()
            try:
                next(run)
            except StopIteration as end:
                results[number] = end.value
            else:
                active.append((number, run))
    finally:
        # When one ends them all: whoever holds its error would hold the models of the others.
        for _, run in active:
            run.close()
    return [results[number] for number in range(len(runs))]


def _check_output(output: Path, arguments: TrainTaskArguments, names: dict[tuple[float, int], str]) -> None:
    """Looks at the folders of a grid, {(rate, seed): name}, and at the other runs beside them."""
    wanted = identity_of(arguments)
    for (rate, seed), name in names.items():
        record = output / name / "run.json"
        if not (output / name).exists():
            continue
        if not record.is_file():
            raise FileExistsError(
                f"{output / name} is there and holds no run (it has no run.json); name another output"
            )
        if arguments.overwrite:
            continue
        if arguments.resume == "never":
            raise FileExistsError(
                f"{output / name} is there: go on with --resume auto, or replace it with --overwrite"
            )
        known = read_record(output / name)
        # The folder may have been renamed or copied.
        saved = {**known["identity"], "learning_rate": known.get("learning_rate"), "seed": known.get("seed")}
        identity = {**wanted, "learning_rate": rate, "seed": seed}
        if different := _differences(saved, identity):
            raise ValueError(f"{output / name} was trained otherwise ({different}); name another output")
    for file in sorted(output.glob("rate-*-seed-*/run.json")):
        if file.parent.name in names.values():
            continue
        if different := _differences(read_record(file.parent)["identity"], wanted):
            raise ValueError(
                f"{file.parent} was trained otherwise ({different}), and runs of one output differ in rate and seed "
                "alone: name another output"
            )


def _differences(saved: dict, identity: dict) -> str:
    return ", ".join(
        f"{key} {saved.get(key)!r} then, {identity.get(key)!r} now"
        for key in sorted({*saved, *identity})
        if saved.get(key) != identity.get(key)
    )


def _test(folder: Path, arguments: TrainTaskArguments, task: SyntheticTask, device: torch.device) -> list[dict]:
    """Exact match of a run's model on the fixed test sets; finished lengths are kept in test.json."""
    file = folder / "test.json"
    found = read_tests(folder) if arguments.resume == "auto" else []
    precision = arguments.test_precision or arguments.precision
    # Earlier versions tested in the precision of training and did not say so.
    same = (arguments.test_samples, precision)
    found = [
        line for line in found
        # What was measured at other lengths stays.
        if line["length"] not in arguments.test_lengths
        or (line.get("wanted"), line.get("precision", arguments.precision)) == same
    ]  # fmt: skip
    left = [length for length in sorted(set(arguments.test_lengths)) if length not in {row["length"] for row in found}]
    model = AutoModelForCausalLM.from_pretrained(folder / "model").to(device).eval()
    with tqdm(
        total=len(left) * arguments.test_samples, desc=f"test of {folder.name}", unit="sample", disable=not left,
        dynamic_ncols=True, mininterval=0.5 if sys.stderr.isatty() else 10,
    ) as bar:  # fmt: skip
        for length in left:
            begun = time.time()
            blocks = task.fixed_blocks(length, arguments.test_samples)
            with working_precision(precision, device):
                line = score(model, blocks, batch_tokens=arguments.batch_tokens, progress=bar.update)
            span = [begun, time.time()]
            kept = {"length": length, "wanted": arguments.test_samples, "precision": precision}
            found.append({**kept, **line, "span": span})
            write_json(file, found)
    return sorted((row for row in found if row["length"] in arguments.test_lengths), key=lambda row: row["length"])


def _trained_with(identity: dict) -> str:
    """What all runs of a folder have in common, beside what the heading says."""
    values = [
        f"{key} {value}" for key, value in identity.items()
        if key not in ("task", "map", "position") and value not in (None, []) and has_option(identity, key)
    ]  # fmt: skip
    return f"Trained with: {', '.join(values)}."


def _shown(summary: dict, table) -> str:
    lengths = sorted({line["length"] for run in summary["runs"] for line in run["validation"]})
    header = ["run", "steps/s", *(f"validation {length:,}" for length in lengths), "remark"]
    rows = []
    for run in summary["runs"]:
        by_length = {line["length"]: line for line in run["validation"]}
        numbers = [share(by_length.get(length)) for length in lengths]
        remark = run["failed"] or ("best" if run["name"] == summary["best"] else "")
        rows.append([run["name"], tables.number(run["steps"] / run["seconds"], 1), *numbers, remark])
    text = f"Exact match, %\n\n{table(header, rows)}"
    if len(rows) > 1:
        text += f"\n\nThe best has the highest mean over the validation lengths. {TIES}"
    if summary["tests"]:
        lengths = sorted({line["length"] for lines in summary["tests"].values() for line in lines})
        rows = [[name, *map(share, lines)] for name, lines in summary["tests"].items()]
        text += f"\n\n{table(['test', *(f'{length:,}' for length in lengths)], rows)}"
    return text

"""Small models from scratch on a synthetic task, top to bottom: a run per learning rate and seed, the best by
validation, its test. (Vasylenko et al. 2025, arXiv 2506.16640, train so; recipes are in examples/reproduction.)

hf-sparse-attention train-task --config examples/reproduction/copy.yaml --map asentmax --output runs/copy-asentmax
"""

from __future__ import annotations

import io
import json
import logging
import math
import shutil
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from .. import tables
from ..checkpoint import choose_device
from ..config import VERSION
from ..files import flush_file, whole_folder, write_bytes, write_json, write_text
from ..loading import count_parameters
from ..tasks.exact_match import score
from ..tasks.samples import SyntheticTask
from .recipe import rate_at
from .task_arguments import TrainTaskArguments, check_task_arguments
from .task_model import new_model
from .task_step import TaskStep, working_precision

logger = logging.getLogger(__name__)

# Options that may differ between the runs of a folder, and when one goes on: they change what is looked at or how
# fast it goes, not what is trained.
FREE = {
    "output", "learning_rates", "seeds", "device", "compile", "cuda_graph", "log_every", "validate_every",
    "validation_lengths", "validation_samples", "test_lengths", "test_samples", "batch_tokens", "checkpoint_every",
    "resume", "overwrite",
}  # fmt: skip


def train_task(arguments: TrainTaskArguments) -> dict:
    """Trains every run of the grid, and returns what is in summary.json: the runs, the best, its test.

    A run lies in `output/rate-0.001-seed-0/`: model/ (with task.json), metrics.jsonl, checkpoint.pt, run.json.

    Raises:
        ValueError: for arguments that do not fit together, before anything is written; for runs in output that were
            trained otherwise.
        FileExistsError: if a run of the grid is there and is neither to go on nor to be replaced.
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
    names = {place: f"rate-{place[0]!r}-seed-{place[1]}" for place in grid}
    _check_output(output, arguments, names.values())
    runs = []
    for place in grid:
        runs.append(_run(output / names[place], arguments, task, device, *place))
    summary = {
        "task": task.name,
        "task_settings": asdict(task),
        "identity": _identity(arguments),
        "version": VERSION,
        "runs": runs,
        "best": _best(runs),
        "test": None,
    }
    write_json(output / "summary.json", summary)
    if summary["best"] is not None and arguments.test_lengths:
        summary["test"] = _test(output / summary["best"], arguments, task, device)
        write_json(output / "summary.json", summary)
    text = _shown(summary, tables.markdown)
    write_text(output / "summary.md", f"# {task.name}, {arguments.map}, {arguments.position}\n\n{text}\n")
    print(_shown(summary, tables.plain))
    return summary


def _identity(arguments: TrainTaskArguments) -> dict:
    """What must be the same for runs to be compared, and for one to go on."""
    return json.loads(json.dumps({name: value for name, value in asdict(arguments).items() if name not in FREE}))


def _check_output(output: Path, arguments: TrainTaskArguments, names) -> None:
    if output.exists() and not output.is_dir():
        raise FileExistsError(f"output {output} is a file, not a folder")
    for name in names:
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
        saved, identity = _record(output / name)["identity"], _identity(arguments)
        different = [
            f"{key} {saved.get(key)!r} then, {identity.get(key)!r} now"
            for key in sorted({*saved, *identity})
            if saved.get(key) != identity.get(key)
        ]
        if different:
            raise ValueError(f"{output / name} was trained otherwise ({', '.join(different)}); name another output")


def _run(
    folder: Path, arguments: TrainTaskArguments, task: SyntheticTask, device: torch.device, rate: float, seed: int
) -> dict:
    """One run, from its beginning or where it stopped; returns what is in its run.json."""
    if arguments.overwrite and (folder / "run.json").is_file():
        shutil.rmtree(folder)
    record = {"name": folder.name, "learning_rate": rate, "seed": seed, "identity": _identity(arguments)}
    if (folder / "run.json").is_file():
        saved = _record(folder)
        if saved.get("finished"):
            logger.info("%s is finished and kept", folder)
            return _validated_as_asked(folder, saved, arguments, task, device)
    model = new_model(arguments, task, seed).to(device)
    record["parameters"] = count_parameters(model)
    lengths = arguments.training_lengths()
    step = TaskStep(model, arguments, (arguments.batch_size, task.width(lengths[1])), device)
    start, earlier = 0, 0.0
    if (folder / "checkpoint.pt").is_file():
        start, earlier = _load_checkpoint(folder / "checkpoint.pt", step, device)
    write_json(folder / "run.json", {**record, "finished": False})
    _keep_metrics(folder / "metrics.jsonl", start)
    begun, failed, window_begun, window, done = time.perf_counter(), None, time.perf_counter(), 0, start
    model.train()
    with tqdm(
        total=arguments.steps, initial=start, desc=folder.name, unit="step", dynamic_ncols=True,
        mininterval=0.5 if sys.stderr.isatty() else 10,
    ) as bar:  # fmt: skip
        for done in range(start + 1, arguments.steps + 1):
            batch = task.training_batch(done - 1, seed=seed, batch=arguments.batch_size, lengths=lengths)
            share = rate_at(
                done - 1, steps=arguments.steps, schedule=arguments.schedule, warmup=arguments.warmup_steps,
                final=arguments.final_share,
            )  # fmt: skip
            step(batch, rate * share)
            window += 1
            bar.update()
            last = done == arguments.steps
            if done % arguments.log_every == 0 or last:
                loss, norm = step.read_loss()
                now = time.perf_counter()
                if not math.isfinite(loss) or not math.isfinite(norm):
                    failed = f"loss {loss}, gradient norm {norm} in the steps up to {done}"
                    break
                line = {"kind": "train", "loss": loss, "gradient_norm": norm, "learning_rate": rate * share}
                timing = {"steps_per_second": window / (now - window_begun), "seconds": earlier + now - begun}
                _write_metrics(folder / "metrics.jsonl", done, **line, timing=timing)
                bar.set_postfix({"loss": f"{loss:.4f}"}, refresh=False)
                window_begun, window = now, 0
            pause = time.perf_counter()
            if arguments.validate_every and done % arguments.validate_every == 0 and not last:
                step.wait()
                for line in _validate(model, arguments, task):
                    _write_metrics(folder / "metrics.jsonl", done, kind="validation", **line)
                model.train()
            if arguments.checkpoint_every and (done % arguments.checkpoint_every == 0 or last):
                _save_checkpoint(folder, step, done, earlier + time.perf_counter() - begun)
            window_begun += time.perf_counter() - pause
    record |= {"steps": done, "seconds": earlier + time.perf_counter() - begun, "failed": failed}
    record |= {"validation": [], "validation_of": _validation_of(arguments)}
    if failed is None:
        with whole_folder(folder / "model", replace=True) as place:
            model.save_pretrained(place)
            write_json(place / "task.json", {"task": task.name, "settings": asdict(task), "lengths": list(lengths)})
        record["validation"] = _validate(model, arguments, task)
        for line in record["validation"]:
            _write_metrics(folder / "metrics.jsonl", arguments.steps, kind="validation", **line)
    else:
        logger.warning("%s failed: %s", folder, failed)
    write_json(folder / "run.json", {**record, "finished": True})
    return {**record, "finished": True}


def _validated_as_asked(
    folder: Path, saved: dict, arguments: TrainTaskArguments, task: SyntheticTask, device: torch.device
) -> dict:
    """A finished run, validated anew if other lengths or samples are asked for than it was validated on."""
    if saved["failed"] or saved["validation_of"] == _validation_of(arguments):
        return saved
    model = AutoModelForCausalLM.from_pretrained(folder / "model").to(device)
    saved |= {"validation": _validate(model, arguments, task), "validation_of": _validation_of(arguments)}
    write_json(folder / "run.json", saved)
    return saved


def _validation_of(arguments: TrainTaskArguments) -> list:
    return [arguments.validated_lengths(), arguments.validation_samples]


def _validate(model, arguments: TrainTaskArguments, task: SyntheticTask) -> list[dict]:
    model.eval()
    found = []
    for length in arguments.validated_lengths():
        blocks = task.fixed_blocks(length, arguments.validation_samples, split="validation")
        with working_precision(arguments, model.device):
            found.append({"length": length, **score(model, blocks, batch_tokens=arguments.batch_tokens)})
    return found


def _best(runs: list[dict]) -> str | None:
    """The run with the most exact answers, then right tokens, then the lowest loss, mean over validation lengths."""

    def rank(run: dict) -> tuple:
        lines = run["validation"]
        if run["failed"] or any("missing" in line for line in lines):
            return (-1.0, -1.0, -math.inf)
        mean = [sum(line[name] for line in lines) / len(lines) for name in ("exact_match", "token_accuracy", "loss")]
        return (mean[0], mean[1], -mean[2])

    best = max(runs, key=rank)
    return None if best["failed"] else best["name"]


def _test(folder: Path, arguments: TrainTaskArguments, task: SyntheticTask, device: torch.device) -> list[dict]:
    """Exact match of a run's model on the fixed test sets; finished lengths are kept in test.json."""
    file = folder / "test.json"
    found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() and arguments.resume == "auto" else []
    found = [line for line in found if line.get("wanted") == arguments.test_samples]
    left = [length for length in sorted(set(arguments.test_lengths)) if length not in {row["length"] for row in found}]
    model = AutoModelForCausalLM.from_pretrained(folder / "model").to(device).eval()
    with tqdm(
        total=len(left) * arguments.test_samples, desc="test", unit="sample", disable=not left, dynamic_ncols=True,
        mininterval=0.5 if sys.stderr.isatty() else 10,
    ) as bar:  # fmt: skip
        for length in left:
            blocks = task.fixed_blocks(length, arguments.test_samples)
            with working_precision(arguments, device):
                line = score(model, blocks, batch_tokens=arguments.batch_tokens, progress=bar.update)
            found.append({"length": length, "wanted": arguments.test_samples, **line})
            write_json(file, found)
    return sorted((row for row in found if row["length"] in arguments.test_lengths), key=lambda row: row["length"])


def _record(folder: Path) -> dict:
    """What is in a run's run.json.

    Raises:
        OSError: if it cannot be read as one.
    """
    file = folder / "run.json"
    try:
        saved = json.loads(file.read_text(encoding="utf-8"))
        return {**saved, "identity": dict(saved["identity"])}
    except (ValueError, KeyError, TypeError) as error:
        raise OSError(f"{file} is damaged ({error}): train this run anew with --overwrite") from error


def _load_checkpoint(file: Path, step: TaskStep, device: torch.device) -> tuple[int, float]:
    """Takes up a checkpoint; returns the steps done and the seconds they took."""
    try:
        state = torch.load(file, map_location=device, weights_only=True)
        step.load(state["step"])
        return state["done"], state["seconds"]
    # PyTorch has no error of its own for a damaged file.
    except Exception as error:
        raise OSError(f"{file} is damaged ({error}): train this run anew with --overwrite") from error


def _save_checkpoint(folder: Path, step: TaskStep, done: int, seconds: float) -> None:
    # A checkpoint is never ahead of the lines.
    if (folder / "metrics.jsonl").exists():
        flush_file(folder / "metrics.jsonl")
    content = io.BytesIO()
    torch.save({"step": step.state(), "done": done, "seconds": seconds}, content)
    write_bytes(folder / "checkpoint.pt", content.getvalue())


def _keep_metrics(file: Path, start: int) -> None:
    """Leaves the lines up to a step, so that no step is there twice."""
    lines = []
    for line in file.read_text(encoding="utf-8").splitlines() if start and file.is_file() else []:
        try:
            if json.loads(line)["step"] <= start:
                lines.append(line + "\n")
        except (json.JSONDecodeError, KeyError, TypeError):
            # A line cut off by the end of the process that wrote it.
            continue
    write_text(file, "".join(lines))


def _write_metrics(file: Path, step: int, **values) -> None:
    with open(file, "a", encoding="utf-8") as stream:
        stream.write(json.dumps({"step": step, **values}) + "\n")


def _shown(summary: dict, table) -> str:
    lengths = sorted({line["length"] for run in summary["runs"] for line in run["validation"]})
    header = ["run", "steps/s", *(f"validation {length:,}" for length in lengths), "remark"]
    rows = []
    for run in summary["runs"]:
        by_length = {line["length"]: line for line in run["validation"]}
        numbers = [_percent(by_length.get(length)) for length in lengths]
        remark = run["failed"] or ("best" if run["name"] == summary["best"] else "")
        rows.append([run["name"], tables.number(run["steps"] / run["seconds"], 1), *numbers, remark])
    text = f"Exact match, %\n\n{table(header, rows)}"
    if summary["test"]:
        header = ["test", *(f"{line['length']:,}" for line in summary["test"])]
        text += f"\n\n{table(header, [[summary['best'], *map(_percent, summary['test'])]])}"
    return text


def _percent(line: dict | None) -> str:
    if line is None or "missing" in line:
        return tables.MISSING
    return f"{100 * line['exact_match']:.1f} ±{100 * line['standard_error']:.1f}"

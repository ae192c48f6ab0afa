"""One run of train-task: a model of a learning rate and seed, its metrics, checkpoints and record, in a folder of its
own. It is a generator that pauses after every step, so that several runs can go side by side in one process."""

from __future__ import annotations

import io
import json
import logging
import math
import shutil
import time
from collections.abc import Generator
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from ..files import flush_file, whole_folder, write_bytes, write_json, write_text
from ..loading import count_parameters
from ..maps import MAPS
from ..models import set_alpha
from ..tasks.exact_match import score
from ..tasks.samples import SyntheticTask
from ..tasks.streams import Layout, Stream, packed_layout
from ..versions import versions
from .recipe import rate_at
from .task_arguments import TrainTaskArguments
from .task_model import new_model
from .task_record import identity_of, read_record, whole_run
from .task_step import TaskStep, working_precision

logger = logging.getLogger(__name__)


def train_run(
    folder: Path,
    arguments: TrainTaskArguments,
    task: SyntheticTask,
    device: torch.device,
    rate: float,
    seed: int,
    bar: tqdm,
) -> Generator[None, None, dict]:
    """Trains a run from its beginning or where it stopped, pausing after every step; returns what is in its run.json.

    Raises:
        OSError: if its files are damaged.
    """
    if arguments.overwrite and (folder / "run.json").is_file():
        shutil.rmtree(folder)
    record = {"name": folder.name, "learning_rate": rate, "seed": seed, "identity": identity_of(arguments)}
    if (folder / "run.json").is_file():
        saved = read_record(folder)
        if saved.get("finished"):
            logger.info("%s is finished and kept", folder)
            bar.update(arguments.steps)
            return _validated_as_asked(folder, saved, arguments, task, device)
    model = new_model(arguments, task, seed).to(device)
    record["parameters"] = count_parameters(model)
    record |= _computed_by(arguments, device)
    lengths, layout = arguments.training_lengths(), _layout(arguments, task)
    step = TaskStep(model, arguments, layout, device)
    start, spans = 0, []
    if (folder / "checkpoint.pt").is_file():
        start, spans = _load_checkpoint(folder / "checkpoint.pt", step, device, _whose(record))
        bar.update(start)
        logger.info("%s goes on from step %d of %d", folder, start, arguments.steps)
    softmax_steps, alpha = arguments.softmax_steps(), None
    if softmax_steps:
        alpha = model.config.sparse_attention["alpha"]
    if start < softmax_steps:
        set_alpha(model, 1.0)
        step.function_changed(softmax=True)
    earlier = sum(end - begin for begin, end in spans)
    write_json(folder / "run.json", {**record, "finished": False})
    _keep_metrics(folder / "metrics.jsonl", start, arguments.steps)
    begun, failed, window_begun, window, done = time.time(), None, time.perf_counter(), 0, start
    model.train()
    arrays = iter(Stream(task, seed, arguments.batch_size, lengths, layout, start, arguments.steps))
    for done in range(start + 1, arguments.steps + 1):
        if not step.left:
            batches = next(arrays)
            step.hand_over(batches, [_rate(arguments, rate, done + ahead) for ahead in range(len(batches))])
        if done == softmax_steps + 1 > 1:
            set_alpha(model, alpha)
            step.function_changed()
        try:
            step()
        except ValueError as error:
            # Where numbers can be looked at, a learned alpha that is none is refused.
            if step.is_finite():
                raise
            failed = f"{error}, in step {done}"
            bar.total -= arguments.steps - done
            break
        window += 1
        bar.update()
        last = done == arguments.steps
        if done % arguments.log_every == 0 or last:
            loss, norm = step.read_loss()
            now = time.perf_counter()
            if not math.isfinite(loss) or not math.isfinite(norm):
                failed = f"loss {loss}, gradient norm {norm} in the steps up to {done}"
                bar.total -= arguments.steps - done
                break
            line = {"kind": "train", "loss": loss, "gradient_norm": norm}
            line["learning_rate"] = _rate(arguments, rate, done)
            if done <= softmax_steps:
                line["alpha"] = 1.0
            elif softmax_steps and not MAPS[arguments.map].learned_alpha:
                line["alpha"] = alpha
            timing = {"steps_per_second": window / (now - window_begun), "seconds": earlier + time.time() - begun}
            _write_metrics(folder / "metrics.jsonl", done, **line, timing=timing)
            bar.set_postfix_str(f"{folder.name} loss {loss:.4f}", refresh=False)
            window_begun, window = now, 0
        pause = time.perf_counter()
        if arguments.validate_every and done % arguments.validate_every == 0 and not last:
            step.wait()
            for line in _validate(model, arguments, task):
                _write_metrics(folder / "metrics.jsonl", done, kind="validation", **line)
            model.train()
        if arguments.checkpoint_every and (done % arguments.checkpoint_every == 0 or last):
            _save_checkpoint(folder, step, done, [*spans, [begun, time.time()]], _whose(record))
        window_begun += time.perf_counter() - pause
        yield
    spans = [*spans, [begun, time.time()]]
    record |= {"steps": done, "seconds": sum(end - begin for begin, end in spans), "spans": spans, "failed": failed}
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


def _computed_by(arguments: TrainTaskArguments, device: torch.device) -> dict:
    """What decides the rounding and is no part of the run: a small model may end tens of points elsewhere by it."""
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else device.type,
        "threads": None if on_gpu else torch.get_num_threads(),
        "compile": arguments.compile,
        "cuda_graph": arguments.cuda_graph,
        "versions": versions("torch", "transformers", "triton"),
    }


def _layout(arguments: TrainTaskArguments, task: SyntheticTask) -> Layout:
    """Samples side by side where what computes the attention skips the keys a query does not see.

    SDPA, which computes the dense model and softmax in float32, would read a matrix of all queries times all keys; and
    looking for the samples waits for the device, which a captured step cannot unless that is compiled.
    """
    is_softmax = arguments.map == "softmax" or MAPS[arguments.map].softmax or arguments.alpha == 1
    is_dense = arguments.map == "softmax" and arguments.position == "rope"
    lengths, waits = arguments.training_lengths(), arguments.cuda_graph and not arguments.compile
    if waits or is_dense or (is_softmax and arguments.precision != "bfloat16"):
        return Layout(arguments.batch_size, task.width(lengths[1]))
    return packed_layout(task, arguments.batch_size, lengths)


def _rate(arguments: TrainTaskArguments, peak: float, step: int) -> float:
    """The learning rate of a step, counted from 1."""
    return peak * rate_at(
        step - 1, steps=arguments.steps, schedule=arguments.schedule, warmup=arguments.warmup_steps,
        final=arguments.final_share,
    )  # fmt: skip


def _validated_as_asked(
    folder: Path, saved: dict, arguments: TrainTaskArguments, task: SyntheticTask, device: torch.device
) -> dict:
    """A finished run, validated anew if other lengths or samples are asked for than it was validated on."""
    if saved["failed"] or saved.get("validation_of") == _validation_of(arguments):
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
        with working_precision(arguments.precision, model.device):
            found.append({"length": length, **score(model, blocks, batch_tokens=arguments.batch_tokens)})
    return found


def _whose(record: dict) -> dict:
    """Of which run a checkpoint is."""
    return {name: record[name] for name in ("learning_rate", "seed", "identity")}


def _load_checkpoint(file: Path, step: TaskStep, device: torch.device, whose: dict) -> tuple[int, list]:
    """Takes up a checkpoint; returns the steps done and when they were: [begin, end] of each time."""
    try:
        state = torch.load(file, map_location=device, weights_only=True)
        if whole_run(state.get("run", whose)) != whose:
            raise ValueError("it is of another run")
        step.load(state["step"])
        return state["done"], state["spans"]
    # PyTorch has no error of its own for a damaged file.
    except Exception as error:
        raise OSError(f"{file} is damaged ({error}): train this run anew with --overwrite") from error


def _save_checkpoint(folder: Path, step: TaskStep, done: int, spans: list, whose: dict) -> None:
    # A checkpoint is never ahead of the lines.
    if (folder / "metrics.jsonl").exists():
        flush_file(folder / "metrics.jsonl")
    content = io.BytesIO()
    torch.save({"step": step.state(), "done": done, "spans": spans, "run": whose}, content)
    write_bytes(folder / "checkpoint.pt", content.getvalue())


def _keep_metrics(file: Path, start: int, steps: int) -> None:
    """Leaves the lines up to a step, so that no step is there twice; the validation at the end comes after it."""
    lines = []
    for line in file.read_text(encoding="utf-8").splitlines() if start and file.is_file() else []:
        try:
            content = json.loads(line)
            ended = content["step"] == steps and content["kind"] == "validation"
            if content["step"] <= start and not ended:
                lines.append(line + "\n")
        except (json.JSONDecodeError, KeyError, TypeError):
            # A line cut off by the end of the process that wrote it.
            continue
    write_text(file, "".join(lines))


def _write_metrics(file: Path, step: int, **values) -> None:
    with open(file, "a", encoding="utf-8") as stream:
        stream.write(json.dumps({"step": step, **values}) + "\n")

"""The folder of a run: whether it may be written, where to go on, metrics.jsonl, and what is left at the end."""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from ..checkpoint import examine
from ..files import fingerprint, flush_file, remove_partial, whole_folder, write_json
from ..held_out import held_out_in_words
from ..loading import Source, companions_of
from ..lock import LOCK
from ..text import find_texts
from ..versions import versions
from .arguments import DEFAULTS, TrainArguments
from .state import load_state, read_state, whole_states

# Options that may differ when a run goes on: they change what is written, not what is computed. The blocks of a step
# are compared as their number, however they are shared out.
FREE = {
    "output", "resume", "overwrite", "checkpoint_every", "keep_checkpoints", "report_to", "run_name", "log_every",
    "eval_every", "on_nonfinite", "lora_save", "save_dtype", "batch_size", "gradient_accumulation", "compile", "cpu",
    "gradient_checkpointing", "loss_chunk", "push_to_hub", "hub_model_id", "hub_private", "recipe",
}  # fmt: skip


class Metrics:
    """`metrics.jsonl`, one JSON object a line, written by the main process, and the trackers beside it.

    Lines of a kind (train, eval, attention, skipped, failed) have their step first; what depends on the clock is under
    `timing`. Going on from a step, the lines after it are removed, so that no step is there twice.
    """

    def __init__(self, path: Path, start: int, accelerator):
        self.accelerator, self.path = accelerator, path
        if not accelerator.is_main_process:
            return
        kept = []
        if start and path.is_file():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    if json.loads(line)["step"] <= start:
                        kept.append(line + "\n")
                except (json.JSONDecodeError, KeyError, TypeError):
                    # A line cut off by the end of the process that wrote it.
                    continue
        temporary = path.with_name(f".{path.name}.kept")
        temporary.write_text("".join(kept), encoding="utf-8")
        os.replace(temporary, path)

    def write(self, step: int, kind: str, **values) -> None:
        numbers = {f"{kind}/{key}": value for key, value in values.items() if isinstance(value, (int, float))}
        self.accelerator.log(numbers, step=step)
        if self.accelerator.is_main_process:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, "kind": kind, **values}) + "\n")

    def flush(self) -> None:
        """Puts the lines on disk: a checkpoint is never ahead of them."""
        if self.accelerator.is_main_process and self.path.exists():
            flush_file(self.path)


def check_output(output: Path, arguments: TrainArguments) -> None:
    """Raises FileExistsError if output is in use and the run neither goes on there nor replaces it."""
    if output.exists() and not output.is_dir():
        raise FileExistsError(f"output {output} is a file, not a folder")
    for model in (Path(name).expanduser() for name in (arguments.model, arguments.distill) if name is not None):
        if model.exists() and output.resolve() in (model.resolve(), *model.resolve().parents) and arguments.overwrite:
            raise ValueError(f"output {output} holds the model {model}, which would be overwritten")
    # Encoded text is kept from a run that failed before its first step, and is of use to the next.
    if not output.exists() or not set(os.listdir(output)) - {"packed", LOCK}:
        return
    if arguments.resume == "never" and not arguments.overwrite:
        raise FileExistsError(
            f"output {output} exists and is not empty: go on with --resume auto, replace it with --overwrite, or name "
            "another"
        )
    if not (output / "run.json").is_file():
        raise FileExistsError(f"output {output} is not empty and holds no training run (it has no run.json)")


def identity_of(
    arguments: TrainArguments, per_step: int, block_size: int | list, tokenizer, source: Source, teacher: Source | None
) -> dict:
    """What must be the same for a run to go on: everything its numbers follow from."""
    options = {name: value for name, value in asdict(arguments).items() if name not in FREE}
    files = [
        [name, fingerprint((Path(name),)) if kind != "hub" else None]
        for names in (arguments.train_data, arguments.eval_data)
        for kind, name in (find_texts(names) if names else [])
    ]
    return {
        **options,
        "block_size": block_size,
        "blocks_per_step": per_step,
        "data": files,
        "vocabulary": len(tokenizer),
        "weights": fingerprint(source.weights),
        **({"dense_weights": source.record.get("dense_weights")} if source.is_sparse else {}),
        **({} if teacher is None else {"teacher": fingerprint(teacher.weights)}),
    }


def _different(identity: dict, saved: dict) -> str:
    # What was saved went through JSON, which knows no tuples; runs from before do not know their teacher, nor
    # what their model was made of, which its weights stand for.
    known = {"teacher": identity.get("teacher"), **saved, "dense_weights": identity.get("dense_weights")}
    # Nor the precision that accelerate was told.
    known |= {"mixed_precision": identity["mixed_precision"]} if known.get("mixed_precision") is None else {}
    names = [name for name, value in json.loads(json.dumps(identity)).items() if known.get(name) != value]
    return ", ".join(f"{name} {saved.get(name)!r} then, {identity[name]!r} now" for name in names)


def finished_summary(output: Path, arguments: TrainArguments, identity: dict) -> dict | None:
    """The summary of a run that is already done, if it is this one.

    Raises:
        ValueError: if it is another one, or its model was saved otherwise than is asked now.
    """
    if not (output / "summary.json").is_file() or not (output / "model").is_dir():
        return None
    saved = json.loads((output / "run.json").read_text(encoding="utf-8"))
    if different := _different(identity, saved):
        raise ValueError(
            f"{output} holds another run, finished: {different}. To train its model further name it as --model, and "
            "another --output"
        )
    summary = json.loads((output / "summary.json").read_text(encoding="utf-8"))
    then = summary.get("options", {})
    for name in ("save_dtype", "lora_save"):
        if name in then and then[name] != getattr(arguments, name):
            raise ValueError(
                f"{name} is {getattr(arguments, name)!r}, but {output} holds this run, finished and saved with "
                f"{then[name]!r}: leave {name} as it was, or remove {output / 'summary.json'}, and the model is "
                "written anew from the last checkpoint"
            )
    return summary


def checkpoint_to_go_on_from(output: Path, arguments: TrainArguments, identity: dict) -> Path | None:
    """The checkpoint that `resume` means, checked to be whole and of this run; None to begin at the beginning.

    Raises:
        ValueError: if it is of another run, or output holds another one, which would be lost.
    """
    path = None
    if arguments.resume == "auto":
        path = next(reversed(whole_states(output / "checkpoints")), None)
    elif arguments.resume != "never":
        path = Path(arguments.resume).expanduser()
    if path is not None and (different := _different(identity, read_state(path)["run"]["identity"])):
        raise ValueError(f"{path} belongs to a run with other options: {different}")
    if arguments.resume not in ("auto", "never") and (output / "run.json").is_file():
        saved = json.loads((output / "run.json").read_text(encoding="utf-8"))
        different = _different(identity, saved) if "blocks_per_step" in saved else "one of several stages"
        if different:
            raise ValueError(
                f"{output} holds another run than {path} ({different}), which would be lost: name another --output"
            )
    return path


def begin_run(
    output: Path, arguments: TrainArguments, identity: dict, path: Path | None, accelerator, model, optimizer, data
) -> tuple[int, dict]:
    """Prepares the folder of the run; puts everything where the checkpoint `path` left it.

    Returns the number of steps done, and the numbers gathered in them.
    """
    checkpoints = output / "checkpoints"
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        if arguments.overwrite:
            for name in ("checkpoints", "model", "logs", "stages"):
                shutil.rmtree(output / name, ignore_errors=True)
            for name in ("summary.json", "metrics.jsonl"):
                (output / name).unlink(missing_ok=True)
        output.mkdir(parents=True, exist_ok=True)
        remove_partial(output)
        remove_partial(checkpoints)
        write_json(output / "run.json", identity)
        if path is not None:
            # What came after this checkpoint is another future.
            for later in whole_states(checkpoints):
                if read_state(later)["step"] > read_state(path)["step"]:
                    shutil.rmtree(later)
    accelerator.wait_for_everyone()
    if path is None:
        fresh = {
            "tokens": 0,
            "seconds": 0.0,
            "device_seconds": 0.0,
            "skipped": 0,
            "loss": None,
            "held_out": [],
            "attention": {},
            "utilisation": None,
        }
        return 0, {**fresh, "window": {"loss": 0.0, "steps": 0, "layers": []}}
    saved, run = load_state(path, accelerator, model, optimizer)
    data.load_state_dict(saved)
    del run["identity"]
    step = read_state(path)["step"]
    accelerator.print(f"going on from {path}, step {step}")
    return step, run


def summary_of(
    source: Source,
    settings,
    arguments: TrainArguments,
    accelerator,
    counts: dict,
    run: dict,
    identity: dict,
    epochs,
) -> dict:
    """What a model card says of the training."""
    cuda = accelerator.device.type == "cuda"
    device = torch.cuda.get_device_name(accelerator.device) if cuda else f"{platform.machine()} CPU"
    attention = {} if settings is None else settings.to_dict()
    # Of blocks that grow, the longest.
    block_size = identity["block_size"] if isinstance(identity["block_size"], int) else identity["block_size"][-1][0]
    return {
        "base_model": source.name,
        "base_commit": source.commit,
        "sparse_attention": attention or None,
        "map": attention.get("map", "none"),
        "steps": arguments.steps,
        "tokens": run["tokens"],
        "epochs": epochs,
        "block_size": block_size,
        "blocks_per_step": identity["blocks_per_step"],
        "recipe": arguments.recipe,
        "stage": arguments.stage,
        "skipped_steps": run["skipped"],
        "learning_rate": arguments.learning_rate,
        "new_learning_rate": arguments.learning_rate
        if arguments.new_learning_rate is None
        else arguments.new_learning_rate,
        "options": {name: value for name, value in asdict(arguments).items() if name not in ("output", "resume")},
        "train_loss": run["loss"],
        "eval_loss": run["held_out"],
        "attention": run["attention"],
        "train_data": arguments.train_data,
        "eval_data": arguments.eval_data,
        **counts,
        "hardware": f"{accelerator.num_processes} x {device}",
        "mixed_precision": accelerator.mixed_precision,
        "seconds": run["seconds"],
        "device_seconds": run["device_seconds"],
        "tokens_per_second": run["tokens"] / run["seconds"] if run["seconds"] else None,
        "flop_utilisation": run["utilisation"],
        "versions": versions("torch", "transformers", "accelerate", "peft", "triton"),
        "command": command_of(arguments, accelerator.num_processes, accelerator.mixed_precision),
    }


def device_seconds(summary: dict) -> float:
    """Seconds of all devices together; of a run from before as if it had had as many as at its end throughout."""
    known = summary.get("device_seconds")
    return summary["seconds"] * int(summary["hardware"].split(" x ")[0]) if known is None else known


def command_of(arguments: TrainArguments, processes: int, mixed_precision: str = "no") -> str:
    """The command line that gives these arguments, however they were given; the precision may be accelerate's."""
    if mixed_precision != "no":
        arguments = replace(arguments, mixed_precision=mixed_precision)
    words = ["hf-sparse-attention", "train"]
    if processes > 1:
        words = ["accelerate", "launch", "--num_processes", str(processes), "-m", "hf_sparse_attention.train"]
    for option in fields(arguments):
        value = getattr(arguments, option.name)
        default = [] if option.default_factory is list else DEFAULTS.get(option.name, option.default)
        # Without a recipe the stage says that there is to be none.
        if option.name == "stage" and arguments.recipe is None and arguments.map != "none" and not arguments.stages:
            default = None
        if value not in (default, None) and option.name not in ("resume", "overwrite"):
            values = value if isinstance(value, list) else [value]
            words += [
                f"--{option.name}",
                *(json.dumps(each) if isinstance(each, dict) else str(each) for each in values),
            ]
    return shlex.join(words)


def save_model(folder: Path, source: Source, model: PreTrainedModel, arguments: TrainArguments, summary: dict) -> None:
    """A folder ready for the Hub: weights, config, tokenizer and the summary, whole or not at all. The summary gets
    the fingerprint of the model."""
    if arguments.lora_rank and arguments.lora_save == "merge":
        model = model.merge_and_unload()
    if arguments.save_dtype is not None:
        model = model.to(getattr(torch, arguments.save_dtype))
    if arguments.lora_rank and arguments.lora_save == "adapter":
        for adapter in model.peft_config.values():
            adapter.base_model_name_or_path = source.name
    with whole_folder(folder, replace=True) as partial_folder:
        model.save_pretrained(partial_folder)
        for file in companions_of(source.folder):
            shutil.copyfile(file, partial_folder / file.name)
        # Ties what is said here to these weights; an adapter alone is no model.
        summary["fingerprint"] = (
            examine(partial_folder).fingerprint if (partial_folder / "config.json").exists() else None
        )
        write_json(partial_folder / "summary.json", summary)


def print_summary(output: Path, summary: dict) -> None:
    lines = [f"model: {output / 'model'}", f"steps {summary['steps']:,}, tokens {summary['tokens']:,}"]
    lines[1] += f", {summary['epochs']:.2f} passes over the data, {summary['seconds']:.0f} s on {summary['hardware']}"
    if summary["flop_utilisation"]:
        lines[1] += f", model FLOP utilisation {summary['flop_utilisation']:.1%}"
    if summary["stage"] == "match" and summary["train_loss"] is not None:
        lines.append(f"squared error of the attention outputs, relative to their size: {summary['train_loss']:.5f}")
    if summary["eval_loss"]:
        lines.append(f"held-out loss: {held_out_in_words(summary)}")
    if summary["attention"]:
        support, zeros = summary["attention"]["support"], summary["attention"]["zeros"]
        lines.append(
            f"attention: {support:.1f} keys carry weight on average, {zeros:.1%} of the weights are exactly 0"
        )
    print("\n".join(lines))

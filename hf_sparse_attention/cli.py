"""The command line: a command's words enter, its dataclass and its function are called, an exit code leaves.
Every option is a field of the command's dataclass; every command can be called from Python with that dataclass."""

from __future__ import annotations

import importlib
import logging
import sys
from dataclasses import dataclass

from .arguments import parse_arguments
from .config import VERSION

PROGRAM = "hf-sparse-attention"


@dataclass(frozen=True)
class Command:
    """One row of `COMMANDS`: where a command lives and what it does.

    Args:
        module: the room, below this package.
        arguments: its dataclass.
        function: what is called with it.
        summary: one line for the overview.
        interrupted: how a run that was interrupted goes on.
    """

    module: str
    arguments: str
    function: str
    summary: str
    interrupted: str = ""


COMMANDS = {
    "demo": Command(
        "demo",
        "DemoArguments",
        "run_demo",
        "convert, train, evaluate and publish an embedded model (CPU)",
        interrupted="run it again to go on",
    ),
    "convert": Command("convert", "ConvertArguments", "convert_model", "dense model -> sparse model"),
    "train": Command(
        "train",
        "TrainArguments",
        "train_model",
        "continue the pretraining of a converted model",
        interrupted="add --resume auto to go on from the last checkpoint",
    ),
    "train-task": Command(
        "train",
        "TrainTaskArguments",
        "train_task",
        "a small model from scratch on a synthetic task (also: train --task)",
        interrupted="add --resume auto to go on from the last checkpoint",
    ),
    "table": Command("train", "TableArguments", "table_of_runs", "runs of train and train-task -> tables"),
    "evaluate": Command(
        "evaluate",
        "EvaluateArguments",
        "evaluate_models",
        "perplexity, needles and tasks by length, side by side",
        interrupted="run it again to go on: what was measured is kept",
    ),
    "report": Command(
        "report", "ReportArguments", "report_model", "what the attention does: support, sparsity, scale"
    ),
    "push": Command("hub", "PushArguments", "push_model", "model card and upload to the Hub"),
    "benchmark": Command(
        "benchmark", "BenchmarkArguments", "benchmark_attention", "time the kernels beside others on this GPU"
    ),
}


def overview() -> str:
    """What `hf-sparse-attention` prints without a command."""
    lines = [f"usage: {PROGRAM} COMMAND [options]", "", "Sparse attention that is trained, for Transformers.", ""]
    lines += [f"  {name:<11} {command.summary}" for name, command in COMMANDS.items()]
    lines += ["", f"{PROGRAM} COMMAND --help lists the options; --config FILE.yaml reads them from a file."]
    return "\n".join(lines)


def main(words: list[str] | None = None) -> int:
    """Runs a command and returns the exit code: 0, or 2 for an error of the user's that is said in one line."""
    words = sys.argv[1:] if words is None else words
    if not words or words[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    if words[0] in ("-V", "--version"):
        print(f"{PROGRAM} {VERSION}")
        return 0
    if words[0] not in COMMANDS:
        print(f"error: unknown command {words[0]!r}; choose one of {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger(__package__).setLevel(logging.INFO)
    name, *words = words
    if name == "train" and any(word.partition("=")[0] == "--task" for word in words):
        name = "train-task"
    command = COMMANDS[name]
    try:
        room = importlib.import_module(f"{__package__}.{command.module}")
        arguments = parse_arguments(getattr(room, command.arguments), words, program=f"{PROGRAM} {name}")
        getattr(room, command.function)(arguments)
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        if logging.getLogger(__package__).isEnabledFor(logging.DEBUG):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(": ".join(["interrupted", *filter(None, [command.interrupted])]), file=sys.stderr)
        return 130
    return 0

"""A training run: one stage of it, or several one after the other, each going on from the model of the one before and
from its place in the data."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import MISSING, asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import HfArgumentParser

from ..files import write_json
from ..lock import sole_writer
from .arguments import TrainArguments, check_arguments
from .default_recipe import ANNEAL, MATCH_DISTILL, check_reach, choose, said, stages_of_recipe
from .distributed import all_agree, check_launch, join_processes
from .lengths import parse_block_sizes
from .loop import train_stage
from .plan import default_block_size, find_source, find_teacher, settings_of
from .publish import check_push, push_run
from .run import check_output, command_of, device_seconds, print_summary

if TYPE_CHECKING:
    from accelerate import PartialState

# Options that are those of the whole run: what it starts from, reads and writes.
COMMON = {
    "model", "output", "revision", "train_data", "eval_data", "text_column", "train_split", "eval_split",
    "blank_lines", "streaming", "map", "position", "layers", "heads", "scale_start", "stages", "resume", "overwrite",
    "cpu", "report_to", "dtype", "compile", "mixed_precision", "push_to_hub", "hub_model_id", "hub_private", "recipe",
}  # fmt: skip
# What a dense model is converted with: the first stage does it, the later ones find it done.
_CONVERSION = ("position", "layers", "heads", "scale_start", "revision", "rope_theta", "rope_yarn", "max_positions")


def train_model(arguments: TrainArguments) -> dict:
    """Trains; writes the model to `output/model`; returns the summary, which is also in `output/summary.json`.

    Without `stages` and `stage` a line names the recipe. With stages, also those of a recipe, each is a run in
    `output/stages/1-match` and so on; the summary is the last one's, with the tokens, steps and seconds of all and
    every stage's own under `stages`.

    Raises:
        ValueError: for arguments, a model, data or a tokenizer that do not fit together, before anything is written.
        FileExistsError: if output is in use and the run is neither to go on nor to be replaced, or if another run is
            writing there.
        OSError: if the model or data is missing or corrupt, the disk is full, or the model could not be pushed.
        RuntimeError: if the loss is not finite or memory runs out, and `on_nonfinite` is stop.
    """
    check_push(arguments)
    asked, planned = _with_recipe(arguments)
    stages = stages_of(planned) if planned.stages else [planned]
    for stage in stages:
        check_launch(stage)
    state = join_processes(arguments)
    output = Path(arguments.output).expanduser()
    with _writing(output, state):
        summary = _train_stages(planned, asked, stages) if planned.stages else train_stage(planned)
        if arguments.push_to_hub and state.is_main_process:
            push_run(output, arguments)
    state.destroy_process_group()
    return summary


@contextmanager
def _writing(output: Path, state: PartialState) -> Iterator[None]:
    """Keeps other runs out of output; all processes of this one are refused together."""
    with ExitStack() as held:
        refusal = None
        if state.is_main_process:
            try:
                held.enter_context(sole_writer(output))
            except OSError as error:
                refusal = error
        all_agree(state, refusal)
        yield


def _with_recipe(arguments: TrainArguments) -> tuple[TrainArguments, TrainArguments]:
    """The arguments with the name of their recipe, and what is to be run: the same, or the recipe's stages."""
    if arguments.stages:
        return arguments, arguments
    # The two stages have a teacher, whose weight and temperature may be given alone.
    own = not arguments.stage and arguments.recipe != ANNEAL and arguments.map != "none"
    checked = check_arguments(replace(arguments, distill=arguments.distill or (arguments.model if own else None)))
    check_launch(arguments)
    state = join_processes(arguments)
    check_output(Path(arguments.output).expanduser(), arguments)
    with state.local_main_process_first():
        source = find_source(arguments)
    sizes = parse_block_sizes(arguments.block_size or default_block_size(source))
    settings = settings_of(source, checked, sizes[0][0])
    choice = choose(arguments, source, settings)
    if choice.reason:
        state.print(said(choice, arguments, source, settings))
    if choice.name is None:
        return arguments, arguments
    if choice.name == MATCH_DISTILL:
        check_reach(arguments, source, settings, sizes[-1][0])
    asked = replace(arguments, recipe=choice.name)
    if choice.name != MATCH_DISTILL:
        return asked, asked
    return asked, replace(stages_of_recipe(arguments, settings), recipe=None)


def stages_of(arguments: TrainArguments) -> list[TrainArguments]:
    """The arguments of every stage: those of the run, with what the stage changes.

    Raises:
        ValueError: for a stage that is no mapping, or has a value or an option that a stage cannot have.
    """
    if arguments.recipe is not None:
        raise ValueError(f"recipe is {arguments.recipe!r}, but stages are given too: leave one of the two out")
    output = Path(arguments.output).expanduser()
    found = []
    for number, text in enumerate(arguments.stages, start=1):
        changes = _changes(text, number)
        stage = _without_distillation(replace(arguments, stages=[], **changes), changes)
        stage = replace(stage, stage=stage.stage or "pretrain")
        folder = output / "stages" / f"{number}-{stage.stage}"
        stage = replace(stage, output=str(folder), run_name=f"{arguments.run_name}-{folder.name}")
        # It is of the model at the end: what a stage goes on from is not rounded.
        if number < len(arguments.stages) and "save_dtype" not in changes:
            stage = replace(stage, save_dtype=None)
        if found:
            before = found[-1]
            none = {name: None for name in _CONVERSION if name not in changes}
            if arguments.map != "none":
                none["map"] = None
            stage = replace(stage, model=str(Path(before.output) / "model"), **none)
            if stage.stage == "match":
                raise ValueError(
                    f"stage {number} is 'match', which needs the dense model's own layers: it can only come first"
                )
        found.append(stage)
    for number, stage in enumerate(found, start=1):
        if stage.lora_rank and stage.lora_save == "adapter" and stage is not found[-1]:
            raise ValueError(
                f"lora_save is 'adapter' in stage {number}, but stage {number + 1} goes on from a whole model: set "
                "lora_save in the last stage alone"
            )
        check_arguments(stage)
    _check_steps(arguments, found)
    return found


def _check_steps(arguments: TrainArguments, stages: list[TrainArguments]) -> None:
    """Raises ValueError for `steps` that no stage takes: all have their own, which add up to something else."""
    own = all("steps" in _changes(text, number) for number, text in enumerate(arguments.stages, start=1))
    total = sum(stage.steps for stage in stages)
    if own and arguments.steps not in (total, TrainArguments.steps):
        raise ValueError(
            f"steps is {arguments.steps}, but every stage has steps of its own, {total:,} in all: change those, or "
            "leave --steps out"
        )


def _without_distillation(stage: TrainArguments, changes: dict) -> TrainArguments:
    """The run's distillation is of the stages that learn from text: matching has no logits, and a stage can set
    `distill` to null."""
    distill = None if stage.stage == "match" and "distill" not in changes else stage.distill
    names = ("distill_weight", "distill_temperature", "distill_revision")
    none = [] if distill else [name for name in names if name not in changes]
    return replace(stage, distill=distill, **dict.fromkeys(none))


def _changes(text: str | dict, number: int) -> dict:
    values = text
    if isinstance(text, str):
        try:
            values = json.loads(text)
        except json.JSONDecodeError:
            import yaml

            try:
                values = yaml.safe_load(text)
            except yaml.YAMLError as error:
                raise ValueError(f"stage {number}, {text!r}, is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"stage {number} is {text!r}; it must be a mapping such as {{stage: match, steps: 200}}")
    allowed = [field.name for field in fields(TrainArguments) if field.name not in COMMON]
    if unknown := sorted(set(map(str, values)) - set(allowed)):
        raise ValueError(
            f"stage {number} sets {', '.join(unknown)}, which a stage cannot; it can set {', '.join(allowed)}"
        )
    # Through the parser of the command line, so that 1e-3, which YAML takes for a word, is a number here too.
    words = []
    for field in fields(TrainArguments):
        if field.default is MISSING and field.default_factory is MISSING:
            words += [f"--{field.name}", "-"]
    for name, value in values.items():
        if value is not None:
            words += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    parser = HfArgumentParser(TrainArguments, prog=f"stage {number}", allow_abbrev=False, exit_on_error=False)
    try:
        parsed, rest = parser.parse_known_args(words)
    except Exception as error:
        raise ValueError(f"stage {number}: {error}") from error
    if rest:
        raise ValueError(f"stage {number}: {' '.join(rest)} is not understood")
    return {name: getattr(parsed, name) for name in values}


def _train_stages(arguments: TrainArguments, asked: TrainArguments, stages: list[TrainArguments]) -> dict:
    if arguments.resume not in ("never", "auto"):
        raise ValueError(f"resume is {arguments.resume!r}; with stages it is auto, which finds the stage, or never")
    output = Path(arguments.output).expanduser()
    for stage in stages:
        check_output(output, replace(arguments, distill=stage.distill))
    state = join_processes(arguments)
    with state.local_main_process_first():
        # What a later stage learns from is looked at before an earlier one is trained.
        source = find_source(stages[0])
        for stage in stages:
            find_teacher(stage, source)
    names = [Path(stage.output).name for stage in stages]
    if (output / "run.json").is_file() and arguments.resume == "auto":
        known = json.loads((output / "run.json").read_text(encoding="utf-8"))
        if known.get("stages") != names:
            raise ValueError(f"{output} holds a run of other stages: {known.get('stages')} then, {names} now")

    def begin() -> None:
        """When the first stage has read all it needs: what is wrong with that costs no earlier run."""
        state.wait_for_everyone()
        if state.is_main_process:
            if arguments.overwrite:
                for name in ("stages", "model", "checkpoints", "logs"):
                    shutil.rmtree(output / name, ignore_errors=True)
                for name in ("summary.json", "metrics.jsonl"):
                    (output / name).unlink(missing_ok=True)
            output.mkdir(parents=True, exist_ok=True)
            write_json(output / "run.json", {"stages": names, **({"recipe": asked.recipe} if asked.recipe else {})})
        state.wait_for_everyone()

    summaries, tokens = [], 0
    for stage in stages:
        folder, first = Path(stage.output), stage is stages[0]
        state.print(f"stage {folder.name}")
        # A stage that was never begun has nothing to go on from, which auto takes for the beginning.
        there = (folder / "run.json").is_file() and not (first and arguments.overwrite)
        stage = replace(stage, overwrite=first and arguments.overwrite, resume="auto" if there else "never")
        moved = not stage.overwrite and (output / "model").is_dir() and not (folder / "model").is_dir()
        if moved and stage.output == stages[-1].output:
            # It was finished and its model moved, but the end of the run was not written: move it back.
            state.wait_for_everyone()
            if state.is_main_process:
                os.rename(output / "model", folder / "model")
            state.wait_for_everyone()
        summaries.append(
            train_stage(stage, first_token=tokens, packed=output / "packed", begin=begin if first else None)
        )
        tokens += summaries[-1]["tokens"]
    summary = _joined(asked, summaries, state.num_processes)
    if state.is_main_process:
        last = Path(stages[-1].output)
        write_json(last / "model" / "summary.json", summary)
        os.rename(last / "model", output / "model")
        write_json(output / "summary.json", summary)
        print_summary(output, summary)
    state.wait_for_everyone()
    return summary


def _joined(arguments: TrainArguments, summaries: list[dict], processes: int) -> dict:
    """The last stage's summary, as one of the whole run."""
    first, last = summaries[0], summaries[-1]
    total = {name: sum(summary[name] for summary in summaries) for name in ("steps", "tokens", "seconds", "epochs")}
    total["device_seconds"] = sum(map(device_seconds, summaries))
    total["tokens_per_second"] = total["tokens"] / total["seconds"] if total["seconds"] else None
    held_out, alphas, steps = [], [], 0
    for summary in summaries:
        kept = [index for index, (step, _) in enumerate(summary["eval_loss"]) if step or not steps]
        held_out += [[steps + step, loss] for step, loss in (summary["eval_loss"][index] for index in kept)]
        alphas += [summary["eval_alpha"][index] for index in kept] if summary["eval_alpha"] else []
        steps += summary["steps"]
    return {
        **last,
        **total,
        **{name: first[name] for name in ("base_model", "base_commit")},
        "skipped_steps": sum(summary["skipped_steps"] for summary in summaries),
        "eval_loss": held_out,
        "eval_alpha": alphas or None,
        "recipe": arguments.recipe,
        "stages": summaries,
        "options": {name: value for name, value in asdict(arguments).items() if name not in ("output", "resume")},
        "command": command_of(arguments, processes, last["mixed_precision"]),
    }

"""The main job on an embedded model, on two CPU cores: convert stories260K, continue its training with sparse
attention and, for comparison, with softmax; evaluate, generate, report, render the folder that would be published."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from .checkpoint import examine, load, load_tokenizer
from .config import SPECIFICATIONS
from .convert import ConvertArguments, convert_model
from .evaluate import EvaluateArguments, evaluate_models
from .hub import PushArguments, push_model
from .maps import MAPS
from .report import ReportArguments, report_model
from .train import TrainArguments, train_model

DATA = Path(__file__).parent / "data"
DENSE = DATA / "stories260K"
STORIES = DATA / "tinystories"
# The context the dense model was trained on, half of it, and up to four times.
LENGTHS = [256, 512, 1024, 2048]
TRAINED_LENGTH = 512
PROMPT = "Once upon a time"


@dataclass
class DemoArguments:
    """How much to do, and where to put it."""

    output_dir: str = field(default="demo_output", metadata={"help": "folder for everything the demo writes"})
    map: str = field(default="asentmax", metadata={"help": f"attention map: {', '.join(SPECIFICATIONS)}"})
    steps: int = field(default=300, metadata={"help": "training steps of each of the two models"})
    batch_size: int = field(default=4, metadata={"help": f"blocks of {TRAINED_LENGTH} tokens in a step"})
    learning_rate: float = field(default=5e-4, metadata={"help": "peak learning rate of both models"})
    windows: int = field(default=16, metadata={"help": "windows of the longest length whose text is evaluated"})
    overwrite: bool = field(default=False, metadata={"help": "remove an earlier demo in the output folder"})

    def __post_init__(self):
        if self.map not in SPECIFICATIONS:
            raise ValueError(f"map is {self.map!r}; choose one of {', '.join(SPECIFICATIONS)}")
        for name in ("steps", "batch_size", "windows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")


def run_demo(arguments: DemoArguments) -> dict:
    """Runs the whole way and returns the losses at the trained length, {"dense": ..., "softmax": ..., map: ...}.

    An interrupted demo goes on where it stopped.

    Raises:
        FileExistsError: if the output folder holds something else.
    """
    begun = time.monotonic()
    output = Path(arguments.output_dir)
    _prepare(output, arguments.overwrite)
    stage = _Stages(6)

    stage(f"convert {DENSE.name}: the same weights, {arguments.map} attention")
    convert_model(ConvertArguments(model=str(DENSE), output=str(output / "converted"), map=arguments.map))

    stage(f"train both with the same tokens: {arguments.map}, then softmax")
    runs = {arguments.map: str(output / "converted"), "softmax": str(DENSE)}
    for name, model in runs.items():
        train_model(training_of(arguments, name, model))

    stage(f"evaluate at {', '.join(f'{length:,}' for length in LENGTHS)} tokens")
    results = evaluate_models(
        EvaluateArguments(
            models=[f"dense={DENSE}", *(f"{name}={output / name / 'model'}" for name in ("softmax", arguments.map))],
            data=[str(STORIES / "validation.txt.xz")],
            output_dir=str(output / "evaluation"),
            lengths=LENGTHS,
            concatenate=True,
            limit=arguments.windows,
            device="cpu",
        )
    )

    stage("write a story with each")
    stories = {name: _story(output / name / "model") for name in ("softmax", arguments.map)}
    for name, story in stories.items():
        print(f"[{name}] {story}\n")
    (output / "stories.txt").write_text("".join(f"[{name}]\n{story}\n\n" for name, story in stories.items()))

    stage("look at the attention")
    report_model(
        ReportArguments(
            model=str(output / arguments.map / "model"),
            data=[str(STORIES / "validation.txt.xz")],
            output_dir=str(output / "report"),
            length=TRAINED_LENGTH,
            windows=4,
            concatenate=True,
            dense=str(DENSE),
            device="cpu",
        )
    )

    stage("render the folder that would be published")
    shutil.rmtree(output / "upload", ignore_errors=True)
    push_model(
        PushArguments(
            model=str(output / arguments.map / "model"),
            dry_run=str(output / "upload"),
            results=str(output / "evaluation" / "results.json"),
            report=str(output / "report" / "report.json"),
            # Of the embedded checkpoint, by the SOURCE.md beside it.
            license="mit",
        )
    )

    losses = {
        cell["model"]: cell["loss"]
        for cell in results["cells"]
        if cell["length"] == TRAINED_LENGTH and cell.get("loss") is not None
    }
    _conclude(arguments, output, losses, time.monotonic() - begun)
    return losses


class _Stages:
    """Numbered headings."""

    def __init__(self, count: int):
        self.count, self.done = count, 0

    def __call__(self, what: str) -> None:
        self.done += 1
        print(f"\n[{self.done}/{self.count}] {what}", flush=True)


def _prepare(output: Path, overwrite: bool) -> None:
    """Makes the output folder, or finds an earlier demo in it."""
    mark = output / ".hf-sparse-attention-demo"
    if output.exists() and not output.is_dir():
        raise FileExistsError(f"{output} is a file; choose another --output_dir")
    if output.exists() and any(output.iterdir()) and not mark.exists():
        raise FileExistsError(f"{output} holds something other than a demo; choose another --output_dir")
    if overwrite and mark.exists():
        shutil.rmtree(output)
    output.mkdir(parents=True, exist_ok=True)
    mark.touch()


def training_of(arguments: DemoArguments, name: str, model: str) -> TrainArguments:
    """The run of the map called `name`, or of its control, "softmax", from a model; both see the same tokens."""
    sparse = name == arguments.map
    has_parameters = MAPS[arguments.map].has_parameters
    return TrainArguments(
        model=model,
        map=None if sparse else "none",
        output=str(Path(arguments.output_dir) / name),
        train_data=[str(STORIES / "train.txt.xz")],
        eval_data=[str(STORIES / "validation.txt.xz")],
        block_size=TRAINED_LENGTH,
        batch_size=arguments.batch_size,
        steps=arguments.steps,
        learning_rate=arguments.learning_rate,
        # The map's few parameters start at zero and have a short run to find their size in.
        new_learning_rate=10 * arguments.learning_rate if sparse and has_parameters else None,
        alpha_share=0.4 if sparse else None,
        eval_every=max(1, arguments.steps // 3),
        eval_blocks=16,
        checkpoint_every=max(1, arguments.steps // 3),
        resume="auto",
        cpu=True,
        # Two stages took longer here and ended no better: 191 s, +0.71 % against 168 s, +0.55 %.
        recipe="anneal" if sparse else None,
    )


def _story(path: Path) -> str:
    tokenizer = load_tokenizer(str(path))
    model = load(examine(str(path)))
    inputs = tokenizer(PROMPT, return_tensors="pt")
    with torch.no_grad():
        tokens = model.generate(**inputs, max_new_tokens=200, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    return tokenizer.decode(tokens[0], skip_special_tokens=True)


def _conclude(arguments: DemoArguments, output: Path, losses: dict[str, float], seconds: float) -> None:
    sparse, softmax = losses[arguments.map], losses["softmax"]
    print(
        f"\nDone in {seconds:.0f} s. At {TRAINED_LENGTH} tokens, the length both were trained on, {arguments.map} has "
        f"a loss of {sparse:.4f} and\nsoftmax on the same tokens {softmax:.4f}: {sparse / softmax - 1:+.2%}. "
        f"Longer windows are in the table above.\n\n"
        f"{output}/\n"
        f"  converted/              stories260K with {arguments.map}, untrained\n"
        f"  {arguments.map + '/':<23} the trained sparse model (model/) and its metrics.jsonl\n"
        f"  softmax/                the dense model trained on the same tokens\n"
        f"  evaluation/             results.md, results.png: loss by length and position\n"
        f"  report/                 report.html, to open in a browser: where each head looks\n"
        f"  upload/                 model card and files as they would be pushed\n\n"
        "With your own model:\n"
        f"  hf-sparse-attention convert --model your/model --output converted --map {arguments.map}\n"
        "  hf-sparse-attention train --model converted --train_data your/*.jsonl --output run\n"
        "  hf-sparse-attention evaluate --models your/model sparse=run/model --data held-out.txt --output_dir "
        "run/evaluation\n"
        "  hf-sparse-attention report --model run/model --data held-out.txt --output_dir run/report\n"
        "  hf-sparse-attention push --model run/model --repo_id you/name"
    )

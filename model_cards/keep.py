"""A run of `train` -> its card and its numbers in this folder: NAME.md as `push` renders it, and in NAME/ the summary
with the command, the metrics of every stage, what `evaluate` measured (by position too) and the report's pictures.
No weights.

    python model_cards/keep.py --run runs/NAME --license apache-2.0"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from hf_sparse_attention.arguments import parse_arguments
from hf_sparse_attention.files import write_bytes, write_json, write_text
from hf_sparse_attention.hub import PushArguments, push_model
from hf_sparse_attention.hub.evidence import local_name, without_folders
from hf_sparse_attention.results import markdown
from hf_sparse_attention.tasks.pictures import draw


@dataclass(frozen=True)
class KeepArguments:
    """Options of keep.py."""

    run: str = field(metadata={"help": "folder of a run: model/, summary.json, metrics.jsonl or stages/"})
    license: str | None = field(default=None, metadata={"help": "licence identifier (default: the base model's)"})
    results: str | None = field(
        default=None, metadata={"help": "results.json of evaluate (default: evaluation/ in the run)"}
    )
    report: str | None = field(default=None, metadata={"help": "report.json of report (default: report/ in the run)"})
    output_dir: str = field(
        default=str(Path(__file__).parent), metadata={"help": "where NAME.md and NAME/ go (default: beside keep.py)"}
    )


def keep_run(arguments: KeepArguments) -> Path:
    """Writes the card and returns its file.

    Raises:
        ValueError: for files of another model, or a card with a number that is missing.
        OSError: if something of the run is not there.
    """
    run = Path(arguments.run).expanduser().resolve()
    output = Path(arguments.output_dir).expanduser()
    results = Path(arguments.results or run / "evaluation" / "results.json").expanduser()
    report = Path(arguments.report or run / "report" / "report.json").expanduser()
    if (output / run.name).resolve() == run:
        raise ValueError(f"output_dir is {output}, where the run itself lies and would be written over: name another")
    stages = [run, *sorted((run / "stages").glob("*"))]
    metrics = [stage / "metrics.jsonl" for stage in stages if (stage / "metrics.jsonl").is_file()]
    if not metrics:
        raise FileNotFoundError(f"{run} has no metrics.jsonl, neither in it nor in its stages")
    with tempfile.TemporaryDirectory() as folder:
        upload = Path(folder) / "upload"
        push_model(
            PushArguments(
                model=str(run / "model"), dry_run=str(upload), license=arguments.license,
                summary=str(run / "summary.json"), results=str(results), report=str(report),
            )
        )  # fmt: skip
        card = (upload / "README.md").read_text(encoding="utf-8")
    if "missing" in card:
        line = next(line for line in card.splitlines() if "missing" in line)
        raise ValueError(f"the card of {run.name} lacks something: {line}")
    kept = output / run.name
    for name, file in (("summary.json", run / "summary.json"), ("results.json", results), ("report.json", report)):
        write_json(kept / name, without_places(json.loads(file.read_text(encoding="utf-8"))))
    write_text(kept / "results.md", markdown(json.loads(results.read_text(encoding="utf-8"))))
    lines = []
    for file in metrics:
        stage = {} if file.parent == run else {"stage": file.parent.name}
        for text in file.read_text(encoding="utf-8").splitlines():
            lines.append(json.dumps({**stage, **json.loads(text)}) + "\n")
    write_text(kept / "metrics.jsonl", "".join(lines))
    for picture in kept.glob("*.png"):
        picture.unlink()
    # Drawn of these numbers: the folder of `evaluate` may hold pictures of an earlier call too.
    for name, content in draw(json.loads(results.read_text(encoding="utf-8"))).items():
        write_bytes(kept / name, content)
    for picture in sorted(report.parent.glob("*.png")):
        shutil.copyfile(picture, kept / picture.name)
    write_text(output / f"{run.name}.md", card)
    return output / f"{run.name}.md"


def without_places(value, key: str = ""):
    """A JSON value whose paths of this machine are cut to their last part."""
    if isinstance(value, dict):
        return {name: without_places(item, name) for name, item in value.items()}
    if isinstance(value, list):
        return [without_places(item) for item in value]
    if not isinstance(value, str):
        return value
    return without_folders(value) if key == "command" else local_name(value)


if __name__ == "__main__":
    print(keep_run(parse_arguments(KeepArguments, sys.argv[1:], program="keep.py")))

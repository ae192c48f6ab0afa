"""The recipes of examples/: every file is one that train takes, on the options that it says, and is in the table."""

import os
import re
import subprocess
from pathlib import Path

import pytest
from training_cases import dense_folder, options, write_text

from hf_sparse_attention.arguments import parse_arguments
from hf_sparse_attention.evaluate import EvaluateArguments
from hf_sparse_attention.report import ReportArguments
from hf_sparse_attention.train import TableArguments, TrainArguments, train_model
from hf_sparse_attention.train.arguments import check_arguments
from hf_sparse_attention.train.stages import stages_of

pytest.importorskip("yaml")
FOLDER = Path(__file__).parent.parent / "examples" / "conversion"
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))


def parsed(name, *words):
    common = ["--model", "m", "--output", "o", "--train_data", "t.txt", "--eval_data", "e.txt"]
    # As run.sh does.
    common += ["--distill", "m"] if "distill_weight" in (FOLDER / f"{name}.yaml").read_text() else []
    return parse_arguments(
        TrainArguments, ["--config", str(FOLDER / f"{name}.yaml"), *common, *words], program="train"
    )


def test_the_table_has_every_recipe():
    rows = re.findall(r"^\| `([\w.-]+)\.yaml` \| (.*?) \|", (FOLDER / "README.md").read_text(), flags=re.MULTILINE)
    assert sorted(name for name, _ in rows) == NAMES and len(NAMES) > 20
    for name, what in rows:
        assert (FOLDER / f"{name}.yaml").read_text().startswith(f"# {what}\n")


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_has_the_same_tokens(name):
    arguments = parsed(name)
    stages = stages_of(arguments) if arguments.stages else [check_arguments(arguments)]
    tokens = 0
    for stage in stages:
        first = int(str(stage.block_size).split(":")[0])
        tokens += stage.steps * first * stage.batch_size * stage.gradient_accumulation
    assert tokens == 674 * 2**16


def test_one_command_makes_a_row(tmp_path):
    """run.sh names the dense model where a recipe learns from it, reports what has zeros, and ends with the table."""
    fake = tmp_path / "hf-sparse-attention"
    fake.write_text('#!/bin/sh\necho "$*"\ncase "$*" in *"seed 9"*) exit 3 ;; esac\n')
    fake.chmod(0o755)
    paths = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}

    def called(*names, **environment):
        words = ["sh", str(FOLDER / "run.sh"), "base", "train.jsonl", "held.jsonl", *names]
        ended = subprocess.run(words, capture_output=True, text=True, env={**paths, **environment})
        return [line.split() for line in ended.stdout.splitlines()], ended.returncode

    lines, code = called("control-softmax", "match-distill", "asentmax", TEXT="books.jsonl")
    assert code == 0
    assert [line[0] for line in lines] == [
        "train", "evaluate", "train", "evaluate", "report", "train", "evaluate", "report", "table"
    ]  # fmt: skip
    distilled = [" ".join(line).count("--distill base") for line in lines if line[0] == "train"]
    assert distilled == [0, 1, 0]
    assert all("books.jsonl" in line and "runs/" in line[3] for line in lines if line[0] == "evaluate")
    # Each of them is one that the commands take.
    parse_arguments(TrainArguments, lines[2][1:], program="train")
    parse_arguments(EvaluateArguments, lines[3][1:], program="evaluate")
    parse_arguments(ReportArguments, lines[4][1:], program="report")
    parse_arguments(TableArguments, lines[8][1:], program="table")
    assert lines[2][-2:] == ["--distill", "base"] and lines[3][3] == "runs/match-distill-s0/model"
    lines, code = called("asentmax", OPTIONS="--seed 1", TAG="-s1")
    assert lines[0][-4:] == ["--output", "runs/asentmax-s1", "--seed", "1"] and lines[1][3] == "runs/asentmax-s1/model"
    # Nothing is measured of a training that failed.
    lines, code = called("asentmax", OPTIONS="--seed 9")
    assert code == 3 and len(lines) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_runs(tmp_path, name):
    """A few steps of each on a tiny model with as many layers."""
    dense_folder(tmp_path / "dense", num_hidden_layers=8)
    write_text(tmp_path / "train.txt")
    write_text(tmp_path / "eval.txt", 20, seed=1)
    values = options(tmp_path)
    arguments = parsed(name)
    changes = {"mixed_precision": "no", "cpu": True, "eval_blocks": 2, "statistics_blocks": 1, "loss_chunk": 0}
    changes |= {key: values[key] for key in ("model", "output", "train_data", "eval_data")}
    changes |= {"batch_size": 8, "steps": 5, "learning_rate": 1e-3}

    def smaller(sizes):
        return re.sub(r"\b(\d{4})\b", lambda size: str(int(size[1]) // 128 * 2), sizes)

    changes["block_size"] = smaller(str(arguments.block_size))
    stages = []
    for stage in arguments.stages:
        stage = re.sub(r'"steps": \d+', '"steps": 3', stage)
        stage = re.sub(r'"block_size": "\d+"', lambda found: smaller(found[0]), stage)
        stages.append(re.sub(r'"batch_size": \d+', '"batch_size": 8', stage))
    changes |= {"stages": stages} if stages else {}
    if arguments.distill:
        changes["distill"] = values["model"]
    if arguments.max_positions:
        changes["max_positions"] = 128
    from dataclasses import replace

    summary = train_model(replace(arguments, **changes))
    assert summary["steps"] == (3 * len(stages) if stages else 5)
    assert (tmp_path / "run" / "model" / "config.json").is_file()

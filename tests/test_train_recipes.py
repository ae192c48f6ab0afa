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


def test_a_recipe_that_needs_a_teacher_says_so():
    """A recipe cannot know where the dense model lies: whoever runs it has to."""
    needy = [path for path in FOLDER.glob("*.yaml") if "distill_weight" in path.read_text()]
    assert needy and not [path.name for path in needy if "--distill" not in path.read_text().splitlines()[0]]


def test_the_table_has_every_recipe():
    rows = re.findall(r"^\| `([\w.-]+)\.yaml` \| (.*?) \|", (FOLDER / "README.md").read_text(), flags=re.MULTILINE)
    assert sorted(name for name, _ in rows) == NAMES and len(NAMES) > 20
    for name, what in rows:
        assert (FOLDER / f"{name}.yaml").read_text().startswith(f"# {what}\n")


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_has_the_same_tokens(name):
    arguments = parsed(name)
    # What a file is must not follow from what train would choose.
    assert bool(arguments.recipe) != (bool(arguments.stages) or arguments.map == "none")
    stages = stages_of(arguments) if arguments.stages else [check_arguments(arguments)]
    tokens = 0
    for stage in stages:
        first = int(str(stage.block_size).split(":")[0])
        tokens += stage.steps * first * stage.batch_size * stage.gradient_accumulation
    assert tokens == 674 * 2**16


@pytest.fixture
def called(tmp_path):
    """Calls run.sh; returns the commands it calls as (card, words), and its exit code. Training with seed 9 fails."""
    fake = tmp_path / "hf-sparse-attention"
    fake.write_text(
        '#!/bin/sh\necho "${CUDA_VISIBLE_DEVICES:--} $*"\ncase "$1 $*" in train*"seed 9"*) exit 3 ;; esac\n'
    )
    fake.chmod(0o755)

    def call(*names, **environment):
        words = ["sh", str(FOLDER / "run.sh"), "base", "train.jsonl", "held.jsonl", *names]
        environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", **environment}
        ended = subprocess.run(words, capture_output=True, text=True, env=environment)
        return [(line.split()[0], line.split()[1:]) for line in ended.stdout.splitlines()], ended.returncode

    return call


def test_one_command_makes_a_row(called):
    """It names the dense model where a recipe learns from it, reports what has zeros, and ends with the table."""
    found, code = called("control-softmax", "match-distill", "asentmax", TEXT="books.jsonl", CUDA_VISIBLE_DEVICES="2")
    lines = [line for _, line in found]
    assert code == 0 and {card for card, _ in found} == {"2"}
    assert [line[0] for line in lines] == [
        "train", "evaluate", "train", "evaluate", "report", "train", "evaluate", "report", "table"
    ]  # fmt: skip
    assert [" ".join(line).count("--distill base") for line in lines if line[0] == "train"] == [0, 1, 0]
    assert all("books.jsonl" in line for line in lines if line[0] == "evaluate")
    # Each of them is one that the commands take.
    train = parse_arguments(TrainArguments, lines[2][1:], program="train")
    evaluate = parse_arguments(EvaluateArguments, lines[3][1:], program="evaluate")
    report = parse_arguments(ReportArguments, lines[4][1:], program="report")
    table = parse_arguments(TableArguments, lines[8][1:], program="table")
    assert train.output == "runs/match-distill-s0" and table.runs == ["runs"]
    assert evaluate.models == ["base", "runs/match-distill-s0/model"] and report.model == evaluate.models[1]
    assert [check_arguments(stage).distill for stage in stages_of(train)] == [None, "base"]


def test_rows_go_over_seeds_rates_and_cards(called):
    found, code = called("asentmax", "nape", SEEDS="0 9", RATES="3e-4 1e-3", CARDS="1 3", OUT="elsewhere")
    trained = {line[line.index("--output") + 1]: (card, line) for card, line in found if line[0] == "train"}
    names = [
        f"{name}-lr{rate}-s{seed}" for name in ("asentmax", "nape") for seed in (0, 9) for rate in ("3e-4", "1e-3")
    ]
    assert sorted(trained) == sorted(f"elsewhere/{name}" for name in names)
    assert [trained[f"elsewhere/{name}"][0] for name in names] == ["1", "3"] * 4
    for name in names:
        line = " ".join(trained[f"elsewhere/{name}"][1])
        assert f"--learning_rate {name.split('-lr')[1][:4]}" in line and f"--seed {name[-1]}" in line
    # Nothing is measured of a training that failed, and it stops no other.
    assert code == 1 and sum(line[0] == "evaluate" for _, line in found) == 4 and found[-1][1][0] == "table"
    assert called("asentmax", "nothing") == ([], 2) and called("match-distill", RATES="1e-3") == ([], 2)


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
    # A recipe of two stages divides them.
    steps = 5 if arguments.recipe != "match_distill" else 12
    changes |= {"batch_size": 8, "steps": steps, "learning_rate": 1e-3}

    def smaller(sizes):
        return re.sub(r"\b(\d{4})\b", lambda size: str(int(size[1]) // 128 * 2), sizes)

    changes["block_size"] = smaller(str(arguments.block_size))
    stages = []
    for stage in arguments.stages:
        stage = re.sub(r'"steps": \d+', '"steps": 3', stage)
        stage = re.sub(r'"block_size": "\d+"', lambda found: smaller(found[0]), stage)
        stages.append(re.sub(r'"batch_size": \d+', '"batch_size": 8', stage))
    changes |= {"stages": stages, "steps": 3 * len(stages)} if stages else {}
    if arguments.distill:
        changes["distill"] = values["model"]
    if arguments.max_positions:
        changes["max_positions"] = 128
    from dataclasses import replace

    summary = train_model(replace(arguments, **changes))
    assert summary["steps"] == (3 * len(stages) if stages else steps)
    assert (tmp_path / "run" / "model" / "config.json").is_file()

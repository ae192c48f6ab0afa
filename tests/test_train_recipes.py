"""The recipes of examples/: every file is one that train takes, on the options that it says, and is in the table."""

import re
from pathlib import Path

import pytest
from training_cases import dense_folder, options, write_text

from hf_sparse_attention.arguments import parse_arguments
from hf_sparse_attention.train import TrainArguments, train_model
from hf_sparse_attention.train.arguments import check_arguments
from hf_sparse_attention.train.stages import stages_of

pytest.importorskip("yaml")
FOLDER = Path(__file__).parent.parent / "examples" / "conversion"
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))


def parsed(name, *words):
    common = ["--model", "m", "--output", "o", "--train_data", "t.txt", "--eval_data", "e.txt"]
    common += ["--distill", "m"] if name.startswith("distill") else []
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
        stage = re.sub(r'"steps": \d+', '"steps": 3', stage).replace('"dense-base"', f'"{values["model"]}"')
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

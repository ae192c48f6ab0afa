"""Training on two gloo processes, DDP and FSDP2: the numbers of one process, and what is left when one dies."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training_cases import (
    all_die_in_second_checkpoint,
    assert_close_metrics,
    dense_folder,
    die_in_second_checkpoint,
    die_in_third_step,
    encode_slowly,
    full_disk_for_one,
    metrics,
    nan_in_third_step_of_one,
    options,
    run,
    save_flat_parts,
    split_heads,
    train_together,
    weights,
    write_text,
)
from transformers import AutoModelForCausalLM

from hf_sparse_attention.train import TrainArguments
from hf_sparse_attention.train.distributed import check_launch
from hf_sparse_attention.train.flat_parts import boxes
from hf_sparse_attention.train.state import whole_states

pytest.importorskip("accelerate")
EXAMPLES = Path(__file__).parent.parent / "examples" / "accelerate"
# DDP runs from the command line in test_train.py; here, what it shares with FSDP2 is left to the slow tests.
ways = pytest.mark.parametrize("fsdp", [pytest.param(False, marks=pytest.mark.slow), True], ids=["ddp", "fsdp2"])


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    dense_folder(folder / "dense")
    write_text(folder / "train.txt")
    write_text(folder / "eval.txt", 20, seed=1)
    return folder


@pytest.fixture(scope="module")
def alone(home):
    """One process with the blocks a step that two have in the tests below."""
    run(home, **recipe(home, output=str(home / "alone"), batch_size=4))
    return home / "alone"


def recipe(home, **changes):
    # Checkpoints come after an evaluation, which leaves FSDP2's root gathered.
    common = {"steps": 6, "batch_size": 2, "eval_every": 2, "eval_blocks": 3, "checkpoint_every": 2}
    common |= {"keep_checkpoints": 9}
    return options(home, **{**common, **changes})


def text_of(log: Path) -> str:
    return "".join(file.read_text() for file in sorted(log.parent.glob(f"{log.name}-*")))


def assert_close_weights(first: Path, second: Path) -> None:
    one, other = weights(first), weights(second)
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, atol=1e-3, rtol=1e-2)


@ways
def test_two_processes_compute_what_one_does(home, alone, tmp_path, fsdp):
    values = recipe(home, output=str(tmp_path / "two"), batch_size=1, gradient_accumulation=2)
    values |= {"gradient_checkpointing": True}
    assert train_together(values, tmp_path / "log", fsdp=fsdp) == [0, 0], text_of(tmp_path / "log")
    assert_close_metrics(alone, tmp_path / "two")
    assert_close_weights(alone, tmp_path / "two")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "two" / "model")
    assert type(model).__name__ == "SparseLlamaForCausalLM" and model.config.sparse_attention["alpha"] == 1.5
    names = {file.name for file in (tmp_path / "two" / "model").iterdir()}
    assert names == {file.name for file in (alone / "model").iterdir()}


@pytest.mark.parametrize(
    ("fsdp", "death"),
    [
        pytest.param(True, die_in_second_checkpoint, marks=pytest.mark.slow),
        pytest.param(False, die_in_second_checkpoint, marks=pytest.mark.slow),
        pytest.param(True, all_die_in_second_checkpoint, marks=pytest.mark.slow),
        pytest.param(True, die_in_third_step, marks=pytest.mark.slow),
        pytest.param(False, die_in_third_step, marks=pytest.mark.slow),
    ],
    ids=["fsdp2", "ddp", "fsdp2-all", "fsdp2-step", "ddp-step"],
)
def test_a_process_that_dies(home, alone, tmp_path, fsdp, death):
    """A checkpoint it dies in is none; the run goes on from the one before, also on another number of processes and
    another way of spreading, and ends where an undisturbed one does."""
    values = recipe(home, output=str(tmp_path / "two"), resume="auto")
    codes = train_together(values, tmp_path / "log", fsdp=fsdp, before=death)
    assert codes[1] == -9 and codes[0] != 0, text_of(tmp_path / "log")
    assert [path.name for path in whole_states(tmp_path / "two" / "checkpoints")] == ["step-00000002"]
    assert not (tmp_path / "two" / "model").exists()
    shutil.copytree(tmp_path / "two", tmp_path / "one")
    shutil.copytree(tmp_path / "two", tmp_path / "other")
    assert train_together(values, tmp_path / "again", fsdp=fsdp) == [0, 0], text_of(tmp_path / "again")
    assert "going on from" in text_of(tmp_path / "again")
    run(home, **{**values, "output": str(tmp_path / "one"), "batch_size": 4})
    other = {**values, "output": str(tmp_path / "other")}
    assert train_together(other, tmp_path / "otherwise", fsdp=not fsdp) == [0, 0], text_of(tmp_path / "otherwise")
    for name in ("two", "one", "other"):
        assert_close_metrics(alone, tmp_path / name)
        assert_close_weights(alone, tmp_path / name)
        assert not list((tmp_path / name / "checkpoints").glob(".partial*"))


@ways
def test_stages_on_two_processes(home, tmp_path, fsdp):
    """Output matching with trained projections, then training in chunks and from a teacher."""
    stages = [
        {
            "stage": "match",
            "steps": 3,
            "alpha_schedule": "none",
            "trained": "attention",
            "gradient_checkpointing": True,
        },
        {"steps": 3, "loss_chunk": 16, "distill": str(home / "dense")},
    ]
    values = recipe(home, output=str(tmp_path / "two"), stages=stages, log_every=1)
    assert train_together(values, tmp_path / "log", fsdp=fsdp) == [0, 0], text_of(tmp_path / "log")
    run(home, **{**values, "output": str(tmp_path / "one"), "batch_size": 4})
    assert_close_weights(tmp_path / "one", tmp_path / "two")
    for stage in ("1-match", "2-pretrain"):
        assert_close_metrics(tmp_path / "one" / "stages" / stage, tmp_path / "two" / "stages" / stage)


def test_half_precision_does_not_round_the_loss(home, tmp_path):
    """Accelerate's own policy has FSDP2 return bf16, of which a step is 0.4 %, and so every number that is written."""
    values = recipe(home, mixed_precision="bf16", steps=1, log_every=1, loss_chunk=16)
    found = []
    for name, fsdp in (("ddp", False), ("fsdp2", True)):
        together = {**values, "output": str(tmp_path / name)}
        assert train_together(together, tmp_path / f"log-{name}", fsdp=fsdp) == [0, 0], text_of(
            tmp_path / f"log-{name}"
        )
        lines = reversed(metrics(tmp_path / name))
        found.append({line["kind"]: line["loss"] for line in lines if "loss" in line})
    assert found[1] == pytest.approx(found[0], rel=2e-4)


@pytest.mark.slow
def test_two_machines_with_one_disk(home, tmp_path):
    """The first process of each would encode the text, and the slower one find the other's."""
    values = recipe(home, output=str(tmp_path / "two"), steps=1)
    each = [{"LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}] * 2
    codes = train_together(values, tmp_path / "log", before=encode_slowly, each=each)
    assert codes == [0, 0], text_of(tmp_path / "log")


def test_processes_that_do_not_know_of_each_other(home, tmp_path):
    """Without a GPU each would be the only one; what accelerate was told of the CPU is what --cpu says."""
    values = recipe(home, output=str(tmp_path / "two"), cpu=False, steps=1)
    alone = [{"ACCELERATE_USE_CPU": "false", "CUDA_VISIBLE_DEVICES": ""}] * 2
    assert train_together(values, tmp_path / "refused", each=alone) == [1, 1]
    assert text_of(tmp_path / "refused").count("ValueError: 2 processes were launched") == 2
    assert not (tmp_path / "two").exists()
    assert train_together(values, tmp_path / "log", fsdp=True) == [0, 0], text_of(tmp_path / "log")
    assert json.loads((tmp_path / "two" / "summary.json").read_text())["spread"] == "FSDP2"


def test_one_bad_process_is_named_by_all(home, tmp_path):
    """A loss that is not finite in one process stops both of them, with the same words."""
    values = recipe(home, output=str(tmp_path / "stop"))
    assert train_together(values, tmp_path / "stopped", before=nan_in_third_step_of_one) == [1, 1]
    logs = [(tmp_path / f"stopped-{rank}").read_text() for rank in range(2)]
    found = [re.search(r"RuntimeError: (step 3: loss nan.*)", log)[1] for log in logs]
    assert found[0] == found[1]
    assert re.search(r"process 1: first in the output of model\.layers\.1\.mlp; blocks \d+ \(documents", found[0]), (
        found
    )


@pytest.mark.slow
def test_one_bad_process_makes_all_skip(home, tmp_path):
    values = recipe(home, output=str(tmp_path / "skip"), on_nonfinite="skip")
    assert train_together(values, tmp_path / "skipped", before=nan_in_third_step_of_one) == [0, 0]
    assert [line["step"] for line in metrics(tmp_path / "skip") if line["kind"] == "skipped"] == [3]
    assert all(torch.isfinite(value).all() for value in weights(tmp_path / "skip").values())


@pytest.mark.parametrize(
    ("options", "works"),
    [pytest.param({"map": "entmax"}, True, marks=pytest.mark.slow), ({"map": "asentmax"}, False)],
)
def test_tensor_parallelism(home, tmp_path, options, works):
    """It computes what one process does, or is refused."""
    codes = train_together({"model": str(home / "dense"), **options}, tmp_path / "log", run=split_heads)
    text = text_of(tmp_path / "log")
    if works:
        assert codes == [0, 0], text
    else:
        assert codes == [1, 1] and "tensor parallelism splits the heads" in text, text


def test_flat_parts_of_checkpoints(tmp_path):
    """What DeepSpeed's processes hold of a tensor is saved so that any other parts of it can be loaded."""
    codes = train_together({"folder": str(tmp_path)}, tmp_path / "log", run=save_flat_parts)
    assert codes == [0, 0], text_of(tmp_path / "log")


@pytest.mark.parametrize("shape", [(), (7,), (3, 4), (1, 5), (5, 1), (2, 3, 4), (2, 2, 2, 3)])
def test_boxes_of_flat_parts(shape):
    """In their order they are the elements of every run, and few."""
    whole = torch.arange(math.prod(shape)).view(shape)
    for first in range(whole.numel() + 1):
        for end in range(first, whole.numel() + 1):
            found = boxes(shape, first, end)
            values = [
                whole[tuple(slice(start, start + size) for start, size in zip(offsets, sizes, strict=True))]
                for offsets, sizes in found
            ]
            assert [number for box in values for number in box.flatten().tolist()] == list(range(first, end))
            assert len(found) <= max(1, 2 * len(shape) - 1)


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "deepspeed_zero2", "deepspeed_zero3"])
def test_accelerate_configs(name, monkeypatch):
    """accelerate reads the files of examples/, and train runs what it makes of them."""
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(EXAMPLES / f"{name}.yaml")).to_dict()
    for key, value in (config.get("fsdp_config") or {}).items():
        monkeypatch.setenv(key.upper() if key.startswith("fsdp") else f"FSDP_{key.upper()}", str(value).lower())
    monkeypatch.setenv("ACCELERATE_USE_FSDP", str(config["distributed_type"] == "FSDP").lower())
    check_launch(TrainArguments(model="-", output="-", train_data=["-"]))
    way, _, stage = name.partition("_zero")
    assert config["distributed_type"] == {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "deepspeed": "DEEPSPEED"}[way]
    assert not stage or config["deepspeed_config"]["zero_stage"] == int(stage)


def test_efficiency_is_of_settled_steps(tmp_path):
    """Twice the tokens on two processes are all of it; what the first steps took does not count; a few are no rate."""
    said = {"mixed_precision": "bf16", "skipped_steps": 0, "options": {"batch_size": 8}}
    for name, rate, steps in (("one", 100.0, 36), ("ddp", 150.0, 36), ("fsdp2", 200.0, 14)):
        (tmp_path / name).mkdir()
        lines = [
            {"step": step, "kind": "train", "timing": {"tokens_per_second": rate if step > 12 else 1.0}}
            for step in range(1, steps + 1)
        ]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        hardware = f"{1 if name == 'one' else 2} x card"
        (tmp_path / name / "summary.json").write_text(json.dumps({**said, "hardware": hardware}))

    def called(*ways, processes=2):
        words = [sys.executable, str(EXAMPLES / "scaling.py"), str(tmp_path), "--kept", "--ways", *ways]
        words += ["--processes", str(processes)]
        return subprocess.run(words, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""})

    found = called("ddp")
    assert found.stdout.splitlines()[2:] == [
        "| one | 1 | 1 x card | 100 | - | 1.000 |",
        "| ddp | 2 | 2 x card | 150 | - | 0.750 |",
    ]
    found = called("ddp", "fsdp2")
    assert found.returncode == 1 and "2 steps after the first 12; give more: --steps 36" in found.stderr
    # Runs that were kept may be of another day: no efficiency of what cannot be compared.
    found = called("ddp", processes=4)
    assert found.returncode == 1 and "was trained on 2 processes, not 4: give --processes 2" in found.stderr
    for changes, message in (
        ({"options": {"batch_size": 4}}, "otherwise than the run on one process (batch_size)"),
        ({"mixed_precision": "no"}, "otherwise than the run on one process (mixed_precision)"),
        ({"hardware": "2 x other"}, "otherwise than the run on one process (device)"),
        ({"skipped_steps": 3}, "skipped 3 steps"),
    ):
        summary = {**said, "hardware": "2 x card", **changes}
        (tmp_path / "ddp" / "summary.json").write_text(json.dumps(summary))
        found = called("ddp")
        assert found.returncode == 1 and message in found.stderr


@pytest.mark.slow
def test_scaling_trains_what_it_tells(home, tmp_path):
    """As many blocks for each process as for one, on the options that are given."""
    words = [
        "--model",
        str(home / "dense"),
        "--train_data",
        str(home / "train.txt"),
        "--map",
        "asentmax",
        "--block_size",
        "32",
    ]
    words += ["--batch_size", "2", "--steps", "15", "--cpu"]
    command = [sys.executable, str(EXAMPLES / "scaling.py"), str(tmp_path), "--ways", "ddp", "--mixed_precision", "no"]
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent.parent), "CUDA_VISIBLE_DEVICES": ""}
    ended = subprocess.run([*command, "--", *words], capture_output=True, text=True, env=environment)
    assert ended.returncode == 0, ended.stderr
    assert [line.split(" | ")[:2] for line in ended.stdout.splitlines()[-2:]] == [["| one", "1"], ["| ddp", "2"]]
    tokens = [json.loads((tmp_path / name / "summary.json").read_text())["tokens"] for name in ("one", "ddp")]
    assert tokens == [15 * 2 * 32, 2 * 15 * 2 * 32]


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [True], ids=["fsdp2"])
def test_a_full_disk_stops_all(home, alone, tmp_path, fsdp):
    values = recipe(home, output=str(tmp_path / "two"), resume="auto")
    assert train_together(values, tmp_path / "log", fsdp=fsdp, before=full_disk_for_one) == [1, 1]
    logs = [(tmp_path / f"log-{rank}").read_text() for rank in range(2)]
    assert all("step-00000004 could not be written: the disk is full" in log for log in logs), logs
    assert "process 1" in logs[0]
    assert [path.name for path in (tmp_path / "two" / "checkpoints").iterdir()] == ["step-00000002"]
    assert train_together(values, tmp_path / "again", fsdp=fsdp) == [0, 0], text_of(tmp_path / "again")
    assert "going on from" in text_of(tmp_path / "again")
    assert_close_metrics(alone, tmp_path / "two")
    assert_close_weights(alone, tmp_path / "two")


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "set fsdp_version: 2"),
        ({"PARALLELISM_CONFIG_TP_SIZE": "2"}, "tensor parallelism"),
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, "mixed_precision fp8"),
        ({"PARALLELISM_CONFIG_CP_SIZE": "2"}, "context parallelism"),
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"},
            "fsdp_cpu_ram_efficient_loading",
        ),
    ],
)
def test_other_ways_are_refused(home, tmp_path, monkeypatch, environment, message):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        run(home, output=str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_deepspeed_is_not_installed(home, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    stages = [{"stage": "match", "steps": 3}, {"steps": 3}]
    for changes in ({}, {"stages": stages}):
        with pytest.raises(ImportError, match=r'pip install "hf-sparse-attention\[deepspeed\]"'):
            run(home, output=str(tmp_path / "run"), **changes)
        assert not (tmp_path / "run").exists()

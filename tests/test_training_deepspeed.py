"""Training on two gloo processes under DeepSpeed ZeRO-2 and ZeRO-3, skipped without DeepSpeed:

pip install deepspeed && pytest tests/test_training_deepspeed.py -m "slow or not slow" """

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from training_cases import (
    assert_close_metrics,
    assert_same_weights,
    dense_folder,
    die_in_second_checkpoint,
    infinite_loss_in_third_step_of_one,
    leave_out_mlps,
    metrics,
    nan_in_third_step_of_one,
    options,
    python,
    run,
    train_together,
    weights,
    write_text,
    zero_environment,
)
from transformers import AutoModelForCausalLM

from hf_sparse_attention.train.state import whole_states

pytest.importorskip("deepspeed")
pytest.importorskip("accelerate")
EXAMPLES = Path(__file__).parent.parent / "examples" / "accelerate"
stages = pytest.mark.parametrize("zero", [2, 3])


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    dense_folder(folder / "dense")
    write_text(folder / "train.txt")
    write_text(folder / "eval.txt", 20, seed=1)
    return folder


def recipe(home, **changes):
    """Clipped steps, learning rates of two groups, alpha on its way up."""
    common = {
        "steps": 6, "batch_size": 2, "eval_blocks": 3, "checkpoint_every": 2, "keep_checkpoints": 9, "log_every": 1,
        "new_learning_rate": 3e-2,
    }  # fmt: skip
    return options(home, **{**common, **changes})


@pytest.fixture(scope="module")
def alone(home):
    """One process with the blocks a step that two have in the tests below."""
    run(home, **recipe(home, output=str(home / "alone"), batch_size=4))
    lines = [line for line in metrics(home / "alone") if line["kind"] == "train"]
    assert all(line["gradient_norm"] > 1 for line in lines) and lines[1]["alpha"] < lines[-1]["alpha"]
    return home / "alone"


@pytest.fixture(scope="module", params=[2, 3], ids=["zero2", "zero3"])
def spread(request, home, alone):
    """The same on two processes, in two parts a step."""
    folder = home / f"zero{request.param}"
    values = recipe(home, output=str(folder), batch_size=1, gradient_accumulation=2)
    assert train_together(values, home / f"log{request.param}", zero=request.param) == [0, 0], text_of(
        home / f"log{request.param}"
    )
    return folder, values, request.param


def text_of(log: Path) -> str:
    return "".join(file.read_text() for file in sorted(log.parent.glob(f"{log.name}-*")))


def assert_close_weights(first: Path, second: Path, atol: float = 2e-5) -> None:
    one, other = weights(first), weights(second)
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, atol=atol, rtol=1e-4)


def forget_after(folder: Path, step: int) -> None:
    """Makes a finished run one that was stopped after the checkpoint of a step."""
    shutil.rmtree(folder / "model")
    (folder / "summary.json").unlink()
    for path in whole_states(folder / "checkpoints"):
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)


def test_two_processes_compute_what_one_does(alone, spread):
    folder, _, zero = spread
    assert_close_metrics(alone, folder)
    assert_close_weights(alone, folder)
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert type(model).__name__ == "SparseLlamaForCausalLM" and model.config.sparse_attention["alpha"] == 1.5
    assert {file.name for file in (folder / "model").iterdir()} == {file.name for file in (alone / "model").iterdir()}
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["spread"] == f"DeepSpeed ZeRO-{zero}"
    assert summary["parameters"] == json.loads((alone / "summary.json").read_text())["parameters"]


def test_it_goes_on_exactly(spread, tmp_path):
    """On as many processes to the bit; and from there on one without DeepSpeed."""
    folder, values, zero = spread
    shutil.copytree(folder, tmp_path / "again")
    forget_after(tmp_path / "again", 2)
    shutil.copytree(tmp_path / "again", tmp_path / "one")
    values = {**values, "resume": "auto"}
    codes = train_together({**values, "output": str(tmp_path / "again")}, tmp_path / "log", zero=zero)
    assert codes == [0, 0] and "going on from" in text_of(tmp_path / "log"), text_of(tmp_path / "log")
    assert_same_weights(folder, tmp_path / "again")
    assert metrics(folder) == metrics(tmp_path / "again")
    run(tmp_path, **{**values, "output": str(tmp_path / "one"), "batch_size": 4, "gradient_accumulation": 1})
    assert_close_weights(folder, tmp_path / "one")
    assert_close_metrics(folder, tmp_path / "one")


@pytest.mark.parametrize(
    ("count", "zero"),
    [(2, 2), (2, 3), pytest.param(1, 3, marks=pytest.mark.slow), pytest.param(4, 2, marks=pytest.mark.slow)],
)
def test_it_goes_on_from_one_process(home, alone, tmp_path, count, zero):
    shutil.copytree(alone, tmp_path / "run")
    forget_after(tmp_path / "run", 2)
    values = recipe(home, output=str(tmp_path / "run"), batch_size=4 // count, resume="auto")
    codes = train_together(values, tmp_path / "log", count=count, zero=zero)
    assert codes == [0] * count and "going on from" in text_of(tmp_path / "log"), text_of(tmp_path / "log")
    assert_close_metrics(alone, tmp_path / "run")
    assert_close_weights(alone, tmp_path / "run")


@pytest.mark.slow
@stages
def test_it_goes_on_under_fsdp(home, alone, tmp_path, zero):
    """After a process died in a checkpoint; and back."""
    values = recipe(home, output=str(tmp_path / "run"), resume="auto")
    codes = train_together(values, tmp_path / "log", zero=zero, before=die_in_second_checkpoint)
    assert codes[1] == -9 and codes[0] != 0, text_of(tmp_path / "log")
    assert [path.name for path in whole_states(tmp_path / "run" / "checkpoints")] == ["step-00000002"]
    assert train_together(values, tmp_path / "fsdp", fsdp=True) == [0, 0], text_of(tmp_path / "fsdp")
    assert_close_weights(alone, tmp_path / "run")
    forget_after(tmp_path / "run", 4)
    assert train_together(values, tmp_path / "back", zero=zero) == [0, 0], text_of(tmp_path / "back")
    assert_close_metrics(alone, tmp_path / "run")
    assert_close_weights(alone, tmp_path / "run")


@pytest.mark.parametrize("zero", [pytest.param(2, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize("recompute", [pytest.param(False, marks=pytest.mark.slow), True])
def test_stages_on_two_processes(home, tmp_path, zero, recompute):
    """Output matching with trained projections, then training in chunks and from a teacher."""
    parts = [
        {"stage": "match", "steps": 3, "alpha_schedule": "none", "trained": "attention"},
        {"steps": 3, "loss_chunk": 16, "distill": str(home / "dense")},
    ]
    parts = [{**part, "gradient_checkpointing": recompute} for part in parts]
    values = recipe(home, output=str(tmp_path / "two"), stages=parts)
    assert train_together(values, tmp_path / "log", zero=zero) == [0, 0], text_of(tmp_path / "log")
    run(home, **{**values, "output": str(tmp_path / "one"), "batch_size": 4})
    assert_close_weights(tmp_path / "one", tmp_path / "two")
    for stage in ("1-match", "2-pretrain"):
        assert_close_metrics(tmp_path / "one" / "stages" / stage, tmp_path / "two" / "stages" / stage)


@pytest.mark.slow
@stages
@pytest.mark.parametrize(
    "changes",
    [
        {"lora_rank": 2},
        {"trained": "map", "clip": 0},
        {"map": "adaptive_entmax", "alpha_start": 1.1},
        {"block_size": "16:0.5,32:0.5"},
    ],
    ids=["lora", "map", "adaptive", "lengths"],
)
def test_other_trainings(home, tmp_path, zero, changes):
    values = recipe(home, output=str(tmp_path / "two"), **changes)
    assert train_together(values, tmp_path / "log", zero=zero) == [0, 0], text_of(tmp_path / "log")
    run(home, **{**values, "output": str(tmp_path / "one"), "batch_size": 4})
    assert_close_metrics(tmp_path / "one", tmp_path / "two")
    assert_close_weights(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
@stages
def test_bf16(home, alone, tmp_path, zero):
    """Parameters compute in bf16 and are kept in float32, also in a checkpoint; the loss is that of float32."""
    values = recipe(home, output=str(tmp_path / "two"), mixed_precision="bf16")
    assert train_together(values, tmp_path / "log", zero=zero) == [0, 0], text_of(tmp_path / "log")
    assert_close_loss(alone, tmp_path / "two", rel=5e-3)
    assert json.loads((tmp_path / "two" / "summary.json").read_text())["mixed_precision"] == "bf16"
    saved = weights(tmp_path / "two")
    assert any(not torch.equal(value, value.bfloat16().float()) for value in saved.values())
    shutil.copytree(tmp_path / "two", tmp_path / "again")
    forget_after(tmp_path / "again", 4)
    values = {**values, "output": str(tmp_path / "again"), "resume": "auto"}
    assert train_together(values, tmp_path / "more", zero=zero) == [0, 0], text_of(tmp_path / "more")
    assert_same_weights(tmp_path / "two", tmp_path / "again")


def assert_close_loss(first: Path, second: Path, rel: float) -> None:
    one, other = ([line["loss"] for line in metrics(folder) if "loss" in line] for folder in (first, second))
    assert other == pytest.approx(one, rel=rel)


@pytest.mark.parametrize(
    ("zero", "fault"),
    [
        (2, nan_in_third_step_of_one),
        pytest.param(3, nan_in_third_step_of_one, marks=pytest.mark.slow),
        pytest.param(2, infinite_loss_in_third_step_of_one, marks=pytest.mark.slow),
        (3, infinite_loss_in_third_step_of_one),
    ],
)
def test_one_bad_process_makes_all_skip(home, tmp_path, zero, fault):
    """The step is dropped, and nothing but it."""
    values = recipe(home, on_nonfinite="skip")
    for name, way in (("zero", {"zero": zero}), ("fsdp", {"fsdp": True})):
        log, values = tmp_path / f"log-{name}", {**values, "output": str(tmp_path / name)}
        assert train_together(values, log, before=fault, **way) == [0, 0], text_of(log)
        skipped = [line for line in metrics(tmp_path / name) if line["kind"] == "skipped"]
        assert [line["step"] for line in skipped] == [3]
        assert fault is not nan_in_third_step_of_one or "model.layers.1.mlp" in skipped[0]["reason"]
    assert_close_weights(tmp_path / "fsdp", tmp_path / "zero")


def test_parameters_without_gradient_are_refused(home, tmp_path):
    """DeepSpeed would decay them."""
    values = recipe(home, output=str(tmp_path / "run"))
    assert train_together(values, tmp_path / "log", zero=2, before=leave_out_mlps) == [1, 1]
    assert re.search(
        r"ValueError: 6 trainable parameters get no gradient, first model\.layers\.0\.mlp", text_of(tmp_path / "log")
    )


@pytest.mark.slow
@stages
def test_checkpoints_with_other_numbers_of_steps_are_refused(home, tmp_path, zero):
    """DeepSpeed has one number for parameters that it steps together."""
    values = recipe(home, output=str(tmp_path / "run"), resume="auto")
    codes = train_together(values, tmp_path / "log", fsdp=True, before=leave_out_mlps)
    assert codes == [0, 0], text_of(tmp_path / "log")
    forget_after(tmp_path / "run", 2)
    assert train_together(values, tmp_path / "more", zero=zero) == [1, 1]
    assert "made another number of steps" in text_of(tmp_path / "more"), text_of(tmp_path / "more")
    assert [path.name for path in whole_states(tmp_path / "run" / "checkpoints")] == ["step-00000002"]


@pytest.mark.slow
@stages
def test_distillation_in_bf16(home, tmp_path, zero):
    """The teacher computes in bf16 too."""
    values = recipe(home, output=str(tmp_path / "two"), distill=str(home / "dense"), loss_chunk=16)
    run(home, **{**values, "output": str(tmp_path / "one"), "batch_size": 4})
    codes = train_together({**values, "mixed_precision": "bf16"}, tmp_path / "log", zero=zero)
    assert codes == [0, 0], text_of(tmp_path / "log")
    assert_close_loss(tmp_path / "one", tmp_path / "two", rel=1e-2)


@pytest.mark.slow
@stages
def test_accelerate_launches_it(home, alone, tmp_path, zero):
    """The files of examples/, on CPUs."""
    words = []
    values = recipe(home, output=str(tmp_path / "run"), batch_size=1, gradient_accumulation=2)
    for name, value in values.items():
        words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    file = EXAMPLES / f"deepspeed_zero{zero}.yaml"
    launch = [
        "--config_file",
        str(file),
        "--num_processes",
        "2",
        "--mixed_precision",
        "no",
        "--main_process_port",
        "0",
    ]
    process = python(
        "from accelerate.commands.launch import main; main()", *launch, "-m", "hf_sparse_attention.train", *words
    )
    text, _ = process.communicate(timeout=180)
    assert process.returncode == 0, text
    assert_close_metrics(alone, tmp_path / "run")
    assert_close_weights(alone, tmp_path / "run")


REFUSED = [
    ({"zero_optimization": {"stage": 1}}, {}, "zero_stage is 1"),
    (
        {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
        {},
        "offload_optimizer_device is cpu",
    ),
    ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, {}, "offload_param_device is nvme"),
    ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}}, {}, "zero_hpz_partition_size"),
    ({"zero_optimization": {"stage": 3, "mics_shard_size": 2}}, {}, "mics_shard_size"),
    ({"curriculum_learning": {"enabled": True}}, {}, "curriculum of its own"),
    ({"optimizer": {"type": "AdamW"}}, {}, "optimizer of its own"),
    ({"torch_autocast": {"enabled": True}}, {}, "torch_autocast"),
    ({"fp16": {"enabled": True}}, {}, "mixed_precision is fp16"),
    ({}, {"mixed_precision": "fp16"}, "mixed_precision is fp16"),
    ({}, {"dtype": "bfloat16"}, "dtype is 'bfloat16'"),
    ({"gradient_clipping": 0.5}, {}, r"gradient_clipping is 0\.5, train's clip is 1\.0"),
    ({"gradient_accumulation_steps": 2}, {}, "gradient_accumulation_steps is 2, train's gradient_accumulation is 1"),
    ({}, {"compile": True}, "compile does not go with DeepSpeed"),
    ({}, {"cpu": False}, "use --cpu"),
    ({}, {"map": "adaptive_entmax"}, "alpha_start 1.01"),
]


@pytest.mark.parametrize(("config", "changes", "message"), REFUSED, ids=[row[2] for row in REFUSED])
def test_what_is_refused(home, tmp_path, monkeypatch, config, changes, message):
    environment = zero_environment(2)
    whole = {**json.loads(environment.pop("ACCELERATE_DEEPSPEED_CONFIG_FILE")), **config}
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", json.dumps(whole))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        run(home, **{**recipe(home, output=str(tmp_path / "run")), **changes})
    assert not (tmp_path / "run").exists()


def test_init_under_zero3_is_refused(home, tmp_path, monkeypatch):
    for name, value in {**zero_environment(3), "ACCELERATE_DEEPSPEED_ZERO3_INIT": "true"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="zero3_init_flag"):
        run(home, **recipe(home, output=str(tmp_path / "run")))

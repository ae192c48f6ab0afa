"""A run goes on exactly after a stop, and nothing that lay there is lost: other runs, whole checkpoints, its model."""

import errno
import json
import math
import random
import shutil
import signal
import time

import pytest
import torch
from training_cases import (
    assert_same_weights,
    dense_folder,
    metrics,
    options,
    python,
    run,
    weights,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_sparse_attention.convert import ConvertArguments, convert_model
from hf_sparse_attention.models import new_parameter_names
from hf_sparse_attention.train import TableArguments, TrainArguments, table_of_runs
from hf_sparse_attention.train.data import check_texts
from hf_sparse_attention.train.state import whole_states

pytest.importorskip("accelerate")


@pytest.mark.parametrize(
    "changes",
    [{}, {"streaming": True, "shuffle_buffer": 4}, {"lora_rank": 2, "lora_dropout": 0.5}, {"map": "adaptive_entmax"}],
    ids=["plain", "streaming", "dropout", "adaptive"],
)
def test_a_run_that_goes_on_is_the_same_run(here, tmp_path, changes):
    changes = {"steps": 9, "checkpoint_every": 3, "keep_checkpoints": 9, "log_every": 4, "eval_every": 2, **changes}
    if "lora_rank" in changes:
        pytest.importorskip("peft")
    here(**changes)
    shutil.copytree(tmp_path / "run", tmp_path / "first")
    here(**changes, resume=str(tmp_path / "run" / "checkpoints" / "step-00000003"))
    assert_same_weights(tmp_path / "first", tmp_path / "run")
    assert metrics(tmp_path / "first") == metrics(tmp_path / "run")
    assert len(metrics(tmp_path / "run")) == len({(line["step"], line["kind"]) for line in metrics(tmp_path / "run")})


VICTIM = """
import json, sys
from training_cases import TrainArguments, train_model
train_model(TrainArguments(**json.loads(sys.argv[1])))
"""
SURVIVOR = """
import json, sys
from training_cases import TrainArguments, train_model
for values in sys.argv[1:]:
    train_model(TrainArguments(**json.loads(values)))
"""


def test_killed_and_resumed_is_bit_identical(home, tmp_path):
    values = options(
        home, output=str(tmp_path / "killed"), steps=120, checkpoint_every=7, eval_every=10, log_every=3,
        resume="auto", recipe="anneal",
    )  # fmt: skip
    victim = python(VICTIM, json.dumps(values))
    checkpoints = tmp_path / "killed" / "checkpoints"
    wait_until = time.monotonic() + 120
    while len(list(checkpoints.glob("step-*"))) < 2 and time.monotonic() < wait_until and victim.poll() is None:
        time.sleep(0.01)
    time.sleep(random.uniform(0, 0.4))
    victim.send_signal(signal.SIGKILL)
    output, _ = victim.communicate(timeout=60)
    assert victim.returncode == -signal.SIGKILL, output
    assert not (tmp_path / "killed" / "summary.json").exists()
    reached = whole_states(checkpoints)[-1].name
    # What a process killed while it writes would leave behind.
    (checkpoints / ".partial-step-00000999").mkdir()
    with open(tmp_path / "killed" / "metrics.jsonl", "a") as file:
        file.write('{"step": 119, "kind": "train", "loss"')

    whole = {**values, "output": str(tmp_path / "whole"), "resume": "never"}
    survivor = python(SURVIVOR, json.dumps(values), json.dumps(whole))
    output, _ = survivor.communicate(timeout=120)
    assert survivor.returncode == 0, output
    assert f"going on from {checkpoints / reached}" in output
    assert_same_weights(tmp_path / "killed", tmp_path / "whole")
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "whole")
    assert not list(checkpoints.glob(".partial*"))


def test_half_checkpoints_never_count(here, tmp_path, caplog):
    here(keep_checkpoints=3, checkpoint_every=2)
    checkpoints = tmp_path / "run" / "checkpoints"
    assert [path.name[-1] for path in whole_states(checkpoints)] == ["4", "6", "8"]
    shutil.rmtree(tmp_path / "run" / "model")
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    (cut,) = (checkpoints / "step-00000008" / "tensors").glob("*.distcp")
    cut.write_bytes(cut.read_bytes()[:-1])
    (checkpoints / "step-00000006" / "state.json").unlink()
    assert [path.name[-1] for path in whole_states(checkpoints)] == ["4"]
    assert f"{cut.name} is missing or cut off" in caplog.text
    here(keep_checkpoints=3, checkpoint_every=2, resume="auto")
    here(keep_checkpoints=3, checkpoint_every=2, resume="auto", output=str(tmp_path / "copy"))
    assert_same_weights(tmp_path / "run", tmp_path / "copy")
    assert metrics(tmp_path / "run") == metrics(tmp_path / "copy")
    with pytest.raises(OSError, match="not a whole checkpoint"):
        here(resume=str(tmp_path / "nowhere"))


def test_counts_are_those_of_the_saved_model(home, tmp_path):
    """PEFT keeps what it replaces, which is not saved."""
    run(home, output=str(tmp_path / "run"), lora_rank=2, lora_targets=["q_proj"], steps=2)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert summary["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    new = [model.get_parameter(name).numel() for name in new_parameter_names(model)]
    assert summary["new_parameters"] == sum(new)


def test_other_text_of_the_same_size_is_another_run(home, tmp_path):
    text = tmp_path / "train.txt"
    shutil.copyfile(home / "train.txt", text)
    run(home, output=str(tmp_path / "run"), train_data=[str(text)], steps=2)
    text.write_text(text.read_text().replace("cat", "sun"))
    with pytest.raises(ValueError, match="holds another run, finished: data"):
        run(home, output=str(tmp_path / "run"), train_data=[str(text)], steps=2, resume="auto")


def test_output_in_use(here, tmp_path, capsys):
    summary = here(steps=2)
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(FileExistsError, match="--resume auto, replace it with --overwrite"):
        here(steps=2)
    assert here(steps=2, resume="auto") == summary
    assert "finished: nothing to do" in capsys.readouterr().out
    with pytest.raises(ValueError, match="steps 2 then, 3 now"):
        here(steps=3, resume="auto")
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    assert here(steps=3, overwrite=True)["steps"] == 3
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("years of work")
    for changes in ({"resume": "auto"}, {"overwrite": True}):
        with pytest.raises(FileExistsError, match="holds no training run"):
            here(output=str(other), **changes)
    assert [path.name for path in other.iterdir()] == ["thesis.txt"]


def test_a_checkpoint_of_elsewhere_costs_no_run(here, tmp_path):
    """A checkpoint is named that is of another run than the one in output."""
    short = {"steps": 4, "checkpoint_every": 2}
    here(output=str(tmp_path / "one"), **short)
    here(output=str(tmp_path / "two"), seed=1, **short)
    (tmp_path / "two" / "summary.json").unlink()
    kept = {file: file.read_bytes() for file in (tmp_path / "two").rglob("*") if file.is_file()}
    checkpoint = str(tmp_path / "one" / "checkpoints" / "step-00000002")
    with pytest.raises(ValueError, match=r"two holds another run than .*seed 1.*, which would be lost"):
        here(output=str(tmp_path / "two"), resume=checkpoint, **short)
    assert kept == {file: file.read_bytes() for file in (tmp_path / "two").rglob("*") if file.is_file()}
    here(output=str(tmp_path / "three"), resume=checkpoint, **short)
    assert_same_weights(tmp_path / "one", tmp_path / "three")


def test_a_run_goes_on_in_the_precision_it_had(here, monkeypatch, tmp_path):
    """Also if accelerate was told it, and not train."""
    from accelerate.state import AcceleratorState

    # As a new process finds it.
    AcceleratorState._reset_state(True)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    here(steps=4, checkpoint_every=2)
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    AcceleratorState._reset_state(True)
    (tmp_path / "run" / "summary.json").unlink()
    with pytest.raises(ValueError, match="mixed_precision 'bf16' then, 'no' now"):
        here(steps=4, checkpoint_every=2, resume="auto")
    # What was written before did not know it.
    file = tmp_path / "run" / "checkpoints" / "step-00000004" / "state.json"
    file.write_text(file.read_text().replace('"mixed_precision": "bf16"', '"mixed_precision": null'))
    assert here(steps=4, checkpoint_every=2, resume="auto")["mixed_precision"] == "no"


def test_a_process_keeps_its_precision_and_says_so(here, tmp_path):
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    here(steps=1, checkpoint_every=0, mixed_precision="bf16")
    with pytest.raises(ValueError, match="mixed_precision is no, but this process has already trained with bf16"):
        here(steps=1, checkpoint_every=0, output=str(tmp_path / "other"))
    assert not (tmp_path / "other").exists()
    AcceleratorState._reset_state(True)
    assert here(steps=1, checkpoint_every=0, overwrite=True)["mixed_precision"] == "no"


def test_the_command_says_the_precision_that_accelerate_was_told(here, monkeypatch, tmp_path):
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    one = here(steps=1, checkpoint_every=0)
    several = here(stages=["{steps: 1}", "{steps: 1}"], output=str(tmp_path / "several"), checkpoint_every=0)
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    AcceleratorState._reset_state(True)
    assert all("--mixed_precision bf16" in summary["command"] for summary in (one, several, several["stages"][0]))
    assert "--mixed_precision" not in here(steps=1, checkpoint_every=0, overwrite=True)["command"]


def test_seconds_of_devices_are_those_of_each_time(here, tmp_path):
    """A run that began on four devices for 25 s and ends on one."""
    short = {"steps": 2, "checkpoint_every": 2}
    first = here(**short)
    assert first["device_seconds"] == first["seconds"]
    (tmp_path / "run" / "summary.json").unlink()
    file = tmp_path / "run" / "checkpoints" / "step-00000002" / "state.json"
    state = json.loads(file.read_text())
    state["run"] |= {"seconds": 25.0, "device_seconds": 100.0}
    file.write_text(json.dumps(state))
    # Every step is done.
    summary = here(**short, resume="auto")
    assert (summary["seconds"], summary["device_seconds"]) == (25.0, 100.0)
    table_of_runs(TableArguments([str(tmp_path / "run")], output_dir=str(tmp_path / "table"), figure=False))
    assert "| 1.7 |" in (tmp_path / "table" / "table.md").read_text()
    # One from before its devices were counted.
    (tmp_path / "run" / "summary.json").unlink()
    del state["run"]["device_seconds"]
    file.write_text(json.dumps(state))
    assert here(**short, resume="auto")["device_seconds"] == 25.0


@pytest.mark.parametrize("every", [0, 2])
def test_a_held_out_loss_that_is_not_finite_costs_no_model(here, home, tmp_path, capsys, every):
    """Of a word that is trained on nowhere. It is not passed over either: the loss before it is not the last one."""
    tokenizer = AutoTokenizer.from_pretrained(home / "dense")
    (number,) = set(tokenizer("the Q cat")["input_ids"]) & {410}
    assert number not in tokenizer((home / "train.txt").read_text(), truncation=False, verbose=False)["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(dense_folder(tmp_path / "dense", tie_word_embeddings=False))
    model.get_input_embeddings().weight.data[number] = math.nan
    model.save_pretrained(tmp_path / "dense")
    (tmp_path / "eval.txt").write_text((home / "eval.txt").read_text().replace("cat", "Q"))
    options = {"model": str(tmp_path / "dense"), "eval_data": [str(tmp_path / "eval.txt")], "checkpoint_every": every}
    summary = here(steps=4, eval_every=2, **options)
    assert summary["eval_loss"] == [[0, None], [2, None], [4, None]] and math.isfinite(summary["train_loss"])
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model") is not None
    shown = capsys.readouterr().out
    assert "warning: at step 2 the held-out loss is nan" in shown
    assert "held-out loss: not finite at step 0 (alpha 1), not finite at step 4" in shown
    table_of_runs(TableArguments([str(tmp_path / "run")], output_dir=str(tmp_path / "table"), figure=False))
    assert "held-out loss not finite" in (tmp_path / "table" / "table.md").read_text()


def test_held_out_text_is_not_trained_on(home, here, tmp_path):
    """As a pattern that takes both files would have it."""
    for name in ("train.txt", "eval.txt"):
        shutil.copyfile(home / name, tmp_path / name)
    (tmp_path / "same.txt").symlink_to(tmp_path / "eval.txt")
    for names in (["*.txt"], ["train.txt", "same.txt"]):
        with pytest.raises(ValueError, match="eval.txt, which train_data has too"):
            here(train_data=[str(tmp_path / name) for name in names], eval_data=[str(tmp_path / "eval.txt")])
    assert not (tmp_path / "run").exists()
    # Splits of a dataset are other texts.
    values = {"model": "m", "output": "o", "train_data": ["a/b"], "eval_data": ["a/b"]}
    check_texts(TrainArguments(**values, eval_split="validation"))
    with pytest.raises(ValueError, match="eval_data has a/b"):
        check_texts(TrainArguments(**values, eval_split="train"))


def test_held_out_text_with_nothing_to_predict(home, here, tmp_path):
    for file in (home / "dense").iterdir():
        (tmp_path / "dense").mkdir(exist_ok=True)
        shutil.copyfile(file, tmp_path / "dense" / file.name)
    config = tmp_path / "dense" / "tokenizer_config.json"
    values = {key: value for key, value in json.loads(config.read_text()).items() if key[:3] not in ("bos", "eos")}
    config.write_text(json.dumps(values))
    (tmp_path / "ones.txt").write_text("\n<|endoftext|>\n".join("a" * 40))
    with pytest.raises(ValueError, match="nothing to predict in 4 blocks of 2: every token begins a document"):
        here(model=str(tmp_path / "dense"), eval_data=[str(tmp_path / "ones.txt")], block_size=2)


@pytest.mark.parametrize("changes", [{"save_dtype": "bfloat16"}, {"lora_save": "adapter"}])
def test_a_finished_run_is_not_saved_otherwise_in_silence(here, home, tmp_path, changes):
    convert_model(ConvertArguments(model=str(home / "dense"), output=str(tmp_path / "sparse"), train_length=32))
    options = {"model": str(tmp_path / "sparse"), "lora_rank": 2, "steps": 2, "checkpoint_every": 2, "resume": "auto"}
    summary = here(**options)
    assert here(**options) == summary
    with pytest.raises(ValueError, match=f"{next(iter(changes))} is .* finished and saved with .*summary.json"):
        here(**options, **changes)
    # The way out that it names.
    (tmp_path / "run" / "summary.json").unlink()
    assert here(**options, **changes)["eval_loss"] == summary["eval_loss"]
    saved = tmp_path / "run" / "model"
    is_adapter = (saved / "adapter_config.json").is_file()
    assert is_adapter or weights(tmp_path / "run")["model.norm.weight"].dtype == torch.bfloat16


def test_full_disk(here, tmp_path, monkeypatch):
    from hf_sparse_attention.train import state

    save, calls = state.sharded.save, []

    def save_once(*arguments, **keywords):
        save(*arguments, **keywords)
        calls.append(1)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(state.sharded, "save", save_once)
    with pytest.raises(OSError, match="step-00000008 could not be written: the disk is full"):
        here()
    checkpoints = tmp_path / "run" / "checkpoints"
    assert [path.name for path in checkpoints.iterdir()] == ["step-00000004"]
    assert not (tmp_path / "run" / "model").exists()
    here(resume="auto")
    here(output=str(tmp_path / "other"))
    assert_same_weights(tmp_path / "run", tmp_path / "other")


def test_loss_that_is_not_finite(here, tmp_path):
    with pytest.raises(
        RuntimeError,
        match=r"step 2: loss nan, .*first in the output of model.embed_tokens; blocks \d+ \(doc.*\).*no checkpoint",
    ):
        here(learning_rate=1e38, clip=0, eval_data=[], eval_blocks=None, statistics_blocks=0)
    assert not (tmp_path / "run" / "model").exists()
    # Its parameters are infinite, and to leave out every step to the end would leave no model.
    options = {"eval_data": [], "eval_blocks": None, "statistics_blocks": 0, "output": str(tmp_path / "skip")}
    with pytest.raises(RuntimeError, match="step 2: loss nan.*; model.* is not finite itself, which no later step"):
        here(learning_rate=1e38, clip=0, on_nonfinite="skip", **options)


@pytest.mark.parametrize("changes", [{"checkpoint_every": 1}, {"checkpoint_every": 0}, {"on_nonfinite": "skip"}])
def test_parameters_that_are_not_finite_replace_no_checkpoint(here, tmp_path, monkeypatch, changes):
    """The last of 8 steps makes one, after which no loss is computed."""
    step, calls = torch.optim.AdamW.step, []

    def spoil(self, *arguments, **keywords):
        step(self, *arguments, **keywords)
        calls.append(1)
        if len(calls) == 8:
            self.param_groups[-1]["params"][-1].data.view(-1)[0] = math.inf

    monkeypatch.setattr(torch.optim.AdamW, "step", spoil)
    options = {"eval_data": [], "eval_blocks": None, "statistics_blocks": 0, "keep_checkpoints": 1, **changes}
    with pytest.raises(RuntimeError, match=r"step 8: model\.layers.* is not finite after it"):
        here(**options)
    left = [path.name for path in whole_states(tmp_path / "run" / "checkpoints")]
    assert left == {0: [], 1: ["step-00000007"]}.get(options.get("checkpoint_every"), ["step-00000004"])
    assert not (tmp_path / "run" / "model").exists()
    assert metrics(tmp_path / "run")[-1]["kind"] == "failed"

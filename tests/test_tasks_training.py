"""Small models from scratch on synthetic tasks, and exact match by one pass and by decoding."""

import json
import math
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from hf_sparse_attention import cli, softmax
from hf_sparse_attention.arguments import parse_arguments
from hf_sparse_attention.config import POSITIONS
from hf_sparse_attention.maps import alibi_slopes
from hf_sparse_attention.models import new_parameter_names
from hf_sparse_attention.tasks.exact_match import generated, score, teacher_forced
from hf_sparse_attention.tasks.samples import NO_TARGET, PAD
from hf_sparse_attention.tasks.streams import Layout, Stream, packed_layout
from hf_sparse_attention.tasks.synthetic import SYNTHETIC, make_task
from hf_sparse_attention.train import TrainTaskArguments, task_loop, task_record, task_run, train_task
from hf_sparse_attention.train.recipe import rate_at
from hf_sparse_attention.train.task_arguments import MAPS, check_task_arguments
from hf_sparse_attention.train.task_loop import _side_by_side
from hf_sparse_attention.train.task_model import answer_loss, new_model
from hf_sparse_attention.train.task_run import _layout
from hf_sparse_attention.train.task_step import TaskStep
from hf_sparse_attention.train.task_table import TableArguments, table_of_runs

TINY = {
    "task": "copy", "task_settings": ["symbols=6"], "lengths": [4, 6], "layers": 2, "hidden_size": 32, "heads": 4,
    "ffn_size": 64, "batch_size": 32, "learning_rates": [1e-2], "warmup_steps": 20, "device": "cpu", "log_every": 10,
    "validation_lengths": [6], "validation_samples": 50, "checkpoint_every": 0,
}  # fmt: skip


def options(output, **changes) -> TrainTaskArguments:
    warmup = min(TINY["warmup_steps"], changes.get("steps", 20) // 2)
    return TrainTaskArguments(**{**TINY, "warmup_steps": warmup, "output": str(output), **changes})


def weights(folder):
    return torch.load(folder, weights_only=True)["step"]["model"]


def lines(run):
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "timing"} for line in found]


@pytest.fixture(scope="module", params=["softmax", "asentmax"])
def learned(request, tmp_path_factory):
    """A run that learns to copy, with its test."""
    output = tmp_path_factory.mktemp("learned") / request.param
    changes = {"map": request.param, "steps": 250, "test_lengths": [6], "test_samples": 300}
    return output, train_task(options(output, **changes))


def test_a_small_model_learns_to_copy(learned):
    output, summary = learned
    (run,), (test,) = summary["runs"], summary["tests"][summary["best"]]
    assert run["failed"] is None and summary["best"] == run["name"]
    assert test["length"] == 6 and test["samples"] == 300 and test["exact_match"] > 0.9
    assert run["validation"][0]["exact_match"] > 0.9
    first, *_, last = [line["loss"] for line in lines(output / run["name"]) if line["kind"] == "train"]
    assert last < 0.1 * first
    assert json.loads((output / "summary.json").read_text()) == summary
    text = (output / "summary.md").read_text()
    assert run["name"] in text and "steps 250, " in text
    assert ("scale_start" in text) == (run["identity"]["map"] == "asentmax")
    # What decides the rounding.
    assert run["threads"] == torch.get_num_threads() and run["versions"]["torch"] and run["compile"] is False
    saved = json.loads((output / run["name"] / "model" / "task.json").read_text())
    assert saved == {"task": "copy", "settings": {"symbols": 6}, "lengths": [4, 6]}


def test_what_was_trained_is_what_is_saved(learned):
    output, summary = learned
    model = AutoModelForCausalLM.from_pretrained(output / summary["best"] / "model")
    sparse = model.config.sparse_attention
    assert sparse["position"] == "nape" and sparse["train_length"] == 15
    assert (sparse["map"], sparse["alpha"]) in (("entmax", 1.0), ("asentmax", 1.5))
    test = score(model, make_task("copy", {"symbols": 6}).fixed_blocks(6, 300), batch_tokens=1000)
    assert test == {key: summary["tests"][summary["best"]][0][key] for key in test}


def test_decoding_and_one_pass_find_the_same_samples(learned):
    """Where the answer is right, where it is wrong, and where it is wrong only from some token on."""
    output, summary = learned
    model = AutoModelForCausalLM.from_pretrained(output / summary["best"] / "model").eval()
    task = make_task("copy", {"symbols": 6})
    found = set()
    for length in (6, 8):
        samples = task.fixed_set(length, 60)
        forced, decoded = teacher_forced(model, samples), generated(model, samples, tags=False)
        assert (forced.exact == decoded.exact).all() and (forced.asked == decoded.asked).all()
        assert (decoded.right <= forced.right + 0).mean() > 0.5
        found |= set(forced.exact.tolist())
    assert found == {True, False}


@pytest.mark.parametrize("name", SYNTHETIC)
def test_decoding_and_one_pass_agree_on_every_task(name):
    """An untrained model is wrong nearly everywhere; tags are compared token by token."""
    task = make_task(name)
    model = new_model(options("unused", task=name, task_settings=[], lengths=[]), task, 0).eval()
    samples = task.fixed_set(max(task.shortest, 10), 5)
    with torch.no_grad():
        # Tokens that are right by chance: the answers become what the model says in some places.
        logits = model(input_ids=torch.from_numpy(samples.tokens), use_cache=False).logits
    targets = samples.targets.copy()
    if task.tags:
        places = np.nonzero(targets != NO_TARGET)
        some = np.arange(len(places[0])) % 3 > 0
        places = tuple(place[some] for place in places)
        targets[places] = logits.argmax(-1).numpy()[places]
        samples = type(samples)(samples.tokens, targets, samples.lengths)
    forced, decoded = teacher_forced(model, samples), generated(model, samples, tags=task.tags)
    assert (forced.exact == decoded.exact).all() and (forced.asked == decoded.asked).all()
    if task.tags:
        assert (forced.right == decoded.right).all() and forced.right.sum() >= some.sum()
    plain = F.cross_entropy(logits.flatten(0, 1), torch.from_numpy(samples.targets).flatten(), ignore_index=NO_TARGET)
    assert forced.loss.sum() / forced.asked.sum() == pytest.approx(plain.item(), rel=1e-5)


def test_score_counts_samples_and_halves_batches():
    task = make_task("copy", {"symbols": 6})
    model = new_model(options("unused"), task, 0).eval()
    whole = score(model, task.fixed_blocks(6, 120), batch_tokens=10**6)
    sizes = []

    def cramped(model, samples):
        sizes.append(len(samples))
        if len(samples) > 20:
            raise torch.OutOfMemoryError("no memory")
        return teacher_forced(model, samples)

    counted = []
    found = score(model, task.fixed_blocks(6, 120), batch_tokens=10**6, answer=cramped, progress=counted.append)
    assert (
        found == pytest.approx(whole)
        and sum(counted) == found["samples"] == 120
        and sizes[:3] == [50, 25, 12]
        and max(sizes[3:]) <= 12
    )
    with pytest.raises(torch.OutOfMemoryError):
        score(model, task.fixed_blocks(6, 1), batch_tokens=1, answer=lambda *_: cramped(model, range(21)))
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")
    assert "not finite" in score(model, task.fixed_blocks(6, 5), batch_tokens=100)["missing"]


@pytest.mark.parametrize("name", ["copy", "2back"])
def test_a_model_without_numbers_answers_nothing_wrong(name):
    """The largest of logits with a NaN among them is a token too: decoding would go on, and count as a mistake."""
    task = make_task(name, {"symbols": 6})
    model = new_model(options("unused", task=name), task, 0).eval()
    with torch.no_grad():
        model.lm_head.weight[5, 0] = float("nan")
    blocks = list(task.fixed_blocks(6, 60))
    for answer, what in ((teacher_forced, "loss"), (partial(generated, tags=task.tags), "logits")):
        found = score(model, blocks, batch_tokens=200, answer=answer)
        assert list(found) == ["missing"] and f"the {what}" in found["missing"] and "60 of 60" in found["missing"]


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("position", POSITIONS)
def test_every_map_and_position_trains_every_parameter(name, position):
    arguments = options("unused", map=name, position=position)
    task = arguments.chosen_task()
    if position == "nape_scaled" and name not in ("asentmax", "ssmax"):
        with pytest.raises(ValueError, match="has no factor"):
            new_model(arguments, task, 0)
        return
    model = new_model(arguments, task, 0)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    layout = _layout(arguments, task)
    assert layout.packed == (name not in ("softmax", "ssmax"))
    step = TaskStep(model, arguments, layout, torch.device("cpu"))
    (batches,) = Stream(task, 0, 32, (4, 6), layout, 0, 3)
    step.hand_over(batches, [1e-2] * 3)
    for _ in range(3):
        step()
    with pytest.raises(ValueError, match="no batch is left"):
        step()
    loss, norm = step.read_loss()
    assert 0.5 < loss < 4 and norm > 0
    still = [key for key, value in model.named_parameters() if torch.equal(before[key], value)]
    assert not still
    if name not in ("softmax", "entmax", "sparsemax"):
        assert new_parameter_names(model)


@pytest.mark.parametrize("width", [15, 32, 26])
@pytest.mark.parametrize("position", ["nape", "rope"])
def test_a_step_is_a_plain_step_of_adamw(position, width):
    """Against a loop written out: warm-up and cosine, clipping, loss on the answer alone. One sample in a row, two,
    and rows that some batches do not fit in."""
    arguments = options(
        "unused", steps=12, warmup_steps=4, clip=0.3, map="asentmax", weight_decay=0.1, position=position
    )
    layout = Layout(16 if width == 15 else 8, width, packed=width > 15)
    task = arguments.chosen_task()
    model, plain = new_model(arguments, task, 3), new_model(arguments, task, 3)
    step = TaskStep(model, arguments, layout, torch.device("cpu"))
    arrays, shapes = iter(Stream(task, 0, 16, (4, 6), layout, 0, 12)), set()
    new = set(new_parameter_names(plain))
    named = list(plain.named_parameters())
    groups = [
        {"params": [value for name, value in named if value.ndim >= 2 and name not in new], "weight_decay": 0.1},
        {"params": [value for name, value in named if value.ndim < 2 or name in new], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.99))
    losses = []
    for number in range(12):
        batch = task.training_batch(number, batch=16, lengths=(4, 6))
        rate = 1e-2 * rate_at(number, steps=12, schedule="cosine", warmup=4, final=0.0)
        if not step.left:
            batches = next(arrays)
            shapes.add(batches.shape[2:])
            ahead = range(number, number + len(batches))
            step.hand_over(
                batches, [1e-2 * rate_at(each, steps=12, schedule="cosine", warmup=4, final=0.0) for each in ahead]
            )
        step()
        logits = plain(input_ids=torch.from_numpy(batch.tokens), use_cache=False).logits
        loss = (
            sum(
                -logits[row, place].log_softmax(-1)[batch.targets[row, place]]
                for row, place in zip(*np.nonzero(batch.targets != NO_TARGET), strict=True)
            )
            / (batch.targets != NO_TARGET).sum()
        )
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.3)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
    assert shapes == {15: {(16, 15)}, 32: {(8, 32)}, 26: {(8, 26), (16, 15)}}[width]
    assert step.read_loss()[0] == pytest.approx(np.mean(losses), rel=1e-4)
    for (name, one), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=2e-4, rtol=1e-3, msg=name)


def test_what_is_behind_a_sample_and_before_its_answer_teaches_nothing():
    task = make_task("copy", {"symbols": 6})
    batch = task.training_batch(0, batch=8, lengths=(4, 6))
    logits = torch.randn(*batch.tokens.shape, task.vocabulary, requires_grad=True)
    answer_loss(logits, torch.from_numpy(batch.targets)).backward()
    taught = logits.grad.abs().sum(-1) > 0
    assert (taught.numpy() == (batch.targets != NO_TARGET)).all()
    assert not taught.numpy()[batch.tokens == PAD].any()


def test_normal_start_is_the_papers_and_neutral_is_exactly_one():
    for start, low, high in (("neutral", 1.0, 1.0), ("normal", 1.6, 1.8), ("beta", 1 - 1e-6, 1 + 1e-6)):
        arguments = options("unused", scale_start=start, hidden_size=64)
        model = new_model(arguments, arguments.chosen_task(), 0)
        factor = model.model.layers[0].self_attn.sparse_scale(torch.randn(4, 50, 64), torch.arange(2, 52)[None])
        assert low <= factor.median() <= high
        assert (start != "normal") == bool(((factor - 1).abs() < 1e-6).all())
        assert start != "neutral" or (factor == 1).all()


def test_samples_stand_side_by_side_where_that_pays_and_can_be():
    task = make_task("copy")
    sizes = {"task_settings": [], "lengths": [], "batch_size": 128, "precision": "bfloat16"}
    for changes, packed in (
        ({}, True),
        ({"cuda_graph": True, "compile": True}, True),
        # What looks for the samples waits for the device, which must not be while a step is captured.
        ({"cuda_graph": True}, False),
        ({"map": "softmax"}, True),
        ({"map": "softmax", "position": "rope"}, False),
        ({"map": "asentmax", "position": "rope"}, True),
        ({"map": "ssmax", "precision": "float32"}, False),
        ({"map": "entmax", "precision": "float32"}, True),
        ({"map": "entmax", "precision": "float32", "alpha": 1.0}, False),
    ):
        layout = _layout(options("unused", **{**sizes, **changes}), task)
        assert layout == (packed_layout(task, 128, (32, 64)) if packed else Layout(128, 131)), changes


@torch.no_grad()
def test_the_logarithmic_start_is_ssmax():
    task, scales = options("unused").chosen_task(), []
    lengths = torch.arange(2, 5002)[None]
    for changes in ({"scale_start": "logarithm"}, {"map": "ssmax"}):
        model = new_model(options("unused", hidden_size=64, **changes), task, 0)
        scales.append(model.model.layers[1].self_attn.sparse_scale(torch.randn(4, 5000, 64), lengths))
    torch.testing.assert_close(scales[0], scales[1].expand_as(scales[0]), rtol=1e-5, atol=0)
    assert scales[0][:, :, : task.width(6)].mean() == pytest.approx(1, rel=1e-5)


def test_an_interrupted_run_goes_on_exactly(tmp_path, monkeypatch, capsys, caplog):
    caplog.set_level("INFO", logger="hf_sparse_attention")
    changes = {"steps": 30, "checkpoint_every": 10, "validate_every": 15, "log_every": 7, "seeds": [1, 2]}
    whole = train_task(options(tmp_path / "whole", **changes))
    call, calls = TaskStep.__call__, []

    def interrupted(self):
        calls.append(self)
        if len(calls) == 49:
            raise KeyboardInterrupt
        call(self)

    monkeypatch.setattr(TaskStep, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_task(options(tmp_path / "cut", **changes))
    with pytest.raises(FileExistsError, match="go on with --resume auto"):
        train_task(options(tmp_path / "cut", **changes))
    again = train_task(options(tmp_path / "cut", **changes, resume="auto"))
    assert f"{tmp_path / 'cut' / again['runs'][1]['name']} goes on from step 10 of 30" in caplog.text
    # 30 of the first run, 18 of the second, the one that was cut, and what was left after its checkpoint at 10.
    assert len(calls) == 30 + 18 + 1 + 20
    for run in whole["runs"]:
        one, two = (weights(tmp_path / kind / run["name"] / "checkpoint.pt") for kind in ("whole", "cut"))
        assert all(torch.equal(value, two[key]) for key, value in one.items())
        assert lines(tmp_path / "whole" / run["name"]) == lines(tmp_path / "cut" / run["name"])
    assert [run["validation"] for run in whole["runs"]] == [run["validation"] for run in again["runs"]]
    # Nothing is left to do; a further rate is one further run; other sizes are refused.
    assert train_task(options(tmp_path / "cut", **changes, resume="auto"))["best"] == again["best"]
    assert len(calls) == 69
    longer = train_task(options(tmp_path / "cut", **{**changes, "validation_lengths": [4, 5]}, resume="auto"))
    assert [line["length"] for line in longer["runs"][1]["validation"]] == [4, 5] and len(calls) == 69
    more = {**changes, "learning_rates": [1e-2, 3e-3], "seeds": [1]}
    assert len(train_task(options(tmp_path / "cut", **more, resume="auto"))["runs"]) == 2
    assert len(calls) == 99
    with pytest.raises(ValueError, match="was trained otherwise \\(hidden_size 32 then, 64 now"):
        train_task(options(tmp_path / "cut", **changes, resume="auto", hidden_size=64))
    assert "validation 6" in capsys.readouterr().out


def test_a_run_interrupted_in_its_last_validation_has_each_line_once(tmp_path, monkeypatch):
    changes = {"steps": 6, "checkpoint_every": 3, "validate_every": 3, "validation_lengths": [5, 6]}
    train_task(options(tmp_path / "whole", **changes))
    write = task_run.write_json

    def interrupted(path, content):
        if content.get("finished"):
            raise KeyboardInterrupt
        write(path, content)

    monkeypatch.setattr(task_run, "write_json", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_task(options(tmp_path / "cut", **changes))
    monkeypatch.undo()
    train_task(options(tmp_path / "cut", **changes, resume="auto"))
    name = "rate-0.01-seed-0"
    assert lines(tmp_path / "whole" / name) == lines(tmp_path / "cut" / name)


@pytest.mark.parametrize(("name", "reason"), [("asentmax", "loss"), ("adaptive_entmax", "alpha=[nan")])
def test_a_run_that_diverges_is_listed_and_not_the_best(tmp_path, name, reason):
    """Also where a learned alpha that is no number is refused before the loss is read."""
    changes = {"map": name, "steps": 20, "warmup_steps": 0, "clip": 0.0}
    summary = train_task(options(tmp_path / "out", **changes, learning_rates=[1e30, 1e-3]))
    sound, broken = summary["runs"]
    assert sound["failed"] is None and reason in broken["failed"] and broken["validation"] == []
    assert summary["best"] == sound["name"] == "rate-0.001-seed-0"
    assert not (tmp_path / "out" / broken["name"] / "model").exists()
    alone = train_task(options(tmp_path / "out", **changes, learning_rates=[1e30], resume="auto"))
    assert alone["best"] is None and alone["tests"] == {}


def test_side_by_side_gives_what_one_after_the_other_gives(tmp_path):
    """Bit for bit; one run diverges, and the others go on."""
    grid = {"learning_rates": [1e-2, 3e-3, 1e30], "seeds": [1, 2], "clip": 0.0, "log_every": 5}
    changes = {"steps": 20, "checkpoint_every": 10, "test_lengths": [6], "tested": "all", **grid}
    one = train_task(options(tmp_path / "one", **changes))
    for together in (4, 9):
        output = tmp_path / str(together)
        several = train_task(options(output, **changes, together=together))
        assert several["best"] == one["best"]
        assert set(several["tests"]) == set(one["tests"]) == {run["name"] for run in one["runs"] if not run["failed"]}
        assert len(one["tests"]) == 4
        for ours, other in zip(one["runs"], several["runs"], strict=True):
            timed = {"seconds", "spans"}
            assert {**ours, **{key: other[key] for key in timed}} == other
            assert lines(tmp_path / "one" / ours["name"]) == lines(output / ours["name"])
            if not ours["failed"]:
                found = [weights(place / ours["name"] / "checkpoint.pt") for place in (tmp_path / "one", output)]
                assert all(torch.equal(value, found[1][key]) for key, value in found[0].items())


def test_an_error_of_one_run_ends_those_beside_it():
    """At once, not when nobody holds the error any more: each holds a model and its optimizer on the device."""
    ended = []

    def run(name, steps):
        try:
            for _ in range(steps):
                yield
            raise OSError("the disk is full")
        finally:
            ended.append(name)

    with pytest.raises(OSError, match="the disk is full") as caught:
        _side_by_side([run("a", 9), run("b", 2), run("c", 9)], 3)
    assert caught.value is not None and sorted(ended) == ["a", "b", "c"]


def test_side_by_side_means_a_step_of_each_in_turn(tmp_path, monkeypatch):
    call, order = TaskStep.__call__, []

    def noted(self):
        order.append(id(self.model))
        call(self)

    monkeypatch.setattr(TaskStep, "__call__", noted)
    train_task(options(tmp_path / "out", steps=6, seeds=[0, 1, 2], together=2))
    assert order[:12] == order[:2] * 6 and order[0] != order[1] and len(set(order[12:])) == 1


def test_several_that_were_interrupted_go_on_exactly(tmp_path, monkeypatch):
    changes = {"steps": 30, "checkpoint_every": 10, "log_every": 7, "seeds": [1, 2, 3], "together": 2}
    whole = train_task(options(tmp_path / "whole", **changes))
    call, calls = TaskStep.__call__, []

    def interrupted(self):
        calls.append(self)
        if len(calls) == 30:
            raise KeyboardInterrupt
        call(self)

    monkeypatch.setattr(TaskStep, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_task(options(tmp_path / "cut", **changes))
    again = train_task(options(tmp_path / "cut", **changes, resume="auto"))
    # 15 and 14 steps of the two, the one that was cut, what was left after their checkpoints at 10, and the third run.
    assert len(calls) == 30 + 20 + 20 + 30
    assert [len(run["spans"]) for run in again["runs"]] == [2, 2, 1]
    for run in whole["runs"]:
        one, two = (weights(tmp_path / kind / run["name"] / "checkpoint.pt") for kind in ("whole", "cut"))
        assert all(torch.equal(value, two[key]) for key, value in one.items())
        assert lines(tmp_path / "whole" / run["name"]) == lines(tmp_path / "cut" / run["name"])


def test_the_best_is_chosen_by_validation():
    def run(name, *numbers, failed=None):
        rows = [
            {"length": 8, "exact_match": exact, "token_accuracy": right, "loss": loss}
            for exact, right, loss in numbers
        ]
        return {"name": name, "failed": failed, "validation": rows}

    runs = [run("a", (0.5, 0.9, 1.0)), run("b", (0.5, 0.95, 3.0)), run("c", (0.4, 1.0, 0.1)), run("d", failed="nan")]
    assert task_record.best_of(runs)["name"] == "b"
    assert task_record.best_of([run("a", (0.0, 0.1, 2.0)), run("b", (0.0, 0.1, 1.0))])["name"] == "b"
    assert task_record.best_of([run("d", failed="nan")]) is None
    # A run without a number is no best one, also where no other is sound.
    silent = {**run("e"), "validation": [{"length": 8, "missing": "the loss is not finite"}]}
    assert task_record.best_of([silent, run("d", failed="nan")]) is None
    assert task_record.best_of([silent, run("a", (0.0, 0.0, 9.0))])["name"] == "a"


def test_low_precision_and_the_command_line(tmp_path, capsys):
    words = [
        "train-task",
        "--output",
        str(tmp_path / "out"),
        "--precision",
        "bfloat16",
        "--map",
        "ssmax",
        "--steps",
        "4",
        "--warmup_steps",
        "2",
    ]
    recipe = {key: value for key, value in TINY.items() if key != "device"}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    words += ["--config", str(tmp_path / "recipe.yaml"), "--device", "cpu"]
    assert cli.main(words) == 0
    assert "validation 6" in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "rate-0.01-seed-0" / "model")
    assert model.dtype == torch.float32 and model.config.sparse_attention["map"] == "ssmax"
    assert cli.main(words) == 2
    assert "--resume auto" in capsys.readouterr().err
    assert cli.main([*words, "--overwrite"]) == 0


def test_what_is_overwritten_has_no_summary_until_the_new_one(tmp_path, monkeypatch):
    train_task(options(tmp_path, steps=2))

    def killed(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(task_loop, "train_run", killed)
    with pytest.raises(KeyboardInterrupt):
        train_task(options(tmp_path, steps=4, overwrite=True))
    assert not list(tmp_path.glob("summary.*"))


def test_a_test_in_another_precision_is_another_test(tmp_path):
    changes = {"steps": 4, "precision": "bfloat16", "test_lengths": [6], "test_samples": 20, "resume": "auto"}
    found, output = [], tmp_path / "runs"
    for precision in (None, "float32", "float32", None):
        summary = train_task(options(output, **changes, test_precision=precision))
        found.append(summary["tests"][summary["best"]][0])
    assert [line["precision"] for line in found] == ["bfloat16", "float32", "float32", "bfloat16"]
    assert found[0]["loss"] != found[1]["loss"] and found[0]["loss"] == found[3]["loss"]
    assert found[1]["span"] == found[2]["span"]
    train_task(options(output, **changes, test_precision="float32"))
    table_of_runs(TableArguments([str(output)], output_dir=str(tmp_path / "table"), figure=False))
    assert "unless it is 0.0, computed in float32; validation" in (tmp_path / "table" / "table.md").read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"test_precision": "half"}, "test_precision is 'half'; choose one of float32, bfloat16"),
        ({"task": "count"}, "task is 'count'"),
        ({"task_settings": ["symbols"]}, "write name=number"),
        ({"task_settings": ["symbols=many"]}, "write name=number"),
        ({"task_settings": ["symbols=6.0"]}, "symbols of copy is 6.0; it must be a whole number"),
        ({"task_settings": ["symbols=6", "symbols=9"]}, "names symbols twice"),
        ({"task": "mqmtar", "task_settings": ["share=0.0004"]}, "share is 0.0004"),
        ({"task": "mqmtar", "task_settings": ["share=0.8004"]}, "share is 0.8004"),
        ({"schedule": "constant", "final_share": 0.1}, "ends at the peak"),
        ({"learning_rates": [math.nan]}, "learning_rates is"),
        ({"task_settings": ["queries=3"]}, "copy has no queries"),
        ({"lengths": [4]}, "the shortest and the longest"),
        ({"lengths": [9, 4]}, "lengths are 9 to 4"),
        ({"test_lengths": [0]}, "lengths are 0 to 0"),
        ({"map": "linear"}, "map is 'linear'"),
        ({"map": "softmax", "alpha": 1.5}, "softmax has none"),
        ({"map": "asentmax", "alpha": 9.0}, "sparse_attention.alpha is 9"),
        ({"position": "alibi"}, "position is 'alibi'"),
        ({"scale_start": "zero"}, "scale_start is 'zero'"),
        ({"map": "entmax", "scale_start": "normal"}, "only asentmax has; map is 'entmax': leave it out"),
        ({"test_precision": "float32"}, "test_precision is 'float32', but no test is asked for"),
        ({"heads": 5}, "which 5 heads do not divide"),
        ({"heads": 32, "position": "rope"}, "rotary"),
        ({"heads": 1}, "at least 2 heads"),
        ({"steps": 0}, "steps is 0"),
        ({"warmup_steps": 200, "steps": 200}, "warmup_steps is 200 and steps is 200.*--warmup_steps 10, or more"),
        ({"warmup_steps": 500, "steps": 10}, "such as --warmup_steps 0"),
        ({"beta2": 1.0}, "beta2 is 1.0"),
        ({"final_share": 1.1}, "final_share is 1.1"),
        ({"clip": math.inf}, "clip is inf"),
        ({"seeds": [2**64]}, "all from 0 to 18446744073709551615"),
        ({"map": "adaptive_entmax", "alpha": 1.0}, "adaptive_entmax learns no other"),
        ({"learning_rates": []}, "learning_rates is"),
        ({"learning_rates": [0.0]}, "all above 0"),
        ({"seeds": []}, "seeds is"),
        ({"together": 0}, "together is 0"),
        ({"tested": "none"}, "tested is 'none'"),
        ({"precision": "float16"}, "precision is 'float16'"),
        ({"device": "abacus"}, "device is 'abacus'"),
        ({"cuda_graph": True}, "cuda_graph needs a CUDA device"),
        ({"overwrite": True, "resume": "auto"}, "choose one"),
    ],
)
def test_wrong_arguments_are_named_before_anything_is_written(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        train_task(options(tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


def test_what_else_is_in_output_is_respected(tmp_path):
    (tmp_path / "out" / "rate-0.01-seed-0").mkdir(parents=True)
    (tmp_path / "out" / "rate-0.01-seed-0" / "precious.txt").write_text("mine")
    for changes in ({}, {"resume": "auto"}, {"overwrite": True}):
        with pytest.raises(FileExistsError, match="holds no run"):
            train_task(options(tmp_path / "out", steps=2, **changes))
    assert (tmp_path / "out" / "rate-0.01-seed-0" / "precious.txt").read_text() == "mine"
    with pytest.raises(FileExistsError, match="is a file"):
        train_task(options(tmp_path / "out" / "rate-0.01-seed-0" / "precious.txt"))


def test_runs_of_an_output_differ_in_rate_and_seed_alone(tmp_path):
    """A summary of runs that were trained otherwise would say one thing of all."""
    train_task(options(tmp_path / "out", steps=2, learning_rates=[1e-2]))
    before = sorted(tmp_path.rglob("*"))
    for changes in ({}, {"resume": "auto"}, {"overwrite": True}):
        with pytest.raises(ValueError, match=r"rate-0.01-seed-0 was trained otherwise \(steps 2 then, 3 now\)"):
            train_task(options(tmp_path / "out", steps=3, learning_rates=[1e-3], **changes))
    assert sorted(tmp_path.rglob("*")) == before
    train_task(options(tmp_path / "out", steps=2, learning_rates=[1e-3]))


def test_a_run_on_samples_of_an_earlier_version_is_another(tmp_path, monkeypatch):
    train_task(options(tmp_path / "out", steps=2))
    monkeypatch.setattr(SYNTHETIC["copy"], "version", 2)
    with pytest.raises(ValueError, match="was trained otherwise \\(task_version None then, 2 now"):
        train_task(options(tmp_path / "out", steps=2, resume="auto"))


@pytest.mark.parametrize("other", [{"learning_rates": [0.5]}, {"seeds": [1]}])
def test_the_folder_of_another_run_is_not_taken_for_this_one(tmp_path, other):
    """Copied or renamed, it would stand in the table with a rate and a seed it never had."""
    train_task(options(tmp_path / "out", steps=2))
    arguments = options(tmp_path / "out", steps=2, resume="auto", **other)
    name = f"rate-{arguments.learning_rates[0]!r}-seed-{arguments.seeds[0]}"
    (tmp_path / "out" / "rate-0.01-seed-0").rename(tmp_path / "out" / name)
    with pytest.raises(ValueError, match="was trained otherwise \\((learning_rate 0.01 then, 0.5|seed 0 then, 1) now"):
        train_task(arguments)


def test_every_option_is_an_option_of_the_run():
    """Each is either part of what a run is, or named among those that are not."""
    known = set(asdict(options("unused")))
    assert known > task_record.FREE
    assert set(task_record.identity_of(options("unused"))) == known - task_record.FREE


@pytest.mark.slow
# Raised inside PyTorch by its compiler, which loads its own parts and looks at what it traces.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_a_compiled_step_gives_the_same_losses(tmp_path):
    found = [
        train_task(options(tmp_path / str(compiled), steps=20, compile=compiled))["runs"][0]["validation"][0]["loss"]
        for compiled in (False, True)
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-3)


@pytest.mark.gpu
def test_captured_steps_side_by_side_give_the_same_losses(tmp_path):
    """Each on a stream of its own, with memory of its own."""
    found = []
    for together in (1, 3):
        changes = {"device": "cuda", "cuda_graph": True, "steps": 60, "seeds": [0, 1, 2], "together": together}
        output = tmp_path / str(together)
        names = [run["name"] for run in train_task(options(output, **changes))["runs"]]
        found.append([line["loss"] for name in names for line in lines(output / name) if line["kind"] == "train"])
    assert len(found[0]) == 18 and found[0] == pytest.approx(found[1], rel=0.05)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["softmax", "asentmax"])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_captured_step_gives_the_same_losses(tmp_path, name, compiled):
    found = []
    for graph in (False, True):
        changes = {"device": "cuda", "cuda_graph": graph, "compile": compiled and graph, "map": name, "steps": 60}
        output = tmp_path / str(graph)
        train_task(options(output, **changes))
        found.append([line["loss"] for line in lines(output / "rate-0.01-seed-0") if line["kind"] == "train"])
    assert all(math.isfinite(loss) for loss in found[1])
    assert found[0] == pytest.approx(found[1], rel=0.05)


@pytest.mark.gpu
def test_a_batch_that_does_not_fit_a_captured_step_is_a_step_too():
    losses = []
    for device in ("cpu", "cuda"):
        captured = device == "cuda"
        arguments = options("unused", map="asentmax", cuda_graph=captured, compile=captured)
        task, layout = arguments.chosen_task(), Layout(8, 26, packed=True)
        step = TaskStep(new_model(arguments, task, 0).to(device), arguments, layout, torch.device(device))
        losses.append([])
        for batches in Stream(task, 0, 16, (4, 6), layout, 0, 30):
            step.hand_over(batches, [1e-2] * len(batches))
            while step.left:
                step()
                losses[-1].append(step.read_loss()[0])
    assert losses[0] == pytest.approx(losses[1], rel=0.02) and losses[0][-1] < losses[0][0]


FOLDER = Path(__file__).parent.parent / "examples" / "reproduction"
RECIPES = sorted(set(FOLDER.glob("*.yaml")) - {FOLDER / "published.yaml"})


def test_there_is_a_recipe_for_every_task():
    assert {path.stem for path in RECIPES} == set(SYNTHETIC)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_recipes_are_valid_and_of_their_task(path):
    arguments = parse_arguments(TrainTaskArguments, ["--config", str(path), "--output", "runs"], program="")
    check_task_arguments(arguments)
    task = arguments.chosen_task()
    assert task.name == path.stem and arguments.training_lengths() == task.default_lengths
    model = new_model(arguments, task, 0)
    assert model.config.num_hidden_layers == arguments.layers and model.config.sparse_attention["map"] == "asentmax"


@pytest.mark.parametrize("position", ["nape", "nope"])
def test_softmax_in_parts_of_the_queries_is_the_same(monkeypatch, position):
    """Long contexts of the control: its mask is made for a few queries at a time."""
    arguments = options("unused", map="softmax", position=position)
    model = new_model(arguments, arguments.chosen_task(), 0).double().eval()
    tokens = torch.randint(4, 10, (3, 37), generator=torch.Generator().manual_seed(0))
    padding = torch.ones_like(tokens)
    padding[1, :5], padding[2, :11] = 0, 0
    # A matrix of the caller's own, in which keys after the query are seen too.
    matrix = torch.rand(3, 1, 37, 37, generator=torch.Generator().manual_seed(1)) > 0.3
    masks = [{}, {"attention_mask": padding}, {"attention_mask": matrix}]
    inputs = [{"input_ids": tokens, "use_cache": False, **mask} for mask in masks]
    with torch.no_grad():
        whole = [model(**values).logits for values in inputs]
        sizes, plain = [], F.scaled_dot_product_attention

        def counted(query, key, value, **keywords):
            mask = keywords.get("attn_mask")
            sizes.append(0 if mask is None else mask.numel())
            return plain(query, key, value, **keywords)

        monkeypatch.setattr(softmax, "_MASK_ENTRIES", 1000)
        monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
        parts = [model(**values).logits for values in inputs]
    assert 0 < max(sizes) <= 1000
    for one, other, values in zip(whole, parts, inputs, strict=True):
        kept = padding.bool() if values.get("attention_mask") is padding else torch.ones_like(padding).bool()
        torch.testing.assert_close(one[kept], other[kept], atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (8, 2), (2, 1), (3, 3)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_softmax_of_the_near_keys_alone_is_the_same(monkeypatch, heads, key_heads, dtype):
    """Heads with slopes leave out keys whose weight is 0, and none whose weight is not; gradients too."""
    generator = torch.Generator().manual_seed(0)
    slopes = alibi_slopes(heads).to(dtype) * 8
    for queries, keys, size in ((300, 300, 1.0), (257, 311, 0.1), (300, 300, 30.0)):
        query = torch.randn(2, heads, queries, 8, generator=generator, dtype=dtype) * size
        key, value = torch.randn(2, 2, key_heads, keys, 8, generator=generator, dtype=dtype)
        # A single key that is large enough to be seen from afar.
        key[0, -1, 40] *= 20
        found, read = [], []
        plain = F.scaled_dot_product_attention

        def counted(query, key, value, plain=plain, read=read, **keywords):
            read.append(query.shape[1] * query.shape[2] * key.shape[2])
            return plain(query, key, value, **keywords)

        monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
        for near_from in (10**9, 100):
            monkeypatch.setattr(softmax, "_NEAR_FROM", near_from)
            inputs = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
            arguments = {"scaling": 0.3, "causal": True, "visible": None, "slopes": slopes, "mask": None}
            output = softmax.softmax_attention(*inputs, **arguments)
            output.square().sum().backward()
            found.append([output, *(tensor.grad for tensor in inputs)])
            read.append(None)
        monkeypatch.undo()
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, atol=1e-12 if dtype == torch.float64 else 1e-4, rtol=1e-4)
        whole, near = sum(read[: read.index(None)]), sum(read[read.index(None) + 1 : -1])
        if dtype == torch.float32 and size < 1:
            assert near < whole


@pytest.mark.parametrize(("queries", "keys"), [(60, 60), (9, 200), (300, 300), (290, 301), (301, 290), (300, 20)])
@pytest.mark.parametrize("near_from", [10**9, 10])
def test_softmax_with_slopes_is_softmax(monkeypatch, queries, keys, near_from):
    """Written out in float64: norms of all sizes, steep and flat slopes, queries before the first key."""
    monkeypatch.setattr(softmax, "_NEAR_FROM", near_from)
    generator = torch.Generator().manual_seed(queries)
    slopes_H = torch.tensor([0.0, 1.0, 1 / 3, 1e-5])
    distance = torch.arange(queries)[:, None] + keys - queries - torch.arange(keys)
    for size in (0.0, 0.1, 1.0, 10.0):
        query, key, value = (
            torch.randn(2, heads, length, 8, generator=generator, dtype=torch.float64) * scale
            for heads, length, scale in ((4, queries, size), (2, keys, size), (2, keys, 1.0))
        )
        scores = query @ key.repeat_interleave(2, 1).mT * 0.3 - slopes_H.double()[:, None, None] * distance
        weights = scores.masked_fill(distance < 0, -math.inf).softmax(-1).nan_to_num(0.0)
        found = softmax.softmax_attention(
            query, key, value, scaling=0.3, causal=True, visible=None, slopes=slopes_H, mask=None
        )
        torch.testing.assert_close(found, weights @ value.repeat_interleave(2, 1), atol=1e-11, rtol=0)


def test_a_run_does_not_go_on_from_the_checkpoint_of_another(tmp_path):
    changes = {"steps": 4, "checkpoint_every": 2, "learning_rates": [1e-2, 1e-3]}
    train_task(options(tmp_path / "out", **changes))
    one, other = (tmp_path / "out" / f"rate-{rate}-seed-0" for rate in (0.01, 0.001))
    record = json.loads((one / "run.json").read_text())
    (one / "run.json").write_text(json.dumps({**record, "finished": False}))
    own = (one / "checkpoint.pt").read_bytes()
    (one / "checkpoint.pt").write_bytes((other / "checkpoint.pt").read_bytes())
    with pytest.raises(OSError, match="it is of another run"):
        train_task(options(tmp_path / "out", **changes, resume="auto"))
    (one / "checkpoint.pt").write_bytes(own)
    again = train_task(options(tmp_path / "out", **changes, resume="auto"))["runs"]
    assert record["validation"] in [run["validation"] for run in again]


def test_damaged_files_of_a_run_are_named(tmp_path):
    changes = {"steps": 4, "checkpoint_every": 2}
    train_task(options(tmp_path / "out", **changes))
    folder = tmp_path / "out" / "rate-0.01-seed-0"
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**record, "finished": False}))
    content = (folder / "checkpoint.pt").read_bytes()
    (folder / "checkpoint.pt").write_bytes(content[: len(content) // 2])
    with pytest.raises(OSError, match="checkpoint.pt is damaged"):
        train_task(options(tmp_path / "out", **changes, resume="auto"))
    for text in ("{", "{}", "[]"):
        (folder / "run.json").write_text(text)
        with pytest.raises(OSError, match="run.json is damaged"):
            train_task(options(tmp_path / "out", **changes, resume="auto"))
    assert train_task(options(tmp_path / "out", **changes, overwrite=True))["runs"][0]["steps"] == 4

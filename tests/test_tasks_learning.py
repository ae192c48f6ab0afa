"""How small models learn synthetic tasks: by Muon, as softmax first, a map's own parameters at their own rate."""

import json

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from hf_sparse_attention.models import attention_layers, new_parameter_names
from hf_sparse_attention.tasks.streams import Stream
from hf_sparse_attention.train import TrainTaskArguments, train_task
from hf_sparse_attention.train.muon import Muon, layer_matrices, orthogonal
from hf_sparse_attention.train.task_arguments import (
    FACTOR_WHILE_SOFTMAX,
    LEARNED,
    MAPS,
    RISING,
    check_task_arguments,
)
from hf_sparse_attention.train.task_model import new_model
from hf_sparse_attention.train.task_record import identity_of, whole_run
from hf_sparse_attention.train.task_run import _layout
from hf_sparse_attention.train.task_step import TaskStep

TINY = {
    "task": "copy", "task_settings": ["symbols=6"], "lengths": [4, 6], "layers": 2, "hidden_size": 32, "heads": 4,
    "ffn_size": 64, "batch_size": 32, "learning_rates": [1e-2], "steps": 20, "warmup_steps": 10, "device": "cpu",
    "log_every": 5, "validation_lengths": [6], "validation_samples": 20, "checkpoint_every": 0,
}  # fmt: skip


def options(output="unused", **changes) -> TrainTaskArguments:
    return TrainTaskArguments(**{**TINY, "output": str(output), **changes})


def trained(arguments: TrainTaskArguments, steps: int):
    """The model of seed 0 after some steps at one rate, and the step that trained it."""
    task = arguments.chosen_task()
    model, layout = new_model(arguments, task, 0), _layout(arguments, task)
    step = TaskStep(model, arguments, layout, torch.device("cpu"))
    for batches in Stream(task, 0, arguments.batch_size, (4, 6), layout, 0, steps):
        step.hand_over(batches, [1e-2] * len(batches))
        for _ in range(len(batches)):
            step()
    return model, step


def test_an_update_has_the_singular_vectors_of_its_momentum_and_values_of_about_one():
    matrices = torch.randn(3, 6, 20, generator=torch.Generator().manual_seed(0))
    left, values, right = torch.linalg.svd(matrices, full_matrices=False)
    found = left.mT @ orthogonal(matrices).float() @ right.mT
    values = found.diagonal(dim1=1, dim2=2)
    assert values.min() > 0.6 and values.max() < 1.25
    torch.testing.assert_close(found, torch.diag_embed(values), atol=0.02, rtol=0)


@pytest.mark.parametrize("tensor", [False, True])
def test_muon_is_that_of_torch(tensor):
    """Tall, wide and square matrices, one that has no gradient in a step, and a rate that changes."""
    random = torch.Generator().manual_seed(0)
    shapes = [(8, 16), (16, 8), (8, 16), (6, 6), (1, 5)]
    ours = [nn.Parameter(torch.randn(shape, generator=random)) for shape in shapes]
    theirs = [nn.Parameter(item.detach().clone()) for item in ours]
    rate = torch.tensor(0.0) if tensor else 0.0
    optimizers = [
        Muon(ours, lr=rate, weight_decay=0.1),
        torch.optim.Muon(theirs, lr=0.0, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
    ]
    for step in range(4):
        for number, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            gradient = None if (step, number) == (1, 2) else torch.randn(one.shape, generator=random)
            one.grad, other.grad = gradient, gradient
        if tensor:
            rate.fill_(0.01 * (step + 1))
        for optimizer in optimizers[tensor:]:
            optimizer.param_groups[0]["lr"] = 0.01 * (step + 1)
        for optimizer in optimizers:
            optimizer.step()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)


def test_muon_refuses_what_is_no_matrix():
    with pytest.raises(ValueError, match=r"the shape \(3,\)"):
        Muon([nn.Parameter(torch.zeros(3))], lr=1e-3)


@pytest.mark.parametrize("name", MAPS)
def test_muon_takes_the_matrices_of_the_layers_and_adamw_all_else(name):
    arguments = options(map=name, optimizer="muon")
    before = new_model(arguments, arguments.chosen_task(), 0)
    model, step = trained(arguments, 3)
    new = set(new_parameter_names(model))
    taken = {id(item) for group in step.muon.param_groups for item in group["params"]}
    others = {id(item) for group in step.optimizer.param_groups for item in group["params"]}
    assert not taken & others and taken | others == {id(item) for item in model.parameters()}
    for (key, item), start in zip(model.named_parameters(), before.parameters(), strict=True):
        inside = key.endswith("_proj.weight")
        assert (id(item) in taken) == inside and not (inside and key in new)
        assert not torch.equal(item, start), f"{key} was not trained"
    assert len(layer_matrices(model, new)) == 2 * 7


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("name", LEARNED)
def test_a_maps_own_parameters_learn_at_their_share_of_the_rate(name, optimizer):
    """AdamW's first step is the rate wherever there is a gradient."""
    for share in (0.0, 0.25, 1.0, 3.0):
        arguments = options(map=name, optimizer=optimizer, new_learning_rate_share=share)
        before = dict(new_model(arguments, arguments.chosen_task(), 0).named_parameters())
        model, step = trained(arguments, 1)
        new = new_parameter_names(model)
        moved = {key: (item - before[key]).abs().max().item() for key, item in model.named_parameters()}
        assert new and max(moved[key] for key in new) == pytest.approx(1e-2 * share, rel=1e-2)
        assert moved["model.embed_tokens.weight"] == pytest.approx(1e-2, rel=1e-2)
        # A step that goes on has the same rates.
        step.load(step.state())
        step.new_rate.fill_(7.0)
        assert {id(item) for group in step.optimizer.param_groups if group["lr"] == 7 for item in group["params"]} == {
            id(item) for key, item in model.named_parameters() if key in new
        }


@pytest.mark.parametrize("name", ["asentmax", "adaptive_entmax"])
def test_an_interrupted_run_with_muon_that_was_softmax_first_goes_on_exactly(tmp_path, monkeypatch, name):
    """Interrupted before alpha rises, and after."""
    changes = {
        "map": name, "optimizer": "muon", "softmax_share": 0.5, "checkpoint_every": 5, "validate_every": 10,
        "new_learning_rate_share": 0.5,
    }  # fmt: skip
    whole = train_task(options(tmp_path / "whole", **changes))["runs"][0]["name"]
    call = TaskStep.__call__
    for stop in (8, 9):
        left = [stop]

        def interrupted(self, left=left):
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            call(self)

        monkeypatch.setattr(TaskStep, "__call__", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train_task(options(tmp_path / "cut", **changes, resume="auto"))
    monkeypatch.setattr(TaskStep, "__call__", call)
    train_task(options(tmp_path / "cut", **changes, resume="auto"))
    found = []
    for kind in ("whole", "cut"):
        folder = tmp_path / kind / whole
        state = torch.load(folder / "checkpoint.pt", weights_only=True)["step"]
        text = (folder / "metrics.jsonl").read_text()
        rows = [json.loads(line) for line in text.splitlines()]
        found.append((state, [{key: value for key, value in row.items() if key != "timing"} for row in rows]))
    (one, lines), (other, again) = found
    assert lines == again
    assert all(torch.equal(value, other["model"][key]) for key, value in one["model"].items())
    buffers = [[item["momentum_buffer"] for item in state["muon"]["state"].values()] for state in (one, other)]
    assert len(buffers[0]) == 14 and all(map(torch.equal, *buffers))


def test_alpha_is_one_first_and_the_maps_own_then(tmp_path, monkeypatch):
    seen, call = [], TaskStep.__call__

    def noted(self):
        ((_, layer), *_) = attention_layers(self.model)
        seen.append(layer.alpha)
        call(self)

    monkeypatch.setattr(TaskStep, "__call__", noted)
    summary = train_task(options(tmp_path, map="entmax", alpha=1.4, steps=15, softmax_share=0.3))
    assert seen == [1.0] * 5 + [1.4] * 10
    folder = tmp_path / summary["best"]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["alpha"] for line in lines if line["kind"] == "train"] == [1.0, 1.4, 1.4]
    saved = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert saved.config.sparse_attention["alpha"] == 1.4


@pytest.mark.parametrize("how", FACTOR_WHILE_SOFTMAX)
def test_the_factor_is_held_while_alpha_is_one_unless_it_is_to_be_learned(tmp_path, monkeypatch, how):
    """And learned from then on. What is no factor is learned from the first step."""
    seen, call = [], TaskStep.__call__

    def noted(self):
        before = {name: item.detach().clone() for name, item in self.model.named_parameters()}
        call(self)
        new = set(new_parameter_names(self.model))
        moved = {name for name, item in self.model.named_parameters() if not torch.equal(item, before[name])}
        assert moved - new == set(before) - new
        seen.append(moved & new == new)
        assert seen[-1] or not moved & new

    monkeypatch.setattr(TaskStep, "__call__", noted)
    changes = {"map": "asentmax", "warmup_steps": 0, "steps": 15, "softmax_share": 0.3}
    train_task(options(tmp_path, **changes, factor_while_softmax=how))
    assert seen == [how == "learned"] * 5 + [True] * 10


@pytest.mark.parametrize(
    ("share", "steps", "expected"),
    [(0.07, 100, 7), (0.2, 90_000, 18_000), (0.14, 90_000, 12_600), (1e-9, 20, 1), (0, 9, 0)],
)
def test_a_share_is_that_many_steps(share, steps, expected):
    assert options(softmax_share=share, steps=steps).softmax_steps() == expected


def test_alpha_of_a_map_that_learns_it_is_no_number_of_the_run(tmp_path):
    train_task(options(tmp_path, map="adaptive_entmax", softmax_share=0.5))
    lines = map(json.loads, (tmp_path / "rate-0.01-seed-0" / "metrics.jsonl").read_text().splitlines())
    assert [line.get("alpha") for line in lines if line["kind"] == "train"] == [1.0, 1.0, None, None]


def test_tests_at_other_lengths_stay(tmp_path):
    train_task(options(tmp_path, test_lengths=[6, 12], test_samples=50))
    summary = train_task(options(tmp_path, test_lengths=[12, 24], test_samples=30, resume="auto"))
    assert [line["length"] for line in summary["tests"][summary["best"]]] == [12, 24]
    kept = json.loads((tmp_path / summary["best"] / "test.json").read_text())
    assert sorted((line["length"], line["samples"]) for line in kept) == [(6, 50), (12, 30), (24, 30)]


def test_steps_as_softmax_are_those_of_alpha_one(tmp_path):
    """And those after them are not."""
    losses = []
    for number, changes in enumerate(({"softmax_share": 0.5, "factor_while_softmax": "learned"}, {"alpha": 1.0})):
        output = tmp_path / str(number)
        train_task(options(output, map="asentmax", log_every=1, optimizer="muon", **changes))
        lines = map(json.loads, (output / "rate-0.01-seed-0" / "metrics.jsonl").read_text().splitlines())
        losses.append([line["loss"] for line in lines if line["kind"] == "train"])
    # Samples stand side by side in the one and alone in the other: sums in another order.
    assert losses[0][:10] == pytest.approx(losses[1][:10], rel=1e-3)
    assert losses[0][10] != pytest.approx(losses[1][10], rel=1e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": "sgd"}, "optimizer is 'sgd'; choose one of adamw, muon"),
        ({"softmax_share": 1.0}, "softmax_share is 1.0; it must be from 0 to below 1"),
        ({"softmax_share": -0.1}, "softmax_share is -0.1"),
        ({"softmax_share": float("nan")}, "softmax_share is nan"),
        ({"softmax_share": 0.99}, "some of the 20 steps are the map's own"),
        *(
            ({"softmax_share": 0.5, "map": name}, f"map is {name!r}, alpha None: leave it out")
            for name in MAPS if name not in RISING
        ),
        *(
            ({"new_learning_rate_share": share}, f"new_learning_rate_share is {share}")
            for share in (-0.1, float("nan"), float("inf"))
        ),
        *(
            ({"new_learning_rate_share": 0.1, "map": name}, f"map is {name!r}: leave it out")
            for name in MAPS if name not in LEARNED
        ),
        ({"softmax_share": 0.5, "map": "entmax", "alpha": 1.0}, "map is 'entmax', alpha 1.0: leave it out"),
        ({"factor_while_softmax": "frozen"}, "factor_while_softmax is 'frozen'; choose one of held, learned"),
        *(
            ({"factor_while_softmax": "learned", **changes}, "factor_while_softmax is 'learned', which asentmax has")
            for changes in (
                {}, {"softmax_share": 0.5, "map": "entmax"}, {"softmax_share": 0.5, "new_learning_rate_share": 0.0},
            )
        ),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        check_task_arguments(options(**changes))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"softmax_share": 0.5}, "learned"),
        ({"softmax_share": 0.5, "new_learning_rate_share": 0.0}, "held"),
        ({"softmax_share": 0.0}, "held"),
        ({"softmax_share": 0.5, "map": "adaptive_entmax"}, "held"),
    ],
)
def test_the_factor_of_runs_of_before_was_learned_wherever_it_could(changes, expected):
    identity = identity_of(options(**{"map": "asentmax", **changes}))
    del identity["factor_while_softmax"]
    assert whole_run({"identity": identity})["identity"]["factor_while_softmax"] == expected
    now = identity_of(options(**{"map": "asentmax", **changes}))
    assert whole_run({"identity": now})["identity"] == now


def test_runs_of_before_there_was_a_choice_go_on_and_stand_in_one_table(tmp_path):
    """Their records have none of the options: they were AdamW's at one rate, and never softmax first."""
    train_task(options(tmp_path, checkpoint_every=10))
    folder = tmp_path / "rate-0.01-seed-0"
    record = json.loads((folder / "run.json").read_text())
    for key in ("optimizer", "softmax_share", "new_learning_rate_share", "factor_while_softmax"):
        del record["identity"][key]
    (folder / "run.json").write_text(json.dumps({**record, "finished": False}))
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    for key in ("optimizer", "softmax_share", "new_learning_rate_share", "factor_while_softmax"):
        del state["run"]["identity"][key]
    torch.save(state, folder / "checkpoint.pt")
    (run,) = train_task(options(tmp_path, checkpoint_every=10, resume="auto"))["runs"]
    assert run["steps"] == 20 and run["validation"]
    with pytest.raises(ValueError, match="new_learning_rate_share 1.0 then, 0.5 now"):
        train_task(options(tmp_path, checkpoint_every=10, resume="auto", new_learning_rate_share=0.5))
    with pytest.raises(ValueError, match="optimizer 'adamw' then, 'muon' now"):
        train_task(options(tmp_path, checkpoint_every=10, resume="auto", optimizer="muon"))


@pytest.mark.gpu
# Raised inside PyTorch by its compiler, which loads its own parts and looks at what it traces.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
# Its advice to a step in float32, which is what is compared here.
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")
def test_a_captured_step_of_muon_gives_the_same_losses(tmp_path):
    """Captured once for softmax and once for the map."""
    found = []
    for graph in (False, True):
        changes = {"device": "cuda", "cuda_graph": graph, "compile": graph, "map": "asentmax", "optimizer": "muon"}
        output = tmp_path / str(graph)
        train_task(options(output, **changes, steps=60, softmax_share=0.4))
        lines = map(json.loads, (output / "rate-0.01-seed-0" / "metrics.jsonl").read_text().splitlines())
        found.append([line["loss"] for line in lines if line["kind"] == "train"])
    assert len(found[0]) == 12 and found[0] == pytest.approx(found[1], rel=0.05)
    assert found[1][-1] < found[1][0]

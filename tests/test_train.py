"""Training: packing, schedules, that a run computes what a plain loop would and goes on exactly after a stop."""

import errno
import json
import math
import random
import shutil
import signal
import time
from functools import partial

import numpy as np
import pytest
import torch
from training_cases import (
    assert_close_metrics,
    assert_same_weights,
    dense_folder,
    metrics,
    options,
    python,
    run,
    weights,
    write_text,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_sparse_attention as hsa
from hf_sparse_attention.convert import ConvertArguments, convert_model
from hf_sparse_attention.maps import ASEntmaxScale
from hf_sparse_attention.models import new_parameter_names
from hf_sparse_attention.text import encode_documents, read_documents
from hf_sparse_attention.train import TableArguments, TrainArguments, table_of_runs, train_model
from hf_sparse_attention.train.data import check_texts
from hf_sparse_attention.train.packing import Blocks, ShuffledBlocks, StreamedBlocks, batch_of, pack
from hf_sparse_attention.train.recipe import alpha_at, parameter_groups, rate_at
from hf_sparse_attention.train.state import whole_states

pytest.importorskip("accelerate")


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """dense/, train.txt and eval.txt, which no test changes."""
    folder = tmp_path_factory.mktemp("home")
    dense_folder(folder / "dense")
    write_text(folder / "train.txt")
    write_text(folder / "eval.txt", 20, seed=1)
    return folder


@pytest.fixture
def here(home, tmp_path):
    """Runs of a test go to tmp_path/run."""
    return lambda **changes: run(home, **{"output": str(tmp_path / "run"), **changes})


def lists(count=40, seed=0, longest=50):
    draw = np.random.default_rng(seed)
    return [draw.integers(3, 500, size=draw.integers(1, longest)).tolist() for _ in range(count)]


def blocks_of(documents, block_size=16):
    return Blocks(*pack(iter(documents), 512), block_size)


# Packing


def test_documents_are_kept_apart():
    documents = [[10, 11, 12], [20, 21, 22, 23, 24, 25], [30], [40, 41]]
    batch = batch_of(*blocks_of(documents, 4).rows(np.arange(3)))
    assert batch["input_ids"].tolist() == [[10, 11, 12, 20], [21, 22, 23, 24], [25, 30, 40, 41]]
    # A document that goes on in the next block starts there again at 0.
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0], [0, 1, 2, 3], [0, 0, 0, 1]]
    assert batch["labels"].tolist() == [[-100, 11, 12, -100], [-100, 22, 23, 24], [-100, -100, -100, 41]]


def test_counted_labels_and_documents():
    blocks = blocks_of(lists())
    starts = [*blocks.starts, len(blocks.tokens)]
    for number in range(len(blocks)):
        tokens, positions = blocks.rows(np.array([number]))
        assert blocks.labels[number] == (batch_of(tokens, positions)["labels"] != -100).sum()
        for document in blocks.documents(number):
            assert starts[document] < (number + 1) * 16 and starts[document + 1] > number * 16
    assert sum(len(blocks.documents(number)) for number in range(len(blocks))) >= 40 - 1


@pytest.mark.parametrize("map_name", [None, "asentmax", "entmax", "ssmax", "adaptive_entmax"])
def test_packed_loss_is_that_of_separate_documents(home, map_name):
    chosen = {} if map_name is None else {"attn_implementation": map_name}
    model = AutoModelForCausalLM.from_pretrained(home / "dense", **chosen).eval()
    documents = [tokens for tokens in lists(seed=3, longest=30) if len(tokens) > 1]
    blocks = blocks_of(documents, 60)
    batch = {name: torch.from_numpy(value) for name, value in batch_of(*blocks.rows(np.arange(len(blocks)))).items()}
    total = count = 0
    with torch.no_grad():
        packed = model(**batch, use_cache=False).loss.item()
        for tokens, positions in zip(*blocks.rows(np.arange(len(blocks))), strict=True):
            for piece in np.split(tokens, np.flatnonzero(positions == 0)[1:]):
                if len(piece) > 1:
                    ids = torch.from_numpy(piece)[None]
                    total += model(input_ids=ids, labels=ids).loss.item() * (len(piece) - 1)
                    count += len(piece) - 1
    assert count == blocks.labels.sum()
    assert packed == pytest.approx(total / count, abs=1e-5)


def test_every_epoch_has_every_block_once_in_another_order():
    blocks = blocks_of(lists())
    walk = ShuffledBlocks(blocks, seed=5)
    orders = [walk.take(len(blocks), slice)[2] for _ in range(2)]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(len(blocks)))
    assert orders[0] != orders[1]
    again = ShuffledBlocks(blocks, seed=5)
    again.load_state_dict({"consumed": len(blocks)})
    assert again.take(len(blocks), slice)[2] == orders[1]


def test_skipping_is_taking_without_looking():
    for make in (lambda: ShuffledBlocks(blocks_of(lists()), seed=5), lambda: streamed(lists(), seed=5)):
        one, other = make(), make()
        one.take(70, slice)
        other.skip(70)
        (first, count, numbers), (second, other_count, other_numbers) = one.take(9, slice), other.take(9, slice)
        assert all((first[name] == second[name]).all() for name in first)
        assert (count, numbers) == (other_count, other_numbers)


def streamed(documents, seed, buffer=4):
    texts = [" ".join(map(str, tokens)) for tokens in documents]
    return StreamedBlocks(
        lambda: iter(texts), lambda some: ([int(word) for word in text.split()] for text in some), 16, seed, buffer
    )


def test_streaming_packs_the_same_blocks():
    documents = lists()
    blocks = blocks_of(documents)
    walk = streamed(documents, seed=None)
    for _ in range(2):
        batch, labels, _ = walk.take(len(blocks), slice)
        wanted = batch_of(*blocks.rows(np.arange(len(blocks))))
        assert all((batch[name] == wanted[name]).all() for name in wanted)
        assert labels == blocks.labels.sum()
    # A document that was shuffled is still known by its number.
    named = streamed(documents, seed=1)
    batch, _, numbers = named.take(len(blocks), slice)
    order = {tuple(row): number for number, row in enumerate(wanted["input_ids"].tolist())}
    for row, number in zip(batch["input_ids"].tolist(), numbers, strict=True):
        assert named.documents(number) == blocks.documents(order[tuple(row)])
    shuffled, _, _ = streamed(documents, seed=1).take(len(blocks), slice)
    assert not (shuffled["input_ids"] == wanted["input_ids"]).all()
    assert sorted(shuffled["input_ids"].tolist()) == sorted(wanted["input_ids"].tolist())


@pytest.mark.parametrize("taken", [1, 7, 100])
def test_streaming_goes_on_from_its_state(taken):
    walk, other = streamed(lists(), seed=2), streamed(lists(), seed=2)
    walk.take(taken, slice)
    state = walk.state_dict()
    plain = json.loads(json.dumps({key: value for key, value in state.items() if not isinstance(value, np.ndarray)}))
    other.load_state_dict({**state, **plain})
    for _ in range(3):
        (one, count, numbers), (two, other_count, other_numbers) = walk.take(9, slice), other.take(9, slice)
        assert all((one[name] == two[name]).all() for name in one)
        assert (count, numbers) == (other_count, other_numbers)


# The recipe


def test_alpha_rises_from_exactly_one_to_its_target():
    linear = [alpha_at(step, target=1.5, schedule="linear", rise=100) for step in range(121)]
    assert linear[0] == 1.0 and linear[1] == 1.01 and linear[50] == 1.25 and linear[100:] == [1.5] * 21
    assert all(first <= second for first, second in zip(linear, linear[1:], strict=False))
    cosine = [alpha_at(step, target=2.0, schedule="cosine", rise=100) for step in range(101)]
    assert cosine[0] == 1.0 and min(cosine[1:]) == 1.01 and cosine[50] == pytest.approx(1.5) and cosine[100] == 2.0
    assert [alpha_at(step, target=1.5, schedule="none", rise=100) for step in (0, 5)] == [1.5, 1.5]
    assert [alpha_at(step, target=1.0, schedule="linear", rise=10) for step in (0, 5)] == [1.0, 1.0]
    assert alpha_at(0, target=1.5, schedule="linear", rise=0) == 1.5


def test_learning_rate():
    rate = partial(rate_at, steps=110, warmup=10, final=0.1)
    assert [rate(step, schedule="cosine") for step in (0, 9, 10, 60)] == pytest.approx([0.1, 1.0, 1.0, 0.55])
    assert rate(110, schedule="cosine") == rate(110, schedule="linear") == pytest.approx(0.1)
    assert rate(60, schedule="linear") == pytest.approx(0.55)
    assert rate(100, schedule="constant") == 1.0


def test_new_parameters_norms_and_biases_do_not_decay(home):
    model = AutoModelForCausalLM.from_pretrained(home / "dense", attn_implementation="asentmax")
    groups = parameter_groups(model, learning_rate=1.0, new_learning_rate=5.0, weight_decay=0.1)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {names[id(item)]: (group["lr"], group["weight_decay"]) for group in groups for item in group["params"]}
    assert found.keys() == dict(model.named_parameters()).keys()
    for name, pair in found.items():
        if name in new_parameter_names(model):
            assert pair == (5.0, 0.0)
        else:
            assert pair == (1.0, 0.0 if "norm" in name else 0.1)


# Runs


def test_run_leaves_a_whole_model(here, home, tmp_path):
    summary = here(new_learning_rate=0.05)
    folder = tmp_path / "run"
    before, after = weights(home, "dense"), weights(folder)
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    new = set(new_parameter_names(model))
    assert len(new) == 10 and set(after) == set(before) | new
    assert all(after[name].count_nonzero() == after[name].numel() for name in new)
    assert not any(torch.equal(before[name], after[name]) for name in before)
    assert model.config.sparse_attention["map"] == "asentmax" and model.config.sparse_attention["alpha"] == 1.5
    assert AutoTokenizer.from_pretrained(folder / "model").vocab_size == 512
    assert sorted(path.name for path in (folder / "model").iterdir()) == [
        "LICENSE", "config.json", "generation_config.json", "model.safetensors", "modeling_hf_sparse_attention.py",
        "summary.json", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    assert json.loads((folder / "summary.json").read_text()) == summary
    assert summary["tokens"] == 8 * 4 * 32 and summary["base_model"] == str(home / "dense")
    assert [step for step, _ in summary["eval_loss"]] == [0, 4, 8]
    assert summary["eval_loss"][-1][1] < summary["eval_loss"][0][1]
    lines = metrics(folder)
    assert [line["step"] for line in lines if line["kind"] == "train"] == [2, 4, 6, 8]
    looked = [line for line in lines if line["kind"] == "attention"]
    assert looked[0]["alpha"] == 1.0 and looked[0]["zeros"] == 0.0 and looked[0]["scale"] == 1.0
    assert looked[-1]["alpha"] == 1.5 and looked[-1]["zeros"] > 0.0 and looked[-1]["scale"] != 1.0
    assert looked[-1]["support"] < looked[-1]["visible"]


def test_step_zero_is_the_dense_model(here, home, tmp_path):
    here(steps=1)
    here(steps=1, map="none", output=str(tmp_path / "control"))
    sparse, control = (
        [line["loss"] for line in metrics(tmp_path / name) if line["kind"] in ("eval", "train")][:2]
        for name in ("run", "control")
    )
    assert sparse == pytest.approx(control, abs=1e-5)


@pytest.mark.parametrize("map_name", list(hsa.MAPS))
def test_every_map_trains(here, tmp_path, map_name, capsys):
    summary = here(map=map_name, steps=4, checkpoint_every=0)
    assert "get no gradient" not in capsys.readouterr().out
    after = weights(tmp_path / "run")
    for name in new_parameter_names(AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")):
        assert after[name].count_nonzero() == after[name].numel()
    assert summary["map"] == map_name and math.isfinite(summary["train_loss"])
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_the_factor_can_start_as_in_the_paper(here, home, tmp_path):
    """Two stages that learn nothing: the first one draws the start, the second one leaves it."""
    still = {"stages": [{"steps": 1}, {"steps": 2}], "learning_rate": 0.0, "statistics_blocks": 0}
    found = {}
    for name, changes in {"a": {}, "b": {}, "other": {"seed": 1}}.items():
        here(output=str(tmp_path / name), scale_start="normal", **still, **changes)
        found[name] = weights(tmp_path / name)
    new = [name for name in found["a"] if ".sparse_scale." in name]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a" / "model")
    scale = model.model.layers[1].self_attn.sparse_scale
    for factors in (scale.beta_bias_weight, scale.gamma_bias_weight):
        assert 0.014 < factors.std() < 0.026
    with torch.no_grad():
        factor = scale(torch.randn(4, 50, 32), torch.arange(2, 52)[None])
    assert 1.6 < factor.median() < 1.8
    assert all(torch.equal(found["a"][name], found["b"][name]) for name in new)
    differ = [name for name in new if not torch.equal(found["a"][name], found["other"][name])]
    assert {name.rpartition(".")[2] for name in differ} == {"beta_bias_weight", "gamma_bias_weight"}
    here(output=str(tmp_path / "neutral"), scale_start="neutral", **still)
    assert not any(weights(tmp_path / "neutral")[name].any() for name in new)


def test_a_run_goes_on_with_the_start_it_had(here, tmp_path):
    here(scale_start="normal", steps=4, checkpoint_every=2)
    (tmp_path / "run" / "summary.json").unlink()
    with pytest.raises(ValueError, match="scale_start 'normal' then, None now"):
        here(steps=4, checkpoint_every=2, resume="auto")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000004")
    here(output=str(tmp_path / "run"), scale_start="normal", steps=4, checkpoint_every=2, resume="auto")
    here(output=str(tmp_path / "whole"), scale_start="normal", steps=4, checkpoint_every=2)
    assert_same_weights(tmp_path / "run", tmp_path / "whole")


def test_a_sparse_model_has_its_start(here, home, tmp_path):
    convert_model(ConvertArguments(model=str(home / "dense"), output=str(tmp_path / "sparse")))
    here(model=str(tmp_path / "sparse"), steps=1, stage="pretrain")
    for start in ("neutral", "normal", "beta"):
        with pytest.raises(ValueError, match=f"scale_start is '{start}', but .* was trained with its factors"):
            here(model=str(tmp_path / "run" / "model"), output=str(tmp_path / "on"), scale_start=start)
    assert not (tmp_path / "on").exists()


def test_a_factor_of_beta_alone_is_the_dense_model_and_can_fall(here, home, tmp_path):
    """The dense loss in step 0, of the dense folder and of one that was converted; a gradient that neutral has not."""
    convert_model(ConvertArguments(model=str(home / "dense"), output=str(tmp_path / "sparse")))
    still = {"learning_rate": 0.0, "steps": 1, "statistics_blocks": 0, "stage": "pretrain", "alpha_schedule": "linear"}
    losses = []
    for number, model in enumerate((home / "dense", tmp_path / "sparse")):
        changes = {} if number else {"map": "asentmax"}
        run = here(model=str(model), output=str(tmp_path / f"run{number}"), scale_start="beta", **still, **changes)
        losses.append(run["eval_loss"][0][1])
        saved = weights(tmp_path / f"run{number}")
        for name, value in (
            ("delta_bias", -0.95),
            ("beta_bias", math.log(math.expm1(1)) - math.log(math.expm1(0.05))),
        ):
            found = saved[f"model.layers.1.self_attn.sparse_scale.{name}"]
            torch.testing.assert_close(found, torch.full_like(found, value))
    dense = here(map="none", output=str(tmp_path / "control"), **{**still, "alpha_schedule": None})["eval_loss"][0][1]
    assert losses == pytest.approx([dense, dense], rel=1e-6)
    scale = ASEntmaxScale(2, 8, 64)
    hidden, lengths = torch.randn(3, 40, 8), torch.arange(2, 42)[None]
    slopes = []
    for start in (None, scale.start_beta):
        if start is not None:
            start()
        factor = scale(hidden, lengths)
        assert (factor - 1).abs().max() < 1e-6
        factor.sum().backward()
        slopes.append(scale.beta_bias.grad.clone())
        scale.zero_grad()
    assert (slopes[1] > 10 * slopes[0]).all()
    scale.beta_bias.data -= 9
    assert (scale(hidden, lengths) < 0.1).all()


def test_control_is_plain_training(here, home, tmp_path):
    """The same data through Transformers alone, in a loop of eight lines."""
    here(map="none", steps=5, schedule="constant", warmup_share=0, weight_decay=0.1, eval_data=[], eval_blocks=None)
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")).__name__ == "LlamaForCausalLM"
    tokenizer = AutoTokenizer.from_pretrained(home / "dense")
    blocks = blocks_of(encode_documents(tokenizer, read_documents([str(home / "train.txt")])), 32)
    walk = ShuffledBlocks(blocks, seed=0)
    model = AutoModelForCausalLM.from_pretrained(home / "dense")
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95))
    for _ in range(5):
        batch, _, _ = walk.take(4, slice)
        model(**{name: torch.from_numpy(value) for name, value in batch.items()}, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    for name, value in weights(tmp_path / "run").items():
        torch.testing.assert_close(value, model.state_dict()[name], atol=1e-5, rtol=1e-4)


def test_accumulation_is_a_bigger_batch(here, tmp_path):
    whole, parts = str(tmp_path / "whole"), str(tmp_path / "parts")
    here(output=whole, batch_size=4, steps=3)
    here(output=parts, batch_size=1, gradient_accumulation=4, steps=3)
    assert_close_metrics(tmp_path / "whole", tmp_path / "parts")


def test_gradient_checkpointing_changes_nothing(here, tmp_path):
    here(output=str(tmp_path / "plain"), steps=3)
    here(output=str(tmp_path / "again"), steps=3, gradient_checkpointing=True)
    assert_close_metrics(tmp_path / "plain", tmp_path / "again", rel=1e-6)


def test_sparse_model_trains_on(here, home, tmp_path):
    convert_model(ConvertArguments(model=str(home / "dense"), output=str(tmp_path / "sparse"), map="entmax"))
    here(model=str(tmp_path / "sparse"), output=str(tmp_path / "one"), train_data=[str(home / "train.txt")])
    here(map="entmax", output=str(tmp_path / "two"))
    assert_same_weights(tmp_path / "one", tmp_path / "two")
    for changes in ({"map": "asentmax"}, {"position": "nope"}, {"layers": "0"}):
        with pytest.raises(ValueError, match="already sparse"):
            here(model=str(tmp_path / "sparse"), **changes)
    with pytest.raises(ValueError, match="map is 'none'"):
        here(model=str(tmp_path / "sparse"), map="none")
    assert not (tmp_path / "run").exists()


def test_a_trained_model_does_not_fall_back_to_softmax(here, home, tmp_path):
    """Only weights that know nothing of their map start at alpha 1; a trained model goes on at its own alpha."""

    def alphas(folder):
        return [line["alpha"] for line in metrics(folder) if line["kind"] == "eval"]

    convert_model(ConvertArguments(model=str(home / "dense"), output=str(tmp_path / "sparse")))
    here(model=str(tmp_path / "sparse"))
    here(model=str(tmp_path / "run" / "model"), output=str(tmp_path / "again"))
    assert alphas(tmp_path / "run")[0] == 1.0
    assert set(alphas(tmp_path / "again")) == {1.5}


def test_saved_dtype(here, tmp_path):
    here(steps=1, save_dtype="bfloat16", checkpoint_every=0)
    assert {value.dtype for value in weights(tmp_path / "run").values()} == {torch.bfloat16}


def test_mixed_precision_in_a_process_of_its_own(home, tmp_path):
    code = "import sys, json; from training_cases import TrainArguments, train_model\n"
    code += "train_model(TrainArguments(**json.loads(sys.argv[1])))"
    values = options(home, output=str(tmp_path / "run"), steps=3, mixed_precision="bf16", report_to=[])
    process = python(code, json.dumps(values))
    assert process.wait(timeout=120) == 0, process.stdout.read()
    process.stdout.close()
    assert {value.dtype for value in weights(tmp_path / "run").values()} == {torch.float32}


# LoRA


def test_lora_merged(here, home, tmp_path, capsys):
    pytest.importorskip("peft")
    summary = here(lora_rank=4, lora_dropout=0.1)
    assert "get no gradient" not in capsys.readouterr().out
    before, after = weights(home, "dense"), weights(tmp_path / "run")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if "_proj" in name and "self_attn" in name}
    assert set(after) == set(before) | set(new_parameter_names(model))
    assert all(after[name].count_nonzero() == after[name].numel() for name in new_parameter_names(model))
    assert summary["trainable_parameters"] < summary["parameters"]


def test_an_adapter_of_tied_weights_is_not_merged(here, home, tmp_path):
    """Merged it would change the embedding too, and the model would have another loss than the run said."""
    with pytest.raises(ValueError, match="lm_head, whose weights are also those of model.embed_tokens"):
        here(lora_rank=2, lora_targets=["q_proj", "lm_head"])
    dense_folder(tmp_path / "untied", tie_word_embeddings=False)
    options = {"lora_rank": 2, "lora_targets": ["lm_head"], "map": "none", "checkpoint_every": 0}
    summary = here(model=str(tmp_path / "untied"), **options)
    again = here(
        model=str(tmp_path / "run" / "model"), output=str(tmp_path / "again"), map="none", steps=1, learning_rate=0.0
    )
    assert again["eval_loss"][0][1] == pytest.approx(summary["eval_loss"][-1][1], rel=1e-5)
    assert summary["eval_loss"][-1][1] < summary["eval_loss"][0][1] - 0.01


def test_lora_adapter_round_trip(here, home, tmp_path):
    peft = pytest.importorskip("peft")
    convert_model(ConvertArguments(model=str(home / "dense"), output=str(tmp_path / "sparse")))
    sparse = str(tmp_path / "sparse")
    here(model=sparse, lora_rank=4, lora_save="adapter")
    here(model=sparse, lora_rank=4, output=str(tmp_path / "merged"))
    adapted = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run" / "model").eval()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged" / "model").eval()
    tokens = torch.arange(3, 33)[None]
    with torch.no_grad():
        torch.testing.assert_close(adapted(tokens).logits, merged(tokens).logits, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="needs a sparse model to sit on"):
        here(lora_rank=4, lora_save="adapter", output=str(tmp_path / "other"))
    with pytest.raises(ValueError, match="lora_targets names c_attn"):
        here(lora_rank=4, lora_targets=["c_attn"], output=str(tmp_path / "other"))


# Going on


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


# Bad input


def _small_vocabulary(folder):
    dense_folder(folder / "dense", vocab_size=400)


def _truncated(folder):
    file = folder / "dense" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


def _file(name, content):
    return lambda folder: (folder / name).write_text(content)


def _remove(name):
    return lambda folder: (folder / name).unlink()


@pytest.mark.parametrize(
    ("damage", "changes", "error", "message"),
    [
        (None, {"block_size": 65}, ValueError, "block_size is 65, .* rotary positions up to 64"),
        (None, {"block_size": 65, "position": "nape", "layers": "0"}, ValueError, "rotary positions up to 64"),
        (None, {"map": "sparsemin"}, ValueError, "map is 'sparsemin'; choose one of entmax"),
        (None, {"alpha": 0.9}, ValueError, "alpha is 0.9"),
        (None, {"map": "none", "alpha": 1.5}, ValueError, "alpha has no place with map 'none'"),
        (None, {"map": "none", "scale_start": "normal"}, ValueError, "scale_start has no place with map 'none'"),
        (None, {"map": "entmax", "scale_start": "neutral"}, ValueError, "only asentmax has; map is 'entmax'"),
        (None, {"map": "ssmax", "scale_start": "normal"}, ValueError, "only asentmax has; map is 'ssmax'"),
        (None, {"scale_start": "zero"}, ValueError, "scale_start is 'zero'; choose one of neutral, normal, beta"),
        (None, {"steps": 0}, ValueError, "steps is 0"),
        (None, {"learning_rate": math.nan}, ValueError, "learning_rate is nan"),
        (None, {"alpha_share": 1.5}, ValueError, "alpha_share is 1.5"),
        (None, {"schedule": "step"}, ValueError, "schedule is 'step'; choose one of cosine"),
        (None, {"dtype": "int8"}, ValueError, "dtype is 'int8'"),
        (None, {"lora_dropout": 0.1}, ValueError, "lora_dropout needs lora_rank"),
        (None, {"overwrite": True, "resume": "auto"}, ValueError, "overwrite or resume, not both"),
        (None, {"report_to": ["aim", "dvclive"]}, ValueError, "report_to names aim, dvclive, which is not installed"),
        (None, {"resume": "nowhere"}, OSError, "nowhere is not a whole checkpoint"),
        (None, {"model": "no such model"}, OSError, "no model"),
        (_file("train.txt", "\n<|endoftext|>\n \n"), {}, ValueError, "train_data .* is empty"),
        (_file("train.txt", "a little cat"), {}, ValueError, "less than one block of 32"),
        (_file("train.txt", "a little cat"), {"streaming": True}, ValueError, "less than one block of 32"),
        (_file("eval.txt", "a little cat"), {}, ValueError, "eval_data .* less than one block of 32"),
        (_remove("train.txt"), {}, FileNotFoundError, "no text .*train.txt"),
        (_remove("eval.txt"), {}, FileNotFoundError, "no text .*eval.txt"),
        (_small_vocabulary, {}, ValueError, "tokenizer does not fit"),
        (_truncated, {}, OSError, "is corrupt or cut off"),
    ],
)
def test_bad_input_leaves_nothing(home, tmp_path, damage, changes, error, message):
    shutil.copytree(home, tmp_path / "home")
    if damage is not None:
        damage(tmp_path / "home")
    with pytest.raises(error, match=message):
        run(tmp_path / "home", **changes)
    assert not (tmp_path / "home" / "run").exists()


def test_blocks_may_be_longer_without_rotary_positions(here):
    assert here(block_size=80, position="nape", steps=2)["block_size"] == 80


# Several processes


def test_two_processes_are_one(home, tmp_path):
    """The command that a user launches, on two CPU processes, against one process with the same blocks a step."""
    values = options(home, output=str(tmp_path / "two"), steps=4, batch_size=2, eval_blocks=3, checkpoint_every=2)
    config = tmp_path / "recipe.yaml"
    config.write_text(json.dumps({key: value for key, value in values.items() if key != "output"}))
    code = "import sys; from accelerate.commands.accelerate_cli import main; sys.exit(main())"
    # On a machine without GPUs --multi_gpu only says that there are several processes; --cpu below is train's own.
    launch = ["launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    launch += ["--dynamo_backend", "no", "--main_process_port", "0", "-m", "hf_sparse_attention.train"]
    process = python(code, *launch, "--config", str(config), "--output", values["output"])
    run(home, **{**values, "output": str(tmp_path / "one"), "batch_size": 4})
    output, _ = process.communicate(timeout=180)
    assert process.returncode == 0, output
    assert output.count("2 processes on cpu, 4 blocks of 32 tokens in a step") == 1
    assert json.loads((tmp_path / "two" / "summary.json").read_text())["hardware"].startswith("2 x")
    assert_close_metrics(tmp_path / "one", tmp_path / "two")
    for name, value in weights(tmp_path / "one").items():
        torch.testing.assert_close(weights(tmp_path / "two")[name], value, atol=1e-3, rtol=1e-2)
    # A checkpoint of two processes goes on in one: the blocks of a step are the same.
    again = {**values, "output": str(tmp_path / "two"), "batch_size": 4}
    train_model(TrainArguments(**again, resume=str(tmp_path / "two" / "checkpoints" / "step-00000002")))
    assert metrics(tmp_path / "two")[-1]["step"] == 4

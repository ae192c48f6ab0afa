"""Training: schedules, that a run computes what a plain loop would, LoRA, bad input, several processes."""

import json
import math
import shutil
from functools import partial

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
)
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_sparse_attention as hsa
from hf_sparse_attention.convert import ConvertArguments, convert_model
from hf_sparse_attention.maps import ASEntmaxScale
from hf_sparse_attention.models import new_parameter_names
from hf_sparse_attention.text import encode_documents, read_documents
from hf_sparse_attention.train import TrainArguments, train_model
from hf_sparse_attention.train.packing import Blocks, ShuffledBlocks, pack
from hf_sparse_attention.train.recipe import alpha_at, parameter_groups, rate_at

pytest.importorskip("accelerate")


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
    tokens = encode_documents(tokenizer, read_documents([str(home / "train.txt")]))
    blocks = Blocks(*pack(tokens, 512), 32)
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

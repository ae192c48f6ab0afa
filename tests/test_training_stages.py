"""Training in stages: output matching, distillation, a loss in chunks, blocks that grow, and failed steps."""

import copy
import json
import math
import re
import shutil

import families
import pytest
import torch
from torch.nn import functional as F
from training_cases import (
    assert_close_metrics,
    assert_same_weights,
    dense_folder,
    metrics,
    options,
    run,
    weights,
    write_text,
)
from transformers import AutoModelForCausalLM

from hf_sparse_attention.arguments import parse_arguments
from hf_sparse_attention.convert import ConvertArguments, convert_model
from hf_sparse_attention.models import attention_layers, new_parameter_names, set_alpha
from hf_sparse_attention.train import TrainArguments, train_model
from hf_sparse_attention.train.head import Distillation, chunk_loss
from hf_sparse_attention.train.lengths import Phase, parse_block_sizes, phase_at, phases_of
from hf_sparse_attention.train.matching import (
    begin_matching,
    end_matching,
    match_errors,
    matched,
    measure_scales,
    set_matching,
)
from hf_sparse_attention.train.recipe import alpha_at, freeze
from hf_sparse_attention.train.stages import stages_of
from hf_sparse_attention.train.throughput import flops_per_token, peak_flops

pytest.importorskip("accelerate")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    dense_folder(folder / "dense")
    dense_folder(folder / "teacher", seed=7)
    write_text(folder / "train.txt")
    write_text(folder / "eval.txt", 20, seed=1)
    return folder


@pytest.fixture
def here(home, tmp_path):
    return lambda **changes: run(home, **{"output": str(tmp_path / "run"), **changes})


def sparse(home, name="asentmax", **options):
    return AutoModelForCausalLM.from_pretrained(
        home / "dense", attn_implementation=name, sparse_attention=options, dtype=torch.float64
    )


def packed(rows=2, length=12):
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 500, (rows, length), generator=generator)
    positions = torch.cat([torch.arange(5), torch.arange(length - 5)]).expand(rows, -1)
    return {"input_ids": ids, "position_ids": positions}


def layers_of(model):
    return [layer for _, layer in matched(model)]


# Output matching


@pytest.mark.parametrize(
    "options", [{"alpha": 1.5}, {"alpha": 1.5, "position": "nape"}, {"alpha": 1.5, "layers": [1]}]
)
@pytest.mark.parametrize("same", [True, False])
def test_the_target_is_the_dense_layer_on_the_dense_stream(home, options, same):
    """Every layer's error is that of its output against the dense model's, both on the dense model's hidden states."""
    model, dense = sparse(home, **options), AutoModelForCausalLM.from_pretrained(home / "dense", dtype=torch.float64)
    chosen = options.get("layers", [0, 1])
    seen, inputs = {}, packed()

    def keep(number):
        def hook(module, arguments, keywords, output):
            seen[number] = (keywords, output[0])

        return hook

    handles = [dense.model.layers[n].self_attn.register_forward_hook(keep(n), with_kwargs=True) for n in chosen]
    with torch.no_grad():
        logits = dense(**inputs, use_cache=False).logits
    for handle in handles:
        handle.remove()
    wanted = []
    for number in chosen:
        keywords, output = seen[number]
        with torch.no_grad():
            own, _ = model.model.layers[number].self_attn(**keywords)
        wanted.append((own - output).square().sum() / output.square().sum(-1).mean())
    begin_matching(model, same_projections=same)
    layers = layers_of(model)
    assert len(layers) == len(chosen)
    measure_scales(model, layers, inputs)
    errors = match_errors(model, layers, inputs)
    torch.testing.assert_close(errors, torch.stack(wanted).to(errors.dtype), rtol=1e-5, atol=0)
    assert all(wanted[i] > 1e-4 for i in range(len(wanted)))
    # What goes through the layers is the dense model.
    torch.testing.assert_close(model(**inputs, use_cache=False).logits, logits)
    set_matching(model, False)
    plain = sparse(home, **options)
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs, use_cache=False).logits, plain(**inputs, use_cache=False).logits)
    names = [name for name, _ in plain.named_parameters()]
    end_matching(model)
    assert [name for name, _ in model.named_parameters()] == names
    assert type(model.model.layers[1].self_attn) is type(plain.model.layers[1].self_attn)


def test_a_layer_learns_from_its_own_error_alone(home):
    model = sparse(home, alpha=1.5)
    freeze(model, "map")
    with torch.no_grad():
        for name in new_parameter_names(model):
            model.get_parameter(name).fill_(0.01)
    begin_matching(model, same_projections=True)
    layers = layers_of(model)
    match_errors(model, layers, packed())[1].backward()
    for name, parameter in model.named_parameters():
        moved = parameter.grad is not None and bool(parameter.grad.count_nonzero())
        assert moved == ("layers.1" in name and "sparse_scale" in name)
    # With its projections trained, a layer still aims at the dense ones it started with.
    model = sparse(home, alpha=1.5)
    freeze(model, "attention")
    begin_matching(model, same_projections=False)
    before = match_errors(model, layers_of(model), packed())
    with torch.no_grad():
        for _, layer in attention_layers(model):
            layer.v_proj.weight.zero_()
    after = match_errors(model, layers_of(model), packed())
    assert (after != before).all()
    with torch.no_grad():
        dense = AutoModelForCausalLM.from_pretrained(home / "dense", dtype=torch.float64)
        torch.testing.assert_close(
            model(**packed(), use_cache=False).logits, dense(**packed(), use_cache=False).logits
        )


@pytest.mark.parametrize("changes", [{}, {"trained": "attention"}, {"lora_rank": 4}], ids=["map", "attention", "lora"])
def test_match_stage(here, home, tmp_path, changes):
    if "lora_rank" in changes:
        pytest.importorskip("peft")
    # alpha 1.5 from the start, so that there is something to learn.
    changes |= {"stage": "match", "steps": 12, "alpha_schedule": "none", "position": "nape", "log_every": 4}
    summary = here(**changes, gradient_checkpointing=True)
    lines = [line for line in metrics(tmp_path / "run") if line["kind"] == "match"]
    assert [line["step"] for line in lines] == [4, 8, 12]
    assert all(0 < lines[-1][f"layer_{layer}"] < lines[0][f"layer_{layer}"] for layer in (0, 1))
    mean = (lines[-1]["layer_0"] + lines[-1]["layer_1"]) / 2
    assert summary["train_loss"] == pytest.approx(mean) and summary["stage"] == "match"
    before, after = weights(home, "dense"), weights(tmp_path / "run")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    projections = {name for name in before if "self_attn" in name}
    assert moved == (projections if len(changes) > 5 else set())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    new = new_parameter_names(model)
    assert set(after) == set(before) | set(new)
    assert all(after[name].count_nonzero() for name in new)


def test_adapters_of_dense_layers_do_not_match(here, capsys):
    """They have no gradient, for which several processes would wait."""
    summary = here(stage="match", lora_rank=2, layers="1", checkpoint_every=0)
    # 4 projections of layer 1, and its factor.
    every = here(stage="match", lora_rank=2, checkpoint_every=0, overwrite=True)
    assert 2 * summary["trainable_parameters"] == every["trainable_parameters"]
    assert "get no gradient" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["starcoder2", "seed_oss"])
def test_layers_match_without_dropout(here, home, tmp_path, name):
    """These families drop a part of the attention's output: matched to another draw of it, a layer's shrinks."""
    errors, saved = {}, {}
    for dropout in (0.0, 0.3):
        folder = tmp_path / f"dense{dropout}"
        families.dense_model(name, vocab_size=512, residual_dropout=dropout).save_pretrained(folder)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(home / "dense" / file, folder / file)
        output = tmp_path / f"run{dropout}"
        options = {"stage": "match", "trained": "attention", "lora_rank": 0, "checkpoint_every": 0, "steps": 4}
        errors[dropout] = here(model=str(folder), output=str(output), **options)["train_loss"]
        saved[dropout] = weights(output)
    assert errors[0.3] == errors[0.0]
    assert all(torch.equal(value, saved[0.3][key]) for key, value in saved[0.0].items())


def test_dropout_of_adapters_stays_where_they_match(here):
    options = {"stage": "match", "lora_rank": 2, "checkpoint_every": 0, "steps": 4, "overwrite": True}
    assert here(**options)["train_loss"] != here(**options, lora_dropout=0.5)["train_loss"]


def test_some_heads_alone(here, home, tmp_path):
    """Matched and trained, the heads that were left out keep softmax, and there is no factor for them."""
    stages = [{"stage": "match", "steps": 2, "trained": "attention"}, {"steps": 2, "alpha_schedule": "none"}]
    changes = {"stages": [json.dumps(stage) for stage in stages], "heads": "0:0,1 1:2,3"}
    summary = here(output=str(tmp_path / "two"), **changes)
    saved = json.loads((tmp_path / "two" / "model" / "config.json").read_text())["sparse_attention"]
    assert saved["heads"] == {"0": [0, 1], "1": [2, 3]} == summary["sparse_attention"]["heads"]
    factors = weights(tmp_path / "two")
    assert factors["model.layers.1.self_attn.sparse_scale.beta_bias"].shape == (2,)
    with pytest.raises(ValueError, match="is already sparse .*: its heads cannot change"):
        here(model=str(tmp_path / "two" / "model"), output=str(tmp_path / "on"), heads="0")
    with pytest.raises(ValueError, match="layer 0 has 4 heads|head 7"):
        here(output=str(tmp_path / "on"), heads="7")
    assert not (tmp_path / "on").exists()


@pytest.mark.parametrize("name", ["adaptive_entmax", "ssmax"])
def test_every_map_with_parameters_matches(here, tmp_path, name):
    here(map=name, stage="match", steps=4, position="nape")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert all(model.get_parameter(new).count_nonzero() for new in new_parameter_names(model))


def test_stages_one_after_the_other(here, home, tmp_path):
    """Two stages are two runs; the second goes on in the data where the first stopped."""
    stages = ["{stage: match, steps: 4, learning_rate: 1e-3}", '{"steps": 5, "schedule": "constant"}']
    summary = here(stages=stages, log_every=1)
    folder = tmp_path / "run"
    assert sorted(path.name for path in (folder / "stages").iterdir()) == ["1-match", "2-pretrain"]
    # The text is encoded once, though each stage has the tokenizer of the model it goes on from.
    assert len(list((folder / "packed").iterdir())) == 1 and not list(folder.glob("stages/*/packed"))
    assert summary["steps"] == 9 and summary["tokens"] == 9 * 4 * 32
    assert summary["base_model"] == str(home / "dense") and len(summary["stages"]) == 2
    assert summary["stages"][0]["options"]["learning_rate"] == 1e-3
    assert [step for step, _ in summary["eval_loss"]] == [0, 4, 8, 9]
    assert json.loads((folder / "model" / "summary.json").read_text()) == summary
    # By hand.
    here(output=str(tmp_path / "one"), stage="match", steps=4, learning_rate=1e-3, log_every=1)
    from hf_sparse_attention.train.loop import train_stage

    second = options(home, model=str(tmp_path / "one" / "model"), output=str(tmp_path / "two"), steps=5, log_every=1)
    train_stage(TrainArguments(**second, schedule="constant"), first_token=4 * 4 * 32)
    assert_same_weights(tmp_path / "two", folder)
    first = metrics(folder / "stages" / "2-pretrain")
    assert first == metrics(tmp_path / "two")
    train_stage(TrainArguments(**{**second, "output": str(tmp_path / "again")}, schedule="constant"))
    assert first != metrics(tmp_path / "again")
    assert here(stages=stages, log_every=1, resume="auto") == summary
    with pytest.raises(ValueError, match="holds a run of other stages"):
        here(stages=stages[1:], log_every=1, resume="auto")


@pytest.mark.parametrize("stopped", [pytest.param(3, marks=pytest.mark.slow), 7])
def test_stages_that_go_on_are_the_same(here, tmp_path, monkeypatch, stopped):
    from hf_sparse_attention.train import packing

    changes = {"stages": [{"stage": "match", "steps": 4, "trained": "attention"}, {"steps": 5}], "checkpoint_every": 1}
    take, calls = packing.ShuffledBlocks.take, []

    def stop(self, *arguments):
        calls.append(1)
        if len(calls) == stopped:
            raise KeyboardInterrupt
        return take(self, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(packing.ShuffledBlocks, "take", stop)
        with pytest.raises(KeyboardInterrupt):
            here(**changes)
    here(**changes, resume="auto")
    here(**changes, output=str(tmp_path / "whole"))
    assert_same_weights(tmp_path / "run", tmp_path / "whole")
    for stage in ("1-match", "2-pretrain"):
        assert metrics(tmp_path / "run" / "stages" / stage) == metrics(tmp_path / "whole" / "stages" / stage)


@pytest.mark.parametrize("stages", [[], ["{steps: 1}", "{steps: 1, distill: TEACHER}"]], ids=["one", "several"])
def test_a_teacher_is_not_overwritten(here, tmp_path, stages):
    """It is the model of a run that lies where the next one is to."""
    here(map="none", steps=1, checkpoint_every=0)
    teacher = tmp_path / "run" / "model"
    stages = [stage.replace("TEACHER", str(teacher)) for stage in stages]
    with pytest.raises(ValueError, match=r"holds the model .*, which would be overwritten"):
        here(overwrite=True, **({"stages": stages} if stages else {"steps": 1, "distill": str(teacher)}))
    assert (teacher / "model.safetensors").is_file()


def test_steps_that_no_stage_takes_are_refused(home):
    own = ["{stage: match, steps: 3}", "{steps: 4}"]
    with pytest.raises(ValueError, match="steps is 40, but every stage has steps of its own, 7 in all"):
        stages_of(TrainArguments(**options(home, steps=40, stages=own)))
    assert [stage.steps for stage in stages_of(TrainArguments(**options(home, steps=7, stages=own)))] == [3, 4]
    # One without takes them.
    found = stages_of(TrainArguments(**options(home, steps=40, stages=[own[0], "{alpha_schedule: none}"])))
    assert [stage.steps for stage in found] == [3, 40]


def test_held_out_losses_of_other_blocks_are_not_compared(here, capsys):
    """Each size has a beginning and an end of its own: a first loss on short blocks says nothing of long ones."""
    sizes = ["{stage: match, steps: 2, block_size: 16}", "{steps: 2, block_size: 16}", "{steps: 3, block_size: 32}"]
    summary = here(stages=sizes, eval_every=100)
    losses = [[f"{loss:.4f}" for _, loss in stage["eval_loss"]] for stage in summary["stages"]]
    line = next(line for line in capsys.readouterr().out.splitlines()[::-1] if line.startswith("held-out loss"))
    assert re.sub(r" \(alpha [\d.]+\)", "", line) == (
        f"held-out loss: {losses[0][0]} at step 0, {losses[1][-1]} at step 4 in blocks of 16; "
        f"{losses[2][0]} at step 4, {losses[2][-1]} at step 7 in blocks of 32"
    )
    # The card has the same words.
    from hf_sparse_attention.held_out import held_out_in_words

    assert line.removeprefix("held-out loss: ") == held_out_in_words(summary)
    # One size in all stages, or another number of blocks of the same.
    for stage in summary["stages"]:
        stage["block_size"] = 16
    assert "blocks of" not in held_out_in_words(summary)
    summary["stages"][2]["options"]["eval_blocks"] += 1
    assert held_out_in_words(summary).endswith(f" in {summary['stages'][2]['options']['eval_blocks']} blocks of 16")
    del summary["stages"][0]["steps"]
    assert held_out_in_words(summary) == ""


def test_distillation_of_a_run_is_of_its_stages_with_text(home):
    stages = ["{stage: match, steps: 1}", "{steps: 2}", "{steps: 3, distill: null}", "{steps: 4, distill_weight: 0.2}"]
    values = options(home, distill="teacher", distill_weight=0.7, stages=stages)
    found = [(stage.distill, stage.distill_weight) for stage in stages_of(TrainArguments(**values))]
    assert found == [(None, None), ("teacher", 0.7), (None, None), ("teacher", 0.2)]
    # What a stage says of itself is never dropped.
    for stage in ("{stage: match, distill: other}", "{distill: null, distill_weight: 0.2}"):
        with pytest.raises(ValueError, match="distill learns from logits|distill_weight needs distill"):
            stages_of(TrainArguments(**{**values, "stages": [stage]}))
    with pytest.raises(ValueError, match="distill_weight needs distill"):
        stages_of(TrainArguments(**options(home), stages=["{distill_weight: 0.2}"]))


def test_stages_in_a_file(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "model: m\noutput: o\ntrain_data: [t.txt]\nstages:\n- stage: match\n  steps: 3\n  learning_rate: 1e-3\n"
        "- lora_targets: [q_proj, k_proj]\n  lora_rank: 4\n"
    )
    arguments = parse_arguments(TrainArguments, ["--config", str(path)], program="train")
    first, second = stages_of(arguments)
    assert (first.stage, first.steps, first.learning_rate, first.model) == ("match", 3, 1e-3, "m")
    assert (second.stage, second.steps, second.lora_targets) == ("pretrain", 1000, ["q_proj", "k_proj"])
    assert second.model.endswith("o/stages/1-match/model")


# The loss in chunks, and distillation


@pytest.mark.parametrize("chunk", [1, 5, 0])
def test_chunks_are_the_whole_loss(home, chunk):
    model, other = sparse(home), sparse(home)
    batch = packed()
    labels = torch.where(batch["position_ids"] == 0, -100, batch["input_ids"])
    whole = model(**batch, labels=labels, use_cache=False, num_items_in_batch=torch.tensor(9.0)).loss
    whole.backward()
    chunk_loss(other, chunk)
    assert other(**batch, use_cache=False).logits.shape == (2, 12, 512)
    output = other(**batch, labels=labels, use_cache=False, num_items_in_batch=torch.tensor(9.0))
    output.loss.backward()
    assert output.logits is None
    torch.testing.assert_close(output.loss.double(), whole.double(), rtol=1e-6, atol=0)
    for (name, one), (_, two) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-4, atol=1e-7, msg=name)
    with torch.no_grad():
        mean = other(**batch, labels=labels, use_cache=False).loss.double()
        torch.testing.assert_close(
            mean, model(**batch, labels=labels, use_cache=False).loss.double(), rtol=1e-6, atol=0
        )
        nothing = other(**batch, labels=torch.full_like(labels, -100), num_items_in_batch=torch.tensor(9.0)).loss
    assert nothing == 0


def test_the_output_layer_is_called_once_whatever_the_chunks(home):
    """FSDP2 and ZeRO-3 hold its weights from its call to the gradient of its input: a second call finds them gone."""
    model, batch = sparse(home), packed()
    chunk_loss(model, 4, Distillation(sparse(home), 0.5, 1.0))
    calls, after = [], []
    model.lm_head.register_forward_hook(lambda *call: calls.append(call[1][0].shape[0]))
    model.lm_head.register_full_backward_hook(lambda *call: after.append(model.lm_head.weight.grad is None))
    model.train()(**batch, labels=batch["input_ids"], use_cache=False).loss.backward()
    assert calls == [batch["input_ids"].numel()] and len(after) == 1


def test_chunks_keep_the_logits_small():
    """Peak memory of loss and gradients over what was there before: a tenth of what all the logits take."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        """The largest tensor that any operation makes."""

        elements = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for item in result if isinstance(result, (tuple, list)) else (result,):
                if isinstance(item, torch.Tensor):
                    self.elements = max(self.elements, item.numel())
            return result

    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=1000, **sizes, tie_word_embeddings=True))
    ids = torch.arange(1, 401)[None]
    found = []
    for chunk in (None, 32):
        if chunk:
            chunk_loss(model, chunk)
        with Largest() as largest:
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        found.append(largest.elements)
    assert found == [400 * 1000, 32 * 1000]


def test_distillation(home):
    batch = packed()
    labels = torch.where(batch["position_ids"] == 0, -100, batch["input_ids"])
    teacher = AutoModelForCausalLM.from_pretrained(home / "teacher", dtype=torch.float64)
    model = sparse(home)
    chosen = labels[:, 1:] != -100
    with torch.no_grad():
        own, dense = (each(**batch, use_cache=False).logits[:, :-1][chosen] for each in (model, teacher))
        entropy = F.cross_entropy(own, labels[:, 1:][chosen])
        soft = F.softmax(dense / 2, -1)
        divergence = 4 * (soft * (soft.log() - F.log_softmax(own / 2, -1))).sum(-1).mean()
    chunk_loss(model, 4, Distillation(teacher, 0.3, 2.0))
    loss = model.train()(**batch, labels=labels, use_cache=False).loss
    torch.testing.assert_close(loss.double(), 0.7 * entropy + 0.3 * divergence, rtol=1e-5, atol=0)
    loss.backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    # What is held out is measured as it is everywhere else.
    torch.testing.assert_close(model.eval()(**batch, labels=labels).loss.double(), entropy, rtol=1e-5, atol=0)
    # A copy of the teacher has nothing to learn from it.
    twin = copy.deepcopy(teacher)
    chunk_loss(twin, 4, Distillation(teacher, 1.0, 1.0))
    twin.train()(**batch, labels=labels).loss.backward()
    assert all(parameter.grad.abs().max() < 1e-6 for parameter in twin.parameters())


def test_training_in_chunks_and_from_a_teacher(here, home, tmp_path):
    here(output=str(tmp_path / "whole"), steps=4)
    here(output=str(tmp_path / "chunks"), steps=4, loss_chunk=7)
    assert_close_metrics(tmp_path / "whole", tmp_path / "chunks")
    here(steps=4, distill=str(home / "dense"), distill_weight=0.9, lora_rank=2)
    assert "Sparse" in type(AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")).__name__
    assert metrics(tmp_path / "run") != metrics(tmp_path / "whole")
    dense_folder(tmp_path / "small", vocab_size=600)
    with pytest.raises(ValueError, match="vocabulary of 600"):
        here(output=str(tmp_path / "other"), distill=str(tmp_path / "small"))


def test_a_head_that_does_more_is_refused():
    from transformers import GraniteConfig, GraniteForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = GraniteForCausalLM(GraniteConfig(vocab_size=50, **sizes, num_key_value_heads=1, logits_scaling=8.0))
    with pytest.raises(ValueError, match="scales or bounds its logits"):
        chunk_loss(model, 4)


# Length


def test_block_sizes():
    assert parse_block_sizes(1024) == parse_block_sizes("1024") == [(1024, 1.0)]
    assert parse_block_sizes("1024:0.8, 4096:0.2") == [(1024, 0.8), (4096, 0.2)]
    phases = phases_of([(16, 0.5), (64, 0.5)], 9, 8)
    assert phases == [Phase(0, 16, 8), Phase(4, 64, 2)]
    assert [phase_at(phases, step) for step in (0, 3, 4, 8)] == [0, 0, 1, 1]
    for text in ("x", "", "1024:0.5,512:0.5", "16:0.5,32:0.4", "1", "16:0.5,32:-0.5,64:1", "16:0.5:3"):
        with pytest.raises(ValueError, match="block_size is"):
            parse_block_sizes(text)
    with pytest.raises(ValueError, match="make batch_size a multiple of 4"):
        phases_of([(16, 0.5), (64, 0.5)], 9, 6)
    with pytest.raises(ValueError, match="a phase without a step"):
        phases_of([(16, 0.99), (64, 0.01)], 9, 8)


def test_blocks_that_grow(here, tmp_path):
    changes = {"block_size": "16:0.5,64:0.5", "batch_size": 8, "log_every": 1, "eval_every": 8, "checkpoint_every": 1}
    summary = here(**changes, keep_checkpoints=9)
    assert summary["block_size"] == 64 and summary["tokens"] == 8 * 8 * 16
    # The first half is a run with short blocks; the held-out blocks are long throughout.
    here(**{**changes, "block_size": 16}, output=str(tmp_path / "short"), alpha_share=0.5)
    losses, short = (
        [line["loss"] for line in metrics(tmp_path / name) if line["kind"] == "train"] for name in ("run", "short")
    )
    assert losses[:4] == short[:4] and losses[4:] != short[4:]
    (tmp_path / "first").mkdir()
    first = {name: value.clone() for name, value in weights(tmp_path / "run").items()}
    for step in (3, 4):
        here(**changes, keep_checkpoints=9, resume=str(tmp_path / "run" / "checkpoints" / f"step-{step:08d}"))
        assert all(torch.equal(value, first[name]) for name, value in weights(tmp_path / "run").items())


@pytest.mark.parametrize("changes", [{"rope_yarn": 4.0}, {"rope_theta": 5e5, "max_positions": 256}])
def test_longer_positions_are_saved(here, home, tmp_path, changes):
    here(steps=1, block_size=128, batch_size=1, eval_blocks=1, **changes)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert model.config.max_position_embeddings == 256
    rope = model.config.rope_parameters
    if "rope_yarn" in changes:
        wanted = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
        assert wanted.items() <= rope.items()
    else:
        assert rope["rope_theta"] == 5e5 and rope["rope_type"] == "default"
    folder = convert_model(ConvertArguments(model=str(home / "dense"), output=str(tmp_path / "sparse"), **changes))
    converted = AutoModelForCausalLM.from_pretrained(folder)
    assert converted.config.rope_parameters == rope and converted.config.max_position_embeddings == 256
    torch.testing.assert_close(converted.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)
    plain = AutoModelForCausalLM.from_pretrained(home / "dense")
    assert not torch.allclose(plain.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)
    with pytest.raises(FileExistsError, match="holds another conversion"):
        convert_model(ConvertArguments(model=str(home / "dense"), output=str(tmp_path / "sparse")))
    # Nothing else differs from the dense model.
    set_alpha(converted, 1.0)
    dense = AutoModelForCausalLM.from_pretrained(home / "dense", config=_dense_config(home, changes))
    tokens = torch.arange(3, 103)[None]
    with torch.no_grad():
        torch.testing.assert_close(converted(tokens).logits, dense(tokens).logits, atol=1e-5, rtol=1e-4)


def _dense_config(home, changes):
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(home / "dense")
    theta = {"rope_theta": changes.get("rope_theta", config.rope_parameters["rope_theta"])}
    config.rope_parameters = {"rope_type": "default", **theta}
    if "rope_yarn" in changes:
        config.rope_parameters = {
            "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, **theta,
        }  # fmt: skip
    config.max_position_embeddings = 256
    return config


# Steps that fail


def _poison(monkeypatch, kind, step, layer=1):
    """Makes the MLP of a layer give NaN, or run out of memory, in one step."""
    from transformers.models.llama.modeling_llama import LlamaMLP

    forward, calls = LlamaMLP.forward, []

    def broken(self, hidden):
        if self.training:
            calls.append(1)
        result = forward(self, hidden)
        # Two layers and one forward pass a step; the look for the layer comes on top.
        number = (len(calls) - 1) % 2
        if self.training and number == layer and len(calls) in (2 * step, 2 * step + 2) and kind == "nan":
            return result * math.nan
        if self.training and number == layer and len(calls) == 2 * step and kind == "memory":
            raise torch.OutOfMemoryError("tried to allocate 3 GiB")
        return result

    monkeypatch.setattr(LlamaMLP, "forward", broken)


@pytest.mark.parametrize("kind", ["nan", "memory"])
def test_a_failed_step(here, tmp_path, monkeypatch, kind):
    place = r"step 3: (loss nan.* first in the output of|out of memory in) model\.layers\.1\.mlp.*"
    place += r"blocks \d+ \(documents \d+ to \d+\)"
    with monkeypatch.context() as patched:
        _poison(patched, kind, 3)
        with pytest.raises(RuntimeError, match=place + ".*The last whole checkpoint is .*step-00000002"):
            here(checkpoint_every=2)
    with monkeypatch.context() as patched:
        _poison(patched, kind, 3)
        summary = here(output=str(tmp_path / "skip"), on_nonfinite="skip", gradient_accumulation=1)
    assert summary["skipped_steps"] == 1 and summary["tokens"] == 8 * 4 * 32
    (line,) = [line for line in metrics(tmp_path / "skip") if line["kind"] == "skipped"]
    assert line["step"] == 3
    assert all(torch.isfinite(value).all() for value in weights(tmp_path / "skip").values())


def test_a_step_without_memory_leaves_nothing_of_its_passes(here, tmp_path, monkeypatch):
    """Wherever among the passes of a step memory runs out, the run is the same."""
    from transformers.models.llama.modeling_llama import LlamaMLP

    forward = LlamaMLP.forward
    options = {"eval_data": [], "eval_blocks": None, "statistics_blocks": 0, "checkpoint_every": 0, "steps": 3}
    # Two layers and four passes: the second step begins with call 9.
    for failed in (9, 13):
        calls = []

        def broken(self, hidden, failed=failed, calls=calls):
            calls.extend([1] if self.training else [])
            if self.training and len(calls) == failed:
                raise torch.OutOfMemoryError("tried to allocate 3 GiB")
            return forward(self, hidden)

        monkeypatch.setattr(LlamaMLP, "forward", broken)
        output = str(tmp_path / f"call{failed}")
        summary = here(output=output, on_nonfinite="skip", batch_size=1, gradient_accumulation=4, **options)
        assert summary["skipped_steps"] == 1
    assert_same_weights(tmp_path / "call9", tmp_path / "call13")


def test_a_step_that_is_left_out_does_not_end_the_next_one_in_fp16(here, monkeypatch):
    """Gradients are scaled: the scaler takes a step that was left out for one."""
    from hf_sparse_attention.train import job

    make = job.make_accelerator

    def scaling(*arguments, **keywords):
        accelerator = make(*arguments, **keywords)
        accelerator.scaler = scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        # Accelerate has one on GPUs alone.
        accelerator.unscale_gradients = lambda: scaler.unscale_(accelerator._optimizers[0].optimizer)
        return accelerator

    monkeypatch.setattr(job, "make_accelerator", scaling)
    _poison(monkeypatch, "nan", 3)
    summary = here(on_nonfinite="skip", checkpoint_every=0)
    assert summary["skipped_steps"] == 1 and math.isfinite(summary["train_loss"])


def test_a_gradient_that_is_not_finite(here, monkeypatch):
    from transformers.models.llama.modeling_llama import LlamaMLP

    class Bad(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value):
            return value.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * math.nan

    forward = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, hidden: Bad.apply(forward(self, hidden)))
    message = r"outputs are finite, first in the gradient of model\.layers\.1\."
    with pytest.raises(RuntimeError, match=message):
        here(steps=1)


# Options without effect, and what a run says of itself


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shuffle_buffer": 8}, "shuffle_buffer needs streaming"),
        ({"eval_data": [], "eval_split": "test", "eval_blocks": None}, "eval_split needs eval_data"),
        ({"eval_data": []}, "eval_blocks needs eval_data"),
        ({"map": "entmax", "new_learning_rate": 0.1}, "entmax has no new parameters"),
        ({"lora_save": "adapter"}, "lora_save needs lora_rank"),
        ({"distill_weight": 0.5}, "distill_weight needs distill: name the dense model .* --distill MODEL"),
        ({"map": "entmax", "stage": "match"}, "the model's map has no parameters of its own"),
        ({"map": "none", "stage": "match"}, "stage is 'match', but map is 'none'"),
        ({"stage": "match", "map": "adaptive_entmax", "alpha_start": 1.0}, "learns nothing while alpha is 1"),
        ({"map": "adaptive_entmax", "alpha": 1.0}, "it would be softmax to the end"),
        (
            {"stage": "pretrain", "map": "adaptive_entmax", "trained": "map"},
            "while alpha is 1: use --alpha_start 1.01",
        ),
        ({"map": "none", "trained": "attention"}, "trained is 'attention', but map is 'none'"),
        ({"stage": "match", "lora_rank": 2, "lora_targets": ["up_proj"]}, "nothing in a sparse layer's attention"),
        ({"stage": "match", "distill": "x"}, "distill learns from logits"),
        ({"stage": "match", "trained": "all"}, "everything beside the attention is frozen"),
        ({"stage": "match", "rope_yarn": 2.0}, "would change the dense layers too"),
        ({"lora_rank": 2, "trained": "map"}, "the adapters and the map's are trained"),
        ({"map": "none", "alpha_schedule": "linear"}, "alpha_schedule has no place"),
        ({"alpha_schedule": "none", "alpha_start": 1.2}, "alpha_start needs an alpha that rises"),
        ({"alpha_schedule": "none", "alpha_share": 0.2}, "alpha_share needs an alpha that rises"),
        ({"schedule": "constant", "final_share": 0.2}, "final_share needs a learning rate that falls"),
        ({"map": "ssmax", "alpha_schedule": "linear"}, "alpha_schedule would raise alpha, which is 1 throughout"),
        ({"alpha_start": 1.7}, "alpha_start is 1.7, above the alpha at the end"),
        ({"max_positions": 128}, "max_positions is 128"),
        ({"rope_yarn": 0.5}, "rope_yarn is 0.5"),
        ({"streaming": True, "block_size": "16:0.5,32:0.5"}, "streaming packs blocks of one size"),
        ({"stages": ["{steps: 3, model: x}"]}, "stage 1 sets model, which a stage cannot"),
        ({"stages": ["{steps: many}"]}, "stage 1: .*steps"),
        ({"stages": ["steps 3"]}, "it must be a mapping"),
        ({"stages": ["{steps: 3}", "{stage: match}"]}, "it can only come first"),
        ({"stages": ["{steps: 0}"]}, "steps is 0"),
        ({"stages": ["{steps: 2}"] * 2, "lora_rank": 2, "lora_save": "adapter"}, "stage 2 goes on from a whole model"),
    ],
)
def test_options_without_effect(here, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        here(**changes)
    assert not (tmp_path / "run" / "checkpoints").exists() and not (tmp_path / "run" / "stages").exists()


def test_a_changed_base_is_noticed(here, home, tmp_path):
    pytest.importorskip("peft")
    dense_folder(tmp_path / "base")
    here(model=str(tmp_path / "base"), lora_rank=2, checkpoint_every=2)
    (tmp_path / "run" / "summary.json").unlink()
    dense_folder(tmp_path / "base", seed=1)
    with pytest.raises(ValueError, match="belongs to a run with other options: weights"):
        here(model=str(tmp_path / "base"), lora_rank=2, checkpoint_every=2, resume="auto")


def test_matching_starts_from_the_dense_model(here, home, tmp_path):
    here(steps=1)
    with pytest.raises(ValueError, match="was trained since it was converted"):
        here(model=str(tmp_path / "run" / "model"), output=str(tmp_path / "other"), stage="match")


def test_alpha_from_elsewhere_and_in_plateaus():
    values = [alpha_at(step, target=1.5, schedule="linear", rise=10, start=1.2) for step in range(12)]
    assert values[0] == 1.2 and values[5] == pytest.approx(1.35) and values[10:] == [1.5, 1.5]
    stairs = [alpha_at(step, target=1.5, schedule="linear", rise=100, plateaus=4) for step in range(120)]
    assert sorted(set(stairs)) == pytest.approx([1.0, 1.125, 1.25, 1.375, 1.5])
    assert stairs[:25] == [1.0] * 25 and stairs[25] == pytest.approx(1.125) and stairs[100] == 1.5


def test_floating_point_operations(home):
    """4 N + 2 T + 6 L A n, against the products counted one by one."""
    from torch.utils.flop_counter import FlopCounterMode

    model = AutoModelForCausalLM.from_pretrained(home / "dense", attn_implementation="eager")
    length = 64
    ids = torch.arange(3, 3 + length)[None]
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    # Counted are all keys, of which half are visible; norms are no products, though their parameters are counted.
    attention = 12 * 2 * 4 * 8 * length * length
    assert flops_per_token(model, length) * length == pytest.approx(
        counter.get_total_flops() - attention / 2, rel=0.01
    )
    freeze(sparse_model := sparse(home), "map")
    assert flops_per_token(sparse_model, length) < 0.75 * flops_per_token(model, length)
    assert peak_flops(torch.device("cpu")) is None


def test_a_run_of_stages_from_the_command(home, tmp_path):
    """Stages, chunks and a teacher together, on the command line."""
    from hf_sparse_attention.cli import main

    values = options(home, output=str(tmp_path / "run"), steps=2, loss_chunk=0)
    words = []
    for name, value in values.items():
        words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    stages = ["{stage: match, alpha_schedule: none}", "{loss_chunk: 16, distill: DENSE}"]
    words += ["--stages", *(stage.replace("DENSE", str(home / "dense")) for stage in stages)]
    assert main(["train", *words]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["stages"][1]["options"]["distill"] == str(home / "dense")
    assert train_model(
        TrainArguments(**values, stages=[s.replace("DENSE", str(home / "dense")) for s in stages], resume="auto")
    )


# Dynamo looks at the gradient of what it traces.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.slow
def test_a_rising_alpha_is_compiled_three_times_at_most(home):
    """As softmax, for the first alpha, and for any alpha."""
    import torch._dynamo as dynamo
    from torch._dynamo.testing import CompileCounter

    dynamo.reset()
    model = AutoModelForCausalLM.from_pretrained(home / "dense", attn_implementation="asentmax")
    counter, counts = CompileCounter(), []
    compiled = torch.compile(model, backend=counter)
    batch = packed()
    for step in (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11):
        set_alpha(model, alpha_at(step, target=1.5, schedule="linear", rise=10))
        compiled(**batch, labels=batch["input_ids"], use_cache=False).loss.backward()
        counts.append(counter.frame_count)
    assert 0 < counts[0] < counts[2] and set(counts[3:]) == {counts[-1]}
    assert counts[3] - counts[2] <= 3
    dynamo.reset()


@pytest.mark.parametrize(
    "changes", [{"map": "none"}, {"map": "ssmax"}, {"lora_rank": 2}, {"stages": ["{steps: 1}"]}, {"steps": 10}]
)
def test_the_command_in_the_summary_is_one(here, changes):
    """The options with their defaults filled in are options that train takes."""
    import shlex

    from hf_sparse_attention.train.arguments import check_arguments

    words = shlex.split(here(**{"steps": 1, "checkpoint_every": 0, "statistics_blocks": 0, **changes})["command"])
    assert words[:2] == ["hf-sparse-attention", "train"]
    arguments = parse_arguments(TrainArguments, words[2:], program="train")
    assert check_arguments(arguments).map == changes.get("map")


def test_a_trained_model_rises_where_it_is_told_to(here, home, tmp_path):
    here(steps=1, alpha=1.25, alpha_schedule="none")
    model = str(tmp_path / "run" / "model")
    for name, changes, first in (("on", {}, 1.5), ("rise", {"alpha_start": 1.25}, 1.25)):
        here(model=model, alpha=1.5, output=str(tmp_path / name), steps=4, **changes)
        alphas = [line["alpha"] for line in metrics(tmp_path / name) if line["kind"] == "eval"]
        assert alphas[0] == first and alphas[-1] == 1.5

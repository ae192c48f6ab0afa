"""What `train` does if it is told nothing of stages: which recipe, from which dense weights, and how it goes on."""

import json
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import families
import pytest
import torch
import yaml
from training_cases import (
    assert_close_metrics,
    assert_same_weights,
    dense_folder,
    metrics,
    options,
    run,
    train_together,
    weights,
    write_text,
)

from hf_sparse_attention.convert import ConvertArguments, convert_model
from hf_sparse_attention.loading import load_model
from hf_sparse_attention.train import TrainArguments, train_model
from hf_sparse_attention.train.default_recipe import Choice, choose, stages_of_recipe
from hf_sparse_attention.train.head import chunk_loss, scales_logits
from hf_sparse_attention.train.plan import find_source, find_teacher, settings_of

pytest.importorskip("accelerate")
MEASURED = Path(__file__).parent.parent / "examples" / "conversion"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    dense_folder(folder / "dense")
    write_text(folder / "train.txt")
    write_text(folder / "eval.txt", 20, seed=1)
    changed = {"converted": {}, "nape": {"position": "nape"}, "yarn": {"rope_yarn": 4.0}}
    # Without a new parameter.
    changed |= {"entmax": {"map": "entmax"}, "heads": {"map": "entmax", "heads": "0,1"}}
    for name, changes in changed.items():
        convert_model(ConvertArguments(model=str(folder / "dense"), output=str(folder / name), **changes))
    run(folder, output=str(folder / "run"), steps=1, checkpoint_every=0)
    shutil.move(folder / "run" / "model", folder / "trained")
    return folder


def asked(home, **changes):
    """Arguments of a run that is long enough for two stages."""
    values = {"checkpoint_every": 3, "eval_every": 6, "log_every": 1, "learning_rate": 3e-3}
    if not changes.get("stages"):
        values["steps"] = 12
    return options(home, **{**values, **changes})


@pytest.fixture
def here(home, tmp_path):
    return lambda **changes: train_model(TrainArguments(**asked(home, **{"output": str(tmp_path / "run"), **changes})))


def choice(home, **changes):
    arguments = TrainArguments(**asked(home, **changes))
    source = find_source(arguments)
    return choose(arguments, source, settings_of(source, arguments, 32))


# The two stages


@pytest.mark.parametrize("name", ["match-distill", "entmax-match-distill", "ssmax-match-distill"])
def test_the_stages_are_those_that_were_measured(home, name):
    """At the tokens and rates of the file they are the file's; their batches are the run's."""
    measured = yaml.safe_load((MEASURED / f"{name}.yaml").read_text())
    arguments = TrainArguments(**asked(home, map=measured["map"], steps=674, learning_rate=3e-4, output="o"))
    source = find_source(arguments)
    planned = stages_of_recipe(arguments, settings_of(source, arguments, 32))
    first, second = map(json.loads, planned.stages)
    wanted = measured["stages"]
    # That of the run bounds the memory of this stage's evaluations.
    assert wanted[0].pop("loss_chunk") == 0
    assert (first.pop("steps"), second.pop("steps")) == (150, 524)
    assert wanted[0].pop("steps") * wanted[0].pop("batch_size") == 150 * 64 and wanted[1].pop("steps") == 524
    assert planned.distill_weight == wanted[1].pop("distill_weight") and planned.distill == str(home / "dense")
    assert [first, second] == wanted


def test_it_is_the_two_stages_written_out(here, home, tmp_path, capsys):
    summary = here(save_dtype="float32")
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("recipe "))
    assert "match_distill (3 steps that match" in line and "9 that learn from text" in line
    assert "dense was only trained with softmax" in line and "--recipe anneal" in line
    assert summary["recipe"] == "match_distill" and summary["steps"] == 12 and summary["tokens"] == 12 * 4 * 32
    assert [stage["stage"] for stage in summary["stages"]] == ["match", "pretrain"]
    assert "--recipe match_distill" in summary["command"] and "--stages" not in summary["command"]
    from hf_sparse_attention.hub import PushArguments, push_model

    push_model(PushArguments(model=str(tmp_path / "run" / "model"), dry_run=str(tmp_path / "upload"), license="mit"))
    card = (tmp_path / "upload" / "README.md").read_text()
    assert "| recipe of `train` | `match_distill` |" in card and "stage 1 (match): 0.02; stage 2 (pretrain)" in card
    assert f"from `{(home / 'dense').name}`, weight 0.6" in card
    stages = [
        "{stage: match, steps: 3, trained: attention, learning_rate: 0.02, new_learning_rate: 0.2, alpha_share: 0.8}",
        "{steps: 9, learning_rate: 0.0015, new_learning_rate: 0.01, alpha_schedule: none, final_share: 0.02}",
    ]
    here(output=str(tmp_path / "out"), stages=stages, distill=str(home / "dense"), distill_weight=0.6)
    assert_same_weights(tmp_path / "run", tmp_path / "out")
    # The dense model in a converted folder is the same teacher, and its layers are the same targets.
    here(output=str(tmp_path / "converted"), model=str(home / "converted"))
    assert_same_weights(tmp_path / "run", tmp_path / "converted")


@pytest.mark.parametrize("name", ["entmax", "ssmax", "adaptive_entmax"])
def test_every_map_has_it(here, name):
    summary = here(map=name, eval_every=12)
    assert [stage["map"] for stage in summary["stages"]] == [name] * 2
    schedules = [stage["options"]["alpha_schedule"] for stage in summary["stages"]]
    assert schedules == (["none", "none"] if name == "ssmax" else ["linear", "none"])


def test_what_is_given_is_used(here, home):
    dense_folder(home / "teacher", seed=7)
    given = {"new_learning_rate": 1e-4, "distill": str(home / "teacher"), "distill_weight": 0.3, "final_share": 0.5}
    summary = here(**given, distill_temperature=2.0, schedule="linear", loss_chunk=16, alpha=1.25)
    for stage in summary["stages"]:
        kept = stage["options"]
        assert kept["new_learning_rate"] == 1e-4 and kept["final_share"] == 0.5 and kept["schedule"] == "linear"
    last = summary["stages"][1]["options"]
    assert {name: last[name] for name in ("distill", "distill_weight")} == {
        name: given[name] for name in ("distill", "distill_weight")
    }
    assert last["distill_temperature"] == 2.0 and last["loss_chunk"] == 16
    assert summary["sparse_attention"]["alpha"] == 1.25


@pytest.mark.parametrize("model", ["dense", "converted"])
def test_blocks_beyond_the_dense_model_say_who_wanted_it(here, home, tmp_path, model):
    """Nobody named a teacher: the error says that the recipe did, and both ways out are ways out."""
    given = {"model": str(home / model), "map": None, "eval_data": [], "eval_blocks": None, "eval_every": 500}
    for recipe in (None, "match_distill"):
        with pytest.raises(
            ValueError, match=r"block_size is 80, .* positions up to 64 .*recipe match_distill"
        ) as error:
            here(**given, recipe=recipe, block_size="80")
        assert "distill is" not in str(error.value) and not (tmp_path / "run").exists()
        assert "use --block_size 64, or one stage without a teacher: --recipe anneal --rope_yarn 2" in str(error.value)
    with pytest.raises(ValueError, match="without a teacher: --recipe anneal$"):
        here(**given | {"model": str(home / "nape")}, recipe="match_distill", block_size="80")
    assert here(**given, block_size="64")["block_size"] == 64
    long = {"recipe": "anneal", "rope_yarn": 2.0, "block_size": "80", "output": str(tmp_path / "long")}
    assert here(**given, **long)["block_size"] == 80


def test_weight_and_temperature_need_no_name_of_the_teacher(here, home, tmp_path):
    given = {"distill_weight": 0.3, "distill_temperature": 2.0, "eval_every": 12}
    summary = here(**given)
    last = summary["stages"][1]["options"]
    assert (last["distill"], last["distill_weight"], last["distill_temperature"]) == (str(home / "dense"), 0.3, 2.0)
    # Where there is no teacher they are refused, before anything is written.
    for changes in ({"recipe": "anneal"}, {"trained": "all"}, {"stage": "pretrain"}, {"map": "none"}):
        with pytest.raises(ValueError, match="distill_weight, distill_temperature needs distill"):
            here(**given, **changes, output=str(tmp_path / "other"))
    assert not (tmp_path / "other").exists()


def test_logits_of_a_chunk_are_all_there_are_in_both_stages(here, tmp_path, monkeypatch):
    """Matching needs none, but its evaluations do."""
    from hf_sparse_attention.train.head import ChunkedLoss

    own, sizes = ChunkedLoss._chunk_loss, []

    def chunk(self, hidden, targets, others):
        sizes.append(len(targets))
        return own(self, hidden, targets, others)

    monkeypatch.setattr(ChunkedLoss, "_chunk_loss", chunk)
    chunked = here(loss_chunk=48, steps=10)
    # At steps 0 and 2, 128 labels.
    assert sizes[:6] == [48, 48, 32] * 2 and set(sizes) == {48, 32}
    whole = here(output=str(tmp_path / "whole"), steps=10)
    found, expected = (torch.tensor(each["stages"][0]["eval_loss"]) for each in (chunked, whole))
    assert torch.allclose(found, expected, atol=1e-5)


def test_a_stream_counts_its_passes_once(here, tmp_path):
    """A later stage goes on from the place of the one before, whose passes are not its own."""
    few = {"streaming": True, "steps": 40, "batch_size": 16, "eval_every": 40, "checkpoint_every": 0}
    summary = here(**few)
    first, second = (stage["epochs"] for stage in summary["stages"])
    assert first > 0 and summary["epochs"] == first + second
    assert here(**few, recipe="anneal", output=str(tmp_path / "one"))["epochs"] == summary["epochs"]


def test_the_command_of_stages_that_python_gave(here):
    summary = here(stages=[{"stage": "match", "steps": 2}, {"steps": 2, "distill": None}], distill="nowhere")
    words = shlex.split(summary["command"])
    place = words.index("--stages") + 1
    assert [json.loads(word) for word in words[place : place + 2]] == summary["options"]["stages"]


def test_only_the_model_at_the_end_is_rounded(here, tmp_path):
    """Both stages in float32: the second one starts from what the first one learned, whatever is saved."""
    here(save_dtype="bfloat16", eval_every=12)
    here(eval_every=12, output=str(tmp_path / "whole"))
    saved, whole = weights(tmp_path / "run"), weights(tmp_path / "whole")
    assert all(torch.equal(saved[name], whole[name].bfloat16()) for name in whole)


def test_a_revision_is_the_teachers_too(home):
    arguments = TrainArguments(**asked(home, output="o"))
    settings = settings_of(find_source(arguments), arguments, 32)
    assert stages_of_recipe(replace(arguments, revision="v2"), settings).distill_revision == "v2"
    other = replace(arguments, revision="v2", distill="other")
    assert stages_of_recipe(other, settings).distill_revision is None


# Which recipe


AGAINST = [
    ({"alpha_share": 0.4}, "alpha_share is of a run in one stage"),
    ({"alpha_share": 0.5, "trained": "all"}, "alpha_share, trained are of a run in one stage"),
    ({"alpha_schedule": "linear"}, "alpha_schedule is of"),
    ({"alpha_start": 1.2}, "alpha_start is of"),
    ({"alpha_plateaus": 3}, "alpha_plateaus is of"),
    ({"lora_rank": 2}, "lora_rank adapters"),
    ({"rope_yarn": 2.0}, "rope_yarn"),
    ({"block_size": "32:0.5,64:0.5"}, "grow in each stage anew"),
    ({"map": "entmax", "alpha": 1.0}, "entmax begins as the dense attention at alpha 1"),
    ({"alpha": 1.0}, "asentmax begins as the dense attention at alpha 1"),
    ({"steps": 9}, "9 steps are too few"),
    ({"model": "yarn"}, "was converted with rope_yarn 4"),
]


@pytest.mark.parametrize(("changes", "reason"), AGAINST, ids=[str(changes) for changes, _ in AGAINST])
def test_an_option_of_one_stage_means_one_stage(home, changes, reason):
    changes = {**changes, "model": str(home / changes.get("model", "dense"))}
    found = choice(home, **changes)
    assert found.name == "anneal" and reason in found.reason
    with pytest.raises(ValueError, match=reason):
        choice(home, **changes, recipe="match_distill")


@pytest.mark.parametrize("changes", [{"position": "nape"}, {"model": "nape"}])
def test_other_positions_have_it_if_it_is_asked_for(home, changes):
    changes = {name: str(home / value) if name == "model" else value for name, value in changes.items()}
    assert choice(home, **changes).name == "anneal"
    assert choice(home, **changes, recipe="match_distill").name == "match_distill"


def test_no_recipe(home, here, capsys):
    """Of a control, a stage by its name and a trained model nothing is new."""
    assert choice(home, map="none") == choice(home, stage="pretrain") == Choice(None)
    summary = here(model=str(home / "trained"), eval_every=12)
    assert summary["recipe"] is None and summary["options"]["alpha_schedule"] == "none"
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("recipe ", "no recipe "))]
    # A conversion whose record was lost, as on the Hub, looks like this: said, not guessed.
    assert len(lines) == 1 and lines[0].startswith("no recipe (one stage, alpha 1.5 throughout): ")
    assert "trained was trained since it was converted (it has no conversion.json)" in lines[0]
    with pytest.raises(ValueError, match="was trained since it was converted"):
        choice(home, model=str(home / "trained"), recipe="match_distill")


def test_a_rise_is_promised_only_where_alpha_rises(home, here, capsys):
    trained = {"model": str(home / "trained"), "recipe": "anneal"}
    with pytest.raises(ValueError, match="recipe is 'anneal', but .* was trained .*, and alpha stays 1.5"):
        here(**trained)
    summary = here(**trained, alpha_schedule="linear", eval_every=12)
    assert summary["eval_alpha"] == [1.0, 1.5] and "in which alpha rises to 1.5" in capsys.readouterr().out
    summary = here(alpha_schedule="none", overwrite=True, eval_every=12)
    assert summary["eval_alpha"] == [1.5, 1.5] and "(one stage, alpha 1.5 throughout)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"map": "none"}, "recipe has no place with map 'none'"),
        ({"stage": "pretrain"}, "recipe is 'anneal', but stage 'pretrain' is given too"),
        ({"stages": ["{steps: 3}"]}, "recipe is 'anneal', but stages are given too"),
        ({"recipe": "other"}, "recipe is 'other'; choose one of match_distill, anneal"),
    ],
)
def test_a_recipe_beside_what_it_decides(here, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        here(**{"recipe": "anneal", **changes})
    assert not (tmp_path / "run").exists()


# The dense model


def test_the_teacher_is_the_dense_model(home):
    arguments = TrainArguments(**asked(home, distill=str(home / "dense")))
    source = find_source(arguments)
    tokens = torch.arange(3, 40)[None]
    logits = []
    for name in ("dense", "converted", "nape", "entmax", "heads"):
        teacher = find_teacher(replace(arguments, distill=str(home / name)), source)
        model, tensors = load_model(teacher, None, "float32", without=teacher.record.get("new"))
        assert type(model).__name__ == "LlamaForCausalLM" and not tensors.unexpected
        logits.append(model(tokens).logits)
    assert all(torch.equal(logits[0], others) for others in logits[1:])


@pytest.mark.parametrize("name", ["entmax", "heads"])
def test_a_converted_folder_without_new_parameters_is_its_own_teacher(here, home, tmp_path, name):
    summary = here(model=str(home / name), eval_every=12)
    assert summary["stages"][1]["options"]["distill"] == str(home / name)
    if name == "entmax":
        here(map="entmax", eval_every=12, output=str(tmp_path / "dense"))
        assert_same_weights(tmp_path / "run", tmp_path / "dense")


@pytest.mark.parametrize(
    ("name", "message"),
    [("trained", "sparse and was trained"), ("yarn", "converted with rope_yarn 4"), ("nowhere", "no model")],
)
def test_a_teacher_is_looked_at_before_anything_is_trained(here, home, tmp_path, name, message, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises((ValueError, OSError), match=message if name != "nowhere" else "nowhere"):
        here(distill=str(home / name))
    assert not (tmp_path / "run").exists()
    dense_folder(tmp_path / "large", vocab_size=600)
    with pytest.raises(ValueError, match="with a vocabulary of 600, the model has one of 512"):
        here(distill=str(tmp_path / "large"))


def test_weights_written_over_a_conversion_are_no_dense_model(here, home, tmp_path):
    """As `save_pretrained` of another trainer leaves it: the record of the conversion stays, the weights do not."""
    folder = shutil.copytree(home / "converted", tmp_path / "converted")
    model, _ = load_model(find_source(TrainArguments(**asked(home, model=str(folder)))), None)
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight[0, 0] += 1
    model.save_pretrained(folder)
    for changes in ({"model": str(folder)}, {"distill": str(folder)}, {"model": str(folder), "recipe": "anneal"}):
        with pytest.raises(ValueError, match=r"has a conversion.json, .* but its weights changed since: remove"):
            here(**changes)
    with pytest.raises(FileExistsError, match="holds this conversion, but weights changed since"):
        convert_model(ConvertArguments(model=str(home / "dense"), output=str(folder)))
    (folder / "conversion.json").unlink()
    assert choice(home, model=str(folder)).name is None


def test_a_teacher_with_other_tokens_or_fewer_positions(here, home, tmp_path):
    """Both compute without an error, and are wrong: the same number of tokens says nothing of which they are."""
    other = dense_folder(tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    if isinstance(vocabulary, dict):
        names = sorted(vocabulary, key=vocabulary.get)
        vocabulary[names[400]], vocabulary[names[401]] = 401, 400
    else:
        vocabulary[400], vocabulary[401] = vocabulary[401], vocabulary[400]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match=r"whose token 400 is .* \(2 differ\): it has another tokenizer"):
        here(distill=str(other))
    dense_folder(tmp_path / "short", max_position_embeddings=16)
    with pytest.raises(ValueError, match="block_size is 32, but distill is .*short, which has .* positions up to 16"):
        here(distill=str(tmp_path / "short"))
    # Without positions of its own a model learns from layers that have them.
    for changes in ({"recipe": "match_distill"}, {"stage": "match"}):
        with pytest.raises(ValueError, match="block_size is 128, but .* positions up to 64"):
            here(position="nape", block_size=128, **changes)
    assert not (tmp_path / "run").exists()


def test_a_run_goes_on_with_the_same_teacher(here, home, tmp_path):
    teacher = dense_folder(tmp_path / "teacher", seed=7)
    given = {"distill": str(teacher), "recipe": "anneal", "eval_every": 12}
    summary = here(**given)
    assert here(**given, resume="auto") == summary
    file = tmp_path / "run" / "run.json"
    known = json.loads(file.read_text())
    dense_folder(teacher, seed=8)
    with pytest.raises(ValueError, match=f"holds another run, finished: teacher '{known['teacher']}' then, "):
        here(**given, resume="auto")
    # As it was written before.
    file.write_text(json.dumps({name: value for name, value in known.items() if name != "teacher"}))
    assert here(**given, resume="auto") == summary


@pytest.mark.parametrize("name", families.NAMES)
def test_a_config_says_whether_logits_are_scaled(name):
    """What refuses a model before the first stage is what its last layer computes."""
    scaled = {"granite": {"logits_scaling": 4.0}, "cohere2": {"logit_scale": 0.25}}
    scaled["gemma3_text"] = {"final_logit_softcapping": 3.0}
    for changes in ({}, scaled.get(name, {})):
        model = families.dense_model(name, **changes)
        if scales_logits(model.config):
            with pytest.raises(ValueError, match="scales or bounds its logits"):
                chunk_loss(model, 4)
        else:
            chunk_loss(model, 4)


# Going on


def test_it_goes_on_as_what_it_was(here, home, tmp_path, monkeypatch):
    from hf_sparse_attention.train import packing

    take, calls = packing.ShuffledBlocks.take, []

    def stop(self, *arguments):
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return take(self, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(packing.ShuffledBlocks, "take", stop)
        with pytest.raises(KeyboardInterrupt):
            here()
    assert json.loads((tmp_path / "run" / "run.json").read_text())["recipe"] == "match_distill"
    for changes, message in (
        ({"recipe": "anneal"}, "holds a run of recipe 'match_distill'"),
        ({"alpha_share": 0.4}, "alpha_share is of a run in one stage"),
        ({"stage": "pretrain"}, "stage is 'pretrain', but .* holds a run of recipe 'match_distill'"),
        ({"map": "none"}, "map is 'none', but .* holds a run of recipe 'match_distill'"),
        ({"model": str(home / "trained")}, "was trained since .* holds such a run. Go on as it was begun"),
    ):
        with pytest.raises(ValueError, match=message):
            here(resume="auto", **changes)
    summary = here(resume="auto")
    here(output=str(tmp_path / "whole"))
    assert_same_weights(tmp_path / "run", tmp_path / "whole")
    for stage in ("1-match", "2-pretrain"):
        assert metrics(tmp_path / "run" / "stages" / stage) == metrics(tmp_path / "whole" / "stages" / stage)
    assert here(resume="auto")["eval_loss"] == summary["eval_loss"]


@pytest.mark.parametrize("stages", [[], ["{steps: 3}"]], ids=["recipe", "one"])
def test_what_the_first_stage_refuses_costs_no_earlier_run(here, home, tmp_path, stages):
    given = {"stages": stages, "eval_every": 12}
    nowhere = {"train_data": [str(home / "nowhere.txt")]}
    with pytest.raises(FileNotFoundError, match="nowhere"):
        here(**given, **nowhere)
    assert not (tmp_path / "run").exists()
    here(**given)
    before = {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()}
    for changes in (nowhere, {"block_size": 65}, {"new_learning_rate": 1e-3, "map": "entmax"}):
        with pytest.raises((OSError, ValueError)):
            here(**given, **changes, overwrite=True)
        assert {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()} == before
    summary = here(**given, overwrite=True, seed=1)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["options"]["seed"] == 1
    assert here(**given, seed=1, resume="auto")["eval_loss"] == summary["eval_loss"]


def test_a_run_of_one_stage_from_before_goes_on_in_one(here, home, tmp_path, capsys):
    """As it was written when there was no recipe: it is neither begun anew nor made two."""
    here(recipe="anneal", keep_checkpoints=9)
    folder = tmp_path / "run"
    shutil.copytree(folder, tmp_path / "whole")
    for name in ("step-00000009", "step-00000012"):
        shutil.rmtree(folder / "checkpoints" / name)
    shutil.rmtree(folder / "model")
    (folder / "summary.json").unlink()
    known = json.loads((folder / "run.json").read_text())
    assert "recipe" not in known and known["stage"] == "pretrain" and known["alpha_share"] == 0.5
    known.pop("distill_revision")
    (folder / "run.json").write_text(json.dumps(known))
    with pytest.raises(ValueError, match="recipe is 'match_distill', but .* holds a run of recipe 'anneal'"):
        here(resume="auto", recipe="match_distill")
    capsys.readouterr()
    assert here(resume="auto")["recipe"] == "anneal"
    output = capsys.readouterr().out
    assert "step-00000006, step 6" in output and "holds such a run" in output
    assert_same_weights(folder, tmp_path / "whole")
    assert metrics(folder) == metrics(tmp_path / "whole")
    # By the path of a checkpoint too.
    here(resume=str(tmp_path / "whole" / "checkpoints" / "step-00000003"), output=str(tmp_path / "whole"))
    assert metrics(folder) == metrics(tmp_path / "whole")


def test_stages_by_hand_do_not_become_a_recipe(here):
    here(stages=["{stage: match, steps: 2}", "{steps: 2}"])
    for changes in ({}, {"recipe": "match_distill"}, {"recipe": "anneal"}, {"stage": "pretrain"}):
        with pytest.raises(ValueError, match=r"holds a run of stages \(1-match, 2-pretrain\)"):
            here(resume="auto", **changes)


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [False, True], ids=["ddp", "fsdp2"])
def test_two_processes_do_the_same(home, tmp_path, fsdp):
    values = asked(home, output=str(tmp_path / "two"), batch_size=2, loss_chunk=16)
    log = tmp_path / "log"
    assert train_together(values, log, fsdp=fsdp) == [0, 0], log.with_name("log-0").read_text()
    assert log.with_name("log-0").read_text().count("recipe match_distill") == 1
    train_model(TrainArguments(**{**values, "output": str(tmp_path / "one"), "batch_size": 4}))
    for stage in ("1-match", "2-pretrain"):
        assert_close_metrics(tmp_path / "one" / "stages" / stage, tmp_path / "two" / "stages" / stage)

"""Model folders that were changed by hand or come from a newer version, and pickled weights: each way to load, convert
or publish them refuses, and says what is wrong and what is allowed."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from training_cases import dense_folder
from transformers import AutoConfig, AutoModelForCausalLM

import hf_sparse_attention
from hf_sparse_attention.checkpoint import examine
from hf_sparse_attention.config import VERSION
from hf_sparse_attention.convert import ConvertArguments, convert_model
from hf_sparse_attention.hub import PushArguments, push_model

MAPS = "entmax, sparsemax, asentmax, ssmax, adaptive_entmax"
CHANGES = [
    ({"map": "supermax"}, rf"sparse_attention\.map is 'supermax'; choose one of {MAPS}$"),
    ({"map": "supermax", "version": "9.9"}, f"choose one of {MAPS}. It was written by .* 9.9, this is .*--upgrade"),
    ({"map": ["entmax"]}, rf"sparse_attention\.map is \['entmax'\]; choose one of {MAPS}"),
    ({"map": None}, f"map is None; choose one of {MAPS}"),
    ({"map": "entmax"}, "10 parameters.* of (another|this) map|10 parameters, first .*two different models"),
    ({"alpha": "x"}, r"sparse_attention\.alpha is 'x'; it must be a number, asentmax takes 1 <= alpha <= 4"),
    ({"alpha": 0.5}, r"sparse_attention\.alpha is 0\.5; asentmax takes 1 <= alpha <= 4"),
    ({"alpha": True}, "alpha is True; it must be a number"),
    ({"alpha": float("nan")}, "alpha is nan; asentmax takes"),
    ({"position": "alibi"}, r"sparse_attention\.position is 'alibi'; choose one of rope, nape, nope"),
    ({"layers": "some"}, r"sparse_attention\.layers is 'some'; choose all, full_attention or a list"),
    ({"layers": [7]}, r"sparse_attention\.layers names \[7\], but the model has layers 0 to 1"),
    ({"train_length": -1}, r"train_length is -1; it must be an integer from 1"),
    (
        {"format": 2, "version": "9.9"},
        f"format is 2, written by .* 9.9; this is {VERSION}, which reads .* 1 to 1.*upgr",
    ),
    ({"format": 0}, "format is 0"),
    ({"version": 3}, "version is 3; it must be"),
    (
        {"softcap": 5},
        "unknown fields softcap; known: map, alpha, position, layers, heads, train_length, version, format$",
    ),
    ({"softcap": 5, "version": "9.9"}, "unknown fields softcap; known: .*written by .* 9.9"),
]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tampering")
    dense_folder(folder / "dense")
    convert_model(ConvertArguments(model=str(folder / "dense"), output=str(folder / "sparse")))
    return folder


@pytest.fixture
def model(source, tmp_path):
    return shutil.copytree(source / "sparse", tmp_path / "sparse")


def edit(folder, change) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def ways(folder) -> dict:
    """Every way that a folder is read."""
    arguments = PushArguments(model=str(folder), dry_run=str(folder.parent / "up"))
    return {
        "Auto class": lambda: AutoModelForCausalLM.from_pretrained(folder),
        "class": lambda: hf_sparse_attention.SparseLlamaForCausalLM.from_pretrained(folder),
        "evaluate, report": lambda: examine(str(folder)),
        "push": lambda: push_model(arguments),
    }


@pytest.mark.parametrize(("block", "says"), CHANGES, ids=[str(change) for change, _ in CHANGES])
def test_a_changed_block_is_refused_everywhere(model, block, says):
    edit(model, lambda config: config["sparse_attention"].update(block))
    for name, way in ways(model).items():
        if name == "evaluate, report" and ("layers" in block or block == {"map": "entmax"}):
            # Looks at the config alone; loading the model, which follows, refuses.
            continue
        with pytest.raises((ValueError, TypeError), match=says):
            way()
    assert not (model.parent / "up").exists()


@pytest.mark.parametrize("name", ["map", "alpha", "position", "layers", "train_length", "version", "format"])
def test_a_block_with_a_field_taken_out_is_refused(model, name):
    # A default in its place might be another function.
    edit(model, lambda config: config["sparse_attention"].pop(name))
    for way in ways(model).values():
        with pytest.raises(ValueError, match=f"sparse_attention lacks {name}"):
            way()


def test_a_config_that_names_the_dense_class_is_refused(model):
    def rename(config):
        config.update(model_type="llama", architectures=["LlamaForCausalLM"])

    edit(model, rename)
    for way in ways(model).values():
        with pytest.raises((ValueError, KeyError), match="softmax"):
            way()
    # Also where what guards the activation was taken away.
    edit(model, lambda config: config.update(hidden_act="silu"))
    for name, way in ways(model).items():
        if name != "class":
            with pytest.raises(ValueError, match=r"has `sparse_attention` .*model_type 'llama'.*softmax"):
                way()
    with pytest.raises(ValueError, match="it should be 'sparse_llama'"):
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))


def test_a_config_without_the_block_is_refused(model):
    edit(model, lambda config: config.pop("sparse_attention"))
    for way in ways(model).values():
        with pytest.raises(ValueError, match="has no `sparse_attention`"):
            way()


def test_pickled_weights_are_refused_everywhere(source, model, tmp_path):
    dense = shutil.copytree(source / "dense", tmp_path / "dense")
    for folder in (dense, model):
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    for way in ways(model).values():
        with pytest.raises(OSError, match=r"\.bin file is a pickle"):
            way()
    with pytest.raises(OSError, match=r"\.bin file is a pickle"):
        AutoModelForCausalLM.from_pretrained(dense, attn_implementation="asentmax")
    with pytest.raises(OSError, match=r"\.bin file is a pickle"):
        convert_model(ConvertArguments(model=str(dense), output=str(tmp_path / "out")))
    with pytest.raises(ValueError, match="use_safetensors is False"):
        hf_sparse_attention.SparseLlamaForCausalLM.from_pretrained(model, use_safetensors=False)
    assert not (tmp_path / "out").exists()
    # An index may name them too.
    weights = {"weight_map": {"lm_head.weight": "pytorch_model.bin"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(weights))
    with pytest.raises(OSError, match=r"names pytorch_model\.bin\. .*pickle"):
        examine(str(model))
    # What is not ours loads as ever.
    assert type(AutoModelForCausalLM.from_pretrained(dense)).__name__ == "LlamaForCausalLM"

"""What training tells the trackers of its attention, layer by layer, against the dense weights."""

import json
import sqlite3
import struct

import accelerate
import families
import pytest
import torch
from report_cases import TEXT, sparse_folder
from training_cases import dense_folder, metrics, options, python, write_text
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_sparse_attention.models import attention_layers
from hf_sparse_attention.train import TrainArguments, train_model
from hf_sparse_attention.train.measures import attention_statistics


@pytest.mark.parametrize("map_name", ["asentmax", "adaptive_entmax", "ssmax"])
def test_the_numbers_of_a_layer_are_those_of_its_weights(tmp_path, map_name):
    dense_folder(tmp_path / "dense", initializer_range=0.3, max_position_embeddings=512)
    folder = sparse_folder(tmp_path, map=map_name)
    model = AutoModelForCausalLM.from_pretrained(folder).double().eval()
    ids = torch.tensor(AutoTokenizer.from_pretrained(folder)(TEXT)["input_ids"][:120]).view(2, 60)
    means, layers = attention_statistics(model, {"input_ids": ids, "labels": ids})
    with torch.no_grad():
        weights = model(ids, use_cache=False, output_attentions=True).attentions
    assert list(layers) == [f"{name}/{layer}" for layer in (0, 1) for name in ("support", "zeros", "scale", "alpha")]
    for layer, attention in attention_layers(model):
        support = (weights[layer] > 0).sum(-1).double().mean().item()
        assert layers[f"support/{layer}"] == pytest.approx(support, rel=1e-6)
        assert layers[f"zeros/{layer}"] == pytest.approx(1 - support / 30.5, abs=1e-6)
        alpha = {"asentmax": 1.5, "ssmax": 1.0}.get(map_name)
        if alpha is None:
            alpha = (1 + attention.sparse_alpha.alpha_bias.sigmoid()).mean().item()
        assert layers[f"alpha/{layer}"] == pytest.approx(alpha, rel=1e-6)
    for name in ("support", "zeros", "scale"):
        mean = sum(layers[f"{name}/{layer}"] for layer in (0, 1)) / 2
        assert means[name] == pytest.approx(mean, rel=1e-6)
    assert ("head_alpha" in means) == (map_name == "adaptive_entmax")
    assert (layers["scale/0"] == 1) == (map_name == "adaptive_entmax")


def test_the_trackers_are_told_at_every_evaluation(tmp_path, monkeypatch):
    dense_folder(tmp_path / "dense", initializer_range=0.3)
    write_text(tmp_path / "train.txt")
    write_text(tmp_path / "eval.txt", seed=1)
    told = []
    monkeypatch.setattr(accelerate.Accelerator, "log", lambda self, values, step: told.append((step, values)))
    train_model(TrainArguments(**options(tmp_path, steps=8, eval_every=4)))
    layers = [(step, values) for step, values in told if any(name.startswith("layers/") for name in values)]
    names = {f"layers/{name}/{layer}" for layer in (0, 1) for name in ("support", "zeros", "scale", "alpha")}
    assert [step for step, _ in layers] == [0, 4, 8]
    assert all(set(values) == names for _, values in layers)
    # At step 0 the model is the dense one, at the end it is not.
    assert [layers[0][1][f"layers/{name}/1"] for name in ("zeros", "scale", "alpha")] == [0, 1, 1]
    assert layers[-1][1]["layers/alpha/1"] == 1.5 and layers[-1][1]["layers/zeros/1"] > 0
    written = [line for line in metrics(tmp_path / "run") if line["kind"] == "layers"]
    assert [line["step"] for line in written] == [0, 4, 8]
    assert written[-1]["support/0"] == layers[-1][1]["layers/support/0"]


TRACKED = """
import sys
from pathlib import Path
from training_cases import run
run(Path(sys.argv[1]), report_to=[sys.argv[2]], run_name="tracked")
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_the_trackers_keep_what_they_are_told(tmp_path, name):
    """What a run without a network leaves in the tracker's own file, read back: the lines of metrics.jsonl."""
    pytest.importorskip(name, reason=f"{name} is not installed")
    dense_folder(tmp_path / "dense", initializer_range=0.3)
    write_text(tmp_path / "train.txt")
    write_text(tmp_path / "eval.txt", seed=1)
    home = {"HOME": str(tmp_path), "HF_HOME": str(tmp_path / "hf"), "WANDB_DIR": str(tmp_path)}
    process = python(TRACKED, str(tmp_path), name, WANDB_MODE="offline", **home)
    said = process.communicate(timeout=240)[0]
    assert process.returncode == 0, said
    told = {}
    for step, values in {"wandb": kept_by_wandb, "trackio": kept_by_trackio}[name](tmp_path):
        told.setdefault(step, {}).update({key: value for key, value in values.items() if key.startswith("layers/")})
    lines = {line["step"]: line for line in metrics(tmp_path / "run") if line["kind"] == "layers"}
    assert list(lines) == [0, 4, 8]
    names = [f"{name}/{layer}" for layer in (0, 1) for name in ("support", "zeros", "scale", "alpha")]
    wanted = {step: {f"layers/{name}": line[name] for name in names} for step, line in lines.items()}
    assert {step: values for step, values in told.items() if values} == wanted


def kept_by_trackio(folder):
    (path,) = folder.glob("hf/trackio/*.db")
    database = sqlite3.connect(path)
    rows = database.execute("select step, metrics from metrics").fetchall()
    database.close()
    return [(step, json.loads(text)) for step, text in rows]


def kept_by_wandb(folder):
    """Of the file of an offline run: chunks of records in blocks of 32 KiB, as in LevelDB's log."""
    from wandb.proto import wandb_internal_pb2

    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    data, place, record, found = path.read_bytes(), 7, b"", []
    assert data.startswith(b":W&B")
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        _, size, kind = struct.unpack_from("<IHB", data, place)
        record += data[place + 7 : place + 7 + size]
        place += 7 + size
        # A whole record, or the last chunk of one.
        if kind in (1, 4):
            history = wandb_internal_pb2.Record.FromString(record).history
            values = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in history.item}
            found.append((history.step.num, values))
            record = b""
    return found


def test_a_look_at_a_compiled_model_compiles_nothing():
    model = families.sparse_model(families.dense_model("llama"), "asentmax")
    ids, graphs = families.tokens(2, 12), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(model, backend=backend)
    expected = attention_statistics(model, {"input_ids": ids})
    assert attention_statistics(compiled, {"input_ids": ids}) == expected
    assert not graphs

"""Publishing: the folder that is uploaded, its card, what is refused, and what happens without the package."""

import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from training_cases import dense_folder
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTNeoXConfig

import hf_sparse_attention
from hf_sparse_attention.checkpoint import examine
from hf_sparse_attention.config import SparseAttentionConfig
from hf_sparse_attention.convert import ConvertArguments, convert_model
from hf_sparse_attention.hub import PushArguments, push_model, upload
from hf_sparse_attention.hub.content import data_file
from hf_sparse_attention.hub.evidence import local_name, without_folders
from hf_sparse_attention.models import MODULE, sparse_config

TOKEN = "hf_" + "Abc123" * 6
PLACE = "/machine/of/someone"
CARDS = [
    file for file in (Path(hf_sparse_attention.__file__).parents[1] / "model_cards").glob("*.md")
    if file.name != "README.md"
]  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """dense/ and sparse/, which nothing changes."""
    folder = tmp_path_factory.mktemp("hub")
    dense_folder(folder / "dense")
    arguments = ConvertArguments(model=str(folder / "dense"), output=str(folder / "sparse"), train_length=64)
    convert_model(arguments)
    return folder


@pytest.fixture
def model(source, tmp_path):
    """run/model with a copy of the converted model."""
    return copy(source / "sparse", tmp_path / "run" / "model")


def copy(folder: Path, to: Path) -> Path:
    to.mkdir(parents=True)
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


def write(path: Path, content) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def change(path: Path, **values) -> None:
    write(path, {**json.loads(path.read_text()), **values})


def block(model: Path) -> dict:
    return json.loads((model / "config.json").read_text())["sparse_attention"]


def summary(model: Path, **changes) -> dict:
    """What `train` writes."""
    values = {
        "base_model": "someone/dense-1b", "base_commit": "a" * 40, "sparse_attention": block(model),
        "fingerprint": examine(str(model)).fingerprint, "map": "asentmax",
        "steps": 1234, "tokens": 56_789_012, "epochs": 0.375, "block_size": 1024, "blocks_per_step": 48,
        "skipped_steps": 3, "learning_rate": 0.00017, "new_learning_rate": 0.0023,
        "options": {"schedule": "cosine", "warmup_share": 0.02, "final_share": 0.1, "alpha_schedule": "linear",
                    "alpha_share": 0.55, "weight_decay": 0.07, "beta1": 0.9, "beta2": 0.93, "clip": 1.5,
                    "dtype": "float32", "lora_rank": 0, "seed": 17},
        "train_loss": 2.71828, "eval_loss": [[0, 3.5], [1234, 2.8125]], "eval_alpha": [1.0, 1.5],
        "attention": {"support": 33.25, "visible": 512.5, "zeros": 0.9351, "scale": 1.0625},
        "train_data": [f"{PLACE}/books.jsonl", "someone/stories"], "eval_data": [f"{PLACE}/held.txt"],
        "parameters": 9, "trainable_parameters": 9, "new_parameters": 1, "hardware": "2 x Some GPU",
        "mixed_precision": "bf16", "seconds": 4321.5, "tokens_per_second": 13141.0,
        "versions": {"hf-sparse-attention": "0.1.0", "torch": "2.99.1"},
        "command": f"hf-sparse-attention train --model someone/dense-1b --output {PLACE}/run --train_data "
                   f"{PLACE}/books.jsonl someone/stories",
    }  # fmt: skip
    return {**values, **changes}


def results(model: Path, **changes) -> dict:
    """What `evaluate` writes."""
    cells = [
        {"model": label, "task": "perplexity", "length": length, "windows": 8, "tokens": 8 * (length - 1),
         "documents": 4, "tokens_sha256": "t", "fingerprint": f"{label}{length}", "note": None, "finished": True,
         **({"missing": "no document has 4096 tokens"} if length == 4096 else
            {"loss": loss, "standard_error": 0.011, "perplexity": value, "last_quarter": loss, "bits_per_byte": 1.1,
             "last_quarter_standard_error": 0.02, "positions": []})}
        for label, loss, value in (("dense", 2.5, 12.1825), ("sparse", 2.4375, 11.4444))
        for length in (512, 4096)
    ]  # fmt: skip
    values = {
        "format": 1, "versions": {"hf_sparse_attention": "0.1.0", "transformers": "5.23.0", "torch": "2.99.1"},
        "arguments": {"models": [f"dense={PLACE}/dense", f"sparse={PLACE}/run/model"], "concatenate": False,
                      "limit": None, "seed": 0},
        "data": {"names": ["held.txt"], "documents": 4, "characters": 99, "sha256": "d" * 64},
        "models": [
            {"label": "dense", "path": f"{PLACE}/dense", "fingerprint": "other", "max_position_embeddings": 64},
            {"label": "sparse", "path": f"{PLACE}/run/model", "fingerprint": examine(str(model)).fingerprint,
             "max_position_embeddings": 64},
        ],
        "lengths": [512, 4096], "cells": cells, "other_cells": [],
    }  # fmt: skip
    return {**values, **changes}


def report(model: Path, **changes) -> dict:
    """What `report` writes."""
    mean = {
        "support": 21.75,
        "visible": 256.5,
        "zeros": 0.9152,
        "block_sparsity": 0.4375,
        "scale": 1.1875,
        "alpha": 1.5,
    }
    values = {
        "format": 1, "model": f"{PLACE}/run/model", "sparse_attention": block(model),
        "fingerprint": examine(str(model)).fingerprint, "arguments": {"data": [f"{PLACE}/held.txt"]},
        "windows": 6, "length": 512, "mean": mean, "layers": [],
    }  # fmt: skip
    return {**values, **changes}


def evidence(model: Path) -> None:
    """All three files where push looks for them."""
    write(model.parent / "summary.json", summary(model))
    (model / "conversion.json").unlink()
    write(model.parent / "evaluation" / "results.json", results(model))
    write(model.parent / "report" / "report.json", report(model))


def dry_run(model: Path, output: Path, **options) -> ModelCard:
    assert push_model(PushArguments(model=str(model), dry_run=str(output), **options)) == output
    return ModelCard.load(output / "README.md")


def python(code: str, *, hidden: bool, folder: Path) -> list[str]:
    """What a fresh process could load and what not; `hidden` takes the package away from it."""
    block = (
        "import sys\n"
        "class Hidden:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] == 'hf_sparse_attention':\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name='hf_sparse_attention')\n"
        "sys.meta_path.insert(0, Hidden())\n"
    )
    tell = (
        "from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM\n"
        "def tell(function):\n"
        "    try:\n"
        "        print('LOADED', type(function()).__name__, flush=True)\n"
        "    except Exception as error:\n"
        "        print('FAILED', ' '.join(str(error).split()), flush=True)\n"
        "folder = sys.argv[1]\n"
    )
    environment = {
        **os.environ, "PYTHONPATH": str(Path(hf_sparse_attention.__file__).parents[1]), "OMP_NUM_THREADS": "1",
        "HF_MODULES_CACHE": str(folder.parent / "modules"),
    }  # fmt: skip
    result = subprocess.run(
        [sys.executable, "-c", (block if hidden else "import sys\n") + tell + code, str(folder)],
        env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    # Transformers asks its question on the same line.
    return [
        line[line.index(word) :]
        for line in result.stdout.splitlines()
        for word in ("LOADED", "FAILED")
        if word in line
    ]


def test_the_folder_is_whole_and_loads_with_equal_logits(model, tmp_path, capsys):
    before = {file.name: file.read_bytes() for file in model.iterdir()}
    dry_run(model, tmp_path / "up", repo_id="someone/story")
    printed = capsys.readouterr().out
    names = {file.name for file in (tmp_path / "up").iterdir()}
    assert names == {
        "LICENSE", "README.md", "config.json", "generation_config.json", "model.safetensors",
        "modeling_hf_sparse_attention.py", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert all(name in printed for name in names)
    assert {file.name: file.read_bytes() for file in model.iterdir()} == before
    assert (tmp_path / "up" / "model.safetensors").read_bytes() == before["model.safetensors"]

    ids = torch.arange(3, 40)[None]
    first, second = (AutoModelForCausalLM.from_pretrained(folder) for folder in (model, tmp_path / "up"))
    assert type(second).__name__ == "SparseLlamaForCausalLM"
    assert torch.equal(first(ids).logits, second(ids).logits)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "up")) == 512
    # What was measured of the one is true of the other.
    assert examine(str(tmp_path / "up")).fingerprint == examine(str(model)).fingerprint
    # A pushed folder can be pushed again.
    dry_run(tmp_path / "up", tmp_path / "again")
    assert (tmp_path / "again" / "config.json").read_bytes() == (tmp_path / "up" / "config.json").read_bytes()


def test_sharded_weights_go_with_their_index(source, tmp_path):
    dense_folder(tmp_path / "dense", shard="40KB")
    convert_model(ConvertArguments(model=str(tmp_path / "dense"), output=str(tmp_path / "sparse")))
    dry_run(tmp_path / "sparse", tmp_path / "up")
    assert len(list((tmp_path / "up").glob("model-*.safetensors"))) > 1
    AutoModelForCausalLM.from_pretrained(tmp_path / "up")


def test_without_the_package_nothing_loads(source, tmp_path):
    # What push uploads, and what save_pretrained wrote.
    dry_run(source / "sparse", tmp_path / "up")
    attempts = (
        "tell(lambda: AutoModelForCausalLM.from_pretrained(folder))\n"
        "tell(lambda: AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True))\n"
        "tell(lambda: LlamaForCausalLM.from_pretrained(folder))\n"
    )
    copy(source / "sparse", tmp_path / "up-saved")
    lines = python(attempts + "folder += '-saved'\n" + attempts, hidden=True, folder=tmp_path / "up")
    assert len(lines) == 6
    for plain, trusted, own_class in (lines[:3], lines[3:]):
        assert plain.startswith("FAILED") and "custom code" in plain
        assert trusted.startswith("FAILED") and "pip install hf-sparse-attention" in trusted
        assert own_class.startswith("FAILED") and "pip install hf-sparse-attention" in own_class


def test_with_the_package_no_flag_is_needed(source, tmp_path):
    dry_run(source / "sparse", tmp_path / "up")
    lines = python(
        "tell(lambda: AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True))\n"
        "assert 'hf_sparse_attention' in sys.modules\n"
        "tell(lambda: AutoModelForCausalLM.from_pretrained(folder))\n"
        "tell(lambda: AutoTokenizer.from_pretrained(folder))\n"
        "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder + '-saved')\n"
        "tell(lambda: AutoModelForCausalLM.from_pretrained(folder + '-saved', trust_remote_code=True))\n",
        hidden=False, folder=tmp_path / "up",
    )  # fmt: skip
    assert lines[:2] == ["LOADED SparseLlamaForCausalLM"] * 2 and lines[2].startswith("LOADED")
    assert lines[3] == "LOADED SparseLlamaForCausalLM"
    # Nothing of the package was copied into the folder that was saved but the module of every folder.
    (module,) = (tmp_path / "up-saved").glob("*.py")
    assert module.name == f"{MODULE}.py" and module.read_bytes() == (tmp_path / "up" / module.name).read_bytes()


def test_a_saved_config_names_the_classes_of_its_family(tmp_path):
    config = sparse_config(GPTNeoXConfig(num_hidden_layers=1), SparseAttentionConfig(map="entmax"))
    config.save_pretrained(tmp_path)
    names = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert names == {
        "AutoConfig": f"{MODULE}.SparseGPTNeoXConfig",
        "AutoModel": f"{MODULE}.SparseGPTNeoXModel",
        "AutoModelForCausalLM": f"{MODULE}.SparseGPTNeoXForCausalLM",
        "AutoModelForSequenceClassification": f"{MODULE}.SparseGPTNeoXForSequenceClassification",
    }
    module = {}
    exec((tmp_path / f"{MODULE}.py").read_text(), module)
    assert module["__getattr__"]("SparseGPTNeoXModel") is hf_sparse_attention.SparseGPTNeoXModel


def test_every_number_of_the_card_is_in_a_file(model, tmp_path):
    evidence(model)
    card = dry_run(model, tmp_path / "up", repo_id="someone/story")
    for text in (
        "1,234", "56,789,012", "0.38", "1,024", "| 48 |", "0.00017", "0.0023", "over the first 55% of the steps",
        "betas 0.9 and 0.93, weight decay 0.07", "clipped at 1.5", "mixed precision bf16", "| 17 |", "2.7183",
        "3.5000 at step 0 (alpha 1), 2.8125 at step 1,234 (alpha 1.5)", "2 x Some GPU", "4,321.5 s", "13,141",
        "torch 2.99.1",
        "| sparse | 11.44 | - |", "| dense | 12.18 | - |", "2.438 ±0.011", "no document has 4096 tokens",
        "21.8", "256.5", "91.5%", "43.8%", "1.188", "someone/dense-1b", "a" * 40, "someone/stories", "`books.jsonl`",
        'from_pretrained("someone/story")', "pip install hf-sparse-attention", "arXiv 2506.16640", "GGUF", "vLLM",
        "entmax((delta + beta (log n)^gamma) z)", "steps left out | 3",
    ):  # fmt: skip
        assert text in card.text, text
    assert "missing" not in card.text
    assert PLACE not in card.content and str(tmp_path) not in card.content
    data = card.data
    assert data.library_name == "transformers" and data.pipeline_tag == "text-generation"
    assert data.base_model == "someone/dense-1b" and data.base_model_relation == "finetune"
    assert data.datasets == ["someone/stories"]
    assert {"hf-sparse-attention", "asentmax", "arxiv:2506.16640"} <= set(data.tags)
    (result,) = data.eval_results
    assert data.model_name == "story"
    assert (result.metric_type, result.metric_value) == ("perplexity", 11.4444)
    assert "512" in result.metric_name and result.dataset_name == "held.txt"


def test_a_card_says_what_each_stage_did(model, tmp_path):
    evidence(model)
    whole = summary(model)
    options = {**whole["options"], "alpha_schedule": "linear", "lora_rank": 0}
    match = summary(model, stage="match", steps=10, train_loss=0.0844, eval_alpha=[1.01, 1.5], options=options)
    later = {**options, "alpha_schedule": "none", "lora_rank": 4, "distill": f"{PLACE}/dense", "distill_weight": 0.5,
             "distill_temperature": 2.0}  # fmt: skip
    train = summary(model, stage="pretrain", steps=90, learning_rate=0.5, options=later)
    write(model.parent / "summary.json", {**whole, "stages": [match, train]})
    text = dry_run(model, tmp_path / "up").text
    for line in (
        "its layers learned the outputs of the dense attention for 10 steps",
        "then its pretraining continued for 90 steps",
        "1 (match): the map's own parameters alone; stage 2 (pretrain): LoRA adapters of rank 4, merged",
        "1 (match): linear, from 1.01 to 1.5 over the first 55% of the steps; stage 2 (pretrain): 1.5 from the first",
        "1 (match): 0.00017; stage 2 (pretrain): 0.5",
        "1 (match): squared error of the attention outputs, relative to their size 0.0844",
        "1 (match): none; stage 2 (pretrain): from `dense`, weight 0.5, temperature 2",
    ):
        assert line in text, line
    assert "all parameters" not in text
    options = {**options, "trained": "attention", "alpha_start": 1.3, "alpha_plateaus": 4}
    write(model.parent / "summary.json", {**whole, "options": options, "eval_alpha": None})
    text = dry_run(model, tmp_path / "again").text
    assert "the attention layers alone" in text and "from 1.3 to 1.5" in text and "in 4 plateaus" in text
    assert "its pretraining continued for 1,234 steps" in text
    assert "start of the factor" not in text
    write(model.parent / "summary.json", {**whole, "options": {**options, "scale_start": "normal"}})
    assert "| start of the factor | normal |" in dry_run(model, tmp_path / "normal").text


@pytest.mark.parametrize(
    ("rope", "said"),
    [
        ({}, "the dense model's own rotary positions"),
        ({"rope_yarn": 8.0}, "rotary positions, stretched 8 times by YaRN from 64 to 512 tokens"),
        (
            {"rope_yarn": 2.5, "max_positions": 100, "rope_theta": 500_000.0},
            "rotary positions, stretched 2.5 times by YaRN from 64 to 100 tokens, theta changed to 500,000",
        ),
        ({"rope_theta": 2_500_000.0, "position": "nope"}, "no positions in attention at all"),
    ],
)
def test_the_card_says_what_was_done_to_the_positions(source, tmp_path, rope, said):
    model = tmp_path / "run" / "model"
    convert_model(ConvertArguments(model=str(source / "dense"), output=str(model), train_length=64, **rope))
    card = dry_run(model, tmp_path / "up").text
    assert f"| positions | `{rope.get('position', 'rope')}`: {said} |" in card


def test_positions_whose_past_is_unknown_are_told_by_their_numbers(model, tmp_path):
    """A dense model may have had them already: then the card does not say that they were changed."""
    evidence(model)
    rope = {"rope_type": "llama3", "factor": 8.0, "rope_theta": 500_000.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 32}  # fmt: skip
    change(model / "config.json", rope_parameters=rope)
    card = dry_run(model, tmp_path / "up").text
    assert "| positions | `rope`: rotary positions, rescaled as `llama3`, factor 8, theta 500,000 |" in card
    run = summary(model)
    write(model.parent / "summary.json", {**run, "stages": [run, {**run, "options": {"rope_theta": 500_000.0}}]})
    assert "factor 8, theta changed to 500,000 |" in dry_run(model, tmp_path / "stages").text


def test_needles_reach_the_card(model, tmp_path):
    """Results without perplexity: the mean over depths, and nothing of a length that was not measured."""
    evidence(model)
    cell = {"task": "passkey", "answers": "forced", "note": None, "tokens_sha256": "t", "samples": 4,
            "standard_error": 0.1, "finished": True}  # fmt: skip
    cells = [
        {**cell, "model": label, "length": 512, "depth": depth, "exact_match": score}
        for label, scores in (("dense", (1.0, 0.5)), ("sparse", (0.75, 0.5)))
        for depth, score in zip((0.0, 1.0), scores, strict=True)
    ]
    content = results(model, cells=cells, lengths=[512], tasks=["passkey"])
    write(model.parent / "evaluation" / "results.json", content)
    card = dry_run(model, tmp_path / "up")
    (result,) = card.data.eval_results
    assert (result.dataset_type, result.metric_type, result.metric_value) == ("passkey", "exact_match", 0.625)
    assert result.metric_name == "exact match at 512 tokens, mean over depths"
    assert result.metric_args == {"samples": 8, "depths": [0.0, 1.0]} and result.dataset_args is None
    assert "62.5" in card.text
    write(model.parent / "evaluation" / "results.json", {**content, "cells": cells[:2]})
    with pytest.raises(ValueError, match="lacks passkey of sparse at 512"):
        dry_run(model, tmp_path / "again", results=str(model.parent / "evaluation" / "results.json"))


def test_a_limited_evaluation_is_marked_in_the_metadata(model, tmp_path):
    """Else its numbers stand beside those of whole sets as if they were of one."""
    evidence(model)
    whole = results(model)
    few = {**whole, "arguments": {**whole["arguments"], "limit": 4, "seed": 3}}
    few["cells"] = [{**cell, "drawn": {"windows": 1, "length": 4096}} for cell in few["cells"]]
    needle = {
        "task": "passkey", "answers": "forced", "note": None, "tokens_sha256": "t", "samples": 4, "finished": True,
        "standard_error": 0.1, "depth": 0.5, "exact_match": 0.5,
    }  # fmt: skip
    few["cells"] += [{**needle, "model": name, "length": n} for name in ("dense", "sparse") for n in (512, 4096)]
    few["tasks"] = ["perplexity", "passkey"]
    write(model.parent / "evaluation" / "results.json", few)
    found = dry_run(model, tmp_path / "up").data.eval_results
    assert [(row.metric_name, row.metric_args) for row in found] == [
        ("perplexity, windows of 512 tokens (limited to 8 windows)", {"windows": 8, "tokens": 8 * 511}),
        ("exact match at 512 tokens (limited to 4 samples)", {"samples": 4, "depths": [0.5]}),
        ("exact match at 4096 tokens (limited to 4 samples)", {"samples": 4, "depths": [0.5]}),
    ]
    assert all(row.dataset_args["limit"] == 4 and row.dataset_args["seed"] == 3 for row in found)


def test_missing_numbers_are_said_to_be_missing(model, tmp_path, caplog):
    evidence(model)
    partial = summary(model)
    for name in ("tokens", "hardware", "eval_loss", "command", "options"):
        del partial[name]
    write(model.parent / "summary.json", partial)
    write(model.parent / "report" / "report.json", report(model, mean={"zeros": 0.5}))
    (model.parent / "evaluation" / "results.json").unlink()
    text = dry_run(model, tmp_path / "up").text
    for line in (
        "| tokens | missing |", "| hardware | missing |", "| held-out loss | missing |", "The command is missing",
        "| learning rate schedule | missing |", "| seed | missing |", "| keys that carry weight, mean | missing |",
        "The results are missing",
    ):  # fmt: skip
        assert line in text, line
    assert "50.0%" in text and "1,234" in text
    # And to the one who pushes, with the way out; the report is there.
    assert f"--output_dir {model.parent}/evaluation, or name them with --results" in caplog.text.replace("`", "")
    assert "--report" not in caplog.text


def test_held_out_losses_of_the_card_are_of_blocks_of_one_size(model, tmp_path):
    evidence(model)
    match = {"stage": "match", "steps": 5, "block_size": 128}
    stages = [
        {**match, "eval_loss": [[0, 3.5], [5, 3.4]], "eval_alpha": [1.01, 1.5]},
        {"steps": 7, "block_size": 1024, "eval_loss": [[0, 3.9], [7, 3.7]], "eval_alpha": None},
    ]
    write(model.parent / "summary.json", summary(model, eval_loss=[[0, 3.5], [5, 3.4], [12, 3.7]], stages=stages))
    assert (
        "| held-out loss | 3.5000 at step 0 (alpha 1.01), 3.4000 at step 5 (alpha 1.5) in blocks of 128; "
        "3.9000 at step 5, 3.7000 at step 12 in blocks of 1,024 |"
    ) in dry_run(model, tmp_path / "up").text


def test_sparsity_of_training_text_is_not_called_held_out(model, tmp_path):
    evidence(model)
    (model.parent / "report" / "report.json").unlink()
    for texts, kind in ((["held.txt"], "held-out"), ([], "training")):
        write(model.parent / "summary.json", summary(model, eval_data=texts))
        assert f"on the first {kind} blocks" in dry_run(model, tmp_path / kind).text


def test_no_number_of_the_training_is_made_up(model, tmp_path):
    """Whatever the summary lacks, the card says that it is missing, and nothing else of it changes."""
    evidence(model)
    full = summary(model)
    before = dry_run(model, tmp_path / "whole").content.splitlines()
    shown = {"steps", "tokens", "epochs", "block_size", "blocks_per_step", "skipped_steps", "learning_rate",
             "new_learning_rate", "train_loss", "eval_loss", "train_data", "eval_data", "hardware",
             "mixed_precision", "seconds", "tokens_per_second", "versions", "command", "options"}  # fmt: skip
    assert shown <= set(full)
    for name in sorted(shown):
        write(model.parent / "summary.json", {key: value for key, value in full.items() if key != name})
        after = dry_run(model, tmp_path / name).content.splitlines()
        changed = [line for line in after if line not in before and not line.startswith("| recipe")]
        allowed = r"missing|^- someone/stories$|^datasets:$" + (r"|longer texts are beyond" * (name == "block_size"))
        assert changed and all(re.search(allowed, line) for line in changed), (name, changed)
    for name in ("fingerprint", "base_model", "sparse_attention"):
        write(model.parent / "summary.json", {key: value for key, value in full.items() if key != name})
        assert "there is no training summary" in dry_run(model, tmp_path / name).text


@pytest.mark.parametrize("file", CARDS, ids=[file.stem for file in CARDS])
def test_cards_of_this_project_are_rendered_from_the_template(file):
    card = ModelCard.load(file)
    assert card.data.library_name == "transformers" and card.data.license and card.data.eval_results
    fixed = [line for line in data_file("model_cards/template.md").decode().splitlines() if "$" not in line]
    lines = card.content.splitlines()
    assert [line for line in fixed if line not in lines and "import AutoModel" not in line] == []
    assert "missing" not in card.text and not re.search(r"(?<![\w.`])/\w+/", card.text.replace("https://", ""))
    assert file.name in (file.parent / "README.md").read_text()


def test_a_converted_model_is_said_to_be_untrained(model, tmp_path):
    card = dry_run(model, tmp_path / "up")
    assert "it was not trained since" in card.text and "`dense`" in card.text
    assert "The numbers of the training are missing" in card.text and "The sparsity figures are missing" in card.text
    assert card.data.base_model is None and card.data.eval_results is None
    assert str(tmp_path) not in card.content and "pytest" not in card.content
    assert card.data.model_name in (None, "run")


def test_weights_that_changed_since_they_were_converted_are_not_called_untrained(model, tmp_path, caplog):
    """As a trainer that saves into the folder leaves it."""
    values = load_file(model / "model.safetensors")
    values["model.norm.weight"][0] += 1
    save_file(values, model / "model.safetensors", metadata={"format": "pt"})
    with caplog.at_level(logging.WARNING):
        assert "it was not trained since" not in dry_run(model, tmp_path / "up").text
    assert "conversion.json belongs to other weights" in caplog.text


def test_training_of_a_converted_folder_names_the_dense_model(source, model, tmp_path):
    (model / "conversion.json").unlink()
    write(model / "summary.json", summary(model, base_model=str(source / "sparse"), base_commit=None))
    assert "Base model: `dense`" in dry_run(model, tmp_path / "up").text
    change(model / "summary.json", base_model=str(tmp_path / "gone"))
    assert "Base model: `gone`" in dry_run(model, tmp_path / "up2").text


def test_licences(model, tmp_path):
    assert dry_run(model, tmp_path / "1").data.license == "other"
    assert dry_run(model, tmp_path / "2", license="apache-2.0").data.license == "apache-2.0"
    (model / "LICENSE").write_text("MIT License\n\nCopyright someone\n")
    assert dry_run(model, tmp_path / "3").data.license == "mit"
    (model / "README.md").write_text("---\nlicense: llama3.1\n---\n# dense\n")
    card = dry_run(model, tmp_path / "4")
    assert card.data.license == "llama3.1" and "# dense" not in card.text
    for name in ("LICENSE", "README.md", "conversion.json"):
        (model / name).unlink()
    card = dry_run(model, tmp_path / "5")
    assert card.data.license is None and "The licence is unknown" in card.text
    with pytest.raises(ValueError, match="license is 'Do what you like'"):
        PushArguments(model="m", dry_run="d", license="Do what you like")


def test_files_of_another_model_are_refused_or_left_out(model, tmp_path, caplog):
    other = {**block(model), "map": "entmax"}
    evidence(model)
    write(model.parent / "summary.json", summary(model, sparse_attention=other))
    write(model.parent / "report" / "report.json", report(model, sparse_attention=other))
    changed = results(model)
    changed["models"][1]["fingerprint"] = "other"
    write(model.parent / "evaluation" / "results.json", changed)
    with caplog.at_level(logging.WARNING):
        text = dry_run(model, tmp_path / "up").text
    assert "1,234" not in text and "11.44" not in text and "21.8" not in text
    assert caplog.text.count("the card goes without it") == 3
    for option, path in (("summary", "summary.json"), ("report", "report/report.json")):
        with pytest.raises(ValueError, match="map is 'entmax' there and 'asentmax' here"):
            dry_run(model, tmp_path / "no", **{option: str(model.parent / path)})
    # Another run of the same recipe.
    for option, content in (("summary", summary(model)), ("report", report(model))):
        path = write(tmp_path / f"{option}.json", {**content, "fingerprint": "another"})
        with pytest.raises(ValueError, match="belongs to a model with other weights"):
            dry_run(model, tmp_path / "no", **{option: str(path)})
    with pytest.raises(ValueError, match="no row with this model's weights"):
        dry_run(model, tmp_path / "no", results=str(model.parent / "evaluation" / "results.json"))
    with pytest.raises(FileNotFoundError, match="report is nowhere"):
        dry_run(model, tmp_path / "no", report="nowhere")
    unfinished = results(model)
    del unfinished["cells"][-1]
    with pytest.raises(ValueError, match="not finished, it lacks perplexity of sparse at 4096"):
        dry_run(model, tmp_path / "no", results=str(write(tmp_path / "part.json", unfinished)))
    for content in ("[1]", "{", '{"models": 3}'):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(ValueError, match=r"bad\.json is not"):
            dry_run(model, tmp_path / "no", results=str(tmp_path / "bad.json"))
    assert not (tmp_path / "no").exists()


def test_refused_models(source, model, tmp_path):
    def refused(match, error=ValueError, folder=model):
        with pytest.raises(error, match=match):
            dry_run(folder, tmp_path / "no")
        assert not (tmp_path / "no").exists()

    refused("is a dense model", folder=source / "dense")
    refused("not a folder", OSError, folder=tmp_path / "absent")
    config = json.loads((model / "config.json").read_text())
    change(model / "config.json", model_type="llama")
    refused("changed by hand")
    for field, value in (("map", "nonsense"), ("alpha", "x"), ("alpha", 0.5), ("format", 99)):
        write(model / "config.json", {**config, "sparse_attention": {**config["sparse_attention"], field: value}})
        refused(f"sparse_attention.{field}", (ValueError, TypeError))
    write(model / "config.json", {**config, "sparse_attention": {**config["sparse_attention"], "map": "entmax"}})
    refused("has beyond those of this map")
    write(model / "config.json", {key: value for key, value in config.items() if key != "sparse_attention"})
    refused("sparse_attention")
    write(model / "config.json", {**config, "architectures": ["LlamaForCausalLM"]})
    refused("architectures 'LlamaForCausalLM'")
    write(model / "config.json", config)

    weights = load_file(model / "model.safetensors")
    fewer = {name: value for name, value in weights.items() if not name.endswith("gamma_bias")}
    save_file(fewer, model / "model.safetensors", metadata={"format": "pt"})
    refused("lacks 2 parameters")
    (model / "model.safetensors").write_bytes(b"cut")
    refused("corrupt or cut off", OSError)
    (model / "model.safetensors").unlink()
    refused("no weights", OSError)
    torch.save(weights, model / "pytorch_model.bin")
    refused("is a pickle", OSError)
    write(model / "adapter_config.json", {})
    refused("is an adapter")


def test_refused_options(model, tmp_path):
    with pytest.raises(ValueError, match="repo_id is missing"):
        PushArguments(model=str(model))
    for name in ("a/b/c", "some one/x", "-x/y", "x..y", "story"):
        with pytest.raises(ValueError, match="write owner/name"):
            PushArguments(model=str(model), repo_id=name)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(FileExistsError, match="not empty"):
        dry_run(model, tmp_path / "full")
    with pytest.raises(FileExistsError, match="is a file"):
        dry_run(model, tmp_path / "full" / "file")
    with pytest.raises(ValueError, match="never written to"):
        dry_run(model, model / "up")
    assert os.listdir(tmp_path / "full") == ["file"]


def test_a_model_without_tokenizer_is_only_warned_of(model, tmp_path, caplog):
    for file in model.glob("tokenizer*"):
        file.unlink()
    with caplog.at_level(logging.WARNING):
        dry_run(model, tmp_path / "up")
    assert "no tokenizer" in caplog.text


def test_offline_or_logged_out_is_said_before_any_work(model, monkeypatch):
    arguments = PushArguments(model="absent", repo_id="someone/story")
    monkeypatch.setattr(upload.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match="HF_HUB_OFFLINE is set"):
        push_model(arguments)
    monkeypatch.setattr(upload.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(upload, "get_token", lambda: None)
    with pytest.raises(OSError, match="hf auth login"):
        push_model(arguments)


def test_a_token_never_leaves(model, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    dry_run(model, tmp_path / "up")
    assert all(TOKEN.encode() not in file.read_bytes() for file in (tmp_path / "up").iterdir())
    evidence(model)
    change(model.parent / "summary.json", command=f"HF_TOKEN={TOKEN} hf-sparse-attention train")
    with pytest.raises(ValueError, match=r"README\.md holds what looks like an access token") as caught:
        dry_run(model, tmp_path / "no")
    assert TOKEN not in str(caught.value) and not (tmp_path / "no").exists()


def test_paths_of_a_machine_are_cut():
    for path, name in (
        (f"{PLACE}/a.txt", "a.txt"), ("~/a/b/", "b"), ("../x/y", "y"), (r"C:\data\z.txt", "z.txt"),
        ("data/a.txt", "data/a.txt"), ("owner/name", "owner/name"), (f"sparse={PLACE}/m", "sparse=m"),
        (f"{PLACE}/*.jsonl", "*.jsonl"), ("file:///a/b", "b"),
        (f'{{"distill": "{PLACE}/base", "steps": 2}}', '{"distill": "base", "steps": 2}'),
        (f"{{steps: 2, distill: {PLACE}/base}}", "{steps: 2, distill: base}"),
        ("{distill: ~/a/b, block_size: '1024:0.8,4096:0.2'}", "{distill: b, block_size: '1024:0.8,4096:0.2'}"),
        ("{distill: owner/name, rate: 1.0e-3}", "{distill: owner/name, rate: 1.0e-3}"),
    ):  # fmt: skip
        assert local_name(path) == name
    assert (
        without_folders(f"train --output={PLACE}/run --data '{PLACE}/my text.txt'")
        == "train --output=run --data 'my text.txt'"
    )
    assert PLACE not in without_folders(f"train --stages '{{\"distill\": \"{PLACE}/base\"}}' '{{distill: {PLACE}/b}}'")

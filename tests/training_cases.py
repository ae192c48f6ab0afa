"""A tiny random Llama folder with a real tokenizer, text, and runs of `train` on them, for the tests of commands."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

import hf_sparse_attention
from hf_sparse_attention.train import TrainArguments, train_model

ROOT = Path(hf_sparse_attention.__file__).parent
STORIES = ROOT / "data" / "stories260K"
_WORDS = ("once", "upon", "a", "time", "the", "little", "cat", "and", "her", "friend", "saw", "red", "sun", "happy")


def dense_folder(folder: Path, *, seed: int = 0, dtype=torch.float32, shard: str = "5GB", **changes) -> Path:
    """A random Llama of 2 layers with the tokenizer of stories260K (512 tokens)."""
    torch.manual_seed(seed)
    values = {
        "vocab_size": 512, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
        "tie_word_embeddings": True, "initializer_range": 0.1, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(**{**values, **changes})).to(dtype)
    model.save_pretrained(folder, max_shard_size=shard)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(STORIES / name, folder / name)
    (folder / "LICENSE").write_text("a licence\n")
    return folder


def write_text(path: Path, documents: int = 60, *, seed: int = 0, longest: int = 40) -> Path:
    """Random sentences, some documents of a few words, some longer than a block."""
    draw = np.random.default_rng(seed)
    texts = [" ".join(draw.choice(_WORDS, size=draw.integers(2, longest))) for _ in range(documents)]
    path.write_text("".join(text + "\n<|endoftext|>\n" for text in texts), encoding="utf-8")
    return path


def options(folder: Path, **changes) -> dict:
    """Arguments of a short run; `folder` holds dense/, train.txt and eval.txt."""
    values = {
        "model": str(folder / "dense"), "output": str(folder / "run"), "train_data": [str(folder / "train.txt")],
        "eval_data": [str(folder / "eval.txt")], "block_size": 32, "batch_size": 4, "steps": 8, "eval_every": 4,
        "eval_blocks": 4, "log_every": 2, "checkpoint_every": 4, "learning_rate": 1e-2, "cpu": True,
    }  # fmt: skip
    return {**values, **changes}


def run(folder: Path, **changes) -> dict:
    return train_model(TrainArguments(**options(folder, **changes)))


def weights(run_folder: Path, name: str = "model") -> dict[str, torch.Tensor]:
    return load_file(run_folder / name / "model.safetensors")


def metrics(run_folder: Path) -> list[dict]:
    """The lines of metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("timing", None)
    return lines


def assert_same_weights(first: Path, second: Path) -> None:
    one, other = weights(first), weights(second)
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different


def python(code: str, *words: str, **environment) -> subprocess.Popen:
    """A Python process with the package, on one thread."""
    paths = os.pathsep.join([str(ROOT.parent), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(
        [sys.executable, "-c", code, *words], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def assert_close_metrics(first: Path, second: Path, *, rel: float = 1e-4) -> None:
    one, other = metrics(first), metrics(second)
    assert [(line["step"], line["kind"]) for line in one] == [(line["step"], line["kind"]) for line in other]
    for line, wanted in zip(one, other, strict=True):
        del line["kind"], wanted["kind"]
        assert line == pytest.approx(wanted, rel=rel)

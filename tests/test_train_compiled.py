"""`train --compile`: the same numbers as without, and nothing compiled anew from step to step."""

import pytest
import torch
from torch._dynamo.utils import counters
from training_cases import assert_close_metrics, dense_folder, run, write_text
from transformers import AutoModelForCausalLM

from hf_sparse_attention.train import compilation
from hf_sparse_attention.train.head import chunk_loss
from hf_sparse_attention.train.recipe import with_lora

pytest.importorskip("accelerate")
# torch.compile itself looks at what the layer before it gave.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    dense_folder(folder / "dense")
    write_text(folder / "train.txt")
    write_text(folder / "eval.txt", 20, seed=1)
    return folder


@pytest.fixture
def graphs(home, tmp_path, monkeypatch):
    """A run -> how many graphs it traced. What traces is the same whatever compiles them."""
    monkeypatch.setattr(compilation, "BACKEND", "eager")

    def traced(name, **changes):
        torch._dynamo.reset()
        counters.clear()
        with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
            run(
                home,
                **{
                    "output": str(tmp_path / name),
                    "checkpoint_every": 0,
                    "eval_every": 99,
                    "loss_chunk": 48,
                    **changes,
                },
            )
        return counters["stats"]["unique_graphs"]

    return traced


KINDS = {
    "dense": {"map": "none"},
    "rising": {"map": "asentmax", "alpha_schedule": "linear"},
    "adaptive": {"map": "adaptive_entmax", "alpha_schedule": "cosine"},
    "lora": {"map": "entmax", "alpha_schedule": "linear", "lora_rank": 2, "gradient_checkpointing": True},
    "match": {"stage": "match", "alpha_schedule": "linear", "trained": "attention"},
}


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=pytest.mark.slow) if kind in ("adaptive", "lora", "match") else kind for kind in KINDS],
)
def test_compiled_is_uncompiled_and_no_step_compiles_anew(home, tmp_path, graphs, kind):
    changes = KINDS[kind] | ({"distill": str(home / "dense"), "distill_weight": 0.5} if kind == "rising" else {})
    assert graphs("plain", steps=4, **changes) == 0
    few = graphs("compiled", steps=4, compile=True, **changes)
    assert few > 0
    assert_close_metrics(tmp_path / "plain", tmp_path / "compiled")
    # Twice the steps, and twice as many values of alpha.
    assert graphs("longer", steps=8, compile=True, **changes) == few


def test_the_loss_of_a_chunk_is_compiled_inside_adapters_too(home):
    pytest.importorskip("peft")
    model = AutoModelForCausalLM.from_pretrained(home / "dense")
    adapted = with_lora(model, rank=2, alpha=None, dropout=0.0, targets=[])
    chunk_loss(adapted.get_base_model(), 16)
    plain = adapted.get_base_model()._chunk_loss
    compilation.compile_parts(adapted, backend="eager")
    assert adapted.get_base_model()._chunk_loss.__wrapped__ == plain

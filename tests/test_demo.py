"""The demo's two runs of training are ones that `train` takes; the whole demo is a slow test of test_hub_push.py."""

from dataclasses import replace

import pytest

import hf_sparse_attention as hsa
from hf_sparse_attention.convert import ConvertArguments, convert_model
from hf_sparse_attention.demo import DENSE, DemoArguments, training_of
from hf_sparse_attention.train import train_model

pytest.importorskip("accelerate")


@pytest.mark.parametrize("name", [*hsa.MAPS, "softmax"])
def test_train_takes_the_runs(tmp_path, name):
    demo = DemoArguments(output_dir=str(tmp_path), steps=2, batch_size=1)
    model = str(DENSE)
    if name != "softmax":
        demo, model = replace(demo, map=name), str(tmp_path / "converted")
        convert_model(ConvertArguments(model=str(DENSE), output=model, map=name))
    short = replace(training_of(demo, name, model), block_size=32, eval_blocks=1)
    summary = train_model(short)
    assert summary["steps"] == 2 and summary["map"] == ("none" if name == "softmax" else name)
    assert (tmp_path / name / "model").is_dir()

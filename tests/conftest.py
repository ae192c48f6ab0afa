import importlib.util
import os

# Before anything imports huggingface_hub: no test reaches for the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

if not torch.cuda.is_available():
    # Before anything imports Triton, whose own functions are interpreted or compiled once and for all.
    os.environ["TRITON_INTERPRET"] = "1"

# The tensors of the tests are small: a second thread costs more in waiting than it computes.
torch.set_num_threads(1)


def pytest_collection_modifyitems(config, items):
    chosen = config.getoption("-m") or ""
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if item.get_closest_marker("slow") and "slow" not in chosen:
            item.add_marker(pytest.mark.skip(reason="slow; run with -m slow"))


@pytest.fixture(autouse=torch.cuda.is_available())
def kernels_are_compiled_at_their_launch(monkeypatch):
    """What `compile_together` plans are calls too, on tensors without memory: a test that watches calls would see
    them."""
    if importlib.util.find_spec("triton") is not None:
        from hf_sparse_attention.kernels import compiling

        monkeypatch.setattr(compiling, "MEASURED", ())


@pytest.fixture(autouse=torch.cuda.is_available())
def a_card_is_shared(monkeypatch):
    """With the other processes of `pytest -n`: the reference takes tiles a quarter as large, and what a test has left
    in this process's cache of memory goes back. 24 processes had filled 140 GiB."""
    from hf_sparse_attention.reference import tiles

    monkeypatch.setitem(tiles.TILE_SCORES, "other", tiles.TILE_SCORES["other"] // 4)
    yield
    if torch.cuda.memory_reserved() > 2**28:
        torch.cuda.empty_cache()


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """A folder with a dense model and text to train on."""
    from training_cases import home_folder

    return home_folder(tmp_path_factory.mktemp("home"))


@pytest.fixture
def here(home, tmp_path):
    """Trains what is in home; runs of a test go to tmp_path/run."""
    from training_cases import run

    return lambda **changes: run(home, **{"output": str(tmp_path / "run"), **changes})

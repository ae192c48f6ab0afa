"""The calls that compute-sanitizer watches reach every kernel, and of those that can go two ways both."""

import importlib
import pkgutil

import pytest
import torch

pytest.importorskip("triton")

import sanitize

from hf_sparse_attention import kernels
from hf_sparse_attention.kernels import operators

# NumPy, which the interpreter computes with, warns where a masked score of -inf meets arithmetic; the GPU does not.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")


def kernels_of_the_package():
    """Name -> the function that is launched."""
    found = {}
    for module in pkgutil.walk_packages(kernels.__path__, kernels.__name__ + "."):
        for name, value in vars(importlib.import_module(module.name)).items():
            if name.endswith("_kernel"):
                found[name] = getattr(value, "function", value)
    return found


@pytest.mark.slow
def test_every_kernel_is_launched(monkeypatch):
    functions, launched, settled, strays = kernels_of_the_package(), set(), [], []
    assert len(functions) > 12
    launch_type = type(next(iter(functions.values())))
    get = launch_type.__getitem__
    monkeypatch.setattr(launch_type, "__getitem__", lambda self, grid: launched.add(self.__name__) or get(self, grid))
    settle, collect = operators.settle, operators.collect

    def settle_and_count(*arguments):
        near = settle(*arguments)
        if near is not None:
            tiles = near.counts < -1
            settled.append((arguments[0].query.dtype, arguments[1], tiles.sum().item(), (~tiles).sum().item()))
        return near

    def collect_and_count(*arguments):
        found = collect(*arguments)
        strays.append(0 if found is None else found.counts.sum().item())
        return found

    monkeypatch.setattr(operators, "settle", settle_and_count)
    monkeypatch.setattr(operators, "collect", collect_and_count)
    cuda = torch.cuda.is_available()
    half = torch.bfloat16 if cuda else torch.float16
    sanitize.run_calls("cuda" if cuda else "cpu", half)
    assert launched >= {function.__name__ for function in functions.values()}
    # With a backward and without, some tiles of each of the calls with slopes, and never all of them.
    assert len(settled) == 6 and {save for _, save, *_ in settled} == {True, False}
    assert all(few > 0 and others > 0 for *_, few, others in settled), settled
    assert sum(count > 0 for count in strays) == 6, strays

"""The kernels of a call -> compiled side by side, before the first of them runs, where Triton can.

One after the other they take seconds. Most of that is spent outside of Python's lock, in LLVM and in ptxas, and in
some versions in a C compiler that builds a launcher per kernel.
"""

import contextvars
import os
from concurrent.futures import ThreadPoolExecutor

import torch
import triton

# Compute capabilities of cards this was run on. Elsewhere every kernel is compiled at its first launch.
MEASURED = ((9, 0),)

_planned = contextvars.ContextVar("planned", default=None)
_prepared = set()


class Kernel:
    """A Triton kernel whose launches `compile_together` can note down instead of running them."""

    def __init__(self, function):
        self.function = function

    def __getitem__(self, grid):
        planned = _planned.get()
        if planned is None:
            return self.function[grid]
        return lambda *arguments, **constants: planned.append((self.function, grid, arguments, constants))


def like(tensor):
    """A tensor without memory that kernels are compiled for as for this one, or None for None."""
    if tensor is None:
        return None
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def is_measured(device):
    return torch.cuda.get_device_capability(device) in MEASURED


def compile_together(variant, device, plan):
    """Compiles what plan() launches, once per variant. What it does not foresee is compiled at its launch.

    variant: hashable. device: the GPU. plan: function without arguments that launches on tensors made by `like`.
    """
    if variant in _prepared:
        return
    _prepared.add(variant)
    if device.type != "cuda" or not hasattr(triton, "AsyncCompileMode") or not is_measured(device):
        return
    # In a context of its own: somebody else's asynchronous compilation is none of ours.
    contextvars.Context().run(_compile, device, plan)


def _compile(device, plan):
    launches = []
    _planned.set(launches)
    plan()

    def build(kernel):
        if hasattr(kernel, "result"):
            kernel = kernel.result()
        # Thrown away, as another thread's may be in it: all launchers are modules of one name, of which Python hands
        # out the same object where a file was loaded before. On disk is the right one.
        triton.runtime.driver.active.launcher_cls(kernel.src, kernel.metadata)
        return kernel

    with ThreadPoolExecutor(min(len(launches), os.cpu_count() or 1)) as pool:
        # A kernel that does not compile says so when it is built.
        with triton.AsyncCompileMode(pool, ignore_errors=True):
            kernels = [
                function.warmup(*arguments, grid=grid, **constants)
                for function, grid, arguments, constants in launches
            ]
        kernels = list(pool.map(build, kernels))
    with torch.cuda.device(device):
        for kernel in kernels:
            # The attribute takes the launcher from disk and loads the kernel.
            _ = kernel.run

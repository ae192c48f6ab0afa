"""Compiles training calls for an H100 without one -> JSON: kernels compiled ahead of their launch, and at it."""

import json
import sys
import threading

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver


class Launcher:
    launch_cooperative_grid = False

    def __init__(self, *_):
        pass

    def __call__(self, *_):
        pass


class Utilities:
    def load_binary(self, *_):
        return 0, 0, 0, 0, 1024

    def get_device_properties(self, _):
        return {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32, "max_num_regs": 65536}


class Driver:
    """As much of a CUDA driver as a launch asks for."""

    utils = Utilities()
    launcher_cls = Launcher

    def get_current_device(self):
        return 0

    def get_current_stream(self, _=0):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


class Nothing:
    def __init__(self, *_):
        pass

    def __enter__(self):
        pass

    def __exit__(self, *_):
        pass


driver.set_active(Driver())
torch.cuda.device_of = torch.cuda.device = Nothing

from hf_sparse_attention import kernels  # noqa: E402
from hf_sparse_attention.kernels import compiling, configurations, operators  # noqa: E402

kernels.supports = lambda *_, **__: None
compiling.is_measured = lambda device: True
compiled = []
together = compiling.compile_together
compile_one = triton.runtime.jit.JITFunction._do_compile


def spy(self, *arguments):
    compiled.append((self.fn.__name__, compiling._planned.get() is not None, threading.active_count()))
    return compile_one(self, *arguments)


triton.runtime.jit.JITFunction._do_compile = spy
operators.compile_together = lambda variant, _, plan: together(variant, torch.device("cuda", 0), plan)
documents = sys.argv[1] == "documents"
changes = {"stray_limit": 64} if sys.argv[1] == "strays" else {}
# Calls of few keys are another path.
for length in (100, 120) if sys.argv[1] == "short" else (320, 640):
    tensors = [torch.zeros(1, heads, length, 32, dtype=torch.bfloat16, requires_grad=True) for heads in (4, 2, 2)]
    positions = torch.arange(length)
    visible = torch.stack([positions // 100 * 100, positions + 1], -1)[None].int() if documents else None
    with configurations.configured(**changes):
        out, _ = kernels.entmax_attention(*tensors, visible=visible)
        torch.autograd.grad(out, tensors, torch.ones_like(out))
print(
    json.dumps({"ahead": [name for name, ahead, _ in compiled if ahead], "late": [n for n, a, _ in compiled if not a]})
)

"""Compiles every kernel that a call would launch, for a card that is not here: what of the card each takes, and which
are compiled ahead of their launch. Run in a process of its own, as Triton must not be interpreted."""

import contextlib
import dataclasses
import functools
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

TARGET = GPUTarget("cuda", 90, 32)
TYPES = {
    torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int32: "*i32", torch.int16: "*i16",
    torch.uint8: "*u8", torch.int8: "*i8", torch.int64: "*i64",
}  # fmt: skip
OPTIONS = ("num_warps", "num_stages", "maxnreg", "enable_fp_fusion")


def _compile(function, arguments, keywords):
    bound = inspect.signature(function.fn).bind(*arguments, **{k: v for k, v in keywords.items() if k not in OPTIONS})
    signature, constants, attributes = {}, {}, {}
    for index, (parameter, (name, value)) in enumerate(zip(function.params, bound.arguments.items(), strict=True)):
        wide = [["tt.divisibility", 16]]
        if parameter.is_constexpr or value is None:
            signature[name], constants[(index,)] = "constexpr", value
        elif isinstance(value, TensorDescriptor):
            shape = ",".join(map(str, value.block_shape))
            signature[name] = f"tensordesc<{TYPES[value.base.dtype][1:]}[{shape}]>"
        elif isinstance(value, torch.Tensor):
            signature[name], attributes[(index,)] = TYPES[value.dtype], wide
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif value == 1 and not parameter.do_not_specialize:
            signature[name], constants[(index,)] = "constexpr", 1
        else:
            signature[name] = "i32"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(index,)] = wide
    options = {name: keywords[name] for name in OPTIONS if name in keywords}
    return triton.compile(ASTSource(function, signature, constants, attributes), target=TARGET, options=options)


def serialized(compiled):
    """Whether ptxas says that products wait for each other one by one."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.ptx"
        file.write_text(compiled.asm["ptx"])
        command = [get_ptxas(90).path, "-v", "--gpu-name=sm_90a", file, "-o", Path(folder) / "kernel.cubin"]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
    # C7510 to C7515, by what they wait for: a loop that cannot be seen through, registers.
    return "wgmma.mma_async instructions are serialized" in run.stdout + run.stderr


def _resources(compiled):
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(compiled.asm["cubin"])
        text = subprocess.run([tool, "-res-usage", file], capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"{name}:(\d+)", text)[1]) for name in ("REG", "STACK"))
    return {
        "registers": registers, "stack": stack, "shared": compiled.metadata.shared,
        "asynchronous": compiled.asm["ptx"].count("cp.async.c"), "tensor": compiled.asm["ptx"].count("mma"),
    }  # fmt: skip


def launches(call, look=_resources):
    """[(kernel, warps, resources)] of what `call()` would launch, on CPU tensors."""
    found = []

    def capture(function, grid):
        def launch(*arguments, **keywords):
            resources = look(_compile(function, arguments, keywords))
            found.append((function.fn.__name__, keywords.get("num_warps", 4), resources))

        return launch

    original, JITFunction.__getitem__ = JITFunction.__getitem__, capture
    try:
        call()
    finally:
        JITFunction.__getitem__ = original
    return found


def decoding(name, dim, heads, key_heads, queries, alpha, with_pages, slopes, mask, keys=4096):
    """The launches of a decoding call; alpha 0 stands for one alpha per head."""
    from hf_sparse_attention.kernels import decode
    from hf_sparse_attention.kernels.decode import launch, pages

    launch.processors = pages.processors = lambda index: 132
    dtype = getattr(torch, name)
    query = torch.empty(1, heads, queries, dim, dtype=dtype)
    key = torch.empty(1, key_heads, keys, dim, dtype=dtype)
    bounds = torch.empty(1, key_heads, keys // 64, dim, dtype=dtype) if with_pages else None
    visible = torch.tensor([0, keys], dtype=torch.int32).expand(1, queries, 2).contiguous()
    call = functools.partial(
        decode.decode_call, query, key, key, float(alpha), None if alpha else torch.ones(heads), dim**-0.5,
        True, visible, torch.ones(heads) if slopes else None,
        torch.ones(1, 1, queries, keys, dtype=torch.bool) if mask else None, bounds, bounds,
        None if bounds is None else bounds.to(torch.int8),
        None if bounds is None else torch.empty(*bounds.shape[:3], 3),
        torch.zeros(3, dtype=torch.int32) if bounds is not None else None,
    )  # fmt: skip
    return launches(call)


def training(limit=0, dim=128, save=1):
    """The launches of a causal training call in bfloat16 for an H200, or (save=0) of a forward alone."""
    from hf_sparse_attention.kernels import configurations, gather, operators, threshold

    gather.processors = threshold.processors = lambda index: 132
    row = configurations.MEASURED[(9, 2, dim)]
    operators.configuration = lambda *arguments: dataclasses.replace(row, stray_limit=limit)
    query, key = (torch.empty(1, heads, 1024, dim, dtype=torch.bfloat16, device="meta") for heads in (8, 2))
    call = operators.describe(query, key, key, 1.5, None, dim**-0.5, True, None, None, None, bool(save))
    look = lambda compiled: _resources(compiled) | {"serialized": int(serialized(compiled))}  # noqa: E731
    return launches(lambda: operators._launch_all(call, bool(save)), look)


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
        return TARGET


def ahead(kind):
    """The kernels that two training calls of a kind, of two lengths, compile: ahead of their launch, and at it."""
    driver.set_active(Driver())
    torch.cuda.device_of = torch.cuda.device = lambda *_: contextlib.nullcontext()

    from hf_sparse_attention import kernels
    from hf_sparse_attention.kernels import compiling, configurations, operators

    kernels.supports = lambda *_, **__: None
    compiling.is_measured = lambda device: True
    compiled = []
    together = compiling.compile_together
    compile_one = JITFunction._do_compile

    def spy(self, *arguments):
        compiled.append((self.fn.__name__, compiling._planned.get() is not None))
        return compile_one(self, *arguments)

    JITFunction._do_compile = spy
    operators.compile_together = lambda variant, _, plan: together(variant, torch.device("cuda", 0), plan)
    changes = {"stray_limit": 64} if kind == "strays" else {}
    # Calls of few keys are another path.
    for length in (100, 120) if kind == "short" else (320, 640):
        tensors = [torch.zeros(1, heads, length, 32, dtype=torch.bfloat16, requires_grad=True) for heads in (4, 2, 2)]
        positions = torch.arange(length)
        documents = torch.stack([positions // 100 * 100, positions + 1], -1)[None].int()
        with configurations.configured(**changes):
            slopes = torch.ones(4) if kind == "slopes" else None
            out, _ = kernels.entmax_attention(
                *tensors, slopes=slopes, visible=documents if kind == "documents" else None
            )
            torch.autograd.grad(out, tensors, torch.ones_like(out))
    return {"ahead": [name for name, early in compiled if early], "late": [n for n, early in compiled if not early]}


def main(words):
    """Words such as bfloat16:128:32:8:1:1.5:0:0:0, or training:16:64 for a stray_limit of 16 and a head_dim of 64, or
    training:0:128:0 for a forward alone -> a line per kernel; or ahead:causal, ahead:documents, strays, slopes, short
    -> JSON.
    """
    os.environ.setdefault("TRITON_CACHE_DIR", tempfile.mkdtemp())
    for word in words:
        if word.startswith("ahead"):
            print(json.dumps(ahead(word.split(":")[1])))
            continue
        if word.startswith("training"):
            for kernel, warps, resources in training(*(int(number) for number in word.split(":")[1:])):
                print(word, kernel, warps, *(f"{key}={value}" for key, value in resources.items()), flush=True)
            continue
        name, *numbers = word.split(":")
        numbers = [float(number) if "." in number else int(number) for number in numbers]
        for kernel, warps, resources in decoding(name, *numbers):
            print(word, kernel, warps, *(f"{key}={value}" for key, value in resources.items()), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])

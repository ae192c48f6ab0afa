"""Runs small calls of every kernel under compute-sanitizer: `python tests/sanitize.py` on a machine with a GPU.

Exit status 0: memcheck and racecheck found nothing; 1: they did, or a call failed; 2: there is no compute-sanitizer.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

TOOLS = ("memcheck", "racecheck")
PLACES = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer", "/opt/cuda/bin")
# Seconds for both together: 60 on a card of their own, more where other processes compile. Only a hang takes longer.
LIMIT = 300


def find_sanitizer():
    """The program, or None."""
    folders = [os.environ.get("PATH", ""), *PLACES]
    if "CUDA_HOME" in os.environ:
        folders.append(os.path.join(os.environ["CUDA_HOME"], "bin"))
    return shutil.which("compute-sanitizer", path=os.pathsep.join(folders))


def run_calls(device="cuda", half=None):
    """Training and forward alone: tile lists, pairs, strays, ranges, slopes, a mask, few keys, decoding with pages."""
    import torch

    from hf_sparse_attention.kernels import decode, entmax_attention
    from hf_sparse_attention.kernels.configurations import configured
    from hf_sparse_attention.kernels.decode import bounds as bounds_kernel

    half = half or torch.bfloat16

    def tensors(queries, keys, dim, dtype):
        generator = torch.Generator(device).manual_seed(0)
        shapes = ((4, queries), (2, keys), (2, keys))
        return [
            (2 * torch.randn(1, heads, length, dim, generator=generator, device=device)).to(dtype).requires_grad_()
            for heads, length in shapes
        ]

    def train(queries, keys, dim, dtype=half, **arguments):
        leaves = tensors(queries, keys, dim, dtype)
        out, _ = entmax_attention(*leaves, **arguments)
        torch.autograd.grad(out.float().square().sum(), leaves)
        with torch.no_grad():
            entmax_attention(*leaves, **arguments)

    position = torch.arange(333, device=device)
    # The second document reaches over enough tiles for strays.
    documents = torch.stack([(position >= 30) * 30, position + 1], -1)[None].int()
    slopes = torch.tensor([0.0, 1.0, 0.5, 0.02], device=device)
    heads = torch.tensor([1.3, 1.5, 2.0, 3.0], device=device, requires_grad=True)
    with configured(stray_limit=60, stray_forward=True):
        train(333, 333, 128)
        train(333, 333, 64, visible=documents)
        train(333, 333, 128, slopes=slopes)
    with configured(stray_limit=0):
        train(333, 333, 128, alpha=1.333)
        train(300, 333, 80, torch.float16, mask=torch.rand(1, 1, 300, 333, device=device) < 0.5)
        train(333, 333, 16, torch.float32, alpha=heads)
        # Of the heads with steep slopes tiles are settled in one kernel, those without take the other passes.
        train(70, 333, 64, torch.float16, alpha=2.0, slopes=slopes)
        train(333, 333, 32, alpha=1.333, slopes=slopes)
    # What the card's own row says.
    train(333, 333, 32)
    train(91, 91, 32)
    train(60, 111, 16, torch.float32, alpha=heads)
    query, key, value = (one.detach() for one in tensors(1, 1000, 64, half))
    lower = torch.empty(1, 2, 16, 64, dtype=key.dtype, device=device)
    codes, ball = torch.empty_like(lower, dtype=torch.int8), torch.empty(1, 2, 16, 3, device=device)
    bounds = (lower, torch.empty_like(lower), codes, ball)
    bounds_kernel.update_bounds(key, *bounds, None, 0, 1000)
    with torch.no_grad(), decode.decoding(True):
        entmax_attention(query, key, value)
        entmax_attention(query, key, value, pages=bounds)
        entmax_attention(query.float(), key.float(), value.float(), alpha=3.0)
    if device == "cuda":
        torch.cuda.synchronize()


def main():
    program = find_sanitizer()
    if program is None:
        print("compute-sanitizer is not on this machine (CUDA's toolkit has it): nothing was checked")
        return 2
    # A block of memory per tensor, so that what lies behind one is nobody's.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), environment.get("PYTHONPATH", "")])
    calls = [sys.executable, __file__, "calls"]
    # Compiled without the tools, which slow the host down as well.
    plain = subprocess.run(calls, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if plain.returncode:
        lines = plain.stdout.strip().splitlines() or [""]
        print(f"nothing was checked, the calls fail without the tools too: {lines[-1]}")
        print("\n".join(lines[-40:]))
        return 1
    running = [
        subprocess.Popen(
            [program, "--tool", tool, "--error-exitcode", "9", *calls],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for tool in TOOLS
    ]  # fmt: skip
    failed = False
    for tool, process in zip(TOOLS, running, strict=True):
        try:
            output, _ = process.communicate(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
            output += f"\nended after {LIMIT} s"
        failed |= process.returncode != 0
        print(f"{tool}: {'clean' if process.returncode == 0 else 'NOT CLEAN, status ' + str(process.returncode)}")
        print("\n".join(output.splitlines()[-3 if process.returncode == 0 else -40 :]))
    return int(failed)


if __name__ == "__main__":
    sys.exit(run_calls() if sys.argv[1:] == ["calls"] else main())

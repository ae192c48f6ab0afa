"""How far the scores of a tensor core are from float64: `python tests/products.py` on a machine with a GPU.

Printed, in units of 2^-24 of the sum of |q_d k_d|: mean, root mean square and largest error of each row's largest
score, towards zero where it is negative. With a number, so many channels are summed at once (`tiles.CHANNELS`).
"""

import sys

import torch
import triton
import triton.language as tl

from hf_sparse_attention.kernels import tiles

KEYS = 4096


@triton.jit
def _score_kernel(q_ptr, k_ptr, x_ptr, KEYS: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr):
    rows = tl.arange(0, 64)
    dims = tl.arange(0, D)
    q = tl.load(q_ptr + rows[:, None] * D + dims[None, :])
    for first in range(0, KEYS, 64):
        columns = first + rows
        k = tl.load(k_ptr + columns[:, None] * D + dims[None, :])
        x = tiles.products(q, k, PRECISION=PRECISION)
        tl.store(x_ptr + rows[:, None] * KEYS + columns[None, :], x)


def errors(dtype, head_dim, precision, device="cuda"):
    """(mean, root mean square, largest) error of the kernels' scores, and the same of torch's in float32."""
    generator = torch.Generator(device).manual_seed(0)
    query, key = (torch.randn(length, head_dim, generator=generator, device=device).to(dtype) for length in (64, KEYS))
    scores = torch.empty(64, KEYS, device=device)
    _score_kernel[(1,)](query, key, scores, KEYS=KEYS, D=head_dim, PRECISION=precision)
    exact = query.double() @ key.double().T
    largest = exact.argmax(1, keepdim=True)
    unit = (query.double().abs() @ key.double().abs().T).gather(1, largest) * 2.0**-24
    found = []
    for values in (scores, query.float() @ key.float().T):
        error = (values.double() - exact).gather(1, largest) * exact.gather(1, largest).sign() / unit
        found.append((error.mean().item(), error.square().mean().sqrt().item(), error.abs().max().item()))
    return found


def main(channels=None):
    if channels is not None:
        # Before the first compilation, which keeps it.
        tiles.CHANNELS = tl.constexpr(int(channels))
    for dtype, head_dim, precision in (
        (torch.bfloat16, 64, "tf32"),
        (torch.bfloat16, 128, "tf32"),
        (torch.bfloat16, 256, "tf32"),
        (torch.float32, 64, "tf32x3"),
        (torch.float32, 128, "tf32x3"),
    ):
        ours, torchs = errors(dtype, head_dim, precision)
        text = "mean {:.2f}, root mean square {:.2f}, largest {:.2f}"
        print(
            dtype, head_dim, f"channels {tiles.CHANNELS.value}:", text.format(*ours), "| torch", text.format(*torchs)
        )


if __name__ == "__main__":
    main(*sys.argv[1:])

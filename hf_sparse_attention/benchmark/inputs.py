"""Length and noise -> query, key and value in which the share of empty blocks is a dial.

Every block of 64 keys has a code, every block of queries aims at its own and one earlier; the more noise, the fewer
blocks are empty.
"""

from __future__ import annotations

import math

import torch

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
BLOCK = 64


def block_inputs(
    arguments, length: int, noise: float, *, device: str = "cuda", seed: int | None = None
) -> tuple[torch.Tensor, ...]:
    """query (B, H, N, D), key and value (B, G, N, D)."""
    generator = torch.Generator(device).manual_seed(arguments.seed if seed is None else seed)
    blocks, dim = length // BLOCK, arguments.head_dim
    shape = (arguments.batch, arguments.kv_heads)

    def normal(*sizes):
        return torch.randn(*sizes, generator=generator, device=device)

    code = torch.nn.functional.normalize(normal(*shape, blocks, dim), dim=-1) * math.sqrt(dim)
    key = code.repeat_interleave(BLOCK, 2) * math.sqrt(1 - noise) + normal(*shape, length, dim) * math.sqrt(noise)
    code = code.repeat_interleave(arguments.heads // arguments.kv_heads, 1)
    choice = torch.rand(*code.shape[:3], generator=generator, device=device)
    earlier = (choice * torch.arange(blocks, device=device).clamp(min=1)).long()
    aim = (code + code.gather(2, earlier[..., None].expand_as(code))) / math.sqrt(2)
    query = aim.repeat_interleave(BLOCK, 2) * math.sqrt(1 - noise)
    query = (query + normal(*query.shape) * math.sqrt(noise)) * 2 / dim**0.25
    dtype = DTYPES[arguments.dtype]
    return query.to(dtype), key.to(dtype), normal(*shape, length, dim).to(dtype)

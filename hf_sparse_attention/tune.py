"""This card, a dtype and a head dimension -> the launch parameters that are fastest on it, checked and in a file.

One kernel after the other tries a short list, the others kept; what errs more than the reference in the dtype may, or
does not run, is not taken. `kernels.configurations.use(file)` reads what this writes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from tqdm import tqdm
from triton.errors import TritonError

from . import reference
from .files import write_json
from .kernels import configurations, entmax_attention
from .kernels.configurations import TILE, Configuration, Launch
from .tables import plain

# How far a trial may be from float64: times the reference's own error in the dtype, for outputs and for gradients.
OUTPUT_FACTOR, GRADIENT_FACTOR = 2.0, 3.0
# A gain below this is noise.
LEAST_GAIN = 0.01


def candidates(wide: bool) -> dict[str, list[dict]]:
    """Per kernel what is tried, as fields of `Configuration`; wide: rows of 512 bytes or more fill the memory."""
    stages = (1, 2) if wide else (2, 3, 4)
    one, two = [Launch(4, depth) for depth in stages], [Launch(8, depth) for depth in stages]
    threshold = [
        {"threshold_rows": rows, "threshold_columns": columns, "threshold": launch, "threshold_programs": programs}
        for rows, columns, launch, programs in (
            (2 * TILE, 2 * TILE, Launch(8, 2, 128), 2),
            (2 * TILE, 2 * TILE, Launch(8, 3), 1),
            (2 * TILE, TILE, Launch(8, 2, 128), 2),
            (2 * TILE, TILE, Launch(8, 2), 2),
            (2 * TILE, TILE, Launch(4, 2), 2),
            (TILE, TILE, Launch(4, 2), 4),
            (TILE, TILE, Launch(4, 1), 2),
        )
    ]
    return {
        "threshold": threshold,
        "refine": [{"refine": launch} for launch in one] + [{"refine_pairs": launch} for launch in two],
        "forward": [{"forward": launch} for launch in one] + [{"forward_pairs": launch} for launch in two],
        "query gradient": [{"query_gradient": launch} for launch in one]
        + [{"query_gradient_pairs": launch} for launch in two],
        "pairs": [{"pair_tenths": tenths} for tenths in (0, 7)],
        "key gradient": [
            {"key_gradient": launch} for launch in (Launch(4, 1), Launch(4, 2), Launch(4, 3), Launch(8, 2))
        ],
        "inner": [{"inner": columns} for columns in (TILE, TILE // 2)],
    }


def tune_kernels(
    inputs: list[tuple[torch.Tensor, ...]],
    output: str | Path,
    *,
    alpha: float = 1.5,
    median: Callable[[Callable, int], float],
    repeats: int = 10,
    choices: dict[str, list[dict]] | None = None,
) -> list[dict]:
    """The trials, one row each; writes the best configuration to `output`, with what it was measured on.

    inputs: tuples of query, key, value; a trial's time is the sum over them of forward and backward.
    median: a function without arguments, repeats -> milliseconds.
    choices: kernel -> fields of `Configuration` to try; by default `candidates`.
    """
    query = inputs[0][0]
    block_dim, element_size = max(16, 1 << (query.shape[-1] - 1).bit_length()), query.element_size()
    key = (configurations.device_name(query.device), element_size, block_dim)
    best = first = configurations.configuration(query.device, element_size, block_dim)
    choices = candidates(block_dim * element_size >= 512) if choices is None else choices
    check = Check(query, alpha)

    def measure(configuration: Configuration) -> dict:
        with configurations.use({key: configuration}):
            refused = check.refusal()
            if refused:
                return {"refused": refused}
            try:
                return {"ms": sum(median(_training(tensors, alpha), repeats) for tensors in inputs)}
            except (RuntimeError, TritonError) as error:
                return {"refused": str(error).splitlines()[0][:100]}

    before = measure(first)
    if "refused" in before:
        raise RuntimeError(f"the present configuration does not compute this attention: {before['refused']}")
    rows, least = [{"kernel": "(all)", "tried": "as now", **before}], before["ms"]
    seen = {first}
    for kernel, values in _progress(choices):
        trial = dataclasses.replace(best, **values, measured="")
        if dataclasses.replace(trial, measured=first.measured) in seen:
            continue
        seen.add(dataclasses.replace(trial, measured=first.measured))
        row = {"kernel": kernel, "tried": _words(values), **measure(trial)}
        rows.append(row)
        if row.get("ms", least) < least * (1 - LEAST_GAIN):
            best, least = trial, row["ms"]
    best = dataclasses.replace(best, measured=key[0])
    content = {
        "rows": [configurations.to_row(*key, best)],
        "measured": {
            "torch": torch.__version__,
            "alpha": alpha,
            "shapes": [list(tensors[0].shape) for tensors in inputs],
            "dtype": str(query.dtype).removeprefix("torch."),
            "ms_before": before["ms"],
            "ms": least,
            "trials": rows,
        },
    }
    write_json(output, content)
    cells = [
        [row["kernel"], row["tried"], f"{row['ms']:.3f}" if "ms" in row else "", row.get("refused", "")]
        for row in rows
    ]
    print(plain(["kernel", "tried", "ms", ""], cells))
    print(f"{before['ms']:.3f} ms before, {least:.3f} ms with {output}. To use it, before the first call:")
    print(f"    from hf_sparse_attention.kernels import configurations; configurations.use({str(output)!r})")
    return rows


class Check:
    """Whether the present configuration computes attention: documents, lengths that are no multiple of a tile."""

    def __init__(self, query: torch.Tensor, alpha: float):
        generator = torch.Generator(query.device).manual_seed(0)
        length, dim = 5 * TILE + 7, query.shape[-1]
        self.alpha = alpha
        self.tensors = [
            torch.randn(1, heads, length, dim, generator=generator, device=query.device).to(query.dtype)
            for heads in (2, 1, 1, 2)
        ]
        position = torch.arange(length, device=query.device)
        start = torch.where(position < 3 * TILE + 5, 0, 3 * TILE + 5)
        self.ranges = [None, torch.stack([start, position + 1], -1)[None].int()]
        self.exact = [self._run(reference.attention, ranges, torch.float64) for ranges in self.ranges]
        own = [self._run(reference.attention, ranges, query.dtype) for ranges in self.ranges]
        present = [self._run(entmax_attention, ranges, query.dtype) for ranges in self.ranges]
        # With unit normal inputs the terms of a gradient are of size 1, also where they cancel; a quarter of their
        # rounding is no error.
        rounding = torch.finfo(query.dtype).eps / 4

        def allowed(found, now, exact, factor, floor):
            most = factor * max(_rms(found - exact), rounding * max(_rms(exact), floor))
            # Where the present configuration rounds worse than that, others may round alike; what is wrong is far off.
            return max(most, min(1.5 * _rms(now - exact), 4 * most))

        factors, floors = (OUTPUT_FACTOR, *3 * [GRADIENT_FACTOR]), (0, 1, 1, 1)
        self.allowed = [
            [allowed(*one) for one in zip(*results, factors, floors, strict=True)]
            for results in zip(own, present, self.exact, strict=True)
        ]

    def refusal(self) -> str | None:
        """None, or in words why the configuration is not to be used."""
        for ranges, exact, allowed in zip(self.ranges, self.exact, self.allowed, strict=True):
            try:
                found = self._run(entmax_attention, ranges, self.tensors[0].dtype)
            except (RuntimeError, ValueError, TritonError) as error:
                return str(error).splitlines()[0][:100]
            for name, one, other, most in zip(
                ("output", "dquery", "dkey", "dvalue"), found, exact, allowed, strict=True
            ):
                error = _rms(one - other)
                # Written so that NaN is refused.
                if not error <= most:
                    return f"wrong {name}: error {error:.1e}, allowed {most:.1e}"
        return None

    def _run(self, attention, ranges, dtype):
        *leaves, gradient = (tensor.to(dtype) for tensor in self.tensors)
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        out, _ = attention(*leaves, alpha=self.alpha, visible=ranges)
        return [out.detach(), *torch.autograd.grad(out, leaves, gradient)]


def _rms(tensor: torch.Tensor) -> float:
    return tensor.double().square().mean().sqrt().item()


def _training(tensors, alpha):
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    gradient = torch.ones_like(tensors[0])

    def call():
        out, _ = entmax_attention(*leaves, alpha=alpha)
        torch.autograd.grad(out, leaves, gradient)

    return call


def _progress(choices) -> Iterator[tuple[str, dict]]:
    trials = [(kernel, values) for kernel, several in choices.items() for values in several]
    progress = tqdm(trials, desc="tune", unit="configuration")
    for kernel, values in progress:
        progress.set_postfix_str(kernel)
        yield kernel, values


def _words(values: dict) -> str:
    def say(value):
        if not isinstance(value, Launch):
            return str(value)
        limit = f" {value.registers} registers" if value.registers else ""
        return f"{value.warps} warps {value.stages} stages{limit}"

    return ", ".join(f"{name} {say(value)}" for name, value in values.items())

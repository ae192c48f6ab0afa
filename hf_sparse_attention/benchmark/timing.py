"""A call -> its milliseconds on the GPU, its peak memory, the time of its first run."""

from __future__ import annotations

import time

import torch


def measure(attention, tensors, repeats: int) -> dict:
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    gradient = torch.randn_like(tensors[0])

    def forward():
        with torch.no_grad():
            attention(*tensors)

    def training():
        torch.autograd.grad(attention(*leaves), leaves, gradient)

    row = {}
    try:
        for kind, call in (("forward", forward), ("training", training)):
            started = time.perf_counter()
            call()
            torch.cuda.synchronize()
            row[f"{kind}_first_call_s"] = time.perf_counter() - started
            row[f"{kind}_ms"] = median(call, repeats)
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            call()
            torch.cuda.synchronize()
            row[f"{kind}_peak_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20
    except (RuntimeError, ValueError, NotImplementedError, TypeError) as error:
        row["refused"] = str(error).splitlines()[0][:200]
    return row


def kernel_times(attention, tensors) -> dict[str, float]:
    """Milliseconds on the GPU by kernel, of one forward and backward; what takes less than 1 us is left out."""
    from torch.profiler import ProfilerActivity, profile

    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    gradient = torch.randn_like(tensors[0])
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        torch.autograd.grad(attention(*leaves), leaves, gradient)
        torch.cuda.synchronize()
    times = {event.key: event.device_time_total / 1000 for event in recorded.key_averages()}
    return {name: time for name, time in sorted(times.items(), key=lambda item: -item[1]) if time >= 0.001}


def median(call, repeats: int) -> float:
    # What is cleared between the calls is larger than the cache, and long enough for the host to stay ahead.
    clear = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    for _ in range(2):
        call()
    pairs = []
    for _ in range(repeats):
        clear.zero_()
        clear.zero_()
        pair = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        pair[0].record()
        call()
        pair[1].record()
        pairs.append(pair)
    torch.cuda.synchronize()
    times = sorted(start.elapsed_time(end) for start, end in pairs)
    return times[len(times) // 2]

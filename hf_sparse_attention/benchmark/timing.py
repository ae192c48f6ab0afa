"""A call -> its milliseconds, its peak memory, the time of its first run. On a GPU with events, else with a clock."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

# Seconds that a card is kept busy before what is timed.
WARM_UP = 0.05


def measure(attention, tensors, repeats: int) -> dict:
    """One row: forward and training of `attention(query, key, value)`, or why it refuses them.

    Whatever another project raises is its refusal: an assertion, often without a word, or an error of its compiler.
    """
    try:
        return measured(attention, tensors, repeats)
    except Exception as error:
        return {"refused": refusal(error)}


def refusal(error: Exception) -> str:
    """The kind of an error and the first line of what it says, if it says anything."""
    lines = str(error).strip().splitlines()
    return ": ".join([type(error).__name__, *lines[:1]])[:200]


def measured(attention, tensors, repeats: int) -> dict:
    """As `measure`, but what is refused raises."""
    device, row = tensors[0].device.type, {}
    for kind, call in calls(attention, tensors).items():
        row[f"{kind}_first_call_s"] = seconds(call, device)
        row[f"{kind}_ms"] = median(call, repeats, device)
        row[f"{kind}_peak_mib"] = peak_mib(call, device)
    return row


def calls(attention, tensors, gradient: torch.Tensor | None = None) -> dict[str, Callable[[], None]]:
    """What is timed of `attention(query, key, value)`: "forward" without a graph, "training" with its backward."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    gradient = torch.randn_like(tensors[0]) if gradient is None else gradient

    def forward():
        with torch.no_grad():
            attention(*tensors)

    def training():
        torch.autograd.grad(attention(*leaves), leaves, gradient)

    return {"forward": forward, "training": training}


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(call, device: str) -> float:
    """One run, by the clock."""
    synchronize(device)
    started = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - started


def peak_mib(call, device: str) -> float | None:
    """What a run takes beyond what is there before it, or None where it is not counted."""
    if device != "cuda":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def median(call, repeats: int, device: str = "cuda", **how) -> float:
    """The median of one call alone; see `medians`."""
    return medians({"": call}, repeats, device, **how)[""]


def medians(
    calls: dict[str, Callable], repeats: int, device: str = "cuda", *, clear: bool = True, warm_up: float = WARM_UP
) -> dict[str, float]:
    """Median milliseconds of each of several calls, in rounds of one run of each, so that none is first.

    Two rounds do not count, and as many more as take `warm_up` seconds: a card that waited, for a compiler or a graph,
    starts slowly. What came first took up to 12 % longer than the same kernels in its place a moment later.

    clear: whether the GPU's cache is cleared between runs. That also lets the host run ahead, so that the time is the
    GPU's alone; without it a call whose launches take longer than its kernels takes as long as they do.
    """
    host = {}
    for call in calls.values():
        call()
    synchronize(device)
    started = time.perf_counter()
    for name, call in calls.items():
        before = time.perf_counter()
        call()
        host[name] = time.perf_counter() - before
        synchronize(device)
    while time.perf_counter() - started < warm_up:
        for call in calls.values():
            call()
        synchronize(device)
    times: dict[str, list] = {name: [] for name in calls}
    if device != "cuda":
        for _ in range(repeats):
            for name, call in calls.items():
                times[name].append(seconds(call, device) * 1000)
    else:
        # What is cleared between the calls is larger than the cache, and takes longer (0.2 ms a GiB at 5 TB/s) than
        # the host needs for the launches.
        filler = torch.empty(1 << 30 if clear else 0, dtype=torch.uint8, device="cuda")
        pairs = {name: [] for name in calls}
        for _ in range(repeats):
            for name, call in calls.items():
                for _ in range(2 + int(host[name] / 1e-4)):
                    filler.zero_()
                pair = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
                pair[0].record()
                call()
                pair[1].record()
                pairs[name].append(pair)
        torch.cuda.synchronize()
        times = {name: [start.elapsed_time(end) for start, end in taken] for name, taken in pairs.items()}
    return {name: sorted(taken)[len(taken) // 2] for name, taken in times.items()}


def kernel_times(call) -> dict[str, float]:
    """Milliseconds on the GPU by kernel, the longest first; what takes less than 1 us is left out."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        call()
        torch.cuda.synchronize()
    times = {event.key: event.device_time_total / 1000 for event in recorded.key_averages()}
    return {name: time for name, time in sorted(times.items(), key=lambda item: -item[1]) if time >= 0.001}


def replay(call, device: str = "cuda"):
    """The call as a replay of its CUDA graph, so that what it launches costs no time of the host's."""
    if device != "cuda":
        return call
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay

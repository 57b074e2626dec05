"""How long something takes, how much memory it needs and how wrong it is, the same way everywhere in the project."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping
from statistics import median

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler would print two lines for every measurement


def peak_bytes(step: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """Most tensor memory alive at one moment of ``step()``, in bytes, above what was alive before it.

    On CUDA this is the allocator's own peak counter. On the CPU every allocation and release is traced by the
    profiler, so the figure is exact and repeatable; memory that a library takes behind torch's back is not seen.
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        step()
    assert trace.profiler is not None and trace.profiler.kineto_results is not None
    changes = [(e.start_ns(), e.nbytes()) for e in trace.profiler.kineto_results.events() if e.name() == "[memory]"]
    trace.profiler = None  # torch 2.6 keeps the trace alive in a cycle, and all events with it
    alive = peak = 0
    for _, change in sorted(changes, key=lambda event: event[0]):
        alive += change
        peak = max(peak, alive)
    return peak


def beyond(peak: float, seconds: float, gigabytes: float, call_seconds: float) -> str | None:
    """Why something is not run that is expected to need so many bytes and seconds; ``None`` within the limits."""
    if peak > gigabytes * 1e9:
        return f"would need about {peak / 1e9:.2g} GB, the limit is {gigabytes:g}"
    if seconds > call_seconds:
        return f"would take about {seconds:.2g} s a call, the limit is {call_seconds:g}"
    return None


def interleaved_seconds(
    contenders: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 7,
    device: torch.device | str = "cpu",
) -> dict[str, list[float]]:
    """Seconds per call of each contender in each of ``rounds`` rounds, one after the other in every round.

    Interleaving lets a machine whose speed drifts slow all contenders alike; compare medians or ratios, round by round.
    """
    cuda = torch.device(device).type == "cuda"

    def timed(step: Callable[[], object]) -> float:
        if cuda:
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        step()
        if cuda:
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    for step in contenders.values():
        timed(step)  # warm-up: compilation, allocator, thread pools
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, step in contenders.items():
            seconds[name].append(timed(step))
    return seconds


def graphed(step: Callable[[], object]) -> Callable[[], object]:
    """The step as a CUDA graph, replayed: what the device takes, however slow the host is."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def median_ratio(slow: list[float], fast: list[float]) -> float:
    """Median over rounds of ``slow / fast``: how many times faster the second contender is."""
    return median(a / b for a, b in zip(slow, fast, strict=True))


def relative_error(got: Tensor, want: Tensor) -> float:
    """Frobenius distance over the size of what is wanted, which is fp64, on any device; 0 where both are 0."""
    distance, size = float((got.detach().to(want.device).double() - want).norm()), float(want.norm())
    return 0.0 if distance == 0 else distance / size if size else math.inf


def nan_last(error: float) -> float:
    """Sort key under which a NaN is the worst error of all; ``max`` alone may forget one."""
    return error if math.isfinite(error) else math.inf

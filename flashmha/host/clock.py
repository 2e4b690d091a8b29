"""Times and memory of calls, on a quiet machine."""

from __future__ import annotations

import contextlib
import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator

import torch

AHEAD = 500_000
"""Cycles a GPU is kept waiting, so that the host has a head start: a fraction of a millisecond."""


def seconds(run: Callable[[], object], calls: int, device: torch.device) -> float:
    """Seconds of one of several calls in a row: on CUDA between two events, else this thread's own time.

    The GPU starts late, so that the first launch is not in the time of those that keep it busy. ``time.thread_time``
    leaves out what other processes take, and what other threads do: where torch has several, all time counts.
    """
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(AHEAD)
        start.record()
        for _ in range(calls):
            run()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / calls
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    began = clock()
    for _ in range(calls):
        run()
    return (clock() - began) / calls


def wait(device: torch.device) -> None:
    """Until a device has done everything."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def host_seconds(run: Callable[[], object], device: torch.device) -> float:
    """Seconds that the host takes to send off one call to an idle GPU: the median of a few."""
    took: list[float] = []
    started = time.perf_counter()
    while len(took) < 9 and time.perf_counter() - started < 0.02:
        wait(device)
        began = time.perf_counter()
        run()
        took.append(time.perf_counter() - began)
    wait(device)
    return statistics.median(took)


def peak_bytes(run: Callable[[], None], device: torch.device) -> int:
    """How far the memory of tensors rises above where it stood, while something runs."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with torch.autograd.profiler.profile(profile_memory=True, use_kineto=True) as profiled:
        run()
    events = [event for event in profiled.kineto_results.events() if event.name() == "[memory]"]
    height = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        height += event.nbytes()
        highest = max(highest, height)
    return highest


@contextlib.contextmanager
def quiet_machine(device: torch.device) -> Iterator[None]:
    """One thread on a CPU, and no garbage collection."""
    threads, collecting = torch.get_num_threads(), gc.isenabled()
    gc.collect()
    gc.disable()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        if collecting:
            gc.enable()

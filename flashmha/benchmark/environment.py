"""The machine: its clock, its memory, its description."""

from __future__ import annotations

import contextlib
import gc
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from ..backends.choice.tuned import PACKAGES, installed

AHEAD = 500_000
"""Cycles a GPU is kept waiting, so that the host has a head start: a fraction of a millisecond."""


def seconds(run: Callable[[], object], calls: int, device: torch.device) -> float:
    """Seconds of one of several calls in a row: on CUDA between two events, on a CPU this thread's own time.

    The GPU starts late, so that the first launch is not in the time of those that keep it busy.

    ``time.thread_time`` leaves out what other processes take, and what other threads do: run with one thread.
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
    began = time.thread_time()
    for _ in range(calls):
        run()
    return (time.thread_time() - began) / calls


def wait(device: torch.device) -> None:
    """Until a device has done everything."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def host_seconds(run: Callable[[], object], device: torch.device) -> float:
    """What the host takes to send off one call to an idle GPU: the median of a few."""
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
def quiet(device: torch.device) -> Iterator[None]:
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


class Canary:
    """Work of one size in every round, which tells whether a GPU's clock moved and what it can do; on a CPU, none.

    A product of two matrices of 8192, in bfloat16, and a copy of 1 GiB.
    """

    SIDE, BYTES = 8192, 2**30

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.square = self.source = self.target = None
        if device.type == "cuda":
            self.square = torch.randn(self.SIDE, self.SIDE, device=device, dtype=torch.bfloat16)
            self.source, self.target = (torch.empty(self.BYTES, device=device, dtype=torch.uint8) for _ in range(2))

    def sing(self) -> dict[str, float]:
        """``gemm_tflops`` and ``copy_tbs`` (bytes read and written); nothing on a CPU, where time is counted."""
        square, source, target = self.square, self.source, self.target
        if square is None or source is None or target is None:
            return {}
        product = seconds(lambda: torch.mm(square, square), 5, self.device)
        copy = seconds(lambda: target.copy_(source), 3, self.device)
        return {"gemm_tflops": 2 * self.SIDE**3 / product / 1e12, "copy_tbs": 2 * self.BYTES / copy / 1e12}


def environment(device: torch.device) -> dict[str, Any]:
    """What the numbers depend on, asked under the conditions they are measured in."""
    found: dict[str, Any] = {
        "device": str(device),
        "cpu": processor(),
        "amx": bool(getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "packages": installed(("einops", *PACKAGES)),
    }
    if device.type == "cuda":
        found |= {
            "gpu": torch.cuda.get_device_name(device),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            **driver(device),
        }
    return found


def driver(device: torch.device) -> dict[str, str]:
    """The driver, and what the GPU is at after a run; nothing without ``nvidia-smi``."""
    fields = ("driver_version", "clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")
    index = torch.cuda.current_device() if device.index is None else device.index
    command = ["nvidia-smi", f"--id={index}", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(fields, (text.strip() for text in ran.stdout.split(","))))


def processor() -> str:
    """The name of the CPU, and the widest vectors torch uses on it."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def commit() -> dict[str, Any]:
    """The git commit this package is at, and whether files differ from it; ``None`` outside a checkout."""
    here = Path(__file__).resolve()

    def git(*arguments: str) -> str:
        ran = subprocess.run(["git", *arguments], cwd=here.parent, capture_output=True, text=True, check=True)
        return ran.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)
        return {"git": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return {"git": None, "dirty": None}

"""The machine: its clock, its memory, its description."""

from __future__ import annotations

import contextlib
import gc
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("einops", "triton", "flash-attn", "flash-attn-4", "transformer-engine")


def seconds(run: Callable[[], None], calls: int, device: torch.device) -> float:
    """Seconds of one of several calls in a row: on CUDA between two events, on a CPU this thread's own time.

    ``time.thread_time`` leaves out what other processes take, and what other threads do: run with one thread.
    """
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
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
    """A matrix product of one size that tells whether a GPU's clock moved; on a CPU, where time is counted, silent."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.square = None
        if device.type == "cuda":
            self.square = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)

    def seconds(self) -> float | None:
        """Of one product."""
        square = self.square
        if square is None:
            return None

        def multiply() -> None:
            torch.mm(square, square)

        return seconds(multiply, 5, self.device)


def environment(device: torch.device) -> dict[str, Any]:
    """What the numbers depend on."""
    found: dict[str, Any] = {
        "device": str(device),
        "cpu": processor(),
        "amx": bool(getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()),
        "threads": 1 if device.type == "cpu" else torch.get_num_threads(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "packages": {},
    }
    if device.type == "cuda":
        found |= {"gpu": torch.cuda.get_device_name(device), "cudnn": torch.backends.cudnn.version()}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found["packages"][package] = metadata.version(package)
    return found


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

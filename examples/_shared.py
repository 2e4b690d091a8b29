"""What both examples measure and print with: a clock, a memory meter, a table."""

import gc
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile


def now(device: torch.device) -> float:
    """Seconds on a clock, read when the device has finished all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def peak_memory(work: Callable[[], object], device: torch.device) -> str:
    """The most tensor memory that the work holds at one time, beyond what is allocated before it begins.

    CUDA keeps this number itself. On a CPU it is the highest running sum of the allocations and releases that torch's
    profiler sees, those inside fused operators included.
    """
    gc.collect()  # so that nothing older is released while the profiler watches
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return f"{(torch.cuda.max_memory_allocated(device) - before) / 2**20:.1f} MiB"
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler writes two lines of its own on the screen
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    held = peak = 0
    for event in sorted((event for event in events if event["name"] == "[memory]"), key=lambda event: event["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return f"{peak / 2**20:.1f} MiB"


def side_by_side(title: str, rows: list[tuple[str, str, str]]) -> None:
    """Print rows of (what, stock, flashmha)."""
    table = Table("", "stock", "flashmha", title=title, title_justify="left", title_style="bold")
    for row in rows:
        table.add_row(*row)
    Console().print(table)

"""What both examples share: a training loop with a clock, a memory meter, and the table at the end."""

import copy
import dataclasses
import gc
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

Batches = list[tuple[Tensor, Tensor]]
"""Inputs and classes."""


@dataclasses.dataclass
class Run:
    """A model, its optimizer, and the numbers that every epoch of training and every test gave."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    losses: list[float] = dataclasses.field(default_factory=list)
    train_seconds: list[float] = dataclasses.field(default_factory=list)
    accuracies: list[float] = dataclasses.field(default_factory=list)
    test_seconds: list[float] = dataclasses.field(default_factory=list)

    def train(self, batches: Batches, epoch: int) -> None:
        """One epoch; its number is the seed of the order of the batches, the same for every run."""
        start = now()
        self.model.train()
        losses = []
        for index in torch.randperm(len(batches), generator=torch.Generator().manual_seed(epoch)).tolist():
            x, y = batches[index]
            loss = F.cross_entropy(self.model(x), y)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            losses.append(loss.detach())
        self.losses.append(torch.stack(losses).mean().item())
        self.train_seconds.append(now() - start)

    @torch.inference_mode()
    def test(self, batches: Batches) -> None:
        start = now()
        self.model.eval()
        right = torch.cat([self.model(x).argmax(dim=1) == y for x, y in batches])
        self.accuracies.append(right.double().mean().item())
        self.test_seconds.append(now() - start)

    def twin(self) -> "Run":
        """A copy of the model and of its optimizer as they are now, without the numbers so far."""
        return Run(*copy.deepcopy((self.model, self.optimizer)))


def now() -> float:
    """Seconds on a clock, read when the GPU, if there is one, has done all it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_memory(work: Callable[[], object]) -> str:
    """The most tensor memory that the work holds at one time, beyond what is allocated before it begins.

    CUDA keeps this number itself. On a CPU it is the highest running sum of the allocations and releases that torch's
    profiler sees, those inside fused operators included.
    """
    gc.collect()  # nothing older shall be released while the profiler watches
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return f"{(torch.cuda.max_memory_allocated() - before) / 2**20:.1f} MiB"
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


def off(difference: float) -> str:
    """A largest difference in words."""
    return f"at most {difference:.1e} off" if difference else "the very same"


def side_by_side(title: str, rows: list[tuple[str, str, str]]) -> None:
    """Print rows of (what, stock, flashmha)."""
    caption = (
        "Times: medians over the epochs after the swap, in which both took turns; the first, a warm-up, is left out.\n"
        "Memory: the most that tensors held at one time, beyond what was there before."
    )
    table = Table("", "stock", "flashmha", title=title, caption=caption, title_justify="left", caption_justify="left")
    for row in rows:
        table.add_row(*row)
    Console().print(table)

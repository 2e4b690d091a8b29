"""Time lost without each kernel, and the seconds that compiling took; backends say when they have compiled."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import threading
import time
from collections.abc import Hashable, Iterator

from ..host.torch_state import in_backward

logger = logging.getLogger("flashmha")
SECONDS = 4.0
"""Seconds that compiling a kernel takes, before this process has compiled one."""
NOTHING = 0.02
"""A first call of fewer seconds compiled nothing: the package had the kernel."""
PATIENCE = 1000
"""Calls before a problem moves, whatever they have lost: by then a backward has shown whether there are checkpoints."""
MOST_WAITS = 1024
"""The most kernels that are waited for; the one first asked for is forgotten."""


@dataclasses.dataclass(eq=False)
class Wait:
    """A kernel that problems could use.

    Attributes:
        backend: the name of its backend.
        cost: the seconds that compiling it takes, as far as is known.
        calls: how many went without it.
        lost: the seconds that were lost so.
        stays: it is never waited for in this process.
        patience: the fewest calls before it is worth its seconds.
    """

    backend: str
    cost: float
    calls: int = 0
    lost: float = 0.0
    stays: bool = False
    patience: int = PATIENCE

    @property
    def over(self) -> bool:
        """It is worth its seconds now, or is there."""
        return self.lost >= self.cost and self.calls >= self.patience and not self.stays

    def lose(self, seconds: float) -> None:
        """Count a call. In a backward it is a checkpoint that computes a forward again, and has to find the backend
        that the forward found: then everything stays as it is."""
        if in_backward():
            self.stays = True
        self.calls += 1
        self.lost += seconds

    def __str__(self) -> str:
        if self.stays:
            return "never waited for, since checkpoints compute forwards again, which must not find another backend"
        return f"{self.lost:.3g} of {self.cost:.3g} seconds lost without it so far"


class Waits:
    """The kernels that are waited for, and what compiling took in this process; of all threads.

    Args:
        cost: the seconds of compiling a kernel, before one was compiled.
        patience: the fewest calls before a problem moves.
        most: the most kernels that are waited for.
    """

    def __init__(self, cost: float = SECONDS, patience: int = PATIENCE, most: int = MOST_WAITS) -> None:
        self.lock = threading.Lock()
        self.begin(cost, patience, most)

    def begin(self, cost: float = SECONDS, patience: int = PATIENCE, most: int = MOST_WAITS) -> None:
        """Nothing is lost and nothing compiled yet."""
        self.cost, self.patience, self.most = cost, patience, most
        self.kernels: dict[tuple[str, Hashable], Wait] = {}
        self.took: dict[str, tuple[int, float]] = {}

    def seconds(self, backend: str) -> float:
        """Seconds that compiling a kernel of a backend takes: the mean of those compiled here."""
        count, total = self.took.get(backend, (0, 0.0))
        return total / count if count else self.cost

    def find(self, backend: str, kernel: Hashable) -> Wait | None:
        """The wait for a kernel; ``None`` where no problem has lost anything without it."""
        return self.kernels.get((backend, kernel))

    def of(self, backend: str, kernel: Hashable, needs_grad: bool) -> Wait:
        """The wait for a kernel, from now on; a training needs one a direction."""
        name = (backend, kernel)
        with self.lock:
            found = self.kernels.get(name)
            if found is None:
                if len(self.kernels) >= self.most:
                    self.kernels.pop(next(iter(self.kernels)))
                cost = self.seconds(backend) * (2 if needs_grad else 1)
                found = self.kernels[name] = Wait(backend, cost, patience=self.patience)
        return found

    def end(self, backend: str, kernel: Hashable, seconds: float) -> None:
        """A kernel is there, and its first call took some seconds: problems that wait for it move."""
        with self.lock:
            wait = self.kernels.pop((backend, kernel), None)
            if wait is not None:
                wait.lost = float("inf")
            if seconds < NOTHING:
                return
            count, total = self.took.get(backend, (0, 0.0))
            self.took[backend] = (count + 1, total + seconds)
        logger.info("%s compiled a kernel in %.1f s", backend, seconds)

    @contextlib.contextmanager
    def ending(self, backend: str, kernel: Hashable) -> Iterator[None]:
        """Around the first call of a kernel; one that raises compiled nothing."""
        start = time.perf_counter()
        yield
        self.end(backend, kernel, time.perf_counter() - start)


waits = Waits()

"""Values that are computed on first use, and a bound on how many may wait."""

from __future__ import annotations

import collections
import contextlib
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..host.torch_state import is_inference, is_stream_capturing


class Source(Protocol):
    """What answers questions about values without making all of them."""

    def reduce(self, kind: str, axes: Sequence[int]) -> Tensor:
        """The ``"sum"`` or ``"amax"`` over some axes, which stay with size 1."""

    def take(self, axis: int, places: Sequence[int]) -> Tensor | None:
        """Some places of an axis, in their order; ``None`` where that would be no cheaper."""


class Cell:
    """The values that a deferred tensor and its aliases share, or what makes them.

    ``cost`` is how many bytes the cell holds until then beyond those of the values.
    """

    __slots__ = ("__weakref__", "cost", "inference", "lock", "made", "make", "process", "source", "stream")

    def __init__(
        self,
        make: Callable[[], Tensor],
        device: torch.device,
        cost: int = 0,
        source: Source | None = None,
    ) -> None:
        self.make: Callable[[], Tensor] | None = make
        self.source = source
        self.made: Tensor | None = None
        self.cost = cost
        self.inference = is_inference()
        self.process, self.lock = os.getpid(), threading.RLock()
        self.stream = torch._C._cuda_getCurrentStream(device.index) if device.type == "cuda" else None

    def values(self) -> Tensor:
        """The values, outside autograd; several threads get one tensor."""
        with self.computing():
            first, made = self.made is None, self.made
            if made is None:
                assert self.make is not None
                self.made = made = self.make()
                self.make = self.source = None  # and with them everything they hold
        return self.share(made) if first else made

    def look(self, question: str, *args: Any) -> Tensor | None:
        """What the source answers where the values are not there; ``None`` where they are, or it has no answer."""
        with self.computing():
            found: Tensor | None = None if self.source is None else getattr(self.source, question)(*args)
        return None if found is None else self.share(found)

    def share(self, made: Tensor) -> Tensor:
        """Tell the memory of what was made that the current stream reads it."""
        if self.stream is not None:
            made.record_stream(torch.cuda.current_stream(made.device))
        return made

    @contextlib.contextmanager
    def computing(self) -> Iterator[None]:
        """Compute as at the call, one thread at a time."""
        forked = self.process != os.getpid()
        if forked:  # a lock that another thread held at the fork stays locked
            self.process, self.lock = os.getpid(), threading.RLock()
        with self.lock:
            if self.made is not None:
                yield
                return
            with (
                torch.inference_mode(self.inference),
                torch.no_grad(),
                run_on_one_thread() if forked else run_on_stream(self.stream),
            ):
                yield


@contextlib.contextmanager
def run_on_one_thread() -> Iterator[None]:
    """Compute in a forked process, where the parent's worker threads do not exist and waiting for them never ends."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextlib.contextmanager
def run_on_stream(stream: tuple[int, int, int] | None) -> Iterator[None]:
    """Run on the stream that made the inputs, and let the current one wait for the result."""
    if stream is None or stream == torch._C._cuda_getCurrentStream(stream[1]):
        yield
        return
    identity, index, kind = stream
    maker = torch.cuda.Stream(stream_id=identity, device_index=index, device_type=kind)
    with torch.cuda.stream(maker):
        yield
    torch.cuda.current_stream(index).wait_stream(maker)


MOST_UNREAD = 4
"""How many unread tensors may hold more than their values would. A model's blocks drop theirs before the next ones."""
unread: collections.deque[weakref.ref[Cell]] = collections.deque()
"""The cells of the latest of them."""


def note_unread(cell: Cell) -> None:
    """Compute the oldest unread values that cost more memory unread, once there are more than ``MOST_UNREAD``.

    Maps that a caller keeps then cost their values, and not what they are made of.
    """
    if cell.cost <= 0:
        return
    unread.append(weakref.ref(cell))
    while len(unread) > MOST_UNREAD:
        try:
            oldest = unread.popleft()()
        except IndexError:  # another thread took it
            return
        if oldest is None or oldest.made is not None:
            continue
        if oldest.stream is not None and is_stream_capturing():
            continue  # a graph would hold the kernels
        with contextlib.suppress(torch.OutOfMemoryError):  # a later look says so
            oldest.values()

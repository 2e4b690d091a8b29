"""Values that are computed on first use, and a bound on how many may wait."""

from __future__ import annotations

import collections
import contextlib
import math
import os
import threading
import weakref
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from ..host.torch_state import is_inference, is_stream_capturing
from .regions import Layout, Region


class Source(Protocol):
    """What makes values, and answers questions about them without making all."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    answers: frozenset[Any]
    """The operators that ``answer`` may know."""
    cost: int
    """Bytes that it holds beyond those of the values."""

    def make(self) -> Tensor:
        """The values."""

    def part(self, region: Region) -> Tensor | None:
        """The view of some places; ``None`` where that is no cheaper than all."""

    def answer(self, func: Any, layout: Layout, region: Region, args: Any, kwargs: Any) -> Tensor | Source | None:
        """What an operator makes of some places of the values, which lie as ``layout`` says.

        ``None`` where it has to have the values.
        """


LEAST_SPENT = 2**12
"""What a look at a few values costs, as so many values of a map that is made at once."""


class Cell:
    """The values that a deferred tensor and its views share, or what makes them."""

    __slots__ = (
        "__weakref__",
        "device",
        "inference",
        "lock",
        "lock_process",
        "made",
        "process",
        "source",
        "spent",
        "stream",
    )

    def __init__(self, source: Source) -> None:
        self.source: Source | None = source
        self.made: Tensor | None = None
        self.spent = 0
        self.inference = is_inference()
        self.process = self.lock_process = os.getpid()
        self.lock = threading.RLock()
        self.device = device = source.device
        self.stream = torch._C._cuda_getCurrentStream(device.index) if device.type == "cuda" else None

    def values(self) -> Tensor:
        """The values, outside autograd; several threads get one tensor."""
        with self.locked():
            made = self.made
            if made is None:
                assert self.source is not None
                with self.computing():
                    self.made = made = self.source.make()
                self.source = None  # and with it everything it holds
                self.share(made)
        return made

    def part(self, region: Region) -> Tensor | None:
        """The view of some places, made alone; ``None`` where all are there, or as soon as all would cost no more.

        What was looked at before counts, so that a map that is read row by row is made in the end.
        """
        with self.locked():
            source, count = self.source, region.numel
            if source is None or self.spent + count > math.prod(source.shape) // 2:
                return None
            self.spent += max(count, LEAST_SPENT)
            with self.computing():
                found = source.part(region)
        return None if found is None else self.share(found)

    def ask(self, func: Any, layout: Layout, region: Region, args: Any, kwargs: Any) -> Tensor | Source | None:
        """What an operator makes of some places; ``None`` where the values are there, or have to be."""
        with self.locked():
            if self.source is None:
                return None
            with self.computing():
                found = self.source.answer(func, layout, region, args, kwargs)
        return self.share(found) if isinstance(found, Tensor) else found

    def share(self, made: Tensor) -> Tensor:
        """Tell the memory of what was made that the current stream reads it, where another one made it."""
        if not is_current(self.stream):
            made.record_stream(torch.cuda.current_stream(made.device))
        return made

    def locked(self) -> contextlib.AbstractContextManager[Any]:
        """One thread at a time."""
        process = os.getpid()
        if self.lock_process != process:  # a lock that another thread held at the fork stays locked
            self.lock_process, self.lock = process, threading.RLock()
        return self.lock

    def computing(self) -> contextlib.AbstractContextManager[Any]:
        """Compute as at the call; without a gradient, which nothing here has."""
        alike = is_inference() == self.inference and self.process == self.lock_process
        if not alike or not is_current(self.stream):
            return self.computing_elsewhere()
        return torch.no_grad() if torch.is_grad_enabled() else UNCHANGED

    @contextlib.contextmanager
    def computing_elsewhere(self) -> Iterator[None]:
        """The same on another stream, in another process or beside another mode."""
        forked = self.process != self.lock_process
        with (
            torch.inference_mode(self.inference),
            torch.no_grad(),
            run_on_one_thread() if forked else run_on_stream(self.stream),
        ):
            yield


UNCHANGED = contextlib.nullcontext()
Stream = tuple[int, int, int]
"""What torch calls a stream: its number, device and kind."""


def is_current(stream: Stream | None) -> bool:
    """A stream is its device's current one; also where there is none."""
    return stream is None or stream == torch._C._cuda_getCurrentStream(stream[1])


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
def run_on_stream(stream: Stream | None) -> Iterator[None]:
    """Run on the stream that made the inputs, and let the current one wait for the result."""
    if stream is None or is_current(stream):
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
    if cell.source is None or cell.source.cost <= 0:
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

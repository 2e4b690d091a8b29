"""Which attentions ran: the layer, the problem and the backend of each."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Iterator
from typing import Any

from ...problem.spec import AttentionSpec
from ..base import Backend


@dataclasses.dataclass(frozen=True, eq=False)
class Call:
    """One attention that ran: the layer it ran for (``None`` for a bare call), the problem, the backend's name."""

    layer: Any
    spec: AttentionSpec
    backend: str

    def __str__(self) -> str:
        layer = "" if self.layer is None else f"{type(self.layer).__name__}: "
        return f"{layer}{self.backend} <- {self.spec}"


class Recording(threading.local):
    """The list that ``record`` set, a thread."""

    calls: list[Call] | None = None


recording = Recording()


@contextlib.contextmanager
def record() -> Iterator[list[Call]]:
    """List every attention of this thread inside the ``with``: layer, spec, backend. Compiled code is not listed."""
    before = recording.calls
    calls: list[Call] = []
    recording.calls = calls
    try:
        yield calls
    finally:
        recording.calls = before


def note(layer: Any, spec: AttentionSpec, backend: Backend) -> None:
    """Tell ``record`` what is about to run."""
    if recording.calls is not None:
        recording.calls.append(Call(layer, spec, backend.name))

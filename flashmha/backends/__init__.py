"""The registry, an ordered list of backends that users can read and change, and the choice among them.

Strongest first, a problem goes to the backend named in the call or on the layer, by ``with use_backend(...)``, or in
the environment variable ``FLASHMHA_BACKEND``; else to the first in ``order(spec)`` without a reason against it. A
backend that was named and cannot serve raises: nothing falls back in silence.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import threading
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from ..errors import NoBackendError, lines
from ..spec import AttentionSpec
from .base import FEATURES, Backend, Limits
from .flash2 import Flash2
from .flash3 import Flash3
from .flash4 import Flash4
from .flex import Flex
from .naive import Naive
from .sdpa import Sdpa

__all__ = [
    "FAMILIES",
    "FEATURES",
    "Backend",
    "Call",
    "Explanation",
    "Limits",
    "choose",
    "explain",
    "get",
    "names",
    "note",
    "order",
    "record",
    "register",
    "unregister",
    "use_backend",
]

Wanted = str | Sequence[str] | None
B = TypeVar("B", bound=type[Backend])
VARIABLE = "FLASHMHA_BACKEND"
FAMILIES: dict[str, tuple[str, ...]] = {"flash_attn": ("flash4", "flash3", "flash2")}
"""One name for several backends, in the order they are tried."""

entries: dict[str, Backend] = {}


def register(backend: B, *, before: str | None = None) -> B:
    """Add a backend class to the end of the list, or in front of another; a decorator.

    A name that is taken raises ``ValueError``.
    """
    if not isinstance(backend, type):
        raise TypeError(f"register takes a Backend class, got {backend!r}.")
    made = backend()
    if made.name in entries or made.name in FAMILIES:
        raise ValueError(f"name must not be taken, got {made.name!r}; unregister({made.name!r}) first to replace it.")
    if before is not None:
        get(before)
    earlier = dict(entries)
    entries.clear()
    for name, other in earlier.items():
        if name == before:
            entries[made.name] = made
        entries[name] = other
    entries[made.name] = made
    return backend


def unregister(name: str) -> None:
    """Take a backend off the list."""
    get(name)
    del entries[name]


def names() -> tuple[str, ...]:
    """The registered backends, in order."""
    return tuple(entries)


def get(name: str) -> Backend:
    """The backend of a name; ``ValueError`` with the names there are."""
    if name not in entries:
        raise ValueError(f"backend must be one of {', '.join((*entries, *FAMILIES))}, got {name!r}.")
    return entries[name]


def expand(wanted: str | Sequence[str]) -> tuple[str, ...]:
    """Backend names out of one name, a family, or a list of both."""
    if not isinstance(wanted, str):
        if not isinstance(wanted, (list, tuple)):
            raise TypeError(f"backend must be a name, a family or a list of them, got {wanted!r}.")
        return tuple(name for one in wanted for name in expand(one))
    if wanted in FAMILIES:
        return FAMILIES[wanted]
    return (get(wanted).name,)


def order(spec: AttentionSpec) -> tuple[str, ...]:
    """The order in which automatic choice asks.

    On a CPU flex runs unfused, so the definition goes first. On a GPU a window, a softcap or packed documents make
    SDPA build a dense mask, which the flash-attn packages and flex never do.
    """
    first: tuple[str, ...] = ("sdpa",)
    if spec.device.type == "cpu":
        first = ("sdpa", "naive")
    elif spec.features & {"window", "documents", "softcap"}:
        first = ("flash4", "flash3", "flash2", "flex", "sdpa")
    first = tuple(name for name in first if name in entries)
    return (*first, *(name for name in entries if name not in first))


class State(threading.local):
    """What ``use_backend`` and ``record`` set, a thread. (Dynamo guards a ``threading.local``, no ``ContextVar``.)"""

    wanted: Wanted = None
    calls: list[Call] | None = None


state = State()


def preference(wanted: Wanted = None) -> Wanted:
    """The names that were asked for, by the strongest of call, context and environment; ``None`` for automatic."""
    if wanted is not None:
        return wanted
    if state.wanted is not None:
        return state.wanted
    named = os.environ.get(VARIABLE)
    return [name.strip() for name in named.split(",")] if named else None


@contextlib.contextmanager
def use_backend(backend: str | Sequence[str]) -> Iterator[None]:
    """Ask for a backend, or a list in order, in every call of this thread inside the ``with``."""
    expand(backend)
    before = state.wanted
    state.wanted = backend
    try:
        yield
    finally:
        state.wanted = before


def reason(backend: Backend, spec: AttentionSpec) -> str | None:
    """Why a backend cannot serve a problem here and now; ``None`` where it can."""
    return backend.unsupported(spec) or backend.unavailable(spec.device) or backend.unbuilt(spec)


def choose(spec: AttentionSpec, wanted: Wanted = None) -> Backend:
    """The backend that serves a problem.

    Raises:
        NoBackendError: nobody can, or the one that was named cannot; with every reason.
    """
    asked = preference(wanted)
    candidates = order(spec) if asked is None else expand(asked)
    reasons: dict[str, str] = {}
    for name in candidates:
        why = reason(entries[name], spec)
        if why is None:
            return entries[name]
        reasons[name] = why
    raise NoBackendError(spec, reasons, None if asked is None else repr(asked))


@dataclasses.dataclass(frozen=True, eq=False)
class Explanation:
    """Which backend serves a problem, and why not the others; print it.

    Attributes:
        spec: the problem.
        chosen: the backend that would run, ``None`` if nobody can.
        rows: backend name -> ``"chosen"``, ``"could serve"`` or the reason against it.
    """

    spec: AttentionSpec
    chosen: str | None
    rows: dict[str, str]

    def __str__(self) -> str:
        return f"{self.spec}\n{lines(self.rows)}"


def explain(spec: AttentionSpec, wanted: Wanted = None) -> Explanation:
    """One line a backend for a problem, in the order they are asked."""
    asked = preference(wanted)
    candidates = order(spec) if asked is None else expand(asked)
    rows: dict[str, str] = {}
    chosen: str | None = None
    for name in (*candidates, *(name for name in order(spec) if name not in candidates)):
        why = entries[name].unavailable(spec.device)
        why = (f"not available: {why}" if why else None) or reason(entries[name], spec)
        if why is None and chosen is None and name in candidates:
            chosen, why = name, "chosen"
        rows[name] = why or ("could serve" if name in candidates else "could serve, not asked for")
    return Explanation(spec, chosen, rows)


@dataclasses.dataclass(frozen=True, eq=False)
class Call:
    """One attention that ran: the layer it ran for (``None`` for a bare call), the problem, the backend's name."""

    layer: Any
    spec: AttentionSpec
    backend: str

    def __str__(self) -> str:
        who = "" if self.layer is None else f"{type(self.layer).__name__}: "
        return f"{who}{self.backend} <- {self.spec}"


@contextlib.contextmanager
def record() -> Iterator[list[Call]]:
    """List every attention of this thread inside the ``with``: layer, spec, backend. Compiled code is not listed."""
    before = state.calls
    calls: list[Call] = []
    state.calls = calls
    try:
        yield calls
    finally:
        state.calls = before


def note(layer: Any, spec: AttentionSpec, backend: Backend) -> None:
    """Tell ``record`` what is about to run."""
    if state.calls is not None:
        state.calls.append(Call(layer, spec, backend.name))


for kind in (Sdpa, Flash4, Flash3, Flash2, Flex, Naive):
    register(kind)

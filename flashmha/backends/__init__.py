"""The choice among the backends on the list, which users can read and change.

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
from typing import Any

from ..errors import NoBackendError, lines
from ..spec import SHARED, AttentionSpec
from . import registry
from .base import FEATURES, Backend, Limits
from .flash2 import Flash2
from .flash3 import Flash3
from .flash4 import Flash4
from .flex import Flex
from .naive import Naive
from .registry import FAMILIES, discover, expand, get, names, origin, register, unregister
from .sdpa import Sdpa

__all__ = [
    "FAMILIES",
    "FEATURES",
    "Backend",
    "Call",
    "Explanation",
    "Limits",
    "choose",
    "expand",
    "explain",
    "get",
    "names",
    "note",
    "order",
    "origin",
    "record",
    "register",
    "unregister",
    "use_backend",
]

Wanted = str | Sequence[str] | None
VARIABLE = "FLASHMHA_BACKEND"


def order(spec: AttentionSpec) -> tuple[str, ...]:
    """The order in which automatic choice asks: the list's, but for one detour.

    On a CPU flex runs unfused, so it waits behind the definition. On a GPU a window, a softcap or packed documents make
    SDPA build a dense mask, which the flash-attn packages and flex never do, so it waits behind flex.
    """
    return tuple(candidates(spec))


def candidates(spec: AttentionSpec) -> Iterator[str]:
    """``order``, one by one, since the first seldom refuses."""
    discover()
    entries, late, anchor = registry.entries, "", ""
    if spec.device.type == "cpu":
        late, anchor = "flex", "naive"
    elif spec.features & {"window", "documents", "softcap"}:
        late, anchor = "sdpa", "flex"
    for name in entries:
        if name != late or anchor not in entries:
            yield name
        if name == anchor and late in entries:
            yield late


class State(threading.local):
    """What ``use_backend`` and ``record`` set, a thread. (Dynamo guards a ``threading.local``, no ``ContextVar``.)"""

    wanted: Wanted = None
    calls: list[Call] | None = None


state = State()


def asked(wanted: Wanted = None) -> tuple[str, Wanted]:
    """The strongest wish of call, context and environment: where it was said, and the names; ``None`` for automatic."""
    if wanted is not None:
        return "backend", wanted
    if state.wanted is not None:
        return "use_backend", state.wanted
    named = os.environ.get(VARIABLE)
    return VARIABLE, [name.strip() for name in named.split(",")] if named else None


def preference(wanted: Wanted = None) -> Wanted:
    """The names that were asked for; ``None`` for automatic."""
    return asked(wanted)[1]


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


chosen: dict[AttentionSpec, tuple[dict[str, Backend], Backend]] = {}
"""What automatic choice said about a shared problem, and for which list of backends."""


def choose(spec: AttentionSpec, wanted: Wanted = None) -> Backend:
    """The backend that serves a problem.

    Raises:
        NoBackendError: nobody can, or the one that was named cannot; with every reason.
    """
    said, named = asked(wanted)
    remember = named is None and spec.shared
    if remember and spec in chosen:
        entries, backend = chosen[spec]
        if entries is registry.entries:
            return backend
    reasons: dict[str, str] = {}
    for name in candidates(spec) if named is None else expand(named, said):
        backend = registry.entries[name]
        why = reason(backend, spec)
        if why is None:
            if remember:
                if len(chosen) >= SHARED:
                    chosen.clear()
                chosen[spec] = (registry.entries, backend)
            return backend
        reasons[name] = why
    raise NoBackendError(spec, reasons, None if named is None else f"{said}={named!r}")


@dataclasses.dataclass(frozen=True, eq=False)
class Explanation:
    """Which backend serves a problem, and why not the others; print it.

    Attributes:
        spec: the problem.
        chosen: the backend that would run, ``None`` if nobody can.
        rows: backend name -> ``"chosen"``, ``"could serve"`` or the reason against it.
        notes: what a layer does beside that.
    """

    spec: AttentionSpec
    chosen: str | None
    rows: dict[str, str]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "\n".join((f"{self.spec}\n{lines(self.rows)}", *self.notes))


def explain(spec: AttentionSpec, wanted: Wanted = None) -> Explanation:
    """One line a backend for a problem, in the order they are asked."""
    said, named = asked(wanted)
    candidates = order(spec) if named is None else expand(named, said)
    rows: dict[str, str] = {}
    chosen: str | None = None
    for name in (*candidates, *(name for name in order(spec) if name not in candidates)):
        backend = registry.entries[name]
        why = backend.unavailable(spec.device)
        why = (f"not available: {why}" if why else None) or reason(backend, spec)
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

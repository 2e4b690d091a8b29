"""The choice among the backends on the list, which users can read and change.

Strongest first, a problem goes to the backend named in the call or on the layer, by ``with use_backend(...)``, or in
the environment variable ``FLASHMHA_BACKEND``; else to the first in ``order(spec)`` without a reason against it, for a
short problem to the first that need not compile. A backend that was named and cannot serve raises: nothing falls back
in silence.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import threading
from collections.abc import Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from ..host.torch_state import asks_deterministic, in_backward, only_warns, surely
from ..problem.errors import NoBackendError
from ..problem.spec import SHARED, AttentionSpec
from ..problem.wording import lines
from .base import FEATURES, Backend, Limits, written
from .choice import registry, tuned
from .choice.ranking import LAST, WORTH, work
from .choice.registry import FAMILIES, discover, expand, get, names, origin, prefer, register, unregister
from .choice.tuned import load_tuned
from .choice.waiting import keeps, loss
from .compiling import Wait, waits
from .flash_attn.flash2 import Flash2
from .flash_attn.flash3 import Flash3
from .flash_attn.flash4 import Flash4
from .flex import Flex
from .naive import Naive
from .sdpa.backend import Sdpa, packs, switches

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
    "load_tuned",
    "names",
    "note",
    "order",
    "origin",
    "prefer",
    "record",
    "register",
    "unregister",
    "use_backend",
]

Wanted = str | Sequence[str] | None
VARIABLE = "FLASHMHA_BACKEND"
KEY: Any = os.environ.encodekey(VARIABLE)
"""The name as ``os.environ`` keeps it."""


OWN = (Sdpa, Flash4, Flash3, Flash2, Flex, Naive)
"""This package's own backends, in the order of the list."""


def order(spec: AttentionSpec) -> tuple[str, ...]:
    """The order in which automatic choice asks: the list's, in which our own backends stand as they were measured.

    Others stay where they were registered, and what ``prefer`` moved stays there. SDPA comes first of our own while one
    of its switches is off, as inside ``sdpa_kernel(...)``: it alone obeys them; and for short problems inside a graph.
    """
    discover()
    row = tuned.row(spec)
    first = () if row is None else row.order
    late = anchor = ""
    if spec.device.type == "cpu":
        late, anchor = "flex", "naive"
    elif spec.features & BUILDS_MASKS and not packs(spec):
        late, anchor = "sdpa", "flex"
        first = tuple([name for name in first if name != late])  # what it was measured at is not what it would do
    if late in registry.preferred:
        late = ""
    if switched(spec) or (late != "sdpa" and is_part(spec)):
        first = ("sdpa", *first)
    if torch.compiler.is_compiling():
        return arranged(registry.entries, first, late, anchor)
    return remembered(registry.entries, first, late, anchor)


def is_part(spec: AttentionSpec) -> bool:
    """A short problem in a graph that is compiled for a GPU: launching another package's kernel takes longer there than
    it saves. Of sizes that are symbols nothing is known, nor asked, which would bind the graph to it."""
    if not torch.compiler.is_compiling() or spec.device.type != "cuda":
        return False
    return surely(work(spec) < WORTH)


BUILDS_MASKS = frozenset(("window", "documents", "softcap"))
"""Where SDPA makes a dense mask on a GPU unless it packs documents, or does nothing."""
orders: tuple[dict[str, Backend], dict[Any, tuple[str, ...]]] = ({}, {})
"""A list of backends, and the orders that were made of it."""


def remembered(entries: dict[str, Backend], first: tuple[str, ...], late: str, anchor: str) -> tuple[str, ...]:
    """``arranged``, made once a list."""
    global orders
    listed, known = orders
    if listed is not entries:
        known = {}
        orders = (entries, known)
    names = known.get((first, late))
    if names is None:
        names = known[first, late] = arranged(entries, first, late, anchor)
    return names


def arranged(entries: dict[str, Backend], first: tuple[str, ...], late: str, anchor: str) -> tuple[str, ...]:
    """The list with one behind another, and then some of our own first among our own.

    On a CPU flex runs unfused, so it waits behind the definition. On a GPU a window, a softcap or documents it cannot
    pack make SDPA build a dense mask, and a deterministic backward takes it to its unfused kernel, which the flash-attn
    packages and flex never do, so it waits behind flex.
    """
    names = list(entries)
    if late in entries and anchor in entries:
        names = [name for name in names if name != late]  # Dynamo 2.8 does not trace list.remove
        names.insert(names.index(anchor) + 1, late)
    if not first:
        return tuple(names)
    own = [name for name in names if type(entries[name]) in OWN and name not in registry.preferred]
    ahead = [name for name in dict.fromkeys(first) if name in own]
    ranked = iter([*ahead, *[name for name in own if name not in ahead]])
    return tuple([next(ranked) if name in own else name for name in names])


def switched(spec: AttentionSpec) -> bool:
    """One of the process-wide switches of SDPA's kernels, which concern a GPU alone, is off."""
    return spec.device.type == "cuda" and not all(switches())


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
    values = getattr(os.environ, "_data", None)
    if values is not None and KEY not in values:  # where ``get`` would raise and catch two exceptions, in every call
        return VARIABLE, None
    return VARIABLE, read_variable()


def read_variable() -> list[str] | None:
    """The names in ``FLASHMHA_BACKEND``; ``None`` where it is not set, or to nothing."""
    named = os.environ.get(VARIABLE)
    return [name.strip() for name in named.split(",")] if named else None


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


class Choice(NamedTuple):
    """What automatic choice said about a problem, and under which list, tuned table and switches of torch: whether it
    is to be deterministic, and those of SDPA. A call loses ``loss`` seconds without the kernel of ``wait``."""

    entries: object
    table: object
    under: tuple[bool, ...]
    backend: Backend
    wait: Wait | None
    loss: float


chosen: dict[Any, Choice] = {}
"""What was chosen for a problem: itself where it is shared, else its form or its outline."""


def kept(spec: AttentionSpec) -> Choice | None:
    """What was chosen for a problem before, where it still holds."""
    name = spec if spec.shared else spec.form or spec.outline
    known = None if name is None else chosen.get(name)
    if known is None:
        return None
    entries, table, under, _, wait, _ = known
    if entries is not registry.entries or table is not tuned.state.table:
        return None
    if wait is not None and wait.over and movable(spec):
        return None
    return None if under and under != (asks_deterministic(), only_warns(), *switches()) else known


def keep(spec: AttentionSpec, backend: Backend, reasons: dict[str, str], wait: Wait | None) -> None:
    """Remember the backend of a problem, and for a problem with tensors only what our own have said and will say again.

    Others may look at the tensors. Nothing is remembered that was found while a CUDA graph was captured, where a
    package that was not tried out yet is refused.
    """
    name = spec if spec.shared else spec.form or spec.outline
    if name is None or capturing(spec):
        return
    stays = keeps()
    if not spec.shared:
        asked = (backend, *(registry.entries[other] for other in reasons))
        if any(type(one) not in OWN for one in asked) or unready(backend, spec) is not None:
            return
        waited = wait is None and not stays and any(why.startswith(WAITS) for why in reasons.values())
        if waited or any("out of memory" in why for why in reasons.values()):
            return
    if len(chosen) >= SHARED:
        chosen.clear()
    under = (asks_deterministic(), only_warns(), *switches()) if spec.device.type == "cuda" else ()
    given = (None, 0.0) if stays or wait is None else (wait, loss(spec))
    chosen[name] = Choice(registry.entries, tuned.state.table, under, backend, *given)


def capturing(spec: AttentionSpec) -> bool:
    """A CUDA graph is being captured around a problem."""
    return spec.device.type == "cuda" and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def choose(spec: AttentionSpec, wanted: Wanted = None, calls: int = 1) -> Backend:
    """The backend that serves a problem, in as many calls as will follow at once.

    Raises:
        NoBackendError: nobody can, or the one that was named cannot; with every reason.
        ValueError: the file in ``FLASHMHA_TUNED`` is not for this machine.
    """
    said, named = asked(wanted)
    reasons: dict[str, str] = {}
    if named is not None:
        for name in expand(named, said):
            backend = registry.entries[name]
            why = reason(backend, spec)
            if why is None:
                return backend
            reasons[name] = why
        raise NoBackendError(spec, reasons, f"{said}={named!r}")
    before = kept(spec)
    if before is not None:
        if before.wait is not None:
            before.wait.lose(before.loss * calls)
        return before.backend
    found, compiles, passed = pick(spec, reasons)
    if found is None:
        raise NoBackendError(spec, reasons)
    if compiles is not None:
        logger.info("%s compiles before it serves %s: %s", found.name, spec, compiles)
    wait = None
    if passed is not None and not capturing(spec):
        kernel = kernel_of(passed, spec)
        wait = None if kernel is None else waits.of(passed.name, kernel, spec.needs_grad)
        if wait is not None:
            wait.lose(loss(spec) * calls)
    keep(spec, found, reasons, wait)
    return found


logger = logging.getLogger("flashmha")


def pick(spec: AttentionSpec, reasons: dict[str, str]) -> tuple[Backend | None, str | None, Backend | None]:
    """Automatic choice: a backend, what it has to compile first, and one that was passed over since it would have to.

    Why not those before it joins ``reasons``. A short problem passes over a backend that would have to compile, where
    another but the definition, which holds every score in memory, can serve at once, until that has lost more than
    compiling takes. A long one waits for the compiler.
    """
    waiting: tuple[Backend, str] | None = None
    for name in order(spec):
        backend = registry.entries[name]
        why = reason(backend, spec)
        if why is None:
            compiles = unready(backend, spec)
            if compiles is None and (waiting is None or name != LAST):
                return backend, None, None if waiting is None else waiting[0]
            if compiles is None:
                continue
            wait = known_wait(backend, spec)
            so_far = "" if wait is None else f"; {wait}"
            if waiting is None:
                if long(spec) or (wait is not None and wait.over and movable(spec) and not keeps()):
                    return backend, f"{compiles}{so_far}", None
                waiting = (backend, compiles)
            why = f"{WAITS}: {compiles}{so_far}"
        reasons[name] = why
    return (None, None, None) if waiting is None else (*waiting, None)


WAITS = "not compiled yet"
"""What is said of a backend that was passed over."""


def unready(backend: Backend, spec: AttentionSpec) -> str | None:
    """What a backend has to compile before it serves a problem; inside another graph that is part of compiling it."""
    return None if spec.aten_only or torch.compiler.is_compiling() else backend.unready(spec)


def kernel_of(backend: Backend, spec: AttentionSpec) -> Hashable:
    """What a backend would compile for a problem; of others, no more is known than the problem."""
    return backend.kernel_key(spec) if type(backend) in OWN else spec.outline


def known_wait(backend: Backend, spec: AttentionSpec) -> Wait | None:
    """What was lost without a kernel so far; ``None`` where that was not counted."""
    kernel = kernel_of(backend, spec)
    return None if kernel is None else waits.find(backend.name, kernel)


def movable(spec: AttentionSpec) -> bool:
    """A problem may go to another backend than before: no CUDA graph is captured, and no checkpoint computes anew."""
    return not in_backward() and not capturing(spec)


def still(wait: Wait, spec: AttentionSpec) -> dict[str, str]:
    """Why a problem that was chosen for before is not served by the backend that it waits for."""
    compiles = unready(registry.entries[wait.backend], spec)
    return {} if compiles is None else {wait.backend: f"{WAITS}: {compiles}; {wait}"}


def long(spec: AttentionSpec) -> bool:
    """A kernel for the problem is worth the seconds of compiling it. Nothing is, while a CUDA graph is captured."""
    return not capturing(spec) and work(spec) >= WORTH


@dataclasses.dataclass(frozen=True, eq=False)
class Explanation:
    """Which backend serves a problem, and why not the others; print it.

    Attributes:
        spec: the problem.
        chosen: the backend that would run, ``None`` if none can, or where the answer is on paper.
        rows: backend name -> ``"chosen"``, ``"could serve"`` or the reason against it.
        notes: what a layer does beside that.
        otherwise: what to conclude where none was chosen.
    """

    spec: AttentionSpec
    chosen: str | None
    rows: dict[str, str]
    notes: tuple[str, ...] = ()
    otherwise: str = ""

    @property
    def conclusion(self) -> str:
        """The answer in a line."""
        return self.otherwise if self.chosen is None else f"chosen: {self.chosen}"

    def __str__(self) -> str:
        return "\n".join((f"{self.spec}\n{lines(self.rows)}", *self.notes, self.conclusion))


def explain(spec: AttentionSpec, wanted: Wanted = None, capability: tuple[int, int] | None = None) -> Explanation:
    """One line a backend for a problem, in the order they are asked.

    With a CUDA compute capability, such as ``(9, 0)``, the answer is on paper: what the limits of each backend say of
    a GPU that need not be here. Nothing is tried then, neither a package nor the machine.
    """
    said, named = asked(wanted)
    if capability is not None:
        return on_paper(spec, capability, said, named)
    candidates = order(spec) if named is None else expand(named, said)
    rows: dict[str, str] = {}
    passed: dict[str, str] = {}
    notes: list[str] = []
    found: Backend | None = None
    if named is None:
        before = kept(spec)
        if before is not None:
            found = before.backend
            if before.wait is not None:
                passed = still(before.wait, spec)
        else:
            found, compiles, _ = pick(spec, passed)
            notes += [] if found is None or compiles is None else [f"{found.name} compiles first: {compiles}"]
        row = tuned.row(spec)
        notes += [] if row is None else [f"our own are asked in the order of {row.source}"]
    for name in (*candidates, *(name for name in order(spec) if name not in candidates)):
        backend = registry.entries[name]
        why = absent(backend, spec) or reason(backend, spec)
        if why is None and name in candidates:
            if found is None:
                found = backend
            why = "chosen" if backend is found else passed.get(name, "could serve")
        rows[name] = why or OTHERWISE
    if found is not None:
        return Explanation(spec, found.name, rows, tuple(notes))
    able = ", ".join(name for name, text in rows.items() if text == OTHERWISE)
    who = "no backend can serve this problem" if named is None else f"{said}={named!r} cannot serve this problem"
    others = f"; without that name {able} could" if able else ""
    return Explanation(spec, None, rows, tuple(notes), f"chosen: none, {who}{others}")


OTHERWISE, BY_LIMITS = "could serve, not asked for", "could serve by its limits"
"""What is said of backends that were not chosen."""


def on_paper(spec: AttentionSpec, capability: tuple[int, int], said: str, named: Wanted) -> Explanation:
    """What the limits say of a problem on a GPU of some CUDA compute capability."""
    if spec.device.type != "cuda":
        raise ValueError(f"capability must come with a problem on a CUDA device, got one on {spec.device}.")
    if not (isinstance(capability, tuple) and len(capability) == 2 and all(type(part) is int for part in capability)):
        raise ValueError(f"capability must be (major, minor), such as (9, 0), got {capability!r}.")
    candidates = names() if named is None else expand(named, said)
    rows = {}
    for name in (*candidates, *(name for name in names() if name not in candidates)):
        backend = registry.entries[name]
        against = backend.unsupported(spec)
        reasons = [] if against is None else [against]
        reasons += backend.limits.refusals_on(capability, spec.features)
        rows[name] = "; ".join(reasons) or (BY_LIMITS if name in candidates else OTHERWISE)
    able = ", ".join(name for name in candidates if rows[name] == BY_LIMITS) or "none"
    where = f"on compute capability {written(capability)}"
    return Explanation(spec, None, rows, (), f"could serve {where}: {able}; this is on paper, nothing was tried")


def absent(backend: Backend, spec: AttentionSpec) -> str | None:
    """Why a backend is not available here, and what else stands against the problem wherever it is."""
    missing = backend.unavailable(spec.device)
    if missing is None:
        return None
    others = (backend.unsupported(spec) or "").split("; ")
    return "; ".join([f"not available: {missing}", *(other for other in others if other not in ("", missing))])


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


for kind in OWN:
    register(kind)

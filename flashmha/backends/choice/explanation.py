"""Which backend serves a problem, and why not the others, in words."""

from __future__ import annotations

import dataclasses

from ...problem.spec import AttentionSpec
from ...problem.wording import tabulate
from ..base import Backend
from ..limits import written
from . import registry, tuned
from .choose import chosen_before, pick, reason
from .order import order
from .registry import expand, names
from .waiting import why_still_waiting
from .wishes import Wanted, asked


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
        return "\n".join((f"{self.spec}\n{tabulate(self.rows)}", *self.notes, self.conclusion))


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
        before = chosen_before(spec)
        if before is not None:
            found = before.backend
            if before.wait is not None:
                passed = why_still_waiting(before.wait, spec)
        else:
            found, compiles, _ = pick(spec, passed)
            notes += [] if found is None or compiles is None else [f"{found.name} compiles first: {compiles}"]
        row = tuned.measured_row(spec)
        notes += [] if row is None else [f"measured backends are asked in the order of {row.source}"]
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
    said_of = "no backend can serve this problem" if named is None else f"{said}={named!r} cannot serve this problem"
    others = f"; without that name {able} could" if able else ""
    return Explanation(spec, None, rows, tuple(notes), f"chosen: none, {said_of}{others}")


OTHERWISE, BY_LIMITS = "could serve, not asked for", "could serve by its limits"
"""Rows of backends that were not chosen."""


def on_paper(spec: AttentionSpec, capability: tuple[int, int], said: str, named: Wanted) -> Explanation:
    """The limits' answer to a problem on a GPU of some CUDA compute capability."""
    if spec.device.type != "cuda":
        raise ValueError(f"capability must come with a problem on a CUDA device, got one on {spec.device}.")
    if not (isinstance(capability, tuple) and len(capability) == 2 and all(type(part) is int for part in capability)):
        raise ValueError(f"capability must be (major, minor), such as (9, 0), got {capability!r}.")
    candidates = names() if named is None else expand(named, said)
    rows = {}
    for name in (*candidates, *(name for name in names() if name not in candidates)):
        backend = registry.entries[name]
        against = backend.why_not(spec)
        reasons = [] if against is None else [against]
        reasons += backend.limits.exceeded_on(capability, spec.features)
        rows[name] = "; ".join(reasons) or (BY_LIMITS if name in candidates else OTHERWISE)
    able = ", ".join(name for name in candidates if rows[name] == BY_LIMITS) or "none"
    where = f"on compute capability {written(capability)}"
    return Explanation(spec, None, rows, (), f"could serve {where}: {able}; this is on paper, nothing was tried")


def absent(backend: Backend, spec: AttentionSpec) -> str | None:
    """Why a backend is not available here, and what else stands against the problem wherever it is."""
    missing = backend.why_not_here(spec.device)
    if missing is None:
        return None
    others = (backend.why_not(spec) or "").split("; ")
    return "; ".join([f"not available: {missing}", *(other for other in others if other not in ("", missing))])

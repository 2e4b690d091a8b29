"""The order in which automatic choice asks: the list's, measured backends as they were measured.

A backend is asked what it is (see ``Backend``) and recognised by nothing else; the tables know backends by name.
"""

from __future__ import annotations

from ...host.torch_state import is_compiling, surely
from ...problem.spec import AttentionSpec
from ..sdpa.switches import switches
from . import registry, tuned
from .ranking import WORTH, is_step, work
from .registry import discover


def order(spec: AttentionSpec) -> tuple[str, ...]:
    """The backends in the order that automatic choice asks them.

    Measured ones change places among themselves, as a table says of the problem; others stay where they were
    registered, and what ``prefer`` moved stays there. Behind the others of its kind comes what would build a mask for
    this problem, and behind the definition what has no kernel on its device.
    """
    discover()
    entries, row = registry.entries, tuned.measured_row(spec)
    table = () if row is None else row.order
    names, kind = list(entries), spec.device.type
    definition: str | None = None
    measured, fast, masking, unfused = [], [], [], []
    for name, backend in entries.items():
        if name in registry.preferred:
            continue
        if backend.holds_scores:
            definition = name
            break
        if backend.measured_as is not None:
            measured.append(name)
        if kind in backend.unfused_on and backend.measured_as not in table:
            unfused.append(name)
        elif backend.builds_mask(spec):
            masking.append(name)
        elif backend.measured_as is not None:
            fast.append(name)
    if unfused and definition is not None:
        names = moved_behind(names, unfused, definition)
    if masking and fast:
        names = moved_behind(names, masking, fast[-1])
    ahead = [name for name in measured if entries[name].obeys_switches] if is_switched(spec) else []
    if is_step(spec):
        ahead += [name for name in fast if entries[name].reads_caches and not table]
    elif is_short_in_a_graph(spec):
        ahead += [name for name in fast if entries[name].launched_by_cpp]
    # a backend that would build a mask is not what was measured
    ahead += [name for known in table for name in fast if entries[name].measured_as == known]
    if not ahead:
        return tuple(names)
    own = [name for name in names if name in measured]
    ranked = iter(dict.fromkeys([*ahead, *own]))
    return tuple([next(ranked) if name in own else name for name in names])


def moved_behind(names: list[str], some: list[str], anchor: str) -> list[str]:
    """Names with those of some that stand in front of another right behind it."""
    place = names.index(anchor)
    late = [name for name in names[:place] if name in some]
    return [*[name for name in names[: place + 1] if name not in late], *late, *names[place + 1 :]]


def is_short_in_a_graph(spec: AttentionSpec) -> bool:
    """A short problem in a graph that is compiled for a GPU: a launch by Python takes longer there than the better
    kernel saves. Of sizes that are symbols nothing is known, nor asked, which would bind the graph to it."""
    if not is_compiling() or spec.device.type != "cuda":
        return False
    return surely(work(spec) < WORTH)


def is_switched(spec: AttentionSpec) -> bool:
    """One of the process-wide switches of SDPA's kernels, which concern a GPU alone, is off."""
    return spec.device.type == "cuda" and not all(switches())

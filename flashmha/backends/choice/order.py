"""The order in which automatic choice asks: the list's, our own as they were measured."""

from __future__ import annotations

from typing import Any

from ...host.torch_state import is_compiling, surely
from ...problem.spec import AttentionSpec
from ..base import Backend
from ..sdpa.packed import packs
from ..sdpa.switches import switches
from . import registry, tuned
from .builtin import OWN
from .ranking import WORTH, work
from .registry import discover


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
    if is_compiling():
        return arranged(registry.entries, first, late, anchor)
    return remembered(registry.entries, first, late, anchor)


def is_part(spec: AttentionSpec) -> bool:
    """A short problem in a graph that is compiled for a GPU: launching another package's kernel takes longer there than
    it saves. Of sizes that are symbols nothing is known, nor asked, which would bind the graph to it."""
    if not is_compiling() or spec.device.type != "cuda":
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

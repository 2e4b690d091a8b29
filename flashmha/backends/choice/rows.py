"""Rows of a table, derived from what was measured."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from .ranking import LAST, MARGIN, PLACE, Row


def derive(cells: Iterable[dict[str, Any]], source: str) -> tuple[Row, ...]:
    """The rows of what ``flashmha tune`` measured, as few as say the same within ``MARGIN``.

    A cell has its ``kind``, ``mode``, ``head_dim``, ``keys``, the microseconds ``us`` of each backend, in the order of
    the list, and the ``spread`` of those: half the middle half of the rounds, as a share of the time. A size between
    two that were measured counts as the larger; beyond the largest, as the largest.
    """
    places: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for cell in combined(cells):
        places.setdefault((cell["kind"], cell["mode"]), []).append(cell)
    groups: list[Group] = [((kind,), (mode,), those) for (kind, mode), those in places.items()]
    for axis in (0, 1):
        groups = list(pooled(groups, axis))
    return tuple(row for kinds, modes, those in groups for row in by_head_dim(kinds, modes, those, source))


def combined(cells: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """One cell a place: where several were measured there, as with one query and with eight, the mean of each time, and
    the largest of each spread."""
    places: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for cell in cells:
        places.setdefault(tuple(cell[name] for name in PLACE), []).append(cell)
    found = []
    for those in places.values():
        names = dict.fromkeys(name for cell in those for name in cell["us"])
        times = {name: [cell["us"][name] for cell in those if name in cell["us"]] for name in names}
        means = {name: statistics.geometric_mean(each) for name, each in times.items()}
        spread = {name: max(cell.get("spread", {}).get(name, 0.0) for cell in those) for name in names}
        found.append({**those[0], "us": means, "spread": spread})
    return found


Group = tuple[tuple[str, ...], tuple[str, ...], list[dict[str, Any]]]
"""Kinds, modes and their cells."""


def pooled(groups: Sequence[Group], axis: int) -> Iterator[Group]:
    """Groups joined along kinds (0) or modes (1), where that needs no more rows."""
    joined: list[Group] = []
    for group in groups:
        for place, other in enumerate(joined):
            together = join(other, group, axis)
            if together is not None:
                joined[place] = together
                break
        else:
            joined.append(group)
    return iter(joined)


def join(one: Group, two: Group, axis: int) -> Group | None:
    """Two groups as one, ``None`` where they have to stay two."""
    cells = [*one[2], *two[2]]
    if one[1 - axis] != two[1 - axis]:
        return None
    few = max(len(by_head_dim(*group, "")) for group in (one, two))
    both = tuple(dict.fromkeys((*one[axis], *two[axis])))
    kinds, modes = (both, one[1]) if axis == 0 else (one[0], both)
    try:
        together = by_head_dim(kinds, modes, cells, "")
    except Disagreement:
        return None
    return (kinds, modes, cells) if len(together) <= few else None


class Disagreement(Exception):
    """Cells of one size that no order suits."""


def by_head_dim(
    kinds: tuple[str, ...], modes: tuple[str, ...], cells: Sequence[dict[str, Any]], source: str
) -> list[Row]:
    """Rows of one group: head dims share theirs where that needs no more of them."""
    parts: list[tuple[int, list[dict[str, Any]], list[tuple[int, tuple[str, ...]]]]] = []
    for size in sorted({cell["head_dim"] for cell in cells}):
        those = [cell for cell in cells if cell["head_dim"] == size]
        steps = by_keys(those)
        if parts:
            _, before, few = parts[-1]
            try:
                together = by_keys([*before, *those])
            except Disagreement:
                together = None
            if together is not None and len(together) <= max(len(few), len(steps)):
                parts[-1] = (size, [*before, *those], together)
                continue
        parts.append((size, those, steps))
    rows = []
    for size, _, steps in parts:
        bound = None if size == parts[-1][0] else size
        rows += [
            Row(kinds, modes, order, source, bound, None if many == steps[-1][0] else many) for many, order in steps
        ]
    return rows


def by_keys(cells: Sequence[dict[str, Any]]) -> list[tuple[int, tuple[str, ...]]]:
    """The order up to each number of keys at which it changes."""
    steps: list[tuple[int, tuple[str, ...]]] = []
    since: list[dict[str, Any]] = []
    for many in sorted({cell["keys"] for cell in cells}):
        those = [cell for cell in cells if cell["keys"] == many]
        alone = agreed(those)
        if alone is None:
            raise Disagreement
        together = agreed([*since, *those]) if steps else None
        if together is not None:
            since += those
            steps[-1] = (many, together)
        else:
            since = list(those)
            steps.append((many, alone))
    return steps


def agreed(cells: Sequence[dict[str, Any]]) -> tuple[str, ...] | None:
    """One order for some cells: none stands in front of another that beats it in one of them.

    Where the times leave a choice the order of the list stays; ``None`` where they leave none.
    """
    left = list(dict.fromkeys(name for cell in cells for name in cell["us"] if name != LAST))
    order: list[str] = []
    while left:
        for name in left:
            if not any(beaten(name, other, cell) for other in left for cell in cells):
                break
        else:
            return None
        order.append(name)
        left.remove(name)
    return tuple(order)


def beaten(name: str, other: str, cell: dict[str, Any]) -> bool:
    """One is slower than another by more than ``MARGIN``, and by more than chance: the middle halves lie apart."""
    times, spread = cell["us"], cell.get("spread", {})
    if name not in times or other not in times:
        return False
    fast, slow = times[other] * (1 + spread.get(other, 0.0)), times[name] * (1 - spread.get(name, 0.0))
    return bool(slow > fast * (1 + MARGIN))

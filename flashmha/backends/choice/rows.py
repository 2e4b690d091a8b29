"""Rows of a table, derived from what was measured."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from . import registry
from .ranking import MARGIN, PLACE, Row


def derive(cells: Iterable[dict[str, Any]], source: str) -> tuple[Row, ...]:
    """The rows of what ``flashmha tune`` measured: for each kind, mode and head_dim the order, where it changes.

    A cell has its ``kind``, ``mode``, ``head_dim``, ``keys``, the microseconds ``us`` of each backend, in the order of
    the list, and the ``spread`` of those: half the middle half of the rounds, as a share of the time. A size between
    two that were measured counts as the larger; beyond the largest, as the largest.
    """
    places: dict[tuple[str, str], dict[int, list[dict[str, Any]]]] = {}
    for cell in combined(cells):
        places.setdefault((cell["kind"], cell["mode"]), {}).setdefault(cell["head_dim"], []).append(cell)
    rows: list[Row] = []
    for (kind, mode), sizes in places.items():
        steps = [(size, by_keys(sizes[size])) for size in sorted(sizes)]
        for place, (size, orders) in enumerate(steps):
            if place + 1 < len(steps) and steps[place + 1][1] == orders:
                continue  # the next size has the same rows
            bound = None if place + 1 == len(steps) else size
            rows += [
                Row((kind,), (mode,), order, source, bound, None if many == orders[-1][0] else many)
                for many, order in orders
            ]
    return tuple(rows)


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


def by_keys(cells: Sequence[dict[str, Any]]) -> list[tuple[int, tuple[str, ...]]]:
    """The order up to each number of keys at which it changes: neighbours that one order suits share it."""
    steps: list[tuple[int, tuple[str, ...]]] = []
    since: list[dict[str, Any]] = []
    for cell in sorted(cells, key=lambda cell: int(cell["keys"])):
        together = agreed([*since, cell]) if steps else None
        if together is not None:
            since.append(cell)
            steps[-1] = (cell["keys"], together)
        else:
            since = [cell]
            steps.append((cell["keys"], agreed(since) or ()))
    return steps


def agreed(cells: Sequence[dict[str, Any]]) -> tuple[str, ...] | None:
    """One order for some cells: none stands in front of another that beats it in one of them.

    Where the times leave a choice the order of the list stays; ``None`` where they leave none.
    """
    left = list(dict.fromkeys(name for cell in cells for name in cell["us"] if is_ranked(name)))
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


def is_ranked(name: str) -> bool:
    """A name of a table is ranked: not that of a backend which holds every score."""
    return name not in registry.entries or not registry.entries[name].holds_scores


def beaten(name: str, other: str, cell: dict[str, Any]) -> bool:
    """One is slower than another by more than ``MARGIN``, and by more than chance: the middle halves lie apart."""
    times, spread = cell["us"], cell.get("spread", {})
    if name not in times or other not in times:
        return False
    fast, slow = times[other] * (1 + spread.get(other, 0.0)), times[name] * (1 - spread.get(name, 0.0))
    return bool(slow > fast * (1 + MARGIN))

"""Places of an axis that a list names, as the runs of neighbours that they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

MOST_RUNS = 16
"""Runs of neighbours that are made one by one before the whole map is."""


def find_list(index: Sequence[Any]) -> tuple[int, list[int] | None]:
    """The axis that an index names a list of places of, and the list; ``None`` where it says anything else.

    As in ``[:, [2, 5]]`` and ``[..., torch.tensor([2, 5]), :]``.
    """
    whole = [one is Ellipsis or (isinstance(one, slice) and one == slice(None)) for one in index]
    if whole.count(False) != 1:
        return 0, None
    place = whole.index(False)
    from_end = any(one is Ellipsis for one in index[:place])
    return (place - len(index) if from_end else place), find_picked(index[place])


def find_picked(index: Any) -> list[int] | None:
    """The places that a list, or a tensor of one axis, holds; ``None`` where it is neither."""
    if isinstance(index, list):
        return index if index and all(type(place) is int for place in index) else None
    if type(index) is Tensor and index.dtype == torch.int64 and index.dim() == 1 and not index.is_meta:
        found: list[int] = index.tolist()
        return found
    return None


def pick_places(tensor: Tensor, dim: int, places: Sequence[int], from_end: bool) -> Tensor | None:
    """Some places of an axis, as a copy; ``None`` where runs are many, most places are wanted, or one is not there.

    ``from_end``: negative places count from the end.
    """
    if not -tensor.dim() <= dim < tensor.dim():
        return None
    size = tensor.shape[dim]
    least = -size if from_end else 0
    if not all(least <= place < size for place in places):
        return None
    places = [place % size for place in places]
    wanted = sorted(set(places))
    starts = [place for place, before in zip(wanted, [None, *wanted]) if before is None or place != before + 1]
    ends = [place + 1 for place, after in zip(wanted, [*wanted[1:], None]) if after != place + 1]
    if not wanted or len(starts) > MOST_RUNS or 2 * len(wanted) > size:
        return None
    parts = [tensor.narrow(dim, start, end - start) for start, end in zip(starts, ends)]
    made = parts[0].clone() if len(parts) == 1 else torch.cat(parts, dim)
    if places == wanted:
        return made
    return made.index_select(dim, torch.tensor([wanted.index(place) for place in places], device=made.device))

"""Rules over positions as rules over indices, and the grid of indices they are evaluated on."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .wording import spell

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
ALIGNMENTS = ("bottom_right", "top_left")


class Restarts(Protocol):
    """Positions that are not the slots: they start again along a row, as in ``Documents``, or go on, as in a cache."""

    @property
    def aligned(self) -> bool:
        """Queries and keys start again at the same places, so that both alignments are one."""

    def positions(self, seqlen_q: int, seqlen_k: int, align: str) -> tuple[Tensor, Tensor]:
        """The position of every query and of every key: (seqlen), or (batch, seqlen) where rows differ."""


def check_broadcast(name: str, tensor: Tensor, want: tuple[int, ...], hint: str = "") -> None:
    """Raise ``ValueError`` where four axes do not broadcast to (batch, heads, seqlen_q, seqlen_k)."""
    for size, target in zip(tensor.shape, want):
        if size != target and size != 1:
            raise ValueError(
                f"{name} must broadcast to (batch, heads, seqlen_q, seqlen_k) = {want}, "
                f"got {tuple(tensor.shape)}{hint}."
            )


def find_device(tensors: tuple[Tensor, ...]) -> torch.device | None:
    """Where tensors are; ``None`` where there are none."""
    return tensors[0].device if tensors else None


class IndexGrid(NamedTuple):
    """The indices that a mask or a bias is evaluated on: all of a problem, or a range of its queries and keys."""

    batch: int
    heads: int
    seqlen_q: int
    seqlen_k: int
    device: torch.device | str | None = None
    documents: Restarts | None = None
    queries: range | None = None
    keys: range | None = None

    def indices(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The indices of every axis, each along its own of four axes, so that they broadcast to the grid."""
        device = self.device
        # no range of a size, which would bind a compiler's graph to it
        first_q, end_q = (0, self.seqlen_q) if self.queries is None else (self.queries.start, self.queries.stop)
        first_k, end_k = (0, self.seqlen_k) if self.keys is None else (self.keys.start, self.keys.stop)
        return (
            torch.arange(self.batch, device=device).view(-1, 1, 1, 1),
            torch.arange(self.heads, device=device).view(1, -1, 1, 1),
            torch.arange(first_q, end_q, device=device).view(1, 1, -1, 1),
            torch.arange(first_k, end_k, device=device).view(1, 1, 1, -1),
        )


def narrowed_to(table: Tensor, queries: range | None, keys: range | None) -> Tensor:
    """Four axes of a whole problem for a range of its queries and keys; an axis of size 1 is the same for all."""
    for axis, part in ((2, queries), (3, keys)):
        if part is not None and table.shape[axis] != 1:
            table = table.narrow(axis, part.start, len(part))
    return table


def check_range(name: str, part: range | None, size: int) -> None:
    """Raise where a range of queries or keys is none, or reaches beyond the problem."""
    if part is None:
        return
    if not isinstance(part, range):
        raise TypeError(f"{name} must be a range, or None for all, got {spell(part)}.")
    if part.step != 1 or not 0 <= part.start <= part.stop <= size:
        raise ValueError(f"{name} must be a range of step 1 within 0 and {size}, got {part}.")


def by_index(fn: MaskMod, seqlen_q: int, seqlen_k: int, documents: Restarts | None, align: str) -> MaskMod:
    """A rule over positions as a rule over indices."""
    if documents is None:
        shift = seqlen_k - seqlen_q if align == "bottom_right" else 0
        return lambda batch, head, q_idx, k_idx: fn(batch, head, q_idx + shift, k_idx)
    q_pos, k_pos = documents.positions(seqlen_q, seqlen_k, align)
    if q_pos.dim() == 2:
        return lambda batch, head, q_idx, k_idx: fn(batch, head, q_pos[batch, q_idx], k_pos[batch, k_idx])
    return lambda batch, head, q_idx, k_idx: fn(batch, head, q_pos[q_idx], k_pos[k_idx])


def look_up_in(table: Tensor) -> MaskMod:
    """A table of four axes as a function of (batch, head, q_idx, k_idx); an axis of size 1 is the same for all.

    Such an axis is gone, since a number among tensors in an index is copied to their device, which waits for it.
    """
    axes = [axis for axis, size in enumerate(table.shape) if size != 1]
    inner = table[tuple(slice(None) if axis in axes else 0 for axis in range(table.dim()))]

    def read(batch: Tensor, head: Tensor, q_idx: Tensor, k_idx: Tensor) -> Tensor:
        index = (batch, head, q_idx, k_idx)
        return inner[tuple([index[axis] for axis in axes])] if axes else inner

    return read

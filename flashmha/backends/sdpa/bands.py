"""A window as bands: blocks of queries, each beside the keys around it alone.

A kernel that is handed a window as a mask computes every score. On a CPU a call costs little, so a long problem is one
call for each block of queries, and takes the time and the memory of what the window shows.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from ...host.torch_state import is_compiling, readable
from ...problem.spec import AttentionSpec
from ...problem.windows import Window
from .mask_tensors import as_numbers

BAND_ROWS = 1024
"""Queries of a block at most."""


class BandBlock(NamedTuple):
    """Some queries; which parts of the keys they are given, and which keys those are."""

    queries: range
    parts: range
    keys: range


class Bands(NamedTuple):
    """A problem cut up: where the keys are cut, and the blocks, first to last."""

    edges: list[int]
    blocks: list[BandBlock]

    def cut(self, x: Tensor) -> tuple[Tensor, ...]:
        """The parts of keys or values (batch, seqlen_k, heads, head_dim); split, so that gradients are as local."""
        parts: tuple[Tensor, ...] = x.split_with_sizes(
            [end - start for start, end in zip(self.edges, self.edges[1:])], 1
        )
        return parts


def cut_into_bands(spec: AttentionSpec, rows: int, worth: int) -> Bands | None:
    """The bands of a problem on a CPU; ``None`` where they would spare too little.

    Serves a window that is bounded on both sides, beside any rule but those of where tokens stand.

    Args:
        rows: queries of a block at least.
        worth: multiplications that each block has to spare.
    """
    if spec.mask is None or spec.aten_only or is_compiling() or spec.seqlen_k < 4 * min(rows, BAND_ROWS):
        return None
    window = spec.window
    if window is None or window.left is None or window.right is None:
        return None
    if spec.places is not None or spec.dropout_p > 0.0:  # torch draws for the whole problem at once
        return None
    if not all(map(readable, spec.mask.tensors())):
        return None
    reach = max(window.left + window.right, 0)
    rows = min(max(reach // 2, rows), BAND_ROWS)
    spared = spec.seqlen_k - 2 * rows - reach
    if 2 * spared < spec.seqlen_k or spec.batch * spec.heads * spec.head_dim * rows * spared <= worth:
        return None
    first = spec.seqlen_k - spec.seqlen_q - window.left  # key of the first query
    edges = sorted({0, *range(first % rows, spec.seqlen_k, rows), spec.seqlen_k})
    blocks = []
    for start in range(0, spec.seqlen_q, rows):
        queries = range(start, min(start + rows, spec.seqlen_q))
        lowest, end = max(first + start, 0), min(first + queries.stop + reach, spec.seqlen_k)
        parts = range(0)
        if reach == window.left + window.right and lowest < end:
            parts = range(bisect_right(edges, lowest) - 1, bisect_left(edges, end))
        blocks.append(BandBlock(queries, parts, range(edges[parts.start], edges[parts.stop])))
    return Bands(edges, blocks) if any(block.parts for block in blocks) else None


def make_tables(spec: AttentionSpec, bands: Bands) -> Iterator[Tensor | None]:
    """The mask of each block as SDPA adds it. A window alone hides the same in most of them, and is made once."""
    made: dict[tuple[int, int, int], Tensor | None] = {}
    for queries, _, keys in bands.blocks:
        place = (keys.start - queries.start, len(queries), len(keys))
        if place not in made or type(spec.mask) is not Window:
            allowed = spec.allowed(queries, keys) if keys else None
            made[place] = None if allowed is None else as_numbers(allowed, spec.dtype)
        yield made[place]

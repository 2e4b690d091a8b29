"""How ``split_kv`` cuts a problem: the tile of a program, among how many a row's keys are split, and both launches."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import torch

from ...host.kernels import Processors, padded, processors

MOST_QUERY_ROWS = 64
"""Queries of the heads of a group that one program takes: above, they fill the tiles of other kernels by themselves."""
MOST_QUERY_BYTES = 32768
"""Bytes of shared memory that those may fill."""
BESIDE_TILES = 4096
"""Bytes of shared memory that a kernel needs beside keys and values."""
TILE_BYTES = 32768
"""Bytes of the keys and values of a tile."""
CHUNK, MANY_ROWS = 32, 512
"""How much of head_dim_v a program combines where there are fewer rows than these."""
COMBINED = 4096
"""Numbers that a program combines at a time."""
MOST_SPLITS = 256
FEW_TILES = 2
"""Tiles that one program reads sooner than two kernels share and combine them, measured on an H200 for two and four."""
EARLIEST = 9
"""The compute capability from which a kernel may be launched before the one that it waits for has ended."""
RESIDENT = 2
"""Programs of a processor at a time: more share its memory without gain, measured on an H200."""
SPLIT_COST = 0.04
"""The share of time that splitting rows takes, of programs that keep the GPU full."""
SHARES = (1, 2, 4, 8)
"""Shares of a row that are tried where rows are more than run at once."""


@dataclasses.dataclass(frozen=True)
class Cut:
    """How a kernel is made: keys of a tile, warps of a program, stages of its pipeline; and how a row is split.

    Attributes:
        splits: ``None`` where that is chosen.
        early: the kernel that combines is launched before the other ends.
    """

    keys: int
    warps: int
    stages: int
    splits: int | None = None
    early: bool = False

    def shared(self, rows: int, head_dim: int, head_dim_v: int, itemsize: int) -> int:
        """Bytes of shared memory that a program fills: keys and values on their way, and its queries."""
        wide = padded(head_dim) + padded(head_dim_v)
        on_their_way = self.stages - (rows < MOST_QUERY_ROWS) if self.stages > 1 else 1
        return (on_their_way * self.keys * wide + padded(rows) * padded(head_dim)) * itemsize

    def options(self, looks_up: bool) -> dict[str, Any]:
        """What makes a kernel; one that looks up where keys are does so two stages ahead of them."""
        return {"num_warps": self.warps, "num_stages": self.stages + 2 * looks_up}


def choose_cut(rows: int, head_dim: int, head_dim_v: int, dtype: torch.dtype, on: Processors) -> Cut:
    """The cut for heads on a device."""
    wide = padded(head_dim) + padded(head_dim_v)
    full = padded(rows) == MOST_QUERY_ROWS
    room = TILE_BYTES // dtype.itemsize // wide
    if full and dtype == torch.float32:  # no tensor core multiplies these exactly, and registers run out
        room //= 2
    keys = min(128, max(16, 1 << max(room, 1).bit_length() - 1))
    cut = Cut(keys, warps=8 if full else 4, stages=3, early=on.major >= EARLIEST)
    while cut.shared(rows, head_dim, head_dim_v, dtype.itemsize) > on.shared_memory - BESIDE_TILES:
        stages, keys = (cut.stages - 1, cut.keys) if cut.stages > 2 else (cut.stages, cut.keys // 2)
        cut = dataclasses.replace(cut, stages=stages, keys=keys)
    return cut


def deepen(cut: Cut, rows: int, head_dim: int, head_dim_v: int, dtype: torch.dtype, on: Processors) -> Cut:
    """The cut with a stage more, for rows that are not split, where as many programs run at once."""
    deeper = dataclasses.replace(cut, stages=cut.stages + 1)
    shared = deeper.shared(rows, head_dim, head_dim_v, dtype.itemsize) + BESIDE_TILES
    return deeper if RESIDENT * shared <= on.shared_memory else cut


def choose_splits(groups: int, tiles: int, on: Processors) -> int:
    """Among how many programs the keys of a row are split: as many as run at once, or so that few places are idle.

    A row of few tiles is not split: its second kernel would cost what the first one gained.

    Args:
        groups: rows times heads of keys, each of which has ``splits`` programs.
        tiles: tiles of keys that a row has room for.
    """
    places = RESIDENT * on.number
    if tiles <= FEW_TILES:
        return 1
    if groups <= places:
        return max(1, min(places // groups, tiles, MOST_SPLITS))

    def idle(splits: int) -> float:
        """The share of places without a program while the last ones run, and what splitting costs."""
        waves = groups * splits / places
        return 1 - waves / math.ceil(waves) + SPLIT_COST * (splits > 1)

    return min((splits for splits in SHARES if splits <= tiles), key=idle)


class SplitSizes(NamedTuple):
    """The sizes of a problem; ``capacity`` are the keys that a row has room for."""

    batch: int
    seqlen_q: int
    heads: int
    heads_kv: int
    head_dim: int
    head_dim_v: int
    capacity: int


class SplitPlan(NamedTuple):
    """What a problem's sizes and kinds say of its launches: the first is split among programs, the second combines."""

    splits: int
    kind: tuple[Any, ...]
    programs: tuple[int, int, int]
    constants: dict[str, Any]
    options: dict[str, Any]
    combining: tuple[int, int, int]
    combined: dict[str, Any]
    combined_options: dict[str, Any]


@functools.lru_cache(maxsize=1024)
def make_plan(
    sizes: SplitSizes,
    dtype: torch.dtype,
    device: torch.device,
    page_size: int | None,
    kinds: tuple[Any, ...],
    cut: Cut | None,
) -> SplitPlan:
    """The plan of such problems, kept: making it takes as long as three launches.

    Args:
        kinds: the dtypes of the tables, ``None`` for those that are missing; whether there is a log-sum-exp, and
            whether left, right and softcap are missing.
        cut: ``None`` for the one that fits.
    """
    batch, seqlen_q, heads, heads_kv, head_dim, head_dim_v, capacity = sizes
    on, rows = processors(device), seqlen_q * (heads // heads_kv)
    heads_of = rows, head_dim, head_dim_v, dtype, on
    chosen = choose_cut(*heads_of) if cut is None else cut
    splits = chosen.splits
    if splits is None:
        splits = choose_splits(batch * heads_kv, -(-capacity // chosen.keys), on)
    cut = deepen(chosen, *heads_of) if cut is None and splits == 1 else chosen
    early = cut.early and splits > 1
    constants = {
        "PAGE": page_size or 0,
        "LEFT": not kinds[-3],
        "RIGHT": not kinds[-2],
        "SOFTCAP": not kinds[-1],
        "WHOLE": splits == 1,
        "HEAD_DIM": head_dim,
        "HEAD_DIM_V": head_dim_v,
        "DIMS": padded(head_dim),
        "DIMS_V": padded(head_dim_v),
        "BLOCK_M": padded(rows),
        "BLOCK_N": cut.keys,
        "EARLY": early,
    }
    options = cut.options(kinds[2] is not None or kinds[3] is not None)
    rows, shares = batch * seqlen_q * heads, padded(splits)
    chunk = padded(head_dim_v) if rows >= MANY_ROWS else min(padded(head_dim_v), CHUNK)
    combined = {
        "HEAD_DIM_V": head_dim_v,
        "CHUNK": chunk,
        "STEP": min(shares, COMBINED // chunk),
        "SPLITS": shares,
        "EARLY": early,
    }
    return SplitPlan(
        splits,
        (device.index, dtype, *kinds, *constants.values(), *combined.values(), *options.values()),
        (batch * splits * heads_kv, 1, 1),
        constants,
        options,
        (rows, -(-head_dim_v // chunk), 1),
        combined,
        {"num_warps": 4 if shares * chunk >= COMBINED // 2 else 1, **({"launch_pdl": True} if early else {})},
    )

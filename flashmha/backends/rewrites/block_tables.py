"""Which tiles of a problem a kernel has to look at: tables of blocks out of the queries that may look at each key, or
out of a mask tensor.

A tile is a block of queries by a block of keys. In an empty tile no query sees a key: it is listed nowhere. In a full
one every query sees every key: it needs no mask. The rest are partial. Not a backend. The kernels
(``block_tables_kernels``) are Triton's, which comes with torch for CUDA and is imported on first use; they run on the
current device.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from ...host.kernels import power_of_two
from ...host.machine import has_triton

MIN_LENGTH = 512
"""Sequences as long as this have tiles to skip that pay for the table."""
CHUNK = 16
"""Tiles that a program judges at a time."""


class BlockTables(NamedTuple):
    """Counts (batch, 1, rows) and the blocks that count, ascending, (batch, 1, rows, columns); int32 each.

    The names, the order and the layout are those of flash-attn 4's ``BlockSparseTensorsTorch``, whose 1 stands for all
    heads. What lies behind a count is never written and never read. Ascending matters: the forward looks at a list from
    its end, and masks what lies behind the last key in the first block it meets alone
    (``block_sparse_utils.consume_block_sparse_loads``).
    """

    mask_block_cnt: Tensor
    mask_block_idx: Tensor
    full_block_cnt: Tensor
    full_block_idx: Tensor


def has_tiles_to_skip(seqlen_q: int, seqlen_k: int) -> bool:
    """A problem has tiles enough that skipping some pays for the tables."""
    return min(seqlen_q, seqlen_k) >= MIN_LENGTH


@functools.cache
def serves_tables(device: torch.device) -> bool:
    """Tables are made and taken on this device: on Hopper; Blackwell's kernels want other blocks."""
    return has_triton() and torch.cuda.get_device_capability(device)[0] == 9


def block_tables(first: Tensor, last: Tensor, seqlen_q: int, tile: tuple[int, int], *, by_keys: bool) -> BlockTables:
    """The tables for intervals (batch, seqlen_k), see ``compact.Intervals``, and tiles of (queries, keys).

    A row is a block of queries and lists blocks of keys, which a forward wants; ``by_keys`` the other way round, for a
    backward. A row without any tile lists its first one as partial: then no kernel has nothing to do, which is what it
    does without tables. A backward without tiles would not even wait for the kernel before it
    (``block_sparse_utils._load_q_do_block_sm90``).
    """
    batch, seqlen_k = first.shape
    rows, columns = -(-seqlen_q // tile[0]), -(-seqlen_k // tile[1])
    if by_keys:
        rows, columns = columns, rows
    made = unwritten(batch, rows, columns, first.device)
    from .block_tables_kernels import interval_tables_kernel

    interval_tables_kernel[(batch * rows,)](
        first.contiguous(),
        last.contiguous(),
        *made,
        seqlen_q,
        seqlen_k,
        rows,
        columns,
        TILE_Q=tile[0],
        TILE_K=tile[1],
        KEYS=power_of_two(tile[1]),
        CHUNK=CHUNK,
        BY_KEYS=by_keys,
    )
    return made


def unwritten(batch: int, rows: int, columns: int, device: torch.device) -> BlockTables:
    """Tables for a kernel to fill."""
    shapes = ((batch, 1, rows), (batch, 1, rows, columns)) * 2
    return BlockTables(*(torch.empty(shape, dtype=torch.int32, device=device) for shape in shapes))


EDGE = 256
"""At least as many queries and keys as a tile has, of any kernel."""


def edged(allowed: Tensor, seqlen_q: int, seqlen_k: int) -> Tensor:
    """A mask (batch or 1, 1, seqlen_q or 1, seqlen_k or 1) as bytes, with room for the tiles that reach over its edges.

    (batch or 1, at least seqlen_q + EDGE, at least seqlen_k + EDGE), 0 where no query may look.
    """
    shape = (allowed.shape[0], *(-(-(size + EDGE) // 16) * 16 for size in (seqlen_q, seqlen_k)))
    table = torch.zeros(shape, dtype=torch.uint8, device=allowed.device)
    table[:, :seqlen_q, :seqlen_k] = allowed[:, 0]
    return table


def mask_tables(
    table: Tensor, items: Tensor, seqlen_q: int, seqlen_k: int, tile: tuple[int, int], *, by_keys: bool
) -> BlockTables:
    """The tables for a mask as ``edged`` gives it, as ``block_tables`` makes them.

    ``items`` (batch,) int32 says which of the mask's items counts for each of the batch.
    """
    rows, columns = -(-seqlen_q // tile[0]), -(-seqlen_k // tile[1])
    states = torch.empty((table.shape[0], rows, columns), dtype=torch.uint8, device=table.device)
    along, across = (columns, rows) if by_keys else (rows, columns)
    made = unwritten(len(items), along, across, table.device)
    from .block_tables_kernels import mask_tables_kernel, tile_states_kernel

    tile_states_kernel[(states.numel(),)](
        table,
        states,
        *table.stride()[:2],
        seqlen_q,
        seqlen_k,
        rows,
        columns,
        TILE_Q=tile[0],
        TILE_K=tile[1],
        KEYS=power_of_two(tile[1]),
        STEP=16,
    )
    mask_tables_kernel[(len(items) * along,)](
        states,
        items,
        *made,
        along,
        across,
        states.stride(0),
        *(states.stride()[:0:-1] if by_keys else states.stride()[1:]),
        CHUNK=CHUNK,
    )
    return made

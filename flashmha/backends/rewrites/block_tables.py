"""Which tiles of a problem a kernel has to look at: tables of blocks out of the queries that may look at each key, or
out of a mask tensor.

A tile is a block of queries by a block of keys. Nobody sees a key of an empty tile, which is listed nowhere; everybody
sees every key of a full one, which needs no mask; the rest are partial. Not a backend; the kernels below are Triton's,
which comes with torch for CUDA and is imported on first use; they run on the current device.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...host.machine import has_triton

WORTH = 512
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


def worth(seqlen_q: int, seqlen_k: int) -> bool:
    """Whether a problem has tiles enough."""
    return min(seqlen_q, seqlen_k) >= WORTH


@functools.cache
def served(device: torch.device) -> bool:
    """Whether tables are made and taken here: on Hopper; Blackwell's kernels want other blocks."""
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
    kernel()[(batch * rows,)](
        first.contiguous(),
        last.contiguous(),
        *made,
        seqlen_q,
        seqlen_k,
        rows,
        columns,
        TILE_Q=tile[0],
        TILE_K=tile[1],
        KEYS=1 << (tile[1] - 1).bit_length(),
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

    (batch or 1, at least seqlen_q + EDGE, at least seqlen_k + EDGE), 0 where nobody may look.
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
    judge, enlist = kernels()
    judge[(states.numel(),)](
        table,
        states,
        *table.stride()[:2],
        seqlen_q,
        seqlen_k,
        rows,
        columns,
        TILE_Q=tile[0],
        TILE_K=tile[1],
        KEYS=1 << (tile[1] - 1).bit_length(),
        STEP=16,
    )
    enlist[(len(items) * along,)](
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


@functools.cache
def kernels() -> Any:
    """Two programs for a mask: one judges a tile, one lists the tiles of a row."""
    import triton
    import triton.language as tl

    @triton.jit(do_not_specialize=["seqlen_q", "seqlen_k", "rows", "columns"])  # type: ignore[untyped-decorator]
    def judge(  # type: ignore[no-untyped-def]
        table,
        states,
        stride_b,
        stride_q,
        seqlen_q,
        seqlen_k,
        rows,
        columns,
        TILE_Q: tl.constexpr,
        TILE_K: tl.constexpr,
        KEYS: tl.constexpr,
        STEP: tl.constexpr,
    ):
        program = tl.program_id(0)
        item, row, column = (program // (rows * columns)).to(tl.int64), (program // columns) % rows, program % columns
        lane, line = tl.arange(0, KEYS), tl.arange(0, STEP)
        first = table + item * stride_b + (row * TILE_Q).to(tl.int64) * stride_q + column * TILE_K
        seen = tl.zeros([STEP, KEYS], dtype=tl.int32)
        for start in range(0, TILE_Q, STEP):
            query = start + line
            inside = (query < TILE_Q)[:, None] & (lane < TILE_K)[None, :]
            seen += tl.load(first + query[:, None] * stride_q + lane[None, :], mask=inside, other=0).to(tl.int32)
        pairs = tl.sum(tl.sum(seen, axis=1), axis=0)
        most = tl.minimum(seqlen_q - row * TILE_Q, TILE_Q) * tl.minimum(seqlen_k - column * TILE_K, TILE_K)
        # 0 is empty, 1 partial, 2 full
        tl.store(states + program, (pairs > 0).to(tl.uint8) + (pairs == most).to(tl.uint8))

    @triton.jit(do_not_specialize=["rows", "columns", "stride_b", "stride_r", "stride_c"])  # type: ignore[untyped-decorator]
    def enlist(  # type: ignore[no-untyped-def]
        states,
        items,
        partial_counts,
        partial_blocks,
        full_counts,
        full_blocks,
        rows,
        columns,
        stride_b,
        stride_r,
        stride_c,
        CHUNK: tl.constexpr,
    ):
        program = tl.program_id(0)
        item, row = tl.load(items + program // rows), program % rows
        lane = tl.arange(0, CHUNK)
        list_at = program.to(tl.int64) * columns
        partials, fulls = 0, 0
        for start in range(0, columns, CHUNK):
            column = start + lane
            place = states + item * stride_b + row * stride_r + column * stride_c
            state = tl.load(place, mask=column < columns, other=0).to(tl.int32)
            partial, full = (state == 1).to(tl.int32), (state == 2).to(tl.int32)
            tl.store(partial_blocks + list_at + partials + tl.cumsum(partial) - 1, column, mask=partial > 0)
            tl.store(full_blocks + list_at + fulls + tl.cumsum(full) - 1, column, mask=full > 0)
            partials += tl.sum(partial)
            fulls += tl.sum(full)
        nothing = (partials + fulls) == 0
        tl.store(partial_blocks + list_at, 0, mask=nothing)
        tl.store(partial_counts + program, tl.where(nothing, 1, partials))
        tl.store(full_counts + program, fulls)

    return judge, enlist


@functools.cache
def kernel() -> Any:
    """A program makes one row of the tables of intervals."""
    import triton
    import triton.language as tl

    # one build for all lengths
    @triton.jit(do_not_specialize=["seqlen_q", "seqlen_k", "rows", "columns"])  # type: ignore[untyped-decorator]
    def fill(  # type: ignore[no-untyped-def]
        first,
        last,
        partial_counts,
        partial_blocks,
        full_counts,
        full_blocks,
        seqlen_q,
        seqlen_k,
        rows,
        columns,
        TILE_Q: tl.constexpr,
        TILE_K: tl.constexpr,
        KEYS: tl.constexpr,
        CHUNK: tl.constexpr,
        BY_KEYS: tl.constexpr,
    ):
        program = tl.program_id(0)
        item, row = (program // rows).to(tl.int64), program % rows
        lane, key = tl.arange(0, CHUNK), tl.arange(0, KEYS)
        list_at = program.to(tl.int64) * columns
        partials, fulls = 0, 0
        for start in range(0, columns, CHUNK):
            column = start + lane
            if BY_KEYS:
                query_block, key_block = column, row + lane * 0
            else:
                query_block, key_block = row + lane * 0, column
            # queries behind the last one see nothing and hinder nothing: their rows are never written
            begin = (query_block * TILE_Q)[:, None]
            end = tl.minimum(begin + TILE_Q, seqlen_q) - 1
            keys = key_block[:, None] * TILE_K + key[None, :]
            real = (key < TILE_K)[None, :] & (keys < seqlen_k)
            low = tl.load(first + item * seqlen_k + keys, mask=real, other=0)
            high = tl.load(last + item * seqlen_k + keys, mask=real, other=0)
            seen = real & (low <= end) & (high >= begin)
            # the kernel itself hides keys behind the last one, in full tiles too
            whole = (low <= begin) & (high >= end) | (real == 0)
            inside = column < columns
            some = inside & (tl.max(seen.to(tl.int32), axis=1) > 0)
            every = inside & (tl.min(whole.to(tl.int32), axis=1) > 0)
            full = every.to(tl.int32)
            partial = (some & (every == 0)).to(tl.int32)
            tl.store(partial_blocks + list_at + partials + tl.cumsum(partial) - 1, column, mask=partial > 0)
            tl.store(full_blocks + list_at + fulls + tl.cumsum(full) - 1, column, mask=full > 0)
            partials += tl.sum(partial)
            fulls += tl.sum(full)
        nothing = (partials + fulls) == 0
        tl.store(partial_blocks + list_at, 0, mask=nothing)
        tl.store(partial_counts + program, tl.where(nothing, 1, partials))
        tl.store(full_counts + program, fulls)

    return fill

"""The Triton kernels of ``block_tables``; importing this imports triton."""

from __future__ import annotations

import triton
import triton.language as tl

LENGTHS = ["seqlen_q", "seqlen_k", "rows", "columns"]
"""Numbers that no kernel is compiled anew for."""


@triton.jit(do_not_specialize=LENGTHS)
def interval_tables_kernel(
    first: tl.tensor,
    last: tl.tensor,
    partial_counts: tl.tensor,
    partial_blocks: tl.tensor,
    full_counts: tl.tensor,
    full_blocks: tl.tensor,
    seqlen_q: tl.tensor,
    seqlen_k: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    TILE_Q: tl.constexpr,
    TILE_K: tl.constexpr,
    KEYS: tl.constexpr,
    CHUNK: tl.constexpr,
    BY_KEYS: tl.constexpr,
) -> None:
    """A row of the tables of intervals."""
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


@triton.jit(do_not_specialize=LENGTHS)
def tile_states_kernel(
    table: tl.tensor,
    states: tl.tensor,
    stride_b: tl.tensor,
    stride_q: tl.tensor,
    seqlen_q: tl.tensor,
    seqlen_k: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    TILE_Q: tl.constexpr,
    TILE_K: tl.constexpr,
    KEYS: tl.constexpr,
    STEP: tl.constexpr,
) -> None:
    """The state of one tile of a mask: 0 is empty, 1 partial, 2 full."""
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
    tl.store(states + program, (pairs > 0).to(tl.uint8) + (pairs == most).to(tl.uint8))


@triton.jit(do_not_specialize=["rows", "columns", "stride_b", "stride_r", "stride_c"])
def mask_tables_kernel(
    states: tl.tensor,
    items: tl.tensor,
    partial_counts: tl.tensor,
    partial_blocks: tl.tensor,
    full_counts: tl.tensor,
    full_blocks: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    stride_b: tl.tensor,
    stride_r: tl.tensor,
    stride_c: tl.tensor,
    CHUNK: tl.constexpr,
) -> None:
    """A row of the tables of a mask, out of the states of its tiles."""
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

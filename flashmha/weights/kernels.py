"""The Triton kernels of ``tiles``; importing this imports triton.

A tile is ``BLOCK_M`` queries by ``BLOCK_N`` keys of one head. Tensors come as pointers with a stride an axis; a table
that is not there is ``None``. Offsets of a whole tile are 64-bit, those inside it 32-bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..host.kernel_math import LOG2E, bend
from ..host.launcher import Launcher
from .kernel_parts import UNSPECIALIZED, exponentiate, find_visible, load_bias, multiply


@triton.jit(do_not_specialize=UNSPECIALIZED)
def statistics_kernel(
    q: tl.tensor,
    k: tl.tensor,
    shift: tl.tensor,
    factor: tl.tensor,
    sinks: tl.tensor,
    valid: tl.tensor,
    dense: tl.tensor,
    bias: tl.tensor,
    q_batch: tl.tensor,
    q_row: tl.tensor,
    q_head: tl.tensor,
    k_batch: tl.tensor,
    k_key: tl.tensor,
    k_head: tl.tensor,
    seqlen_q: tl.tensor,
    seqlen_k: tl.tensor,
    heads: tl.tensor,
    group: tl.tensor,
    scale: tl.tensor,
    softcap: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    dense_batch: tl.tensor,
    dense_head: tl.tensor,
    dense_row: tl.tensor,
    dense_key: tl.tensor,
    bias_batch: tl.tensor,
    bias_head: tl.tensor,
    bias_row: tl.tensor,
    bias_key: tl.tensor,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """Compute what makes weights of scores, ``factor * exp(score - shift)``: the largest one a row, and 1 / the sum.

    One program a tile of rows of a head. The sum has the head's sink in it. A row that sees no key has shift inf and
    factor 0.
    """
    tiles = tl.cdiv(seqlen_q, BLOCK_M)
    place = tl.program_id(0) // tiles
    batch, head = (place // heads).to(tl.int64), (place % heads).to(tl.int64)
    first_row = tl.program_id(0) % tiles * BLOCK_M
    row = first_row.to(tl.int64)
    q += batch * q_batch + head * q_head + row * q_row
    k += batch * k_batch + head // group * k_head
    if valid is not None:
        valid += batch * seqlen_k
    if dense is not None:
        dense += batch * dense_batch + head * dense_head + row * dense_row
    if bias is not None:
        bias += batch * bias_batch + head * bias_head + row * bias_row
    start, stop = 0, seqlen_k
    if WINDOW:
        start = tl.maximum(first_row + low, 0) // BLOCK_N * BLOCK_N
        stop = tl.minimum(tl.minimum(first_row + BLOCK_M, seqlen_q) + high, seqlen_k)
    sizes, window, steps = (seqlen_q, seqlen_k), (low, high), (dense_row, dense_key)
    largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for first_key in range(start, stop, BLOCK_N):
        key = tl.cast(first_key, tl.int64)
        left = (seqlen_q - first_row, seqlen_k - first_key)
        score = multiply(q, k + key * k_key, (q_row, k_key), left, HEAD_DIM, CHUNK, BLOCK_M, BLOCK_N)
        score = bend(score, scale, softcap, SOFTCAP)
        if bias is not None:
            score += load_bias(bias + key * bias_key, (bias_row, bias_key), left, BLOCK_M, BLOCK_N)
        table = dense
        if dense is not None:
            table += key * dense_key
        first = (first_row, first_key)
        seen = find_visible(first, sizes, window, valid, table, steps, WINDOW, BLOCK_M, BLOCK_N)
        score = tl.where(seen, score, float("-inf"))
        known = largest
        largest = tl.maximum(known, tl.max(score, axis=1))
        base = tl.where(largest == float("-inf"), 0.0, largest)  # -inf - -inf would be NaN
        total = total * tl.exp2((known - base) * LOG2E) + tl.sum(tl.exp2((score - base[:, None]) * LOG2E), axis=1)
    rows = first_row + tl.arange(0, BLOCK_M)
    places = place.to(tl.int64) * seqlen_q + rows
    blind = total == 0.0  # not by the largest, which a NaN leaves as it is
    if sinks is not None:
        total += tl.exp2((tl.load(sinks + head) - tl.where(blind, 0.0, largest)) * LOG2E)
    tl.store(shift + places, tl.where(blind, float("inf"), largest), mask=rows < seqlen_q)
    tl.store(factor + places, tl.where(blind, 0.0, 1.0 / total), mask=rows < seqlen_q)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def weights_kernel(
    q: tl.tensor,
    k: tl.tensor,
    shift: tl.tensor,
    factor: tl.tensor,
    valid: tl.tensor,
    dense: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    q_batch: tl.tensor,
    q_row: tl.tensor,
    q_head: tl.tensor,
    k_batch: tl.tensor,
    k_key: tl.tensor,
    k_head: tl.tensor,
    seqlen_q: tl.tensor,
    seqlen_k: tl.tensor,
    heads: tl.tensor,
    group: tl.tensor,
    count: tl.tensor,
    scale: tl.tensor,
    softcap: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    dense_batch: tl.tensor,
    dense_head: tl.tensor,
    dense_row: tl.tensor,
    dense_key: tl.tensor,
    bias_batch: tl.tensor,
    bias_head: tl.tensor,
    bias_row: tl.tensor,
    bias_key: tl.tensor,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BAND: tl.constexpr,
    BY_HEAD: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """The mean weights of ``count`` heads that follow one another: one program a tile of them.

    ``out`` is (batch * heads // count, seqlen_q, seqlen_k), contiguous. ``BY_HEAD``: the dense table has heads.
    Programs walk down ``BAND`` tiles before they go right, so that those at work share their keys in the cache.
    """
    tiles_q, tiles_k = tl.cdiv(seqlen_q, BLOCK_M), tl.cdiv(seqlen_k, BLOCK_N)
    tile = tl.program_id(0) % (tiles_q * tiles_k)
    place = tl.program_id(0) // (tiles_q * tiles_k)
    above = tile // (BAND * tiles_k) * BAND
    inside = tile % (BAND * tiles_k)
    height = tl.minimum(tiles_q - above, BAND)
    first_row, first_key = (above + inside % height) * BLOCK_M, inside // height * BLOCK_N
    row, key = first_row.to(tl.int64), first_key.to(tl.int64)
    left = (seqlen_q - first_row, seqlen_k - first_key)
    first, sizes, window = (first_row, first_key), (seqlen_q, seqlen_k), (low, high)
    tokens, steps, bias_steps = (q_row, k_key), (dense_row, dense_key), (bias_row, bias_key)

    parts = heads // count
    batch, first_head = (place // parts).to(tl.int64), place % parts * count
    q += batch * q_batch + row * q_row
    k += batch * k_batch + key * k_key
    if valid is not None:
        valid += batch * seqlen_k
    if dense is not None:
        dense += batch * dense_batch + row * dense_row + key * dense_key
    if bias is not None:
        bias += batch * bias_batch + row * bias_row + key * bias_key
    rows = tl.arange(0, BLOCK_M)
    statistic = batch * heads * seqlen_q + row + tl.minimum(rows, left[0] - 1)

    stop = first_head + count
    if WINDOW:  # a tile that is wholly hidden has no heads
        last_row = tl.minimum(first_row + BLOCK_M, seqlen_q) - 1
        hidden = (first_key > last_row + high) | (first_key + BLOCK_N - 1 < first_row + low)
        stop = tl.where(hidden, first_head, stop)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for number in range(first_head, stop):
        head = tl.cast(number, tl.int64)
        q_place, k_place = q + head * q_head, k + head // group * k_head
        score = multiply(q_place, k_place, tokens, left, HEAD_DIM, CHUNK, BLOCK_M, BLOCK_N)
        table = bias
        if bias is not None:
            table += head * bias_head
        places = statistic + head * seqlen_q
        part = exponentiate(score, shift, factor, places, table, bias_steps, left, scale, softcap, SOFTCAP)
        if BY_HEAD:
            mine = dense + head * dense_head
            seen = find_visible(first, sizes, window, valid, mine, steps, WINDOW, BLOCK_M, BLOCK_N)
            part = tl.where(seen, part, 0.0)
        total += part
    if not BY_HEAD:
        seen = find_visible(first, sizes, window, valid, dense, steps, WINDOW, BLOCK_M, BLOCK_N)
        total = tl.where(seen, total, 0.0)
    out += place.to(tl.int64) * seqlen_q * seqlen_k + row * seqlen_k + key
    keys = tl.arange(0, BLOCK_N)
    entries = out + rows[:, None] * seqlen_k + keys[None, :]
    real = (rows < left[0])[:, None] & (keys < left[1])[None, :]
    tl.store(entries, (total / count).to(out.dtype.element_ty), mask=real)


launch_statistics, launch_weights = Launcher(statistics_kernel), Launcher(weights_kernel)

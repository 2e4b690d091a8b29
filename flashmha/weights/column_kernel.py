"""Sums of the weights over queries, tile by tile, in Triton."""

from __future__ import annotations

import triton
import triton.language as tl

from ..host.launcher import Launcher
from .kernel_parts import UNSPECIALIZED, exponentiate, find_visible, load_tokens, multiply


@triton.jit(do_not_specialize=UNSPECIALIZED)
def columns_kernel(
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
    MASKED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """What each key of a tile gets of all rows of ``count`` heads that follow one another.

    ``out`` is (batch * heads // count, seqlen_k), float32, contiguous. ``MASKED``: a window or a dense table hides. One
    program adds in one order, so that the same call gives the same sums. The first tiles start first: beside a causal
    mask they have the most rows.
    """
    places = tl.num_programs(0) // tl.cdiv(seqlen_k, BLOCK_N)
    place = tl.program_id(0) % places
    parts = heads // count
    batch, first_head = (place // parts).to(tl.int64), place % parts * count
    first_key = tl.program_id(0) // places * BLOCK_N
    key, keys_left = first_key.to(tl.int64), seqlen_k - first_key
    q += batch * q_batch
    k += batch * k_batch + key * k_key
    if dense is not None:
        dense += batch * dense_batch + key * dense_key
    if bias is not None:
        bias += batch * bias_batch + key * bias_key
    start, stop = 0, seqlen_q
    if WINDOW:
        start = tl.maximum(first_key - high, 0) // BLOCK_M * BLOCK_M
        stop = tl.minimum(tl.minimum(first_key + BLOCK_N, seqlen_k) - low, seqlen_q)
    PIECES: tl.constexpr = 3 if WINDOW and dense is None else 1
    whole, rest = start, start
    if PIECES == 3:  # rows from which nothing in the tile is hidden need no mask, which takes as long as the product
        whole = tl.cdiv(tl.maximum(first_key + BLOCK_N - 1 - high, start), BLOCK_M) * BLOCK_M
        rest = tl.maximum(tl.minimum(first_key - low + 1, seqlen_q), 0) // BLOCK_M * BLOCK_M
        rest = tl.maximum(rest, whole)
    sizes, window, tokens = (seqlen_q, seqlen_k), (low, high), (q_row, k_key)
    steps, bias_steps = (dense_row, dense_key), (bias_row, bias_key)
    rows = tl.arange(0, BLOCK_M)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for number in range(first_head, first_head + count):
        head = tl.cast(number, tl.int64)
        key_tile, k_place = None, k + head // group * k_head
        if CHUNK >= HEAD_DIM:
            key_tile = load_tokens(k_place, keys_left, k_key, HEAD_DIM, 0, CHUNK, BLOCK_N)
        for piece in tl.static_range(PIECES):
            first, last = start, stop
            if PIECES == 3 and piece == 0:
                last = tl.minimum(whole, stop)
            elif PIECES == 3 and piece == 1:
                first, last = whole, rest
            elif PIECES == 3:
                first = rest
            for first_row in range(first, last, BLOCK_M):
                row, rows_left = tl.cast(first_row, tl.int64), seqlen_q - first_row
                left, q_place = (rows_left, keys_left), q + head * q_head + row * q_row
                score = multiply(q_place, k_place, tokens, left, HEAD_DIM, CHUNK, BLOCK_M, BLOCK_N, keys=key_tile)
                added, table = bias, dense
                if bias is not None:
                    added += head * bias_head + row * bias_row
                statistic = (batch * heads + head) * seqlen_q + row + tl.minimum(rows, rows_left - 1)
                part = exponentiate(score, shift, factor, statistic, added, bias_steps, left, scale, softcap, SOFTCAP)
                if MASKED and not (PIECES == 3 and piece == 1):
                    if dense is not None:
                        table += head * dense_head + row * dense_row
                    at = (first_row, first_key)
                    seen = find_visible(at, sizes, window, None, table, steps, WINDOW, BLOCK_M, BLOCK_N)
                    total += tl.where(seen, part, 0.0)
                else:
                    total += tl.where((rows < rows_left)[:, None], part, 0.0)
    keys = tl.arange(0, BLOCK_N)
    sums = tl.sum(total, axis=0)
    if valid is not None:
        real = tl.load(valid + batch * seqlen_k + first_key + keys, mask=keys < keys_left, other=0)
        sums = tl.where(real != 0, sums, 0.0)
    tl.store(out + place.to(tl.int64) * seqlen_k + first_key + keys, sums, mask=keys < keys_left)


launch_columns = Launcher(columns_kernel)

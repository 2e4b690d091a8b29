"""A few rows of weights, out of their log-sum-exp, in Triton."""

from __future__ import annotations

import triton
import triton.language as tl

from ..host.launcher import Launcher
from .kernel_parts import exponentiate, multiply

ROW_NUMBERS = """
    lse_batch lse_head lse_row group parts count first_batch first_head first_row rows step first_key keys
    scale softcap low high
""".split()  # noqa: SIM905
"""Arguments whose value shall not make another kernel."""


@triton.jit(do_not_specialize=ROW_NUMBERS)
def rows_kernel(
    q: tl.tensor,
    k: tl.tensor,
    lse: tl.tensor,
    out: tl.tensor,
    q_batch: tl.tensor,
    q_row: tl.tensor,
    q_head: tl.tensor,
    k_batch: tl.tensor,
    k_key: tl.tensor,
    k_head: tl.tensor,
    lse_batch: tl.tensor,
    lse_head: tl.tensor,
    lse_row: tl.tensor,
    group: tl.tensor,
    parts: tl.tensor,
    count: tl.tensor,
    first_batch: tl.tensor,
    first_head: tl.tensor,
    first_row: tl.tensor,
    rows: tl.tensor,
    step: tl.tensor,
    first_key: tl.tensor,
    keys: tl.tensor,
    scale: tl.tensor,
    softcap: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """The mean weights of ``count`` heads that follow one another, of some rows and keys: one program a tile of keys.

    q, k and ``lse`` (batch, heads, seqlen_q) are those of the whole problem. ``rows`` queries from ``first_row`` on are
    ``step`` apart; ``out`` is (items * parts, rows, keys), contiguous. A key is visible to a row from ``low`` to
    ``high`` places after it.
    """
    tiles = tl.cdiv(keys, BLOCK_N)
    place = tl.program_id(0) // tiles
    first = tl.program_id(0) % tiles * BLOCK_N
    batch = (first_batch + place // parts).to(tl.int64)
    number = first_head + place % parts * count
    left = (rows, keys - first)
    q += batch * q_batch + tl.cast(first_row, tl.int64) * q_row
    k += batch * k_batch + tl.cast(first_key + first, tl.int64) * k_key
    lse += batch * lse_batch + tl.cast(first_row, tl.int64) * lse_row
    row, key = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    apart = tl.cast(step, tl.int64)  # rows that are far apart
    statistic = tl.minimum(row, rows - 1) * (apart * lse_row)
    stop = number + count
    if WINDOW:  # a tile that is wholly hidden has no heads
        last_row = first_row + (rows - 1) * step
        hidden = first_key + first > last_row + high
        hidden = hidden | (first_key + tl.minimum(first + BLOCK_N, keys) - 1 < first_row + low)
        stop = tl.where(hidden, number, stop)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for one in range(number, stop):
        head = tl.cast(one, tl.int64)
        here = (apart * q_row, k_key)
        score = multiply(q + head * q_head, k + head // group * k_head, here, left, HEAD_DIM, CHUNK, BLOCK_M, BLOCK_N)
        total += exponentiate(score, lse + head * lse_head, None, statistic, None, here, left, scale, softcap, SOFTCAP)
    if WINDOW:
        distance = (first_key + first + key)[None, :] - (first_row + row * step)[:, None]
        total = tl.where((distance >= low) & (distance <= high), total, 0.0)
    entries = out + (place.to(tl.int64) * rows + row[:, None]) * keys + first + key[None, :]
    there = (row < rows)[:, None] & (first + key < keys)[None, :]
    tl.store(entries, (total / count).to(out.dtype.element_ty), mask=there)


launch_row_kernel = Launcher(rows_kernel)

"""The parts that the kernels of the weights share: operands, masks, exponentials.

What a function takes of rows and of keys is one tuple of two: ``strides`` of a table, the ``first`` of a tile, how many
are ``left`` from there on. The compiler takes them apart, into the same instructions. A launch has none: to Triton 3.4,
which torch 2.8 brings, ``do_not_specialize`` says nothing about the numbers in a tuple, so others would make another
kernel.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..host.kernel_math import LOG2E, bend


@triton.jit
def load_tokens(
    x: tl.tensor,
    left: tl.tensor,
    stride: tl.tensor,
    HEAD_DIM: tl.constexpr,
    start: tl.tensor,
    CHUNK: tl.constexpr,
    SIZE: tl.constexpr,
) -> tl.tensor:
    """``SIZE`` tokens of a head, from dimension ``start`` on: (SIZE, CHUNK), 0 past the last dimension.

    Past the last token (``left`` of them are there) it repeats that one, which needs no mask.
    """
    dims = start + tl.arange(0, CHUNK)
    places = x + tl.minimum(tl.arange(0, SIZE), left - 1)[:, None] * stride + dims[None, :]
    if HEAD_DIM % CHUNK == 0:
        made = tl.load(places)
    else:
        made = tl.load(places, mask=(dims < HEAD_DIM)[None, :], other=0.0)
    return made


@triton.jit
def multiply(
    q: tl.tensor,
    k: tl.tensor,
    strides: tl.tuple,
    left: tl.tuple,
    HEAD_DIM: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    keys: tl.tensor = None,
) -> tl.tensor:
    """``q @ k.T`` of a tile in float32; q and k point at its first row and key of one head.

    Where a chunk is all of head_dim, ``keys`` may have been loaded before a loop.
    """
    if CHUNK >= HEAD_DIM:
        rows = load_tokens(q, left[0], strides[0], HEAD_DIM, 0, CHUNK, BLOCK_M)
        if keys is None:
            keys = load_tokens(k, left[1], strides[1], HEAD_DIM, 0, CHUNK, BLOCK_N)
        score = tl.dot(rows, tl.trans(keys), input_precision="ieee")
    else:
        score = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in range(0, HEAD_DIM, CHUNK):
            some_rows = load_tokens(q, left[0], strides[0], HEAD_DIM, start, CHUNK, BLOCK_M)
            some_keys = load_tokens(k, left[1], strides[1], HEAD_DIM, start, CHUNK, BLOCK_N)
            score = tl.dot(some_rows, tl.trans(some_keys), score, input_precision="ieee")
    return score


@triton.jit
def find_visible(
    first: tl.tuple,
    sizes: tl.tuple,
    window: tl.tuple,
    valid: tl.tensor,
    dense: tl.tensor,
    strides: tl.tuple,
    WINDOW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> tl.tensor:
    """Which query of a tile may look at which key.

    ``sizes`` are those of the problem. ``window`` is (low, high), the least and the largest ``key - row``. ``valid``
    points at the batch item's first key, ``dense`` at the tile's first entry; its ``strides``.
    """
    first_row, first_key = first
    low, high = window
    rows, keys = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    real_rows, real_keys = first_row + rows < sizes[0], first_key + keys < sizes[1]
    seen = real_rows[:, None] & real_keys[None, :]
    if WINDOW:
        distance = (first_key + keys)[None, :] - (first_row + rows)[:, None]
        seen = seen & (distance >= low) & (distance <= high)
    if valid is not None:
        seen = seen & (tl.load(valid + first_key + keys, mask=real_keys, other=0) != 0)[None, :]
    if dense is not None:
        entries = dense + rows[:, None] * strides[0] + keys[None, :] * strides[1]
        seen = seen & (tl.load(entries, mask=seen, other=0) != 0)
    return seen


@triton.jit
def load_bias(
    bias: tl.tensor,
    strides: tl.tuple,
    left: tl.tuple,
    M: tl.constexpr,
    N: tl.constexpr,
) -> tl.tensor:
    """The bias of a tile; ``bias`` points at its first entry."""
    rows = tl.minimum(tl.arange(0, M), left[0] - 1)
    keys = tl.minimum(tl.arange(0, N), left[1] - 1)
    return tl.load(bias + rows[:, None] * strides[0] + keys[None, :] * strides[1]).to(tl.float32)


@triton.jit
def exponentiate(
    score: tl.tensor,
    shift: tl.tensor,
    factor: tl.tensor,
    statistic: tl.tensor,
    bias: tl.tensor,
    strides: tl.tuple,
    left: tl.tuple,
    scale: tl.tensor,
    softcap: tl.tensor,
    SOFTCAP: tl.constexpr,
) -> tl.tensor:
    """The weights of a tile before its mask, given ``q @ k.T`` and where its rows' statistics lie.

    With a ``factor`` they are ``factor * exp(score - shift)``; without, ``shift`` is a log-sum-exp.
    """
    moved = tl.load(shift + statistic)
    if factor is None:  # a blind row has no weights: exp(anything - inf) is 0
        moved = tl.where(moved == float("-inf"), float("inf"), moved * LOG2E)
        if SOFTCAP:
            made = tl.exp2(bend(score, scale, softcap, SOFTCAP) * LOG2E - moved[:, None])
        else:
            made = tl.exp2(score * (scale * LOG2E) - moved[:, None])
    else:
        score = bend(score, scale, softcap, SOFTCAP)
        if bias is not None:
            score += load_bias(bias, strides, left, score.shape[0], score.shape[1])
        made = tl.exp2((score - moved[:, None]) * LOG2E) * tl.load(factor + statistic)[:, None]
    return made


UNSPECIALIZED = """
    seqlen_q heads group count low high scale softcap
    dense_batch dense_head dense_row dense_key bias_batch bias_head bias_row bias_key
""".split()  # noqa: SIM905
"""Arguments whose value shall not make another kernel."""

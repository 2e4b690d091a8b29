"""What the kernels of the weights share: operands, masks, exponentials."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def operand(
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
def product(
    q: tl.tensor,
    k: tl.tensor,
    rows_left: tl.tensor,
    keys_left: tl.tensor,
    q_row: tl.tensor,
    k_key: tl.tensor,
    HEAD_DIM: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> tl.tensor:
    """``q @ k.T`` of a tile in float32; q and k point at its first row and key of one head."""
    if CHUNK >= HEAD_DIM:
        left = operand(q, rows_left, q_row, HEAD_DIM, 0, CHUNK, BLOCK_M)
        right = operand(k, keys_left, k_key, HEAD_DIM, 0, CHUNK, BLOCK_N)
        score = tl.dot(left, tl.trans(right), input_precision="ieee")
    else:
        score = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in range(0, HEAD_DIM, CHUNK):
            left = operand(q, rows_left, q_row, HEAD_DIM, start, CHUNK, BLOCK_M)
            right = operand(k, keys_left, k_key, HEAD_DIM, start, CHUNK, BLOCK_N)
            score = tl.dot(left, tl.trans(right), score, input_precision="ieee")
    return score


@triton.jit
def visible(
    first_row: tl.tensor,
    first_key: tl.tensor,
    seqlen_q: tl.tensor,
    seqlen_k: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    valid: tl.tensor,
    dense: tl.tensor,
    dense_row: tl.tensor,
    dense_key: tl.tensor,
    WINDOW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> tl.tensor:
    """Which query of a tile may look at which key.

    ``valid`` points at the batch item's first key, ``dense`` at the tile's first entry.
    """
    rows, keys = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    real_rows, real_keys = first_row + rows < seqlen_q, first_key + keys < seqlen_k
    seen = real_rows[:, None] & real_keys[None, :]
    if WINDOW:
        distance = (first_key + keys)[None, :] - (first_row + rows)[:, None]
        seen = seen & (distance >= low) & (distance <= high)
    if valid is not None:
        seen = seen & (tl.load(valid + first_key + keys, mask=real_keys, other=0) != 0)[None, :]
    if dense is not None:
        entries = dense + rows[:, None] * dense_row + keys[None, :] * dense_key
        seen = seen & (tl.load(entries, mask=seen, other=0) != 0)
    return seen


@triton.jit
def added(
    bias: tl.tensor,
    rows_left: tl.tensor,
    keys_left: tl.tensor,
    bias_row: tl.tensor,
    bias_key: tl.tensor,
    M: tl.constexpr,
    N: tl.constexpr,
) -> tl.tensor:
    """The bias of a tile; ``bias`` points at its first entry."""
    rows = tl.minimum(tl.arange(0, M), rows_left - 1)
    keys = tl.minimum(tl.arange(0, N), keys_left - 1)
    return tl.load(bias + rows[:, None] * bias_row + keys[None, :] * bias_key).to(tl.float32)


@triton.jit
def exponentials(
    score: tl.tensor,
    shift: tl.tensor,
    factor: tl.tensor,
    statistic: tl.tensor,
    bias: tl.tensor,
    rows_left: tl.tensor,
    keys_left: tl.tensor,
    bias_row: tl.tensor,
    bias_key: tl.tensor,
    scale: tl.tensor,
) -> tl.tensor:
    """The weights of a tile before its mask, given ``q @ k.T`` and where its rows' statistics lie.

    With a ``factor`` they are ``factor * exp(score - shift)``; without, ``shift`` is a log-sum-exp.
    """
    moved = tl.load(shift + statistic)
    if factor is None:  # a blind row has no weights: exp(anything - inf) is 0
        moved = tl.where(moved == float("-inf"), float("inf"), moved * LOG2_E)
        made = tl.exp2(score * (scale * LOG2_E) - moved[:, None])
    else:
        score = score * scale
        if bias is not None:
            score += added(bias, rows_left, keys_left, bias_row, bias_key, score.shape[0], score.shape[1])
        made = tl.exp2((score - moved[:, None]) * LOG2_E) * tl.load(factor + statistic)[:, None]
    return made


NUMBERS = """
    seqlen_q heads group count low high scale
    dense_batch dense_head dense_row dense_key bias_batch bias_head bias_row bias_key
""".split()  # noqa: SIM905
"""Arguments whose value shall not make another kernel."""

"""The Triton kernels of ``tiles``; importing this imports triton.

A tile is ``BLOCK_M`` queries by ``BLOCK_N`` keys of one head. Tensors come as pointers with a stride an axis; a table
that is not there is ``None``. Offsets of a whole tile are 64-bit, those inside it 32-bit.
"""

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


@triton.jit(do_not_specialize=NUMBERS)
def statistics_kernel(
    q: tl.tensor,
    k: tl.tensor,
    shift: tl.tensor,
    factor: tl.tensor,
    valid: tl.tensor,
    dense: tl.tensor,
    bias: tl.tensor,
    seqlen_q: tl.tensor,
    seqlen_k: tl.tensor,
    heads: tl.tensor,
    group: tl.tensor,
    scale: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    q_batch: tl.tensor,
    q_row: tl.tensor,
    q_head: tl.tensor,
    k_batch: tl.tensor,
    k_key: tl.tensor,
    k_head: tl.tensor,
    dense_batch: tl.tensor,
    dense_head: tl.tensor,
    dense_row: tl.tensor,
    dense_key: tl.tensor,
    bias_batch: tl.tensor,
    bias_head: tl.tensor,
    bias_row: tl.tensor,
    bias_key: tl.tensor,
    WINDOW: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """What makes weights of scores, ``factor * exp(score - shift)``: the largest one a row, and 1 / the sum.

    One program a tile of rows of a head. A blind row has shift inf and factor 0.
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
    largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for first_key in range(start, stop, BLOCK_N):
        key = tl.cast(first_key, tl.int64)
        rows_left, keys_left = seqlen_q - first_row, seqlen_k - first_key
        score = product(q, k + key * k_key, rows_left, keys_left, q_row, k_key, HEAD_DIM, CHUNK, BLOCK_M, BLOCK_N)
        score *= scale
        if bias is not None:
            score += added(bias + key * bias_key, rows_left, keys_left, bias_row, bias_key, BLOCK_M, BLOCK_N)
        table = dense
        if dense is not None:
            table += key * dense_key
        seen = visible(
            first_row,
            first_key,
            seqlen_q,
            seqlen_k,
            low,
            high,
            valid,
            table,
            dense_row,
            dense_key,
            WINDOW,
            BLOCK_M,
            BLOCK_N,
        )
        score = tl.where(seen, score, float("-inf"))
        known = largest
        largest = tl.maximum(known, tl.max(score, axis=1))
        base = tl.where(largest == float("-inf"), 0.0, largest)  # -inf - -inf would be NaN
        total = total * tl.exp2((known - base) * LOG2_E) + tl.sum(tl.exp2((score - base[:, None]) * LOG2_E), axis=1)
    rows = first_row + tl.arange(0, BLOCK_M)
    places = place.to(tl.int64) * seqlen_q + rows
    blind = total == 0.0  # not by the largest, which a NaN leaves as it is
    tl.store(shift + places, tl.where(blind, float("inf"), largest), mask=rows < seqlen_q)
    tl.store(factor + places, tl.where(blind, 0.0, 1.0 / total), mask=rows < seqlen_q)


@triton.jit(do_not_specialize=NUMBERS)
def weights_kernel(
    q: tl.tensor,
    k: tl.tensor,
    shift: tl.tensor,
    factor: tl.tensor,
    valid: tl.tensor,
    dense: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    seqlen_q: tl.tensor,
    seqlen_k: tl.tensor,
    heads: tl.tensor,
    group: tl.tensor,
    count: tl.tensor,
    scale: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    q_batch: tl.tensor,
    q_row: tl.tensor,
    q_head: tl.tensor,
    k_batch: tl.tensor,
    k_key: tl.tensor,
    k_head: tl.tensor,
    dense_batch: tl.tensor,
    dense_head: tl.tensor,
    dense_row: tl.tensor,
    dense_key: tl.tensor,
    bias_batch: tl.tensor,
    bias_head: tl.tensor,
    bias_row: tl.tensor,
    bias_key: tl.tensor,
    WINDOW: tl.constexpr,
    BY_HEAD: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BAND: tl.constexpr,
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
    rows_left, keys_left = seqlen_q - first_row, seqlen_k - first_key

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
    statistic = batch * heads * seqlen_q + row + tl.minimum(rows, rows_left - 1)

    stop = first_head + count
    if WINDOW:  # a tile that is wholly hidden has no heads
        last_row = tl.minimum(first_row + BLOCK_M, seqlen_q) - 1
        hidden = (first_key > last_row + high) | (first_key + BLOCK_N - 1 < first_row + low)
        stop = tl.where(hidden, first_head, stop)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for number in range(first_head, stop):
        head = tl.cast(number, tl.int64)
        score = product(
            q + head * q_head,
            k + head // group * k_head,
            rows_left,
            keys_left,
            q_row,
            k_key,
            HEAD_DIM,
            CHUNK,
            BLOCK_M,
            BLOCK_N,
        )
        table = bias
        if bias is not None:
            table += head * bias_head
        part = exponentials(
            score, shift, factor, statistic + head * seqlen_q, table, rows_left, keys_left, bias_row, bias_key, scale
        )
        if BY_HEAD:
            seen = visible(
                first_row,
                first_key,
                seqlen_q,
                seqlen_k,
                low,
                high,
                valid,
                dense + head * dense_head,
                dense_row,
                dense_key,
                WINDOW,
                BLOCK_M,
                BLOCK_N,
            )
            part = tl.where(seen, part, 0.0)
        total += part
    if not BY_HEAD:
        seen = visible(
            first_row,
            first_key,
            seqlen_q,
            seqlen_k,
            low,
            high,
            valid,
            dense,
            dense_row,
            dense_key,
            WINDOW,
            BLOCK_M,
            BLOCK_N,
        )
        total = tl.where(seen, total, 0.0)
    out += place.to(tl.int64) * seqlen_q * seqlen_k + row * seqlen_k + key
    keys = tl.arange(0, BLOCK_N)
    entries = out + rows[:, None] * seqlen_k + keys[None, :]
    real = (rows < rows_left)[:, None] & (keys < keys_left)[None, :]
    tl.store(entries, (total / count).to(out.dtype.element_ty), mask=real)


@triton.jit
def weights_and_gradient(
    left: tl.tensor,
    right: tl.tensor,
    shift: tl.tensor,
    factor: tl.tensor,
    statistic: tl.tensor,
    valid: tl.tensor,
    dense: tl.tensor,
    bias: tl.tensor,
    grad: tl.tensor,
    first_row: tl.tensor,
    first_key: tl.tensor,
    seqlen_q: tl.tensor,
    seqlen_k: tl.tensor,
    scale: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    dense_row: tl.tensor,
    dense_key: tl.tensor,
    bias_row: tl.tensor,
    bias_key: tl.tensor,
    grad_row: tl.tensor,
    grad_key: tl.tensor,
    WINDOW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> tl.tensor:
    """The weights of a tile, 0 where hidden, and what came back for them; tables point at (0, 0) of a head."""
    row, key = tl.cast(first_row, tl.int64), tl.cast(first_key, tl.int64)
    rows_left, keys_left = seqlen_q - first_row, seqlen_k - first_key
    if dense is not None:
        dense += row * dense_row + key * dense_key
    if bias is not None:
        bias += row * bias_row + key * bias_key
    rows, keys = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    score = tl.dot(left, tl.trans(right))
    places = statistic + row + tl.minimum(rows, rows_left - 1)
    made = exponentials(score, shift, factor, places, bias, rows_left, keys_left, bias_row, bias_key, scale)
    seen = visible(
        first_row,
        first_key,
        seqlen_q,
        seqlen_k,
        low,
        high,
        valid,
        dense,
        dense_row,
        dense_key,
        WINDOW,
        BLOCK_M,
        BLOCK_N,
    )
    entries = grad + row * grad_row + key * grad_key + rows[:, None] * grad_row + keys[None, :] * grad_key
    return tl.where(seen, made, 0.0), tl.load(entries, mask=seen, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=NUMBERS)
def gradient_of_q_kernel(
    q: tl.tensor,
    k: tl.tensor,
    shift: tl.tensor,
    factor: tl.tensor,
    valid: tl.tensor,
    dense: tl.tensor,
    bias: tl.tensor,
    grad: tl.tensor,
    mean: tl.tensor,
    out: tl.tensor,
    seqlen_q: tl.tensor,
    seqlen_k: tl.tensor,
    heads: tl.tensor,
    group: tl.tensor,
    count: tl.tensor,
    scale: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    q_batch: tl.tensor,
    q_row: tl.tensor,
    q_head: tl.tensor,
    k_batch: tl.tensor,
    k_key: tl.tensor,
    k_head: tl.tensor,
    dense_batch: tl.tensor,
    dense_head: tl.tensor,
    dense_row: tl.tensor,
    dense_key: tl.tensor,
    bias_batch: tl.tensor,
    bias_head: tl.tensor,
    bias_row: tl.tensor,
    bias_key: tl.tensor,
    grad_batch: tl.tensor,
    grad_head: tl.tensor,
    grad_row: tl.tensor,
    grad_key: tl.tensor,
    WINDOW: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """``scale * (weights * (grad - mean)) @ k`` of a tile of rows of a head, and ``mean``, the weights' mean of grad.

    ``out`` is (batch, seqlen_q, heads, head_dim), ``mean`` (batch, heads, seqlen_q), both contiguous; the weights are
    means over ``count`` heads.
    """
    tiles = tl.cdiv(seqlen_q, BLOCK_M)
    place = tl.program_id(0) // tiles
    batch, head = (place // heads).to(tl.int64), (place % heads).to(tl.int64)
    first_row = tl.program_id(0) % tiles * BLOCK_M
    row, rows_left = first_row.to(tl.int64), seqlen_q - first_row
    k += batch * k_batch + head // group * k_head
    grad += batch * grad_batch + head * grad_head
    statistic = place.to(tl.int64) * seqlen_q
    if valid is not None:
        valid += batch * seqlen_k
    if dense is not None:
        dense += batch * dense_batch + head * dense_head
    if bias is not None:
        bias += batch * bias_batch + head * bias_head
    start, stop = 0, seqlen_k
    if WINDOW:
        start = tl.maximum(first_row + low, 0) // BLOCK_N * BLOCK_N
        stop = tl.minimum(tl.minimum(first_row + BLOCK_M, seqlen_q) + high, seqlen_k)
    left = operand(q + batch * q_batch + head * q_head + row * q_row, rows_left, q_row, HEAD_DIM, 0, CHUNK, BLOCK_M)
    average = tl.zeros((BLOCK_M,), tl.float32)
    for first_key in range(start, stop, BLOCK_N):
        right = operand(
            k + tl.cast(first_key, tl.int64) * k_key, seqlen_k - first_key, k_key, HEAD_DIM, 0, CHUNK, BLOCK_N
        )
        made, back = weights_and_gradient(
            left,
            right,
            shift,
            factor,
            statistic,
            valid,
            dense,
            bias,
            grad,
            first_row,
            first_key,
            seqlen_q,
            seqlen_k,
            scale,
            low,
            high,
            dense_row,
            dense_key,
            bias_row,
            bias_key,
            grad_row,
            grad_key,
            WINDOW,
            BLOCK_M,
            BLOCK_N,
        )
        average += tl.sum(made * back, axis=1)
    total = tl.zeros((BLOCK_M, CHUNK), tl.float32)
    for first_key in range(start, stop, BLOCK_N):
        right = operand(
            k + tl.cast(first_key, tl.int64) * k_key, seqlen_k - first_key, k_key, HEAD_DIM, 0, CHUNK, BLOCK_N
        )
        made, back = weights_and_gradient(
            left,
            right,
            shift,
            factor,
            statistic,
            valid,
            dense,
            bias,
            grad,
            first_row,
            first_key,
            seqlen_q,
            seqlen_k,
            scale,
            low,
            high,
            dense_row,
            dense_key,
            bias_row,
            bias_key,
            grad_row,
            grad_key,
            WINDOW,
            BLOCK_M,
            BLOCK_N,
        )
        total = tl.dot((made * (back - average[:, None])).to(right.dtype), right, total)
    rows, dims = tl.arange(0, BLOCK_M), tl.arange(0, CHUNK)
    real = rows < rows_left
    tl.store(mean + statistic + first_row + rows, average, mask=real)
    out += ((batch * seqlen_q + row) * heads + head) * HEAD_DIM
    entries = out + rows[:, None] * (heads * HEAD_DIM) + dims[None, :]
    tl.store(
        entries, (total * (scale / count)).to(out.dtype.element_ty), mask=real[:, None] & (dims < HEAD_DIM)[None, :]
    )


@triton.jit(do_not_specialize=NUMBERS)
def gradient_of_k_kernel(
    q: tl.tensor,
    k: tl.tensor,
    shift: tl.tensor,
    factor: tl.tensor,
    valid: tl.tensor,
    dense: tl.tensor,
    bias: tl.tensor,
    grad: tl.tensor,
    mean: tl.tensor,
    out: tl.tensor,
    seqlen_q: tl.tensor,
    seqlen_k: tl.tensor,
    heads: tl.tensor,
    group: tl.tensor,
    count: tl.tensor,
    scale: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    q_batch: tl.tensor,
    q_row: tl.tensor,
    q_head: tl.tensor,
    k_batch: tl.tensor,
    k_key: tl.tensor,
    k_head: tl.tensor,
    dense_batch: tl.tensor,
    dense_head: tl.tensor,
    dense_row: tl.tensor,
    dense_key: tl.tensor,
    bias_batch: tl.tensor,
    bias_head: tl.tensor,
    bias_row: tl.tensor,
    bias_key: tl.tensor,
    grad_batch: tl.tensor,
    grad_head: tl.tensor,
    grad_row: tl.tensor,
    grad_key: tl.tensor,
    WINDOW: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """``scale * (weights * (grad - mean)).T @ q`` of a tile of keys of a key head, summed over its query heads.

    ``out`` is (batch, seqlen_k, heads // group, head_dim), contiguous; ``mean`` is that of ``gradient_of_q_kernel``.
    """
    tiles = tl.cdiv(seqlen_k, BLOCK_N)
    heads_kv = heads // group
    place = tl.program_id(0) // tiles
    batch, head_kv = (place // heads_kv).to(tl.int64), (place % heads_kv).to(tl.int64)
    first_key = tl.program_id(0) % tiles * BLOCK_N
    key, keys_left = first_key.to(tl.int64), seqlen_k - first_key
    q += batch * q_batch
    grad += batch * grad_batch
    if valid is not None:
        valid += batch * seqlen_k
    if dense is not None:
        dense += batch * dense_batch
    if bias is not None:
        bias += batch * bias_batch
    start, stop = 0, seqlen_q
    if WINDOW:
        start = tl.maximum(first_key - high, 0) // BLOCK_M * BLOCK_M
        stop = tl.minimum(tl.minimum(first_key + BLOCK_N, seqlen_k) - low, seqlen_q)
    right = operand(k + batch * k_batch + head_kv * k_head + key * k_key, keys_left, k_key, HEAD_DIM, 0, CHUNK, BLOCK_N)
    total = tl.zeros((BLOCK_N, CHUNK), tl.float32)
    for member in range(group):
        head = head_kv * group + member
        table, added_table = dense, bias
        if dense is not None:
            table += head * dense_head
        if bias is not None:
            added_table += head * bias_head
        statistic = (batch * heads + head) * seqlen_q
        for first_row in range(start, stop, BLOCK_M):
            row, rows_left = tl.cast(first_row, tl.int64), seqlen_q - first_row
            left = operand(q + head * q_head + row * q_row, rows_left, q_row, HEAD_DIM, 0, CHUNK, BLOCK_M)
            made, back = weights_and_gradient(
                left,
                right,
                shift,
                factor,
                statistic,
                valid,
                table,
                added_table,
                grad + head * grad_head,
                first_row,
                first_key,
                seqlen_q,
                seqlen_k,
                scale,
                low,
                high,
                dense_row,
                dense_key,
                bias_row,
                bias_key,
                grad_row,
                grad_key,
                WINDOW,
                BLOCK_M,
                BLOCK_N,
            )
            average = tl.load(mean + statistic + row + tl.minimum(tl.arange(0, BLOCK_M), rows_left - 1))
            total = tl.dot(tl.trans((made * (back - average[:, None])).to(left.dtype)), left, total)
    keys, dims = tl.arange(0, BLOCK_N), tl.arange(0, CHUNK)
    out += ((batch * seqlen_k + key) * heads_kv + head_kv) * HEAD_DIM
    entries = out + keys[:, None] * (heads_kv * HEAD_DIM) + dims[None, :]
    real = (keys < keys_left)[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(entries, (total * (scale / count)).to(out.dtype.element_ty), mask=real)

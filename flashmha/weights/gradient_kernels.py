"""The gradients of queries and keys that the weights give, tile by tile, in Triton."""

from __future__ import annotations

import triton
import triton.language as tl

from .kernel_parts import UNSPECIALIZED, exponentiate, find_visible, load_tokens


@triton.jit
def load_weights_and_gradient(
    left: tl.tensor,
    right: tl.tensor,
    shift: tl.tensor,
    factor: tl.tensor,
    statistic: tl.tensor,
    valid: tl.tensor,
    dense: tl.tensor,
    bias: tl.tensor,
    grad: tl.tensor,
    first: tl.tuple,
    sizes: tl.tuple,
    window: tl.tuple,
    dense_strides: tl.tuple,
    bias_strides: tl.tuple,
    grad_strides: tl.tuple,
    scale: tl.tensor,
    WINDOW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> tl.tensor:
    """The weights of a tile, 0 where hidden, and what came back for them; tables point at (0, 0) of a head."""
    row, key = tl.cast(first[0], tl.int64), tl.cast(first[1], tl.int64)
    rows_left, keys_left = sizes[0] - first[0], sizes[1] - first[1]
    if dense is not None:
        dense += row * dense_strides[0] + key * dense_strides[1]
    if bias is not None:
        bias += row * bias_strides[0] + key * bias_strides[1]
    rows, keys = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    score = tl.dot(left, tl.trans(right))
    places = statistic + row + tl.minimum(rows, rows_left - 1)
    made = exponentiate(score, shift, factor, places, bias, bias_strides, (rows_left, keys_left), scale, 0.0, False)
    seen = find_visible(first, sizes, window, valid, dense, dense_strides, WINDOW, BLOCK_M, BLOCK_N)
    grad_row, grad_key = grad_strides
    entries = grad + row * grad_row + key * grad_key + rows[:, None] * grad_row + keys[None, :] * grad_key
    return tl.where(seen, made, 0.0), tl.load(entries, mask=seen, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=UNSPECIALIZED)
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
    left = load_tokens(q + batch * q_batch + head * q_head + row * q_row, rows_left, q_row, HEAD_DIM, 0, CHUNK, BLOCK_M)
    average = tl.zeros((BLOCK_M,), tl.float32)
    total = tl.zeros((BLOCK_M, CHUNK), tl.float32)
    for second in tl.static_range(2):  # the mean takes all keys, and the gradient the mean
        for first_key in range(start, stop, BLOCK_N):
            key, keys_left = tl.cast(first_key, tl.int64), seqlen_k - first_key
            right = load_tokens(k + key * k_key, keys_left, k_key, HEAD_DIM, 0, CHUNK, BLOCK_N)
            made, back = load_weights_and_gradient(
                left,
                right,
                shift,
                factor,
                statistic,
                valid,
                dense,
                bias,
                grad,
                (first_row, first_key),
                (seqlen_q, seqlen_k),
                (low, high),
                (dense_row, dense_key),
                (bias_row, bias_key),
                (grad_row, grad_key),
                scale,
                WINDOW,
                BLOCK_M,
                BLOCK_N,
            )
            if second:
                total = tl.dot((made * (back - average[:, None])).to(right.dtype), right, total)
            else:
                average += tl.sum(made * back, axis=1)
    rows, dims = tl.arange(0, BLOCK_M), tl.arange(0, CHUNK)
    real = rows < rows_left
    tl.store(mean + statistic + first_row + rows, average, mask=real)
    out += ((batch * seqlen_q + row) * heads + head) * HEAD_DIM
    entries = out + rows[:, None] * (heads * HEAD_DIM) + dims[None, :]
    tl.store(
        entries, (total * (scale / count)).to(out.dtype.element_ty), mask=real[:, None] & (dims < HEAD_DIM)[None, :]
    )


@triton.jit(do_not_specialize=UNSPECIALIZED)
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
    right = load_tokens(
        k + batch * k_batch + head_kv * k_head + key * k_key, keys_left, k_key, HEAD_DIM, 0, CHUNK, BLOCK_N
    )
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
            left = load_tokens(q + head * q_head + row * q_row, rows_left, q_row, HEAD_DIM, 0, CHUNK, BLOCK_M)
            made, back = load_weights_and_gradient(
                left,
                right,
                shift,
                factor,
                statistic,
                valid,
                table,
                added_table,
                grad + head * grad_head,
                (first_row, first_key),
                (seqlen_q, seqlen_k),
                (low, high),
                (dense_row, dense_key),
                (bias_row, bias_key),
                (grad_row, grad_key),
                scale,
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

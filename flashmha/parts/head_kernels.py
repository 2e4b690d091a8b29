"""The Triton kernels of ``head_launches``; importing this imports triton.

A program takes ``TOKENS`` neighbouring tokens and up to ``HEADS`` heads of theirs, all of queries or all of keys. It
makes cos and sin once and goes from head to head. A head is three tiles: the first members of its pairs, the second
ones, and the features behind ``DIM``; each is 0 where nothing is. All is computed in float32 and rounded once.

``walk`` says where tokens stand: how many lie side by side in a row, the first place, and the steps from row to row and
from token to token; of ``positions`` where that is a tensor, else of the positions themselves.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..host.launcher import Launcher

UNSPECIALIZED = "tokens inner start by_row by_token heads_q heads_k".split()  # noqa: SIM905
"""Arguments whose value shall not make another kernel."""


@triton.jit
def load_head(
    places: tl.tensor,
    inside: tl.tensor,
    INTERLEAVED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    PAIRS: tl.constexpr,
    REST: tl.constexpr,
) -> tl.tuple:
    """The three tiles of rows that start at ``places`` (rows, 1)."""
    if INTERLEAVED:
        columns = tl.arange(0, 2 * PAIRS)[None, :]
        both = tl.load(places + columns, mask=inside & (columns < DIM), other=0.0).to(tl.float32)
        one, two = tl.split(tl.reshape(both, (both.shape[0], PAIRS, 2)))
    else:
        columns = tl.arange(0, PAIRS)[None, :]
        there = inside & (columns < DIM // 2)
        one = tl.load(places + columns, mask=there, other=0.0).to(tl.float32)
        two = tl.load(places + DIM // 2 + columns, mask=there, other=0.0).to(tl.float32)
    if HEAD_DIM > DIM:
        behind = tl.arange(0, REST)[None, :]
        rest = tl.load(places + DIM + behind, mask=inside & (behind < HEAD_DIM - DIM), other=0.0).to(tl.float32)
    else:
        rest = tl.zeros((one.shape[0], REST), tl.float32)
    return one, two, rest


@triton.jit
def store_head(
    places: tl.tensor,
    inside: tl.tensor,
    head: tl.tuple,
    INTERLEAVED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    PAIRS: tl.constexpr,
    REST: tl.constexpr,
) -> None:
    """The reverse of ``load_head``."""
    dtype = places.dtype.element_ty
    one, two, rest = head
    if INTERLEAVED:
        columns = tl.arange(0, 2 * PAIRS)[None, :]
        both = tl.reshape(tl.join(one, two), (one.shape[0], 2 * PAIRS))
        tl.store(places + columns, both.to(dtype), mask=inside & (columns < DIM))
    else:
        columns = tl.arange(0, PAIRS)[None, :]
        there = inside & (columns < DIM // 2)
        tl.store(places + columns, one.to(dtype), mask=there)
        tl.store(places + DIM // 2 + columns, two.to(dtype), mask=there)
    if HEAD_DIM > DIM:
        behind = tl.arange(0, REST)[None, :]
        tl.store(places + DIM + behind, rest.to(dtype), mask=inside & (behind < HEAD_DIM - DIM))


@triton.jit
def make_table(
    positions: tl.tensor,
    inv_freq: tl.tensor,
    walk: tl.tuple,
    token: tl.tensor,
    tokens: tl.tensor,
    scale: tl.tensor,
    DIM: tl.constexpr,
    PAIRS: tl.constexpr,
) -> tl.tuple:
    """cos and sin of each token and pair, (tokens, PAIRS)."""
    inner, start, by_row, by_token = walk
    row = token // inner
    at = start + row * by_row + (token - row * inner) * by_token
    if positions is not None:
        at = tl.load(positions + at, mask=token < tokens, other=0)
    pair = tl.arange(0, PAIRS)
    speed = tl.load(inv_freq + pair, mask=pair < DIM // 2, other=0.0)
    angles = at.to(tl.float32)[:, None] * speed[None, :]
    return tl.cos(angles) * scale, tl.sin(angles) * scale


@triton.jit
def add_features(one: tl.tensor, two: tl.tensor, rest: tl.tensor) -> tl.tensor:
    """The sum over the features of each row, (rows, 1)."""
    return (tl.sum(one, axis=1) + tl.sum(two, axis=1) + tl.sum(rest, axis=1))[:, None]


@triton.jit
def normalize(
    head: tl.tuple,
    eps: tl.tensor,
    LAYER: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    PAIRS: tl.constexpr,
    REST: tl.constexpr,
) -> tl.tuple:
    """A head without its mean (``LAYER``) and divided by its size, and 1 / that size, (rows, 1)."""
    one, two, rest = head
    if LAYER:
        mean = add_features(one, two, rest) / HEAD_DIM
        real = tl.arange(0, PAIRS)[None, :] < DIM // 2
        one, two = tl.where(real, one - mean, 0.0), tl.where(real, two - mean, 0.0)
        rest = tl.where(tl.arange(0, REST)[None, :] < HEAD_DIM - DIM, rest - mean, 0.0)
    inverse = 1.0 / tl.sqrt(add_features(one * one, two * two, rest * rest) / HEAD_DIM + eps)
    return one * inverse, two * inverse, rest * inverse, inverse


@triton.jit(do_not_specialize=UNSPECIALIZED)
def prepare_kernel(
    q: tl.tensor,
    k: tl.tensor,
    out_q: tl.tensor,
    out_k: tl.tensor,
    positions: tl.tensor,
    inv_freq: tl.tensor,
    q_weight: tl.tensor,
    k_weight: tl.tensor,
    q_bias: tl.tensor,
    k_bias: tl.tensor,
    q_token: tl.tensor,
    q_head: tl.tensor,
    k_token: tl.tensor,
    k_head: tl.tensor,
    tokens: tl.tensor,
    inner: tl.tensor,
    start: tl.tensor,
    by_row: tl.tensor,
    by_token: tl.tensor,
    heads_q: tl.tensor,
    heads_k: tl.tensor,
    scale: tl.tensor,
    eps: tl.tensor,
    NORM: tl.constexpr,
    LAYER: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    PAIRS: tl.constexpr,
    REST: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
) -> None:
    """Heads of q and k, normalised and turned, into ``out_q`` and ``out_k``, which are contiguous rows."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    row, inside = token.to(tl.int64)[:, None], (token < tokens)[:, None]
    chunks = tl.cdiv(heads_q, HEADS)
    second = tl.program_id(1) >= chunks
    first, last = tl.program_id(1) * HEADS, heads_q
    x, x_token, x_head, out = q, q_token, q_head, out_q
    if second:
        first, last = (tl.program_id(1) - chunks) * HEADS, heads_k
        x, x_token, x_head, out = k, k_token, k_head, out_k
    every = tl.zeros((1, 1), tl.int32)
    if q_weight is not None:
        weight = q_weight
        if second:
            weight = k_weight
        w_one, w_two, w_rest = load_head(weight + every, every == 0, INTERLEAVED, HEAD_DIM, DIM, PAIRS, REST)
    if q_bias is not None:
        bias = q_bias
        if second:
            bias = k_bias
        b_one, b_two, b_rest = load_head(bias + every, every == 0, INTERLEAVED, HEAD_DIM, DIM, PAIRS, REST)
    if inv_freq is not None:
        walk = (inner, start, by_row, by_token)
        cos, sin = make_table(positions, inv_freq, walk, token, tokens, scale, DIM, PAIRS)
    for head in range(first, tl.minimum(first + HEADS, last)):
        places = x + row * x_token + tl.cast(head, tl.int64) * x_head
        one, two, rest = load_head(places, inside, INTERLEAVED, HEAD_DIM, DIM, PAIRS, REST)
        if NORM:
            one, two, rest, _ = normalize((one, two, rest), eps, LAYER, HEAD_DIM, DIM, PAIRS, REST)
        if q_weight is not None:
            one, two, rest = one * w_one, two * w_two, rest * w_rest
        if q_bias is not None:
            one, two, rest = one + b_one, two + b_two, rest + b_rest
        if inv_freq is not None:
            one, two = one * cos - two * sin, two * cos + one * sin
        target = out + (row * last + head) * HEAD_DIM
        store_head(target, inside, (one, two, rest), INTERLEAVED, HEAD_DIM, DIM, PAIRS, REST)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def prepare_backward_kernel(
    dq: tl.tensor,
    dk: tl.tensor,
    q: tl.tensor,
    k: tl.tensor,
    out_q: tl.tensor,
    out_k: tl.tensor,
    sums: tl.tensor,
    positions: tl.tensor,
    inv_freq: tl.tensor,
    q_weight: tl.tensor,
    k_weight: tl.tensor,
    dq_token: tl.tensor,
    dq_head: tl.tensor,
    dk_token: tl.tensor,
    dk_head: tl.tensor,
    q_token: tl.tensor,
    q_head: tl.tensor,
    k_token: tl.tensor,
    k_head: tl.tensor,
    out_q_token: tl.tensor,
    out_q_head: tl.tensor,
    out_k_token: tl.tensor,
    out_k_head: tl.tensor,
    tokens: tl.tensor,
    inner: tl.tensor,
    start: tl.tensor,
    by_row: tl.tensor,
    by_token: tl.tensor,
    heads_q: tl.tensor,
    heads_k: tl.tensor,
    scale: tl.tensor,
    eps: tl.tensor,
    BIAS: tl.constexpr,
    NORM: tl.constexpr,
    LAYER: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    PAIRS: tl.constexpr,
    REST: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
) -> None:
    """Gradients of what ``prepare_kernel`` read, given those of what it wrote.

    ``sums`` (programs, programs, 1 or 2, HEAD_DIM) gets what each program adds to the gradient of a weight and a bias.
    A program goes on to as many other tokens as there are programs, so that there are few sums.
    """
    chunks = tl.cdiv(heads_q, HEADS)
    second = tl.program_id(1) >= chunks
    first, last = tl.program_id(1) * HEADS, heads_q
    grad, grad_token, grad_head = dq, dq_token, dq_head
    out, out_token, out_head = out_q, out_q_token, out_q_head
    if second:
        first, last = (tl.program_id(1) - chunks) * HEADS, heads_k
        grad, grad_token, grad_head = dk, dk_token, dk_head
        out, out_token, out_head = out_k, out_k_token, out_k_head
    every = tl.zeros((1, 1), tl.int32)
    if NORM:
        x, x_token, x_head = q, q_token, q_head
        if second:
            x, x_token, x_head = k, k_token, k_head
    if q_weight is not None:
        weight = q_weight
        if second:
            weight = k_weight
        w_one, w_two, w_rest = load_head(weight + every, every == 0, INTERLEAVED, HEAD_DIM, DIM, PAIRS, REST)
        dw_one, dw_two = tl.zeros((TOKENS, PAIRS), tl.float32), tl.zeros((TOKENS, PAIRS), tl.float32)
        dw_rest = tl.zeros((TOKENS, REST), tl.float32)
    if BIAS:
        db_one, db_two = tl.zeros((TOKENS, PAIRS), tl.float32), tl.zeros((TOKENS, PAIRS), tl.float32)
        db_rest = tl.zeros((TOKENS, REST), tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(tokens, TOKENS), tl.num_programs(0)):
        token = block * TOKENS + tl.arange(0, TOKENS)
        row, inside = token.to(tl.int64)[:, None], (token < tokens)[:, None]
        if inv_freq is not None:
            walk = (inner, start, by_row, by_token)
            cos, sin = make_table(positions, inv_freq, walk, token, tokens, scale, DIM, PAIRS)
        for head in range(first, tl.minimum(first + HEADS, last)):
            far = tl.cast(head, tl.int64)
            places = grad + row * grad_token + far * grad_head
            one, two, rest = load_head(places, inside, INTERLEAVED, HEAD_DIM, DIM, PAIRS, REST)
            if inv_freq is not None:
                one, two = one * cos + two * sin, two * cos - one * sin
            if BIAS:
                db_one, db_two, db_rest = db_one + one, db_two + two, db_rest + rest
            if NORM:
                read = load_head(x + row * x_token + far * x_head, inside, INTERLEAVED, HEAD_DIM, DIM, PAIRS, REST)
                n_one, n_two, n_rest, inverse = normalize(read, eps, LAYER, HEAD_DIM, DIM, PAIRS, REST)
                if q_weight is not None:
                    dw_one, dw_two, dw_rest = dw_one + one * n_one, dw_two + two * n_two, dw_rest + rest * n_rest
                    one, two, rest = one * w_one, two * w_two, rest * w_rest
                along = add_features(one * n_one, two * n_two, rest * n_rest) / HEAD_DIM
                mean = 0.0
                if LAYER:
                    mean = add_features(one, two, rest) / HEAD_DIM
                one, two = (one - mean - n_one * along) * inverse, (two - mean - n_two * along) * inverse
                rest = (rest - mean - n_rest * along) * inverse
            target = out + row * out_token + far * out_head
            store_head(target, inside, (one, two, rest), INTERLEAVED, HEAD_DIM, DIM, PAIRS, REST)
    if q_weight is not None:
        program = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
        place = sums + program * ((1 + BIAS) * HEAD_DIM) + every
        total = tl.sum(dw_one, axis=0)[None, :], tl.sum(dw_two, axis=0)[None, :], tl.sum(dw_rest, axis=0)[None, :]
        store_head(place, every == 0, total, INTERLEAVED, HEAD_DIM, DIM, PAIRS, REST)
        if BIAS:
            total = tl.sum(db_one, axis=0)[None, :], tl.sum(db_two, axis=0)[None, :], tl.sum(db_rest, axis=0)[None, :]
            store_head(place + HEAD_DIM, every == 0, total, INTERLEAVED, HEAD_DIM, DIM, PAIRS, REST)


launch_prepare, launch_prepare_backward = Launcher(prepare_kernel), Launcher(prepare_backward_kernel)

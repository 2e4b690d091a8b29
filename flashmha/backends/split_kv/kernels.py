"""The Triton kernels of ``split_kv``; importing this imports triton.

A row of a program is one query of one head. The queries of the heads of a group share the keys that are read, so they
share a program: row ``query * group + place in the group``. Scores are kept in units of log(2), for ``exp2``.

A launch takes no tuples: to Triton 3.4, which torch 2.8 brings, ``do_not_specialize`` says nothing about the numbers in
one, so other sizes would make another kernel.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...host.kernel_math import LOG2E, bend

NOWHERE: tl.constexpr = tl.constexpr(1 << 30)
LET_GO: tl.constexpr = tl.constexpr("griddepcontrol.launch_dependents; mov.u32 $0, 0;")
WAIT: tl.constexpr = tl.constexpr("griddepcontrol.wait; mov.u32 $0, 0;")
"""A program lets the next kernel start, and waits for the one before. ``tl.extra.cuda`` has both: not in Triton 3.4."""

ANY_VALUE = """
    at_b at_s held_b held_s table_b own_b own_h own_s own_t own_tokens
    slope_b slope_h group heads heads_kv seqlen_q capacity splits low high scale softcap
""".split()  # noqa: SIM905
ANY_ROWS = ["heads", "seqlen_q", "splits"]
"""Arguments whose value shall not make another kernel."""


@triton.jit(do_not_specialize=ANY_VALUE)
def split_kernel(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    lengths: tl.tensor,
    queries: tl.tensor,
    held: tl.tensor,
    table: tl.tensor,
    own: tl.tensor,
    begin: tl.tensor,
    slopes: tl.tensor,
    sinks: tl.tensor,
    out: tl.tensor,
    lse: tl.tensor,
    q_b: tl.tensor,
    q_s: tl.tensor,
    q_h: tl.tensor,
    k_b: tl.tensor,
    k_s: tl.tensor,
    k_h: tl.tensor,
    v_b: tl.tensor,
    v_s: tl.tensor,
    v_h: tl.tensor,
    at_b: tl.tensor,
    at_s: tl.tensor,
    held_b: tl.tensor,
    held_s: tl.tensor,
    table_b: tl.tensor,
    own_b: tl.tensor,
    own_h: tl.tensor,
    own_s: tl.tensor,
    own_t: tl.tensor,
    own_tokens: tl.tensor,
    slope_b: tl.tensor,
    slope_h: tl.tensor,
    group: tl.tensor,
    heads: tl.tensor,
    heads_kv: tl.tensor,
    seqlen_q: tl.tensor,
    capacity: tl.tensor,
    splits: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    scale: tl.tensor,
    softcap: tl.tensor,
    PAGE: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WHOLE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    DIMS: tl.constexpr,
    DIMS_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    """Attention of the queries of one group to one share of a row's keys; ``WHOLE``: to all of them, and the sinks.

    Args:
        lengths: (batch,) how many keys are real; ``None`` for all.
        queries: (batch, seqlen_q) the positions of queries; ``None``: the last query stands at the last key.
        held: (batch, seqlen_k) the positions of keys, negative where there is none; ``None``: key j stands at j.
        table: (batch, pages) where k and v are pools (pages, PAGE, heads_kv, head_dim); ``None``: they are rows.
        own, begin: bytes (batch, heads, seqlen_q, own_tokens), which of the keys from position (batch,) on are seen.
        slopes: (batch, heads) of ALiBi; sinks: (heads,).
        out: the answer (batch, seqlen_q, heads, head_dim_v), where ``WHOLE``; else those of shares, (batch, seqlen_q,
            heads, splits, head_dim_v), and behind them (batch, seqlen_q, heads, splits) in units of log(2).
        lse: (batch, heads, seqlen_q) of the ``WHOLE``; ``None`` where it is not wanted.
        low, high: the least and the largest ``key - query``, where there is ``LEFT`` and ``RIGHT``.
        EARLY: the kernel that combines is launched before this one ends, and waits for it.
    """
    if EARLY:
        tl.inline_asm_elementwise(LET_GO, "=r", [], dtype=tl.int32, is_pure=False, pack=1)
    program = tl.program_id(0)
    head_kv, share = program % heads_kv, program // heads_kv
    split, item = share % splits, (share // splits).to(tl.int64)
    row = tl.arange(0, BLOCK_M)
    query, head = row // group, head_kv * group + row % group
    real = query < seqlen_q
    if queries is None:
        at = query + (capacity - seqlen_q)
    else:
        at = tl.load(queries + item * at_b + query * at_s, mask=real, other=0).to(tl.int32)

    # the keys that some query may see, and this program's share of their tiles
    start, end = 0, capacity
    if lengths is not None:
        end = tl.minimum(tl.maximum(tl.load(lengths + item), 0), capacity).to(tl.int32)
    if held is None:
        if LEFT:
            start = tl.maximum(tl.min(tl.where(real, at, NOWHERE), axis=0) + low, 0)
        if RIGHT:
            end = tl.minimum(tl.max(tl.where(real, at, -NOWHERE), axis=0) + (high + 1), end)
    tiles = (tl.maximum(end - start, 0) + BLOCK_N - 1) // BLOCK_N
    first_tile, last_tile = split * tiles // splits, (split + 1) * tiles // splits

    dims, dims_v, near = tl.arange(0, DIMS), tl.arange(0, DIMS_V), tl.arange(0, BLOCK_N)
    rows = tl.load(
        q + item * q_b + query[:, None] * q_s + head[:, None] * q_h + dims[None, :],
        mask=real[:, None] & (dims < HEAD_DIM)[None, :],
        other=0.0,
    )
    k += head_kv.to(tl.int64) * k_h
    v += head_kv.to(tl.int64) * v_h
    if slopes is not None:
        slope = tl.load(slopes + item * slope_b + head * slope_h, mask=real, other=0.0).to(tl.float32) * LOG2E

    if own is not None:
        own_start = tl.load(begin + item).to(tl.int32)
        own_rows = own + item * own_b + head * own_h + query * own_s

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    made = tl.zeros([BLOCK_M, DIMS_V], tl.float32)
    for tile in range(first_tile, last_tile):
        first = start + tile * BLOCK_N
        # past the last key that key again, whose score is hidden: what lies behind may be anything
        place = tl.minimum(near, end - 1 - first)
        seen = first + near < end
        if table is None:
            from_start = tl.cast(first, tl.int64)
            k_first, v_first = k + item * k_b + from_start * k_s, v + item * v_b + from_start * v_s
            k_steps, v_steps = place * k_s, place * v_s
        else:
            slot = first + place
            page, within = tl.load(table + item * table_b + slot // PAGE).to(tl.int64), slot % PAGE
            k_first, v_first = k, v
            k_steps, v_steps = page * k_b + within * k_s, page * v_b + within * v_s
        position = first + near
        if held is not None:
            position = tl.load(held + item * held_b + (first + place) * held_s).to(tl.int32)
            seen = seen & (position >= 0)
        k_places = k_first + k_steps[:, None] + dims[None, :]
        if HEAD_DIM == DIMS:
            k_tile = tl.load(k_places)
        else:
            k_tile = tl.load(k_places, mask=(dims < HEAD_DIM)[None, :], other=0.0)
        score = tl.dot(rows, tl.trans(k_tile), input_precision="ieee")
        score = bend(score, scale, softcap, SOFTCAP) * LOG2E
        distance = position[None, :] - at[:, None]
        if slopes is not None:
            score -= slope[:, None] * tl.abs(distance).to(tl.float32)
        visible = seen[None, :]
        if LEFT:
            visible = visible & (distance >= low)
        if RIGHT:
            visible = visible & (distance <= high)
        if own is not None:
            token = position - own_start
            among = real[:, None] & (seen & (token >= 0) & (token < own_tokens))[None, :]
            entry = tl.load(own_rows[:, None] + token[None, :] * own_t, mask=among, other=1)
            visible = visible & (entry != 0)
        score = tl.where(visible, score, float("-inf"))

        larger = tl.maximum(top, tl.max(score, axis=1))
        shift = tl.where(larger == float("-inf"), 0.0, larger)
        weights = tl.exp2(score - shift[:, None])
        kept = tl.exp2(top - shift)
        total = total * kept + tl.sum(weights, axis=1)
        top = larger
        v_places = v_first + v_steps[:, None] + dims_v[None, :]
        if held is not None:  # a slot that holds no key may hold anything
            v_tile = tl.load(v_places, mask=seen[:, None] & (dims_v < HEAD_DIM_V)[None, :], other=0.0)
        elif HEAD_DIM_V == DIMS_V:
            v_tile = tl.load(v_places)
        else:
            v_tile = tl.load(v_places, mask=(dims_v < HEAD_DIM_V)[None, :], other=0.0)
        made = tl.dot(weights.to(v_tile.dtype), v_tile, made * kept[:, None], input_precision="ieee")

    blind = total == 0.0
    log = tl.where(blind, float("-inf"), top + tl.log2(total))
    made = made / tl.where(blind, 1.0, total)[:, None]
    place = (item * seqlen_q + query) * heads + head
    if WHOLE:
        if sinks is not None:
            log, factor = join_sink(log, tl.load(sinks + head, mask=real, other=0.0))
            made = made * factor[:, None]
        if lse is not None:
            tl.store(lse + (item * heads + head) * seqlen_q + query, log / LOG2E, mask=real)
        wanted = real
    else:
        place = place * splits + split
        logs = out + tl.num_programs(0).to(tl.int64) * (group * seqlen_q) * HEAD_DIM_V
        tl.store(logs + place, log, mask=real)
        wanted = real & (log != float("-inf"))
    wanted_dims = wanted[:, None] & (dims_v < HEAD_DIM_V)[None, :]
    tl.store(out + place[:, None] * HEAD_DIM_V + dims_v[None, :], made.to(out.dtype.element_ty), mask=wanted_dims)


@triton.jit
def join_sink(log: tl.tensor, sink: tl.tensor) -> tl.tensor:
    """A log-sum-exp in units of log(2) with a sink in it, and the part of the sum that was there without."""
    sink = sink.to(tl.float32) * LOG2E
    top = tl.maximum(log, sink)
    shift = tl.where(top == float("-inf"), 0.0, top)
    joined = tl.exp2(log - shift) + tl.exp2(sink - shift)
    whole = shift + tl.log2(joined)
    return whole, tl.where(top == float("-inf"), 0.0, tl.exp2(log - whole))


@triton.jit(do_not_specialize=ANY_ROWS)
def combine_kernel(
    parts: tl.tensor,
    sinks: tl.tensor,
    out: tl.tensor,
    lse: tl.tensor,
    heads: tl.tensor,
    seqlen_q: tl.tensor,
    splits: tl.tensor,
    HEAD_DIM_V: tl.constexpr,
    CHUNK: tl.constexpr,
    STEP: tl.constexpr,
    SPLITS: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    """The shares of one query of one head as one answer, a chunk of head_dim_v at a time; see ``split_kernel``."""
    if EARLY:
        tl.inline_asm_elementwise(WAIT, "=r", [], dtype=tl.int32, is_pure=False, pack=1)
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    head, token = row % heads, row // heads
    logs = parts + tl.num_programs(0).to(tl.int64) * splits * HEAD_DIM_V
    share = tl.arange(0, SPLITS)
    log = tl.load(logs + row * splits + share, mask=share < splits, other=float("-inf"))
    top = tl.max(log, axis=0)
    shift = tl.where(top == float("-inf"), 0.0, top)
    whole = shift + tl.log2(tl.sum(tl.exp2(log - shift), axis=0))
    if sinks is not None:
        whole, _ = join_sink(whole, tl.load(sinks + head))
    base = tl.where(whole == float("-inf"), 0.0, whole)
    dims = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = dims < HEAD_DIM_V
    made = tl.zeros([CHUNK], tl.float32)
    for start in range(0, splits, STEP):
        some = start + tl.arange(0, STEP)
        there = tl.load(logs + row * splits + some, mask=some < splits, other=float("-inf"))
        # of a share without keys nothing was written
        written = (there != float("-inf"))[:, None] & inside[None, :]
        part = tl.load(parts + (row * splits + some)[:, None] * HEAD_DIM_V + dims[None, :], mask=written, other=0.0)
        made += tl.sum(part * tl.exp2(there - base)[:, None], axis=0)
    tl.store(out + row * HEAD_DIM_V + dims, made.to(out.dtype.element_ty), mask=inside)
    if lse is not None and chunk == 0:
        tl.store(lse + (token // seqlen_q * heads + head) * seqlen_q + token % seqlen_q, whole / LOG2E)

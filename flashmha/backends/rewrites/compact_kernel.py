"""The Triton kernel of ``compact``; importing this imports triton."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def move_keys_kernel(
    k_source: tl.tensor,
    v_source: tl.tensor,
    k_target: tl.tensor,
    v_target: tl.tensor,
    valid: tl.tensor,
    lengths: tl.tensor,
    valid_b: tl.tensor,
    valid_s: tl.tensor,
    ks_b: tl.tensor,
    ks_s: tl.tensor,
    ks_h: tl.tensor,
    ks_d: tl.tensor,
    vs_b: tl.tensor,
    vs_s: tl.tensor,
    vs_h: tl.tensor,
    vs_d: tl.tensor,
    kt_b: tl.tensor,
    kt_s: tl.tensor,
    kt_h: tl.tensor,
    kt_d: tl.tensor,
    vt_b: tl.tensor,
    vt_s: tl.tensor,
    vt_h: tl.tensor,
    vt_d: tl.tensor,
    seqlen: tl.tensor,
    head_dim: tl.tensor,
    width: tl.tensor,
    TILE: tl.constexpr,
    KEYS: tl.constexpr,
    SCAN: tl.constexpr,
    BLOCK: tl.constexpr,
    SCATTER: tl.constexpr,
) -> None:
    """``KEYS`` neighbouring keys of an item, or their values, moved to their slots; without ``SCATTER`` back from them.

    Each program counts the real keys before its own, which avoids a kernel that counts them all.
    """
    item, start, second = tl.program_id(0).to(tl.int64), tl.program_id(1) * KEYS, tl.program_id(2)
    row = valid + item * valid_b
    lane = tl.arange(0, SCAN)
    every, earlier = tl.zeros([SCAN], dtype=tl.int32), tl.zeros([SCAN], dtype=tl.int32)
    for at in range(0, seqlen, SCAN):
        index = at + lane
        one = tl.load(row + index.to(tl.int64) * valid_s, mask=index < seqlen, other=0).to(tl.int32)
        every += one
        earlier += tl.where(index < start, one, 0)
    length = tl.sum(every)
    key = start + tl.arange(0, KEYS)
    real = tl.load(row + key.to(tl.int64) * valid_s, mask=key < seqlen, other=0).to(tl.int32)
    before = tl.sum(earlier) + tl.cumsum(real) - real
    slot = tl.where(real > 0, before, length + key - before)
    reached = key < seqlen
    read, wrote = slot.to(tl.int64), key.to(tl.int64)
    if SCATTER:
        read, wrote = wrote, read
        reached = reached & (slot < length + TILE)
        tl.store(lengths + item, length, mask=(start + second) == 0)
    for column in range(0, width, BLOCK):
        place = column + tl.arange(0, BLOCK)
        head, part = (place // head_dim)[None, :], (place % head_dim)[None, :]
        inside = (place < width)[None, :]
        if second == 0:
            source = k_source + item * ks_b + read[:, None] * ks_s + head * ks_h + part * ks_d
            target = k_target + item * kt_b + wrote[:, None] * kt_s + head * kt_h + part * kt_d
            moved = tl.load(source, mask=(real > 0)[:, None] & inside, other=0.0)
            tl.store(target, moved, mask=reached[:, None] & inside)
        else:
            source = v_source + item * vs_b + read[:, None] * vs_s + head * vs_h + part * vs_d
            target = v_target + item * vt_b + wrote[:, None] * vt_s + head * vt_h + part * vt_d
            moved = tl.load(source, mask=(real > 0)[:, None] & inside, other=0.0)
            tl.store(target, moved, mask=reached[:, None] & inside)

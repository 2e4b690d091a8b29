"""Keys that are real, moved to the front of their row: padding of any pattern as a length, for kernels that take one.

Where no mask depends on a key's position the order of keys does not matter, so a kernel that can stop after the first
``lengths[b]`` keys serves every pattern of padding. Not a backend; the kernels below are Triton's, which comes with
torch for CUDA and is imported on first use.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..masks import KeyLengths, KeyPadding, Mask, Window
from ..spec import AttentionSpec

TILE = 256
"""At least as many keys as a kernel loads at a time. What it loads behind the last real key must be finite: a weight of
0 times NaN is NaN."""


class Slots(NamedTuple):
    """Where keys go: ``places`` (batch, seqlen_k), a permutation of each row, and how many are real (batch,)."""

    places: Tensor
    lengths: Tensor


def validity(mask: Mask | None, spec: AttentionSpec) -> Tensor | None:
    """Which keys the padding in a mask leaves, (batch, seqlen_k) bool; ``None`` where there is none."""
    valid: Tensor | None = None
    for part in () if mask is None else mask.parts:
        if isinstance(part, (KeyPadding, KeyLengths)):
            table = part.materialize(spec.batch, 1, 1, spec.seqlen_k, spec.device)[:, 0, 0]
            valid = table if valid is None else valid & table
    return valid


def slots(valid: Tensor) -> Slots:
    """Real keys first, each kind in the order it had."""
    before = valid.cumsum(1, dtype=torch.int32)
    lengths = before[:, -1].contiguous()
    index = torch.arange(valid.shape[1], dtype=torch.int32, device=valid.device)
    return Slots(torch.where(valid, before - 1, lengths[:, None] + index - before), lengths)


class Intervals(NamedTuple):
    """The queries that may look at each key, ``first`` to ``last`` inclusive, (batch, seqlen_k) int32 each."""

    first: Tensor
    last: Tensor


def intervals(valid: Tensor, window: Window, seqlen_q: int) -> Intervals:
    """Padding and a window in one table: a key is seen by neighbouring queries, a hidden one by none."""
    seqlen_k = valid.shape[1]
    meets = torch.arange(seqlen_k, dtype=torch.int32, device=valid.device) - (seqlen_k - seqlen_q)
    first = torch.zeros_like(meets) if window.right is None else meets - window.right
    last = torch.full_like(meets, seqlen_q) if window.left is None else meets + window.left
    return Intervals(torch.where(valid, first, seqlen_q), torch.where(valid, last, -1))


def missing() -> str | None:
    """Why keys cannot be moved here."""
    return None if importlib.util.find_spec("triton") else "key_padding moves keys with triton, which is not installed"


def compact(k: Tensor, v: Tensor, to: Slots) -> tuple[Tensor, Tensor]:
    """Keys and values (batch, seqlen_k, heads_kv, head_dim) with the real ones first; one tile behind them is 0."""
    made = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (k, v))
    for source, target in zip((k, v), made):
        move(source, target, to, scatter=True)
    return made[0], made[1]


def spread(source: Tensor, target: Tensor, to: Slots) -> None:
    """Gradients of compacted keys, written where the keys were; 0 for padding."""
    move(source, target, to, scatter=False)


def move(source: Tensor, target: Tensor, to: Slots, *, scatter: bool) -> None:
    import triton

    batch, seqlen, heads, head_dim = source.shape
    width = heads * head_dim
    if not source.numel():
        return
    block = min(triton.next_power_of_2(width), 4096)
    with torch.cuda.device(source.device):
        kernel()[(batch * seqlen, triton.cdiv(width, block))](
            source,
            target,
            to.places,
            to.lengths,
            *source.stride(),
            *target.stride(),
            seqlen,
            head_dim,
            width,
            TILE=TILE,
            BLOCK=block,
            SCATTER=scatter,
        )


@functools.cache
def kernel() -> Any:
    import triton
    import triton.language as tl

    @triton.jit  # type: ignore[untyped-decorator]
    def move_row(  # type: ignore[no-untyped-def]
        source,
        target,
        places,
        lengths,
        source_b,
        source_s,
        source_h,
        source_d,
        target_b,
        target_s,
        target_h,
        target_d,
        seqlen,
        head_dim,
        width,
        TILE: tl.constexpr,
        BLOCK: tl.constexpr,
        SCATTER: tl.constexpr,
    ):
        row = tl.program_id(0)
        item, place = (row // seqlen).to(tl.int64), (row % seqlen).to(tl.int64)
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = column < width
        head, lane = (column // head_dim).to(tl.int64), (column % head_dim).to(tl.int64)
        slot = tl.load(places + row).to(tl.int64)
        length = tl.load(lengths + item).to(tl.int64)
        read, wrote = place, slot
        if not SCATTER:
            read, wrote = slot, place
        start = source + item * source_b + read * source_s
        values = tl.load(start + head * source_h + lane * source_d, mask=inside & (slot < length), other=0.0)
        reached = inside
        if SCATTER:
            reached = inside & (slot < length + TILE)
        tl.store(target + item * target_b + wrote * target_s + head * target_h + lane * target_d, values, mask=reached)

    return move_row

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

from ..masks import KeyLengths, KeyPadding, Mask, Window, find
from ..spec import AttentionSpec

TILE = 256
"""At least as many keys as a kernel loads at a time. What it loads behind the last real key must be finite: a weight of
0 times NaN is NaN."""


Pair = tuple[Tensor, Tensor]


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


def key_lengths(spec: AttentionSpec) -> Tensor:
    """The lengths of a mask with ``KeyLengths`` as kernels take them, (batch,) int32."""
    lengths = find(spec.mask, KeyLengths)
    assert lengths is not None
    return lengths.lengths.clamp(0, spec.seqlen_k).int()


def slots(valid: Tensor) -> Slots:
    """Real keys first, each kind in the order it had."""
    batch, seqlen = valid.shape
    made = Slots(*(torch.empty(shape, dtype=torch.int32, device=valid.device) for shape in (valid.shape, (batch,))))
    if valid.numel():
        with torch.cuda.device(valid.device):
            kernels()[0][(batch,)](valid, *made, *valid.stride(), seqlen, BLOCK=1024)
    return made


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


@functools.cache
def has_triton() -> bool:
    """Triton is installed; looking takes longer than a kernel."""
    return importlib.util.find_spec("triton") is not None


def missing() -> str | None:
    """Why keys cannot be moved here."""
    return None if has_triton() else "key_padding moves keys with triton, which is not installed"


missing._dynamo_marked_constant = True  # type: ignore[attr-defined]  # torch.compiler.assume_constant_result, unimported


def compact(k: Tensor, v: Tensor, to: Slots) -> tuple[Tensor, Tensor]:
    """Keys and values (batch, seqlen_k, heads_kv, head_dim) with the real ones first; one tile behind them is 0."""
    made = (k.new_empty(k.shape), v.new_empty(v.shape))
    move((k, v), made, to, scatter=True)
    return made


def spread(sources: Pair, targets: Pair, to: Slots) -> None:
    """Gradients of compacted keys and values, written where those were; 0 for padding."""
    move(sources, targets, to, scatter=False)


def move(sources: Pair, targets: Pair, to: Slots, *, scatter: bool) -> None:
    """Rows of two tensors of one shape to their slots, or back from them."""
    batch, seqlen, heads, head_dim = sources[0].shape
    width = heads * head_dim
    if not sources[0].numel():
        return
    block = min(1 << (width - 1).bit_length(), 4096)
    with torch.cuda.device(sources[0].device):
        kernels()[1][(batch * seqlen, -(-width // block), 2)](
            *sources,
            *targets,
            *to,
            *sources[0].stride(),
            *sources[1].stride(),
            *targets[0].stride(),
            *targets[1].stride(),
            seqlen,
            head_dim,
            width,
            TILE=TILE,
            BLOCK=block,
            SCATTER=scatter,
        )


@functools.cache
def kernels() -> Any:
    """Two programs: one counts the real keys of a row, one moves a key."""
    import triton
    import triton.language as tl

    @triton.jit  # type: ignore[untyped-decorator]
    def count(valid, places, lengths, stride_b, stride_s, seqlen, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        item = tl.program_id(0).to(tl.int64)
        lane = tl.arange(0, BLOCK)
        row = valid + item * stride_b
        total = tl.zeros([BLOCK], dtype=tl.int32)
        for start in range(0, seqlen, BLOCK):
            index = start + lane
            total += tl.load(row + index * stride_s, mask=index < seqlen, other=0).to(tl.int32)
        length = tl.sum(total)
        tl.store(lengths + item, length)
        seen = 0
        for start in range(0, seqlen, BLOCK):
            index = start + lane
            real = tl.load(row + index * stride_s, mask=index < seqlen, other=0).to(tl.int32)
            before = seen + tl.cumsum(real) - real
            place = tl.where(real > 0, before, length + index - before)
            tl.store(places + item * seqlen + index, place, mask=index < seqlen)
            seen += tl.sum(real)

    @triton.jit  # type: ignore[untyped-decorator]
    def move_key(  # type: ignore[no-untyped-def]
        k_source,
        v_source,
        k_target,
        v_target,
        places,
        lengths,
        ks_b,
        ks_s,
        ks_h,
        ks_d,
        vs_b,
        vs_s,
        vs_h,
        vs_d,
        kt_b,
        kt_s,
        kt_h,
        kt_d,
        vt_b,
        vt_s,
        vt_h,
        vt_d,
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
        head, lane = column // head_dim, column % head_dim
        slot = tl.load(places + row).to(tl.int64)
        length = tl.load(lengths + item).to(tl.int64)
        inside = column < width
        real = inside & (slot < length)
        reached = inside
        read, wrote = slot, place
        if SCATTER:
            read, wrote = place, slot
            reached = inside & (slot < length + TILE)
        if tl.program_id(2) == 0:
            source = k_source + item * ks_b + read * ks_s + head * ks_h + lane * ks_d
            target = k_target + item * kt_b + wrote * kt_s + head * kt_h + lane * kt_d
            tl.store(target, tl.load(source, mask=real, other=0.0), mask=reached)
        else:
            source = v_source + item * vs_b + read * vs_s + head * vs_h + lane * vs_d
            target = v_target + item * vt_b + wrote * vt_s + head * vt_h + lane * vt_d
            tl.store(target, tl.load(source, mask=real, other=0.0), mask=reached)

    return count, move_key

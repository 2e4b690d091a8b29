"""Launches of the kernels of ``split_kv``, eagerly and as an operator for compilers."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...host.kernels import processors, use_device
from ...host.torch_state import is_compiling
from ...problem.cached import OwnTokens
from ...problem.masks import find_rule
from ...problem.ragged import KeyLengths
from ...problem.scores import ALiBi
from ...problem.spec import AttentionSpec
from .tilings import Cut, choose_cut, choose_splits, padded

REACH = 1 << 30
"""Farther than any key."""
CHUNK, MANY_ROWS = 32, 512
"""How much of head_dim_v a program combines where there are fewer rows than these."""
COMBINED = 4096
"""Numbers that a program combines at a time."""


class SplitProblem(NamedTuple):
    """What a kernel is told of a problem beside q, k and v."""

    lengths: Tensor | None
    queries: Tensor | None
    held: Tensor | None
    table: Tensor | None
    own: Tensor | None
    begin: Tensor | None
    slopes: Tensor | None
    sinks: Tensor | None
    left: int | None
    right: int | None
    scale: float
    softcap: float | None
    page_size: int | None

    @classmethod
    def of(cls, spec: AttentionSpec) -> SplitProblem:
        own = find_rule(spec.mask, OwnTokens)
        lengths, places, pages, window = find_rule(spec.mask, KeyLengths), spec.positions, spec.pages, spec.window
        return cls(
            None if lengths is None else lengths.lengths,
            None if places is None else places.queries,
            None if places is None else places.keys,
            None if pages is None else pages.block_table,
            None if own is None else own.allowed,
            None if own is None else own.start,
            spec.bias.slopes if isinstance(spec.bias, ALiBi) else None,
            spec.sinks,
            None if window is None else window.left,
            None if window is None else window.right,
            spec.scale,
            spec.softcap,
            None if pages is None else pages.page_size,
        )

    def lay_out(self, shape: torch.Size) -> tuple[tuple[Tensor | None, ...], tuple[int, ...]]:
        """The tables as the kernel reads them, and their steps; ``shape`` is that of q."""
        batch, seqlen_q, heads, _ = shape
        lengths, begin, sinks = (x if x is None else x.contiguous() for x in (self.lengths, self.begin, self.sinks))
        table = self.table if self.table is None or self.table.stride(1) == 1 else self.table.contiguous()
        own = None if self.own is None else self.own.view(torch.uint8).expand(batch, heads, seqlen_q, -1)
        steps = (
            *steps_of(self.queries),
            *steps_of(self.held),
            *steps_of(table)[:1],
            *((0, 0, 0, 0, 0) if own is None else (*own.stride(), own.shape[3])),
            *((0, 0) if self.slopes is None else (0, *self.slopes.stride())[-2:]),
        )
        return (lengths, self.queries, self.held, table, own, begin, self.slopes, sinks), steps


def attend(q: Tensor, k: Tensor, v: Tensor, told: SplitProblem) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp; eagerly, or as an operator where a compiler traces."""
    if is_compiling():
        made: tuple[Tensor, Tensor] = torch.ops.flashmha.split_kv(q, k, v, *told)
        return made
    return attend_split(q, k, v, told)


def attend_split(q: Tensor, k: Tensor, v: Tensor, told: SplitProblem, cut: Cut | None = None) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp, by one kernel, or by two where the keys of a row are split."""
    (batch, seqlen_q, heads, head_dim), (_, capacity, heads_kv, head_dim_v) = q.shape, v.shape
    capacity = capacity if told.table is None else capacity * told.table.shape[1]
    sizes = seqlen_q * (heads // heads_kv), head_dim, head_dim_v
    on = processors(q.device)
    cut = choose_cut(*sizes, q.dtype, on.shared_memory) if cut is None else cut
    splits = cut.splits
    if splits is None:
        shared = cut.shared(*sizes, q.dtype.itemsize)
        splits = choose_splits(batch * heads_kv, -(-capacity // cut.keys), shared, on)
    rows = batch, seqlen_q, heads
    out, lse = q.new_empty(*rows, head_dim_v), q.new_empty(batch, heads, seqlen_q, dtype=torch.float32)
    parts = out, lse
    if splits > 1:
        parts = (
            q.new_empty(*rows, splits, head_dim_v, dtype=torch.float32),
            q.new_empty(*rows, splits, dtype=torch.float32),
        )
    tables, steps = told.lay_out(q.shape)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    softcap = 0.0 if told.softcap is None else told.softcap
    with use_device(q.device):
        split_kernels().split_kernel[(batch * splits * heads_kv,)](
            *(q, k, v, *tables, *parts),
            *(*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *steps),
            *(heads // heads_kv, heads, heads_kv, seqlen_q, capacity, splits),
            *(-within(told.left), within(told.right), told.scale, softcap),
            PAGE=told.page_size or 0,
            LEFT=told.left is not None,
            RIGHT=told.right is not None,
            SOFTCAP=told.softcap is not None,
            WHOLE=splits == 1,
            HEAD_DIM=head_dim,
            HEAD_DIM_V=head_dim_v,
            DIMS=padded(head_dim),
            DIMS_V=padded(head_dim_v),
            BLOCK_M=padded(sizes[0]),
            EARLY=cut.early and splits > 1,
            **cut.options(told.table is not None or told.held is not None),
        )
        if splits > 1:
            combine_splits(parts, tables[-1], out, lse, cut.early)
    return out, lse


def combine_splits(parts: tuple[Tensor, Tensor], sinks: Tensor | None, out: Tensor, lse: Tensor, early: bool) -> None:
    """Write the answer that the shares of each row make."""
    batch, seqlen_q, heads, head_dim_v = out.shape
    splits, rows = parts[1].shape[-1], batch * seqlen_q * heads
    chunk = padded(head_dim_v) if rows >= MANY_ROWS else min(padded(head_dim_v), CHUNK)
    shares = padded(splits)
    split_kernels().combine_kernel[(rows, -(-head_dim_v // chunk))](
        *(*parts, sinks, out, lse, heads, seqlen_q, splits),
        HEAD_DIM_V=head_dim_v,
        CHUNK=chunk,
        STEP=min(shares, COMBINED // chunk),
        SPLITS=shares,
        EARLY=early,
        **({"launch_pdl": True} if early else {}),
        num_warps=4 if shares * chunk >= COMBINED // 2 else 1,
    )


def steps_of(table: Tensor | None) -> tuple[int, ...]:
    """The strides of a table of positions."""
    return (0, 0) if table is None else table.stride()


def within(bound: int | None) -> int:
    """A bound of a window, no larger than a kernel can count."""
    return 0 if bound is None else max(-REACH, min(bound, REACH))


@functools.cache
def split_kernels() -> Any:
    """The module of the kernels, which imports triton."""
    from . import kernels as module

    return module


OPERATORS = torch.library.Library("flashmha", "FRAGMENT")
"""``torch.library.custom_op`` looks for outputs that alias inputs at every call, which costs more than a launch."""
OPERATORS.define(
    "split_kv(Tensor q, Tensor k, Tensor v, Tensor? lengths, Tensor? queries, Tensor? held, Tensor? table, "
    "Tensor? own, Tensor? begin, Tensor? slopes, Tensor? sinks, SymInt? left, SymInt? right, float scale, "
    "float? softcap, SymInt? page_size) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order),
)


def run_operator(q: Tensor, k: Tensor, v: Tensor, *told: Any) -> tuple[Tensor, Tensor]:
    """``attend_split`` as an operator."""
    return attend_split(q, k, v, SplitProblem(*told))


def fake_operator(q: Tensor, k: Tensor, v: Tensor, *told: Any) -> tuple[Tensor, Tensor]:
    batch, seqlen_q, heads, _ = q.shape
    return q.new_empty(batch, seqlen_q, heads, v.shape[3]), q.new_empty(batch, heads, seqlen_q, dtype=torch.float32)


OPERATORS.impl("split_kv", run_operator, "CompositeExplicitAutograd")
torch.library.register_fake("flashmha::split_kv", fake_operator, lib=OPERATORS)

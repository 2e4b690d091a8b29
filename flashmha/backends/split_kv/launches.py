"""Launches of the kernels of ``split_kv``, eagerly and as an operator for compilers."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...host.kernels import processors, use_device
from ...host.launcher import Launcher
from ...host.torch_state import is_compiling
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
    slopes: Tensor | None
    sinks: Tensor | None
    left: int | None
    right: int | None
    scale: float
    softcap: float | None
    page_size: int | None

    @classmethod
    def of(cls, spec: AttentionSpec) -> SplitProblem:
        lengths, places, pages, window = find_rule(spec.mask, KeyLengths), spec.positions, spec.pages, spec.window
        return cls(
            None if lengths is None else lengths.lengths,
            None if places is None else places.queries,
            None if places is None else places.keys,
            None if pages is None else pages.block_table,
            spec.bias.slopes if isinstance(spec.bias, ALiBi) else None,
            spec.sinks,
            None if window is None else window.left,
            None if window is None else window.right,
            spec.scale,
            spec.softcap,
            None if pages is None else pages.page_size,
        )


def attend(q: Tensor, k: Tensor, v: Tensor, told: SplitProblem) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp; eagerly, or as an operator where a compiler traces."""
    if is_compiling():
        made: tuple[Tensor, Tensor] = torch.ops.flashmha.split_kv(q, k, v, *told)
        return made
    return attend_split(q, k, v, told)


def attend_split(q: Tensor, k: Tensor, v: Tensor, told: SplitProblem, cut: Cut | None = None) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp, by one kernel, or by two where the keys of a row are split."""
    lengths, queries, held, table, slopes, sinks, left, right, scale, softcap, page_size = told
    (batch, seqlen_q, heads, head_dim), (_, capacity, heads_kv, head_dim_v) = q.shape, v.shape
    capacity = capacity if table is None else capacity * table.shape[1]
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    lengths, sinks = (x if x is None else x.contiguous() for x in (lengths, sinks))
    table = table if table is None or table.stride(1) == 1 else table.contiguous()
    on, group = processors(q.device), heads // heads_kv
    cut = choose_cut(seqlen_q * group, head_dim, head_dim_v, q.dtype, on) if cut is None else cut
    splits = choose_splits(batch * heads_kv, -(-capacity // cut.keys), on) if cut.splits is None else cut.splits
    out, lse = q.new_empty(batch, seqlen_q, heads, head_dim_v), q.new_empty(batch, heads, seqlen_q, dtype=torch.float32)
    parts = out, lse
    if splits > 1:
        rows = (batch, seqlen_q, heads, splits)
        parts = tuple(q.new_empty(*shape, dtype=torch.float32) for shape in ((*rows, head_dim_v), rows))  # type: ignore[assignment]
    early = cut.early and splits > 1
    constants = {
        "PAGE": page_size or 0,
        "LEFT": left is not None,
        "RIGHT": right is not None,
        "SOFTCAP": softcap is not None,
        "WHOLE": splits == 1,
        "HEAD_DIM": head_dim,
        "HEAD_DIM_V": head_dim_v,
        "DIMS": padded(head_dim),
        "DIMS_V": padded(head_dim_v),
        "BLOCK_M": padded(seqlen_q * group),
        "BLOCK_N": cut.keys,
        "EARLY": early,
    }
    options = cut.options(table is not None or held is not None)
    dtypes = tuple(None if x is None else x.dtype for x in (q, lengths, queries, held, table, slopes, sinks))
    with use_device(q.device):
        launchers()[0](
            (q.device.index, *dtypes, *constants.values(), *options.values()),
            (batch * splits * heads_kv, 1, 1),
            (q, k, v, lengths, queries, held, table, slopes, sinks, *parts),
            (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3]),
            (
                *(*steps_of(queries), *steps_of(held), *steps_of(table)[:1]),
                *((0, 0) if slopes is None else (0, *slopes.stride())[-2:]),
                *(group, heads, heads_kv, seqlen_q, capacity, splits),
                *(-within(left), within(right), float(scale), 0.0 if softcap is None else float(softcap)),
            ),
            constants,
            options,
        )
        if splits > 1:
            combine_splits(parts, sinks, out, lse, early)
    return out, lse


def combine_splits(parts: tuple[Tensor, Tensor], sinks: Tensor | None, out: Tensor, lse: Tensor, early: bool) -> None:
    """Write the answer that the shares of each row make."""
    batch, seqlen_q, heads, head_dim_v = out.shape
    splits, rows = parts[1].shape[-1], batch * seqlen_q * heads
    chunk = padded(head_dim_v) if rows >= MANY_ROWS else min(padded(head_dim_v), CHUNK)
    shares = padded(splits)
    constants = {
        "HEAD_DIM_V": head_dim_v,
        "CHUNK": chunk,
        "STEP": min(shares, COMBINED // chunk),
        "SPLITS": shares,
        "EARLY": early,
    }
    options = {"num_warps": 4 if shares * chunk >= COMBINED // 2 else 1, **({"launch_pdl": True} if early else {})}
    launchers()[1](
        (out.device.index, out.dtype, None if sinks is None else sinks.dtype, *constants.values(), *options.values()),
        (rows, -(-head_dim_v // chunk), 1),
        (*parts, sinks, out, lse),
        (),
        (heads, seqlen_q, splits),
        constants,
        options,
    )


def steps_of(table: Tensor | None) -> tuple[int, ...]:
    """The strides of a table of positions."""
    return (0, 0) if table is None else table.stride()


def within(bound: int | None) -> int:
    """A bound of a window, no larger than a kernel can count."""
    return 0 if bound is None else max(-REACH, min(bound, REACH))


@functools.cache
def launchers() -> tuple[Launcher, Launcher]:
    """Those of the two kernels, whose module imports triton."""
    from .kernels import combine_kernel, split_kernel

    return Launcher(split_kernel), Launcher(combine_kernel)


OPERATORS = torch.library.Library("flashmha", "FRAGMENT")
"""``torch.library.custom_op`` looks for outputs that alias inputs at every call, which costs more than a launch."""
OPERATORS.define(
    "split_kv(Tensor q, Tensor k, Tensor v, Tensor? lengths, Tensor? queries, Tensor? held, Tensor? table, "
    "Tensor? slopes, Tensor? sinks, SymInt? left, SymInt? right, float scale, float? softcap, SymInt? page_size) "
    "-> (Tensor, Tensor)",
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

"""Launches of the kernels of ``split_kv``, eagerly and as an operator for compilers."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...host.kernels import lined_up, padded, processors, use_device
from ...host.launcher import Launcher
from ...host.torch_state import is_compiling
from ...problem.cached import OwnTokens, Pages, Positions
from ...problem.ragged import KeyLengths
from ...problem.scores import ALiBi
from ...problem.spec import AttentionSpec
from ...problem.windows import Window
from .tilings import Cut, choose_cut, choose_splits, deepen

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
        lengths: KeyLengths | None = None
        places: Positions | None = None
        pages: Pages | None = None
        own: OwnTokens | None = None
        window: Window | None = None
        for part in () if spec.mask is None else spec.mask.parts:
            if isinstance(part, KeyLengths):
                lengths = part
            elif isinstance(part, Positions):
                places = part
            elif isinstance(part, Pages):
                pages = part
            elif isinstance(part, OwnTokens):
                own = part
            elif isinstance(part, Window):
                window = part
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
        lengths, begin, sinks, table = self.lengths, self.begin, self.sinks, self.table
        lengths = lengths if lengths is None else lengths.contiguous()
        begin = begin if begin is None else begin.contiguous()
        sinks = sinks if sinks is None else sinks.contiguous()
        table = table if table is None else lined_up(table)
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
    q, k, v = lined_up(q), lined_up(k), lined_up(v)
    (batch, seqlen_q, heads, head_dim), (_, capacity, heads_kv, head_dim_v) = q.shape, v.shape
    capacity = capacity if told.table is None else capacity * told.table.shape[1]
    tables, steps = told.lay_out(q.shape)
    left, right, scale, softcap, page_size = told[-5:]
    kinds = (*[None if x is None else x.dtype for x in tables], left is None, right is None, softcap is None)
    sizes = (batch, seqlen_q, heads, heads_kv, head_dim, head_dim_v, capacity)
    plan = make_plan(sizes, q.dtype, q.device, page_size, kinds, cut)
    splits = plan.splits
    out = q.new_empty((batch, seqlen_q, heads, head_dim_v))
    lse = q.new_empty((batch, heads, seqlen_q), dtype=torch.float32)
    parts = out, lse
    if splits > 1:
        rows = (batch, seqlen_q, heads, splits)
        parts = q.new_empty((*rows, head_dim_v), dtype=torch.float32), q.new_empty(rows, dtype=torch.float32)
    with use_device(q.device):
        launchers()[0](
            plan.kind,
            plan.programs,
            (q, k, v, *tables, *parts),
            (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3]),
            (
                *steps,
                *(heads // heads_kv, heads, heads_kv, seqlen_q, capacity, splits),
                *(-within(left), within(right), float(scale), 0.0 if softcap is None else float(softcap)),
            ),
            plan.constants,
            plan.options,
        )
        if splits > 1:
            launchers()[1](
                plan.kind,
                plan.combining,
                (*parts, tables[-1], out, lse),
                (),
                (heads, seqlen_q, splits),
                plan.combined,
                plan.combined_options,
            )
    return out, lse


class SplitPlan(NamedTuple):
    """What a problem's sizes and kinds say of its launches: the first is split among programs, the second combines."""

    splits: int
    kind: tuple[Any, ...]
    programs: tuple[int, int, int]
    constants: dict[str, Any]
    options: dict[str, Any]
    combining: tuple[int, int, int]
    combined: dict[str, Any]
    combined_options: dict[str, Any]


@functools.lru_cache(maxsize=1024)
def make_plan(
    sizes: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    page_size: int | None,
    kinds: tuple[Any, ...],
    cut: Cut | None,
) -> SplitPlan:
    """The plan of such problems, kept: making it takes as long as three launches.

    Args:
        sizes: batch, seqlen_q, heads, heads_kv, head_dim, head_dim_v, capacity.
        kinds: the dtypes of the tables, ``None`` for those that are missing; whether left, right and softcap are.
        cut: ``None`` for the one that fits.
    """
    batch, seqlen_q, heads, heads_kv, head_dim, head_dim_v, capacity = sizes
    on, rows = processors(device), seqlen_q * (heads // heads_kv)
    heads_of = rows, head_dim, head_dim_v, dtype, on
    chosen = choose_cut(*heads_of) if cut is None else cut
    splits = chosen.splits
    if splits is None:
        splits = choose_splits(batch * heads_kv, -(-capacity // chosen.keys), on)
    cut = deepen(chosen, *heads_of) if cut is None and splits == 1 else chosen
    early = cut.early and splits > 1
    constants = {
        "PAGE": page_size or 0,
        "LEFT": not kinds[-3],
        "RIGHT": not kinds[-2],
        "SOFTCAP": not kinds[-1],
        "WHOLE": splits == 1,
        "HEAD_DIM": head_dim,
        "HEAD_DIM_V": head_dim_v,
        "DIMS": padded(head_dim),
        "DIMS_V": padded(head_dim_v),
        "BLOCK_M": padded(rows),
        "BLOCK_N": cut.keys,
        "EARLY": early,
    }
    options = cut.options(kinds[2] is not None or kinds[3] is not None)
    rows, shares = batch * seqlen_q * heads, padded(splits)
    chunk = padded(head_dim_v) if rows >= MANY_ROWS else min(padded(head_dim_v), CHUNK)
    combined = {
        "HEAD_DIM_V": head_dim_v,
        "CHUNK": chunk,
        "STEP": min(shares, COMBINED // chunk),
        "SPLITS": shares,
        "EARLY": early,
    }
    return SplitPlan(
        splits,
        (device.index, dtype, *kinds, *constants.values(), *combined.values(), *options.values()),
        (batch * splits * heads_kv, 1, 1),
        constants,
        options,
        (rows, -(-head_dim_v // chunk), 1),
        combined,
        {"num_warps": 4 if shares * chunk >= COMBINED // 2 else 1, **({"launch_pdl": True} if early else {})},
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

"""Launches of the kernels of ``split_kv``, eagerly and as an operator for compilers."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...host.kernels import lined_up, use_device
from ...host.launcher import Launch, Launcher
from ...host.torch_state import is_compiling
from ...problem.cached import OwnTokens, Pages, Positions
from ...problem.ragged import KeyLengths
from ...problem.scores import ALiBi
from ...problem.spec import AttentionSpec
from ...problem.windows import Window
from .tilings import Cut, SplitSizes, make_plan

REACH = 1 << 30
"""Farther than any key."""


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

    def lay_out(self, rows: tuple[int, int, int]) -> tuple[tuple[Tensor | None, ...], tuple[int, ...]]:
        """The tables as the kernel reads them, and their steps, for (batch, seqlen_q, heads)."""
        batch, seqlen_q, heads = rows
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


class SplitCall:
    """A problem as it is launched, by one kernel, or by two where the keys of a row are split.

    What the heads of a call do not say is found here, once for the layers of a model. A table is read at each call,
    where it lies in a row.

    Args:
        needs_lse: a call gives the log-sum-exp as well.
        cut: ``None`` for the one that fits.
    """

    def __init__(
        self,
        sizes: SplitSizes,
        dtype: torch.dtype,
        device: torch.device,
        told: SplitProblem,
        needs_lse: bool,
        cut: Cut | None = None,
    ) -> None:
        batch, seqlen_q, heads, heads_kv, _, head_dim_v, capacity = sizes
        self.tables, steps = told.lay_out(sizes[:3])
        left, right, scale, softcap, page_size = told[-5:]
        kinds = (*[None if x is None else x.dtype for x in self.tables], needs_lse)
        bounds = (left is None, right is None, softcap is None)
        plan = make_plan(sizes, dtype, device, page_size, (*kinds, *bounds), cut)
        splits = plan.splits
        numbers = (
            *steps,
            *(heads // heads_kv, heads, heads_kv, seqlen_q, capacity, splits),
            *(-within(left), within(right), float(scale), 0.0 if softcap is None else float(softcap)),
        )
        split, combine = launchers()
        self.split = Launch(split, plan.kind, plan.programs, numbers, plan.constants, plan.options)
        self.combine: Launch | None = None
        if splits > 1:
            told_rows = (heads, seqlen_q, splits)
            self.combine = Launch(combine, plan.kind, plan.combining, told_rows, plan.combined, plan.combined_options)
        self.needs_lse = needs_lse
        self.shape, self.shape_lse = (batch, seqlen_q, heads, head_dim_v), (batch, heads, seqlen_q)
        self.room = batch * seqlen_q * heads * splits * (head_dim_v + 1)

    @classmethod
    def of(cls, spec: AttentionSpec, device: torch.device) -> SplitCall:
        """The call of heads on a device, whose index the problem may leave out."""
        sizes = (spec.batch, spec.seqlen_q, spec.heads, spec.heads_kv, spec.head_dim, spec.head_dim_v, spec.seqlen_k)
        return cls(SplitSizes(*sizes), spec.dtype, device, SplitProblem.of(spec), spec.need_lse)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        q, k, v = lined_up(q), lined_up(k), lined_up(v)
        tables, combine = self.tables, self.combine
        heads, steps = (q, k, v, *tables), (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
        out = q.new_empty(self.shape)
        lse = q.new_empty(self.shape_lse, dtype=torch.float32) if self.needs_lse else None
        with use_device(q.device):
            if combine is None:
                self.split((*heads, out, lse), steps)
            else:
                parts = q.new_empty(self.room, dtype=torch.float32)
                self.split((*heads, parts, None), steps)
                combine((parts, tables[-1], out, lse), ())
        return out if lse is None else (out, lse)


def attend(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor | tuple[Tensor, Tensor]:
    """A problem served, as an operator where a compiler traces."""
    if not is_compiling():
        return SplitCall.of(spec, q.device)(q, k, v)
    made: tuple[Tensor, Tensor] = torch.ops.flashmha.split_kv(q, k, v, *SplitProblem.of(spec))
    return made if spec.need_lse else made[0]


def attend_split(q: Tensor, k: Tensor, v: Tensor, told: SplitProblem, cut: Cut | None = None) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of heads, whose sizes are the problem's."""
    (batch, seqlen_q, heads, head_dim), (_, capacity, heads_kv, head_dim_v) = q.shape, v.shape
    capacity = capacity if told.table is None else capacity * told.table.shape[1]
    sizes = SplitSizes(batch, seqlen_q, heads, heads_kv, head_dim, head_dim_v, capacity)
    made: Any = SplitCall(sizes, q.dtype, q.device, told, True, cut)(q, k, v)
    return made[0], made[1]


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

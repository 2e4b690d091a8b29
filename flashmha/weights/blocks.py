"""A block of rows of some heads of the weights, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..problem.scores import TensorBias
from ..problem.spec import AttentionSpec
from .regions import as_slice, cover

SCORES_IN_A_BLOCK = {"cpu": 2**19, "cuda": 2**26}
"""Scores computed at a time: about what a core's cache holds, and more on a GPU, which a small block leaves idle."""
LOG2_E = 1.4426950408889634


class Box(NamedTuple):
    """Batch items and heads of a problem, each some that follow one another, and queries."""

    batch: range
    heads: range
    rows: range

    @classmethod
    def whole(cls, spec: AttentionSpec) -> Box:
        """All of a problem."""
        return cls(range(spec.batch), range(spec.heads), range(spec.seqlen_q))

    def of_query(self, q: Tensor) -> Tensor:
        """The part of a tensor (batch, seqlen_q, heads, ...) that lies in the box."""
        return narrowed(narrowed(narrowed(q, 0, self.batch), 1, self.rows), 2, self.heads)

    def of_key(self, k: Tensor, heads: int) -> Tensor:
        """The keys of the box's heads, (batch, seqlen_k, heads, head_dim), of the heads that ``heads`` heads share."""
        k, group = self.of_grouped_key(k, heads)
        return k if group == 1 else k.repeat_interleave(group, dim=2)

    def of_grouped_key(self, k: Tensor, heads: int) -> tuple[Tensor, int]:
        """The keys that the box's heads share, and how many heads share one."""
        group = heads // k.shape[2]
        first, last = self.heads.start // group, -(-self.heads.stop // group)
        k = narrowed(narrowed(k, 0, self.batch), 2, range(first, last))
        start, count = self.heads.start - first * group, len(self.heads)
        if count == (last - first) * group:
            return k, group
        if last - first == 1:
            return k, count
        return k.repeat_interleave(group, dim=2)[:, :, start : start + count], 1

    def of_row(self, table: Tensor) -> Tensor:
        """The part of a tensor (batch, heads, seqlen_q) that lies in the box."""
        return narrowed(narrowed(narrowed(table, 0, self.batch), 1, self.heads), 2, self.rows)

    def of_table(self, table: Tensor) -> Tensor:
        """The part that lies in the box of one that broadcasts to (batch, heads, ``cover(rows)``, keys)."""
        table = table[as_slice(self.batch)] if table.shape[0] > 1 else table
        table = table[:, as_slice(self.heads)] if table.shape[1] > 1 else table
        return table[:, :, :: self.rows.step] if table.shape[2] > 1 and self.rows.step > 1 else table

    def expand(self, table: Tensor, spec: AttentionSpec, keys: range) -> Tensor:
        """The part that lies in the box, and in some keys, of one that broadcasts to (batch, heads, queries, keys)."""
        table = table.expand(spec.batch, spec.heads, spec.seqlen_q, spec.seqlen_k)
        return table[as_slice(self.batch), as_slice(self.heads), as_slice(self.rows), as_slice(keys)]


def narrowed(x: Tensor, dim: int, part: range) -> Tensor:
    """Some places of an axis, as a view; the tensor itself where they are all, which takes no operator."""
    if part.step == 1 and len(part) == x.shape[dim]:
        return x
    return x[(slice(None),) * dim + (as_slice(part),)]


class Block(NamedTuple):
    """Rows of some heads, as (heads, batch, rows, seqlen_k or 1); the next block may be made in the same memory.

    Attributes:
        numbers, share: two factors of the weights. The second makes a row's sum exactly 1, its sink's share with it,
            where rounding of the log-sum-exp would move all weights of a row one way, and is 0 for a blind row.
        sink: what the sink gets of a row; ``None`` without sinks.
        slope: what a score moves by for each step of ``q @ k`` scaled; ``None`` without a softcap.
    """

    numbers: Tensor
    share: Tensor
    sink: Tensor | None
    slope: Tensor | None


class Score:
    """The scores of a box of one problem; everything is heads first.

    With a log-sum-exp, weights are powers of two: they are computed faster than those of e.
    """

    def __init__(self, q: Tensor, k: Tensor, lse: Tensor | None, spec: AttentionSpec, box: Box | None = None) -> None:
        self.spec, self.box = spec, Box.whole(spec) if box is None else box
        dtype = at_least_float32(q.dtype)
        held = () if spec.bias is None else spec.bias.tensors()
        for tensor in held if spec.sinks is None else (*held, spec.sinks):
            dtype = torch.promote_types(dtype, tensor.dtype)
        q, k = self.box.of_query(q), self.box.of_key(k, spec.heads)
        self.q, self.k = (x.to(dtype).permute(2, 0, 1, 3) for x in (q, k))
        self.lse: Tensor | None = None
        if lse is not None:  # a blind row has no weights: exp(anything - inf) is 0
            lse = self.box.of_row(lse)
            self.lse = lse.to(dtype).masked_fill(lse == float("-inf"), float("inf")).transpose(0, 1)[..., None]
        self.sinks: Tensor | None = None
        if spec.sinks is not None:
            self.sinks = spec.sinks.detach()[as_slice(self.box.heads)].to(dtype).view(-1, 1, 1, 1)
        self.buffer = q.new_empty(0, dtype=dtype)
        self.block = scores_in_a_block(spec)

    def bands(self) -> Iterator[Band]:
        """The rows that make blocks, from the first on."""
        spec, rows = self.spec, self.box.rows
        if not spec.seqlen_k:
            return
        made = spec.bias is not None and not isinstance(spec.bias, TensorBias)  # which is made for all heads at once
        step = max(16, self.block // max(1, len(self.box.batch) * spec.seqlen_k * (spec.heads if made else 1)))
        step = max(1, step // rows.step)  # what hides and moves them is made of all rows between
        for start in range(0, len(rows), step):
            yield Band(self, slice(start, min(start + step, len(rows))))


class Band:
    """Rows of a score, with what hides and moves them."""

    def __init__(self, score: Score, place: slice) -> None:
        self.score, self.place = score, place
        self.box = score.box._replace(rows=score.box.rows[place])
        self.covered = cover(self.box.rows)
        allowed, added = score.spec.allowed(queries=self.covered), score.spec.added(queries=self.covered)
        self.hidden = None if allowed is None else ~self.box.of_table(allowed).transpose(0, 1)
        self.bias = None if added is None else self.box.of_table(added.detach()).to(score.q.dtype).transpose(0, 1)

    def head_blocks(self) -> Iterator[slice]:
        """Heads of the box whose rows make a block, at most half of all."""
        score, count = self.score, len(self.score.box.heads)
        scores = len(score.box.batch) * score.spec.seqlen_k * len(self.box.rows)
        step = max(1, min(count // 2, score.block // max(1, scores)))
        return (slice(start, start + step) for start in range(0, count, step))

    def block(self, heads: slice) -> Block:
        """The weights of some heads of the box."""
        score, spec, place = self.score, self.score.spec, self.place
        q, k = score.q[heads, :, place], score.k[heads]
        shape = (*q.shape[:3], k.shape[2])
        if score.buffer.shape != shape:
            score.buffer = score.buffer.new_empty(shape)
        made, slope = score.buffer, None
        hidden = None if self.hidden is None else of_heads(self.hidden, heads)
        lse = None if score.lse is None else score.lse[heads, :, place]
        sinks = None if score.sinks is None else score.sinks[heads]
        out, q, k = made.flatten(0, 1), q.flatten(0, 1), k.flatten(0, 1)
        if lse is not None and spec.softcap is None:
            flat = (lse * LOG2_E).flatten(0, 1)
            torch.baddbmm(flat, q, k.mT, beta=-1, alpha=spec.scale * LOG2_E, out=out)
        elif spec.softcap is None:
            torch.baddbmm(out, q, k.mT, beta=0, alpha=spec.scale, out=out)
        else:
            torch.baddbmm(out, q, k.mT, beta=0, alpha=spec.scale / spec.softcap, out=out)
            slope = 1 - made.tanh_().square()
            made *= spec.softcap
            if lse is not None:
                made.sub_(lse).mul_(LOG2_E)
        if lse is not None:
            made.exp2_()
            if hidden is not None:
                made.masked_fill_(hidden, 0.0)
            total = made.sum(dim=-1, keepdim=True)
            sink = None if sinks is None else torch.exp(sinks - lse)
            total = total if sink is None else total + sink
            share = total.reciprocal().masked_fill_(total == 0.0, 0.0)
            return Block(made, share, None if sink is None else sink * share, slope)
        if self.bias is not None:
            made += of_heads(self.bias, heads)
        if hidden is not None:
            made.masked_fill_(hidden, float("-inf"))
        blind = made.amax(dim=-1, keepdim=True) == float("-inf")
        if sinks is None:
            return Block(made.softmax(dim=-1).masked_fill_(blind, 0.0), (~blind).to(made.dtype), None, slope)
        above = made.logsumexp(dim=-1, keepdim=True) - sinks  # the softmax of keys beside that of all and the sink
        made = made.softmax(dim=-1).masked_fill_(blind, 0.0)
        gone = (sinks != float("-inf")).expand_as(blind).to(made.dtype)
        share, sink = (torch.where(blind, rest, torch.sigmoid(x)) for x, rest in ((above, 0.0), (-above, gone)))
        return Block(made, share, sink, slope)


def scores_in_a_block(spec: AttentionSpec) -> int:
    """How many scores of a problem are computed at a time."""
    return SCORES_IN_A_BLOCK.get(spec.device.type, SCORES_IN_A_BLOCK["cpu"])


def of_heads(table: Tensor, heads: slice) -> Tensor:
    """Some heads of a table that broadcasts to (heads, ...)."""
    return table[heads] if table.shape[0] > 1 else table


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """At least float32."""
    return dtype if dtype == torch.float64 else torch.float32


def align_rows(rows: Tensor, average: bool) -> Tensor:
    """(batch, seqlen_q) against the axes of the weights."""
    return rows[:, :, None] if average else rows[:, None, :, None]


def shape_weights(weights: Tensor, average: bool, batched: bool, dtype: torch.dtype, rows: Tensor | None) -> Tensor:
    """The weights (batch, heads, seqlen_q, seqlen_k) of the definition as the caller wants them."""
    weights = weights.mean(dim=1) if average else weights
    if rows is not None:
        weights = weights.masked_fill(~align_rows(rows, average), 0.0)
    return (weights if batched else weights[0]).to(dtype)

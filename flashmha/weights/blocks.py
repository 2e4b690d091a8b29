"""A block of rows of some heads of the weights, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..problem.spec import AttentionSpec

SCORES_IN_A_BLOCK = 2**19
"""Scores computed at a time: about what a core's cache holds."""
SCORES_IN_A_BLOCK_ON_GPU = 2**26
"""The same on a GPU, which a small block leaves idle."""
LOG2_E = 1.4426950408889634


class Score:
    """The weights of one problem, a block of rows of some heads at a time; everything is heads first.

    With a log-sum-exp, powers of two: they are computed faster than those of e.
    """

    def __init__(self, q: Tensor, k: Tensor, lse: Tensor | None, spec: AttentionSpec) -> None:
        self.spec = spec
        if spec.heads != spec.heads_kv:
            k = k.repeat_interleave(spec.heads // spec.heads_kv, dim=2)
        allowed, added = spec.allowed(), spec.added()
        dtype = at_least_float32(q.dtype)
        if added is not None:
            dtype = torch.promote_types(dtype, added.dtype)
        self.q, self.k = (x.to(dtype).permute(2, 0, 1, 3) for x in (q, k))
        self.lse: Tensor | None = None
        if lse is not None:  # a blind row has no weights: exp(anything - inf) is 0
            self.lse = (lse.to(dtype).masked_fill(lse == float("-inf"), float("inf")) * LOG2_E).transpose(0, 1)
        self.buffer = q.new_empty(0, dtype=dtype)
        self.block = SCORES_IN_A_BLOCK_ON_GPU if spec.device.type == "cuda" else SCORES_IN_A_BLOCK
        self.hidden = None if allowed is None else ~allowed.transpose(0, 1)
        self.bias = None if added is None else added.detach().to(dtype).transpose(0, 1)

    def row_blocks(self) -> Iterator[slice]:
        """Rows of one head that make a block."""
        step = max(16, self.block // max(1, self.spec.batch * self.spec.seqlen_k))
        if not self.spec.seqlen_k:
            return iter(())
        return (slice(start, start + step) for start in range(0, self.spec.seqlen_q, step))

    def head_blocks(self, rows: slice) -> Iterator[slice]:
        """Heads whose rows make a block, at most half of all."""
        count = min(rows.stop, self.spec.seqlen_q) - rows.start
        step = max(1, min(self.spec.heads // 2, self.block // max(1, self.spec.batch * self.spec.seqlen_k * count)))
        return (slice(start, start + step) for start in range(0, self.spec.heads, step))

    def weights(self, heads: slice, rows: slice) -> tuple[Tensor, Tensor]:
        """Two factors of the weights (heads, batch, rows, seqlen_k), the second (heads, batch, rows, 1).

        The next call writes over the first. The second makes a row's sum exactly 1, where rounding of the log-sum-exp
        would move all weights of a row one way, and is 0 for a blind row.
        """
        q, k = self.q[heads, :, rows], self.k[heads]
        shape = (*q.shape[:3], k.shape[2])
        if self.buffer.shape != shape:
            self.buffer = self.buffer.new_empty(shape)
        score, hidden = self.buffer, None if self.hidden is None else part_of(self.hidden, heads, rows)
        out, q, k = score.flatten(0, 1), q.flatten(0, 1), k.flatten(0, 1)
        if self.lse is not None:
            lse = self.lse[heads, :, rows].flatten(0, 1)[..., None]
            torch.baddbmm(lse, q, k.mT, beta=-1, alpha=self.spec.scale * LOG2_E, out=out)
            score.exp2_()
            if hidden is not None:
                score.masked_fill_(hidden, 0.0)
            total = score.sum(dim=-1, keepdim=True)
            return score, total.reciprocal().masked_fill_(total == 0.0, 0.0)
        torch.baddbmm(out, q, k.mT, beta=0, alpha=self.spec.scale, out=out)
        if self.bias is not None:
            score += part_of(self.bias, heads, rows)
        if hidden is not None:
            score.masked_fill_(hidden, float("-inf"))
        blind = score.amax(dim=-1, keepdim=True) == float("-inf")
        return score.softmax(dim=-1).masked_fill_(blind, 0.0), (~blind).to(score.dtype)


def part_of(table: Tensor, heads: slice, rows: slice) -> Tensor:
    """Some heads and rows of a tensor that broadcasts to (heads, batch, seqlen_q, seqlen_k)."""
    table = table[heads] if table.shape[0] > 1 else table
    return table[:, :, rows] if table.shape[2] > 1 else table


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """At least float32."""
    return torch.promote_types(dtype, torch.float32)


def align_rows(rows: Tensor, average: bool) -> Tensor:
    """(batch, seqlen_q) against the axes of the weights."""
    return rows[:, :, None] if average else rows[:, None, :, None]


def shape_weights(weights: Tensor, average: bool, batched: bool, dtype: torch.dtype, rows: Tensor | None) -> Tensor:
    """The weights (batch, heads, seqlen_q, seqlen_k) of the definition as the caller wants them."""
    weights = weights.mean(dim=1) if average else weights
    if rows is not None:
        weights = weights.masked_fill(~align_rows(rows, average), 0.0)
    return (weights if batched else weights[0]).to(dtype)

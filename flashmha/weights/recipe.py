"""Attention weights beside a fused output, computed when they are first read.

The output comes from a backend. The weights are made of q, k and the log-sum-exp, tile by tile where a GPU can
(``tiles``), elsewhere a block of rows of some heads at a time, so that a mean over heads never holds
(batch, heads, seqlen_q, seqlen_k)::

    weights[b, h, i, j] = exp(softmax_scale * q[b, i, h] @ k[b, j, h] + bias[b, h, i, j] - lse[b, h, i])

A softcap bends the product before the bias. A sink counts in the log-sum-exp, and the weights here are the keys'.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..backends.naive import probabilities, scores
from ..host.torch_state import without_autocast
from ..problem.packing import unpack_tokens
from ..problem.spec import AttentionSpec
from . import tiles
from .blocks import Box, Score, align_rows, as_slice, of_heads, shape_weights
from .learned import Learned, replace_learned

WEIGHTS_IN_A_PIECE = 2**22
"""Weights that kernels of a GPU make at a time where they are reduced."""
MOST_RUNS = 16
"""Runs of neighbours that are made one by one before the whole map is."""
F = TypeVar("F", bound=Callable[..., Any])


def without_caller_autocast(method: F) -> F:
    """A method of a recipe without autocast, whatever is on where it is read or differentiated."""

    @functools.wraps(method)
    def inside(recipe: Recipe, *args: Any) -> Any:
        with without_autocast(recipe.spec.device):
            return method(recipe, *args)

    return inside  # type: ignore[return-value]


@dataclasses.dataclass
class Recipe:
    """The ingredients of the weights of one call.

    Attributes:
        q, k: (batch, seqlen, heads, head_dim), outside autograd.
        spec: the problem, over a bias and sinks of its own, outside autograd.
        lse: (batch, heads, seqlen_q), ``None`` where the backend gave none, or beside a bias.
        average: their mean over heads, (batch, seqlen_q, seqlen_k), instead of (batch, heads, seqlen_q, seqlen_k).
        batched: without it the batch axis, of size 1, is left out.
        dtype: of the weights.
        rows: queries (batch, seqlen_q) whose weights count; the others' are 0. ``None`` for all.
        places: where q and k lie in (batch * seqlen) if only the real tokens are there; ``None`` for everywhere.
    """

    q: Tensor
    k: Tensor
    spec: AttentionSpec
    lse: Tensor | None
    average: bool
    batched: bool
    dtype: torch.dtype
    rows: Tensor | None = None
    places: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        spec = self.spec
        heads = () if self.average else (spec.heads,)
        return ((spec.batch,) if self.batched else ()) + (*heads, spec.seqlen_q, spec.seqlen_k)

    @property
    def cost(self) -> int:
        """Bytes that it holds beyond those of the weights, where autograd holds nothing of it."""
        held = {x.data_ptr(): x.nbytes() for x in (self.q.untyped_storage(), self.k.untyped_storage())}
        return sum(held.values()) - math.prod(self.shape) * self.dtype.itemsize

    def make(self) -> Tensor:
        """The weights."""
        return self.part(Box.whole(self.spec))

    @without_caller_autocast
    def part(self, box: Box) -> Tensor:
        """The weights of a box, which has all heads where they are a mean."""
        q, k = self.put_tokens_back(self.q, self.k)
        if self.has_tiles:
            made = tiles.make_weights(q, k, self.lse, self.spec, self.average, self.dtype, box)
        else:
            sizes = (len(box.batch), 1 if self.average else len(box.heads), len(box.rows), self.spec.seqlen_k)
            made = torch.empty(sizes, dtype=self.dtype, device=self.spec.device)
            for heads, rows, piece in self.by_blocks(q, k, box):
                made[:, heads, rows] = piece
        if self.rows is not None:
            real = self.rows[as_slice(box.batch), as_slice(box.rows)]
            made.masked_fill_(~align_rows(real, average=False), 0.0)
        made = made.squeeze_(1) if self.average else made  # in place: a view is no result of a node
        return made if self.batched else made.squeeze_(0)

    def take(self, axis: int, places: Sequence[int]) -> Tensor | None:
        """The weights of some batch items, heads or queries, of which neighbours are made at a time.

        ``None`` where that would not be cheaper than all of them.
        """
        axis = self.here[axis]
        wanted = sorted(set(places))
        starts = [place for place, before in zip(wanted, [None, *wanted]) if before is None or place != before + 1]
        if axis == 3 or not wanted or len(starts) > MOST_RUNS or 2 * len(wanted) > self.all_axes[axis]:
            return None
        ends = [place + 1 for place, after in zip(wanted, [*wanted[1:], None]) if after != place + 1]
        whole = Box.whole(self.spec)
        runs = [whole._replace(**{Box._fields[axis]: range(*run)}) for run in zip(starts, ends)]
        made = torch.cat([self.part(run) for run in runs], dim=self.here.index(axis))
        order = torch.tensor([wanted.index(place) for place in places], device=made.device)
        return made if list(places) == wanted else made.index_select(self.here.index(axis), order)

    @property
    def has_tiles(self) -> bool:
        """Kernels of this machine make the weights."""
        return tiles.why_not_here(self.spec.device) is None and tiles.why_not(self.spec) is None

    @property
    def all_axes(self) -> tuple[int, int, int, int]:
        """The sizes of the weights over (batch, heads, queries, keys), 1 for the heads of a mean."""
        return self.spec.batch, 1 if self.average else self.spec.heads, self.spec.seqlen_q, self.spec.seqlen_k

    @property
    def here(self) -> list[int]:
        """Which of (batch, heads, queries, keys) are axes of the weights."""
        return [axis for axis in (0, 1, 2, 3) if (axis or self.batched) and (axis != 1 or not self.average)]

    @without_caller_autocast
    def reduce(self, kind: str, axes: Sequence[int]) -> Tensor:
        """The ``"sum"`` or the ``"amax"`` of the weights over some of their axes, which stay with size 1.

        In float32 at least, and without the weights: a block of them is there at a time. On a GPU kernels sum over
        queries, and find the largest of each row of a head.
        """
        here = self.here
        over = {here[axis] for axis in axes}
        q, k = self.put_tokens_back(self.q, self.k)
        if self.has_tiles and self.rows is None and kind == "sum" and 2 in over:
            found = tiles.sum_columns(q, k, self.lse, self.spec, self.average)
            found = found.sum(dim=sorted(over), keepdim=True)
        elif self.has_tiles and self.rows is None and kind == "amax" and 3 in over and not self.average:
            found = tiles.find_largest(q, k, self.spec).amax(dim=sorted(over), keepdim=True)
        else:
            found = self.reduce_pieces(q, k, kind, over)
        kept = [found.shape[axis] for axis in here]
        return found.view(kept)

    def reduce_pieces(self, q: Tensor, k: Tensor, kind: str, over: set[int]) -> Tensor:
        """``reduce`` of four axes, piece by piece."""
        sizes, found = [1 if axis in over else size for axis, size in enumerate(self.all_axes)], None
        real = None if self.rows is None else align_rows(self.rows, average=False)
        for heads, rows, piece in self.by_tiles(q, k) if self.has_tiles else self.by_blocks(q, k):
            if real is not None:
                piece = piece.masked_fill(~real[:, :, rows], 0.0)
            if found is None:
                found = piece.new_full(sizes, 0.0 if kind == "sum" else float("-inf"))
            place = found[:, slice(None) if 1 in over else heads, slice(None) if 2 in over else rows]
            if kind == "sum":
                place += piece.sum(dim=sorted(over), keepdim=True)
            else:
                torch.maximum(place, piece.amax(dim=sorted(over), keepdim=True), out=place)
        assert found is not None
        return found

    def by_tiles(self, q: Tensor, k: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
        """The weights of some rows after the other, by the kernels of a GPU."""
        batch, heads, seqlen_q, seqlen_k = self.all_axes
        step = max(128, WEIGHTS_IN_A_PIECE // max(1, batch * heads * seqlen_k))
        for start in range(0, seqlen_q, step):
            rows = range(start, min(start + step, seqlen_q))
            box = Box(range(batch), range(self.spec.heads), rows)
            piece = tiles.make_weights(q, k, self.lse, self.spec, self.average, torch.float32, box)
            yield slice(0, heads), as_slice(rows), piece

    def by_blocks(self, q: Tensor, k: Tensor, box: Box | None = None) -> Iterator[tuple[slice, slice, Tensor]]:
        """Rows of some heads, or of their mean, in PyTorch's operators, for any problem on any device."""
        for band in Score(q, k, self.lse, self.spec, box).bands():
            total: Tensor | None = None
            for heads in band.head_blocks():
                numbers, share, _, _ = band.block(heads)
                if not self.average:
                    yield heads, band.place, (numbers * share).transpose(0, 1)
                elif total is None or len(numbers) > 1:
                    part = (numbers * share).sum(dim=0)
                    total = part if total is None else total.add_(part)
                else:
                    total.addcmul_(numbers[0], share[0])
            if total is not None:
                yield slice(0, 1), band.place, total.div_(self.spec.heads)[:, None]

    @without_caller_autocast
    def gradients(self, grad: Tensor, wanted: Sequence[bool]) -> list[Tensor | None]:
        """Gradients of q, k and what ``held`` holds, where wanted, for a gradient of the weights::

        d_score = weights * (grad - (grad * weights).sum(-1))
        d_sink = -weight_of_sink * (grad * weights).sum(-1)
        """
        spec = self.spec
        grad = grad if self.batched else grad[None]
        if self.rows is not None:
            grad = grad.masked_fill(~align_rows(self.rows, self.average), 0.0)
        q, k = self.put_tokens_back(self.q, self.k)
        learned: list[Tensor | None] = [None] * (len(wanted) - 2)
        if not any(wanted[2:]) and tiles.why_not_here(spec.device) is None and tiles.no_gradients(spec) is None:
            dq, dk = tiles.make_gradients(q, k, self.lse, spec, self.average, grad)
        else:
            dq, dk, learned = self.gradients_by_blocks(q, k, grad, wanted[2:])
        if self.places is not None:
            dq, dk = (x.flatten(0, 1)[self.places][None] for x in (dq, dk))
        return [
            dq.to(self.q.dtype) if wanted[0] else None,
            dk.to(self.k.dtype) if wanted[1] else None,
            *learned,
        ]

    def gradients_by_blocks(
        self, q: Tensor, k: Tensor, grad: Tensor, wanted: Sequence[bool]
    ) -> tuple[Tensor, Tensor, list[Tensor | None]]:
        """The gradients of q, k and learned scores in PyTorch's operators, for any problem on any device."""
        spec = self.spec
        score = Score(q, k, self.lse, spec)
        q, k = score.q, score.k
        dq, dk = (torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
        learned = Learned(self.spec, wanted, q.dtype)
        for band in score.bands():
            with learned.band(band.rows) as d_bias:
                for heads in band.head_blocks():
                    numbers, share, sink, slope = band.block(heads)
                    weights = numbers * share
                    if self.average:
                        d_weights = grad[:, band.place] / spec.heads
                    else:
                        d_weights = grad[:, heads, band.place].transpose(0, 1)
                    mean = (d_weights * weights).sum(dim=-1, keepdim=True)
                    d_score = weights * (d_weights - mean)
                    if d_bias is not None:
                        part = of_heads(d_bias, heads)
                        part += d_score.sum_to_size(part.shape)
                    if learned.sinks is not None:
                        assert sink is not None
                        learned.sinks[heads] -= (sink * mean).sum(dim=(1, 2, 3))
                    d_score = d_score if slope is None else d_score * slope
                    dq[heads, :, band.place] = spec.scale * (d_score @ k[heads])
                    dk[heads] += spec.scale * (d_score.mT @ q[heads, :, band.place])
        dq, dk = (x.permute(1, 2, 0, 3) for x in (dq, dk))  # (batch, seqlen, heads, head_dim)
        if spec.heads != spec.heads_kv:
            dk = torch.unflatten(dk, 2, (spec.heads_kv, -1)).sum(dim=3)
        return dq, dk, learned.gradients()

    @without_caller_autocast
    def define(self, q: Tensor, k: Tensor, learned: Sequence[Tensor | None]) -> Tensor:
        """The weights by the definition, in the autograd graph; ``learned`` stands for what ``held`` holds."""
        q, k = self.put_tokens_back(q, k)
        spec = replace_learned(self.spec, learned)
        weights = probabilities(*scores(q, k, spec), spec)
        return shape_weights(weights, self.average, self.batched, self.dtype, self.rows)

    def put_tokens_back(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """q and k with every token in its place."""
        if self.places is None:
            return q, k
        sizes = (self.spec.batch, self.spec.seqlen_q)
        return unpack_tokens(q, self.places, sizes), unpack_tokens(k, self.places, sizes)

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
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..backends.naive import probabilities, scores
from ..host.kernels import use_device, why_no_kernels
from ..host.torch_state import is_autocasting, without_autocast
from ..problem.packing import unpack_tokens
from ..problem.spec import AttentionSpec
from . import rows, tiles
from .blocks import Box, Score, align_rows, scores_in_a_block, shape_weights
from .gradients import GradientPiece, Gradients
from .learned import replace_learned
from .regions import as_slice, cover
from .row_launches import launch_rows, takes_rows

WEIGHTS_IN_A_PIECE = 2**22
"""Weights that kernels of a GPU make at a time where they are reduced."""
F = TypeVar("F", bound=Callable[..., Any])


def without_caller_autocast(method: F) -> F:
    """A method of a recipe without autocast, whatever is on where it is read or differentiated."""

    @functools.wraps(method)
    def inside(recipe: Recipe, *args: Any) -> Any:
        if not is_autocasting():
            return method(recipe, *args)
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
        made = self.part(Box.whole(self.spec))
        made = made.squeeze_(1) if self.average else made  # in place: a view is no result of a node
        return made if self.batched else made.squeeze_(0)

    @without_caller_autocast
    def part(self, box: Box, keys: range | None = None) -> Tensor:
        """The weights of a box and some keys, over four axes; a box has all heads where they are a mean."""
        keys = range(self.spec.seqlen_k) if keys is None else keys
        if self.has_row_kernel(box, keys):
            return self.launch_rows(box, keys, self.dtype)
        q, k = self.put_tokens_back(self.q, self.k)
        if self.are_few(box):
            made = rows.make_rows(q, k, self.spec, box, self.average)
            made = (made if len(keys) == self.spec.seqlen_k else made[..., as_slice(keys)].clone()).to(self.dtype)
        elif self.has_tiles and box.rows.step == keys.step == 1:
            made = tiles.make_weights(q, k, self.lse, self.spec, self.average, self.dtype, box, keys)
        else:
            made = torch.empty((*self.sizes(box), len(keys)), dtype=self.dtype, device=self.spec.device)
            for heads, place, piece in self.pieces(q, k, box):
                made[:, heads, place] = piece[..., as_slice(keys)]
        hidden = self.find_unreal(box)
        return made if hidden is None else made.masked_fill_(hidden, 0.0)

    def find_unreal(self, box: Box) -> Tensor | None:
        """The rows of a box whose weights do not count, against four axes; ``None`` where all do."""
        if self.rows is None:
            return None
        return ~align_rows(self.rows[as_slice(box.batch), as_slice(box.rows)], average=False)

    def sizes(self, box: Box) -> tuple[int, int, int]:
        """The sizes of the weights of a box over (batch, heads, queries), 1 for the heads of a mean."""
        return len(box.batch), 1 if self.average else len(box.heads), len(box.rows)

    def are_few(self, box: Box) -> bool:
        """Whether the rows of a box are so few that the definition makes them at once."""
        count = len(box.batch) * len(box.heads) * len(box.rows)
        return 0 < count * self.spec.seqlen_k <= scores_in_a_block(self.spec) and len(cover(box.rows)) <= rows.MOST_ROWS

    def has_row_kernel(self, box: Box, keys: range) -> bool:
        """One launch makes the weights of a box and some keys."""
        if (
            self.places is not None
            or self.rows is not None
            or why_no_kernels(self.spec.device.type, self.spec.device.index) is not None
        ):
            return False
        return takes_rows(self.q, self.k, self.lse, self.spec, box, keys)

    def launch_rows(self, box: Box, keys: range, dtype: torch.dtype) -> Tensor:
        """Those weights, in a dtype."""
        assert self.lse is not None
        with use_device(self.spec.device):
            return launch_rows(self.q, self.k, self.lse, self.spec, self.average, dtype, box, keys)

    @property
    def has_tiles(self) -> bool:
        """Kernels of this machine make the weights."""
        return (
            why_no_kernels(self.spec.device.type, self.spec.device.index) is None and tiles.why_not(self.spec) is None
        )

    @without_caller_autocast
    def reduce(self, kind: str, over: set[int], box: Box, keys: range) -> Tensor:
        """The ``"sum"`` or the ``"amax"`` over some of the four axes of a box and some keys, which stay with size 1.

        In float32 at least, and without the weights: a piece of them is there at a time. On a GPU kernels sum over
        queries, and find the largest of each row of a head.
        """
        dims = sorted(over)
        if self.has_row_kernel(box, keys):
            made = self.launch_rows(box, keys, torch.float32)
            return made.sum(dim=dims, keepdim=True) if kind == "sum" else made.amax(dim=dims, keepdim=True)
        q, k = self.put_tokens_back(self.q, self.k)
        kernels = self.has_tiles and self.rows is None and box.rows.step == 1 and not self.are_few(box)
        if kernels and kind == "sum" and 2 in over:
            found = tiles.sum_columns(q, k, self.lse, self.spec, self.average, box)[..., as_slice(keys)]
            return found.sum(dim=dims, keepdim=True)
        if kernels and kind == "amax" and 3 in over and not self.average and len(keys) == self.spec.seqlen_k:
            return tiles.find_largest(q, k, self.spec, box).amax(dim=dims, keepdim=True)
        sizes = [1 if a in over else n for a, n in enumerate((*self.sizes(box), len(keys)))]
        total: Tensor | None = None
        hidden = self.find_unreal(box)
        for heads, place, piece in self.pieces(q, k, box):
            piece = piece[..., as_slice(keys)]
            piece = piece if hidden is None else piece.masked_fill(hidden[:, :, place], 0.0)
            part = piece.sum(dim=dims, keepdim=True) if kind == "sum" else piece.amax(dim=dims, keepdim=True)
            if piece.shape[:3] == self.sizes(box):
                return part  # of all at once
            if total is None:
                total = piece.new_full(sizes, 0.0 if kind == "sum" else float("-inf"))
            mine = total[:, slice(None) if 1 in over else heads, slice(None) if 2 in over else place]
            if kind == "sum":
                mine += part
            else:
                torch.maximum(mine, part, out=mine)
        assert total is not None
        return total

    def pieces(self, q: Tensor, k: Tensor, box: Box) -> Iterator[tuple[slice, slice, Tensor]]:
        """Heads and rows of a box, counted from its first ones, and their weights, in float32 at least."""
        if self.are_few(box):
            made = rows.make_rows(q, k, self.spec, box, self.average)
            return iter([(slice(None), slice(None), made)])
        return self.by_tiles(q, k, box) if self.has_tiles else self.by_blocks(q, k, box)

    def by_tiles(self, q: Tensor, k: Tensor, box: Box) -> Iterator[tuple[slice, slice, Tensor]]:
        """The weights of some rows after the other, by the kernels of a GPU."""
        batch, heads, count = self.sizes(box)
        step = max(1, max(128, WEIGHTS_IN_A_PIECE // max(1, batch * heads * self.spec.seqlen_k)) // box.rows.step)
        for start in range(0, count, step):
            place = slice(start, min(start + step, count))
            part = box._replace(rows=cover(box.rows[place]))
            piece = tiles.make_weights(q, k, self.lse, self.spec, self.average, torch.float32, part)
            yield slice(0, heads), place, piece[:, :, :: box.rows.step]

    def by_blocks(self, q: Tensor, k: Tensor, box: Box) -> Iterator[tuple[slice, slice, Tensor]]:
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

    def gradients(self, grad: Tensor, wanted: Sequence[bool]) -> list[Tensor | None]:
        """Gradients of q, k and what ``held`` holds, where wanted, for a gradient of the weights."""
        grad = grad if self.batched else grad[None]
        grad = grad[:, None] if self.average else grad
        return self.gradients_of([GradientPiece(Box.whole(self.spec), range(self.spec.seqlen_k), grad)], wanted)

    @without_caller_autocast
    def gradients_of(self, pieces: Iterable[GradientPiece], wanted: Sequence[bool]) -> list[Tensor | None]:
        """``gradients`` for one that is 0 but in some pieces."""
        spec = self.spec
        q, k = self.put_tokens_back(self.q, self.k)
        found = Gradients(q, k, self.lse, spec, self.average, wanted)
        for box, keys, grad in pieces:
            hidden = self.find_unreal(box)
            found.add(box, keys, grad if hidden is None else grad.masked_fill(hidden, 0.0))
        dq, dk, *learned = found.all()
        if self.places is not None:
            dq, dk = (None if x is None else x.flatten(0, 1)[self.places][None] for x in (dq, dk))
        return [
            None if dq is None else dq.to(self.q.dtype),
            None if dk is None else dk.to(self.k.dtype),
            *learned,
        ]

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

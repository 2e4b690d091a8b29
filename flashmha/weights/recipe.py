"""Attention weights beside a fused output, computed when they are first read.

The output comes from a backend. The weights are made of q, k and the log-sum-exp, tile by tile where a GPU can
(``tiles``), elsewhere a block of rows of some heads at a time, so that a mean over heads never holds
(batch, heads, seqlen_q, seqlen_k)::

    weights[b, h, i, j] = exp(softmax_scale * q[b, i, h] @ k[b, j, h] + bias[b, h, i, j] - lse[b, h, i])
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..backends.naive import probabilities, scores
from ..host.torch_state import without_autocast
from ..problem.packing import unpack_tokens
from ..problem.scores import TensorBias
from ..problem.spec import AttentionSpec
from . import tiles
from .blocks import Score, align_rows, part_of, shape_weights

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
        spec: the problem; a bias is a ``TensorBias``, and there are neither softcap nor sinks, as in a layer.
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

    @without_caller_autocast
    def make(self) -> Tensor:
        """The weights."""
        spec = self.spec
        q, k = self.put_tokens_back(self.q, self.k)
        if tiles.why_not_here(spec.device) is None and tiles.why_not(spec) is None:
            made = tiles.make_weights(q, k, self.lse, spec, self.average, self.dtype)
        else:
            made = self.by_blocks(q, k)
        if self.rows is not None:
            made.masked_fill_(~align_rows(self.rows, self.average), 0.0)
        return made if self.batched else made[0]

    def by_blocks(self, q: Tensor, k: Tensor) -> Tensor:
        """The weights in PyTorch's operators, for any problem on any device."""
        spec = self.spec
        shape = (spec.batch, spec.seqlen_q) if self.average else (spec.batch, spec.heads, spec.seqlen_q)
        made = torch.empty(*shape, spec.seqlen_k, dtype=self.dtype, device=spec.device)
        score = Score(q, k, self.lse, spec)
        for rows in score.row_blocks():
            total: Tensor | None = None
            for heads in score.head_blocks(rows):
                block, share = score.weights(heads, rows)
                if not self.average:
                    made[:, heads, rows] = (block * share).transpose(0, 1)
                elif total is None or len(block) > 1:
                    part = (block * share).sum(dim=0)
                    total = part if total is None else total.add_(part)
                else:
                    total.addcmul_(block[0], share[0])
            if total is not None:
                made[:, rows] = total.div_(spec.heads)
        return made

    @without_caller_autocast
    def gradients(self, grad: Tensor, wanted: tuple[bool, bool, bool]) -> tuple[Tensor | None, ...]:
        """Gradients of q, k and the bias for a gradient of the weights::

        d_score = weights * (grad - (grad * weights).sum(-1))
        """
        spec = self.spec
        grad = grad if self.batched else grad[None]
        if self.rows is not None:
            grad = grad.masked_fill(~align_rows(self.rows, self.average), 0.0)
        q, k = self.put_tokens_back(self.q, self.k)
        d_bias: Tensor | None = None
        if not wanted[2] and tiles.why_not_here(spec.device) is None and tiles.no_gradients(spec) is None:
            dq, dk = tiles.make_gradients(q, k, self.lse, spec, self.average, grad)
        else:
            dq, dk, d_bias = self.gradients_by_blocks(q, k, grad, wanted[2])
        if self.places is not None:
            dq, dk = (x.flatten(0, 1)[self.places][None] for x in (dq, dk))
        return (
            dq.to(self.q.dtype) if wanted[0] else None,
            dk.to(self.k.dtype) if wanted[1] else None,
            d_bias,
        )

    def gradients_by_blocks(
        self, q: Tensor, k: Tensor, grad: Tensor, learned: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The gradients of q, k and a learned bias in PyTorch's operators, for any problem on any device."""
        spec = self.spec
        score = Score(q, k, self.lse, spec)
        q, k = score.q, score.k
        dq, dk = (torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
        bias = spec.bias.tensors()[0] if spec.bias is not None and learned else None
        d_bias = None if bias is None else torch.zeros_like(bias, dtype=q.dtype).transpose(0, 1)
        for rows in score.row_blocks():
            for heads in score.head_blocks(rows):
                block, share = score.weights(heads, rows)
                block = block * share
                d_block = grad[:, rows] / spec.heads if self.average else grad[:, heads, rows].transpose(0, 1)
                d_score = block * (d_block - (d_block * block).sum(dim=-1, keepdim=True))
                dq[heads, :, rows] = spec.scale * (d_score @ k[heads])
                dk[heads] += spec.scale * (d_score.mT @ q[heads, :, rows])
                if d_bias is not None:
                    part = part_of(d_bias, heads, rows)
                    part += d_score.sum_to_size(part.shape)
        dq, dk = (x.permute(1, 2, 0, 3) for x in (dq, dk))  # (batch, seqlen, heads, head_dim)
        if spec.heads != spec.heads_kv:
            dk = torch.unflatten(dk, 2, (spec.heads_kv, -1)).sum(dim=3)
        return dq, dk, None if d_bias is None or bias is None else d_bias.transpose(0, 1).to(bias.dtype)

    @without_caller_autocast
    def define(self, q: Tensor, k: Tensor, bias: Tensor | None) -> Tensor:
        """The weights by the definition, in the autograd graph."""
        q, k = self.put_tokens_back(q, k)
        weights = probabilities(*scores(q, k, replace_bias(self.spec, bias)), self.spec)
        return shape_weights(weights, self.average, self.batched, self.dtype, self.rows)

    def put_tokens_back(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """q and k with every token in its place."""
        if self.places is None:
            return q, k
        sizes = (self.spec.batch, self.spec.seqlen_q)
        return unpack_tokens(q, self.places, sizes), unpack_tokens(k, self.places, sizes)


def replace_bias(spec: AttentionSpec, bias: Tensor | None) -> AttentionSpec:
    """The same problem over another bias tensor."""
    return spec if bias is None else spec.changed(bias=TensorBias(bias))

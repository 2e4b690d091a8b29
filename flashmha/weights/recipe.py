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
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from ..backends import choose, note
from ..backends.base import Backend
from ..backends.choice.builtin import OWN
from ..backends.choice.waiting import capturing
from ..backends.choice.wishes import Wanted, preference
from ..backends.naive import Naive, probabilities, scores, weigh
from ..functional import answer, run
from ..host.torch_state import is_batched, traced, without_autocast
from ..problem.masks import normalize
from ..problem.packing import Padded, unpack
from ..problem.scores import TensorBias
from ..problem.spec import SHARED, AttentionSpec
from . import tiles
from .deferred import Cell, Deferred, expect_look

BLOCK = 2**19
"""Scores computed at a time: about what a core's cache holds."""
BLOCK_ON_GPU = 2**26
"""The same on a GPU, which a small block leaves idle."""
LOG2_E = 1.4426950408889634


F = TypeVar("F", bound=Callable[..., Any])


def behind_the_door(method: F) -> F:
    """A method of a recipe without autocast, whatever is on where it is read or differentiated."""

    @functools.wraps(method)
    def inside(recipe: Recipe, *args: Any) -> Any:
        with without_autocast(recipe.spec.device):
            return method(recipe, *args)

    return inside  # type: ignore[return-value]


@dataclasses.dataclass
class Recipe:
    """What the weights of one call are made of, later.

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

    @behind_the_door
    def make(self) -> Tensor:
        """The weights."""
        spec = self.spec
        q, k = self.spread(self.q, self.k)
        if tiles.unavailable(spec.device) is None and tiles.unsupported(spec) is None:
            made = tiles.weights(q, k, self.lse, spec, self.average, self.dtype)
        else:
            made = self.by_blocks(q, k)
        if self.rows is not None:
            made.masked_fill_(~spread(self.rows, self.average), 0.0)
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

    @behind_the_door
    def gradients(self, grad: Tensor, wanted: tuple[bool, bool, bool]) -> tuple[Tensor | None, ...]:
        """Gradients of q, k and the bias for a gradient of the weights::

        d_score = weights * (grad - (grad * weights).sum(-1))
        """
        spec = self.spec
        grad = grad if self.batched else grad[None]
        if self.rows is not None:
            grad = grad.masked_fill(~spread(self.rows, self.average), 0.0)
        q, k = self.spread(self.q, self.k)
        d_bias: Tensor | None = None
        if not wanted[2] and tiles.unavailable(spec.device) is None and tiles.no_gradients(spec) is None:
            dq, dk = tiles.gradients(q, k, self.lse, spec, self.average, grad)
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
                    part = cut(d_bias, heads, rows)
                    part += d_score.sum_to_size(part.shape)
        dq, dk = (x.permute(1, 2, 0, 3) for x in (dq, dk))  # (batch, seqlen, heads, head_dim)
        if spec.heads != spec.heads_kv:
            dk = torch.unflatten(dk, 2, (spec.heads_kv, -1)).sum(dim=3)
        return dq, dk, None if d_bias is None or bias is None else d_bias.transpose(0, 1).to(bias.dtype)

    @behind_the_door
    def define(self, q: Tensor, k: Tensor, bias: Tensor | None) -> Tensor:
        """The weights by the definition, in the autograd graph."""
        q, k = self.spread(q, k)
        weights = probabilities(*scores(q, k, with_bias(self.spec, bias)), self.spec)
        return shaped(weights, self.average, self.batched, self.dtype, self.rows)

    def spread(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """q and k with every token in its place."""
        if self.places is None:
            return q, k
        sizes = (self.spec.batch, self.spec.seqlen_q)
        return unpack(q, self.places, sizes), unpack(k, self.places, sizes)


class Score:
    """The weights of one problem, a block of rows of some heads at a time; everything is heads first.

    With a log-sum-exp, powers of two: they are computed faster than those of e.
    """

    def __init__(self, q: Tensor, k: Tensor, lse: Tensor | None, spec: AttentionSpec) -> None:
        self.spec = spec
        if spec.heads != spec.heads_kv:
            k = k.repeat_interleave(spec.heads // spec.heads_kv, dim=2)
        allowed, added = spec.allowed(), spec.added()
        dtype = finer(q.dtype) if added is None else torch.promote_types(finer(q.dtype), added.dtype)
        self.q, self.k = (x.to(dtype).permute(2, 0, 1, 3) for x in (q, k))
        self.lse: Tensor | None = None
        if lse is not None:  # a blind row has no weights: exp(anything - inf) is 0
            self.lse = (lse.to(dtype).masked_fill(lse == float("-inf"), float("inf")) * LOG2_E).transpose(0, 1)
        self.buffer = q.new_empty(0, dtype=dtype)
        self.block = BLOCK_ON_GPU if spec.device.type == "cuda" else BLOCK
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
        score, hidden = self.buffer, None if self.hidden is None else cut(self.hidden, heads, rows)
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
            score += cut(self.bias, heads, rows)
        if hidden is not None:
            score.masked_fill_(hidden, float("-inf"))
        blind = score.amax(dim=-1, keepdim=True) == float("-inf")
        return score.softmax(dim=-1).masked_fill_(blind, 0.0), (~blind).to(score.dtype)


def cut(table: Tensor, heads: slice, rows: slice) -> Tensor:
    """Some heads and rows of a tensor that broadcasts to (heads, batch, seqlen_q, seqlen_k)."""
    table = table[heads] if table.shape[0] > 1 else table
    return table[:, :, rows] if table.shape[2] > 1 else table


class Weights(torch.autograd.Function):
    """A backend's output, and the weights of a recipe beside it, which are a function of q, k and the bias.

    With v the output can be differentiated twice, which the stock layer's can with ``need_weights=True`` and no fused
    kernel's: a backward with ``create_graph`` takes the gradients of the definition and hands the backend none; a plain
    one takes the backend's own. Every tensor is one that autograd saved, so that hooks on those find it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor | None,
        bias: Tensor | None,
        spec: AttentionSpec,
        recipe: Recipe,
        make: Callable[[Recipe], Tensor],
    ) -> Any:
        tensors, ctx.recipe_again = taken_apart(recipe)
        masks, ctx.spec_again = ((), None) if recipe.places is None else without_tensors(spec)
        ctx.save_for_backward(q, k, v, bias, *tensors, *masks)
        ctx.count = len(tensors)
        ctx.set_materialize_grads(False)
        weights = make(recipe)
        if not any(ctx.needs_input_grad[place] for place in (1, 2, 4)):
            ctx.mark_non_differentiable(weights)
        return out.detach(), weights  # an input returned as it is could not be written in place

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        of_out, of_weights = grads
        again = torch.is_grad_enabled()
        rest = (None,) * 3
        if of_weights is None and not again:
            return of_out, None, None, None, None, *rest
        needed = ctx.needs_input_grad[1:5]
        q, k, v, bias, *tensors = ctx.saved_tensors
        recipe = ctx.recipe_again(q, k, tensors[: ctx.count])
        if not (again or is_batched(of_weights)):
            dq, dk, d_bias = recipe.gradients(of_weights, (needed[0], needed[1], needed[3]))
            return of_out, dq, dk, None, d_bias, *rest
        with torch.enable_grad():
            defined = [] if of_weights is None else [(recipe.define(q, k, bias), of_weights)]
            if v is not None and of_out is not None and again:
                spec = recipe.spec if ctx.spec_again is None else ctx.spec_again(tensors[ctx.count :])
                spec = with_bias(spec, bias)
                defined.append((weigh(probabilities(*scores(q, k, spec), spec), v, spec), of_out))
                of_out = None
            if not defined:
                return of_out, None, None, None, None, *rest
            wanted = [x for x, need in zip((q, k, v, bias), needed) if need]
            outputs, gradients = zip(*defined)
            made = iter(torch.autograd.grad(outputs, wanted, gradients, create_graph=True, allow_unused=True))
        return (of_out, *(next(made) if need else None for need in needed), *rest)


def without_tensors(spec: AttentionSpec) -> tuple[tuple[Tensor, ...], Callable[[Sequence[Tensor]], AttentionSpec]]:
    """The tensors that a problem's mask and bias hold, and what makes the problem of them again."""
    masks, again = ((), None) if spec.mask is None else spec.mask.flatten()
    biases = () if spec.bias is None else spec.bias.tensors()
    bare, count = spec.changed(mask=None, bias=None), len(masks)

    def whole(tensors: Sequence[Tensor]) -> AttentionSpec:
        mask = None if again is None else again(tensors[:count])
        return with_bias(bare.changed(mask=mask), tensors[count] if len(tensors) > count else None)

    return (*masks, *biases), whole


def taken_apart(recipe: Recipe) -> tuple[list[Tensor | None], Callable[..., Recipe]]:
    """The tensors that a recipe holds beside q and k, and what makes the recipe of all of them again."""
    held, again = without_tensors(recipe.spec)
    average, batched, dtype = recipe.average, recipe.batched, recipe.dtype

    def whole(q: Tensor, k: Tensor, tensors: Sequence[Any]) -> Recipe:
        lse, rows, places, *rest = tensors
        return Recipe(q.detach(), k.detach(), again(rest), lse, average, batched, dtype, rows, places)

    return [recipe.lse, recipe.rows, recipe.places, *held], whole


def attention_with_weights(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: AttentionSpec,
    wanted: Wanted = None,
    layer: Any = None,
    *,
    average: bool = True,
    batched: bool = True,
    dtype: torch.dtype | None = None,
    rows: Tensor | None = None,
    padded: Padded | None = None,
    remade: bool = False,
) -> tuple[Tensor, Tensor]:
    """The output, and the attention weights before dropout, 0 in blind rows, which are computed when read.

    The weights are (batch, heads, seqlen_q, seqlen_k), or their mean over heads with ``average``, without the batch
    axis unless ``batched``, in ``dtype``, and 0 outside ``rows`` (batch, seqlen_q). ``padded`` for q, k and v that hold
    the real tokens alone, ``remade`` where a hop of the layer's own made q and k.

    Where PyTorch records what runs (compile, export, torch.func, forward AD) both are ordinary tensors, and a compiler
    drops what nobody reads; the definition makes both in one pass, unless a backend is named.
    """
    dtype = q.dtype if dtype is None else dtype
    backend = None if recorded(spec) else choose(spec, wanted)
    if backend is None or (padded is None and is_defined(spec, backend, wanted)):
        out, weights = by_definition(q, k, v, spec, wanted, layer)
        return out, shaped(weights, average, batched, dtype, rows)
    note(layer, spec, backend)
    free = (q.detach(), k.detach()) if q.requires_grad or k.requires_grad else (q, k)
    recipe = Recipe(*free, spec, None, average, batched, dtype, rows)
    learned: Tensor | None = None
    if spec.bias is not None:  # the caller's own tensor, which may change before the weights are read
        bias = spec.bias.tensors()[0]
        learned = bias if bias.requires_grad else None
        recipe.spec = with_bias(spec, bias.detach().clone())
    problem = recipe.spec
    told = asking(spec, backend)
    result = answer(backend, q, k, v, told)
    out, lse = result if isinstance(result, tuple) else (result, None)
    if padded is not None:
        batch, seqlen = padded.rows.shape
        sizes = {"batch": batch, "seqlen_q": seqlen, "seqlen_k": seqlen}
        recipe.spec = recipe.spec.changed(**sizes, mask=normalize(padded.mask, seqlen, seqlen))
        recipe.places, recipe.rows = padded.places, padded.rows
    elif lse is not None:
        recipe.lse = lse.detach() if lse.requires_grad else lse
    at_once = is_small(spec) or (remade and may_change(q, k)) or capturing(spec) or spec.device.type == "meta"
    make = Recipe.make if at_once else defer
    if spec.needs_grad:
        fused = None if spec.dropout_p > 0.0 or backend.name == "naive" else v
        out, weights = Weights.apply(out, q, k, fused, learned, problem, recipe, make)  # type: ignore[no-untyped-call]
    else:
        with torch.no_grad():
            weights = make(recipe)
    return out, weights


SMALL = 2**12
"""Scores of all heads, up to which the definition makes output and weights in one pass, as ordinary tensors.

On one thread of a CPU that trains in the time of the stock layer (0.95 to 1.04 of it, 1 x 8 to 4 x 16 tokens); an eval
whose weights are thrown away takes 20 to 50 us more, which being ordinary is worth.
"""


def is_small(spec: AttentionSpec) -> bool:
    """The weights of a problem are made at once, as ordinary tensors."""
    return spec.batch * spec.heads * spec.seqlen_q * spec.seqlen_k <= SMALL


def is_defined(spec: AttentionSpec, backend: Backend, wanted: Wanted) -> bool:
    """The definition makes output and weights, though automatic choice found a backend for the output alone."""
    return is_small(spec) and type(backend) in OWN and preference(wanted) is None


def may_change(q: Tensor, k: Tensor) -> bool:
    """A hop of the layer's own may return memory that is written before the weights are read: a cache's, an input's."""
    written = q.is_inference() or k.is_inference() or q._version > 0 or k._version > 0
    return written or q._is_view() or k._is_view()


DEFINITION = Naive()


def by_definition(
    q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, wanted: Wanted, layer: Any
) -> tuple[Tensor, Tensor]:
    """Output and weights (batch, heads, seqlen_q, seqlen_k) as ordinary tensors."""
    with without_autocast(spec.device):
        weights = probabilities(*scores(q, k, spec), spec)
        if preference(wanted) is None and not torch.compiler.is_compiling():
            note(layer, spec, DEFINITION)
            return weigh(weights, v, spec), weights
    out = run(q, k, v, spec, wanted, layer)
    assert isinstance(out, Tensor)
    return out, weights


def shaped(weights: Tensor, average: bool, batched: bool, dtype: torch.dtype, rows: Tensor | None) -> Tensor:
    """The weights (batch, heads, seqlen_q, seqlen_k) of the definition as the caller wants them."""
    weights = weights.mean(dim=1) if average else weights
    if rows is not None:
        weights = weights.masked_fill(~spread(rows, average), 0.0)
    return (weights if batched else weights[0]).to(dtype)


remembered: dict[AttentionSpec, tuple[Backend, AttentionSpec]] = {}
"""What ``asking`` said about a shared problem, and of which backend."""


def asking(spec: AttentionSpec, backend: Backend) -> AttentionSpec:
    """The problem as the backend is asked for it: with the log-sum-exp too, where it can give that.

    Not beside a bias, which may move all scores of a row far off, as -10000 does, where a log-sum-exp in float32 is
    coarse.
    """
    known = remembered.get(spec) if spec.shared else None
    if known is not None and known[0] is backend:
        return known[1]
    found = spec.with_lse() if spec.bias is None else spec
    if backend.unsupported(found) is not None or backend.unbuilt(found) is not None:
        found = spec
    if spec.shared:
        if len(remembered) >= SHARED:
            remembered.clear()
        remembered[spec] = (backend, found)
    return found


def recorded(spec: AttentionSpec) -> bool:
    """Somebody records operators, or differentiates forward."""
    return torch.compiler.is_compiling() or spec.aten_only or traced() or forward_ad._current_level >= 0


def defer(recipe: Recipe) -> Deferred:
    """The weights of a recipe, computed when they are read."""
    cell = Cell(recipe.make, recipe.spec.device, recipe.cost)
    made: Deferred = Deferred(cell, recipe.shape, recipe.dtype, recipe.spec.device)
    expect_look(cell)
    return made


def with_bias(spec: AttentionSpec, bias: Tensor | None) -> AttentionSpec:
    """The same problem over another bias tensor."""
    return spec if bias is None else spec.changed(bias=TensorBias(bias))


def finer(dtype: torch.dtype) -> torch.dtype:
    """At least float32."""
    return torch.promote_types(dtype, torch.float32)


def spread(rows: Tensor, average: bool) -> Tensor:
    """(batch, seqlen_q) against the axes of the weights."""
    return rows[:, :, None] if average else rows[:, None, :, None]

"""Output and weights in one node of autograd."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends.naive import probabilities, scores, weigh
from ..host.torch_state import is_batched
from ..problem.spec import AttentionSpec
from .learned import replace_learned, take_apart_scores
from .recipe import Recipe
from .unmade import Unmade


class Weights(torch.autograd.Function):
    """A backend's output, and the weights of a recipe beside it, which are a function of q, k and learned scores.

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
        spec: AttentionSpec,
        recipe: Recipe,
        make: Callable[[Recipe], Tensor],
        *learned: Tensor | None,
    ) -> Any:
        tensors, ctx.recipe_again = take_apart(recipe)
        masks, ctx.spec_again = ((), None) if recipe.places is None else take_tensors_out(spec)
        ctx.save_for_backward(q, k, v, *learned, *tensors, *masks)
        ctx.counts = len(learned), len(tensors)
        ctx.set_materialize_grads(False)
        weights = make(recipe)
        if not any(ctx.needs_input_grad[place] for place in (1, 2, *range(FIRST, FIRST + len(learned)))):
            ctx.mark_non_differentiable(weights)
        return out.detach(), weights  # an input returned as it is could not be written in place

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        of_out, of_weights = grads
        again = torch.is_grad_enabled()
        count, held = ctx.counts
        nothing = (of_out, *(None,) * (FIRST - 1 + count))
        if of_weights is None and not again:
            return nothing
        q, k, v, *tensors = ctx.saved_tensors
        learned, tensors = tensors[:count], tensors[count:]
        recipe = ctx.recipe_again(q, k, tensors[:held])
        needed = ctx.needs_input_grad
        if not (again or is_batched(of_weights)):
            dq, dk, *rest = Unmade(recipe).gradients(of_weights, (*needed[1:3], *needed[FIRST:]))
            return of_out, dq, dk, *nothing[3:FIRST], *rest
        with torch.enable_grad():
            q, k, v, *learned = (apart(x) for x in (q, k, v, *learned))
            defined = [] if of_weights is None else [(recipe.define(q, k, learned), of_weights)]
            if v is not None and of_out is not None and again:
                spec = recipe.spec if ctx.spec_again is None else ctx.spec_again(tensors[held:])
                spec = replace_learned(spec, learned)
                defined.append((weigh(probabilities(*scores(q, k, spec), spec), v, spec), of_out))
                of_out = None
            if not defined:
                return nothing
            inputs = (q, k, v, *nothing[4:FIRST], *learned)
            wanted = [x for x, need in zip(inputs, needed[1:]) if need]
            outputs, gradients = zip(*defined)
            made = iter(torch.autograd.grad(outputs, wanted, gradients, create_graph=True, allow_unused=True))
        return (of_out, *(next(made) if need else None for need in needed[1:]))


FIRST = 7
"""The place of the first learned tensor among the inputs of ``Weights``."""


def apart(x: Any) -> Any:
    """A tensor as a view of its own, so that its gradient takes no way through another that was made of it."""
    return None if x is None else x.view_as(x)


def take_tensors_out(spec: AttentionSpec) -> tuple[tuple[Tensor, ...], Callable[[Sequence[Tensor]], AttentionSpec]]:
    """The tensors that a problem's mask and scores hold, and what makes the problem of them again."""
    masks, again = ((), None) if spec.mask is None else spec.mask.flatten()
    learned, over = take_apart_scores(spec)
    bare, count = spec.changed(mask=None, bias=None, sinks=None), len(masks)

    def whole(tensors: Sequence[Tensor]) -> AttentionSpec:
        mask = None if again is None else again(tensors[:count])
        return over(bare.changed(mask=mask), tensors[count:])

    return (*masks, *learned), whole


def take_apart(recipe: Recipe) -> tuple[list[Tensor | None], Callable[..., Recipe]]:
    """The tensors that a recipe holds beside q and k, and what makes the recipe of all of them again."""
    held, again = take_tensors_out(recipe.spec)
    average, batched, dtype = recipe.average, recipe.batched, recipe.dtype

    def whole(q: Tensor, k: Tensor, tensors: Sequence[Any]) -> Recipe:
        lse, rows, places, *rest = tensors
        return Recipe(q.detach(), k.detach(), again(rest), lse, average, batched, dtype, rows, places)

    return [recipe.lse, recipe.rows, recipe.places, *held], whole

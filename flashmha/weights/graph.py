"""Output and weights in one node of autograd."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends.naive import probabilities, scores, weigh
from ..host.torch_state import is_batched
from ..problem.spec import AttentionSpec
from .recipe import Recipe, replace_bias


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
        tensors, ctx.recipe_again = take_apart(recipe)
        masks, ctx.spec_again = ((), None) if recipe.places is None else take_tensors_out(spec)
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
                spec = replace_bias(spec, bias)
                defined.append((weigh(probabilities(*scores(q, k, spec), spec), v, spec), of_out))
                of_out = None
            if not defined:
                return of_out, None, None, None, None, *rest
            wanted = [x for x, need in zip((q, k, v, bias), needed) if need]
            outputs, gradients = zip(*defined)
            made = iter(torch.autograd.grad(outputs, wanted, gradients, create_graph=True, allow_unused=True))
        return (of_out, *(next(made) if need else None for need in needed), *rest)


def take_tensors_out(spec: AttentionSpec) -> tuple[tuple[Tensor, ...], Callable[[Sequence[Tensor]], AttentionSpec]]:
    """The tensors that a problem's mask and bias hold, and what makes the problem of them again."""
    masks, again = ((), None) if spec.mask is None else spec.mask.flatten()
    biases = () if spec.bias is None else spec.bias.tensors()
    bare, count = spec.changed(mask=None, bias=None), len(masks)

    def whole(tensors: Sequence[Tensor]) -> AttentionSpec:
        mask = None if again is None else again(tensors[:count])
        return replace_bias(bare.changed(mask=mask), tensors[count] if len(tensors) > count else None)

    return (*masks, *biases), whole


def take_apart(recipe: Recipe) -> tuple[list[Tensor | None], Callable[..., Recipe]]:
    """The tensors that a recipe holds beside q and k, and what makes the recipe of all of them again."""
    held, again = take_tensors_out(recipe.spec)
    average, batched, dtype = recipe.average, recipe.batched, recipe.dtype

    def whole(q: Tensor, k: Tensor, tensors: Sequence[Any]) -> Recipe:
        lse, rows, places, *rest = tensors
        return Recipe(q.detach(), k.detach(), again(rest), lse, average, batched, dtype, rows, places)

    return [recipe.lse, recipe.rows, recipe.places, *held], whole

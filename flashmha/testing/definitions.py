"""Definitions by other operations: right answers that differ by rounding from those of ``naive``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..backends.base import Backend
from ..backends.naive import at_least_single
from ..backends.parity import moved
from ..problem.spec import AttentionSpec


class OneByOne(Backend):
    """A definition by other operations: its matrix products are loops, its weights come from the log-sum-exp.

    A library adds up in several sums at once, which errs a half or a quarter as much over a hundred features. A loop
    drifts where its products are alike, how far is a matter of their size: ``factor`` changes that, as a scale does
    that comes before or after.
    """

    name = "one by one"

    def __init__(self, definition: Backend, factor: float = 1.0) -> None:
        self.definition, self.factor = definition, factor

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor | tuple[Tensor, Tensor]:
        with Loops(self.factor):
            return self.definition(q, k, v, spec)


class Loops(TorchFunctionMode):
    """Products of batches of matrices, and softmax, by other operations, forward and backward."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.bmm:
            return Product.apply(*args, self.factor)  # type: ignore[no-untyped-call]
        if func is Tensor.softmax:
            score = at_least_single(args[0])
            return (score - score.logsumexp(dim=-1, keepdim=True)).exp().to(args[0].dtype)
        return func(*args, **(kwargs or {}))


class Product(torch.autograd.Function):
    """``one @ two``, and its gradients by the same loop."""

    @staticmethod
    def forward(ctx: Any, one: Tensor, two: Tensor, factor: float) -> Tensor:
        ctx.save_for_backward(one, two)
        ctx.factor = factor
        return added_up(one, two, factor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        one, two = ctx.saved_tensors
        return added_up(grad, two.mT, ctx.factor), added_up(one.mT, grad, ctx.factor), None


def added_up(one: Tensor, two: Tensor, factor: float) -> Tensor:
    """``one @ two``, ``factor`` times as large, one product after the other; and divided by it.

    In float32 at least, as matrix products are, and rounded once.
    """
    first, second = at_least_single(one) * factor, at_least_single(two)
    total = first.new_zeros(*first.shape[:-1], second.shape[-1])
    for column, row in zip(first.unbind(-1), second.unbind(-2)):
        total += column[..., :, None] * row[..., None, :]
    return (total / factor).to(one.dtype)


class FromOutput(Backend):
    """A definition whose backward starts from its output as it was rounded, as that of every fused kernel does.

    Such a kernel subtracts ``(grad * out).sum(-1)`` from the gradients of a row's weights. For a row that sees one key
    that should leave 0, and the definition's own backward leaves exactly 0. ``nudge`` is the seed of the roundings.
    """

    name = "from output"

    def __init__(self, definition: Backend, nudge: int) -> None:
        self.definition, self.nudge = definition, nudge

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor | tuple[Tensor, Tensor]:
        out, lse = self.definition(q, k, v, spec.with_lse())
        out, lse = Subtracted.apply(out, lse, self.nudge)  # type: ignore[no-untyped-call]
        return (out, lse) if spec.need_lse else out


class Subtracted(torch.autograd.Function):
    """An output and its log-sum-exp, which takes the gradient that an output off by roundings makes of a row's."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, lse: Tensor, nudge: int) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(moved(out, torch.Generator("cpu").manual_seed(nudge)) - out, lse)
        return out.clone(), lse.clone()

    @staticmethod
    def backward(ctx: Any, of_out: Tensor, of_lse: Tensor) -> tuple[Tensor, Tensor, None]:
        error, lse = ctx.saved_tensors
        return of_out, of_lse + (of_out * error).sum(dim=-1).transpose(1, 2).to(lse.dtype), None

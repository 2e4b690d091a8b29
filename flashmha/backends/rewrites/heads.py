"""The heads of one projection: queries, keys and values as views of one tensor, and their gradients as one again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...host.torch_state import is_compiling, is_inside_transform


def neighbours(heads: Sequence[Tensor]) -> bool:
    """Tensors (..., heads, head_dim) that lie behind one another in the heads of one tensor."""
    first = heads[0]
    place, shape, stride, size = first.data_ptr(), first.shape, first.stride(), first.element_size()
    memory = first.untyped_storage().data_ptr()  # tensors of their own may happen to lie so
    for x in heads:
        if x.data_ptr() != place or x.stride() != stride or x.shape[:-2] != shape[:-2] or x.shape[-1] != shape[-1]:
            return False
        if x.untyped_storage().data_ptr() != memory:
            return False
        place += x.shape[-2] * stride[-2] * size
    return True


class Heads(torch.autograd.Function):
    """(..., heads, head_dim) split into heads of queries, keys and values, as views.

    ``split`` copies three gradients into one. This takes them as they are where a backend wrote them side by side.
    """

    @staticmethod
    def forward(ctx: Any, packed: Tensor, sizes: list[int]) -> tuple[Tensor, ...]:
        ctx.sizes = sizes
        return packed.split_with_sizes(sizes, -2)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        first = grads[0]
        # a gradient that is differentiated again must not look like a view of one of the three
        if torch.is_grad_enabled() or not neighbours(grads):
            return torch.cat(grads, dim=-2), None
        shape = (*first.shape[:-2], sum(ctx.sizes), first.shape[-1])
        return first.as_strided(shape, first.stride(), first.storage_offset()), None


MIN_ELEMENTS = 2**22
"""Elements of a projection from which the copy that ``Heads`` spares takes longer than its Python."""


def split(packed: Tensor, head_dim: int, sizes: list[int], together: bool = False) -> tuple[Tensor, ...]:
    """Queries, keys and values (.., .., heads, head_dim) out of (.., .., features of all heads), as views.

    ``together`` where their gradients may come side by side.
    """
    outer, inner, _ = packed.shape
    if together:
        made: tuple[Tensor, ...] = Heads.apply(packed.view(outer, inner, sum(sizes), head_dim), sizes)  # type: ignore[no-untyped-call]
        return made
    count = len(sizes)
    if sizes == [sizes[0]] * count:  # Dynamo 2.8 does not trace list.count
        return packed.view(outer, inner, count, sizes[0], head_dim).unbind(2)
    return packed.view(outer, inner, sum(sizes), head_dim).split_with_sizes(sizes, -2)


def spares(packed: Tensor) -> bool:
    """``Heads`` spares more than it takes."""
    if not (packed.requires_grad and torch.is_grad_enabled()) or is_compiling():
        return False
    return packed.numel() >= MIN_ELEMENTS and not is_inside_transform()

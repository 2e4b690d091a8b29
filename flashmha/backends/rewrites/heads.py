"""The heads of one projection: queries, keys and values as views of one tensor, and their gradients as one again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

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


class Room:
    """Memory for the gradients of all heads of one split, side by side.

    What needs the heads writes their gradients here, each in its place, so that ``Heads`` has nothing to copy.
    """

    def __init__(self, like: Tensor, split: Any) -> None:
        self.memory = like.new_empty_strided(split.shape, split.stride)
        self.parts = self.memory.split_with_sizes(split.sizes, -2)
        self.filled: set[int] = set()

    def complete(self, grads: Sequence[Tensor]) -> bool:
        """Copy the gradients that were made elsewhere; ``False`` where one is not what was written here."""
        if not all(is_same_memory(self.parts[place], grads[place]) for place in self.filled):
            return False  # of another backward, or added to another
        for place, (part, grad) in enumerate(zip(self.parts, grads)):
            if place not in self.filled:
                part.copy_(grad)
        return True


def is_same_memory(part: Tensor, grad: Tensor) -> bool:
    """Two tensors are the same numbers in memory."""
    return part.data_ptr() == grad.data_ptr() and part.stride() == grad.stride() and part.shape == grad.shape


class Slots(NamedTuple):
    """Where the gradients of heads that came out of one split belong."""

    split: Any
    numbers: list[int]
    swapped: bool

    def take(self, like: Tensor) -> list[Tensor]:
        """Memory for one gradient of each. What was written once is not written again: it may be in use."""
        room: Room | None = self.split.room
        if room is None or not room.filled.isdisjoint(self.numbers):
            room = self.split.room = Room(like, self.split)
        room.filled.update(self.numbers)
        parts = [room.parts[number] for number in self.numbers]
        return [part.transpose(0, 1) for part in parts] if self.swapped else parts


def find_slots(heads: Sequence[Tensor]) -> Slots | None:
    """The places of heads (batch, seqlen, heads, head_dim) that came as they are, or swapped, out of one ``Heads``."""
    split: Any = None
    numbers: list[int] = []
    swapped = False
    for x in heads:
        node, number, its = origin_of(x)
        if node is None or (numbers and (node is not split or its != swapped)):
            return None
        split, swapped = node, its
        numbers.append(number)
    return Slots(split, numbers, swapped)


def origin_of(x: Tensor) -> tuple[Any, int, bool]:
    """The ``Heads`` that made a tensor, as which of its outputs, and whether batch and seqlen changed places since."""
    node: Any = x.grad_fn
    if getattr(node, "_forward_cls", None) is Heads:
        return node, x.output_nr, False
    if node is not None and node.name() == "TransposeBackward0" and (node._saved_dim0, node._saved_dim1) == (0, 1):
        before, number = node.next_functions[0]
        if getattr(before, "_forward_cls", None) is Heads:
            return before, number, True
    return None, 0, False


class Heads(torch.autograd.Function):
    """(..., features of all heads) split into heads of queries, keys and values, as views.

    ``split`` copies three gradients into one. This takes them as they are where they were written side by side.
    """

    @staticmethod
    def forward(ctx: Any, packed: Tensor, head_dim: int, sizes: list[int]) -> tuple[Tensor, ...]:
        heads = packed.view(*packed.shape[:-1], sum(sizes), head_dim)
        ctx.sizes, ctx.shape, ctx.stride, ctx.room = sizes, heads.shape, heads.stride(), None
        return heads.split_with_sizes(sizes, -2)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        room, ctx.room = ctx.room, None
        return join_gradients(ctx.sizes, room, grads).flatten(-2), None, None


def join_gradients(sizes: Sequence[int], room: Room | None, grads: Sequence[Tensor]) -> Tensor:
    """The gradients of all heads as one; copied where they were not written side by side."""
    # a gradient that is differentiated again must not look like a view of one of the three
    if not torch.is_grad_enabled():
        if room is not None and room.complete(grads):
            return room.memory
        if neighbours(grads):
            first = grads[0]
            shape = (*first.shape[:-2], sum(sizes), first.shape[-1])
            return first.as_strided(shape, first.stride(), first.storage_offset())
    return torch.cat(grads, dim=-2)  # type: ignore[arg-type]


MIN_ELEMENTS = 2**22
"""Elements of a projection from which the copy that ``Heads`` spares takes longer than its Python."""


def split(packed: Tensor, head_dim: int, sizes: list[int], together: bool = False) -> tuple[Tensor, ...]:
    """Queries, keys and values (.., .., heads, head_dim) out of (.., .., features of all heads), as views.

    ``together`` where their gradients may come side by side.
    """
    if together:
        made: tuple[Tensor, ...] = Heads.apply(packed, head_dim, sizes)  # type: ignore[no-untyped-call]
        return made
    (outer, inner, _), count = packed.shape, len(sizes)
    if sizes == [sizes[0]] * count:  # Dynamo 2.8 does not trace list.count
        return packed.view(outer, inner, count, sizes[0], head_dim).unbind(2)
    return packed.view(outer, inner, sum(sizes), head_dim).split_with_sizes(sizes, -2)


def spares(packed: Tensor) -> bool:
    """``Heads`` spares more than it takes."""
    if not (packed.requires_grad and torch.is_grad_enabled()) or is_compiling():
        return False
    return packed.numel() >= MIN_ELEMENTS and not is_inside_transform()

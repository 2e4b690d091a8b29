"""A map that was not made: its places, and reductions of them, out of its recipe."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .blocks import Box
from .cell import Source
from .gradients import GradientPiece
from .patches import Patches
from .recipe import Recipe
from .regions import Layout, Region, cover

aten = torch.ops.aten
REDUCTIONS = {
    aten.sum.default: "sum",
    aten.sum.dim_IntList: "sum",
    aten.mean.default: "sum",
    aten.mean.dim: "sum",
    aten.amax.default: "amax",
    aten.max.default: "amax",
}
"""What is computed of values that are not there without making them."""
MEANS = (aten.mean.default, aten.mean.dim)


class Unmade:
    """The weights of a recipe, over the axes that the caller sees."""

    answers: frozenset[Any] = frozenset(REDUCTIONS)

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, self.shape, self.dtype, self.device = recipe, recipe.shape, recipe.dtype, recipe.spec.device
        self.cost = recipe.cost
        self.here = [axis for axis in range(4) if (axis or recipe.batched) and (axis != 1 or not recipe.average)]

    def make(self) -> Tensor:
        """The weights."""
        return self.recipe.make()

    def part(self, region: Region) -> Tensor:
        """The weights of some places."""
        return self.gather(region, self.recipe.part, torch.cat).reshape(region.sizes)

    def gather(
        self, region: Region, make: Callable[[Box, range], Tensor], join: Callable[[list[Tensor], int], Tensor]
    ) -> Tensor:
        """What is made of the boxes of a region, whose heads and batch items follow one another, joined by axis."""
        batch, heads, queries, keys = self.ranges(region)
        if batch.step == heads.step == 1:
            return make(Box(batch, heads, queries), keys)
        by_item = []
        for items in runs(batch):
            made = [make(Box(items, some, queries), keys) for some in runs(heads)]
            by_item.append(made[0] if len(made) == 1 else join(made, 1))
        return by_item[0] if len(by_item) == 1 else join(by_item, 0)

    def ranges(self, region: Region) -> tuple[range, range, range, range]:
        """The ranges of a region of batch items, heads (all of them where they are a mean), queries and keys."""
        recipe, spec = self.recipe, self.recipe.spec
        *others, queries, keys = [part if part.step == 1 or len(part) > 1 else cover(part) for part in region.ranges]
        heads = range(spec.heads) if recipe.average else others.pop()
        return others.pop() if recipe.batched else range(spec.batch), heads, queries, keys

    def pieces(self, patches: Iterable[tuple[Region, Tensor]]) -> Iterator[GradientPiece]:
        """Gradients of places, which broadcast to them, as pieces of a gradient of the recipe's."""
        for region, grad in patches:
            batch, heads, queries, keys = self.ranges(region)
            sizes = (len(batch), 1 if self.recipe.average else len(heads), len(queries), len(keys))
            for axis in {0, 1, 2, 3}.difference(self.here):
                grad = grad.unsqueeze(axis)
            grad, item = grad.expand(sizes), 0
            for items in runs(batch):
                head = 0
                for some in runs(heads):
                    stop = 1 if self.recipe.average else head + len(some)
                    part = grad[item : item + len(items), head:stop]
                    yield GradientPiece(Box(items, some, queries), keys, part)
                    head = stop
                item += len(items)

    def gradients(self, grad: Tensor, wanted: Sequence[bool]) -> list[Tensor | None]:
        """The recipe's, of patches without the zeros around them where those are most of the gradient."""
        patches = getattr(grad, "source", None)
        if isinstance(patches, Patches) and patches.is_small:
            found = [(Region(places, tuple(range(len(places)))), values) for places, values in patches.patches]
            return self.recipe.gradients_of(self.pieces(found), wanted)
        return self.recipe.gradients(grad, wanted)

    def answer(self, func: Any, layout: Layout, region: Region, args: Any, kwargs: Any) -> Tensor | Source | None:
        """A reduction of some places, or the mean over heads, which is a map that was not made either.

        In float32 at least, where a map in half precision is rounded before it is added up.
        """
        kind = REDUCTIONS[func]
        if not region.numel or not region.axes:
            return None
        shape, dtype, dims = foresee(func, layout, args, kwargs)
        if not dtype.is_floating_point:
            return None
        axes = {region.axes[dim] for dim in dims}
        over = {self.here[axis] for axis in axes}
        if over == {1} and func in MEANS and region == Region.whole(self.shape):
            averaged = Unmade(dataclasses.replace(self.recipe, average=True))
            if averaged.shape == shape and averaged.dtype == dtype:
                return averaged

        def join(parts: list[Tensor], axis: int) -> Tensor:
            if axis not in over:
                return torch.cat(parts, axis)
            return functools.reduce(torch.add if kind == "sum" else torch.maximum, parts)

        made = self.gather(region, lambda box, keys: self.recipe.reduce(kind, over, box, keys), join)
        if func in MEANS:
            made = made / math.prod(len(region.ranges[axis]) for axis in axes)
        return made.reshape(shape).to(dtype)


def foresee(func: Any, layout: Layout, args: Any, kwargs: Any) -> tuple[tuple[int, ...], torch.dtype, set[int]]:
    """The shape and the dtype of a reduction and the axes that it is over; raises what it would raise."""
    count = len(layout.sizes)
    given = args[0] if args else kwargs.get("dim")
    dims = {dim % count for dim in given or range(count)}
    if given and (len(dims) < len(given) or not all(-count <= dim < count for dim in given)):
        func(layout.blank(), *args, **kwargs)
    keep = args[1] if len(args) > 1 else kwargs.get("keepdim", False)
    sizes = [1 if axis in dims else size for axis, size in enumerate(layout.sizes) if keep or axis not in dims]
    return tuple(sizes), kwargs.get("dtype") or layout.dtype, dims


def runs(part: range) -> list[range]:
    """A range of places as some whose places follow one another."""
    return [part] if part.step == 1 else [range(place, place + 1) for place in part]

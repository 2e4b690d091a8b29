"""The gradient of a map of which some places were read: 0 elsewhere, where nothing is stored.

Autograd hands the gradient of a slice back as one of the whole map, of zeros but for the slice. Such a gradient is a
deferred tensor here, which the backward of weights takes apart; whatever else reads it finds its values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .cell import Source
from .regions import Layout, Region, as_slice

aten = torch.ops.aten
SCALES = (aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar)
INNER = (
    aten.select_backward.default,
    aten.slice_backward.default,
    aten.unsqueeze.default,
    aten.expand.default,
    aten.add.Tensor,
)
"""Others that stand between a slice or a mean and its map in a backward."""
Patch = tuple[tuple[range, ...], Tensor]
"""The places of a patch, and its numbers, which broadcast to them."""


class Patches:
    """A gradient that is 0 outside some patches, which may overlap."""

    cost = 0
    answers: frozenset[Any] = frozenset([*SCALES, *INNER])

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device, patches: list[Patch]) -> None:
        self.shape, self.dtype, self.device, self.patches = tuple(shape), dtype, device, patches

    @classmethod
    def of(cls, grad: Tensor) -> Patches:
        """An ordinary gradient."""
        places = tuple(map(range, grad.shape))
        return cls(grad.shape, grad.dtype, grad.device, [(places, grad)])

    def changed(self, shape: Sequence[int], patches: list[Patch]) -> Patches:
        return Patches(shape, self.dtype, self.device, patches)

    def make(self) -> Tensor:
        """The gradient with all its zeros."""
        made = torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        for places, values in self.patches:
            made[tuple(map(as_slice, places))] += values
        return made

    def part(self, region: Region) -> None:
        """Nothing: some places of a gradient are cut out of all."""

    @property
    def is_small(self) -> bool:
        """Whether the patches have less numbers than the gradient."""
        return 2 * sum(values.numel() for _, values in self.patches) <= math.prod(self.shape)

    def answer(self, func: Any, layout: Layout, region: Region, args: Any, kwargs: Any) -> Tensor | Source | None:
        """What one of ``answers`` makes of it."""
        if kwargs or region != Region.whole(self.shape):
            return None
        if func is aten.select_backward.default:
            sizes, dim, index = args
            return self.widened(sizes, dim % len(sizes), range(sizes[dim])[index])
        if func is aten.slice_backward.default:
            sizes, dim, start, end, step = args
            return self.spread(sizes, dim % len(sizes), range(sizes[dim])[start:end:step])
        if func is aten.unsqueeze.default:
            dim = args[0] % (len(self.shape) + 1)
            return self.widened((*self.shape[:dim], 1, *self.shape[dim:]), dim, 0)
        if func is aten.expand.default and len(args[0]) == len(self.shape):
            return self.expanded(args[0])
        if func in SCALES and len(args) == 1 and not (isinstance(args[0], Tensor) and args[0].dim()):
            return self.changed(self.shape, [(places, func(values, *args)) for places, values in self.patches])
        if func is aten.add.Tensor and len(args) == 1:
            other = getattr(args[0], "source", None)
            if isinstance(other, Patches) and other.shape == self.shape and other.dtype == self.dtype:
                return self.changed(self.shape, [*self.patches, *other.patches])
        return None

    def widened(self, shape: Sequence[int], dim: int, place: int) -> Patches:
        """One place of an axis that is new."""
        one = range(place, place + 1)
        return self.changed(shape, [((*p[:dim], one, *p[dim:]), v.unsqueeze(dim)) for p, v in self.patches])

    def spread(self, shape: Sequence[int], dim: int, places: range) -> Patches:
        """Some places of an axis that is longer."""
        return self.changed(shape, [((*p[:dim], places[as_slice(p[dim])], *p[dim + 1 :]), v) for p, v in self.patches])

    def expanded(self, shape: Sequence[int]) -> Patches:
        """The same numbers along axes that had one place."""
        shape = [old if new == -1 else new for old, new in zip(self.shape, shape)]
        grown = [
            (tuple(range(n) if n != old else r for n, old, r in zip(shape, self.shape, p)), v) for p, v in self.patches
        ]
        return self.changed(shape, grown)

"""Some places of a tensor, as slices of slices name them, and how a view of them lies in memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

SELECT, SLICE = torch.ops.aten.select.int, torch.ops.aten.slice.Tensor


class Region(NamedTuple):
    """A range of each axis of a tensor, and which of its axes a view of them has, in their order."""

    ranges: tuple[range, ...]
    axes: tuple[int, ...]

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Region:
        """All of a tensor."""
        return cls(tuple(map(range, shape)), tuple(range(len(shape))))

    @property
    def numel(self) -> int:
        """How many places there are."""
        return math.prod(map(len, self.ranges))

    def select(self, dim: int, index: int) -> Region:
        """One place of an axis of the view, which loses it."""
        axis = self.axes[dim]
        one = self.ranges[axis][index]
        return Region(self.narrowed(axis, range(one, one + 1)), tuple(a for a in self.axes if a != axis))

    def slice(self, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Region:
        """Some places of an axis of the view."""
        axis = self.axes[dim]
        return self._replace(ranges=self.narrowed(axis, self.ranges[axis][start:end:step]))

    def after(self, func: Any, args: tuple[Any, ...]) -> Region | None:
        """What ``select`` or ``slice`` leaves; ``None`` for another operator, and where it would raise."""
        if func is SELECT:
            dim, index = args
            inside = -len(self.axes) <= dim < len(self.axes) and -1 - index < self.count_of(dim) > index
            return self.select(dim, index) if inside else None
        if func is not SLICE or (len(args) > 3 and args[3] < 1):
            return None
        return self.slice(*args) if -len(self.axes) <= (args[0] if args else 0) < len(self.axes) else None

    def count_of(self, dim: int) -> int:
        """How many places an axis of the view has."""
        return len(self.ranges[self.axes[dim]])

    def narrowed(self, axis: int, places: range) -> tuple[range, ...]:
        """The ranges with another one of an axis."""
        return (*self.ranges[:axis], places, *self.ranges[axis + 1 :])

    def of(self, values: Tensor) -> Tensor:
        """The view of a tensor."""
        return values[tuple(self.as_index(axis, places) for axis, places in enumerate(self.ranges))]

    def alone(self, values: Tensor) -> Tensor:
        """The view of its places, where no others are there."""
        return values[tuple(slice(None) if axis in self.axes else 0 for axis in range(values.dim()))]

    def as_index(self, axis: int, places: range) -> Any:
        """What stands for an axis of the tensor in an index."""
        return as_slice(places) if axis in self.axes else places.start


class Layout(NamedTuple):
    """How a tensor lies in its memory."""

    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> Layout:
        return cls(tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()), tensor.dtype)

    @classmethod
    def contiguous(cls, sizes: Sequence[int], dtype: torch.dtype) -> Layout:
        strides = [1]
        for size in reversed(sizes[1:]):
            strides.insert(0, strides[0] * max(size, 1))
        return cls(tuple(sizes), tuple(strides[: len(sizes)]), 0, dtype)

    def cut(self, region: Region) -> Layout:
        """That of a view of some places."""
        places = [(region.ranges[axis], self.strides[axis]) for axis in region.axes]
        offset = sum(part.start * stride for part, stride in zip(region.ranges, self.strides))
        sizes, strides = tuple(len(part) for part, _ in places), tuple(part.step * stride for part, stride in places)
        return Layout(sizes, strides, self.offset + offset, self.dtype)

    def blank(self) -> Tensor:
        """A tensor that lies so and has no values."""
        last = self.offset + sum((size - 1) * stride for size, stride in zip(self.sizes, self.strides) if size) + 1
        return torch.empty(last, dtype=self.dtype, device="meta").as_strided(self.sizes, self.strides, self.offset)


def as_slice(part: range) -> slice:
    """A range as an index."""
    return slice(part.start, part.stop, part.step)


def cover(part: range) -> range:
    """The range of step 1 from the first to the last place of one."""
    return range(part[0], part[-1] + 1) if part else range(0)

"""Some places of a tensor, as slices of slices name them, and how a view of them lies in memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

SELECT, SLICE = torch.ops.aten.select.int, torch.ops.aten.slice.Tensor
WHOLE_SLICE: tuple[Any, ...] = (0, None, None, 1)
"""What the arguments of a slice are where they are not given."""


class Axis(NamedTuple):
    """Some places of one axis of a view, and whether the view keeps the axis."""

    dim: int
    places: range
    keeps: bool


def read_cut(func: Any, args: tuple[Any, ...], sizes: Sequence[int]) -> Axis | None:
    """What ``select`` or ``slice`` leaves; ``None`` for another operator, and where it would raise."""
    count = len(sizes)
    if func is SELECT:
        dim, index = args
        if not -count <= dim < count or not -sizes[dim] <= index < sizes[dim]:
            return None
        index %= sizes[dim]
        return Axis(dim % count, range(index, index + 1), False)
    if func is not SLICE:
        return None
    dim, start, end, step = [*args, *WHOLE_SLICE[len(args) :]]
    if step < 1 or not -count <= dim < count:
        return None
    return Axis(dim % count, range(sizes[dim])[start:end:step], True)


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

    @property
    def sizes(self) -> list[int]:
        """Those of the view."""
        return list(map(len, map(self.ranges.__getitem__, self.axes)))

    def cut(self, cut: Axis) -> Region:
        """Some places of an axis of the view."""
        (dim, places, keeps), (ranges, axes) = cut, self
        axis = axes[dim]
        part = ranges[axis][places.start : places.stop : places.step]
        ranges = ranges[:axis] + (part,) + ranges[axis + 1 :]  # noqa: RUF005
        return Region(ranges, axes if keeps else axes[:dim] + axes[dim + 1 :])

    def of(self, values: Tensor) -> Tensor:
        """The view of a tensor."""
        return values[tuple(self.as_index(axis, places) for axis, places in enumerate(self.ranges))]

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

    def cut(self, cut: Axis) -> Layout:
        """That of a view of some places of an axis."""
        (dim, places, keeps), (sizes, strides, offset, dtype) = cut, self
        step, behind = strides[dim], dim + 1
        size, stride = ((len(places),), (places.step * step,)) if keeps else ((), ())
        return Layout(
            sizes[:dim] + size + sizes[behind:],
            strides[:dim] + stride + strides[behind:],
            offset + places.start * step,
            dtype,
        )

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

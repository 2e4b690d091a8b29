"""Views of a tensor whose values were not made: what is read of one is made alone."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .cell import Cell
from .regions import SLICE, Axis, Layout, Region, read_cut

aten = torch.ops.aten
ALIASES = (aten.alias.default, aten.detach.default)
BY_STORAGE = (aten.as_strided.default, aten._reshape_alias.default)
"""Views whose arguments speak of the storage below the tensor."""


class Step(NamedTuple):
    """An operator that gives a view, or several, of which one is meant."""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    place: int | None = None

    def of(self, values: Tensor) -> Tensor:
        found = self.func(values, *self.args, **self.kwargs)
        chosen: Tensor = found if self.place is None else found[self.place]
        return chosen


class View:
    """The way from a map to a view of it: places of the map, then operators.

    A view stays one. Until the map is made nothing can have been written, so what is read of the view is made alone and
    handed out to operators that keep no hold of it; from then on the view is one of the map's memory.

    Attributes:
        layout: how the view lies in the map's memory.
        rows: what was made of its places alone.
    """

    __slots__ = ("layout", "region", "rows", "steps")

    def __init__(self, layout: Layout, region: Region, steps: tuple[Step, ...] = ()) -> None:
        self.layout, self.region, self.steps = layout, region, steps
        self.rows: Tensor | None = None

    @classmethod
    def whole(cls, layout: Layout) -> View:
        """All of a map."""
        return cls(layout, Region.whole(layout.sizes))

    def cut(self, cut: Axis) -> View:
        """Some places of an axis."""
        return View(self.layout.cut(cut), self.region.cut(cut))

    def then(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> View | list[View]:
        """The view or views that an operator makes of this one; raises what it would raise."""
        if not self.steps and not kwargs:
            cut = read_cut(func, args, self.layout.sizes)
            if cut is not None:
                return self.cut(cut)
        found = func(self.layout.blank(), *args, **kwargs)
        if isinstance(found, Tensor):
            return View(Layout.of(found), self.region, (*self.steps, Step(func, args, kwargs)))
        if not self.steps and func is aten.unbind.int:
            dim = args[0] % len(self.layout.sizes) if args else 0
            return [self.cut(Axis(dim, range(place, place + 1), False)) for place in range(len(found))]
        steps = [Step(func, args, kwargs, place) for place in range(len(found))]
        return [View(Layout.of(one), self.region, (*self.steps, step)) for one, step in zip(found, steps)]

    def of(self, cell: Cell) -> Tensor:
        """The view of the map, which is made for it."""
        return self.follow(self.region.of(cell.values()))

    def read(self, cell: Cell) -> Tensor:
        """The values for operators that neither write them nor give a view of them."""
        rows = self.rows  # which another thread may let go
        if cell.made is None and rows is None:
            self.rows = rows = cell.part(self.region)
        if cell.made is not None or rows is None:
            self.rows = None
            return self.of(cell)
        return self.follow(rows)

    def copy(self, cell: Cell) -> Tensor | None:
        """The values as a tensor of their own, which nothing here keeps; ``None`` where a copy has to be made."""
        return None if self.steps or self.rows is not None else cell.part(self.region)

    def follow(self, values: Tensor) -> Tensor:
        """What the operators make of the values of the places."""
        for step in self.steps:
            values = step.of(values)
        return values


def is_view(func: Any) -> bool:
    """Whether an operator gives a view of its first argument that sizes and strides determine."""
    return bool(func.is_view) and func not in BY_STORAGE


def is_all(func: Any, tensor: Any, args: Any) -> bool:
    """A view of all of a tensor as it is: a hook's, or the ``:`` of an index, by which torch 2.8 slices."""
    if func in ALIASES:
        return True
    if func is aten.view.default:
        return list(args[0]) == list(tensor.shape) and (tensor.way is None or tensor.is_contiguous())
    if func is not SLICE or len(args) < 3:
        return False
    start, end, step = (*args[1:], 1)[:3]
    return start == 0 and step == 1 and end is not None and end >= tensor.shape[args[0]]

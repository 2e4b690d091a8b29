"""Views of a tensor whose values were not made: what is read of one is made alone."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .cell import Cell
from .regions import Layout, Region

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
        rows: what was made of it alone.
    """

    __slots__ = ("layout", "map", "region", "rows", "steps")

    def __init__(self, layout: Layout, region: Region, steps: tuple[Step, ...], of: Layout) -> None:
        self.layout, self.region, self.steps, self.map = layout, region, steps, of
        self.rows: Tensor | None = None

    @classmethod
    def whole(cls, layout: Layout) -> View:
        """All of a map."""
        return cls(layout, Region.whole(layout.sizes), (), layout)

    def cut(self, region: Region) -> View:
        """Some places of the map."""
        return View(self.map.cut(region), region, (), self.map)

    def then(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> View | list[View]:
        """The view or views that an operator makes of this one; raises what it would raise."""
        if not self.steps and not kwargs:
            region = self.region.after(func, args)
            if region is not None:
                return self.cut(region)
        found = func(self.layout.blank(), *args, **kwargs)
        if isinstance(found, Tensor):
            return View(Layout.of(found), self.region, (*self.steps, Step(func, args, kwargs)), self.map)
        if not self.steps and func is aten.unbind.int:
            dim = args[0] if args else 0
            return [self.cut(self.region.select(dim, place)) for place in range(len(found))]
        steps = [Step(func, args, kwargs, place) for place in range(len(found))]
        return [View(Layout.of(one), self.region, (*self.steps, step), self.map) for one, step in zip(found, steps)]

    def of(self, cell: Cell) -> Tensor:
        """The view of the map, which is made for it."""
        return self.follow(self.region.of(cell.values()))

    def read(self, cell: Cell) -> Tensor:
        """The values for operators that neither write them nor give a view of them."""
        if cell.made is None and self.rows is None:
            self.rows = cell.part(self.region)
        if cell.made is not None or self.rows is None:
            self.rows = None
            return self.of(cell)
        return self.follow(self.region.alone(self.rows))

    def follow(self, values: Tensor) -> Tensor:
        """What the operators make of the values of the places."""
        for step in self.steps:
            values = step.of(values)
        return values


def is_view(func: Any) -> bool:
    """Whether an operator gives a view of its first argument that sizes and strides determine."""
    return bool(func.is_view) and func not in BY_STORAGE

"""Where the values of a deferred tensor lie: nowhere yet, in its own storage, or lent to a compiler."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._guards import TracingContext

from .regions import Layout


def make_blank(cls: type[Tensor], layout: Layout, device: torch.device) -> Any:
    """A tensor of a class without memory."""
    made: Any = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
        cls, layout.sizes, layout.strides, layout.offset, dtype=layout.dtype, device=device
    )
    made.cell = made.way = made.foreign = None
    return made


def fill(tensor: Any) -> None:
    """Compute the values, if that is still to do, and take back what was lent, into the tensor's own storage."""
    cell, foreign = tensor.cell, tensor.foreign
    if cell is not None:
        values = cell.values() if tensor.way is None else tensor.way.of(cell)
        with cell.lock:
            if tensor.cell is not None:
                put(tensor, values)
                tensor.cell = tensor.way = None
    elif type(foreign) is Tensor and TracingContext.try_get() is None:
        put(tensor, foreign)
        tensor.foreign = None


def lend(tensor: Any) -> None:
    """Keep the values in a tensor beside this one: a compiler wants the two to have storages of their own."""
    if tensor.foreign is None:
        values = values_of(tensor)
        put(tensor, make_blank(type(tensor), Layout.of(values), values.device))
        torch._C._set_throw_on_mutable_data_ptr(tensor)
        tensor.foreign = values


def put(tensor: Any, values: Tensor) -> None:
    """Give a tensor the memory and the sizes of ordinary values."""
    with torch._C._DisableTorchDispatch():
        Tensor.data.__set__(tensor, values)  # type: ignore[attr-defined]


def values_of(tensor: Any) -> Tensor:
    """The values as an ordinary tensor over the same memory, outside autograd."""
    fill(tensor)
    if tensor.foreign is not None:
        lent: Tensor = tensor.foreign
        return lent
    with torch._C._DisableTorchDispatch(), torch.no_grad():
        values: Tensor = torch.ops.aten.alias.default(tensor)
    return values.detach()  # a view would lead a compiler back to the tensor


def read_values(tensor: Any) -> Tensor:
    """The values for an operator that neither writes them nor gives a view of them: those of a view alone."""
    cell, view = tensor.cell, tensor.way
    return values_of(tensor) if cell is None or view is None else view.read(cell)


def as_ordinary(tensor: Any) -> Tensor:
    """The tensor or parameter that would stand in its place had it never been deferred."""
    values = values_of(tensor)
    if getattr(tensor, "_is_param", False):
        return nn.Parameter(values, tensor.requires_grad)
    return values.requires_grad_(tensor.requires_grad)

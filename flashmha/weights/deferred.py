"""A tensor whose values are computed on first use.

Until then it has no memory: whatever reads it through PyTorch computes the values first, and code that reaches for
the memory itself, behind PyTorch, gets an error, but for ``other.data = unread``, which nothing can intercept: give it
``unread.detach()``. From then on it is a tensor with a storage like any other.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch._guards import TracingContext
from torch.utils._pytree import tree_leaves, tree_map_only

from .cell import Cell


class Deferred(Tensor):
    """A tensor that computes its values on first use, once; shape, dtype, device and ``requires_grad`` are free.

    Every operator reads it as an ordinary tensor, and so do printing, pickling, copying, NumPy, DLPack, storages and
    ``data``. The views that hooks of modules take share the values and compute nothing. A C++ or CUDA extension that
    takes the address of an unread tensor gets PyTorch's error for tensors without memory: read it first.
    """

    cell: Cell | None
    """``None`` once the values are in the tensor's own storage."""
    foreign: Tensor | None
    """The values while they lie in another tensor: those of a tracer, and those that are lent to a compiler."""

    @staticmethod
    def __new__(cls, cell: Cell, shape: torch.Size | tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Any:
        made = make_blank(cls, shape, dtype, device)
        made.cell = cell
        torch._C._set_throw_on_mutable_data_ptr(made)
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    __dlpack_c_exchange_api__ = None  # which reads the memory behind ``__dlpack__``
    __c_dlpack_exchange_api__ = None

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else None
        if type(first) is Deferred and first.cell is not None and is_all(func, first, args):
            return Deferred(first.cell, first.shape, first.dtype, first.device)
        if type(first) is Deferred and first.cell is not None:
            if func in REDUCTIONS:
                found = reduce_unread(func, first, args[1:], kwargs)
            else:
                found = take_unread(first, *args[1:]) if func in (INDEX, INDEX_SELECT) else None
            if found is not None:
                return found
        mine = [x for x in tree_leaves((args, kwargs)) if type(x) is Deferred]
        for x in mine:
            fill(x)
        if any(kind is not Deferred for kind in types) or any(x.foreign is not None for x in mine):
            plain_args, plain_kwargs = tree_map_only(Deferred, values_of, (args, kwargs))
            result = func(*plain_args, **plain_kwargs)
            return first if type(first) is Deferred and result is plain_args[0] else result  # changed in place
        with torch._C._DisableTorchDispatch():
            return func(*args, **kwargs)

    @property
    def plain(self) -> Tensor:
        """The values as an ordinary tensor over the same memory, outside autograd."""
        return values_of(self)

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        fill(self)
        found: Tensor = Tensor.data.__get__(self)  # type: ignore[attr-defined]
        return found

    @data.setter
    def data(self, values: Tensor) -> None:
        values = values_of(values) if isinstance(values, Deferred) else values
        put(self, values)
        self.cell = None

    def detach(self) -> Tensor:
        """The values without a graph, in the same class, as ``nn.Parameter`` wants it."""
        return wrap(values_of(self))

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        lend(self)
        return ["plain"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], context: None, size: Any, stride: Any) -> Tensor:
        return wrap(inner["plain"])

    def _stable_hash_for_caching(self) -> str:
        return f"{tuple(self.shape)} {self.dtype} {self.device}"  # what compiled code may depend on

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return repr(self.clone())

    def __reduce_ex__(self, protocol: Any) -> Any:
        return as_ordinary(self).__reduce_ex__(protocol)

    def __deepcopy__(self, memo: Any) -> Tensor:
        copied: Tensor = copy.deepcopy(as_ordinary(self) if self.is_leaf else self.clone(), memo)
        return copied

    def numpy(self, *, force: bool = False) -> Any:
        return (self.clone() if self.requires_grad else values_of(self)).numpy(force=force)

    def tolist(self) -> Any:
        return values_of(self).tolist()

    def apply_(self, function: Any) -> Tensor:
        fill(self)
        return super().apply_(function)

    def map_(self, other: Tensor, function: Any) -> Tensor:
        fill(self)
        return super().map_(other, function)

    def map2_(self, one: Tensor, two: Tensor, function: Any) -> Tensor:
        fill(self)
        return super().map2_(one, two, function)  # type: ignore[misc, no-any-return]

    def data_ptr(self) -> int:
        return values_of(self).data_ptr()

    def const_data_ptr(self) -> int:
        found: int = values_of(self).const_data_ptr()  # type: ignore[attr-defined]
        return found

    def as_subclass(self, cls: Any) -> Any:
        return torch.ops.aten.alias.default(self).as_subclass(cls)

    def untyped_storage(self) -> torch.UntypedStorage:
        fill(self)
        return super().untyped_storage()

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        found: dict[str, Any] = (self.clone() if self.requires_grad else values_of(self)).__cuda_array_interface__
        return found

    def __dlpack__(self, **options: Any) -> Any:
        return (self.clone() if self.requires_grad else values_of(self)).__dlpack__(**options)


VIEW = torch.ops.aten.view.default
"""The alias that a hook on the outputs of a module takes."""


aten = torch.ops.aten


def is_all(func: Any, tensor: Deferred, args: Any) -> bool:
    """A view of all of a tensor as it is: a hook's, or the ``:`` of an index, by which torch 2.8 slices."""
    if func is VIEW:
        return list(args[1]) == list(tensor.shape)
    if func is not aten.slice.Tensor or len(args) < 4:
        return False
    start, end, step = (*args[2:], 1)[:3]
    return start == 0 and step == 1 and end is not None and end >= tensor.shape[args[1]]


REDUCTIONS = {
    aten.sum.default: "sum",
    aten.sum.dim_IntList: "sum",
    aten.mean.default: "sum",
    aten.mean.dim: "sum",
    aten.amax.default: "amax",
    aten.max.default: "amax",
}
"""What is computed of values that are not there without making them."""


def reduce_unread(func: Any, tensor: Deferred, args: Any, kwargs: Any) -> Tensor | None:
    """A reduction of values that were not made; ``None`` where they are there, or wanted for it.

    The gradient of a largest value looks for that value among all, bit by bit, so it wants them.
    """
    kind, cell = REDUCTIONS[func], tensor.cell
    wanted = (kind == "amax" and tensor.requires_grad) or TracingContext.try_get() is not None
    if cell is None or cell.made is not None or wanted or not tensor.numel():
        return None
    like = func(torch.empty(tensor.shape, dtype=tensor.dtype, device="meta"), *args, **kwargs)  # errors, shape, dtype
    if not like.is_floating_point():
        return None
    dims = (args[0] if args else kwargs.get("dim")) or range(tensor.dim())
    axes = sorted({axis % tensor.dim() for axis in dims})
    found = cell.look("reduce", kind, axes)
    if found is None:
        return None
    if func in (aten.mean.default, aten.mean.dim):
        found = found / math.prod(tensor.shape[axis] for axis in axes)
    return found.reshape(like.shape).to(like.dtype)


INDEX, INDEX_SELECT = aten.index.Tensor, aten.index_select.default


def take_unread(tensor: Deferred, dim: Any, index: Tensor | None = None) -> Tensor | None:
    """Some places of an axis of values that were not made, which is a copy; ``None`` where the values are wanted.

    Of ``tensor[:, [2, 5]]`` (``dim`` is a list of tensors then) or ``tensor.index_select(1, index)``.
    """
    from_end = index is None  # ``index_select`` counts from the first place alone
    if index is None:
        given = [(axis, one) for axis, one in enumerate(dim) if one is not None]
        if len(given) != 1:
            return None
        dim, index = given[0]
    cell = tensor.cell
    plain = type(index) is Tensor and index.dtype == torch.int64 and index.dim() == 1
    if cell is None or cell.made is not None or not plain or not tensor.numel() or TracingContext.try_get() is not None:
        return None
    size = tensor.shape[dim]
    places = index.tolist()
    least = -size if from_end else 0
    if not all(least <= place < size for place in places) or len(places) > size:
        return None  # whose error is PyTorch's
    return cell.look("take", dim % tensor.dim(), [place % size for place in places])


def make_blank(cls: type[Tensor], shape: torch.Size | tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Any:
    """A tensor of a class without memory."""
    made: Any = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)  # type: ignore[attr-defined]
    made.cell = made.foreign = None
    return made


def wrap(values: Tensor) -> Deferred:
    """A deferred tensor whose values are there."""
    made: Deferred = make_blank(Deferred, values.shape, values.dtype, values.device)
    if type(values) is Tensor:
        put(made, values)
    else:
        made.foreign = values
    return made


def fill(tensor: Deferred) -> None:
    """Compute the values, if that is still to do, and take back what was lent, into the tensor's own storage."""
    cell, foreign = tensor.cell, tensor.foreign
    if cell is not None:
        values = cell.values()
        with cell.lock:
            if tensor.cell is not None:
                put(tensor, values)
                tensor.cell = None
    elif type(foreign) is Tensor and TracingContext.try_get() is None:
        put(tensor, foreign)
        tensor.foreign = None


def lend(tensor: Deferred) -> None:
    """Keep the values in a tensor beside this one: a compiler wants the two to have storages of their own."""
    if tensor.foreign is None:
        values = values_of(tensor)
        put(tensor, make_blank(Deferred, values.shape, values.dtype, values.device))
        torch._C._set_throw_on_mutable_data_ptr(tensor)
        tensor.foreign = values


def put(tensor: Deferred, values: Tensor) -> None:
    """Give a tensor the memory and the sizes of ordinary values."""
    with torch._C._DisableTorchDispatch():
        Tensor.data.__set__(tensor, values)  # type: ignore[attr-defined]


def values_of(tensor: Deferred) -> Tensor:
    """The values as an ordinary tensor over the same memory, outside autograd."""
    fill(tensor)
    if tensor.foreign is not None:
        return tensor.foreign
    with torch._C._DisableTorchDispatch(), torch.no_grad():
        values: Tensor = torch.ops.aten.alias.default(tensor)
    return values.detach()  # a view would lead a compiler back to the tensor


def as_ordinary(tensor: Deferred) -> Tensor:
    """The tensor or parameter that would stand in its place had it never been deferred."""
    values = values_of(tensor)
    if getattr(tensor, "_is_param", False):
        return nn.Parameter(values, tensor.requires_grad)
    return values.requires_grad_(tensor.requires_grad)

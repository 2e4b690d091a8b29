"""A tensor whose values are computed on first use.

Until then it has no memory: whatever reads it through PyTorch computes the values first, and code that reaches for
the memory itself, behind PyTorch, gets an error, but for ``other.data = unread``, which nothing can intercept: give it
``unread.clone()``. From then on it is a tensor with a storage like any other.

Views of it wait as well (``View``). What is read of one is computed alone; a write into one, and whatever wants its
memory, computes all, of which it is a view then.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._guards import TracingContext
from torch.utils._pytree import tree_leaves, tree_map_only

from ..host.torch_state import is_batched
from .cell import Cell, Source, note_unread
from .patches import Patches
from .picks import find_list, find_picked, pick_places
from .regions import Layout
from .storage import as_ordinary, fill, lend, make_blank, put_values, read_values, values_of
from .views import View, is_all, is_view


def sparing(name: str) -> Callable[..., Any]:
    """A method of tensors whose gradient, of a map that was not read, is no map of zeros around what was asked for."""
    method = getattr(Tensor, name)

    @functools.wraps(method)
    def call(tensor: Deferred, *args: Any, **kwargs: Any) -> Any:
        return spare(tensor, method(tensor, *args, **kwargs))

    return call


def spare(tensor: Deferred, found: Tensor) -> Tensor:
    """What was read of a tensor, whose gradient comes as patches where the tensor was not read."""
    if tensor.requires_grad and tensor.cell is not None and found.grad_fn is not None:
        found.grad_fn.register_prehook(thin)
    return found


def thin(grads: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...] | None:
    """The gradient of a part of a map as patches of that of the map."""
    (grad,) = grads
    if type(grad) is not Tensor or torch.is_grad_enabled() or is_batched(grad):
        return None
    return (defer(Patches.of(grad)),)


class Deferred(Tensor):
    """A tensor that computes its values on first use, once; shape, dtype, device and ``requires_grad`` are free.

    Every operator reads it as an ordinary tensor, and so do printing, pickling, copying, NumPy, DLPack, storages and
    ``data``. Its views share the values and compute nothing. A C++ or CUDA extension that
    takes the address of an unread tensor gets PyTorch's error for tensors without memory: read it first.
    """

    cell: Cell | None
    """``None`` once the values are in the tensor's own storage."""
    way: View | None
    """What part of the cell's values the tensor is; ``None`` for all as they are."""
    foreign: Tensor | None
    """The values while they lie in another tensor: those of a tracer, and those that are lent to a compiler."""

    @staticmethod
    def __new__(cls, cell: Cell, layout: Layout, view: View | None = None) -> Any:
        """The values of a cell, or a view of them."""
        made = make_blank(cls, layout, cell.device)
        made.cell, made.way = cell, view
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
        if type(first) is Deferred and first.cell is not None:
            found = look(first, func, args[1:], kwargs)
            if found is not None:
                return found
        mine = [x for x in tree_leaves((args, kwargs)) if type(x) is Deferred]
        held = mine if is_view(func) or func in SHARING else find_written(func, args, kwargs)
        for x in mine:
            if x.way is None or any(x is other for other in held):
                fill(x)
        if any(kind is not Deferred for kind in types) or any(
            x.foreign is not None or x.cell is not None for x in mine
        ):
            plain_args, plain_kwargs = tree_map_only(Deferred, read_values, (args, kwargs))
            result = func(*plain_args, **plain_kwargs)
            return first if type(first) is Deferred and result is plain_args[0] else result  # changed in place
        with torch._C._DisableTorchDispatch():
            return func(*args, **kwargs)

    select, narrow, sum, mean = map(sparing, ("select", "narrow", "sum", "mean"))  # type: ignore[assignment]

    def __getitem__(self, index: Any) -> Tensor:
        parts = index if type(index) is tuple else (index,)
        for part in parts:
            if type(part) in LISTS:
                dim, places = find_list(parts) if is_unread(self) else (0, None)
                found = None if places is None else pick_places(self, dim, places, from_end=True)
                if found is not None:
                    return found
                break
        return spare(self, super().__getitem__(index))

    def index_select(self, dim: Any, index: Tensor) -> Tensor:  # type: ignore[override]
        places = find_picked(index) if is_unread(self) else None
        found = None if places is None else pick_places(self, dim, places, from_end=False)
        return super().index_select(dim, index) if found is None else found

    @property
    def source(self) -> Source | None:
        """What would make the values, where they are not there and the tensor is all of them."""
        return self.cell.source if self.cell is not None and self.way is None else None

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
        put_values(self, values)
        self.cell = None

    def detach(self) -> Tensor:
        """The values without a graph, in the same class, as ``nn.Parameter`` wants it."""
        return super().detach() if is_unread(self) else wrap(values_of(self))

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
        return read_values(self).tolist()

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
        fill(self)
        return aten.alias.default(self).as_subclass(cls)

    def untyped_storage(self) -> torch.UntypedStorage:
        fill(self)
        return super().untyped_storage()

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        found: dict[str, Any] = (self.clone() if self.requires_grad else values_of(self)).__cuda_array_interface__
        return found

    def __dlpack__(self, **options: Any) -> Any:
        return (self.clone() if self.requires_grad else values_of(self)).__dlpack__(**options)


aten = torch.ops.aten
CLONE, INDEX, INDEX_SELECT = aten.clone.default, aten.index.Tensor, aten.index_select.default
LISTS = (list, Tensor)
"""Kinds of indices that may name places one by one."""
SHARING = (aten.set_.source_Tensor, aten.set_.source_Tensor_storage_offset)
"""Operators that give one tensor the memory of another."""


def is_unread(tensor: Deferred) -> bool:
    """The values were not computed, and no compiler records what is read of them."""
    return tensor.cell is not None and tensor.cell.made is None and TracingContext.try_get() is None


def look(tensor: Deferred, func: Any, args: Any, kwargs: Any) -> Any:
    """What an operator makes of a tensor whose values are not there; ``None`` where it has to have them."""
    cell, view = tensor.cell, tensor.way
    assert cell is not None
    if is_all(func, tensor, args):
        return Deferred(cell, Layout.of(tensor), view)
    if not is_unread(tensor):
        return None
    if func in COMPARING and tensor.requires_grad:
        fill(tensor)
        return None
    source = cell.source
    if source is not None and func in source.answers and not (view is not None and view.steps):
        whole = View.whole(Layout.of(tensor)) if view is None else view
        found = cell.ask(func, whole.layout, whole.region, args, kwargs)
        if found is not None:
            return found if isinstance(found, Tensor) else defer(found)
    if is_view(func):
        views = (View.whole(Layout.of(tensor)) if view is None else view).then(func, args, kwargs)
        if isinstance(views, list):
            return [Deferred(cell, one.layout, one) for one in views]
        return Deferred(cell, views.layout, views)
    if func is CLONE and view is not None and not kwargs:
        copied = view.copy(cell)
        if copied is not None:
            return copied
    if func in (INDEX, INDEX_SELECT):
        if func is INDEX:
            dim, places = find_list([slice(None) if one is None else one for one in args[0]])
        else:
            dim, places = args[0], find_picked(args[1])
        return (
            None if places is None else pick_places(Deferred(cell, Layout.of(tensor), view), dim, places, func is INDEX)
        )
    if view is None or func._schema.is_mutable or any(isinstance(x, LEADING) for x in (*args, *kwargs.values())):
        return None
    return func(view.read(cell), *args, **kwargs)


COMPARING = (
    *(aten.amax.default, aten.amin.default, aten.aminmax.default, aten.max.default, aten.min.default),
    *(aten.median.default, aten.nanmedian.default, aten.linalg_vector_norm.default, aten.norm.Scalar),
)
"""Operators whose gradient looks for their result among the values, bit by bit: those have to stay the same."""
LEADING = (Tensor, list, tuple)
"""Kinds of arguments that are, or may hold, tensors."""


def find_written(func: Any, args: Any, kwargs: Any) -> list[Any]:
    """The tensors that an operator writes."""
    if not func._schema.is_mutable:
        return []
    given = [*zip(func._schema.arguments, args), *((a, kwargs.get(a.name)) for a in func._schema.arguments)]
    return tree_leaves([value for argument, value in given if argument.is_write])


def defer(source: Source) -> Deferred:
    """A tensor whose values a source makes when they are read."""
    cell = Cell(source)
    made: Deferred = Deferred(cell, Layout.contiguous(source.shape, source.dtype))
    note_unread(cell)
    return made


def wrap(values: Tensor) -> Deferred:
    """A deferred tensor whose values are there."""
    made: Deferred = make_blank(Deferred, Layout.of(values), values.device)
    if type(values) is Tensor:
        put_values(made, values)
    else:
        made.foreign = values
    return made

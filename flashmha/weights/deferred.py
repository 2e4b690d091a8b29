"""A tensor whose values are computed on first use.

Until then it has no memory: whatever reads it through PyTorch computes the values first, and code that reaches for
the memory itself, behind PyTorch, gets an error, but for ``other.data = unread``, which nothing can intercept: give it
``unread.detach()``. From then on it is a tensor with a storage like any other.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._guards import TracingContext
from torch.utils._pytree import tree_leaves, tree_map_only

from ..host.torch_state import is_inference, is_stream_capturing


class Cell:
    """The values that a deferred tensor and its aliases share: how they are made, and they themselves once they are.

    ``cost`` is how many bytes the cell holds until then beyond those of the values.
    """

    __slots__ = ("__weakref__", "cost", "inference", "lock", "made", "make", "process", "stream")

    def __init__(self, make: Callable[[], Tensor], device: torch.device, cost: int = 0) -> None:
        self.make: Callable[[], Tensor] | None = make
        self.made: Tensor | None = None
        self.cost = cost
        self.inference = is_inference()
        self.process, self.lock = os.getpid(), threading.RLock()
        self.stream = torch._C._cuda_getCurrentStream(device.index) if device.type == "cuda" else None

    def values(self) -> Tensor:
        """The values, outside autograd; several threads get one tensor."""
        forked = self.process != os.getpid()
        if forked:  # a lock that another thread held at the fork stays locked
            self.process, self.lock = os.getpid(), threading.RLock()
        with self.lock:
            if self.made is None:
                assert self.make is not None
                with torch.inference_mode(self.inference), torch.no_grad(), one_thread() if forked else on(self.stream):
                    self.made = self.make()
                self.make = None  # and with it everything it holds
                if self.stream is not None:
                    self.made.record_stream(torch.cuda.current_stream(self.made.device))
            return self.made


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Compute in a forked process, where the parent's worker threads do not exist and waiting for them never ends."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextlib.contextmanager
def on(stream: tuple[int, int, int] | None) -> Iterator[None]:
    """Run on the stream that made the inputs, and let the current one wait for the result."""
    if stream is None or stream == torch._C._cuda_getCurrentStream(stream[1]):
        yield
        return
    identity, index, kind = stream
    maker = torch.cuda.Stream(stream_id=identity, device_index=index, device_type=kind)
    with torch.cuda.stream(maker):
        yield
    torch.cuda.current_stream(index).wait_stream(maker)


KEPT = 4
"""How many unread tensors may hold more than their values would. A model's blocks drop theirs before the next ones."""
unread: collections.deque[weakref.ref[Cell]] = collections.deque()
"""The cells of the latest of them."""


def expect_look(cell: Cell) -> None:
    """Compute the oldest unread values that cost more memory unread, once there are more than ``KEPT``.

    Who keeps maps pays for their values, and not for what they are made of.
    """
    if cell.cost <= 0:
        return
    unread.append(weakref.ref(cell))
    while len(unread) > KEPT:
        try:
            oldest = unread.popleft()()
        except IndexError:  # another thread took it
            return
        if oldest is None or oldest.made is not None:
            continue
        if oldest.stream is not None and is_stream_capturing():
            continue  # a graph would hold the kernels
        with contextlib.suppress(torch.OutOfMemoryError):  # a later look says so
            oldest.values()


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
        made = blank(cls, shape, dtype, device)
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
        if func is VIEW and type(first) is Deferred and first.cell is not None and list(args[1]) == list(first.shape):
            return Deferred(first.cell, first.shape, first.dtype, first.device)
        mine = [x for x in tree_leaves((args, kwargs)) if type(x) is Deferred]
        for x in mine:
            fill(x)
        if any(kind is not Deferred for kind in types) or any(x.foreign is not None for x in mine):
            plain_args, plain_kwargs = tree_map_only(Deferred, plain, (args, kwargs))
            result = func(*plain_args, **plain_kwargs)
            return first if type(first) is Deferred and result is plain_args[0] else result  # changed in place
        with torch._C._DisableTorchDispatch():
            return func(*args, **kwargs)

    @property
    def plain(self) -> Tensor:
        """The values as an ordinary tensor over the same memory, outside autograd."""
        return plain(self)

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        fill(self)
        found: Tensor = Tensor.data.__get__(self)  # type: ignore[attr-defined]
        return found

    @data.setter
    def data(self, values: Tensor) -> None:
        values = plain(values) if isinstance(values, Deferred) else values
        put(self, values)
        self.cell = None

    def detach(self) -> Tensor:
        """The values without a graph, in the same class, as ``nn.Parameter`` wants it."""
        return filled(plain(self))

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        lend(self)
        return ["plain"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], context: None, size: Any, stride: Any) -> Tensor:
        return filled(inner["plain"])

    def _stable_hash_for_caching(self) -> str:
        return f"{tuple(self.shape)} {self.dtype} {self.device}"  # what compiled code may depend on

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return repr(self.clone())

    def __reduce_ex__(self, protocol: Any) -> Any:
        return ordinary(self).__reduce_ex__(protocol)

    def __deepcopy__(self, memo: Any) -> Tensor:
        copied: Tensor = copy.deepcopy(ordinary(self) if self.is_leaf else self.clone(), memo)
        return copied

    def numpy(self, *, force: bool = False) -> Any:
        return (self.clone() if self.requires_grad else plain(self)).numpy(force=force)

    def tolist(self) -> Any:
        return plain(self).tolist()

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
        return plain(self).data_ptr()

    def const_data_ptr(self) -> int:
        found: int = plain(self).const_data_ptr()  # type: ignore[attr-defined]
        return found

    def as_subclass(self, cls: Any) -> Any:
        return torch.ops.aten.alias.default(self).as_subclass(cls)

    def untyped_storage(self) -> torch.UntypedStorage:
        fill(self)
        return super().untyped_storage()

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        found: dict[str, Any] = (self.clone() if self.requires_grad else plain(self)).__cuda_array_interface__
        return found

    def __dlpack__(self, **options: Any) -> Any:
        return (self.clone() if self.requires_grad else plain(self)).__dlpack__(**options)


VIEW = torch.ops.aten.view.default
"""The alias that a hook on the outputs of a module takes."""


def blank(cls: type[Tensor], shape: torch.Size | tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Any:
    """A tensor of a class without memory."""
    made: Any = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)  # type: ignore[attr-defined]
    made.cell = made.foreign = None
    return made


def filled(values: Tensor) -> Deferred:
    """A deferred tensor whose values are there."""
    made: Deferred = blank(Deferred, values.shape, values.dtype, values.device)
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
        values = plain(tensor)
        put(tensor, blank(Deferred, values.shape, values.dtype, values.device))
        torch._C._set_throw_on_mutable_data_ptr(tensor)
        tensor.foreign = values


def put(tensor: Deferred, values: Tensor) -> None:
    """Give a tensor the memory and the sizes of ordinary values."""
    with torch._C._DisableTorchDispatch():
        Tensor.data.__set__(tensor, values)  # type: ignore[attr-defined]


def plain(tensor: Deferred) -> Tensor:
    """The values as an ordinary tensor over the same memory, outside autograd."""
    fill(tensor)
    if tensor.foreign is not None:
        return tensor.foreign
    with torch._C._DisableTorchDispatch(), torch.no_grad():
        values: Tensor = torch.ops.aten.alias.default(tensor)
    return values.detach()  # a view would lead a compiler back to the tensor


def ordinary(tensor: Deferred) -> Tensor:
    """What would stand in its place had it never been deferred: a tensor or a parameter."""
    values = plain(tensor)
    if getattr(tensor, "_is_param", False):
        return nn.Parameter(values, tensor.requires_grad)
    return values.requires_grad_(tensor.requires_grad)

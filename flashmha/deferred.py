"""A tensor whose values are computed when somebody first looks at them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only


class Cell:
    """The values of a deferred tensor: how they are made, and they themselves once they are."""

    __slots__ = ("made", "make")

    def __init__(self, make: Callable[[], Tensor]) -> None:
        self.make: Callable[[], Tensor] | None = make
        self.made: Tensor | None = None

    def values(self) -> Tensor:
        if self.made is None:
            assert self.make is not None
            with torch.no_grad():
                self.made = self.make()
            self.make = None  # and with it everything it holds
        return self.made


class Deferred(Tensor):
    """A tensor that computes its values on first use, once; shape, dtype, device and ``requires_grad`` are free.

    Every operator sees an ordinary tensor; so do printing, pickling, copying and NumPy. Aliases (``detach``, the
    views that hooks take) share the values and compute nothing.
    """

    cell: Cell

    @staticmethod
    def __new__(cls, cell: Cell, shape: torch.Size | tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Any:
        made: Any = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)  # type: ignore[attr-defined]
        made.cell = cell
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        first = args[0] if args else None
        if isinstance(first, Deferred) and (
            func in ALIASES or (func is torch.ops.aten.view.default and list(args[1]) == list(first.shape))
        ):
            return Deferred(first.cell, first.shape, first.dtype, first.device)
        plain_args, plain_kwargs = tree_map_only(Deferred, values, (args, kwargs or {}))
        result = func(*plain_args, **plain_kwargs)
        if isinstance(first, Deferred) and result is plain_args[0]:
            return first  # changed in place
        return result

    @property
    def plain(self) -> Tensor:
        """The values as an ordinary tensor, outside autograd."""
        return self.cell.values()

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["plain"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], context: None, size: Any, stride: Any) -> Tensor:
        values = inner["plain"]
        made: Tensor = Deferred(Cell(lambda: values), size, values.dtype, values.device)
        return made

    def _stable_hash_for_caching(self) -> str:
        return f"{tuple(self.shape)} {self.dtype} {self.device}"  # what compiled code may depend on

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return repr(self.clone())

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.plain.detach().requires_grad_(self.requires_grad).__reduce_ex__(protocol)

    def __deepcopy__(self, memo: Any) -> Tensor:
        copied: Tensor = copy.deepcopy(self.clone(), memo)
        return copied

    def numpy(self, *, force: bool = False) -> Any:
        return (self.clone() if self.requires_grad else self.plain).numpy(force=force)

    def tolist(self) -> Any:
        return self.plain.tolist()

    def data_ptr(self) -> int:
        return self.plain.data_ptr()

    def __dlpack__(self, **options: Any) -> Any:
        return self.clone().__dlpack__(**options)


ALIASES = (torch.ops.aten.detach.default, torch.ops.aten.alias.default)


def values(tensor: Deferred) -> Tensor:
    return tensor.plain

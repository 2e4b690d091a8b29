"""What flash-attn 4 calls its kernels with, watched and compared."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from torch import Tensor

LaunchArguments = tuple[Any, ...]


class Watched:
    """A cache of compiled kernels that lists what its thread calls."""

    calls: list[tuple[Callable[..., Any], LaunchArguments]]

    def __init__(self, own: Any) -> None:
        self.own, self.thread = own, threading.get_ident()

    def __contains__(self, key: Any) -> bool:
        return key in self.own

    def __setitem__(self, key: Any, kernel: Any) -> None:
        self.own[key] = kernel

    def __getattr__(self, name: str) -> Any:
        return getattr(self.own, name)

    def __getitem__(self, key: Any) -> Callable[..., Any]:
        kernel: Callable[..., Any] = self.own[key]
        if threading.get_ident() != self.thread:
            return kernel

        def call(*arguments: Any) -> Any:
            self.calls.append((kernel, arguments))
            return kernel(*arguments)

        return call


def is_same(mine: Any, theirs: Any, places: dict[int, int]) -> bool:
    """Two arguments are the same; two workspaces wherever each of them is one throughout."""
    if isinstance(mine, Tensor):
        if not isinstance(theirs, Tensor) or mine.dtype != theirs.dtype:
            return False
        if mine.shape != theirs.shape or mine.stride() != theirs.stride():
            return False
        place = theirs.data_ptr()
        return (places.setdefault(id(mine), place) if mine.is_meta else mine.data_ptr()) == place
    if isinstance(mine, (tuple, list)):
        if type(mine) is not type(theirs) or len(mine) != len(theirs):
            return False
        return all(is_same(one, other, places) for one, other in zip(mine, theirs))
    return type(mine) is type(theirs) and bool(mine == theirs)

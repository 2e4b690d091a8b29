"""Tensors as the kernels of flash-attn 4 take them, and the workspaces of its backward."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from .flash4_watch import LaunchArguments

POINTER_ALIGNMENT = 16
"""Bytes that the kernels load at once: pointers and strides are multiples of it, or the package makes a copy."""


class Tile(NamedTuple):
    """Queries and keys of a backward's tile, and what head dims are rounded up to in its sums."""

    queries: int
    keys: int
    width: int


def detached(x: Any) -> Any:
    """A tensor without its graph, which kernels refuse."""
    return x.detach() if x is not None and x.requires_grad else x


def is_taken_as_it_is(x: Tensor) -> bool:
    """The package hands a tensor of half precision to its kernels as it is, and no two of its rows lie in one place."""
    strides = x.stride()
    if 0 in strides or x.data_ptr() % POINTER_ALIGNMENT:
        return False
    if x.is_contiguous():
        return True
    if strides[-1] != 1:
        return False
    return not any(stride % (POINTER_ALIGNMENT // 2) for stride in strides[:-1])


def is_contiguous(x: Tensor | None) -> bool:
    """The same of any other tensor, where there is one."""
    return x is None or (x.is_contiguous() and not x.data_ptr() % POINTER_ALIGNMENT)


def workspace_rows(x: Tensor, offsets: Tensor | None, size: int) -> tuple[int, ...]:
    """The shape of a workspace with a number a row: rows in whole tiles, behind batch and heads."""
    if offsets is None:
        return x.shape[0], x.shape[2], -(-x.shape[1] // size) * size
    return x.shape[1], (x.shape[0] + offsets.shape[0] * size - 1) // size * size


def workspace_shape(shape: tuple[int, ...], head_dim: int, tile: Tile) -> tuple[int, ...]:
    """The shape of a workspace with a number for each of a row's."""
    return (*shape[:-1], shape[-1] * (-(-head_dim // tile.width) * tile.width))


def rules(told: dict[str, Any]) -> list[Tensor] | None:
    """The tensors that a mask of one's own reads."""
    if told["first"] is not None:
        return [told["first"], told["last"]]
    return None if told["table"] is None else [told["table"], told["items"]]


def tables_for_heads(tables: Any, heads: int) -> LaunchArguments | None:
    """The blocks to look at as kernels take them: for every head, and without the tables of other problems."""
    if tables is None:
        return None
    found = [x if heads == 1 else x.expand(x.shape[0], heads, *x.shape[2:]) for x in tables[:4]]
    return (*found, None, None, None, None)

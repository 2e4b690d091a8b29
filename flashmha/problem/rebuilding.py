"""Masks and biases taken apart into their tensors, and made again of others like them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from torch import Tensor

Whole = TypeVar("Whole", covariant=True)
Rebuild = Callable[[Sequence[Tensor]], Whole]
"""What makes a mask or a bias again."""


class Flat(Protocol[Whole]):
    """A mask or a bias, which can be taken apart."""

    def flatten(self) -> tuple[tuple[Tensor, ...], Rebuild[Whole]]:
        """The tensors it holds, and what makes the same of others like them."""


def flatten_parts(
    parts: Sequence[Flat[Whole]], join: Callable[[tuple[Whole, ...]], Whole]
) -> tuple[tuple[Tensor, ...], Rebuild[Whole]]:
    """What several parts hold, one after another, and what makes the whole of them again."""
    held = [part.flatten() for part in parts]
    counts = [len(tensors) for tensors, _ in held]
    rebuilds = [rebuild for _, rebuild in held]

    def again(tensors: Sequence[Tensor]) -> Whole:
        rest = iter(tensors)
        return join(tuple(make([next(rest) for _ in range(count)]) for make, count in zip(rebuilds, counts)))

    return tuple(tensor for tensors, _ in held for tensor in tensors), again

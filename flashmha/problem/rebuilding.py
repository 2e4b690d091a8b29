"""Masks and biases taken apart into their tensors, and made again of others like them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

from torch import Tensor

Whole = TypeVar("Whole")
Part = TypeVar("Part", bound=Any)
Rebuild = Callable[[Sequence[Tensor]], Whole]
"""What makes a mask or a bias again."""


class Several(Generic[Part]):
    """Masks in one, or biases."""

    __slots__ = ("_parts",)

    def __init__(self, parts: tuple[Part, ...]) -> None:
        self._parts = parts

    @property
    def parts(self) -> tuple[Part, ...]:
        """Those that it is of."""
        return self._parts

    def check(self, batch: int, heads: int, seqlen_q: int, seqlen_k: int) -> None:
        """Raise ``ValueError`` where the tensors of one do not fit the problem."""
        for part in self._parts:
            part.check(batch, heads, seqlen_q, seqlen_k)

    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors of all, one after another."""
        return tuple(tensor for part in self._parts for tensor in part.tensors())

    def flatten(self) -> tuple[tuple[Tensor, ...], Any]:
        """The tensors of all, and what makes the whole of them again."""
        held = [part.flatten() for part in self._parts]
        counts, rebuilds = [len(tensors) for tensors, _ in held], [rebuild for _, rebuild in held]
        join = type(self)

        def again(tensors: Sequence[Tensor]) -> Several[Part]:
            rest = iter(tensors)
            return join(tuple(make([next(rest) for _ in range(count)]) for make, count in zip(rebuilds, counts)))

        return tuple(tensor for tensors, _ in held for tensor in tensors), again

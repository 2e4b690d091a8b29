"""Rows of several lengths in one batch: padding, as rules."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..host.torch_state import eager, is_compiling, is_dense, readable
from .computed import Computed, Made, hides_changes, make_plain, stream_of
from .masks import Mask
from .positions import IndexGrid, MaskMod, Restarts, narrowed_to
from .rebuilding import Rebuild
from .tensors import is_vector_of_integers
from .wording import spell


class Padding(Mask):
    """Keys that are real and keys that are padding, with what was computed of them.

    A layer takes one as ``key_padding_mask``. What backends make of its tensor (lengths, an order, a table) is made
    once and kept on the object, so that all layers of a model that take this object share it. It is made anew once the
    tensor has changed: on a CPU its values are compared, elsewhere its version and address. Copies keep nothing.
    """

    __slots__ = ("_kept", "_private", "lasts")
    _kept: Computed | None
    _private: bool
    lasts: bool
    """More calls than one have this rule: so have the caller's, and one of this package's own that was met before."""

    def real(self, seqlen_k: int) -> Tensor:
        """Which keys are real, (batch, seqlen_k) bool."""
        raise NotImplementedError

    def once(self, name: Hashable, make: Callable[[], Made]) -> Made:
        """Call ``make`` once a name, as long as the tensor and the stream are the same, and give what it made.

        Plain tensors outside autograd, whatever is on around the call. Nothing is kept of what a compiler, a transform
        or a CUDA graph records, but for an object of this package's own, which lives no longer than they do.
        """
        (held,) = self.tensors()
        if is_compiling() and self._private:  # made and used in one graph
            if self._kept is None:
                self._kept = Computed(held, 0, True)
            return self._kept.fetch(name, make)
        if not eager(held):
            return make()
        stream, captured = stream_of(held)
        if captured and not self._private:
            return make_plain(make)
        kept = self._kept
        if kept is None or kept.stream != stream or not (self._private or kept.fits(held)):
            if not self._private and hides_changes(held):
                return make_plain(make)
            self._kept = kept = Computed(held, stream, self._private)
        return kept.fetch(name, functools.partial(make_plain, make))

    def own(self) -> Padding:
        """The same rule over a tensor of its own: the caller may change theirs."""
        return self if self._private else self.once("own", self.copy_tensors)

    def copy_tensors(self) -> Padding:
        """The same rule over a copy of its tensor."""
        tensors, rebuild = self.flatten()
        twin = rebuild([tensor.clone() for tensor in tensors])
        assert isinstance(twin, Padding)
        return mark_private(twin)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self.tensors()


P = TypeVar("P", bound="Padding")


def mark_private(rule: P) -> P:
    """Say of a rule that its maker alone holds its tensor, so that it cannot change."""
    rule._private, rule.lasts = True, False
    return rule


class KeyPadding(Padding):
    """Keys that are real: ``valid`` is a bool tensor (batch, seqlen_k), ``True`` = may be attended to."""

    __slots__ = ("valid",)
    feature = "key_padding"

    def __init__(self, valid: Tensor) -> None:
        if not is_dense(valid) or valid.dtype != torch.bool or valid.dim() != 2:
            raise ValueError(
                f"valid must be a bool tensor of shape (batch, seqlen_k), True = may attend, got {spell(valid)}."
            )
        self.valid = valid
        self._kept, self._private, self.lasts = None, False, True

    def real(self, seqlen_k: int) -> Tensor:
        return self.valid

    def check(self, batch: int, heads: int, seqlen_q: int, seqlen_k: int) -> None:
        if self.valid.shape != (batch, seqlen_k):
            raise ValueError(
                f"valid must have shape (batch, seqlen_k) = ({batch}, {seqlen_k}), got {tuple(self.valid.shape)}."
            )

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.valid,)

    def flatten(self) -> tuple[tuple[Tensor, ...], Rebuild[Mask]]:
        return (self.valid,), lambda tensors: KeyPadding(*tensors)

    def mask_mod(self, seqlen_q: int, seqlen_k: int, documents: Restarts | None = None) -> MaskMod:
        valid = self.valid
        return lambda batch, head, q_idx, k_idx: valid[batch, k_idx]

    def merged(self, other: Mask) -> KeyPadding | None:
        if not isinstance(other, KeyPadding) or self.valid.shape != other.valid.shape:
            return None
        return mark_private(KeyPadding(self.valid & other.valid))

    def materialize(self, *grid: Any, queries: range | None = None, keys: range | None = None) -> Tensor:
        batch, seqlen_k = self.valid.shape
        table = self.valid.view(batch, 1, 1, seqlen_k)
        return table if keys is None else narrowed_to(table, None, keys)

    def dense(self, grid: IndexGrid) -> Tensor:
        return self.materialize(keys=grid.keys)

    def __repr__(self) -> str:
        return f"KeyPadding({tuple(self.valid.shape)})"


class KeyLengths(Padding):
    """The first ``lengths[b]`` keys of each batch item are real: an integer tensor (batch,)."""

    __slots__ = ("lengths",)
    feature = "key_lengths"

    def __init__(self, lengths: Tensor) -> None:
        if not is_vector_of_integers(lengths):
            raise ValueError(f"lengths must be an int32 or int64 tensor of shape (batch,), got {spell(lengths)}.")
        self.lengths = lengths
        self._kept, self._private, self.lasts = None, False, True

    def real(self, seqlen_k: int) -> Tensor:
        def table() -> Tensor:
            return torch.arange(seqlen_k, device=self.lengths.device) < self.lengths[:, None]

        return self.once(("real", seqlen_k), table)

    def check(self, batch: int, heads: int, seqlen_q: int, seqlen_k: int) -> None:
        if self.lengths.shape != (batch,):
            raise ValueError(f"lengths must have shape (batch,) = ({batch},), got {tuple(self.lengths.shape)}.")
        if not readable(self.lengths) or not batch:
            return
        shortest, longest = self.once("bounds", lambda: (int(self.lengths.min()), int(self.lengths.max())))
        if not 0 <= shortest <= longest <= seqlen_k:
            raise ValueError(f"lengths must lie between 0 and seqlen_k={seqlen_k}, got {self.lengths.tolist()}.")

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.lengths,)

    def flatten(self) -> tuple[tuple[Tensor, ...], Rebuild[Mask]]:
        return (self.lengths,), lambda tensors: KeyLengths(*tensors)

    def mask_mod(self, seqlen_q: int, seqlen_k: int, documents: Restarts | None = None) -> MaskMod:
        lengths = self.lengths
        return lambda batch, head, q_idx, k_idx: k_idx < lengths[batch]

    def merged(self, other: Mask) -> KeyLengths | None:
        if not isinstance(other, KeyLengths) or self.lengths.shape != other.lengths.shape:
            return None
        return mark_private(KeyLengths(torch.minimum(self.lengths, other.lengths)))

    def __repr__(self) -> str:
        return f"KeyLengths({tuple(self.lengths.shape)})"


PADDING_CLASSES = (KeyPadding, KeyLengths)
"""The classes of padding; a look for a type among them spares ``isinstance`` its step in Python, .25 us of 95."""

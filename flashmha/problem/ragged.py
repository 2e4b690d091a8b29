"""Rows of several lengths: padding and packed documents, as rules."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..host.torch_state import eager, is_compiling, is_dense, readable
from .computed import Computed, Made, hides_changes, make_plain, stream_of
from .masks import Mask, Rebuild
from .positions import MaskMod, Restarts, narrowed_to
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

    def flatten(self) -> tuple[tuple[Tensor, ...], Rebuild]:
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

    def dense(self, *grid: Any) -> Tensor:
        return self.materialize(keys=grid[-1])

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

    def flatten(self) -> tuple[tuple[Tensor, ...], Rebuild]:
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


class Documents(Mask):
    """Documents packed end to end into one row (batch 1): a query sees its own document alone ("varlen").

    ``cu_seqlens`` (documents + 1,) holds where each document starts, and the total at the end; ``cu_seqlens_k``
    does so for the keys where they differ. Tokens past the last offset belong to no document and see nothing.
    ``max_seqlen`` (``max_seqlen_k``) is the longest document as a host integer; kernels need it, and without it
    they have to ask the device. ``total`` (``total_k``) is the last offset as a host integer: where it is the number of
    tokens, nothing has to be done about tokens of no document, which takes ten operators on a GPU.
    """

    __slots__ = ("cu_seqlens", "cu_seqlens_k", "max_seqlen", "max_seqlen_k", "total", "total_k")
    feature = "documents"

    def __init__(
        self,
        cu_seqlens: Tensor,
        cu_seqlens_k: Tensor | None = None,
        *,
        max_seqlen: int | None = None,
        max_seqlen_k: int | None = None,
        total: int | None = None,
        total_k: int | None = None,
    ) -> None:
        both = (("cu_seqlens", cu_seqlens), ("cu_seqlens_k", cu_seqlens if cu_seqlens_k is None else cu_seqlens_k))
        for name, offsets in both:
            if not is_vector_of_integers(offsets) or offsets.shape[0] < 2:
                raise ValueError(
                    f"{name} must be an int32 or int64 tensor of shape (documents + 1,), at least (2,), "
                    f"got {spell(offsets)}."
                )
        if cu_seqlens_k is not None and cu_seqlens_k.shape != cu_seqlens.shape:
            raise ValueError(
                f"cu_seqlens_k must name as many documents as cu_seqlens, {tuple(cu_seqlens.shape)}, "
                f"got {tuple(cu_seqlens_k.shape)}."
            )
        self.cu_seqlens = cu_seqlens
        self.cu_seqlens_k = cu_seqlens if cu_seqlens_k is None else cu_seqlens_k
        self.max_seqlen = max_seqlen
        self.max_seqlen_k = max_seqlen if cu_seqlens_k is None else max_seqlen_k
        self.total = total
        self.total_k = total if cu_seqlens_k is None else total_k

    def check(self, batch: int, heads: int, seqlen_q: int, seqlen_k: int) -> None:
        if batch != 1:
            raise ValueError(
                f"batch must be 1 with Documents, which are packed end to end into one item, got {batch}; a layer "
                "wants (1, total, embed_dim), with batch_first=False (total, 1, embed_dim)."
            )
        if self.total is not None and self.total > seqlen_q:
            raise ValueError(f"total must be at most the {seqlen_q} queries, got {self.total}.")
        if self.total_k is not None and self.total_k > seqlen_k:
            raise ValueError(f"total_k must be at most the {seqlen_k} keys, got {self.total_k}.")
        if not readable(self.cu_seqlens):
            return
        for name, offsets, said, size in (
            ("cu_seqlens", self.cu_seqlens, self.total, seqlen_q),
            ("cu_seqlens_k", self.cu_seqlens_k, self.total_k, seqlen_k),
        ):
            steps = offsets.tolist()
            if steps[0] != 0 or steps != sorted(steps) or steps[-1] > size:
                raise ValueError(f"{name} must rise from 0 to at most {size}, got {steps}.")
            if said is not None and said != steps[-1]:
                raise ValueError(f"{name} must end at its total, {said}, got {steps}.")

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.cu_seqlens, self.cu_seqlens_k)

    def flatten(self) -> tuple[tuple[Tensor, ...], Rebuild]:
        said: dict[str, Any] = {"max_seqlen": self.max_seqlen, "total": self.total}
        if self.aligned:
            return (self.cu_seqlens,), lambda tensors: Documents(*tensors, **said)
        said |= {"max_seqlen_k": self.max_seqlen_k, "total_k": self.total_k}
        return (self.cu_seqlens, self.cu_seqlens_k), lambda tensors: Documents(*tensors, **said)

    @property
    def documents(self) -> Documents:  # type: ignore[override]
        return self

    def merged(self, other: Mask) -> None:
        if isinstance(other, Documents):
            raise ValueError(f"a mask must hold at most one Documents, got {self!r} & {other!r}.")

    @property
    def sizes(self) -> tuple[Any, ...]:
        """All that is known of the documents but their tensors' values."""
        return (
            self.aligned,
            self.cu_seqlens.shape,
            self.max_seqlen,
            self.max_seqlen_k,
            self.total,
            self.total_k,
        )

    @property
    def aligned(self) -> bool:
        """Queries and keys have the same offsets, so that both alignments are one."""
        return self.cu_seqlens is self.cu_seqlens_k

    def membership(self, seqlen_q: int, seqlen_k: int) -> tuple[Tensor, Tensor]:
        """The document of every query and of every key; the number of documents where a token is in none."""
        device = self.cu_seqlens.device
        q_doc = torch.bucketize(torch.arange(seqlen_q, device=device), self.cu_seqlens[1:], right=True)
        k_doc = torch.bucketize(torch.arange(seqlen_k, device=device), self.cu_seqlens_k[1:], right=True)
        return q_doc, k_doc

    def positions(self, seqlen_q: int, seqlen_k: int, align: str) -> tuple[Tensor, Tensor]:
        """The position of every query and of every key inside the own document."""
        q_doc, k_doc = self.membership(seqlen_q, seqlen_k)
        last = self.cu_seqlens.shape[0] - 2  # tokens in no document see nothing: their position does not matter
        q_doc, k_doc = q_doc.clamp(max=last), k_doc.clamp(max=last)
        q_pos = torch.arange(seqlen_q, device=q_doc.device) - self.cu_seqlens[q_doc]
        k_pos = torch.arange(seqlen_k, device=k_doc.device) - self.cu_seqlens_k[k_doc]
        if align == "bottom_right" and not self.aligned:
            q_pos = q_pos + (self.cu_seqlens_k.diff() - self.cu_seqlens.diff())[q_doc]
        return q_pos, k_pos

    def mask_mod(self, seqlen_q: int, seqlen_k: int, documents: Restarts | None = None) -> MaskMod:
        last = self.cu_seqlens.shape[0] - 1
        q_doc, k_doc = self.membership(seqlen_q, seqlen_k)

        def same_document(batch: Tensor, head: Tensor, q_idx: Tensor, k_idx: Tensor) -> Tensor:
            return (q_doc[q_idx] == k_doc[k_idx]) & (q_doc[q_idx] < last)

        return same_document

    def __repr__(self) -> str:
        return f"Documents({self.cu_seqlens.shape[0] - 1})"


def is_vector_of_integers(thing: object) -> bool:
    """Whether a thing is a dense tensor of one axis, int32 or int64."""
    return (
        isinstance(thing, Tensor) and is_dense(thing) and thing.dtype in (torch.int32, torch.int64) and thing.dim() == 1
    )

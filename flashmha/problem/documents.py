"""Rows of several lengths end to end: packed documents, as a rule."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..host.torch_state import readable
from .masks import Mask
from .positions import MaskMod, Restarts
from .rebuilding import Rebuild
from .tensors import is_vector_of_integers
from .wording import spell


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

    def flatten(self) -> tuple[tuple[Tensor, ...], Rebuild[Mask]]:
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
        """The position of every query and of every key inside the own document; 0 in none, where it sees nothing."""
        q_doc, k_doc = self.membership(seqlen_q, seqlen_k)
        starts = self.cu_seqlens
        if align == "bottom_right" and not self.aligned:
            starts = starts - F.pad(self.cu_seqlens_k.diff() - starts.diff(), (0, 1))
        return count_from(starts, q_doc), count_from(self.cu_seqlens_k, k_doc)

    def mask_mod(self, seqlen_q: int, seqlen_k: int, documents: Restarts | None = None) -> MaskMod:
        last = self.cu_seqlens.shape[0] - 1
        q_doc, k_doc = self.membership(seqlen_q, seqlen_k)

        def same_document(batch: Tensor, head: Tensor, q_idx: Tensor, k_idx: Tensor) -> Tensor:
            return (q_doc[q_idx] == k_doc[k_idx]) & (q_doc[q_idx] < last)

        return same_document

    def __repr__(self) -> str:
        return f"Documents({self.cu_seqlens.shape[0] - 1})"


def count_from(starts: Tensor, document: Tensor) -> Tensor:
    """The position of every token from the start of its document on; 0 in the last entry, which is none."""
    slots = torch.arange(document.shape[0], device=document.device)
    return (slots - starts[document]).masked_fill(document == starts.shape[0] - 1, 0)

"""Packed tokens: the real tokens of a batch end to end, the documents they make, and the way back."""

from __future__ import annotations

import torch
from torch import Tensor

from ..host.torch_state import is_dense
from ..problem import packing
from ..problem.documents import Documents
from ..problem.ragged import KeyLengths, KeyPadding
from ..problem.wording import spell
from . import nested
from .call import hides_alone


class Packed:
    """The real tokens of a padded batch, end to end; ``pack`` makes one.

    ``tokens`` is (1, total, ...), or (total, 1, ...) with ``batch_first=False``. ``documents`` is the mask under which
    every item of the batch looks at itself alone: ``attn_mask=packed.documents``, or ``packed.documents & causal()``.
    """

    tokens: Tensor
    documents: Documents

    def __init__(self, x: Tensor, real: packing.Tokens, batch_first: bool = True) -> None:
        self.sizes, self.places, self.batch_first = (x.shape[0], x.shape[1]), real.places, batch_first
        self.documents = real.documents
        self.tokens = self.pack(x)

    def pack(self, other: Tensor) -> Tensor:
        """Another tensor of the same batch (position ids, labels, ...) as ``tokens`` is; any dtype.

        (batch, seqlen, ...) in, (1, total, ...) out; with ``batch_first=False`` (seqlen, batch, ...), (total, 1, ...).
        """
        if not is_dense(other) or other.shape[:2] != self.sizes:
            axes = "(batch, seqlen, ...)" if self.batch_first else "(seqlen, batch, ...)"
            raise ValueError(f"other must be a tensor {axes} of {self.sizes}, got {spell(other)}.")
        if self.batch_first:
            return packing.take_real(other, self.places)
        return packing.take_real(other.transpose(0, 1), self.places).transpose(0, 1)

    def unpack(self, tokens: Tensor) -> Tensor:
        """Packed tokens as a batch again, zeros where there was padding.

        (1, total, ...) in, (batch, seqlen, ...) out; with ``batch_first=False`` (total, 1, ...), (seqlen, batch, ...).
        """
        self.check(tokens)
        if self.batch_first:
            return packing.unpack_tokens(tokens, self.places, self.sizes)
        return packing.unpack_tokens(tokens.transpose(0, 1), self.places, self.sizes[::-1]).transpose(0, 1)

    def across(self, memory: Packed) -> Documents:
        """The mask of cross-attention, queries here and keys there: every item looks at the same item's.

        Raises:
            ValueError: batches of different sizes.
        """
        if not isinstance(memory, Packed):
            raise TypeError(f"memory must be what pack returned, got {spell(memory)}.")
        here, there = self.documents, memory.documents
        sizes = [documents.cu_seqlens.shape[0] - 1 for documents in (here, there)]
        if sizes[0] != sizes[1]:
            raise ValueError(f"memory must be a batch of {sizes[0]} items, got {sizes[1]}.")
        return Documents(
            here.cu_seqlens,
            there.cu_seqlens,
            max_seqlen=here.max_seqlen,
            max_seqlen_k=there.max_seqlen,
            total=here.total,
            total_k=there.total,
        )

    def check(self, tokens: Tensor) -> None:
        """Raise ``ValueError`` where tokens are not as many as these."""
        if not is_dense(tokens) or tokens.shape[:2] != self.tokens.shape[:2]:
            raise ValueError(f"tokens must be packed, {tuple(self.tokens.shape[:2])} first, got {spell(tokens)}.")

    def __repr__(self) -> str:
        total, items = self.tokens.shape[:2].numel(), self.documents.cu_seqlens.shape[0] - 1
        return f"{type(self).__name__}({total} tokens, {items} items)"


class PackedNested(Packed):
    """The tokens of a nested tensor; ``unpack`` nests them again."""

    def __init__(self, x: Tensor) -> None:
        self.like = nested.without_gaps(x)
        offsets = self.like.offsets().int()  # type: ignore[attr-defined]
        self.tokens = self.like.values()[None]
        total = self.tokens.shape[1]
        self.documents = Documents(offsets, max_seqlen=int(offsets.diff().max()), total=total)

    def pack(self, other: Tensor) -> Tensor:
        if not nested.is_jagged(other) or not nested.are_as_long(other, self.like):
            raise ValueError(
                f"other must be a jagged nested tensor with the lengths of these items, got {spell(other)}."
            )
        return nested.without_gaps(other).values()[None]

    def unpack(self, tokens: Tensor) -> Tensor:
        self.check(tokens)
        return nested.nest_values_like(tokens[0], self.like)


def pack(
    x: Tensor, key_padding_mask: Tensor | KeyPadding | KeyLengths | None = None, *, batch_first: bool = True
) -> Packed:
    """The real tokens of a batch end to end, so that a model sees them alone and padding costs nothing.

    For any model whose attention is flashmha's and that treats tokens one by one elsewhere::

        packed = flashmha.pack(x, key_padding_mask)
        y = model(packed.tokens, attn_mask=packed.documents)
        y = packed.unpack(y)

    Positions are counted among the real tokens of an item. So padding with holes, unlike padding at either end, moves
    what a window sees.

    Args:
        x: (batch, seqlen, ...), with ``batch_first=False`` (seqlen, batch, ...), of any dtype; or a jagged nested
            tensor, which ``unpack`` makes again.
        key_padding_mask: (batch, seqlen), bool with ``True`` = *hidden* or float with 0 and ``-inf``, as in
            ``nn.MultiheadAttention``; a ``KeyPadding`` or ``KeyLengths``; ``None`` hides nothing.

    On a GPU the host waits, for the number of real tokens.

    Raises:
        ValueError: another shape or kind; a float mask that does more than hide.
    """
    if type(batch_first) is not bool:
        raise TypeError(f"batch_first must be True or False, got {batch_first!r}.")
    if isinstance(x, Tensor) and x.is_nested:
        if not nested.is_jagged(x):
            raise ValueError(f"x must be a jagged nested tensor, ragged in its second axis, got {spell(x)}.")
        if key_padding_mask is not None or not batch_first:
            raise ValueError(
                "key_padding_mask and batch_first must be left out beside a nested x, which has no padding."
            )
        return PackedNested(x)
    if not is_dense(x) or x.dim() < 2:
        raise ValueError(f"x must be a tensor (batch, seqlen, ...), got {spell(x)}.")
    batch, seqlen = x.shape[:2] if batch_first else x.shape[1::-1]
    valid = real_tokens(key_padding_mask, batch, seqlen, x.device)
    if valid.device != x.device:
        raise ValueError(f"key_padding_mask must be on the device of x, {x.device}, got {valid.device}.")
    return Packed(x, packing.find_tokens(valid), batch_first)


def real_tokens(mask: Tensor | KeyPadding | KeyLengths | None, batch: int, seqlen: int, device: torch.device) -> Tensor:
    """Which tokens are real, (batch, seqlen), of what a caller says about padding."""
    if mask is None:
        return torch.ones(batch, seqlen, dtype=torch.bool, device=device)
    if isinstance(mask, (KeyPadding, KeyLengths)):
        mask.check(batch, 1, seqlen, seqlen)
        return mask.materialize(batch, 1, 1, seqlen)[:, 0, 0]
    if (
        not is_dense(mask)
        or mask.shape != (batch, seqlen)
        or not (mask.dtype == torch.bool or mask.is_floating_point())
    ):
        one = isinstance(mask, Tensor) and mask.dim() == 1
        hint = ": x must be (batch, seqlen, features), so give one sequence as x[None], key_padding_mask[None]" * one
        raise ValueError(
            f"key_padding_mask must be (batch, seqlen) = ({batch}, {seqlen}), bool with True = hidden or float with 0 "
            f"and -inf, or a KeyPadding, a KeyLengths or None, got {spell(mask)}{hint}."
        )
    if mask.dtype != torch.bool and (mask.requires_grad or not hides_alone(mask)):
        raise ValueError("key_padding_mask must be bool or hold 0 and -inf alone, got other numbers or a gradient.")
    return mask == 0

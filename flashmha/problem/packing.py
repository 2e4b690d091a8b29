"""The real tokens of a padded batch end to end, and every token back in its place."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .documents import Documents
from .masks import Mask, join_masks
from .ragged import Padding
from .windows import Window


class Tokens(NamedTuple):
    """The real tokens of a batch: where they lie in (batch * seqlen), and one document for each batch item."""

    places: Tensor
    documents: Documents


@torch.inference_mode(False)
@torch.no_grad()
def find_tokens(valid: Tensor) -> Tokens:
    """The tokens that are real, as plain tensors; the host waits for a GPU once."""
    lengths = valid.sum(dim=1) if len(valid) else valid.new_zeros(1, dtype=torch.int64)  # documents are one at least
    total, longest = torch.stack((lengths.sum(), lengths.max())).tolist()
    places = torch.nonzero_static(valid.flatten(), size=total).squeeze(1)
    offsets = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    return Tokens(places, Documents(offsets, max_seqlen=longest, total=total))


def tokens_of(padding: Padding, seqlen: int) -> Tokens:
    """The tokens that a rule says are real, found once a rule."""
    return padding.once(("tokens", seqlen), lambda: find_tokens(padding.real(seqlen)))


def packed_mask(mask: Mask | None, real: Tokens) -> Mask | None:
    """The mask among the real tokens end to end: their documents, and the windows."""
    return join_masks(real.documents, *find_windows(mask))


def take_real(x: Tensor, places: Tensor) -> Tensor:
    """(batch, seqlen, ...) as (1, tokens, ...): the tokens at ``places`` in (batch * seqlen)."""
    return x.flatten(0, 1).index_select(0, places)[None]


def unpack_tokens(tokens: Tensor, places: Tensor, sizes: tuple[int, int]) -> Tensor:
    """(1, tokens, ...) as (batch, seqlen, ...), 0 where there was padding; ``sizes`` is (batch, seqlen)."""
    blank = tokens.new_zeros(sizes[0] * sizes[1], *tokens.shape[2:])
    return torch.unflatten(blank.index_copy_(0, places, tokens[0]), 0, sizes)


def has_holes(valid: Tensor) -> bool:
    """Whether padding lies between real tokens, where positions would move."""
    starts = (valid[:, 1:] & ~valid[:, :-1]).sum(dim=1) + valid[:, 0]
    return bool((starts > 1).any())


def find_windows(mask: Mask | None) -> list[Window]:
    """The windows of a mask, which count positions among the real tokens as well."""
    return [part for part in parts_of(mask) if type(part) is Window]


def parts_of(mask: Mask | None) -> tuple[Mask, ...]:
    """The rules of a mask, none where there is no mask."""
    return () if mask is None else mask.parts


class Padded(NamedTuple):
    """Where packed tokens came from: the mask before packing, their places in (batch * seqlen), the real positions."""

    mask: Mask | None
    places: Tensor
    rows: Tensor

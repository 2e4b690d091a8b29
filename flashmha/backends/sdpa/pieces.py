"""A masked problem as smaller ones that need no mask: padding cut off, documents taken one by one.

A kernel that is handed a mask computes what the mask hides. On a CPU, where the mask's values can be read without
waiting, the hidden part is cheaper to leave out.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

from ...host.torch_state import readable
from ...problem.documents import Documents
from ...problem.masks import Mask, join_masks
from ...problem.ragged import KeyLengths, KeyPadding
from ...problem.spec import AttentionSpec
from ...problem.windows import Window

MIN_MULTIPLICATIONS = 2**21
"""Multiplications in the scores of a padded problem that cost as much as a call: below, one call with a mask beats one
for each item. Those that are left out count too, and twice as many of them have to be where there is no backward.
"""
SHARE = 2**17
"""The same for packed documents, a document: one call for all looks at every pair of them."""


class Costs(NamedTuple):
    """What a call costs beside what it spares: a padded item's or a window's block's, a document's.

    ``rows`` are the fewest queries of such a block.
    """

    item: int = MIN_MULTIPLICATIONS
    document: int = SHARE
    rows: int = 64


Piece = tuple[int, int | None, bool | Mask]


@dataclasses.dataclass(frozen=True)
class Item:
    """One batch item cut up: its keys into ``k_sizes``, its queries into pieces, first to last.

    A piece is (queries, which part of the keys they look at or ``None`` for nothing at all, how: causally or not, or
    under a mask of its own).
    """

    k_sizes: list[int]
    pieces: list[Piece]


def cut_up(spec: AttentionSpec, costs: Costs = Costs()) -> list[Item] | None:  # noqa: B008  a tuple
    """One ``Item`` a batch item, or ``None`` where the mask is better handed over whole.

    Serves key padding without holes and key lengths, with top-left causality or none, and documents with any windows.
    """
    work = spec.heads * spec.seqlen_q * spec.seqlen_k * spec.head_dim
    least = min(costs.item, costs.document)
    if spec.mask is None or spec.bias is not None or spec.aten_only or (type(work) is int and work <= least):
        return None
    if not all(map(readable, spec.mask.tensors())):
        return None
    documents, window = spec.documents, spec.window
    kinds = {type(part) for part in spec.mask.parts}
    items: list[Item] | None = None
    if documents is not None:
        calls = documents.cu_seqlens.shape[0] - 1
        if kinds <= {Documents, Window} and work > costs.document * calls:
            windows = join_masks(*[part for part in spec.mask.parts if type(part) is Window])
            how = windows if windows is not None and not follows(window, documents.aligned) else windows is not None
            items = cut_documents(documents, how, spec)
    elif kinds & {KeyPadding, KeyLengths} and kinds <= {KeyPadding, KeyLengths, Window}:
        drawing = "dropout" in spec.features  # for the whole problem at once, as torch draws
        most = work * (2 if spec.needs_grad else 1)
        pays = most > 2 * costs.item and spec.batch
        if pays and follows(window, True, spec.seqlen_q - spec.seqlen_k) and not drawing:
            rule = spec.padding()
            assert rule is not None
            sizes = (spec.seqlen_q, spec.seqlen_k, spec.heads, spec.head_dim, spec.needs_grad)
            name = ("items", *sizes, window is not None, costs.item)
            valid, item = rule.real, costs.item
            items = rule.once(name, lambda: cut_padding(valid(spec.seqlen_k), spec, window is not None, item))
    # where no query looks at any key, the mask keeps the output in the autograd graph
    return items if items and any(piece[1] is not None for item in items for piece in item.pieces) else None


def follows(window: Window | None, aligned: bool, right: int = 0) -> bool:
    """The window is absent or top-left causality, ``right`` in bottom-right positions."""
    return window is None or (aligned and window.left is None and window.right == right)


def cut_documents(documents: Documents, how: bool | Mask, spec: AttentionSpec) -> list[Item]:
    """The one row of packed documents, a piece each; what lies behind the last belongs to none."""
    q_sizes, k_sizes = (offsets.diff().tolist() for offsets in (documents.cu_seqlens, documents.cu_seqlens_k))
    pieces: list[Piece] = [(size, place if k_sizes[place] else None, how) for place, size in enumerate(q_sizes)]
    pieces.append((spec.seqlen_q - sum(q_sizes), None, False))
    return [Item([*k_sizes, spec.seqlen_k - sum(k_sizes)], [piece for piece in pieces if piece[0]])]


def cut_padding(valid: Tensor, spec: AttentionSpec, causal: bool, cost: int) -> list[Item] | None:
    """The real keys of each batch item, where they are neighbours and enough are not."""
    real = valid.to(torch.uint8)
    counts = real.sum(dim=1).tolist()
    hidden = spec.batch * spec.seqlen_k - (sum(counts) // 2 if causal else sum(counts))
    spared = hidden * spec.heads * spec.seqlen_q * spec.head_dim
    if spared and spared * (2 if spec.needs_grad else 1) <= 2 * cost * spec.batch:
        return None
    starts = real.argmax(dim=1).tolist()
    ends = (spec.seqlen_k - real.flip(1).argmax(dim=1)).tolist()
    if any(count and end - start != count for count, start, end in zip(counts, starts, ends)):
        return None
    items = []
    for count, start, end in zip(counts, starts, ends):
        rows = spec.seqlen_q
        if not count:
            pieces: list[Piece] = [(rows, None, False)]
        elif not causal:
            pieces = [(rows, 1, False)]
        else:
            before, inside = min(start, rows), min(end, rows) - min(start, rows)
            pieces = [(before, None, False), (inside, 1, True), (rows - before - inside, 1, False)]
        items.append(Item([start, end - start, spec.seqlen_k - end], [piece for piece in pieces if piece[0]]))
    return items


def keep_all(items: list[Item], spec: AttentionSpec) -> bool:
    """Nothing is padding: every item looks at every key."""
    whole = [(spec.seqlen_q, 1, False)]
    return all(item.k_sizes == [0, spec.seqlen_k, 0] and item.pieces == whole for item in items)


def slices(x: Tensor, items: list[Item], keys: bool) -> list[tuple[Tensor, ...]]:
    """The parts of (batch, seqlen, heads, head_dim), an item a tuple; split, so that gradients join in one copy."""
    return [
        row.split(item.k_sizes if keys else [piece[0] for piece in item.pieces], dim=1)
        for row, item in zip(x.split(1), items)
    ]

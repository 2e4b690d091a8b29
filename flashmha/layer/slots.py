"""What a call's mask and bias say of the slots of a cache.

Tensors speak of the call's own keys: those of earlier calls are seen by every query. Rules over positions and biases by
distance go on where the cache stopped.
"""

from __future__ import annotations

import functools
import operator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends.choice.choose import reads_pages
from ..backends.choice.wishes import Wanted
from ..cache.base import Cache, first_real
from ..cache.checks import refuse_gradients
from ..cache.ring import RingCache
from ..host.torch_state import surely
from ..problem.cached import OwnTokens
from ..problem.masks import Dense, Mask, join_masks
from ..problem.packing import parts_of
from ..problem.ragged import Padding
from ..problem.rules import Rule
from ..problem.scores import Bias, TensorBias
from ..problem.spec import AttentionSpec
from ..problem.windows import Window
from .cached import CacheStep
from .features import EXTRA_KEYS
from .protocol import Layer

MOST_GUESSES = 16
"""Tokens of a step, whose mask stays as small as it is; a prompt's is made as wide as the slots, once."""


class Rules(NamedTuple):
    """The mask of a call taken apart: rules over positions, and tensors."""

    counting: list[Mask]
    tables: list[Dense]


def read_rules(layer: Layer, cache: Cache, mask: Mask | None, seqlen: int) -> Rules:
    """The mask of a call, apart from padding, which the cache leaves out.

    A call begins where the cache stopped, so that both alignments are one there.

    Raises:
        ValueError: a mask that cannot speak of earlier keys.
    """
    rules = Rules([], [])
    for part in parts_of(mask):
        if isinstance(part, Dense):
            check_width(part, seqlen, cache)
            rules.tables.append(part)
        elif isinstance(part, Window):
            # the last token of a row hides no future
            if part.left is not None or seqlen > 1 or (part.right is not None and part.right < 0):
                rules.counting.append(part.to_bottom_right(0, 0))
        elif isinstance(part, Rule):
            rules.counting.append(Rule(part.fn))
        elif not isinstance(part, Padding):
            rules.counting.append(part)
    window = layer.window
    if isinstance(cache, RingCache) and window is not None and (window.left is None or window.left > cache.window):
        raise ValueError(f"window of a RingCache must reach as far as the layer's {window!r}, got {cache.window}.")
    return rules


def check_width(part: Dense, seqlen: int, cache: Cache) -> None:
    """Raise where a mask tensor is neither over a call's own keys nor over every position of a row."""
    width = part.allowed.shape[3]
    if width not in (1, seqlen, cache.max_seqlen):
        whole = "" if cache.max_seqlen is None else f" or {cache.max_seqlen}, every position of a row"
        raise ValueError(f"attn_mask must be {seqlen} keys wide beside a cache, the call's own{whole}, got {width}.")


def check_by_distance(bias: Bias) -> None:
    """Raise where a layer's bias is made for the keys of one call, and not for a distance."""
    if not bias.by_distance:
        raise ValueError(
            f"position_bias must go by distance beside a cache, as AlibiBias and RelativePositionBias do, got {bias!r}."
        )


def extend(
    layer: Layer,
    step: CacheStep,
    heads: tuple[Tensor, Tensor, Tensor],
    mask: Mask | None,
    bias: Bias | None,
    every_slot: bool,
    in_rows: bool,
) -> tuple[Tensor, Tensor, Mask | None, Bias | None]:
    """Keys and values of earlier calls and of this one, and its mask and bias over them.

    Where looking at lengths waits for nothing, slots that no row fills are left out, unless ``every_slot`` is wanted.
    Elsewhere keys that lie in pages are the pool, and its mask has ``Pages``, unless they are wanted ``in_rows``.

    Raises:
        ValueError: the heads do not fit the cache, or a mask or a bias cannot speak of it. The cache is as it was.
    """
    cache, real, positions = step
    q, k, v = heads
    seqlen = q.shape[1]
    if not seqlen:  # a table of no tokens says nothing
        mask = bias = None
    check_own_keys(layer, k, seqlen)
    refuse_gradients(q)
    rules = read_rules(layer, cache, mask, seqlen)
    biases = () if bias is None else bias.parts
    tensors = [one for one in biases if isinstance(one, TensorBias)]
    # lengths: torch 2.8 traces no bool of a list
    counts = len(rules.counting) > 0 or len(tensors) < len(biases) or isinstance(cache, RingCache)
    if counts and positions is None:
        positions = cache.positions(seqlen, real)
    start = cache.lengths[:, None].clone() if len(rules.tables) + len(tensors) > 0 else None
    held = cache.append(k, v, real)
    held = None if every_slot else held
    slots = cache.capacity if held is None else min(cache.capacity, max(1, *held))
    tables: list[Mask] = []
    if start is not None:
        own = own_tokens(cache, start, real, seqlen, slots)
        for part in rules.tables:
            if real is None and part.allowed.shape[3] in (1, seqlen) and surely(seqlen <= MOST_GUESSES):
                tables.append(OwnTokens(part.allowed.expand(-1, -1, -1, seqlen), start[:, 0]))
            else:
                tables.append(Dense(over_slots(part.allowed, own, seqlen, True)))
        wide = [TensorBias(over_slots(one.tensor, own, seqlen, 0.0)) for one in tensors]
        others = [one for one in biases if not isinstance(one, TensorBias)]
        bias = functools.reduce(operator.add, [*wide, *others]) if biases else None
    if held is not None and real is None and end_together(cache, held, rules):
        return *cache.read(slots), join_masks(*rules.counting, *tables), bias
    placed = cache.placed(positions, slots, real is not None) if counts and positions is not None else None
    pages = None if in_rows or held is not None else cache.pages()
    keys, values = cache.read(slots) if pages is None else cache.store
    return keys, values, join_masks(cache.rule(), placed, *rules.counting, *tables, pages), bias


def settle_pages(
    q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, wanted: Wanted
) -> tuple[Tensor, Tensor, Tensor, AttentionSpec]:
    """Heads and their problem: keys in pages stay there where the backend of the choice reads them there."""
    if "pages" not in spec.needs or reads_pages(spec, wanted):
        return q, k, v, spec
    return (q, *spec.in_rows(k, v))


def check_own_keys(layer: Layer, k: Tensor, seqlen: int) -> None:
    """Raise where ``process_heads`` made other keys than those of the call's tokens."""
    if k.shape[1] != seqlen or any(getattr(layer, name) for name in EXTRA_KEYS):
        raise ValueError(
            f"process_heads must return the call's {seqlen} keys beside a cache, got {k.shape[1]}, with "
            f"keys_before={layer.keys_before} and keys_after={layer.keys_after}."
        )


def end_together(cache: Cache, held: list[int], rules: Rules) -> bool:
    """Every row ends at the last of the slots that are read: a problem like any, without a cache."""
    known = all(isinstance(part, (Window, Rule)) for part in rules.counting)  # which align there
    return known and not isinstance(cache, RingCache) and min(held) == max(held)


def own_tokens(cache: Cache, start: Tensor, real: Tensor | None, seqlen: int, slots: int) -> Tensor:
    """Which of a call's tokens lies in each slot, (batch, slots), -1 for none; ``start`` is where they begin."""
    places = cache.slots()
    own = (torch.arange(slots, device=start.device) if places is None else places[:, :slots]) - start
    inside = (own >= 0) & (own < seqlen)
    if real is not None:  # real tokens come first there
        own = first_real(real).gather(1, own.clamp(0, seqlen - 1).long())
    return torch.where(inside, own, -1)


def over_slots(table: Tensor, own: Tensor, seqlen: int, past: bool | float) -> Tensor:
    """A table (..., seqlen_q, seqlen) over a call's own keys as one over all slots, with ``past`` for the others."""
    batch, slots = own.shape
    width = table.shape[3]
    if width not in (1, seqlen):  # over every position
        return F.pad(table[..., :slots], (0, max(0, slots - width)), value=past)
    index = own.clamp(min=0).long()[:, None, None, :].expand(-1, *table.shape[1:3], slots)
    taken = table.expand(batch, -1, -1, seqlen).gather(3, index)
    return torch.where((own >= 0)[:, None, None, :], taken, past)

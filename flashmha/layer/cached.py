"""A call over a cache: where its tokens stand, and what its masks say of the keys that earlier calls left.

Masks, padding and biases that are tensors speak of the call's own keys: those of earlier calls are seen by every query.
Rules over positions and biases by distance go on where the cache stopped.
"""

from __future__ import annotations

import contextlib
import functools
import operator
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cache.base import Cache, first_real, refuse_gradients
from ..cache.memory import MemoryCache
from ..cache.ring import RingCache
from ..problem.masks import Dense, Mask, Rule, Window, join_masks
from ..problem.packing import parts_of
from ..problem.ragged import Documents, Padding
from ..problem.scores import Bias, TensorBias
from ..problem.wording import spell
from .arguments import Arguments
from .call import Reading
from .features import EXTRA_KEYS
from .keys_values import make_keys_values
from .options import counted_by
from .protocol import Layer


def enter_cache(layer: Layer, given: Arguments) -> Arguments:
    """The arguments of a call with a cache, checked; a memory that was projected is ``kv`` from here on.

    Raises:
        TypeError, ValueError: there is no such cache, or something beside it that it cannot serve.
    """
    cache = check_cache(given.cache)
    if given.kv is not None:
        raise ValueError("kv must be None beside a cache, which holds keys and values itself, got a pair.")
    query, padding = given.query, given.key_padding_mask
    batch = 1 if query.dim() == 2 else query.shape[0 if layer.batch_first else 1]
    if batch != cache.batch:
        raise ValueError(f"cache must have the batch of the query, {batch}, got {cache!r}.")
    if isinstance(cache, MemoryCache):
        return read_memory(layer, cache, given)
    if isinstance(padding, Tensor) and padding.dtype != torch.bool:
        raise ValueError(
            f"key_padding_mask must be bool or a rule beside a cache, got {spell(padding)}: say mask == float('-inf')."
        )
    return given


def check_cache(cache: object) -> Cache | MemoryCache:
    """Raise ``TypeError`` where a layer was given no cache."""
    if not isinstance(cache, (Cache, MemoryCache)):
        raise TypeError(
            "cache must be the cache of this one layer, such as a StaticCache or a MemoryCache, got "
            f"{spell(cache)}; a KVCache holds one for each layer: cache['layers.0.self_attn']."
        )
    return cache


def read_memory(layer: Layer, cache: MemoryCache, given: Arguments) -> Arguments:
    """A call over a memory, which is projected where that has not happened."""
    counted = counted_by(layer)
    if counted == "rotary" and given.positions is not None:
        counted = None
    rules = given.attn_mask.parts if isinstance(given.attn_mask, Mask) else ()
    if given.is_causal or any(isinstance(part, (Window, Rule)) for part in rules):
        counted = "is_causal" if given.is_causal else "attn_mask"
    if counted is not None:
        raise ValueError(
            f"{counted} must not count positions over a MemoryCache, which does not know where its queries stand, got "
            f"{spell(getattr(given if counted in given._fields else layer, counted))}: give the rows of the mask as a "
            "tensor, and positions= for rotary."
        )
    key, value, axis = given.key, given.value, -2 if layer.batch_first or given.query.dim() == 2 else 0
    if not cache.filled:
        cache.update(*make_keys_values(layer, key, value, given.key_positions))
    elif isinstance(key, Tensor) and key.shape[axis] != cache.seqlen:
        raise ValueError(
            f"key must be the memory of the cache, of {cache.seqlen} tokens, got {key.shape[axis]}: reset the cache "
            "for another memory."
        )
    return Arguments(  # a graph of torch 2.8 can hold no _replace
        given.query,
        key,
        value,
        given.key_padding_mask,
        given.need_weights,
        given.attn_mask,
        given.average_attn_weights,
        given.is_causal,
        given.backend,
        given.positions,
        kv=(cache.k, cache.v),
    )


class Step(NamedTuple):
    """One call's place in a cache.

    ``start`` (batch, 1) are the tokens that each row held, ``positions`` (batch, seqlen) where the call's stand, and
    ``real`` says which of them are no padding, ``None`` for all.
    """

    cache: Cache
    start: Tensor
    positions: Tensor
    real: Tensor | None


def begin_step(cache: Cache | MemoryCache, call: Reading) -> Step:
    """Where the tokens of a call will stand.

    Raises:
        ValueError: keys that are no tokens of the queries' own row, or a mask that says nothing of earlier keys.
    """
    assert isinstance(cache, Cache)  # a memory is kv by now
    seqlen = call.query.shape[1]
    if call.key.shape[1] != seqlen:
        raise ValueError(
            f"key must be the tokens of the query beside a cache, {seqlen}, got {call.key.shape[1]}; what a "
            "cross-attention looks at goes into a MemoryCache."
        )
    for part in parts_of(call.mask):
        if isinstance(part, Documents) or (isinstance(part, Padding) and call.padding is None):
            kind = type(part).__name__
            hint = "call it document by document" if kind == "Documents" else "give padding as key_padding_mask"
            raise ValueError(f"attn_mask must hold no {kind} beside a cache, got {call.mask!r}: {hint}.")
    real = None if call.padding is None else call.valid
    if call.padding is not None:
        call.padding.check(cache.batch, 1, seqlen, seqlen)
    return Step(cache, cache.lengths[:, None].clone(), cache.positions(seqlen, real), real)


class Rules(NamedTuple):
    """The mask of a call taken apart: rules over positions, and tensors."""

    counting: list[Mask]
    tables: list[Dense]


def read_rules(layer: Layer, cache: Cache, mask: Mask | None, seqlen: int) -> Rules:
    """The mask of a call, apart from padding, which the cache keeps.

    Raises:
        ValueError: a mask that cannot speak of earlier keys.
    """
    rules = Rules([], [])
    for part in parts_of(mask):
        if isinstance(part, Dense):
            check_width(part, seqlen, cache)
            rules.tables.append(part)
        elif not isinstance(part, Padding) and not (seqlen == 1 and hides_the_future_alone(part)):
            rules.counting.append(part)
    window = layer.window
    if isinstance(cache, RingCache) and window is not None and (window.left is None or window.left > cache.window):
        raise ValueError(f"window of a RingCache must reach as far as the layer's {window!r}, got {cache.window}.")
    return rules


def check_by_distance(bias: Bias) -> None:
    """Raise where a layer's bias is made for the keys of one call, and not for a distance."""
    if not bias.by_distance:
        raise ValueError(
            f"position_bias must go by distance beside a cache, as AlibiBias and RelativePositionBias do, got {bias!r}."
        )


def hides_the_future_alone(part: Mask) -> bool:
    """A rule shows a single query, the last token of its row, every key."""
    return isinstance(part, Window) and part.left is None and (part.right is None or part.right >= 0)


def check_width(part: Dense, seqlen: int, cache: Cache) -> None:
    """Raise where a mask tensor is neither over a call's own keys nor over every position of a row."""
    width = part.allowed.shape[3]
    if width not in (1, seqlen, cache.max_seqlen):
        whole = "" if cache.max_seqlen is None else f" or {cache.max_seqlen}, every position of a row"
        raise ValueError(f"attn_mask must be {seqlen} keys wide beside a cache, the call's own{whole}, got {width}.")


def extend(
    layer: Layer, step: Step, heads: tuple[Tensor, Tensor, Tensor], mask: Mask | None, bias: Bias | None
) -> tuple[Tensor, Tensor, Mask | None, Bias | None]:
    """Keys and values of all slots, with a call's own among them, and its mask and bias over them.

    Raises:
        ValueError: the heads do not fit the cache, or a mask or a bias cannot speak of it. The cache is as it was.
    """
    cache, (q, k, v) = step.cache, heads
    seqlen = q.shape[1]
    if k.shape[1] != seqlen or any(getattr(layer, name) for name in EXTRA_KEYS):
        raise ValueError(
            f"process_heads must return the call's {seqlen} keys beside a cache, got {k.shape[1]}, with "
            f"keys_before={layer.keys_before} and keys_after={layer.keys_after}."
        )
    refuse_gradients(q, k, v)
    rules = read_rules(layer, cache, mask, seqlen)
    k, v = cache.update(k, v, step.real)
    biases = () if bias is None else bias.parts
    counts = rules.counting or isinstance(cache, RingCache) or not all(isinstance(one, TensorBias) for one in biases)
    placed = cache.placed(step.positions, step.real is not None) if counts else None
    wide: list[Mask] = []
    if rules.tables or any(isinstance(one, TensorBias) for one in biases):
        own = own_tokens(step, seqlen)
        wide = [Dense(over_slots(part.allowed, own, seqlen, True, cache)) for part in rules.tables]
        if bias is not None:
            bias = functools.reduce(operator.add, [bias_over_slots(one, own, seqlen, cache) for one in biases])
    return k, v, join_masks(cache.rule(), placed, *rules.counting, *wide), bias


def bias_over_slots(bias: Bias, own: Tensor, seqlen: int, cache: Cache) -> Bias:
    """A bias over a call's own keys as one over all slots, 0 on earlier keys."""
    if not isinstance(bias, TensorBias):
        return bias
    return TensorBias(over_slots(bias.tensor, own, seqlen, 0.0, cache))


def own_tokens(step: Step, seqlen: int) -> Tensor:
    """Which of a call's tokens lies in each slot, (batch, slots), -1 for none of them."""
    places = step.cache.slots()
    if places is None:
        places = torch.arange(step.cache.capacity, device=step.start.device)
    own = places - step.start
    inside = (own >= 0) & (own < seqlen)
    if step.real is not None:  # real tokens come first there
        own = first_real(step.real).gather(1, own.clamp(0, seqlen - 1).long())
    return torch.where(inside, own, -1)


def over_slots(table: Tensor, own: Tensor, seqlen: int, past: bool | float, cache: Cache) -> Tensor:
    """A table (..., seqlen_q, seqlen) over a call's own keys as one over all slots, with ``past`` for the others."""
    if table.shape[3] not in (1, seqlen):  # over every position
        return F.pad(table, (0, cache.capacity - table.shape[3]), value=past)
    batch, slots = own.shape
    table = table.expand(batch, -1, -1, seqlen)
    index = own.clamp(min=0).long()[:, None, None, :].expand(-1, *table.shape[1:3], slots)
    return torch.where((own >= 0)[:, None, None, :], table.gather(3, index), past)


@contextlib.contextmanager
def undone_where_it_fails(cache: Cache | MemoryCache) -> Iterator[None]:
    """A cache is as it was before, if something is raised inside."""
    before = cache.state()
    try:
        yield
    except BaseException:
        cache.restore(before)
        raise

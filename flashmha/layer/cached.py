"""A call over a cache, at the door: what it may be, and where its tokens stand."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..cache.base import Cache, Restorable
from ..cache.memory import MemoryCache
from ..problem.documents import Documents
from ..problem.masks import Mask
from ..problem.packing import parts_of
from ..problem.ragged import Padding
from ..problem.rules import Rule
from ..problem.windows import Window
from ..problem.wording import spell
from .arguments import Arguments
from .call import Reading
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


class CacheStep(NamedTuple):
    """One call's place in a cache.

    ``real`` (batch, seqlen) says which tokens are no padding, ``None`` for all. ``positions`` (batch, seqlen) are where
    they will stand, ``None`` where rotary does not ask.
    """

    cache: Cache
    real: Tensor | None
    positions: Tensor | None


def begin_step(layer: Layer, cache: Cache | MemoryCache, call: Reading) -> CacheStep:
    """The place of a call.

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
    if call.padding is not None:
        call.padding.check(cache.batch, 1, seqlen, seqlen)
    real = None if call.padding is None else call.valid
    return CacheStep(cache, real, None if layer.rotary is None else cache.positions(seqlen, real))


@contextlib.contextmanager
def undone_where_it_fails(cache: Restorable) -> Iterator[None]:
    """A cache is as it was before, if something is raised inside."""
    before = cache.state()
    try:
        yield
    except BaseException:
        cache.restore(before)
        raise

"""``KVCache``: the caches of every layer of a model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..cache.base import Cache
from ..cache.checks import row_numbers
from ..cache.memory import MemoryCache
from ..cache.pages import PagedCache, PagePool
from ..cache.ring import RingCache
from ..cache.static import StaticCache
from ..host.torch_state import computed_in
from ..layer.cached import undone_where_it_fails
from ..layer.module import FlashMultiHeadAttention
from ..layer.projection import sizes_of
from ..problem.sizes import check_sizes
from ..problem.wording import spell

One = Cache | MemoryCache
"""The cache of one layer."""


class KVCache:
    """Caches of the layers of a model by the names of these, with the verbs of one.

    ``cache["layers.0.self_attn"]`` is that of a layer, ``cache["layers.0"]`` holds those inside. A model of your own
    hands each layer its own: ``layer(x, x, x, cache=cache[f"blocks.{number}.attention"])``.

    Args:
        caches: name of a layer -> its cache.

    Raises:
        ValueError: two layers have one cache, in which each would write over the other.
    """

    def __init__(self, caches: Mapping[str, One]) -> None:
        names: dict[int, str] = {}
        for name, cache in caches.items():
            first = names.setdefault(id(cache), name)
            if first != name:
                raise ValueError(
                    f"caches must be one for each layer, got one {type(cache).__name__} for {first} and {name}."
                )
        self.parts: dict[str, One | KVCache] = {}
        inside: dict[str, dict[str, One]] = {}
        for name, cache in caches.items():
            if not isinstance(cache, One):
                raise TypeError(f"caches must be of one layer each, got {spell(cache)} under {name!r}.")
            first, dot, rest = name.partition(".")
            if dot:
                inside.setdefault(first, {})[rest] = cache
            else:
                self.parts[first] = cache
        for name in inside.keys() & self.parts.keys():
            raise ValueError(f"caches must be of layers beside one another, got {name!r} and others inside it.")
        self.parts.update({first: KVCache(held) for first, held in inside.items()})

    @classmethod
    def of(
        cls,
        model: nn.Module,
        batch: int,
        max_seqlen: int,
        *,
        chunk: int | None = None,
        page_size: int | None = None,
        pages: int | None = None,
        memory_seqlen: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> KVCache:
        """Caches for every ``FlashMultiHeadAttention`` of a model outside encoders.

        ``multihead_attn`` of an ``nn.TransformerDecoderLayer`` gets a ``MemoryCache``, every other layer a
        ``StaticCache``.

        Args:
            model: a decoder, or any model; swap it first.
            batch: rows.
            max_seqlen: tokens that a row has room for.
            chunk: layers with a ``window`` get a ``RingCache`` that takes so many tokens a call, where that is smaller.
            page_size: other layers get a ``PagedCache``, each out of a ``PagePool`` of its own.
            pages: how many pages a pool has; default as many as all rows of ``max_seqlen`` need.
            memory_seqlen: keys of the memory, whose place is then allocated here, as CUDA graphs want it.
            device, dtype: of the heads; default those of each layer's parameters, and autocast's dtype inside autocast.

        Raises:
            ValueError: the model holds no such layer.
        """
        if pages is not None and page_size is None:
            raise ValueError(f"page_size must be given beside pages, got None beside pages={pages}.")
        sizes = {"chunk": chunk, "page_size": page_size, "pages": pages, "memory_seqlen": memory_seqlen}
        check_sizes(**{name: size for name, size in sizes.items() if size is not None})

        def make(layer: FlashMultiHeadAttention, crosses: bool) -> One:
            _, heads_kv, head_dim, head_dim_v = sizes_of(layer)
            told = {"head_dim_v": head_dim_v, **placement(layer, device, dtype)}
            left = None if layer.window is None else layer.window.left
            if crosses:
                return MemoryCache(batch, heads_kv, head_dim, seqlen=memory_seqlen, **told)
            if chunk is not None and left is not None and left + chunk < max_seqlen:
                return RingCache(batch, left, heads_kv, head_dim, chunk=chunk, **told)
            if page_size is not None:
                count = -(-max_seqlen // page_size) * batch if pages is None else pages
                return PagedCache(PagePool(count, page_size, heads_kv, head_dim, **told), batch, max_seqlen)
            return StaticCache(batch, max_seqlen, heads_kv, head_dim, **told)

        made = {name: make(layer, crosses) for name, layer, crosses in find_layers(model)}
        if not made:
            raise ValueError(
                f"model must hold a FlashMultiHeadAttention outside encoders, got a {type(model).__name__} with none: "
                "call replace_mha first."
            )
        return cls(made)

    def __getitem__(self, name: str) -> Any:
        part: Any = self
        for word in name.split("."):
            if not isinstance(part, KVCache) or word not in part.parts:
                there = ", ".join(self.names())
                raise KeyError(f"cache must hold {name!r}, got only {there}.")
            part = part.parts[word]
        return part

    def named_caches(self) -> Iterator[tuple[str, One]]:
        """The name and the cache of every layer."""
        for name, part in self.parts.items():
            if isinstance(part, KVCache):
                yield from ((f"{name}.{rest}", cache) for rest, cache in part.named_caches())
            else:
                yield name, part

    def names(self) -> list[str]:
        """The names of the layers."""
        return [name for name, _ in self.named_caches()]

    def caches(self) -> list[One]:
        """The cache of every layer."""
        return [cache for _, cache in self.named_caches()]

    def growing(self) -> list[Cache]:
        """The caches of self-attention, which grow with every call."""
        return [cache for cache in self.caches() if isinstance(cache, Cache)]

    def paged(self) -> list[PagedCache]:
        """The caches that book pages."""
        return [cache for cache in self.caches() if isinstance(cache, PagedCache)]

    @property
    def nbytes(self) -> int:
        """Bytes of device memory that all caches hold."""
        return sum(cache.nbytes for cache in self.caches())

    def get_seq_length(self) -> Tensor:
        """The tokens that each row holds, (batch,) int32, by the first self-attention."""
        for cache in self.growing():
            return cache.get_seq_length()
        raise ValueError(f"cache must hold a self-attention's, got {', '.join(self.names())}.")

    def reorder(self, rows: Tensor) -> None:
        """Row i becomes what row ``rows[i]`` was, in every layer: (batch,) integers."""
        with undone_where_it_fails(self):  # pages of one pool may not do for all layers
            for cache in self.caches():
                cache.prepare_reorder(rows)
        for cache in self.caches():
            cache.put_in_order(rows)

    def crop(self, length: int | Tensor) -> None:
        """Keep the first ``length`` tokens of each row, see ``Cache.crop``."""
        caches = self.growing()
        for cache, left in zip(caches, [cache.cropped(length) for cache in caches]):
            cache.lengths.copy_(left)

    def keep(self, length: int | Tensor, chosen: Tensor) -> None:
        """Of the tokens behind ``length`` keep the chosen ones, see ``Cache.keep``."""
        caches = self.growing()
        for cache, moved in zip(caches, [cache.kept(length, chosen) for cache in caches]):
            cache.move(moved)

    def reset(self) -> None:
        """Forget every token, and the memory."""
        for cache in self.caches():
            cache.reset()

    def reserve(self, seqlen: int) -> None:
        """Make sure of room for ``seqlen`` tokens more, see ``Cache.reserve``."""
        with undone_where_it_fails(self):
            for cache in self.growing():
                cache.reserve(seqlen)

    def release(self, rows: Iterable[int]) -> None:
        """Forget the tokens of rows that are done, see ``Cache.release``; the memory stays."""
        numbers = row_numbers(rows, min((cache.batch for cache in self.caches()), default=0))
        for cache in self.growing():
            cache.release(numbers)

    def trim(self) -> None:
        """Give back the pages in which no token lies."""
        for cache in self.paged():
            cache.trim()

    def state(self) -> list[Any]:
        """What ``restore`` needs to undo a call of a model that failed on the way."""
        return [cache.state() for cache in self.caches()]

    def restore(self, state: list[Any]) -> None:
        """Go back to a state."""
        for cache, before in zip(self.caches(), state):
            cache.restore(before)

    def __repr__(self) -> str:
        return f"KVCache({', '.join(self.names())})"


def find_layers(model: nn.Module) -> Iterator[tuple[str, FlashMultiHeadAttention, bool]]:
    """The layers of a model that a cache serves, by name, and whether each looks at a memory."""
    modules = {
        ".".join(word for word in name.split(".") if word != COMPILED): module  # the inner one, which comes later
        for name, module in model.named_modules(remove_duplicate=False)
    }
    inside = tuple(f"{name}." for name, module in modules.items() if isinstance(module, WITHOUT_CACHE))
    for name, module in modules.items():
        if not isinstance(module, FlashMultiHeadAttention) or f"{name}.".startswith(inside):
            continue
        above, _, own = name.rpartition(".")
        decodes = own == "multihead_attn" and isinstance(modules[above], nn.TransformerDecoderLayer)
        yield name, module, decodes


COMPILED = "_orig_mod"
"""What ``torch.compile(module)`` calls the module; inside, layers go by their own names."""
WITHOUT_CACHE = (nn.TransformerEncoder, nn.TransformerEncoderLayer)
"""Modules that hand no cache on."""


def placement(
    layer: FlashMultiHeadAttention, device: torch.device | str | None, dtype: torch.dtype | None
) -> dict[str, Any]:
    """Where and in what dtype a layer's heads will be."""
    parameter = next(layer.parameters(), torch.empty(0))
    like = torch.empty(0, device=parameter.device if device is None else device, dtype=parameter.dtype)
    return {"device": like.device, "dtype": dtype or computed_in(like)}


def check_kv_cache(cache: object) -> KVCache:
    """Raise ``TypeError`` where a decoder was given something else."""
    if not isinstance(cache, KVCache):
        raise TypeError(
            f"cache must be a KVCache, as KVCache.of(decoder, batch, max_seqlen) makes one, got {spell(cache)}."
        )
    return cache

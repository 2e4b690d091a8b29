"""Keys that lie in a cache: where each row's queries and slots stand, and in which pages the slots lie."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..host.torch_state import is_dense
from .documents import Documents
from .masks import Mask, combine
from .positions import MaskMod, Restarts, check_broadcast, look_up_in
from .rebuilding import Rebuild
from .tensors import is_table_of_pages, is_vector_of_integers
from .wording import spell


class Positions(Mask):
    """Where the queries and the keys of each row stand, where that is not their place among the tensors' slots.

    A cache holds more slots than keys, and as many keys in one row as it happens to. Windows, rules over positions and
    biases by distance read these positions; alignment says nothing then. By itself it hides what holds no key.

    Attributes:
        queries: (batch, seqlen_q) integers.
        keys: (batch, seqlen_k) integers, negative where a slot holds no key; ``None`` where slot j holds the key at j.
        at_end: the queries of a row are neighbours, and the last stands at the last key that ``KeyLengths`` beside this
            leaves: what a kernel for caches takes for granted.
    """

    __slots__ = ("at_end", "keys", "queries")
    feature = "cache"
    aligned = True

    def __init__(self, queries: Tensor, keys: Tensor | None = None, *, at_end: bool = False) -> None:
        for name, places in (("queries", queries), ("keys", keys)):
            whole = isinstance(places, Tensor) and places.dim() == 2 and not places.is_floating_point()
            if not whole and (name == "queries" or places is not None):
                raise ValueError(f"{name} must be an integer tensor (batch, seqlen), got {spell(places)}.")
        self.queries, self.keys, self.at_end = queries, keys, at_end

    @property
    def documents(self) -> Positions:  # type: ignore[override]
        return self

    def check(self, batch: int, heads: int, seqlen_q: int, seqlen_k: int) -> None:
        for name, places, seqlen in (("queries", self.queries, seqlen_q), ("keys", self.keys, seqlen_k)):
            if places is not None and places.shape != (batch, seqlen):
                raise ValueError(f"{name} must have shape {(batch, seqlen)}, got {tuple(places.shape)}.")

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.queries,) if self.keys is None else (self.queries, self.keys)

    def flatten(self) -> tuple[tuple[Tensor, ...], Rebuild[Mask]]:
        at_end = self.at_end

        def again(tensors: Sequence[Tensor]) -> Mask:
            return Positions(*tensors, at_end=at_end)

        return self.tensors(), again

    def merged(self, other: Mask) -> None:
        if isinstance(other, (Positions, Documents)):
            raise ValueError(f"a mask must hold at most one rule of where tokens stand, got {self!r} & {other!r}.")

    def positions(self, seqlen_q: int, seqlen_k: int, align: str) -> tuple[Tensor, Tensor]:
        """The position of every query and of every key, (batch, seqlen)."""
        if self.keys is not None:
            return self.queries, self.keys
        slots = torch.arange(seqlen_k, device=self.queries.device)
        return self.queries, slots.expand(self.queries.shape[0], -1)

    def mask_mod(self, seqlen_q: int, seqlen_k: int, documents: Restarts | None = None) -> MaskMod:
        keys = self.keys
        if keys is None:
            return lambda batch, head, q_idx, k_idx: k_idx >= 0
        return lambda batch, head, q_idx, k_idx: keys[batch, k_idx] >= 0

    def __repr__(self) -> str:
        return f"Positions({', '.join(str(tuple(places.shape)) for places in self.tensors())})"


class OwnTokens(Mask):
    """Which of a call's own tokens a query sees, in a call over a cache: a tree of guesses. Earlier keys it hides not.

    Attributes:
        allowed: bool, broadcasts to (batch, heads, seqlen_q, tokens), ``True`` = may attend.
        start: (batch,) integers, the position of the first of the tokens.
    """

    __slots__ = ("allowed", "start")
    feature = "own_tokens"

    def __init__(self, allowed: Tensor, start: Tensor) -> None:
        if not is_dense(allowed) or allowed.dtype != torch.bool or not 2 <= allowed.dim() <= 4 or not allowed.shape[-1]:
            raise ValueError(
                "allowed must be a bool tensor that broadcasts to (batch, heads, seqlen_q, tokens), with a token, "
                f"got {spell(allowed)}."
            )
        if not is_vector_of_integers(start):
            raise ValueError(f"start must be an int32 or int64 tensor of shape (batch,), got {spell(start)}.")
        self.allowed, self.start = allowed[(None,) * (4 - allowed.dim())], start

    def check(self, batch: int, heads: int, seqlen_q: int, seqlen_k: int) -> None:
        check_broadcast("allowed", self.allowed, (batch, heads, seqlen_q, self.allowed.shape[3]))
        if self.start.shape != (batch,):
            raise ValueError(f"start must have shape (batch,) = ({batch},), got {tuple(self.start.shape)}.")

    def tensors(self) -> tuple[Tensor, ...]:
        return self.allowed, self.start

    def flatten(self) -> tuple[tuple[Tensor, ...], Rebuild[Mask]]:
        return self.tensors(), lambda tensors: OwnTokens(*tensors)

    def mask_mod(self, seqlen_q: int, seqlen_k: int, documents: Restarts | None = None) -> MaskMod:
        look_up, start, tokens = look_up_in(self.allowed), self.start, self.allowed.shape[3]

        def visible(batch: Tensor, head: Tensor, q_idx: Tensor, k_pos: Tensor) -> Tensor:
            own = k_pos - start[batch]
            return (own < 0) | (own >= tokens) | look_up(batch, head, q_idx, own.clamp(0, tokens - 1))

        if documents is None:
            return visible
        keys = documents.positions(seqlen_q, seqlen_k, "bottom_right")[1]
        if keys.dim() == 2:
            return lambda batch, head, q_idx, k_idx: visible(batch, head, q_idx, keys[batch, k_idx])
        return lambda batch, head, q_idx, k_idx: visible(batch, head, q_idx, keys[k_idx])

    def __repr__(self) -> str:
        return f"OwnTokens({tuple(self.allowed.shape)})"


class Pages(Mask):
    """Where keys and values lie, where these are a pool of pages: slot ``j`` of row ``b`` is the key
    ``k[block_table[b, j // page_size], j % page_size]``.

    Beside it k and v are (pages, page_size, heads_kv, head_dim), and a problem has as many keys as a row of the table
    has slots. It hides none of them: ``KeyLengths`` says how many a row holds. Pages may be in several rows.

    Attributes:
        block_table: (batch, pages of a row) int32, no entry beyond the pool.
        page_size: keys of a page.
    """

    __slots__ = ("block_table", "page_size")
    feature = "pages"

    def __init__(self, block_table: Tensor, page_size: int) -> None:
        if not is_table_of_pages(block_table):
            raise ValueError(f"block_table must be an int32 tensor (batch, pages), got {spell(block_table)}.")
        if isinstance(page_size, bool) or not isinstance(page_size, (int, torch.SymInt)) or page_size < 1:
            raise ValueError(f"page_size must be a whole number of at least 1, got {page_size!r}.")
        self.block_table, self.page_size = block_table, page_size

    @property
    def seqlen_k(self) -> int:
        """Slots of a row."""
        return self.block_table.shape[1] * self.page_size

    def read(self, pool: Tensor) -> Tensor:
        """The rows (batch, seqlen_k, heads_kv, head_dim) that lie in a pool, copied."""
        return read_pages(pool, self.block_table)

    def check(self, batch: int, heads: int, seqlen_q: int, seqlen_k: int) -> None:
        if self.block_table.shape[0] != batch or self.seqlen_k != seqlen_k:
            raise ValueError(
                f"block_table must have shape (batch, pages) = ({batch}, seqlen_k / page_size = {seqlen_k} / "
                f"{self.page_size}), got {tuple(self.block_table.shape)}."
            )

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.block_table,)

    def flatten(self) -> tuple[tuple[Tensor, ...], Rebuild[Mask]]:
        page_size = self.page_size
        return self.tensors(), lambda tensors: Pages(tensors[0], page_size)

    def merged(self, other: Mask) -> None:
        if isinstance(other, Pages):
            raise ValueError(f"a mask must hold at most one table of pages, got {self!r} & {other!r}.")

    def mask_mod(self, seqlen_q: int, seqlen_k: int, documents: Restarts | None = None) -> MaskMod:
        return lambda batch, head, q_idx, k_idx: k_idx >= 0

    def __repr__(self) -> str:
        return f"Pages({tuple(self.block_table.shape)}, page_size={self.page_size})"


def read_pages(pool: Tensor, block_table: Tensor) -> Tensor:
    """The rows of a table (batch, pages * page_size, heads_kv, head_dim), copied out of a pool."""
    return pool[block_table].flatten(1, 2)


def without_pages(mask: Mask) -> Mask | None:
    """The mask over keys that were copied out of their pages."""
    left = tuple(part for part in mask.parts if not isinstance(part, Pages))
    return combine(left) if left else None

"""Steps over a cache, for kernels that read keys where they lie: each row up to its length, in rows or in pages.

Such a kernel takes a row's queries for neighbours that end with its keys, which is what ``Positions.at_end`` promises,
and counts causality, windows and ALiBi from there. It runs forward alone. Not a backend.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ...host.kernels import lined_up
from ...problem.spec import AttentionSpec
from ..limits import FEATURES
from .documents import POSITIONS, positions_lost

CACHED = ("cache", "pages")
"""Features of keys that kernels for caches alone read where they lie."""
BESIDE_NO_CACHE = ("backward", "dropout", "key_padding", "documents")
"""Features that no kernel for caches serves."""


def is_cache(spec: AttentionSpec) -> bool:
    """A problem goes to the kernel for caches, if it is within its limits."""
    return "key_lengths" in spec.needs and spec.features.isdisjoint(BESIDE_NO_CACHE)


def lies_in_cache(spec: AttentionSpec) -> bool:
    """Keys stand, or lie, where no kernel but one for caches finds them."""
    return "cache" in spec.needs or "pages" in spec.needs


def caches_exceeded(spec: AttentionSpec) -> list[str]:
    """A phrase for all that a package whose kernels take packed documents, or rows of a cache, cannot serve."""
    lying = [name for name in CACHED if name in spec.needs]
    if not lying:
        return positions_lost(spec)
    reasons, said = [], " and ".join(lying)
    if "key_lengths" not in spec.features:
        reasons.append(f"{said} without key_lengths (a kernel for caches wants the lengths of rows)")
    apart = [name for name in BESIDE_NO_CACHE if name in spec.needs]
    if apart:
        reasons.append(f"{said} beside {', '.join(apart)} (a kernel for caches runs forward, over whole rows)")
    positions = spec.positions
    counting = [name for name in FEATURES if name in spec.features & POSITIONS]
    if positions is None and counting:
        reasons.append(f"{said} beside {', '.join(counting)} without Positions (queries end with the keys there)")
    if positions is not None and not (positions.at_end and positions.keys is None):
        reasons.append("Positions anywhere (at_end=True, and keys in their slots)")
    if "pages" in spec.features and spec.head_dim % 8:
        reasons.append(f"pages of head_dim={spec.head_dim} (a multiple of 8, or the package copies the pool)")
    return reasons


def page_table(spec: AttentionSpec) -> Tensor | None:
    """The pages of each row as kernels take them, (batch, pages) int32; ``None`` where keys lie in rows."""
    pages = spec.pages
    return None if pages is None else lined_up(pages.block_table)


def read_cache(function: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, **told: Any) -> Any:
    """An ``is_cache`` problem by ``flash_attn_with_kvcache`` of a package: out, or the pair of it and lse.

    Of an item without keys the kernels write zeros, since partial results could not be combined otherwise.
    """
    k, v = lined_up(k), lined_up(v)
    return function(q, k, v, cache_seqlens=spec.key_lengths(), return_softmax_lse=spec.need_lse, **told)

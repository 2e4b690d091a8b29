"""A batch as packed documents, for kernels that know documents ("varlen") and no padding.

The documents are those of the mask. Where there is padding instead, each batch item is one, with its real keys alone:
padding of any pattern goes behind the keys of all items, which no rule notices as long as none looks at positions.
Not a backend.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..masks import Documents, find
from ..spec import AttentionSpec
from .base import FEATURES
from .compact import key_lengths, validity
from .flash import packed, real_rows, unpacked, unpacked_lse

PADDING = ("key_lengths", "key_padding")
POSITIONS = frozenset(("causal", "window", "documents", "alibi"))
"""What looks at the position of a key."""


def packs(spec: AttentionSpec) -> bool:
    """A problem goes to the kernel as documents."""
    return "documents" in spec.features or not spec.features.isdisjoint(PADDING)


def refusals(spec: AttentionSpec) -> list[str]:
    """What padding cannot stand beside here."""
    padding = [name for name in PADDING if name in spec.features]
    beside = [name for name in FEATURES if name in spec.features & POSITIONS]
    if not padding or not beside:
        return []
    return [f"{' and '.join(padding)} beside {', '.join(beside)} (real keys are packed and lose their positions)"]


def pack(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
    """A batch as tensors (total, heads, head_dim) and the offsets a kernel wants; the device is never waited for."""
    documents = find(spec.mask, Documents)
    if documents is not None:
        return packed(q, k, v, documents)
    valid = validity(spec.mask, spec)
    assert valid is not None
    # bytes rather than bool: every torch sorts them on a GPU
    order = (~valid).flatten().to(torch.uint8).argsort(stable=True)
    ends = F.pad(valid.sum(1).cumsum(0), (1, 0)).int()
    k, v = (real_rows(x.flatten(0, 1).index_select(0, order), ends) for x in (k, v))
    offsets = {
        "cu_seqlens_q": torch.arange(spec.batch + 1, dtype=torch.int32, device=q.device) * spec.seqlen_q,
        "cu_seqlens_k": ends,
        "max_seqlen_q": spec.seqlen_q,
        "max_seqlen_k": spec.seqlen_k,
    }
    return q.flatten(0, 1), k, v, offsets


def unpack(out: Tensor, spec: AttentionSpec) -> Tensor:
    """A packed output as a batch."""
    documents = find(spec.mask, Documents)
    if documents is not None:
        return unpacked(out, documents)
    return out.view(spec.batch, spec.seqlen_q, *out.shape[1:])


def unpack_lse(lse: Tensor, spec: AttentionSpec) -> Tensor:
    """A packed log-sum-exp (heads, total) as that of a batch."""
    documents = find(spec.mask, Documents)
    if documents is not None:
        return unpacked_lse(lse, documents)
    return lse.view(-1, spec.batch, spec.seqlen_q).transpose(0, 1)


def is_cache(spec: AttentionSpec) -> bool:
    """Key lengths alone, in inference: a kernel for caches of keys reads them where they lie."""
    return "key_lengths" in spec.features and spec.features.isdisjoint(("key_padding", "backward", "dropout"))


def read_cache(
    function: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, options: dict[str, Any]
) -> Any:
    """What ``flash_attn_with_kvcache`` of a package says of an ``is_cache`` problem: out, or the pair of it and lse.

    Of an item without keys the kernels write zeros, since partial results could not be combined otherwise.
    """
    k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
    return function(q, k, v, cache_seqlens=key_lengths(spec), return_softmax_lse=spec.need_lse, **options)

"""A batch as packed documents, for kernels that know documents ("varlen") and no padding.

The documents are those of the mask. Where there is padding instead, each batch item is two: its real keys with all of
its queries, then its padding with none, so that every key is some document's and gets its gradient, 0 there. Real keys
that do not lie first are moved, which no rule notices as long as none looks at positions. Not a backend.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...problem.masks import Documents, KeyPadding, Padding, find
from ...problem.spec import AttentionSpec
from ..base import FEATURES
from .compact import key_lengths, padding
from .order import Order, permuted, real_first

PADDING = ("key_lengths", "key_padding")
POSITIONS = frozenset(("causal", "window", "documents", "alibi"))
"""What looks at the position of a key."""


def packs(spec: AttentionSpec) -> bool:
    """A problem goes to the kernel as documents."""
    return "documents" in spec.features or not spec.features.isdisjoint(PADDING)


def positions_lost(spec: AttentionSpec) -> list[str]:
    """What padding cannot stand beside here."""
    padding = [name for name in PADDING if name in spec.features]
    beside = [name for name in FEATURES if name in spec.features & POSITIONS]
    if not padding or not beside:
        return []
    return [f"{' and '.join(padding)} beside {', '.join(beside)} (real keys are packed and lose their positions)"]


def pack(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
    """A batch as tensors (total, heads, head_dim) and the offsets a kernel wants; the device is never waited for."""
    documents = None if isinstance(spec.mask, Padding) else find(spec.mask, Documents)
    if documents is not None:
        return packed(q, k, v, documents)
    plan = plan_of(spec)
    k, v = k.flatten(0, 1), v.flatten(0, 1)
    if plan.order is not None:
        k, v = permuted((k, v), plan.order)
    return q.flatten(0, 1), k, v, plan.offsets


def offsets_in_place(spec: AttentionSpec) -> dict[str, Any] | None:
    """The offsets a kernel wants where no token has to be moved, nor to be kept out; else ``None``."""
    documents = None if isinstance(spec.mask, Padding) else find(spec.mask, Documents)
    if documents is None:
        plan = plan_of(spec)
        return plan.offsets if plan.order is None else None
    whole = documents.total == spec.seqlen_q and documents.total_k == spec.seqlen_k
    return offsets(documents, spec.seqlen_q, spec.seqlen_k) if whole else None


def plan_of(spec: AttentionSpec) -> Plan:
    """Padding as documents, as the rule keeps it."""
    rule = spec.mask if isinstance(spec.mask, Padding) else padding(spec)
    assert rule is not None
    return rule.once(("documents", spec.seqlen_q, spec.seqlen_k), functools.partial(planned, rule, spec))


class Plan(NamedTuple):
    """Padding as documents: how keys are moved, ``None`` where they lie right, and the offsets a kernel wants."""

    order: Order | None
    offsets: dict[str, Any]


def planned(rule: Padding, spec: AttentionSpec) -> Plan:
    if isinstance(rule, KeyPadding):
        order, lengths = real_first(rule.valid), rule.valid.sum(1)
    else:
        order, lengths = None, key_lengths(spec)
    where = {
        "cu_seqlens_q": query_offsets(spec.batch, spec.seqlen_q, spec.device),
        "cu_seqlens_k": key_offsets(lengths, spec.seqlen_k),
        "max_seqlen_q": spec.seqlen_q,
        "max_seqlen_k": spec.seqlen_k,
    }
    return Plan(order, where)


def query_offsets(batch: int, seqlen_q: int, device: torch.device) -> Tensor:
    """Where the queries of each document start: 0, seqlen_q, seqlen_q, 2 seqlen_q, 2 seqlen_q, ..."""
    return (torch.arange(2 * batch + 1, dtype=torch.int32, device=device) + 1) // 2 * seqlen_q


def key_offsets(lengths: Tensor, seqlen_k: int) -> Tensor:
    """Where its keys do: 0, lengths[0], seqlen_k, seqlen_k + lengths[1], 2 seqlen_k, ..."""
    batch = lengths.shape[0]
    starts = torch.arange(batch, device=lengths.device) * seqlen_k
    steps = torch.stack((starts, starts + lengths), dim=1).flatten()
    return F.pad(steps, (0, 1), value=batch * seqlen_k).int()


def unpack(out: Tensor, spec: AttentionSpec) -> Tensor:
    """A packed output as a batch."""
    documents = None if isinstance(spec.mask, Padding) else find(spec.mask, Documents)
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


def packed(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
    """Batch 1 with ``Documents`` as the packed tensors (total, heads, head_dim) and offsets a kernel wants."""
    q, k, v = q[0], k[0], v[0]
    where = offsets(documents, q.shape[0], k.shape[0])
    if documents.total != q.shape[0] or documents.total_k != k.shape[0]:
        real = owned(q, where["cu_seqlens_q"])
        real_k = real if documents.aligned and q.shape[0] == k.shape[0] else owned(k, where["cu_seqlens_k"])
        q = torch.where(real, q, 0.0)
        k, v = (torch.where(real_k, x, 0.0) for x in (k, v))
    return q, k, v, where


def offsets(documents: Documents, total_q: int, total_k: int) -> dict[str, Any]:
    """Where documents start and how long they are, in the words of a kernel."""
    ends = documents.cu_seqlens.int()
    return {
        "cu_seqlens_q": ends,
        "cu_seqlens_k": ends if documents.aligned else documents.cu_seqlens_k.int(),
        "max_seqlen_q": longest(documents.max_seqlen, documents.cu_seqlens, total_q),
        "max_seqlen_k": longest(documents.max_seqlen_k, documents.cu_seqlens_k, total_k),
    }


def unpacked(out: Tensor, documents: Documents) -> Tensor:
    """A packed output as batch 1, zeros where no document is."""
    return (out if documents.total == out.shape[0] else real_rows(out, documents.cu_seqlens)).unsqueeze(0)


def unpacked_lse(lse: Tensor, documents: Documents) -> Tensor:
    """A packed log-sum-exp (heads, total) as batch 1, ``-inf`` where no document is."""
    if documents.total == lse.shape[1]:
        return lse.unsqueeze(0)
    real = owned(lse.transpose(0, 1), documents.cu_seqlens)[:, 0, 0]
    return lse.masked_fill(~real, float("-inf")).unsqueeze(0)


def real_rows(packed_rows: Tensor, offsets: Tensor) -> Tensor:
    """Rows of documents as they are, and zeros behind them.

    Kernels never write rows that belong to no document, nor their gradients (flash-attention#2324); ``torch.where``
    keeps what arrives in their gradient out.
    """
    return torch.where(owned(packed_rows, offsets), packed_rows, 0.0)


def owned(packed_rows: Tensor, offsets: Tensor) -> Tensor:
    """Which rows belong to a document, (total, 1, 1)."""
    return (torch.arange(packed_rows.shape[0], device=packed_rows.device) < offsets[-1])[:, None, None]


def longest(known: int | None, offsets: Tensor, total: int) -> int:
    """A bound on the longest document, at least 1: a bound of 0 launches an empty grid, which is an error.

    Where the device must not be asked, while somebody compiles or captures a CUDA graph, it is the total.
    """
    if known is not None:
        return max(1, known)
    if torch.compiler.is_compiling() or (offsets.is_cuda and torch.cuda.is_current_stream_capturing()):
        return total
    return max(1, int(offsets.diff().max()))

"""A batch as packed documents, for kernels that know documents ("varlen") and no padding.

The documents are those of the mask. Where there is padding instead, each batch item is two: its real keys with all of
its queries, then its padding with none, so that every key is some document's and gets its gradient, 0 there. Real keys
that do not lie first are moved, which no rule notices as long as none looks at positions. Not a backend.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...host.torch_state import is_capturing, is_compiling, surely
from ...problem.documents import Documents
from ...problem.ragged import KeyPadding, Padding
from ...problem.spec import AttentionSpec
from ..limits import FEATURES
from .order import Order, permute_rows, real_first

PADDING = ("key_lengths", "key_padding")
POSITIONS = frozenset(("causal", "window", "documents", "alibi"))
"""Features that look at the position of a key."""


MIN_MOVED_WORK = 2.0**32
"""Operations of attention beside padding from which moving keys pays where a kernel takes a mask too: 12 heads of 64 on
32 x 256 tokens. On 32 x 128 a whole encoder was at 0.7 of one with a mask, on an H200."""


def worth_moving(batch: Any, seqlen_q: Any, seqlen_k: Any, width: Any) -> bool:
    """Padding of such sizes and features is worth moving keys; sizes that are not known are."""
    return not surely(4.0 * batch * seqlen_q * seqlen_k * width < MIN_MOVED_WORK)


def needs_packing(spec: AttentionSpec) -> bool:
    """A problem goes to the kernel as documents."""
    return "documents" in spec.needs or spec.is_padded


def positions_lost(spec: AttentionSpec) -> list[str]:
    """A phrase for features that padding cannot stand beside here."""
    padding = [name for name in PADDING if name in spec.features]
    beside = [name for name in FEATURES if name in spec.features & POSITIONS]
    if not padding or not beside:
        return []
    return [f"{' and '.join(padding)} beside {', '.join(beside)} (real keys are packed and lose their positions)"]


def pack_batch(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
    """A batch as tensors (total, heads, head_dim) and the offsets a kernel wants.

    The device is not waited for, but for documents whose longest is not known.
    """
    documents = spec.documents
    if documents is None:
        plan = plan_of(spec)
        k, v = k.flatten(0, 1), v.flatten(0, 1)
        if plan.order is not None:
            k, v = permute_rows((k, v), plan.order)
        return q.flatten(0, 1), k, v, plan.offsets
    q, k, v = q[0], k[0], v[0]
    where = kernel_offsets(documents, q.shape[0], k.shape[0])
    if documents.total != q.shape[0] or documents.total_k != k.shape[0]:
        # a kernel never writes the gradients of rows that no document owns (flash-attention#2324)
        real = owned(q, where["cu_seqlens_q"])
        real_k = real if documents.aligned and q.shape[0] == k.shape[0] else owned(k, where["cu_seqlens_k"])
        q = torch.where(real, q, 0.0)
        k, v = (torch.where(real_k, x, 0.0) for x in (k, v))
    return q, k, v, where


def offsets_in_place(spec: AttentionSpec) -> dict[str, Any] | None:
    """The offsets a kernel wants where no token has to be moved, nor to be kept out; else ``None``."""
    documents = spec.documents
    if documents is None:
        plan = plan_of(spec)
        return plan.offsets if plan.order is None else None
    whole = documents.total == spec.seqlen_q and documents.total_k == spec.seqlen_k
    return kernel_offsets(documents, spec.seqlen_q, spec.seqlen_k) if whole else None


def plan_of(spec: AttentionSpec) -> PaddingPlan:
    """Padding as documents, as the rule keeps it."""
    rule = spec.padding()
    assert rule is not None
    return rule.once(("documents", spec.seqlen_q, spec.seqlen_k), functools.partial(plan_padding, rule, spec))


class PaddingPlan(NamedTuple):
    """Padding as documents: how keys are moved, ``None`` where they lie right, and the offsets a kernel wants."""

    order: Order | None
    offsets: dict[str, Any]


def plan_padding(rule: Padding, spec: AttentionSpec) -> PaddingPlan:
    if isinstance(rule, KeyPadding):
        order, lengths = real_first(rule.valid), rule.valid.sum(1)
    else:
        order, lengths = None, spec.key_lengths()
    where = {
        "cu_seqlens_q": query_offsets(spec.batch, spec.seqlen_q, spec.device),
        "cu_seqlens_k": key_offsets(lengths, spec.seqlen_k),
        "max_seqlen_q": spec.seqlen_q,
        "max_seqlen_k": spec.seqlen_k,
    }
    return PaddingPlan(order, where)


def query_offsets(batch: int, seqlen_q: int, device: torch.device) -> Tensor:
    """The offsets of each document's queries: 0, seqlen_q, seqlen_q, 2 seqlen_q, 2 seqlen_q, ..."""
    return (torch.arange(2 * batch + 1, dtype=torch.int32, device=device) + 1) // 2 * seqlen_q


def key_offsets(lengths: Tensor, seqlen_k: int) -> Tensor:
    """The offsets of its keys: 0, lengths[0], seqlen_k, seqlen_k + lengths[1], 2 seqlen_k, ..."""
    batch = lengths.shape[0]
    starts = torch.arange(batch, device=lengths.device) * seqlen_k
    steps = torch.stack((starts, starts + lengths), dim=1).flatten()
    return F.pad(steps, (0, 1), value=batch * seqlen_k).int()


def unpack_batch(out: Tensor, spec: AttentionSpec) -> Tensor:
    """A packed output as a batch, zeros where no document is.

    Kernels never write rows that no document owns (flash-attention#2324); ``torch.where`` keeps what arrives in their
    gradient out.
    """
    documents = spec.documents
    if documents is None:
        return out.view(spec.batch, spec.seqlen_q, *out.shape[1:])
    if documents.total != out.shape[0]:
        out = torch.where(owned(out, documents.cu_seqlens), out, 0.0)
    return out.unsqueeze(0)


def unpack_batch_lse(lse: Tensor, spec: AttentionSpec) -> Tensor:
    """A packed log-sum-exp (heads, total) as that of a batch, ``-inf`` where no document is."""
    documents = spec.documents
    if documents is None:
        return lse.view(-1, spec.batch, spec.seqlen_q).transpose(0, 1)
    if documents.total != lse.shape[1]:
        real = owned(lse.transpose(0, 1), documents.cu_seqlens)[:, 0, 0]
        lse = lse.masked_fill(~real, float("-inf"))
    return lse.unsqueeze(0)


def kernel_offsets(documents: Documents, total_q: int, total_k: int) -> dict[str, Any]:
    """The offsets and longest lengths of documents, as arguments of a kernel."""
    ends = documents.cu_seqlens.int()
    return {
        "cu_seqlens_q": ends,
        "cu_seqlens_k": ends if documents.aligned else documents.cu_seqlens_k.int(),
        "max_seqlen_q": longest(documents.max_seqlen, documents.cu_seqlens, total_q),
        "max_seqlen_k": longest(documents.max_seqlen_k, documents.cu_seqlens_k, total_k),
    }


def owned(packed_rows: Tensor, offsets: Tensor) -> Tensor:
    """Which rows belong to a document, (total, 1, 1)."""
    return (torch.arange(packed_rows.shape[0], device=packed_rows.device) < offsets[-1])[:, None, None]


def longest(known: int | None, offsets: Tensor, total: int) -> int:
    """A bound on the longest document, at least 1: a bound of 0 launches an empty grid, which is an error.

    While a graph is compiled or captured, where the device must not be asked, it is the total.
    """
    if known is not None:
        return max(1, known)
    if is_compiling() or is_capturing(offsets.device):
        return total
    return max(1, int(offsets.diff().max()))

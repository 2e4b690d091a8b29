"""Packed documents for the flash-attn 2 inside torch."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ...host.kernels import lined_up
from ...problem.spec import AttentionSpec
from ...problem.windows import Window
from ..base import Serve
from ..limits import HALF
from ..rewrites.documents import PADDING, offsets_in_place, pack_batch, unpack_batch, worth_moving
from ..rewrites.grouped import MOST_FOLDED_QUERIES
from .switches import by_math, switches


def packs_here(spec: AttentionSpec) -> bool:
    """A problem goes to torch's own flash-attn 2 as packed documents, here and now; else SDPA is handed a mask."""
    if not (packable(spec) and runs_packed(spec.head_dim, spec.device.index)) or by_math(spec):
        return False
    if "documents" in spec.features:
        return True
    return worth_moving(spec.batch, spec.seqlen_q, spec.seqlen_k, spec.heads * spec.head_dim)


def packable(spec: AttentionSpec) -> bool:
    """Documents, causal or not, or padding is all that is hidden, and the kernel serves what else is asked for.

    A few queries are not worth packing their keys.
    """
    if not takes_packed(spec.dtype, spec.head_dim) or spec.aten_only:
        return False
    if 0 in (spec.batch, spec.seqlen_q, spec.seqlen_k):
        return False
    features = spec.features
    if "documents" in features:
        if "causal" in features:
            assert spec.mask is not None
            windows = [part for part in spec.mask.parts if isinstance(part, Window)]
            if not all(window.align == "bottom_right" for window in windows):
                return False
        return features <= BESIDE_DOCUMENTS
    return features <= BESIDE_PADDING and not features.isdisjoint(PADDING) and spec.seqlen_q > MOST_FOLDED_QUERIES


BESIDE_BOTH = ("backward", "deterministic", "dropout", "gqa")
"""Features that documents and padding may stand beside in that kernel."""
BESIDE_DOCUMENTS = frozenset((*BESIDE_BOTH, "documents", "causal"))
BESIDE_PADDING = frozenset((*BESIDE_BOTH, *PADDING))


def takes_packed(dtype: torch.dtype, head_dim: int) -> bool:
    """torch's packed flash-attn 2 has kernels for such heads on some GPU."""
    return dtype in HALF and head_dim % 8 == 0


def runs_packed(head_dim: int, index: int | None) -> bool:
    """It has them for a GPU, and is switched on."""
    return head_dim <= packs_up_to(index) and switches()[2]


@functools.cache
def packs_up_to(index: int | None) -> int:
    """The largest head_dim of torch's packed flash-attn 2 on a GPU; 0 where there is none.

    NVIDIA's, Ampere and newer; where shared memory is small, as on 8.6, 8.9 and 12.0, there is no backward beyond 192.
    Source: ``check_requires_grad_and_head_dim_gt192_constraints_on_sm86_89_or_120`` in aten's sdp_utils.cpp.
    """
    if not torch.cuda.is_available() or torch.version.hip or not torch.backends.cuda.is_flash_attention_available():
        return 0
    major, minor = torch.cuda.get_device_capability(index)
    return 0 if major < 8 else 256 if minor == 0 and major < 12 else 192


packs_up_to._dynamo_marked_constant = True  # type: ignore[attr-defined]  # torch.compiler.assume_constant_result, unimported


def attend_packed(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
    """A problem as packed documents: SDPA would be handed a mask, and compute what that hides."""
    q, k, v, offsets = pack_batch(q, k, v, spec)
    return unpack_batch(attend_varlen(q, k, v, spec, **offsets), spec)


def attend_in_place(spec: AttentionSpec) -> Serve | None:
    """``attend_packed`` for one problem of which no token has to be moved, its offsets found; ``None`` for others."""
    where = offsets_in_place(spec)
    if where is None:
        return None

    def serve(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = attend_varlen(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), spec, **where)
        return out.view(spec.batch, spec.seqlen_q, *out.shape[1:])

    return serve


def attend_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: AttentionSpec,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
) -> Tensor:
    """The flash-attn 2 inside torch, over documents packed as (total, heads, head_dim).

    Its own package makes head dims and offsets contiguous; the operator raises.
    """
    q, k, v = lined_up(q), lined_up(k), lined_up(v)
    out: Tensor = torch.ops.aten._flash_attention_forward(
        q,
        k,
        v,
        cu_seqlens_q.contiguous(),
        cu_seqlens_k.contiguous(),
        # a longest document of one query takes a decoding path with wrong shapes (flash-attention#1537)
        max(2, max_seqlen_q),
        max_seqlen_k,
        spec.dropout_p,
        "causal" in spec.needs,
        False,
        scale=spec.scale,
    )[0]
    return out

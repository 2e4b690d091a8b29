"""Calls of SDPA, and of the kernels behind it, in our layout."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...problem.spec import AttentionSpec
from .mask_tensors import as_numbers


def call_sdpa(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, spec: AttentionSpec, is_causal: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """SDPA in our layout."""
    if spec.need_lse:
        return attend_with_lse(q, k, v, mask, spec, is_causal)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if spec.usual_scale and spec.heads == spec.heads_kv:  # neither is said, which takes .25 us of 40 to read
        return F.scaled_dot_product_attention(q, k, v, mask, spec.dropout_p, is_causal).transpose(1, 2)
    out = F.scaled_dot_product_attention(
        q,
        k,
        v,
        mask,
        spec.dropout_p,
        is_causal,
        scale=spec.softmax_scale,
        # q may have as many heads as k by now; a bool where sizes are symbols
        enable_gqa=True if spec.heads != spec.heads_kv and q.shape[1] != k.shape[1] else False,  # noqa: SIM210
    )
    return out.transpose(1, 2)


def attend_with_lse(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, spec: AttentionSpec, is_causal: bool
) -> tuple[Tensor, Tensor]:
    """The CPU kernel behind SDPA, called for the log-sum-exp that SDPA throws away."""
    if spec.heads != spec.heads_kv:
        k, v = for_every_head(k, v, spec)
    if mask is not None and mask.dtype == torch.bool:
        mask = as_numbers(mask, q.dtype)
    out, lse = torch._scaled_dot_product_flash_attention_for_cpu(  # type: ignore[attr-defined]
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), 0.0, is_causal, attn_mask=mask, scale=spec.scale
    )
    if mask is not None:  # the kernel gives blind rows zeros, and a log-sum-exp of 0
        lse = lse.masked_fill((mask == float("-inf")).all(dim=-1), float("-inf"))
    return out.transpose(1, 2), lse


def attend_by_math(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, spec: AttentionSpec) -> Tensor:
    """SDPA's unfused form, called rather than chosen by its switches, which belong to every thread of the process."""
    if spec.heads != spec.heads_kv:
        k, v = for_every_head(k, v, spec)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if mask is not None and mask.dtype != q.dtype:  # finer than the heads: so are the scores
        q, k, v = (x.to(mask.dtype) for x in (q, k, v))
    out: Tensor = torch.ops.aten._scaled_dot_product_attention_math(
        q, k, v, mask, spec.dropout_p, False, None, scale=spec.scale
    )[0]
    return out.transpose(1, 2).to(spec.dtype)


def for_every_head(k: Tensor, v: Tensor, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
    """Keys and values of grouped heads, once for each head of the queries."""
    groups = spec.heads // spec.heads_kv
    return k.repeat_interleave(groups, dim=2), v.repeat_interleave(groups, dim=2)

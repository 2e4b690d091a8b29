"""Problems of a CPU without a mask: one query over many keys, as when a text is written, and what else is plain."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...problem.spec import AttentionSpec
from ..base import Serve

FEWEST_KEYS, MOST_FEATURES = 512, 128
FEWEST_KEYS_APART, MOST_FEATURES_APART = 2048, 64
"""Keys and head_dim from which, and up to which, two products of matrices beat SDPA's kernel for one query: by 2 to 20%
where keys of neighbouring heads are neighbours, and where they lie apart, as in a cache that is not full, by 8 to 13%
(Zen 4, one thread, 1 to 32 rows of 4 to 16 heads). Grouped heads, which are folded to rows, lose 5 to 10%."""
FEWEST_NUMBERS = 2**19
"""Numbers of the keys, below which three operators take longer than one."""


def is_plain(spec: AttentionSpec) -> bool:
    """A problem of a CPU that hides nothing and asks for nothing beside."""
    return spec.device.type == "cpu" and spec.mask is None and not spec.needs and spec.dtype != torch.float16


def serve_plainly(spec: AttentionSpec) -> Serve:
    """The call of such a problem, for several in a row."""
    scale, one = spec.softmax_scale, takes_products(spec)

    def serve(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if one and lies_well(k, v, spec):
            return by_products(q, k, v, spec).transpose(1, 2)
        return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)

    return serve


def takes_products(spec: AttentionSpec) -> bool:
    """One query for each key head over so many keys that products of matrices may pay."""
    if spec.aten_only or spec.seqlen_q != 1 or spec.dtype != torch.float32:
        return False
    if spec.seqlen_k < FEWEST_KEYS or max(spec.head_dim, spec.head_dim_v) > MOST_FEATURES:
        return False
    return spec.batch * spec.heads * spec.seqlen_k * spec.head_dim >= FEWEST_NUMBERS


def lies_well(k: Tensor, v: Tensor, spec: AttentionSpec) -> bool:
    """Keys and values (batch, heads, seqlen_k, head_dim) lie so that they do."""
    if k.is_contiguous() and v.is_contiguous():
        return True
    if spec.seqlen_k < FEWEST_KEYS_APART or max(spec.head_dim, spec.head_dim_v) > MOST_FEATURES_APART:
        return False
    return all(x.stride(3) == 1 and x.stride(0) == x.shape[1] * x.stride(1) for x in (k, v))


def by_products(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
    """The definition, (batch, heads, 1, head_dim_v) of (batch, heads, seqlen, head_dim)."""
    rows, keys = q.reshape(-1, 1, spec.head_dim), k.flatten(0, 1).transpose(1, 2)
    scores = torch.baddbmm(q.new_empty(1, 1, 1), rows, keys, beta=0.0, alpha=spec.scale)
    out = torch.bmm(scores.softmax(-1), v.flatten(0, 1))
    return out.view(spec.batch, spec.heads, 1, spec.head_dim_v)

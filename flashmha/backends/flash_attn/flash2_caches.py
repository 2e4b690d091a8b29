"""The function of flash-attn 2 for caches: eagerly as it is, and as an operator where a compiler traces.

Not a backend: ``flash2`` says what a problem needs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...host.kernels import lined_up
from ...host.torch_state import is_compiling
from ...problem.spec import AttentionSpec
from ..rewrites.caches import page_table, read_cache
from .package import probed_packages


def attend_cache(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, key: str, told: dict[str, Any]) -> Any:
    """An ``is_cache`` problem by the package of a backend: out, or the pair of it and lse."""
    table, slopes = page_table(spec), told.pop("alibi_slopes", None)
    if not is_compiling():
        more = {} if table is None else {"block_table": table}
        more |= {} if slopes is None else {"alibi_slopes": slopes}
        return read_cache(cached_function(key), q, k, v, spec, **more, **told)
    causal, (left, right) = told["causal"], told["window_size"]
    told_of_scores = (told["softmax_scale"], told["softcap"], causal, left, right, key)
    made = torch.ops.flashmha.flash2_cache(q, k, v, spec.key_lengths(), table, slopes, *told_of_scores)
    return made if spec.need_lse else made[0]


def cached_function(key: str) -> Any:
    """The function of a package that is loaded."""
    package = probed_packages[key]
    assert package.cached is not None
    return package.cached


def two_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    table: Tensor | None,
    slopes: Tensor | None,
    scale: float,
    softcap: float,
    causal: bool,
    left: int,
    right: int,
    key: str,
) -> tuple[Tensor, Tensor]:
    """out and lse, contiguous as the fake ones are."""
    k, v = lined_up(k), lined_up(v)
    out, lse = cached_function(key)(
        q,
        k,
        v,
        cache_seqlens=lengths,
        block_table=table,
        alibi_slopes=slopes,
        softmax_scale=scale,
        softcap=softcap,
        causal=causal,
        window_size=(left, right),
        return_softmax_lse=True,
    )[:2]
    return out.contiguous(), lse.contiguous()


def fake_cache(q: Tensor, k: Tensor, v: Tensor, *told: Any) -> tuple[Tensor, Tensor]:
    batch, seqlen_q, heads, _ = q.shape
    return q.new_empty(*q.shape[:3], v.shape[-1]), q.new_empty((batch, heads, seqlen_q), dtype=torch.float32)


FOR_CACHES = torch.library.Library("flashmha", "FRAGMENT")
FOR_CACHES.define(
    "flash2_cache(Tensor q, Tensor k, Tensor v, Tensor lengths, Tensor? table, Tensor? slopes, float scale, "
    "float softcap, bool causal, SymInt left, SymInt right, str key) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order),
)
FOR_CACHES.impl("flash2_cache", two_cache, "CompositeExplicitAutograd")
torch.library.register_fake("flashmha::flash2_cache", fake_cache, lib=FOR_CACHES)

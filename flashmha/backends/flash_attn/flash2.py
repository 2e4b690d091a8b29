"""flash2: the package flash-attn 2 (``import flash_attn``)."""

from __future__ import annotations

import importlib
import re
from typing import Any

from torch import Tensor

from ...problem.scores import ALiBi
from ...problem.spec import AttentionSpec
from ...problem.wording import say_size
from ..limits import HALF, Limits
from ..rewrites.caches import CACHED, caches_exceeded, is_cache
from ..rewrites.documents import needs_packing, pack_batch, unpack_batch, unpack_batch_lse
from ..rewrites.grouped import fold, folds, unfold, unfold_lse
from .flash2_caches import attend_cache
from .package import EVERY_VERSION, FlashAttn, Functions, installed_version, lacks
from .windows import normal_lse, trimmed, window_options

BUCKETS = (32, 64, 96, 128, 192, 256)
"""The head dims there are kernels for, each for those below it; a build may have been made without some."""


class Flash2(FlashAttn):
    """flash-attn 2: half precision on Ampere and newer; padding of any pattern, dropout, ALiBi, no mask tensors.

    Source: Dao, "FlashAttention-2" (2023); signatures of flash-attn 2.8.3.
    """

    name = measured_as = "flash2"
    distribution = "flash-attn"
    install = "pip install flash-attn --no-build-isolation"
    keywords = ("dropout_p", "softmax_scale", "causal", "window_size", "softcap", "alibi_slopes", "deterministic")
    limits = Limits(
        devices=("cuda",),
        dtypes=HALF,
        features=EVERY_VERSION | {*CACHED, "alibi", "dropout"},
        head_dim=256,
        seqlen_min=1,
        batch_min=1,
        page_step=256,
        capability=(8, 9, 10, 12),
    )

    waits_for_pages = False
    """Its function for caches asks the GPU for the longest row of pages, and waits for the answer."""

    def load(self) -> Functions:
        import flash_attn_2_cuda  # noqa: F401  the extension: a bare `import flash_attn` proves nothing
        from flash_attn import flash_attn_func, flash_attn_varlen_func

        self.cached = getattr(importlib.import_module("flash_attn"), "flash_attn_with_kvcache", None)
        self.waits_for_pages = waits_beside_pages(installed_version(self))
        return flash_attn_func, flash_attn_varlen_func

    def why_not_built(self, spec: AttentionSpec) -> str | None:
        why = self.why_no_cache(spec)
        if why is None and self.waits_for_pages and "pages" in spec.features:
            why = f"pages ({self.distribution} waits for the GPU beside them in releases behind 2.8.3)"
        if why is not None:
            return why
        bucket = [size for size in BUCKETS if spec.head_dim <= size][0]  # noqa: RUF015  Dynamo reads it
        why = lacks(self.key, spec.device.index, bucket, spec.dtype, False)
        if why is None and spec.needs_grad:
            why = lacks(self.key, spec.device.index, bucket, spec.dtype, True, spec.heads != spec.heads_kv)
        return None if why is None else f"head_dim={spec.head_dim} ({why})"

    def limits_exceeded(self, spec: AttentionSpec) -> list[str]:
        reasons = super().limits_exceeded(spec) + caches_exceeded(spec)
        window = spec.window
        if window is not None and spec.seqlen_q > spec.seqlen_k:
            # a right bound of seqlen_k or more turns unbounded inside the kernel, and unbounded into seqlen_k
            # (flash-attention#895)
            if window.right is None:
                reasons.append("window right=None with seqlen_q > seqlen_k (flash-attention#895)")
            elif window.right >= spec.seqlen_k:
                far, longer = say_size("window right", window.right), say_size("seqlen_k", spec.seqlen_k)
                reasons.append(f"{far} with seqlen_q > {longer} (flash-attention#895)")
        if spec.dropout_p >= 1.0:
            reasons.append(f"dropout_p={spec.dropout_p} (less than 1: what is kept is divided by 1 - dropout_p)")
        if spec.softcap is not None and spec.dropout_p > 0.0:
            reasons.append("softcap together with dropout")
        if spec.bias is not None:
            if window is not None and window.right is not None and window.right < 0:
                # keys past the window are cut off, and the package would count distances from those that are left
                reasons.append(f"ALiBi beside a window with {say_size('right', window.right)} (at least 0)")
            if spec.need_lse:
                # under causality the kernel adds slope * key alone, which moves every row's log-sum-exp
                reasons.append("lse beside ALiBi")
            if len(spec.bias.parts) > 1:
                reasons.append("more than one bias (one ALiBi)")
            elif "bias_grad" in spec.features:
                reasons.append("no gradient for slopes")
        return reasons

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor | tuple[Tensor, Tensor]:
        dense, varlen = self.functions or self.load()
        caching = self.cached is not None and is_cache(spec)
        packing = not caching and needs_packing(spec)
        # for one query the package folds by itself (seqlenq_ngroups_swapped in csrc/flash_attn/flash_api.cpp); for no
        # other number does it, though it splits the keys of every short problem
        alone = spec.mask is None or (caching and spec.window is None)
        few = spec.seqlen_q > 1 and alone and spec.bias is None and folds(spec)
        groups = spec.heads // spec.heads_kv if few else 1
        q = fold(q, groups) if groups > 1 else q
        k, v, left, right = trimmed(k, v, spec)
        options: dict[str, Any] = {
            "softmax_scale": spec.scale,
            **window_options(left, right),
            "softcap": spec.softcap or 0.0,
        }
        if isinstance(spec.bias, ALiBi):
            slopes = spec.bias.slopes.float()
            # packed, the package takes documents for batch items
            options["alibi_slopes"] = slopes[0] if slopes.dim() == 2 and spec.batch == 1 else slopes
        if caching:
            result = attend_cache(q, k, v, spec, self.key, options)
        else:
            options |= {
                "dropout_p": spec.dropout_p,
                "deterministic": spec.deterministic,
                "return_attn_probs": spec.need_lse,
            }
            if packing:
                q, k, v, offsets = pack_batch(q, k, v, spec)
                options |= looser(offsets, spec)
            result = (varlen if packing else dense)(q, k, v, **options)
        out, lse = result[:2] if spec.need_lse else (result, None)
        if packing:
            out, lse = unpack_batch(out, spec), None if lse is None else unpack_batch_lse(lse, spec)
        if groups > 1:
            out, lse = unfold(out, groups), None if lse is None else unfold_lse(lse, groups)
        return out if lse is None else (out, normal_lse(lse))


def waits_beside_pages(version: str) -> bool:
    """A release reads the longest row of a cache in pages on the host: those behind 2.8.3."""
    numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:3])
    return numbers > (2, 8, 3)


def looser(offsets: dict[str, Any], spec: AttentionSpec) -> dict[str, Any]:
    """Offsets with longest documents that keep the package out of trouble; it takes them as bounds."""
    longest_q, longest_k = offsets["max_seqlen_q"], offsets["max_seqlen_k"]
    if spec.window is not None:
        # a right bound of the longest document's keys or more counts as none, however many queries there are
        # (flash-attention#895)
        longest_k = max(longest_k, longest_q)
    # a longest document of one query takes a decoding path with wrong shapes (flash-attention#1537)
    return {**offsets, "max_seqlen_q": max(2, longest_q), "max_seqlen_k": longest_k}

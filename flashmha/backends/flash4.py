"""flash4: the package flash-attn-4 (``import flash_attn.cute``), kernels compiled on first use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..masks import Documents, KeyLengths, find
from ..spec import AttentionSpec
from .base import HALF, Limits
from .flash import FlashAttn, normal_lse, packed, trimmed, unpacked, unpacked_lse


class Flash4(FlashAttn):
    """flash-attn 4: half precision on Hopper and Blackwell; no dropout, no mask tensors.

    The first call of a (dtype, head_dim, causal, ...) combination compiles for some seconds.
    Source: signatures of flash-attn-4 4.0.0b36.
    """

    name = "flash4"
    distribution = "flash-attn-4"
    install = "pip install --pre flash-attn-4"
    keywords = ("softmax_scale", "causal", "window_size", "softcap", "deterministic", "return_lse")
    limits = Limits(
        devices=("cuda",),
        dtypes=HALF,
        features=frozenset(
            (
                "backward",
                "causal",
                "window",
                "key_lengths",
                "documents",
                "softcap",
                "gqa",
                "lse",
                "lse_grad",
                "deterministic",
            )
        ),
        head_dim=256,
        head_dim_min=8,
        head_dim_step=8,
        seqlen_min=1,
        batch_min=1,
        capability=(9, 10, 11),
    )

    def load(self) -> tuple[Callable[..., Any], Callable[..., Any]]:
        # flash-attn 2 ships an older prototype under the same name: the signature check tells them apart
        from flash_attn.cute import flash_attn_func, flash_attn_varlen_func

        return flash_attn_func, flash_attn_varlen_func

    def refusals(self, spec: AttentionSpec) -> list[str]:
        reasons = super().refusals(spec)
        if torch.compiler.is_compiling():
            reasons.append("no operators of its own for torch.compile to trace")
        if spec.needs_grad and spec.window is not None and spec.seqlen_k < spec.seqlen_q:
            reasons.append(
                f"the backward of a window with seqlen_k={spec.seqlen_k} < seqlen_q={spec.seqlen_q} "
                "(untested by the package)"
            )
        return reasons

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor | tuple[Tensor, Tensor]:
        dense, varlen = self.functions or self.load()
        k, v, left, right = trimmed(k, v, spec)
        is_causal = left is None and right == 0
        options: dict[str, Any] = {
            "softmax_scale": spec.scale,
            "causal": is_causal,
            # (None, None) is no window; -1 would be a literal bound
            "window_size": (None, None) if is_causal else (left, right),
            "softcap": spec.softcap or 0.0,
            "deterministic": spec.deterministic,
            "return_lse": spec.need_lse,
            "num_splits": 1,
        }
        documents, lengths = find(spec.mask, Documents), find(spec.mask, KeyLengths)
        # the package asks the current device, not the tensors', which kernels to build
        with torch.cuda.device(q.device):
            if documents is not None:
                q, k, v, offsets = packed(q, k, v, documents)
                out, lse = varlen(q, k, v, **offsets, **options)[:2]
                out = unpacked(out, documents)
                lse = None if lse is None else unpacked_lse(lse, documents)
            elif lengths is not None:
                used = lengths.lengths.clamp(0, spec.seqlen_k).int()
                # gradients of keys past their length are never written (flash-attention#2167): where keeps them out
                real = (torch.arange(spec.seqlen_k, device=q.device) < used[:, None])[:, :, None, None]
                k, v = (torch.where(real, x, 0.0) for x in (k, v))
                out, lse = varlen(q, k, v, seqused_k=used, **options)[:2]
            else:
                out, lse = dense(q, k, v, **options)[:2]
        return (out, normal_lse(lse)) if spec.need_lse else out

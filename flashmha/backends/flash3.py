"""flash3: flash-attn 3 for Hopper (``import flash_attn_interface``), or a forward-only build of it (``fa3_fwd``)."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..masks import Documents, find
from ..spec import AttentionSpec
from .base import HALF, Limits
from .flash import FlashAttn, normal_lse, packed, trimmed, unpacked, unpacked_lse, window_options

BUILDS = (
    ("flash_attn_interface", "flash_attn_config"),
    ("flash_attn_3.flash_attn_interface", "flash_attn_3.flash_attn_config"),
    ("fa3_fwd_interface", "fa3_fwd_config"),
)
"""Where a build of flash-attn 3 may lie: its interface, and the flags it was built with."""


class Flash3(FlashAttn):
    """flash-attn 3: half precision on Hopper; no dropout, no mask tensors.

    Source: Shah et al., "FlashAttention-3" (2024); signatures of the ``hopper`` folder of flash-attention 2.8.4.
    """

    name = "flash3"
    distribution = "flash_attn_3"
    install = "build the hopper folder of flash-attention (forward only: pip install fa3-fwd)"
    keywords = ("softmax_scale", "causal", "window_size", "softcap")
    limits = Limits(
        devices=("cuda",),
        dtypes=HALF,
        features=frozenset(("backward", "causal", "window", "documents", "softcap", "gqa", "lse", "deterministic")),
        head_dim=256,
        head_dim_step=8,
        seqlen_min=1,
        batch_min=1,
        capability=(9,),
    )

    def __init__(self) -> None:
        super().__init__()
        self.flags: dict[str, bool] = {}

    def load(self) -> tuple[Callable[..., Any], Callable[..., Any]]:
        missing: ModuleNotFoundError | None = None
        for interface, config in BUILDS:
            try:
                module = importlib.import_module(interface)
            except ModuleNotFoundError as error:
                missing = missing or error
                continue
            try:
                self.flags = dict(importlib.import_module(config).CONFIG["build_flags"])
            except (ModuleNotFoundError, KeyError):
                self.flags = {}
            if interface == "fa3_fwd_interface":
                self.flags["FLASHATTENTION_DISABLE_BACKWARD"] = True
            return module.flash_attn_func, module.flash_attn_varlen_func
        raise missing or ModuleNotFoundError("No module named 'flash_attn_interface'")

    def unbuilt(self, spec: AttentionSpec) -> str | None:
        features = {"BACKWARD": spec.needs_grad, "LOCAL": "window" in spec.features}
        features["SOFTCAP"] = spec.softcap is not None
        features["VARLEN"] = "documents" in spec.features
        features["FP16"] = spec.dtype == torch.float16
        off = [name for name, wanted in features.items() if wanted and self.flags.get(f"FLASHATTENTION_DISABLE_{name}")]
        return f"this build has no {', no '.join(name.lower() for name in off)}" if off else None

    def refusals(self, spec: AttentionSpec) -> list[str]:
        reasons = super().refusals(spec)
        if "deterministic" in spec.features and spec.head_dim > 192:
            reasons.append(f"a deterministic backward at head_dim={spec.head_dim} (at most 192)")
        return reasons

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor | tuple[Tensor, Tensor]:
        dense, varlen = self.functions or self.load()
        k, v, left, right = trimmed(k, v, spec)
        options: dict[str, Any] = {
            "softmax_scale": spec.scale,
            **window_options(left, right),
            "softcap": spec.softcap or 0.0,
            "return_attn_probs": spec.need_lse,
        }
        if spec.needs_grad:
            options["deterministic"] = spec.deterministic
        documents = find(spec.mask, Documents)
        if documents is None:
            result = dense(q, k, v, **options)
        else:
            q, k, v, offsets = packed(q, k, v, documents)
            result = varlen(q, k, v, **offsets, **options)
        out: Tensor
        lse: Tensor | None
        # older builds always return (out, lse)
        out, lse = (result[0], result[1]) if isinstance(result, tuple) else (result, None)
        if documents is not None:
            out = unpacked(out, documents)
            lse = None if lse is None else unpacked_lse(lse, documents)
        if not spec.need_lse:
            return out
        assert lse is not None
        return out, normal_lse(lse)

"""flash3: flash-attn 3 for Hopper (``import flash_attn_interface``), or a forward-only build of it (``fa3_fwd``)."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...host.machine import HERE, Machine
from ...host.torch_state import is_compiling
from ...problem.spec import AttentionSpec
from ..limits import HALF, Limits
from ..rewrites.caches import CACHED, caches_exceeded, is_cache, page_table, read_cache
from ..rewrites.documents import needs_packing, pack_batch, unpack_batch, unpack_batch_lse
from .package import EVERY_VERSION, FlashAttn, Functions, lacks
from .windows import normal_lse, trimmed, window_options

BUILDS = (
    ("flash_attn_interface", "flash_attn_config"),
    ("flash_attn_3.flash_attn_interface", "flash_attn_3.flash_attn_config"),
    ("fa3_fwd_interface", "fa3_fwd_config"),
)
"""Places of a build of flash-attn 3: its interface, and the flags it was built with."""

KERNEL_HEAD_DIMS = (64, 96, 128, 192, 256)
"""The sizes a build may have kernels of; a head_dim is served by the next one there is."""
ROWS_PER_TILE, KEYS_TO_SPLIT = 128, 512
"""Queries that one tile holds, and keys that are worth several: the package's own heuristic splits no fewer."""


class Flash3(FlashAttn):
    """flash-attn 3: half precision on Hopper; padding of any pattern, no dropout, no mask tensors.

    Source: Shah et al., "FlashAttention-3" (2024); signatures of the ``hopper`` folder of flash-attention 2.8.4.
    """

    name = measured_as = "flash3"
    distribution = "flash_attn_3"
    install = "build the hopper folder of flash-attention (forward only: pip install fa3-fwd)"
    keywords = ("softmax_scale", "causal", "window_size", "softcap")
    limits = Limits(
        devices=("cuda",),
        dtypes=HALF,
        features=EVERY_VERSION | {*CACHED},
        head_dim=256,
        head_dim_step=8,
        seqlen_min=1,
        batch_min=1,
        capability=(9,),
    )

    def __init__(
        self,
        functions: Functions | None = None,
        cached: Callable[..., Any] | None = None,
        machine: Machine = HERE,
        flags: dict[str, bool] | None = None,
        splitting: bool = False,
    ) -> None:
        super().__init__(functions, cached, machine)
        self.flags = {} if flags is None else flags
        """What the package was built with, and without."""
        self.splitting = splitting
        """The build can split the keys of a few queries over the whole GPU."""

    def load(self) -> Functions:
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
            dense, varlen = module.flash_attn_func, module.flash_attn_varlen_func
            self.cached = getattr(module, "flash_attn_with_kvcache", None)
            takes = "num_splits" in inspect.signature(dense).parameters
            self.splitting = takes and not self.flags.get("FLASHATTENTION_DISABLE_SPLIT")
            return dense, varlen
        raise missing or ModuleNotFoundError("No module named 'flash_attn_interface'")

    def why_not_built(self, spec: AttentionSpec) -> str | None:
        why = self.why_no_cache(spec)
        if why is not None:
            return why
        there = [size for size in KERNEL_HEAD_DIMS if not self.flags.get(f"FLASHATTENTION_DISABLE_HDIM{size}")]
        if not any(spec.head_dim <= size for size in there):
            return f"head_dim={spec.head_dim} (this build has kernels for {', '.join(map(str, there)) or 'none'})"
        features = {"BACKWARD": spec.needs_grad, "LOCAL": "window" in spec.features}
        features["SOFTCAP"] = spec.softcap is not None
        features["VARLEN"] = needs_packing(spec)
        features["PAGEDKV"] = "pages" in spec.features
        features["FP16"] = spec.dtype == torch.float16
        off = [name for name, wanted in features.items() if wanted and self.flags.get(f"FLASHATTENTION_DISABLE_{name}")]
        if off or not spec.needs_grad:
            return f"this build has no {', no '.join(name.lower() for name in off)}" if off else None
        bucket = [size for size in there if spec.head_dim <= size][0]  # noqa: RUF015  Dynamo reads it
        why = lacks(self.key, spec.device.index, bucket, spec.dtype, True, spec.heads != spec.heads_kv)
        return None if why is None else f"head_dim={spec.head_dim} ({why})"

    def limits_exceeded(self, spec: AttentionSpec) -> list[str]:
        reasons = super().limits_exceeded(spec) + caches_exceeded(spec)
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
        }
        cached = self.cached if is_cache(spec) else None
        packing = cached is None and needs_packing(spec)
        table = page_table(spec)
        if self.splitting and not packing and splits(spec):
            options["num_splits"] = 0  # as many as the package's heuristic says
        if cached is not None:
            # 0 by itself, which no compiler may trace
            options = {"num_splits": 1} | options | ({} if table is None else {"page_table": table})
            result = read_cache(cached, q, k, v, spec, **options)
        else:
            options["return_attn_probs"] = spec.need_lse
            if spec.needs_grad:
                options["deterministic"] = spec.deterministic
            if packing:
                q, k, v, offsets = pack_batch(q, k, v, spec)
                options |= offsets
            result = (varlen if packing else dense)(q, k, v, **options)
        out: Tensor
        lse: Tensor | None
        # older builds always return (out, lse)
        out, lse = (result[0], result[1]) if isinstance(result, tuple) else (result, None)
        if packing:
            out, lse = unpack_batch(out, spec), None if lse is None else unpack_batch_lse(lse, spec)
        if not spec.need_lse:
            return out
        assert lse is not None
        return out, normal_lse(lse)


def splits(spec: AttentionSpec) -> bool:
    """So few queries meet so many keys that a tile of queries alone would leave most of the GPU idle."""
    if spec.needs_grad or is_compiling():
        return False
    return spec.seqlen_q <= ROWS_PER_TILE and spec.seqlen_k >= KEYS_TO_SPLIT

"""flash4: the package flash-attn-4 (``import flash_attn.cute``), kernels compiled on first use."""

from __future__ import annotations

import functools
import os
import tempfile
from bisect import bisect_left
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from ...host.machine import HERE, Machine
from ...host.torch_state import is_compiling
from ...problem.spec import AttentionSpec
from ...problem.wording import say_size
from ..compiling import waits
from ..limits import HALF, Limits
from ..rewrites.block_tables import edged, has_tiles_to_skip
from ..rewrites.caches import CACHED, caches_exceeded, lies_in_cache, page_table
from ..rewrites.compact import intervals, why_no_moves
from ..rewrites.documents import pack_batch, unpack_batch, unpack_batch_lse
from .flash4_kernels import call_kernels
from .flash4_tools import Tools
from .package import EVERY_VERSION, FlashAttn, Functions, probed_packages
from .windows import normal_lse, trimmed

PAGED_HEAD_DIMS = (64, 128)
"""Sizes of heads in pages: those that fill the kernel's tiles."""
TILE_STEPS = (64, 80, 128, 192)
"""Lengths up to which the package compiles for one tile, by head_dim and pass."""


CACHE, CACHE_DIR = "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR"
"""The variables of the package's cache of kernels, read when it is imported (``flash_attn.cute.cache_utils``)."""


class Flash4(FlashAttn):
    """flash-attn 4: half precision on Hopper and Blackwell; padding of any pattern, mask tensors, sinks, no dropout.

    The first call of a (dtype, head_dim, causal, ...) combination compiles for some seconds.
    Source: ``flash_attn.cute.interface`` of flash-attn-4 4.0.0b36. Its forward and backward are called rather than its
    public functions, which cannot be traced, nor told where gradients go.
    """

    name = measured_as = "flash4"
    distribution = "flash-attn-4"
    install = "pip install --pre flash-attn-4"
    compiles = "kinds"
    joins_gradients = True
    remark = (
        "no backward of a head_dim below 128 that is 1 to 16 modulo 32; mask tensors on sm9x alone, one for all heads"
    )
    keywords = (
        "softmax_scale",
        "causal",
        "softcap",
        "window_size_left",
        "window_size_right",
        "cu_seqlens_q",
        "seqused_k",
        "mask_mod",
        "aux_tensors",
        "block_sparse_tensors",
        "learnable_sink",
    )
    limits = Limits(
        devices=("cuda",),
        dtypes=HALF,
        features=EVERY_VERSION | {*CACHED, "dense_mask", "sinks", "lse_grad"},
        head_dim=256,
        head_dim_min=8,
        head_dim_step=8,
        seqlen_min=1,
        batch_min=1,
        capability=(9, 10, 11),
        only_on={"dense_mask": (9,)},
    )

    def __init__(self, functions: Functions | None = None, machine: Machine = HERE, tools: Tools | None = None) -> None:
        super().__init__(functions, machine=machine)
        self.tools = Tools() if tools is None else tools
        self.compiled: set[tuple[Any, ...]] = set()
        self.latest: AttentionSpec | None = None
        """A problem that was served and is shared: the next layer's, most of the time; ``kernel_kind`` takes 2.6 us."""

    def load(self) -> Functions:
        # flash-attn 2 ships an older prototype under the same name: the signature check tells them apart
        from flash_attn.cute.interface import _flash_attn_bwd, _flash_attn_fwd

        return _flash_attn_fwd, _flash_attn_bwd

    def public(self) -> Callable[..., Any]:
        from flash_attn.cute import flash_attn_func

        dense: Callable[..., Any] = flash_attn_func
        return dense

    def limits_exceeded(self, spec: AttentionSpec) -> list[str]:
        reasons = super().limits_exceeded(spec)
        if lies_in_cache(spec):
            return reasons + self.caches_exceeded(spec)
        padded = spec.is_padded
        if padded and "documents" in spec.features and "dense_mask" not in spec.features:
            reasons.append("padding inside Documents")
        if spec.needs_grad and spec.head_dim < 128 and 0 < spec.head_dim % 32 <= 16:
            # seen on a Hopper GPU with 4.0.0b36: gradients of q, and of grouped k and v, are wrong or do not compile
            reasons.append(f"the backward of head_dim={spec.head_dim} (wrong below 128 where it is 1 to 16 modulo 32)")
        dense = spec.dense
        if dense is not None and dense.allowed.shape[1] > 1:
            reasons.append("a mask tensor that differs from head to head")
        plain = not padded and dense is None
        if spec.needs_grad and spec.window is not None and spec.seqlen_k < spec.seqlen_q and plain:
            sizes = f"{say_size('seqlen_k', spec.seqlen_k)} < {say_size('seqlen_q', spec.seqlen_q)}"
            reasons.append(f"the backward of a window with {sizes} (untested by the package)")
        return reasons

    def caches_exceeded(self, spec: AttentionSpec) -> list[str]:
        """One phrase for each limit that keys in a cache exceed."""
        reasons = caches_exceeded(spec)
        if "dense_mask" in spec.features:
            reasons.append("a mask tensor beside keys in a cache")
        if spec.pages is not None and spec.head_dim not in PAGED_HEAD_DIMS:
            # pages that are no tile of the kernel's are loaded without the copies that know where a head ends
            reasons.append(f"pages of head_dim={spec.head_dim} ({' or '.join(map(str, PAGED_HEAD_DIMS))})")
        return reasons

    def why_not_built(self, spec: AttentionSpec) -> str | None:
        if "dense_mask" in spec.features:
            return untried(self.key, spec.device.index)
        return why_no_moves() if "key_padding" in spec.features and spec.window is None else None

    def must_compile(self, spec: AttentionSpec) -> str | None:
        # asked of problems it can serve; inside a graph that is compiled, compiling is what is going on
        if is_compiling() or kernel_kind(spec) in self.compiled:
            return None
        return "not compiled for this kind of problem yet (3 to 5 seconds a kernel)"

    def on_disk(self, device: torch.device) -> str | None:
        if os.environ.get(CACHE) != "1":
            return f"each process compiles its kernels anew; {CACHE}=1 keeps them on disk"
        place = os.environ.get(CACHE_DIR) or os.path.join(
            tempfile.gettempdir(), "USER", "flash_attention_cute_dsl_cache"
        )
        return f"kernels are kept in {place}"

    def kernel_key(self, spec: AttentionSpec) -> Hashable:
        return kernel_kind(spec)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor | tuple[Tensor, Tensor]:
        told: dict[str, Any] = {
            "scale": spec.scale,
            "softcap": spec.softcap or 0.0,
            "deterministic": spec.deterministic,
            "package": self.key,
        }
        documents = None
        if spec.mask is not None:
            documents = None if "dense_mask" in spec.needs else spec.documents
            q, k, v, masked = self.masked(q, k, v, spec)
            told |= masked
        if is_compiling() or spec is self.latest or (needed := kernel_kind(spec)) in self.compiled:
            out, lse = call_kernels(q, k, v, spec, told)
        else:
            with waits.ending(self.name, needed):
                out, lse = call_kernels(q, k, v, spec, told)
            self.compiled.add(needed)
        if spec.shared:
            self.latest = spec
        if documents is not None:
            out = unpack_batch(out, spec)
            if spec.need_lse:
                lse = unpack_batch_lse(lse, spec)
        return (out, normal_lse(lse, spec.sinks)) if spec.need_lse else out

    def masked(
        self, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec
    ) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
        """q, k and v as the kernels take them beside the mask, and what these are told of it."""
        told: dict[str, Any] = {}
        documents, window = spec.documents, spec.window
        if "dense_mask" in spec.needs:
            return q, k, v, mask_table(spec)
        lying = lies_in_cache(spec)
        valid = None if lying else spec.valid_keys()
        if valid is not None and window is not None:
            told["first"], told["last"] = intervals(valid, window, spec.seqlen_q)
            return q, k, v, told
        k, v, left, right = trimmed(k, v, spec)
        causal = left is None and right == 0
        told |= {"causal": causal, "left": left, "right": None if causal else right}
        if lying:
            told |= {"lengths": spec.key_lengths(), "pages": page_table(spec)}
        elif documents is not None:
            q, k, v, offsets = pack_batch(q, k, v, spec)
            told |= offsets
        elif valid is not None:
            told |= {"valid": valid} if "key_padding" in spec.needs else {"lengths": spec.key_lengths()}
        return q, k, v, told


def mask_table(spec: AttentionSpec) -> dict[str, Tensor]:
    """All that a mask with a tensor in it says, in one table, and which of its items each of the batch looks at."""
    allowed = spec.allowed()
    assert allowed is not None
    items = torch.arange(spec.batch, dtype=torch.int32, device=allowed.device)
    items = torch.zeros_like(items) if allowed.shape[0] == 1 else items
    return {"table": edged(allowed, spec.seqlen_q, spec.seqlen_k), "items": items}


def kernel_kind(spec: AttentionSpec) -> tuple[Any, ...]:
    """All that tells kernels of the package apart, as far as a problem shows it."""
    window = spec.window
    dense = "dense_mask" in spec.features
    return (
        spec.device,
        spec.dtype,
        spec.head_dim,
        spec.heads // spec.heads_kv,
        spec.features - {"lse", "lse_grad"},  # which every kernel gives, since its memory is small beside the output's
        window is not None and (window.left is None, window.right is None, window.right == 0),
        spec.softcap,
        None if spec.sinks is None else spec.sinks.dtype,
        bisect_left(TILE_STEPS, spec.seqlen_q),
        bisect_left(TILE_STEPS, spec.seqlen_k),
        None if spec.pages is None else spec.pages.page_size,
        (dense or (spec.is_padded and window is not None and spec.positions is None))
        and has_tiles_to_skip(spec.seqlen_q, spec.seqlen_k),
    )


@functools.cache
def untried(key: str, index: int | None) -> str | None:
    """Why mask tensors are not served on a GPU."""
    backend = probed_packages[key]
    return "; ".join(backend.limits.exceeded_on(backend.machine.capability(index), frozenset(("dense_mask",)))) or None


untried._dynamo_marked_constant = True  # type: ignore[attr-defined]  # torch.compiler.assume_constant_result, unimported

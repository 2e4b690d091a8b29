"""sdpa: torch's own scaled_dot_product_attention, and the kernels behind it."""

from __future__ import annotations

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..spec import AttentionSpec
from .base import FEATURES, HALF, Backend, Limits


def top_left_causal(spec: AttentionSpec) -> bool:
    """The mask is causality alone, aligned as SDPA aligns it: to the first key."""
    window = spec.window
    if window is None or spec.mask is None or len(spec.mask.parts) > 1:
        return False
    # dynamic shapes make this comparison a symbol; the branch turns it into a bool
    if window.left is None and window.right == spec.seqlen_q - spec.seqlen_k:  # noqa: SIM103
        return True
    return False


class Sdpa(Backend):
    """``F.scaled_dot_product_attention``; masks and biases become one dense tensor, top-left causality none."""

    name = "sdpa"
    limits = Limits(
        devices=(),
        dtypes=(torch.float64, torch.float32, torch.bfloat16, torch.float16),
        features=frozenset(FEATURES) - {"softcap", "sinks", "lse", "lse_grad"},
        aten=True,
    )

    def refusals(self, spec: AttentionSpec) -> list[str]:
        reasons = super().refusals(spec)
        if spec.device.type == "cuda" and needs_tensor(spec) and not kernels_for_masks():
            reasons.append("only cuDNN is enabled, which must not see a mask (pytorch#196678)")
        return reasons

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
        if spec.batch == 0 and spec.device.type == "cuda":
            with sdpa_kernel(SDPBackend.MATH):  # the fused kernels give nothing at all for an empty batch
                return attend(q, k, v, None, spec)
        if spec.mask is None and spec.bias is None:
            return attend(q, k, v, None, spec)
        if spec.bias is None and top_left_causal(spec):
            return attend(q, k, v, None, spec, is_causal=True)
        mask = spec.allowed()
        bias = spec.added()
        if bias is not None:
            mask = bias if mask is None else torch.where(mask, bias, float("-inf"))
            finer = mask.dtype == torch.float32 and q.dtype in HALF and spec.device.type == "cpu"
            mask = mask if finer else mask.to(q.dtype)  # a finer mask is used as it is on a CPU, and misread on a GPU
        if spec.device.type != "cuda":
            return attend(q, k, v, mask, spec)
        if spec.heads != spec.heads_kv:
            # with a mask, grouped heads land in the math kernel up to torch 2.13 (pytorch#191085)
            k, v = (x.repeat_interleave(spec.heads // spec.heads_kv, dim=2) for x in (k, v))
        # cuDNN must not see a mask: NaN gradients (pytorch#196678), misread float masks (pytorch#191612)
        with without_cudnn():
            return attend(q, k, v, mask, spec)


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, spec: AttentionSpec, is_causal: bool = False
) -> Tensor:
    """SDPA in our layout."""
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        mask,
        spec.dropout_p,
        is_causal,
        scale=spec.scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2)


def needs_tensor(spec: AttentionSpec) -> bool:
    """SDPA is handed a mask tensor."""
    return spec.bias is not None or (spec.mask is not None and not top_left_causal(spec))


KERNELS = (
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
)


def switches() -> tuple[bool, ...]:
    """Which of ``KERNELS`` the process-wide switches allow; a constant to Dynamo, which cannot trace the question."""
    cuda = torch.backends.cuda
    return (
        cuda.mem_efficient_sdp_enabled(),
        cuda.math_sdp_enabled(),
        cuda.flash_sdp_enabled(),
        cuda.cudnn_sdp_enabled(),
    )


switches._dynamo_marked_constant = True  # type: ignore[attr-defined]  # torch.compiler.assume_constant_result, unimported


def kernels_for_masks() -> list[SDPBackend]:
    """The kernels the switches leave for a call with a mask: all but cuDNN."""
    return [kernel for kernel, allowed in zip(KERNELS[:3], switches()) if allowed]


def without_cudnn() -> contextlib.AbstractContextManager[None]:
    """SDPA's switches as they are, cuDNN off."""
    if not switches()[3]:
        return contextlib.nullcontext()
    return sdpa_kernel(kernels_for_masks())

"""flex: torch's flex_attention, where rules and biases become one compiled kernel."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..masks import Documents, find
from ..spec import AttentionSpec
from .base import FEATURES, Backend, Limits


class Flex(Backend):
    """``flex_attention``: any rule and any bias without a (seqlen_q, seqlen_k) tensor on a GPU; forward on a CPU."""

    name = "flex"
    limits = Limits(
        devices=("cuda", "cpu", "xpu"),
        dtypes=(torch.float32, torch.bfloat16, torch.float16),
        features=frozenset(FEATURES) - {"dropout", "deterministic"},
        not_on={"cpu": frozenset(("backward", "bias_grad", "lse_grad"))},
        seqlen_min=1,
        batch_min=1,
    )
    head_dim_min_gpu = 16
    """Triton's smallest matrix product; the unfused form on a CPU takes any head_dim."""

    def refusals(self, spec: AttentionSpec) -> list[str]:
        reasons = super().refusals(spec)
        smallest = min(spec.head_dim, spec.head_dim_v)
        if spec.device.type != "cpu" and smallest < self.head_dim_min_gpu:
            reasons.append(f"head_dim={smallest} (at least {self.head_dim_min_gpu} on {spec.device.type})")
        return reasons

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor | tuple[Tensor, Tensor]:
        need_lse = spec.need_lse or spec.sinks is not None
        out: Tensor
        lse: Tensor | None
        result = kernel(spec.device.type)(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            score_mod=score_mod(spec),
            block_mask=block_mask(spec),
            scale=spec.scale,
            enable_gqa=spec.heads != spec.heads_kv,
            return_lse=need_lse,
        )
        out, lse = result if need_lse else (result, None)
        out = out.transpose(1, 2)
        if spec.sinks is not None and lse is not None:
            # a sink is one more column: it takes its share of every row and gives nothing back
            sink = spec.sinks.to(lse.dtype)[:, None]
            out = out * torch.sigmoid(lse - sink).transpose(1, 2).unsqueeze(-1).to(out.dtype)
            lse = torch.logaddexp(lse, sink)
        return out if not spec.need_lse or lse is None else (out, lse)


def score_mod(spec: AttentionSpec) -> Callable[..., Tensor] | None:
    """Softcap and biases as flex's ``score_mod``."""
    cap = spec.softcap
    bias = None
    if spec.bias is not None:
        bias = spec.bias.bias_mod(spec.seqlen_q, spec.seqlen_k, find(spec.mask, Documents))
    if cap is None and bias is None:
        return None

    def modify(score: Tensor, batch: Tensor, head: Tensor, q_idx: Tensor, k_idx: Tensor) -> Tensor:
        if cap is not None:
            score = cap * torch.tanh(score / cap)
        return score if bias is None else score + bias(batch, head, q_idx, k_idx)

    return modify


def block_mask(spec: AttentionSpec) -> Any:
    """The mask as flex's ``BlockMask``."""
    if spec.mask is None:
        return None
    from torch.nn.attention.flex_attention import create_block_mask

    mod = spec.mask.mask_mod(spec.seqlen_q, spec.seqlen_k)
    per_batch = spec.mask.features & {"key_padding", "key_lengths", "dense_mask", "rule"}
    per_head = spec.mask.features & {"dense_mask", "rule"}
    return create_block_mask(
        mod,
        spec.batch if per_batch else None,
        spec.heads if per_head else None,
        spec.seqlen_q,
        spec.seqlen_k,
        device=str(spec.device),
    )


def kernel(device_type: str) -> Callable[..., Any]:
    """flex_attention, compiled where that makes a kernel: on a GPU, outside somebody else's torch.compile."""
    from torch.nn.attention.flex_attention import flex_attention

    if torch.compiler.is_compiling():
        return flex_attention
    if device_type == "cpu":
        return unfused
    return compiled()


def unfused(*args: Any, **kwargs: Any) -> Any:
    """flex_attention in plain operators; its advice to compile is for GPUs."""
    from torch.nn.attention.flex_attention import flex_attention

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return flex_attention(*args, **kwargs)


@functools.cache
def compiled() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    # dynamic shapes would make head_dim a symbol, which the kernel's templates refuse
    return torch.compile(flex_attention, dynamic=False)

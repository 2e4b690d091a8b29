"""The kernels called by hand, alone and in the layer a good engineer writes around one; and flash-attn's own layer."""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..backends import get
from ..backends.flash_attn.package import FlashAttn
from .cases import Case
from .hand import HandLayer
from .inputs import Inputs
from .peers import Contestant, OutAndWeights

KernelFunction = Callable[[Tensor, Tensor, Tensor, Any, bool], Tensor]
"""Attention on (batch, seqlen, heads, head_dim), told a bool mask (``True`` = may attend) or what else it is made for,
or that it is causal."""

FORCED = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
"""The kernels that SDPA chooses among on a GPU."""


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
    """``F.scaled_dot_product_attention``."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    grouped = {"enable_gqa": True} if q.shape[1] != k.shape[1] else {}
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, **grouped).transpose(1, 2)


def fold_by_hand(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
    """SDPA of one query, whose grouped heads are rows of their key head."""
    batch, _, heads_kv, head_dim = k.shape
    rows = q.reshape(batch, heads_kv, -1, head_dim)
    out = F.scaled_dot_product_attention(rows, k.transpose(1, 2), v.transpose(1, 2))
    return out.reshape(batch, 1, -1, head_dim)


def two_products(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
    """Two products of matrices and a softmax, for one query."""
    batch, _, heads_kv, head_dim = k.shape
    rows = q.reshape(batch * heads_kv, -1, head_dim)
    k, v = (x.transpose(1, 2).flatten(0, 1) for x in (k, v))
    weights = torch.bmm(rows * head_dim**-0.5, k.transpose(1, 2)).softmax(-1)
    return torch.bmm(weights, v).reshape(batch, 1, -1, head_dim)


def flash_attn(backend: str) -> KernelFunction:
    """The dense function of a flash-attn package that is here."""
    dense = function(backend)

    def attend(
        q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, window: int | None = None
    ) -> Tensor:
        narrow = {} if window is None else {"window_size": (window - 1, 0)}
        return first(dense(q, k, v, causal=is_causal, **narrow))

    return attend


def with_kvcache(backend: str) -> KernelFunction:
    """The function it has for few queries on many keys, which it splits among the processors."""
    module = sys.modules[function(backend).__module__]

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
        return first(module.flash_attn_with_kvcache(q, k, v, causal=is_causal))

    return attend


def function(backend: str) -> Callable[..., Any]:
    """The dense function that a package makes public."""
    package = get(backend)
    assert isinstance(package, FlashAttn)
    return package.public()


def first(result: Any) -> Tensor:
    """The output, which some versions return beside the log-sum-exp."""
    out: Tensor = result[0] if isinstance(result, tuple) else result
    return out


class ByHand(Contestant):
    """A kernel, called without anything around it.

    ``takes_masks``: it can be told of padding; ``decodes``: it is for few queries on many keys alone; ``forced``: the
    one kernel SDPA is left.
    """

    level = "core"

    class Module(nn.Module):
        def __init__(self, kernel: KernelFunction) -> None:
            super().__init__()
            self.kernel = kernel

        def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
            return self.kernel(q, k, v, mask, is_causal)

    def __init__(
        self,
        name: str = "sdpa",
        kernel: KernelFunction = sdpa,
        takes_masks: bool = True,
        decodes: bool = False,
        forced: SDPBackend | None = None,
    ) -> None:
        self.name, self.kernel, self.takes_masks, self.decodes, self.forced = name, kernel, takes_masks, decodes, forced

    def refuses(self, case: Case) -> str | None:
        if case.level != self.level:
            return super().refuses(case)
        if case.lengths is not None and not self.takes_masks:
            return "takes no padding mask"
        return "for one query or a few" if self.decodes and case.suite not in ("decode", "generate") else None

    def build(self, case: Case) -> nn.Module:
        if case.window is None or self.takes_masks:
            return self.Module(self.kernel)
        narrow: Callable[..., Tensor] = self.kernel
        return self.Module(functools.partial(narrow, window=case.window))

    def call(self, module: nn.Module, inputs: Inputs) -> OutAndWeights:
        told = mask_of(inputs) if self.takes_masks else (None, inputs.case.causal)
        return module(inputs.query, inputs.key, inputs.value, *told), None

    def setting(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self.forced is None else sdpa_kernel(self.forced)


class Linear(Contestant):
    """The layer a good engineer writes around a kernel, for one shape of problem, without options."""

    class Module(nn.Module):
        def __init__(
            self, embed_dim: int, heads: int, kernel: KernelFunction, batch_first: bool = True, bias: bool = True
        ) -> None:
            super().__init__()
            self.heads, self.kernel, self.batch_first = heads, kernel, batch_first
            self.in_proj_weight = nn.Parameter(torch.empty(3 * embed_dim, embed_dim))
            self.in_proj_bias = nn.Parameter(torch.empty(3 * embed_dim)) if bias else None
            self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias)

        def forward(self, query: Tensor, key: Tensor, mask: Any, is_causal: bool) -> Tensor:
            weight, bias, embed_dim = self.in_proj_weight, self.in_proj_bias, query.shape[-1]
            if query is key:
                q, k, v = F.linear(query, weight, bias).unflatten(-1, (3, self.heads, -1)).unbind(2)
            else:
                q_bias, kv_bias = (None, None) if bias is None else (bias[:embed_dim], bias[embed_dim:])
                q = F.linear(query, weight[:embed_dim], q_bias).unflatten(-1, (self.heads, -1))
                kv = F.linear(key, weight[embed_dim:], kv_bias)
                k, v = kv.unflatten(-1, (2, self.heads, -1)).unbind(2)
            if self.batch_first:
                out = self.kernel(q, k, v, mask, is_causal)
            else:
                q, k, v = (x.transpose(0, 1) for x in (q, k, v))
                out = self.kernel(q, k, v, mask, is_causal).transpose(0, 1)
            projected: Tensor = self.out_proj(out.flatten(2))
            return projected

    def __init__(self, name: str = "linear_sdpa", kernel: KernelFunction = sdpa, takes_masks: bool = True) -> None:
        self.name, self.kernel, self.takes_masks = name, kernel, takes_masks

    def refuses(self, case: Case) -> str | None:
        if case.level != self.level:
            return super().refuses(case)
        if case.weights:
            return "its kernel returns no weights"
        if case.own_heads and (case.seqlen_q != case.seqlen_k or not case.batch_first):
            return "with heads of its own it is for self-attention, batch first"
        return None if self.takes_masks or case.lengths is None else "its kernel takes no padding mask"

    def build(self, case: Case) -> nn.Module:
        if case.own_heads:
            return HandLayer(case, self.kernel)
        return self.Module(case.embed_dim, case.heads, self.kernel, case.batch_first, case.bias)

    def call(self, module: nn.Module, inputs: Inputs) -> OutAndWeights:
        return module(inputs.query, inputs.key, *mask_of(inputs)), None


class FlashAttnMha(Contestant):
    """``flash_attn.modules.mha.MHA``, the layer that comes with flash-attn 2."""

    name = "flash_attn_mha"

    def refuses(self, case: Case) -> str | None:
        if case.level != self.level:
            return super().refuses(case)
        if case.dtype not in ("float16", "bfloat16"):
            return f"dtype {case.dtype} (only float16, bfloat16)"
        if case.seqlen_q != case.seqlen_k:
            return "one packed projection: self-attention only"
        if case.weights:
            return "returns no weights"
        if not case.batch_first:
            return "takes the batch first"
        if case.qk_norm is not None:
            return "has no norms of heads"
        return "takes no padding mask" if case.lengths is not None else None

    def build(self, case: Case) -> nn.Module:
        kind = importlib.import_module("flash_attn.modules.mha").MHA
        module: nn.Module = kind(
            case.embed_dim,
            case.heads,
            num_heads_kv=case.heads_kv,
            qkv_proj_bias=case.bias,
            out_proj_bias=case.bias,
            rotary_emb_dim=case.head_dim if case.rotary else 0,
            causal=case.causal,
            use_flash_attn=True,
        )
        return module

    def translate(self, state: dict[str, Tensor], case: Case) -> dict[str, Tensor]:
        return {name.replace("in_proj_", "Wqkv."): x for name, x in state.items()}

    def call(self, module: nn.Module, inputs: Inputs) -> OutAndWeights:
        return module(inputs.query), None


def mask_of(inputs: Inputs) -> tuple[Tensor | None, bool]:
    """``attn_mask`` and ``is_causal`` of SDPA, which takes one of them: causality beside more joins the mask."""
    hidden = inputs.padding()
    if hidden is None:
        return (None, inputs.case.causal) if inputs.case.window is None else (inputs.seen, False)
    mask = ~hidden[:, None, None, :]
    return (mask if inputs.attn_mask is None else mask & ~inputs.attn_mask), False

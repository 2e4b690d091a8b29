"""The plain call: self-attention that asks for the output alone, by the shortest way through a layer.

A small layer takes as long as its Python. What ``forward`` finds out step by step about any call is known of this one
from a look at its layer and its input, so it is one projection, one kernel and one projection, as if written by hand.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .backends import choose, note
from .backends.base import HALF
from .features import HOPS
from .heads import WORTH
from .projection import PLAIN
from .spec import SHARED, AttentionSpec

SPECIAL = (*HOPS, "num_kv_heads", "window", "backend", "call_out_proj")
"""What a layer must not have of its own."""

problems: dict[tuple[Any, ...], AttentionSpec] = {}
"""The shared problems of plain calls, by what is known before the projection."""


def attend(layer: Any, x: Tensor) -> Tensor | None:
    """The output of ``layer(x, x, x)`` without masks and weights; ``None`` where ``forward`` has to look closer."""
    if torch.compiler.is_compiling() or not ordinary(layer, x):
        return None
    inner, outer = layer._parameters, layer._modules["out_proj"]._parameters
    batch, seqlen, width = x.shape
    heads = layer.num_heads
    packed = F.linear(x, inner["in_proj_weight"], inner["in_proj_bias"])
    q, k, v = packed.view(batch, seqlen, 3, heads, width // heads).unbind(2)
    key = (x.shape, heads, x.dtype, x.device, q.requires_grad, torch._C._get_deterministic_algorithms())
    spec = problems.get(key)
    if spec is None:
        spec = AttentionSpec.of(q, k, v)
        if spec.shared:
            if len(problems) >= SHARED:
                problems.clear()
            problems[key] = spec
    backend = choose(spec)
    note(layer, spec, backend)
    out = backend(q, k, v, spec)
    assert isinstance(out, Tensor)
    return F.linear(out.flatten(2), outer["weight"], outer["bias"])


def ordinary(layer: Any, x: Tensor) -> bool:
    """Layer and input are of the usual kind, size and dtype, and nobody casts, transforms or records them."""
    out_proj = layer._modules["out_proj"]
    if type(layer) not in PLAIN or type(out_proj) not in PLAIN or not vars(layer).keys().isdisjoint(SPECIAL):
        return False
    if type(x) is not Tensor or x.is_nested or x.dim() != 3 or not layer.batch_first:
        return False
    if layer.bias_k is not None or layer.bias_v is not None or layer.add_zero_attn:
        return False
    if layer.training and layer.dropout:
        return False
    if x.is_cuda and 3 * x.numel() >= WORTH and torch.is_grad_enabled():  # where ``heads.split`` spares a copy
        return False
    if x.shape[2] != layer.embed_dim or layer.embed_dim % layer.num_heads:
        return False
    inner, outer, dtype = layer._parameters, out_proj._parameters, x.dtype
    if "in_proj_bias" not in inner or "bias" not in outer:  # pruned, parametrized, or put there by hand
        return False
    for parameter in (inner.get("in_proj_weight"), outer.get("weight")):
        if type(parameter) is not torch.nn.Parameter or parameter.dtype != dtype:
            return False
    for parameter in (inner["in_proj_bias"], outer["bias"]):
        if parameter is not None and (type(parameter) is not torch.nn.Parameter or parameter.dtype != dtype):
            return False
    if torch._C._is_any_autocast_enabled() or (dtype in HALF and not x.is_cuda):  # which a CPU may only emulate
        return False
    return torch._C._get_tracing_state() is None and not torch._C._are_functorch_transforms_active()

"""The plain call: self-attention without masks, by the shortest way through a layer.

A small layer takes as long as its Python. What ``forward`` finds out step by step about any call is known of this one
from a look at its layer and its input, so it is one projection, one kernel and one projection, as if written by hand.
Every look below is a microsecond of a call, so each happens once, in the object's own dictionary.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

from .backends import OWN, choose, note
from .backends.base import HALF
from .features import HOPS
from .functional import check_result
from .heads import WORTH
from .projection import PLAIN
from .spec import SHARED, AttentionSpec, asks_deterministic, only_warns
from .weights import attention_with_weights

SPECIAL = (*HOPS, "num_kv_heads", "window", "backend", "call_out_proj", "keys_before", "keys_after")
"""What a layer must not have of its own."""

ELSEWHERE = (*SPECIAL, "in_proj_weight", "in_proj_bias", "out_proj")
"""What an instance must not have in its own dictionary: hops and features, and what belongs among its parameters."""

AWAY = ("weight", "bias", "forward")
"""The same of ``out_proj``."""

hops_of = operator.attrgetter(*SPECIAL)
usual: dict[type, tuple[Any, ...]] = {}
"""A class, and what it has under those names unless somebody patches it."""


def expect(kind: type) -> None:
    """Know a class as it is."""
    usual[kind] = hops_of(kind)


problems: dict[tuple[Any, ...], AttentionSpec] = {}
"""The shared problems of plain calls, by what is known before the projection."""

casts, traces = torch._C._is_any_autocast_enabled, torch._C._get_tracing_state
transforms = torch._C._are_functorch_transforms_active


def attend(layer: Any, x: Tensor, need_weights: bool, average: bool) -> tuple[Tensor, Tensor | None] | None:
    """What ``layer(x, x, x)`` without masks returns; ``None`` where ``forward`` has to look closer."""
    if torch.compiler.is_compiling() or type(x) is not Tensor or x.is_nested:
        return None
    kind = type(layer)
    if kind not in usual or usual[kind] != hops_of(kind):
        return None
    # who casts, traces or transforms wants to see every step
    if casts() or transforms() or traces() is not None:
        return None
    state, shape = layer.__dict__, x.shape
    out_proj = state["_modules"].get("out_proj")
    if len(shape) != 3 or type(out_proj) not in PLAIN or not state.keys().isdisjoint(ELSEWHERE):
        return None
    if not state["batch_first"] or not state["_qkv_same_embed_dim"] or state["add_zero_attn"]:
        return None
    if state["training"] and state["dropout"]:
        return None
    if state.get("bias_k", x) is not None or state.get("bias_v", x) is not None:
        return None
    # a parameter that was pruned, parametrized or put there by hand lies elsewhere
    behind = out_proj.__dict__
    if behind["_forward_hooks"] or behind["_forward_pre_hooks"] or not behind.keys().isdisjoint(AWAY):
        return None
    inner, outer, dtype, heads = state["_parameters"], behind["_parameters"], x.dtype, state["num_heads"]
    weight, bias = inner.get("in_proj_weight"), inner.get("in_proj_bias", x)
    weight_out, bias_out = outer.get("weight"), outer.get("bias", x)
    if not (type(weight) is type(weight_out) is Parameter and weight.dtype == weight_out.dtype == dtype):
        return None
    if bias is not None and (type(bias) is not Parameter or bias.dtype != dtype):
        return None
    if bias_out is not None and (type(bias_out) is not Parameter or bias_out.dtype != dtype):
        return None
    batch, seqlen, width = shape
    if width != state["embed_dim"] or width % heads:
        return None
    if not x.is_cuda:
        if dtype in HALF:  # which a CPU may only emulate
            return None
    elif 3 * x.numel() >= WORTH and torch.is_grad_enabled():  # where ``heads.split`` spares a copy
        return None
    q, k, v = F.linear(x, weight, bias).view(batch, seqlen, 3, heads, width // heads).unbind(2)
    key = (shape, heads, dtype, x.device, q.requires_grad, asks_deterministic(), only_warns())
    spec = problems.get(key)
    if spec is None:
        spec = AttentionSpec.of(q, k, v)
        if spec.shared:
            if len(problems) >= SHARED:
                problems.clear()
            problems[key] = spec
    weights: Tensor | None = None
    if need_weights:
        out, weights = attention_with_weights(q, k, v, spec, None, layer, average=average)
    else:
        backend = choose(spec)
        note(layer, spec, backend)
        out = backend(q, k, v, spec)  # type: ignore[assignment]
        if type(backend) not in OWN:
            check_result(out, spec, backend)
    return F.linear(out.flatten(2), weight_out, bias_out), weights  # type: ignore[union-attr]

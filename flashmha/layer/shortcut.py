"""The plain call: attention beside no mask, padding, documents, causality or a table of bools, by the shortest way.

A small layer takes as long as its Python. What ``forward`` finds out step by step about any call is known of this one
from a look at its layer and its input, so it is one projection, one kernel and one projection, as if written by hand.
Every look below is a microsecond of a call, so each happens once, in the object's own dictionary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

from ..backends import choose
from ..backends.choice.record import recording
from ..backends.choice.serve import serve
from ..backends.limits import HALF
from ..host.torch_state import (
    casts_to,
    computed_in,
    is_autocasting,
    is_compiling,
    is_transforming,
    tracing_state,
)
from ..problem.documents import Documents
from ..problem.masks import Dense, Mask
from ..problem.ragged import KeyLengths, KeyPadding, Padding, mark_private
from ..problem.spec import AttentionSpec
from ..problem.windows import causal
from ..weights.attend import attention_with_weights
from .call import is_causal_mask
from .features import SPECIAL
from .options import PARTS
from .projection import LINEARS, by_one_matrix
from .protocol import Layer

NOT_IN_LAYER = frozenset((*SPECIAL, "position_bias", "in_proj_weight", "in_proj_bias", "out_proj"))
"""What an instance must not have in its own dictionary: hops and features, and what belongs among its parameters."""

Linears = tuple[Parameter, Parameter | None, Parameter, Parameter | None]
"""The two projections of a plain layer, weight and bias.

A tuple without names: a ``NamedTuple`` takes .3 us more of the 35 of a small layer.
"""


def linears(layer: Layer, dtype: torch.dtype) -> Linears | None:
    """The projections of a layer in which nothing is special; ``None`` where something is, or is of another dtype."""
    kind: Any = type(layer)
    written = kind._written
    if written.kind is not kind or written.read(kind) != written.whole:
        return None
    state: Any = layer.__dict__
    modules, inner = state["_modules"], state["_parameters"]
    if len(modules) > 1 and not modules.keys().isdisjoint(PARTS):
        return None
    if not state["_qkv_same_embed_dim"] or state["add_zero_attn"] or not NOT_IN_LAYER.isdisjoint(state):
        return None
    # a parameter that was pruned, parametrized or put there by hand lies elsewhere; where a look for one in its place
    # is refused, this is ``None`` too, and a look spares a call of ``get``: .2 us for all
    try:
        out_proj = modules["out_proj"]
        if type(out_proj) not in LINEARS or state["bias_k"] is not None or state["bias_v"] is not None:
            return None
        behind = out_proj.__dict__
        outer = behind["_parameters"]
        weight, bias, weight_out, bias_out = (
            inner["in_proj_weight"],
            inner["in_proj_bias"],
            outer["weight"],
            outer["bias"],
        )
    except KeyError:
        return None
    if behind["_forward_hooks"] or behind["_forward_pre_hooks"]:
        return None
    if "weight" in behind or "bias" in behind or "forward" in behind:
        return None
    if "sinks" in inner or type(weight) is not Parameter or type(weight_out) is not Parameter:
        return None
    if weight.dtype is not dtype or weight_out.dtype is not dtype:
        return None
    if bias is not None and (type(bias) is not Parameter or bias.dtype is not dtype):
        return None
    if bias_out is not None and (type(bias_out) is not Parameter or bias_out.dtype is not dtype):
        return None
    if type(state["dropout"]) is not float or (dtype in HALF and not weight.is_cuda):  # which a CPU may only emulate
        return None
    return weight, bias, weight_out, bias_out


def learns(own: Linears, query: Tensor, key: Tensor, value: Tensor) -> bool:
    """The heads of a plain layer want gradients, where gradients are recorded."""
    weight, bias, _, _ = own
    if weight.requires_grad or query.requires_grad or (bias is not None and bias.requires_grad):
        return True
    return key.requires_grad or value.requires_grad


def attend_plain(
    layer: Layer,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Padding | Tensor | None,
    need_weights: bool,
    attn_mask: Mask | Tensor | None,
    average: bool,
    is_causal: bool,
) -> tuple[Tensor, Tensor | None] | None:
    """Run a plain call; ``None`` where ``forward`` has to look closer."""
    if is_compiling() or type(query) is not Tensor or query.is_nested:
        return None
    # tracing and transforms have to see every step
    if is_transforming() or tracing_state() is not None:
        return None
    shape, dtype = query.shape, query.dtype
    cast = casts_to(query.device) if is_autocasting() else None
    if len(shape) != 3 or (need_weights and (cast is not None or attn_mask is not None or is_causal)):
        return None
    own = linears(layer, dtype)
    if own is None:
        return None
    state = layer.__dict__
    outer, inner, width = shape
    heads, batch_first = state["num_heads"], state["batch_first"]
    if width != state["embed_dim"] or width % heads:
        return None
    sizes = (outer, inner, inner) if batch_first else (inner, outer, outer)
    if not (query is key and key is value):
        if not are_keys(key, value, shape, dtype, batch_first):
            return None
        sizes = (outer, inner, key.shape[1]) if batch_first else (inner, outer, key.shape[0])
    mask: Mask | None = None
    if key_padding_mask is not None or attn_mask is not None or is_causal:
        if key_padding_mask is not None and layer.skip_padding:
            return None
        mask = plain_mask(key_padding_mask, attn_mask, is_causal, sizes, query.device)
        if mask is None:
            return None
        mask = mask.own() if need_weights and isinstance(mask, Padding) else mask
    weight, bias, weight_out, bias_out = own
    grad = torch.is_grad_enabled() and learns(own, query, key, value)
    computed = dtype if cast is None else computed_in(query)
    dropout, head_dim = state["dropout"] if state["training"] else 0.0, width // heads
    spec = AttentionSpec.between(sizes, heads, head_dim, computed, query.device, grad, mask, dropout)
    backend = None if need_weights else choose(spec)
    together = backend is None or backend.joins_gradients
    q, k, v = by_one_matrix(query, key, value, weight, bias, heads, heads, head_dim, batch_first, together)
    weights: Tensor | None = None
    if type(q) is not Tensor:  # a mode makes other tensors of ours
        spec = AttentionSpec.of(q, k, v, mask=mask, dropout_p=spec.dropout_p)
        backend = None if need_weights else choose(spec)
    if backend is None:
        out, weights = attention_with_weights(q, k, v, spec, None, layer, average=average)
    elif cast is None and recording.calls is None and backend.results_checked:
        out = backend(q, k, v, spec)  # type: ignore[assignment]  # as ``serve`` does, which takes .3 us of 40
    else:
        out = serve(backend, q, k, v, spec, layer)
    if not batch_first:
        out = out.transpose(0, 1).contiguous()
    return F.linear(out.flatten(2), weight_out, bias_out), weights


def are_keys(key: Tensor, value: Tensor, shape: torch.Size, dtype: torch.dtype, batch_first: bool) -> bool:
    """Keys and values are ordinary tensors that fit queries of a shape and a dtype."""
    if type(key) is not Tensor or type(value) is not Tensor or key.is_nested or value.is_nested:
        return False
    keys, axis = key.shape, 0 if batch_first else 1
    if len(keys) != 3 or value.shape != keys or keys[2] != shape[2] or keys[axis] != shape[axis]:
        return False
    return key.dtype == value.dtype == dtype


def plain_mask(
    key_padding_mask: Padding | Tensor | None,
    attn_mask: Mask | Tensor | None,
    is_causal: bool,
    sizes: tuple[int, int, int],
    device: torch.device,
) -> Mask | None:
    """The mask of a call of (batch, seqlen_q, seqlen_k): padding, documents, the causal hint, or a table of bools.

    ``None`` for anything else, and for what may be an error.
    """
    batch, seqlen_q, seqlen_k = sizes
    if attn_mask is None and not is_causal:
        if type(key_padding_mask) is Tensor:
            fits = key_padding_mask.shape == (batch, seqlen_k) and key_padding_mask.device == device
            return (
                mark_private(KeyPadding(~key_padding_mask)) if fits and key_padding_mask.dtype == torch.bool else None
            )
        if not isinstance(key_padding_mask, Padding):
            return None
        attn_mask, key_padding_mask = key_padding_mask, None
    if key_padding_mask is not None:
        return None
    if type(attn_mask) in RULES:
        mask: Mask = attn_mask  # type: ignore[assignment]
        if any(tensor.device != device for tensor in mask.tensors()):
            return None
        mask.check(batch, 1, seqlen_q, seqlen_k)  # none of them depends on heads
        return mask
    if type(attn_mask) is not Tensor or attn_mask.shape != (seqlen_q, seqlen_k):
        return None
    if is_causal:
        return CAUSAL if attn_mask.dtype == torch.bool or attn_mask.is_floating_point() else None
    if attn_mask.dtype != torch.bool or attn_mask.device != device:
        return None
    return CAUSAL if is_causal_mask(attn_mask) else Dense(~attn_mask)


RULES = (KeyPadding, KeyLengths, Documents)
"""Masks that are taken as they are."""
CAUSAL = causal(align="top_left")
"""What the hint promises."""

"""One forward of a layer, from the call to the output."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Union

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import has_torch_function

from . import nested, padding, plain, projection
from .backends import preference
from .backends.base import HALF
from .call import Reading, read_call
from .features import changed, overridden
from .functional import autocast, run
from .masks import Dense, joined
from .scores import TensorBias
from .spec import AttentionSpec, needs_aten
from .stock import stock_forward
from .weights import Padded, attention_with_weights

Wanted = Union[str, Sequence[str], None]  # noqa: UP007


class Problem(NamedTuple):
    """What one call of a layer asks of attention.

    ``dtype`` is what it is computed in where that is not the layer's own; ``padded`` says where the tokens lie if
    padding was left out.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    spec: AttentionSpec
    dtype: torch.dtype | None = None
    padded: Padded | None = None


def attend(
    layer: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    need_weights: bool,
    attn_mask: Tensor | None,
    average_attn_weights: bool,
    is_causal: bool,
    backend: Wanted,
) -> tuple[Tensor, Tensor | None]:
    """One forward of a layer."""
    need_weights = need_weights and layer.need_weights
    one, unmasked = query is key and key is value, key_padding_mask is None and attn_mask is None
    if one and unmasked and not need_weights and not is_causal and backend is None:
        output = plain.attend(layer, query)
        if output is not None:
            return output, None
    if query.is_nested or (key is not query and key.is_nested) or (value is not key and value.is_nested):
        nested.check(layer, query, key, value, key_padding_mask, attn_mask)
        return attend_nested(layer, query, key, value, need_weights, average_attn_weights, is_causal, backend)
    if torch._C._get_tracing_state() is not None or wants_torch_function(layer, query, key, value):
        refuse_torchscript(layer, backend)
        return as_stock(
            layer, query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
        )
    call = read_call(layer, query, key, value, key_padding_mask, need_weights, attn_mask, is_causal)
    return attend_call(layer, call, need_weights, average_attn_weights, backend, layer.skip_padding)


def attend_call(
    layer: Any,
    call: Reading,
    need_weights: bool,
    average_attn_weights: bool,
    backend: Wanted,
    skip_padding: bool,
    rows: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """A call that was read: hops 2 to 5. Weights count for ``rows`` (batch, seqlen_q) alone."""
    wanted = layer.backend if backend is None else backend
    q, k, v, spec, dtype, padded = prepare(layer, call, wanted, skip_padding)
    weights: Tensor | None = None
    if need_weights:
        out, weights = attention_with_weights(
            q,
            k,
            v,
            spec,
            wanted,
            layer,
            average=average_attn_weights,
            batched=call.batched,
            dtype=weights_dtype(q) if dtype is None else call.query.dtype,
            rows=rows,
            padded=padded,
        )
    else:
        out = run(q, k, v, spec, wanted, layer)  # type: ignore[assignment]
    output = layer.merge(out) if dtype is None else projection.merge(layer, out, dtype).to(call.query.dtype)
    if padded is not None:
        output = padding.unpack(output, padded.places, (call.query.shape[0], call.query.shape[1]))
    if not call.batched:
        return output.squeeze(0), weights
    if not layer.batch_first:
        output = output.transpose(0, 1).contiguous()
    return output, weights


def weights_dtype(q: Tensor) -> torch.dtype:
    """What a softmax of scores of q gives: on a GPU autocast takes it to float32."""
    if q.is_cuda and torch.is_autocast_enabled("cuda"):
        return torch.promote_types(q.dtype, torch.float32)
    return q.dtype


def prepare(layer: Any, call: Reading, wanted: Wanted, skip_padding: bool) -> Problem:
    """Hops 2 and 3: the heads projected and processed, and the problem they make."""
    query, key, value, mask, bias, _, columns, valid, given = call
    padded: Padded | None = None
    dtype = computing_dtype(layer, call, wanted) if query.dtype in HALF else None
    if layer.window is not None:
        mask = joined(mask, layer.window)
    if skip_padding and valid is not None and padding.refusal(layer, call) is None:
        real = padding.tokens(valid, given)
        padded = Padded(mask, real.places, valid)
        query = key = value = query.flatten(0, 1).index_select(0, real.places)[None]
        mask = padding.packed(mask, real)
    if dtype is None:
        heads = layer.process_heads(*layer.project(query, key, value))
        if not isinstance(heads, (tuple, list)) or len(heads) != 3:
            kind = f"{len(heads)} of them" if isinstance(heads, (tuple, list)) else type(heads).__name__
            raise ValueError(f"process_heads must return the three tensors q, k and v, got {kind}.")
        q, k, v = heads
        made, wished = q.shape, query.shape
        if len(made) != 4 or made[0] != wished[0] or made[1] != wished[1]:
            raise ValueError(
                f"project and process_heads must return (batch, seqlen, heads, head_dim), q with batch and seqlen_q = "
                f"{tuple(query.shape[:2])}, got {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}."
            )
        if torch._C._is_any_autocast_enabled():
            q, k, v = autocast(q, k, v)
    else:
        q, k, v = projection.project(layer, query, key, value, dtype)
    if columns:  # always visible, and outside position space
        if mask is not None:
            seen = mask.materialize(q.shape[0], q.shape[2], q.shape[1], k.shape[1], q.device)
            mask = Dense(F.pad(seen, (0, columns), value=True))
        if bias is not None:
            bias = F.pad(bias, (0, columns))
        k, v = projection.append_columns(layer, k, v)
    spec = AttentionSpec.of(
        q,
        k,
        v,
        mask=mask,
        bias=None if bias is None else TensorBias(bias),
        dropout_p=layer.dropout if layer.training else 0.0,
    )
    return Problem(q, k, v, spec, dtype, padded)


def computing_dtype(layer: Any, call: Reading, wanted: Wanted) -> torch.dtype | None:
    """float32 where this CPU is slower in the half precision the layer is kept in; ``None`` for the layer's own.

    Not for a layer that was told a backend or has hops of its own, which were written for the layer's dtype.
    """
    query, dtype = call.query, call.query.dtype
    if query.device.type != "cpu" or torch.is_autocast_enabled("cpu") or not projection.emulated(dtype):
        return None
    if layer.call_out_proj or overridden(layer) or preference(wanted) is not None or needs_aten(query):
        return None
    weights = (layer.in_proj_weight, layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight)
    tensors = (call.key, call.value, getattr(layer.out_proj, "weight", None), *weights)
    if any(x is not None and x.dtype != dtype for x in tensors):
        return None  # an error of the caller's, which the projection reports
    return torch.float32


def attend_nested(
    layer: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    need_weights: bool,
    average_attn_weights: bool,
    is_causal: bool,
    backend: Wanted,
) -> tuple[Tensor, Tensor | None]:
    """Nested tensors: padded for the layer, and nested again; what the padding would hold is not computed."""
    if layer.window is not None and query is not key:
        raise AssertionError(
            "window beside nested query and key of their own lengths is not supported: the last query of each item "
            "would have to sit at its own last key; call the layer item by item."
        )
    same_q, same_kv = query is key, key is value
    dense_k, valid_k = nested.padded(key)
    dense_v = dense_k if same_kv else nested.padded(value)[0]
    dense_q, valid_q = (dense_k, valid_k) if same_q else nested.padded(query)
    call = read_call(layer, dense_q, dense_k, dense_v, ~valid_k, need_weights, None, is_causal)
    out, weights = attend_call(layer, call, need_weights, average_attn_weights, backend, True, rows=valid_q)
    return nested.like(out, query, valid_q), weights


def refuse_torchscript(layer: Any, backend: Wanted) -> None:
    """Raise where PyTorch's own function would lose what a layer or a call asks for."""
    lost = changed(layer) + ([] if backend is None else [f"backend={backend!r}"])
    if lost:
        raise RuntimeError(
            "TorchScript and tensors with __torch_function__ run F.multi_head_attention_forward, which has no "
            f"{', no '.join(lost)}, and this {type(layer).__name__} uses that; use torch.compile or torch.export."
        )


def wants_torch_function(layer: Any, *inputs: Tensor) -> bool:
    """Some input or weight is a tensor subclass that wants to see the call (a mode alone does not count)."""
    out_proj = layer._modules["out_proj"]  # an adapter may stand there
    inner, outer = layer._parameters, out_proj._parameters
    tensors: Any = (*inputs, *inner.values(), *outer.values())
    if "in_proj_weight" not in inner or "weight" not in outer:  # pruned, parametrized, or put there by hand
        tensors = (*tensors, getattr(layer, "in_proj_weight", None), getattr(out_proj, "weight", None))
    if not has_torch_function(tensors):
        return False
    for tensor in tensors:
        kind = type(tensor)
        if kind is Tensor or kind is torch.nn.Parameter:
            continue
        if getattr(kind, "__torch_function__", None) not in (None, torch._C._disabled_torch_function_impl):
            return True
    return False


def as_stock(
    layer: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    need_weights: bool,
    attn_mask: Tensor | None,
    average_attn_weights: bool,
    is_causal: bool,
) -> tuple[Tensor, Tensor | None]:
    """The call as ``F.multi_head_attention_forward``."""
    return stock_forward(
        query,
        key,
        value,
        layer.embed_dim,
        layer.num_heads,
        layer.in_proj_weight,
        layer.in_proj_bias,
        layer.bias_k,
        layer.bias_v,
        layer.add_zero_attn,
        layer.dropout,
        layer.out_proj.weight,
        layer.out_proj.bias,
        layer.training,
        key_padding_mask,
        need_weights,
        attn_mask,
        layer.q_proj_weight,
        layer.k_proj_weight,
        layer.v_proj_weight,
        average_attn_weights,
        is_causal,
        layer.batch_first,
    )

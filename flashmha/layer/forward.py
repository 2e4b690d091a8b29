"""One forward of a layer, from the call to the output."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..backends.base import HALF
from ..backends.choice.wishes import Wanted
from ..functional import run
from ..host.torch_state import autocast, is_autocasting, tracing_state
from ..problem import packing
from ..problem.masks import Mask, join_masks
from ..problem.packing import Padded
from ..problem.ragged import Padding
from ..problem.scores import TensorBias
from ..problem.spec import AttentionSpec
from ..weights.attend import attention_with_weights
from . import nested, padding, projection, shortcut
from .arguments import Arguments, check_flags, check_kinds
from .call import Reading, read_call
from .columns import append, count_added_keys, widen
from .features import has_hops, is_ours
from .hops import check_heads, check_output, check_weights, refuse_weights, take_three
from .precision import computing_dtype, weights_dtype
from .protocol import Layer
from .stock import as_stock, refuse_torchscript, wants_torch_function


class Prepared(NamedTuple):
    """One call of a layer as attention gets it.

    ``dtype`` is what it is computed in where that is not the layer's own; ``padded`` says where the tokens lie if
    padding was left out, ``custom`` whether the layer has hops of its own.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    spec: AttentionSpec
    dtype: torch.dtype | None = None
    padded: Padded | None = None
    custom: bool = False


def attend(
    layer: Layer,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Padding | Tensor | None,
    need_weights: bool,
    attn_mask: Mask | Tensor | None,
    average_attn_weights: bool,
    is_causal: bool,
    backend: Wanted,
) -> tuple[Tensor, Tensor | None]:
    """One forward of a layer, spelled out, since FX records this call."""
    if not (type(need_weights) is type(average_attn_weights) is type(is_causal) is bool):
        check_flags(need_weights=need_weights, average_attn_weights=average_attn_weights, is_causal=is_causal)
    need_weights = need_weights and layer.need_weights
    if backend is None:
        found = shortcut.attend_plain(
            layer, query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
        )
        if found is not None:
            return found
    given = Arguments(
        query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal, backend
    )
    unmasked = key_padding_mask is None and attn_mask is None
    tensors = isinstance(query, Tensor) and isinstance(key, Tensor) and isinstance(value, Tensor)
    if not (tensors and (unmasked or (attn_mask is None and isinstance(key_padding_mask, (Tensor, Padding))))):
        check_kinds(given)
    if query.is_nested or (key is not query and key.is_nested) or (value is not key and value.is_nested):
        nested.check_nested(layer, given)
        return attend_nested(layer, given)
    if tracing_state() is not None or wants_torch_function(layer, query, key, value):
        refuse_torchscript(layer, backend)
        return as_stock(layer, given)
    return attend_call(layer, read_call(layer, given), given, layer.skip_padding)


def attend_call(
    layer: Layer, call: Reading, given: Arguments, skip_padding: bool, rows: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """A call that was read: hops 2 to 5. Weights count for ``rows`` (batch, seqlen_q) alone."""
    wanted = layer.backend if given.backend is None else given.backend
    need_weights, average = given.need_weights, given.average_attn_weights
    q, k, v, spec, dtype, padded, custom = prepare(layer, call, wanted, skip_padding)
    weights: Tensor | None = None
    says = need_weights and custom and not is_ours(layer, "process_weights")
    if need_weights and not says and q.shape[2] != layer.num_heads:
        refuse_weights(layer, q.shape[2])
    if need_weights:
        out, weights = attention_with_weights(
            q,
            k,
            v,
            spec,
            wanted,
            layer,
            average=average and not says,
            batched=call.batched or says,
            dtype=weights_dtype(q) if dtype is None else call.query.dtype,
            rows=rows,
            padded=padded,
            remade=custom and not (is_ours(layer, "project") and is_ours(layer, "process_heads")),
        )
    else:
        out = run(q, k, v, spec, wanted, layer)  # type: ignore[assignment]
    if weights is not None and says:
        sizes = weights.shape[0], weights.shape[2], weights.shape[3]
        weights = layer.process_weights(weights)
        check_weights(layer, weights, sizes)
        weights = weights.mean(dim=1) if average else weights
        weights = weights if call.batched else weights.squeeze(0)
    output = layer.merge(out) if dtype is None else projection.merge_heads(layer, out, dtype).to(call.query.dtype)
    if not isinstance(output, Tensor) or output.shape != (q.shape[0], q.shape[1], layer.embed_dim):
        check_output(layer, output, q.shape[0], q.shape[1])
    if padded is not None:
        output = packing.unpack_tokens(output, padded.places, (call.query.shape[0], call.query.shape[1]))
    if not call.batched:
        return output.squeeze(0), weights
    if not layer.batch_first:
        output = output.transpose(0, 1).contiguous()
    return output, weights


def prepare(layer: Layer, call: Reading, wanted: Wanted, skip_padding: bool) -> Prepared:
    """Hops 2 and 3: the heads projected and processed, and the problem they make."""
    query, key, value, mask, bias, _, columns, rule = call
    padded: Padded | None = None
    custom = has_hops(layer)
    dtype = computing_dtype(layer, call, wanted) if query.dtype in HALF else None
    if layer.window is not None:
        mask = join_masks(mask, layer.window)
    if skip_padding and rule is not None and padding.why_padding_stays(layer, call) is None:
        real = packing.tokens_of(rule, key.shape[1])
        padded = Padded(mask, real.places, call.valid)
        query, key, value = padding.pack_inputs(query, key, value, real.places)
        mask = packing.packed_mask(mask, real)
    if dtype is None:
        projected = layer.project(query, key, value)
        heads = layer.process_heads(*(take_three("project", projected) if custom else projected))
        if custom:
            heads = take_three("process_heads", heads)
            check_heads(layer, projected, heads, query.shape[0], query.shape[1])
        q, k, v = heads
        if is_autocasting():
            q, k, v = autocast(q, k, v)
    else:
        q, k, v = projection.project_inputs(layer, query, key, value, dtype)
    before = after = 0
    if custom or layer.keys_before or layer.keys_after:
        before, after = count_added_keys(layer, key.shape[1], k.shape[1], mask is not None or bias is not None)
    if before or after or columns:
        sizes = q.shape[0], q.shape[2], q.shape[1], k.shape[1] - before - after
        mask, bias = widen(mask, bias, before, after + columns, sizes, q)
    if columns:
        k, v = append(layer, k, v)
    spec = AttentionSpec.of(
        q,
        k,
        v,
        mask=mask,
        bias=None if bias is None else TensorBias(bias),
        dropout_p=layer.dropout if layer.training else 0.0,
    )
    return Prepared(q, k, v, spec, dtype, padded, custom)


def attend_nested(layer: Layer, given: Arguments) -> tuple[Tensor, Tensor | None]:
    """Nested tensors: padded for the layer, and nested again; what the padding would hold is not computed."""
    query, key, value = given.query, given.key, given.value
    if layer.window is not None and query is not key:
        raise AssertionError(
            "window beside nested query and key of their own lengths is not supported: the last query of each item "
            "would have to sit at its own last key; call the layer item by item."
        )
    same_q, same_kv = query is key, key is value
    dense_k, valid_k = nested.pad(key)
    dense_v = dense_k if same_kv else nested.pad(value)[0]
    dense_q, valid_q = (dense_k, valid_k) if same_q else nested.pad(query)
    dense = given._replace(query=dense_q, key=dense_k, value=dense_v, key_padding_mask=~valid_k)
    out, weights = attend_call(layer, read_call(layer, dense), given, True, rows=valid_q)
    return nested.nest_like(out, query, valid_q), weights

"""One forward of a layer, from the call to the output."""

from typing import Any

from torch import Tensor

from ..backends.choice.wishes import Wanted
from ..cache.base import Cache
from ..cache.memory import MemoryCache
from ..functional import run_attention
from ..host.torch_state import is_compiling, tracing_state
from ..problem import packing
from ..problem.masks import Mask
from ..problem.ragged import Padding
from ..problem.spec import AttentionSpec
from ..weights.attend import attention_with_weights
from . import nested, projection, shortcut
from .arguments import Arguments, check_flags, check_kinds
from .cached import check_cache, enter_cache, undone_where_it_fails
from .call import Reading, read_call
from .features import is_ours
from .hops import check_attended, check_output, check_weights, refuse_weights, say_heads
from .keys_values import with_stand_ins
from .precision import weights_dtype
from .prepared import prepare_call
from .problems import Problems
from .protocol import Layer
from .slots import settle_pages
from .step import attend_alone
from .stock import as_stock, refuse_torchscript, wants_torch_function


def call_layer(
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
    positions: Tensor | None,
    key_positions: Tensor | None,
    kv: tuple[Tensor, Tensor] | None,
    cache: Cache | MemoryCache | None,
) -> tuple[Tensor, Tensor | None]:
    """One forward of a layer, spelled out, since FX records this call."""
    if not (type(need_weights) is type(average_attn_weights) is type(is_causal) is bool):
        check_flags(need_weights=need_weights, average_attn_weights=average_attn_weights, is_causal=is_causal)
    need_weights = need_weights and layer.need_weights
    if backend is None and positions is None and key_positions is None and kv is None and cache is None:
        found = shortcut.attend_plain(
            layer, query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
        )
        if found is not None:
            return found
    unmasked = key_padding_mask is None and attn_mask is None
    named = backend is not None or positions is not None or key_positions is not None or kv is not None
    if cache is not None and unmasked and not (named or need_weights or is_causal):
        out = attend_alone(layer, query, key, value, cache)
        if out is not None:
            return out, None
    given = Arguments(
        query,
        key,
        value,
        key_padding_mask,
        need_weights,
        attn_mask,
        average_attn_weights,
        is_causal,
        backend,
        positions,
        key_positions,
        kv,
        cache,
    )
    tensors = isinstance(query, Tensor) and isinstance(key, Tensor) and isinstance(value, Tensor)
    if not (tensors and (unmasked or (attn_mask is None and isinstance(key_padding_mask, (Tensor, Padding))))):
        check_kinds(given)
    if cache is None or is_compiling():
        return call_checked(layer, given)
    with undone_where_it_fails(check_cache(cache)):
        return call_checked(layer, given)


def call_checked(layer: Layer, given: Arguments) -> tuple[Tensor, Tensor | None]:
    """A call whose arguments are of the right kinds."""
    query = given.query
    if query.is_nested or (given.kv is None and (given.key.is_nested or given.value.is_nested)):
        nested.check_nested(layer, given)
        return attend_nested(layer, given)
    if given.cache is not None:
        given = enter_cache(layer, given)
    if given.kv is not None:
        given = with_stand_ins(layer, given)
    if tracing_state() is not None or wants_torch_function(layer, query, given.key, given.value):
        refuse_torchscript(layer, given)
        return as_stock(layer, given)
    return attend_call(layer, read_call(layer, given), given, layer.skip_padding)


def attend_call(
    layer: Layer, call: Reading, given: Arguments, skip_padding: bool, rows: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """A call that was read: hops 2 to 5. Weights count for ``rows`` (batch, seqlen_q) alone."""
    wanted = layer.backend if given.backend is None else given.backend
    need_weights, average = given.need_weights, given.average_attn_weights
    query, q, k, v, problem, dtype, padded, custom = prepare_call(layer, call, given, wanted, skip_padding)
    says = need_weights and custom and not is_ours(layer, "process_weights")
    weigh: dict[str, Any] | None = None
    if need_weights:
        weigh = {"average": average and not says, "batched": call.batched or says, "rows": rows, "padded": padded}
        weigh["lent"] = given.kv is not None
    weights: list[Tensor] = []
    if custom and not is_ours(layer, "attend"):
        problems = Problems(layer, wanted, weigh, says)
        out = layer.attend(q, k, v, **problem, call=problems)
        check_attended(out, q.shape[0], q.shape[1])
        weights = problems.take_weights() if need_weights else weights
    elif weigh is None:
        q, k, v, spec = settle_pages(q, k, v, AttentionSpec.of(q, k, v, **problem), wanted)
        out = run_attention(q, k, v, spec, wanted, layer)  # type: ignore[assignment]
    else:
        if not says and q.shape[2] != layer.num_heads:
            refuse_weights(layer, say_heads(layer, q.shape[2]))
        weigh["dtype"] = weights_dtype(q) if dtype is None else call.query.dtype
        remade = custom and not (is_ours(layer, "project") and is_ours(layer, "process_heads"))
        weigh["remade"] = remade or given.cache is not None
        out, its = attention_with_weights(q, k, v, AttentionSpec.of(q, k, v, **problem), wanted, layer, **weigh)
        weights = [its]
    shown = weights[0] if weights else None
    if says:
        shown = say_weights(layer, weights, average, call.batched)
    if dtype is None:
        output = layer.merge(out, query)
    else:
        output = projection.merge_heads(layer, out, dtype).to(call.query.dtype)
    if not isinstance(output, Tensor) or output.shape != (q.shape[0], q.shape[1], layer.embed_dim):
        check_output(layer, output, q.shape[0], q.shape[1])
    if padded is not None:
        output = packing.unpack_tokens(output, padded.places, (call.query.shape[0], call.query.shape[1]))
    if not call.batched:
        return output.squeeze(0), shown
    if not layer.batch_first:
        output = output.transpose(0, 1).contiguous()
    return output, shown


def say_weights(layer: Layer, weights: list[Tensor], average: bool, batched: bool) -> Tensor:
    """The weights of a layer, as it makes them of those of its problems."""
    first = weights[0]
    made = layer.process_weights(*weights)
    check_weights(made, (first.shape[0], first.shape[2], first.shape[3]))
    made = made.mean(dim=1) if average else made
    return made if batched else made.squeeze(0)


def attend_nested(layer: Layer, given: Arguments) -> tuple[Tensor, Tensor | None]:
    """Nested tensors: padded for the layer, and nested again; what the padding would hold is not computed."""
    query, key, value = given.query, given.key, given.value
    nested.check_lengths(layer, query, key, value)
    same_q, same_kv = query is key, key is value
    dense_k, valid_k = nested.pad(key)
    dense_v = dense_k if same_kv else nested.pad(value)[0]
    dense_q, valid_q = (dense_k, valid_k) if same_q else nested.pad(query)
    dense = given._replace(query=dense_q, key=dense_k, value=dense_v, key_padding_mask=~valid_k)
    out, weights = attend_call(layer, read_call(layer, dense), dense, True, rows=valid_q)
    return nested.nest_like(out, query, valid_q), weights

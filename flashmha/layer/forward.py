"""One forward of a layer, from the call to the output."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends.choice.wishes import Wanted
from ..backends.limits import HALF
from ..cache.base import Cache
from ..cache.memory import MemoryCache
from ..functional import as_bias, run_attention
from ..host.torch_state import autocast, is_autocasting, is_compiling, tracing_state
from ..parts.heads import prepare_heads
from ..problem import packing
from ..problem.masks import Mask, join_masks
from ..problem.packing import Padded
from ..problem.ragged import Padding
from ..problem.scores import Bias, TensorBias
from ..problem.spec import AttentionSpec
from ..weights.attend import attention_with_weights
from . import nested, padding, projection, shortcut
from .arguments import Arguments, check_flags, check_kinds
from .cached import begin_step, check_cache, enter_cache, undone_where_it_fails
from .call import Reading, read_call
from .columns import append, count_added_keys, widen
from .features import has_hops, is_ours
from .hops import (
    check_absent,
    check_attended,
    check_heads,
    check_output,
    check_projected,
    check_weights,
    refuse_weights,
    run_without,
    say_heads,
    take_three,
)
from .keys_values import with_stand_ins
from .options import owns_parts, rule_of
from .places import Places, count_real, find_places, read_places
from .precision import computing_dtype, weights_dtype
from .problems import Problems
from .protocol import Layer
from .slots import check_by_distance, extend, settle_pages
from .step import attend_alone
from .stock import as_stock, refuse_torchscript, wants_torch_function


class Prepared(NamedTuple):
    """One call of a layer as attention gets it.

    ``query`` is what was projected, ``problem`` the mask and the scores by name, ``dtype`` what it is computed in where
    that is not the layer's own; ``padded`` says where the tokens lie if padding was left out, ``custom`` whether the
    layer has hops of its own.
    """

    query: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    problem: dict[str, Any]
    dtype: torch.dtype | None = None
    padded: Padded | None = None
    custom: bool = False


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
    return attend_call(layer, read_call(layer, given), given, layer.skip_padding and given.cache is None)


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


def prepare_call(layer: Layer, call: Reading, given: Arguments, wanted: Wanted, skip_padding: bool) -> Prepared:
    """Hops 2 and 3: the heads projected and processed, and the problem they make."""
    query, key, value, mask, bias, _, columns, rule = call
    batch, seqlen, _ = query.shape
    sizes = batch, seqlen, seqlen if query is key else key.shape[1]
    padded: Padded | None = None
    custom, kv = has_hops(layer), given.kv
    step = None if given.cache is None else begin_step(layer, given.cache, call)
    own = kv is None and step is None
    dtype = computing_dtype(layer, call, wanted) if query.dtype in HALF and own else None
    if layer.window is not None or layer.causal:
        mask = join_masks(mask, rule_of(layer))
    if skip_padding and rule is not None and step is None and padding.why_padding_stays(layer, call) is None:
        real = packing.tokens_of(rule, key.shape[1])
        padded = Padded(mask, real.places, call.valid)
        query, key, value = padding.pack_inputs(query, key, value, real.places)
        mask = packing.packed_mask(mask, real)
    if kv is not None:
        key = value = None  # type: ignore[assignment]
    if dtype is None:
        inputs: Any = query, key, value
        heads = projected = layer.project(*inputs) if kv is None else run_without(layer, "project", *inputs)
        if custom:
            heads = take_three("project", projected)
            check_projected(layer, heads)
            if kv is not None:
                check_absent("project", heads, (query, key, value))
    else:
        heads = projected = projection.project_inputs(layer, query, key, value, dtype)
    named: Places = (None, None)
    if given.positions is not None or given.key_positions is not None:
        named = read_places(layer, given.positions, given.key_positions, sizes, kv is not None, query.device)
    elif step is not None and step.positions is not None:
        named = step.positions, step.positions
    sinks = position_bias = None
    if owns_parts(layer):
        sinks, position_bias = layer.sinks, layer.position_bias
        real_places = None if padded is None else padded.places
        places = find_places(named, mask, sizes, real_places, kv is not None, query.device)
        length = None if padded is not None else count_real(layer, rule, places, sizes[2], call.query is call.key)
        heads = turn_heads(layer, heads, *places, length)
    if dtype is None:
        before_hop = heads
        heads = layer.process_heads(*heads) if kv is None else run_without(layer, "process_heads", *heads)
        if custom:
            heads = take_three("process_heads", heads)
            if kv is not None:
                check_absent("process_heads", heads, before_hop)
    q, k, v = heads if kv is None else (heads[0], *kv)
    if custom or kv is not None:
        check_heads(layer, projected, (q, k, v), query.shape[0], query.shape[1], kv is not None)
    if dtype is None and is_autocasting():
        q, k, v = autocast(q, k, v)
    before = after = 0
    if custom or layer.keys_before or layer.keys_after:
        looks = mask is not None or bias is not None or position_bias is not None
        before, after = count_added_keys(layer, sizes[2] if padded is None else key.shape[1], k.shape[1], looks)
    added: Bias | None = None if bias is None else TensorBias(bias)
    if position_bias is not None:
        added = add_position_bias(position_bias, added, q, k[:, before : k.shape[1] - after], step is not None)
    if step is not None:
        in_rows = columns > 0 or given.need_weights or not is_ours(layer, "attend")
        k, v, mask, added = extend(layer, step, (q, k, v), mask, added, given.need_weights, in_rows)
    if before or after or columns:
        whole = q.shape[0], q.shape[2], q.shape[1], k.shape[1] - before - after
        mask, added = widen(mask, added, before, after + columns, whole, q)
    if columns:
        k, v = append(layer, k, v)
    problem = {
        "mask": mask,
        "bias": added,
        "softcap": layer.softcap,
        "sinks": sinks,
        "softmax_scale": layer.softmax_scale,
        "dropout_p": layer.dropout if layer.training else 0.0,
    }
    return Prepared(query, q, k, v, problem, dtype, padded, custom)


def turn_heads(
    layer: Layer, heads: Any, positions_q: Tensor | None, positions_k: Tensor | None, length: Tensor | None
) -> Any:
    """Heads with the norms and the rotary of a layer."""
    q, k, v = heads
    q, k = prepare_heads(
        q,
        k,
        q_norm=layer.q_norm,
        k_norm=layer.k_norm,
        rotary=layer.rotary,
        positions_q=positions_q,
        positions_k=positions_k,
        length=length,
    )
    return q, k, v


def add_position_bias(mine: Any, bias: Bias | None, q: Tensor, k: Tensor, goes_on: bool) -> Bias | None:
    """A bias with that of a layer's positions; k holds the call's own keys, which may go on behind a cache."""
    made = mine if isinstance(mine, Bias) else as_bias(mine(q, k))
    if goes_on and made is not None:
        check_by_distance(made)
    return bias if made is None else made if bias is None else bias + made


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

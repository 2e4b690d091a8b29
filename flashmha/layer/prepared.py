"""A call of a layer on its way to attention: heads projected and processed, and the problem that they make."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends.choice.wishes import Wanted
from ..backends.limits import HALF
from ..functional import as_bias
from ..host.torch_state import autocast, is_autocasting
from ..parts.heads import prepare_heads
from ..problem import packing
from ..problem.masks import Mask, join_masks
from ..problem.packing import Padded
from ..problem.scores import Bias, TensorBias
from . import padding, projection
from .arguments import Arguments
from .cached import CacheStep, begin_step
from .call import Reading
from .columns import append, count_added_keys, widen
from .features import has_hops, is_ours
from .hops import check_heads, run_process_heads, run_project
from .options import owns_parts, rule_of
from .places import Places, count_real, find_places, read_places
from .precision import computing_dtype
from .protocol import Layer
from .slots import check_by_distance, extend


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


def prepare_call(layer: Layer, call: Reading, given: Arguments, wanted: Wanted, skip_padding: bool) -> Prepared:
    """Hops 2 and 3, and what they make of the call's mask and bias."""
    query, key, value, mask, bias, _, columns, rule = call
    sizes = query.shape[0], query.shape[1], query.shape[1] if query is key else key.shape[1]
    padded: Padded | None = None
    custom, kv = has_hops(layer), given.kv
    step = None if given.cache is None else begin_step(layer, given.cache, call)
    own = kv is None and step is None
    dtype = computing_dtype(layer, call, wanted) if query.dtype in HALF and own else None
    if layer.window is not None or layer.causal:
        mask = join_masks(mask, rule_of(layer))
    if skip_padding and rule is not None and padding.why_padding_stays(layer, call, step is not None) is None:
        real = packing.tokens_of(rule, key.shape[1])
        padded = Padded(mask, real.places, call.valid)
        query, key, value = padding.pack_inputs(query, key, value, real.places)
        mask = packing.packed_mask(mask, real)
    if kv is not None:
        key = value = None  # type: ignore[assignment]
    if dtype is not None:
        heads = projected = projection.project_inputs(layer, query, key, value, dtype)
    else:
        heads = projected = run_project(layer, query, key, value) if custom else layer.project(query, key, value)
    named = name_places(layer, given, step, sizes, query.device)
    sinks = position_bias = None
    if owns_parts(layer):
        sinks, position_bias = layer.sinks, layer.position_bias
        heads = turn_heads(layer, heads, call, named, mask, sizes, padded, kv is not None)
    if dtype is None:
        heads = run_process_heads(layer, heads) if custom else layer.process_heads(*heads)
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


def name_places(
    layer: Layer, given: Arguments, step: CacheStep | None, sizes: tuple[int, int, int], device: torch.device
) -> Places:
    """The positions that the caller says, or a cache."""
    if given.positions is not None or given.key_positions is not None:
        return read_places(layer, given.positions, given.key_positions, sizes, given.kv is not None, device)
    return (None, None) if step is None else (step.positions, step.positions)


def turn_heads(
    layer: Layer,
    heads: Any,
    call: Reading,
    named: Places,
    mask: Mask | None,
    sizes: tuple[int, int, int],
    padded: Padded | None,
    has_kv: bool,
) -> Any:
    """Heads with the norms and the rotary of a layer."""
    q, k, v = heads
    real = None if padded is None else padded.places
    positions_q, positions_k = places = find_places(named, mask, sizes, real, has_kv, call.query.device)
    length = None
    if padded is None:
        length = count_real(layer, call.padding, places, sizes[2], call.query is call.key)
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

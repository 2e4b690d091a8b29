"""Heads of keys and values that are handed out by one call of a layer and in to another."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..host.torch_state import is_dense
from ..parts.heads import prepare_heads
from ..problem.wording import spell
from .arguments import Arguments
from .call import change_each_once
from .columns import number_of_keys
from .features import EXTRA_KEYS
from .hops import check_absent, check_kv, check_projected, run_without, take_three
from .nested import PACK
from .places import read_places
from .protocol import Layer


def make_keys_values(layer: Layer, key: Tensor, value: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor]:
    """Keys and values as hops 2 and 3 make them, without queries."""
    if key.is_nested or value.is_nested:
        raise TypeError(
            f"key and value must be dense tensors for keys_values, got {spell(key if key.is_nested else value)}: kv "
            f"takes no nested heads; {PACK}, beside kv=layer.keys_values(packed.tokens, positions=...)."
        )
    batched = key.dim() == 3
    if not (batched and layer.batch_first):
        _, key, value = change_each_once(lambda x: x.transpose(0, 1) if batched else x.unsqueeze(0), key, key, value)
    sizes = key.shape[0], key.shape[1], key.shape[1]
    places, _ = read_places(layer, positions, None, sizes, True, key.device)
    nothing: Any = None
    made = take_three("project", run_without(layer, "project", nothing, key, value))
    check_absent("project", made, (None, key, value))
    check_projected(layer, made)
    _, k, v = made
    _, k = prepare_heads(
        None,
        k,
        q_norm=None,
        k_norm=layer.k_norm,
        rotary=layer.rotary,
        positions_q=None,
        positions_k=places,
    )
    heads: Any = nothing, k, v
    made = take_three("process_heads", run_without(layer, "process_heads", *heads))
    check_absent("process_heads", made, heads)
    return made[1], made[2]


def with_stand_ins(layer: Layer, given: Arguments) -> Arguments:
    """The arguments of a call with ``kv``, whose key and value are as many as the keys and hold nothing.

    Raises:
        TypeError, ValueError: ``kv`` is no pair of heads of keys and values.
    """
    query, kv = given.query, given.kv
    if not isinstance(kv, (tuple, list)) or len(kv) != 2 or not all(map(is_dense, kv)):
        raise TypeError(f"kv must be the pair of tensors that keys_values returns, got {spell(kv)}.")
    k, v = kv
    batch = 1 if query.dim() == 2 else query.shape[0 if layer.batch_first else 1]
    if k.dim() != 4 or v.dim() != 4 or k.shape[:3] != v.shape[:3] or k.shape[0] != batch:
        raise ValueError(
            f"kv must be keys and values (batch={batch}, seqlen_k, heads_kv, head_dim), got {tuple(k.shape)} and "
            f"{tuple(v.shape)}."
        )
    check_kv(layer, k, v)
    before, after = (number_of_keys(layer, name) for name in EXTRA_KEYS)
    seqlen = k.shape[1] - before - after
    shape = [seqlen] if query.dim() == 2 else [batch, seqlen] if layer.batch_first else [seqlen, batch]

    def stand_in(width: Any) -> Tensor:
        return torch.empty(1, dtype=query.dtype, device=query.device).expand(*shape, width or layer.embed_dim)

    rest: list[Any]
    _, _, _, *rest = given  # a graph of torch 2.8 can hold neither _replace nor a slice
    return Arguments(query, stand_in(layer.kdim), stand_in(layer.vdim), *rest)

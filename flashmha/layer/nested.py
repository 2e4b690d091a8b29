"""Nested tensors at a layer's door: padded on the way in, nested on the way out."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ..host.torch_state import eager, readable
from .arguments import Arguments
from .options import counted_by
from .protocol import Layer


def check_nested(layer: Layer, given: Arguments) -> None:
    """Raise ``nn.MultiheadAttention``'s error for what a nested call cannot be."""
    query, key, value, key_padding_mask, _, attn_mask, *_ = given
    for name in ("positions", "key_positions", "kv", "cache"):
        if getattr(given, name) is not None:
            fix = f"{PACK}, and takes {name}"
            if name == "cache":
                fix = "give padded rows, query.to_padded_tensor(0.0), and say in key_padding_mask what is padding"
            raise AssertionError(
                f"{name} beside NestedTensor input is not supported: every item counts from 0, and has keys of its "
                f"own; {fix}"
            )
    if query.dim() != 3:
        raise AssertionError(
            f"query should be unbatched 2D or batched 3D tensor but received {query.dim()}-D query tensor"
        )
    why = None
    if not (query.is_nested and key.is_nested and value.is_nested):
        why = "query, key and value are not all nested"
    elif key_padding_mask is not None or attn_mask is not None:
        why = (
            "a mask beside NestedTensor input is not supported: the lengths of the items are the mask. causal=True and "
            f"window= of the constructor go with it; {PACK}, and takes any rule: attn_mask=packed.documents & rule"
        )
    elif not layer.batch_first:
        why = "batch_first was not True"
    elif query.layout == torch.strided and torch.is_grad_enabled() and wants_grad(layer, query, key, value):
        why = (
            "grad is enabled and at least one of query or the input/output projection weights or biases requires_grad "
            "(nested tensors with layout=torch.jagged can be differentiated)"
        )
    if why is not None:
        raise AssertionError(
            "MultiheadAttention does not support NestedTensor outside of its fast path. "
            f"The fast path was not hit because {why}"
        )


PACK = (
    "flashmha.pack makes one row of the items, for attn_mask=packed.documents, in cross-attention queries.across(keys)"
)
"""What takes the arguments that a nested call cannot have."""


def check_lengths(layer: Layer, query: Tensor, key: Tensor, value: Tensor) -> None:
    """Raise where the items of nested tensors are not as long as each other and have to be.

    Keys and values always; queries and keys where the layer counts positions, since the last query of an item sits at
    its last key. On a GPU these have to share their offsets: a look at them would wait for the device.
    """
    if key is not value and eager(item_lengths(key)) and not are_as_long(key, value):
        raise AssertionError(
            f"key and value must have items of the same lengths, got {item_lengths(key).tolist()} and "
            f"{item_lengths(value).tolist()}"
        )
    counted = counted_by(layer)
    if counted is None or query is key or share_offsets(query, key):
        return
    lengths = item_lengths(query), item_lengths(key)
    if not all(map(readable, lengths)):
        raise AssertionError(
            f"{counted} beside nested query and key must find one tensor of offsets in both, since on a GPU and in a "
            f"graph their lengths are not looked at; {PACK}"
        )
    if not torch.equal(*lengths):
        raise AssertionError(
            f"{counted} beside nested query and key must find items of the same lengths, got {lengths[0].tolist()} and "
            f"{lengths[1].tolist()}; {PACK}"
        )


def wants_grad(layer: Layer, *inputs: Tensor) -> bool:
    """Some input or weight that stock's fast path looks at requires a gradient."""
    out_proj = layer.out_proj
    outer = (getattr(out_proj, "weight", None), getattr(out_proj, "bias", None))
    weights = (layer.in_proj_weight, layer.in_proj_bias, *outer)
    return any(isinstance(tensor, Tensor) and tensor.requires_grad for tensor in (*inputs, *weights))


def pad(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Pad with zeros to (batch, longest, features), and say which positions are real, (batch, longest)."""
    dense = torch.nested.to_padded_tensor(tensor if tensor.layout == torch.strided else without_gaps(tensor), 0.0)
    places = torch.arange(dense.shape[1], device=dense.device)
    return dense, places < item_lengths(tensor).to(dense.device)[:, None]


def item_lengths(tensor: Tensor) -> Tensor:
    """How long each item of a nested tensor is."""
    if tensor.layout == torch.strided:
        return tensor._nested_tensor_size()[:, 0]  # type: ignore[no-any-return]
    held: Any = tensor
    lengths: Tensor = held.offsets().diff() if held.lengths() is None else held.lengths()
    return lengths


def share_offsets(one: Any, two: Any) -> bool:
    """Two nested tensors were made with one tensor of offsets, and have the same gaps."""
    if not one.layout == two.layout == torch.jagged:
        return False
    return one.offsets() is two.offsets() and one.lengths() is two.lengths()


def are_as_long(one: Tensor, two: Tensor) -> bool:
    """Two nested tensors hold as many items, of the same lengths."""
    return share_offsets(one, two) or torch.equal(item_lengths(one), item_lengths(two))


def nest_like(dense: Tensor, tensor: Tensor, valid: Tensor) -> Tensor:
    """A padded tensor nested as another one is, with its gaps, so that they can be added."""
    if tensor.layout == torch.strided:
        return torch._nested_tensor_from_mask(dense, valid, mask_check=False)
    values, held = dense[valid], cast(Any, tensor)
    if held.lengths() is None:
        return nest_values_like(values, tensor)
    spread = values.new_zeros(held.values().shape[0], *values.shape[1:]).index_put((rows_of_items(held),), values)
    return torch.nested.nested_tensor_from_jagged(spread, offsets=held.offsets(), lengths=held.lengths())


def nest_values_like(values: Tensor, tensor: Tensor) -> Tensor:
    """Values (total, ...) nested as a jagged tensor is; both share their offsets, so that they can be added."""
    return torch.nested.nested_tensor_from_jagged(values, offsets=tensor.offsets())  # type: ignore[attr-defined]


def is_jagged(thing: object) -> bool:
    """A jagged nested tensor whose second axis is the ragged one."""
    if not isinstance(thing, Tensor) or thing.layout != torch.jagged:
        return False
    return all(isinstance(size, int) for place, size in enumerate(thing.shape) if place != 1)


def without_gaps(tensor: Tensor) -> Tensor:
    """A jagged tensor whose values are those of its items and no others, end to end.

    (``contiguous`` makes one too, whose gradient PyTorch 2.13 refuses.)
    """
    held: Any = tensor
    if held.lengths() is None:
        return tensor
    offsets = F.pad(held.lengths().cumsum(0), (1, 0))
    return torch.nested.nested_tensor_from_jagged(held.values()[rows_of_items(held)], offsets=offsets)


def rows_of_items(held: Any) -> Tensor:
    """Where the rows of the items lie among the values of a jagged tensor with gaps, (total,)."""
    lengths = held.lengths()
    before = held.offsets()[:-1] - (lengths.cumsum(0) - lengths)
    shifts: Tensor = before.repeat_interleave(lengths)
    return shifts + torch.arange(shifts.shape[0], device=shifts.device)

"""Nested tensors at a layer's door: padded on the way in, nested on the way out."""

from __future__ import annotations

import torch
from torch import Tensor

from .arguments import Arguments
from .protocol import Layer


def check_nested(layer: Layer, given: Arguments) -> None:
    """Raise ``nn.MultiheadAttention``'s error for what a nested call cannot be."""
    query, key, value, key_padding_mask, _, attn_mask, *_ = given
    for name in ("positions", "key_positions", "kv", "cache"):
        if getattr(given, name) is not None:
            raise AssertionError(f"{name} beside NestedTensor input is not supported: every item counts from 0")
    if query.dim() != 3:
        raise AssertionError(
            f"query should be unbatched 2D or batched 3D tensor but received {query.dim()}-D query tensor"
        )
    why = None
    if not (query.is_nested and key.is_nested and value.is_nested):
        why = "query, key and value are not all nested"
    elif key_padding_mask is not None or attn_mask is not None:
        why = "a mask beside NestedTensor input is not supported: the lengths of the items are the mask"
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


def wants_grad(layer: Layer, *inputs: Tensor) -> bool:
    """Some input or weight that stock's fast path looks at requires a gradient."""
    out_proj = layer.out_proj
    outer = (getattr(out_proj, "weight", None), getattr(out_proj, "bias", None))
    weights = (layer.in_proj_weight, layer.in_proj_bias, *outer)
    return any(isinstance(tensor, Tensor) and tensor.requires_grad for tensor in (*inputs, *weights))


def pad(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Pad with zeros to (batch, longest, features), and say which positions are real, (batch, longest)."""
    dense = torch.nested.to_padded_tensor(tensor, 0.0)
    lengths = tensor._nested_tensor_size()[:, 0] if tensor.layout == torch.strided else tensor.offsets().diff()  # type: ignore[attr-defined]
    places = torch.arange(dense.shape[1], device=dense.device)
    return dense, places < lengths.to(dense.device)[:, None]


def nest_like(dense: Tensor, tensor: Tensor, valid: Tensor) -> Tensor:
    """A padded tensor nested as another one is."""
    if tensor.layout == torch.strided:
        return torch._nested_tensor_from_mask(dense, valid, mask_check=False)
    return nest_values_like(dense[valid], tensor)


def nest_values_like(values: Tensor, tensor: Tensor) -> Tensor:
    """Values (total, ...) nested as a jagged tensor is; both share their offsets, so that they can be added."""
    return torch.nested.nested_tensor_from_jagged(values, offsets=tensor.offsets())  # type: ignore[attr-defined]


def is_jagged(thing: object) -> bool:
    """A jagged nested tensor whose second axis is the ragged one."""
    if not isinstance(thing, Tensor) or thing.layout != torch.jagged:
        return False
    return all(isinstance(size, int) for place, size in enumerate(thing.shape) if place != 1)


def without_gaps(tensor: Tensor) -> Tensor:
    """A jagged tensor whose values are those of its items and no others, end to end."""
    return tensor if tensor.lengths() is None else tensor.contiguous()  # type: ignore[attr-defined]


def as_long(tensor: Tensor, other: Tensor) -> bool:
    """Two jagged tensors without gaps hold as many items, of the same lengths."""
    one, two = without_gaps(tensor).offsets(), other.offsets()  # type: ignore[attr-defined]
    return one is two or torch.equal(one, two)

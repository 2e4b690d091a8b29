"""The tensors of a call, checked as ``nn.MultiheadAttention`` checks them."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import torch
from torch import Tensor

from ..host.torch_state import casts_to, is_autocasting
from ..problem.wording import dtype_name
from .protocol import Layer


def check_inputs(layer: Layer, query: Tensor, key: Tensor, value: Tensor) -> None:
    """The errors of ``nn.MultiheadAttention`` for query, key and value."""
    embed_dim = layer.embed_dim
    one = query is key and key is value and layer._qkv_same_embed_dim
    free = layer.free_head_dim is not None
    if layer._qkv_same_embed_dim and layer.in_proj_weight is None and layer.has_in_proj:
        raise AssertionError("use_separate_proj_weight is False but in_proj_weight is None")
    if one and query.dim() == 3 and query.shape[2] == embed_dim and (free or embed_dim % layer.num_heads == 0):
        return  # nothing is left that could differ
    if query.dim() not in (2, 3):
        raise AssertionError(
            f"query should be unbatched 2D or batched 3D tensor but received {query.dim()}-D query tensor"
        )
    if key.dim() != query.dim() or value.dim() != query.dim():
        kind = "For batched (3-D) `query`" if query.dim() == 3 else "For unbatched (2-D) `query`"
        raise AssertionError(
            f"{kind}, expected `key` and `value` to be {query.dim()}-D"
            f" but found {key.dim()}-D and {value.dim()}-D tensors respectively"
        )
    if query.shape[-1] != embed_dim:
        raise AssertionError(
            f"was expecting embedding dimension of {embed_dim}, but got {query.shape[-1]}; "
            f"query must have embed_dim={embed_dim} features, got shape {tuple(query.shape)}: "
            f"build the layer with embed_dim={query.shape[-1]}, or project query before it."
        )
    if not free and embed_dim % layer.num_heads:
        raise AssertionError(f"embed_dim {embed_dim} not divisible by num_heads {layer.num_heads}")
    if layer._qkv_same_embed_dim:
        if key.shape != value.shape:
            raise AssertionError(f"key shape {key.shape} does not match value shape {value.shape}{APART}")
        if key.shape[-1] != embed_dim:
            raise RuntimeError(
                f"key and value must have embedding dimension {embed_dim}, got {key.shape[-1]}; "
                "pass kdim= and vdim= to the constructor where they differ."
            )
    else:
        if key.shape[:-1] != value.shape[:-1]:
            raise AssertionError(
                f"key's sequence and batch dims {key.shape[:-1]} do not match value's {value.shape[:-1]}{APART}"
            )
        if not layer.has_in_proj:
            return check_batch(layer, query, key)
        for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
            if getattr(layer, name) is None:
                raise AssertionError(f"use_separate_proj_weight is True but {name} is None")
        for name, x, weight in (("key", key, layer.k_proj_weight), ("value", value, layer.v_proj_weight)):
            if weight.shape[1] != x.shape[-1]:
                want = (weight.shape[0], x.shape[-1])
                raise AssertionError(
                    f"expecting {name} weights shape of {want}, but got {weight.shape}; "
                    f"{name} must have {name[0]}dim={weight.shape[1]} features, got shape {tuple(x.shape)}: "
                    f"build the layer with {name[0]}dim={x.shape[-1]}."
                )
    check_batch(layer, query, key)


APART = (
    "; key and value must have one batch and seqlen, and one width unless kdim= and vdim= of the constructor differ: "
    "give one value for each key."
)


def check_dtypes(layer: Layer, inputs: Iterable[Tensor | None], error: RuntimeError) -> None:
    """Say of a projection that failed which input is of another dtype than its weights, if one is.

    Looked at behind the failure, so that a call that works pays nothing for it.
    """
    if type(error) is not RuntimeError or is_autocasting():
        return
    weights = (layer.in_proj_weight,) * 3
    if not layer._qkv_same_embed_dim:
        weights = (layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight)
    for name, x, weight in zip(("query", "key", "value"), inputs, weights):
        if x is not None and isinstance(weight, Tensor) and x.dtype != weight.dtype:
            found, wanted = dtype_name(x.dtype), dtype_name(weight.dtype)
            raise RuntimeError(
                f"{name} must have the dtype of the layer's weights, {wanted}, got {found}: "
                f"{name}.to(torch.{wanted}), or layer.to(torch.{found})."
            ) from error


def check_batch(layer: Layer, query: Tensor, key: Tensor) -> None:
    """Raise where queries and keys are of two batches."""
    batch_axis = 0 if layer.batch_first else 1
    if query.dim() == 3 and query.shape[batch_axis] != key.shape[batch_axis]:
        raise RuntimeError(
            f"query and key must have one batch size, got {query.shape[batch_axis]} and {key.shape[batch_axis]} "
            f"(axis {batch_axis}, batch_first={layer.batch_first})."
        )


def check_masks(
    layer: Layer,
    query: Tensor,
    key: Tensor,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    columns: int,
) -> None:
    """The errors of ``nn.MultiheadAttention`` for dtypes and axes of the masks, and its one warning."""
    batched = query.dim() == 3
    kind = "For batched (3-D) `query`" if batched else "For unbatched (2-D) `query`"
    for mask, name in ((key_padding_mask, "key_padding_mask"), (attn_mask, "attn_mask")):
        if mask is not None and mask.dtype != torch.bool and not mask.is_floating_point():
            raise AssertionError(
                f"only bool and floating types of {name} are supported; {name} must be bool, True = hidden, or added "
                f"to the scores, got {dtype_name(mask.dtype)}: {name}.bool() if what is not 0 hides."
            )
    if key_padding_mask is not None:
        axes = 2 if batched else 1
        if key_padding_mask.dim() != axes:
            raise AssertionError(
                f"{kind}, expected `key_padding_mask` to be `None` or {axes}-D"
                f" but found {key_padding_mask.dim()}-D tensor instead"
                + describe_fit(layer, query, key, key_padding_mask, "key_padding_mask")
            )
        seqlen_k = key.shape[1 if batched and layer.batch_first else 0] + columns
        if batched:
            batch = key.shape[0 if layer.batch_first else 1]
            if key_padding_mask.shape[0] != batch:
                raise AssertionError(
                    f"Expected key_padded_mask.shape[0] to be {batch}, but got {key_padding_mask.shape[0]}"
                    + describe_fit(layer, query, key, key_padding_mask, "key_padding_mask")
                )
        if key_padding_mask.shape[-1] + columns != seqlen_k:
            raise AssertionError(
                f"Expected key_padded_mask.shape[1] to be {seqlen_k}, but got {key_padding_mask.shape[-1] + columns}"
                + describe_fit(layer, query, key, key_padding_mask, "key_padding_mask")
            )
    if attn_mask is not None:
        if attn_mask.dim() not in ((2, 3, 4) if batched else (2, 3)):
            raise AssertionError(
                f"{kind}, expected `attn_mask` to be `None`, 2-D or 3-D but found {attn_mask.dim()}-D tensor instead"
                + describe_fit(layer, query, key, attn_mask, "attn_mask")
            )
        if not batched and attn_mask.dim() == 3:
            want = (layer.num_heads, query.shape[0], key.shape[0])
            if attn_mask.shape != want:
                raise AssertionError(
                    f"Expected `attn_mask` shape to be {want} but got {attn_mask.shape}"
                    + describe_fit(layer, query, key, attn_mask, "attn_mask")
                )
    if key_padding_mask is not None and attn_mask is not None and key_padding_mask.dtype != attn_mask.dtype:
        warnings.warn(
            "Support for mismatched key_padding_mask and attn_mask is deprecated. Use same type for both instead.",
            stacklevel=3,
        )


def sizes_of_call(query: Tensor, key: Tensor, batch_first: bool) -> tuple[int, int, int]:
    """(batch, seqlen_q, seqlen_k) of a call, without a batch of one item."""
    if query.dim() == 2:
        return 1, query.shape[0], key.shape[0]
    items, tokens = (0, 1) if batch_first else (1, 0)
    return query.shape[items], query.shape[tokens], key.shape[tokens]


def check_attn_mask_shape(layer: Layer, query: Tensor, key: Tensor, attn_mask: Tensor) -> None:
    """The errors of ``nn.MultiheadAttention`` for the sizes of ``attn_mask``."""
    batch, seqlen_q, seqlen_k = sizes_of_call(query, key, layer.batch_first)
    axes = attn_mask.dim()
    if axes == 4:
        heads = layer.num_heads if attn_mask.shape[1] != 1 else 1
        items = batch if attn_mask.shape[0] != 1 else 1
        sizes: tuple[int, ...] = (items, heads, seqlen_q, seqlen_k)
    else:
        sizes = (seqlen_q, seqlen_k) if axes == 2 else (batch * layer.num_heads, seqlen_q, seqlen_k)
    if attn_mask.shape != sizes:
        raise RuntimeError(
            f"The shape of the {axes}D attn_mask is {attn_mask.shape}, but should be {sizes}"
            + describe_fit(layer, query, key, attn_mask, "attn_mask")
        )


def describe_fit(layer: Layer, query: Tensor, key: Tensor, mask: Tensor, name: str) -> str:
    """The end of an error about the shape of a mask: what fits, and what this one may have been meant as."""
    batched, shape = query.dim() == 3, tuple(mask.shape)
    other = "attn_mask" if name == "key_padding_mask" else "key_padding_mask"
    fits = fitting_shapes(layer, query, key, layer.batch_first)
    said = " or ".join(f"{axes} = {sizes}" for axes, sizes in fits[name].items())
    hint = ""
    if shape in fits[other].values():
        hint = f": give it as {other}="
    elif batched and shape in fitting_shapes(layer, query, key, not layer.batch_first)[name].values():
        order = "(batch, seqlen, features)" if layer.batch_first else "(seqlen, batch, features)"
        hint = f": batch_first={layer.batch_first} says that query and key are {order}"
    return f". {name} must be {said}, got {shape}{hint}."


def fitting_shapes(
    layer: Layer, query: Tensor, key: Tensor, batch_first: bool
) -> dict[str, dict[str, tuple[int, ...]]]:
    """The shapes that either mask of a call may have, by what their axes are called."""
    batch, seqlen_q, seqlen_k = sizes_of_call(query, key, batch_first)
    heads, one = layer.num_heads, query.dim() == 2
    every: dict[str, tuple[int, ...]] = {"(seqlen_q, seqlen_k)": (seqlen_q, seqlen_k)}
    every[f"({'' if one else 'batch * '}num_heads, seqlen_q, seqlen_k)"] = (batch * heads, seqlen_q, seqlen_k)
    if one:
        return {"key_padding_mask": {"(seqlen_k,)": (seqlen_k,)}, "attn_mask": every}
    every["(batch, num_heads, seqlen_q, seqlen_k)"] = (batch, heads, seqlen_q, seqlen_k)
    return {"key_padding_mask": {"(batch, seqlen_k)": (batch, seqlen_k)}, "attn_mask": every}


def check_float_mask(mask: Tensor, name: str, query: Tensor, need_weights: bool) -> None:
    """A float mask has the dtype of the heads; float32 will do where stock lets it."""
    if mask.dtype == query.dtype or (mask.dtype == torch.float32 and not need_weights):
        return
    dtype = casts_to(query.device)
    if dtype is not None and mask.dtype in (torch.float32, dtype):
        return
    raise RuntimeError(
        f"Expected {name} dtype to be bool or to match query dtype, "
        f"but got {name}.dtype: {mask.dtype} and query.dtype: {query.dtype} instead."
    )


def four_axes(mask: Tensor, name: str, batch: int, heads: int) -> Tensor:
    """A mask as (batch or 1, heads or 1, seqlen_q or 1, seqlen_k)."""
    if name == "key_padding_mask":
        return mask[:, None, None, :] if mask.dim() == 2 else mask[None, None, None, :]
    if mask.dim() == 3:
        return mask.reshape(batch, heads, *mask.shape[1:])
    return mask[None, None] if mask.dim() == 2 else mask


def extra_columns(layer: Layer) -> int:
    """How many keys ``add_bias_kv`` and ``add_zero_attn`` append."""
    learned = layer.bias_k is not None
    if learned != (layer.bias_v is not None):
        given, absent = ("bias_k", "bias_v") if learned else ("bias_v", "bias_k")
        raise AssertionError(f"{given} is set but {absent} is None")
    return learned + bool(layer.add_zero_attn)

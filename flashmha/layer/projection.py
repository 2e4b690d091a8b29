"""Between features and heads: the projections of queries, keys and values, and the one behind attention."""

from __future__ import annotations

import warnings
import weakref
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ..backends.choice.registry import any_backend
from ..backends.rewrites.heads import spares, split
from ..host.torch_state import is_compiling
from .call import change_each_once
from .features import is_quantised
from .options import owns_parts
from .protocol import Layer
from .written import is_as_written


class Sizes(NamedTuple):
    """How many heads a layer has, and how wide they are."""

    heads: int
    heads_kv: int
    head_dim: int
    head_dim_v: int

    @property
    def rows(self) -> tuple[int, int, int]:
        """Features of all heads of queries, keys and values."""
        return self.heads * self.head_dim, self.heads_kv * self.head_dim, self.heads_kv * self.head_dim_v


def sizes_of(layer: Layer) -> Sizes:
    """The heads of a layer."""
    heads = layer.num_heads
    head_dim = layer.free_head_dim or layer.embed_dim // heads
    return Sizes(heads, layer.free_num_kv_heads or heads, head_dim, layer.free_value_head_dim or head_dim)


def project_inputs(
    layer: Layer, query: Tensor, key: Tensor, value: Tensor, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v (batch, seqlen, heads, head_dim) of (batch, seqlen, features), computed in ``dtype``.

    ``None`` for what is ``None``: the query, or key and value.
    """
    packed_weight, bias = parameters(layer, "in_proj_weight", "in_proj_bias")
    if not layer.batch_first:  # as the caller's tensors lie, so that a projection is one operator
        query, key, value = change_each_once(swap_axes, query, key, value)
    whole = layer.free_value_head_dim is None and query is not None and key is not None
    if layer._qkv_same_embed_dim and whole:  # which of the two sets of weights counts is the flag's to say
        weight, bias = cast_weights(packed_weight, bias, dtype)
        if dtype is not None:
            query, key, value = change_each_once(lambda x: x.to(dtype), query, key, value)
        heads = layer.num_heads
        head_dim = layer.free_head_dim or layer.embed_dim // heads
        heads_kv = layer.free_num_kv_heads or heads
        turned = owns_parts(layer) and not (layer.rotary is None and layer.q_norm is None and layer.k_norm is None)
        return by_one_matrix(
            query, key, value, weight, bias, heads, heads_kv, head_dim, layer.batch_first, turned=turned
        )
    sizes = sizes_of(layer)
    made = project_apart(layer, sizes, (query, key, value), packed_weight, bias, dtype)
    widths = ((sizes.heads, sizes.head_dim), (sizes.heads_kv, sizes.head_dim), (sizes.heads_kv, sizes.head_dim_v))
    heads_of = [None if x is None else torch.unflatten(x, -1, width) for x, width in zip(made, widths)]
    return tuple(heads_of) if layer.batch_first else tuple(map(swap_axes, heads_of))  # type: ignore


def project_apart(
    layer: Layer, sizes: Sizes, inputs: Any, packed_weight: Any, bias: Tensor | None, dtype: torch.dtype | None
) -> Any:
    """Features of the heads of queries, keys and values, each by its own matrix; one operator where it can be."""
    query, key, value = inputs
    rows = sizes.rows
    if layer._qkv_same_embed_dim:
        if query is not None and query is key and key is value:
            packed: Any = apply_linear_in(query, packed_weight, bias, dtype)
            return packed.split_with_sizes(rows, -1)
        weights = packed_weight.split_with_sizes(rows)
    else:
        weights = (layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight)
    biases = (None, None, None) if bias is None else bias.split_with_sizes(rows)
    return [None if x is None else apply_linear_in(x, w, b, dtype) for x, w, b in zip(inputs, weights, biases)]


def by_one_matrix(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    heads: int,
    heads_kv: int,
    head_dim: int,
    batch_first: bool,
    together: bool = True,
    turned: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Heads (batch, seqlen, heads, head_dim) of features as the caller's tensors lie, ``batch_first`` or not.

    What is one object is projected by one operator. ``together`` where gradients of neighbouring heads may be written
    side by side, ``turned`` where they come from a norm or a rotation, which does so whatever the backend does.
    """
    outer, inner, _ = query.shape
    q: Tensor
    if query is key and key is value:
        packed = F.linear(query, weight, bias)
        if heads == heads_kv and not packed.is_cuda:  # what ``split`` says, in fewer steps
            parts = packed.view(outer, inner, 3, heads, head_dim).unbind(2)
            if batch_first:
                return parts  # type: ignore[return-value]
            q, k, v = parts
        else:
            q, k, v = split(
                packed, head_dim, [heads, heads_kv, heads_kv], together and may_join_gradients(packed, turned)
            )
    else:
        rows, rows_kv = heads * head_dim, heads_kv * head_dim
        sizes = [rows, 2 * rows_kv] if key is value else [rows, rows_kv, rows_kv]
        weights = weight.split_with_sizes(sizes)
        biases = (None, None, None) if bias is None else bias.split_with_sizes(sizes)
        q = F.linear(query, weights[0], biases[0]).view(outer, inner, heads, head_dim)
        if key is value:
            packed = F.linear(key, weights[1], biases[1])
            k, v = split(
                packed,
                head_dim,
                [heads_kv, heads_kv],
                together and packed.is_cuda and may_join_gradients(packed, turned),
            )
        else:
            outer, inner, _ = key.shape
            k = F.linear(key, weights[1], biases[1]).view(outer, inner, heads_kv, head_dim)
            v = F.linear(value, weights[2], biases[2]).view(outer, inner, heads_kv, head_dim)
    return (q, k, v) if batch_first else (q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1))


def may_join_gradients(packed: Tensor, turned: bool = False) -> bool:
    """Gradients of these heads may come side by side: something that writes them so is here, and it pays."""
    if not spares(packed):
        return False
    if turned and packed.is_cuda:
        return True
    return any_backend(lambda one: one.joins_gradients and one.why_not_here(packed.device) is None)


def swap_axes(x: Any) -> Any:
    """(seqlen, batch, ...) as (batch, seqlen, ...), and back; ``None`` is ``None``."""
    return None if x is None else x.transpose(0, 1)


def merge_heads(layer: Layer, out: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """(batch, seqlen_q, embed_dim) of out (batch, seqlen_q, heads, head_dim)."""
    out_proj = out_proj_of(layer)
    if layer.call_out_proj:
        try:
            projected: Tensor = out_proj(out.flatten(2))
        except NotImplementedError as error:
            if not is_quantised(out_proj):
                raise
            raise TypeError(
                f"out_proj must take the heads as they are, got {type(out_proj).__name__}, which takes quantised ones. "
                f"{QUANTISE}, or quantise out_proj dynamically."
            ) from error
        return projected
    if (
        type(out_proj) not in LINEARS
        or out_proj._forward_hooks
        or out_proj._forward_pre_hooks
        or "forward" in out_proj.__dict__
    ):
        warn_unheard(layer)
    weight, bias = parameters(out_proj, "weight", "bias")
    if not isinstance(weight, Tensor):
        raise TypeError(
            f"out_proj must have a tensor as its weight, got {type(weight).__name__} in {type(out_proj).__name__}. "
            f"{QUANTISE}, or set call_out_proj=True, which calls out_proj as it is."
        )
    if layer.batch_first:
        return apply_linear_in(out.flatten(2), weight, bias, dtype)
    # the layout of the output, so that neither it nor its gradient is copied once more
    turned: Tensor = swap_axes(apply_linear_in(swap_axes(out).contiguous().flatten(2), weight, bias, dtype))
    return turned


QUANTISE = "Quantise the stock layer: flashmha.restore_mha(model) comes before prepare and convert"


def why_unheard(layer: Layer) -> str | None:
    """Say what stands at ``out_proj`` and never runs, since its weight and bias are read; ``None`` for nothing."""
    out_proj: Any = layer.out_proj
    if layer.call_out_proj or not isinstance(out_proj, nn.Module):
        return None
    if getattr(out_proj, "merged", False):  # an adapter that counts by its weight, as PEFT's does
        return None
    kind = type(out_proj)
    if kind.forward is not nn.Linear.forward or "forward" in vars(out_proj):
        what = f"the forward of out_proj ({kind.__name__}) never runs"
    elif out_proj._forward_hooks or out_proj._forward_pre_hooks:
        what = "hooks on out_proj never run"
    else:
        return None
    return f"{what}, as in nn.MultiheadAttention, which reads its weight and bias; call_out_proj=True calls it"


warned: weakref.WeakSet[Layer] = weakref.WeakSet()
"""Layers that ``warn_unheard`` spoke of."""


def warn_unheard(layer: Layer) -> None:
    """Say at a layer's first forward that something at its ``out_proj`` does not run."""
    if is_compiling() or layer in warned:
        return
    why = why_unheard(layer)
    if why is not None:
        warned.add(layer)
        warnings.warn(f"{type(layer).__name__}: {why}.", stacklevel=2)


LINEARS: tuple[type, ...] = (NonDynamicallyQuantizableLinear, nn.Linear)
"""PyTorch's classes of ``out_proj``."""

PARAMETRIC = (*LINEARS, nn.LayerNorm)
"""Classes that define nothing under the names of their parameters."""


def parameters(module: Any, weight: str, bias: str) -> tuple[Any, Any]:
    """``getattr`` of two parameters, without the exceptions raised and caught on the way to those of ``nn.Module``.

    A subclass may have a property there, a module whose weights were replaced holds them elsewhere, and anything with
    a weight and a bias may stand for a module.
    """
    if type(module) in PARAMETRIC or is_as_written(type(module)):
        held, own = module._parameters, module.__dict__
        if weight in held and bias in held and weight not in own and bias not in own:
            return held[weight], held[bias]
    return getattr(module, weight), getattr(module, bias)


def out_proj_of(layer: Layer) -> Any:
    """``layer.out_proj``, without the exception raised and caught on the way to it: .6 us of a call."""
    modules = layer._modules
    if is_as_written(type(layer)) and "out_proj" in modules and "out_proj" not in layer.__dict__:
        return modules["out_proj"]
    return layer.out_proj


def apply_linear_in(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype | None = None) -> Tensor:
    """``F.linear`` in ``dtype``."""
    weight, bias = cast_weights(weight, bias, dtype)
    return F.linear(x if dtype is None else x.to(dtype), weight, bias)


def cast_weights(weight: Tensor, bias: Tensor | None, dtype: torch.dtype | None) -> tuple[Tensor, Tensor | None]:
    """Weight and bias in ``dtype``; a bias of another dtype joins in the weight's, as it does in the stock module."""
    weight = weight if dtype is None else weight.to(dtype)
    return weight, bias if bias is None or bias.dtype == weight.dtype else bias.to(weight.dtype)


def settle_parameters(layer: Any, bias: bool, device: Any, dtype: torch.dtype | None) -> None:
    """Give a new layer projections of the sizes of its heads, drawn as the stock class draws its own; or none."""
    sizes = sizes_of(layer)
    rows_q, rows_k, rows_v = sizes.rows
    if (rows_q, rows_k, rows_v) != (layer.embed_dim,) * 3:

        def resized(parameter: Tensor | None, *shape: int) -> nn.Parameter | None:
            return None if parameter is None else nn.Parameter(parameter.new_empty(*shape))

        embed_dim = layer.embed_dim
        layer.in_proj_weight = resized(layer.in_proj_weight, rows_q + rows_k + rows_v, embed_dim)
        layer.in_proj_bias = resized(layer.in_proj_bias, rows_q + rows_k + rows_v)
        layer.q_proj_weight = resized(layer.q_proj_weight, rows_q, embed_dim)
        layer.k_proj_weight = resized(layer.k_proj_weight, rows_k, layer.kdim)
        layer.v_proj_weight = resized(layer.v_proj_weight, rows_v, layer.vdim)
        layer.bias_k = resized(layer.bias_k, 1, 1, rows_k)
        layer.bias_v = resized(layer.bias_v, 1, 1, rows_v)
        if sizes.heads * sizes.head_dim_v != embed_dim:
            width = sizes.heads * sizes.head_dim_v
            layer.out_proj = NonDynamicallyQuantizableLinear(width, embed_dim, bias=bias, device=device, dtype=dtype)
        layer._reset_parameters()
    if not layer.has_in_proj:
        for name in ("in_proj_weight", "in_proj_bias", "q_proj_weight", "k_proj_weight", "v_proj_weight"):
            setattr(layer, name, None)
    if not layer.has_out_proj:
        layer.out_proj = None

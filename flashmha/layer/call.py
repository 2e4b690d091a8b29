"""What a call of ``nn.MultiheadAttention`` means: its arguments read and checked, once.

``True`` in a mask of ``nn.MultiheadAttention`` *hides*; in everything behind this file it *may attend*. The errors
begin with the stock module's own text, since programs match on it, and go on where that names no fix.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..host.torch_state import readable
from ..problem.bias_values import add_biases
from ..problem.masks import Dense, Mask, join_masks
from ..problem.ragged import KeyPadding, Padding, mark_private
from ..problem.windows import causal
from .arguments import Arguments
from .checks import check_attn_mask_shape, check_float_mask, check_inputs, check_masks, extra_columns, four_axes
from .protocol import Layer


class Reading(NamedTuple):
    """One call: inputs (batch, seqlen, features), one object where the caller passed one, and the masks.

    ``bias`` broadcasts to (batch, heads, seqlen_q, seqlen_k). ``mask`` and ``bias`` know nothing of the ``columns``
    that ``add_bias_kv`` and ``add_zero_attn`` append. ``padding`` is that of the call, which is a part of ``mask``.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Mask | None
    bias: Tensor | None
    batched: bool
    columns: int
    padding: Padding | None

    @property
    def valid(self) -> Tensor:
        """Which tokens are real, (batch, seqlen_k), where there is padding."""
        assert self.padding is not None
        return self.padding.real(self.key.shape[1])


def read_call(layer: Layer, given: Arguments) -> Reading:
    """Read and check one call. A flashmha mask is taken as it is, whatever the hint says.

    Raises:
        AssertionError, RuntimeError: what the stock module raises for the same input.
    """
    query, key, value, key_padding_mask, need_weights, attn_mask, _, is_causal, *_ = given
    columns = extra_columns(layer)
    check_inputs(layer, query, key, value)
    mask: Mask | None = None
    bias: Tensor | None = None
    if isinstance(attn_mask, Mask):
        mask, attn_mask, is_causal = own_copy(attn_mask) if need_weights else attn_mask, None, False
    pads = mask is not None and any(isinstance(part, Padding) for part in mask.parts)
    pads_keys = key_padding_mask is not None
    rule: Padding | None = None
    if isinstance(key_padding_mask, Padding):
        rule, key_padding_mask = key_padding_mask.own() if need_weights else key_padding_mask, None
    if key_padding_mask is not None or attn_mask is not None or is_causal:
        check_masks(layer, query, key, key_padding_mask, attn_mask, columns)
        if is_causal and attn_mask is None and not layer.trust_is_causal:
            raise RuntimeError(
                "Need attn_mask if specifying the is_causal hint. You may use the Transformer module method "
                "`generate_square_subsequent_mask` to create this mask."
            )
        # stock reads no mask beside the hint, unless it has another reason to
        if is_causal and (layer.trust_is_causal or not (need_weights or pads_keys)):
            attn_mask, mask = None, causal(align="top_left")
        if attn_mask is not None:
            check_attn_mask_shape(layer, query, key, attn_mask)
    batched = query.dim() == 3
    if not (batched and layer.batch_first):
        query, key, value = lay_batch_first(query, key, value, batched)
    if key_padding_mask is None and attn_mask is None:
        mask = rule if mask is None else join_masks(mask, rule)
        return Reading(query, key, value, mask, bias, batched, columns, None if pads else rule)
    if key_padding_mask is not None and hides_or_nothing(key_padding_mask):
        check_float_mask(key_padding_mask, "key_padding_mask", query, need_weights)
        key_padding_mask = key_padding_mask != 0
    if attn_mask is not None and is_causal_mask(attn_mask):
        if attn_mask.is_floating_point():
            check_float_mask(attn_mask, "attn_mask", query, need_weights)
        attn_mask, mask = None, causal(align="top_left")
    padding = rule
    for one, name in ((key_padding_mask, "key_padding_mask"), (attn_mask, "attn_mask")):
        if one is None:
            continue
        if one.is_floating_point():
            check_float_mask(one, name, query, need_weights)
            added = four_axes(one, name, query.shape[0], layer.num_heads)
            bias = added if bias is None else add_biases(bias, added)
        elif name == "key_padding_mask":
            padding = mark_private(KeyPadding(~one if one.dim() == 2 else ~one[None]))
            mask = join_masks(mask, padding)
        else:
            mask = join_masks(mask, Dense(~four_axes(one, name, query.shape[0], layer.num_heads)))
    # padding of a rule's own is no padding of the call's: its queries are as real as any
    return Reading(query, key, value, join_masks(mask, rule), bias, batched, columns, None if pads else padding)


def own_copy(mask: Mask) -> Mask | None:
    """The same mask over tensors of its own: the weights may be made of them after the caller's have changed."""

    def copied(part: Mask) -> Mask:
        if isinstance(part, Padding):
            return part.own()
        tensors, again = part.flatten()
        return again([tensor.clone() for tensor in tensors]) if tensors else part

    return join_masks(*map(copied, mask.parts))


def lay_batch_first(query: Tensor, key: Tensor, value: Tensor, batched: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs (seqlen, batch, features) or without a batch as (batch, seqlen, features), one object where they were."""

    def turned(x: Tensor) -> Tensor:
        return x.transpose(0, 1) if batched else x.unsqueeze(0)

    return change_each_once(turned, query, key, value)


def change_each_once(
    change: Callable[[Tensor], Tensor], query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value changed, one object where they were one; ``None`` stays."""
    k = None if key is None else change(key)
    q = k if query is key else None if query is None else change(query)
    return q, k, k if key is value else None if value is None else change(value)  # type: ignore[return-value]


def hides_or_nothing(mask: Tensor) -> bool:
    """A float mask that only hides: 0 and ``-inf``, and no gradient. Looked at on a CPU alone."""
    if not mask.is_floating_point() or not readable(mask) or mask.requires_grad:
        return False
    return hides_alone(mask)


def hides_alone(mask: Tensor) -> bool:
    """A float mask holds 0 and ``-inf`` and nothing else."""
    return bool(((mask == 0.0) | (mask == float("-inf"))).all())


def is_causal_mask(mask: Tensor) -> bool:
    """A mask (seqlen_q, seqlen_k) that hides exactly the future, aligned to the first key.

    Its values are read at every call, on a CPU alone, where reading waits for nothing. The far corner tells most
    large masks that are not causal.
    """
    if mask.dim() != 2 or not readable(mask) or mask.requires_grad or not mask.numel():
        return False
    hidden = True if mask.dtype == torch.bool else float("-inf")
    if mask.numel() > CORNER and mask.shape[1] > 1 and mask[0, -1].item() != hidden:
        return False
    return hides_the_future(mask)


def hides_the_future(mask: Tensor) -> bool:
    """The values of a mask (seqlen_q, seqlen_k) hide exactly the future; TorchScript compiles this."""
    future = torch.ones(mask.shape[0], mask.shape[1], dtype=torch.bool, device=mask.device).triu_(1)
    if mask.dtype == torch.bool:
        return torch.equal(mask, future)
    return torch.equal(mask, torch.zeros_like(mask).masked_fill_(future, float("-inf")))


CORNER = 2**14
"""Entries from which reading one first is cheaper than comparing all."""

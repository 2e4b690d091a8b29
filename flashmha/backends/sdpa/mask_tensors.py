"""Masks and biases as the one tensor that SDPA takes."""

from __future__ import annotations

import torch
from torch import Tensor

from ...host.torch_state import eager, readable
from ...problem.bias_values import narrow_bias
from ...problem.ragged import Padding
from ...problem.spec import AttentionSpec
from ..limits import HALF


def dense_mask(spec: AttentionSpec) -> Tensor | None:
    """Mask and bias as the one tensor SDPA takes."""
    table = mask_and_bias(spec)
    if table is not None and spec.device.type != "cpu" and table.shape[-1] != spec.seqlen_k:
        # the efficient kernel wants the keys side by side, and raises where they are one number
        table = table.expand(*table.shape[:-1], spec.seqlen_k).contiguous()
    return table


def mask_and_bias(spec: AttentionSpec) -> Tensor | None:
    """Mask and bias in one, in the dtype that SDPA takes; an axis on which neither depends may have size 1."""
    if spec.bias is None and isinstance(spec.mask, Padding) and all(map(eager, spec.mask.tensors())):
        return spec.mask.once(("added", spec.seqlen_k, spec.dtype), lambda: padding_as_bias(spec))
    mask, bias = spec.allowed(), spec.added()
    if bias is None:
        return mask
    table = bias if mask is None else torch.where(mask, bias, float("-inf"))
    if spec.device.type == "cpu":  # a mask of float32 is used as it is there, and misread on a GPU
        return narrow_bias(table, torch.float32 if spec.dtype in HALF and table.dtype != spec.dtype else spec.dtype)
    # always level there: a kernel multiplies by log2(e), which makes -inf of float32's lowest number
    return narrow_bias(table, spec.dtype, level=True)


def as_numbers(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as numbers to add: 0, and -inf where it hides."""
    return torch.zeros_like(allowed, dtype=dtype).masked_fill_(~allowed, float("-inf"))


def padding_as_bias(spec: AttentionSpec) -> Tensor:
    """Padding as the numbers that SDPA would make of it in each call, in rows that its kernels need not copy."""
    valid = spec.valid_keys()
    assert valid is not None
    whole = -(-spec.seqlen_k // MASK_ROW_MULTIPLE) * MASK_ROW_MULTIPLE
    table = torch.zeros(spec.batch, 1, 1, whole, dtype=spec.dtype, device=spec.device)[..., : spec.seqlen_k]
    return table.masked_fill_(~valid[:, None, None, :], float("-inf"))


MASK_ROW_MULTIPLE = 16
"""A row of a mask that is no multiple long is copied in each call (``pad_bias`` in aten's attention.cpp)."""


COARSE = 1000.0
"""A log-sum-exp further from 0 makes the weights of a backward, which is in float32, err by more than 3e-5."""


def coarse(mask: Tensor | None, spec: AttentionSpec) -> bool:
    """On a CPU a backward from the log-sum-exp of a row may be off: by a factor of its keys, beside nothing but -1e9.

    Looked at where that is possible. On a GPU ``dense_mask`` levels the rows.
    """
    if mask is None or spec.bias is None or not spec.needs_grad:
        return False
    if not mask.numel() or not readable(mask):
        return True
    largest = mask.detach().amax(dim=-1)
    return bool(((largest.abs() > COARSE) & largest.isfinite()).any())

"""The numbers of a bias: added, put into a narrower dtype, moved row by row."""

from __future__ import annotations

import torch
from torch import Tensor


def add_biases(one: Tensor, two: Tensor) -> Tensor:
    """Two biases added, in float32 at least; what neither hides stays finite, as the lowest number twice would not."""
    dtype = torch.promote_types(torch.promote_types(one.dtype, two.dtype), torch.float32)
    total = one.to(dtype) + two
    hidden = (one == float("-inf")) | (two == float("-inf"))
    return torch.where(hidden, float("-inf"), total.clamp(min=torch.finfo(dtype).min))


def narrow_bias(bias: Tensor, dtype: torch.dtype, *, level: bool = False) -> Tensor:
    """A bias in the dtype that a kernel takes, which hides what it hid and no more; ``level``: see ``level_bias``."""
    moved = level_bias(bias.to(torch.promote_types(bias.dtype, dtype)))[0] if level else bias
    if torch.promote_types(moved.dtype, dtype) == dtype:
        return moved.to(dtype)
    moved, limits = moved.to(torch.promote_types(moved.dtype, torch.float32)), torch.finfo(dtype)
    return moved.clamp(limits.min, limits.max).masked_fill(bias == float("-inf"), float("-inf")).to(dtype)


def level_bias(bias: Tensor) -> tuple[Tensor, Tensor]:
    """A bias, in float32 at least, each of whose rows was moved so that its largest number is 0; and what that was.

    A softmax does not notice. The numbers that matter are then those that a narrow dtype holds best, and the
    log-sum-exp that a kernel's backward starts from is small: float32 has no room for a logarithm beside -1e9.
    """
    bias = bias.to(torch.promote_types(bias.dtype, torch.float32))
    if not bias.shape[-1]:
        return bias, bias.new_zeros(*bias.shape[:-1], 1)
    largest = bias.detach().amax(dim=-1, keepdim=True)
    largest = largest.masked_fill(largest == float("-inf"), 0.0)
    return add_biases(bias, -largest), largest

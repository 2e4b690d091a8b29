"""The memory that keys, values and lengths lie in."""

from __future__ import annotations

import torch
from torch import Tensor

from ..host.torch_state import keep_address


def allocate(
    rows: int, seqlen: int, heads: int, head_dim: int, device: torch.device | str | None, dtype: torch.dtype | None
) -> Tensor:
    """Zeros (rows, seqlen, heads, head_dim), as kernels want them: on a CPU the tokens of a head are neighbours.

    There one query over 4,096 keys takes half the time that way. Zeros, since a hidden slot is multiplied by 0, which
    turns no NaN into 0.
    """
    with torch.inference_mode(False):  # a cache that is made inside may be written to outside
        made = torch.zeros(rows, heads, seqlen, head_dim, device=device, dtype=dtype)
    if made.device.type == "cpu":
        return keep_address(made.transpose(1, 2))
    return keep_address(made.view(rows, seqlen, heads, head_dim))


def no_tokens(batch: int, device: torch.device | str | None) -> Tensor:
    """Lengths of empty rows."""
    with torch.inference_mode(False):
        return keep_address(torch.zeros(batch, dtype=torch.int32, device=device))

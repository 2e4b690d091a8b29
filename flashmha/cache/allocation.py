"""The memory that keys, values and lengths lie in."""

from __future__ import annotations

import torch
from torch import Tensor

from ..host.torch_state import keep_address
from ..problem.sizes import check_sizes


def allocate(
    rows: int,
    seqlen: int,
    heads_kv: int,
    head_dim: int,
    head_dim_v: int | None,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    """Zeros for keys and values (rows, seqlen, heads_kv, head_dim), as kernels want them.

    On a CPU the tokens of a head are neighbours: one query over 4,096 keys takes half the time that way. Zeros, since a
    hidden slot is multiplied by 0, which turns no NaN into 0.
    """
    head_dim_v = head_dim if head_dim_v is None else head_dim_v
    check_sizes(heads_kv=heads_kv, head_dim=head_dim, head_dim_v=head_dim_v)

    def zeros(size: int) -> Tensor:
        with torch.inference_mode(False):  # a cache that is made inside may be written to outside
            made = torch.zeros(rows, heads_kv, seqlen, size, device=device, dtype=dtype)
        on_cpu = made.device.type == "cpu"
        return keep_address(made.transpose(1, 2) if on_cpu else made.view(rows, seqlen, heads_kv, size))

    return zeros(head_dim), zeros(head_dim_v)


def no_tokens(batch: int, device: torch.device | str | None) -> Tensor:
    """Lengths of empty rows."""
    with torch.inference_mode(False):
        return keep_address(torch.zeros(batch, dtype=torch.int32, device=device))

"""Tokens put behind those of each row by one launch, where lengths lie on a GPU."""

from __future__ import annotations

import functools

from torch import Tensor

from ..host.kernels import lined_up, power_of_two, use_device
from ..host.launcher import Launcher

AT_ONCE = 2048
"""Numbers that a program copies at a time."""


def append_on_device(k: Tensor, v: Tensor, stores: tuple[Tensor, Tensor], lengths: Tensor, ends: Tensor) -> None:
    """Write the keys and values of a step behind those of each row; ``lengths`` stay as they are.

    Args:
        k, v: (batch, seqlen, heads_kv, head_dim).
        stores: (batch, capacity, heads_kv, head_dim) each, with neighbouring features.
        ends: (batch,) the lengths behind the step, which are written as well.
    """
    (batch, seqlen, heads, head_dim), head_dim_v = k.shape, v.shape[3]
    k, v = lined_up(k), lined_up(v)
    k_store, v_store = stores
    constants = make_constants(heads, head_dim, head_dim_v)
    with use_device(k.device):
        append_launcher()(
            (k.device.index, k.dtype, lengths.dtype, ends.dtype, constants["HEADS"], head_dim, head_dim_v),
            (batch * seqlen, 1, 1),
            (k, v, k_store, v_store, lengths, ends),
            (*k.stride()[:3], *v.stride()[:3], *k_store.stride()[:3], *v_store.stride()[:3]),
            (heads, seqlen, k_store.shape[1]),
            constants,
            {"num_warps": 4},
        )


@functools.lru_cache(maxsize=256)
def make_constants(heads: int, head_dim: int, head_dim_v: int) -> dict[str, int]:
    """How many heads a program copies at a time, and how wide."""
    dims, dims_v = power_of_two(head_dim), power_of_two(head_dim_v)
    at_once = min(power_of_two(heads), max(1, AT_ONCE // max(dims, dims_v)))
    return {"HEADS": at_once, "HEAD_DIM": head_dim, "HEAD_DIM_V": head_dim_v, "DIMS": dims, "DIMS_V": dims_v}


@functools.cache
def append_launcher() -> Launcher:
    """The kernel's, which imports triton."""
    from .append_kernel import append_kernel

    return Launcher(append_kernel)

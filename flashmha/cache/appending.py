"""Tokens put behind those of each row by one launch, where lengths lie on a GPU."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..host.kernels import lined_up, power_of_two, use_device
from ..host.launcher import Launch, Launcher
from .static import StaticCache

AT_ONCE = 2048
"""Numbers that a program copies at a time."""


class Appending:
    """Launches that put as many tokens behind those of each row, one for each of several caches that are alike.

    Attributes:
        ends: (batch,) the lengths behind the last launch, which writes them; those of its cache stay as they are.
    """

    def __init__(self, cache: StaticCache, seqlen: int) -> None:
        lengths, (batch, capacity, heads, head_dim), head_dim_v = cache.lengths, cache.k.shape, cache.v.shape[3]
        self.ends = torch.empty_like(lengths)
        constants = make_constants(heads, head_dim, head_dim_v)
        kind = (lengths.device.index, cache.k.dtype, lengths.dtype, constants["HEADS"], head_dim, head_dim_v)
        sizes, options = (heads, seqlen, capacity), {"num_warps": 4}
        self.launch = Launch(append_launcher(), kind, (batch * seqlen, 1, 1), sizes, constants, options)

    def __call__(self, k: Tensor, v: Tensor, cache: StaticCache) -> None:
        """Write keys and values (batch, seqlen, heads_kv, head_dim)."""
        k, v, (k_store, v_store) = lined_up(k), lined_up(v), cache.store
        steps = (*k.stride()[:3], *v.stride()[:3], *k_store.stride()[:3], *v_store.stride()[:3])
        with use_device(k.device):
            self.launch((k, v, k_store, v_store, cache.lengths, self.ends), steps)


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

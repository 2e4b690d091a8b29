"""Checks of tensors: shapes, dtypes, devices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

from ..host.torch_state import is_dense, readable


def check_tensors(q: Tensor, k: Tensor, v: Tensor, page_size: int | None = None) -> None:
    """Raise ``ValueError`` where q, k and v do not make one problem; with a ``page_size`` k and v are pools."""
    alike = q.dtype == k.dtype == v.dtype and q.device == k.device == v.device
    if not (q.dim() == k.dim() == v.dim() == 4 and alike):
        refuse_tensors(q, k, v)
    if not q.dtype.is_floating_point:
        raise ValueError(f"q, k and v must be floating point, got {q.dtype}.")
    batch, _, _, head_dim = q.shape
    batch_k, seqlen_k, heads_kv, head_dim_k = k.shape
    batch_v, seqlen_v, heads_v, _ = v.shape
    agree = head_dim == head_dim_k and seqlen_k == seqlen_v and heads_kv == heads_v
    if page_size is not None:
        if not agree or batch_k != batch_v or seqlen_k != page_size:
            refuse_pools(q, k, v, page_size)
    elif not agree or not batch == batch_k == batch_v:
        raise ValueError(
            "q, k and v must agree in batch, q and k in head_dim, k and v in seqlen and heads, "
            f"got {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}."
        )


def refuse_tensors(q: Tensor, k: Tensor, v: Tensor) -> NoReturn:
    """Say which of q, k and v is not like the others."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != 4:
            raise ValueError(f"{name} must be 4-D (batch, seqlen, heads, head_dim), got shape {tuple(tensor.shape)}.")
    name, other = ("k", k) if (k.dtype, k.device) != (q.dtype, q.device) else ("v", v)
    raise ValueError(
        "q, k and v must have one dtype and device, "
        f"got {q.dtype} on {q.device} for q and {other.dtype} on {other.device} for {name}."
    )


def refuse_pools(q: Tensor, k: Tensor, v: Tensor, page_size: int) -> NoReturn:
    """Say what k and v are beside ``Pages``."""
    raise ValueError(
        f"k and v must be pools (pages, page_size={page_size}, heads_kv, head_dim) beside Pages, alike in pages and "
        f"heads, with the head_dim={q.shape[3]} of q in k, got {tuple(k.shape)} and {tuple(v.shape)}."
    )


def check_entries(block_table: Tensor, pages: int) -> None:
    """Raise ``ValueError`` where a table names pages that a pool lacks, where looking waits for nothing."""
    if readable(block_table) and not bool(((block_table >= 0) & (block_table < pages)).all()):
        raise ValueError(f"block_table must name pages between 0 and {pages - 1}, got {block_table.tolist()}.")


def refuse_device(name: str, holder: object, tensors: Sequence[Tensor], device: torch.device) -> NoReturn:
    """Say where a mask or a bias is, which is not where q is."""
    raise ValueError(f"{name} must be on the device of q, {device}, got {tensors[0].device}: {holder!r}.")


def is_vector_of_integers(thing: object) -> bool:
    """Whether a thing is a dense tensor of one axis, int32 or int64."""
    return (
        isinstance(thing, Tensor) and is_dense(thing) and thing.dtype in (torch.int32, torch.int64) and thing.dim() == 1
    )


def is_table_of_pages(thing: object) -> bool:
    """Whether a thing is a dense int32 tensor (batch, pages)."""
    return isinstance(thing, Tensor) and is_dense(thing) and thing.dtype == torch.int32 and thing.dim() == 2

"""Checks of tensors: shapes, dtypes, devices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

from ..host.torch_state import is_dense


def check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise ``ValueError`` where q, k and v do not make one problem."""
    alike = q.dtype == k.dtype == v.dtype and q.device == k.device == v.device
    if not (q.dim() == k.dim() == v.dim() == 4 and alike):
        refuse_tensors(q, k, v)
    if not q.dtype.is_floating_point:
        raise ValueError(f"q, k and v must be floating point, got {q.dtype}.")
    batch, _, _, head_dim = q.shape
    batch_k, seqlen_k, heads_kv, head_dim_k = k.shape
    batch_v, seqlen_v, heads_v, _ = v.shape
    agree = batch == batch_k == batch_v and head_dim == head_dim_k and seqlen_k == seqlen_v and heads_kv == heads_v
    if not agree:
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


def refuse_device(name: str, holder: object, tensors: Sequence[Tensor], device: torch.device) -> NoReturn:
    """Say where a mask or a bias is, which is not where q is."""
    raise ValueError(f"{name} must be on the device of q, {device}, got {tensors[0].device}: {holder!r}.")


def is_vector_of_integers(thing: object) -> bool:
    """Whether a thing is a dense tensor of one axis, int32 or int64."""
    return (
        isinstance(thing, Tensor) and is_dense(thing) and thing.dtype in (torch.int32, torch.int64) and thing.dim() == 1
    )

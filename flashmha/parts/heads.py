"""What happens to q and k between their projection and ``process_heads``: norms first, then the rotation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..host.kernels import why_no_kernels
from ..host.torch_state import eager, is_dual, is_inside_transform
from . import fused_heads
from .norms import KnownNorm, call_norm, know
from .rotation import Rotation

Norms = tuple[nn.Module | None, nn.Module | None]
"""Of q and of k."""


def prepare_heads(
    q: Tensor | None,
    k: Tensor | None,
    *,
    q_norm: nn.Module | None = None,
    k_norm: nn.Module | None = None,
    rotary: nn.Module | None = None,
    positions_q: Tensor | None = None,
    positions_k: Tensor | None = None,
    length: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """q and k (batch, seqlen, heads, head_dim), normalised and turned.

    Args:
        q_norm, k_norm: modules over head_dim.
        rotary: a ``Rotary``, or another module that turns q and k; it is called, so that its hooks run.
        positions_q, positions_k, length: as ``Rotary`` takes them.
    """
    if rotary is None:
        return prepare(q, k, (q_norm, k_norm), None)
    options: dict[str, Any] = {} if length is None else {"length": length}
    if getattr(rotary, "takes_norms", False):
        options["norms"] = q_norm, k_norm
    else:
        q, k = prepare(q, k, (q_norm, k_norm), None)
    made: tuple[Tensor | None, Tensor | None] = rotary(q, k, positions_q, positions_k, **options)
    return made


def prepare(
    q: Tensor | None, k: Tensor | None, norms: Norms, rotation: Rotation | None
) -> tuple[Tensor | None, Tensor | None]:
    """The same, given what turns the heads."""
    q_norm, k_norm = norms
    if rotation is None and q_norm is None and k_norm is None:
        return q, k
    if are_fused(q, k):
        device = (q if k is None else k).device  # type: ignore[union-attr]
        known = [name(q_norm, q, device), name(k_norm, k, device)]
        # a norm that must be called comes first, and the rotation alone is left to the kernel
        if known[0] is CALLED:
            q, known[0] = call_norm(q_norm, q), None
        if known[1] is CALLED:
            k, known[1] = call_norm(k_norm, k), None
        return fused_heads.prepare(q, k, known[0], known[1], rotation)
    q, k = call_norm(q_norm, q), call_norm(k_norm, k)
    return (q, k) if rotation is None else rotation.apply(q, k)


CALLED = KnownNorm(False, None, None, 0.0)
"""Stands for a norm that no kernel knows."""


def name(norm: nn.Module | None, x: Tensor | None, device: torch.device) -> KnownNorm | None:
    """A norm as a kernel takes it; ``CALLED`` where none does."""
    if norm is None or x is None:
        return None
    return know(norm, x.shape[-1], device) or CALLED


def are_fused(q: Tensor | None, k: Tensor | None) -> bool:
    """A kernel prepares these heads, of which one may not be there."""
    first, second = (k, q) if q is None else (q, k)
    # first, since a compiler cannot trace what comes next
    if first is None or not eager(first) or is_dual() or is_inside_transform():
        return False
    if why_no_kernels(first.device.type, first.device.index) is not None or fused_heads.why_not(first) is not None:
        return False
    return second is None or (eager(second) and fused_heads.why_not(second) is None)

"""Windows and log-sum-exps as flash-attn's kernels are told them and give them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...problem.spec import AttentionSpec


def trimmed(k: Tensor, v: Tensor, spec: AttentionSpec) -> tuple[Tensor, Tensor, int | None, int | None]:
    """Keys, values and the window (left, right) with ``right`` at least 0, ``None`` where unbounded.

    Keys that lie after the window of every query are cut off, which moves the alignment to the keys that are left.
    """
    window = spec.window
    if window is None:
        return k, v, None, None
    left, right, seqlen_k = window.left, window.right, spec.seqlen_k
    if right is not None and right < 0:
        k, v = k[:, :right], v[:, :right]
        left = None if left is None else left + right
        seqlen_k, right = seqlen_k + right, 0
    if spec.documents is None:
        if left is not None and left >= seqlen_k - 1:
            left = None
        if right is not None and right >= spec.seqlen_q - 1 and right > 0:
            right = None
    return k, v, left, right


def window_options(left: int | None, right: int | None) -> dict[str, Any]:
    """A window as flash-attn 2 and 3 are told it: ``-1`` is unbounded, and causality is a flag of its own."""
    if left is None and right == 0:
        return {"causal": True, "window_size": (-1, -1)}
    return {"causal": False, "window_size": (-1 if left is None else left, -1 if right is None else right)}


def normal_lse(lse: Tensor, sinks: Tensor | None = None) -> Tensor:
    """The log-sum-exp of a row that saw nothing as ``-inf``, where flash-attn 2 says ``+inf``; its sink beside sinks.

    There a row is ``+inf`` too whose scores lie so far below its sink that a kernel's exponential of the difference
    overflows. The sink is its log-sum-exp then, and gets all of its gradient.
    """
    if sinks is None:
        return lse.masked_fill(lse == float("inf"), float("-inf"))
    return torch.where(lse.isinf(), sinks.to(lse.dtype)[:, None], lse)

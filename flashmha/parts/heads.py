"""What happens to heads before ``process_heads``: norms first, then rotary."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def prepare_heads(
    q: Tensor | None,
    k: Tensor | None,
    *,
    q_norm: nn.Module | None,
    k_norm: nn.Module | None,
    rotary: Any,
    positions_q: Tensor | None,
    positions_k: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """q (batch, seqlen_q, heads, head_dim) and k (batch, seqlen_k, heads_kv, head_dim) normed and turned.

    Either may be ``None``. Positions are (batch or 1, seqlen) integers, or ``None``: see ``Rotary``.
    """
    q, k = apply_norm(q_norm, q), apply_norm(k_norm, k)
    if rotary is None:
        return q, k
    made: tuple[Tensor | None, Tensor | None] = rotary(q, k, positions_q, positions_k)
    return made


def apply_norm(norm: nn.Module | None, x: Tensor | None) -> Tensor | None:
    """Heads normed, in their own dtype."""
    if norm is None or x is None:
        return x
    normed: Tensor = norm(x)
    return normed.to(x.dtype)

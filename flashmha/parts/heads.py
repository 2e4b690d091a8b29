"""What happens to q and k between their projection and ``process_heads``: norms first, then the rotation."""

from __future__ import annotations

from torch import Tensor, nn

from .norms import normalize
from .rotary import Rotary


def prepare_heads(
    q: Tensor | None,
    k: Tensor | None,
    *,
    q_norm: nn.Module | None = None,
    k_norm: nn.Module | None = None,
    rotary: Rotary | None = None,
    positions_q: Tensor | None = None,
    positions_k: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """q and k (batch, seqlen, heads, head_dim), normalised and turned.

    Args:
        q_norm, k_norm: modules over head_dim.
        rotary: turns q and k.
        positions_q, positions_k: as ``Rotary`` takes them.
    """
    if rotary is not None:
        made: tuple[Tensor | None, Tensor | None] = rotary(q, k, positions_q, positions_k, norms=(q_norm, k_norm))
        return made
    return normalize(q_norm, q), normalize(k_norm, k)

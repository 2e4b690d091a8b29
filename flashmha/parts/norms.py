"""The norms of heads: modules over head_dim."""

from __future__ import annotations

from torch import Tensor, nn

from ..problem.wording import spell


def normalize(norm: nn.Module | None, x: Tensor | None) -> Tensor | None:
    """A module over head_dim called on heads; they keep their dtype, whatever the module computes in."""
    if norm is None or x is None:
        return x
    made = norm(x)
    if not isinstance(made, Tensor) or made.shape != x.shape:
        raise ValueError(f"a norm must keep the shape of its heads, {tuple(x.shape)}, got {spell(made)}.")
    return made.to(x.dtype)

"""What kernels of Triton compute alike; importing this imports triton."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def bend(score: tl.tensor, scale: tl.tensor, softcap: tl.tensor, SOFTCAP: tl.constexpr) -> tl.tensor:
    """A product of q and k as a score: scaled, and kept below the softcap by a hyperbolic tangent."""
    score *= scale
    if SOFTCAP:
        score = softcap * (1.0 - 2.0 / (tl.exp2(score * (2.0 * LOG2E / softcap)) + 1.0))
    return score

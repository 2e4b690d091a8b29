"""The rule of parity: how far a result may be from the exact one.

A result is right when it agrees with a float64 computation of the same formula. How much it may differ follows from
what a plain computation in its own dtype makes of the same inputs::

    error(result) <= multiple * error(plain) + 2 * eps * max|exact| + floor

with the multiple (``Backend.tolerance``) and the floor as flash-attention's own tests use them.
"""

from __future__ import annotations

import torch
from torch import Tensor

FINEST = 1e-12
"""A dtype with a smaller eps is a reference itself."""
AGAIN = 5
"""How often a plain computation runs again, on inputs moved by a rounding, before a result is called wrong: one run may
err little by luck."""


def moved(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """A tensor with every number moved by a rounding, up or down or not at all."""
    steps = torch.randint(-1, 2, tensor.shape, generator=generator, device="cpu").to(tensor)
    return tensor.detach() * (1.0 + steps * torch.finfo(tensor.dtype).eps)


def allowed_error(name: str, plain: float, largest: float, eps: float, tolerance: tuple[float, float]) -> float:
    """The right side of the rule.

    Args:
        name: of the result; one that starts with "gradient" is given the multiple and the floor of gradients.
        plain: the error of the plain computation.
        largest: the largest absolute value of the exact result.
        eps: of the dtype that was computed in.
        tolerance: the multiples for outputs and for gradients.
    """
    gradient = name.startswith("gradient")
    floor = 1e-11 if eps < FINEST else 2e-4 if gradient else 1e-5
    return tolerance[gradient] * plain + 2 * eps * largest + floor

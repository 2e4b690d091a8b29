"""Closeness: two tensors within the rule of parity (``backends.parity``), or equal to rounding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends.base import Backend
from ..backends.parity import allowed_error


def is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def assert_close(
    name: str,
    actual: Tensor,
    plain: Tensor,
    exact: Tensor,
    dtype: torch.dtype,
    tolerance: tuple[float, float] = Backend.tolerance,
    *,
    again: Sequence[tuple[Tensor, Tensor]] = (),
) -> float:
    """``actual`` errs no more than the rule of parity allows, given ``plain`` and, in float64, ``exact``.

    Returns the error as a share of what is allowed.

    ``dtype`` is the one that was computed in; a learned table may be kept in a finer one. ``again`` holds more plain
    computations, each with an exact one of its own: the largest error counts. A name that starts with "gradient" is
    given the floor of gradients.
    """
    assert actual.shape == exact.shape, f"{name} must have shape {tuple(exact.shape)}, got {tuple(actual.shape)}"
    assert actual.dtype == plain.dtype, f"{name} must be {plain.dtype}, got {actual.dtype}"
    if not exact.numel():
        return 0.0
    eps = max(torch.finfo(dtype).eps, torch.finfo(actual.dtype).eps)
    reference, actual = exact.to(actual.dtype).double(), actual.double()
    finite = reference.isfinite()
    strange = actual.isfinite() != finite
    assert not strange.any(), f"{name} is not finite in {int(strange.sum())} places where it should be, or the reverse"
    infinite, expected = actual[~finite], reference[~finite]
    assert torch.equal(infinite.isnan(), expected.isnan()), f"{name} is NaN where it should be infinite, or the reverse"
    assert torch.equal(infinite.nan_to_num(), expected.nan_to_num()), f"{name} differs where it is infinite"
    if not finite.any():
        return 0.0
    error, largest = (actual - reference)[finite].abs().max().item(), reference[finite].abs().max().item()
    allowed = max(rounding_error(*pair) for pair in ((plain, exact), *again))
    bound = allowed_error(name, allowed, largest, eps, tolerance)
    assert error <= bound, (
        f"{name} is off by {error:.3g}, at most {bound:.3g} allowed "
        f"(a plain {dtype} computation is off by {allowed:.3g})"
    )
    return error / bound


def rounding_error(plain: Tensor, exact: Tensor) -> float:
    """The largest error of a computation where the exact result, in its dtype, is finite."""
    reference = exact.to(plain.dtype).double()
    errors = (plain.double() - reference)[reference.isfinite()].abs()
    return errors.nan_to_num(0.0).max().item() if errors.numel() else 0.0


ROUNDING = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
"""How much two ways to compute one thing may differ, relative to the largest value, and at least absolutely."""


def assert_same(actual: Any, expected: Any, name: str = "tensor") -> None:
    """Equal to rounding, for tensors and dicts of them: two ways to say one thing, in one dtype.

    The difference may be 1e-10 (float64), 1e-5 (float32), 2e-3 (float16) or 2e-2 (bfloat16) times the largest value,
    and times 1 where all are smaller. A reference that is not finite fails.
    """
    if isinstance(expected, Mapping):
        assert list(actual) == list(expected), f"{name} must hold {list(expected)}, got {list(actual)}"
        for key, value in expected.items():
            assert_same(actual[key], value, key)
        return
    assert actual.shape == expected.shape, f"{name} must have shape {tuple(expected.shape)}, got {tuple(actual.shape)}"
    assert actual.dtype == expected.dtype, f"{name} must be {expected.dtype}, got {actual.dtype}"
    if not expected.numel():
        return
    rounding = ROUNDING[expected.dtype]
    actual, expected = actual.detach().double(), expected.detach().double()
    assert expected.isfinite().all(), f"{name} must have a finite reference"
    error, bound = (actual - expected).abs().max().item(), rounding * max(1.0, expected.abs().max().item())
    assert error <= bound, f"{name} is off by {error:.3g}, at most {bound:.3g} allowed"

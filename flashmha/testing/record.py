"""The parts of drawn layers, calls and models: records that a failure shows in one line, and values of a seed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from hypothesis import strategies as st

Drawn = TypeVar("Drawn")
DRAWN: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
"""What the values of a seed are made as, whatever torch makes by default."""


class Record:
    """The base of frozen dataclasses whose repr names the fields that are not as by default, and can be evaluated."""

    def __repr__(self) -> str:
        parts = []
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value, usual = getattr(self, field.name), field.default
            if field.default_factory is not dataclasses.MISSING:
                usual = field.default_factory()
            if usual is dataclasses.MISSING or value != usual:
                parts.append(f"{field.name}={value!r}")
        return f"{type(self).__name__}({', '.join(parts)})"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """The line that Hypothesis prints; without it, it writes every field of a dataclass on a line of its own."""
        printer.text(repr(self))


def one(values: Iterable[Drawn]) -> st.SearchStrategy[Drawn]:
    """One of some values; the first is what Hypothesis shrinks to."""
    from hypothesis import strategies as st  # here alone: what else is in this file draws nothing

    return st.sampled_from(tuple(values))


def placed(device: torch.device | str | None) -> torch.device:
    """A device; where torch makes tensors by default for ``None``."""
    return torch.empty(0).device if device is None else torch.device(device)


def noise(
    seed: int, *shape: int, dtype: torch.dtype = torch.float64, device: torch.device | str | None = None
) -> Tensor:
    """Normal values of one seed; the same in every dtype and on every device, up to rounding."""
    generator = torch.Generator("cpu").manual_seed(seed)
    values = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
    return values.to(device=placed(device), dtype=dtype)


def randomized(module: Any, seed: int) -> Any:
    """A module whose parameters come from a seed: none at zero or one, where a bug could hide, and no two alike."""
    generator = torch.Generator("cpu").manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64, device="cpu")
            fan_in = max(parameter.shape[1], 1) if parameter.dim() == 2 else 0
            parameter.copy_(values / math.sqrt(fan_in) if fan_in else 1.0 + values / 4)
    return module

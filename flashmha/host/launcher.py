"""A Triton kernel whose compiled forms are launched again without Triton's look at every argument."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

from torch import Tensor

from .torch_state import raw_stream

DIVISOR = 16
"""Triton compiles a form for addresses that divide by this, and another for those that do not."""
LARGEST_NUMBER = 2**31 - 1
"""The largest number that a form takes as one of 32 bits."""
MOST_FORMS = 1024


class Launcher:
    """Launches of a kernel.

    Triton finds the form of a kernel for a call by its constants and by the kinds of its arguments: the dtype of a
    tensor, and whether its address divides by 16; whether a number is whole and fits 32 bits, and, unless the kernel
    says otherwise, whether it divides by 16 or is 1. That takes six times as long as to launch the form. Here the
    caller says the kind of a call. Where all addresses divide and all numbers fit, the form that the last such call
    with the same steps had is launched; Triton launches the others.
    """

    def __init__(self, kernel: Any, stream: Callable[[int], int] | None = raw_stream) -> None:
        self.kernel, self.stream = kernel, stream
        self.forms: dict[Hashable, Any] = {}

    def __call__(
        self,
        kind: Hashable,
        programs: tuple[int, int, int],
        tensors: tuple[Tensor | None, ...],
        steps: tuple[int, ...],
        numbers: tuple[float, ...],
        constants: dict[str, Any],
        options: dict[str, int],
    ) -> None:
        """Launch programs along three axes, on the current device.

        Args:
            kind: what decides the form beside addresses, steps and numbers: the device, the dtypes of the tensors and
                which are there, which numbers are whole, the constants and the options.
            tensors, steps, numbers, constants: the arguments of the kernel in their order. The kernel says of the
                numbers that their values make no other form.
            options: warps and stages.
        """
        places = 0
        for tensor in tensors:
            if tensor is not None:
                places |= tensor.data_ptr()
        plain = places % DIVISOR == 0 and min(numbers) >= -LARGEST_NUMBER and max(numbers) <= LARGEST_NUMBER
        key = kind, steps
        form = self.forms.get(key) if plain else None
        if form is not None and self.stream is not None:
            stream = self.stream(tensors[0].device.index)  # type: ignore[arg-type, union-attr]
            form[programs](*tensors, *steps, *numbers, *constants.values(), stream=stream)
            return
        made = self.kernel[programs](*tensors, *steps, *numbers, *constants.values(), **options)
        if plain and hasattr(type(made), "__getitem__"):  # an interpreter makes none
            if len(self.forms) >= MOST_FORMS:
                self.forms.clear()
            self.forms[key] = made

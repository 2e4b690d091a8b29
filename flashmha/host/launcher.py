"""A Triton kernel whose compiled forms are launched again without Triton's look at every argument."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

from torch import Tensor

from .torch_state import raw_stream

DIVISOR = 16
"""Triton compiles a form for addresses and numbers that divide by this, and another for those that do not."""
LARGEST = 2**31 - 1
"""The largest number that a form takes as one of 32 bits."""


class Launcher:
    """Launches of a kernel.

    Triton finds the form of a kernel for a call by its constants and by the kinds of its arguments: the dtype of a
    tensor, and whether its address divides by 16; whether a number is whole and fits 32 bits, and, unless the kernel
    says otherwise, whether it divides by 16 or is 1. That takes six times as long as to launch the form. Here the
    caller says the kind of a call. Where all addresses and steps divide and all numbers fit, the form that the first
    such call had is launched; Triton launches the others.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.forms: dict[Hashable, Any] = {}

    def __call__(
        self,
        kind: Hashable,
        programs: tuple[int, int],
        tensors: Sequence[Tensor | None],
        steps: Sequence[int],
        numbers: Sequence[float],
        constants: dict[str, Any],
        options: dict[str, int],
    ) -> None:
        """Launch programs along two axes, on the current device.

        Args:
            kind: what decides the form beside addresses and sizes: the device, the dtypes of the tensors and which are
                there, which numbers are whole, the constants and the options.
            tensors, steps, numbers, constants: the arguments of the kernel in their order. The kernel says of the
                numbers that their values make no other form.
            options: warps and stages.
        """
        together = size = 0
        for tensor in tensors:
            if tensor is not None:
                together |= tensor.data_ptr()
        for step in steps:
            size |= step
        fits = 0 <= size <= LARGEST and min(numbers) >= -LARGEST and max(numbers) <= LARGEST
        regular = fits and (together | size) % DIVISOR == 0
        form = self.forms.get(kind) if regular else None
        if form is None:
            made = self.kernel[programs](*tensors, *steps, *numbers, **constants, **options)
            if regular and hasattr(type(made), "__getitem__"):  # an interpreter makes none
                self.forms[kind] = made
            return
        assert tensors[0] is not None and raw_stream is not None
        stream = raw_stream(tensors[0].device.index)
        form[(*programs, 1)](*tensors, *steps, *numbers, *constants.values(), stream=stream)

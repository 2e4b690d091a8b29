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
MOST_FORMS = 256
"""Kinds that are remembered, and forms of each."""
KNOWN = ("3.4.", "3.5.", "3.6.", "3.7.", "3.8.")
"""The releases of Triton that hand ``CompiledKernel.run`` the same things; another one starts its forms itself."""

Start = Callable[..., None]
"""A form started: programs, the stream, tensors, their addresses, and all other arguments in."""


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
        self.forms: dict[Hashable, dict[tuple[int, ...], Start]] = {}

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
        Launch(self, kind, programs, numbers, constants, options)(tensors, steps)

    def forms_of(self, kind: Hashable) -> dict[tuple[int, ...], Start]:
        """The forms of a kind by the steps of their tensors."""
        forms = self.forms.get(kind)
        if forms is None or len(forms) >= MOST_FORMS:
            if len(self.forms) >= MOST_FORMS:
                self.forms.clear()
            forms = self.forms[kind] = {}
        return forms


class Launch:
    """Launches of one kind that differ in their tensors and the steps of these; see ``Launcher`` for the arguments."""

    __slots__ = ("fits", "forms", "launcher", "options", "programs", "rest")

    def __init__(
        self,
        launcher: Launcher,
        kind: Hashable,
        programs: tuple[int, int, int],
        numbers: tuple[float, ...],
        constants: dict[str, Any],
        options: dict[str, int],
    ) -> None:
        self.launcher, self.programs, self.options = launcher, programs, options
        self.forms = launcher.forms_of(kind)
        self.fits = min(numbers) >= -LARGEST_NUMBER and max(numbers) <= LARGEST_NUMBER
        self.rest = (*numbers, *constants.values())

    def __call__(self, tensors: tuple[Tensor | None, ...], steps: tuple[int, ...]) -> None:
        """Launch the programs on tensors, the first of which is there."""
        places = 0
        addresses: list[int | None] = []
        for tensor in tensors:
            if tensor is None:
                addresses.append(None)
            else:
                address = tensor.data_ptr()
                places |= address
                addresses.append(address)
        plain = self.fits and not places % DIVISOR
        start, stream = self.forms.get(steps) if plain else None, self.launcher.stream
        if start is not None and stream is not None:
            on: int = tensors[0].get_device()  # type: ignore[union-attr]
            start(self.programs, stream(on), tensors, addresses, (*steps, *self.rest))
            return
        made = self.launcher.kernel[self.programs](*tensors, *steps, *self.rest, **self.options)
        if plain and hasattr(type(made), "__getitem__"):  # an interpreter makes none
            self.forms[steps] = make_start(made)


def make_start(form: Any) -> Start:
    """A function that starts a compiled form.

    ``form[programs]`` makes what hooks want to know and calls them, also where there are none, and has C ask each
    tensor for its address, and the driver for each address: as much Python as all the rest of a launch.
    """

    def start(programs: Any, stream: int, tensors: Any, addresses: Any, others: Any) -> None:
        form[programs](*tensors, *others, stream=stream)

    run, function, metadata = (getattr(form, name, None) for name in ("run", "function", "packed_metadata"))
    if run is None or function is None or metadata is None or not is_known():
        return start
    from triton.knobs import runtime

    def start_bare(programs: Any, stream: int, tensors: Any, addresses: Any, others: Any) -> None:
        before, behind = runtime.launch_enter_hook, runtime.launch_exit_hook
        # a hook, or a chain of them
        if getattr(before, "calls", before) or getattr(behind, "calls", behind):
            start(programs, stream, tensors, addresses, others)
        else:
            run(*programs, stream, function, metadata, None, None, None, *addresses, *others)

    return start_bare


def is_known() -> bool:
    """The installed Triton starts its forms as this module does."""
    import triton

    version: str = triton.__version__
    return version.startswith(KNOWN)

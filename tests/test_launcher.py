"""Launches without Triton's look: each runs the form that Triton would have found."""

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashmha.host.launcher import Launcher

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton: pip install triton")


def add(x, y, x_row, y_row, rows, scale, WIDE: "constexpr", TILE: "constexpr"):  # type: ignore  # noqa: F821
    """A kernel's arguments: tensors, steps, numbers, constants."""


class Form:
    """A compiled form, which says what it is and what it is launched with."""

    def __init__(self, name: str, ran: list[Any]) -> None:
        self.name, self.ran = name, ran

    def __getitem__(self, programs: Any) -> Callable[..., None]:
        assert len(programs) == 3

        def run(*arguments: Any, stream: int) -> None:
            self.ran.append((self.name, arguments, stream))

        return run


class Kernel:
    """A kernel whose forms are found by Triton and run nothing."""

    def __init__(self) -> None:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.backends.nvidia.compiler import CUDABackend
        from triton.runtime.jit import create_function_from_signature

        function = triton.JITFunction(add, do_not_specialize=["rows", "scale"])
        self.bind = create_function_from_signature(
            function.signature, function.params, CUDABackend(GPUTarget("cuda", 90, 32))
        )
        self.ran: list[Any] = []

    def find(self, *arguments: Any, **options: Any) -> str:
        """The form that Triton finds for a call."""
        _, specialization, given = self.bind(*arguments, **options)
        return f"{specialization} {arguments[6:]} {given}"

    def __getitem__(self, programs: Any) -> Callable[..., Form]:
        def run(*arguments: Any, **options: Any) -> Form:
            name = self.find(*arguments, **options)
            self.ran.append((name, arguments, None))
            return Form(name, self.ran)

        return run


DTYPES = (torch.float16, torch.float32)
memory = torch.zeros(512, dtype=torch.uint8)
lists = st.tuples(st.sampled_from(DTYPES), st.sampled_from((0, 0, 4, 16, 20)))
numbers = st.sampled_from((0, 1, 2, 16, 17, 48, 2**31 - 1, 2**31, 2**40, -5, -(2**31)))
calls = st.lists(
    st.tuples(
        lists,
        st.none() | lists,
        st.tuples(numbers, numbers),
        st.tuples(numbers, st.sampled_from((0.0, 0.5, 1.0))),
        st.tuples(st.booleans(), st.sampled_from((16, 32))),
        st.sampled_from((1, 4)),
    ),
    min_size=2,
    max_size=8,
)


@settings(max_examples=200)
@given(drawn=calls, repeats=st.integers(1, 3))
def test_a_call_runs_the_form_that_triton_finds_for_it(drawn: list[Any], repeats: int) -> None:
    kernel = Kernel()
    launch = Launcher(kernel, lambda index: 7)
    for x, y, steps, others, constants, warps in drawn * repeats:
        tensors = tuple(None if one is None else memory[one[1] :][:64].view(one[0]) for one in (x, y))
        kind = x[0], y and y[0], constants, warps
        named = dict(zip(("WIDE", "TILE"), constants))
        launch(kind, (3, 1, 1), tensors, steps, others, named, {"num_warps": warps})
        name, arguments, _ = kernel.ran[-1]
        given_arguments = (*tensors, *steps, *others, *constants)
        assert len(arguments) == len(given_arguments)
        assert all(a is b or a == b for a, b in zip(arguments, given_arguments))
        assert name == kernel.find(*given_arguments, num_warps=warps)


def test_a_second_call_does_not_ask_triton() -> None:
    kernel = Kernel()
    launch = Launcher(kernel, lambda index: 7)
    for rows in (5, 6, 16):
        launch("one", (3, 1, 1), (memory, None), (32, 1), (rows, 0.5), {"WIDE": True, "TILE": 16}, {})
    assert [stream for _, _, stream in kernel.ran] == [None, 7, 7]


def test_what_an_interpreter_ran_is_run_again_by_it() -> None:
    ran: list[Any] = []

    class Interpreted:
        def __getitem__(self, programs: Any) -> Callable[..., None]:
            return lambda *arguments, **options: ran.append(arguments)

    launch = Launcher(Interpreted(), lambda index: 7)
    for _ in range(2):
        launch("one", (3, 1, 1), (memory,), (32,), (5,), {}, {})
    assert len(ran) == 2

"""Kernels on this machine: whether Triton's run on a device, what it has for them, and how they want tensors."""

from __future__ import annotations

import contextlib
import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .machine import has_triton
from .torch_state import current_device

OLDEST = (8, 0)
"""The compute capability that has tensor cores for bfloat16."""


def why_no_kernels(kind: str, index: int | None) -> str | None:
    """Why no kernel runs on a device of a type; found out once. It takes constants alone, as Dynamo wants it."""
    return find_out(kind, index)


why_no_kernels._dynamo_marked_constant = True  # type: ignore[attr-defined]  # torch.compiler.assume_constant_result, unimported


@functools.cache
def find_out(kind: str, index: int | None) -> str | None:
    """``why_no_kernels``, asked of the machine."""
    if kind != "cuda" or torch.version.cuda is None:
        return "needs an NVIDIA GPU"
    capability = torch.cuda.get_device_capability(index)
    if capability < OLDEST:
        return f"compute capability must be at least {OLDEST}, got {capability}"
    if not has_triton():
        return "triton is not installed"
    try:
        import triton

        triton.runtime.driver.active.get_current_device()
    except Exception as error:  # it compiles C here, and a machine without a compiler or Python's headers cannot
        return f"triton does not work: {error}"
    return None


class Processors(NamedTuple):
    """A GPU's processors, bytes of shared memory that a program may have, and major compute capability."""

    number: int
    shared_memory: int
    major: int


H200 = Processors(132, 232448, 9)


@functools.cache
def processors(device: torch.device) -> Processors:
    """Those of a device; those of an H200 where an interpreter runs."""
    if device.type != "cuda":
        return H200._replace(major=8)  # no kernel waits for another there
    import triton

    index = torch.cuda.current_device() if device.index is None else device.index
    limit: int = triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"]
    found = torch.cuda.get_device_properties(index)
    return Processors(found.multi_processor_count, limit, found.major)


def use_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Make a device the current one, on which kernels are launched; nothing is entered where it is."""
    if device.type != "cuda" or device.index == current_device():
        return AT_HOME
    return torch.cuda.device(device)


AT_HOME = contextlib.nullcontext()
"""Nothing to enter: one of them may be entered any number of times."""


def power_of_two(size: int) -> int:
    """The least one that is as large, as an axis of a tile must be."""
    return 1 << (size - 1).bit_length()


LEAST_AXIS = 16
"""The fewest that a tensor core multiplies along an axis."""


def padded(size: int) -> int:
    """The power of two that an axis of a product of tiles is as long as."""
    return max(LEAST_AXIS, power_of_two(size))


def lined_up(x: Tensor) -> Tensor:
    """The tensor where neighbours along its last axis are neighbours in memory, as kernels read it; else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()

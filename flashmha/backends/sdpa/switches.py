"""The process-wide switches of SDPA's kernels."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from torch.nn.attention import SDPBackend, sdpa_kernel

from ...host.torch_state import (
    allows_cudnn,
    allows_efficient,
    allows_flash,
    allows_math,
    is_compiling,
    is_deterministic,
)
from ...problem.spec import AttentionSpec

KERNELS = (
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
)


def switches() -> tuple[bool, ...]:
    """Which of ``KERNELS`` the process-wide switches allow; a constant to Dynamo, which cannot trace the question."""
    return allows_efficient(), allows_math(), allows_flash(), allows_cudnn()


switches._dynamo_marked_constant = True  # type: ignore[attr-defined]  # torch.compiler.assume_constant_result, unimported


def kernels_for_masks() -> list[SDPBackend]:
    """The kernels the switches leave for a call with a mask: all but cuDNN."""
    return [kernel for kernel, allowed in zip(KERNELS[:3], switches()) if allowed]


def without_cudnn() -> contextlib.AbstractContextManager[None]:
    """SDPA's switches as they are, cuDNN off."""
    if not switches()[3]:
        return contextlib.nullcontext()
    return only(kernels_for_masks())


LOCK = threading.RLock()
"""Held while SDPA's switches, which belong to the process, are other than they were: two threads that set and restore
them in turns would leave them off."""


def only(kernels: list[SDPBackend]) -> contextlib.AbstractContextManager[None]:
    """SDPA by some kernels alone, one thread at a time; a compiler writes the switches into its graph."""
    return sdpa_kernel(kernels) if is_compiling() else alone(kernels)


@contextlib.contextmanager
def alone(kernels: list[SDPBackend]) -> Iterator[None]:
    with LOCK, sdpa_kernel(kernels):
        yield


def by_math(spec: AttentionSpec) -> bool:
    """Only the math kernel's backward is deterministic for this problem.

    The fused ones ask torch's own switch when the backward runs, and add gradients up in any order where it is off or
    no more than a warning.
    """
    return "deterministic" in spec.needs and not is_deterministic()

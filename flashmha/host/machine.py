"""What this machine is and has: its GPUs, and the packages that are installed."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from collections.abc import Sequence
from importlib import metadata

import torch


@functools.cache
def has_triton() -> bool:
    """Triton is installed; looking takes longer than a kernel."""
    return importlib.util.find_spec("triton") is not None


known: dict[int, tuple[str | None, int | None]] = {}


def graphics(index: int | None) -> tuple[str | None, int | None]:
    """The name and the compute capability (major version) of a CUDA device; nothing where there is none."""
    if not torch.cuda.is_available():
        return None, None
    index = torch.cuda.current_device() if index is None else index
    if index not in known:
        known[index] = (torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)[0])
    return known[index]


KERNEL_PACKAGES = ("triton", "flash-attn", "flash-attn-3", "fa3-fwd", "flash-attn-4", "nvidia-cutlass-dsl")
"""The packages of kernels, whose versions a measurement depends on."""


def installed_versions(packages: Sequence[str] = KERNEL_PACKAGES) -> dict[str, str]:
    """The versions of those packages that are here."""
    found: dict[str, str] = {}
    for package in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found

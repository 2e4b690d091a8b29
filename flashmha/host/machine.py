"""What this machine is and has: its GPUs, and the packages that are installed."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import torch

from .torch_state import is_stream_capturing


@functools.cache
def has_triton() -> bool:
    """Triton is installed; looking takes longer than a kernel."""
    return importlib.util.find_spec("triton") is not None


class Machine:
    """The GPUs of this machine, as PyTorch knows them; a test makes a backend with one of its own."""

    def has_cuda(self) -> bool:
        return torch.cuda.is_available()

    def current(self) -> int:
        """The index of the current CUDA device."""
        return torch.cuda.current_device()

    def captures(self) -> bool:
        """A CUDA graph is being captured."""
        return is_stream_capturing()

    def capability(self, index: int | None) -> tuple[int, int]:
        """The compute capability of a CUDA device."""
        return torch.cuda.get_device_capability(index)

    def graphics(self, index: int | None) -> tuple[str | None, int | None]:
        """The name and the major version of a CUDA device, as ``graphics`` below."""
        return graphics(index)

    def installed(self) -> dict[str, str]:
        """The versions of the packages of kernels, as ``installed_versions`` below."""
        return installed_versions()

    def device(self, index: int) -> torch.device:
        """Where the tensors lie that a kernel is tried on."""
        return torch.device("cuda", index)

    def on(self, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        """A device is the current one: kernels are launched there, whatever the tensors say."""
        return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


HERE = Machine()

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

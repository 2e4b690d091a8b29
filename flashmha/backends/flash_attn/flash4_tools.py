"""What serves the kernels of flash-attn 4 on a GPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch

from ..rewrites.block_tables import MIN_LENGTH, serves_tables
from ..rewrites.compact import Mover, move_rows


def own_masks() -> Any:
    """``flash4_masks``, which needs the package."""
    from . import flash4_masks

    return flash4_masks


READ_RELEASES = ("4.0.0b36",)
"""The releases of the package whose workspaces hold at first what ``backward_calls`` puts there, as their source says:
no look at the arguments of a kernel would tell."""


def was_read(device: torch.device) -> bool:
    """The installed release is one of ``READ_RELEASES``, and its kernels for a device are those of Hopper."""
    try:
        version = metadata.version("flash-attn-4")
    except metadata.PackageNotFoundError:
        return False
    return version in READ_RELEASES and torch.cuda.get_device_capability(device)[0] == 9


@dataclasses.dataclass(frozen=True)
class Tools:
    """What serves the package's kernels on a GPU; a test on a CPU makes a backend with its own.

    Attributes:
        move: moves real keys to the front and back, as ``compact.move_rows``.
        masks: gives ``flash4_masks``.
        takes_tables: tables of tiles are made and taken on a device.
        least: sequences as long as this have tiles to skip.
        was_read: the package's launches are known on a device.
    """

    move: Mover = move_rows
    masks: Callable[[], Any] = own_masks
    takes_tables: Callable[[torch.device], bool] = serves_tables
    least: int = MIN_LENGTH
    was_read: Callable[[torch.device], bool] = was_read

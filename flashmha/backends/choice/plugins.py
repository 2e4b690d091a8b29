"""Backends of other packages, named by the entry-point group ``flashmha.backends`` in their metadata.

    [project.entry-points."flashmha.backends"]
    mine = "my_package.attention:Mine"          # the name is Mine.name

Not a backend. The registry takes these in on the first use of its list; importing flashmha imports none of them.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import metadata

import torch
from torch import Tensor

from ...problem.spec import AttentionSpec
from ...problem.wording import summarize_error
from ..base import Backend
from ..limits import Limits

GROUP = "flashmha.backends"
Load = Callable[[], object]


def find_offers() -> list[tuple[str, str, Load]]:
    """The offers of the environment: the backend's name, the package it comes with, and how to import its class.

    Metadata that cannot be read is one offer as well, whose import raises what went wrong.
    """
    try:
        points = sorted(metadata.entry_points(group=GROUP), key=lambda point: (point.name, package(point)))
    except Exception as error:  # one damaged package must not take attention away from all others
        return [(GROUP, "the environment's metadata", raising(error))]
    return [(point.name, package(point), point.load) for point in points]


def package(point: metadata.EntryPoint) -> str:
    """The distribution an entry point belongs to, with its version."""
    return f"{point.dist.name} {point.dist.version}" if point.dist is not None else point.value


def raising(error: Exception) -> Load:
    def load() -> object:
        raise error

    return load


def load_class(load: Load) -> object:
    """Import a class in a clean state: no tensor a package makes meanwhile may be a fake or an inference tensor."""
    from torch.utils._python_dispatch import _disable_current_modes

    with _disable_current_modes(), torch.inference_mode(False):
        return load()


class Unusable(Backend):
    """A plug-in that could not be taken in: it stays on the list, so that a look for it finds the reason."""

    limits = Limits(devices=(), dtypes=(), features=frozenset())

    def __init__(self, name: str, error: BaseException) -> None:
        self.name = name
        self.reason = summarize_error(error)

    def why_not_here(self, device: torch.device) -> str | None:
        return self.reason

    def limits_exceeded(self, spec: AttentionSpec) -> list[str]:
        return [self.reason]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
        raise RuntimeError(f"{self.name} cannot be used: {self.reason}")

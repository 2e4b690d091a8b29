"""Limits: what an implementation of attention can do, as data."""

from __future__ import annotations

import dataclasses

import torch

from ..problem.spec import AttentionSpec
from ..problem.wording import dtype_name

FEATURES = (
    "backward",
    "causal",
    "window",
    "key_lengths",
    "key_padding",
    "documents",
    "cache",
    "pages",
    "own_tokens",
    "dense_mask",
    "rule",
    "bias",
    "bias_grad",
    "alibi",
    "softcap",
    "sinks",
    "dropout",
    "gqa",
    "head_dim_v",
    "lse",
    "lse_grad",
    "deterministic",
)
"""Everything a problem may need, in the order tables show it."""


HALF = (torch.float16, torch.bfloat16)


@dataclasses.dataclass(frozen=True)
class Limits:
    """Capabilities of a backend, as data: reasons, the site's table and the tests all come from here.

    Attributes:
        devices: device types.
        dtypes: dtypes of q, k and v.
        features: the names out of ``FEATURES`` it serves.
        not_on: device type -> features it serves elsewhere and not there.
        head_dim: the largest head_dim, ``None`` without a limit.
        head_dim_min, head_dim_step: the smallest head_dim, and what it must be a multiple of.
        seqlen_min: the fewest queries and keys.
        page_step: what the size of a page must be a multiple of, where keys lie in ``Pages``.
        batch_min: the fewest batch items.
        capability: the CUDA compute capabilities (major versions) it has kernels for.
        only_on: feature -> those of them it serves it on, where that is not all.
        aten: made of PyTorch operators alone, as export, torch.func and tensor subclasses want it.
    """

    devices: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    features: frozenset[str]
    not_on: dict[str, frozenset[str]] = dataclasses.field(default_factory=dict)
    head_dim: int | None = None
    head_dim_min: int = 1
    head_dim_step: int = 1
    seqlen_min: int = 0
    batch_min: int = 0
    page_step: int = 1
    capability: tuple[int, ...] | None = None
    only_on: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    aten: bool = False
    sized: bool = dataclasses.field(init=False, repr=False)
    """Some size is limited."""

    def __post_init__(self) -> None:
        bounds = (self.head_dim, self.head_dim_min, self.head_dim_step, self.seqlen_min, self.batch_min)
        object.__setattr__(self, "sized", (*bounds, self.page_step) != (None, 1, 1, 0, 0, 1))
        for name, kind in (("devices", str), ("dtypes", torch.dtype)):
            values = getattr(self, name)
            if not isinstance(values, tuple) or not all(isinstance(value, kind) for value in values):
                raise TypeError(f"{name} must be a tuple of {kind.__name__}, got {values!r}.")
        if not isinstance(self.features, frozenset):
            raise TypeError(f"features must be a frozenset of names, got {self.features!r}.")
        unknown = sorted(self.features.union(*self.not_on.values()) - frozenset(FEATURES))
        if unknown:
            raise ValueError(f"features must be among {', '.join(FEATURES)}, got {', '.join(unknown)}.")

    def exceeded_by(self, spec: AttentionSpec) -> list[str]:
        """One phrase for each limit that a problem exceeds."""
        reasons: list[str] = []
        if self.devices and spec.device.type not in self.devices:
            reasons.append(f"device {spec.device.type} (only {', '.join(self.devices)})")
        if spec.dtype not in self.dtypes:
            reasons.append(f"dtype {dtype_name(spec.dtype)} (only {', '.join(map(dtype_name, self.dtypes))})")
        served = self.features
        if spec.device.type in self.not_on:
            served = served - self.not_on[spec.device.type]
        if not spec.features <= served:
            missing = [name for name in FEATURES if name in spec.features and name not in served]
            missing += sorted(spec.features - served - frozenset(missing))
            where = f" on {spec.device.type}" if spec.device.type in self.not_on else ""
            reasons.append(f"no {', no '.join(missing)}{where}")
        if spec.aten_only and not self.aten:
            reasons.append("not made of PyTorch operators alone (export, torch.func or a tensor subclass wants that)")
        return reasons + self._sizes_exceeded_by(spec) if self.sized or not spec.head_dim else reasons

    def _sizes_exceeded_by(self, spec: AttentionSpec) -> list[str]:
        reasons: list[str] = []
        largest = max(spec.head_dim, spec.head_dim_v)
        if self.head_dim is not None and largest > self.head_dim:
            reasons.append(f"head_dim={largest} (at most {self.head_dim})")
        if min(spec.head_dim, spec.head_dim_v) < self.head_dim_min:
            reasons.append(f"head_dim={min(spec.head_dim, spec.head_dim_v)} (at least {self.head_dim_min})")
        if self.head_dim_step > 1:
            for name, size in (("head_dim", spec.head_dim), ("head_dim_v", spec.head_dim_v)):
                if size % self.head_dim_step:
                    reasons.append(f"{name}={size} (a multiple of {self.head_dim_step})")
                    break
        if min(spec.seqlen_q, spec.seqlen_k) < self.seqlen_min:
            shortest = min(spec.seqlen_q, spec.seqlen_k)
            reasons.append(f"seqlen={shortest} (at least {self.seqlen_min})")
        if spec.batch < self.batch_min:
            reasons.append(f"batch={spec.batch} (at least {self.batch_min})")
        pages = spec.pages
        if pages is not None and pages.page_size % self.page_step:
            reasons.append(f"page_size={pages.page_size} (a multiple of {self.page_step})")
        return reasons

    def takes_heads(self, dtype: torch.dtype, head_dim: int) -> bool:
        """Heads of a dtype and a size are within the limits."""
        largest = head_dim if self.head_dim is None else self.head_dim
        return dtype in self.dtypes and self.head_dim_min <= head_dim <= largest and not head_dim % self.head_dim_step

    def exceeded_on(self, capability: tuple[int, int], features: frozenset[str]) -> list[str]:
        """One phrase for each limit that a CUDA compute capability exceeds, of a GPU that need not be here."""
        found = []
        if self.capability is not None and capability[0] not in self.capability:
            found.append(f"compute capability {written(capability)} (only {of_majors(self.capability)})")
        for name in FEATURES:
            majors = self.only_on.get(name)
            if majors is not None and name in features and capability[0] not in majors:
                found.append(f"{name} on compute capability {written(capability)} (only {of_majors(majors)})")
        return found


def written(capability: tuple[int, int]) -> str:
    """``9.0``."""
    return ".".join(map(str, capability))


def of_majors(majors: tuple[int, ...]) -> str:
    """``9.x, 10.x``."""
    return ", ".join(f"{major}.x" for major in majors)

"""Backend and Limits: what one implementation of attention can do, as data, and the call.

A backend is one self-contained file with one class. It imports neither another backend nor the registry.

The contract, version 1. A backend may rely on this, and whatever breaks it gets another number:

- The class is made without arguments, once, when it is registered.
- ``__call__`` sees only problems for which ``why_not(spec)``, ``why_not_here(spec.device)`` and ``why_not_built(spec)``
  all gave ``None``; ``why_not_built`` is asked only where the other two did.
- ``spec`` describes q, k and v exactly and is checked: one dtype and device, heads a multiple of heads_kv, a mask and
  biases that fit. q, k and v are ``(batch, seqlen, heads, head_dim)`` with any strides and must not be written to.
- ``spec.features`` is a subset of ``limits.features`` on that device. A feature that a later release adds is a new
  name, so a class that has never heard of it refuses it: nothing is dropped in silence.
- ``spec.mask`` is normalised: windows are bottom-right and merged, with bounds that may be negative; a rule that hides
  nothing is gone. ``spec.allowed()`` and ``spec.added()`` give mask and bias as tensors, ``spec.scale`` a number.
- What it said about a problem without tensors (no mask, bias or sinks) may be remembered while the list stays as it is.
- Gradients are asked for only with ``"backward"`` among the features, and go through autograd: those of q, k and v, and
  of sinks that want one. What a bias holds (slopes, a table, a tensor) wants one only with ``"bias_grad"``.

What it owes: the answer of ``naive`` within ``tolerance``, zeros (and zero gradients) in rows that may look at nothing,
dropout wherever ``spec.dropout_p`` is not 0, which under one seed of torch's generator drops the same weights whatever
the values are, no fallback in silence, and reasons that cost nothing to ask for.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Hashable
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..problem.spec import AttentionSpec
from ..problem.wording import short

FEATURES = (
    "backward",
    "causal",
    "window",
    "key_lengths",
    "key_padding",
    "documents",
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

Serve = Callable[[Tensor, Tensor, Tensor], Tensor | tuple[Tensor, Tensor]]
"""What a backend does with the q, k and v of a problem."""

CONTRACTS = (1,)
"""The versions of the contract above that this release keeps."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a backend can do, as data: reasons, the README's table and the tests all come from here.

    Attributes:
        devices: device types.
        dtypes: dtypes of q, k and v.
        features: the names out of ``FEATURES`` it serves.
        not_on: device type -> features it serves elsewhere and not there.
        head_dim: the largest head_dim, ``None`` without a limit.
        head_dim_min, head_dim_step: the smallest head_dim, and what it must be a multiple of.
        seqlen_min: the fewest queries and keys.
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
    capability: tuple[int, ...] | None = None
    only_on: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    aten: bool = False
    sized: bool = dataclasses.field(init=False, repr=False)
    """Some size is limited."""

    def __post_init__(self) -> None:
        bounds = (self.head_dim, self.head_dim_min, self.head_dim_step, self.seqlen_min, self.batch_min)
        object.__setattr__(self, "sized", bounds != (None, 1, 1, 0, 0))
        for name, kind in (("devices", str), ("dtypes", torch.dtype)):
            values = getattr(self, name)
            if not isinstance(values, tuple) or not all(isinstance(value, kind) for value in values):
                raise TypeError(f"{name} must be a tuple of {kind.__name__}, got {values!r}.")
        if not isinstance(self.features, frozenset):
            raise TypeError(f"features must be a frozenset of names, got {self.features!r}.")
        unknown = sorted(self.features.union(*self.not_on.values()) - frozenset(FEATURES))
        if unknown:
            raise ValueError(f"features must be among {', '.join(FEATURES)}, got {', '.join(unknown)}.")

    def exceeded_on(self, capability: tuple[int, int], features: frozenset[str]) -> list[str]:
        """One phrase for each reason that speaks against a CUDA compute capability, of a GPU that need not be here."""
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


class Backend(abc.ABC):
    """One implementation of attention.

    Subclass it, fill ``name`` and ``limits``, and write ``__call__``. A reason is a short phrase that carries the
    value and the limit, such as ``head_dim=320 (at most 256)``.
    """

    name: str
    limits: Limits
    contract: ClassVar[int] = 1
    """The version of the contract it was written for; a class that says nothing was written for 1."""
    install: ClassVar[str | None] = None
    """How to get it, said when it is not there."""
    remark: ClassVar[str | None] = None
    """What tables say beside the limits, which are not all there is to say."""
    joins_gradients: ClassVar[bool] = False
    """It writes the gradients of q, k and v that lie side by side in one tensor side by side too."""
    compiles: ClassVar[Literal["kinds", "shapes"] | None] = None
    """Compiles a kernel, which takes seconds, for each kind of problem or each shape: tests draw from a fixed grid."""
    tolerance: ClassVar[tuple[float, float]] = (2.0, 3.0)
    """How much worse than a plain computation in the same dtype it may be: the output, and gradients."""

    def why_not_here(self, device: torch.device) -> str | None:
        """Why this machine cannot run it on this device; ``None`` where it can."""
        if self.limits.devices and device.type not in self.limits.devices:
            return f"device {device.type} (only {', '.join(self.limits.devices)})"
        return None

    def why_not_built(self, spec: AttentionSpec) -> str | None:
        """Why the installed build cannot serve a problem the package can; asked only where it is available."""
        return None

    def must_compile(self, spec: AttentionSpec) -> str | None:
        """Why a call would wait for a compiler first; ``None`` where the kernel is there.

        Automatic choice asks, so that a short problem goes to somebody who is ready; who was named compiles.
        """
        return None

    def kernel_key(self, spec: AttentionSpec) -> Hashable:
        """What it compiles for a problem: problems with one answer share a kernel. ``None`` where that has no name."""
        return spec.outline

    def on_disk(self, device: torch.device) -> str | None:
        """Where compiled kernels outlive the process, or what turns that on; ``None`` where there is nothing to say."""
        return None

    def why_not(self, spec: AttentionSpec) -> str | None:
        """Why it cannot serve this problem, out of ``limits``; ``None`` where it can. Pure: it looks at no machine."""
        reasons = self.limits_exceeded(spec)
        return "; ".join(reasons) if reasons else None

    def limits_exceeded(self, spec: AttentionSpec) -> list[str]:
        """One phrase for each limit the problem passes; extend it for the odd rule."""
        limits = self.limits
        reasons: list[str] = []
        if limits.devices and spec.device.type not in limits.devices:
            reasons.append(f"device {spec.device.type} (only {', '.join(limits.devices)})")
        if spec.dtype not in limits.dtypes:
            reasons.append(f"dtype {short(spec.dtype)} (only {', '.join(map(short, limits.dtypes))})")
        served = limits.features
        if spec.device.type in limits.not_on:
            served = served - limits.not_on[spec.device.type]
        if not spec.features <= served:
            missing = [name for name in FEATURES if name in spec.features and name not in served]
            missing += sorted(spec.features - served - frozenset(missing))
            where = f" on {spec.device.type}" if spec.device.type in limits.not_on else ""
            reasons.append(f"no {', no '.join(missing)}{where}")
        if spec.aten_only and not limits.aten:
            reasons.append("not made of PyTorch operators alone (export, torch.func or a tensor subclass wants that)")
        return reasons + self.sizes_exceeded(spec) if limits.sized or not spec.head_dim else reasons

    def sizes_exceeded(self, spec: AttentionSpec) -> list[str]:
        """One phrase for each size out of ``limits``."""
        limits = self.limits
        reasons: list[str] = []
        largest = max(spec.head_dim, spec.head_dim_v)
        if limits.head_dim is not None and largest > limits.head_dim:
            reasons.append(f"head_dim={largest} (at most {limits.head_dim})")
        if min(spec.head_dim, spec.head_dim_v) < limits.head_dim_min:
            reasons.append(f"head_dim={min(spec.head_dim, spec.head_dim_v)} (at least {limits.head_dim_min})")
        if limits.head_dim_step > 1:
            for name, size in (("head_dim", spec.head_dim), ("head_dim_v", spec.head_dim_v)):
                if size % limits.head_dim_step:
                    reasons.append(f"{name}={size} (a multiple of {limits.head_dim_step})")
                    break
        if min(spec.seqlen_q, spec.seqlen_k) < limits.seqlen_min:
            shortest = min(spec.seqlen_q, spec.seqlen_k)
            reasons.append(f"seqlen={shortest} (at least {limits.seqlen_min})")
        if spec.batch < limits.batch_min:
            reasons.append(f"batch={spec.batch} (at least {limits.batch_min})")
        return reasons

    @abc.abstractmethod
    def __call__(self, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor | tuple[Tensor, Tensor]:
        """Attention: (batch, seqlen, heads, head_dim) in, (batch, seqlen_q, heads, head_dim_v) out.

        With ``spec.need_lse`` the pair (out, lse), lse (batch, heads, seqlen_q) in float32 (float64 for float64),
        ``-inf`` for a row that may look at nothing, its sink where there are sinks.
        """

    def prepare(self, spec: AttentionSpec) -> Serve:
        """A function of q, k and v that serves one problem, for several calls of it in a row: the layers of a model.

        What follows from the problem alone may be found here, once for all of them.
        """

        def serve(q: Tensor, k: Tensor, v: Tensor) -> Tensor | tuple[Tensor, Tensor]:
            return self(q, k, v, spec)

        return serve

    def __repr__(self) -> str:
        return f"<backend {self.name}>"

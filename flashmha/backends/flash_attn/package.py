"""The flash-attn packages in common: found, tried out, and told a mask.

Not a backend. ``flash2``, ``flash3`` and ``flash4`` each wrap one package version and share the class below.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...host.machine import HERE, Machine
from ...problem.spec import AttentionSpec
from ...problem.windows import Window
from ...problem.wording import first_line, say_size, summarize_error
from ..base import Backend
from ..rewrites.caches import CACHED

probed_packages: dict[str, FlashAttn] = {}
"""The packages by key, so that a probe takes nothing but constants, as Dynamo wants it."""

EVERY_VERSION = frozenset(
    (
        "backward",
        "causal",
        "window",
        "key_lengths",
        "key_padding",
        "documents",
        "softcap",
        "gqa",
        "lse",
        "deterministic",
    )
)
"""The features that every version of flash-attn serves."""

Functions = tuple[Callable[..., Any], Callable[..., Any]]


class FlashAttn(Backend):
    """A flash-attn package, found and tried out on first use.

    Subclasses say how to import the package (``load``), which keywords its functions must take (``keywords``) and
    how to call it (``__call__``).

    Args:
        functions: the package's two functions, where it is not to be imported.
        cached: its function for a cache of keys, whose items have lengths; forward alone.
        machine: the GPUs that it is tried out on.
    """

    family = "flash_attn"
    judges_by_outline = results_checked = yields_small_weights = True
    distribution: ClassVar[str]
    keywords: ClassVar[tuple[str, ...]]

    def __init__(
        self,
        functions: Functions | None = None,
        cached: Callable[..., Any] | None = None,
        machine: Machine = HERE,
    ) -> None:
        self.probed: dict[int, str | None] = {}
        self.tried: dict[tuple[int, int, torch.dtype, bool, bool], str | None] = {}
        self.functions, self.cached, self.machine = functions, cached, machine
        self.key = self.name if self.name not in probed_packages else f"{self.name} {len(probed_packages)}"
        probed_packages[self.key] = self

    def load(self) -> Functions:
        """Import the package: its dense and its packed ("varlen") function."""
        raise NotImplementedError

    def public(self) -> Callable[..., Any]:
        """The dense function that the package documents, to measure against."""
        return (self.functions or self.load())[0]

    def why_not_here(self, device: torch.device) -> str | None:
        reason = super().why_not_here(device)
        if reason is not None:
            return reason
        return probe(self.key, device.index)

    def runs_packed(self, dtype: torch.dtype, head_dim: int, device: torch.device, windowed: bool = False) -> bool:
        return self.limits.takes_heads(dtype, head_dim) and self.why_not_here(device) is None

    def why_no_cache(self, spec: AttentionSpec) -> str | None:
        """Why the installed package has nothing for keys that lie in a cache."""
        lying = [name for name in CACHED if name in spec.needs]
        if not lying or self.cached is not None:
            return None
        return f"no {', no '.join(lying)} (this build of {self.distribution} has no flash_attn_with_kvcache)"

    def limits_exceeded(self, spec: AttentionSpec) -> list[str]:
        reasons = super().limits_exceeded(spec)
        window = spec.window
        if window is not None:
            assert spec.mask is not None
            if any(isinstance(part, Window) and part.align != "bottom_right" for part in spec.mask.parts):
                reasons.append("a top-left window inside Documents with other offsets for keys (bottom-right only)")
            elif window.left is not None and window.left < 0:
                reasons.append(f"{say_size('window left', window.left)} (at least 0)")
            elif window.right is not None and window.right < 0 and spec.documents is not None:
                reasons.append(f"{say_size('window right', window.right)} inside Documents (at least 0)")
            elif window.right is not None and window.left is not None and window.left + window.right < 0:
                # what is left of it once keys are cut off would be -1, which means unbounded
                bounds = f"{say_size('left', window.left)}, {say_size('right', window.right)}"
                reasons.append(f"window {bounds} (holds no key)")
        return reasons


CAPTURING = "not tried out yet, and a CUDA graph is being captured: run one call before"


def probe(key: str, index: int | None) -> str | None:
    """Why a package does not work on a CUDA device; asked once a device, and only a clean answer is kept."""
    backend = probed_packages[key]
    machine = backend.machine
    if not machine.has_cuda():
        return "no CUDA device (torch.cuda.is_available() is False)"
    index = machine.current() if index is None else index
    if index in backend.probed:
        return backend.probed[index]
    if machine.captures():
        return CAPTURING
    backend.probed[index] = reason = trial(backend, index)
    return reason


probe._dynamo_marked_constant = True  # type: ignore[attr-defined]  # torch.compiler.assume_constant_result, unimported


def trial(backend: FlashAttn, index: int) -> str | None:
    """Find, import and run a package on a device: the reason it does not work, with the exception's own text."""
    wrong = backend.limits.exceeded_on(backend.machine.capability(index), frozenset())
    if wrong:
        return wrong[0]
    try:
        functions = backend.functions or backend.load()
        for function in functions:
            missing = [name for name in backend.keywords if name not in inspect.signature(function).parameters]
            if missing:
                return f"{backend.distribution} {installed_version(backend)} has no argument {', '.join(missing)}"
        backend.functions = functions
        return try_out(backend, backend.machine.device(index), 64, torch.bfloat16, False)
    except Exception as error:  # a broken binary fails in many ways, and each is a reason rather than a crash
        hint = f"; install: {backend.install}" if isinstance(error, ModuleNotFoundError) and backend.install else ""
        return f"{summarize_error(error)}{hint}"


def lacks(
    key: str, index: int | None, head_dim: int, dtype: torch.dtype, backward: bool, grouped: bool = False
) -> str | None:
    """Why a build cannot run a head_dim in a dtype, by trying; asked once each, and only a clean answer is kept.

    A backward of grouped heads is tried by itself: it adds up gradients, and a build may fail there alone
    (kernels-community#1085).
    """
    backend = probed_packages[key]
    machine = backend.machine
    index = machine.current() if index is None else index
    asked = (index, head_dim, dtype, backward, grouped)
    if asked in backend.tried:
        return backend.tried[asked]
    if machine.captures():
        return CAPTURING
    missing = "grouped backward" if grouped else "backward" if backward else "kernel"
    try:
        why = try_out(backend, machine.device(index), head_dim, dtype, backward, grouped)
    except torch.OutOfMemoryError as error:  # says nothing about the build
        return first_line(error)
    except Exception as error:
        why = first_line(error)
    backend.tried[asked] = None if why is None else f"this build has no {missing}: {why}"
    return backend.tried[asked]


lacks._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as above


def try_out(
    backend: FlashAttn,
    device: torch.device,
    head_dim: int,
    dtype: torch.dtype,
    backward: bool,
    grouped: bool = False,
) -> str | None:
    """Run one small forward, and its backward, to the end; what the definition says of the numbers."""
    with clean(device, backward), backend.machine.on(device):
        q, k, v = waves(device, head_dim, dtype)
        k, v = (x[:, :, :1] if grouped else x for x in (k, v))
        found = results(lambda q, k, v: backend(q, k, v, AttentionSpec.of(q, k, v)), q, k, v, backward)
        exact = results(exact_attention, q.double(), k.double(), v.double(), backward)
        for name, one, other in zip(("the output", *(f"the gradient of {x}" for x in "qkv")), found, exact):
            largest = other.abs().max()
            error = ((one.double() - other).abs().max() / largest).item()  # looking waits for the kernel
            if not error < CLOSE:
                return f"{name} of a trial run is off by {error:.3g} of its largest value (at most {CLOSE})"
    return None


CLOSE = 0.05
"""Ten times as much as half precision makes a right kernel err on ``waves``."""


def results(call: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, backward: bool) -> tuple[Tensor, ...]:
    """The output, and the gradients of q, k and v for a cotangent like q."""
    q, k, v = (x.detach().requires_grad_(backward) for x in (q, k, v))
    out = call(q, k, v)
    return (out, *torch.autograd.grad(out, (q, k, v), q.detach())) if backward else (out,)


def exact_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention in plain PyTorch, for one key head or as many as there are query heads."""
    k, v = (x.expand(-1, -1, q.shape[2], -1) for x in (k, v))
    score = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[3])
    return torch.einsum("bhqk,bkhd->bqhd", score.softmax(-1), v)


def waves(device: torch.device, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v to try a kernel on, without random numbers: waves that grow faster and faster look like some."""
    place = torch.arange(16 * 2 * head_dim, device=device, dtype=torch.float64).view(1, 16, 2, head_dim)
    q, k, v = (torch.sin(place.square() * step).to(dtype) for step in (0.37, 0.73, 1.1))
    return q, k, v


@contextlib.contextmanager
def clean(device: torch.device, backward: bool = False) -> Iterator[None]:
    """A state apart from the call that asked: no modes, no autocast, no hooks on saved tensors."""
    from torch.utils._python_dispatch import _disable_current_modes

    with (
        _disable_current_modes(),
        torch.inference_mode(False),
        torch.set_grad_enabled(backward),
        # checkpointing counts what is saved by hooks: the last ones hide those before
        torch.autograd.graph.saved_tensors_hooks(unchanged, unchanged) if backward else contextlib.nullcontext(),
        torch.autocast(device.type, enabled=False),
    ):
        yield


def unchanged(tensor: Tensor) -> Tensor:
    return tensor


def installed_version(backend: FlashAttn) -> str:
    """The package's version, out of its metadata."""
    try:
        return metadata.version(backend.distribution)
    except metadata.PackageNotFoundError:
        return "(no metadata)"

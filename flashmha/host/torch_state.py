"""Questions to PyTorch's state: compiling, exporting, transformed, captured, autocast, ...; the one place that asks.

Where a question is PyTorch's own function under a plainer name, asking it costs no step more.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

is_compiling = torch.compiler.is_compiling
"""Dynamo traces this call, or export."""

is_tracing: Callable[[], bool] = torch.jit.is_tracing
"""``torch.jit.trace`` records on this thread."""

tracing_state = torch._C._get_tracing_state
"""What ``torch.jit.trace`` records into; ``None`` where it does not."""

is_transforming = torch._C._are_functorch_transforms_active
"""A transform of ``torch.func`` is active."""

is_autocasting = torch._C._is_any_autocast_enabled
"""Autocast is on, for some device type."""

is_inference = torch.is_inference_mode_enabled
"""``torch.inference_mode`` is on."""

has_torch_function = torch.overrides.has_torch_function
"""Some of these things want to see the functions of PyTorch that are called with them."""

asks_deterministic = torch._C._get_deterministic_algorithms
"""``torch.use_deterministic_algorithms(True)`` was called, ``warn_only`` or not."""

only_warns = torch._C._get_deterministic_algorithms_warn_only
"""It was called with ``warn_only``."""

allows_efficient, allows_math = torch._C._get_mem_efficient_sdp_enabled, torch._C._get_math_sdp_enabled
allows_flash, allows_cudnn = torch._C._get_flash_sdp_enabled, torch._C._get_cudnn_sdp_enabled
"""The process-wide switch of each of SDPA's kernels is on."""

is_autocast_enabled = torch.is_autocast_enabled
"""Autocast is on for CUDA, or for a device type that is given, as ``nn.TransformerEncoder`` asks."""


def is_dense(thing: object) -> bool:
    """A tensor whose numbers are there to read: neither sparse nor nested, nor torch's CausalBias, which has none."""
    if not isinstance(thing, Tensor) or type(thing).__name__ == "CausalBias":
        return False
    return thing.layout == torch.strided and not thing.is_nested


def readable(tensor: Tensor) -> bool:
    """Looking at a tensor's values waits for no device, breaks no graph and is not itself recorded."""
    return tensor.device.type == "cpu" and eager(tensor)


def insist(condition: Tensor, say: Callable[[], str]) -> None:
    """Raise ``ValueError`` unless a condition holds everywhere; where looking would wait, the device raises later."""
    if readable(condition):
        if not bool(condition.all()):
            raise ValueError(say())
    elif not condition.is_meta:
        torch._assert_async(condition.all(), "a condition of a cache does not hold")  # type: ignore[call-overload]


def eager(tensor: Tensor) -> bool:
    """Operators on a tensor run when they are called, and are not recorded."""
    return (
        type(tensor) in (Tensor, torch.nn.Parameter)
        and not is_compiling()
        and not is_tracing()
        and not traced()
        and not is_wrapped(tensor)
    )


TRACERS = (
    torch._C._TorchDispatchModeKey.FAKE,
    torch._C._TorchDispatchModeKey.PROXY,
    torch._C._TorchDispatchModeKey.FUNCTIONAL,
)


def traced() -> bool:
    """Operators are being recorded rather than run (make_fx, fake tensors); a mode that only watches does not count."""
    if not torch._C._len_torch_dispatch_stack():
        return False
    return any(torch._C._get_dispatch_mode(key) is not None for key in TRACERS)


def is_deterministic() -> bool:
    """``torch.use_deterministic_algorithms(True)`` holds; with ``warn_only`` torch's kernels promise nothing."""
    return asks_deterministic() and not only_warns()


# a constant to Dynamo, which guards both switches
is_deterministic._dynamo_marked_constant = True  # type: ignore[attr-defined]  # torch.compiler.assume_constant_result


def surely(condition: Any) -> bool:
    """A condition on sizes holds; under a compiler only where that is known without binding the graph to it."""
    if not is_compiling():
        return bool(condition)
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # sympy's import takes most of a second

    return bool(statically_known_true(condition))


def are_ordinary(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Ordinary tensors, neither transformed nor compiled: their sizes and flags are all there is to know."""
    if is_compiling() or is_transforming():
        return False
    return type(q) is Tensor and type(k) is Tensor and type(v) is Tensor


PLAIN_TENSORS = ("Tensor", "Parameter", "FakeTensor", "FunctionalTensor")


def needs_aten(*tensors: Tensor) -> bool:
    """PyTorch needs its own operators here: exporting, torch.func transforms, tensor subclasses."""
    if is_compiling():
        return bool(torch.compiler._is_exporting_flag)  # is_exporting() is always True to Dynamo before torch 2.13
    if is_inside_transform() and any(map(is_wrapped, tensors)):
        return True
    for tensor in tensors:
        kind = type(tensor)
        if kind is not Tensor and kind.__name__ not in PLAIN_TENSORS:
            return True
    return False


is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
"""A transform of ``torch.func`` works on a tensor."""


def is_inside_transform() -> bool:
    """A transform of ``torch.func`` runs the present function."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def is_dual() -> bool:
    """Forward-mode differentiation is on."""
    return forward_ad._current_level >= 0


raw_stream: Callable[[int], int] | None = getattr(torch._C, "_cuda_getCurrentRawStream", None)
"""The address of the current stream of a CUDA device, given its index; ``None`` in a build without CUDA."""

current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)
"""The index of the current CUDA device, where a tensor lies on one already."""


def keep_address(tensor: Tensor) -> Tensor:
    """Say of a tensor that it stays where it is, or ``mode="reduce-overhead"`` makes no CUDA graph that writes into it.

    As ``torch._dynamo.mark_static_address``, whose import takes a second: a graph is recorded anew where it moved.
    """
    if not is_compiling():
        tensor._dynamo_static_input_type = "unguarded"  # type: ignore[attr-defined]
    return tensor


def is_stream_capturing() -> bool:
    """A CUDA graph is captured on the current stream; only where there is a CUDA device."""
    return torch.cuda.is_current_stream_capturing()


def is_capturing(device: torch.device) -> bool:
    """A CUDA graph is captured on the current stream, and a device is that stream's."""
    return device.type == "cuda" and torch.cuda.is_available() and is_stream_capturing()


def overrides_functions(tensor: Tensor) -> bool:
    """A tensor's class wants to see the functions of PyTorch that are called with it."""
    kind = type(tensor)
    if kind is Tensor or kind is torch.nn.Parameter:
        return False
    return getattr(kind, "__torch_function__", None) not in (None, torch._C._disabled_torch_function_impl)


AUTOCAST = tuple(kind for kind in ("cpu", "cuda", "xpu", "mps", "hpu") if torch.amp.is_autocast_available(kind))
"""Device types that autocast; asked here, because Dynamo cannot trace the question before torch 2.13."""


def casts_to(device: torch.device) -> torch.dtype | None:
    """The dtype of autocast on a device; ``None`` where it is off."""
    if device.type not in AUTOCAST or not is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def computed_in(tensor: Tensor) -> torch.dtype:
    """The dtype of the products of a tensor, projections and scores: autocast's where it casts, else the tensor's own.

    The one rule for what a layer's heads will be, before they are projected.
    """
    dtype = casts_to(tensor.device)
    if dtype is None or tensor.dtype == torch.float64 or not tensor.dtype.is_floating_point:
        return tensor.dtype
    return dtype


def autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v in the autocast dtype where autocast is on: kernels outside torch do not do it themselves."""
    dtype = casts_to(q.device)
    if dtype is None or q.dtype == k.dtype == v.dtype == dtype:
        return q, k, v
    return tuple([x.to(computed_in(x)) for x in (q, k, v)])  # type: ignore[return-value]


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Autocast off, as it is behind the door, where q, k and v have been cast; nothing is entered where it is off."""
    if casts_to(device) is None:
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False) if is_compiling() else Uncast(device.type)


class Uncast(contextlib.AbstractContextManager[None]):
    """``torch.autocast(kind, enabled=False)`` where it is on, in a tenth of the time: each layer enters it."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __enter__(self) -> None:
        torch.set_autocast_enabled(self.kind, False)

    def __exit__(self, *raised: object) -> None:
        torch.set_autocast_enabled(self.kind, True)


def is_batched(grad: Tensor) -> bool:
    """``is_grads_batched`` walks the graph once for many gradients."""
    return torch._C._functorch.is_legacy_batchedtensor(grad) or is_wrapped(grad)


graph_task: Any = getattr(torch._C, "_current_graph_task_id", None)


def in_backward() -> bool:
    """The autograd engine runs on this thread."""
    return graph_task is not None and graph_task() != -1


@contextlib.contextmanager
def without_fast_path() -> Iterator[None]:
    """Stock as it computes in training: no fused operator, no nested tensors."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)

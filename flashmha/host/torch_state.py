"""Questions to PyTorch: who records or transforms, what autocast and determinism say; the one place that asks."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor


def is_dense(thing: object) -> bool:
    """A tensor whose numbers are there to read: neither sparse nor nested, nor torch's CausalBias, which has none."""
    if not isinstance(thing, Tensor) or type(thing).__name__ == "CausalBias":
        return False
    return thing.layout == torch.strided and not thing.is_nested


def readable(tensor: Tensor) -> bool:
    """Looking at a tensor's values waits for no device, breaks no graph and is not itself recorded."""
    return tensor.device.type == "cpu" and eager(tensor)


def eager(tensor: Tensor) -> bool:
    """Operators on a tensor run when they are called, and nobody records them."""
    return (
        type(tensor) in (Tensor, torch.nn.Parameter)
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not traced()
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
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


asks_deterministic = torch._C._get_deterministic_algorithms
only_warns = torch._C._get_deterministic_algorithms_warn_only


def is_deterministic() -> bool:
    """``torch.use_deterministic_algorithms(True)`` holds; with ``warn_only`` torch's kernels promise nothing."""
    return asks_deterministic() and not only_warns()


# a constant to Dynamo, which guards both switches
is_deterministic._dynamo_marked_constant = True  # type: ignore[attr-defined]  # torch.compiler.assume_constant_result


def surely(condition: Any) -> bool:
    """A condition on sizes holds; under a compiler only where that is known without binding the graph to it."""
    if not torch.compiler.is_compiling():
        return bool(condition)
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # sympy's import takes most of a second

    return bool(statically_known_true(condition))


def plain(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Ordinary tensors that nobody transforms or records: their sizes and flags are all there is to know."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    return type(q) is Tensor and type(k) is Tensor and type(v) is Tensor


PLAIN_TENSORS = ("Tensor", "Parameter", "FakeTensor", "FunctionalTensor")


def needs_aten(*tensors: Tensor) -> bool:
    """PyTorch needs its own operators here: exporting, torch.func transforms, tensor subclasses."""
    if torch.compiler.is_compiling():
        return bool(torch.compiler._is_exporting_flag)  # is_exporting() is always True to Dynamo before torch 2.13
    if torch._C._functorch.peek_interpreter_stack() is not None and any(map(is_wrapped, tensors)):
        return True
    for tensor in tensors:
        kind = type(tensor)
        if kind is not Tensor and kind.__name__ not in PLAIN_TENSORS:
            return True
    return False


def is_wrapped(tensor: Tensor) -> bool:
    """A transform of torch.func works on this tensor."""
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)


AUTOCAST = tuple(kind for kind in ("cpu", "cuda", "xpu", "mps", "hpu") if torch.amp.is_autocast_available(kind))
"""Device types that autocast; asked here, because Dynamo cannot trace the question before torch 2.13."""


def casts_to(device: torch.device) -> torch.dtype | None:
    """The dtype of autocast on a device; ``None`` where it is off."""
    if device.type not in AUTOCAST or not torch.is_autocast_enabled(device.type):
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
    return torch.autocast(device.type, enabled=False) if torch.compiler.is_compiling() else Uncast(device.type)


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
    functorch = torch._C._functorch
    return functorch.is_legacy_batchedtensor(grad) or functorch.is_functorch_wrapped_tensor(grad)


task: Any = getattr(torch._C, "_current_graph_task_id", None)


def in_backward() -> bool:
    """The autograd engine runs on this thread."""
    return task is not None and task() != -1

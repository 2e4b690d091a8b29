"""The gate: a contestant that computes something else is not timed.

On the very tensors that are timed, an output and every gradient must keep the rule of parity (``tolerance``).
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import math
import time
from typing import Any

import torch
from torch import Tensor, nn

from ..backends import Backend, Call, record
from ..backends.parity import AGAIN, allowed_error
from ..host.clock import host_seconds, peak_bytes, wait
from ..problem.errors import NoBackendError
from .capture import capture
from .inputs import Inputs
from .peers import Contestant
from .reference import NamedTensors, Reference


class Seat:
    """A contestant at the tensors of a case, with leaves of its own; a call computes the case once."""

    def __init__(self, contestant: Contestant, inputs: Inputs) -> None:
        case = inputs.case
        self.contestant, self.inputs = contestant, inputs.to(inputs.query.dtype)
        self.module = build_module(contestant, inputs)
        self.leaves: dict[str, Tensor] = {}
        self.parameters: dict[str, Tensor] = {}
        if case.mode == "train":
            self.leaves, self.parameters = self.inputs.leaves(), dict(self.module.named_parameters())
        called: Any = self.module  # ``module.compile()`` leaves a module of torch's own, such as stock, as it is
        if contestant.how == "compiled":
            called = torch.compile(self.module, dynamic=False)
        elif contestant.how == "reduced":
            called = torch.compile(self.module, dynamic=False, mode="reduce-overhead")
        self.call = contestant.bind(called, self.inputs)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.captured: NamedTensors = {}

    def __call__(self) -> None:
        self.run(keep=False)
        if self.graph is None:
            self.clear()

    def run(self, keep: bool = True) -> NamedTensors:
        """Compute the case, reading the weights it asks for; gradients stay on the leaves.

        Unless weights are to be kept they are gone during the backward, as when they are only looked at.
        """
        if self.contestant.how != "graph":
            return self.compute(keep)
        if self.graph is None:
            self.capture()
        assert self.graph is not None
        self.graph.replay()
        return self.captured

    def compute(self, keep: bool = True) -> NamedTensors:
        if self.inputs.case.autocast is None:
            out, weights = self.call()
        else:  # as in a program: the forward alone, and the copies of parameters are made anew
            with self.inputs.casting():
                out, weights = self.call()
        named = {"out": out}
        if weights is not None:
            weights = weights.detach()
            weights.sum()
            if keep:
                named["weights"] = weights
            del weights
        if self.leaves:
            out.backward(self.inputs.cotangent)
        return named

    def capture(self) -> None:
        """Put the call into a CUDA graph, gradients included: every replay writes into the same tensors."""
        self.graph, self.captured = capture(self.compute, clear=self.clear)

    def clear(self) -> None:
        for leaf in (*self.leaves.values(), *self.parameters.values()):
            leaf.grad = None

    def collect(self, named: NamedTensors) -> NamedTensors:
        """The results of ``run``: plain tensors, the gradients among them."""
        plain = {name: x.detach() + 0.0 for name, x in named.items()}
        gradients = {name: self.gradient(leaf) for name, leaf in self.leaves.items()}
        gradients |= self.translate_back({name: self.gradient(x) for name, x in self.parameters.items()})
        plain |= {f"gradient of {name}": gradient for name, gradient in gradients.items()}
        if self.graph is None:
            self.clear()
        return plain

    def gradient(self, leaf: Tensor) -> Tensor:
        if leaf.grad is None:
            return torch.zeros_like(leaf)
        # the next call may write into memory of its graphs
        return leaf.grad.clone() if self.contestant.how == "reduced" else leaf.grad

    def translate_back(self, gradients: NamedTensors) -> NamedTensors:
        """The gradients of the parameters by which the case knows them, from those of the contestant's own."""
        if not gradients:
            return {}
        known = {name: x.detach().requires_grad_() for name, x in self.inputs.state.items()}
        own = self.contestant.translate(known, self.inputs.case)
        back = torch.autograd.grad([own[name] for name in gradients], list(known.values()), list(gradients.values()))
        return dict(zip(known, back))


def build_module(contestant: Contestant, inputs: Inputs) -> nn.Module:
    """A contestant's module with the parameters of a case."""
    case, device = inputs.case, inputs.query.device
    with device:  # parameters are drawn ten times faster on a GPU
        module = contestant.build(case).to(device, inputs.query.dtype)
    module.load_state_dict(contestant.translate(inputs.state, case))
    return module.train(case.mode == "train")


def admit(contestant: Contestant, inputs: Inputs, reference: Reference) -> tuple[Seat | None, dict[str, Any]]:
    """A seat for a contestant that computes the case rightly, and what is to be reported of it.

    ``status`` is ``ok``, ``refused``, ``failed`` or ``wrong``, the last three with a ``reason``; only the first has a
    seat. A peer that raises cannot compute the case, and neither can one that the memory is too small for: that is
    ``refused``, with ``raised``. One of ours that raises has ``failed``.
    """
    row: dict[str, Any] = {"ours": contestant.ours, "status": "refused"}
    if contestant.yardstick:
        row["yardstick"] = True
    why = contestant.refuses(inputs.case)
    if why is not None:
        return None, {**row, "reason": why}
    try:
        seat, named, calls = tried(contestant, inputs, row)
    except NoBackendError as error:
        return None, {**row, "reason": "; ".join(f"{name}: {why}" for name, why in error.reasons.items())}
    except Exception as error:  # whatever a peer or a third party raises must not end the run of the others
        row |= {"raised": True, "reason": f"{type(error).__name__}: {error}"[:300]}
        if contestant.ours and not isinstance(error, torch.OutOfMemoryError):
            row["status"] = "failed"
        error.__traceback__ = None  # it holds the tensors of the attempt
        sweep(inputs.query.device)
        return None, row
    if calls:
        row["backend"] = ", ".join(sorted({call.backend for call in calls}))
    real = {}
    if not contestant.every_row and inputs.hidden is not None:
        real = {"out": inputs.turned(~inputs.hidden), "weights": ~inputs.hidden}
    faults, row["error"] = find_faults(named, reference, real)
    for place in range(AGAIN):  # the plain answer may have erred little by luck
        if faults:
            faults = find_faults(named, dataclasses.replace(reference, plain=reference.again(place)), real)[0]
    if faults:
        return None, {**row, "status": "wrong", "reason": "; ".join(faults)}
    return seat, {**row, "status": "ok"}


def tried(contestant: Contestant, inputs: Inputs, row: dict[str, Any]) -> tuple[Seat, NamedTensors, list[Call]]:
    """A contestant's first calls: one that may compile, one whose memory counts, and how long the host takes."""
    device = inputs.query.device
    # what is compiled inside of record would be compiled once more outside
    recording: contextlib.AbstractContextManager[list[Call]] = contextlib.nullcontext([])
    if contestant.how == "eager":
        recording = record()
    seat = Seat(contestant, inputs)
    with torch.inference_mode(not seat.leaves), contestant.setting():
        began = time.perf_counter()
        with recording as calls:
            seat()
            wait(device)
        row["first_call_ms"] = float(f"{1e3 * (time.perf_counter() - began):.4g}")
        peak = peak_bytes(seat, device)
        if seat.graph is None:  # a graph holds its memory from the first call on
            row["peak_bytes"] = peak
        named = seat.collect(seat.run())
        if device.type == "cuda":
            row["host_seconds"] = float(f"{host_seconds(seat, device):.4g}")
    return seat, named, calls


def sweep(device: torch.device) -> None:
    """Give back memory that is no longer held; the collector is off while a run goes on."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def find_faults(
    named: NamedTensors, reference: Reference, real: NamedTensors | None = None
) -> tuple[list[str], dict[str, float]]:
    """What is wrong with an answer, and its errors relative to the exact one (of the worst gradient).

    ``real`` says which rows of ``out`` and ``weights`` count, by their first two axes; else all do.
    """
    faults: list[str] = []
    errors: dict[str, float] = {}
    largest = max(exact.norm().item() for exact in reference.exact.values())
    for name, exact in reference.exact.items():
        actual, plain = named[name], reference.plain[name]
        if real and name in real:
            actual, exact, plain = (x[real[name]] for x in (actual, exact, plain))
        if actual.shape != exact.shape or actual.dtype != plain.dtype:
            faults.append(f"{name} is {actual.dtype} {tuple(actual.shape)}, not {plain.dtype} {tuple(exact.shape)}")
            continue
        gradient = name.startswith("gradient")
        target = exact.to(actual.dtype).double()
        off, allowed = actual.double() - target, (plain.double() - target).abs().max().item()
        bound = allowed_error(name, allowed, target.abs().max().item(), reference.eps, Backend.tolerance)
        if not off.abs().max().item() <= bound:  # a NaN is not
            faults.append(f"{name} is off by {off.abs().max().item():.3g}, at most {bound:.3g} allowed")
        short = "gradient" if gradient else name
        length = exact.double().norm().item()
        relative = (actual.double() - exact).norm().item() / max(length, 1e-30)
        # else it is among the faults, and JSON knows no such number; nothing is relative to a gradient that cancels
        if math.isfinite(relative) and length > 1e-12 * largest:
            errors[short] = max(errors.get(short, 0.0), float(f"{relative:.3g}"))
    return faults, errors

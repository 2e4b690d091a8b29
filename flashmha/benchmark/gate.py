"""The gate: nobody is timed who computes something else.

On the very tensors that are timed, an output and every gradient must keep the rule of parity (``tolerance``).
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from typing import Any

import torch
from torch import Tensor

from ..backends import Backend, Call, record
from ..errors import NoBackendError
from ..tolerance import allowed_error
from .inputs import Inputs
from .machine import peak_bytes
from .peers import Attention, Contestant, Sdpa, Stock, StockBest

Named = dict[str, Tensor]
"""``out``, ``weights`` where they are read, and ``gradient of ...`` for every leaf."""


class Seat:
    """A contestant at the tensors of a case; a call computes the case once.

    Attributes:
        first: seconds the first call took.
    """

    first: float

    def __init__(self, contestant: Contestant, inputs: Inputs) -> None:
        case = inputs.case
        self.contestant, self.inputs = contestant, inputs
        self.module = contestant.build(case).to(inputs.query.device, inputs.query.dtype)
        self.module.load_state_dict(inputs.state)
        self.module.train(case.mode == "train")
        self.leaves = {**inputs.leaves(), **dict(self.module.named_parameters())} if case.mode == "train" else {}
        if contestant.compiled:
            self.module.compile(dynamic=False)

    def __call__(self) -> None:
        self.run()
        for leaf in self.leaves.values():
            leaf.grad = None

    def run(self) -> Named:
        """Compute the case, reading the weights it asks for; gradients stay on the leaves."""
        out, weights = self.contestant.call(self.module, self.inputs)
        named = {"out": out}
        if weights is not None:
            named["weights"] = weights.detach()
            named["weights"].sum()
        if self.leaves:
            out.backward(self.inputs.cotangent)
        return named

    def collect(self, named: Named) -> Named:
        """What ``run`` left behind: plain tensors, the gradients among them."""
        plain = {name: x.detach() + 0.0 for name, x in named.items()}
        for name, leaf in self.leaves.items():
            plain[f"gradient of {name}"] = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
            leaf.grad = None
        return plain


@dataclasses.dataclass(frozen=True)
class Reference:
    """The exact answer of a case, and a plain one in its dtype."""

    exact: Named
    plain: Named

    @classmethod
    def of(cls, inputs: Inputs) -> Reference:
        """The stock layer (at level core: SDPA) in float64, and by the definition in the case's dtype.

        On CUDA in float32 and by the fused kernel: the definition does not fit the memory at the lengths timed there.
        """
        cuda, layer = inputs.query.device.type == "cuda", inputs.case.level == "layer"
        fused: Contestant = StockBest() if layer else Sdpa()
        definition: Contestant = Stock() if layer else Attention("definition", "naive")
        wide = inputs.to(torch.float32 if cuda else torch.float64)
        return cls(answer(fused, wide), answer(fused if cuda else definition, inputs))


def answer(contestant: Contestant, inputs: Inputs) -> Named:
    seat = Seat(contestant, inputs)
    seat.module.train()  # off stock's fast path
    with torch.inference_mode(not seat.leaves):
        return seat.collect(seat.run())


def admit(contestant: Contestant, inputs: Inputs, reference: Reference) -> tuple[Seat | None, dict[str, Any]]:
    """A seat for a contestant that computes the case rightly, and what is to be reported of it.

    ``status`` is ``ok``, ``refused`` or ``failed`` (with ``reason``), or ``wrong``; only the first has a seat.
    """
    row: dict[str, Any] = {"ours": contestant.ours, "status": "refused"}
    why = contestant.refuses(inputs.case)
    if why is not None:
        return None, {**row, "reason": why}
    named: Named = {}
    try:
        seat = Seat(contestant, inputs)
        # what is compiled inside of record would be compiled once more outside
        recording: contextlib.AbstractContextManager[list[Call]] = contextlib.nullcontext([])
        if not contestant.compiled:
            recording = record()
        with torch.inference_mode(not seat.leaves), recording as calls:
            if contestant.compiled:
                seat()
            device, began = inputs.query.device, time.monotonic()
            row["peak_bytes"] = peak_bytes(lambda: named.update(seat.run()), device)
            seat.first = time.monotonic() - began
            named = seat.collect(named)
    except NoBackendError as error:
        return None, {**row, "reason": "; ".join(f"{name}: {why}" for name, why in error.reasons.items())}
    except Exception as error:  # a peer's or a third party's: it must not end the run of the others
        for leaf in inputs.leaves().values():
            leaf.grad = None
        return None, {**row, "status": "failed", "reason": f"{type(error).__name__}: {error}"[:300]}
    if calls:
        row["backend"] = ", ".join(sorted({call.backend for call in calls}))
    real = None if contestant.every_row or inputs.hidden is None else ~inputs.hidden
    faults, row["error"] = judge(named, reference, real)
    if faults:
        return None, {**row, "status": "wrong", "reason": "; ".join(faults)}
    return seat, {**row, "status": "ok"}


def judge(named: Named, reference: Reference, real: Tensor | None = None) -> tuple[list[str], dict[str, float]]:
    """What is wrong with an answer, and its errors relative to the exact one (of the worst gradient).

    ``real`` (batch, seqlen_q) says which rows of ``out`` and ``weights`` count.
    """
    faults: list[str] = []
    errors: dict[str, float] = {}
    for name, exact in reference.exact.items():
        actual, plain = named[name], reference.plain[name]
        if real is not None and name in ("out", "weights"):
            actual, exact, plain = actual[real], exact[real], plain[real]
        if actual.shape != exact.shape or actual.dtype != plain.dtype:
            faults.append(f"{name} is {actual.dtype} {tuple(actual.shape)}, not {plain.dtype} {tuple(exact.shape)}")
            continue
        gradient = name.startswith("gradient")
        target = exact.to(actual.dtype).double()
        off, allowed = actual.double() - target, (plain.double() - target).abs().max().item()
        largest, eps = target.abs().max().item(), torch.finfo(actual.dtype).eps
        bound = allowed_error(name, allowed, largest, eps, Backend.tolerance)
        if not off.abs().max().item() <= bound:  # a NaN is not
            faults.append(f"{name} is off by {off.abs().max().item():.3g}, at most {bound:.3g} allowed")
        short = "gradient" if gradient else name
        relative = ((actual.double() - exact).norm() / exact.double().norm().clamp_min(1e-30)).item()
        errors[short] = max(errors.get(short, 0.0), float(f"{relative:.3g}"))
    return faults, errors

"""The suite of ``flashmha tune``: every backend timed on a grid of problems."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends import get
from ..backends.choice.choose import reason
from ..backends.choice.ranking import LAST, keys
from ..backends.choice.tuned import SCHEMA
from ..functional import attention
from ..host.clock import seconds
from ..host.machine import graphics
from ..problem.masks import Mask
from ..problem.spec import AttentionSpec
from ..problem.wording import summarize_error
from ..version import __version__
from .capture import capture
from .environment import commit, environment
from .gate import sweep
from .grid import STEPS, Grid, GridCell
from .inputs import Inputs, draw_inputs
from .rounds import Timer, take_turns

MOST_CALLS = 100
"""Of one turn, at most."""
CHECKED = 64
"""Queries of a cell whose answer is held against the definition."""
TOLERATED = 0.05
"""How far from the definition an answer may lie, as a share of its largest value. ``verify`` measures precision; this
keeps a kernel that computes something else from being ranked."""
IN_A_GRAPH = 10
"""Calls of a CUDA graph."""
SPENT, STOPPED = "the budget is spent", "stopped by hand"


@dataclasses.dataclass(frozen=True)
class Tuning:
    """The measurement to make: cells of a grid, backends in the order of the list, a device, a seed."""

    grid: Grid
    cells: Sequence[GridCell]
    backends: Sequence[str]
    dtype: str
    device: torch.device
    seed: int = 0


def measure_grid(tuning: Tuning, advance: Callable[[], None]) -> dict[str, Any]:
    """Measure every cell that the budget allows; everything known afterwards, ready for JSON."""
    began, date = time.monotonic(), datetime.datetime.now(datetime.timezone.utc)
    measured: list[dict[str, Any]] = []
    dropped: dict[str, str] = {}
    env, budget = environment(tuning.device), tuning.grid.budget
    for cell in tuning.cells:
        if STOPPED in dropped.values():
            dropped[str(cell)] = STOPPED
        elif time.monotonic() - began < budget:
            try:
                measured.append(measure_cell(cell, tuning, budget / len(tuning.cells)))
                sweep(tuning.device)
            except RuntimeError as error:  # no memory for its tensors, or a kernel has left the GPU in ruins
                dropped[str(cell)] = summarize_error(error)
            except KeyboardInterrupt:  # what was measured before is kept
                dropped[str(cell)] = STOPPED
        else:
            dropped[str(cell)] = SPENT
        advance()
    gpu, capability = graphics(tuning.device.index) if tuning.device.type == "cuda" else (None, None)
    return {
        "schema": SCHEMA,
        "command": "tune",
        "flashmha": __version__,
        **commit(),
        "date": date.date().isoformat(),
        "seconds": round(time.monotonic() - began, 1),
        "device": tuning.device.type,
        "gpu": gpu,
        "capability": capability,
        "dtype": tuning.dtype,
        "rounds": tuning.grid.rounds,
        "env": env,
        "dropped": dropped,
        "cells": measured,
    }


def measure_cell(cell: GridCell, tuning: Tuning, share: float) -> dict[str, Any]:
    """A cell in a share of the budget: microseconds of a call, their spread, and why some backends have none."""
    trial = Trial.of(cell, tuning)
    spec, definition = trial.spec(), Definition(cell, trial, tuning)
    absent: dict[str, str] = {}
    timers: dict[str, Timer] = {}
    for name in tuning.backends:
        try:
            why = reason(get(name), spec) or too_large(name, spec) or definition.fault(trial.run(name))  # compiles, too
            if why is None:
                timers[name] = trial.timer(name)
        except Exception as error:  # a kernel may raise anything, and is then not the fastest
            why = summarize_error(error)
        if why is not None:
            absent[name] = why
    times = take_turns(
        timers,
        block=tuning.grid.block,
        most=MOST_CALLS,
        rounds=tuning.grid.rounds,
        until=time.monotonic() + share,
        seed=tuning.seed,
        failed=lambda name, error: absent.update({name: summarize_error(error)}),
    )
    return {
        **dataclasses.asdict(cell),
        "keys": keys(spec),
        "in_graphs": trial.in_graphs,
        "absent": absent,
        "us": {name: float(f"{statistics.median(each) * 1e6:.5g}") for name, each in times.items()},
        "spread": {name: float(f"{half_spread(each):.3g}") for name, each in times.items()},
    }


@dataclasses.dataclass(frozen=True)
class Trial:
    """The tensors of a cell, q, k and v as views of one projection, and its mask, one object for all calls.

    Calls ``in_graphs`` are replayed from CUDA graphs: a step takes the host longer than the GPU, and the time of a
    host says nothing of kernels.
    """

    inputs: Inputs
    mask: Mask | None
    in_graphs: bool

    @classmethod
    def of(cls, cell: GridCell, tuning: Tuning) -> Trial:
        inputs = draw_inputs(cell.case(tuning.dtype), tuning.device, tuning.seed, one_projection=True)
        in_graphs = cell.kind in STEPS and tuning.device.type == "cuda"
        return cls(inputs, cell.mask(tuning.device, tuning.seed), in_graphs)

    def spec(self) -> AttentionSpec:
        return AttentionSpec.of(self.inputs.query, self.inputs.key, self.inputs.value, mask=self.mask)

    def run(self, backend: str) -> list[Tensor]:
        """The output, and the gradients of q, k and v where they are wanted."""
        qkv = (self.inputs.query, self.inputs.key, self.inputs.value)
        out = attention(*qkv, mask=self.mask, backend=backend)
        assert isinstance(out, Tensor)
        return [out, *torch.autograd.grad(out, qkv, self.inputs.cotangent)] if out.requires_grad else [out]

    def timer(self, backend: str) -> Timer:
        """What tells the seconds of one of some calls in a row."""
        run, device = functools.partial(self.run, backend), self.inputs.query.device
        if not self.in_graphs:
            return lambda calls: seconds(run, calls, device)
        graph, _ = capture(run, IN_A_GRAPH)
        return lambda calls: seconds(graph.replay, calls, device) / IN_A_GRAPH


class Definition:
    """The definition's answer at the end of a cell, and the gradient of those queries, in float32."""

    def __init__(self, cell: GridCell, trial: Trial, tuning: Tuning) -> None:
        self.end, inputs, training = cell.end(CHECKED), trial.inputs, cell.mode == "train"
        q = self.part(inputs.query).requires_grad_(training)
        k, v = (x.detach()[:1, -self.end.seqlen_k :, :1].float() for x in (inputs.key, inputs.value))
        out = attention(q, k, v, mask=self.end.mask(tuning.device, tuning.seed), backend=LAST)
        assert isinstance(out, Tensor)
        self.parts = [out.detach()]
        if training:
            self.parts += torch.autograd.grad(out, q, self.part(inputs.cotangent))

    def part(self, x: Tensor) -> Tensor:
        """The queries and heads that are compared."""
        return x.detach()[:1, -self.end.seqlen_q :, : self.end.heads].float()

    def error(self, answer: Sequence[Tensor]) -> float:
        """The distance of an answer from it, as a share of its largest value."""
        worst = 0.0
        for exact, tensor in zip(self.parts, answer):
            away = (self.part(tensor) - exact).abs().max()
            worst = max(
                worst, float(away / exact.abs().max().clamp(min=1e-30)), key=lambda x: math.inf if x != x else x
            )
        return worst

    def fault(self, answer: Sequence[Tensor]) -> str | None:
        """The reason why an answer is something else than the definition's."""
        error = self.error(answer)
        if error <= TOLERATED:
            return None
        return f"wrong: {error:.3g} of the largest value away from the definition (at most {TOLERATED})"


def half_spread(times: Sequence[float]) -> float:
    """Half the width of the middle half, as a share of the median."""
    if len(times) < 2:
        return 0.0
    low, median, high = statistics.quantiles(times, n=4, method="inclusive")
    return (high - low) / 2 / median


def too_large(name: str, spec: AttentionSpec) -> str | None:
    """The reason why the definition, which holds several float32 tensors of every score, must not be tried here."""
    if name != LAST:
        return None
    needed = 6 * 4 * spec.batch * spec.heads * spec.seqlen_q * spec.seqlen_k
    free = torch.cuda.mem_get_info(spec.device)[0] if spec.device.type == "cuda" else 2**31
    return None if needed < free / 2 else f"needs about {needed / 2**30:.0f} GiB"

"""Texts written in turns: each contestant a few tokens, then the next, so that a ratio is formed at one length."""

from __future__ import annotations

import contextlib
import dataclasses
import random
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends import Call, record
from ..host.clock import seconds
from .cases import Case
from .decoders import Writer
from .gate import build_module, find_faults, sweep
from .inputs import Inputs, draw_inputs
from .peers import Contestant
from .reference import Reference

PART = 16
"""Tokens of a turn."""
TEXTS, SURE = 3, 20.0
"""Texts at most; one, however long it takes, and others while so many seconds have not passed."""
ROWS = 2
"""Rows of the batch that are compared with the definition."""

WriterRow = dict[str, Any]


def write_in_turns(
    case: Case, taking_part: Sequence[Contestant], device: torch.device, seed: int
) -> dict[str, WriterRow]:
    """What is to be reported of every contestant: ``seconds`` of a token, turn by turn, and ``cache_bytes``.

    Every output is compared with the definition afterwards: the text that is timed is the one that is judged.
    """
    inputs, rows, writers = draw_inputs(case, device, seed), {}, {}
    with torch.inference_mode():
        for one in taking_part:
            writer, rows[one.name] = ready(one, inputs)
            if writer is not None:
                writers[one.name] = writer
        samples: dict[str, list[float]] = {name: [] for name in writers}
        shuffler = random.Random(seed)
        if device.type == "cuda":  # cuDNN plans for each new length, some 50 ms of a process once
            write_text(case, writers, shuffler, {name: [] for name in writers}, device)
        began = time.monotonic()
        found = write_text(case, writers, shuffler, samples, device)
        for _ in range(TEXTS - 1):
            if time.monotonic() < began + SURE:
                write_text(case, writers, shuffler, samples, device)
    reference = Reference.of(first_rows(inputs, ROWS))
    for name, (places, outs) in found.items():
        faults, rows[name]["error"] = compare(places, outs, reference)
        rows[name] |= {"status": "wrong", "reason": "; ".join(faults)} if faults else {"seconds": samples[name]}
    return rows


def ready(one: Contestant, inputs: Inputs) -> tuple[Writer | None, WriterRow]:
    """A writer that has written two tokens, so that all is compiled, and what is known of it."""
    row: WriterRow = {"ours": one.ours, "status": "refused"}
    why = one.refuses(inputs.case)
    if why is not None:
        return None, {**row, "reason": why}
    calls: list[Call] = []
    recording = record() if one.how == "eager" and one.ours else contextlib.nullcontext(calls)
    inner: Any = getattr(one, "inner", one)
    try:
        began = time.perf_counter()
        with recording as calls:
            writer: Writer = inner.writer(build_module(one, inputs), inputs, one.how)
            writer.begin()
            for place in range(2):
                writer.write(range(place, place + 1))
        row["first_call_ms"] = float(f"{1e3 * (time.perf_counter() - began):.4g}")
    except Exception as error:  # whatever a peer raises must not end the run of the others
        row |= {"raised": True, "reason": f"{type(error).__name__}: {error}"[:300]}
        row["status"] = "failed" if one.ours else "refused"
        error.__traceback__ = None  # it holds the tensors of the attempt
        sweep(inputs.query.device)
        return None, row
    if calls:
        row["backend"] = ", ".join(sorted({call.backend for call in calls}))
    return writer, {**row, "status": "ok", "cache_bytes": writer.nbytes}


Outputs = dict[str, tuple[list[int], list[Tensor]]]
"""By contestant the places that were computed, and the first rows of their outputs."""


def write_text(
    case: Case,
    writers: dict[str, Writer],
    shuffler: random.Random,
    samples: dict[str, list[float]],
    device: torch.device,
) -> Outputs:
    """One text by each contestant, a part after the other, each time in a new order."""
    written: Outputs = {name: ([], []) for name in writers}
    for writer in writers.values():
        writer.begin()
    took: dict[str, dict[int, float]] = {name: {} for name in writers}
    parts = range(0, case.seqlen_q, PART)
    for number, start in enumerate(parts):
        places = range(start, min(start + PART, case.seqlen_q))
        order = [name for name, writer in writers.items() if number % writer.every == 0 or number == len(parts) - 1]
        shuffler.shuffle(order)
        for name in order:
            done: list[tuple[range, list[Tensor]]] = []
            spent = seconds(lambda: done.append(writers[name].write(places)), 1, device)  # noqa: B023  called at once
            computed, outs = done[0]
            took[name][number] = spent / len(computed)
            written[name][0].extend(computed)
            written[name][1].extend(out[:ROWS].clone() for out in outs)
    for name, known in took.items():
        samples[name] += [float(f"{between(known, number):.5g}") for number in range(len(parts))]
    return written


def between(known: dict[int, float], number: int) -> float:
    """A number, or what lies on the line between its neighbours that are known."""
    if number in known:
        return known[number]
    before, after = max(x for x in known if x < number), min(x for x in known if x > number)
    return known[before] + (known[after] - known[before]) * (number - before) / (after - before)


def first_rows(inputs: Inputs, rows: int) -> Inputs:
    """The case of the first rows of a batch."""
    case = dataclasses.replace(inputs.case, batch=min(rows, inputs.case.batch))
    query, key = inputs.query[:rows], inputs.key[:rows]
    return dataclasses.replace(inputs, case=case, query=query, key=key, value=key, cotangent=inputs.cotangent[:rows])


def compare(places: list[int], outs: list[Tensor], reference: Reference) -> tuple[list[str], dict[str, float]]:
    """What is wrong with the outputs at some places, and their error."""
    exact, plain = ({"out": named["out"][:, places]} for named in (reference.exact, reference.plain))
    return find_faults({"out": torch.cat(outs, dim=1)}, dataclasses.replace(reference, exact=exact, plain=plain))

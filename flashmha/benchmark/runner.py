"""The runner: correct first, then rounds in which every contestant takes a turn."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..host.clock import quiet_machine, seconds
from ..version import __version__
from .cases import Case
from .environment import Canary, commit, environment
from .gate import Seat, admit, sweep
from .inputs import Inputs, draw_inputs
from .lineup import all_contestants, contestants, shown_by_name
from .peers import CONTROL, HEADLINES, Contestant
from .reference import Reference
from .rounds import FEWEST, take_turns
from .verdicts import judge_cases, middle
from .writing import write_in_turns

RUN_SCHEMA = 1
TURN_SECONDS = {"cpu": 0.02, "cuda": 0.01}
"""Seconds that the calls of one turn take together, at least."""

IDLE = {"cpu": 6e9, "cuda": 4e12}
"""What a case costs beside its work, in the operations that a turn could do meanwhile."""

DRIFT, REPEATS = 0.03, 0.3
"""How far a round's canary may lie from the median, and how many rounds, of those asked for, may be repeated."""

UNSTABLE_FLOOR = {"cpu": 0.1, "cuda": 0.05}
"""The noise floor from which a run proves nothing."""

Tell = Callable[[str], None]
"""Called with a line a case, once that is done."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """The cases to measure, and the time for them.

    Attributes:
        cases: reported in this order; the headline cases run first.
        device: where.
        rounds: turns of every contestant in a case.
        budget: seconds in all; rounds are dropped first, down to ``FEWEST``, then cases.
        seed: of the data and of the order in a round.
        peers, backends: as in ``lineup.contestants``.
        options: how the command line chose all this, for the record.
    """

    cases: Sequence[Case]
    device: torch.device
    rounds: int = 12
    budget: float = 360.0
    seed: int = 0
    peers: Sequence[str] | None = None
    backends: Sequence[str] | None = None
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


def run(plan: Plan, tell: Tell) -> dict[str, Any]:
    """Measure a plan; everything known afterwards, ready for JSON."""
    every, absent = all_contestants(plan.device)
    began, utc = time.monotonic(), datetime.datetime.now(datetime.timezone.utc)
    measured: list[dict[str, Any]] = []
    dropped: list[str] = []
    stopped = False
    canary = Canary(plan.device)
    with quiet_machine(plan.device), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        queue = sorted(plan.cases, key=lambda case: not case.headline)
        for place, case in enumerate(queue):
            left = plan.budget - (time.monotonic() - began)
            if left <= 0 or stopped:
                dropped.append(case.id)
                tell(f"{case.id}: dropped, {'stopped' if stopped else 'the budget is spent'}")
                continue
            share = effort(case, plan) / sum(effort(other, plan) for other in queue[place:])
            taking_part = contestants(every, case, plan.device, plan.peers, plan.backends)
            try:
                measured.append(measure(case, taking_part, plan, canary, began + plan.budget, share))
                tell(f"{case.id}: {spoken(measured[-1])}")
            except KeyboardInterrupt:  # what was measured before is kept
                stopped = True
                dropped.append(case.id)
                tell(f"{case.id}: stopped")
        env = environment(plan.device)
    places = [case.id for case in plan.cases]
    measured.sort(key=lambda row: places.index(row["id"]))
    judged = judge_cases(measured)
    floor = judged["noise_floor"]
    drifted = [case["id"] for case in measured if case["drifted"]]
    return {
        "schema": RUN_SCHEMA,
        "run": {
            "version": __version__,
            **commit(),
            "options": plan.options,
            "utc": utc.isoformat(timespec="seconds"),
            "seconds": round(time.monotonic() - began, 1),
            "rounds": plan.rounds,
            "budget": plan.budget,
            "seed": plan.seed,
        },
        "env": env,
        "absent": absent,
        "named": shown_by_name(every, plan.backends),
        "dropped": dropped,
        "stopped": stopped,
        "unstable": bool(drifted) or floor > UNSTABLE_FLOOR.get(plan.device.type, 0.1),
        **judged,
        "cases": measured,
    }


def spoken(case: dict[str, Any]) -> str:
    """A measured case in a line: rounds, and what was wrong or raised."""
    rows = case["contestants"]
    rounds = max((len(row.get("seconds", ())) for row in rows.values()), default=0)
    bad = [f"{name} {row['status']}" for name, row in rows.items() if row["status"] == "wrong" or "raised" in row]
    return ", ".join([f"{rounds} round{'s' * (rounds != 1)}", *bad])


def effort(case: Case, plan: Plan) -> float:
    """A case's share of a budget: its work, and what every turn costs at least."""
    return case.flop + IDLE.get(plan.device.type, IDLE["cpu"])


def measure(
    case: Case, taking_part: Sequence[Contestant], plan: Plan, canary: Canary, end: float, share: float
) -> dict[str, Any]:
    """One case: every contestant through the gate, then the rounds, for a share of what is left until ``end``."""
    if case.level == "decoder":
        return measure_decoders(case, taking_part, plan, canary)
    problems: dict[Case, tuple[Inputs, Reference]] = {}
    rows: dict[str, dict[str, Any]] = {}
    seats: dict[str, Seat] = {}
    for contestant in taking_part:
        problem = contestant.problem(case)
        if problem not in problems:
            inputs = draw_inputs(problem, plan.device, plan.seed)
            problems[problem] = inputs, Reference.of(inputs)
        seat, rows[contestant.name] = admit(contestant, *problems[problem])
        if seat is not None:
            seats[contestant.name] = seat
    problems.clear()
    if case.how != "eager":  # compiling a twin takes too long: the first of ours takes two turns a round instead
        for name in [one for one in HEADLINES if one in seats][:1]:
            seats[CONTROL], rows[CONTROL] = seats[name], dict(rows[name])
    sweep(plan.device)
    now = time.monotonic()
    with torch.inference_mode(case.mode == "eval"):
        samples, songs, drifted = race(seats, rows, plan, canary, now + share * max(0.0, end - now))
    for name, times in samples.items():
        rows[name]["seconds"] = times
    seats.clear()
    if any(one.how in ("compiled", "reduced") or one.name.endswith(":flex") for one in taking_part):
        torch.compiler.reset()
    sweep(plan.device)
    row = {"id": case.id, "case": dataclasses.asdict(case), "flop": case.flop, "drifted": drifted, "canaries": songs}
    return {**row, "contestants": rows}


def measure_decoders(case: Case, taking_part: Sequence[Contestant], plan: Plan, canary: Canary) -> dict[str, Any]:
    """One case of decoders that write."""
    rows = write_in_turns(case, taking_part, plan.device, plan.seed)
    if any(one.how == "reduced" for one in taking_part):
        torch.compiler.reset()
    sweep(plan.device)
    songs = {name: [float(f"{one:.5g}")] for name, one in canary.sing().items()}
    row = {"id": case.id, "case": dataclasses.asdict(case), "flop": case.flop, "drifted": False, "canaries": songs}
    return {**row, "contestants": rows}


def race(
    seats: dict[str, Seat], rows: dict[str, dict[str, Any]], plan: Plan, canary: Canary, until: float
) -> tuple[dict[str, list[float]], dict[str, list[float]], bool]:
    """Seconds of a call, round by round; what the canaries did in each, and whether too many rounds drifted."""
    songs: dict[str, list[float]] = {}
    beats: list[float] = []
    spare = int(REPEATS * plan.rounds)

    def failed(name: str, error: Exception) -> None:
        if not isinstance(error, torch.OutOfMemoryError):
            raise error
        rows[name] |= {"status": "refused", "raised": True, "reason": f"OutOfMemoryError: {error}"[:300]}
        error.__traceback__ = None  # it holds the tensors of the attempt
        del seats[name]  # it fitted alone, and not beside the others
        sweep(plan.device)

    def is_steady() -> bool:
        nonlocal spare
        song = canary.sing()
        if song:
            beats.append(song["gemm_tflops"])
            if abs(beats[-1] / middle(beats) - 1) > DRIFT and len(beats) > FEWEST:
                spare -= 1
                if spare >= 0:
                    return False
        for name, one in song.items():
            songs.setdefault(name, []).append(float(f"{one:.5g}"))
        return True

    samples = take_turns(
        {name: functools.partial(turn_of, seat, plan.device) for name, seat in seats.items()},
        block=TURN_SECONDS.get(plan.device.type, TURN_SECONDS["cpu"]),
        most=10_000,
        rounds=plan.rounds,
        until=until,
        seed=plan.seed,
        failed=failed,
        counts=is_steady,
    )
    return samples, songs, spare < 0


def turn_of(seat: Seat, device: torch.device, calls: int) -> float:
    """Seconds of one of several calls in a row, under the switches that the contestant wants."""
    with seat.contestant.setting():
        return seconds(seat, calls, device)

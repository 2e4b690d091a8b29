"""Rounds: several ways to compute one thing, timed in turns."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

FEWEST = 3
"""Rounds, however short the time."""

Timer = Callable[[int], float]
"""Seconds of one of so many calls in a row."""


def take_turns(
    timers: dict[str, Timer],
    *,
    block: float,
    most: int,
    rounds: int,
    until: float,
    seed: int,
    failed: Callable[[str, Exception], None],
    counts: Callable[[], bool] = lambda: True,
) -> dict[str, list[float]]:
    """Seconds of a call, round by round, each way once a round in a new order.

    Args:
        timers: by the names of the ways; one that raises is taken out, and its times are lost.
        block: seconds that the calls of one turn take together, about.
        most: calls of one turn at most.
        rounds: how many; fewer, but ``FEWEST``, once ``time.monotonic()`` is beyond ``until``.
        seed: of the orders.
        failed: is told what raised, and may raise.
        counts: is asked after each round, which is repeated unless it counts.
    """
    calls: dict[str, int] = {}
    for name in list(timers):
        try:
            calls[name] = calls_of_a_turn(timers[name], block, most)
        except Exception as error:
            del timers[name]
            failed(name, error)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    shuffler, order, done = random.Random(seed), list(calls), 0
    while order and done < rounds and (done < FEWEST or time.monotonic() < until):
        shuffler.shuffle(order)
        turn: dict[str, float] = {}
        for name in list(order):
            try:
                turn[name] = timers[name](calls[name])
            except Exception as error:
                del timers[name], samples[name]
                order.remove(name)
                failed(name, error)
        if counts():
            done += 1
            for name, seconds in turn.items():
                samples[name].append(float(f"{seconds:.5g}"))
    return samples


def calls_of_a_turn(timer: Timer, block: float, most: int) -> int:
    """The number of calls that take about ``block`` seconds."""
    calls = 1
    while True:
        took = timer(calls) * calls
        if took >= block / 4 or calls >= most:
            return max(1, min(most, round(calls * block / max(took, 1e-9))))
        calls *= 4

"""The table of suite heads: what rotary, norms, grouped heads and a window cost, and the same layer of others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .cases import Case
from .libraries import Torchtune, XTransformers
from .peers import HEADLINES
from .report import TextTable, ratio_and_loss, without_empty_columns
from .run_file import Run
from .verdicts import best_peer, middle

SUITE = "heads"

PEERS = {
    "by hand": ("linear_sdpa", "sdpa"),
    "x-transformers": (XTransformers.name,),
    "torchtune": (Torchtune.name,),
    "flash-attn's layer": ("flash_attn_mha",),
}
"""Columns, and the contestants that they are about, one a level at most."""

COST_COLUMNS = ("case", "ms", "cost", "target", *PEERS, "best peer")
COST_LEGEND = (
    "*cost*: the time of ours over its time without rotary, norms and window, in the same rounds: 1.05 is 5% more, 0.1 "
    "a tenth. *target*: what the cost may be at most, or the least that the column *by hand* may say. Every other "
    "column: how many times faster ours is than a layer of the same function with the same parameters. *by hand*: one "
    "projection, `nn.RMSNorm` or `nn.LayerNorm`, `rotate_half` and SDPA; for attention alone, SDPA with the mask as a "
    "tensor. LOSS: the whole interval of the rounds lies below the noise. A dash: no such option, or not here."
)


def cost_table(run: Run, name_of: Callable[[dict[str, Any]], str] = lambda case: str(case["id"])) -> TextTable:
    """One row a case of the suite."""
    rows = [
        cost_row(case, name_of(case), run["noise_floor"]) for case in run["cases"] if case["case"]["suite"] == SUITE
    ]
    return without_empty_columns(COST_COLUMNS, rows)


def cost_row(case: dict[str, Any], name: str, floor: float) -> Sequence[str]:
    one = next(one for one, kind in HEADLINES.items() if kind == (case["case"]["level"], "eager"))
    ratios, best = case["ratios"].get(one), best_peer(case, one)
    if ratios is None:
        why = case["contestants"].get(one, {}).get("reason", "not timed")
        return name, why, *"-" * (len(COST_COLUMNS) - 2)
    found = [next((ratios[peer] for peer in peers if peer in ratios), None) for peers in PEERS.values()]
    return (
        name,
        f"{1e3 * middle(case['contestants'][one]['seconds']):.3g}",
        cost_words(case, one),
        target_words(case),
        *(ratio_and_loss(each, floor) for each in found),
        "-" if best is None else f"{ratio_and_loss(ratios[best], floor)} ({best})",
    )


def cost_words(case: dict[str, Any], one: str) -> str:
    """The time of ours over its time without options."""
    found = Case.of(case["case"])
    beside = case["ratios"][one].get(found.yardstick)
    return "-" if beside is None or found == found.bare else f"{1 / beside['median']:.3g}"


def target_words(case: dict[str, Any]) -> str:
    """The target, and whether it is met."""
    found = Case.of(case["case"])
    if found.target is None:
        return "-"
    said = f"by hand at least {found.target:.2f}" if found == found.bare else f"at most {1 / found.target:.3g}"
    return f"{said}: {case['target'] or 'not timed'}"

"""The verdicts: from the seconds of every round to ratios, a noise floor, and WIN, TIE or LOSS.

Everything is computed on logarithms, so that exchanging two contestants turns a ratio into its inverse and a WIN into
a LOSS.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .cases import Case
from .peers import CONTROL, HEADLINES, how

RESAMPLES = 1000
LOWEST_FLOOR = 0.01
"""Differences below it are noise, whatever twins say."""

Ratio = dict[str, float]
"""``median``, quartiles ``q25`` and ``q75``, and ``low`` and ``high`` of a 95% interval."""


def ratio(theirs: Sequence[float], ours: Sequence[float]) -> Ratio:
    """Their seconds over ours: medians of the ratios within a round, bootstrapped."""
    seconds = torch.tensor([theirs, ours], dtype=torch.float64, device="cpu")  # whatever the default device is
    logs = (seconds[0] / seconds[1]).log()
    return {
        "median": ratio_at(logs, 0.5),
        "q25": ratio_at(logs, 0.25),
        "q75": ratio_at(logs, 0.75),
        "low": ratio_at(medians(logs), 0.025),
        "high": ratio_at(medians(logs), 0.975),
    }


def ratio_at(logs: Tensor, at: float) -> float:
    """A quantile of logarithms, no longer a logarithm."""
    return float(f"{math.exp(torch.quantile(logs, at).item()):.5g}")


def medians(logs: Tensor) -> Tensor:
    """The medians of ``RESAMPLES`` draws of as many rounds, with replacement; the same draws every time."""
    generator = torch.Generator("cpu").manual_seed(len(logs))
    drawn = torch.randint(0, len(logs), (RESAMPLES, len(logs)), generator=generator, device="cpu")
    return torch.quantile(logs[drawn], 0.5, dim=1)


def verdict(against: Ratio, floor: float) -> str:
    """``WIN`` or ``LOSS`` where the interval lies wholly beyond the noise, else ``TIE``."""
    if against["low"] > 1 + floor:
        return "WIN"
    return "LOSS" if against["high"] < 1 / (1 + floor) else "TIE"


def noise_floor(controls: Sequence[float]) -> float:
    """The distance from 1 that a ratio may have by chance: the 95th percentile of ratios between twins."""
    if not controls:
        return LOWEST_FLOOR
    far = torch.tensor(controls, dtype=torch.float64).log().abs()
    return round(max(LOWEST_FLOOR, math.exp(torch.quantile(far, 0.95).item()) - 1), 4)


def judge_cases(cases: list[dict[str, Any]]) -> dict[str, Any]:
    """Put ratios, best peers and verdicts into measured cases; the noise floor, the canaries and a summary.

    What runs eagerly, compiled or in a CUDA graph is compared with the best peer that runs alike. A summary, one for
    each of ``HEADLINES``, counts every case there is a verdict for, and its geometric mean is over all of them.
    """
    for case in cases:
        timed = {name: row["seconds"] for name, row in case["contestants"].items() if "seconds" in row}
        ours = [name for name in timed if case["contestants"][name]["ours"] and name != CONTROL]
        others = [name for name in timed if not case["contestants"][name]["ours"]]
        peers = [name for name in others if not case["contestants"][name].get("yardstick")]
        case["ratios"] = {one: {other: ratio(timed[other], timed[one]) for other in others} for one in ours}
        case["best_peers"] = {}
        for peer in sorted(peers, key=lambda peer: middle(timed[peer])):
            case["best_peers"].setdefault(how(peer), peer)
        alike = [one for one in HEADLINES if one in timed and how(one) == case["case"].get("how", "eager")]
        if alike and CONTROL in timed:
            case["control"] = ratio(timed[CONTROL], timed[alike[0]])
    floor = noise_floor([case["control"]["median"] for case in cases if "control" in case])
    for case in cases:
        case["verdicts"] = {
            one: verdict(peers[best], floor)
            for one, peers in case["ratios"].items()
            if (best := case["best_peers"].get(how(one))) is not None
        }
        case["target"] = judge_target(case, floor)
    summary = {one: summarize(cases, one) for one in HEADLINES}
    return {
        "noise_floor": floor,
        "canaries": canaries(cases),
        "summary": {one: found for one, found in summary.items() if found["cases"]},
    }


TARGET_WORDS = {"WIN": "met", "TIE": "within the noise", "LOSS": "missed"}
"""What a verdict on a ratio over its target says."""


def judge_target(case: dict[str, Any], floor: float) -> str | None:
    """``met``, ``missed`` or ``within the noise``; ``None`` without a target, or where one of the two was not timed."""
    bound, beside = case["case"].get("target"), Case.of(case["case"]).yardstick
    eager = [one for one in case["ratios"] if one in HEADLINES and how(one) == "eager"]
    found = [case["ratios"][one][beside] for one in eager if beside in case["ratios"][one]]
    if bound is None or not found:
        return None
    return TARGET_WORDS[verdict({name: each / bound for name, each in found[0].items()}, floor)]


def canaries(cases: list[dict[str, Any]]) -> dict[str, float]:
    """The rates of the canaries over the whole run, median; nothing on a CPU."""
    songs = [case.get("canaries", {}) for case in cases]
    found = {name: [one for song in songs for one in song.get(name, ())] for name in ("gemm_tflops", "copy_tbs")}
    return {name: float(f"{middle(every):.4g}") for name, every in found.items() if every}


def share_of_gemm(case: dict[str, Any], name: str) -> float | None:
    """The operations a case needs, by a contestant's time, as a share of what a matrix product did in its rounds."""
    song, row = case.get("canaries", {}).get("gemm_tflops"), case["contestants"].get(name, {})
    if not song or "seconds" not in row:
        return None
    return float(case["flop"] / middle(row["seconds"]) / middle(song) / 1e12)


def middle(seconds: Sequence[float]) -> float:
    """The median."""
    return torch.quantile(torch.tensor(seconds, dtype=torch.float64), 0.5).item()


def summarize(cases: list[dict[str, Any]], one: str) -> dict[str, Any]:
    """The verdicts of one of ours against the best peer of its kind in every case."""
    judged = [case for case in cases if one in case["verdicts"]]
    found = [case["verdicts"][one] for case in judged]
    level, kind = HEADLINES[one]
    summary: dict[str, Any] = {"level": level, "how": kind, "cases": len(judged)}
    summary |= {each.lower(): found.count(each) for each in ("WIN", "TIE", "LOSS")}
    if judged:
        rows = [[case["contestants"][name]["seconds"] for name in (best_peer(case, one), one)] for case in judged]
        logs = [(torch.tensor(theirs).double() / torch.tensor(ours).double()).log() for theirs, ours in rows]
        means = torch.stack([medians(each) for each in logs]).mean(0)
        center = torch.stack([torch.quantile(each, 0.5) for each in logs]).mean(0, keepdim=True)
        summary["geomean"] = {
            "median": ratio_at(center, 0.5),
            "low": ratio_at(means, 0.025),
            "high": ratio_at(means, 0.975),
        }
    return summary


def best_peer(case: dict[str, Any], one: str) -> str | None:
    """The fastest peer of a case that runs as one of ours does."""
    best: str | None = case["best_peers"].get(how(one))
    return best

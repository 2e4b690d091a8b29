"""The report of a run: its JSON file, tables in Markdown and for the screen, and the figures of the README."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .cases import Case
from .peers import HEADLINE
from .verdicts import middle

Run = dict[str, Any]
Table = tuple[Sequence[str], list[Sequence[str]]]
"""Column names, and rows of as many cells."""

COLUMNS = ("case", "as called", "at best", "best peer", "against it", "95%", "verdict", "memory")
LEGEND = (
    "*as called*: `flashmha` against `stock`, both with default arguments and masks as tensors; *at best*: "
    "`flashmha_best` against `stock_best`, both told that no weights are wanted and that a causal mask is causal. "
    "Ratios are times of the peer over ours, so above 1 ours is faster. *memory*: our peak above inputs and "
    "parameters, as a share of `stock_best`'s (at level core `sdpa`'s)."
)


def save(run: Run, path: Path) -> None:
    """Write a run as JSON, one line a case."""
    head = {name: value for name, value in run.items() if name != "cases"}
    lines = ",\n".join(json.dumps(case, allow_nan=False, separators=(",", ":")) for case in run["cases"])
    text = json.dumps(head, indent=1, allow_nan=False)
    path.write_text(f'{text.rstrip()[:-1].rstrip()},\n "cases": [\n{lines}\n]}}\n', encoding="utf-8")


def load(path: Path) -> Run:
    """A run back from its file.

    Raises:
        ValueError: the file is no run of this schema.
    """
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} must hold JSON, got {error}.") from None
    schema = run.get("schema") if isinstance(run, dict) else None
    if schema != 1:
        raise ValueError(f"{path} must hold a benchmark run of schema 1, got schema {schema}.")
    found: Run = run
    return found


def verdict_table(run: Run, level: str) -> Table:
    """One row a case of a level, and one more where padding was skipped."""
    rows = []
    for case in run["cases"]:
        if case["case"]["level"] == level:
            one = HEADLINE[level]
            rows.append(verdict_row(case, one, case["id"]))
            if "flashmha_skip" in case["ratios"]:
                rows.append(verdict_row(case, "flashmha_skip", f"{case['id']}, skip_padding"))
    return COLUMNS, rows


def verdict_row(case: dict[str, Any], one: str, name: str) -> Sequence[str]:
    ratios, contestants = case["ratios"], case["contestants"]
    as_called = cell(ratios.get("flashmha" if one == "flashmha_best" else one, {}).get("stock"))
    at_best = cell(ratios.get(one, {}).get("stock_best"))
    best = case["best_peer"]
    against = ratios.get(one, {}).get(best)
    if against is None:
        why = contestants.get(one, {}).get("reason", "no peer was timed")
        return name, as_called, at_best, best or "-", "-", "-", contestants.get(one, {}).get("status", "-"), why
    shown = cell(against)
    if case["case"]["suite"] == "overhead":
        shown += f" ({extra_microseconds(case, one, best):+.1f} us)"
    interval = f"{against['low']:.2f} to {against['high']:.2f}"
    return name, as_called, at_best, best, shown, interval, case["verdicts"][one], cell_of_memory(case, one)


def cell(ratio: dict[str, float] | None) -> str:
    return "-" if ratio is None else f"{ratio['median']:.2f}"


def cell_of_memory(case: dict[str, Any], one: str, peer: str | None = None) -> str:
    """The peak of a contestant as a share of a peer's, by default of the one at its best."""
    rows = case["contestants"]
    theirs = rows.get(peer or ("sdpa" if case["case"]["level"] == "core" else "stock_best"), {}).get("peak_bytes")
    ours = rows.get(one, {}).get("peak_bytes")
    return f"{ours / theirs:.2f}" if ours is not None and theirs else "-"


def extra_microseconds(case: dict[str, Any], one: str, peer: str) -> float:
    """What a call takes beyond the peer's, median over the rounds."""
    seconds = [case["contestants"][name]["seconds"] for name in (one, peer)]
    return 1e6 * middle([ours - theirs for ours, theirs in zip(*seconds)])


EVERYBODY = ("case", "contestant", "ms", "middle half", "peak MiB", "error", "of gradients", "backend")


def everybody_table(run: Run) -> Table:
    """One row for each contestant of each case: what was measured, or why it was not."""
    rows: list[Sequence[str]] = []
    for case in run["cases"]:
        for name, row in case["contestants"].items():
            if "seconds" not in row:
                if row["status"] != "refused":
                    rows.append((case["id"], name, row["status"], row["reason"], "", "", "", ""))
                continue
            times = sorted(1e3 * one for one in row["seconds"])
            half = f"{times[len(times) // 4]:.4g} to {times[-1 - len(times) // 4]:.4g}"
            errors = [f"{row['error'][key]:.1e}" if key in row["error"] else "" for key in ("out", "gradient")]
            peak = f"{row['peak_bytes'] / 2**20:.3g}"
            rows.append((case["id"], name, f"{middle(times):.4g}", half, peak, *errors, row.get("backend", "")))
    return EVERYBODY, rows


def summary_lines(run: Run) -> list[str]:
    """Who was ahead where, a line a level; and all that went wrong."""
    said = []
    for level, summary in run["summary"].items():
        one = summary["contestant"]
        line = f"Level {level}: {one} ahead of the best peer in {summary['win']} of {summary['cases']} cases"
        line += f", tied in {summary['tie']}, behind in {summary['loss']}"
        lost = [case["id"] for case in run["cases"] if case["verdicts"].get(one) == "LOSS"]
        lost = [name for name in lost if f"/{level}/" in name]
        line += f" ({', '.join(lost)})" if lost else ""
        if "geomean" in summary:
            mean = summary["geomean"]
            line += f"; geometric mean of all {mean['median']:.3f} [{mean['low']:.3f} to {mean['high']:.3f}]"
        said.append(line + ".")
    said += [f"{case_id}: {name} is {status}: {reason}." for case_id, name, status, reason in faults(run)]
    if run["dropped"]:
        said.append(f"Dropped, since the budget was spent: {', '.join(run['dropped'])}.")
    if run["unstable"]:
        said.append(f"UNSTABLE: twins differ by up to {run['noise_floor']:.1%}; measure again on a quieter machine.")
    return said


def faults(run: Run) -> list[tuple[str, str, str, str]]:
    """Case, contestant, status and reason of everybody who was wrong or failed."""
    return [
        (case["id"], name, row["status"], row["reason"])
        for case in run["cases"]
        for name, row in case["contestants"].items()
        if row["status"] in ("wrong", "failed")
    ]


def origin_line(run: Run) -> str:
    """Machine, versions, date and noise in one sentence."""
    env, meta = run["env"], run["run"]
    device = env.get("gpu", env["cpu"])
    threads = f", {env['threads']} thread{'s' * (env['threads'] != 1)}" if env["device"] == "cpu" else ""
    revision = f" at {meta['git'][:10]}{' with changes' if meta['dirty'] else ''}" if meta["git"] else ""
    return (
        f"{device}{threads}, torch {env['torch']}, Python {env['python']}, flashmha {meta['version']}{revision}, "
        f"{meta['utc'][:10]}; up to {meta['rounds']} rounds, noise floor {run['noise_floor']:.1%}."
    )


def markdown(run: Run) -> str:
    """The whole report as a page."""
    parts = ["# Benchmark", origin_line(run), "\n".join(f"- {line}" for line in summary_lines(run)), LEGEND]
    for level in run["summary"]:
        parts += [f"## Level {level}", markdown_table(*verdict_table(run, level))]
    parts += ["## Everybody", markdown_table(*everybody_table(run))]
    if run["absent"]:
        parts += ["Not here: " + "; ".join(f"`{name}` ({why})" for name, why in run["absent"].items()) + "."]
    return "\n\n".join(parts) + "\n"


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    clean = [[text.replace("|", "\\|").replace("\n", " ") for text in row] for row in rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in (columns, ["---"] * len(columns), *clean))


FIGURES = ("case", "stock as called", "stock at its best", "hand-written layer", "memory", "spread")
Pair = tuple[str, str] | None
"""One of ours, and the peer it is compared with."""


def figures(path: Path) -> str:
    """The headline cases of a run as a small table for the README, and what it says and where it comes from."""
    run = load(path)
    rows: list[Sequence[str]] = []
    said = [
        "How many times faster than each peer; *memory* is our peak as a share of stock's at its best, *spread* half "
        "the width of the middle half of the rounds."
    ]
    for case in run["cases"]:
        words, ratios = Case.of(case["case"]).words, case["ratios"]
        if case["case"]["suite"] == "overhead" and "sdpa" in ratios.get("attention", {}):
            extra = extra_microseconds(case, "attention", "sdpa")
            said.append(f"On tiny tensors `attention` takes {extra:.1f} us more than SDPA called by hand.")
        if not case["case"]["headline"] or case["case"]["level"] != "layer":
            continue
        best, skip = "flashmha_best", "flashmha_skip"
        rows.append(figures_row(case, words, ("flashmha", "stock"), (best, "stock_best"), (best, "linear_sdpa")))
        if skip in ratios:
            pairs = (skip, "stock"), (skip, "stock_best"), (skip, "linear_sdpa")
            rows.append(figures_row(case, f"{words}, `skip_padding`", *pairs))
        if "stock_slow" in ratios.get("flashmha", {}):
            rows.append(figures_row(case, f"{words}, stock off its fast path", None, ("flashmha", "stock_slow"), None))
    return f"{markdown_table(FIGURES, rows)}\n\n{' '.join([*said, origin_line(run)])}"


def figures_row(
    case: dict[str, Any], words: str, as_called: Pair, at_best: tuple[str, str], by_hand: Pair
) -> Sequence[str]:
    found = [
        None if pair is None else case["ratios"].get(pair[0], {}).get(pair[1]) for pair in (as_called, at_best, by_hand)
    ]
    wide = max((each["q75"] / each["q25"] for each in found if each), default=1.0)
    return words, *map(cell, found), cell_of_memory(case, *at_best), f"±{50 * (wide - 1):.0f}%"

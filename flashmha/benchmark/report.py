"""The report of a run: its JSON file, and tables in Markdown and for the screen."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from .peers import HEADLINES, how
from .run_file import Run
from .verdicts import best_peer, middle, share_of_gemm, verdict

TextTable = tuple[Sequence[str], list[Sequence[str]]]
"""Column names, and rows of as many cells."""

VERDICT_COLUMNS = ("case", "as called", "at best", "best peer", "against it", "95%", "verdict", "memory", "of GEMM")
LEGEND = (
    "*as called*: `flashmha` against `stock`, both with default arguments and masks as tensors; *at best*: "
    "`flashmha_best` against `stock_best`, both told that no weights are wanted and that a causal mask is causal. "
    "Ratios are times of the peer over ours, so above 1 ours is faster. The *best peer* is the fastest that runs as "
    "ours does: eagerly, compiled, or replayed from a CUDA graph. *memory*: our peak above inputs and parameters, as a "
    "share of `stock_best`'s (at level core `sdpa`'s). *of GEMM*: the operations the case needs, padding not counted, "
    "by our time, as a share of the rate of a bfloat16 product of two 8192 × 8192 matrices in the same rounds."
)

AT_BEST = {"flashmha_compiled": "stock_compiled", "flashmha_graph": "stock_graph"}
"""Stock at its best, where it runs as one of ours does; else ``stock_best``."""

HOW_WORDS = {
    "eager": "",
    "compiled": ", compiled",
    "graph": ", in a CUDA graph",
    "reduced": ", compiled for reduced overhead",
}
"""How a contestant runs, behind the name of a case."""

ENCODER_COLUMNS = ("encoder", "ours", "ms", "stock", "by hand", "packed", "memory")
ENCODER_LEGEND = (
    "How many times faster an encoder of ours is than `nn.TransformerEncoder` (*stock*), than one written by hand on "
    "SDPA with a broadcast mask, and than that one on tokens packed once, with the flash-attn 2 inside torch (on a CPU "
    "with SDPA, one sequence after the other). LOSS: the whole interval of the rounds lies below the noise. *memory*: "
    "our peak as a share of stock's. `skip_padding` computes real rows alone, as *packed* does, and stock in eval."
)


def encoder_table(run: Run, name_of: Callable[[dict[str, Any]], str]) -> TextTable:
    """One row for each way that ours ran each encoder, against each peer that ran alike."""
    rows: list[Sequence[str]] = []
    for case in run["cases"]:
        if case["case"]["level"] != "encoder":
            continue
        if not case["ratios"]:
            rows.append((name_of(case), *"-" * 6))
        for one in case["ratios"]:
            kind = f"_{how(one)}" if how(one) != "eager" else ""
            peers = [f"{peer}_encoder{kind}" for peer in ("stock", "hand", "packed")]
            way = "skip_padding" if "_skip" in one else "exact"
            took = f"{1e3 * middle(case['contestants'][one]['seconds']):.3g}"
            against = [ratio_and_loss(case["ratios"][one].get(peer), run["noise_floor"]) for peer in peers]
            rows.append((name_of(case) + HOW_WORDS[how(one)], way, took, *against, cell_of_memory(case, one, peers[0])))
    return without_empty_columns(ENCODER_COLUMNS, rows)


def ratio_and_loss(ratio: dict[str, float] | None, floor: float) -> str:
    """A ratio, and that it is a loss."""
    lost = ratio is not None and verdict(ratio, floor) == "LOSS"
    return cell(ratio) + " LOSS" * lost


def verdict_table(run: Run, level: str) -> TextTable:
    """One row a case of a level, and one more for each other way that ours was run, and for each named backend."""
    if level == "encoder":
        return encoder_table(run, lambda case: str(case["id"]))
    rows = []
    eager = next(one for one, kind in HEADLINES.items() if kind == (level, "eager"))
    for case in run["cases"]:
        if case["case"]["level"] == level:
            rows.append(verdict_row(case, eager, case["id"]))
            others = [one for one, (where, _) in HEADLINES.items() if where == level and one != eager]
            rows += [
                verdict_row(case, one, case["id"] + HOW_WORDS[how(one)]) for one in others if one in case["verdicts"]
            ]
            if "flashmha_skip" in case["ratios"]:
                rows.append(verdict_row(case, "flashmha_skip", f"{case['id']}, skip_padding"))
            named = [one for one in run.get("named", ()) if one in case["contestants"]]
            rows += [verdict_row(case, one, f"{case['id']}, {one.partition(':')[2]}") for one in named]
    return without_empty_columns(VERDICT_COLUMNS, rows)


def without_empty_columns(columns: Sequence[str], rows: list[Sequence[str]]) -> TextTable:
    """A table without the columns in which nothing stands."""
    kept = [at for at in range(len(columns)) if at == 0 or any(row[at] for row in rows)]
    return [columns[at] for at in kept], [[row[at] for at in kept] for row in rows]


def verdict_row(case: dict[str, Any], one: str, name: str) -> Sequence[str]:
    ratios, contestants = case["ratios"], case["contestants"]
    as_called = cell(
        ratios.get({"flashmha_best": "flashmha"}.get(one, one), {}).get("stock") if how(one) == "eager" else None
    )
    at_best = cell(ratios.get(one, {}).get(AT_BEST.get(one, "stock_best")))
    best = best_peer(case, one)
    against = ratios.get(one, {}).get(best)
    if against is None:
        why = contestants.get(one, {}).get("reason", "no peer was timed")
        return name, as_called, at_best, best or "-", "-", "-", contestants.get(one, {}).get("status", "-"), why, ""
    shown = cell(against)
    if case["case"]["suite"] == "overhead":
        shown += f" ({extra_microseconds(case, one, best):+.1f} us)"
    interval = f"{against['low']:.2f} to {against['high']:.2f}"
    shares = cell_of_memory(case, one), percent(share_of_gemm(case, one))
    return name, as_called, at_best, best or "-", shown, interval, case["verdicts"][one], *shares


def percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"


def cell(ratio: dict[str, float] | None) -> str:
    return "-" if ratio is None else f"{ratio['median']:.2f}"


def cell_of_memory(case: dict[str, Any], one: str, peer: str | None = None) -> str:
    """The peak of a contestant as a share of a peer's, by default of the one at its best."""
    rows = case["contestants"]
    theirs = rows.get(peer or ("sdpa" if case["case"]["level"] == "core" else "stock_best"), {}).get("peak_bytes")
    ours = rows.get(one, {}).get("peak_bytes")
    if ours is None or not theirs:
        return "-"
    return f"{ours / theirs:.2f}" if ours / theirs >= 0.005 else "<0.01"


def extra_microseconds(case: dict[str, Any], one: str, peer: str | None) -> float:
    """The time of a call beyond the peer's, median over the rounds."""
    seconds = [case["contestants"][name]["seconds"] for name in (one, peer)]
    return 1e6 * middle([ours - theirs for ours, theirs in zip(*seconds)])


CONTESTANT_COLUMNS = (
    *("case", "contestant", "ms", "middle half", "of GEMM", "host us", "first call ms", "peak MiB"),
    *("error", "of gradients", "backend"),
)


def contestants_table(run: Run) -> TextTable:
    """One row for each contestant of each case that was timed: all that was measured."""
    rows: list[Sequence[str]] = []
    for case in run["cases"]:
        for name, row in case["contestants"].items():
            if "seconds" not in row:
                continue
            times = sorted(1e3 * one for one in row["seconds"])
            half = f"{times[len(times) // 4]:.4g} to {times[-1 - len(times) // 4]:.4g}"
            host = f"{1e6 * row['host_seconds']:.0f}" if "host_seconds" in row else ""
            first = f"{row['first_call_ms']:.3g}" if "first_call_ms" in row else ""
            peak = f"{row['peak_bytes'] / 2**20:.3g}" if "peak_bytes" in row else ""
            errors = [f"{row['error'][key]:.1e}" if key in row["error"] else "" for key in ("out", "gradient")]
            measured = (f"{middle(times):.4g}", half, percent(share_of_gemm(case, name)), host, first, peak)
            rows.append((case["id"], name, *measured, *errors, row.get("backend", "")))
    return without_empty_columns(CONTESTANT_COLUMNS, rows)


def absences_table(run: Run) -> TextTable:
    """All that was not timed, where and why; not the contestants that a case is not meant for."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for case in run["cases"]:
        for name, row in case["contestants"].items():
            reason = row.get("reason", "for")
            if not reason.startswith("for "):
                found.setdefault((name, row["status"], reason), []).append(case["id"])
    rows = [(name, status, reason, ", ".join(ids)) for (name, status, reason), ids in found.items() if status != "ok"]
    return ("contestant", "status", "reason", "cases"), list(rows)


def summary_lines(run: Run) -> list[str]:
    """The verdicts, a line for each way that ours was run; and all that went wrong."""
    said = [summary_line(run, one) for one in run["summary"]]
    said += [f"{case_id}: {name} is {status}: {reason}." for case_id, name, status, reason in faults(run)]
    if run["dropped"]:
        why = "the run was stopped" if run.get("stopped") else "the budget was spent"
        said.append(f"Dropped, since {why}: {', '.join(run['dropped'])}.")
    if run["unstable"]:
        said.append(f"UNSTABLE: twins differ by up to {run['noise_floor']:.1%}; measure again on a quieter machine.")
    return said


def summary_line(run: Run, one: str) -> str:
    """The verdicts of one of ours, every lost case by its name."""
    summary = run["summary"][one]
    line = f"Level {summary['level']}{HOW_WORDS[summary['how']]}: {one} ahead of the best peer in {summary['win']} of "
    line += f"{summary['cases']} cases, tied in {summary['tie']}, behind in {summary['loss']}"
    lost = [case["id"] for case in run["cases"] if case["verdicts"].get(one) == "LOSS"]
    line += f" ({', '.join(lost)})" if lost else ""
    mean = summary["geomean"]
    return f"{line}; geometric mean of all {mean['median']:.3f} [{mean['low']:.3f} to {mean['high']:.3f}]."


def faults(run: Run) -> list[tuple[str, str, str, str]]:
    """Case, contestant, status and reason of all that were wrong or failed."""
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
    rounds = f"{meta['rounds']} round{'s' * (meta['rounds'] != 1)}"
    revision = f" at {meta['git'][:10]}{' with changes' if meta['dirty'] else ''}" if meta["git"] else ""
    return (
        f"{device}{threads}, torch {env['torch']}, Python {env['python']}, flashmha {meta['version']}{revision}, "
        f"{meta['utc'][:10]}; up to {rounds}, noise floor {run['noise_floor']:.1%}{canary_words(run)}."
    )


def canary_words(run: Run) -> str:
    """The rates that a GPU reached during the run."""
    if not run["canaries"]:
        return ""
    return "; a matrix product ran at {gemm_tflops:.0f} TFLOP/s, a copy at {copy_tbs:.1f} TB/s".format(
        **run["canaries"]
    )


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    clean = [[text.replace("|", "\\|").replace("\n", " ") for text in row] for row in rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in (columns, ["---"] * len(columns), *clean))

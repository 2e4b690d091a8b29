"""``flashmha bench``: its flags, and what it does with them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from ..benchmark.cases import LEVELS, PASSES, select
from ..benchmark.costs import cost_table
from ..benchmark.lineup import all_contestants, contestants
from ..benchmark.page import markdown
from ..benchmark.report import faults, origin_line, summary_lines, verdict_table
from ..benchmark.rounds import FEWEST
from ..benchmark.run_file import Run, levels, load, save
from ..benchmark.runner import Plan, run
from ..benchmark.suites import ON_REQUEST, SUITES, every_case
from ..host.extras import wanted_by
from ..problem.wording import summarize_error
from .destination import check_folder
from .devices import device
from .screen import add_json, print_json, print_table, progress
from .variables import check_variables

BUDGETS = {"cpu": 360.0, "cuda": 450.0}
"""Seconds a run takes without ``--budget``."""

CHOICES = ("suites", "case", "level", "passes", "peers", "backends")
"""The flags that a run's record keeps beside rounds, budget and seed."""

WRONG, UNSTABLE = 1, 3
"""Exit statuses beside 0."""

RECORD, PAGE = "run.json", "table.md"
PLOTS = ("ratios.png", "time.png", "memory.png", "gemm.png")
"""The files of a run."""
DrawPlots = Callable[[Run, Path], None]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    suites = "; ".join(f"{name}: {text}" for name, text in SUITES.items())
    parser.add_argument(
        "--suites",
        nargs="+",
        choices=SUITES,
        metavar="SUITE",
        help=f"only these ({suites}); default all but {', '.join(ON_REQUEST)}",
    )
    parser.add_argument("--case", nargs="+", metavar="GLOB", help="only cases whose id fits one, as 'dense/*/train/*'")
    parser.add_argument("--level", nargs="+", choices=LEVELS, help="only these: whole layers, or attention alone")
    parser.add_argument("--pass", nargs="+", choices=PASSES, dest="passes", help="only these")
    parser.add_argument(
        "--peers",
        nargs="+",
        metavar="GLOB",
        help="only peers whose name fits one, or 'all'; default all, and on a CPU none that is compiled",
    )
    parser.add_argument(
        "--backends",
        nargs="*",
        metavar="NAME",
        help="our backends that take part by name; default all, but this package's own on a CPU at level core alone, "
        "and on a GPU flex in few cases and naive in none",
    )
    parser.add_argument("--device", default="cpu", help="default cpu")
    parser.add_argument("--rounds", type=int, default=12, help="turns of every contestant in a case (default 12)")
    parser.add_argument(
        "--budget",
        type=float,
        metavar="SECONDS",
        help=f"drop rounds (down to {FEWEST}), then the last cases, to take no longer (default 360, on cuda 450)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the data and of every round's order (default 0)")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="where run.json, table.md and the plots go (default flashmha-bench)"
    )
    parser.add_argument("--no-plots", action="store_true", help="no plots, and no need of matplotlib")
    parser.add_argument("--list", action="store_true", help="show the cases and their contestants, and measure nothing")
    parser.add_argument("--report", type=Path, metavar="FILE", help="measure nothing: table and plots of this run.json")
    add_json(parser)


def main(options: argparse.Namespace) -> int:
    """Measure and report: 0, or 1 where a contestant of ours was wrong, a file was not written or the run was stopped,
    or 3 where the machine was too unsteady to tell."""
    if options.rounds < 1 or (options.budget is not None and not options.budget > 0):
        raise ValueError(f"rounds and budget must be positive, got {options.rounds} and {options.budget}.")
    if options.list:
        return show_cases(plan_from_flags(options), options.json)
    draw = None if options.no_plots else plots()
    if options.report is not None:
        found = load(options.report)
        folder = options.out or options.report.with_suffix("")
        check_folder(folder, "--out", (PAGE, *PLOTS))
        written = write_run(found, folder, draw, again=True)
        return show_run(found, options.json) if written else WRONG
    plan = plan_from_flags(options)
    folder = options.out or Path("flashmha-bench")
    check_folder(folder, "--out", (RECORD, PAGE, *PLOTS))
    with progress(f"{len(plan.cases)} cases", len(plan.cases)) as advance:

        def tell(line: str) -> None:
            advance()
            if not sys.stderr.isatty():
                print(line, file=sys.stderr, flush=True)

        found = run(plan, tell)
    written = write_run(found, folder, draw)
    status = show_run(found, options.json)
    return status if written else WRONG


def plots() -> DrawPlots:
    """The function that draws the plots, imported before anything is measured for them."""
    with wanted_by("bench", ", or --no-plots"):
        from ..benchmark.plots import draw_plots  # matplotlib
    return draw_plots


def plan_from_flags(options: argparse.Namespace) -> Plan:
    """The flags as a plan.

    Raises:
        ValueError: a flag names what there is not.
    """
    where = device(options.device)
    check_variables(where.type)
    named, absent = all_contestants(where)
    known = [one.name for one in named]
    for name in options.backends or ():
        if f"attention:{name}" not in known:
            raise ValueError(
                f"backends must be available on {where}, got {name!r}: {absent.get(name, 'not registered')}."
            )
    for name in options.peers or ():
        if name in absent:
            raise ValueError(f"peers must be available on {where}, got {name!r}: {absent[name]}.")
        if not any(character in name for character in "*?[") and name not in (*known, "all"):
            raise ValueError(f"peers must be among {', '.join(known)}, all, or globs, got {name!r}.")
    every = every_case(where.type)
    if not (options.list or options.suites or options.case):
        asked = options.level or ()
        every = [case for case in every if case.suite not in ON_REQUEST or ON_REQUEST[case.suite] in asked]
    return Plan(
        cases=select(every, options.suites, options.case, options.level, options.passes),
        device=where,
        rounds=options.rounds,
        budget=options.budget or BUDGETS.get(where.type, 360.0),
        seed=options.seed,
        peers=options.peers,
        backends=options.backends,
        options={name: value for name in CHOICES if (value := getattr(options, name)) is not None},
    )


def show_cases(plan: Plan, json: bool) -> int:
    every, _ = all_contestants(plan.device)
    rows = []
    for case in plan.cases:
        those = contestants(every, case, plan.device, plan.peers, plan.backends)
        rows.append((case.id, [one.name for one in those if one.refuses(case) is None]))
    if json:
        print_json([{"id": name, "contestants": those} for name, those in rows])
    else:
        print_table(("case", "contestants"), [(name, " ".join(those)) for name, those in rows])
    return 0


def write_run(found: Run, folder: Path, draw: DrawPlots | None, again: bool = False) -> bool:
    """Every file of a run in a folder, what was measured first; ``again`` leaves the JSON where it is.

    ``False`` where one could not be written, which is said: nothing that follows may be lost by it.
    """
    try:
        if not again:
            save(found, folder / RECORD)
        (folder / PAGE).write_text(markdown(found), encoding="utf-8")
        if draw is not None:
            draw(found, folder)
    except Exception as error:  # a full disk, or whatever the library of the plots raises
        hint = "" if again else f"; what was measured is in {folder / RECORD}" * (folder / RECORD).exists()
        print(f"flashmha bench: {summarize_error(error)}{hint}", file=sys.stderr)
        return False
    return True


def show_run(found: Run, json: bool) -> int:
    """A run on the screen, and the exit status it gives."""
    if json:
        print_json(found)
    else:
        for level in levels(found):
            print_table(*verdict_table(found, level))
            print()
        columns, rows = cost_table(found)
        if rows:
            print_table(columns, rows)
            print()
        print("\n".join([*summary_lines(found), origin_line(found)]))
    if found.get("stopped"):
        return WRONG
    ours = [name for _, name, _, _ in faults(found) if name.startswith(("flashmha", "attention", "control"))]
    if ours:
        return WRONG
    return UNSTABLE if found["unstable"] else 0

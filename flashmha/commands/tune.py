"""``flashmha tune``: time every backend of this machine on a grid of problems, for automatic choice to follow."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..backends import FAMILIES, expand, get, names, origin
from ..backends.choice.ranking import KINDS, LAST, MARGIN, MODES, Row, Table
from ..backends.choice.rows import derive
from ..backends.choice.tuned import read
from ..benchmark.grid import GRIDS, GridCell, grid_cells
from ..benchmark.tuning import STOPPED, Tuning, measure_grid
from .destination import check_file
from .devices import device
from .flags import DTYPE_NAMES, add_sizes, at_least
from .screen import add_json, print_json, print_table, progress

LEFT_OUT = {"cpu": frozenset(("flex",)), "cuda": frozenset(("flex", LAST))}
"""What is measured only by name, by device type: on a GPU flex compiles for every shape and the definition is never the
fastest. Another accelerator is like a GPU."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--save", type=Path, metavar="FILE", help="where the measurement goes, for load_tuned")
    parser.add_argument("--device", help="default: the first accelerator, or cpu")
    parser.add_argument("--dtype", choices=DTYPE_NAMES, help="default bfloat16, on a CPU float32")
    size = at_least(1)
    add_sizes(parser, "--head-dims", "default 64 128 256, on a CPU 64")
    add_sizes(parser, "--seqlens", "default 512 to 16384, on a CPU 128 512")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, metavar="KIND", help=f"among {', '.join(KINDS)}")
    parser.add_argument("--pass", nargs="+", choices=MODES, dest="modes", help="only these")
    parser.add_argument("--backends", nargs="+", metavar="NAME", help="default: ours, but flex, and on a GPU naive")
    parser.add_argument("--rounds", type=size, metavar="N", help="turns of every backend in a cell, at most, default 7")
    parser.add_argument(
        "--budget", type=float, metavar="SECONDS", help="drop the last cells to take no longer, default 190 (CPU: 45)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the data and of every round's order, default 0")
    parser.add_argument("--rows", type=Path, metavar="FILE", help="measure nothing: the rows that such a file gives")
    add_json(parser)


def tune(options: argparse.Namespace) -> dict[str, Any]:
    """Measure what the flags say."""
    where = device(options.device)
    grid = GRIDS.get(where.type, GRIDS["cpu"])
    grid = dataclasses.replace(grid, rounds=options.rounds or grid.rounds, budget=options.budget or grid.budget)
    backends = measured_backends(options.backends, where)
    head_dims = options.head_dims or grid.head_dims
    cells = grid_cells(grid, options.kinds or KINDS, options.modes or MODES, head_dims, options.seqlens)
    with progress(f"{len(cells)} problems", len(cells)) as advance:
        return measure_grid(Tuning(grid, cells, backends, options.dtype or grid.dtype, where, options.seed), advance)


def measured_backends(named: Sequence[str] | None, where: torch.device) -> tuple[str, ...]:
    """The backends to measure, in the order of the list.

    Raises:
        ValueError: a name that is no backend's, or of one that is not available.
    """
    if named is None:
        ours = [name for name in names() if origin(name) == "flashmha"]
        left_out = LEFT_OUT.get(where.type, LEFT_OUT["cuda"])
        return tuple(name for name in ours if name not in left_out and get(name).why_not_here(where) is None)
    for name in expand(list(named), "--backends"):
        why = get(name).why_not_here(where)
        if why is not None and not any(one in FAMILIES for one in named):
            raise ValueError(f"--backends must be available on {where}, got {name!r}: {why}.")
    asked = expand(list(named))
    return tuple(name for name in names() if name in asked and get(name).why_not_here(where) is None)


def main(options: argparse.Namespace) -> int:
    if options.rows is not None:
        if options.save is not None:
            raise ValueError(f"--rows measures nothing that --save could write, got --save {options.save}.")
        return show_rows(options.rows, options.json)
    if options.budget is not None and not options.budget > 0:
        raise ValueError(f"--budget must be positive, got {options.budget}.")
    if options.save is not None:
        check_file(options.save, "--save")
    found = tune(options)
    measured = any(cell["us"] for cell in found["cells"])
    if options.save is not None and measured:
        try:
            options.save.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        except OSError:  # the disk is full by now: what took minutes must not be lost
            print_json(found)
            raise
    if options.save is not None and not measured:
        print(f"nothing was measured, so that {options.save} was not written", file=sys.stderr)
    status = 1 if (options.save is not None and not measured) or STOPPED in found["dropped"].values() else 0
    if options.json:
        print_json(found)
        return status
    print_table(*table_of(found["cells"]))
    print(MARKS if found["cells"] else "", end="\n" if found["cells"] else "")
    for why, many in collections.Counter(found["dropped"].values()).items():
        print(f"{many} of {len(found['dropped']) + len(found['cells'])} problems were dropped: {why}", file=sys.stderr)
    if options.save is not None and measured:
        print(f"\nflashmha.load_tuned({str(options.save)!r}) or FLASHMHA_TUNED={options.save} follows it")
    return status


MARKS = (
    "* what automatic choice takes by these figures; ± half the middle half of the rounds. Where that\n"
    f"or {MARGIN:.0%} is all that tells two apart, the order of the list stands; {LAST} is never put in front."
)


def table_of(cells: Sequence[dict[str, Any]]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """A table: a cell a line, microseconds and their spread, and a mark at what the rows of these cells choose."""
    names = tuple(dict.fromkeys(name for cell in cells for name in (*cell["us"], *cell["absent"])))
    table = Table("", "", (), derive(cells, ""))
    rows = []
    for row in cells:
        cell = GridCell(**{field.name: row[field.name] for field in dataclasses.fields(GridCell)})
        covering = [one for one in table.places[cell.kind, cell.mode] if one.covers(cell.head_dim, row["keys"])]
        chosen = next((name for one in covering[:1] for name in one.order if name in row["us"]), None)
        figures = [
            f"{row['us'][name]:.0f}{'*' * (name == chosen)} ±{row['spread'][name]:.0%}" if name in row["us"] else "-"
            for name in names
        ]
        rows.append((cell.kind, cell.mode, str(cell.head_dim), cell.lengths, *figures))
    return ("kind", "pass", "head_dim", "seqlen", *(f"{name} us" for name in names)), rows


def show_rows(path: Path, json: bool) -> int:
    """The rows that a file gives: as the source of a table, or as JSON."""
    rows = derive(read(path).found["cells"], path.as_posix())
    if json:
        print_json([dataclasses.asdict(row) for row in rows])
    else:
        print("\n".join(map(source_line, rows)))
    return 0


def source_line(row: Row) -> str:
    """A row as ``measured.py`` writes it."""
    parts = (row.kinds, row.modes, row.order)
    names = [f"({', '.join(map(json.dumps, part))}{',' * (len(part) == 1)})" for part in parts]
    bounds = [f"{name}={value}" for name in ("head_dim", "keys") if (value := getattr(row, name)) is not None]
    return f"Row({', '.join([*names, 'SOURCE', *bounds])}),"

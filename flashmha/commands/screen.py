"""The screen: rich tables on a terminal, aligned text in a pipe, JSON where it is asked for."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

STYLES = {"available": "green", "chosen": "bold green", "agrees": "green", "FAILS": "bold red"}
"""How a cell of this text looks on a terminal."""

Advance = Callable[[], None]


def add_json(parser: argparse.ArgumentParser) -> None:
    """The flag every command has."""
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")


def print_json(thing: Any) -> None:
    """A value as JSON; ASCII, so that every pipe takes it."""
    print(json.dumps(thing, indent=2, allow_nan=False))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Rows under their columns."""
    if sys.stdout.isatty():
        with contextlib.suppress(ModuleNotFoundError):  # rich is an extra
            return print_rich_table(columns, rows)
    print(aligned(columns, rows))


def aligned(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """One line a row, each column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(columns, *rows)]
    return "\n".join(
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths)).rstrip() for row in (columns, *rows)
    )


def print_rich_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*columns, box=box.SIMPLE_HEAD, pad_edge=False)
    for row in rows:
        table.add_row(*(Text(cell, STYLES.get(cell, "")) for cell in row))
    Console().print(table)


@contextlib.contextmanager
def progress(what: str, total: int) -> Iterator[Advance]:
    """A bar on stderr that moves on with each call; nothing where stderr is no terminal or rich is not there."""
    try:
        from rich.console import Console
        from rich.progress import Progress
    except ModuleNotFoundError:
        yield lambda: None
        return
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=total)
        yield lambda: bar.advance(task)

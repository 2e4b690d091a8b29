"""The command line: ``flashmha`` or ``python -m flashmha``."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from .commands.variables import check_variables
from .version import __version__

COMMANDS = {
    "info": ("flashmha.commands.info", "versions, devices, and what stands against each backend"),
    "explain": ("flashmha.commands.explain", "which backend serves a problem, and why not the others"),
    "verify": ("flashmha.commands.verify", "judge this machine's backends against the definition"),
    "bench": ("flashmha.commands.bench", "measure time, memory and error beside every peer"),
    "tune": ("flashmha.commands.tune", "time this machine's backends, for automatic choice to follow"),
}
"""Command -> the module that holds its ``add_arguments`` and ``main``, imported when it is called; and its help."""


class Parser(argparse.ArgumentParser):
    """A parser whose complaints take one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (--help shows how)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit status: 0, 1 where the answer is no, 2 for a wrong call."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = Parser(prog="flashmha", description="nn.MultiheadAttention on the fastest attention this machine has.")
    parser.add_argument("--version", action="version", version=f"flashmha {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    rooms = {name: commands.add_parser(name, help=text, description=text) for name, (_, text) in COMMANDS.items()}
    called = arguments[0] if arguments else ""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a picture of a mask must not fail where the terminal knows no ■
    try:
        if called in COMMANDS:
            room = importlib.import_module(COMMANDS[called][0])
            room.add_arguments(rooms[called])
        options = parser.parse_args(arguments)
        if called != "info":  # which shows what there is first
            check_variables(table=called != "tune")  # which makes the table anew
        status: int = room.main(options)
        return status
    except BrokenPipeError:  # the reader of the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError, ModuleNotFoundError) as error:  # a wrong call, a missing file, a missing extra
        rooms[called].exit(2, f"{rooms[called].prog}: {' '.join(str(error).split())}\n")


if __name__ == "__main__":
    sys.exit(main())

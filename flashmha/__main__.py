"""The command line: ``flashmha`` or ``python -m flashmha``."""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import torch

from . import __version__
from .backends import get, names
from .errors import lines
from .table import table, write


def info() -> str:
    """Versions, devices, and what stands against each backend on each device."""
    versions = {"flashmha": __version__, "python": platform.python_version(), "torch": torch.__version__}
    for package in ("einops", "flash-attn", "flash-attn-4"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    parts = [lines(versions)]
    for device in devices():
        title = str(device)
        if device.type == "cuda":
            major, minor = torch.cuda.get_device_capability(device)
            title += f": {torch.cuda.get_device_name(device)}, compute capability {major}.{minor}"
        reasons = {name: get(name).unavailable(device) for name in names()}
        parts.append(f"{title}\n" + lines({name: reason or "available" for name, reason in reasons.items()}))
    return "\n\n".join(parts)


def devices() -> list[torch.device]:
    return [torch.device("cpu"), *(torch.device("cuda", index) for index in range(torch.cuda.device_count()))]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit status."""
    parser = argparse.ArgumentParser(prog="flashmha", description="nn.MultiheadAttention on this machine's fastest.")
    parser.add_argument("--version", action="version", version=f"flashmha {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="versions, devices, and what stands against each backend")
    tables = commands.add_parser("table", help="the backends and what they serve, as a Markdown table")
    tables.add_argument("--write", metavar="FILE", type=Path, help="put the table between its marks in FILE")
    chosen = parser.parse_args(arguments)
    if chosen.command == "info":
        print(info())
    elif chosen.write is None:
        print(table())
    else:
        print(f"{chosen.write}: {'rewritten' if write(chosen.write) else 'up to date'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

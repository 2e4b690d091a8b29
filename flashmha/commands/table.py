"""``flashmha table``: the backends and what they serve, as a Markdown table."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from ..backends import get, names, origin
from ..backends.base import FEATURES, Limits
from ..problem.wording import short
from .destination import check_file
from .markdown import table, write
from .screen import add_json, print_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--write", metavar="FILE", type=Path, help="put the table between its marks in FILE")
    add_json(parser)


def main(options: argparse.Namespace) -> int:
    if options.write is not None:
        if not options.write.is_file():
            raise ValueError(f"--write must name a file that exists, got {options.write}.")
        check_file(options.write, "--write")
        changed = write(options.write)
        if options.json:
            print_json({"file": str(options.write), "rewritten": changed})
        else:
            print(f"{options.write}: {'rewritten' if changed else 'up to date'}")
    elif options.json:
        print_json([{"name": name, "registered_by": origin(name), **data(get(name).limits)} for name in names()])
    else:
        print(table())
    return 0


def data(limits: Limits) -> dict[str, Any]:
    """Limits as JSON knows them."""
    return {
        **dataclasses.asdict(limits),
        "dtypes": [short(dtype) for dtype in limits.dtypes],
        "features": in_order(limits.features),
        "not_on": {device: in_order(features) for device, features in limits.not_on.items()},
    }


def in_order(features: frozenset[str]) -> list[str]:
    return [name for name in FEATURES if name in features]

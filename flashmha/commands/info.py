"""``flashmha info``: versions, devices, and what stands against each backend on each device."""

from __future__ import annotations

import argparse
import os
import platform
from importlib import metadata

import torch

from .. import __version__
from ..backends import VARIABLE, get, names, origin
from ..errors import lines
from .devices import description, devices
from .screen import add_json, print_json, print_table

PACKAGES = ("einops", "flash-attn", "flash-attn-3", "flash-attn-4", "hypothesis", "rich", "matplotlib")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_json(parser)


def main(options: argparse.Namespace) -> int:
    here = devices()
    reasons = {str(device): {name: get(name).unavailable(device) for name in names()} for device in here}
    if options.json:
        backends = [
            {"name": name, "registered_by": origin(name), "contract": get(name).contract, "install": get(name).install}
            for name in names()
        ]
        titles = {str(device): description(device) for device in here}
        found = [
            {
                "device": device,
                "description": titles[device],
                "backends": {name: {"available": reason is None, "reason": reason} for name, reason in rows.items()},
            }
            for device, rows in reasons.items()
        ]
        print_json({"versions": versions(), VARIABLE: os.environ.get(VARIABLE), "backends": backends, "devices": found})
        return 0
    rows = {name: version or "not installed" for name, version in versions().items()}
    print(lines({**rows, VARIABLE: os.environ.get(VARIABLE, "not set")}))
    for device in here:
        print(f"\n{description(device)}")
        answers = reasons[str(device)]
        print_table(
            ("backend", "registered by", "on this device"),
            [(name, origin(name), reason or "available") for name, reason in answers.items()],
        )
    return 0


def versions() -> dict[str, str | None]:
    """What is installed; ``None`` for what is not."""
    found: dict[str, str | None] = {
        "flashmha": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
    }
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found

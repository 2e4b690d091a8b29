"""``flashmha info``: versions, devices, and what stands against each backend on each device."""

from __future__ import annotations

import argparse
import os
import platform
from importlib import metadata

import torch

from ..backends import expand, get, names, origin
from ..backends.choice import tuned, waiting
from ..backends.choice.wishes import BACKEND_VARIABLE, read_variable
from ..problem.wording import tabulate
from ..version import __version__
from .devices import description, devices
from .screen import add_json, print_json, print_table
from .variables import check_variables

LISTED_PACKAGES = ("einops", "flash-attn", "flash-attn-3", "flash-attn-4", "hypothesis", "rich", "matplotlib")


VARIABLES = (BACKEND_VARIABLE, tuned.TABLE_VARIABLE, waiting.FIRST_CHOICE_VARIABLE)
"""The environment variables that automatic choice follows."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_json(parser)


def main(options: argparse.Namespace) -> int:
    """Show what there is, whatever the variables say, and then refuse those that cannot be followed."""
    here = devices()
    show_devices(here, options.json)
    check_variables(*(device.type for device in here))
    return 0


def show_devices(here: list[torch.device], json: bool) -> None:
    """Everything, as text or as JSON."""
    reasons = {str(device): {name: get(name).why_not_here(device) for name in names()} for device in here}
    kept = {
        (device, name): get(name).on_disk(torch.device(device))
        for device, rows in reasons.items()
        for name, reason in rows.items()
        if reason is None
    }
    if json:
        backends = [
            {"name": name, "registered_by": origin(name), "contract": get(name).contract, "install": get(name).install}
            for name in names()
        ]
        titles = {str(device): description(device) for device in here}
        found = [
            {
                "device": device,
                "description": titles[device],
                "measured": followed(torch.device(device)),
                "calls_raise": why_calls_raise(rows),
                "backends": {
                    name: {"available": reason is None, "reason": reason, "on_disk": kept.get((device, name))}
                    for name, reason in rows.items()
                },
            }
            for device, rows in reasons.items()
        ]
        variables = {name: os.environ.get(name) for name in VARIABLES}
        print_json({"versions": versions(), **variables, "backends": backends, "devices": found})
        return
    rows = {name: version or "not installed" for name, version in versions().items()}
    print(tabulate({**rows, **{name: os.environ.get(name, "not set") for name in VARIABLES}}))
    for device in here:
        print(f"\n{description(device)}")
        print(f"automatic choice follows {' and '.join(followed(device)) or 'the order of the list: no measurement'}")
        answers = reasons[str(device)]
        print_table(
            ("backend", "registered by", "on this device"),
            [(name, origin(name), reason or "available") for name, reason in answers.items()],
        )
        if (why := why_calls_raise(answers)) is not None:
            print(why)
        for name in answers:
            if (said := kept.get((str(device), name))) is not None:
                print(f"{name}: {said}")


def why_calls_raise(reasons: dict[str, str | None]) -> str | None:
    """Why every call on a device raises: no backend that the environment names is available there."""
    try:
        named = read_variable()
        wanted = () if named is None else expand(named, BACKEND_VARIABLE)
    except ValueError:  # a name that is no backend's, which is said below
        return None
    if not wanted or any(reasons[name] is None for name in wanted):
        return None
    there = "; ".join(f"{name}: {reasons[name]}" for name in wanted)
    return f"{BACKEND_VARIABLE}={','.join(named or ())}: every call on this device raises ({there})"


def followed(device: torch.device) -> list[str]:
    """The tables that automatic choice follows on a device, the strongest first; or why the tuned one is refused."""
    try:
        return [table.name for table in tuned.tables(device.type, device.index)]
    except ValueError as error:
        return [f"nothing: {error}"]


def versions() -> dict[str, str | None]:
    """The versions of packages; ``None`` for one that is not installed."""
    found: dict[str, str | None] = {
        "flashmha": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
    }
    for package in LISTED_PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found

"""Destinations: where a command writes at its end, tried before it does its work."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path


def check_file(path: Path, flag: str) -> None:
    """Raise unless a file can be written: opening one says more than its permissions do, and changes nothing.

    Raises:
        ValueError: it is a folder, its folder is missing, or the system refuses.
    """
    if path.is_dir():
        raise ValueError(f"{flag} must name a file, got the folder {path}.")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"{flag} must name a file in a folder that exists, got {path}.")
    try:
        if path.is_file():
            path.open("ab").close()
        elif not path.exists():  # what is neither file nor folder, such as a pipe, is written to once
            path.open("xb").close()
            path.unlink()
    except OSError as error:
        raise ValueError(f"{flag} must name a file that can be written, got {path}: {error.strerror}.") from error


def check_folder(path: Path, flag: str, files: Sequence[str]) -> None:
    """Make a folder, and raise unless those files can be written there.

    Raises:
        ValueError: it is no folder, it cannot be made, or one of the files cannot.
    """
    missing = [one for one in (path, *path.parents) if not one.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{flag} must name a folder that can be written, got {path}: {error.strerror}.") from error
    try:
        for name in files:
            check_file(path / name, flag)
    except ValueError:
        with contextlib.suppress(OSError):
            for one in missing:
                os.rmdir(one)
        raise

"""Extras: packages that a part of flashmha wants, and that an installation need not have."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

EXTRAS = ("hypothesis", "matplotlib", "rich")
"""Each is imported by the name it is installed by."""


@contextlib.contextmanager
def wanted_by(part: str, instead: str = "") -> Iterator[None]:
    """Around imports: where an extra is missing, the error says what needs it and how to install it.

    Args:
        part: what cannot do without it.
        instead: another way out, behind the command that installs it.

    Raises:
        ModuleNotFoundError: with the name of the package that is missing.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        said = f"{part} must have {package}, which is not installed: pip install {package}{instead}"
        raise ModuleNotFoundError(said, name=package) from error

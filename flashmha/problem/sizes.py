"""Sizes: whole numbers, of Python's or of another library."""

from __future__ import annotations

import numbers


def is_size(size: object, least: int = 1) -> bool:
    """A whole number that is large enough."""
    return isinstance(size, numbers.Integral) and not isinstance(size, bool) and int(size) >= least


def check_sizes(least: int = 1, /, **sizes: object) -> None:
    """Raise ``ValueError`` where a size is none."""
    for name, size in sizes.items():
        if not is_size(size, least):
            raise ValueError(f"{name} must be a whole number of at least {least}, got {size!r}.")

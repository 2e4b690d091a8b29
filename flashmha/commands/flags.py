"""Flags that several commands take."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from .explain import within

DTYPES = ("float32", "float64", "bfloat16", "float16")


def at_least(smallest: int) -> Callable[[str], int]:
    """Reads a whole number from ``smallest`` up."""

    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < smallest:
            raise argparse.ArgumentTypeError(f"must be a whole number of at least {smallest}, got {text!r}")
        return within(int(text))

    return read

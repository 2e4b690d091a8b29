"""Flags that several commands take."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

DTYPE_NAMES = ("float32", "float64", "bfloat16", "float16")


def at_least(smallest: int) -> Callable[[str], int]:
    """Reads a whole number from ``smallest`` up."""

    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < smallest:
            raise argparse.ArgumentTypeError(f"must be a whole number of at least {smallest}, got {text!r}")
        return check_size(int(text))

    return read


LARGEST = 2**48
"""Beyond any size, and within the integers of a tensor."""


def check_size(number: int) -> int:
    """A number that tensors can hold."""
    if abs(number) > LARGEST:
        raise argparse.ArgumentTypeError(f"must be at most {LARGEST}, got {number}")
    return number


def version(text: str) -> tuple[int, int]:
    """Reads ``9.0``, or ``9``."""
    major, _, minor = text.partition(".")
    if not major.isdecimal() or not (minor or "0").isdecimal():
        raise argparse.ArgumentTypeError(f"must be a compute capability such as 9.0, got {text!r}")
    return int(major), int(minor or 0)


def whole_numbers(text: str) -> list[int]:
    """Reads ``5,3``."""
    try:
        numbers = [int(one) for one in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be whole numbers between commas, got {text!r}") from None
    return [check_size(number) for number in numbers]


def bound(text: str) -> int | None:
    """Reads a side of a window."""
    if text.lower() == "none":
        return None
    try:
        return at_least(0)(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}; none for no bound") from None


def add_sizes(parser: argparse.ArgumentParser, flag: str, text: str) -> None:
    """A flag that takes sizes between commas, between spaces, or both: ``64,128`` or ``64 128``."""
    parser.add_argument(flag, nargs="+", type=sizes, action=Joined, metavar="N", help=text)


def sizes(text: str) -> list[int]:
    """Reads sizes between commas."""
    return [at_least(1)(one) for one in text.split(",")]


class Joined(argparse.Action):
    """The lists that the words of a flag were read to, as one."""

    def __call__(self, parser: Any, options: Any, values: Any, flag: str | None = None) -> None:
        setattr(options, self.dest, [one for part in values for one in part])

"""Choices of a drawn problem, no two of which are alike to Hypothesis."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Sequence
from typing import Any

from hypothesis import strategies as st

Choose = Callable[[Sequence[Any]], Any]
"""Takes one of some options: drawn, or always the same. What is drawn shrinks to the first."""


class Choices:
    """Draws one of some options at a time, each time from a strategy that the problem has nowhere else.

    Hypothesis makes most examples by copying one draw of an example over another of the same kind, so that of a hundred
    problems no more than forty would be strangers to one another. Where no two draws are of one kind, all of them are.
    """

    def __init__(self, draw: st.DrawFn, about: str) -> None:
        self.draw, self.about, self.count = draw, about, 0

    def __call__(self, options: Sequence[Any]) -> Any:
        self.count += 1
        return options[self.draw(places(f"{self.about} {self.count}", len(options)))]


@functools.cache
def places(name: str, number: int) -> st.SearchStrategy[int]:
    """The places of some options, from a strategy that Hypothesis tells from those of other names."""
    first = zlib.crc32(name.encode())  # a range is known by where it begins
    return st.sampled_from(range(first, first + number)).map(lambda place: place - first)

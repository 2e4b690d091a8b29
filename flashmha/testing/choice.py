"""Choices of a drawn problem, no two of which are alike to Hypothesis."""

from __future__ import annotations

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
        first = zlib.crc32(f"{self.about} {self.count}".encode())  # a range is known by where it begins
        return options[self.draw(st.sampled_from(range(first, first + len(options)))) - first]

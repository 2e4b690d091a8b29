"""CUDA graphs of calls, whose replays take none of the host's time."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

Gave = TypeVar("Gave")

WARMUP = 3
"""Calls before one is captured: libraries take their memory, and compile, in the first ones."""


def capture(
    call: Callable[[], Gave], calls: int = 1, clear: Callable[[], object] = lambda: None
) -> tuple[torch.cuda.CUDAGraph, Gave]:
    """A graph of some calls in a row, and what the last one gave, which every replay writes anew.

    Args:
        clear: is called behind each call of the warm-up.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARMUP):
            call()
            clear()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            made = call()
    return graph, made

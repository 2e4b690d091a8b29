"""How values, tensors and errors are put into words."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..host.torch_state import is_compiling, is_dense


def say_size(name: str, size: int) -> str:
    """A size of a problem by its name; without its number under a compiler, whose graph that would bind to it."""
    return name if is_compiling() else f"{name}={size}"


def spell(thing: object) -> str:
    """Put what a caller passed in a few words."""
    if type(thing).__name__ == "CausalBias":
        upper = thing.variant.name == "UPPER_LEFT"  # type: ignore[attr-defined]
        return f"torch's CausalBias (say mask=causal({'align=' + repr('top_left') if upper else ''}))"
    if isinstance(thing, Tensor) and not is_dense(thing):
        return f"a {'nested' if thing.is_nested else dtype_name(thing.layout)} tensor of {dtype_name(thing.dtype)}"
    if isinstance(thing, Tensor):
        return f"{dtype_name(thing.dtype)} of shape {tuple(thing.shape)}"
    kind, words = type(thing).__name__, " ".join(repr(thing).split())
    if kind in words and len(words) > 40:  # an object that says no more than its class
        return kind
    return f"{kind} {words if len(words) <= 80 else words[:77] + '...'}"


def dtype_name(name: torch.dtype | torch.layout) -> str:
    """The name of a dtype or layout without its ``torch.``."""
    return str(name).removeprefix("torch.")


def tabulate(rows: Mapping[str, str]) -> str:
    """Rows as lines of ``name  text``, aligned."""
    width = max([0, *[len(name) for name in rows]])
    return "\n".join(f"  {name:<{width}}  {text}" for name, text in rows.items())


def first_line(error: BaseException) -> str:
    """The first line of an exception's text, of its representation where that is blank."""
    return (str(error).strip() or repr(error)).splitlines()[0]


def summarize_error(error: BaseException) -> str:
    """An exception's type and the first line of its text."""
    return f"{type(error).__name__}: {first_line(error)}"

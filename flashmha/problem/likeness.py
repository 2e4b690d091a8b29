"""What two functions share where a kernel that was compiled for one serves the other."""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

CONSTANTS = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
"""Kinds of values that are compiled into a kernel."""


class Itself:
    """A thing by its identity, which is not kept alive; one that is gone is like no other."""

    __slots__ = ("number", "thing")

    def __init__(self, thing: Any) -> None:
        self.number, self.thing = id(thing), weakref.ref(thing)

    def __hash__(self) -> int:
        return self.number

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Itself) and self.thing() is not None and self.thing() is other.thing()


def likeness(thing: Any, within: tuple[Any, ...] = ()) -> Hashable:
    """What a function is known by, so that one made anew, of the same code with the same numbers, is known again.

    That is its code, and the numbers and strings among its defaults, the variables that it captures and the globals
    that it reads; of tensors how they lie, since their values are a kernel's inputs; of other things the kind alone,
    since a compiler looks at each call whether what it read there is as it was. ``within`` are the functions around.
    """
    kind = type(thing)
    if kind in CONSTANTS:
        return kind, thing
    if isinstance(thing, Tensor):
        return kind, thing.shape, thing.stride(), thing.dtype, thing.device, thing.requires_grad
    for depth, outer in enumerate(within):
        if outer is thing:  # a function that calls itself
            return kind, depth
    within = (*within, thing)
    held: tuple[Any, ...] = ()
    if kind is types.FunctionType:
        held = (Itself(thing.__code__), *(likeness(one, within) for one in find_held(thing)))
    elif kind is types.MethodType:
        held = likeness(thing.__func__, within), likeness(thing.__self__, within)
    elif kind is functools.partial:
        held = tuple(likeness(one, within) for one in (thing.func, thing.args, *sorted(thing.keywords.items())))
    elif kind is tuple:
        held = tuple(likeness(one, within) for one in thing)
    return kind, held


def is_settled(function: Any, within: tuple[Any, ...] = ()) -> bool:
    """A function reads nothing that may be another later: no variable of its surroundings, no global but code.

    ``within`` are the functions that call it.
    """
    if any(function is outer for outer in within):
        return True
    if type(function) is not types.FunctionType or function.__closure__:
        return False
    defaults = (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
    code = function.__code__
    if any(type(one) not in CONSTANTS for one in defaults) or any(
        type(one) is types.CodeType for one in code.co_consts
    ):
        return False
    read = [function.__globals__[name] for name in code.co_names if name in function.__globals__]
    return all(isinstance(one, CODE) or is_settled(one, (*within, function)) for one in read)


CODE = (types.ModuleType, type, types.BuiltinFunctionType)
"""Kinds of globals that stay what they are."""


def find_held(function: types.FunctionType) -> list[Any]:
    """What a function holds beside its code: defaults, captured variables, and globals that are constants."""
    found: list[Any] = [function.__defaults__, *sorted((function.__kwdefaults__ or {}).items())]
    for cell in function.__closure__ or ():
        try:
            found.append(cell.cell_contents)
        except ValueError:  # a variable that has no value yet
            found.append(None)
    values = [function.__globals__.get(name) for name in function.__code__.co_names]
    return found + [value for value in values if type(value) in CONSTANTS]

"""The address of public names: the package they are imported from, not the file they lie in."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any


def publish(package: str, things: Iterable[Any]) -> None:
    """Give public classes and functions the name of a package as their ``__module__``.

    Pickles, reprs, FX graphs and ``torch.serialization.add_safe_globals`` name that. Annotations of a class are
    strings which ``typing.get_type_hints`` reads in the module that the class names, so they are read here, before. One
    price is left: ``inspect.getsource`` of such a class looks into that package's file; of its methods it finds it.
    """
    for thing in things:
        if isinstance(thing, type):
            thing.__annotations__ = inspect.get_annotations(thing, eval_str=True)
        thing.__module__ = package

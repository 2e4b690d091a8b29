"""A class's attributes as they were written, by which a patch is told; and code of a subclass or an instance."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

from torch import nn


class Written:
    """The attributes of a class under some names, as they were when it was made; it stands in the class's own body.

    A subclass inherits it, so ``kind`` says whether a class is the one that was written. Read it from the class: Dynamo
    2.8 knows no such attribute of a module. ``read`` gives those under the names ``at_calls``, ``whole`` those of then.
    """

    kind: type
    values: dict[str, Any]

    def __init__(self, names: Sequence[str], at_calls: Sequence[str] = ()) -> None:
        self.names, self.read = names, operator.attrgetter(*(at_calls or names))

    def __set_name__(self, kind: type, name: str) -> None:
        self.kind, self.whole = kind, self.read(kind)
        self.values = {each: getattr(kind, each) for each in self.names}


def is_as_written(kind: type) -> bool:
    """A class is one of the package's own, not a subclass of it, and so defines nothing under names of parameters."""
    written = getattr(kind, "_written", None)
    return written is not None and written.kind is kind


HARMLESS = frozenset(
    [
        "__module__",
        "__qualname__",
        "__doc__",
        "__dict__",
        "__weakref__",
        "__annotations__",
        "__annotate__",
        "__annotate_func__",
        "__annotations_cache__",
        "__firstlineno__",
        "__static_attributes__",
        "__orig_bases__",
        "__parameters__",
        "__init__",
        "__repr__",
        "extra_repr",
        "__constants__",
        "__jit_ignored_attributes__",
    ]
)
"""What a subclass may define without computing anything else."""


def find_own_code(module: nn.Module, kind: type[nn.Module]) -> list[str]:
    """List the names that a module's subclass, or the module itself, has in place of those of a class that it is of."""
    classes = type(module).__mro__
    above = classes[: classes.index(kind)]
    names = [name for each in above for name in vars(each) if name not in HARMLESS]
    return list(dict.fromkeys(names + find_shadows(module)))


def find_shadows(module: nn.Module) -> list[str]:
    """Methods of a module's class that the instance has another one for."""
    return [name for name in vars(module).keys() - USUAL if callable(getattr(type(module), name, None))]


USUAL = {*vars(nn.Module()), "_compiled_call_impl"}
"""What an instance has in its dictionary and is no method's."""

"""A class's attributes as they were written, by which a patch is told."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any


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

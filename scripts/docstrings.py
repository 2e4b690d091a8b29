"""How the site reads docstrings: a double colon in front of an indented block becomes one, as Markdown wants it."""

from __future__ import annotations

import re
from typing import Any

import griffe


class OneColon(griffe.Extension):
    """Docstrings are written with ``::`` before code, as Python's own are; Markdown would show both colons."""

    def on_object(self, *, obj: griffe.Object, **more: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"::(?=\n\n)", ":", obj.docstring.value)

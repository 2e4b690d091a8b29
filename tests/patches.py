"""Names of the choice replaced for a test, wherever they were imported to."""

import contextlib
import sys
from collections.abc import Iterator
from typing import Any
from unittest import mock


@contextlib.contextmanager
def everywhere(**values: Any) -> Iterator[None]:
    """Each name replaced in every file of the backends that holds it."""
    rooms = [module for name, module in sys.modules.items() if name.startswith("flashmha.backends.")]
    with contextlib.ExitStack() as stack:
        for name, value in values.items():
            for room in [room for room in rooms if name in vars(room)]:
                stack.enter_context(mock.patch.object(room, name, value))
        yield

"""The wish for a backend: of a call, of ``use_backend``, of the environment."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from .registry import expand

Wanted = str | Sequence[str] | None
BACKEND_VARIABLE = "FLASHMHA_BACKEND"


variables: Any = getattr(os.environ, "_data", os.environ)
"""The mapping behind ``os.environ``: a look at it spares a call two exceptions that ``get`` raises and
catches, 2 to 5 us of 67."""
KEY: Any = os.environ.encodekey(BACKEND_VARIABLE) if variables is not os.environ else BACKEND_VARIABLE
"""The name as that mapping keeps it."""


class Wish(threading.local):
    """The backends that ``use_backend`` set, a thread. (Dynamo guards a ``threading.local``, no ``ContextVar``.)"""

    wanted: Wanted = None


wish = Wish()


def asked(wanted: Wanted = None) -> tuple[str, Wanted]:
    """The strongest wish of call, context and environment: where it was said, and the names; ``None`` for automatic."""
    if wanted is not None:
        return "backend", wanted
    if wish.wanted is not None:
        return "use_backend", wish.wanted
    return BACKEND_VARIABLE, read_variable() if KEY in variables else None


def read_variable() -> list[str] | None:
    """The names in ``FLASHMHA_BACKEND``; ``None`` where it is not set, or to nothing."""
    named = os.environ.get(BACKEND_VARIABLE)
    return [name.strip() for name in named.split(",")] if named else None


def preference(wanted: Wanted = None) -> Wanted:
    """The names that were asked for; ``None`` for automatic."""
    return asked(wanted)[1]


@contextlib.contextmanager
def use_backend(backend: str | Sequence[str]) -> Iterator[None]:
    """Ask for a backend, or a list in order, in every call of this thread inside the ``with``."""
    expand(backend)
    before = wish.wanted
    wish.wanted = backend
    try:
        yield
    finally:
        wish.wanted = before

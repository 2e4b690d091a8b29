"""The choice among the backends on the list, which users can read and change.

Strongest first, a problem goes to the backend named in the call or on the layer, by ``with use_backend(...)``, or in
the environment variable ``FLASHMHA_BACKEND``; else to the first in ``order(spec)`` without a reason against it, for a
short problem to the first that need not compile. A backend that was named and cannot serve raises: nothing falls back
in silence.
"""

from .base import Backend
from .choice.builtin import BUILT_IN
from .choice.choose import choose
from .choice.explanation import Explanation, explain
from .choice.order import order
from .choice.record import Call, note, record
from .choice.registry import FAMILIES, expand, get, names, origin, prefer, register, unregister
from .choice.tuned import load_tuned
from .choice.wishes import use_backend
from .limits import FEATURES, Limits

__all__ = [
    "FAMILIES",
    "FEATURES",
    "Backend",
    "Call",
    "Explanation",
    "Limits",
    "choose",
    "expand",
    "explain",
    "get",
    "load_tuned",
    "names",
    "note",
    "order",
    "origin",
    "prefer",
    "record",
    "register",
    "unregister",
    "use_backend",
]


for kind in BUILT_IN:
    register(kind)

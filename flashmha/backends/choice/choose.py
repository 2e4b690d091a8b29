"""The backend that serves a problem."""

from __future__ import annotations

import logging

from ...problem.errors import NoBackendError
from ...problem.spec import AttentionSpec
from ..base import Backend
from ..compiling import waits
from . import registry
from .memory import keep, kept
from .order import order
from .ranking import LAST
from .registry import expand
from .waiting import WAITS, capturing, keeps, kernel_of, known_wait, long, loss, movable, must_compile
from .wishes import Wanted, asked


def reason(backend: Backend, spec: AttentionSpec) -> str | None:
    """Why a backend cannot serve a problem here and now; ``None`` where it can."""
    return backend.why_not(spec) or backend.why_not_here(spec.device) or backend.why_not_built(spec)


def choose(spec: AttentionSpec, wanted: Wanted = None, calls: int = 1) -> Backend:
    """The backend that serves a problem, in as many calls as will follow at once.

    Raises:
        NoBackendError: nobody can, or the one that was named cannot; with every reason.
        ValueError: the file in ``FLASHMHA_TUNED`` is not for this machine.
    """
    said, named = asked(wanted)
    reasons: dict[str, str] = {}
    if named is not None:
        for name in expand(named, said):
            backend = registry.entries[name]
            why = reason(backend, spec)
            if why is None:
                return backend
            reasons[name] = why
        raise NoBackendError(spec, reasons, f"{said}={named!r}")
    before = kept(spec)
    if before is not None:
        if before.wait is not None:
            before.wait.lose(before.loss * calls)
        return before.backend
    found, compiles, passed = pick(spec, reasons)
    if found is None:
        raise NoBackendError(spec, reasons)
    if compiles is not None:
        logger.info("%s compiles before it serves %s: %s", found.name, spec, compiles)
    wait = None
    if passed is not None and not capturing(spec):
        kernel = kernel_of(passed, spec)
        wait = None if kernel is None else waits.of(passed.name, kernel, spec.needs_grad)
        if wait is not None:
            wait.lose(loss(spec) * calls)
    keep(spec, found, reasons, wait)
    return found


logger = logging.getLogger("flashmha")


def pick(spec: AttentionSpec, reasons: dict[str, str]) -> tuple[Backend | None, str | None, Backend | None]:
    """Automatic choice: a backend, what it has to compile first, and one that was passed over since it would have to.

    Why not those before it joins ``reasons``. A short problem passes over a backend that would have to compile, where
    another but the definition, which holds every score in memory, can serve at once, until that has lost more than
    compiling takes. A long one waits for the compiler.
    """
    waiting: tuple[Backend, str] | None = None
    for name in order(spec):
        backend = registry.entries[name]
        why = reason(backend, spec)
        if why is None:
            compiles = must_compile(backend, spec)
            if compiles is None and (waiting is None or name != LAST):
                return backend, None, None if waiting is None else waiting[0]
            if compiles is None:
                continue
            wait = known_wait(backend, spec)
            so_far = "" if wait is None else f"; {wait}"
            if waiting is None:
                if long(spec) or (wait is not None and wait.over and movable(spec) and not keeps()):
                    return backend, f"{compiles}{so_far}", None
                waiting = (backend, compiles)
            why = f"{WAITS}: {compiles}{so_far}"
        reasons[name] = why
    return (None, None, None) if waiting is None else (*waiting, None)

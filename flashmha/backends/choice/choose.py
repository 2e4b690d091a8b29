"""The backend that serves a problem."""

from __future__ import annotations

import logging
from typing import NamedTuple

from ...problem.errors import NoBackendError
from ...problem.spec import AttentionSpec
from ..base import Backend
from ..compiling import Wait, waits
from . import registry
from .memory import Memory, key_of
from .order import order
from .registry import expand
from .waiting import (
    WAITS,
    capturing,
    compiled_first,
    is_worth_compiling,
    keeps_first_choice,
    known_wait,
    loss,
    may_move,
)
from .wishes import KEY, Wanted, asked, variables, wish

logger = logging.getLogger("flashmha")


class Choice(NamedTuple):
    """An automatic choice for a problem. A call loses ``loss`` seconds without the kernel of ``wait``."""

    backend: Backend
    wait: Wait | None
    loss: float

    def holds(self, spec: AttentionSpec) -> bool:
        """It is still the choice: no kernel that it waits for has become worth compiling."""
        return self.wait is None or not (self.wait.over and may_move(spec))


choices: Memory[Choice] = Memory()
"""Spares an attention on a CPU 4.5 us of 22, a padded one 10 of 58."""


def reason(backend: Backend, spec: AttentionSpec) -> str | None:
    """Why a backend cannot serve a problem here and now; ``None`` where it can."""
    return backend.why_not(spec) or backend.why_not_here(spec.device) or backend.why_not_built(spec)


def choose(spec: AttentionSpec, wanted: Wanted = None, calls: int = 1) -> Backend:
    """The backend that serves a problem, in as many calls as will follow at once.

    Raises:
        NoBackendError: no backend can, or the one that was named cannot; with every reason.
        ValueError: the file in ``FLASHMHA_TUNED`` is not for this machine.
    """
    if wanted is not None or wish.wanted is not None or KEY in variables:
        said, named = asked(wanted)
        if named is not None:
            return choose_among(spec, expand(named, said), f"{said}={named!r}")
    key = spec if spec.shared else spec.form or spec.outline  # ``key_of``, without a call for it
    before = None if key is None else choices.get(key)
    if before is not None and (before.wait is None or before.holds(spec)):  # the first spares a call
        if before.wait is not None:
            before.wait.lose(before.loss * calls)
        return before.backend
    token = None if key is None else choices.token()
    reasons: dict[str, str] = {}
    found, compiles, passed = pick(spec, reasons)
    if found is None:
        raise NoBackendError(spec, reasons)
    if compiles is not None:
        logger.info("%s compiles before it serves %s: %s", found.name, spec, compiles)
    wait = None
    if passed is not None and not capturing(spec):
        kernel = passed.kernel_key(spec)
        wait = None if kernel is None else waits.of(passed.name, kernel, spec.needs_grad)
        if wait is not None:
            wait.lose(loss(spec) * calls)
    if token is not None and is_kept(spec, found, reasons, wait):
        counted = wait is not None and not keeps_first_choice()
        choices.put(key, token, Choice(found, wait, loss(spec)) if counted else Choice(found, None, 0.0))
    return found


def choose_among(spec: AttentionSpec, names: tuple[str, ...], wanted: str) -> Backend:
    """The first of the backends that were named which can serve a problem; ``wanted`` is how they were named."""
    reasons: dict[str, str] = {}
    for name in names:
        backend = registry.entries[name]
        why = reason(backend, spec)
        if why is None:
            return backend
        reasons[name] = why
    raise NoBackendError(spec, reasons, wanted)


def reads_pages(spec: AttentionSpec, wanted: Wanted = None) -> bool:
    """The choice for a problem is a backend that reads keys where they lie in pages."""
    said, named = asked(wanted)
    if named is None:
        return choose(spec).reads_pages(spec)
    backends = [registry.entries[name] for name in expand(named, said)]
    able = [backend for backend in backends if reason(backend, spec) is None]
    return len(able) > 0 and able[0].reads_pages(spec)


def chosen_before(spec: AttentionSpec) -> Choice | None:
    """The choice that was made for a problem before, where it still holds."""
    key = key_of(spec)
    before = None if key is None else choices.get(key)
    return before if before is not None and before.holds(spec) else None


def is_kept(spec: AttentionSpec, backend: Backend, reasons: dict[str, str], wait: Wait | None) -> bool:
    """A choice is remembered; for a problem with tensors, where every backend that was asked judges by its outline.

    Nothing is remembered that was found while a CUDA graph was captured, where a package that was not tried out yet is
    refused.
    """
    if capturing(spec):
        return False
    if spec.shared:
        return True
    judges = (backend, *(registry.entries[other] for other in reasons))
    if not all(one.judges_by_outline for one in judges) or compiled_first(backend, spec) is not None:
        return False
    if wait is None and not keeps_first_choice() and any(why.startswith(WAITS) for why in reasons.values()):
        return False
    return not any("out of memory" in why for why in reasons.values())


def pick(spec: AttentionSpec, reasons: dict[str, str]) -> tuple[Backend | None, str | None, Backend | None]:
    """Automatic choice: a backend, what it has to compile first, and one that was passed over since it would have to.

    Why not those before it joins ``reasons``. Short problems skip a backend that must compile first if another one,
    which does not hold every score, is ready, until that has lost more than compiling takes. A long one waits for the
    compiler.
    """
    waiting: tuple[Backend, str] | None = None
    for name in order(spec):
        backend = registry.entries[name]
        why = reason(backend, spec)
        if why is None:
            compiles = compiled_first(backend, spec)
            if compiles is None and (waiting is None or not backend.holds_scores):
                return backend, None, None if waiting is None else waiting[0]
            if compiles is None:
                continue
            wait = known_wait(backend, spec)
            so_far = "" if wait is None else f"; {wait}"
            if waiting is None:
                if is_worth_compiling(spec) or (
                    wait is not None and wait.over and may_move(spec) and not keeps_first_choice()
                ):
                    return backend, f"{compiles}{so_far}", None
                waiting = (backend, compiles)
            why = f"{WAITS}: {compiles}{so_far}"
        reasons[name] = why
    return (None, None, None) if waiting is None else (*waiting, None)

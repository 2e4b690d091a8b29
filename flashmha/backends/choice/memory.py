"""What automatic choice said before, and for how long that holds."""

from __future__ import annotations

from typing import Any, NamedTuple

from ...host.torch_state import asks_deterministic, only_warns
from ...problem.spec import SHARED, AttentionSpec
from ..base import Backend
from ..compiling import Wait
from ..sdpa.switches import switches
from . import registry, tuned
from .builtin import OWN
from .waiting import WAITS, capturing, keeps, loss, movable, must_compile


class Choice(NamedTuple):
    """What automatic choice said about a problem, and under which list, tuned table and switches of torch: whether it
    is to be deterministic, and those of SDPA. A call loses ``loss`` seconds without the kernel of ``wait``."""

    entries: object
    table: object
    under: tuple[bool, ...]
    backend: Backend
    wait: Wait | None
    loss: float


chosen: dict[Any, Choice] = {}
"""What was chosen for a problem: itself where it is shared, else its form or its outline."""


def kept(spec: AttentionSpec) -> Choice | None:
    """What was chosen for a problem before, where it still holds."""
    name = spec if spec.shared else spec.form or spec.outline
    known = None if name is None else chosen.get(name)
    if known is None:
        return None
    entries, table, under, _, wait, _ = known
    if entries is not registry.entries or table is not tuned.state.table:
        return None
    if wait is not None and wait.over and movable(spec):
        return None
    return None if under and under != (asks_deterministic(), only_warns(), *switches()) else known


def keep(spec: AttentionSpec, backend: Backend, reasons: dict[str, str], wait: Wait | None) -> None:
    """Remember the backend of a problem, and for a problem with tensors only what our own have said and will say again.

    Others may look at the tensors. Nothing is remembered that was found while a CUDA graph was captured, where a
    package that was not tried out yet is refused.
    """
    name = spec if spec.shared else spec.form or spec.outline
    if name is None or capturing(spec):
        return
    stays = keeps()
    if not spec.shared:
        asked = (backend, *(registry.entries[other] for other in reasons))
        if any(type(one) not in OWN for one in asked) or must_compile(backend, spec) is not None:
            return
        waited = wait is None and not stays and any(why.startswith(WAITS) for why in reasons.values())
        if waited or any("out of memory" in why for why in reasons.values()):
            return
    if len(chosen) >= SHARED:
        chosen.clear()
    under = (asks_deterministic(), only_warns(), *switches()) if spec.device.type == "cuda" else ()
    given = (None, 0.0) if stays or wait is None else (wait, loss(spec))
    chosen[name] = Choice(registry.entries, tuned.state.table, under, backend, *given)

"""A class of a backend, checked and guarded before it may stand on the list."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

from ...problem.spec import AttentionSpec
from ...problem.wording import summarize_error
from ..base import CONTRACTS, Backend
from ..limits import Limits

FACTS: dict[str, tuple[type, ...]] = {
    "measured_as": (str, type(None)),
    "install": (str, type(None)),
    "remark": (str, type(None)),
    "compiles": (str, type(None)),
    "unfused_on": (tuple,),
    "tolerance": (tuple,),
    "holds_scores": (bool,),
    "obeys_switches": (bool,),
    "launched_by_cpp": (bool,),
    "reads_caches": (bool,),
    "reads_late": (bool,),
    "judges_by_outline": (bool,),
    "results_checked": (bool,),
    "joins_gradients": (bool,),
    "yields_small_weights": (bool,),
}
"""What a class says of itself as data, and the kinds that it may be."""


def made(backend: object) -> Backend:
    """A class of a backend, checked and instantiated."""
    if not (isinstance(backend, type) and issubclass(backend, Backend)):
        raise TypeError(f"register takes a Backend class, got {backend!r}.")
    kind = backend.__name__
    if backend.contract not in CONTRACTS:
        raise ValueError(
            f"contract must be {' or '.join(map(str, CONTRACTS))}, as this release of flashmha keeps, "
            f"got {backend.contract!r} on {kind}; install releases of both packages that share one."
        )
    instance = backend()
    name, limits = getattr(instance, "name", None), getattr(instance, "limits", None)
    if not isinstance(name, str) or not name or name != name.strip() or "," in name:
        raise TypeError(f"name must be a string without commas or outer spaces, got {name!r} on {kind}.")
    if not isinstance(limits, Limits):
        raise TypeError(f"limits must be a Limits, got {limits!r} on {kind}.")
    family = instance.family
    if family is not None and (not isinstance(family, str) or not family or family != family.strip() or "," in family):
        raise TypeError(f"family must be a string without commas or outer spaces, or None, got {family!r} on {kind}.")
    for fact, kinds in FACTS.items():
        if not isinstance(getattr(instance, fact), kinds):
            wanted = " or ".join("None" if one is type(None) else one.__name__ for one in kinds)
            raise TypeError(f"{fact} must be {wanted}, got {getattr(instance, fact)!r} on {kind}.")
    if not comes_with_flashmha(instance):
        for guard, questions in GUARDS.items():
            for question in questions:
                setattr(instance, question, guard(question, getattr(instance, question)))
    return instance


def guarded_reason(question: str, ask: Callable[[Any], Any]) -> Callable[[Any], str | None]:
    """A question that always gives a reason or ``None``: what it raises is a reason against its backend."""

    def answer(about: Any) -> str | None:
        try:
            said = ask(about)
        except (Exception, SystemExit) as error:
            return f"{question} raised {summarize_error(error)}"
        return said if said is None or isinstance(said, str) else f"{question} must give text or None, got {said!r}"

    return answer


def guarded_flag(question: str, ask: Callable[..., Any]) -> Callable[..., bool]:
    """A question that always gives ``True`` or ``False``; what it raises is a no."""

    def answer(*about: Any, **named: Any) -> bool:
        try:
            return ask(*about, **named) is True
        except (Exception, SystemExit):
            return False

    return answer


def guarded_key(question: str, ask: Callable[[AttentionSpec], Any]) -> Callable[[AttentionSpec], Hashable]:
    """A question that always gives a name of a kernel; what raises or has no hash is named by the problem."""

    def answer(spec: AttentionSpec) -> Hashable:
        try:
            key: Hashable = ask(spec)
            hash(key)
        except (Exception, SystemExit):
            return spec.outline
        return key

    return answer


GUARDS: dict[Callable[[str, Any], Callable[..., Any]], tuple[str, ...]] = {
    guarded_reason: ("why_not_here", "why_not", "why_not_built", "must_compile", "on_disk"),
    guarded_flag: ("builds_mask", "reads_pages", "runs_packed"),
    guarded_key: ("kernel_key",),
}
"""Questions to a backend of another package, whose faults must not reach the others."""


def comes_with_flashmha(backend: Backend) -> bool:
    """Its class is this package's own, so that ``origin`` says so and its faults are raised."""
    return type(backend).__module__.startswith("flashmha.backends.")

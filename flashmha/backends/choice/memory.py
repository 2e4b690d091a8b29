"""Answers about problems, and for how long they hold."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, Generic, TypeVar

from ...host.torch_state import (
    allows_cudnn,
    allows_efficient,
    allows_flash,
    allows_math,
    asks_deterministic,
    only_warns,
)
from ...problem.spec import SHARED, AttentionSpec
from . import registry, tuned

T = TypeVar("T")
Token = tuple[Any, Any, tuple[bool, ...]]
"""The list of backends, the tuned table, and torch's switches: deterministic algorithms, and the kernels of SDPA."""


def key_of(spec: AttentionSpec) -> Hashable:
    """The key that answers about a problem are kept under: itself where it is shared, else its form or its outline.

    ``None`` where nothing may be kept.
    """
    return spec if spec.shared else spec.form or spec.outline


class Memory(Generic[T]):
    """At most ``SHARED`` answers, each of which holds while all that it depends on stays as it was.

    An answer is kept under the token that was taken before it was looked for, so that a change meanwhile, by any
    thread, is noticed. Nothing in it is changed but the dictionary, by single operations.
    """

    def __init__(self) -> None:
        self._answers: dict[Hashable, tuple[Any, Any, tuple[bool, ...], T]] = {}

    def token(self) -> Token:
        """All that an answer which is looked for now depends on."""
        switches = (
            asks_deterministic(),
            only_warns(),
            allows_efficient(),
            allows_math(),
            allows_flash(),
            allows_cudnn(),
        )
        return registry.entries, tuned.state.table, switches

    def get(self, key: Hashable) -> T | None:
        """The answer under a key, where it still holds."""
        known = self._answers.get(key)
        if known is None:
            return None
        entries, table, switches, answer = known
        if entries is not registry.entries or table is not tuned.state.table:
            return None
        # as ``token`` asks; a call for it would take a step in Python of every call of a layer
        if switches != (
            asks_deterministic(),
            only_warns(),
            allows_efficient(),
            allows_math(),
            allows_flash(),
            allows_cudnn(),
        ):
            return None
        return answer

    def put(self, key: Hashable, token: Token, answer: T) -> None:
        """Keep an answer that was found under a token."""
        if len(self._answers) >= SHARED:
            self._answers.clear()
        self._answers[key] = (*token, answer)

    def clear(self) -> None:
        """Forget all of it."""
        self._answers.clear()

"""NoBackendError: a problem that no backend serves, with one reason for each."""

from __future__ import annotations

from collections.abc import Mapping

from .spec import AttentionSpec
from .wording import tabulate


class NoBackendError(RuntimeError):
    """No backend can serve a problem, or the one that was named cannot.

    Attributes:
        spec: the problem.
        reasons: backend name -> why it cannot serve the problem.
        wanted: what named a backend, as it was written, such as ``backend='flash2'`` or ``FLASHMHA_BACKEND='flash2'``;
            ``None`` where the choice was automatic.
    """

    def __init__(self, spec: AttentionSpec, reasons: Mapping[str, str], wanted: str | None = None) -> None:
        self.spec = spec
        self.reasons = dict(reasons)
        self.wanted = wanted
        asked = "No backend can serve" if wanted is None else f"{wanted} cannot serve"
        fix = "" if wanted is None else "\nChoose another backend, or leave it unset: then flashmha chooses."
        super().__init__(f"{asked} this problem:\n  {spec}\n{tabulate(self.reasons)}{fix}")

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.spec, self.reasons, self.wanted)

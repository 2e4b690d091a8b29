"""A problem served by its backend."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...host.torch_state import is_autocasting, without_autocast
from ...problem.spec import AttentionSpec
from ..base import Backend, Serve
from .record import note, recording


def serve(
    backend: Backend, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, layer: Any = None, call: Serve | None = None
) -> Any:
    """Let a backend serve a problem: told to ``record``, without autocast, and checked unless its own tests do that.

    ``layer`` is what the attention is for; ``call`` is what the backend prepared for this problem, where it was asked.
    """
    if recording.calls is not None:
        note(layer, spec, backend)
    if is_autocasting():  # it would cast masks and sums, which are finer than q, k and v on purpose
        with without_autocast(spec.device):
            result = backend(q, k, v, spec) if call is None else call(q, k, v)
    else:
        result = backend(q, k, v, spec) if call is None else call(q, k, v)
    if not backend.results_checked:
        check_result(result, spec, backend)
    return result


def check_result(result: Any, spec: AttentionSpec, backend: Backend) -> None:
    """Raise where a backend returned something of another kind, shape or dtype."""
    parts = result if spec.need_lse and isinstance(result, tuple) else (result,)
    wanted = [(spec.batch, spec.seqlen_q, spec.heads, spec.head_dim_v), (spec.batch, spec.heads, spec.seqlen_q)]
    shapes = [tuple(part.shape) if isinstance(part, Tensor) else type(part).__name__ for part in parts]
    if shapes != wanted[: 1 + spec.need_lse]:
        raise ValueError(
            f"the backend {backend.name} must return {'out and lse' if spec.need_lse else 'out'} of shape "
            f"{' and '.join(map(str, wanted[: 1 + spec.need_lse]))}, got {' and '.join(map(str, shapes))}."
        )
    if parts[0].dtype != spec.dtype:
        raise ValueError(f"the backend {backend.name} must return out in {spec.dtype}, got {parts[0].dtype}.")

"""What the options of a layer demand of a backend, whatever it is called with."""

from __future__ import annotations

import itertools

import torch

from ..backends import expand, get
from ..backends.base import Backend
from ..problem.errors import NoBackendError
from ..problem.scores import Bias
from ..problem.spec import AttentionSpec
from .options import rule_of
from .projection import sizes_of
from .protocol import Layer


def find_demands(layer: Layer) -> frozenset[str]:
    """The features that every problem of a layer needs, but for its window."""
    found = problem_on_paper(layer).features | find_bias_demands(layer)
    return frozenset(name for name in found if name not in ("causal", "window"))


@torch.no_grad()
def find_bias_demands(layer: Layer) -> frozenset[str]:
    """The features that a plain ``position_bias`` needs; a module says what it is when it is called."""
    bias = layer.position_bias
    return bias.features if isinstance(bias, Bias) else frozenset()


def problem_on_paper(
    layer: Layer, dtype: torch.dtype = torch.float32, device: str = "cpu", batch: int = 1, seqlen: int = 1024
) -> AttentionSpec:
    """A problem of a layer without its bias and without a gradient."""
    sizes = sizes_of(layer)
    return AttentionSpec(
        batch,
        *(seqlen, seqlen),
        *(sizes.heads, sizes.heads_kv, sizes.head_dim, sizes.head_dim_v),
        dtype,
        torch.device(device),
        mask=rule_of(layer),
        softcap=layer.softcap,
        sinks=layer.sinks,
        softmax_scale=layer.softmax_scale,
    )


SEQLENS = (1024, 1)
"""Of long and of short calls: a kernel may be made for either."""


def check_served(layer: Layer) -> None:
    """Raise ``NoBackendError`` where no backend that a layer names can serve it, on any device and in any dtype."""
    if layer.backend is None:
        return
    reasons = {}
    for name in expand(layer.backend):
        why = why_never(get(name), layer)
        if why is None:
            return
        reasons[name] = why
    raise NoBackendError(problem_on_paper(layer), reasons, f"backend={layer.backend!r}")


def why_never(backend: Backend, layer: Layer) -> str | None:
    """Why a backend cannot serve a layer, whatever it is called with; ``None`` where it may."""
    limits, reasons = backend.limits, []
    lost = find_bias_demands(layer) - limits.features
    if lost:
        return f"no {', no '.join(sorted(lost))}"
    for device, dtype, seqlen in itertools.product(limits.devices or ("cpu", "cuda"), limits.dtypes, SEQLENS):
        why = backend.why_not(problem_on_paper(layer, dtype, device, max(1, limits.batch_min), seqlen))
        if why is None:
            return None
        reasons.append(why)
    return reasons[0] if reasons else None

"""The attention problems that an overridden ``attend`` runs in one call of a layer, and their weights."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..backends.choice.wishes import Wanted
from ..functional import as_bias, as_mask, check_arguments, run_attention
from ..host.torch_state import autocast
from ..problem.spec import AttentionSpec
from ..weights.attend import attention_with_weights
from .hops import refuse_weights, say_heads
from .precision import weights_dtype
from .protocol import Layer


class Problems:
    """What one call of a layer notes of the problems that its ``attend`` runs; overrides hand it on as ``call``.

    ``weigh`` holds how ``attention_with_weights`` makes the weights, where the call asks for them; ``several`` where
    the layer says in ``process_weights`` what they are. With ``dry`` problems are noted and not computed.
    """

    def __init__(
        self, layer: Layer, wanted: Wanted, weigh: dict[str, Any] | None, several: bool, dry: bool = False
    ) -> None:
        self.layer, self.wanted, self.weigh, self.several, self.dry = layer, wanted, weigh, several, dry
        self.specs: list[AttentionSpec] = []
        self.weights: list[Tensor] = []

    def run(self, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
        """Attention for one problem, whose weights are kept where the call asks for them."""
        self.specs.append(spec)
        if self.dry:
            return q.new_zeros(spec.batch, spec.seqlen_q, spec.heads, spec.head_dim_v)
        if self.weigh is None:
            out = run_attention(q, k, v, spec, self.wanted, self.layer)
            assert isinstance(out, Tensor)
            return out
        if not self.several:
            self.check_alone(spec)
        out, weights = attention_with_weights(
            q, k, v, spec, self.wanted, self.layer, dtype=weights_dtype(q), remade=True, **self.weigh
        )
        self.weights.append(weights)
        return out

    def check_alone(self, spec: AttentionSpec) -> None:
        """Raise where the weights of a problem are not those of the layer."""
        if len(self.specs) > 1:
            refuse_weights(self.layer, "run attention more than once, so that there are several weights")
        if spec.heads != self.layer.num_heads:
            refuse_weights(self.layer, say_heads(self.layer, spec.heads))

    def take_weights(self) -> list[Tensor]:
        """The weights of every problem that ran."""
        if not self.weights:
            refuse_weights(self.layer, "ran no attention of the package's own, which super().attend does")
        return self.weights


def run_problem(
    layer: Layer, call: Problems | None, q: Tensor, k: Tensor, v: Tensor, *, mask: Any, bias: Any, **scores: Any
) -> Tensor:
    """The package's own ``attend``.

    Raises:
        TypeError: an override has lost what it was called with.
    """
    if not isinstance(call, Problems):
        raise TypeError(
            f"attend must be called with what it was given, call among it, got call={call!r}: an override of "
            f"{type(layer).__name__} ends in **call and hands that on."
        )
    check_arguments(q, k, v, **scores)
    q, k, v = autocast(q, k, v)
    return call.run(q, k, v, AttentionSpec.of(q, k, v, mask=as_mask(mask), bias=as_bias(bias), **scores))

"""Attention weights beside an output."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .backends import Wanted, get, note, preference
from .backends.naive import probabilities, scores, weigh
from .functional import run
from .spec import AttentionSpec


def attention_with_weights(
    q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, wanted: Wanted = None, layer: Any = None
) -> tuple[Tensor, Tensor]:
    """The output and the attention weights (batch, heads, seqlen_q, seqlen_k), before dropout, 0 in blind rows.

    Where no backend is named both come out of one pass of the definition, which can be differentiated twice and
    forward, and draws the dropout ``nn.MultiheadAttention`` draws. A named backend makes the output it was named
    for, and the weights are computed beside it.
    """
    score, blind = scores(q, k, spec)
    weights = probabilities(score, blind, spec)
    if preference(wanted) is not None:
        out = run(q, k, v, spec, wanted, layer)
        assert isinstance(out, Tensor)
        return out, weights
    note(layer, spec, get("naive"))
    return weigh(weights, v, spec), weights

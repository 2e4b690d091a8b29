"""explain: which backend would serve, and why not the others."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor

from . import backends, padding
from .arguments import check_kinds
from .backends import Explanation, Wanted
from .call import read_call
from .forward import prepare
from .functional import as_bias, as_mask, autocast
from .masks import short
from .module import FlashMultiHeadAttention
from .spec import AttentionSpec


def explain(subject: AttentionSpec | FlashMultiHeadAttention | Tensor, *args: Any, **kwargs: Any) -> Explanation:
    """Which backend would serve a problem, and why not the others: one line a backend. Nothing is computed.

    ``explain(spec, backend=None)`` for an ``AttentionSpec``; ``explain(q, k, v, mask=..., ...)`` for a call of
    ``attention``; ``explain(layer, query, key, value, ...)`` for a call of a layer, which projects its inputs to
    see the problem, and says in ``notes`` what it does about padding and precision.
    """
    if isinstance(subject, AttentionSpec):
        return backends.explain(subject, *args, **kwargs)
    if isinstance(subject, FlashMultiHeadAttention):
        return explain_layer(subject, *args, **kwargs)
    if isinstance(subject, Tensor):
        return explain_call(subject, *args, **kwargs)
    raise TypeError(
        f"subject must be an AttentionSpec, a FlashMultiHeadAttention or the tensor q, got {type(subject).__name__}."
    )


def explain_call(q: Tensor, k: Tensor, v: Tensor, *, backend: Wanted = None, **options: Any) -> Explanation:
    options["mask"], options["bias"] = as_mask(options.get("mask")), as_bias(options.get("bias"))
    options["need_lse"] = options.pop("return_lse", False)
    return backends.explain(AttentionSpec.of(*autocast(q, k, v), **options), backend)


def explain_layer(
    layer: FlashMultiHeadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
    backend: Wanted = None,
) -> Explanation:
    wanted = layer.backend if backend is None else backend
    need_weights = need_weights and layer.need_weights
    check_kinds(query, key, value, key_padding_mask, attn_mask)
    call = read_call(layer, query, key, value, key_padding_mask, need_weights, attn_mask, is_causal)
    problem = prepare(layer, call, wanted, layer.skip_padding)
    notes = []
    if problem.padded is not None:
        real, total = problem.q.shape[1], problem.padded.rows.numel()
        notes.append(
            f"skip_padding: {total - real} of {total} positions are left out; "
            "while compiling or capturing a CUDA graph every row is computed"
        )
    elif layer.skip_padding and key_padding_mask is not None:
        notes.append(f"skip_padding: every row is computed ({padding.refusal(layer, call)})")
    if problem.dtype is not None:
        notes.append(f"computed in {short(problem.dtype)}: this CPU is slower in {short(call.query.dtype)}")
    said = backends.explain(problem.spec, wanted)
    return dataclasses.replace(said, notes=(*said.notes, *notes))

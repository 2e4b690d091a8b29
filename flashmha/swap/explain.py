"""explain: which backend would serve, and why not the others."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor

from .. import backends
from ..backends import Explanation
from ..backends.choice.wishes import Wanted
from ..backends.rewrites.order import RealFirst
from ..functional import as_bias, as_mask, attention, check_arguments
from ..host.torch_state import autocast
from ..layer import padding
from ..layer.arguments import Arguments, check_kinds
from ..layer.cached import check_cache, enter_cache
from ..layer.call import read_call
from ..layer.features import is_ours
from ..layer.keys_values import with_stand_ins
from ..layer.module import FlashMultiHeadAttention
from ..layer.prepared import Prepared, prepare_call
from ..layer.problems import Problems
from ..layer.slots import settle_pages
from ..problem.spec import AttentionSpec
from ..problem.wording import dtype_name
from ..weights.attend import is_defined
from .encoder import FlashTransformerEncoder, found_causal
from .route import enter

NAIVE = "naive"


def explain(
    subject: AttentionSpec | FlashMultiHeadAttention | FlashTransformerEncoder | Tensor, *args: Any, **kwargs: Any
) -> Explanation:
    """Which backend would serve a problem, and why not the others: one line a backend. Nothing is computed.

    ``explain(spec, backend=None)`` for an ``AttentionSpec``, where ``capability=(9, 0)`` asks on paper, for a GPU that
    need not be here; ``explain(q, k, v, mask=..., ...)`` for a call of ``attention``; ``explain(layer, query, key,
    value, ...)`` for a call of a layer, which projects its inputs to see the problem, and says in ``notes`` what it
    does about padding and precision. ``explain(encoder, src, ...)`` for a call of a ``FlashTransformerEncoder``: the
    attention of its first layer, and whether padding is left out once for all of them.
    """
    for kind, answer, called, form in FORMS:
        if isinstance(subject, kind):
            try:
                inspect.signature(called).bind(subject, *args, **kwargs)
            except TypeError as error:
                raise TypeError(f"the call must be {form}, got: {error}.") from None
            return answer(subject, *args, **kwargs)
    raise TypeError(
        "subject must be an AttentionSpec, a FlashMultiHeadAttention, a FlashTransformerEncoder or the tensor q, got "
        f"{type(subject).__name__}."
    )


def explain_spec(spec: AttentionSpec, backend: Wanted = None, capability: tuple[int, int] | None = None) -> Explanation:
    """Which backend would serve a problem."""
    return backends.explain(spec, backend, capability)


def explain_call(q: Tensor, k: Tensor, v: Tensor, *, backend: Wanted = None, **options: Any) -> Explanation:
    """Which backend would serve a call of ``attention``."""
    unknown = sorted(set(options) - set(CALL_OPTIONS))
    if unknown:
        raise TypeError(f"options must be among {', '.join(CALL_OPTIONS)}, got {', '.join(unknown)}.")
    options["mask"], options["bias"] = as_mask(options.get("mask")), as_bias(options.get("bias"))
    plain = ("sinks", "softcap", "softmax_scale", "dropout_p", "deterministic", "return_lse")
    check_arguments(q, k, v, **{name: options[name] for name in plain if name in options})
    options["need_lse"] = options.pop("return_lse", False)
    return backends.explain(AttentionSpec.of(*autocast(q, k, v), **options), backend)


def explain_layer(layer: FlashMultiHeadAttention, *args: Any, **kwargs: Any) -> Explanation:
    """Which backend would serve a call of a layer, and what it does about padding and precision."""
    given = Arguments(*args, **kwargs)
    check_kinds(given)
    cache = given.cache
    if cache is None:
        return explain_arguments(layer, given)
    check_cache(cache)
    before = cache.state()
    try:
        return explain_arguments(layer, enter_cache(layer, given))
    finally:
        cache.restore(before)


def explain_arguments(layer: FlashMultiHeadAttention, given: Arguments) -> Explanation:
    """The same of the arguments of a call."""
    given = given if given.kv is None else with_stand_ins(layer, given)
    wanted = layer.backend if given.backend is None else given.backend
    need_weights = given.need_weights and layer.need_weights
    call = read_call(layer, given._replace(need_weights=need_weights))
    problem = prepare_call(layer, call, given._replace(need_weights=need_weights), wanted, layer.skip_padding)
    spec, notes = find_problem(layer, problem, wanted)
    if problem.padded is not None:
        notes.append(f"skip_padding: {say_left_out(problem.q.shape[1], problem.padded.rows.numel())}")
    elif layer.skip_padding and given.key_padding_mask is not None:
        why = padding.why_padding_stays(layer, call, given.cache is not None)
        notes.append(f"skip_padding: every row is computed ({why})")
    if problem.dtype is not None:
        notes.append(f"computed in {dtype_name(problem.dtype)}: this CPU is slower in {dtype_name(call.query.dtype)}")
    elif spec.dtype != call.query.dtype:
        notes.append(f"computed in {dtype_name(spec.dtype)}: autocast takes {dtype_name(call.query.dtype)} there")
    said = backends.explain(spec, wanted)
    plain = need_weights and problem.padded is None and said.chosen is not None
    if plain and is_defined(spec, backends.get(str(said.chosen)), wanted):
        rows = {**said.rows, str(said.chosen): "could serve", NAIVE: "chosen"}
        said = dataclasses.replace(said, chosen=NAIVE, rows=rows)
        notes.append("attention weights of a small problem: the definition makes them and the output in one pass")
    return dataclasses.replace(said, notes=(*said.notes, *notes))


def find_problem(layer: FlashMultiHeadAttention, made: Prepared, wanted: Wanted) -> tuple[AttentionSpec, list[str]]:
    """The problem of a layer's call, the first where its own ``attend`` runs several, and a note of the others."""
    heads = made.q, made.k, made.v
    if is_ours(layer, "attend"):
        return settle_pages(*heads, AttentionSpec.of(*heads, **made.problem), wanted)[3], []
    problems = Problems(layer, wanted, None, True, dry=True)
    layer.attend(*heads, **made.problem, call=problems)
    if not problems.specs:
        note = "attend is overridden and runs none of the package's own: this is the problem it was given"
        return AttentionSpec.of(*heads, **made.problem), [note]
    first, *others = problems.specs
    return first, [f"attend is overridden and then runs: {spec}" for spec in others]


def explain_encoder(
    encoder: FlashTransformerEncoder,
    src: Tensor,
    mask: Any = None,
    src_key_padding_mask: Tensor | None = None,
    is_causal: bool | None = None,
) -> Explanation:
    """Which backend would serve an encoder's first layer, and where its padding goes."""
    causal = found_causal(mask, src_key_padding_mask) if is_causal is None else is_causal
    way = enter(encoder, src, mask, src_key_padding_mask, causal)
    first = encoder.layers[0].self_attn
    if not isinstance(first, FlashMultiHeadAttention):
        raise TypeError(f"encoder must have attention of flashmha in its first layer, got {type(first).__name__}.")
    x = way.src if first.batch_first or not isinstance(way.packed, RealFirst) else way.src.transpose(0, 1)
    said = explain_layer(first, x, x, x, way.key_padding_mask, False, way.mask, is_causal=way.is_causal)
    notes = list(said.notes)
    if isinstance(way.packed, RealFirst):
        notes.append("every row is computed, the real tokens of each item first, in one order for all layers")
    elif way.packed is not None:
        notes.append(f"once for all layers: {say_left_out(way.src.shape[:2].numel(), src.shape[:2].numel())}")
    elif way.hidden is not None:
        notes.append(
            "every row is computed and padding zeroed behind the last layer: too little of it to pay for packing"
        )
    if way.why is not None:
        notes.append(f"not once for all layers ({way.why})")
    return dataclasses.replace(said, notes=tuple(notes))


def say_left_out(real: int, total: int) -> str:
    """A note about padding that is left out."""
    return (
        f"{total - real} of {total} positions are left out; "
        "while compiling or capturing a CUDA graph every row is computed"
    )


CALL_OPTIONS = tuple(inspect.signature(attention).parameters)[3:]
"""What ``attention`` takes by name."""

FORMS: tuple[tuple[type, Callable[..., Explanation], Callable[..., Any], str], ...] = (
    (AttentionSpec, explain_spec, explain_spec, "explain(spec, backend=None, capability=None)"),
    (
        FlashMultiHeadAttention,
        explain_layer,
        FlashMultiHeadAttention.forward,
        "explain(layer, query, key, value, ...), as the layer is called",
    ),
    (FlashTransformerEncoder, explain_encoder, explain_encoder, "explain(encoder, src, ...), as the encoder is called"),
    (Tensor, explain_call, explain_call, "explain(q, k, v, ...), as attention is called"),
)
"""Kinds of subjects, what answers for each, and how that is called: a signature, and in words."""

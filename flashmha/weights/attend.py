"""Output and weights of one call."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import choose
from ..backends.base import Backend
from ..backends.choice.memory import Memory
from ..backends.choice.record import note
from ..backends.choice.serve import serve
from ..backends.choice.wishes import Wanted, preference
from ..backends.naive import Naive, probabilities, scores, weigh
from ..functional import run_attention
from ..host.torch_state import is_capturing, is_compiling, is_dual, traced, without_autocast
from ..problem.packing import Padded
from ..problem.spec import AttentionSpec
from ..problem.windows import normalize
from .blocks import shape_weights
from .deferred import defer
from .graph import Weights
from .learned import held, replace_learned
from .recipe import Recipe
from .unmade import Unmade


def attention_with_weights(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: AttentionSpec,
    wanted: Wanted = None,
    layer: object = None,
    *,
    average: bool = True,
    batched: bool = True,
    dtype: torch.dtype | None = None,
    rows: Tensor | None = None,
    padded: Padded | None = None,
    remade: bool = False,
    lent: bool = False,
) -> tuple[Tensor, Tensor]:
    """The output, and the attention weights before dropout, 0 in blind rows, which are computed when read.

    The weights are (batch, heads, seqlen_q, seqlen_k), or their mean over heads with ``average``, without the batch
    axis unless ``batched``, in ``dtype``, and 0 outside ``rows`` (batch, seqlen_q). ``padded`` for q, k and v that hold
    the real tokens alone, ``remade`` where a hop of the layer's own made q and k, ``lent`` where k is the caller's.

    Where PyTorch records what runs (compile, export, torch.func, forward AD) both are ordinary tensors, and a compiler
    drops what is not read; the definition makes both in one pass, unless a backend is named.
    """
    dtype = q.dtype if dtype is None else dtype
    k, v, spec = spec.in_rows(k, v)
    backend = None if is_recorded(spec) else choose(spec, wanted)
    if backend is None or (padded is None and is_defined(spec, backend, wanted)):
        out, weights = define_both(q, k, v, spec, wanted, layer)
        return out, shape_weights(weights, average, batched, dtype, rows)
    free = (q.detach(), k.detach()) if q.requires_grad or k.requires_grad else (q, k)
    recipe = Recipe(*free, spec, None, average, batched, dtype, rows)
    learned = held(spec)
    if learned:  # the caller's own tensors, which may change before the weights are read
        recipe.spec = replace_learned(spec, [tensor.detach().clone() for tensor in learned])
    problem = recipe.spec
    result = serve(backend, q, k, v, request_with_lse(spec, backend), layer)
    out, lse = result if isinstance(result, tuple) else (result, None)
    if padded is not None:
        batch, seqlen = padded.rows.shape
        sizes = {"batch": batch, "seqlen_q": seqlen, "seqlen_k": seqlen}
        recipe.spec = recipe.spec.changed(**sizes, mask=normalize(padded.mask, seqlen, seqlen))
        recipe.places, recipe.rows = padded.places, padded.rows
    elif lse is not None:
        recipe.lse = lse.detach() if lse.requires_grad else lse
    rules = () if spec.mask is None else spec.mask.parts
    changing = lent or (remade and may_change(q, k)) or any(rule.may_change() for rule in rules)
    at_once = changing or is_small(spec) or is_capturing(spec.device) or spec.device.type == "meta"
    make = Recipe.make if at_once else put_off
    if spec.needs_grad:
        fused = None if spec.dropout_p > 0.0 or backend.holds_scores else v
        wanted_of = [tensor if tensor.requires_grad else None for tensor in learned]
        out, weights = Weights.apply(out, q, k, fused, problem, recipe, make, *wanted_of)  # type: ignore[no-untyped-call]
    else:
        with torch.no_grad():
            weights = make(recipe)
    return out, weights


FEW_SCORES = 2**12
"""Scores of all heads, up to which the definition makes output and weights in one pass, as ordinary tensors.

On one thread of a CPU that trains in the time of the stock layer (0.95 to 1.04 of it, 1 x 8 to 4 x 16 tokens); an eval
whose weights are thrown away takes 20 to 50 us more, which being ordinary is worth.
"""


def is_small(spec: AttentionSpec) -> bool:
    """Whether the weights of a problem are made at once, as ordinary tensors."""
    return spec.batch * spec.heads * spec.seqlen_q * spec.seqlen_k <= FEW_SCORES


def is_defined(spec: AttentionSpec, backend: Backend, wanted: Wanted) -> bool:
    """Whether the definition makes output and weights, though automatic choice found a backend for the output alone."""
    return is_small(spec) and backend.yields_small_weights and preference(wanted) is None


def may_change(q: Tensor, k: Tensor) -> bool:
    """Whether a hop of the layer's own may have returned memory that is written before the weights are read.

    As that of a cache or of an input.
    """
    written = q.is_inference() or k.is_inference() or q._version > 0 or k._version > 0
    return written or q._is_view() or k._is_view()


DEFINITION = Naive()


def define_both(
    q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, wanted: Wanted, layer: object
) -> tuple[Tensor, Tensor]:
    """Output and weights (batch, heads, seqlen_q, seqlen_k) as ordinary tensors."""
    with without_autocast(spec.device):
        weights = probabilities(*scores(q, k, spec), spec)
        if preference(wanted) is None and not is_compiling():
            note(layer, spec, DEFINITION)
            return weigh(weights, v, spec), weights
    out = run_attention(q, k, v, spec, wanted, layer)
    assert isinstance(out, Tensor)
    return out, weights


def request_with_lse(spec: AttentionSpec, backend: Backend) -> AttentionSpec:
    """The problem that a backend is given: with the log-sum-exp too, where the backend has that.

    Not beside a bias, which may move all scores of a row far off, as -10000 does, where a log-sum-exp in float32 is
    coarse.
    """
    known = requests.get(spec) if spec.shared else None
    if known is not None and known[0] is backend:
        return known[1]
    token, found = requests.token(), spec.with_lse() if spec.bias is None else spec
    if backend.why_not(found) is not None or backend.why_not_built(found) is not None:
        found = spec
    if spec.shared:
        requests.put(spec, token, (backend, found))
    return found


def is_recorded(spec: AttentionSpec) -> bool:
    """Whether PyTorch records operators, or differentiates forward."""
    return is_compiling() or spec.aten_only or traced() or is_dual()


def put_off(recipe: Recipe) -> Tensor:
    """The weights of a recipe, computed when they are read."""
    return defer(Unmade(recipe))


requests: Memory[tuple[Backend, AttentionSpec]] = Memory()
"""What ``request_with_lse`` said about a shared problem, and of which backend: 1 us, and 16 where it is asked."""

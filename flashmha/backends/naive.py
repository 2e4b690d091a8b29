"""naive: the definition of attention; every other backend is right when it agrees with this file."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..host.torch_state import is_compiling, readable
from ..problem.bias_values import narrow_bias
from ..problem.spec import AttentionSpec
from .base import Backend
from .limits import FEATURES, Limits


def scores(q: Tensor, k: Tensor, spec: AttentionSpec) -> tuple[Tensor, Tensor | None]:
    """Scores as the softmax sees them, and the rows that may look at nothing.

    Returns the scores (batch, heads, seqlen_q, seqlen_k, one column more with sinks), ``-inf`` where a query may
    not look, and a bool tensor (batch, heads, seqlen_q, 1) of blind rows, whose scores are 0 so that no NaN
    arises; ``None`` where no row can be blind. A bias or sinks that are finer than the heads make finer scores.
    """
    k = k.repeat_interleave(spec.heads // spec.heads_kv, dim=2) if spec.heads != spec.heads_kv else k
    if spec.aten_only and is_compiling():  # see ``heads_first``
        score = torch.einsum("bihd,bjhd->bhij", q * spec.scale, k)
    else:
        score = torch.unflatten(torch.bmm(heads_first(q * spec.scale), heads_first(k).mT), 0, (spec.batch, spec.heads))
    return finish_scores(score, spec, spec.added(), spec.allowed(), spec.sinks)


def finish_scores(
    score: Tensor, spec: AttentionSpec, bias: Tensor | None, allowed: Tensor | None, sinks: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """What ``scores`` returns, of the scaled products of q and k and what moves and hides them; also of some rows."""
    if spec.softcap is not None:
        score = spec.softcap * torch.tanh(score / spec.softcap)
    if bias is not None:
        score = at_least_single(score) + bias  # float16 has no room for its lowest number and a score
    if allowed is not None:
        score = score.masked_fill(~allowed, float("-inf"))
    if sinks is not None:
        sink = sinks.view(1, -1, 1, 1).expand(*score.shape[:3], 1)
        score = torch.cat((score, sink), dim=-1)
    blind = blind_rows(allowed, bias, sinks)
    return (score if blind is None else score.masked_fill(blind, 0.0)), blind


def heads_first(x: Tensor) -> Tensor:
    """(batch, seqlen, heads, head_dim) as (batch * heads, seqlen, head_dim).

    Products of what lies so err a quarter of what those of permuted heads do (float32, head_dim 512, a CPU). A graph
    that is exported, to serve every length, permutes all the same: on a GPU this copy binds it to some.
    """
    return x.transpose(1, 2).flatten(0, 1)


def at_least_single(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def blind_rows(allowed: Tensor | None, bias: Tensor | None, sinks: Tensor | None) -> Tensor | None:
    """Rows that may look at nothing, as a bool tensor that broadcasts; ``None`` where there are none.

    Read off the mask and the bias, which are small where they broadcast, rather than off the scores. A sink is there to
    look at, unless it is ``-inf``.
    """
    if bias is not None:
        open_keys = bias.detach() != float("-inf")
        allowed = open_keys if allowed is None else allowed & open_keys
    if allowed is None:
        return None
    blind = ~allowed.any(dim=-1, keepdim=True)
    if sinks is not None:
        blind = blind & (sinks.detach() == float("-inf")).view(1, -1, 1, 1)
    # looking costs nothing on a CPU and spares two passes over the scores; elsewhere it would wait or break a graph
    if readable(blind) and not blind.any():
        return None
    return blind


def probabilities(score: Tensor, blind: Tensor | None, spec: AttentionSpec) -> Tensor:
    """Attention weights before dropout (batch, heads, seqlen_q, seqlen_k), 0 in blind rows."""
    weights = score.softmax(dim=-1)
    if blind is not None:
        weights = weights.masked_fill(blind, 0.0)
    return weights if spec.sinks is None else weights[..., : spec.seqlen_k]


def log_sum_exp(score: Tensor, blind: Tensor | None) -> Tensor:
    """The log-sum-exp of every row (batch, heads, seqlen_q), at least float32, ``-inf`` in blind rows."""
    lse = at_least_single(score).logsumexp(dim=-1)
    return lse if blind is None else lse.masked_fill(blind.squeeze(-1), float("-inf"))


def weigh(weights: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
    """Dropout on the weights, and their sum over the values: (batch, seqlen_q, heads, head_dim_v)."""
    v = v.repeat_interleave(spec.heads // spec.heads_kv, dim=2) if spec.heads != spec.heads_kv else v
    weights = weights.to(v.dtype)
    if spec.dropout_p > 0.0:
        weights = F.dropout(weights, spec.dropout_p)
    if spec.aten_only and is_compiling():  # see ``heads_first``
        return torch.einsum("bhij,bjhd->bihd", weights, v)
    out = torch.unflatten(torch.bmm(weights.flatten(0, 1), heads_first(v)), 0, (spec.batch, spec.heads))
    return out.transpose(1, 2)


class Naive(Backend):
    """The definition, in plain PyTorch: every feature, every dtype, every device; memory seqlen_q * seqlen_k."""

    name = "naive"
    holds_scores = True
    judges_by_outline = results_checked = yields_small_weights = True
    limits = Limits(
        devices=(),
        dtypes=(torch.float64, torch.float32, torch.bfloat16, torch.float16),
        features=frozenset(FEATURES),
        aten=True,
    )

    def reads_pages(self, spec: AttentionSpec) -> bool:
        return False

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor | tuple[Tensor, Tensor]:
        k, v, spec = spec.in_rows(k, v)
        score, blind = scores(q, k, spec)
        out = weigh(probabilities(score, blind, spec), v, spec)
        if not spec.need_lse:
            return out
        q, k = at_least_single(q), at_least_single(k)
        if q.dtype != out.dtype:  # weights made of it would show every rounding of a score
            score, blind = scores(q, k, spec)
        return out, narrow_bias(log_sum_exp(score, blind), q.dtype)

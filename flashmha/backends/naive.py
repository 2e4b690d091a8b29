"""naive: the definition of attention; every other backend is right when it agrees with this file."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..masks import readable
from ..spec import AttentionSpec
from .base import FEATURES, Backend, Limits


def scores(q: Tensor, k: Tensor, spec: AttentionSpec) -> tuple[Tensor, Tensor | None]:
    """What the softmax sees, and which rows may look at nothing.

    Returns the scores (batch, heads, seqlen_q, seqlen_k, one column more with sinks), ``-inf`` where a query may
    not look, and a bool tensor (batch, heads, seqlen_q, 1) of blind rows, whose scores are 0 so that no NaN
    arises; ``None`` where no row can be blind.
    """
    k = k.repeat_interleave(spec.heads // spec.heads_kv, dim=2) if spec.heads != spec.heads_kv else k
    score = torch.einsum("bqhd,bkhd->bhqk", q * spec.scale, k)
    if spec.softcap is not None:
        score = spec.softcap * torch.tanh(score / spec.softcap)
    bias, allowed = spec.added(), spec.allowed()
    if bias is not None:
        score = score + bias.to(score.dtype)
    if allowed is not None:
        score = score.masked_fill(~allowed, float("-inf"))
    if spec.sinks is not None:
        sink = spec.sinks.to(score.dtype).view(1, -1, 1, 1).expand(*score.shape[:3], 1)
        return torch.cat((score, sink), dim=-1), None
    blind = blind_rows(allowed, bias)
    return (score if blind is None else score.masked_fill(blind, 0.0)), blind


def blind_rows(allowed: Tensor | None, bias: Tensor | None) -> Tensor | None:
    """Rows that may look at nothing, as a bool tensor that broadcasts; ``None`` where there are none.

    Read off the mask and the bias, which are small where they broadcast, rather than off the scores.
    """
    if bias is not None:
        open_keys = bias.detach() != float("-inf")
        allowed = open_keys if allowed is None else allowed & open_keys
    if allowed is None:
        return None
    blind = ~allowed.any(dim=-1, keepdim=True)
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
    lse = score.to(torch.promote_types(score.dtype, torch.float32)).logsumexp(dim=-1)
    return lse if blind is None else lse.masked_fill(blind.squeeze(-1), float("-inf"))


def weigh(weights: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
    """Dropout on the weights, and their sum over the values: (batch, seqlen_q, heads, head_dim_v)."""
    v = v.repeat_interleave(spec.heads // spec.heads_kv, dim=2) if spec.heads != spec.heads_kv else v
    if spec.dropout_p > 0.0:
        weights = F.dropout(weights, spec.dropout_p)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v)


class Naive(Backend):
    """The definition, in plain PyTorch: every feature, every dtype, every device; memory seqlen_q * seqlen_k."""

    name = "naive"
    limits = Limits(
        devices=(),
        dtypes=(torch.float64, torch.float32, torch.bfloat16, torch.float16),
        features=frozenset(FEATURES),
        aten=True,
    )

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor | tuple[Tensor, Tensor]:
        score, blind = scores(q, k, spec)
        out = weigh(probabilities(score, blind, spec), v, spec)
        if not spec.need_lse:
            return out
        finer = torch.promote_types(q.dtype, torch.float32)
        if finer != q.dtype:  # who makes weights of it would see every rounding of a score
            score, blind = scores(q.to(finer), k.to(finer), spec)
        return out, log_sum_exp(score, blind)

"""A few rows of weights: the definition of those rows, in as few operators as there are.

A row of a GPU's map is read in the time of its launches, so every operator counts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends.naive import finish_scores, probabilities
from ..problem.spec import AttentionSpec
from ..problem.windows import Window
from .blocks import Box, at_least_float32
from .regions import as_slice, cover
from .tables import window_bounds

MOST_ROWS = 16
"""Rows up to which a product of vectors is no slower than tiles."""


def make_rows(q: Tensor, k: Tensor, spec: AttentionSpec, box: Box, average: bool) -> Tensor:
    """The weights of a box, (batch, heads, rows, seqlen_k), or their mean over heads, in float32 at least."""
    score = multiply_heads(box.of_query(q), *box.of_grouped_key(k, spec.heads), spec.scale)
    covered = cover(box.rows)
    bias, allowed = spec.added(queries=covered), None if sees_all(spec, box.rows) else spec.allowed(queries=covered)
    bias = None if bias is None else box.of_table(bias.detach())
    allowed = None if allowed is None else box.of_table(allowed)
    sinks = None if spec.sinks is None else spec.sinks.detach()[as_slice(box.heads)]
    weights = probabilities(*finish_scores(score, spec, bias, allowed, sinks), spec)
    if average:
        return weights.mean(dim=1, keepdim=True)
    return weights if sinks is None else weights.clone(memory_format=torch.contiguous_format)  # without their column


def multiply_heads(q: Tensor, k: Tensor, group: int, scale: float) -> Tensor:
    """The scaled products of queries (batch, rows, heads, head_dim) and keys that ``group`` heads share."""
    batch, rows, heads, head_dim = q.shape
    shared = k.shape[2]
    dtype = at_least_float32(q.dtype)
    wide = q.dtype == dtype or q.device.type != "cuda"
    q = q.to(dtype) * scale if wide else q
    q = q.view(batch, rows, shared, group, head_dim).permute(0, 2, 3, 1, 4).reshape(-1, group * rows, head_dim)
    k = (k.to(dtype) if wide else k).permute(0, 2, 3, 1)
    k = k[0] if batch == 1 else k.flatten(0, 1)
    made = torch.bmm(q, k) if wide else torch.bmm(q, k, out_dtype=dtype).mul_(scale)  # type: ignore[call-overload]
    found: Tensor = made.view(batch, heads, rows, -1)
    return found


def sees_all(spec: AttentionSpec, rows: range) -> bool:
    """Whether a mask hides nothing from some rows, as far as that shows without a tensor."""
    parts = () if spec.mask is None else spec.mask.parts
    windows = [part for part in parts if isinstance(part, Window)]
    if len(windows) < len(parts):
        return False
    bounds = window_bounds(windows, spec.seqlen_q, spec.seqlen_k)
    return bounds is None or (rows[-1] + bounds[0] <= 0 and rows[0] + bounds[1] >= spec.seqlen_k - 1)

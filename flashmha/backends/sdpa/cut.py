"""A problem that was cut up, served piece by piece."""

from __future__ import annotations

import torch
from torch import Tensor

from ...problem.masks import Mask
from ...problem.spec import AttentionSpec
from .bands import Bands, make_tables
from .calls import call_sdpa
from .pieces import Item, keep_all, slices


def attend_cut(
    q: Tensor, k: Tensor, v: Tensor, items: list[Item], spec: AttentionSpec
) -> Tensor | tuple[Tensor, Tensor]:
    """SDPA of what is left of a problem."""
    return call_sdpa(q, k, v, None, spec) if keep_all(items, spec) else attend_items(q, k, v, items, spec)


def attend_items(
    q: Tensor, k: Tensor, v: Tensor, items: list[Item], spec: AttentionSpec
) -> Tensor | tuple[Tensor, Tensor]:
    """SDPA of every item's pieces, none of which needs a mask."""
    outs, lses = [], []
    for item, qs, ks, vs in zip(items, slices(q, items, False), slices(k, items, True), slices(v, items, True)):
        done = [attend_piece(piece, ks, vs, where, how, spec) for piece, (_, where, how) in zip(qs, item.pieces)]
        outs.append(done[0][0] if len(done) == 1 else torch.cat([out for out, _ in done], dim=1))
        if spec.need_lse:
            lses.append(torch.cat([lse for _, lse in done], dim=2))
    out = outs[0] if len(outs) == 1 else torch.cat(outs)
    return (out, torch.cat(lses)) if spec.need_lse else out


def attend_piece(
    q: Tensor, ks: tuple[Tensor, ...], vs: tuple[Tensor, ...], where: int | None, how: bool | Mask, spec: AttentionSpec
) -> tuple[Tensor, Tensor]:
    """One piece: out and lse, which is empty where it is not asked for."""
    if where is None:
        return make_blind(q, spec)
    k, v = ks[where], vs[where]
    if isinstance(how, Mask):
        result = call_sdpa(q, k, v, how.materialize(1, 1, q.shape[1], k.shape[1], q.device), spec)
    else:
        result = call_sdpa(q, k, v, None, spec, is_causal=how)
    return result if isinstance(result, tuple) else (result, result.new_empty(0))


def attend_bands(q: Tensor, k: Tensor, v: Tensor, bands: Bands, spec: AttentionSpec) -> Tensor | tuple[Tensor, Tensor]:
    """SDPA of every block of a window."""
    outs, lses = [], []
    ks, vs = bands.cut(k), bands.cut(v)
    queries = q.split([len(block.queries) for block in bands.blocks], dim=1)
    for rows, block, table in zip(queries, bands.blocks, make_tables(spec, bands)):
        if not block.parts:
            out, lse = make_blind(rows, spec)
        else:
            one, many = block.parts.start, slice(block.parts.start, block.parts.stop)
            k, v = (x[one] if len(block.parts) == 1 else torch.cat(x[many], dim=1) for x in (ks, vs))
            result = call_sdpa(rows, k, v, table, spec)
            out, lse = result if isinstance(result, tuple) else (result, result)
        outs.append(out)
        lses.append(lse)
    out = torch.cat(outs, dim=1)
    return (out, torch.cat(lses, dim=2)) if spec.need_lse else out


def make_blind(q: Tensor, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
    """out and lse of queries that look at no key."""
    blank = q.new_zeros(*q.shape[:3], spec.head_dim_v)
    return blank, blank.new_full((q.shape[0], spec.heads, q.shape[1]), float("-inf"))

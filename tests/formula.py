"""What the pretended kernels of flash-attn compute: the definition in float64, out of what a package was told.

``told`` is in flash-attn 4's words: ``None`` is unbounded in a window, and what is absent was not told.
"""

import dataclasses
import math
from typing import Any

import torch
from test_block_tables import spread, states
from torch import Tensor


def seen(q: Tensor, k: Tensor, told: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Which key a query sees, and how far it lies behind the query, (batch, 1, seqlen_q, seqlen_k)."""
    rows, columns = (torch.arange(n, device=q.device) for n in (q.shape[-3], k.shape[-3]))
    rows, columns = rows[:, None], columns[None]
    batch = 1 if q.dim() == 3 else q.shape[0]
    if told.get("mask_mod") is not None:
        assert not told["causal"] and told["window_size_left"] is None and told["window_size_right"] is None
        one, two = told["aux_tensors"]
        if told["mask_mod"] == "within":
            within = (rows >= one[:, None]) & (rows <= two[:, None])
        else:
            assert one.dtype == torch.uint8 and two.dtype == torch.int32 and two.shape == (batch,)
            within = one[two.long(), : len(rows), : columns.shape[1]].bool()
        if told.get("block_sparse_tensors") is not None:  # full blocks forget the mask, and no others are looked at
            tables, tile = told["block_sparse_tensors"]
            state = spread(states(tables, by_keys="dq" in told), tile, *within.shape[1:])
            within = (state == 2) | (state == 1) & within
        return within[:, None], columns - rows
    lengths_q, lengths_k = torch.full((1, 1), q.shape[-3]), torch.full((1, 1), k.shape[-3])
    allowed = torch.ones(batch, q.shape[-3], k.shape[-3], dtype=torch.bool)
    if told.get("cu_seqlens_q") is not None:
        starts, ends = told["cu_seqlens_q"], told["cu_seqlens_k"]
        places = [torch.bucketize(torch.arange(n), x[1:], right=True) for n, x in ((len(q), starts), (len(k), ends))]
        allowed = ((places[0][:, None] == places[1][None]) & (places[0][:, None] < len(starts) - 1))[None]
        last = len(starts) - 2
        rows = (rows[:, 0] - starts[places[0].clamp(max=last)])[:, None]
        columns = (columns[0] - ends[places[1].clamp(max=last)])[None]
        lengths_q, lengths_k = (x.diff()[places[0].clamp(max=last)][:, None] for x in (starts, ends))
    elif told.get("seqused_k") is not None:
        lengths_k = told["seqused_k"][:, None, None]
        allowed = allowed & (columns < lengths_k)
    distance = columns - rows - (lengths_k - lengths_q)
    left, right = told["window_size_left"], 0 if told["causal"] else told["window_size_right"]
    allowed = allowed if left is None else allowed & (distance >= -left)
    allowed = allowed if right is None else allowed & (distance <= right)
    return allowed[:, None], distance.expand(allowed.shape)[:, None]


def slopes(told: dict[str, Any], rows: int) -> Tensor:
    """ALiBi's slopes (heads,), or (batch, heads) where documents are the batch, so that they broadcast."""
    given = told["alibi_slopes"].double()
    if given.dim() == 1:
        return given[:, None, None]
    starts = told.get("cu_seqlens_q")
    if starts is None:
        return given[..., None, None]
    assert given.shape[0] == len(starts) - 1
    document = torch.bucketize(torch.arange(rows), starts[1:], right=True).clamp(max=len(given) - 1)
    return given[document].mT[None, ..., None]


@dataclasses.dataclass
class Formula:
    """The definition with its intermediate results, a sink as one more column; float64 inside."""

    q: Tensor
    k: Tensor
    v: Tensor
    slope: Tensor
    weights: Tensor
    lse: Tensor
    group: int

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, told: dict[str, Any]) -> "Formula":
        allowed, distance = seen(q, k, told)
        q, k, v = (x.double() if x.dim() == 4 else x[None].double() for x in (q, k, v))
        group = q.shape[2] // k.shape[2]
        k, v = (x.repeat_interleave(group, dim=2) for x in (k, v))
        score, slope = told["softmax_scale"] * torch.einsum("bqhd,bkhd->bhqk", q, k), torch.ones(())
        if told["softcap"]:
            bent = torch.tanh(score / told["softcap"])
            score, slope = told["softcap"] * bent, 1 - bent * bent
        if told.get("alibi_slopes") is not None:
            score = score - slopes(told, score.shape[2]) * distance.abs()
        score = score.masked_fill(~allowed, -math.inf)
        if told.get("learnable_sink") is not None:
            sink = told["learnable_sink"].to(score).view(1, -1, 1, 1).expand(*score.shape[:3], 1)
            score = torch.cat((score, sink), dim=-1)
        blind = (score == -math.inf).all(dim=-1, keepdim=True)
        lse = score.logsumexp(-1).masked_fill(blind[..., 0], -math.inf)
        weights = score.masked_fill(blind, 0.0).softmax(-1).masked_fill(blind, 0.0)
        return cls(q, k, v, slope, weights, lse, group)

    @property
    def out(self) -> Tensor:
        return torch.einsum("bhqk,bkhd->bqhd", self.weights[..., : self.k.shape[1]], self.v)

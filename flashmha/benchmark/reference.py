"""The reference: a case by its definition, in blocks that fit the memory at every length that is timed."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .inputs import Inputs

Named = dict[str, Tensor]
"""``out``, ``weights`` where they are read, and ``gradient of ...`` for every leaf."""

BLOCK = 2**26
"""How many scores, all heads counted, are in memory at a time."""


@dataclasses.dataclass(frozen=True)
class Reference:
    """The exact answer of a case, and a plain one: the same definition wholly in the case's dtype."""

    exact: Named
    plain: Named

    @classmethod
    def of(cls, inputs: Inputs, block: int = BLOCK) -> Reference:
        return cls(definition(inputs.to(torch.float64), block), definition(inputs.to(inputs.query.dtype), block))


def definition(inputs: Inputs, block: int = BLOCK) -> Named:
    """A case by its definition in the dtype of its inputs; ``block`` bounds the scores that are held at once."""
    training = inputs.case.mode == "train"
    state = {name: x.detach().requires_grad_(training) for name, x in inputs.state.items()}
    with torch.set_grad_enabled(training):
        if state:
            q, k, v = project(inputs, state)
            heads, weights = attend(q, k, v, inputs, block)
            out = F.linear(heads.flatten(2), state["out_proj.weight"], state["out_proj.bias"])
        else:
            out, weights = attend(inputs.query, inputs.key, inputs.value, inputs, block)
    named = {"out": out.detach()}
    if inputs.case.weights:
        named["weights"] = weights
    if training:
        leaves = {**inputs.leaves(), **state}
        gradients = torch.autograd.grad(out, list(leaves.values()), inputs.cotangent)
        named |= {f"gradient of {name}": x for name, x in zip(leaves, gradients)}
    return named


def project(inputs: Inputs, state: Named) -> list[Tensor]:
    """The heads (batch, seqlen, heads, head_dim) of a layer's query, key and value."""
    matrices, biases = (state[f"in_proj_{name}"].chunk(3) for name in ("weight", "bias"))
    heads = (inputs.case.heads, -1)
    sources = (inputs.query, inputs.key, inputs.value)
    return [F.linear(x, matrix, bias).unflatten(-1, heads) for x, matrix, bias in zip(sources, matrices, biases)]


def attend(q: Tensor, k: Tensor, v: Tensor, inputs: Inputs, block: int) -> tuple[Tensor, Tensor]:
    """Attention on (batch, seqlen, heads, head_dim), and the weights averaged over the heads where they are read.

    As many items at a time as ``block`` allows, or as many rows of one; backward computes each block again.
    """
    batch, seqlen_q, heads = q.shape[:3]
    items = max(1, block // (heads * seqlen_q * k.shape[1]))
    rows = min(seqlen_q, max(1, block // (heads * k.shape[1])))
    hidden = inputs.hidden
    outs, means = [], []
    for item in range(0, batch, items):
        here = slice(item, item + items)
        parts = []
        for row in range(0, seqlen_q, rows):
            mask = None if inputs.attn_mask is None else inputs.attn_mask[None, row : row + rows]
            if hidden is not None:
                mask = hidden[here, None] if mask is None else mask | hidden[here, None]
            arguments = (q[here, row : row + rows], k[here], v[here], mask, inputs.case.weights)
            parts.append(checkpoint(attend_block, *arguments, use_reentrant=False, preserve_rng_state=False))
        outs.append(torch.cat([out for out, _ in parts], dim=1))
        means.append(torch.cat([mean for _, mean in parts], dim=1))
    return torch.cat(outs), torch.cat(means)


def attend_block(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, weights: bool) -> tuple[Tensor, Tensor]:
    """The definition; ``mask`` (batch or 1, rows or 1, seqlen_k) says what is hidden, query heads share key heads."""
    q = q.unflatten(2, (k.shape[2], -1)) * q.shape[-1] ** -0.5
    scores = torch.einsum("bqhgd,bkhd->bhgqk", q, k)
    if mask is not None:
        scores = scores.masked_fill(mask[:, None, None], float("-inf"))
    each = scores.softmax(dim=-1)
    mean = each.detach().mean(dim=(1, 2)) if weights else each.new_empty(len(each), q.shape[1], 0)
    return torch.einsum("bhgqk,bkhd->bqhgd", each, v).flatten(2, 3), mean

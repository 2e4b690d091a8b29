"""The reference: a case by its definition, in blocks that fit the memory at every length that is timed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..backends.parity import moved
from .cases import Case
from .inputs import Inputs

NamedTensors = dict[str, Tensor]
"""``out``, ``weights`` where they are read, and ``gradient of ...`` for every leaf."""

SCORES_AT_ONCE = 2**26
"""How many scores, all heads counted, are in memory at a time."""


@dataclasses.dataclass(frozen=True)
class Reference:
    """The exact answer of a case, and a plain one: the same definition in the case's dtype; and the ``eps`` of that.

    ``again`` computes another plain answer, from inputs moved by a rounding.
    """

    exact: NamedTensors
    plain: NamedTensors
    eps: float
    again: Callable[[int], NamedTensors]

    @classmethod
    def of(cls, inputs: Inputs, block: int = SCORES_AT_ONCE) -> Reference:
        def again(time: int) -> NamedTensors:
            generator = torch.Generator().manual_seed(time)
            near = {id(x): moved(x, generator).requires_grad_(x.requires_grad) for x in inputs.leaves().values()}
            query, key, value = (near[id(x)] for x in (inputs.query, inputs.key, inputs.value))
            return compute_definition(dataclasses.replace(inputs, query=query, key=key, value=value), block)

        computing = getattr(torch, inputs.case.autocast or inputs.case.dtype)
        exact, plain = (compute_definition(inputs.to(dtype), block) for dtype in (torch.float64, inputs.query.dtype))
        return cls(exact, plain, torch.finfo(computing).eps, again)


def compute_definition(inputs: Inputs, block: int = SCORES_AT_ONCE) -> NamedTensors:
    """A case by its definition in the dtype of its inputs; ``block`` bounds the scores that are held at once."""
    training = inputs.case.mode == "train"
    state = {name: x.detach().requires_grad_(training) for name, x in inputs.state.items()}
    sources = [inputs.turned(x) for x in (inputs.query, inputs.key, inputs.value)]
    with torch.set_grad_enabled(training), inputs.casting():
        if inputs.case.level == "decoder":
            out, weights = decode(sources[0], sources[1], inputs, state, block)
        elif inputs.case.layers:
            out, weights = encode(sources[0], inputs, state, block)
        elif state:
            out, weights = layer(sources, inputs, state, block)
        else:
            out, weights = attend_in_blocks(sources, inputs, block)
        out = inputs.turned(out)
    named = {"out": out.detach()}
    if inputs.case.weights:
        named["weights"] = weights
    if training:
        leaves = {**inputs.leaves(), **state}
        gradients = torch.autograd.grad(out, list(leaves.values()), inputs.cotangent)
        named |= {f"gradient of {name}": x for name, x in zip(leaves, gradients)}
    return named


def encode(x: Tensor, inputs: Inputs, state: NamedTensors, block: int) -> tuple[Tensor, Tensor]:
    """An encoder of post-norm layers with ReLU; no weights."""
    for place in range(inputs.case.layers):
        mine = under(f"layers.{place}", state)
        attended, weights = layer([x, x, x], inputs, under("self_attn", mine), block)
        x = apply_norm(x + attended, under("norm1", mine))
        x = apply_norm(
            x + apply_linear(F.relu(apply_linear(x, under("linear1", mine))), under("linear2", mine)),
            under("norm2", mine),
        )
    return x, weights


def decode(x: Tensor, memory: Tensor, inputs: Inputs, state: NamedTensors, block: int) -> tuple[Tensor, Tensor]:
    """A decoder of post-norm layers with ReLU, all tokens at once; no weights."""
    over = dataclasses.replace(inputs, attn_mask=None)
    for place in range(inputs.case.layers):
        mine = under(f"layers.{place}", state)
        attended, _ = layer([x, x, x], inputs, under("self_attn", mine), block)
        x = apply_norm(x + attended, under("norm1", mine))
        attended, weights = layer([x, memory, memory], over, under("multihead_attn", mine), block)
        x = apply_norm(x + attended, under("norm2", mine))
        fed = apply_linear(F.relu(apply_linear(x, under("linear1", mine))), under("linear2", mine))
        x = apply_norm(x + fed, under("norm3", mine))
    return x, weights


def layer(sources: list[Tensor], inputs: Inputs, state: NamedTensors, block: int) -> tuple[Tensor, Tensor]:
    """A layer of attention on query, key and value."""
    heads, weights = attend_in_blocks(project_heads(sources, inputs.case, state), inputs, block)
    return apply_linear(heads.flatten(2), under("out_proj", state)), weights


def under(name: str, state: NamedTensors) -> NamedTensors:
    """The parameters of a part."""
    return {key.removeprefix(f"{name}."): x for key, x in state.items() if key.startswith(f"{name}.")}


def apply_linear(x: Tensor, state: NamedTensors) -> Tensor:
    return F.linear(x, state["weight"], state.get("bias"))


def apply_norm(x: Tensor, state: NamedTensors) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], state["weight"], state["bias"])


def project_heads(sources: list[Tensor], case: Case, state: NamedTensors) -> list[Tensor]:
    """The heads (batch, seqlen, heads, head_dim) of a layer's query, key and value, normalised and turned."""
    heads = (case.heads, case.heads_kv, case.heads_kv)
    rows = [each * case.head_dim for each in heads]
    matrices = state["in_proj_weight"].split(rows)
    biases = state["in_proj_bias"].split(rows) if case.bias else (None, None, None)
    made = [
        F.linear(x, matrix, bias).unflatten(-1, (each, -1))
        for x, matrix, bias, each in zip(sources, matrices, biases, heads)
    ]
    for place, name in enumerate(("q_norm", "k_norm")):
        if case.qk_norm is not None:
            made[place] = normalize_heads(made[place], case.qk_norm, under(name, state))
        if case.rotary:
            made[place] = rotate_pairs(made[place])
    return made


def normalize_heads(x: Tensor, kind: str, state: NamedTensors) -> Tensor:
    """Heads over the root of their mean square, or less their mean and over their deviation."""
    if kind == "layer":
        return F.layer_norm(x, x.shape[-1:], state["weight"], state["bias"])
    return F.rms_norm(x, x.shape[-1:], state["weight"], torch.finfo(torch.float32).eps)


def rotate_pairs(x: Tensor) -> Tensor:
    """Features i and i + head_dim / 2 of every head, turned by its position over 10000 ** (2i / head_dim)."""
    half = x.shape[-1] // 2
    # the angles in float32, as everywhere: their rounding is part of what is computed
    slower = 1.0 / 10000.0 ** (torch.arange(half, device=x.device).float() / half)
    angles = (torch.arange(x.shape[1], device=x.device).float()[:, None, None] * slower).double()
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def attend_in_blocks(heads: list[Tensor], inputs: Inputs, block: int) -> tuple[Tensor, Tensor]:
    """Attention on q, k and v (batch, seqlen, heads, head_dim), and the weights averaged over the heads where they are
    read.

    As many items at a time as ``block`` allows, or as many rows of one; backward computes each block again.
    """
    q, k, v = heads
    batch, seqlen_q, each = q.shape[:3]
    items = max(1, block // (each * seqlen_q * k.shape[1]))
    rows = min(seqlen_q, max(1, block // (each * k.shape[1])))
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

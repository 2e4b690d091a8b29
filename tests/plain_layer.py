"""A layer with every option, written down in float64 and plain PyTorch: the definition that ``test_features`` holds to.

Shapes are (batch, seqlen, ...) throughout. ``own`` holds the layer's parameters by name, ``layer`` says its options.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def project(layer: Any, own: dict[str, Tensor], inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """q, k and v, each by its rows of the matrices."""
    heads, heads_kv = layer.num_heads, layer.num_kv_heads
    head_dim = layer.head_dim
    counts, widths = (heads, heads_kv, heads_kv), (head_dim, head_dim, layer.value_head_dim)
    rows = [count * width for count, width in zip(counts, widths)]
    names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
    weights = own["in_proj_weight"].split(rows) if "in_proj_weight" in own else [own[name] for name in names]
    biases = own["in_proj_bias"].split(rows) if "in_proj_bias" in own else [None] * 3
    made = [F.linear(x, weight, bias) for x, weight, bias in zip(inputs, weights, biases)]
    return [x.unflatten(-1, (count, width)) for x, count, width in zip(made, counts, widths)]


def norm(layer: Any, own: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    """The norm of a head."""
    module = getattr(layer, name)
    if module is None:
        return x
    if isinstance(module, torch.nn.LayerNorm):
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + module.eps).sqrt()
        return x * own[f"{name}.weight"] + own[f"{name}.bias"]
    eps = torch.finfo(module.weight.dtype).eps if module.eps is None else module.eps
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * own[f"{name}.weight"]


def turn(layer: Any, x: Tensor, positions: Tensor) -> Tensor:
    """Pairs of features turned by their angle; positions are (batch or 1, seqlen)."""
    if layer.rotary is None:
        return x
    half = layer.rotary.dim // 2
    angles = positions[..., None, None] * 10000.0 ** (-torch.arange(half).double() / half)
    one, two, rest = x.split([half, half, x.shape[-1] - 2 * half], -1)
    return torch.cat([one * angles.cos() - two * angles.sin(), one * angles.sin() + two * angles.cos(), rest], -1)


def attend(layer: Any, q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, bias: Tensor, sinks: Any) -> list[Tensor]:
    """out (batch, seqlen_q, heads, head_dim_v) and weights (batch, heads, seqlen_q, seqlen_k)."""
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    scale = layer.softmax_scale or q.shape[-1] ** -0.5
    score = scale * torch.einsum("bqhd,bkhd->bhqk", q, k)
    if layer.softcap is not None:
        score = layer.softcap * (score / layer.softcap).tanh()
    blind = ~allowed.any(-1, keepdim=True)
    score = (score + bias).masked_fill(~(allowed | blind), -torch.inf)
    if sinks is not None:
        score = torch.cat([score, sinks[:, None, None].expand(*score.shape[:3], 1)], -1)
    weights = score.softmax(-1)[..., : k.shape[1]].masked_fill(blind, 0.0)
    return [torch.einsum("bhqk,bkhd->bqhd", weights, v), weights]


def answer(
    layer: Any,
    own: dict[str, Tensor],
    inputs: tuple[Tensor, ...],
    allowed: Tensor,
    bias: Tensor,
    slots: tuple[Tensor, Tensor],
    turned: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """Output and weights of every head. ``slots`` are the positions that rules count, ``turned`` those of rotary.

    ``allowed`` and ``bias`` are (batch, heads, seqlen_q, seqlen_k), those of the call.
    """
    q, k, v = project(layer, own, inputs)
    q = turn(layer, norm(layer, own, "q_norm", q), turned[0])
    k = turn(layer, norm(layer, own, "k_norm", k), turned[1])
    distance = (slots[1][:, None, :] - slots[0][:, :, None])[:, None]
    if layer.causal:
        allowed = allowed & (distance <= 0)
    if layer.window is not None:
        left, right = layer.window.left, layer.window.right
        allowed = allowed & (distance >= -left if left is not None else True)
        allowed = allowed & (distance <= right if right is not None else True)
    if "bias_k" in own:
        more = (own[name].view(1, 1, k.shape[2], -1).expand(k.shape[0], -1, -1, -1) for name in ("bias_k", "bias_v"))
        k, v = (torch.cat(pair, 1) for pair in zip((k, v), more))
    if layer.add_zero_attn:
        k, v = (F.pad(x, (0, 0, 0, 0, 0, 1)) for x in (k, v))
    columns = k.shape[1] - allowed.shape[-1]
    allowed, bias = F.pad(allowed, (0, columns), value=True), F.pad(bias, (0, columns))
    out, weights = attend(layer, q, k, v, allowed, bias, own.get("sinks"))
    return F.linear(out.flatten(2), own["out_proj.weight"], own.get("out_proj.bias")), weights

"""The layers of an encoder run as functions, one after another.

Calling a module takes Python, of which a short batch has more than a GPU has work. Where every layer is known
(``known.find_unknown_layers``) the same operators run without it, in the same order; and what is the same for all
layers, the problem and its backend, is found out once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backends import choose
from ..backends.base import Backend, Serve
from ..backends.choice.serve import serve
from ..backends.rewrites.order import RealFirst
from ..host.torch_state import computed_in
from ..layer import shortcut
from ..layer.module import FlashMultiHeadAttention
from ..layer.projection import by_one_matrix, parameters
from ..problem.masks import Mask
from ..problem.spec import AttentionSpec
from .route import Route


def run_layers(encoder: nn.TransformerEncoder, route: Route) -> Tensor:
    """Run the layers of an encoder, all of which are known; the output of the last."""
    attention = SelfAttention(route, len(encoder.layers))
    x = route.src
    for layer in encoder.layers:
        x = run_layer(layer, x, attention)
    return x


def run_layer(layer: nn.TransformerEncoderLayer, x: Tensor, attention: SelfAttention) -> Tensor:
    """One encoder layer."""
    parts: Any = layer._modules
    if layer.norm_first:
        x = x + run_dropout(parts["dropout1"], attention(parts["self_attn"], run_norm(parts["norm1"], x)))
        return x + feed_forward(layer, run_norm(parts["norm2"], x))
    x = run_norm(parts["norm1"], x + run_dropout(parts["dropout1"], attention(parts["self_attn"], x)))
    return run_norm(parts["norm2"], x + feed_forward(layer, x))


def feed_forward(layer: Any, x: Tensor, last: str = "dropout2") -> Tensor:
    """The two linear layers of an encoder layer, or of a decoder layer, what is between them, and the last dropout."""
    parts: Any = layer._modules
    activation = layer.activation
    x = run_linear(parts["linear1"], x)
    x = activation.forward(x) if isinstance(activation, nn.Module) else activation(x)
    return run_dropout(parts[last], run_linear(parts["linear2"], run_dropout(parts["dropout"], x)))


def run_linear(part: Any, x: Tensor) -> Tensor:
    """A linear layer as a function."""
    out: Tensor = F.linear(x, *parameters(part, "weight", "bias")) if type(part) is nn.Linear else part.forward(x)
    return out


def run_norm(part: Any, x: Tensor) -> Tensor:
    """A norm as a function."""
    if type(part) is nn.LayerNorm:
        return torch.layer_norm(x, part.normalized_shape, *parameters(part, "weight", "bias"), part.eps)
    out: Tensor = part.forward(x)
    return out


def run_dropout(part: Any, x: Tensor) -> Tensor:
    """A dropout as a function, left out where it drops nothing."""
    if type(part) is nn.Dropout and not (part.training and part.p):
        return x
    out: Tensor = part.forward(x)
    return out


class Same(NamedTuple):
    """The problem that layers which are alike share, how their tensors lie, and the backend that serves it."""

    spec: AttentionSpec
    batch_first: bool
    backend: Backend
    call: Serve


class SelfAttention:
    """Self-attention, layer by layer, beside the masks of a route."""

    def __init__(self, route: Route, layers: int) -> None:
        self.route, self.left = route, layers
        self.batch_first = True if isinstance(route.packed, RealFirst) else None
        self.masked = route.mask is not None or route.key_padding_mask is not None or route.is_causal
        self.problems: dict[tuple[Any, ...], Same] = {}

    def __call__(self, layer: FlashMultiHeadAttention, x: Tensor) -> Tensor:
        own = shortcut.linears(layer, x.dtype) if type(x) is Tensor and x.dim() == 3 else None
        same = None if own is None else self.problem(layer, own, x)
        if own is None or same is None:
            return self.module(layer, x)
        spec, batch_first, backend, call = same
        weight, bias, weight_out, bias_out = own
        heads, together = spec.heads, backend.joins_gradients
        q, k, v = by_one_matrix(x, x, x, weight, bias, heads, heads, spec.head_dim, batch_first, together)
        if type(q) is not Tensor:  # a mode makes other tensors of ours
            return self.module(layer, x)
        attended = serve(backend, q, k, v, spec, layer, call)
        if not batch_first:
            attended = attended.transpose(0, 1).contiguous()
        return F.linear(attended.flatten(2), weight_out, bias_out)

    def module(self, layer: FlashMultiHeadAttention, x: Tensor) -> Tensor:
        """The layer's own forward."""
        route = self.route
        masks: dict[str, Any] = {
            "attn_mask": route.mask,
            "key_padding_mask": route.key_padding_mask,
            "is_causal": route.is_causal,
        }
        turned = self.batch_first is not None and not layer.batch_first
        x = x.transpose(0, 1) if turned else x
        out: Tensor = layer.forward(x, x, x, **masks, need_weights=False)[0]
        return out.transpose(0, 1) if turned else out

    def problem(self, layer: FlashMultiHeadAttention, own: shortcut.Linears, x: Tensor) -> Same | None:
        """The problem of a layer and its backend, found once for layers that are alike; ``None`` for more."""
        state, shape = layer.__dict__, x.shape
        dropout = state["dropout"] if state["training"] else 0.0
        batch_first = state["batch_first"] if self.batch_first is None else self.batch_first
        heads = state["num_heads"]
        grad = torch.is_grad_enabled() and shortcut.learns(own, x, x, x)
        key = (shape, x.dtype, heads, state["embed_dim"], batch_first, dropout, grad, layer.skip_padding)
        known = self.problems.get(key)
        if known is not None:
            return known
        if shape[2] != state["embed_dim"] or shape[2] % heads:
            return None
        sizes = (shape[0], shape[1], shape[1]) if batch_first else (shape[1], shape[0], shape[0])
        mask: Mask | None = None
        if self.masked:
            route, padding = self.route, self.route.key_padding_mask
            if padding is not None and layer.skip_padding:
                return None
            mask = shortcut.plain_mask(padding, route.mask, route.is_causal, sizes, x.device)
            if mask is None:
                return None
        head_dim = shape[2] // heads
        spec = AttentionSpec.between(sizes, heads, head_dim, computed_in(x), x.device, grad, mask, dropout)
        backend, self.left = choose(spec, calls=self.left), 0  # the calls of all layers count once
        same = self.problems[key] = Same(spec, batch_first, backend, backend.prepare(spec))
        return same

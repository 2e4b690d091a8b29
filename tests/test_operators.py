"""What a plain call costs: the operators of the layer that one writes by hand, and no others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import fewer
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from flashmha import Documents, FlashMultiHeadAttention, KeyLengths, KeyPadding, replace_mha, use_backend
from flashmha.testing.call import SHARINGS

FREE = ("aten::detach", "aten::_unsafe_view")
"""Operators that move no memory, though PyTorch does not call them views."""
LOOK = "equal.default"
"""How a rule that lasts learns on a CPU that its tensor is what it was."""


class Operators(TorchDispatchMode):
    """The operators that make or change a tensor's memory, in order; views are none of them."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and func.overloadpacket._qualified_op_name not in FREE:
            self.names.append(str(func).removeprefix("aten."))
        return func(*args, **(kwargs or {}))


def operators(call: Callable[[], Tensor], leaves: list[Tensor]) -> list[str]:
    """The operators of a call, and of its backward where something learns, once all that is kept has been found."""
    for _ in range(3):
        with Operators() as ran:
            out = call()
            if out.requires_grad:
                torch.autograd.grad(out, leaves, torch.ones_like(out))
    return ran.names


# The layer, as one writes it by hand


def heads(layer: Any, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    """Queries, keys and values (batch, heads, seqlen, head_dim), by one product for what is one input."""
    weight, bias, width, many = layer.in_proj_weight, layer.in_proj_bias, layer.embed_dim, layer.num_heads
    if query is key is value:
        made = F.linear(query, weight, bias).unflatten(-1, (3, many, -1)).unbind(-3)
    elif key is value:
        weights, biases = (x.split((width, 2 * width)) for x in (weight, bias))
        pair = F.linear(key, weights[1], biases[1]).unflatten(-1, (2, many, -1))
        made = (F.linear(query, weights[0], biases[0]).unflatten(-1, (many, -1)), *pair.unbind(-3))
    else:
        parts = zip((query, key, value), weight.chunk(3), bias.chunk(3), strict=True)
        made = tuple(F.linear(x, w, b).unflatten(-1, (many, -1)) for x, w, b in parts)
    return tuple(x.transpose(1, 2) if layer.batch_first else x.permute(1, 2, 0, 3) for x in made)


def merged(layer: Any, out: Tensor) -> Tensor:
    """The output projection of (batch, heads, seqlen, head_dim)."""
    out = out.transpose(1, 2) if layer.batch_first else out.permute(2, 0, 1, 3).contiguous()
    return F.linear(out.flatten(2), layer.out_proj.weight, layer.out_proj.bias)


def by_hand(layer: Any, *inputs: Tensor, **more: Any) -> Tensor:
    """A layer's output by its own parameters; ``more`` is what SDPA is told."""
    return merged(layer, F.scaled_dot_product_attention(*heads(layer, *inputs), **more))


def weighed_by_hand(layer: Any, *inputs: Tensor) -> Tensor:
    """Output and weights of a layer in one tensor."""
    q, k, v = heads(layer, *inputs)
    weights = ((q * q.shape[-1] ** -0.5) @ k.mT).softmax(-1)
    out = (weights @ v).transpose(1, 2)
    out = (out if layer.batch_first else out.transpose(0, 1).contiguous()).flatten(2)
    return torch.cat((F.linear(out, layer.out_proj.weight, layer.out_proj.bias).flatten(), weights.mean(1).flatten()))


def inputs(
    sharing: str, batch: int, seqlen: int, batch_first: bool, training: bool
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Query, key and value, one object where letters are equal, and the objects."""
    shape = (batch, seqlen, 16) if batch_first else (seqlen, batch, 16)
    given = {name: torch.randn(shape, requires_grad=training) for name in dict.fromkeys(sharing)}
    return [given[name] for name in sharing], given


drawn = {
    "sharing": st.sampled_from(SHARINGS),
    "batch": st.integers(1, 3),
    "seqlen": st.integers(2, 7),
    "heads_": st.sampled_from((1, 2, 4)),
    "batch_first": st.booleans(),
    "training": st.booleans(),
    "cast": st.booleans(),
}


@given(**drawn, hint=st.booleans())
def test_a_call_beside_no_mask_runs_the_operators_of_the_layer_written_by_hand(
    sharing: str, batch: int, seqlen: int, heads_: int, batch_first: bool, training: bool, cast: bool, hint: bool
) -> None:
    layer = FlashMultiHeadAttention(16, heads_, batch_first=batch_first).train(training)
    given, leaves = inputs(sharing, batch, seqlen, batch_first, training)
    future = torch.ones(seqlen, seqlen, dtype=torch.bool).triu(1)
    told: dict[str, Any] = {"attn_mask": future, "is_causal": True} if hint else {}
    ran = []
    for call in (
        lambda: layer(*given, need_weights=False, **told)[0],
        lambda: by_hand(layer, *given, is_causal=hint),
    ):
        autocast = torch.autocast(given[0].device.type, torch.bfloat16, enabled=cast)
        # another package's kernels are other operators
        with torch.set_grad_enabled(training), autocast, use_backend("sdpa"):
            ran.append(operators(call, [*leaves.values(), *layer.parameters()]))
    forward, theirs = (names[: names.index("ones_like.default")] if training else names for names in ran)
    assert forward == theirs and sorted(ran[0]) == sorted(ran[1])  # a backward's order is autograd's


@pytest.mark.cpu("a GPU makes numbers of a mask once, where SDPA makes them in each call")
@given(**drawn, kind=st.sampled_from(("padding", "KeyPadding", "KeyLengths", "Documents")))
def test_a_call_beside_a_mask_runs_no_operator_but_those_and_the_mask_s(
    sharing: str, batch: int, seqlen: int, heads_: int, batch_first: bool, training: bool, cast: bool, kind: str
) -> None:
    batch = 1 if kind == "Documents" else batch
    layer = FlashMultiHeadAttention(16, heads_, batch_first=batch_first).train(training)
    given, leaves = inputs(sharing, batch, seqlen, batch_first, training)
    lengths = torch.arange(batch) % (seqlen - 1) + 1
    valid = torch.arange(seqlen)[None] < lengths[:, None]
    numbers = torch.zeros(valid.shape, dtype=torch.bfloat16 if cast else torch.float32)
    numbers = numbers.masked_fill(~valid, float("-inf"))[:, None, None]
    documents = Documents(torch.tensor([0, 1, seqlen]))
    told, mask = {
        "padding": ({"key_padding_mask": ~valid}, lambda hidden=~valid: (~hidden)[:, None, None]),
        "KeyPadding": ({"key_padding_mask": KeyPadding(valid)}, lambda: numbers),  # made once, and kept
        "KeyLengths": ({"key_padding_mask": KeyLengths(lengths)}, lambda: numbers),
        "Documents": ({"attn_mask": documents}, lambda: documents.materialize(1, 1, seqlen, seqlen)),
    }[kind]
    ran = []
    for call in (
        lambda: layer(*given, need_weights=False, **told)[0],
        lambda: by_hand(layer, *given, attn_mask=mask()),
    ):
        with torch.set_grad_enabled(training), torch.autocast("cpu", torch.bfloat16, enabled=cast):
            names = operators(call, [*leaves.values(), *layer.parameters()])
        ran.append(sorted(name for name in names if name != LOOK))
    assert ran[0] == ran[1]


@pytest.mark.cpu("a GPU packs documents for another kernel")
@pytest.mark.parametrize("batch_first", (False, True))
@torch.no_grad()
def test_long_documents_are_attended_to_one_by_one(batch_first: bool) -> None:
    sizes = [150, 250]
    layer = FlashMultiHeadAttention(16, 2, batch_first=batch_first)
    (x, *_), _ = inputs("aaa", 1, sum(sizes), batch_first, False)
    documents = Documents(torch.tensor([0, *sizes]).cumsum(0))

    def apart() -> Tensor:
        parts = zip(*(part.split(sizes, dim=2) for part in heads(layer, x, x, x)), strict=True)
        outs = [F.scaled_dot_product_attention(*part).transpose(1, 2) for part in parts]
        return merged(layer, torch.cat(outs, dim=1).transpose(1, 2))

    ran = []
    for call in (lambda: layer(x, x, x, attn_mask=documents, need_weights=False)[0], apart):
        ran.append(operators(call, []))
    spare = {"sub.Tensor", "new_empty.default"}  # how long the documents are, on the host
    assert sorted(name for name in ran[0] if name not in spare) == sorted(ran[1])


@pytest.mark.cpu("a GPU makes weights by a kernel of Triton, tile by tile")
@given(**{name: drawn[name] for name in ("sharing", "batch", "heads_", "batch_first", "training")}, short=st.booleans())
def test_weights_cost_their_formula_where_they_are_small_and_nothing_until_they_are_read(
    sharing: str, batch: int, heads_: int, batch_first: bool, training: bool, short: bool
) -> None:
    layer = FlashMultiHeadAttention(16, heads_, batch_first=batch_first).train(training)
    given, leaves = inputs(sharing, batch, 5 if short else 100, batch_first, training)

    def ours() -> Tensor:
        out, weights = layer(*given)
        return torch.cat((out.flatten(), weights.flatten())) if short else out

    ran = []
    for call in (ours, lambda: weighed_by_hand(layer, *given) if short else by_hand(layer, *given)):
        with torch.set_grad_enabled(training):
            ran.append(sorted(operators(call, [*leaves.values(), *layer.parameters()])))
    assert ran[0] == ran[1]


# The encoder, as one writes it by hand


def encoder_by_hand(model: Any, x: Tensor, **more: Any) -> Tensor:
    """A ``nn.TransformerEncoder`` of torch's own layers with ReLU."""
    for layer in model.layers:
        attention = layer.self_attn

        def attend(x: Tensor, layer: Any = layer, attention: Any = attention) -> Tensor:
            dropout_p = attention.dropout if attention.training else 0.0
            return layer.dropout1(by_hand(attention, x, x, x, dropout_p=dropout_p, **more))

        def feed(x: Tensor, layer: Any = layer) -> Tensor:
            return layer.dropout2(layer.linear2(layer.dropout(F.relu(layer.linear1(x)))))

        if layer.norm_first:
            x = x + attend(layer.norm1(x))
            x = x + feed(layer.norm2(x))
        else:
            x = layer.norm1(x + attend(x))
            x = layer.norm2(x + feed(x))
    return x if model.norm is None else model.norm(x)


@given(
    layers=st.integers(1, 3),
    training=st.booleans(),
    grad=st.booleans(),
    cast=st.booleans(),
    batch_first=st.booleans(),
    norm_first=st.booleans(),
    dropout=st.sampled_from((0.0, 0.1)),
    hint=st.booleans(),
)
@fewer(2)
def test_a_swapped_encoder_runs_the_operators_of_the_one_written_by_hand(
    layers: int,
    training: bool,
    grad: bool,
    cast: bool,
    batch_first: bool,
    norm_first: bool,
    dropout: float,
    hint: bool,
) -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout, batch_first=batch_first, norm_first=norm_first)
    model = nn.TransformerEncoder(layer, layers, nn.LayerNorm(16) if norm_first else None, enable_nested_tensor=False)
    model = replace_mha(model.train(training))
    (x, *_), _ = inputs("aaa", 2, 5, batch_first, False)
    future = torch.ones(5, 5, dtype=torch.bool).triu(1)
    ran = []
    for call in (
        lambda: model(x, mask=future if hint else None, is_causal=hint),
        lambda: encoder_by_hand(model, x, is_causal=hint),
    ):
        autocast = torch.autocast(x.device.type, torch.bfloat16, enabled=cast)
        with torch.set_grad_enabled(grad), autocast, use_backend("sdpa"):
            ran.append(operators(call, list(model.parameters())))
    assert ran[0] == ran[1]

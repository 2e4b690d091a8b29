"""Keys that a layer's process_heads adds: visible to every query, whatever masks say of the call's own keys."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import flashmha
from flashmha import FlashMultiHeadAttention
from flashmha.testing import assert_same, noise

WIDTH, HEADS = 8, 2


class Wider(FlashMultiHeadAttention):
    """Keys in front of the call's own and behind them."""

    keys_before, keys_after = 2, 1

    def process_heads(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return q, self.wider(k, 0.5), self.wider(v, -0.7)

    def wider(self, x: Tensor, value: float) -> Tensor:
        before, after = ((i + 1.0) * value * torch.ones_like(x[:, :n]) for i, n in enumerate(self.added()))
        return torch.cat((before, x, after), dim=1)

    def added(self) -> tuple[int, int]:
        return self.keys_before, self.keys_after


class Undeclared(Wider):
    keys_before, keys_after = 0, 0

    def added(self) -> tuple[int, int]:
        return 1, 0


BATCH, QUERIES, KEYS = 2, 3, 5


def masks(kind: str, keys: int) -> Any:
    table = noise(3, QUERIES, keys) > 0.0
    return {
        "none": None,
        "causal": torch.ones(QUERIES, keys, dtype=torch.bool).triu(1),
        "flag": torch.ones(QUERIES, keys, dtype=torch.bool).triu(1),
        "dense": table,
        "all hidden": torch.ones(QUERIES, keys, dtype=torch.bool),
        "per head": noise(4, BATCH * HEADS, QUERIES, keys) > 0.0,
        "four axes": noise(5, 1, HEADS, QUERIES, keys) > 0.0,
        "float": noise(6, QUERIES, keys),
        "float per head": noise(7, BATCH * HEADS, QUERIES, keys),
        "rule": flashmha.causal(align="top_left"),
        "rule of a query": flashmha.Rule(lambda batch, head, q_idx, k_idx: q_idx > 0),
    }[kind]


def hides(mask: Tensor) -> Tensor:
    """A mask of the stock class, added to (batch, heads, queries, keys)."""
    added = torch.zeros(mask.shape).double().masked_fill(mask, -torch.inf) if mask.dtype == torch.bool else mask
    if added.dim() == 3:
        return added.unflatten(0, (BATCH, HEADS))
    return added


def formula(layer: Any, x: Tensor, y: Tensor, attn_mask: Any, padding: Tensor | None) -> tuple[Tensor, Tensor]:
    """Output and weights of every head by the definition, every key beside the call's own open to all."""
    q, k, v = layer.process_heads(*FlashMultiHeadAttention.project(layer, x, y, y))
    added = torch.zeros(BATCH, HEADS, x.shape[1], y.shape[1], dtype=torch.float64)
    if isinstance(attn_mask, flashmha.Mask):
        attn_mask = ~attn_mask.materialize(BATCH, HEADS, x.shape[1], y.shape[1], None).expand(added.shape)
    if attn_mask is not None:
        added = added + hides(attn_mask)
    if padding is not None:
        added = added + hides(padding)[:, None, None]
    if layer.window is not None:
        added = added + hides(~layer.window.materialize(1, 1, x.shape[1], y.shape[1], None))
    columns = 0
    if layer.bias_k is not None:
        k = torch.cat((k, layer.bias_k.view(1, 1, HEADS, -1).expand(BATCH, -1, -1, -1)), 1)
        v = torch.cat((v, layer.bias_v.view(1, 1, HEADS, -1).expand(BATCH, -1, -1, -1)), 1)
        columns += 1
    if layer.add_zero_attn:
        k, v = (nn.functional.pad(x, (0, 0, 0, 0, 0, 1)) for x in (k, v))
        columns += 1
    before, after = layer.added()
    added = nn.functional.pad(added, (before, after + columns))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / (WIDTH // HEADS) ** 0.5 + added
    weights = scores.softmax(-1).nan_to_num(0.0)
    return layer.merge(torch.einsum("bhqk,bkhd->bqhd", weights, v), x), weights


KINDS = (
    "none",
    "causal",
    "flag",
    "dense",
    "all hidden",
    "per head",
    "four axes",
    "float",
    "float per head",
    "rule",
    "rule of a query",
)


@given(
    kind=st.sampled_from(KINDS),
    keys=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    padded=st.booleans(),
    window=st.sampled_from((None, (1, 0), (0, 1))),
    columns=st.sampled_from(
        ({}, {"add_bias_kv": True}, {"add_zero_attn": True}, {"add_bias_kv": True, "add_zero_attn": True})
    ),
    need_weights=st.booleans(),
    average=st.booleans(),
    training=st.booleans(),
    skip=st.booleans(),
)
def test_keys_that_a_layer_adds_are_open_to_every_query(
    kind: str,
    keys: tuple[int, int],
    padded: bool,
    window: Any,
    columns: dict[str, bool],
    need_weights: bool,
    average: bool,
    training: bool,
    skip: bool,
) -> None:
    options: dict[str, Any] = {"batch_first": True, "dtype": torch.float64, "window": window, "skip_padding": skip}
    layer = Wider(WIDTH, HEADS, **columns, **options).train(training)
    layer.keys_before, layer.keys_after = keys
    x, y = torch.randn(BATCH, QUERIES, WIDTH).double(), torch.randn(BATCH, KEYS, WIDTH).double()
    attn_mask = masks(kind, KEYS)
    padding = (torch.arange(KEYS) >= torch.tensor([[4], [0]])) if padded else None
    out, weights = layer(
        x,
        y,
        y,
        attn_mask=attn_mask,
        key_padding_mask=padding if padding is None or not str(kind).startswith("float") else hides(padding),
        need_weights=need_weights,
        average_attn_weights=average,
        is_causal=kind == "flag",
    )
    expected, heads = formula(layer, x, y, attn_mask, padding)
    assert_same(out, expected)
    assert (weights is not None) == need_weights
    if weights is not None:
        assert_same(weights, heads.mean(1) if average else heads)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "none"])
def test_keys_that_a_layer_adds_without_a_word_are_refused_beside_any_mask(kind: str) -> None:
    layer = Undeclared(WIDTH, HEADS, batch_first=True, dtype=torch.float64)
    x, y = torch.randn(BATCH, QUERIES, WIDTH).double(), torch.randn(BATCH, KEYS, WIDTH).double()
    with pytest.raises(ValueError, match="keys_before"):
        layer(x, y, y, attn_mask=masks(kind, KEYS), need_weights=False, is_causal=kind == "flag")


def test_keys_that_a_layer_adds_without_a_word_are_refused_beside_padding_and_a_window() -> None:
    layer = Undeclared(WIDTH, HEADS, batch_first=True, dtype=torch.float64)
    x = torch.randn(BATCH, KEYS, WIDTH).double()
    with pytest.raises(ValueError, match="keys_before"):
        layer(x, x, x, key_padding_mask=torch.zeros(BATCH, KEYS, dtype=torch.bool))
    layer.window = (1, 0)  # type: ignore[assignment]
    with pytest.raises(ValueError, match="keys_before"):
        layer(x, x, x)


def test_other_keys_than_the_call_s_are_all_visible_where_no_mask_speaks_of_them() -> None:
    layer = Undeclared(WIDTH, HEADS, batch_first=True, dtype=torch.float64)
    x = torch.randn(BATCH, KEYS, WIDTH).double()
    out, weights = layer(x, x, x)
    expected, heads = formula(layer, x, x, None, None)
    assert_same(out, expected)
    assert_same(weights, heads.mean(1))


@pytest.mark.parametrize("keys", [-1, 1.5, True, None, "one"])
@pytest.mark.parametrize("name", ["keys_before", "keys_after"])
def test_a_number_of_keys_that_means_nothing_is_refused(name: str, keys: Any) -> None:
    layer = FlashMultiHeadAttention(WIDTH, HEADS, batch_first=True)
    x = torch.randn(BATCH, KEYS, WIDTH)
    layer.process_heads = lambda q, k, v: (q, k, v)  # type: ignore[method-assign]
    setattr(layer, name, keys)
    with pytest.raises(ValueError, match=f"{name} must be a number of keys"):
        layer(x, x, x)


def test_a_number_of_keys_that_is_not_true_is_refused() -> None:
    layer = FlashMultiHeadAttention(WIDTH, HEADS, batch_first=True)
    layer.keys_before = 3
    x = torch.randn(BATCH, KEYS, WIDTH)
    with pytest.raises(ValueError, match="3 before"):
        layer(x, x, x)


def test_added_keys_stay_in_a_compiled_layer() -> None:
    layer = Wider(WIDTH, HEADS, batch_first=True, dtype=torch.float64)
    x = torch.randn(BATCH, KEYS, WIDTH).double()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for mask in (None, torch.ones(KEYS, KEYS, dtype=torch.bool).triu(1)):
        assert_same(compiled(x, x, x, attn_mask=mask)[0], layer(x, x, x, attn_mask=mask)[0])


def test_nested_tensors_have_added_keys_in_every_item() -> None:
    layer = Wider(WIDTH, HEADS, batch_first=True, dtype=torch.float64)
    items = [torch.randn(length, WIDTH).double() for length in (2, 4)]
    nested = torch.nested.nested_tensor(items, layout=torch.jagged)
    found = layer(nested, nested, nested, need_weights=False)[0].unbind()
    for item, out in zip(items, found):
        assert_same(out, layer(item, item, item, need_weights=False)[0])

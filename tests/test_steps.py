"""A step of generating runs as functions: the numbers, the caches and the errors are those of the modules called."""

from __future__ import annotations

import collections
import copy
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import fewer
from hypothesis import given, settings
from hypothesis import strategies as st
from test_generate import future, part
from test_stack import Operators, loud_linear, shout
from torch import Tensor, nn

import flashmha
from flashmha import FlashMultiHeadAttention, KVCache, replace_mha
from flashmha.layer.step import PlainStep
from flashmha.swap.known import find_unknown_layers
from flashmha.testing import assert_same, noise
from flashmha.testing.models import Architecture, architectures

pytestmark = pytest.mark.cpu("steps read lengths, which on a GPU would wait for the device")

PROMPT, STEPS, MEMORY, BATCH = 4, 3, 5, 2


@pytest.fixture(autouse=True)
def without_gradients() -> Any:
    with torch.no_grad():
        yield


def hook(seen: list[str]) -> Callable[..., None]:
    return lambda *told: seen.append("hook")


STRANGE: dict[str, Callable[[Any, list[str]], Any]] = {
    "a hook on a layer": lambda layer, seen: layer.register_forward_hook(hook(seen)),
    "a hook before the last norm": lambda layer, seen: layer.norm3.register_forward_pre_hook(hook(seen)),
    "a hook on the last dropout": lambda layer, seen: layer.dropout3.register_forward_hook(hook(seen)),
    "a hook on self-attention": lambda layer, seen: layer.self_attn.register_forward_hook(hook(seen)),
    "a hook before cross-attention": lambda layer, seen: layer.multihead_attn.register_forward_pre_hook(hook(seen)),
    "another linear": loud_linear,
    "a forward of an instance": lambda layer, seen: shout(layer.linear1, seen),
    "a forward of attention": lambda layer, seen: shout(layer.multihead_attn, seen),
}


@fewer(2)
@given(
    architecture=architectures(),
    lengths=st.lists(st.integers(0, PROMPT), min_size=BATCH, max_size=BATCH),
    tokens=st.integers(1, 3),
    padding=st.sampled_from((None, "tensor", "rule")),
)
def test_a_step_of_functions_is_one_of_modules(
    architecture: Architecture, lengths: list[int], tokens: int, padding: str | None
) -> None:
    """For rows of one length and of several, beside a padded memory, for a token and for a few."""
    functions = replace_mha(architecture.decoder().eval())
    modules = copy.deepcopy(functions)
    seen: list[str] = []
    modules.layers[0].norm3.register_forward_hook(hook(seen))
    x, memory = architecture.inputs(BATCH, PROMPT + tokens * STEPS), architecture.inputs(BATCH, MEMORY, 2)
    hidden = torch.arange(MEMORY) >= torch.tensor([[MEMORY], [MEMORY - 2]])
    given: Any = {"tensor": hidden, "rule": flashmha.KeyPadding(~hidden), None: None}[padding]
    caches = [KVCache.of(one, BATCH, PROMPT + tokens * STEPS) for one in (functions, modules)]
    outs: list[list[Tensor]] = [[], []]
    for decoder, cache, out in zip((functions, modules), caches, outs):
        told = {"memory_key_padding_mask": given, "cache": cache}
        real = torch.arange(PROMPT) >= torch.tensor(lengths)[:, None]
        first = {"tgt_mask": future(PROMPT, "bool"), "tgt_key_padding_mask": real}
        decoder(part(architecture, x, slice(0, PROMPT)), memory, **first, **told)
        for place in range(PROMPT, PROMPT + tokens * STEPS, tokens):
            out.append(decoder(part(architecture, x, slice(place, place + tokens)), memory, **told))
    assert find_unknown_layers(functions) is None and seen
    for one, other in zip(*outs):
        assert_same(one, other)
    for one, other in zip(*(cache.caches() for cache in caches)):
        assert torch.equal(one.get_seq_length(), other.get_seq_length())


@pytest.mark.parametrize("strange", STRANGE)
def test_what_counts_on_being_called_is_called(strange: str) -> None:
    decoder = replace_mha(Architecture().decoder().eval())
    seen: list[str] = []
    STRANGE[strange](decoder.layers[0], seen)
    x, memory = Architecture().inputs(1, 2), Architecture().inputs(1, MEMORY, 2)
    cache = KVCache.of(decoder, 1, 4)
    for place in range(2):
        decoder(part(Architecture(), x, slice(place, place + 1)), memory, cache=cache)
    assert len(seen) == 2


@settings(parent=fewer(2))
@given(architecture=architectures(), data=st.data())
def test_a_step_that_fails_leaves_every_layer_as_it_was(architecture: Architecture, data: st.DataObject) -> None:
    ours = replace_mha(architecture.decoder().eval())
    x, memory = architecture.inputs(BATCH, PROMPT), architecture.inputs(BATCH, MEMORY, 2)
    begun = data.draw(st.integers(0, 2))
    cache = KVCache.of(ours, BATCH, PROMPT - 1)
    made = [ours(part(architecture, x, slice(place, place + 1)), memory, cache=cache) for place in range(begun)]
    last: Any = data.draw(st.sampled_from(list(ours.layers)))
    slow = data.draw(st.sampled_from((None, *ours.layers)))
    if slow is not None:  # which is then called as a module
        slow.self_attn.softmax_scale = slow.self_attn.head_dim**-0.5
    right, wrong = last.linear2.weight, torch.zeros(1, 1, dtype=torch.float64)
    last.linear2.weight = nn.Parameter(wrong)
    with pytest.raises(RuntimeError):
        ours(part(architecture, x, slice(begun, begun + 1)), memory, cache=cache)
    last.linear2.weight = right
    assert [one.get_seq_length().tolist() for one in cache.caches() if isinstance(one, flashmha.StaticCache)] == [
        [begun] * BATCH for _ in ours.layers
    ]
    for place in range(begun, PROMPT - 1):
        made.append(ours(part(architecture, x, slice(place, place + 1)), memory, cache=cache))
    axis = 1 if architecture.batch_first else 0
    wanted = ours(x, memory, tgt_mask=future(PROMPT))
    assert_same(torch.cat(made, dim=axis), part(architecture, wanted, slice(0, PROMPT - 1)))
    with pytest.raises(ValueError, match=f"max_seqlen must be at least {PROMPT} for 1 tokens"):
        ours(part(architecture, x, slice(PROMPT - 1, PROMPT)), memory, cache=cache)
    assert cache.get_seq_length().tolist() == [PROMPT - 1] * BATCH


def by_hand(decoder: Any, x: Tensor, held: list[Any], memories: list[Any], place: int) -> Tensor:
    """A step as a good engineer writes it, over keys (batch, heads, tokens, head_dim)."""
    batch, _, width = x.shape
    for layer, (k, v), (k_memory, v_memory) in zip(decoder.layers, held, memories):
        own, cross, heads = layer.self_attn, layer.multihead_attn, layer.self_attn.num_heads
        packed = F.linear(x, own.in_proj_weight, own.in_proj_bias).view(batch, 1, 3, heads, -1)
        q, k_new, v_new = packed.permute(2, 0, 3, 1, 4).unbind(0)
        k[:, :, place : place + 1] = k_new
        v[:, :, place : place + 1] = v_new
        out = F.scaled_dot_product_attention(q, k[:, :, : place + 1], v[:, :, : place + 1])
        x = layer.norm1(x + own.out_proj(out.transpose(1, 2).reshape(x.shape)))
        q = F.linear(x, cross.in_proj_weight[:width], cross.in_proj_bias[:width]).view(batch, 1, heads, -1)
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k_memory, v_memory)
        x = layer.norm2(x + cross.out_proj(out.transpose(1, 2).reshape(x.shape)))
        x = layer.norm3(x + layer.linear2(F.relu(layer.linear1(x))))
    return x


VIEWS = ("view", "transpose", "permute", "unbind", "slice", "select", "t.default", "expand", "alias", "detach", "split")


def computing(names: list[str]) -> collections.Counter[str]:
    """How often each operator runs that is no view."""
    return collections.Counter(name for name in names if not any(view in name for view in VIEWS))


@fewer(3)
@given(batch=st.integers(1, 3), layers=st.integers(1, 3), place=st.integers(1, 6))
def test_a_step_is_the_operators_of_one_by_hand_and_the_move_of_its_lengths(
    batch: int, layers: int, place: int
) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerDecoderLayer(16, 2, 32, batch_first=True, dropout=0.1, dtype=torch.float64)
    decoder = replace_mha(nn.TransformerDecoder(layer, layers).eval())
    x, memory = noise(1, batch, place + 1, 16), noise(2, batch, MEMORY, 16)
    cache = KVCache.of(decoder, batch, 8)
    decoder(x[:, :place], memory, tgt_mask=future(place), cache=cache)
    names = [f"layers.{number}" for number in range(layers)]
    held, memories = (
        [
            tuple(store.transpose(1, 2).clone() for store in (cache[f"{name}.{kind}"].k, cache[f"{name}.{kind}"].v))
            for name in names
        ]
        for kind in ("self_attn", "multihead_attn")
    )
    token = x[:, place:].contiguous()
    with Operators() as hand:
        wanted = by_hand(decoder, token, held, memories, place)
    read: list[str] = []

    def reads(frame: Any, event: str, what: Any) -> None:
        if event == "c_call" and what.__name__ in ("tolist", "item"):
            read.append(what.__name__)

    sys.setprofile(reads)
    try:
        with Operators() as ours:
            out = decoder(token, memory, cache=cache)
    finally:
        sys.setprofile(None)
    assert_same(out, wanted)
    more = computing(ours.names)
    more.subtract(computing(hand.names))
    moves = {"aten._foreach_add_.ScalarList": 1}
    assert {name: count for name, count in more.items() if count} == moves
    assert read == ["tolist"] * layers  # the lengths of each cache, once


@given(batch=st.integers(1, 3), tokens=st.lists(st.integers(1, 3), min_size=1, max_size=4), first=st.booleans())
def test_a_layer_steps_as_it_does_beside_a_mask_that_hides_nothing(batch: int, tokens: list[int], first: bool) -> None:
    torch.manual_seed(0)
    layer = FlashMultiHeadAttention(16, 2, batch_first=first, need_weights=False, dtype=torch.float64).eval()
    caches = [KVCache.of(nn.ModuleDict({"it": layer}), batch, sum(tokens))["it"] for _ in range(2)]
    x = noise(1, batch, sum(tokens), 16)
    for end, count in zip(torch.tensor(tokens).cumsum(0).tolist(), tokens):
        piece = x[:, end - count : end] if first else x[:, end - count : end].transpose(0, 1)
        shown = torch.zeros(count, count, dtype=torch.bool)
        outs = [
            layer(piece, piece, piece, cache=cache, attn_mask=mask)[0] for cache, mask in zip(caches, (None, shown))
        ]
        assert_same(*outs)
    assert torch.equal(*(cache.get_seq_length() for cache in caches))


@given(batch=st.integers(1, 3), tokens=st.lists(st.integers(1, 3), min_size=1, max_size=4), data=st.data())
def test_a_step_that_may_not_read_lengths_is_one_that_does(batch: int, tokens: list[int], data: st.DataObject) -> None:
    """As on a GPU: the same numbers, and operators whose number no cache changes."""
    torch.manual_seed(0)
    layer = FlashMultiHeadAttention(16, 2, batch_first=True, need_weights=False, dtype=torch.float64).eval()
    caches = [KVCache.of(nn.ModuleDict({"it": layer}), batch, 2 + sum(tokens))["it"] for _ in range(2)]
    begun = torch.tensor([data.draw(st.integers(0, 2)) for _ in range(batch)])
    x, start = noise(1, batch, sum(tokens), 16), noise(2, batch, 2, 16)
    for cache in caches:
        layer(start, start, start, cache=cache, key_padding_mask=torch.arange(2) >= begun[:, None])
    for end, count in zip(torch.tensor(tokens).cumsum(0).tolist(), tokens):
        piece = x[:, end - count : end]
        step = PlainStep(piece)
        step.reads = False
        with Operators() as seen:
            out = step.attend_next(layer, piece.reshape(-1, 16), caches[0])
            step.finish()
        assert out is not None and sum("index_put" in name for name in seen.names) == 2
        assert_same(out.view(piece.shape), layer(piece, piece, piece, cache=caches[1])[0])
        assert torch.equal(*(cache.get_seq_length() for cache in caches))


@fewer(3)
@given(
    batch=st.integers(1, 2),
    seqlen_k=st.integers(1020, 1030) | st.integers(2040, 2060),
    spare=st.sampled_from((0, 7)),
    scale=st.sampled_from((0.1, 1.0, 30.0)),
)
def test_one_query_over_many_keys_is_the_definition(batch: int, seqlen_k: int, spare: int, scale: float) -> None:
    """By whatever operators: where keys are neighbours, and in a cache that is not full."""
    q = (scale * noise(1, batch, 1, 8, 64)).float()
    k, v = (noise(salt, batch, 8, seqlen_k + spare, 64).float().transpose(1, 2)[:, :seqlen_k] for salt in (2, 3))
    exact, plain = (
        flashmha.attention(*(x.to(to) for x in (q, k, v)), backend="naive") for to in (torch.float64, torch.float32)
    )
    with flashmha.record() as calls:
        out = flashmha.attention(q, k, v)
    assert isinstance(out, Tensor) and isinstance(exact, Tensor) and isinstance(plain, Tensor)
    assert [one.backend for one in calls] == ["sdpa"]
    assert (out - exact).abs().max() <= 2 * (plain - exact).abs().max() + 1e-5

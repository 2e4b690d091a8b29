"""Packed tokens: the real tokens of a batch end to end, through a layer, an encoder and people's own models."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flashmha import Documents, FlashMultiHeadAttention, KeyLengths, KeyPadding, Mask, Window, causal, pack
from flashmha.backends.choice.registry import instead
from flashmha.backends.rewrites import heads
from flashmha.backends.sdpa import pieces as blocks
from flashmha.backends.sdpa.backend import Sdpa
from flashmha.testing import noise, randomized, seeds

MASKS: dict[str, Mask | None] = {
    "none": None,
    "causal": causal(),
    "top left": causal(align="top_left"),
    "window": Window(1, 2),
    "behind": Window(2, None),
}


@dataclasses.dataclass(frozen=True)
class Problem:
    """A layer, and items to attend one by one or packed; ``keys`` are the lengths of other keys than their own."""

    queries: tuple[int, ...] = (3, 4, 1)
    keys: tuple[int, ...] | None = None
    heads: int = 2
    heads_kv: int | None = None
    bias: bool = True
    batch_first: bool = True
    batched: bool = True
    window: tuple[int | None, int | None] | None = None
    columns: tuple[str, ...] = ()
    mask: str = "none"
    told: bool = True
    dropout: float = 0.0
    seed: int = 0

    def layer(self, **more: Any) -> FlashMultiHeadAttention:
        """The layer, no parameter of which is zero."""
        options = {
            "bias": self.bias,
            "dropout": self.dropout,
            "batch_first": self.batch_first,
            "num_kv_heads": self.heads_kv,
            "window": self.window,
            "dtype": torch.float64,
            **dict.fromkeys(self.columns, True),
            **more,
        }
        return randomized(FlashMultiHeadAttention(4 * self.heads, self.heads, **options), self.seed)

    def inputs(self) -> tuple[Tensor, Tensor]:
        """Queries (total_q, features) and keys (total_k, features), one object in self-attention."""
        x = noise(self.seed, sum(self.queries), 4 * self.heads).requires_grad_()
        return x, x if self.keys is None else noise(self.seed + 1, sum(self.keys), 4 * self.heads).requires_grad_()

    @property
    def documents(self) -> Documents:
        queries, keys = self.queries, self.keys
        longest = {"max_seqlen": max(queries), "max_seqlen_k": None if keys is None else max(keys)}
        return Documents(offsets(queries), None if keys is None else offsets(keys), **(longest if self.told else {}))

    def laid_out(self, x: Tensor, batched: bool = True) -> Tensor:
        """One item as the layer takes it."""
        return x if not batched else x[None] if self.batch_first else x[:, None]

    def packed(self, layer: Any, x: Tensor, y: Tensor, need_weights: bool) -> tuple[Tensor, list[Tensor]]:
        query = self.laid_out(x, self.batched)
        key = query if y is x else self.laid_out(y, self.batched)
        beside = MASKS[self.mask]
        mask = self.documents if beside is None else self.documents & beside
        out, seen = layer(query, key, key, attn_mask=mask, need_weights=need_weights)
        assert out.shape == query.shape
        return out.reshape(x.shape), [] if seen is None else self.blocks(seen if self.batched else seen[None])

    def blocks(self, seen: Tensor) -> list[Tensor]:
        """The weights of every item, cut out of those of all; those of the columns behind them."""
        keys = self.queries if self.keys is None else self.keys
        own, extra = seen[..., : sum(keys)], seen[..., sum(keys) :]
        rows, cut = (
            seen.split(self.queries, dim=-2),
            zip(own.split(self.queries, dim=-2), extra.split(self.queries, dim=-2)),
        )
        items = [torch.cat((mine.split(keys, dim=-1)[place], more), dim=-1) for place, (mine, more) in enumerate(cut)]
        # nothing is seen of other items
        for row, item in zip(rows, items):
            torch.testing.assert_close(row.sum(dim=-1), item.sum(dim=-1))
        return items

    def one_by_one(self, layer: Any, x: Tensor, y: Tensor, need_weights: bool) -> tuple[Tensor, list[Tensor]]:
        outs, maps = [], []
        keys = self.queries if self.keys is None else self.keys
        for query, key in zip(x.split(self.queries), y.split(keys)):
            one = self.laid_out(query)
            other = one if y is x else self.laid_out(key)
            out, seen = layer(one, other, other, attn_mask=MASKS[self.mask], need_weights=need_weights)
            outs.append(out.reshape(query.shape))
            maps += [] if seen is None else [seen]
        return torch.cat(outs), maps


def offsets(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor((0, *lengths), dtype=torch.int32).cumsum(0).int()


@st.composite
def problems(draw: st.DrawFn, **fixed: Any) -> Problem:
    """Self- and cross-attention of packed items, some of them empty, small and beyond the block of a kernel."""
    size = st.integers(0, draw(st.sampled_from((4, 9, 70))))
    queries = tuple(draw(st.lists(size, min_size=1, max_size=4)))
    keys = draw(st.none() | st.lists(size, min_size=len(queries), max_size=len(queries)).map(tuple))
    heads = draw(st.sampled_from((1, 2, 4)))
    columns = st.lists(st.sampled_from(("add_bias_kv", "add_zero_attn")), unique=True).map(tuple)
    bound = st.none() | st.integers(0, 3)
    drawn = {
        "queries": queries,
        "keys": keys,
        "heads": heads,
        "heads_kv": draw(st.sampled_from([n for n in (None, 1, 2) if n is None or heads % n == 0])),
        "bias": draw(st.booleans()),
        "batch_first": draw(st.booleans()),
        "batched": draw(st.booleans()),
        "window": draw(st.none() | st.tuples(bound, bound)),
        "columns": draw(st.just(()) | columns),
        "mask": draw(st.sampled_from(sorted(MASKS))),
        "told": draw(st.booleans()),
        "seed": draw(seeds()),
    }
    return Problem(**{**drawn, **fixed})


# The layer takes packed tokens


@pytest.mark.parametrize("worth", (0, blocks.SHARE))
@given(problem=problems(), need_weights=st.booleans())
def test_packed_items_are_attended_as_if_each_came_alone(worth: int, problem: Problem, need_weights: bool) -> None:
    layer = problem.layer()
    answers = []
    with instead(Sdpa(blocks.Costs(document=worth))):
        for run in (problem.packed, problem.one_by_one):
            x, y = problem.inputs()
            out, maps = run(layer, x, y, need_weights)
            goal = (out * noise(7, *out.shape)).sum() + sum((each * noise(8, *each.shape)).sum() for each in maps)
            wanted = [x, *([] if y is x else [y]), *layer.parameters()]
            answers.append([out, *maps, *torch.autograd.grad(goal, wanted, allow_unused=True, materialize_grads=True)])
    for packed, alone in zip(*answers, strict=True):
        torch.testing.assert_close(packed, alone, atol=1e-9, rtol=1e-7)


@given(problem=problems(columns=(), mask="none", window=None, dropout=1.0), need_weights=st.booleans())
def test_dropout_of_everything_leaves_the_bias(problem: Problem, need_weights: bool) -> None:
    layer = problem.layer()
    out = problem.packed(layer, *problem.inputs(), need_weights)[0]
    rest = torch.zeros(4 * problem.heads, dtype=torch.float64) if layer.out_proj.bias is None else layer.out_proj.bias
    torch.testing.assert_close(out, rest.expand_as(out))


@given(count=st.integers(1, 200), seed=seeds(), need_weights=st.booleans())
def test_dropout_takes_the_only_key_of_an_item_or_doubles_it(count: int, seed: int, need_weights: bool) -> None:
    """An item of one token has one weight, 1: dropped or divided by what is kept, for each head."""
    problem = Problem(queries=(1,) * count, dropout=0.5, seed=seed, batched=True, bias=False)
    layer, (x, _) = problem.layer(), problem.inputs()
    with torch.no_grad():
        layer.out_proj.weight.copy_(torch.eye(8))
        out = problem.packed(layer, x, x, need_weights)[0].unflatten(-1, (2, 4))
        full = problem.packed(layer.eval(), x, x, False)[0].unflatten(-1, (2, 4))
    dropped = (out == 0).all(dim=-1)
    torch.testing.assert_close(out[~dropped], 2 * full[~dropped])


@pytest.mark.parametrize("features", ({}, {"window": (2, 2)}, {"num_kv_heads": 1}), ids=str)
@pytest.mark.parametrize("beside", (None, causal()), ids=str)
def test_packed_tokens_compile_into_one_graph_for_every_batch(features: dict[str, Any], beside: Mask | None) -> None:
    layer = FlashMultiHeadAttention(8, 2, batch_first=True, **features)

    def run(x: Tensor, mask: Mask) -> Tensor:
        return layer(x, x, x, attn_mask=mask, need_weights=False)[0]

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=True)
    # Dynamo keeps floats in tensors of the default type, one of the GPU's there, and cannot read them
    floats = torch._dynamo.config.patch(error_on_recompile=True, specialize_float=True)
    with floats, pytest.MonkeyPatch.context() as patch:
        patch.setattr(heads, "MIN_ELEMENTS", 24 * 100)  # from here on a projection is split another way
        for lengths in ((30, 40), (50, 7), (5, 9, 3), (64, 64), (2, 0, 1, 1)):
            x = torch.randn(1, sum(lengths), 8, requires_grad=True)
            mask: Mask = Documents(offsets(lengths), max_seqlen=max(lengths))
            mask = mask if beside is None else mask & beside
            outs = [step(x, mask) for step in (compiled, run)]
            grads = [torch.autograd.grad(out.square().sum(), x)[0] for out in outs]
            torch.testing.assert_close(outs[0], outs[1])
            torch.testing.assert_close(grads[0], grads[1])


# pack and unpack


@dataclasses.dataclass(frozen=True)
class Padding:
    """What is hidden in a batch, said in one of the ways that ``pack`` knows."""

    batch: int = 3
    seqlen: int = 5
    pattern: str = "right"
    kind: str = "bool"
    seed: int = 0

    @property
    def hidden(self) -> Tensor:
        drawn = noise(self.seed, self.batch, self.seqlen)
        if self.pattern == "holes":
            return drawn > 0
        lengths = (drawn[:, :1] * 100 if self.seqlen else drawn.sum(1, keepdim=True)).long().abs() % (self.seqlen + 1)
        places = torch.arange(self.seqlen)
        return places >= lengths if self.pattern == "right" else places < self.seqlen - lengths

    @property
    def mask(self) -> Any:
        hidden = self.hidden
        return {
            "bool": lambda: hidden,
            "float": lambda: torch.zeros(hidden.shape).masked_fill(hidden, float("-inf")),
            "KeyPadding": lambda: KeyPadding(~hidden),
            "KeyLengths": lambda: KeyLengths((~hidden).sum(1)),
        }[self.kind]()


@st.composite
def paddings(draw: st.DrawFn, **fixed: Any) -> Padding:
    kind = draw(st.sampled_from(("bool", "float", "KeyPadding", "KeyLengths")))
    drawn = {
        "batch": draw(st.integers(0, 4)),
        "seqlen": draw(st.integers(0, 7)),
        "pattern": "right" if kind == "KeyLengths" else draw(st.sampled_from(("right", "left", "holes"))),
        "kind": kind,
        "seed": draw(seeds()),
    }
    return Padding(**{**drawn, **fixed})


@given(
    padding=paddings(),
    batch_first=st.booleans(),
    trailing=st.lists(st.integers(1, 3), max_size=2),
    dtype=st.sampled_from((torch.float32, torch.int64, torch.bool, torch.bfloat16, torch.complex64)),
)
def test_unpack_gives_every_real_token_back_and_zeros(
    padding: Padding, batch_first: bool, trailing: list[int], dtype: torch.dtype
) -> None:
    hidden = padding.hidden

    def batch(salt: int, *sizes: int) -> Tensor:
        x = (noise(salt, padding.batch, padding.seqlen, *sizes) * 9).to(dtype)
        return x if batch_first else x.transpose(0, 1)

    x, other = batch(1, 4), batch(2, *trailing)
    packed = pack(x, padding.mask, batch_first=batch_first)
    total = int((~hidden).sum())
    shown = ~hidden if batch_first else ~hidden.T
    for tensor, tokens in ((x, packed.tokens), (other, packed.pack(other))):
        assert tokens.shape == ((1, total) if batch_first else (total, 1)) + tensor.shape[2:]
        back = packed.unpack(tokens)
        assert back.shape == tensor.shape and back.dtype == dtype
        assert torch.equal(back[shown], tensor[shown]) and not back[~shown].any()
    # items lie one after another, each in its order
    rows = tokens[0] if batch_first else tokens[:, 0]
    assert torch.equal(rows, (other if batch_first else other.transpose(0, 1))[~hidden])
    lengths = (~hidden).sum(1).tolist() or [0]
    assert packed.documents.cu_seqlens.diff().tolist() == lengths and packed.documents.max_seqlen == max(lengths)


@given(padding=paddings(), batch_first=st.booleans(), mask=st.sampled_from(("none", "causal")), seed=seeds())
def test_a_packed_batch_is_attended_as_the_padded_one(
    padding: Padding, batch_first: bool, mask: str, seed: int
) -> None:
    layer = Problem(batch_first=batch_first, seed=seed).layer()
    hidden = padding.hidden
    answers = []
    for packs in (False, True):
        x = noise(seed, padding.batch, padding.seqlen, 8).requires_grad_()
        given_x = x if batch_first else x.transpose(0, 1)
        if packs:
            packed = pack(given_x, padding.mask, batch_first=batch_first)
            beside = packed.documents if mask == "none" else packed.documents & causal()
            out = packed.unpack(layer(*[packed.tokens] * 3, attn_mask=beside)[0])
        else:
            beside = KeyPadding(~hidden) if mask == "none" else KeyPadding(~hidden) & causal()
            out = layer(given_x, given_x, given_x, attn_mask=beside)[0]
        out = (out if batch_first else out.transpose(0, 1))[~hidden]
        answers.append((out, *torch.autograd.grad(out.square().sum(), [x, *layer.parameters()])))
    for one, two in zip(*answers, strict=True):
        torch.testing.assert_close(one, two, atol=1e-9, rtol=1e-7)


@given(ours=paddings(kind="bool"), theirs=paddings(kind="bool"), seed=seeds())
def test_cross_attention_between_two_packed_batches(ours: Padding, theirs: Padding, seed: int) -> None:
    theirs = dataclasses.replace(theirs, batch=ours.batch)
    layer = Problem(seed=seed).layer()
    x, memory = noise(seed, ours.batch, ours.seqlen, 8), noise(seed + 1, theirs.batch, theirs.seqlen, 8)
    queries, keys = pack(x, ours.mask), pack(memory, theirs.mask)
    out = layer(queries.tokens, keys.tokens, keys.tokens, attn_mask=queries.across(keys))[0]
    expected = layer(x, memory, memory, key_padding_mask=theirs.mask)[0].masked_fill(ours.hidden[..., None], 0.0)
    torch.testing.assert_close(queries.unpack(out), expected, atol=1e-9, rtol=1e-7)


def jagged(lengths: list[int], seed: int, *sizes: int) -> Tensor:
    items = [noise(seed + place, length, *sizes) for place, length in enumerate(lengths)]
    return torch.nested.nested_tensor(items, layout=torch.jagged, requires_grad=True)


@given(lengths=st.lists(st.integers(0, 5), min_size=1, max_size=4).filter(any), seed=seeds())
def test_jagged_tensors_are_packed_and_come_back_jagged(lengths: list[int], seed: int) -> None:
    x, layer = jagged(lengths, seed, 8), Problem(seed=seed).layer()
    packed = pack(x)
    out = packed.unpack(layer(*[packed.tokens] * 3, attn_mask=packed.documents, need_weights=False)[0])
    torch.testing.assert_close((x + out).values(), (x + layer(x, x, x, need_weights=False)[0]).values())
    out.values().sum().backward()
    assert x.grad is not None and x.grad.values().shape == x.values().shape
    other = jagged(lengths, seed + 9, 2, 3)
    assert torch.equal(packed.pack(other)[0], other.values())
    with pytest.raises(ValueError, match="lengths of these items"):
        packed.pack(jagged([length + 1 for length in lengths], seed, 2))


def test_jagged_tensors_with_gaps_are_packed_without_them() -> None:
    x, starts, lengths = noise(0, 3, 6, 4).requires_grad_(), torch.tensor([1, 0, 2]), torch.tensor([2, 3, 1])
    gaps = torch.nested.narrow(x, 1, starts, lengths, layout=torch.jagged)
    expected = torch.cat([row[start : start + length] for row, start, length in zip(x, starts, lengths)])
    packed = pack(gaps)
    assert torch.equal(packed.tokens[0], expected)
    assert torch.equal(packed.pack(gaps)[0], expected)
    assert torch.equal(packed.unpack(packed.tokens).values(), expected)
    (grad,) = torch.autograd.grad(packed.tokens.square().sum(), x)
    assert torch.equal(grad, torch.autograd.grad(expected.square().sum(), x)[0])


REFUSED: dict[str, tuple[Any, str]] = {
    "no tensor": (lambda x, m: pack([1], m), r"x must be a tensor \(batch, seqlen"),
    "one axis": (lambda x, m: pack(x[0, :, 0]), r"x must be a tensor \(batch, seqlen"),
    "another shape": (lambda x, m: pack(x, m.T), r"key_padding_mask must be .*\(3, 4\)"),
    "one sequence": (lambda x, m: pack(x[0], m[0]), r"\(batch, seqlen, features\).*x\[None\]"),
    "batch_first": (lambda x, m: pack(x, m, batch_first=False), r"\(4, 3\)"),
    "integers": (lambda x, m: pack(x, m.long()), "key_padding_mask must be .*bool .* float with 0 and -inf"),
    "a list": (lambda x, m: pack(x, m.tolist()), "key_padding_mask must be .* got list"),
    "a bias": (lambda x, m: pack(x, torch.full((3, 4), -1.0)), "0 and -inf alone"),
    "one that learns": (lambda x, m: pack(x, torch.zeros(3, 4, requires_grad=True)), "gradient"),
    "lengths beyond": (lambda x, m: pack(x, KeyLengths(torch.tensor([5, 1, 1]))), "seqlen_k=4"),
    "padding of another shape": (lambda x, m: pack(x, KeyPadding(~m[:2])), r"\(3, 4\)"),
    "another batch": (lambda x, m: pack(x, m).pack(x[:2]), r"other must be .*\(3, 4\)"),
    "other tokens": (lambda x, m: pack(x, m).unpack(x), "tokens must be packed"),
    "batches of two sizes": (lambda x, m: pack(x, m).across(pack(x[:2], m[:2])), "a batch of 3 items, got 2"),
    "strided": (lambda x, m: pack(torch.nested.nested_tensor(list(x))), "x must be a jagged"),
    "ragged elsewhere": (
        lambda x, m: pack(torch.nested.nested_tensor(list(x), layout=torch.jagged).transpose(1, 2)),
        "ragged in its second axis",
    ),
    "a mask beside jagged": (
        lambda x, m: pack(torch.nested.nested_tensor(list(x), layout=torch.jagged), m),
        "must be left out",
    ),
}


@pytest.mark.cpu("lengths are looked at there alone")
@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_packed_is_refused_by_name(kind: str) -> None:
    call, message = REFUSED[kind]
    with pytest.raises(ValueError, match=message):
        call(noise(0, 3, 4, 8), torch.arange(4) >= torch.tensor([[1], [2], [4]]))

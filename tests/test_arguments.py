"""What a call may be given: kinds of arguments, rules as masks, flags, masks of one item; and what hops give back."""

import contextlib
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import flashmha
from flashmha import FlashMultiHeadAttention, explain, replace_mha
from flashmha.testing import assert_same, noise

WIDTH, HEADS = 8, 2
X = noise(0, 2, 5, WIDTH)
CAUSAL = torch.ones(5, 5, dtype=torch.bool).triu(1)


def layer(kind: Any = FlashMultiHeadAttention, **options: Any) -> Any:
    return kind(WIDTH, HEADS, **{"batch_first": True, "dtype": torch.float64} | options)


# Kinds

WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "query a list": ({"query": X.tolist()}, "query must be a tensor, got list"),
    "query None": ({"query": None}, "query must be a tensor"),
    "query an array": ({"query": X.cpu().numpy()}, "query must be a tensor, got ndarray"),
    "key a number": ({"key": 3}, "key must be a tensor, got int 3"),
    "value a tuple": ({"value": (X,)}, "value must be a tensor, got tuple"),
    "padding a rule": ({"key_padding_mask": flashmha.causal()}, "key_padding_mask must be .* attn_mask"),
    "padding a list": ({"key_padding_mask": [[False] * 5] * 2}, "key_padding_mask must be .*as_tensor"),
    "padding an array": ({"key_padding_mask": numpy.zeros((2, 5), dtype=bool)}, "key_padding_mask must be .*as_tensor"),
    "padding a number": ({"key_padding_mask": 3}, "key_padding_mask must be .*int 3"),
    "padding a flag": ({"key_padding_mask": False}, "key_padding_mask must be .*bool False"),
    "mask a list": ({"attn_mask": CAUSAL.tolist()}, "attn_mask must be .*as_tensor"),
    "mask an array": ({"attn_mask": CAUSAL.cpu().numpy()}, "attn_mask must be .*as_tensor"),
    "mask a string": ({"attn_mask": "causal"}, r"attn_mask must be .*causal\(\)"),
    "mask a flag": ({"attn_mask": True}, "attn_mask must be .*bool True"),
    "mask a pair": ({"attn_mask": (1, 0)}, "attn_mask must be .*tuple"),
    "mask a score": ({"attn_mask": flashmha.ALiBi(torch.ones(HEADS))}, "attn_mask must be "),
    "need_weights a mask": (
        {"need_weights": CAUSAL},
        "need_weights must be True or .* got bool of shape.*attn_mask=",
    ),
    "need_weights a string": ({"need_weights": "no"}, "need_weights must be True or False, got str 'no'"),
    "is_causal a mask": ({"is_causal": CAUSAL}, "is_causal must be True or False"),
    "is_causal a rule": ({"is_causal": flashmha.causal()}, "is_causal must be True or False.*attn_mask="),
    "average a list": ({"average_attn_weights": [True]}, "average_attn_weights must be True or False"),
}


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize(("wrong", "message"), WRONG.values(), ids=WRONG.keys())
def test_an_argument_of_a_wrong_kind_is_named(wrong: dict[str, Any], message: str, plain: bool) -> None:
    arguments: dict[str, Any] = {"query": X, "key": X, "value": X, "need_weights": not plain} | wrong
    for ours in (layer(), layer().eval(), replace_mha(layer(nn.MultiheadAttention))):
        with pytest.raises(TypeError, match=message):
            ours(**arguments)


@pytest.mark.parametrize("flag", [0, 1, None, numpy.bool_(True), torch.tensor(False)])
def test_flags_that_stock_takes_for_true_or_false_are_taken(flag: Any) -> None:
    stock = layer(nn.MultiheadAttention)
    ours = FlashMultiHeadAttention.from_torch(stock)
    for name in ("need_weights", "average_attn_weights"):
        (out, weights), (expected, heads) = (each(X, X, X, **{name: flag}) for each in (ours, stock))
        assert_same(out, expected)
        assert (weights is None) == (heads is None)
        if weights is not None:
            assert_same(weights, heads)


# Rules as masks


RULES: dict[str, Callable[[], Any]] = {
    "causal": flashmha.causal,
    "causal to the first key": lambda: flashmha.causal(align="top_left"),
    "window": lambda: flashmha.Window(2, 1),
    "padding": lambda: flashmha.KeyPadding(torch.arange(5) < torch.tensor([[4], [0]])),
    "dense": lambda: flashmha.Dense(~CAUSAL),
    "of heads": lambda: flashmha.Dense(noise(1, 1, HEADS, 5, 5) > 0.0),
    "of queries": lambda: flashmha.Rule(lambda batch, head, q_idx, k_idx: q_idx != 1),
    "both": lambda: flashmha.Window(2, 0) & (noise(2, 2, 1, 5, 5) > 0.0),
}


@given(
    name=st.sampled_from(tuple(RULES)),
    options=st.sampled_from(
        ({}, {"add_bias_kv": True}, {"window": (1, 1)}, {"skip_padding": True}, {"backend": "naive"})
    ),
    padded=st.booleans(),
    hint=st.booleans(),
    trust=st.booleans(),
    batch_first=st.booleans(),
    batched=st.booleans(),
    need_weights=st.booleans(),
)
def test_a_rule_is_taken_as_the_mask_that_it_is(
    name: str,
    options: dict[str, Any],
    padded: bool,
    hint: bool,
    trust: bool,
    batch_first: bool,
    batched: bool,
    need_weights: bool,
) -> None:
    assume(batched or name not in ("padding", "both"))
    ours = layer(batch_first=batch_first, trust_is_causal=trust, **options)
    x = X if batched else X[0]
    x = x.transpose(0, 1) if batched and not batch_first else x
    rule, padding = RULES[name](), torch.arange(5) >= torch.tensor([[4], [2]])
    hidden = ~rule.materialize(len(X) if batched else 1, HEADS, 5, 5, None).expand(
        len(X) if batched else 1, HEADS, 5, 5
    )
    given = {"key_padding_mask": (padding if batched else padding[0]) if padded else None, "need_weights": need_weights}
    out, weights = ours(x, x, x, attn_mask=rule, is_causal=hint, **given)
    ours.skip_padding = False
    expected, heads = ours(x, x, x, attn_mask=hidden.flatten(0, 1), **given)
    real = ~(padding if batched else padding[0]) if padded and options.get("skip_padding") else None
    if real is not None and batched and not batch_first:
        real = real.T
    assert_same(out if real is None else out[real], expected if real is None else expected[real])
    if weights is not None and real is None:
        assert_same(weights, heads)


def test_a_rule_reaches_pytorch_s_own_function() -> None:
    ours = layer().requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for x in (X, X[0]):
            run = lambda x: ours(x, x, x, attn_mask=flashmha.causal())[0]  # noqa: E731
            assert_same(torch.jit.trace(run, (x,), check_trace=False)(x), run(x))


def test_explain_takes_a_rule() -> None:
    assert "causal" in str(explain(layer(), X, X, X, attn_mask=flashmha.causal()))


# The hint


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_a_trusted_hint_is_enough(need_weights: bool, padded: bool, training: bool) -> None:
    ours = layer(trust_is_causal=True).train(training)
    padding = (torch.arange(5) >= torch.tensor([[4], [2]])) if padded else None
    for query in (X, X[:, :3]):
        given = {"key_padding_mask": padding, "need_weights": need_weights}
        out, weights = ours(query, X, X, is_causal=True, **given)
        expected, heads = ours(query, X, X, attn_mask=CAUSAL[: query.shape[1]], **given)
        assert_same(out, expected)
        if weights is not None:
            assert_same(weights, heads)


@pytest.mark.parametrize("options", [{}, {"window": (1, 0)}, {"backend": "naive"}])
def test_a_hint_alone_is_stock_s_error_unless_it_is_trusted(options: dict[str, Any]) -> None:
    with pytest.raises(RuntimeError, match="Need attn_mask if specifying the is_causal hint"):
        layer(**options)(X, X, X, is_causal=True)


# Masks of one item


@given(
    floating=st.booleans(),
    heads=st.sampled_from((1, HEADS)),
    items=st.sampled_from((1, 2)),
    padded=st.booleans(),
    need_weights=st.booleans(),
    columns=st.booleans(),
    way=st.sampled_from(("called", "traced")),
)
def test_a_mask_of_one_item_or_head_is_every_item_s_and_head_s(
    floating: bool, heads: int, items: int, padded: bool, need_weights: bool, columns: bool, way: str
) -> None:
    ours = layer(add_bias_kv=columns).requires_grad_(False)
    mask = torch.rand(items, heads, 5, 5) > 0.6
    mask = torch.randn(mask.shape).double() if floating else mask
    padding = (torch.arange(5) >= torch.tensor([[4], [2]])) if padded and not floating else None

    def call(x: Tensor, mask: Tensor) -> Tensor:
        found = ours(x, x, x, attn_mask=mask, key_padding_mask=padding, need_weights=need_weights)
        return torch.cat([part.flatten() for part in found if part is not None])

    expected = call(X, mask.expand(2, HEADS, 5, 5).flatten(0, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = torch.jit.trace(call, (X, mask), check_trace=False) if way == "traced" else call
        assert_same(run(X, mask), expected)


@pytest.mark.parametrize("shape", [(3, 2, 5, 5), (1, 3, 5, 5), (1, 1, 4, 5), (1, 1, 5, 1), (1, 5, 5), (4, 5, 4)])
def test_a_mask_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(RuntimeError, match="but should be"):
        layer()(X, X, X, attn_mask=torch.zeros(shape, dtype=torch.bool))


# What hops give back

GIVEN_BACK: dict[str, tuple[str, Callable[..., Any], str]] = {
    "project, two": ("project", lambda *x: x[:2], "project must return the three tensors q, k and v, got 2 of them"),
    "project, one": ("project", lambda q, k, v: q, "project must return the three tensors q, k and v, got Tensor"),
    "project, none": ("project", lambda q, k, v: None, "project must return the three .* got NoneType"),
    "project, features": (
        "project",
        lambda q, k, v: (q, k, v),
        r"project must return q \(batch=2, seqlen_q=5, .*\(2, 5, 8\)",
    ),
    "heads, two": ("process_heads", lambda q, k, v: (q, k), "process_heads must return the three tensors"),
    "heads, a number": ("process_heads", lambda q, k, v: (q, k, 3), "process_heads must return q .* got .* int"),
    "heads, no q": ("process_heads", lambda q, k, v: (None, k, v), "process_heads must return q .* got NoneType"),
    "heads, short q": ("process_heads", lambda q, k, v: (q[:, :2], k, v), r"process_heads must .*\(2, 2, 2, 4\)"),
    "heads, flat": ("process_heads", lambda q, k, v: (q, k.flatten(2), v), "process_heads must return q"),
    "heads, batch": ("process_heads", lambda q, k, v: (q, k[:1], v[:1]), "process_heads must return q"),
    "heads, short v": ("process_heads", lambda q, k, v: (q, k, v[:, :3]), "process_heads must return q"),
    "heads, wide k": ("process_heads", lambda q, k, v: (q, k.repeat(1, 1, 1, 2), v), "process_heads must return q"),
    "merge, heads": (
        "merge",
        lambda out, query: out,
        r"merge must return \(batch=2, seqlen_q=5, embed_dim=8\), got \(2, 5, 2, 4\)",
    ),
    "merge, narrow": ("merge", lambda out, query: out.flatten(2)[..., :3], r"merge must .* got \(2, 5, 3\)"),
    "merge, tokens": ("merge", lambda out, query: out.flatten(2)[:, :2], r"merge must .* got \(2, 2, 8\)"),
    "merge, batch": ("merge", lambda out, query: out.flatten(2)[:1], r"merge must .* got \(1, 5, 8\)"),
    "merge, turned": ("merge", lambda out, query: out.flatten(2).transpose(0, 1), r"merge must .* got \(5, 2, 8\)"),
    "merge, a pair": ("merge", lambda out, query: (out.flatten(2), None), "merge must .* got tuple"),
    "attend, features": (
        "attend",
        lambda q, k, v, **call: q.flatten(2),
        r"attend must return \(batch=2, seqlen_q=5, heads, head_dim_v\), got \(2, 5, 8\)",
    ),
    "attend, tokens": ("attend", lambda q, k, v, **call: q[:, :3], r"attend must .* got \(2, 3, 2, 4\)"),
    "attend, a pair": ("attend", lambda q, k, v, **call: (q, None), "attend must return .* got tuple"),
    "weights, mean": (
        "process_weights",
        lambda w: w.mean(1),
        r"process_weights must return \(batch=2, heads, .* got \(2, 5, 5\)",
    ),
    "weights, fewer": ("process_weights", lambda w: w[..., :3], "process_weights must return"),
    "weights, none": ("process_weights", lambda w: None, "process_weights must return .* got NoneType"),
}


@pytest.mark.parametrize("on", ["class", "instance"])
@pytest.mark.parametrize(("name", "hop", "message"), GIVEN_BACK.values(), ids=GIVEN_BACK.keys())
def test_a_hop_that_returns_something_else_is_named(name: str, hop: Callable[..., Any], message: str, on: str) -> None:
    if on == "class":
        ours = layer(type("Custom", (FlashMultiHeadAttention,), {name: lambda self, *args, **call: hop(*args, **call)}))
    else:
        ours = layer()
        setattr(ours, name, hop)
    with pytest.raises(ValueError, match=message):
        ours(X, X, X)


def test_what_a_called_out_proj_returns_is_checked_too() -> None:
    ours = layer(call_out_proj=True)
    ours.out_proj.register_forward_hook(lambda module, args, out: (out, out))
    with pytest.raises(ValueError, match=r"out_proj must return \(batch=2, seqlen_q=5, features\), got tuple"):
        ours(X, X, X)


# Weights of a layer whose hops change the heads


class Differential(FlashMultiHeadAttention):
    """Twice as many heads of half the size, whose maps are subtracted."""

    share = 0.8

    def process_heads(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k = (x.unflatten(3, (2, -1)).flatten(2, 3) for x in (q, k))
        return q, k, v.repeat_interleave(2, dim=2)

    def merge(self, out: Tensor, query: Tensor) -> Tensor:
        return super().merge(out[:, :, 0::2] - self.share * out[:, :, 1::2], query)


class Said(Differential):
    def process_weights(self, weights: Tensor) -> Tensor:
        return weights[:, 0::2] - self.share * weights[:, 1::2]


@given(
    average=st.booleans(),
    batched=st.booleans(),
    mask=st.sampled_from((None, "causal", "padding")),
    training=st.booleans(),
    grad=st.booleans(),
)
def test_weights_are_those_that_the_layer_says(
    average: bool, batched: bool, mask: str | None, training: bool, grad: bool
) -> None:
    ours, x = layer(Said).train(training), X if batched else X[0]
    given: dict[str, Any] = {"attn_mask": CAUSAL} if mask == "causal" else {}
    if mask == "padding":
        padding = torch.arange(5) >= torch.tensor([[4], [2]])
        given["key_padding_mask"] = padding if batched else padding[0]
    with torch.set_grad_enabled(grad):
        out, weights = ours(x, x, x, average_attn_weights=average, **given)
        _, heads = ours(x, x, x, average_attn_weights=False, **given)
    assert_same(weights, heads.mean(-3) if average else heads)
    assert heads.shape == ((2,) if batched else ()) + (HEADS, 5, 5)
    assert_same(heads.sum(-1), torch.full_like(heads[..., 0], 1 - ours.share))
    _, _, v = FlashMultiHeadAttention.project(ours, *(X if batched else X[:1],) * 3)
    made = torch.einsum("bhqk,bkhd->bqhd", heads if batched else heads[None], v)
    assert_same(FlashMultiHeadAttention.merge(ours, made, X if batched else X[:1]), out if batched else out[None])
    if grad:
        (gradient,) = torch.autograd.grad(weights.square().sum(), ours.in_proj_weight)
        assert gradient.abs().sum() > 0


@pytest.mark.parametrize("given", [{}, {"attn_mask": CAUSAL}, {"average_attn_weights": False}])
def test_weights_of_a_layer_that_does_not_say_what_they_are_are_refused(given: dict[str, Any]) -> None:
    ours = layer(Differential)
    with pytest.raises(ValueError, match=r"need_weights must be False for this Differential.*process_weights"):
        ours(X, X, X, **given)
    ours(X, X, X, need_weights=False, **{name: value for name, value in given.items() if name == "attn_mask"})
    assert layer(Differential, need_weights=False)(X, X, X)[1] is None


def test_weights_that_a_layer_says_go_through_a_compiler() -> None:
    ours = layer(Said)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    for found, expected in zip(compiled(X, X, X), ours(X, X, X)):
        assert_same(found, expected)


# FX


class Encoding(nn.Module):
    def __init__(self, norm_first: bool) -> None:
        super().__init__()
        one = nn.TransformerEncoderLayer(WIDTH, HEADS, 16, 0.0, batch_first=True, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(one.double(), 2, enable_nested_tensor=False)


class MaskAlone(Encoding):
    def forward(self, x: Tensor, mask: Tensor, padding: Tensor) -> Tensor:
        return self.encoder(x, mask)


class Both(Encoding):
    def forward(self, x: Tensor, mask: Tensor, padding: Tensor) -> Tensor:
        return self.encoder(x, mask=mask, src_key_padding_mask=padding)


class PaddingAlone(Encoding):
    def forward(self, x: Tensor, mask: Tensor, padding: Tensor) -> Tensor:
        return self.encoder(x, src_key_padding_mask=padding)


class Hinted(Encoding):
    def forward(self, x: Tensor, mask: Tensor, padding: Tensor) -> Tensor:
        return self.encoder(x, mask, is_causal=True)


class Held(Encoding):
    def forward(self, x: Tensor, mask: Tensor, padding: Tensor) -> Tensor:
        return self.encoder(x, self.held)


class OneLayer(Encoding):
    def forward(self, x: Tensor, mask: Tensor, padding: Tensor) -> Tensor:
        return self.encoder.layers[1](x, mask)


@pytest.mark.parametrize("kind", [MaskAlone, Both, PaddingAlone, Hinted, Held, OneLayer])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
def test_fx_traces_a_model_whose_encoder_was_swapped(kind: Any, training: bool, norm_first: bool) -> None:
    model = kind(norm_first).train(training)
    model.register_buffer("held", CAUSAL)
    replace_mha(model)
    graph = fx.symbolic_trace(model)
    padding = torch.arange(5) >= torch.tensor([[4], [5]])
    for mask in (CAUSAL, CAUSAL.flip(1) & ~torch.eye(5, dtype=torch.bool)):
        if kind is not Hinted or mask is CAUSAL:
            for found in (graph, pickle.loads(pickle.dumps(graph))):
                assert_same(found(X, mask, padding), model(X, mask, padding))


# Quantised output projections


def dynamic() -> nn.Module:
    from torch.ao.nn.quantized.dynamic import Linear

    return Linear(WIDTH, WIDTH)


def static() -> nn.Module:
    from torch.ao.nn.quantized import Linear

    return Linear(WIDTH, WIDTH)


@pytest.mark.cpu("torch has quantised operators for CPUs alone")
@pytest.mark.skipif(
    not torch.backends.quantized.supported_engines[1:],
    reason="needs an engine for quantised operators",
)
@pytest.mark.parametrize("build", [dynamic, static])
@pytest.mark.parametrize("grad", [False, True])
def test_a_quantised_out_proj_names_the_way_to_quantise(build: Callable[[], nn.Module], grad: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours, x = layer(dtype=torch.float32), X.float()
        ours.out_proj = build()
        encoder = nn.TransformerEncoderLayer(WIDTH, HEADS, 16, 0.0, batch_first=True).eval()
        encoder.self_attn = ours.eval()
        calls = [lambda: ours(x, x, x), lambda: ours(x, x, x, need_weights=False), lambda: encoder(x)]
        with torch.set_grad_enabled(grad):
            for call in calls:
                with pytest.raises(TypeError, match="restore_mha"):
                    call()
            ours.call_out_proj = True
            expected = contextlib.nullcontext() if build is dynamic else pytest.raises(TypeError, match="restore_mha")
            for call in calls:
                with expected:
                    call()

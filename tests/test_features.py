"""A layer's options of heads, positions and scores, all of them composed, against the definition in ``plain_layer``."""

from __future__ import annotations

import copy
import pickle
import re
from typing import Any, NamedTuple

import plain_layer
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import flashmha
from flashmha import (
    ALiBi,
    AlibiBias,
    Documents,
    FlashMultiHeadAttention,
    KeyLengths,
    KeyPadding,
    NoBackendError,
    RelativeBias,
    RelativePositionBias,
    Rotary,
    causal,
    replace_mha,
    swap_report,
)
from flashmha.testing import assert_same

WIDTH, LONGEST = 12, 6


class Table(nn.Module):
    """A learned number for each head and distance."""

    by_distance = True

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(heads, 5))

    def forward(self, q: Tensor, k: Tensor) -> RelativeBias:
        return RelativeBias(self.table)

    def written(self, own: dict[str, Tensor], distance: Tensor) -> Tensor:
        return own["position_bias.table"][:, distance.clamp(-2, 2) + 2].transpose(0, 1)


class Slots(nn.Module):
    """A learned number for each head, query and key, as a tensor."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(heads, LONGEST, LONGEST))

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        return self.table[:, : q.shape[1], : k.shape[1]]

    def written(self, own: dict[str, Tensor], distance: Tensor) -> Tensor:
        return own["position_bias.table"][None, :, : distance.shape[1], : distance.shape[2]]


def alibi(bias: Any, distance: Tensor) -> Tensor:
    """The bias of plain slopes (batch or 1, heads, seqlen_q, seqlen_k)."""
    return -bias.slopes.double()[:, None, None] * distance.abs()[:, None]


# What is drawn


class Drawn(NamedTuple):
    """A layer's options, and how it is called."""

    heads: int
    arguments: dict[str, Any]
    positions: dict[str, Any]
    scores: dict[str, Any]
    batch: int
    seqlens: tuple[int, int] | int
    mask: str
    named: bool
    need_weights: bool
    average: bool
    training: bool
    seed: int

    def build(self, kind: type[FlashMultiHeadAttention] = FlashMultiHeadAttention, **more: Any) -> Any:
        torch.manual_seed(self.seed)
        made = {**self.arguments, **self.positions, **self.scores, **more}
        dtype = made["dtype"]
        if made.get("rotary"):
            made["rotary"] = Rotary(made["head_dim"] or WIDTH // self.heads, **made["rotary"])
        bias = made.get("position_bias")
        if bias is not None:
            made["position_bias"] = {
                "alibi": lambda: ALiBi(torch.rand(self.heads, dtype=torch.float32)),
                "table": lambda: Table(self.heads).to(dtype),
                "slots": lambda: Slots(self.heads).to(dtype),
            }[bias]()
        if made.pop("sinks", False):
            made["sinks"] = torch.randn(self.heads)
        layer = kind(WIDTH, self.heads, **made).train(self.training)
        with torch.no_grad():
            for parameter in layer.parameters():  # none is left at zero or one, where bugs hide
                parameter.add_(0.3 * torch.randn_like(parameter))
        return layer


@st.composite
def drawn_layers(draw: st.DrawFn) -> Drawn:
    heads = draw(st.sampled_from((1, 2, 4)))
    head_dim = draw(st.sampled_from((None, None, 4, 5)))
    seqlens = draw(st.one_of(st.integers(1, LONGEST), st.tuples(st.integers(1, LONGEST), st.integers(1, LONGEST))))
    alone = isinstance(seqlens, int)
    masks = ("none", "bool", "float", "causal", "padding", "lengths") + ("documents",) * alone
    mask = draw(st.sampled_from(masks))
    whole = {"dim": (head_dim or WIDTH // heads) // 2 * 2}
    rotary = draw(st.sampled_from((None, whole, {"dim": 2})))
    return Drawn(
        heads=heads,
        arguments={
            "num_kv_heads": draw(st.sampled_from([n for n in (None, 1, 2) if n is None or heads % n == 0])),
            "head_dim": head_dim,
            "value_head_dim": draw(st.sampled_from((None, None, 3, 7))),
            "qk_norm": draw(st.sampled_from((None, "rms", "layer"))),
            "bias": draw(st.booleans()),
            "add_bias_kv": draw(st.sampled_from((False, False, True))),
            "add_zero_attn": draw(st.sampled_from((False, False, True))),
            "kdim": None if alone else draw(st.sampled_from((None, 5))),
            "batch_first": draw(st.booleans()),
            "dtype": draw(st.sampled_from((torch.float64, torch.float64, torch.float32))),
        },
        positions={
            "rotary": rotary,
            "position_bias": draw(st.sampled_from((None, "alibi", "table", "slots"))),
            "window": draw(st.sampled_from((None, (2, 0), (1, 1), (None, 1)))),
            "causal": draw(st.booleans()),
        },
        scores={
            "softcap": draw(st.sampled_from((None, 1.5))),
            "sinks": draw(st.booleans()),
            "softmax_scale": draw(st.sampled_from((None, 0.4))),
            "skip_padding": draw(st.booleans()),
            "backend": draw(st.sampled_from((None, None, "naive", "sdpa"))),
        },
        batch=1 if mask == "documents" else draw(st.integers(1, 3)),
        seqlens=seqlens,
        mask=mask,
        named=rotary is not None and draw(st.booleans()),
        need_weights=draw(st.booleans()),
        average=draw(st.booleans()),
        training=draw(st.booleans()),
        seed=draw(st.integers(0, 2**16)),
    )


class Masked(NamedTuple):
    """One mask of a call: as the layer is told, which pairs it allows, what it adds, and which rows are real."""

    told: dict[str, Any]
    allowed: Tensor
    bias: Tensor
    real: Tensor
    slots: tuple[Tensor, Tensor]


def mask_of(drawn: Drawn, seqlen_q: int, seqlen_k: int, dtype: torch.dtype) -> Masked:
    """The mask of a call, told and written."""
    shape = (drawn.batch, 1, seqlen_q, seqlen_k)
    allowed, bias = torch.ones(shape, dtype=torch.bool), torch.zeros(shape).double()
    real = torch.ones(drawn.batch, seqlen_q, dtype=torch.bool)
    slots = torch.arange(seqlen_k - seqlen_q, seqlen_k)[None], torch.arange(seqlen_k)[None]
    told: dict[str, Any] = {}
    if drawn.mask == "bool":
        hidden = torch.rand(seqlen_q, seqlen_k) < 0.4
        told, allowed = {"attn_mask": hidden}, allowed & ~hidden
    elif drawn.mask == "float":
        bias = torch.randn(seqlen_q, seqlen_k).to(dtype).double().expand(shape)
        told = {"attn_mask": bias[0, 0].to(dtype)}
    elif drawn.mask == "causal":
        future = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool).triu(1)
        told, allowed = {"attn_mask": future, "is_causal": True}, allowed & ~future
    elif drawn.mask in ("padding", "lengths"):
        lengths = torch.randint(0, seqlen_k + 1, (drawn.batch,))
        valid = torch.arange(seqlen_k) < lengths[:, None]
        if drawn.mask == "padding":
            valid = torch.rand(valid.shape) < 0.6 if drawn.seed % 2 else valid
            told = {"key_padding_mask": ~valid}
        else:
            told = {"key_padding_mask": KeyLengths(lengths)}
        allowed = allowed & valid[:, None, None]
        if isinstance(drawn.seqlens, int):
            real = valid
    elif drawn.mask == "documents":
        cuts = [0, *sorted(torch.randint(0, seqlen_k + 1, (2,)).tolist()), seqlen_k]
        told = {"attn_mask": Documents(torch.tensor(cuts))}
        places = torch.bucketize(torch.arange(seqlen_k), torch.tensor(cuts)[1:], right=True)
        allowed = allowed & (places[:, None] == places)
        slots = ((torch.arange(seqlen_k) - torch.tensor(cuts)[places])[None],) * 2
    return Masked(told, allowed, bias, real, slots)


def compare(name: str, found: Tensor, wanted: Tensor, exact: bool) -> None:
    close = {"rtol": 1e-6, "atol": 1e-7} if exact else {"rtol": 2e-4, "atol": 5e-5}
    torch.testing.assert_close(found.double(), wanted, msg=lambda told: f"{name}: {told}", **close)


def check(drawn: Drawn, **more: Any) -> None:
    """Output, weights and every gradient of a call agree with the definition."""
    try:
        layer = drawn.build(**more)
    except NoBackendError:
        assert drawn.scores["backend"] == "sdpa"
        return
    alone = isinstance(drawn.seqlens, int)
    seqlen_q, seqlen_k = (drawn.seqlens,) * 2 if alone else drawn.seqlens  # type: ignore[misc]
    dtype = drawn.arguments["dtype"]
    query = torch.randn(drawn.batch, seqlen_q, WIDTH, dtype=dtype)
    key = query if alone else torch.randn(drawn.batch, seqlen_k, layer.kdim, dtype=dtype)
    value = query if alone else torch.randn(drawn.batch, seqlen_k, layer.vdim, dtype=dtype)
    masked = mask_of(drawn, seqlen_q, seqlen_k, dtype)
    turned = masked.slots
    told = dict(masked.told)
    if drawn.named:
        positions = (
            torch.randint(0, 50, (drawn.batch, seqlen_q)) if drawn.seed % 3 else torch.randint(0, 50, (seqlen_q,))
        )
        told["positions"], turned = positions, (positions.reshape(-1, seqlen_q),) * 2
        if not alone:
            told["key_positions"] = torch.randint(0, 50, (drawn.batch, seqlen_k))
            turned = turned[0], told["key_positions"]

    given = [x.detach().requires_grad_() for x in ((query,) if alone else (query, key, value))]
    ours = [x if layer.batch_first else x.transpose(0, 1) for x in given]
    ours = ours * 3 if alone else ours
    flags = {"need_weights": drawn.need_weights, "average_attn_weights": drawn.average}
    try:
        out, weights = layer(*ours, **told, **flags)
    except NoBackendError:
        assert layer.backend == "sdpa"
        return
    out = out if layer.batch_first else out.transpose(0, 1)

    own = {name: p.detach().double().requires_grad_() for name, p in layer.named_parameters()}
    exact = [x.detach().double().requires_grad_() for x in given]
    distance = masked.slots[1][:, None, :] - masked.slots[0][:, :, None]
    bias = masked.bias
    if isinstance(layer.position_bias, ALiBi):
        bias = bias + alibi(layer.position_bias, distance)
    elif layer.position_bias is not None:
        bias = bias + layer.position_bias.written(own, distance)
    wanted, maps = plain_layer.answer(
        layer, own, tuple(exact * 3 if alone else exact), masked.allowed, bias, masked.slots, turned
    )
    maps = maps.mean(1) if drawn.average else maps

    rows = masked.real if layer.skip_padding else torch.ones_like(masked.real)
    precise = dtype == torch.float64 and layer.rotary is None  # whose cos and sin are float32
    compare("output", out[rows], wanted[rows], precise)
    loss = (out * out.detach().cos() * rows[..., None]).sum()
    loss_wanted = (wanted * out.detach().double().cos() * rows[..., None]).sum()
    assert (weights is not None) == drawn.need_weights
    if weights is not None:
        shown = rows[..., None] if drawn.average else rows[:, None, :, None]
        compare("weights", weights * shown, maps * shown, precise)
        slope = torch.randn(weights.shape).double() * shown
        loss, loss_wanted = loss + (weights * slope).sum(), loss_wanted + (maps * slope).sum()
    names = [*own, *("query", "key", "value")[: len(given)]]
    found = torch.autograd.grad(loss, [*layer.parameters(), *given], allow_unused=True, materialize_grads=True)
    exactly = torch.autograd.grad(loss_wanted, [*own.values(), *exact], allow_unused=True, materialize_grads=True)
    for name, one, two in zip(names, found, exactly, strict=True):
        compare(f"gradient of {name}", one, two, precise)


@given(drawn_layers())
def test_options_of_a_layer_mean_what_they_say(drawn: Drawn) -> None:
    check(drawn)


@given(drawn_layers())
def test_an_attend_that_hands_everything_on_changes_nothing(drawn: Drawn) -> None:
    class Through(FlashMultiHeadAttention):
        def attend(self, q: Tensor, k: Tensor, v: Tensor, **call: Any) -> Tensor:
            return super().attend(q, k, v, **call)

    check(drawn._replace(scores={**drawn.scores, "backend": None}), kind=Through)


@given(drawn_layers(), st.sampled_from((copy.copy, copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer)))))
def test_the_sizes_of_heads_are_numbers_in_every_layer(drawn: Drawn, again: Any) -> None:
    class Looking(FlashMultiHeadAttention):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self.seen = sizes(self)

    def sizes(layer: Any) -> tuple[int, ...]:
        return layer.num_heads, layer.num_kv_heads, layer.head_dim, layer.value_head_dim

    said = drawn.arguments
    head_dim = said["head_dim"] or WIDTH // drawn.heads
    wanted = drawn.heads, said["num_kv_heads"] or drawn.heads, head_dim, said["value_head_dim"] or head_dim
    layer = drawn.build(backend=None, position_bias=None)
    assert sizes(layer) == sizes(again(layer)) == drawn.build(Looking, backend=None).seen == wanted
    assert all(type(size) is int for size in wanted)
    made = layer.keys_values(*(torch.randn(2, 3, n, dtype=said["dtype"]) for n in (layer.kdim, layer.vdim)))
    assert [one.shape[2:] for one in made] == [(wanted[1], wanted[2]), (wanted[1], wanted[3])]
    stock = nn.MultiheadAttention(WIDTH, drawn.heads)
    plain = (drawn.heads, drawn.heads, *[WIDTH // drawn.heads] * 2)
    assert sizes(FlashMultiHeadAttention.from_torch(stock)) == plain == sizes(replace_mha(nn.ModuleList([stock]))[0])
    shown = [f"{name}={said[name]}" in repr(layer) for name in ("num_kv_heads", "value_head_dim")]
    assert shown == [wanted[1] != drawn.heads, wanted[3] != head_dim]


# Options that are absent, and the objects around a layer

EVERY: dict[str, Any] = {
    "num_kv_heads": 2,
    "head_dim": 4,
    "value_head_dim": 3,
    "qk_norm": "rms",
    "window": (3, 1),
    "causal": True,
    "softcap": 2.0,
    "softmax_scale": 0.5,
}


def full(**more: Any) -> FlashMultiHeadAttention:
    """A layer with every option."""
    torch.manual_seed(0)
    parts = {"rotary": Rotary(4), "position_bias": Table(4), "sinks": torch.randn(4)}
    return FlashMultiHeadAttention(WIDTH, 4, batch_first=True, **{**EVERY, **parts, **more})


def answers(layer: nn.Module, x: Tensor, **told: Any) -> list[Tensor]:
    """Output, weights and gradients of a call."""
    out, weights = layer(x, x, x, **told)
    total = out.square().sum() + (0 if weights is None else weights.square().sum())
    made = torch.autograd.grad(total, list(layer.parameters()), allow_unused=True, materialize_grads=True)
    return [out.detach(), *([] if weights is None else [weights.detach()]), *made]


ABSENT: dict[str, Any] = {
    **dict.fromkeys(("num_kv_heads", "head_dim", "value_head_dim", "qk_norm", "rotary", "position_bias", "window")),
    **dict.fromkeys(("softcap", "sinks", "softmax_scale")),
    "causal": False,
}


@given(st.sampled_from([{}, {"head_dim": 3}, {"head_dim": 3, "value_head_dim": 3}, {"num_kv_heads": 4}]))
def test_a_layer_whose_options_are_absent_is_the_plain_one(said: dict[str, Any]) -> None:
    layers = []
    for options in ({}, {**ABSENT, **said}):
        torch.manual_seed(0)
        layers.append(FlashMultiHeadAttention(WIDTH, 4, **options))
    assert vars(layers[0]).keys() == vars(layers[1]).keys() and repr(layers[0]) == repr(layers[1])
    x = torch.randn(3, 2, WIDTH)
    for one, two in zip(answers(layers[0], x), answers(layers[1], x), strict=True):
        assert torch.equal(one, two)
    assert type(layers[1].to_torch()) is nn.MultiheadAttention


def test_only_options_that_own_parameters_are_in_the_state_dict() -> None:
    stock = nn.MultiheadAttention(WIDTH, 4)
    own = {"num_kv_heads": 2, "head_dim": 4, "value_head_dim": 3}
    free = {name: value for name, value in EVERY.items() if name not in own and name != "qk_norm"}
    layer = FlashMultiHeadAttention(WIDTH, 4, rotary=Rotary(3, dim=2), position_bias=ALiBi(torch.rand(4)), **free)
    layer.load_state_dict(stock.state_dict())
    assert layer.state_dict().keys() == stock.state_dict().keys()
    wide = FlashMultiHeadAttention(WIDTH, 4, **own, add_bias_kv=True)
    assert wide.in_proj_weight.shape == (4 * 4 + 2 * 4 + 2 * 3, WIDTH) and wide.out_proj.weight.shape == (WIDTH, 4 * 3)
    assert wide.bias_k.shape == (1, 1, 2 * 4) and wide.bias_v.shape == (1, 1, 2 * 3)  # type: ignore[union-attr]
    assert full().state_dict().keys() - stock.state_dict().keys() == {
        "q_norm.weight",
        "k_norm.weight",
        "position_bias.table",
        "sinks",
    }


@pytest.mark.parametrize("again", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_a_copy_of_a_layer_has_its_options(again: Any) -> None:
    layer, x = full(), torch.randn(2, 5, WIDTH)
    other = again(layer)
    assert repr(other) == repr(layer) and other.sinks is not layer.sinks and other.rotary is not layer.rotary
    for one, two in zip(answers(layer, x), answers(other, x), strict=True):
        assert torch.equal(one, two)


def test_a_layer_shows_its_options_and_loses_none() -> None:
    layer = full()
    shown = repr(layer)
    for name, value in EVERY.items():
        assert name == "qk_norm" or name == "window" or f"{name}={value!r}" in shown
    assert "window=Window(3, 1)" in shown and "sinks=(4,)" in shown and "(rotary): Rotary" in shown
    with pytest.raises(ValueError, match=r"has no num_kv_heads, no head_dim, no value_head_dim.*no sinks"):
        layer.to_torch()
    with pytest.raises(RuntimeError, match=r"has no num_kv_heads"):
        torch.jit.script(layer)
    assert replace_mha(nn.Sequential(layer))[0] is layer and swap_report(layer)[0].swapped
    assert layer.rotary is not None and layer.sinks is not None


def test_a_layer_that_was_swapped_in_has_no_parts_and_takes_them() -> None:
    model = replace_mha(nn.Sequential(nn.MultiheadAttention(WIDTH, 4, batch_first=True)), causal=True, softcap=3.0)
    layer, x = model[0], torch.randn(2, 5, WIDTH)
    assert all(getattr(layer, name) is None for name in ("rotary", "q_norm", "k_norm", "position_bias", "sinks"))
    layer.rotary, layer.sinks, layer.position_bias = (
        Rotary(3, dim=2),
        nn.Parameter(torch.zeros(4)),
        ALiBi(torch.ones(4)),
    )
    wanted = FlashMultiHeadAttention(
        WIDTH, 4, batch_first=True, causal=True, softcap=3.0, rotary=Rotary(3, dim=2), sinks=torch.zeros(4)
    )
    wanted.position_bias = Table(4)
    wanted.position_bias = layer.position_bias
    wanted.rotary = layer.rotary
    wanted.load_state_dict(layer.state_dict())
    assert_same(layer(x, x, x)[0], wanted(x, x, x)[0])
    layer.rotary = layer.sinks = layer.position_bias = None
    assert layer.state_dict().keys() == nn.MultiheadAttention(WIDTH, 4).state_dict().keys()
    flashmha.restore_mha(model)
    assert type(layer) is nn.MultiheadAttention and not hasattr(layer, "causal") and not hasattr(layer, "rotary")


REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"causal": 1}, TypeError, "causal must be True or False, got 1"),
    ({"softcap": 0.0}, ValueError, "softcap must be finite and greater than 0, got 0.0"),
    ({"num_kv_heads": 0}, ValueError, "num_kv_heads must be a whole number of at least 1 .* and num_kv_heads=0"),
    ({"num_kv_heads": 2.0}, ValueError, "num_kv_heads must be a whole number .*num_heads=4 and num_kv_heads=2.0"),
    ({"num_kv_heads": "2"}, ValueError, "num_kv_heads must be a whole number .* and num_kv_heads='2'"),
    ({"num_kv_heads": True}, ValueError, "num_kv_heads must be a whole number .* and num_kv_heads=True"),
    ({"softcap": "2"}, TypeError, "softcap must be a number or None, got str"),
    ({"sinks": torch.zeros(3)}, ValueError, r"sinks must be a floating point tensor \(num_heads,\) = \(4,\)"),
    ({"qk_norm": "batch"}, ValueError, "qk_norm must be 'rms', 'layer' or a pair of modules"),
    ({"rotary": 3}, TypeError, "rotary must be a module, or None, got int 3"),
    ({"rotary": Rotary(8)}, ValueError, "rotary must turn heads of head_dim=3, got one of head_dim=8"),
    ({"position_bias": torch.zeros(3, 3)}, TypeError, "position_bias must be a module .* TensorBias"),
    ({"position_bias": AlibiBias(3)}, ValueError, "position_bias must be for num_heads=4 heads, got AlibiBias for 3"),
    ({"position_bias": RelativePositionBias(8)}, ValueError, "got RelativePositionBias for 8"),
    ({"head_dim": 0}, ValueError, "head_dim must be a whole number of at least 1, got 0"),
    ({"value_head_dim": 2.0}, ValueError, "value_head_dim must be a whole number of at least 1, got 2.0"),
    ({"backend": "flash2", "sinks": torch.zeros(4)}, NoBackendError, "flash2  no sinks"),
    ({"backend": ("flash3", "flash2"), "value_head_dim": 300}, NoBackendError, "(?s)flash3 .*flash2 .*"),
    ({"backend": "flash3", "position_bias": ALiBi(torch.ones(4))}, NoBackendError, "flash3  no alibi"),
]


@given(
    name=st.sampled_from(("softcap", "softmax_scale")),
    number=st.one_of(st.floats(max_value=0.0), st.sampled_from((float("inf"), float("nan"), 0))),
)
def test_a_number_of_the_scores_is_finite_and_positive(name: str, number: float) -> None:
    layer = FlashMultiHeadAttention(WIDTH, 4)
    for take in (lambda: FlashMultiHeadAttention(WIDTH, 4, **{name: number}), lambda: setattr(layer, name, number)):
        with pytest.raises(ValueError, match=re.escape(f"{name} must be finite and greater than 0, got {number}.")):
            take()
    assert getattr(layer, name) is None


@given(
    heads=st.sampled_from((1, 2, 4)),
    head_dim=st.sampled_from((None, 4, 5)),
    shape=st.one_of(st.integers(1, 12).map(lambda n: (n,)), st.sampled_from(((4, 3), (2, 6)))),
    kind=st.sampled_from((nn.RMSNorm, nn.LayerNorm)),
    which=st.sampled_from((0, 1)),
)
def test_norms_of_heads_are_over_a_head(
    heads: int, head_dim: int | None, shape: tuple[int, ...], kind: Any, which: int
) -> None:
    size = head_dim or WIDTH // heads
    norms = [kind(size), kind(size)]
    norms[which] = kind(shape)
    if shape == (size,):
        layer = FlashMultiHeadAttention(WIDTH, heads, head_dim=head_dim, qk_norm=tuple(norms))
        assert (layer.q_norm, layer.k_norm) == tuple(norms)
        return
    before = torch.get_rng_state()
    with pytest.raises(
        ValueError, match=f"qk_norm must be norms over head_dim={size}, got {kind.__name__} over"
    ) as caught:
        FlashMultiHeadAttention(WIDTH, heads, head_dim=head_dim, qk_norm=tuple(norms))
    assert str(shape) in str(caught.value) and torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("options", "kind", "message"), REFUSED)
def test_an_option_that_means_nothing_is_refused(options: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        FlashMultiHeadAttention(WIDTH, 4, **options)
    name, value = list(options.items())[-1]
    if kind is not NoBackendError and hasattr(FlashMultiHeadAttention, name) and not isinstance(value, nn.Module):
        layer = FlashMultiHeadAttention(WIDTH, 4)
        before = repr(layer)
        with pytest.raises((TypeError, ValueError)):
            setattr(layer, name, value)
        assert repr(layer) == before


# Positions, and keys and values that come from elsewhere


@given(drawn_layers(), st.booleans())
def test_keys_and_values_that_were_made_before_are_those_of_the_call(drawn: Drawn, shared: bool) -> None:
    layer = drawn.build(backend=None, kdim=None)
    seqlen_q, seqlen_k = (drawn.seqlens,) * 2 if isinstance(drawn.seqlens, int) else drawn.seqlens
    dtype = drawn.arguments["dtype"]
    told = dict(mask_of(drawn, seqlen_q, seqlen_k, dtype).told)
    axes = (lambda x: x) if layer.batch_first else (lambda x: x.transpose(0, 1))
    query, memory = (axes(torch.randn(drawn.batch, n, WIDTH, dtype=dtype)) for n in (seqlen_q, seqlen_k))
    if drawn.mask == "documents":
        layer.rotary = None  # whose positions would restart in the call alone
    wanted = layer(query, memory, memory, **told)
    kv = layer.keys_values(memory)
    found = layer(query, query, None if shared else memory, **told, kv=kv)
    for one, two in zip(found, wanted):
        torch.testing.assert_close(one, two)


WIDTHS = ("head_dim", "value_head_dim")
HEADS = st.fixed_dictionaries(
    {
        "num_kv_heads": st.sampled_from((None, 1, 2)),
        "head_dim": st.sampled_from((None, 4)),
        "value_head_dim": st.sampled_from((None, 3, 5)),
    }
)


@given(one=HEADS, two=HEADS, kind=st.sampled_from((FlashMultiHeadAttention, "hops")))
def test_keys_and_values_of_other_heads_are_refused(one: dict[str, Any], two: dict[str, Any], kind: Any) -> None:
    class Through(FlashMultiHeadAttention):
        def attend(self, q: Tensor, k: Tensor, v: Tensor, **call: Any) -> Tensor:
            return super().attend(q, k, v, **call)

    make = Through if kind == "hops" else kind
    first, second = (make(WIDTH, 4, batch_first=True, **heads) for heads in (one, two))
    x, kv = torch.randn(2, 5, WIDTH), first.keys_values(torch.randn(2, 3, WIDTH))
    differ = {name: (getattr(second, name), getattr(first, name)) for name in ("num_kv_heads", *WIDTHS)}
    differ = {name: pair for name, pair in differ.items() if pair[0] != pair[1]}
    if not differ:
        assert second(x, x, x, kv=kv)[0].shape == x.shape
        return
    with pytest.raises(ValueError, match="kv must have ") as caught:
        second(x, x, x, kv=kv)
    name, (wanted, found) = next(iter(differ.items()))
    assert f"{name}={wanted}, as this layer has, got {found}" in str(caught.value)


class Repeated(FlashMultiHeadAttention):
    """Heads of keys and values as many as those of queries, and wider ones."""

    def process_heads(self, q: Any, k: Any, v: Any) -> tuple[Any, Any, Any]:
        wide = [None if one is None else torch.cat([one, one.cos()], -1) for one in (q, k)]
        if k is None:
            return wide[0], None, None
        again = [one.repeat_interleave(self.num_heads // self.num_kv_heads, 2) for one in (wide[1], v)]
        return wide[0], again[0], again[1]


@given(heads=HEADS)
def test_hops_that_change_the_heads_take_what_they_made(heads: dict[str, Any]) -> None:
    layer, plain = (kind(WIDTH, 4, batch_first=True, **heads) for kind in (Repeated, FlashMultiHeadAttention))
    x, y = torch.randn(2, 5, WIDTH), torch.randn(2, 3, WIDTH)
    torch.testing.assert_close(layer(x, y, y)[0], layer(x, x, x, kv=layer.keys_values(y))[0])
    with pytest.raises(ValueError, match=f"kv must have keys of head_dim={2 * layer.head_dim}, as q has, got "):
        layer(x, x, x, kv=plain.keys_values(y))


@pytest.mark.parametrize(
    ("said", "shapes"),
    [
        ("key and value must be dense tensors for keys_values, got NoneType", (None, (2, 3, WIDTH))),
        ("key and value must be .*alike in batch and seqlen", ((2, 3, WIDTH), (2, 4, WIDTH))),
        ("key and value must be .batch, seqlen, features.", ((1, 2, 3, WIDTH), (1, 2, 3, WIDTH))),
        ("key and value must have kdim, vdim = ", ((2, 3, WIDTH + 1), (2, 3, WIDTH + 1))),
    ],
)
def test_what_keys_and_values_cannot_be_made_of_is_told(said: str, shapes: Any) -> None:
    layer = FlashMultiHeadAttention(WIDTH, 4, batch_first=True)
    with pytest.raises((TypeError, ValueError), match=said):
        layer.keys_values(*(None if shape is None else torch.randn(shape) for shape in shapes))


class Blind(FlashMultiHeadAttention):
    """Hops that look at all of what they get."""

    hop = ""

    def project(self, query: Any, key: Any, value: Any) -> Any:
        return super().project(
            *((x.neg() for x in (query, key, value)) if self.hop == "project" else (query, key, value))
        )

    def process_heads(self, q: Any, k: Any, v: Any) -> Any:
        return (q.neg(), k + 0.0, v) if self.hop == "process_heads" else (q, k, v)


@given(hop=st.sampled_from(("project", "process_heads")), hands_out=st.booleans())
def test_a_hop_that_takes_no_none_is_named(hop: str, hands_out: bool) -> None:
    layer, plain = (kind(WIDTH, 4, batch_first=True) for kind in (Blind, FlashMultiHeadAttention))
    layer.hop = hop
    x = torch.randn(2, 5, WIDTH)
    missing = {"project": ("query", "key, value"), "process_heads": ("q", "k, v")}[hop][not hands_out]
    with pytest.raises(TypeError, match=rf"^{hop} of Blind must take None for {missing}, which kv= .*, got \w+Error: "):
        layer.keys_values(x) if hands_out else layer(x, x, x, kv=plain.keys_values(x))


@given(heads=HEADS, made=st.tuples(st.sampled_from((1, 2, 4)), st.sampled_from((3, 4)), st.sampled_from((3, 4, 5))))
def test_a_project_keeps_what_the_constructor_was_told(heads: dict[str, Any], made: tuple[int, int, int]) -> None:
    count, width, width_v = made

    class Free(FlashMultiHeadAttention):
        has_in_proj = has_out_proj = False

        def project(self, query: Any, key: Any, value: Any) -> tuple[Any, Any, Any]:
            q = None if query is None else query[..., :width, None].transpose(2, 3).expand(-1, -1, 4, -1)
            k, v = (key[..., :n, None].transpose(2, 3).expand(-1, -1, count, -1) for n in (width, width_v))
            return q, k, v

        def merge(self, out: Tensor, query: Tensor) -> Tensor:
            return query

    layer, x = Free(WIDTH, 4, batch_first=True, **heads), torch.randn(2, 5, WIDTH)
    usual = {"num_kv_heads": 4, "head_dim": WIDTH // 4, "value_head_dim": layer.head_dim}
    broken = [
        (name, heads[name], got)
        for name, got in zip(("num_kv_heads", *WIDTHS), made)
        if heads[name] not in (None, usual[name]) and heads[name] != got
    ]
    for call in (lambda: layer(x, x, x), lambda: layer.keys_values(x)):
        if not broken:
            call()
            continue
        name, told, got = broken[0]
        with pytest.raises(ValueError, match=f"project must return . of {name}={told}, .*, got {got} in shape"):
            call()


def test_positions_that_nothing_reads_or_that_are_none_are_refused() -> None:
    x, y = torch.randn(2, 5, WIDTH), torch.randn(2, 3, WIDTH)
    plain, turned = FlashMultiHeadAttention(WIDTH, 4, batch_first=True), full(position_bias=None)
    at = torch.arange(5)
    with pytest.raises(ValueError, match="positions must be None for a layer without rotary"):
        plain(x, x, x, positions=at)
    with pytest.raises(ValueError, match="key_positions must be given beside positions"):
        turned(x, y, y, positions=at)
    with pytest.raises(ValueError, match="positions must be given beside key_positions"):
        turned(x, x, x, key_positions=at)
    with pytest.raises(ValueError, match=r"positions must be \(seqlen,\) = \(5,\) or .*, got \(4,\)"):
        turned(x, x, x, positions=at[:4])
    with pytest.raises(TypeError, match="positions must be an integer tensor"):
        turned(x, x, x, positions=at.float())
    kv = turned.keys_values(y)
    with pytest.raises(ValueError, match="key_positions must be None beside kv"):
        turned(x, y, y, positions=at, key_positions=at[:3], kv=kv)
    with pytest.raises(ValueError, match=r"kv must be keys and values \(batch=2"):
        turned(x, y, y, kv=(kv[0][:1], kv[1]))
    with pytest.raises(TypeError, match="kv must be the pair"):
        turned(x, y, y, kv=kv[0])


def test_rotary_alone_is_the_same_wherever_the_positions_start() -> None:
    layer, x = full(window=None, position_bias=None).double(), torch.randn(2, 5, WIDTH).double()
    for start in (0, 7):
        out = layer(x, x, x, positions=torch.arange(start, start + 5))[0]
        torch.testing.assert_close(out, layer(x, x, x)[0], rtol=1e-4, atol=1e-5)


SCALED: dict[str, dict[str, Any]] = {
    "dynamic": {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 4.0},
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 100.0,
        "factor": 4.0,
        "short_factor": [1.0, 1.0],
        "long_factor": [4.0, 2.0],
        "original_max_position_embeddings": 4,
    },
}
"""Scalings whose angles depend on the length of a call."""


@given(
    kind=st.sampled_from(sorted(SCALED)),
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    more=st.integers(0, 5),
    seed=st.integers(0, 99),
)
def test_padding_is_not_counted_in_the_length_of_a_call(kind: str, lengths: list[int], more: int, seed: int) -> None:
    """However it is left out: hidden by a mask, packed by the layer, by the caller, or nested."""
    torch.manual_seed(seed)
    rotary = Rotary(4, rope_parameters=SCALED[kind], max_seqlen=4)
    layer = FlashMultiHeadAttention(8, 2, batch_first=True, rotary=rotary, need_weights=False).double()
    longest = max(lengths)
    x = torch.randn(len(lengths), longest, 8, dtype=torch.float64)
    hidden = torch.arange(longest)[None] >= torch.tensor(lengths)[:, None]
    wanted = torch.cat([rows[:n] for rows, n in zip(layer(x, x, x, hidden)[0], lengths)])
    wider = torch.cat((x, torch.randn(len(lengths), more, 8, dtype=x.dtype)), 1)
    hides = torch.arange(longest + more)[None] >= torch.tensor(lengths)[:, None]
    found = {"wider": layer(wider, wider, wider, hides)[0][~hides]}
    layer.skip_padding = True
    found["left out"] = layer(wider, wider, wider, hides)[0][~hides]
    table = torch.zeros(longest + more, longest + more, dtype=x.dtype)
    found["beside a mask"] = layer(wider, wider, wider, hides, attn_mask=table)[0][~hides]
    packed = flashmha.pack(wider, hides)
    found["packed"] = layer(packed.tokens, packed.tokens, packed.tokens, attn_mask=packed.documents)[0][0]
    row, offsets = torch.cat((packed.tokens, wider[:1], wider[:1]), 1), packed.documents.cu_seqlens
    found["behind the last document"] = layer(row, row, row, attn_mask=Documents(offsets))[0][0, : offsets[-1]]
    row, offsets = wider.flatten(0, 1)[None], (longest + more) * torch.arange(len(lengths) + 1)
    out = layer(row, row, row, hides.flatten()[None], attn_mask=Documents(offsets))[0]
    found["inside documents"] = out.view_as(wider)[~hides]
    nested = torch.nested.nested_tensor([rows[:n] for rows, n in zip(x, lengths)], layout=torch.jagged)
    found["nested"] = layer(nested, nested, nested)[0].values()
    places = torch.arange(longest + more).expand(len(lengths), -1)
    found["named"] = layer(wider, wider, wider, hides, positions=places)[0][~hides]
    for name, rows in found.items():
        torch.testing.assert_close(rows, wanted, atol=1e-6, rtol=1e-6, msg=lambda said, name=name: f"{name}: {said}")


def test_the_items_of_a_nested_tensor_count_from_zero() -> None:
    layer = full().double()
    items = [torch.randn(n, WIDTH).double() for n in (4, 1, 3)]
    nested = torch.nested.nested_tensor(items, layout=torch.jagged)
    out = layer(nested, nested, nested, need_weights=False)[0]
    for one, item in zip(out.unbind(), items):
        torch.testing.assert_close(one, layer(item, item, item, need_weights=False)[0])


class Turned(nn.Module):
    """A rotation of one's own, which knows q, k and positions alone."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Rotary(4)

    def forward(self, q: Any, k: Any, positions_q: Any = None, positions_k: Any = None) -> Any:
        return self.inner(q, k, positions_q, positions_k)


class Twisted(Rotary):
    """The same by inheritance."""

    def forward(self, q: Any, k: Any, positions_q: Any = None, positions_k: Any = None) -> Any:  # type: ignore[override]
        return super().forward(q, k, positions_q, positions_k)


@given(
    own=st.sampled_from((Turned, lambda: Twisted(4))),
    norm=st.sampled_from((None, "rms", "layer")),
    call=st.sampled_from(("plain", "padded", "documents", "positions", "kv", "cache")),
    seed=st.integers(0, 99),
)
def test_a_rotation_of_ones_own_is_called_as_the_package_s(own: Any, norm: str | None, call: str, seed: int) -> None:
    torch.manual_seed(seed)
    options = {"batch_first": True, "qk_norm": norm, "causal": True, "need_weights": False}
    layers = [FlashMultiHeadAttention(8, 2, rotary=rotary, **options).eval() for rotary in (Rotary(4), own())]
    layers[1].load_state_dict(layers[0].state_dict())
    x, made = torch.randn(1, 6, 8), []
    for layer in layers:
        told: dict[str, Any] = {
            "plain": {},
            "padded": {"key_padding_mask": torch.arange(6)[None] < 2},
            "documents": {"attn_mask": Documents(torch.tensor([0, 2, 6]))},
            "positions": {"positions": torch.tensor([3, 1, 4, 1, 5, 9])},
            "kv": {"kv": layer.keys_values(x)},
            "cache": {"cache": flashmha.KVCache.of(nn.ModuleDict({"one": layer}), 1, 12)["one"]},
        }[call]
        with torch.no_grad():
            made.append(torch.cat([layer(x, x, x, **told)[0] for _ in range(1 + (call == "cache"))])[:, :3])
    torch.testing.assert_close(made[1], made[0])


COUNTING: dict[str, Any] = {"causal": True, "window": (1, 0), "rotary": Rotary(3, dim=2), "position_bias": Table(4)}


@pytest.mark.cpu("lengths are looked at there alone")
@pytest.mark.parametrize("option", COUNTING)
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
@given(
    lengths=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    more=st.lists(st.integers(0, 1), min_size=3, max_size=3),
    value=st.booleans(),
)
@torch.no_grad()
def test_nested_queries_and_keys_that_are_as_long_count_together(
    layout: torch.layout, option: str, lengths: list[int], more: list[int], value: bool
) -> None:
    layer = FlashMultiHeadAttention(WIDTH, 4, batch_first=True, **{option: COUNTING[option]})
    other = [n + extra for n, extra in zip(lengths, more)]
    items = [[torch.randn(n, WIDTH) for n in each] for each in (lengths, other, other)]
    query, key, own = (torch.nested.nested_tensor(rows, layout=layout) for rows in items)
    values, rows = (own, items[2]) if value else (key, items[1])
    if other == lengths:
        out = layer(query, key, values, need_weights=False)[0]
        for found, *each in zip(out.unbind(), items[0], items[1], rows):
            torch.testing.assert_close(found, layer(*each)[0], atol=1e-5, rtol=1e-4)
        return
    with pytest.raises(AssertionError, match=f"(?s){option} beside nested query and key .*flashmha.pack") as caught:
        layer(query, key, values)
    assert f"{lengths} and {other}" in str(caught.value)
    with pytest.raises(AssertionError, match="key and value must have items of the same lengths"):
        layer(query, key, query)
    one, two = (flashmha.pack(torch.nested.nested_tensor(rows, layout=torch.jagged)) for rows in items[:2])
    if option != "position_bias":  # what the error says
        out = layer(one.tokens, two.tokens, two.tokens, attn_mask=one.across(two), need_weights=False)[0]
        for found, *each in zip(one.unpack(out).unbind(), items[0], items[1], items[1]):
            torch.testing.assert_close(found, layer(*each)[0], atol=1e-5, rtol=1e-4)


@given(
    lengths=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    gap=st.integers(0, 2),
    shared=st.booleans(),
    option=st.sampled_from((None, *COUNTING)),
)
def test_gaps_of_jagged_tensors_hold_nothing(lengths: list[int], gap: int, shared: bool, option: str | None) -> None:
    layer = FlashMultiHeadAttention(WIDTH, 4, batch_first=True, **({option: COUNTING[option]} if option else {}))

    def narrowed() -> tuple[Tensor, Tensor]:
        dense = torch.randn(len(lengths), 7, WIDTH, requires_grad=True)
        starts = torch.full((len(lengths),), gap)
        return dense, torch.nested.narrow(dense, 1, starts, torch.tensor(lengths), layout=torch.jagged)

    shared = shared or (option is not None and torch.empty(0).is_cuda)  # whose lengths are not looked at
    pairs = [narrowed()] * 2 if shared else [narrowed(), narrowed()]
    query, key = (jagged for _, jagged in pairs)
    out, weights = layer(query, key, key)
    leaves = [dense for dense, _ in pairs[: 2 - shared]]
    assert torch.equal(out.lengths(), query.lengths()) and (query + out).shape == query.shape
    total = wanted = torch.zeros(())
    for item, (found, both) in enumerate(zip(out.unbind(), (query + out).unbind())):
        one, two = (dense[item, gap : gap + lengths[item]] for dense, _ in pairs)
        alone, maps = layer(one, two, two)
        torch.testing.assert_close(found, alone, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(both, one + alone, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(weights[item, : lengths[item], : lengths[item]], maps, atol=1e-5, rtol=1e-4)
        total, wanted = total + found.square().sum(), wanted + alone.square().sum()
    for one, two in zip(torch.autograd.grad(total, leaves), torch.autograd.grad(wanted, leaves)):
        torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "told",
    [
        {"attn_mask": causal()},
        {"attn_mask": flashmha.Window(1, 0)},
        {"key_padding_mask": KeyLengths(torch.tensor([4, 3]))},
        {"kv": None},
        {"positions": torch.arange(3)},
    ],
)
def test_what_a_nested_call_cannot_take_is_refused_with_what_can(told: dict[str, Any]) -> None:
    layer = full(position_bias=None)
    x = torch.nested.nested_tensor([torch.randn(n, WIDTH) for n in (4, 3)], layout=torch.jagged)
    told = {"kv": layer.keys_values(torch.randn(2, 4, WIDTH))} if "kv" in told else told
    fix = r"beside NestedTensor.*flashmha\.pack .*queries\.across\(keys\)"
    with pytest.raises(AssertionError, match=fix) as caught:
        layer(x, x, x, **told)
    assert "mask" not in next(iter(told)) or "causal=True and window= of the constructor" in str(caught.value)
    with pytest.raises(TypeError, match=r"key and value must be dense tensors for keys_values.*flashmha\.pack"):
        layer.keys_values(x)


# Graphs, transforms and encoders


@pytest.mark.parametrize("kind", [FlashMultiHeadAttention, "attend"])
def test_a_layer_with_every_option_compiles_whole(kind: Any) -> None:
    layer = full() if kind is FlashMultiHeadAttention else Scaled.of(full)
    x, hidden = torch.randn(2, 5, WIDTH), torch.tensor([[False] * 5, [False, False, False, True, True]])
    for told in ({"key_padding_mask": hidden}, {"need_weights": False}):
        torch._dynamo.reset()
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        for one, two in zip(answers(compiled, x, **told), answers(layer, x, **told), strict=True):
            assert_same(one, two)


class Scaled(FlashMultiHeadAttention):
    """A learned scale for each head, and a bias of its own."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, bias: Any = None, **call: Any) -> Tensor:
        mine = torch.linspace(-1, 1, k.shape[1], dtype=q.dtype)[None]
        return super().attend(2 * q, k, v, bias=flashmha.TensorBias(mine) + bias, **call)

    @classmethod
    def of(cls, make: Any) -> FlashMultiHeadAttention:
        layer: FlashMultiHeadAttention = make()
        layer.__class__ = cls
        return layer


@pytest.mark.parametrize("make", [full, lambda: Scaled.of(full)])
def test_export_checkpoints_and_transforms_see_the_same_layer(make: Any) -> None:
    layer, x = make(), torch.randn(2, 5, WIDTH)
    wanted = layer(x, x, x)
    exported = torch.export.export(layer, (x, x, x), strict=False).module()(x, x, x)
    own = dict(layer.named_parameters())
    called = functional_call(layer, own, (x, x, x))
    mapped = torch.func.vmap(lambda one: layer(one, one, one))(x)
    again = checkpoint(layer, x, x, x, use_reentrant=False)
    for found in (exported, called, mapped, again):
        for one, two in zip(found, wanted):
            torch.testing.assert_close(one, two)
    again[0].sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())


@pytest.mark.parametrize("option", [{name: value} for name, value in EVERY.items()] + ["rotary", "bias", "sinks"])
@torch.no_grad()
def test_an_encoder_layer_in_eval_runs_its_attention(option: Any) -> None:
    made: dict[str, Any] = (
        {
            "rotary": {"rotary": Rotary(3, dim=2)},
            "bias": {"position_bias": ALiBi(torch.ones(4))},
            "sinks": {"sinks": torch.ones(4)},
        }.get(option, option)
        if isinstance(option, str)
        else option
    )
    encoder = nn.TransformerEncoderLayer(WIDTH, 4, 16, dropout=0.0, batch_first=True)
    encoder.self_attn = FlashMultiHeadAttention(WIDTH, 4, batch_first=True, **made)
    x = torch.randn(2, 5, WIDTH)
    torch.testing.assert_close(encoder.eval()(x), encoder.train()(x))


# An attend of a subclass's own


class Twice(FlashMultiHeadAttention):
    """Two maps of the halves of each head, one taken from the other."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **call: Any) -> Tensor:
        (q_one, q_two), (k_one, k_two) = q.chunk(2, -1), k.chunk(2, -1)
        return super().attend(q_one, k_one, v, **call) - 0.5 * super().attend(q_two, k_two, v, **call)


class TwiceSaid(Twice):
    def process_weights(self, one: Tensor, two: Tensor) -> Tensor:  # type: ignore[override]
        return one - 0.5 * two


class Alone(FlashMultiHeadAttention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, **call: Any) -> Tensor:
        return v


class Forgetful(FlashMultiHeadAttention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, **call: Any) -> Tensor:
        return super().attend(q, k, v)


@given(st.booleans(), st.booleans(), st.sampled_from((None, causal(), KeyPadding(torch.rand(2, 5) < 0.7))))
def test_an_attend_that_runs_twice_says_what_its_weights_are(average: bool, training: bool, mask: Any) -> None:
    layer = TwiceSaid(16, 4, batch_first=True).double().train(training)
    x = torch.randn(2, 5, 16).double()
    out, weights = layer(x, x, x, attn_mask=mask, average_attn_weights=average)
    _, heads = layer(x, x, x, attn_mask=mask, average_attn_weights=False)
    torch.testing.assert_close(weights, heads.mean(1) if average else heads)
    _, _, v = layer.project(x, x, x)
    torch.testing.assert_close(layer.merge(torch.einsum("bhqk,bkhd->bqhd", heads, v), x), out)


def test_weights_that_mean_nothing_are_refused() -> None:
    x = torch.randn(2, 5, 16)
    with pytest.raises(ValueError, match=r"its attend run attention more than once.*Override process_weights"):
        Twice(16, 4, batch_first=True)(x, x, x)
    with pytest.raises(ValueError, match="its attend ran no attention of the package's own"):
        Alone(16, 4, batch_first=True)(x, x, x)
    for kind in (Twice, Alone):
        assert kind(16, 4, batch_first=True)(x, x, x, need_weights=False)[0].shape == x.shape
    with pytest.raises(TypeError, match=r"attend must be called with what it was given.*Forgetful ends in"):
        Forgetful(16, 4)(x, x, x)


def test_what_an_attend_runs_is_explained() -> None:
    x = torch.randn(2, 5, 16)
    said = flashmha.explain(TwiceSaid(16, 4, batch_first=True), x, x, x, need_weights=False)
    assert "head_dim=2" in str(said) and any("then runs" in note for note in said.notes)
    said = flashmha.explain(Alone(16, 4, batch_first=True), x, x, x, need_weights=False)
    assert any("runs none of the package's own" in note for note in said.notes)


@pytest.mark.parametrize(
    ("name", "hop", "message"),
    [
        ("merge", lambda self, out: out, r"merge must take \(self, out, query\) in Wrong, got \(self, out\)"),
        ("attend", lambda self, q, k, v: v, r"attend must take \(self, q, k, v, \*, bias=None, \*\*call\)"),
        (
            "attend",
            lambda self, q, k, v, *, mask, call: v,
            r"attend must take \(self, q, k, v, \*, bias=None, \*\*call\)",
        ),
        ("process_heads", lambda self, q: q, r"process_heads must take \(self, q, k, v\)"),
    ],
)
def test_a_hop_that_cannot_be_called_is_refused_where_it_is_written(name: str, hop: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        type("Wrong", (FlashMultiHeadAttention,), {name: hop})


class Spelt(FlashMultiHeadAttention):
    """An ``attend`` that spells out what it is called with, as the documentation does."""

    def attend(self, q, k, v, *, mask, bias, softcap, sinks, softmax_scale, dropout_p, call) -> Tensor:  # type: ignore
        scores = {"softcap": softcap, "sinks": sinks, "softmax_scale": softmax_scale, "dropout_p": dropout_p}
        return super().attend(q, k, v, mask=mask, bias=bias, call=call, **scores)


@given(
    causal=st.booleans(),
    softcap=st.sampled_from((None, 2.0)),
    sinks=st.sampled_from((None, torch.ones(2))),
    weights=st.booleans(),
    seed=st.integers(0, 99),
)
def test_an_attend_may_spell_out_its_call(
    causal: bool, softcap: float | None, sinks: Tensor | None, weights: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    layer = FlashMultiHeadAttention(8, 2, batch_first=True, causal=causal, softcap=softcap, sinks=sinks)
    spelt = Spelt(8, 2, batch_first=True, causal=causal, softcap=softcap, sinks=sinks)
    spelt.load_state_dict(layer.state_dict())
    x = torch.randn(2, 5, 8)
    torch.testing.assert_close(spelt(x, x, x, need_weights=weights), layer(x, x, x, need_weights=weights))


@pytest.mark.parametrize("name", ["num_kv_heads", "value_head_dim"])
@pytest.mark.parametrize("value", [2, property(lambda self: 2)])
def test_sizes_of_heads_that_a_class_says_are_refused(name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=f"{name} must be an argument of the constructor, got an attribute of Wrong"):
        type("Wrong", (FlashMultiHeadAttention,), {name: value})


class Latent(FlashMultiHeadAttention):
    """Keys and values out of a narrow latent, and a gate: no in_proj and no out_proj."""

    has_in_proj = has_out_proj = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        rows = self.num_heads * self.head_dim
        self.to_q, self.down, self.up = nn.Linear(WIDTH, rows), nn.Linear(WIDTH, 3), nn.Linear(3, 2 * rows)
        self.gate, self.out = nn.Linear(WIDTH, rows), nn.Linear(rows, WIDTH)

    def project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        k, v = self.up(self.down(key)).chunk(2, -1)
        made = (x.unflatten(-1, (self.num_heads, -1)) for x in (self.to_q(query), k, v))
        return tuple(made)  # type: ignore[return-value]

    def merge(self, out: Tensor, query: Tensor) -> Tensor:
        gated: Tensor = self.out(out.flatten(2) * self.gate(query).sigmoid())
        return gated


@pytest.mark.parametrize("batch_first", [True, False])
def test_a_layer_without_projections_has_none(batch_first: bool) -> None:
    layer = Latent(WIDTH, 4, head_dim=5, batch_first=batch_first, rotary=Rotary(5, dim=4), causal=True)
    assert {name.split(".")[0] for name in layer.state_dict()} == {"to_q", "down", "up", "gate", "out"}
    x = torch.randn(2, 5, WIDTH)
    assert layer(x, x, x)[0].shape == x.shape
    encoder = nn.TransformerEncoderLayer(WIDTH, 4, 16, dropout=0.0, batch_first=batch_first)
    encoder.self_attn = layer
    with torch.no_grad():
        torch.testing.assert_close(encoder.eval()(x), encoder.train()(x))
    for name, hop in (("has_in_proj", "project"), ("has_out_proj", "merge")):
        with pytest.raises(TypeError, match=f"{name} must be True unless {hop} is overridden"):
            type("Without", (FlashMultiHeadAttention,), {name: False})(WIDTH, 4)

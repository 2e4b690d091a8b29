"""Padding left out once for all layers of an encoder, where that changes no real row."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import fewer
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn

import flashmha
from flashmha import FlashMultiHeadAttention, Window, causal, explain, replace_mha, swap_report
from flashmha.host.torch_state import without_fast_path
from flashmha.swap import route
from flashmha.testing import assert_same, noise
from flashmha.testing.models import Architecture, EncoderMasks, architectures, encoder_masks
from flashmha.testing.models.encoder import fused_architectures

pytestmark = [
    pytest.mark.filterwarnings("ignore:Support for mismatched:UserWarning"),
    pytest.mark.cpu("leaves padding out in float64, for which no GPU has a kernel"),
]


@pytest.fixture(autouse=True)
def packing_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Problems that are drawn are too small for packing to pay; a law about that says so."""
    monkeypatch.setattr(route, "ITEM", 0)


PADDED = ("bool", "float", "holes", "whole items")


def positions(architecture: Architecture, out: Tensor) -> Tensor:
    """(batch, seqlen, features) of an encoder's output."""
    return architecture.batch_major(out)


@given(
    architecture=architectures(),
    masks=encoder_masks(padding=PADDED, attention=("none", "bool causal", "float causal")),
    window=st.none() | st.just((1, None)),
    pays=st.booleans(),
)
def test_an_encoder_that_skips_padding_computes_real_rows_as_ever(
    architecture: Architecture, masks: EncoderMasks, window: Any, pays: bool
) -> None:
    hidden = masks.padded()
    route.ITEM = 0 if pays else 2**40
    answers = []
    for skip in (False, True):
        model = replace_mha(architecture.encoder(), skip_padding=skip, window=window)
        x = architecture.inputs(masks.batch, masks.seqlen).requires_grad_()
        with without_fast_path(), flashmha.record() as calls:
            out = model(x, **masks.arguments(architecture.num_heads))
        out = positions(architecture, out)
        kept = out[~hidden]
        answers.append((kept, *torch.autograd.grad(kept.square().sum(), [x, *model.parameters()])))
    zeroes = window is None or masks.padding != "holes" or not holes(hidden)
    packs = pays and zeroes and bool(hidden.any())
    assert all(("documents" in call.spec.features) == packs for call in calls)
    assert not zeroes or not out[hidden].any()
    if packs:
        assert {call.spec.seqlen_q for call in calls} == {int((~hidden).sum())}
    for padded, packed in zip(*answers, strict=True):
        assert_same(packed, padded)


def holes(hidden: Tensor) -> bool:
    """Some item has padding between real tokens."""
    return any("1" in "".join(str(int(h)) for h in row).strip("1") for row in hidden.tolist())


@contextlib.contextmanager
def nesting() -> Iterator[list[int]]:
    """What the stock encoder made nested tensors of."""
    made: list[int] = []
    stock = torch._nested_tensor_from_mask

    def counted(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        made.append(len(x))
        return stock(x, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "_nested_tensor_from_mask", counted)
        yield made


@given(
    architecture=st.one_of(fused_architectures(), architectures()),
    masks=encoder_masks(attention=("none", "none", "bool causal")),
    shorter=st.booleans(),
    grad=st.booleans(),
    frozen=st.booleans(),
    pays=st.booleans(),
)
def test_in_eval_padding_is_left_out_where_stock_nests_and_nowhere_else(
    architecture: Architecture, masks: EncoderMasks, shorter: bool, grad: bool, frozen: bool, pays: bool
) -> None:
    route.ITEM = 0 if pays else 2**40
    stock = architecture.encoder().requires_grad_(not frozen)
    model = replace_mha(architecture.encoder().requires_grad_(not frozen))
    x, given_masks = architecture.inputs(masks.batch, masks.seqlen), masks.arguments(architecture.num_heads)
    padding = given_masks["src_key_padding_mask"]
    if shorter and padding is not None:  # every item is shorter than the batch
        padding = padding.clone()
        padding[:, -1] = True if padding.dtype == torch.bool else float("-inf")
        given_masks["src_key_padding_mask"] = padding
    with torch.set_grad_enabled(grad):
        with nesting() as made, flashmha.record() as calls:
            out = model(x, **given_masks)
        assert not made
        with nesting() as made:
            try:
                expected = stock(x, **given_masks)
            except RuntimeError:  # nothing but padding
                assume(False)
    packed = ["documents" in call.spec.features for call in calls]
    some = padding is not None and bool((padding != 0).any())
    assert packed == [bool(made) and pays and some] * architecture.num_layers
    if made:
        assert out.shape == expected.shape
        assert_same(out, expected)  # padded rows, too


@given(architecture=fused_architectures(), lengths=st.lists(st.integers(0, 5), min_size=1, max_size=3))
def test_where_nothing_is_real_the_rows_are_those_of_zeros(architecture: Architecture, lengths: list[int]) -> None:
    architecture = dataclasses.replace(architecture, norm=True, nested=True, norm_first=False)
    model = replace_mha(architecture.encoder())
    with torch.no_grad():
        hidden = torch.arange(5) >= torch.tensor(lengths)[:, None]
        out = model(architecture.inputs(len(lengths), 5), src_key_padding_mask=hidden)
        assert_same(out[hidden], model.norm(torch.zeros_like(out[hidden])))


# What counts on (batch, seqlen) keeps it


class Centred(nn.Module):
    """A module that looks at the other tokens of its item."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(dim=1, keepdim=True)


class Turned(FlashMultiHeadAttention):
    def process_heads(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return q, k, v * torch.arange(v.shape[1], dtype=v.dtype)[:, None, None]


def with_bias_kv(model: Any) -> None:
    attention = model.layers[0].self_attn
    attention.bias_k, attention.bias_v = (nn.Parameter(torch.ones(1, 1, attention.embed_dim).double()) for _ in "kv")


def listen(*names: str, kind: str = "register_forward_hook") -> Callable[[Any], None]:
    def plant(model: Any) -> None:
        getattr(model.get_submodule(".".join(names)), kind)(lambda *_: None)

    return plant


def put(name: str, thing: Callable[[], Any]) -> Callable[[Any], None]:
    def plant(model: Any) -> None:
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, thing())

    return plant


class Dropped(nn.TransformerEncoderLayer):
    """A layer of another package."""


def other_layer(model: Any) -> None:
    with torch.no_grad():
        layer = Architecture(seed=3).layer(Dropped)
    layer.self_attn = FlashMultiHeadAttention(8, 2, batch_first=True, dtype=torch.float64, skip_padding=True)
    model.layers[1] = layer.train(model.training)


KEEPS: dict[str, tuple[Callable[[Any], None], str]] = {
    "a layer of another class": (other_layer, "layers.1 is a Dropped"),
    "a hook on a layer": (listen("layers", "0"), "layers.0 has hooks"),
    "a pre-hook on a layer": (listen("layers", "1", kind="register_forward_pre_hook"), "layers.1 has hooks"),
    "a backward hook on a layer": (listen("layers", "0", kind="register_full_backward_hook"), "layers.0 has hooks"),
    "a hook on attention": (listen("layers", "0", "self_attn"), "layers.0.self_attn has hooks"),
    "a hook on a linear": (listen("layers", "0", "linear1"), "layers.0.linear1 has hooks"),
    "a hook on the last norm": (listen("norm"), "norm has hooks"),
    "heads that count positions": (lambda m: setattr(m.layers[0].self_attn, "__class__", Turned), "process_heads"),
    "a forward of its own": (put("layers.0.forward", lambda: lambda x, **_: x.cumsum(1)), "layers.0 is a"),
    "a block of its own": (put("layers.0._ff_block", lambda: lambda x: x.cumsum(1)), "layers.0 is a"),
    "a module that mixes tokens": (put("layers.0.dropout", Centred), "layers.0.dropout is a Centred"),
    "a norm over two axes": (
        put("layers.0.norm1", lambda: nn.LayerNorm((4, 8), dtype=torch.float64)),
        "layers.0.norm1 normalises",
    ),
    "a norm over the batch": (put("norm", lambda: nn.BatchNorm1d(4).double()), "norm is a BatchNorm1d"),
    "an activation that mixes": (
        put("layers.1.activation", lambda: lambda x: x - x.mean(dim=1, keepdim=True)),
        "layers.1.activation",
    ),
    "add_bias_kv": (with_bias_kv, "add_bias_kv"),
    "add_zero_attn": (put("layers.1.self_attn.add_zero_attn", lambda: True), "add_zero_attn"),
    "layers that differ": (lambda m: setattr(m.layers[1].self_attn, "trust_is_causal", True), "differ"),
}


@pytest.mark.parametrize("training", (True, False))
@pytest.mark.parametrize("kind", KEEPS)
def test_what_may_count_on_the_padded_form_keeps_it_and_the_report_says_why(kind: str, training: bool) -> None:
    plant, why = KEEPS[kind]
    hidden = torch.arange(4) >= torch.tensor([[2], [4], [3]])
    model = replace_mha(Architecture(norm=True, training=training, seed=2).encoder(), skip_padding=True)
    torch.manual_seed(5)
    plant(model)
    x = Architecture().inputs(3, 4)
    assert why in str(explain(model, x, src_key_padding_mask=hidden))
    assert why not in str(explain(model, x))
    with torch.no_grad():
        padded = x
        for layer in model.layers:
            padded = layer(padded, src_key_padding_mask=hidden)
        if route.would_nest(model, x, None):  # padded rows are those of stock all the same
            padded = padded.masked_fill(hidden[..., None], 0.0)
        assert_same(model(x, src_key_padding_mask=hidden), model.norm(padded))


def test_little_padding_is_zeroed_and_explain_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # packing pays where it does
    model = replace_mha(Architecture(norm=True).encoder(), skip_padding=True)
    x, hidden = Architecture().inputs(3, 4), torch.arange(4) >= torch.tensor([[2], [4], [3]])
    out = model(x, src_key_padding_mask=hidden)
    assert not out[hidden].any() and bool(out[~hidden].all())
    assert "too little of it to pay" in str(explain(model, x, src_key_padding_mask=hidden))
    wide = replace_mha(nn.TransformerEncoder(nn.TransformerEncoderLayer(256, 4, 1024, batch_first=True), 1))
    wide.layers[0].self_attn.skip_padding = True
    said = explain(wide, torch.zeros(2, 99, 256), src_key_padding_mask=torch.arange(99) >= torch.tensor([[9], [99]]))
    assert "90 of 198 positions are left out" in str(said)


def test_the_report_of_a_swap_says_what_becomes_of_padding() -> None:
    model = replace_mha(Architecture().encoder(), skip_padding=True)
    rows = {row.name: row.why for row in swap_report(model)}
    assert "once for all layers" in rows[""]
    model.layers[1].register_forward_hook(lambda *_: None)
    rows = {row.name: row.why for row in swap_report(model)}
    assert "layers.1 has hooks" in rows[""]


@pytest.mark.parametrize(
    "activation",
    (F.relu, F.silu, nn.GELU(), functools.partial(F.gelu, approximate="tanh"), torch.tanh, nn.SiLU()),
    ids=("relu", "silu", "GELU", "gelu by tanh", "tanh", "SiLU"),
)
def test_functions_of_torch_s_are_known_to_take_tokens_one_by_one(activation: Any) -> None:
    architecture = Architecture(activation=activation)
    model = replace_mha(architecture.encoder(), skip_padding=True)
    hidden = torch.arange(4) >= torch.tensor([[2], [4], [3]])
    assert "5" not in str(explain(model, architecture.inputs(3, 4), src_key_padding_mask=hidden).chosen)
    assert "3 of 12 positions" in str(explain(model, architecture.inputs(3, 4), src_key_padding_mask=hidden))


def test_layers_of_which_some_skip_padding_keep_the_padded_form() -> None:
    model = replace_mha(Architecture().encoder())
    model.layers[0].self_attn.skip_padding = True
    x, hidden = Architecture().inputs(3, 4), torch.arange(4) >= torch.tensor([[2], [4], [3]])
    assert "not every layer has skip_padding" in str(explain(model, x, src_key_padding_mask=hidden))


def test_an_attention_mask_that_is_no_window_keeps_the_padded_form() -> None:
    masks = EncoderMasks(batch=3, attention="bool", padding="bool", seed=4)
    model = replace_mha(Architecture().encoder(), skip_padding=True)
    call = {"src": Architecture().inputs(3, 4), **masks.arguments(2)}
    assert "an attn_mask beside causality" in str(explain(model, **call))
    assert_same(real_rows(model(**call), masks), real_rows(replace_mha(Architecture().encoder())(**call), masks))


def real_rows(out: Tensor, masks: EncoderMasks) -> Tensor:
    return out[~masks.padded()]


@pytest.mark.parametrize("mask", (Window(1, 0), causal(), Window(1, 1) & causal()), ids=repr)
@pytest.mark.parametrize("padding", ("bool", "holes"))
def test_windows_given_as_rules_count_the_same_positions(mask: Any, padding: str) -> None:
    masks = EncoderMasks(batch=3, seqlen=5, padding=padding, seed=4)
    outs = []
    for skip in (False, True):
        model = replace_mha(Architecture().encoder(), skip_padding=skip)
        outs.append(model(Architecture().inputs(3, 5), mask=mask, src_key_padding_mask=masks.padded()))
    assert_same(*(real_rows(out, masks) for out in outs))


@fewer(5)
@given(architecture=architectures(), masks=encoder_masks(padding=("bool", "holes"), attention=("none",)))
def test_under_a_compiler_every_row_is_computed(architecture: Architecture, masks: EncoderMasks) -> None:
    torch._dynamo.reset()
    architecture = dataclasses.replace(architecture, num_layers=1)
    model = replace_mha(architecture.encoder(), skip_padding=True)
    exact = replace_mha(architecture.encoder())
    x, given_masks = architecture.inputs(masks.batch, masks.seqlen), masks.arguments(architecture.num_heads)
    out = torch.compile(model, fullgraph=True, backend="eager")(x, **given_masks)
    with without_fast_path():
        assert_same(out, exact(x, **given_masks))
    assert not masks.padded().any() or "compiling" in str(explain(model, x, **given_masks))


def test_an_encoder_takes_tokens_that_are_packed_already() -> None:
    masks = EncoderMasks(batch=3, seqlen=5, padding="holes", seed=4)
    architecture = Architecture(norm=True)
    model, x = replace_mha(architecture.encoder()), architecture.inputs(3, 5)
    packed = flashmha.pack(x, masks.padded())
    out = packed.unpack(model(packed.tokens, mask=packed.documents))
    expected = model(x, src_key_padding_mask=masks.padded()).masked_fill(masks.padded()[..., None], 0.0)
    assert_same(out, expected)


def test_fx_traces_an_encoder_that_skips_padding() -> None:
    model = replace_mha(Architecture(norm=True).encoder(), skip_padding=True)
    x, hidden = Architecture().inputs(3, 4), torch.arange(4) >= torch.tensor([[2], [4], [3]])
    traced = torch.fx.symbolic_trace(model, concrete_args={"mask": None, "is_causal": None})
    assert_same(traced(x, None, hidden, None)[~hidden], model(x, src_key_padding_mask=hidden)[~hidden])


INSIDE: dict[str, Callable[[Any], None]] = {
    "nothing": lambda model: None,
    "a hook on a linear": listen("layers.0.linear1"),
    "a hook on a layer": listen("layers.1"),
    "a hook on an attention": listen("layers.1.self_attn"),
    "a norm of its own": lambda model: setattr(model, "norm", nn.Sequential(nn.LayerNorm(8))),
    "a norm over positions": lambda model: setattr(model, "norm", nn.LayerNorm((5, 8))),
}


@pytest.mark.parametrize("skip", (False, True))
@pytest.mark.parametrize("kind", INSIDE)
@pytest.mark.parametrize("form", ("bool", "float"))
def test_in_eval_padded_rows_are_those_of_stock_whatever_watches(kind: str, skip: bool, form: str) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True, dtype=torch.float64)
    stock = nn.TransformerEncoder(layer, 2, nn.LayerNorm(8, dtype=torch.float64)).eval()
    INSIDE[kind](stock.double())
    ours = replace_mha(copy.deepcopy(stock.double()), skip_padding=skip)
    x = noise(0, 3, 5, 8)
    hidden = torch.arange(5) >= torch.tensor([[5], [2], [3]])
    mask = hidden if form == "bool" else torch.zeros(3, 5, dtype=torch.float64).masked_fill(hidden, float("-inf"))
    with torch.no_grad():
        expected, found = stock(x, src_key_padding_mask=mask), ours(x, src_key_padding_mask=mask)
    if skip and kind in ("nothing", "a hook on a linear", "a hook on a layer", "a hook on an attention"):
        expected, found = expected[~hidden], found[~hidden]  # the last norm of zeros is none with ``skip_padding``
    assert_same(found, expected)


def test_masks_alone_are_mapped_over() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True).double(), 2)
    ours = replace_mha(model, skip_padding=True).train()
    x, hidden = noise(0, 2, 5, 8), torch.arange(5) >= torch.tensor([[[5], [2]], [[3], [5]], [[1], [4]]])
    several = torch.func.vmap(lambda mask: ours(x, src_key_padding_mask=mask))(hidden)
    layer = ours.layers[0].self_attn
    out = torch.func.vmap(lambda mask: layer(x, x, x, key_padding_mask=mask, need_weights=False)[0])(hidden)
    for one, alone, mask in zip(several, out, hidden):
        assert_same(one[~mask], ours(x, src_key_padding_mask=mask)[~mask])
        assert_same(alone[~mask], layer(x, x, x, key_padding_mask=mask, need_weights=False)[0][~mask])


def test_shapes_are_told_without_data() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
    ours = replace_mha(model, skip_padding=True).to("meta")
    x, mask = torch.empty(2, 5, 8, device="meta"), torch.empty(2, 5, dtype=torch.bool, device="meta")
    assert ours(x, src_key_padding_mask=mask).shape == x.shape
    layer = ours.layers[0].self_attn
    assert layer(x, x, x, key_padding_mask=mask)[0].shape == x.shape

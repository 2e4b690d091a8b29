"""nn.TransformerEncoder, nn.TransformerDecoder and nn.Transformer after a swap, against themselves before it."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import fewer
from hypothesis import assume, example, given
from hypothesis import strategies as st
from torch import Tensor, nn

import flashmha
from flashmha import FlashMultiHeadAttention, replace_mha, restore_mha, swap_report
from flashmha.testing import assert_drop_in, assert_same, noise, without_fast_path
from flashmha.testing.judge import gradients_of
from flashmha.testing.models import Architecture, EncoderMasks, anatomy, architectures, encoder_masks, transformers
from flashmha.testing.models.encoder import fused_architectures, without_warnings
from flashmha.testing.models.transformer import MODEL_KINDS
from flashmha.testing.models.tree import WIDTH
from flashmha.testing.record import placed

pytestmark = pytest.mark.filterwarnings("ignore:Support for mismatched:UserWarning")


def twins(build: Callable[[], Any], **options: Any) -> tuple[Any, Any]:
    """A model, and the same one swapped."""
    return build(), replace_mha(build(), **options)


def real(architecture: Architecture, masks: EncoderMasks, out: Tensor) -> Tensor:
    """The output at positions that are not padding, (positions, features)."""
    return architecture.batch_major(out)[~masks.padded()]


# The whole encoder


@pytest.mark.parametrize("kind", MODEL_KINDS)
@given(data=st.data(), grad=st.booleans())
def test_a_swapped_transformer_computes_what_stock_does_without_its_fast_path(
    kind: str, data: st.DataObject, grad: bool
) -> None:
    model = data.draw(transformers(kinds=(kind,)))
    stock, ours = twins(model.build)
    attentions = [module for module in ours.modules() if isinstance(module, nn.MultiheadAttention)]
    with torch.set_grad_enabled(grad), without_fast_path():
        assert_drop_in(stock, ours, kwargs=model.arguments())
        with flashmha.record() as calls:
            ours(**model.arguments())
    assert [call.layer for call in calls] == attentions


def check_activation(architecture: Architecture) -> None:
    """On a GPU stock's fast path takes the tanh approximation for GELU, as the README says; set those aside."""
    assume(architecture.activation != "gelu" or placed(None).type == "cpu")


@given(architecture=fused_architectures(), masks=encoder_masks())
@example(Architecture(training=False), EncoderMasks(padding="bool"))
@example(Architecture(training=False), EncoderMasks(padding="whole items"))
def test_a_swapped_encoder_computes_what_stock_s_fast_path_does_at_real_positions(
    architecture: Architecture, masks: EncoderMasks
) -> None:
    check_activation(architecture)
    assume(not masks.padded().all())  # stock cannot pad nested tensors that are all empty
    stock, model = twins(architecture.encoder)
    x = architecture.inputs(masks.batch, masks.seqlen)
    given_masks = masks.arguments(architecture.num_heads)
    with torch.no_grad():
        out, expected = model(x, **given_masks), stock(x, **given_masks)
    assert out.shape == expected.shape
    assert bool(out.isfinite().all())
    if not masks.attention.startswith("ALiBi"):  # stock's fast path reads a float mask as a bool one, pytorch#118628
        kept, wanted = real(architecture, masks, out), real(architecture, masks, expected)
        finite = wanted.isfinite().all(dim=-1)
        assert masks.blind or bool(finite.all())
        assert_same(kept[finite], wanted[finite])


@given(architecture=architectures(), masks=encoder_masks())
def test_train_and_eval_with_and_without_gradients_give_one_answer(
    architecture: Architecture, masks: EncoderMasks
) -> None:
    model = replace_mha(architecture.encoder())
    x = architecture.inputs(masks.batch, masks.seqlen)
    given_masks = masks.arguments(architecture.num_heads)
    expected = model.train()(x, **given_masks)
    assert_same(model.eval()(x, **given_masks), expected)
    for off in (torch.no_grad, torch.inference_mode):
        with off(), without_fast_path():
            assert_same(model(x, **given_masks).clone(), expected)
        with off():  # padding may be left out, as in stock's nested tensors
            out = model(x, **given_masks).clone()
        assert_same(real(architecture, masks, out), real(architecture, masks, expected))


@given(architecture=architectures(), masks=encoder_masks(), option=st.sampled_from((None, "naive")))
def test_every_layer_runs_in_eval_and_padding_stays_key_padding(
    architecture: Architecture, masks: EncoderMasks, option: str | None
) -> None:
    model = replace_mha(architecture.encoder(), **({"backend": option} if option else {}))
    x = architecture.inputs(masks.batch, masks.seqlen)
    with torch.no_grad(), without_fast_path(), flashmha.record() as calls:
        model.eval()(x, **masks.arguments(architecture.num_heads))
    assert [call.layer for call in calls] == [layer.self_attn for layer in model.layers]
    unread = masks.padding == "float" and x.device.type != "cpu"  # to look whether it hides alone would wait for a GPU
    float_masks = masks.attention.startswith(("ALiBi", "float")) or unread
    for call in calls:
        assert option in (None, call.backend)
        assert ("key_padding" in call.spec.features) == (masks.padding != "none" and not unread)
        assert float_masks or "bias" not in call.spec.features
        assert (call.spec.batch, call.spec.seqlen_q, call.spec.seqlen_k) == (masks.batch, masks.seqlen, masks.seqlen)


@given(architecture=architectures(), padding=st.sampled_from(("bool", "holes", "whole items")))
def test_a_padding_mask_alone_reaches_every_layer_as_it_was_given(architecture: Architecture, padding: str) -> None:
    masks = EncoderMasks(padding=padding)
    model = replace_mha(architecture.encoder())
    seen: list[Tensor] = []
    for layer in model.layers:
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["key_padding_mask"]), with_kwargs=True
        )
    given_mask = masks.padding_mask()
    model(architecture.inputs(masks.batch, masks.seqlen), src_key_padding_mask=given_mask)
    assert len(seen) == architecture.num_layers
    assert all(mask is given_mask for mask in seen)


@fewer(2)
@given(architecture=architectures(), kind=st.sampled_from(("bool causal", "float causal")), hint=st.booleans())
def test_a_causal_mask_alone_is_recognised_with_and_without_the_hint(
    architecture: Architecture, kind: str, hint: bool
) -> None:
    masks = EncoderMasks(attention=kind, hint=hint)
    model = replace_mha(architecture.encoder())
    with flashmha.record() as calls:
        model(architecture.inputs(masks.batch, masks.seqlen), **masks.arguments(architecture.num_heads))
    for call in calls:
        assert "causal" in call.spec.features
        assert not call.spec.features & {"bias", "dense_mask"}


def test_a_mask_that_is_nearly_causal_is_not_taken_for_causal() -> None:
    stock, model = twins(Architecture().encoder)
    x = Architecture().inputs(2, 4)
    for opened in ((0, 3), (0, 1), (2, 3)):
        mask = torch.ones(4, 4, dtype=torch.bool).triu(1)
        mask[opened] = False
        assert_same(model(x, mask), stock(x, mask))
        soft = torch.zeros(4, 4, dtype=torch.float64).masked_fill(mask, float("-inf"))
        assert_same(model(x, soft), stock(x, soft))


def test_the_hint_without_a_mask_is_stock_s_error_in_train_and_eval() -> None:
    x = Architecture().inputs(2, 4)
    for training in (True, False):
        stock, model = (encoder.train(training) for encoder in twins(Architecture().encoder))
        for encoder in (stock, model):
            with without_fast_path(), pytest.raises(RuntimeError, match="is_causal hint"):
                encoder(x, is_causal=True)


def test_a_float_mask_that_learns_gets_its_gradient() -> None:
    stock, model = twins(Architecture().encoder)
    x, grads = Architecture().inputs(2, 4), []
    for encoder in (stock, model):
        mask = noise(5, 4, 4).requires_grad_()
        encoder(x, mask).square().sum().backward()
        grads.append(mask.grad)
    assert_same(grads[1], grads[0])


def test_learning_goes_on_where_stock_has_nothing_but_nan() -> None:
    masks = EncoderMasks(padding="whole items")
    model = replace_mha(Architecture().encoder())
    out = model(Architecture().inputs(2, 4), **masks.arguments(2))
    for grad in gradients_of({"out": out}, dict(model.named_parameters()), 7).values():
        assert grad is not None and bool(grad.isfinite().all())


@fewer(2)
@given(architecture=architectures(), masks=encoder_masks())
def test_hooks_on_submodules_fire_alike_in_train_and_eval(architecture: Architecture, masks: EncoderMasks) -> None:
    model = replace_mha(architecture.encoder())
    log: list[str] = []
    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda module, args, name=name: log.append(f"before {name}"))
        module.register_forward_hook(
            lambda module, args, out, name=name: log.append(f"after {name} nested={nested(args)}{nested(out)}")
        )
    x, given_masks = architecture.inputs(masks.batch, masks.seqlen), masks.arguments(architecture.num_heads)
    model.train()(x, **given_masks)
    in_training = list(log)
    log.clear()
    with torch.no_grad():
        model.eval()(x, **given_masks)
    assert log == in_training
    expected = {name for name, _ in model.named_modules() if name not in ("layers",) and "out_proj" not in name}
    assert {line.split()[1] for line in log if len(line.split()) > 1} >= expected - {""}
    assert not any("True" in line for line in log)


def nested(values: Any) -> bool:
    values = values if isinstance(values, tuple) else (values,)
    return any(isinstance(value, Tensor) and value.is_nested for value in values)


# Nested tensors


@given(architecture=fused_architectures(), lengths=st.lists(st.integers(1, 5), min_size=1, max_size=3))
def test_strided_nested_tensors_go_through_a_swapped_layer_in_eval_as_through_stock(
    architecture: Architecture, lengths: list[int]
) -> None:
    check_activation(architecture)
    items = [noise(architecture.seed + i, length, WIDTH) for i, length in enumerate(lengths)]
    with without_warnings():
        batch = torch.nested.nested_tensor(items)
    for build in (architecture.layer, lambda: architecture.encoder()):
        stock, model = twins(build)
        with torch.no_grad(), flashmha.record() as calls:
            out, expected = model(batch), stock(batch)
        assert calls
        assert out.is_nested
        assert out.layout == batch.layout
        for one, other, item in zip(out.unbind(), expected.unbind(), items, strict=True):
            assert_same(one, other)
            with torch.no_grad():
                assert_same(one, model(item[None])[0])


# Subclasses of the encoder classes


class Layer(nn.TransformerEncoderLayer):
    """A subclass without code of its own, which therefore has the fast path of stock."""


class ScaledLayer(nn.TransformerEncoderLayer):
    """A subclass that halves what attention adds, but not where stock's fused operator takes over."""

    def _sa_block(self, *args: Any, **kwargs: Any) -> Tensor:
        return super()._sa_block(*args, **kwargs) / 2


class OwnLayer(nn.TransformerEncoderLayer):
    """A subclass that builds and calls what it likes."""

    def __init__(self, **arguments: Any) -> None:
        nn.Module.__init__(self)
        self.self_attn = nn.MultiheadAttention(
            WIDTH, arguments["nhead"], batch_first=arguments["batch_first"], dtype=arguments["dtype"]
        )

    def forward(self, src: Tensor, src_mask: Tensor | None = None, **masks: Any) -> Tensor:
        return src + self.self_attn(src, src, src, attn_mask=src_mask)[0]


class Encoder(nn.TransformerEncoder):
    """A subclass that marks its output."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return super().forward(*args, **kwargs) + 1


SUBCLASSES = [(Encoder, nn.TransformerEncoderLayer), (nn.TransformerEncoder, Layer), (Encoder, Layer)]


@fewer(2)
@given(
    architecture=architectures(),
    masks=encoder_masks(),
    kinds=st.sampled_from([*SUBCLASSES, (nn.TransformerEncoder, ScaledLayer), (Encoder, ScaledLayer)]),
)
def test_subclasses_keep_their_code_and_call_their_attention_in_eval(
    architecture: Architecture, masks: EncoderMasks, kinds: tuple[Any, Any]
) -> None:
    encoder, layer = kinds
    stock, model = twins(lambda: architecture.encoder(encoder, layer))
    assert encoder is nn.TransformerEncoder or type(model) is encoder
    assert layer is nn.TransformerEncoderLayer or all(type(inner) is layer for inner in model.layers)
    x, given_masks = architecture.inputs(masks.batch, masks.seqlen), masks.arguments(architecture.num_heads)
    with without_fast_path():
        expected = stock(x, **given_masks)
    assert_same(model.train()(x, **given_masks), expected)
    with torch.no_grad(), flashmha.record() as calls:
        out = model.eval()(x, **given_masks)
    assert_same(out, expected)
    assert len(calls) == architecture.num_layers


@pytest.mark.parametrize(("encoder", "layer"), SUBCLASSES)
def test_what_the_swap_sets_on_subclasses_is_reported_and_restored(encoder: Any, layer: Any) -> None:
    model = Architecture().encoder(encoder, layer)
    before = anatomy(model)
    replace_mha(model)
    if layer is Layer:
        assert [inner.activation_relu_or_gelu for inner in model.layers] == [0, 0]
    if encoder is Encoder:
        assert model.use_nested_tensor is False
    rows = {row.name: row for row in swap_report(model)}
    assert {"layers.0", "layers.1", "layers.0.self_attn", "layers.1.self_attn"} <= rows.keys()
    assert all(row.swapped and row.why for row in rows.values())
    restore_mha(model)
    assert anatomy(model) == before


def test_a_subclass_without_the_attributes_of_stock_is_swapped_inside() -> None:
    stock, model = OwnLayer(**Architecture().arguments), OwnLayer(**Architecture().arguments)
    model.load_state_dict(stock.state_dict())
    replace_mha(model)
    assert type(model.self_attn) is FlashMultiHeadAttention
    x = Architecture().inputs(2, 4)
    assert_same(model(x), stock(x))
    restore_mha(model)
    assert type(model.self_attn) is nn.MultiheadAttention


def test_layers_of_several_kinds_in_one_encoder_all_run() -> None:
    def build() -> nn.TransformerEncoder:
        encoder = Architecture(training=False, num_layers=3).encoder()
        encoder.layers[1] = Architecture(seed=1, training=False).layer(Layer)
        encoder.layers[2] = Architecture(seed=2, training=False).layer(ScaledLayer)
        return encoder

    stock, model = twins(build)
    x, padding = Architecture().inputs(2, 4), EncoderMasks(padding="bool").padding_mask()
    with torch.no_grad(), without_fast_path():
        expected = stock(x, src_key_padding_mask=padding)
    with torch.no_grad(), flashmha.record() as calls:
        assert_same(model(x, src_key_padding_mask=padding), expected)
    assert [call.layer for call in calls] == [layer.self_attn for layer in model.layers]


# Layers with features, in stock encoders, by hand


class Rotated(FlashMultiHeadAttention):
    """Heads of its own: the values are turned around."""

    def process_heads(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return q, k, v.flip(-1)


class Gated(FlashMultiHeadAttention):
    """An output projection of its own."""

    def merge(self, out: Tensor, query: Tensor) -> Tensor:
        return super().merge(out, query) * 2


class Narrow(FlashMultiHeadAttention):
    """A feature set by a class."""

    window = flashmha.Window(1, 0)


FEATURED: dict[str, Callable[..., FlashMultiHeadAttention]] = {
    "window": lambda *sizes, **more: FlashMultiHeadAttention(*sizes, window=(1, 0), **more),
    "grouped heads": lambda *sizes, **more: FlashMultiHeadAttention(*sizes, num_kv_heads=1, **more),
    "backend": lambda *sizes, **more: FlashMultiHeadAttention(*sizes, backend="naive", **more),
    "call_out_proj": lambda *sizes, **more: FlashMultiHeadAttention(*sizes, call_out_proj=True, **more),
    "process_heads": Rotated,
    "merge": Gated,
    "window of the class": Narrow,
}


def later(*sizes: int, **more: Any) -> FlashMultiHeadAttention:
    layer = FlashMultiHeadAttention(*sizes, **more)
    layer.window = (1, 0)
    return layer


FEATURED["window set later"] = later


def by_hand(kind: str, architecture: Architecture) -> nn.TransformerEncoder:
    """A stock encoder whose layers were given attention of this kind."""
    encoder = architecture.encoder()
    for layer in encoder.layers:
        layer.self_attn = FEATURED[kind](WIDTH, architecture.num_heads, batch_first=True, dtype=torch.float64)
    return architecture.ready(encoder)


DUPLICATES: dict[str, Callable[[Any], Any]] = {
    "itself": lambda model: model,
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "state moved": lambda model: model.load_state_dict(model.state_dict()) and model,
    "swapped": replace_mha,
    "swapped and restored": lambda model: restore_mha(replace_mha(model)),
}


@pytest.mark.parametrize("kind", FEATURED)
@pytest.mark.parametrize("duplicate", DUPLICATES.values(), ids=DUPLICATES.keys())
def test_a_layer_with_features_put_into_a_stock_encoder_by_hand_runs_in_eval_too(
    kind: str, duplicate: Callable[[Any], Any]
) -> None:
    model, x = by_hand(kind, Architecture(seed=11)), Architecture().inputs(2, 4)
    padding = EncoderMasks(padding="bool").padding_mask()
    expected = [model.train()(x, mask).detach() for mask in (None, torch.ones(4, 4, dtype=torch.bool).triu(1))]
    padded = model(x, src_key_padding_mask=padding).detach()
    twin = duplicate(model)
    assert [type(layer.self_attn) for layer in twin.layers] == [type(layer.self_attn) for layer in model.layers]
    with torch.no_grad(), flashmha.record() as calls:
        twin.eval()
        assert_same(twin(x), expected[0])
        assert_same(twin(x, torch.ones(4, 4, dtype=torch.bool).triu(1)), expected[1])
        assert_same(twin(x, src_key_padding_mask=padding)[~padding], padded[~padding])
    assert len(calls) == 6


@pytest.mark.parametrize("kind", FEATURED)
def test_encoders_that_clone_a_featured_layer_run_every_clone_in_eval(kind: str) -> None:
    with without_warnings():
        layer = Architecture().layer()
        layer.self_attn = FEATURED[kind](WIDTH, 2, batch_first=True, dtype=torch.float64)
        model = nn.TransformerEncoder(layer, 3)
    x = Architecture().inputs(2, 4)
    expected = model.train()(x)
    with torch.no_grad(), flashmha.record() as calls:
        assert_same(model.eval()(x), expected)
    assert len({id(call.layer) for call in calls}) == 3


def test_a_method_overridden_on_the_instance_counts_in_eval_too() -> None:
    layer, x = Architecture().layer(), Architecture().inputs(2, 4)
    layer.self_attn = FlashMultiHeadAttention(WIDTH, 2, batch_first=True, dtype=torch.float64)
    layer.self_attn.process_heads = lambda q, k, v: (q, k, v.flip(-1))
    expected = layer.train()(x).detach()
    with torch.no_grad():
        assert_same(layer.eval()(x), expected)


# TorchScript and the compiler


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_a_swapped_encoder_can_be_scripted_and_computes_the_same(norm_first: bool, training: bool) -> None:
    architecture = Architecture(norm_first=norm_first, norm=True, training=training)
    model = replace_mha(architecture.encoder())
    with without_warnings():
        scripted = torch.jit.script(model)
    for kinds in ({}, {"attention": "bool causal"}, {"attention": "ALiBi"}, {"padding": "bool"}, {"padding": "holes"}):
        masks = EncoderMasks(batch=2, seqlen=4, **kinds)
        x, given_masks = architecture.inputs(2, 4), masks.arguments(2)
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                kept = real(architecture, masks, scripted(x, **given_masks))
                assert_same(kept, real(architecture, masks, model(x, **given_masks)))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "masks",
    [
        EncoderMasks(),
        EncoderMasks(attention="bool causal"),
        EncoderMasks(padding="whole items"),
        EncoderMasks(attention="ALiBi", padding="float"),
    ],
    ids=["no mask", "causal", "padding", "ALiBi and padding"],
)
def test_a_swapped_encoder_compiles_into_one_graph(masks: EncoderMasks, training: bool) -> None:
    torch._dynamo.reset()
    architecture = Architecture(num_layers=1, training=training)
    model = replace_mha(architecture.encoder())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x, given_masks = architecture.inputs(masks.batch, masks.seqlen), masks.arguments(2)
    if training:
        out, expected = compiled(x, **given_masks), model(x, **given_masks)
        assert_same(out, expected)
        parameters = dict(model.named_parameters())
        assert_same(gradients_of({"out": out}, parameters, 7), gradients_of({"out": expected}, parameters, 7))
    else:
        with torch.no_grad(), without_fast_path():  # beside which the model itself leaves padding out
            assert_same(compiled(x, **given_masks), model(x, **given_masks))

"""A layer of ours that computes something else than stock always runs, however it came to be so."""

import copy
import functools
import pickle
import types
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import flashmha
from flashmha import FlashMultiHeadAttention, replace_mha, restore_mha
from flashmha.layer.features import MARK
from flashmha.testing import assert_same

WIDTH = 8


class Tripled(FlashMultiHeadAttention):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out, weights = super().forward(*args, **kwargs)
        return 3 * out, weights


class Inherited(Tripled):
    """A subclass of a subclass."""


class Called(FlashMultiHeadAttention):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        out, weights = super().__call__(*args, **kwargs)
        return 3 * out, weights


class Late(FlashMultiHeadAttention):
    """What a test patches after a layer was built."""


def tripled(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        out, weights = method(*args, **kwargs)
        return 3 * out, weights

    return wrapper


def shifted(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return method(*args, **kwargs) + 1

    return wrapper


def encoder_layer(kind: type[FlashMultiHeadAttention] = FlashMultiHeadAttention) -> Any:
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, 0.0, batch_first=True, dtype=torch.float64)
    layer.self_attn = kind(WIDTH, 2, batch_first=True, dtype=torch.float64)
    return layer


def set_class(layer: Any) -> None:
    layer.__class__ = Inherited


def set_forward(layer: Any) -> None:
    layer.forward = tripled(layer.forward)


def bind_forward(layer: Any) -> None:
    before = type(layer).forward
    layer.forward = types.MethodType(tripled(before), layer)


def write_forward(layer: Any) -> None:
    layer.__dict__["forward"] = tripled(layer.forward)


def set_call(layer: Any) -> None:
    layer._call_impl = tripled(layer._call_impl)


def write_window(layer: Any) -> None:
    layer.__dict__["window"] = replace_mha(nn.MultiheadAttention(WIDTH, 2), window=(0, 0)).window


def set_hop(layer: Any) -> None:
    layer.merge = shifted(layer.merge)


CHANGES: dict[str, Callable[[Any], None]] = {
    "class": set_class,
    "forward": set_forward,
    "bound forward": bind_forward,
    "forward in the dictionary": write_forward,
    "_call_impl": set_call,
    "window in the dictionary": write_window,
    "hop": set_hop,
}


def clear(layer: Any) -> Any:
    layer.self_attn._forward_pre_hooks.clear()
    return layer


def assigned(layer: Any) -> Any:
    layer.load_state_dict(copy.deepcopy(layer.state_dict()), assign=True)
    return layer


AFTERWARDS: dict[str, Callable[[Any], Any]] = {
    "nothing": lambda layer: layer,
    "hooks cleared": clear,
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "assigned": assigned,
    "moved": lambda layer: layer.float().double(),
}


def runs(layer: Any) -> None:
    """In eval a stock encoder layer computes what it does in training, padding and all."""
    x = torch.randn(2, 5, WIDTH, dtype=torch.float64)
    plain, padding = torch.zeros(2, 5, dtype=torch.bool), torch.arange(5) > torch.tensor([[4], [2]])
    for mask in (None, plain, padding):
        expected = layer.train()(x, src_key_padding_mask=mask).detach()
        with torch.no_grad():
            found = layer.eval()(x, src_key_padding_mask=mask)
        assert_same(found[~padding], expected[~padding])


def differs(layer: Any) -> None:
    """A layer computes something else than the fused operator would of its weights."""
    x = torch.randn(2, 5, WIDTH, dtype=torch.float64)
    stock = nn.MultiheadAttention.forward(layer, x, x, x, need_weights=False)[0]
    assert not torch.allclose(layer(x, x, x, need_weights=False)[0], stock)


@pytest.mark.parametrize("afterwards", AFTERWARDS.values(), ids=AFTERWARDS.keys())
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_layer_changed_after_construction_runs_in_a_stock_encoder_layer(
    change: Callable[[Any], None], afterwards: Callable[[Any], Any]
) -> None:
    layer = encoder_layer()
    runs(layer)
    change(layer.self_attn)
    differs(layer.self_attn)
    runs(afterwards(layer))


@pytest.mark.parametrize("kind", [Tripled, Inherited, Called])
@pytest.mark.parametrize("duplicate", [lambda layer: pickle.loads(pickle.dumps(layer)), copy.deepcopy])
def test_a_subclass_with_a_forward_of_its_own_runs_in_a_stock_encoder_layer(
    kind: type[FlashMultiHeadAttention], duplicate: Callable[[Any], Any]
) -> None:
    layer = encoder_layer(kind)
    differs(layer.self_attn)
    runs(layer)
    runs(duplicate(layer))


@pytest.mark.parametrize("where", [FlashMultiHeadAttention, Late])
@pytest.mark.parametrize("name", ["forward", "__call__", "_call_impl", "merge"])
def test_a_class_patched_after_construction_runs_until_it_is_as_it_was(where: Any, name: str) -> None:
    layer, change = encoder_layer(Late), shifted if name == "merge" else tripled
    with mock.patch.object(where, name, change(getattr(where, name))):
        differs(layer.self_attn)
        runs(layer)
        assert MARK in layer.self_attn._forward_pre_hooks
    runs(layer)
    assert MARK not in layer.self_attn._forward_pre_hooks


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_encoders_run_every_changed_layer_with_padding_too(change: Callable[[Any], None]) -> None:
    with mock.patch("warnings.warn"):
        model = nn.TransformerEncoder(encoder_layer(), 2)
    for layer in model.layers:
        change(layer.self_attn)
    runs(model)


def test_a_compiled_encoder_layer_runs_what_was_changed_before_and_after() -> None:
    layer, x = encoder_layer(), torch.randn(2, 5, WIDTH, dtype=torch.float64)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        compiled.eval()(x)
        for window in ((0, 0), (1, 0), None):
            layer.self_attn.window = window
            expected = layer.train()(x)
            assert_same(compiled.eval()(x), expected)


@pytest.mark.parametrize("kind", [Tripled, Inherited, Called])
def test_a_scripted_encoder_layer_that_would_bypass_a_layer_is_refused(kind: type[FlashMultiHeadAttention]) -> None:
    with pytest.raises(RuntimeError, match=r"torch\.compile or torch\.export"):
        torch.jit.script(encoder_layer(kind))


def test_a_backend_named_for_a_while_serves_in_eval_too() -> None:
    layer, x = encoder_layer().eval(), torch.randn(2, 5, WIDTH, dtype=torch.float64)
    with torch.no_grad(), flashmha.record() as calls:
        expected = layer(x)
        assert not calls
        with flashmha.use_backend("naive"):
            assert_same(layer(x), expected)
        assert [call.backend for call in calls] == ["naive"]
        assert_same(layer(x), expected)
        assert len(calls) == 1


def test_no_layer_shows_that_it_is_looked_at() -> None:
    layer = encoder_layer().eval()
    before = pickle.dumps(layer)
    with torch.no_grad():
        layer(torch.randn(2, 5, WIDTH, dtype=torch.float64))
    assert pickle.dumps(layer) == before
    assert [name for name, _ in layer.self_attn.named_modules()] == ["", "out_proj"]


class Helper(FlashMultiHeadAttention):
    def helper(self) -> Tensor:
        return self.in_proj_weight.sum()


class Property(FlashMultiHeadAttention):
    @property
    def dropout(self) -> float:  # type: ignore[override]
        return 0.5

    @dropout.setter
    def dropout(self, value: float) -> None: ...


class Named(FlashMultiHeadAttention):
    """Nothing is lost: only construction and printing differ."""

    def __init__(self, width: int) -> None:
        super().__init__(width, 2)

    def extra_repr(self) -> str:
        return "named"


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_to_torch_refuses_what_it_would_drop(change: Callable[[Any], None]) -> None:
    layer = FlashMultiHeadAttention(WIDTH, 2)
    change(layer)
    with pytest.raises(ValueError, match="must not lose"):
        layer.to_torch()


@pytest.mark.parametrize("kind", [Tripled, Inherited, Called, Helper, Property])
def test_to_torch_refuses_a_subclass_with_code_of_its_own(kind: type[FlashMultiHeadAttention]) -> None:
    with pytest.raises(ValueError, match="must not lose"):
        kind(WIDTH, 2).to_torch()


def test_to_torch_takes_a_subclass_that_only_builds_and_prints() -> None:
    assert type(Named(WIDTH).to_torch()) is nn.MultiheadAttention


@pytest.mark.parametrize("name", ["forward", "__call__", "merge"])
def test_to_torch_refuses_while_the_class_is_patched(name: str) -> None:
    layer = FlashMultiHeadAttention(WIDTH, 2)
    patched = tripled(getattr(FlashMultiHeadAttention, name))
    with mock.patch.object(FlashMultiHeadAttention, name, patched), pytest.raises(ValueError, match=name):
        layer.to_torch()


def test_a_parametrized_layer_goes_neither_way() -> None:
    for kind in (FlashMultiHeadAttention, nn.MultiheadAttention):
        layer: Any = kind(WIDTH, 2)
        nn.utils.parametrizations.orthogonal(layer, "in_proj_weight")
        ours = kind is FlashMultiHeadAttention
        with pytest.raises((TypeError, ValueError), match=f"must .*Parametrized{kind.__name__}"):
            layer.to_torch() if ours else FlashMultiHeadAttention.from_torch(layer)


@pytest.mark.parametrize("change", [set_forward, write_forward, set_call, bind_forward])
def test_an_instance_with_a_forward_of_its_own_is_not_swapped(change: Callable[[Any], None]) -> None:
    layer, x = nn.MultiheadAttention(WIDTH, 2), torch.randn(3, 2, WIDTH)
    change(layer)
    expected = layer(x, x, x)[0]
    with pytest.raises(ValueError, match=r"forward|_call_impl"):
        FlashMultiHeadAttention.from_torch(layer)
    assert type(replace_mha(layer)) is nn.MultiheadAttention
    assert_same(layer(x, x, x)[0], expected)


def test_a_patched_stock_class_is_not_swapped() -> None:
    layer, x = nn.MultiheadAttention(WIDTH, 2), torch.randn(3, 2, WIDTH)
    with mock.patch.object(nn.MultiheadAttention, "forward", tripled(nn.MultiheadAttention.forward)):
        expected = layer(x, x, x)[0]
        assert_same(replace_mha(layer)(x, x, x)[0], expected)
        with pytest.raises(ValueError, match="patched"):
            FlashMultiHeadAttention.from_torch(layer)


@pytest.mark.parametrize("how", ["instance", "class"])
@pytest.mark.parametrize("kind", [nn.TransformerEncoderLayer, nn.TransformerEncoder])
def test_an_encoder_with_a_forward_of_its_own_keeps_it_and_calls_its_attention(kind: Any, how: str) -> None:
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, 0.0, batch_first=True, dtype=torch.float64)
    with mock.patch("warnings.warn"):
        model = layer if kind is nn.TransformerEncoderLayer else nn.TransformerEncoder(layer, 2)
    x = torch.randn(2, 5, WIDTH, dtype=torch.float64)
    padding = torch.arange(5) >= torch.tensor([[4], [2]])
    patch: Any = mock.patch.object(kind, "forward", shifted(kind.forward))
    if how == "instance":
        patch = mock.patch.object(model, "forward", shifted(model.forward))
    before = {id(module): type(module) for module in model.modules()}
    with patch:
        expected = model.train()(x, src_key_padding_mask=padding)
        replace_mha(model, backend="naive")
        with torch.no_grad(), flashmha.record() as calls:
            found = model.eval()(x, src_key_padding_mask=padding)
        assert_same(found[~padding], expected[~padding])
        assert len(calls) == (1 if model is layer else 2)
        restore_mha(model)
        assert {id(module): type(module) for module in model.modules()} == before


def test_a_feature_set_after_the_swap_does_not_outlive_it() -> None:
    layer = replace_mha(nn.MultiheadAttention(WIDTH, 2))
    layer.window = (1, 0)  # type: ignore[assignment]
    restore_mha(layer)
    assert type(layer) is nn.MultiheadAttention and not hasattr(layer, "window")
    assert type(replace_mha(layer)) is FlashMultiHeadAttention

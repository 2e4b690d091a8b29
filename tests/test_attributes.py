"""Every attribute that the stock forward reads is read by ours, whatever stands there and however it came there."""

from __future__ import annotations

import types
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.utils.parametrize as parametrize
import torch.nn.utils.prune as prune
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from flashmha import FlashMultiHeadAttention, replace_mha
from flashmha.testing import assert_same, judge, noise

WIDTH, HEADS = 8, 4


def tensor(seed: int, *shape: int) -> Tensor:
    return noise(seed, *shape)


def separate(layer: Any) -> dict[str, Any]:
    """The flag alone says which weights are read; the packed one stays where it was."""
    named = {f"{letter}_proj_weight": nn.Parameter(tensor(i, WIDTH, WIDTH)) for i, letter in enumerate("qkv")}
    return {"_qkv_same_embed_dim": False, **named}


CHANGES: dict[str, Callable[[Any], dict[str, Any]]] = {
    "num_heads": lambda layer: {"num_heads": 2},
    "head_dim": lambda layer: {"head_dim": 99},
    "kdim": lambda layer: {"kdim": 99, "vdim": 99},
    "batch_first": lambda layer: {"batch_first": not layer.batch_first},
    "add_zero_attn": lambda layer: {"add_zero_attn": True},
    "bias_k": lambda layer: {"bias_k": tensor(1, 1, 1, WIDTH), "bias_v": tensor(2, 1, 1, WIDTH)},
    "separate": separate,
    "separate, no packed": lambda layer: {**separate(layer), "in_proj_weight": None},
    "in_proj_weight": lambda layer: {"in_proj_weight": tensor(3, 3 * WIDTH, WIDTH)},
    "in_proj_bias": lambda layer: {"in_proj_bias": tensor(4, 3 * WIDTH)},
    "in_proj_bias None": lambda layer: {"in_proj_bias": None},
    "dropout in training": lambda layer: {"dropout": 1.0, "training": True},
    "dropout in eval": lambda layer: {"dropout": 1.0, "training": False},
}


def set_on_instance(layer: Any, changes: dict[str, Any]) -> None:
    for name, value in changes.items():
        if name in layer._parameters and not isinstance(value, nn.Parameter):
            delattr(layer, name)
        setattr(layer, name, value)


def write_in_dictionary(layer: Any, changes: dict[str, Any]) -> None:
    layer.__dict__.update(changes)


def make_properties(layer: Any, changes: dict[str, Any]) -> None:
    properties = {name: property(lambda self, value=value: value) for name, value in changes.items()}
    layer.__class__ = type("Changed", (type(layer),), properties)


def make_class_attributes(layer: Any, changes: dict[str, Any]) -> None:
    for name in changes:
        layer._parameters.pop(name, None)
        layer.__dict__.pop(name, None)
    layer.__class__ = type("Changed", (type(layer),), dict(changes))


WAYS = (set_on_instance, write_in_dictionary, make_properties, make_class_attributes)


class Plain:
    """Anything with a weight and a bias."""

    def __init__(self, bias: bool) -> None:
        self.weight, self.bias = tensor(5, WIDTH, WIDTH), tensor(6, WIDTH) if bias else None


class Computed(nn.Module):
    """A module whose weight is computed."""

    @property
    def weight(self) -> Tensor:
        return tensor(7, WIDTH, WIDTH)

    bias = None


def put_plain(layer: Any, bias: bool = True) -> None:
    del layer.out_proj
    layer.out_proj = Plain(bias)


def tensors_in_out_proj(layer: Any) -> None:
    del layer.out_proj.weight, layer.out_proj.bias
    layer.out_proj.weight, layer.out_proj.bias = tensor(5, WIDTH, WIDTH), tensor(6, WIDTH)


def written_in_out_proj(layer: Any) -> None:
    layer.out_proj.__dict__.update(weight=tensor(5, WIDTH, WIDTH), bias=tensor(6, WIDTH))


def narrow() -> nn.Linear:
    linear = nn.Linear(WIDTH, 5, bias=False, dtype=torch.float64)
    linear.weight = nn.Parameter(tensor(5, 5, WIDTH))
    return linear


def no_bias(layer: Any) -> None:
    layer.out_proj.bias = None


class Twice(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


OUT_PROJ: dict[str, Callable[[Any], Any]] = {
    "a plain object": put_plain,
    "a plain object without a bias": lambda layer: put_plain(layer, bias=False),
    "a namespace": lambda layer: (
        delattr(layer, "out_proj"),
        setattr(layer, "out_proj", types.SimpleNamespace(**vars(Plain(True)))),
    ),
    "a computed weight": lambda layer: setattr(layer, "out_proj", Computed()),
    "of another width": lambda layer: setattr(layer, "out_proj", narrow()),
    "tensors": tensors_in_out_proj,
    "tensors in the dictionary": written_in_out_proj,
    "no bias": no_bias,
    "parametrized": lambda layer: parametrize.register_parametrization(layer.out_proj, "weight", Twice()),
    "pruned": lambda layer: prune.l1_unstructured(layer.out_proj, "weight", 0.5),
    "pruned packed": lambda layer: prune.l1_unstructured(layer, "in_proj_weight", 0.5),
    "pruned bias": lambda layer: prune.l1_unstructured(layer, "in_proj_bias", 0.5),
    "parametrized bias": lambda layer: parametrize.register_parametrization(layer, "in_proj_bias", Twice()),
    "parametrized packed": lambda layer: parametrize.register_parametrization(layer, "in_proj_weight", Twice()),
    "parametrized bias_k": lambda layer: parametrize.register_parametrization(biased(layer), "bias_k", Twice()),
    "one of two": lambda layer: setattr(biased(layer), "bias_v", None),
}


def biased(layer: Any) -> Any:
    layer.bias_k, layer.bias_v = (nn.Parameter(tensor(i, 1, 1, WIDTH)) for i in (1, 2))
    return layer


def twins(kind: type[nn.MultiheadAttention]) -> Any:
    layer = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, dtype=torch.float64)
    with torch.no_grad():
        for i, parameter in enumerate(layer.parameters()):
            parameter.copy_(tensor(10 + i, *parameter.shape))
    return layer if kind is nn.MultiheadAttention else replace_mha(layer)


def answer(layer: Any, sharing: str, need_weights: bool, masked: bool) -> dict[str, Any]:
    """Output, weights and every gradient, or the error."""
    first, second, third = (tensor(20 + i, 3, 3, WIDTH).requires_grad_() for i in range(3))
    query, key, value = {"one": (first,) * 3, "two": (first, second, second), "three": (first, second, third)}[sharing]
    mask = torch.tensor([[False, True, False]] * 3) if masked else None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            out, weights = layer(query, key, value, attn_mask=mask, need_weights=need_weights)
    except Exception as error:
        return {"error": type(error)}
    leaves = {"query": first, **{name: x for name, x in layer.named_parameters() if x.requires_grad}}
    found = {"out": out} if weights is None else {"out": out, "weights": weights}
    return found | {name: x for name, x in judge.gradients_of(found, leaves, 3).items() if x is not None}


def assert_alike(change: Callable[[Any], Any], training: bool, sharing: str, need_weights: bool, masked: bool) -> None:
    answers = []
    for kind in (nn.MultiheadAttention, FlashMultiHeadAttention):
        layer = twins(kind).train(training)
        change(layer)
        answers.append(answer(layer, sharing, need_weights, masked))
    stock, ours = answers
    assert stock.keys() == ours.keys(), (stock.keys(), ours.keys(), stock.get("error"), ours.get("error"))
    for name, value in stock.items():
        if name == "error":
            assert issubclass(ours[name], value) or issubclass(value, ours[name])
        elif name != "weights" or "dropout" not in str(change):
            assert_same(ours[name], value, name)


CALLS = {
    "training": st.booleans(),
    "sharing": st.sampled_from(("one", "two", "three")),
    "need_weights": st.booleans(),
    "masked": st.booleans(),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CHANGES)
@given(**CALLS)
def test_what_stands_at_an_attribute_is_read_as_stock_reads_it(
    way: Any, name: str, training: bool, sharing: str, need_weights: bool, masked: bool
) -> None:
    need_weights = need_weights and name != "dropout in training"  # ours are those before dropout

    def change(layer: Any) -> None:
        way(layer, CHANGES[name](layer))

    assert_alike(change, training, sharing, need_weights, masked)


@pytest.mark.parametrize("change", OUT_PROJ.values(), ids=OUT_PROJ.keys())
@given(**CALLS)
def test_what_stands_at_out_proj_is_read_as_stock_reads_it(
    change: Callable[[Any], Any], training: bool, sharing: str, need_weights: bool, masked: bool
) -> None:
    assert_alike(change, training, sharing, need_weights, masked)


@pytest.mark.parametrize("flag", [True, False])
def test_a_flag_without_its_weights_is_stock_s_error(flag: bool) -> None:
    x = tensor(1, 3, 3, WIDTH)
    for layer in (twins(nn.MultiheadAttention), twins(FlashMultiHeadAttention)):
        if flag:
            layer.in_proj_weight = None
        else:
            layer._qkv_same_embed_dim = False
        with pytest.raises(AssertionError, match=f"use_separate_proj_weight is {not flag} but"):
            layer(x, x, x)


def test_the_flag_reaches_pytorch_s_own_function_too() -> None:
    x = tensor(1, 3, 3, WIDTH)
    for name in ("separate", "num_heads", "add_zero_attn"):
        answers = []
        for kind in (nn.MultiheadAttention, FlashMultiHeadAttention):
            layer = twins(kind)
            set_on_instance(layer, CHANGES[name](layer))
            layer.requires_grad_(False)
            traced = torch.jit.trace(lambda x, layer=layer: layer(x, x, x)[0], (x,), check_trace=False)
            answers.append(traced(x))
        assert_same(answers[1], answers[0])

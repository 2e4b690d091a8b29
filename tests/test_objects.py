"""A layer as an object: copies, files, hooks, parametrizations, conversion, overrides, and life inside an encoder."""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.utils.parametrizations as parametrizations
import torch.nn.utils.parametrize as parametrize
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import prune

from flashmha import FlashMultiHeadAttention, Window, record
from flashmha.testing import Blueprint, Call, ask, assert_same, blueprints, problems

EXACT = (torch.float64,)
FEATURES: tuple[dict[str, Any], ...] = (
    {},
    {"window": Window(2, 1)},
    {"backend": "naive"},
    {"backend": ["sdpa", "naive"]},
    {"num_kv_heads": 1},
    {"call_out_proj": True},
    {"num_kv_heads": 1, "window": (1, 0), "backend": "sdpa", "call_out_proj": True},
)


def saved_and_loaded(layer: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[nn.Module], Any]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
    "torch.save": saved_and_loaded,
}

exact_problems = problems(layers=blueprints(dtypes=EXACT))


def assert_same_answer(one_layer: Any, other: Any, call: Call, blueprint: Blueprint) -> None:
    """Output, weights, gradients and warnings agree, wherever the first layer has them."""
    found = ask(one_layer, call, call.tensors(blueprint))
    wanted = ask(other, call, call.tensors(blueprint))
    for name, tensor in wanted.tensors.items():
        if tensor is not None:
            assert found[name] is not None, name
            assert_same(found[name], tensor, name)
    assert found.warnings == wanted.warnings


def by_the_hint(blueprint: Blueprint, call: Call) -> Call:
    """The call without the hint where stock and we differ about extra columns."""
    return dataclasses.replace(call, is_causal=call.is_causal and not blueprint.extra_columns)


# Copies and files


@pytest.mark.parametrize("way", COPIES)
@given(problem=exact_problems, features=st.sampled_from(FEATURES))
@settings(max_examples=25)
def test_a_copy_is_the_layer_with_its_features(
    way: str, problem: tuple[Blueprint, Call], features: dict[str, Any]
) -> None:
    blueprint, call = problem
    layer = blueprint.build(FlashMultiHeadAttention, **features)
    twin = COPIES[way](layer)
    assert type(twin) is FlashMultiHeadAttention
    assert (twin.num_kv_heads, twin.call_out_proj, repr(twin.window), twin.backend) == (
        layer.num_kv_heads,
        layer.call_out_proj,
        repr(layer.window),
        layer.backend,
    )
    assert list(twin.state_dict()) == list(layer.state_dict())
    assert_same_answer(twin, layer, call, blueprint)


@pytest.mark.parametrize("way", COPIES)
@given(features=st.sampled_from(FEATURES[1:]))
@settings(max_examples=8)
def test_a_copy_can_be_changed_without_the_original(way: str, features: dict[str, Any]) -> None:
    layer = FlashMultiHeadAttention(4, 2, **features)
    twin = COPIES[way](layer)
    twin.backend, twin.window = "naive", (0, 0)
    assert layer.backend == features.get("backend")
    assert repr(layer.window) == repr(FlashMultiHeadAttention(4, 2, **features).window)


@given(problem=exact_problems, way=st.sampled_from(("class", "state", "pickle", "old state")))
def test_a_stock_layer_becomes_ours_by_class_or_by_state(problem: tuple[Blueprint, Call], way: str) -> None:
    blueprint, call = problem
    stock = blueprint.build()
    ours: Any = copy.deepcopy(stock)
    if way == "class":
        ours.__class__ = FlashMultiHeadAttention
    else:
        state = pickle.loads(pickle.dumps(vars(ours))) if way == "pickle" else vars(ours)
        if way == "old state" and state["_qkv_same_embed_dim"]:
            del state["_qkv_same_embed_dim"]  # torch 1.1 had none
        ours = FlashMultiHeadAttention.__new__(FlashMultiHeadAttention)
        ours.__setstate__(state)
    assert_same_answer(ours, stock, by_the_hint(blueprint, call), blueprint)
    ours.backend = "naive"
    assert_same_answer(ours, stock, by_the_hint(blueprint, call), blueprint)


@given(problem=exact_problems)
def test_to_torch_and_from_torch_share_parameters_and_answer_alike(problem: tuple[Blueprint, Call]) -> None:
    blueprint, call = problem
    ours = blueprint.build(FlashMultiHeadAttention, backend="naive", call_out_proj=True).train(call.training)
    ours.note = "kept"
    stock = ours.to_torch()
    again = FlashMultiHeadAttention.from_torch(stock)
    assert (type(stock), type(again)) == (nn.MultiheadAttention, FlashMultiHeadAttention)
    for other in (stock, again):
        assert [id(p) for p in other.parameters()] == [id(p) for p in ours.parameters()]
        assert (other.training, other.note) == (ours.training, "kept")
    assert not stock._forward_pre_hooks and not again._forward_pre_hooks
    assert set(vars(stock)) <= set(vars(blueprint.build())) | {"note"}
    assert_same_answer(again, stock, by_the_hint(blueprint, call), blueprint)


@given(features=st.sampled_from(({"window": (1, 1)}, {"num_kv_heads": 1})), override=st.booleans())
def test_to_torch_refuses_what_it_would_lose(features: dict[str, Any], override: bool) -> None:
    layer = Doubled(4, 2) if override else FlashMultiHeadAttention(4, 2, **features)
    with pytest.raises(ValueError, match="merge" if override else next(iter(features))):
        layer.to_torch()


@given(kind=st.sampled_from((nn.Linear, FlashMultiHeadAttention)), derived=st.booleans())
def test_from_torch_refuses_all_but_the_stock_class(kind: type[nn.Module], derived: bool) -> None:
    class Derived(nn.MultiheadAttention):
        pass

    with pytest.raises(TypeError, match=r"exactly an nn\.MultiheadAttention"):
        FlashMultiHeadAttention.from_torch(Derived(4, 2) if derived else kind(4, 2))  # type: ignore[arg-type]


# Hooks


@given(problem=problems(layers=blueprints(dtypes=EXACT), grad=(True,)), features=st.sampled_from(FEATURES[:6]))
def test_module_hooks_fire_once_with_keywords_in_train_and_eval(
    problem: tuple[Blueprint, Call], features: dict[str, Any]
) -> None:
    blueprint, call = problem
    layer = blueprint.build(FlashMultiHeadAttention, **features)
    for training in (True, False):
        fired: list[str] = []
        seen: list[set[str]] = []

        def with_kwargs(name: str, fired: list[str] = fired, seen: list[set[str]] = seen) -> Callable[..., None]:
            return lambda module, args, kwargs, *rest: (fired.append(name), seen.append(set(kwargs)))[0]

        handles = [
            layer.register_forward_pre_hook(lambda *_, fired=fired: fired.append("forward pre")),
            layer.register_forward_pre_hook(with_kwargs("forward pre with kwargs"), with_kwargs=True),
            layer.register_forward_hook(lambda *_, fired=fired: fired.append("forward")),
            layer.register_forward_hook(with_kwargs("forward with kwargs"), with_kwargs=True),
            layer.register_full_backward_hook(lambda *_, fired=fired: fired.append("full backward")),
        ]
        ask(layer, dataclasses.replace(call, training=training), call.tensors(blueprint))
        for handle in handles:
            handle.remove()
        wanted = ["forward pre", "forward pre with kwargs", "forward", "forward with kwargs", "full backward"]
        assert fired == wanted
        assert all({"key_padding_mask", "need_weights", "attn_mask"} <= names for names in seen)


@given(problem=problems(layers=blueprints(dtypes=EXACT), grad=(False,)), training=st.booleans())
def test_a_forward_hook_sees_and_may_replace_what_the_layer_returns(
    problem: tuple[Blueprint, Call], training: bool
) -> None:
    blueprint, call = problem
    call = dataclasses.replace(call, training=training)
    layer = blueprint.build(FlashMultiHeadAttention)
    plain = ask(layer, call, call.tensors(blueprint))
    layer.register_forward_hook(lambda module, args, output: (output[0] * 2, output[1]))
    assert_same(ask(layer, call, call.tensors(blueprint))["output"], plain["output"] * 2, "output")


@given(problem=exact_problems, call_out_proj=st.booleans())
def test_hooks_on_out_proj_run_only_where_it_is_called(problem: tuple[Blueprint, Call], call_out_proj: bool) -> None:
    blueprint, call = problem
    layer = blueprint.build(FlashMultiHeadAttention, call_out_proj=call_out_proj)
    wanted = ask(blueprint.build(FlashMultiHeadAttention), call, call.tensors(blueprint))
    fired: list[int] = []
    layer.out_proj.register_forward_hook(lambda *_: fired.append(1))
    found = ask(layer, call, call.tensors(blueprint))
    assert len(fired) == int(call_out_proj)
    assert_same(found["output"], wanted["output"], "output")


@given(problem=exact_problems)
def test_an_adapter_in_place_of_out_proj_runs_with_call_out_proj(problem: tuple[Blueprint, Call]) -> None:
    blueprint, call = problem
    layer = blueprint.build(FlashMultiHeadAttention, call_out_proj=True)
    plain = ask(layer, call, call.tensors(blueprint))["output"]
    layer.out_proj = nn.Sequential(layer.out_proj, Scaled())
    assert_same(ask(layer, call, call.tensors(blueprint))["output"], plain * 3, "output")


class Scaled(nn.Module):
    """Three times its input; as a parametrization, three times the weight."""

    def forward(self, x: Tensor) -> Tensor:
        return 3 * x


# Parametrizations


def parametrized(layer: Any, where: str) -> None:
    """Three times the weights of a projection, recomputed whenever they are read."""
    module, name = parts(layer, where)
    parametrize.register_parametrization(module, name, Scaled())


def weight_normed(layer: Any, where: str) -> None:
    module, name = parts(layer, where)
    parametrizations.weight_norm(module, name)


def pruned(layer: Any, where: str) -> None:
    module, name = parts(layer, where)
    prune.l1_unstructured(module, name, amount=0.5)


def parts(layer: Any, where: str) -> tuple[nn.Module, str]:
    if where == "out_proj":
        return layer.out_proj, "weight"
    return layer, "in_proj_weight" if layer.in_proj_weight is not None else "k_proj_weight"


@pytest.mark.parametrize("where", ["in_proj", "out_proj"])
@pytest.mark.parametrize("change", [parametrized, weight_normed, pruned], ids=lambda change: change.__name__)
@given(problem=problems(layers=blueprints(dtypes=EXACT, head_dims=(2, 4)), batches=(2, None, 1), seqlens=(3, 1, 2)))
@settings(max_examples=20)
def test_a_changed_projection_is_used_in_train_and_eval_as_in_stock(
    change: Callable[[Any, str], None], where: str, problem: tuple[Blueprint, Call]
) -> None:
    blueprint, call = problem
    call = by_the_hint(blueprint, call)
    stock, ours = blueprint.build(), blueprint.build(FlashMultiHeadAttention)
    plain = ask(ours, call, call.tensors(blueprint))["output"]
    for layer in (stock, ours):
        change(layer, where)
    if where == "out_proj" and change is pruned:
        call = dataclasses.replace(call, grad=False)  # nothing masks again: stock has no second backward
    assert isinstance(ours, FlashMultiHeadAttention)
    wanted = ask(stock, dataclasses.replace(call, training=True), call.tensors(blueprint))
    for training in (True, False):
        found = ask(ours, dataclasses.replace(call, training=training), call.tensors(blueprint))
        for name, tensor in wanted.tensors.items():
            if tensor is not None:
                assert_same(found[name], tensor, name)
    if change is parametrized and where == "out_proj":
        bias = 0.0 if ours.out_proj.bias is None else ours.out_proj.bias.detach()
        assert_same(found["output"] - bias, 3 * (plain - bias), "output")


@given(seed=st.integers(0, 99), steps=st.integers(2, 4), where=st.sampled_from(("in_proj", "out_proj")))
@settings(max_examples=10)
def test_a_pruned_layer_trains_for_many_steps(seed: int, steps: int, where: str) -> None:
    blueprint = Blueprint(seed=seed)
    layer = blueprint.build(FlashMultiHeadAttention, call_out_proj=True)
    pruned(layer, where)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-3)
    for _ in range(steps):
        x = Call(seed=seed).tensors(blueprint).query
        layer(x, x, x)[0].square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    module, name = parts(layer, where)
    layer(x, x, x)
    assert (getattr(module, name) == 0).float().mean() >= 0.5


@given(problem=problems(layers=blueprints(dtypes=EXACT), grad=(True,)), features=st.sampled_from(FEATURES[1:4]))
@settings(max_examples=20)
def test_a_parametrized_layer_keeps_its_features(problem: tuple[Blueprint, Call], features: dict[str, Any]) -> None:
    blueprint, call = problem
    layer = blueprint.build(FlashMultiHeadAttention, **features)
    plain = ask(layer, call, call.tensors(blueprint))
    module, name = parts(layer, "in_proj")
    parametrize.register_parametrization(module, name, nn.Identity())
    found = ask(layer, call, call.tensors(blueprint))
    assert_same(found["output"], plain["output"], "output")
    parametrize.remove_parametrizations(module, name)
    assert type(layer) is FlashMultiHeadAttention
    assert_same(ask(layer, call, call.tensors(blueprint))["output"], plain["output"], "output")


# Overrides


class Doubled(FlashMultiHeadAttention):
    """Twice the output."""

    def merge(self, out: Tensor, query: Tensor) -> Tensor:
        return 2 * super().merge(out, query)


class Reversed(FlashMultiHeadAttention):
    """The values of the last key first."""

    def process_heads(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return q, k, v.flip(1)


class Flat(FlashMultiHeadAttention):
    """Queries of zeros: every visible key weighs the same."""

    def project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().project(query, key, value)
        return torch.zeros_like(q), k, v


@given(problem=problems(layers=blueprints(dtypes=EXACT), blind=True))
def test_an_overridden_merge_makes_the_output(problem: tuple[Blueprint, Call]) -> None:
    blueprint, call = problem
    plain = ask(blueprint.build(FlashMultiHeadAttention), call, call.tensors(blueprint))
    found = ask(blueprint.build(Doubled), call, call.tensors(blueprint))
    assert_same(found["output"], 2 * plain["output"], "output")
    if call.need_weights:
        assert_same(found["weights"], plain["weights"], "weights")


@given(problem=problems(layers=blueprints(dtypes=EXACT, extra_columns=(False,)), paddings=("none",)))
def test_an_overridden_process_heads_changes_the_heads(problem: tuple[Blueprint, Call]) -> None:
    blueprint, call = problem
    call = dataclasses.replace(call, sharing="abc", grad=False)
    tensors = call.tensors(blueprint)
    axis = 1 if call.batch is not None and blueprint.batch_first else 0
    flipped = dataclasses.replace(tensors, value=tensors.value.flip(axis))
    found = ask(blueprint.build(Reversed), call, tensors)
    wanted = ask(blueprint.build(FlashMultiHeadAttention), call, flipped)
    assert_same(found["output"], wanted["output"], "output")


@given(
    problem=problems(
        layers=blueprints(dtypes=EXACT, extra_columns=(False,)),
        seqlens=(3, 1, 2, 5),
        batches=(2, None, 1),
        paddings=("none",),
        attn_masks=("none",),
        need_weights=(True,),
    )
)
def test_an_overridden_project_makes_the_heads(problem: tuple[Blueprint, Call]) -> None:
    blueprint, call = problem
    weights = ask(blueprint.build(Flat), call, call.tensors(blueprint))["weights"]
    assert weights is not None
    assert_same(weights, torch.full_like(weights, 1 / call.seqlen_k), "weights")


@given(problem=exact_problems)
def test_a_subclass_may_override_forward_and_call_super(problem: tuple[Blueprint, Call]) -> None:
    class Named(FlashMultiHeadAttention):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.calls = 0

        def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
            self.calls += 1
            return super().forward(*args, **kwargs)

    blueprint, call = problem
    layer = blueprint.build(Named)
    assert_same_answer(layer, blueprint.build(FlashMultiHeadAttention), call, blueprint)
    assert layer.calls == 1


# dtypes and devices


@given(blueprint=blueprints(), dtype=st.sampled_from((torch.float64, torch.float32, torch.bfloat16)))
def test_the_default_dtype_is_every_parameters_dtype(blueprint: Blueprint, dtype: torch.dtype) -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        layer = FlashMultiHeadAttention(**{**blueprint.arguments, "dtype": None})
    finally:
        torch.set_default_dtype(before)
    assert {parameter.dtype for parameter in layer.parameters()} == {dtype}


@given(blueprint=blueprints(), by_context=st.booleans(), kv_heads=st.sampled_from((None, 1)))
def test_a_layer_on_meta_is_emptied_and_reset_like_stock(
    blueprint: Blueprint, by_context: bool, kv_heads: int | None
) -> None:
    def built(kind: type[Any], **more: Any) -> Any:
        if by_context:
            with torch.device("meta"):
                return kind(**blueprint.arguments, **more)
        return kind(**{**blueprint.arguments, **more, "device": "meta"})

    ours = built(FlashMultiHeadAttention, num_kv_heads=kv_heads)
    layers = [ours] if kv_heads else [ours, built(nn.MultiheadAttention)]
    for layer in layers:
        assert {parameter.device.type for parameter in layer.parameters()} == {"meta"}
        layer.to_empty(device="cpu")
        with torch.no_grad():
            layer.out_proj.weight.zero_()
        torch.manual_seed(blueprint.seed)
        layer._reset_parameters()
    assert not ours.out_proj.weight.any()
    for parameter in ours.parameters():
        assert parameter.device.type == "cpu" and parameter.isfinite().all()
    for mine, theirs in zip(ours.parameters(), layers[-1].parameters(), strict=True):
        assert torch.equal(mine, theirs)


@given(
    problem=problems(layers=blueprints(dtypes=(torch.float32,))), dtype=st.sampled_from((torch.float64, torch.bfloat16))
)
def test_a_layer_follows_to(problem: tuple[Blueprint, Call], dtype: torch.dtype) -> None:
    blueprint, call = problem
    layer = blueprint.build(FlashMultiHeadAttention).to(dtype)
    found = ask(layer, call, call.tensors(blueprint, dtype))
    assert {tensor.dtype for tensor in found.tensors.values() if tensor is not None} == {dtype}


@given(problem=exact_problems)
def test_state_loaded_in_place_or_assigned_is_used(problem: tuple[Blueprint, Call]) -> None:
    blueprint, call = problem
    wanted = blueprint.build(FlashMultiHeadAttention)
    for assign in (False, True):
        layer = FlashMultiHeadAttention(**blueprint.arguments)
        ask(layer, call, call.tensors(blueprint))
        layer.load_state_dict(wanted.state_dict(), assign=assign)
        assert_same_answer(layer, wanted, call, blueprint)


@given(seed=st.integers(0, 99))
@settings(max_examples=5)
def test_an_optimizer_state_goes_on_between_the_classes(seed: int) -> None:
    blueprint = Blueprint(seed=seed, dtype=torch.float64, kdim=5)
    stock, ours = blueprint.build(), blueprint.build(FlashMultiHeadAttention)
    inputs = Call(seed=seed).tensors(blueprint).inputs
    state: dict[str, Any] | None = None
    for order in ((stock, ours), (ours, stock)):
        results = []
        for layer in order:
            optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
            if state is not None:
                optimizer.load_state_dict(copy.deepcopy(state))
            layer.zero_grad()
            layer(*inputs)[0].square().sum().backward()
            optimizer.step()
            results.append(optimizer.state_dict())
        state = results[0]
    for mine, theirs in zip(ours.parameters(), stock.parameters(), strict=True):
        assert_same(mine.detach(), theirs.detach())


# Inside nn.TransformerEncoder

LOSSES: dict[str, Callable[[int, int], FlashMultiHeadAttention]] = {
    "window": lambda width, heads: FlashMultiHeadAttention(width, heads, batch_first=True, window=(1, 0)),
    "num_kv_heads": lambda width, heads: FlashMultiHeadAttention(width, heads, batch_first=True, num_kv_heads=1),
    "backend": lambda width, heads: FlashMultiHeadAttention(width, heads, batch_first=True, backend="naive"),
    "override": lambda width, heads: Doubled(width, heads, batch_first=True),
    "call_out_proj": lambda width, heads: FlashMultiHeadAttention(width, heads, batch_first=True, call_out_proj=True),
}


def encoder_layer(attention: FlashMultiHeadAttention) -> nn.TransformerEncoderLayer:
    """A stock encoder layer with another attention put in by hand."""
    layer = nn.TransformerEncoderLayer(attention.embed_dim, attention.num_heads, 8, dropout=0.0, batch_first=True)
    layer.self_attn = attention
    return layer.eval()


@pytest.mark.parametrize("loss", LOSSES)
@given(seed=st.integers(0, 99), way=st.sampled_from((None, "deepcopy", "pickle", "torch.save")), padded=st.booleans())
@settings(max_examples=12)
def test_a_stock_encoder_layer_in_eval_runs_an_attention_that_has_something_to_lose(
    loss: str, seed: int, way: str | None, padded: bool
) -> None:
    torch.manual_seed(seed)
    attention = LOSSES[loss](8, 2)
    layer = encoder_layer(attention)
    if way is not None:
        layer = COPIES[way](layer)
    x = torch.randn(2, 4, 8)
    padding = torch.tensor([[False] * 4, [False] * 2 + [True] * 2]) if padded else None
    with torch.no_grad(), record() as ran:
        found = layer(x, src_key_padding_mask=padding)
    assert [call.layer for call in ran] == [layer.self_attn]
    trained = layer.train()(x, src_key_padding_mask=padding).detach()
    assert_same(found, trained, "output")


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True", "ignore:The PyTorch API of nested tensors")
@given(
    seed=st.integers(0, 99),
    way=st.sampled_from((None, "deepcopy", "pickle")),
    padded=st.booleans(),
    loss=st.sampled_from(sorted(LOSSES)),
)
@settings(max_examples=25)
def test_a_stock_encoder_in_eval_runs_every_layer_that_has_something_to_lose(
    seed: int, way: str | None, padded: bool, loss: str
) -> None:
    torch.manual_seed(seed)
    encoder: Any = nn.TransformerEncoder(encoder_layer(LOSSES[loss](8, 2)), num_layers=2).eval()
    if way is not None:
        encoder = COPIES[way](encoder)
    x = torch.randn(2, 4, 8)
    padding = torch.tensor([[False] * 4, [False] * 2 + [True] * 2]) if padded else None
    with torch.no_grad(), record() as ran:
        found = encoder(x, src_key_padding_mask=padding)
    assert [call.layer for call in ran] == [layer.self_attn for layer in encoder.layers]
    trained = encoder.train()(x, src_key_padding_mask=padding).detach()
    real = torch.ones(2, 4, dtype=torch.bool) if padding is None else ~padding
    assert_same(found[real], trained[real], "output")


@given(seed=st.integers(0, 99), way=st.sampled_from((None, "deepcopy", "pickle")))
@settings(max_examples=10)
def test_a_feature_set_later_and_unset_again_switches_the_layer_on_and_off(seed: int, way: str | None) -> None:
    torch.manual_seed(seed)
    layer = encoder_layer(FlashMultiHeadAttention(8, 2, batch_first=True))
    if way is not None:
        layer = COPIES[way](layer)
    x = torch.randn(2, 4, 8)

    def ran() -> list[str]:
        with torch.no_grad(), record() as calls:
            layer(x)
        return [call.backend for call in calls]

    attention: Any = layer.self_attn
    for name, value in (("backend", "naive"), ("window", (1, 1)), ("call_out_proj", True)):
        before = ran()
        setattr(attention, name, value)
        assert len(ran()) == 1
        setattr(attention, name, None if name != "call_out_proj" else False)
        assert ran() == before
        assert not attention._forward_pre_hooks
    with torch.no_grad():
        assert_same(layer(x), layer.train()(x).detach(), "output")

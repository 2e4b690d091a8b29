"""replace_mha, restore_mha and swap_report over drawn models."""

from __future__ import annotations

import copy
import io
import pickle
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.utils.parametrize as parametrize
import torch.nn.utils.prune as prune
from conftest import fewer
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import flashmha
from flashmha import FlashMultiHeadAttention, Window, replace_mha, restore_mha, swap_report
from flashmha.layer.options import STOCK_VALUES
from flashmha.testing import assert_drop_in, assert_same, judge, noise, randomized, seeds
from flashmha.testing.models import Architecture, Tree, anatomy, architectures, trees
from flashmha.testing.models.encoder import fused_architectures, without_warnings
from flashmha.testing.models.tree import WIDTH, Leaf, ModuleGroup, TreeBlock

DTYPES = (torch.float64, torch.float32, torch.bfloat16)


def options() -> st.SearchStrategy[dict[str, Any]]:
    """What ``replace_mha`` may be told, without what a CPU cannot serve."""
    bounds = st.none() | st.integers(0, 3)
    return st.fixed_dictionaries(
        {},
        optional={
            "backend": st.sampled_from((None, "naive", "sdpa", ["sdpa", "naive"])),
            "window": st.none() | st.tuples(bounds, bounds),
            "call_out_proj": st.booleans(),
        },
    )


def attentions(model: nn.Module) -> list[nn.MultiheadAttention]:
    return [module for module in model.modules() if isinstance(module, nn.MultiheadAttention)]


def attention(seed: int = 0, **more: Any) -> nn.MultiheadAttention:
    layer = nn.MultiheadAttention(WIDTH, 2, batch_first=True, dtype=torch.float64, **more)
    return randomized(layer, seed)


def inputs(seed: int = 1) -> Tensor:
    return noise(seed, 2, 4, WIDTH)


def self_attend(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x, x, x, need_weights=False)[0]


def in_eval(model: nn.Module, x: Tensor) -> Tensor:
    """The output in eval without gradients, where stock encoders bypass their attention."""
    model.eval()
    with torch.no_grad():
        return model(x)


def gradients(module: nn.Module, out: Tensor) -> dict[str, Tensor]:
    """The gradient of every parameter that trains, for one random cotangent."""
    leaves = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    found = judge.gradients_of({"out": out}, leaves, 7)
    return {name: torch.zeros_like(leaves[name]) if grad is None else grad for name, grad in found.items()}


# The swap itself


@given(tree=trees(dtypes=DTYPES), chosen=st.booleans())
def test_a_swapped_model_stands_where_the_stock_one_stood(tree: Tree, chosen: bool) -> None:
    stock, model = tree.build(), replace_mha(tree.build(), **({"backend": "naive"} if chosen else {}))
    for training in (True, False):
        stock.train(training), model.train(training)
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                assert_drop_in(stock, model, kwargs=tree.arguments())


@given(tree=trees(dtypes=DTYPES), options=options())
def test_a_swap_keeps_objects_parameters_names_flags_and_returns_the_model(tree: Tree, options: dict[str, Any]) -> None:
    model = tree.build()
    modules = dict(model.named_modules(remove_duplicate=False))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    flags = {name: (p.requires_grad, p.dtype) for name, p in parameters.items()}
    keys, training = list(model.state_dict()), {name: module.training for name, module in modules.items()}

    assert replace_mha(model, **options) is model

    after = dict(model.named_modules(remove_duplicate=False))
    assert list(after) == list(modules)
    assert all(after[name] is modules[name] for name in modules)
    now = dict(model.named_parameters(remove_duplicate=False))
    assert list(now) == list(parameters)
    assert all(now[name] is parameters[name] for name in parameters)
    assert {name: (p.requires_grad, p.dtype) for name, p in now.items()} == flags
    assert list(model.state_dict()) == keys
    assert {name: module.training for name, module in after.items()} == training
    assert all(type(layer) is FlashMultiHeadAttention for layer in attentions(model))


@given(tree=trees(), options=options(), run=st.booleans(), moved=st.booleans())
def test_restoring_leaves_classes_and_attributes_exactly_as_they_were(
    tree: Tree, options: dict[str, Any], run: bool, moved: bool
) -> None:
    model = tree.build()
    before = anatomy(model)
    replace_mha(model, **options)
    if run:
        model(tree.inputs()).sum().backward()
        in_eval(model, tree.inputs())
        model.train(tree.training)
    if moved:
        model.load_state_dict(model.state_dict())
    assert restore_mha(model) is model
    assert anatomy(model) == before


@given(architecture=architectures(), options=options(), inner=st.booleans())
def test_restoring_leaves_encoders_exactly_as_they_were(
    architecture: Architecture, options: dict[str, Any], inner: bool
) -> None:
    class Layer(nn.TransformerEncoderLayer):
        pass

    model = architecture.encoder(layer=Layer if inner else nn.TransformerEncoderLayer)
    before = anatomy(model)
    replace_mha(model, **options)
    assert anatomy(model) != before
    restore_mha(model)
    assert anatomy(model) == before


@given(tree=trees(), options=options())
def test_a_second_swap_changes_nothing_and_a_restored_model_swaps_again(tree: Tree, options: dict[str, Any]) -> None:
    model = replace_mha(tree.build(), **options)
    once = anatomy(model)
    replace_mha(model)
    assert anatomy(model) == once
    before = anatomy(restore_mha(model))
    restore_mha(model)
    assert anatomy(model) == before
    replace_mha(model)
    assert all(type(layer) is FlashMultiHeadAttention for layer in attentions(model))


@given(architecture=architectures())
def test_a_second_swap_of_an_encoder_changes_nothing(architecture: Architecture) -> None:
    model = replace_mha(architecture.encoder())
    once = anatomy(model)
    replace_mha(model)
    assert anatomy(model) == once


@given(seed=seeds(), options=options())
def test_the_root_may_itself_be_a_layer(seed: int, options: dict[str, Any]) -> None:
    layer, x = attention(seed), inputs(seed)
    expected, before = self_attend(layer, x), anatomy(layer)
    assert replace_mha(layer) is layer
    assert type(layer) is FlashMultiHeadAttention
    assert_same(self_attend(layer, x), expected)
    replace_mha(layer, **options)
    assert restore_mha(layer) is layer
    assert anatomy(layer) == before
    assert_same(self_attend(layer, x), expected)


def test_the_root_may_be_an_encoder_or_an_encoder_layer() -> None:
    for model in (Architecture().layer(), Architecture().encoder(), Architecture().transformer()):
        before = anatomy(model)
        assert replace_mha(model) is model
        assert isinstance(model, type(before[""][0].thing))
        assert all(type(layer) is FlashMultiHeadAttention for layer in attentions(model))
        restore_mha(model)
        assert anatomy(model) == before


def test_a_model_without_attention_is_left_as_it_is() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    before = anatomy(model)
    assert replace_mha(model) is model
    assert anatomy(model) == before
    assert len(swap_report(model)) == 0
    assert str(swap_report(model))


@given(tree=trees())
def test_a_layer_held_outside_the_tree_is_the_same_layer(tree: Tree) -> None:
    model = tree.build()
    held = attentions(model)
    replace_mha(model)
    assert all(one is other for one, other in zip(held, attentions(model), strict=True))
    assert all(type(layer) is FlashMultiHeadAttention for layer in held)
    restore_mha(model)
    assert all(type(layer) is nn.MultiheadAttention for layer in held)


class Ours(FlashMultiHeadAttention):
    """A subclass of ours, with a hop of its own."""

    def process_heads(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return q, k, v.flip(1)


@pytest.mark.parametrize("kind", [FlashMultiHeadAttention, Ours])
@pytest.mark.parametrize("own", [{}, {"window": (3, 0)}, {"backend": "sdpa", "need_weights": False}])
@given(options=st.sampled_from(({}, {"backend": "naive", "window": (1, 0)}, {"call_out_proj": True})))
def test_options_reach_layers_that_were_built_as_flashmha_s_and_restoring_brings_back_what_was(
    kind: type[FlashMultiHeadAttention], own: dict[str, Any], options: dict[str, Any]
) -> None:
    model = nn.ModuleDict({"built": kind(WIDTH, 2, **own), "stock": attention()})
    before = anatomy(model)
    replace_mha(model, **options)
    replace_mha(model, **options)
    alike = kind(WIDTH, 2, **(own | options))
    for name in STOCK_VALUES:
        assert repr(getattr(model["built"], name)) == repr(getattr(alike, name)), name
    told = {row.name: row.why for row in swap_report(model)}
    assert "built" in told["built"]
    assert all(f"{name}={getattr(model['built'], name)!r}" in told["built"] for name in options)
    restore_mha(model)
    assert anatomy(model) == before


class Half(FlashMultiHeadAttention):
    """A subclass that takes one option and refuses another."""

    @property
    def window(self) -> Any:  # type: ignore[override]
        return None


@pytest.mark.parametrize("swapped", [False, True])
def test_nothing_is_half_changed_where_a_layer_refuses_an_option(swapped: bool) -> None:
    model = nn.ModuleDict({"stock": attention(), "halved": Half(WIDTH, 2), "last": attention()})
    if swapped:
        replace_mha(model, backend="sdpa")
    before = anatomy(model)
    with pytest.raises(AttributeError, match="'window' of 'Half'"):
        replace_mha(model, backend="naive", window=(1, 0))
    assert anatomy(model) == before
    assert anatomy(restore_mha(model)) == anatomy(restore_mha(model))


def several() -> nn.ModuleDict:
    return nn.ModuleDict(
        {"early": attention(), "late": nn.ModuleDict({"a": attention(), "b": attention()}), "built": Half(WIDTH, 2)}
    )


CHOICES: dict[str, tuple[Any, set[str]]] = {
    "a name": ("early", {"early"}),
    "a pattern": ("late.*", {"late.a", "late.b"}),
    "several": (["early", "*.b"], {"early", "late.b"}),
    "a function": (lambda name, module: name.endswith("a"), {"late.a"}),
    "a function of the module": (lambda name, module: type(module) is Half, {"built"}),
}


@pytest.mark.parametrize(("where", "names"), CHOICES.values(), ids=CHOICES.keys())
def test_a_choice_of_layers_is_swapped_and_no_other(where: Any, names: set[str]) -> None:
    model = several()
    before = anatomy(model)
    replace_mha(model, where=where, to=Ours, backend="naive")
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            kinds = (Half,) if name == "built" else (Ours,) if name in names else (nn.MultiheadAttention,)
            assert type(module) in kinds
            assert (getattr(module, "backend", None) == "naive") == (name in names)
    rows = {row.name: row for row in swap_report(model)}
    assert all(rows[name].swapped for name in names)
    assert all(rows[name].kind == "Ours" for name in names - {"built"})
    restore_mha(model)
    assert anatomy(model) == before


def test_layers_change_class_once_more_and_go_back_to_stock() -> None:
    model, x = nn.ModuleDict({"a": attention(), "b": attention()}), inputs()
    before = anatomy(model)
    replace_mha(model)
    replace_mha(model, where="a", to=Ours)
    assert [type(layer) for layer in model.values()] == [Ours, FlashMultiHeadAttention]
    a, b = (self_attend(layer, x) for layer in model.values())
    assert not torch.allclose(a, b)
    restore_mha(model)
    assert anatomy(model) == before


def test_what_was_chosen_and_stays_is_said() -> None:
    model = nn.ModuleDict({"left": Doubling(WIDTH, 2), "built": Half(WIDTH, 2), "stock": attention()})
    with pytest.warns(UserWarning) as said:
        replace_mha(model, where="*", to=Ours)
    assert [
        str(each.message)[: len(start)]
        for each, start in zip(said, ("left: stays as it is", "built: stays a Half"), strict=True)
    ] == ["left: stays as it is", "built: stays a Half"]
    again = type("Again", (Ours,), {})
    replace_mha(model, where="stock", to=again)
    assert type(model["stock"]) is again
    assert type(restore_mha(model)["stock"]) is nn.MultiheadAttention


@pytest.mark.parametrize("build", [lambda: quantizable(), lambda: Doubling(WIDTH, 2)])
def test_a_swap_that_changes_nothing_says_why(build: Callable) -> None:
    with pytest.warns(UserWarning, match="changed nothing: one: a subclass"):
        replace_mha(nn.ModuleDict({"one": build(), "two": build()}))


def test_a_layer_that_got_grouped_heads_since_waits() -> None:
    model = nn.ModuleDict({"grouped": attention(), "other": attention()})
    replace_mha(model)
    model["grouped"].num_kv_heads = 1
    restore_mha(model)
    assert [type(layer) for layer in model.values()] == [FlashMultiHeadAttention, nn.MultiheadAttention]
    assert "grouped heads" in str(swap_report(model))
    model["grouped"].num_kv_heads = None
    assert type(restore_mha(model)["grouped"]) is nn.MultiheadAttention


class Grown(FlashMultiHeadAttention):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.norm = nn.LayerNorm(4)


@pytest.mark.parametrize(
    "arguments",
    [
        {"where": "nowhere"},
        {"where": ["early", "nowhere"]},
        {"where": lambda name, module: False},
        {"where": 3},
        {"where": [3]},
        {"where": []},
        {"to": nn.MultiheadAttention},
        {"to": FlashMultiHeadAttention(8, 2)},
        {"to": Grown},
        {"to": None},
    ],
)
def test_a_choice_that_means_nothing_raises_and_leaves_the_model_untouched(arguments: dict[str, Any]) -> None:
    model = several()
    before = anatomy(model)
    with pytest.raises((TypeError, ValueError), match="must"):
        replace_mha(model, **arguments)
    assert anatomy(model) == before


class TimmAttention(nn.Module):
    """An attention layer of another library."""


@pytest.mark.parametrize("model", [nn.Linear(2, 2), nn.Sequential(TimmAttention(), TimmAttention())])
def test_a_model_without_a_stock_layer_is_said_to_have_none(model: nn.Module) -> None:
    with pytest.warns(UserWarning, match="no nn.MultiheadAttention") as said:
        replace_mha(model)
    assert len(said) == 1
    assert isinstance(model, nn.Linear) or "TimmAttention" in str(said[0].message)


def test_tied_projections_stay_one_parameter_and_get_both_gradients() -> None:
    leaves = (Leaf(), Leaf(num_heads=4, tied=True))
    stock, model = (nn.Sequential(*build_all(leaves)) for _ in range(2))
    randomized(stock, 3), randomized(model, 3)
    replace_mha(model)
    first, second = attentions(model)
    assert first.in_proj_weight is second.in_proj_weight
    assert_drop_in(stock, model, (inputs().float(),))


def build_all(leaves: tuple[Leaf, ...]) -> list[TreeBlock]:
    earlier: list[nn.MultiheadAttention] = []
    return [leaf.build(earlier) for leaf in leaves]


# Training goes on


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, eps=1e-3),
    "RMSprop": lambda parameters: torch.optim.RMSprop(parameters, lr=0.001, eps=1e-3),
}
"""With an eps that rounding cannot fill: the bias of keys has no gradient but rounding."""


@fewer(2)
@given(tree=trees(), optimizer=st.sampled_from(sorted(OPTIMIZERS)), at=st.integers(0, 3), back=st.booleans())
def test_an_optimizer_goes_on_through_a_swap_in_the_middle_of_training(
    tree: Tree, optimizer: str, at: int, back: bool
) -> None:
    runs: list[dict[str, Tensor]] = []
    for swapped in (False, True):
        model = tree.build().train()
        steps = OPTIMIZERS[optimizer](model.parameters())
        for step in range(4):
            if swapped and step == at:
                replace_mha(model)
            if swapped and back and step == at + 1:
                restore_mha(model)
            steps.zero_grad()
            torch.tanh(model(tree.inputs())).square().mean().backward()
            steps.step()
        runs.append({name: parameter.detach() for name, parameter in model.named_parameters()})
    torch.testing.assert_close(runs[1], runs[0], rtol=1e-7, atol=1e-7)


# Options


@given(tree=trees(), options=options())
def test_options_reach_every_layer(tree: Tree, options: dict[str, Any]) -> None:
    model = replace_mha(tree.build(), **options)
    for layer in attentions(model):
        for name, value in options.items():
            got = getattr(layer, name)
            if name == "window" and value is not None:
                assert (got.left, got.right) == value
            else:
                assert got == value


@given(seed=seeds(), options=options())
def test_a_swap_with_options_computes_what_a_layer_built_with_them_computes(seed: int, options: dict[str, Any]) -> None:
    swapped, x = replace_mha(attention(seed), **options), inputs(seed)
    built = FlashMultiHeadAttention(WIDTH, 2, batch_first=True, dtype=torch.float64, **options)
    built.load_state_dict(swapped.state_dict())
    assert_same(self_attend(swapped, x), self_attend(built, x))


@given(tree=trees(), first=options(), second=options())
def test_a_second_swap_sets_the_options_it_names_and_one_restore_undoes_both(
    tree: Tree, first: dict[str, Any], second: dict[str, Any]
) -> None:
    model = tree.build()
    before = anatomy(model)
    replace_mha(replace_mha(model, **first), **second)
    both = {**first, **second}
    for layer in attentions(model):
        window = both.get("window")
        assert layer.backend == both.get("backend")
        assert layer.call_out_proj == both.get("call_out_proj", False)
        assert (layer.window and (layer.window.left, layer.window.right)) == window
    restore_mha(model)
    assert anatomy(model) == before


BAD_OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": ({"windows": (1, 0)}, "options must be among .*, got windows"),
    "of the constructor": ({"num_kv_heads": 1}, "options must be among .*, got num_kv_heads"),
    "of stock": ({"dropout": 0.5}, "options must be among .*, got dropout"),
    "no backend of that name": ({"backend": "no such backend"}, "backend must be one of .*, got 'no such backend'"),
    "one of several backends": (
        {"backend": ["naive", "no such backend"]},
        "backend must be one of .*, got 'no such backend'",
    ),
    "no backend at all": ({"backend": []}, r"backend must name at least one backend, got \[\]"),
    "backend of another type": ({"backend": 5}, "backend must be a name, .*, got 5"),
    "window of another type": ({"window": 3}, "window must be .*, got 3"),
    "window of three": ({"window": (1, 2, 3)}, r"window must be .*, got \(1, 2, 3\)"),
    "window of words": ({"window": ("left", 0)}, "left must be .*, got 'left'"),
    "a good one and a bad one": (
        {"window": (1, 0), "backend": "no such backend"},
        "backend must be one of .*, got 'no such backend'",
    ),
}


@pytest.mark.parametrize(("bad", "said"), BAD_OPTIONS.values(), ids=BAD_OPTIONS.keys())
def test_a_bad_option_raises_and_leaves_the_model_untouched(bad: dict[str, Any], said: str) -> None:
    model = nn.Sequential(Architecture().encoder(), attention())
    before = anatomy(model)
    with pytest.raises((TypeError, ValueError), match=said):
        replace_mha(model, **bad)
    assert anatomy(model) == before
    replace_mha(model, window=(2, 0))
    swapped = anatomy(model)
    with pytest.raises((TypeError, ValueError), match=said):
        replace_mha(model, **bad)
    assert anatomy(model) == swapped


# What people hang on layers


@fewer(2)
@given(
    kinds=st.sets(st.sampled_from(("pre", "pre kwargs", "post", "post kwargs", "always", "backward", "backward pre"))),
    training=st.booleans(),
    when=st.sampled_from(("before", "after")),
)
def test_hooks_fire_as_often_and_do_the_same_after_a_swap(kinds: set[str], training: bool, when: str) -> None:
    def run(layer: nn.Module) -> Tensor:
        x = inputs().requires_grad_()
        out = self_attend(layer, x)
        out.sum().backward()
        return torch.stack([out.detach(), x.grad])

    stock, stock_log = attention().train(training), []
    hook(stock, kinds, stock_log)
    expected = run(stock)
    assert sorted(stock_log) == sorted(kinds)

    model, log = attention().train(training), []
    if when == "after":
        replace_mha(model)
    hook(model, kinds, log)
    for change in (replace_mha, restore_mha):
        log.clear()
        assert_same(run(change(model)), expected)
        assert log == stock_log


def hook(layer: nn.Module, kinds: set[str], log: list[str]) -> None:
    """Hooks that write down that they ran; those of forward double what they see."""

    def seen(kind: str, answer: Any = None) -> Any:
        log.append(kind)
        return answer

    if "pre" in kinds:
        layer.register_forward_pre_hook(lambda module, args: seen("pre", tuple(2 * x for x in args)))
    if "pre kwargs" in kinds:
        layer.register_forward_pre_hook(
            lambda module, args, kwargs: seen("pre kwargs", (args, {**kwargs, "need_weights": True})), with_kwargs=True
        )
    if "post" in kinds:
        layer.register_forward_hook(lambda module, args, out: seen("post", (2 * out[0], out[1])))
    if "post kwargs" in kinds:
        layer.register_forward_hook(lambda module, args, kwargs, out: seen("post kwargs"), with_kwargs=True)
    if "always" in kinds:
        layer.register_forward_hook(lambda module, args, out: seen("always"), always_call=True)
    if "backward" in kinds:
        layer.register_full_backward_hook(lambda module, grad_in, grad_out: seen("backward"))
    if "backward pre" in kinds:
        layer.register_full_backward_pre_hook(lambda module, grad_out: seen("backward pre", (3 * grad_out[0], None)))


def test_hooks_on_state_dicts_survive() -> None:
    layer, log = attention(), []
    layer.register_state_dict_post_hook(lambda module, state, prefix, meta: log.append("state_dict"))
    layer.register_load_state_dict_pre_hook(lambda *arguments: log.append("load before"))
    layer.register_load_state_dict_post_hook(lambda module, keys: log.append("load after"))
    replace_mha(layer)
    layer.load_state_dict(layer.state_dict())
    assert log == ["state_dict", "load before", "load after"]


@given(
    names=st.sets(st.sampled_from(("note", "tag", "cache", "scale_factor", "owner", "featured")), min_size=1),
    seed=seeds(),
)
def test_user_attributes_survive_a_swap_and_a_restore(names: set[str], seed: int) -> None:
    layer = attention(seed)
    things = {name: object() for name in names}
    for name, thing in things.items():
        setattr(layer, name, thing)
    layer.register_buffer("counter", torch.zeros(1))
    layer.adapter = nn.Linear(2, 2)
    for change in (replace_mha, restore_mha):
        change(layer)
        assert all(getattr(layer, name) is thing for name, thing in things.items())
        assert [name for name, _ in layer.named_buffers()] == ["counter"]
        assert isinstance(layer.adapter, nn.Linear)


def a_function(*arguments: Any) -> str:
    return "the user's own"


OUR_NAMES = {
    "window": 5,
    "backend": "mine",
    "num_kv_heads": 1,
    "call_out_proj": "never",
    "project": a_function,
    "process_heads": a_function,
    "merge": nn.Linear(WIDTH, WIDTH),
    "to_torch": nn.Linear(WIDTH, WIDTH),
}


@pytest.mark.parametrize(("name", "value"), OUR_NAMES.items(), ids=OUR_NAMES.keys())
def test_a_layer_with_an_attribute_that_bears_one_of_our_names_is_left_and_reported(name: str, value: Any) -> None:
    layer, x = attention(), inputs()
    setattr(layer, name, value)
    expected, before = self_attend(layer, x), anatomy(layer)
    replace_mha(layer)
    (row,) = swap_report(layer)
    assert not row.swapped and name in row.why
    assert_same(self_attend(layer, x), expected)
    assert anatomy(layer) == before


def test_a_forward_put_on_the_instance_keeps_running() -> None:
    layer, x = attention(), inputs()
    stock_forward = layer.forward

    def tripled(self: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        out, weights = stock_forward(*args, **kwargs)
        return 3 * out, weights

    layer.forward = types.MethodType(tripled, layer)
    expected, before = self_attend(layer, x), anatomy(layer)
    replace_mha(layer)
    assert_same(self_attend(layer, x), expected)
    restore_mha(layer)
    assert anatomy(layer) == before


def test_pruned_and_weight_normed_layers_swap_and_go_on() -> None:
    stock, model, x = attention(), attention(), inputs()
    for layer in (stock, model):
        prune.l1_unstructured(layer, "in_proj_weight", amount=0.5)
        with without_warnings():
            torch.nn.utils.weight_norm(layer.out_proj)
            torch.nn.utils.weight_norm(layer, "in_proj_bias", dim=None)
    replace_mha(model)
    out, expected = self_attend(model, x), self_attend(stock, x)
    assert_same(out, expected)
    assert_same(gradients(model, out), gradients(stock, expected))


# What is left alone


class Doubling(nn.MultiheadAttention):
    """A user's subclass with code of its own."""

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        out, weights = super().forward(*args, **kwargs)
        return 2 * out, weights


class FSDPFriendlyAttention(nn.MultiheadAttention):
    """A user's subclass whose name begins like those that FSDP makes."""


class Twice(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def quantizable() -> nn.MultiheadAttention:
    with without_warnings():
        from torch.ao.nn.quantizable import MultiheadAttention

        return MultiheadAttention(WIDTH, 2, batch_first=True)


def parametrized() -> nn.MultiheadAttention:
    layer = attention()
    parametrize.register_parametrization(layer, "in_proj_weight", Twice())
    return layer


LEFT = {
    "a subclass": (lambda: Doubling(WIDTH, 2), "subclass"),
    "a subclass called FSDP...": (lambda: FSDPFriendlyAttention(WIDTH, 2), "subclass"),
    "quantizable": (quantizable, "subclass"),
    "parametrized": (parametrized, "swap first"),
}


@pytest.mark.parametrize(("build", "why"), LEFT.values(), ids=LEFT.keys())
def test_what_cannot_be_swapped_is_left_as_it_is_and_reported_with_the_reason(build: Callable, why: str) -> None:
    model = nn.ModuleDict({"left": build(), "other": attention()})
    before = anatomy(model)
    told = {row.name: row for row in swap_report(model)}
    assert not told["left"].swapped
    assert why in told["left"].why
    replace_mha(model, window=(1, 0))
    after = anatomy(model)
    assert {name: after[name] for name in after if name.startswith("left")} == {
        name: before[name] for name in before if name.startswith("left")
    }
    rows = {row.name: row for row in swap_report(model)}
    assert rows["left"] == told["left"]
    assert rows["other"].swapped
    restore_mha(model)
    assert anatomy(model) == before


@pytest.mark.parametrize("build", [quantizable, parametrized, lambda: Doubling(WIDTH, 2, batch_first=True)])
def test_an_encoder_layer_around_what_is_left_computes_as_before(build: Callable) -> None:
    encoder = Architecture(training=False).encoder()
    for layer in encoder.layers:
        layer.self_attn = build().double().eval()
    x = inputs()
    with torch.no_grad():
        expected = encoder(x)
        replace_mha(encoder)
        assert_same(encoder(x), expected)


@given(seed=seeds(), target=st.sampled_from(("in_proj_weight", "in_proj_bias", "out_proj")), training=st.booleans())
def test_parametrizing_after_the_swap_works(seed: int, target: str, training: bool) -> None:
    stock, model, x = attention(seed).train(training), replace_mha(attention(seed)).train(training), inputs(seed)
    for layer in (stock, model):
        if target == "out_proj":
            torch.nn.utils.parametrizations.weight_norm(layer.out_proj)
        else:
            parametrize.register_parametrization(layer, target, Twice())
    out, expected = self_attend(model, x), self_attend(stock, x)
    assert_same(out, expected)
    assert_same(gradients(model, out), gradients(stock, expected))
    assert [row.swapped for row in swap_report(model)] == [True]


def test_a_layer_parametrized_after_the_swap_can_still_be_restored() -> None:
    layer = replace_mha(attention())
    before = anatomy(attention())[""][2].keys()
    parametrize.register_parametrization(layer, "in_proj_weight", Twice())
    restore_mha(layer)
    parametrize.remove_parametrizations(layer, "in_proj_weight")
    restore_mha(layer)  # if the first one had to wait
    assert type(layer) is nn.MultiheadAttention
    assert vars(layer).keys() == before


def test_options_reach_a_layer_parametrized_after_the_swap() -> None:
    layer = replace_mha(attention())
    parametrize.register_parametrization(layer, "in_proj_weight", Twice())
    replace_mha(layer, window=(1, 0))
    assert layer.window is not None


def test_parametrized_output_projections_do_not_hinder_the_swap() -> None:
    layer, x = attention(), inputs()
    torch.nn.utils.parametrizations.weight_norm(layer.out_proj)
    expected = self_attend(layer, x)
    replace_mha(layer)
    assert type(layer) is FlashMultiHeadAttention
    assert_same(self_attend(layer, x), expected)


# FSDP, in one process on a CPU


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("needs a build of torch with gloo")
    store = Path(tmp_path_factory.mktemp("gloo")) / "store"
    dist.init_process_group("gloo", store=dist.FileStore(str(store), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def fsdp1(module: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel

    # without a device FSDP1 wants an accelerator
    with without_warnings():
        return FullyShardedDataParallel(module, device_id=torch.device("cpu"))


def fsdp2(module: nn.Module) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    return fully_shard(module, mesh=init_device_mesh("cpu", (1,)))


@pytest.mark.cpu("shards over gloo")
@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("where", ["the layer", "around it"])
def test_what_fsdp_1_wraps_is_left_and_reported(where: str) -> None:
    model = Architecture().layer()
    model.self_attn = fsdp1(model.self_attn) if where == "the layer" else model.self_attn
    model = fsdp1(model) if where == "around it" else model
    x = inputs()
    expected = model(x)
    replace_mha(model)
    assert [type(layer) for layer in attentions(model)] == [nn.MultiheadAttention]
    rows = [row for row in swap_report(model) if "MultiheadAttention" in row.kind]
    assert [(row.swapped, "FSDP" in row.why and "swap first" in row.why) for row in rows] == [(False, True)]
    assert_same(model(x), expected)


@pytest.mark.cpu("shards over gloo")
@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("where", ["the layer", "around it"])
def test_what_fsdp_2_wraps_is_left_and_reported(where: str) -> None:
    model = Architecture().layer()
    fsdp2(model.self_attn if where == "the layer" else model)
    x = inputs()
    expected = model(x)
    kind = type(model.self_attn)
    replace_mha(model)
    assert type(model.self_attn) is kind
    rows = [row for row in swap_report(model) if "MultiheadAttention" in row.kind]
    assert [(row.swapped, "FSDP" in row.why and "swap first" in row.why) for row in rows] == [(False, True)]
    assert_same(model(x), expected)


@pytest.mark.cpu("shards over gloo")
@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("wrap", [fsdp1, fsdp2])
def test_wrapping_after_the_swap_works(wrap: Callable[[nn.Module], nn.Module]) -> None:
    stock, model, x = Architecture().layer(), replace_mha(Architecture().layer()), inputs()
    wrapped = wrap(model)
    with flashmha.record() as calls:
        out = wrapped(x)
    assert len(calls) == 1
    assert_same(out.detach(), stock(x).detach())
    out.sum().backward()
    assert_same(in_eval(wrapped, x), in_eval(stock, x))


@pytest.mark.cpu("shards over gloo")
@pytest.mark.usefixtures("group")
def test_layers_sharded_after_the_swap_are_restored_or_still_known_as_swapped() -> None:
    model = replace_mha(Architecture().layer())
    fsdp2(model.self_attn)
    restore_mha(model)
    row = next(row for row in swap_report(model) if row.name == "self_attn")
    assert row.swapped == isinstance(model.self_attn, FlashMultiHeadAttention)
    assert "built as one" not in row.why


# The report


@given(tree=trees(), options=options())
def test_the_report_has_one_row_per_layer_and_swapped_ones_are_those_that_run(
    tree: Tree, options: dict[str, Any]
) -> None:
    model = tree.build()
    names = [name for name, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)]
    before = swap_report(model)
    assert [(row.name, row.swapped, bool(row.why)) for row in before] == [(name, False, True) for name in names]
    replace_mha(model, **options)
    report = swap_report(model)
    assert [(row.name, row.swapped, bool(row.why)) for row in report] == [(name, True, True) for name in names]
    modules = dict(model.named_modules())
    with flashmha.record() as calls:
        in_eval(model, tree.inputs())
    assert {id(call.layer) for call in calls} == {id(modules[row.name]) for row in report if row.swapped}
    assert len(str(report).splitlines()) == len(report)
    restore_mha(model)
    assert swap_report(model) == before


def test_a_layer_whose_forward_was_put_on_the_instance_is_not_reported_as_running_here() -> None:
    layer = attention()
    stock_forward = layer.forward
    layer.forward = lambda *args, **kwargs: stock_forward(*args, **kwargs)
    replace_mha(layer)
    with flashmha.record() as calls:
        self_attend(layer, inputs())
    (row,) = swap_report(layer)
    assert calls or not row.swapped or "forward" in row.why


# Copies


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = (copy.deepcopy, pickled, saved)


@pytest.mark.parametrize("duplicate", COPIES, ids=["deepcopy", "pickle", "torch.save"])
@fewer(3)
@given(tree=trees(), options=options())
def test_copies_of_swapped_models_compute_the_same_and_can_be_restored(
    duplicate: Callable[[nn.Module], nn.Module], tree: Tree, options: dict[str, Any]
) -> None:
    stock, model, x = tree.build(), replace_mha(tree.build(), **options), tree.inputs()
    twin = duplicate(model)
    assert_same(twin(x), model(x))
    assert_same(in_eval(twin, x), in_eval(model, x))
    twin.train(tree.training)
    restore_mha(twin)
    assert all(type(layer) is FlashMultiHeadAttention for layer in attentions(model))
    assert shape_of(twin) == shape_of(stock)
    assert_same(twin(x), stock.train(tree.training)(x))


@pytest.mark.parametrize("duplicate", COPIES, ids=["deepcopy", "pickle", "torch.save"])
def test_copies_of_swapped_encoders_never_bypass_their_attention(
    duplicate: Callable[[nn.Module], nn.Module],
) -> None:
    stock, model, x = Architecture().encoder(), replace_mha(Architecture().encoder()), inputs()
    twin = duplicate(model)
    with flashmha.record() as calls:
        assert_same(in_eval(twin, x), in_eval(stock, x))
    assert len(calls) == 2
    assert shape_of(restore_mha(twin)) == shape_of(stock)


def shape_of(model: nn.Module) -> dict[str, Any]:
    """Classes and names of attributes, but not whose objects they are."""
    return {
        name: (type(module), sorted(vars(module)), list(module._forward_pre_hooks))
        for name, module in model.named_modules(remove_duplicate=False)
    }


# Wrappers


def compiled(module: nn.Module) -> Any:
    return torch.compile(module, backend="eager")


class Transparent(nn.Module):
    """A wrapper that passes calls and attributes on, as checkpoint wrappers and adapters do."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


def test_a_compiled_model_is_swapped_through_its_wrapper_after_its_first_call_too() -> None:
    torch._dynamo.reset()
    tree = Tree(ModuleGroup("sequential", (Leaf(mask="causal"), Leaf(num_heads=4, need_weights=True))))
    stock, model, x = tree.build(), tree.build(), tree.inputs()
    wrapper = compiled(model)
    for change in (lambda module: module, replace_mha, restore_mha):
        assert change(wrapper) is wrapper
        assert_same(wrapper(x), stock(x))
    replace_mha(wrapper, window=(0, 0))
    assert float((model(x) - stock(x)).abs().max().detach()) > 1e-3
    assert_same(wrapper(x), model(x))


@pytest.mark.parametrize("wrap", [compiled, Transparent])
def test_a_compiled_or_wrapped_layer_can_be_the_root(wrap: Callable[[nn.Module], nn.Module]) -> None:
    torch._dynamo.reset()
    layer, x = attention(), inputs()
    wrapper = wrap(layer)
    expected = self_attend(wrapper, x)
    replace_mha(wrapper)
    assert type(layer) is FlashMultiHeadAttention
    assert_same(self_attend(wrapper, x), expected)
    restore_mha(wrapper)
    assert type(layer) is nn.MultiheadAttention
    assert_same(self_attend(wrapper, x), expected)


@pytest.mark.parametrize("wrap", [compiled, Transparent])
@pytest.mark.parametrize("what", ["the attention", "the layers", "the encoder"])
def test_no_wrapper_keeps_an_encoder_from_calling_its_swapped_attention_in_eval(what: str, wrap: Callable) -> None:
    encoder: Any = Architecture().encoder()
    if what == "the attention":
        for layer in encoder.layers:
            layer.self_attn = wrap(layer.self_attn)
    elif what == "the layers":
        for i, layer in enumerate(list(encoder.layers)):
            encoder.layers[i] = wrap(layer)
    model = wrap(encoder) if what == "the encoder" else encoder
    with torch.compiler.set_stance("force_eager"):  # compiled code is not recorded
        expected = in_eval(model, inputs())
        replace_mha(model)
        with flashmha.record() as calls:
            assert_same(in_eval(model, inputs()), expected)
        assert [call.layer for call in calls] == attentions(model)
        restore_mha(model)
        assert_same(in_eval(model, inputs()), expected)


@pytest.mark.parametrize("wrap", [compiled, Transparent])
def test_an_encoder_over_wrapped_layers_keeps_its_padding_mask_boolean(wrap: Callable) -> None:
    encoder = Architecture(nested=False).encoder()
    for i, layer in enumerate(list(encoder.layers)):
        encoder.layers[i] = wrap(layer)
    replace_mha(encoder)
    padding = torch.tensor([[False, False, False, True]] * 2)
    with torch.compiler.set_stance("force_eager"), flashmha.record() as calls:
        encoder.eval()(inputs(), src_key_padding_mask=padding)
    assert ["key_padding" in call.spec.features for call in calls] == [True, True]


# PEFT


class LowRank(nn.Module):
    """PEFT's way with an attention layer, by hand: a merged tensor takes the parameter's place for each forward.

    The tensor has the parameter's name and is no parameter, so that gradients flow to the adapter through it.
    """

    def __init__(self, base: nn.MultiheadAttention, seed: int) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Parameter(noise(seed, 2, WIDTH))
        self.up = nn.Parameter(noise(seed + 1, 3 * WIDTH, 2))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)

    def forward(self, query: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        base = self.base
        frozen = base.in_proj_weight
        merged = frozen.detach() + self.up @ self.down
        del base.in_proj_weight
        base.in_proj_weight = merged
        try:
            return base(query, *args, **kwargs)
        finally:
            del base.in_proj_weight
            base.register_parameter("in_proj_weight", frozen)


def adapt(encoder: Any) -> Any:
    for i, layer in enumerate(encoder.layers):
        layer.self_attn = LowRank(layer.self_attn, seed=i)
    return encoder


@fewer(4)
@given(seed=seeds())
def test_an_adapter_that_swaps_its_merged_weight_in_works_on_a_swapped_layer(seed: int) -> None:
    stock, model, x = LowRank(attention(seed), seed), LowRank(replace_mha(attention(seed)), seed), inputs(seed)
    for training in (True, False):
        stock.train(training), model.train(training)
        out, expected = self_attend(model, x), self_attend(stock, x)
        assert_same(out, expected)
        grads = gradients(model, out)
        assert set(grads) == {"down", "up"}
        assert_same(grads, gradients(stock, expected))
    restore_mha(model)
    assert shape_of(model) == shape_of(stock)
    assert dict(model.named_parameters()).keys() == dict(stock.named_parameters()).keys()


@fewer(4)
@given(architecture=fused_architectures(), order=st.sampled_from(("swap, adapt", "adapt, swap")))
def test_adapters_in_an_encoder_count_in_eval_whichever_comes_first(architecture: Architecture, order: str) -> None:
    stock, x = adapt(architecture.encoder()), architecture.inputs(2, 4)
    model = architecture.encoder()
    model = adapt(replace_mha(model)) if order == "swap, adapt" else replace_mha(adapt(model))
    expected = stock.train()(x).detach()
    assert_same(model.train()(x).detach(), expected)
    with flashmha.record() as calls:
        assert_same(in_eval(model, x), expected)
    assert len(calls) == architecture.num_layers


@fewer(4)
@given(architecture=fused_architectures())
def test_adapters_on_a_featured_layer_in_a_stock_encoder_count_in_eval(architecture: Architecture) -> None:
    encoder, x = architecture.encoder(), architecture.inputs(2, 4)
    for layer in encoder.layers:
        layer.self_attn = FlashMultiHeadAttention(
            WIDTH, architecture.num_heads, batch_first=True, window=(1, 0), dtype=torch.float64
        )
    adapt(encoder)
    expected = encoder.train()(x).detach()
    with flashmha.record() as calls:
        assert_same(in_eval(encoder, x), expected)
    assert [call.layer.window.left for call in calls] == [1] * architecture.num_layers


class Adaptable(nn.Module):
    """A model with an encoder inside, as peft wants to be given one."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Architecture(nested=False).encoder()

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x)


def lora(model: nn.Module) -> Any:
    peft = pytest.importorskip("peft", reason="needs pip install peft; its way of working is tested by hand above")
    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules=["self_attn"], r=2, init_lora_weights=False)
    return peft.get_peft_model(model, config).double()


@pytest.mark.parametrize("order", ["swap, adapt", "adapt, swap"])
def test_peft_adapts_a_swapped_encoder_and_its_adapters_count_in_eval(order: str) -> None:
    stock, x = lora(Adaptable()), inputs()
    model = lora(replace_mha(Adaptable())) if order == "swap, adapt" else replace_mha(lora(Adaptable()))
    out, expected = model.train()(x), stock.train()(x)
    assert_same(out, expected)
    assert_same(gradients(model, out), gradients(stock, expected))
    with flashmha.record() as calls:
        assert_same(in_eval(model, x), expected.detach())
    assert len(calls) == 2


def test_peft_merges_into_a_swapped_layer_that_is_then_restored() -> None:
    model, x = lora(replace_mha(Adaptable())), inputs()
    expected = in_eval(model, x)
    merged = model.merge_and_unload()
    assert_same(in_eval(merged, x), expected)
    restore_mha(merged)
    assert all(type(layer) is nn.MultiheadAttention for layer in attentions(merged))
    assert_same(in_eval(merged, x), expected)


def test_peft_adapts_a_featured_layer_put_into_a_stock_encoder_by_hand() -> None:
    model = Adaptable()
    for layer in model.encoder.layers:
        layer.self_attn = FlashMultiHeadAttention(WIDTH, 2, batch_first=True, window=Window(1, 0), dtype=torch.float64)
    adapted, x = lora(model), inputs()
    expected = adapted.train()(x).detach()
    with flashmha.record() as calls:
        assert_same(in_eval(adapted, x), expected)
    assert len(calls) == 2

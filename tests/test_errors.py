"""Bad input, drawn: the stock class's errors with its words, and no trace left behind."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import pickle
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn

from flashmha import (
    AttentionSpec,
    Backend,
    FlashMultiHeadAttention,
    KeyLengths,
    Limits,
    NoBackendError,
    Window,
    attention,
    backends,
    causal,
    record,
    register,
    replace_mha,
)
from flashmha.backends import unregister
from flashmha.problem.wording import summarize_error
from flashmha.testing import Blueprint, Call, assert_same, blueprints, problems

Arguments = dict[str, Any]
Spoiler = Callable[[Blueprint, Call, Arguments], Iterable[Arguments]]


def error_of(layer: nn.Module, arguments: Arguments) -> Exception:
    """What a layer raises."""
    with pytest.raises(Exception) as caught:
        layer(**arguments)
    return caught.value


# One function for each way to spoil a good call: what to change, perhaps in several forms.


def query_of_another_rank(blueprint: Blueprint, call: Call, good: Arguments) -> Iterable[Arguments]:
    yield {"query": good["query"].flatten()}
    yield {"query": good["query"][None, None]}


def key_or_value_of_another_rank(blueprint: Blueprint, call: Call, good: Arguments) -> Iterable[Arguments]:
    yield {"key": good["key"][0]}
    yield {"value": good["value"][None]}


def query_of_another_width(blueprint: Blueprint, call: Call, good: Arguments) -> Iterable[Arguments]:
    yield {"query": torch.cat((good["query"],) * 2, dim=-1)}


def key_longer_than_value(blueprint: Blueprint, call: Call, good: Arguments) -> Iterable[Arguments]:
    axis = 1 if call.batch is not None and blueprint.batch_first else 0
    yield {"key": torch.cat((good["key"],) * 2, dim=axis)}
    yield {"value": torch.cat((good["value"],) * 2, dim=axis)}


def key_and_value_of_another_width(blueprint: Blueprint, call: Call, good: Arguments) -> Iterable[Arguments]:
    yield {"key": torch.cat((good["key"],) * 2, dim=-1)}
    yield {"value": torch.cat((good["value"],) * 2, dim=-1)}


def integer_masks(blueprint: Blueprint, call: Call, good: Arguments) -> Iterable[Arguments]:
    good = dataclasses.replace(call, padding="bool", attn_mask="bool 2-D").arguments(blueprint)
    for dtype in (torch.uint8, torch.int64, torch.int32):
        yield {"key_padding_mask": good["key_padding_mask"].to(dtype)}
        yield {"attn_mask": good["attn_mask"].to(dtype)}


def padding_of_another_rank(blueprint: Blueprint, call: Call, good: Arguments) -> Iterable[Arguments]:
    mask = dataclasses.replace(call, padding="bool").arguments(blueprint)["key_padding_mask"]
    yield {"key_padding_mask": mask[None]}
    yield {"key_padding_mask": mask[0]}


def padding_of_another_size(blueprint: Blueprint, call: Call, good: Arguments) -> Iterable[Arguments]:
    mask = dataclasses.replace(call, padding="bool").arguments(blueprint)["key_padding_mask"]
    yield {"key_padding_mask": torch.cat((mask, mask), dim=-1), "is_causal": False}
    if call.batch is not None:
        yield {"key_padding_mask": torch.cat((mask, mask)), "is_causal": False}


def attn_mask_of_another_rank(blueprint: Blueprint, call: Call, good: Arguments) -> Iterable[Arguments]:
    mask = dataclasses.replace(call, attn_mask="bool 2-D").arguments(blueprint)["attn_mask"]
    yield {"attn_mask": mask[0]}
    yield {"attn_mask": mask[None, None, None]}
    if call.batch is None:
        yield {"attn_mask": mask[None, None]}


def attn_mask_of_another_size(blueprint: Blueprint, call: Call, good: Arguments) -> Iterable[Arguments]:
    for kind in ("bool 2-D", "float 2-D", "bool 3-D"):
        mask = dataclasses.replace(call, attn_mask=kind).arguments(blueprint)["attn_mask"]
        yield {"attn_mask": torch.cat((mask, mask), dim=-1), "is_causal": False}
        yield {"attn_mask": torch.cat((mask, mask), dim=-2), "is_causal": False}
        if mask.dim() == 3:
            yield {"attn_mask": torch.cat((mask, mask)), "is_causal": False}
            if len(mask) > 1:
                yield {"attn_mask": mask[:1], "is_causal": False}
            if call.batch is not None and blueprint.num_heads > 1:
                yield {"attn_mask": mask[: call.batch], "is_causal": False}


def the_hint_without_a_mask(blueprint: Blueprint, call: Call, good: Arguments) -> Iterable[Arguments]:
    yield {"attn_mask": None, "is_causal": True}


LITERAL: tuple[Spoiler, ...] = (
    query_of_another_rank,
    key_or_value_of_another_rank,
    query_of_another_width,
    integer_masks,
    padding_of_another_rank,
    padding_of_another_size,
    attn_mask_of_another_rank,
    attn_mask_of_another_size,
    the_hint_without_a_mask,
)
"""Errors whose type and text are the stock class's."""

SAYS_MORE: tuple[Spoiler, ...] = (
    query_of_another_width,
    integer_masks,
    padding_of_another_rank,
    padding_of_another_size,
    attn_mask_of_another_rank,
    attn_mask_of_another_size,
)
"""Those that go on behind the stock class's text, with what fits."""


def key_of_another_batch(blueprint: Blueprint, call: Call, good: Arguments) -> Iterable[Arguments]:
    if call.batch is not None:
        axis = 0 if blueprint.batch_first else 1
        yield {name: torch.cat((good[name],) * 2, dim=axis) for name in ("key", "value")}


def inputs_of_another_dtype(blueprint: Blueprint, call: Call, good: Arguments) -> Iterable[Arguments]:
    other = torch.float32 if blueprint.dtype == torch.float64 else torch.float64
    yield {name: good[name].to(other) for name in ("query", "key", "value")}
    yield {"query": good["query"].to(other)}
    yield {name: good[name].to(other) for name in ("key", "value")}


def float_mask_of_another_dtype(blueprint: Blueprint, call: Call, good: Arguments) -> Iterable[Arguments]:
    good = dataclasses.replace(call, padding="float", attn_mask="float 2-D", is_causal=False).arguments(blueprint)
    plain = {"key_padding_mask": None, "attn_mask": None, "need_weights": True, "is_causal": False}
    for name in ("key_padding_mask", "attn_mask"):
        yield {**plain, name: good[name].to(torch.float64 if blueprint.dtype != torch.float64 else torch.float32)}


TYPE_ONLY: tuple[Spoiler, ...] = (
    key_longer_than_value,  # stock prints the shapes of its own transposed copies
    key_and_value_of_another_width,
    key_of_another_batch,
    inputs_of_another_dtype,
    float_mask_of_another_dtype,
)
"""Errors whose type is the stock class's, with words of our own."""

whole = {"batches": (2, None, 1, 3), "seqlens": (3, 1, 2)}
plain_masks = {"paddings": ("none",), "attn_masks": ("none",), "grad": (False,)}


@pytest.mark.parametrize("spoiler", LITERAL, ids=lambda spoiler: spoiler.__name__)
@given(problem=problems(**whole, **plain_masks))
def test_an_error_is_the_stock_error_word_for_word(spoiler: Spoiler, problem: tuple[Blueprint, Call]) -> None:
    blueprint, call = problem
    stock, ours = blueprint.build(), blueprint.build(FlashMultiHeadAttention).train(call.training)
    good = call.arguments(blueprint)
    for change in spoiler(blueprint, call, good):
        theirs, mine = error_of(stock, {**good, **change}), error_of(ours, {**good, **change})
        assert type(mine) is type(theirs) and str(mine).startswith(str(theirs))
        assert spoiler in SAYS_MORE or str(mine) == str(theirs)


@pytest.mark.parametrize("spoiler", TYPE_ONLY, ids=lambda spoiler: spoiler.__name__)
@given(problem=problems(**whole, **plain_masks))
def test_an_error_is_of_the_type_of_the_stock_error(spoiler: Spoiler, problem: tuple[Blueprint, Call]) -> None:
    blueprint, call = problem
    stock, ours = blueprint.build(), blueprint.build(FlashMultiHeadAttention).train(call.training)
    good = call.arguments(blueprint)
    for change in spoiler(blueprint, call, good):
        assert type(error_of(ours, {**good, **change})) is type(error_of(stock, {**good, **change}))


@given(
    problem=problems(layers=blueprints(packed=(False,)), **whole, **plain_masks),
    which=st.sampled_from(("key", "value")),
)
def test_a_wrong_kdim_or_vdim_is_named_as_in_stock(problem: tuple[Blueprint, Call], which: str) -> None:
    blueprint, call = problem
    assume(set(blueprint.widths) != {blueprint.embed_dim})
    good = call.arguments(blueprint)
    good[which] = torch.cat((good[which],) * 2, dim=-1)
    theirs, mine = error_of(blueprint.build(), good), error_of(blueprint.build(FlashMultiHeadAttention), good)
    assert type(mine) is type(theirs) and str(mine).startswith(str(theirs))
    assert f"expecting {which} weights shape of" in str(mine)


@given(problem=problems(layers=blueprints(extra_columns=(True,)), **whole, **plain_masks), lost=st.sampled_from("kv"))
def test_one_extra_key_without_its_value_is_refused_as_in_stock(problem: tuple[Blueprint, Call], lost: str) -> None:
    blueprint, call = problem
    stock, ours = blueprint.build(), blueprint.build(FlashMultiHeadAttention)
    for layer in (stock, ours):
        setattr(layer, f"bias_{lost}", None)
    good = call.arguments(blueprint)
    theirs, mine = error_of(stock, good), error_of(ours, good)
    assert type(mine) is type(theirs)
    assert str(mine) == (str(theirs) or str(mine))  # the assertion of torch 2.8 and 2.9 has no text
    given, absent = ("v", "k") if lost == "k" else ("k", "v")
    assert str(mine) == f"bias_{given} is set but bias_{absent} is None"


@given(
    problem=problems(**whole, **plain_masks), spoiler=st.sampled_from((*LITERAL, *TYPE_ONLY)), choice=st.integers(0, 9)
)
def test_an_error_leaves_no_trace(problem: tuple[Blueprint, Call], spoiler: Spoiler, choice: int) -> None:
    blueprint, call = problem
    layer = dataclasses.replace(blueprint, dropout=0.5).build(FlashMultiHeadAttention).train(call.training)
    good = call.arguments(blueprint)
    changes = list(spoiler(blueprint, call, good))
    assume(changes)
    bad = {**good, **changes[choice % len(changes)]}
    state, names, tensors = copy.deepcopy(layer.state_dict()), set(vars(layer)), copy.deepcopy(bad)
    torch.manual_seed(call.seed)
    wanted = layer(**good)[0].detach()
    torch.manual_seed(call.seed)
    before = torch.get_rng_state()
    with record() as ran:
        error_of(layer, bad)
    assert torch.equal(torch.get_rng_state(), before)
    assert not ran
    assert set(vars(layer)) == names
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    assert all(parameter.grad is None for parameter in layer.parameters())
    for name, value in bad.items():
        assert torch.equal(value, tensors[name]) if isinstance(value, Tensor) else value == tensors[name], name
    assert_same(layer(**good)[0].detach(), wanted, "output")


# Construction


@given(
    embed_dim=st.integers(-3, 12),
    num_heads=st.integers(-3, 12),
    kdim=st.sampled_from((None, 5)),
    batch_first=st.booleans(),
)
def test_sizes_that_make_no_layer_are_refused_in_the_words_of_stock(
    embed_dim: int, num_heads: int, kdim: int | None, batch_first: bool
) -> None:
    assume(embed_dim <= 0 or num_heads <= 0 or embed_dim % num_heads)
    before = torch.get_rng_state()
    with pytest.raises((ValueError, AssertionError)) as theirs:
        nn.MultiheadAttention(embed_dim, num_heads, kdim=kdim, batch_first=batch_first)
    with pytest.raises(theirs.type) as ours:
        FlashMultiHeadAttention(embed_dim, num_heads, kdim=kdim, batch_first=batch_first)
    assert str(ours.value).startswith(str(theirs.value))
    if embed_dim > 0 and num_heads > 0:  # stock names neither, nor has it a head_dim to give
        assert f"got embed_dim={embed_dim} and num_heads={num_heads}; give head_dim=" in str(ours.value)
        assert FlashMultiHeadAttention(embed_dim, num_heads, head_dim=2).num_heads == num_heads
        return
    assert str(ours.value) == str(theirs.value)
    assert torch.equal(torch.get_rng_state(), before)


@given(heads=st.sampled_from((1, 2, 4, 6)), kv_heads=st.integers(-2, 8))
def test_kv_heads_must_divide_the_heads(heads: int, kv_heads: int) -> None:
    assume(kv_heads < 1 or heads % kv_heads)
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match=f"num_kv_heads must be .*num_heads={heads} and num_kv_heads={kv_heads}"):
        FlashMultiHeadAttention(heads * 2, heads, num_kv_heads=kv_heads)
    assert torch.equal(torch.get_rng_state(), before)


BAD_WINDOWS = (3, "ab", [1, 2], (1,), (1, 2, 3), ("a", 1), (1.5, None))


@given(window=st.sampled_from(BAD_WINDOWS), later=st.booleans())
def test_a_window_is_a_pair_or_a_window(window: Any, later: bool) -> None:
    layer = FlashMultiHeadAttention(4, 2, window=(1, 1))
    before = torch.get_rng_state()
    with pytest.raises((ValueError, TypeError), match=r"window|left|right"):
        if later:
            layer.window = window
        else:
            FlashMultiHeadAttention(4, 2, window=window)
    assert torch.equal(torch.get_rng_state(), before)
    assert (layer.window.left, layer.window.right) == (1, 1)


@given(
    name=st.text("abcdefgh_", min_size=1, max_size=8),
    listed=st.booleans(),
    door=st.sampled_from(("build", "set", "call")),
)
def test_an_unknown_backend_is_refused_with_the_names_there_are(name: str, listed: bool, door: str) -> None:
    assume(name not in backends.names() and name not in backends.FAMILIES)
    layer, x = FlashMultiHeadAttention(4, 2), torch.ones(2, 1, 4)
    wanted: Any = ["naive", name] if listed else name
    with pytest.raises(ValueError, match="backend must be one of") as caught:
        if door == "build":
            FlashMultiHeadAttention(4, 2, backend=wanted)
        elif door == "set":
            layer.backend = wanted
        else:
            layer(x, x, x, backend=wanted)
    assert all(known in str(caught.value) for known in (*backends.names(), *backends.FAMILIES, repr(name)))
    assert layer.backend is None
    layer(x, x, x)


@pytest.mark.parametrize("sizes", [(4.0, 2), (4, 2.0), ("4", 2), (4, "2"), (4, None)])
def test_a_size_that_is_no_whole_number_is_named(sizes: tuple[Any, Any]) -> None:
    name = "num_heads" if sizes[0] == 4 and type(sizes[0]) is int else "embed_dim"
    with pytest.raises(TypeError, match=f"{name} must be a whole number, got "):
        FlashMultiHeadAttention(*sizes)


OPTIONS = list(inspect.signature(FlashMultiHeadAttention).parameters)
MEANT = {
    "num_key_value_heads": "num_kv_heads",
    "n_heads": "num_heads",
    "rope": "rotary",
    "alibi": "position_bias",
    "sliding_window": "window",
    "is_causal": "causal",
}


@given(
    name=st.one_of(
        st.sampled_from(list(MEANT)), st.tuples(st.sampled_from(OPTIONS), st.integers(0, 5)).map(lambda at: cut(*at))
    ),
    sub=st.booleans(),
)
def test_an_unknown_option_is_refused_with_the_one_that_was_meant(name: str, sub: bool) -> None:
    class Passing(FlashMultiHeadAttention):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)

    assume(name not in OPTIONS)
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'; say ") as caught:
        (Passing if sub else FlashMultiHeadAttention)(4, 2, **{name: 2})
    said = str(caught.value).rpartition("; say ")[2].rstrip(".")
    assert said in OPTIONS and said == MEANT.get(name, said)


def cut(name: str, place: int) -> str:
    """A name without one of its letters."""
    return name[:place] + name[place + 1 :]


@pytest.mark.parametrize("name", ["causal", "is_causal"])
def test_a_mask_of_another_library_is_refused_with_ours(name: str) -> None:
    q = torch.randn(1, 2, 1, 4)
    with pytest.raises(
        TypeError, match=rf"attention\(\) got an unexpected keyword argument '{name}'; say mask=causal\(\)"
    ):
        attention(q, q, q, **{name: True})
    with pytest.raises(TypeError, match="unexpected keyword argument 'soft_cap'; say softcap"):
        attention(q, q, q, soft_cap=1.0)
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'zzz'\."):
        attention(q, q, q, zzz=1.0)


@given(mask=st.sampled_from((causal(), Window(1, 0), causal() & KeyLengths(torch.tensor([1])))))
def test_rules_that_no_operator_makes_are_refused_with_the_rule_that_does(mask: Any) -> None:
    for combine in (lambda: mask | Window(1, 1), lambda: Window(1, 1) | mask, lambda: ~mask):
        with pytest.raises(TypeError, match=r"Rule\(fn\) says any pattern"):
            combine()


def test_unknown_arguments_are_refused() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'heads'"):
        FlashMultiHeadAttention(4, 2, heads=2)
    x = torch.ones(2, 1, 4)
    with pytest.raises(TypeError, match="unexpected keyword argument 'causal'"):
        FlashMultiHeadAttention(4, 2)(x, x, x, causal=True)
    with pytest.raises(TypeError, match="positional arguments but 13 were given"):
        FlashMultiHeadAttention(4, 2, 0.0, True, False, False, None, None, False, None, None, 1)


# Nested tensors


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
@given(
    lengths=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    why=st.sampled_from(("mask", "padding", "batch_first", "mixed", "grad")),
    layout=st.sampled_from((torch.jagged, torch.strided)),
)
def test_nested_calls_that_mean_nothing_are_refused(lengths: list[int], why: str, layout: torch.layout) -> None:
    layer = FlashMultiHeadAttention(4, 2, batch_first=why != "batch_first").eval()
    x = torch.nested.nested_tensor([torch.ones(n, 4) for n in lengths], layout=layout)
    dense = torch.ones(len(lengths), max(lengths), 4)
    masks: Arguments = {}
    if why == "mask":
        masks["attn_mask"] = torch.zeros(max(lengths), max(lengths), dtype=torch.bool)
    if why == "padding":
        masks["key_padding_mask"] = torch.zeros(len(lengths), max(lengths), dtype=torch.bool)
    assume(why != "grad" or layout == torch.strided)  # jagged ones can be differentiated
    key = dense if why == "mixed" else x
    with torch.set_grad_enabled(why == "grad"), pytest.raises(AssertionError) as caught:
        layer(x, key, key, **masks)
    assert "does not support NestedTensor outside of its fast path" in str(caught.value)


# NoBackendError


@given(problem=problems(**whole, grad=(False,)), asked=st.sampled_from(("flash_attn", "flash2", ["flash3", "flash4"])))
def test_a_named_backend_that_cannot_serve_raises_with_its_reason(
    problem: tuple[Blueprint, Call], asked: str | list[str]
) -> None:
    blueprint, call = problem
    assume(not call.mixed)
    layer, good = blueprint.build(FlashMultiHeadAttention), call.arguments(blueprint)
    wanted = layer(**good)[0].detach()
    names = {"flash_attn": ("flash4", "flash3", "flash2")}.get(
        str(asked), (asked,) if isinstance(asked, str) else asked
    )
    before = torch.get_rng_state()
    with record() as ran, pytest.raises(NoBackendError) as caught:
        layer(**good, backend=asked)
    error = caught.value
    assert not ran
    assert tuple(error.reasons) == tuple(names)
    assert all(name in str(error) and reason in str(error) for name, reason in error.reasons.items())
    assert all(error.reasons.values())
    assert str(error.spec) in str(error)
    assert f"heads={blueprint.num_heads}" in str(error)
    assert repr(asked) in str(error)
    assert torch.equal(torch.get_rng_state(), before)
    assert_same(layer(**good)[0].detach(), wanted, "output")


@given(seed=st.integers(0, 9), dropout=st.sampled_from((0.0, 0.3)), window=st.sampled_from((None, Window(1, 0))))
def test_when_no_backend_can_serve_each_says_why(seed: int, dropout: float, window: Window | None) -> None:
    q = torch.randn(1, 2, 2, 4, generator=torch.Generator().manual_seed(seed)).to(torch.float8_e4m3fn)
    with pytest.raises(NoBackendError) as caught:
        attention(q, q, q, dropout_p=dropout, mask=window)
    assert set(caught.value.reasons) == set(backends.names())
    assert all("float8_e4m3fn" in reason for reason in caught.value.reasons.values())


@given(
    heads=st.sampled_from((1, 2)),
    window=st.sampled_from((None, (1, 0))),
    asked=st.sampled_from(("flash2", "flash_attn")),
)
def test_no_backend_error_survives_pickle(heads: int, window: Any, asked: str) -> None:
    layer, x = FlashMultiHeadAttention(4, heads, window=window, backend=asked), torch.ones(3, 2, 4)
    error = error_of(layer, {"query": x, "key": x, "value": x, "need_weights": False})
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is NoBackendError
    assert str(again) == str(error)
    assert again.reasons == error.reasons
    assert str(again.spec) == str(error.spec)


@given(asked=st.sampled_from(("flash2", ["flash3", "flash4"])))
def test_a_list_is_served_by_the_first_that_can_and_an_error_names_all(asked: Any) -> None:
    x = torch.ones(3, 2, 16)
    layer = FlashMultiHeadAttention(16, 2, backend=asked)
    with pytest.raises(NoBackendError):
        layer(x, x, x)
    names = [asked] if isinstance(asked, str) else asked
    layer.backend = [*names, "naive"]
    with record() as ran:
        layer(x, x, x)
    assert [call.backend for call in ran] == ["naive"]


@given(rounds=st.integers(1, 3))
def test_the_environment_variable_is_obeyed_and_may_be_wrong(rounds: int) -> None:
    x, layer = torch.ones(3, 2, 4), FlashMultiHeadAttention(4, 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLASHMHA_BACKEND", "flash2")
        for _ in range(rounds):
            with pytest.raises(NoBackendError, match="flash2"):
                layer(x, x, x, need_weights=False)
        patch.setenv("FLASHMHA_BACKEND", "nonsense")
        with pytest.raises(ValueError, match="nonsense"):
            layer(x, x, x, need_weights=False)
    layer(x, x, x, need_weights=False)


@given(text=st.text())
def test_whatever_an_exception_says_there_is_one_line_of_it(text: str) -> None:
    line = summarize_error(RuntimeError(text))
    assert line.startswith("RuntimeError: ") and len(line.splitlines()) == 1
    assert line.removeprefix("RuntimeError: ").strip()


SHAPES: dict[str, Callable[[Tensor], Any]] = {
    "heads before rows": lambda out: out.transpose(1, 2),
    "flat": lambda out: out.flatten(2),
    "nothing": lambda out: None,
    "a pair": lambda out: (out, out),
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("need_weights", (True, False))
def test_a_result_of_another_shape_is_not_passed_on(name: str, need_weights: bool) -> None:
    class Odd(Backend):
        """A backend of another package, which returns something else."""

        limits = Limits(devices=(), dtypes=(torch.float32,), features=frozenset())

        def __call__(self, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Any:
            return SHAPES[name](q)

    Odd.name = "odd"
    register(Odd)
    try:
        layer, x = FlashMultiHeadAttention(8, 2, batch_first=True, backend="odd"), torch.randn(3, 5, 8)
        with torch.no_grad(), pytest.raises(ValueError, match=r"the backend odd must return out .*\(3, 5, 2, 4\)"):
            layer(x, x, x, need_weights=need_weights)
        unregister("odd")
        register(Odd, before="sdpa")
        layer.backend = None
        with torch.no_grad(), pytest.raises(ValueError, match="the backend odd must return"):
            layer(x, x, x, need_weights=need_weights)
    finally:
        unregister("odd")


@pytest.mark.parametrize("heads", ((), (1, 2), None, "q"))
def test_a_hook_that_returns_something_else_is_named(heads: Any) -> None:
    layer, x = FlashMultiHeadAttention(8, 2, batch_first=True), torch.randn(3, 5, 8)
    layer.process_heads = lambda q, k, v: heads  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="process_heads must return the three tensors q, k and v, got "):
        layer(x, x, x)


def test_names_that_mean_nothing_are_refused_where_they_are_said() -> None:
    q = torch.randn(1, 2, 1, 4)
    with pytest.raises(ValueError, match=r"backend must name at least one backend, got \[\]"):
        attention(q, q, q, backend=[])
    with pytest.raises(ValueError, match=r"before must be one of sdpa, .*, got 'flash_attn'"):
        register(type("Late", (type(backends.get("naive")),), {"name": "late"}), before="flash_attn")
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got 'x'"):
        replace_mha("x")  # type: ignore[type-var]

"""State dicts with other projections: there and back they are equal, and layers that load them give the same output."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from flashmha import FlashMultiHeadAttention, fuse_projections, group_heads, repeat_heads, separate_projections
from flashmha.testing import noise, seeds

NAMES = (None, ("q_proj", "k_proj", "v_proj"), ("to_q", "to_k", "to_v"))
State = dict[str, Tensor]


@st.composite
def layers(draw: st.DrawFn, full: bool = False, usual: bool = False) -> tuple[FlashMultiHeadAttention, dict[str, Any]]:
    """A layer of drawn sizes, and what a helper has to be told of its heads; ``usual`` heads are of one size."""
    heads_kv = draw(st.integers(1, 3))
    heads = heads_kv * draw(st.integers(1, 3))
    options: dict[str, Any] = {"num_kv_heads": heads if full else heads_kv}
    width = heads * draw(st.integers(1, 4))
    if not usual and draw(st.booleans()):
        options["head_dim"] = draw(st.integers(1, 5))
    if not usual and draw(st.booleans()):
        options["value_head_dim"] = draw(st.integers(1, 5))
    told = {"num_heads": heads, **{name: options[name] for name in options if name != "head_dim"}}
    for name in ("kdim", "vdim"):
        if draw(st.booleans()):
            options[name] = draw(st.integers(1, 6))
    options |= {"bias": draw(st.booleans()), "add_bias_kv": draw(st.booleans())}
    torch.manual_seed(draw(seeds()))
    return FlashMultiHeadAttention(width, heads, batch_first=True, dtype=torch.float64, **options), told


def redraw(layer: nn.Module, seed: int) -> None:
    """Give biases numbers too, which start at zero."""
    for place, parameter in enumerate(layer.parameters()):
        parameter.data = noise(seed + place, *parameter.shape)


def output(layer: nn.Module, seed: int) -> Tensor:
    """What a layer gives for drawn inputs of its sizes."""
    sizes: Any = (layer.embed_dim, layer.kdim, layer.vdim)
    query, key, value = (noise(seed + place, 2, 5, size) for place, size in enumerate(sizes))
    out: Tensor = layer(query, key, value)[0]
    return out


def assert_equal_states(one: State, other: State) -> None:
    assert set(one) == set(other)
    for key, tensor in one.items():
        assert torch.equal(tensor, other[key]), key


@given(drawn=st.lists(layers(usual=True), min_size=1, max_size=3), names=st.sampled_from(NAMES), seed=seeds())
def test_a_model_comes_back_as_it_was(
    drawn: list[tuple[FlashMultiHeadAttention, dict[str, Any]]], names: tuple[str, ...] | None, seed: int
) -> None:
    """Layers of several heads, with ``kdim`` or without, and something else beside them; nothing is told of heads."""
    model = nn.ModuleDict({f"layers_{place}": layer for place, (layer, _) in enumerate(drawn)})
    redraw(model, seed)
    state = {**model.state_dict(), "my_in_proj_weight": noise(seed, 7, 2)}
    before = {key: tensor.clone() for key, tensor in state.items()}
    apart = separate_projections(state, names=names)
    assert not any(key.endswith(".in_proj_weight") for key in apart)
    assert names is None or not any("q_proj_weight" in key or "in_proj_bias" in key for key in apart)
    back = fuse_projections(apart, names=names)
    assert_equal_states(back, before)
    for key, tensor in apart.items():
        if key not in state:
            tensor.zero_()  # a tensor of its own
    assert_equal_states(state, before)


@given(drawn=layers(), names=st.sampled_from(NAMES[1:]), seed=seeds())
def test_separate_projections_are_the_rows_of_each(
    drawn: tuple[FlashMultiHeadAttention, dict[str, Any]], names: tuple[str, ...], seed: int
) -> None:
    """Three linear modules that load them make the queries, keys and values of the layer."""
    layer, told = drawn
    redraw(layer, seed)
    apart = separate_projections(layer.state_dict(), **told, names=names)
    inputs = [noise(seed + place, 2, 3, size) for place, size in enumerate((layer.embed_dim, layer.kdim, layer.vdim))]
    for name, x, heads in zip(names, inputs, layer.project(*inputs)):
        linear = nn.Linear(x.shape[-1], heads.shape[2:].numel(), bias=layer.in_proj_bias is not None, dtype=x.dtype)
        linear.load_state_dict({kind: apart[f"{name}.{kind}"] for kind in linear.state_dict()})
        torch.testing.assert_close(linear(x).view_as(heads), heads)
    assert_equal_states(fuse_projections(apart, names=names), layer.state_dict())


@given(drawn=layers(usual=True), names=st.sampled_from(NAMES))
def test_heads_of_one_size_need_not_be_told(
    drawn: tuple[FlashMultiHeadAttention, dict[str, Any]], names: tuple[str, ...] | None
) -> None:
    layer, told = drawn
    state = layer.state_dict()
    assert_equal_states(separate_projections(state, names=names), separate_projections(state, **told, names=names))


@given(drawn=layers(), wrong=st.integers(1, 9), wrong_kv=st.integers(1, 9))
def test_rows_of_other_heads_are_never_invented(
    drawn: tuple[FlashMultiHeadAttention, dict[str, Any]], wrong: int, wrong_kv: int
) -> None:
    """Any number of heads either is refused, or cuts the rows where the layer's own heads do."""
    layer, told = drawn
    if "value_head_dim" in told or wrong % wrong_kv:
        return
    state, right = layer.state_dict(), separate_projections(layer.state_dict(), **told)
    try:
        found = separate_projections(state, wrong, wrong_kv)
    except ValueError as error:
        assert "num_heads" in str(error) and "num_kv_heads" in str(error)
        assert (wrong, wrong_kv) != (told["num_heads"], told["num_kv_heads"])
    else:
        assert_equal_states(found, right)


@given(drawn=layers(), names=st.sampled_from(NAMES), wrapped=st.booleans(), seed=seeds())
def test_repeated_heads_give_the_output_of_grouped_ones_and_group_back(
    drawn: tuple[FlashMultiHeadAttention, dict[str, Any]], names: tuple[str, ...] | None, wrapped: bool, seed: int
) -> None:
    """Of a layer or a model, in every form that its projections may have."""
    grouped, told = drawn
    redraw(grouped, seed)
    prefix = "encoder.self_attn." if wrapped else ""
    held = {prefix + key: tensor for key, tensor in grouped.state_dict().items()}
    state = held if names is None else separate_projections(held, **told, names=names)
    repeated = repeat_heads(state, **told, names=names)
    assert list(repeated) == list(state)
    back = group_heads(repeated, **told, names=names)
    for key, tensor in state.items():
        torch.testing.assert_close(back[key], tensor)
    loaded = repeated if names is None else fuse_projections(repeated, names=names)
    full = FlashMultiHeadAttention(
        grouped.embed_dim,
        grouped.num_heads,
        bias=grouped.in_proj_bias is not None,
        add_bias_kv=grouped.bias_k is not None,
        kdim=grouped.kdim,
        vdim=grouped.vdim,
        batch_first=True,
        dtype=torch.float64,
        head_dim=grouped.free_head_dim,
        value_head_dim=grouped.value_head_dim,
    )
    full.load_state_dict({key.removeprefix(prefix): tensor for key, tensor in loaded.items()})
    torch.testing.assert_close(output(full, seed), output(grouped, seed), atol=1e-9, rtol=1e-9)


@given(heads_kv=st.integers(1, 3), group=st.integers(1, 3), seed=seeds())
def test_a_grouped_head_is_the_mean_of_its_group(heads_kv: int, group: int, seed: int) -> None:
    heads, rows = heads_kv * group, heads_kv * group * 2
    weight = noise(seed, 3 * rows, 4)
    found = group_heads({"in_proj_weight": weight}, heads, heads_kv)["in_proj_weight"]
    assert torch.equal(found[:rows], weight[:rows])
    for place, part in enumerate(weight[rows:].view(2, heads_kv, group, 2, 4).mean(2).flatten(0, 1)):
        torch.testing.assert_close(found[rows + 2 * place : rows + 2 * place + 2], part)


@given(drawn=layers(full=True), divisor=st.integers(1, 9), seed=seeds())
def test_full_heads_that_meet_grouped_ones_are_told_what_groups_them(
    drawn: tuple[FlashMultiHeadAttention, dict[str, Any]], divisor: int, seed: int
) -> None:
    """The error's own call makes a state dict that loads; what else is said is as without the hint."""
    full, told = drawn
    heads = told["num_heads"]
    if heads % divisor or divisor == heads:
        return
    grouped = FlashMultiHeadAttention(
        full.embed_dim,
        heads,
        bias=full.in_proj_bias is not None,
        add_bias_kv=full.bias_k is not None,
        kdim=full.kdim,
        vdim=full.vdim,
        dtype=torch.float64,
        num_kv_heads=divisor,
        head_dim=full.free_head_dim,
        value_head_dim=full.value_head_dim,
    )
    model, state = nn.ModuleDict({"inner": grouped}), nn.ModuleDict({"inner": full}).state_dict()
    with pytest.raises(RuntimeError, match="size mismatch") as caught:
        model.load_state_dict(state)
    (hint,) = [line for line in str(caught.value).splitlines() if "group_heads" in line]
    arguments = hint.partition("group_heads(state_dict, ")[2].partition(")")[0]
    model.load_state_dict(group_heads(state, *map(int, arguments.split(", "))))
    assert str(caught.value).count("size mismatch") == sum(
        tensor.shape != state[key].shape for key, tensor in model.state_dict().items()
    )


@given(drawn=layers(), seed=seeds())
def test_a_state_that_fits_gets_no_hint(drawn: tuple[FlashMultiHeadAttention, dict[str, Any]], seed: int) -> None:
    layer, _ = drawn
    state = {key: noise(seed, *tensor.shape) for key, tensor in layer.state_dict().items()}
    layer.load_state_dict(state)
    state["out_proj.weight"] = noise(seed, 1, 99)
    with pytest.raises(RuntimeError, match="size mismatch") as caught:
        layer.load_state_dict(state)
    assert "group_heads" not in str(caught.value)


@given(rows=st.integers(1, 8), seed=seeds())
def test_a_projection_without_a_bias_has_one_of_zeros(rows: int, seed: int) -> None:
    """As Whisper's keys; the error's own line mends it."""
    names = ("q_proj", "k_proj", "v_proj")
    state = {f"{name}.weight": noise(seed, rows, 4) for name in names} | {
        f"{name}.bias": noise(seed, rows) for name in (names[0], names[2])
    }
    with pytest.raises(ValueError, match=r"must hold .*got no k_proj.bias") as caught:
        fuse_projections(state, names=names)
    exec(str(caught.value).rpartition(", ")[2].rstrip("."), {"torch": torch, "state_dict": state})
    assert torch.equal(fuse_projections(state, names=names)["in_proj_bias"][rows : 2 * rows], torch.zeros(rows))


@given(
    drawn=layers(),
    names=st.sampled_from(NAMES),
    way=st.sampled_from(("parametrized", "pruned", "normed")),
    convert=st.sampled_from((separate_projections, fuse_projections, group_heads, repeat_heads)),
    place=st.integers(0, 2),
)
def test_a_projection_in_another_form_is_refused(
    drawn: tuple[FlashMultiHeadAttention, dict[str, Any]],
    names: tuple[str, ...] | None,
    way: str,
    convert: Callable[..., State],
    place: int,
) -> None:
    """A bias that is converted while its weight stays would be half of a layer."""
    layer, told = drawn
    names = None if convert is separate_projections else names
    state = layer.state_dict() if names is None else separate_projections(layer.state_dict(), **told, names=names)
    model = Tree(state)
    weights = [key for key in state if key.startswith(("in_proj_w", *(names or ("q_proj", "k_proj", "v_proj"))))]
    weights = [key for key in weights if key.endswith("weight")]
    at, _, name = weights[place % len(weights)].rpartition(".")
    where = model.get_submodule(at)
    if way == "pruned":
        prune.identity(where, name)
    elif way == "normed":  # as nn.utils.weight_norm leaves it, which warns
        weight = where._parameters.pop(name)
        assert weight is not None
        where.register_parameter(f"{name}_g", nn.Parameter(weight.norm(dim=1, keepdim=True)))
        where.register_parameter(f"{name}_v", weight)
    else:
        parametrize.register_parametrization(where, name, nn.Identity())
    more = () if convert in (separate_projections, fuse_projections) else (told["num_heads"], 1)
    with pytest.raises(ValueError, match=r"state_dict must hold \S+weight itself, got .*: convert the state dict"):
        convert(model.state_dict(), *more, names=names)


class Tree(nn.Module):
    """The parameters of a state dict, under its names."""

    def __init__(self, state: State) -> None:
        super().__init__()
        for key, tensor in state.items():
            name, _, rest = key.partition(".")
            if rest and name not in self._modules:
                inner = {k.removeprefix(f"{name}."): x for k, x in state.items() if k.startswith(f"{name}.")}
                self.add_module(name, Tree(inner))
            elif not rest:
                self.register_parameter(name, nn.Parameter(tensor))


WEIGHT = torch.zeros(12, 4)
THREE = ("q", "k", "v")
BAD: dict[str, Callable[[], object]] = {
    "rows of no heads": lambda: separate_projections({"in_proj_weight": torch.zeros(7, 4)}, 2),
    "rows that nothing tells apart": lambda: separate_projections({"in_proj_weight": WEIGHT}),
    "values as wide as they like": lambda: separate_projections(
        FlashMultiHeadAttention(32, 4, value_head_dim=16).state_dict()
    ),
    "values that leave nothing": lambda: separate_projections({"in_proj_weight": WEIGHT}, 2, 2, 6),
    "half a value": lambda: separate_projections({"in_proj_weight": WEIGHT}, 2, 2, 1.5),  # type: ignore[arg-type]
    "groups alone": lambda: separate_projections({"in_proj_weight": WEIGHT}, num_kv_heads=2),
    "groups of unequal size": lambda: group_heads({"in_proj_weight": WEIGHT}, 3, 2),
    "half a head": lambda: repeat_heads({"in_proj_weight": WEIGHT}, 2.0, 1),  # type: ignore[arg-type]
    "keys alone": lambda: group_heads({"k_proj_weight": torch.zeros(8, 4)}, 4, 2),
    "keys of other heads": lambda: group_heads(
        {"q_proj_weight": WEIGHT, "k_proj_weight": torch.zeros(7, 4), "v_proj_weight": WEIGHT}, 4, 2
    ),
    "a bias of other rows": lambda: group_heads({"in_proj_weight": WEIGHT, "in_proj_bias": torch.zeros(11)}, 4, 2),
    "no queries": lambda: fuse_projections({"k_proj_weight": WEIGHT, "v_proj_weight": WEIGHT}),
    "two names": lambda: fuse_projections({}, names=("q", "k")),
    "one name twice": lambda: separate_projections({"in_proj_weight": WEIGHT}, 1, names=("q", "q", "v")),
    "a name that is taken": lambda: separate_projections(
        {"in_proj_weight": WEIGHT, "q.weight": WEIGHT}, 1, names=THREE
    ),
    "fused already": lambda: fuse_projections(
        {"in_proj_weight": WEIGHT, **{f"{name}.weight": WEIGHT for name in THREE}}, names=THREE
    ),
    **{
        f"nothing to {convert.__name__}": lambda convert=convert, more=more: convert({"head.weight": WEIGHT}, *more)  # type: ignore
        for convert, more in (
            (separate_projections, ()),
            (fuse_projections, ()),
            (group_heads, (2, 1)),
            (repeat_heads, (2, 1)),
        )
    },
}


@pytest.mark.parametrize("name", sorted(BAD))
def test_what_does_not_fit_is_told_by_name_and_shape(name: str) -> None:
    with pytest.raises(ValueError, match=r"must .*got"):
        BAD[name]()


@pytest.mark.parametrize("given", (nn.Linear(2, 2), [WEIGHT], None, {0: WEIGHT}), ids=("module", "list", "none", "int"))
@pytest.mark.parametrize("convert", (separate_projections, fuse_projections, group_heads, repeat_heads))
def test_what_is_no_state_dict_is_told(given: Any, convert: Any) -> None:
    sizes = (2, 1) if convert in (group_heads, repeat_heads) else ()
    with pytest.raises(TypeError, match=r"state_dict must .*got"):
        convert(given, *sizes)

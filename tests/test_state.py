"""State dicts with other projections: there and back they are equal, and layers that load them give the same output."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from flashmha import FlashMultiHeadAttention, fuse_projections, group_heads, repeat_heads, separate_projections
from flashmha.testing import noise, seeds

NAMES = (None, ("q_proj", "k_proj", "v_proj"), ("to_q", "to_k", "to_v"))
PREFIXES = ("", "encoder.layers.0.self_attn.")


@st.composite
def states(draw: st.DrawFn) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Projections of drawn sizes, with something else beside them, and the sizes."""
    heads_kv = draw(st.integers(1, 3))
    sizes = {"num_heads": heads_kv * draw(st.integers(1, 3)), "num_kv_heads": heads_kv}
    head_dim = value_head_dim = draw(st.integers(1, 4))
    if draw(st.booleans()):
        sizes["value_head_dim"] = value_head_dim = draw(st.integers(1, 4))
    rows = (sizes["num_heads"] + heads_kv) * head_dim + heads_kv * value_head_dim
    prefix, seed = draw(st.sampled_from(PREFIXES)), draw(seeds())
    state = {f"{prefix}in_proj_weight": noise(seed, rows, 5)}
    if draw(st.booleans()):
        state[f"{prefix}in_proj_bias"] = noise(seed + 1, rows)
    return state | {f"{prefix}out_proj.weight": noise(seed + 2, 5, 5), "my_in_proj_weight": noise(seed, 7, 2)}, sizes


def assert_equal_states(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert set(one) == set(other)
    for key, tensor in one.items():
        assert torch.equal(tensor, other[key]), key


@given(case=states(), names=st.sampled_from(NAMES))
def test_projections_come_back_as_they_were(
    case: tuple[dict[str, Tensor], dict[str, int]], names: tuple[str, ...] | None
) -> None:
    state, sizes = case
    before = {key: tensor.clone() for key, tensor in state.items()}
    apart = separate_projections(state, **sizes, names=names)
    assert not any(key.endswith(("in_proj_weight",)) for key in apart if key != "my_in_proj_weight")
    assert_equal_states(fuse_projections(apart, names=names), before)
    for key, tensor in apart.items():
        if key not in state:
            tensor.zero_()  # a tensor of its own
    assert_equal_states(state, before)


@given(case=states())
def test_separate_projections_are_the_rows_of_each(case: tuple[dict[str, Tensor], dict[str, int]]) -> None:
    state, sizes = case
    apart = separate_projections(state, **sizes, names=NAMES[1])
    for kind in ("weight", "bias"):
        for key in [key for key in state if key.endswith(f"in_proj_{kind}") and key != "my_in_proj_weight"]:
            parts = [apart[key.replace(f"in_proj_{kind}", f"{name}.{kind}")] for name in NAMES[1] or ()]
            assert torch.equal(torch.cat(parts), state[key])
            assert parts[0].shape[0] % sizes["num_heads"] == parts[1].shape[0] % sizes["num_kv_heads"] == 0
            assert parts[0].shape[0] * sizes["num_kv_heads"] == parts[1].shape[0] * sizes["num_heads"]


OPTIONS = (
    {},
    {"bias": False},
    {"add_bias_kv": True},
    {"kdim": 6, "vdim": 5},
)


@given(
    heads_kv=st.integers(1, 3),
    group=st.integers(1, 3),
    options=st.sampled_from(OPTIONS),
    wrapped=st.booleans(),
    seed=seeds(),
)
def test_repeated_heads_give_the_output_of_grouped_ones_and_group_back(
    heads_kv: int, group: int, options: dict[str, int], wrapped: bool, seed: int
) -> None:
    heads = heads_kv * group
    width = 4 * heads

    def layer(kv: int | None) -> nn.Module:
        made = FlashMultiHeadAttention(
            width,
            heads,
            batch_first=True,
            dtype=torch.float64,
            num_kv_heads=kv,
            **options,  # type: ignore[arg-type]
        )
        return nn.ModuleDict({"inner": made}) if wrapped else made

    torch.manual_seed(seed)
    grouped, full, again = layer(heads_kv), layer(None), layer(heads_kv)
    state = repeat_heads(grouped.state_dict(), heads, heads_kv)
    full.load_state_dict(state, strict=True)
    back = group_heads(state, heads, heads_kv)
    again.load_state_dict(back, strict=True)
    query = noise(seed, 2, 5, width)
    key, value = (noise(seed + 1, 2, 6, options.get(name, width)) for name in ("kdim", "vdim"))
    outs = [(one["inner"] if wrapped else one)(query, key, value)[0] for one in (grouped, full, again)]  # type: ignore
    for out in outs[1:]:
        torch.testing.assert_close(out, outs[0], atol=1e-9, rtol=1e-9)
    for name, tensor in grouped.state_dict().items():
        torch.testing.assert_close(back[name], tensor)


@given(heads_kv=st.integers(1, 3), group=st.integers(1, 3), seed=seeds())
def test_a_grouped_head_is_the_mean_of_its_group(heads_kv: int, group: int, seed: int) -> None:
    heads, rows = heads_kv * group, heads_kv * group * 2
    weight = noise(seed, 3 * rows, 4)
    found = group_heads({"in_proj_weight": weight}, heads, heads_kv)["in_proj_weight"]
    assert torch.equal(found[:rows], weight[:rows])
    for place, part in enumerate(weight[rows:].view(2, heads_kv, group, 2, 4).mean(2).flatten(0, 1)):
        torch.testing.assert_close(found[rows + 2 * place : rows + 2 * place + 2], part)


WEIGHT = torch.zeros(12, 4)
BAD: dict[str, Callable[[], object]] = {
    "rows of no heads": lambda: separate_projections({"in_proj_weight": torch.zeros(7, 4)}),
    "values that leave nothing": lambda: separate_projections({"in_proj_weight": WEIGHT}, 2, 2, 6),
    "groups of unequal size": lambda: group_heads({"in_proj_weight": WEIGHT}, 3, 2),
    "half a head": lambda: repeat_heads({"in_proj_weight": WEIGHT}, 2.0, 1),  # type: ignore[arg-type]
    "keys of other heads": lambda: group_heads({"k_proj_weight": torch.zeros(7, 4)}, 4, 2),
    "no queries": lambda: fuse_projections({"k_proj_weight": WEIGHT, "v_proj_weight": WEIGHT}),
    "features of two sizes": lambda: fuse_projections(
        {"q_proj_weight": WEIGHT, "k_proj_weight": WEIGHT, "v_proj_weight": WEIGHT[:, :2]}
    ),
    "two names": lambda: fuse_projections({}, names=("q", "k")),
}


@pytest.mark.parametrize("name", sorted(BAD))
def test_what_does_not_fit_is_told_by_name_and_shape(name: str) -> None:
    with pytest.raises(ValueError, match=r"must .*got"):
        BAD[name]()

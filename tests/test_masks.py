"""Masks and biases: what the rules say, that they combine as rules should, and that bad tensors are told so."""

import copy
import pickle

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from flashmha import (
    ALiBi,
    Dense,
    Documents,
    KeyLengths,
    KeyPadding,
    Mask,
    RelativeBias,
    Rule,
    TensorBias,
    Window,
    causal,
)
from flashmha.problem.windows import normalize
from flashmha.testing import masks, seeds

sizes = st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 9), st.integers(1, 9)).map(
    lambda numbers: dict(zip(("batch", "heads", "seqlen_q", "seqlen_k"), numbers))
)


@st.composite
def drawn(draw: st.DrawFn, number: int) -> tuple[dict[str, int], list[Mask | None]]:
    """Some masks for one problem, at most one of them packed."""
    shape = draw(sizes)
    found: list[Mask | None] = [draw(masks(**shape)) for _ in range(number)]
    packed = [mask for mask in found if mask is not None and "documents" in mask.features]
    return shape, found if len(packed) < 2 else [mask for mask in found if mask not in packed[1:]] + [None]


def dense(mask: Mask | None, shape: dict[str, int]) -> torch.Tensor:
    full = tuple(shape.values())
    return torch.ones(full, dtype=torch.bool) if mask is None else mask.materialize(*full).expand(full)


def counts_slots(mask: Mask | None) -> bool:
    return mask is None or mask.features.isdisjoint(("documents", "cache"))


@given(drawn(2))
def test_and_is_the_intersection(case: tuple[dict[str, int], list[Mask | None]]) -> None:
    shape, (one, two) = case
    assume(one is not None and two is not None)
    assume(counts_slots(one) and counts_slots(two))  # where the other rule counts positions anew: see below
    assert torch.equal(dense(one & two, shape), dense(one, shape) & dense(two, shape))
    assert torch.equal(dense(one & two, shape), dense(two & one, shape))


@given(drawn(1))
def test_normalizing_changes_no_answer(case: tuple[dict[str, int], list[Mask | None]]) -> None:
    shape, (mask,) = case
    assert torch.equal(dense(normalize(mask, shape["seqlen_q"], shape["seqlen_k"]), shape), dense(mask, shape))


@given(drawn(1))
def test_mask_mod_and_picture_say_what_materialize_says(case: tuple[dict[str, int], list[Mask | None]]) -> None:
    shape, (mask,) = case
    assume(mask is not None)
    table = dense(mask, shape)
    mod = mask.mask_mod(shape["seqlen_q"], shape["seqlen_k"])
    for index in torch.cartesian_prod(*(torch.arange(size) for size in shape.values())).view(-1, 4)[::7]:
        assert bool(mod(*index.unbind())) == bool(table[tuple(index.tolist())])
    last = {"batch": shape["batch"] - 1, "head": shape["heads"] - 1}
    rows = mask.picture(shape["seqlen_q"], shape["seqlen_k"], **last).splitlines()
    assert [[cell == "■" for cell in row.split()] for row in rows] == table[-1, -1].tolist()


def test_a_bool_tensor_joins_as_a_dense_mask() -> None:
    lower = torch.ones(3, 3, dtype=torch.bool).tril()
    for both in (Window(1, 1) & lower, lower & Window(1, 1)):
        assert torch.equal(both.materialize(1, 1, 3, 3)[0, 0], Window(1, 0).materialize(1, 1, 3, 3)[0, 0])


@given(sizes, st.none() | st.integers(0, 9), st.none() | st.integers(0, 9), st.booleans())
def test_a_window_is_its_definition(shape: dict[str, int], left: int | None, right: int | None, first: bool) -> None:
    window = Window(left, right, align="top_left" if first else "bottom_right")
    table = dense(window, shape)[0, 0]
    shift = 0 if first else shape["seqlen_k"] - shape["seqlen_q"]
    for i in range(shape["seqlen_q"]):
        for j in range(shape["seqlen_k"]):
            after = j - (i + shift)
            seen = (left is None or after >= -left) and (right is None or after <= right)
            assert bool(table[i, j]) == seen


def test_alignment_is_the_difference_between_the_two_causal_masks() -> None:
    assert causal().picture(2, 4) == "■ ■ ■ ·\n■ ■ ■ ■"
    assert causal(align="top_left").picture(2, 4) == "■ · · ·\n■ ■ · ·"


@given(st.lists(st.integers(0, 5), min_size=1, max_size=4), st.integers(0, 2), st.booleans())
def test_a_row_of_documents_is_each_document_alone(lengths: list[int], rest: int, hidden_future: bool) -> None:
    total = sum(lengths) + rest
    assume(total)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    mask: Mask = Documents(offsets)
    rule = causal() if hidden_future else Window(1, 1)
    table = (mask & rule).materialize(1, 1, total, total)[0, 0]
    expected = torch.zeros(total, total, dtype=torch.bool)
    for start, length in zip(offsets.tolist(), lengths):
        if length:
            own = rule.materialize(1, 1, length, length)[0, 0]
            expected[start : start + length, start : start + length] = own
    assert torch.equal(table, expected)


@given(drawn(1))
def test_masks_survive_copy_and_pickle(case: tuple[dict[str, int], list[Mask | None]]) -> None:
    shape, (mask,) = case
    assume(mask is not None and "rule" not in mask.features)  # a rule is as picklable as its function
    assert torch.equal(dense(pickle.loads(pickle.dumps(mask)), shape), dense(mask, shape))
    assert torch.equal(dense(copy.deepcopy(mask), shape), dense(mask, shape))


def test_windows_merge_and_wide_ones_vanish() -> None:
    both = causal() & Window(3, 5)
    assert repr(both) == "Window(3, 0)"
    assert normalize(Window(8, 8), 5, 9) is None
    assert normalize(causal(), 1, 9) is None
    assert repr(normalize(causal(align="top_left"), 3, 5)) == "Window(None, -2)"


@given(seeds(), sizes)
def test_biases_add(seed: int, shape: dict[str, int]) -> None:
    torch.manual_seed(seed)
    full = tuple(shape.values())
    tensor, slopes, table = torch.randn(full), torch.rand(full[1]), torch.randn(full[1], 5)
    parts = [TensorBias(tensor), ALiBi(slopes), RelativeBias(table)]
    total = (parts[0] + parts[1] + parts[2]).materialize(*full).expand(full)
    shift = shape["seqlen_k"] - shape["seqlen_q"]
    i, j = torch.meshgrid(torch.arange(full[2]) + shift, torch.arange(full[3]), indexing="ij")
    expected = tensor - slopes[:, None, None] * (i - j).abs() + table[:, (j - i).clamp(-2, 2) + 2]
    torch.testing.assert_close(total, expected)


bad = {
    "int padding": lambda: KeyPadding(torch.ones(2, 3, dtype=torch.int64)),
    "padding of one axis": lambda: KeyPadding(torch.ones(3, dtype=torch.bool)),
    "float lengths": lambda: KeyLengths(torch.ones(3)),
    "float mask": lambda: Dense(torch.ones(3, 3)),
    "mask of five axes": lambda: Dense(torch.ones(1, 1, 1, 3, 3, dtype=torch.bool)),
    "bool bias": lambda: TensorBias(torch.ones(3, 3, dtype=torch.bool)),
    "float offsets": lambda: Documents(torch.zeros(3)),
    "offsets of nothing": lambda: Documents(torch.zeros(1, dtype=torch.int64)),
    "offsets that differ in number": lambda: Documents(torch.tensor([0, 3]), torch.tensor([0, 1, 3])),
    "two packings": lambda: Documents(torch.tensor([0, 3])) & Documents(torch.tensor([0, 3])),
    "an unknown alignment": lambda: Window(1, 1, align="middle"),
    "an unknown alignment of a rule": lambda: Rule(lambda b, h, q, k: q == k, align="middle"),
    "a list of lengths": lambda: KeyLengths([3, 5]),  # type: ignore[arg-type]
    "a list of offsets": lambda: Documents([0, 3]),  # type: ignore[arg-type]
    "flash-attn's unbounded": lambda: Window(-1, 0),
    "half a key": lambda: Window(2.5, 0),  # type: ignore[arg-type]
    "slopes of three axes": lambda: ALiBi(torch.ones(1, 1, 1)),
    "an even table": lambda: RelativeBias(torch.ones(2, 4)),
}


@pytest.mark.parametrize("name", bad)
def test_a_bad_tensor_is_told_what_was_wrong(name: str) -> None:
    with pytest.raises(ValueError, match=r"must .*got"):
        bad[name]()

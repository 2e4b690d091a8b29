"""Sums, means and largest values of a map that was not made yet: the same numbers, and never the map."""

from typing import Any

import pytest
import torch
from conftest import fewer
from hypothesis import assume, given
from hypothesis import strategies as st
from test_recipe import blocks_of, problems
from test_weights import Largest
from torch import Tensor

from flashmha import AttentionSpec, Window
from flashmha.testing import noise, seeds, tensors
from flashmha.weights.attend import attention_with_weights
from flashmha.weights.deferred import Deferred

FUNCTIONS = {"sum": torch.sum, "mean": torch.mean, "amax": torch.amax}


pytestmark = pytest.mark.usefixtures("every_map_is_deferred")


def rounding(spec: AttentionSpec, q: Tensor, k: Tensor) -> float:
    """What two ways to the same weights may differ by: the rounding of scores as large as these, and of the weights."""
    fine = torch.finfo(torch.promote_types(spec.dtype, torch.float32)).eps
    longest = [x.double().norm(dim=-1).max().item() for x in (q, k)]
    added = spec.added()
    moved = 0.0 if added is None else added.detach().double().masked_fill(~added.isfinite(), 0.0).abs().max().item()
    size = abs(spec.scale) * longest[0] * longest[1] + moved
    return 4 * torch.finfo(spec.dtype).eps + 4 * fine * (1 + size) + 1e-6


def told(spec: AttentionSpec, average: bool, batched: bool, some: bool, seed: int) -> dict[str, Any]:
    """How a call wants its weights; with ``some`` those of drawn queries alone count."""
    rows = noise(seed, spec.batch, spec.seqlen_q, dtype=torch.float32) < 0.5 if some else None
    return {"average": average, "batched": batched or spec.batch != 1, "rows": rows}


def outcome(name: str, weights: Tensor, dims: Any, keepdim: bool, wide: bool) -> Any:
    """What a reduction gives, or the error that it raises."""
    more: dict[str, Any] = {} if dims is None else {"dim": dims, "keepdim": keepdim}
    if wide and name != "amax":
        more["dtype"] = torch.float64
    try:
        return FUNCTIONS[name](weights, **more)
    except (IndexError, RuntimeError) as error:
        return type(error)


@given(
    spec=problems,
    average=st.booleans(),
    batched=st.booleans(),
    some=st.booleans(),
    name=st.sampled_from(sorted(FUNCTIONS)),
    dims=st.none() | st.integers(-5, 4) | st.lists(st.integers(-4, 3), max_size=3),
    keepdim=st.booleans(),
    wide=st.booleans(),
    block=st.sampled_from((1, 2**19)),
    seed=seeds(),
)
def test_a_reduction_is_that_of_the_map(
    spec: AttentionSpec,
    average: bool,
    batched: bool,
    some: bool,
    name: str,
    dims: Any,
    keepdim: bool,
    wide: bool,
    block: int,
    seed: int,
) -> None:
    """Within the rounding of the map's dtype, of sums that count as many of its numbers."""
    spec = spec.changed(dropout_p=0.0, need_lse=False)
    q, k, v = tensors(spec, seed)
    more = told(spec, average, batched, some, seed)
    with torch.no_grad(), blocks_of(block):
        unread = attention_with_weights(q, k, v, spec, "naive", **more)[1]
        waits = spec.mask is None or not any(rule.may_change() for rule in spec.mask.parts)
        assert (type(unread) is Deferred) == waits
        found = outcome(name, unread, dims, keepdim, wide)
        assert not waits or unread.cell.made is None  # type: ignore[attr-defined]
        read = attention_with_weights(q, k, v, spec, "naive", **more)[1].clone()
        expected = outcome(name, read, dims, keepdim, wide)
        assert torch.equal(unread.clone(), read), "reading it whole afterwards"
    if not isinstance(expected, Tensor):
        assert found == expected
        return
    assert isinstance(found, Tensor) and found.dtype == expected.dtype and found.shape == expected.shape
    error, scale = rounding(spec, q, k), max(1.0, expected.abs().max().item())
    torch.testing.assert_close(found.double(), expected.double(), atol=error * scale, rtol=error)


@fewer(2)
@given(spec=problems, average=st.booleans(), name=st.sampled_from(sorted(FUNCTIONS)), dim=st.integers(-3, -1))
def test_gradients_pass_a_reduction(spec: AttentionSpec, average: bool, name: str, dim: int) -> None:
    spec = spec.changed(dropout_p=0.0, need_lse=False, needs_grad=True, dtype=torch.float64, bias=None, sinks=None)
    values = [x.double() for x in tensors(spec, 0)]
    answers = []
    for read in (True, False):
        q, k, v = (x.clone().requires_grad_() for x in values)
        weights = attention_with_weights(q, k, v, spec, "naive", average=average)[1]
        found = FUNCTIONS[name](weights * 1.0 if read else weights, dim)
        answers.append((found, *torch.autograd.grad(found.sum(), (q, k))))
    for expected, actual in zip(*answers):
        torch.testing.assert_close(actual, expected, atol=1e-9, rtol=1e-9)


@given(
    spec=problems,
    average=st.booleans(),
    batched=st.booleans(),
    some=st.booleans(),
    axis=st.integers(0, 3),
    places=st.lists(st.integers(-9, 8), max_size=6),
    by_index=st.booleans(),
    seed=seeds(),
)
def test_some_rows_or_heads_are_those_of_the_map(
    spec: AttentionSpec,
    average: bool,
    batched: bool,
    some: bool,
    axis: int,
    places: list[int],
    by_index: bool,
    seed: int,
) -> None:
    spec = spec.changed(dropout_p=0.0, need_lse=False)
    q, k, v = tensors(spec, seed)
    more = told(spec, average, batched, some, seed)
    answers = []
    with torch.no_grad():
        for read in (False, True):
            weights = attention_with_weights(q, k, v, spec, "naive", **more)[1]
            weights = weights.clone() if read else weights
            if weights.device.type != "cpu" and axis < weights.dim():  # where one place too far ends the process
                size = weights.shape[axis]
                assume(all((-size if by_index else 0) <= place < size for place in places))
            index = torch.tensor(places, dtype=torch.int64, device=weights.device)
            try:
                if by_index:
                    answers.append(weights[(*(slice(None),) * axis, index)])
                else:
                    answers.append(weights.index_select(axis, index))
            except (IndexError, RuntimeError) as error:
                answers.append(type(error))
    found, expected = answers
    if not isinstance(expected, Tensor):
        assert found == expected
        return
    assert found.dtype == expected.dtype and found.shape == expected.shape
    error = rounding(spec, q, k)
    torch.testing.assert_close(found.double(), expected.double(), atol=error, rtol=error)


@pytest.mark.cpu("blocks of a size for a CPU")
def test_the_last_row_alone_is_made_of_its_own_scores() -> None:
    q, k, v = (torch.randn(1, 256, 4, 8).requires_grad_() for _ in range(3))
    unread = attention_with_weights(q, k, v, AttentionSpec.of(q, k, v), "naive")[1]
    with Largest() as largest:
        last = unread[:, [-1]]
    assert type(unread) is Deferred and unread.cell is not None and unread.cell.made is None
    assert last.shape == (1, 1, 256) and largest.numel <= 256 * 4 * 8, "more than the keys"
    (gradient,) = torch.autograd.grad(last.square().sum(), q)
    assert gradient[:, -1].any() and not gradient[:, :-1].any()


@pytest.mark.cpu("blocks of a size for a CPU")
@pytest.mark.parametrize("average", (False, True))
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dim", (-2, -1))
def test_no_tensor_is_as_large_as_the_map(average: bool, name: str, dim: int) -> None:
    q, k, v = (torch.randn(1, 256, 4, 8) for _ in range(3))
    spec = AttentionSpec.of(q, k, v, mask=Window(None, 0))
    with torch.no_grad(), blocks_of(256 * 16):
        unread = attention_with_weights(q, k, v, spec, "naive", average=average)[1]
        with Largest() as largest:
            found = FUNCTIONS[name](unread, dim)
    assert type(unread) is Deferred and unread.cell is not None and found.numel() < 256 * 8
    assert largest.numel < 256 * 256 / 4, "as large as the map of a head"


def test_a_written_map_gives_what_was_written() -> None:
    q, k, v = (torch.randn(1, 16, 2, 8) for _ in range(3))
    with torch.no_grad():
        weights = attention_with_weights(q, k, v, AttentionSpec.of(q, k, v), "naive")[1]
        before = weights.sum(1)
        alias = weights.view(weights.shape)
        alias.mul_(2.0)
        torch.testing.assert_close(weights.sum(1), 2.0 * before)
        torch.testing.assert_close(alias.sum(1), 2.0 * before)

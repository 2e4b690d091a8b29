"""A rule of one's own, made anew in each call: known again by its code and numbers, never taken for another one."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from flashmha import Documents, FlashMultiHeadAttention, Mask, Rule, causal
from flashmha.problem.likeness import likeness
from flashmha.problem.positions import MaskMod
from flashmha.testing import noise, seeds


def near(width: Any) -> MaskMod:
    """A rule whose function captures what it is given."""
    return lambda batch, head, q_pos, k_pos: (q_pos - k_pos).abs() <= width


def around(width: int) -> MaskMod:
    inner = near(width)
    return lambda batch, head, q_pos, k_pos: inner(batch, head, q_pos, k_pos) | (k_pos == 0)


def by_default(width: int) -> MaskMod:
    return lambda batch, head, q_pos, k_pos, width=width: (q_pos - k_pos).abs() <= width


def by_list(widths: list[int]) -> MaskMod:
    return lambda batch, head, q_pos, k_pos: (q_pos - k_pos).abs() <= widths[0]


def of_width(width: int, batch: Tensor, head: Tensor, q_pos: Tensor, k_pos: Tensor) -> Tensor:
    return (q_pos - k_pos).abs() <= width


class Near:
    """A rule as a method, and as an object that is called."""

    def __init__(self, width: int) -> None:
        self.width = width

    def __call__(self, batch: Tensor, head: Tensor, q_pos: Tensor, k_pos: Tensor) -> Tensor:
        return self.allowed(batch, head, q_pos, k_pos)

    def allowed(self, batch: Tensor, head: Tensor, q_pos: Tensor, k_pos: Tensor) -> Tensor:
        return (q_pos - k_pos).abs() <= self.width


REACH = 0


def by_global(width: int) -> MaskMod:
    global REACH
    REACH = width
    return lambda batch, head, q_pos, k_pos: (q_pos - k_pos).abs() <= REACH


def for_each_item(width: int) -> MaskMod:
    widths = torch.tensor([width, width + 1])
    return lambda batch, head, q_pos, k_pos: (q_pos - k_pos).abs() <= widths[batch]


MADE_ANEW: dict[str, Callable[[int], MaskMod]] = {
    "a number": near,
    "a number in a function": around,
    "a default": by_default,
    "a part of a function": lambda width: functools.partial(of_width, width),
    "a method": lambda width: Near(width).allowed,
    "an object": Near,
    "a list": lambda width: by_list([width]),
    "a global": by_global,
    "a tensor": lambda width: near(torch.tensor(width)),
    "a tensor of each item": for_each_item,
}
"""Functions of a width, by where they hold it."""
OF_TENSORS = ("a tensor", "a tensor of each item")
KNOWN_BY_NUMBERS = ("a number", "a number in a function", "a default", "a part of a function", "a global")


@given(name=st.sampled_from(sorted(MADE_ANEW)), width=st.integers(0, 5), other=st.integers(0, 5))
def test_a_function_made_anew_is_known_again(name: str, width: int, other: int) -> None:
    make = MADE_ANEW[name]
    one = likeness(make(width))
    again, different = likeness(make(width)), likeness(make(other))
    assert one == again and hash(one) == hash(again)
    if name in KNOWN_BY_NUMBERS and width != other:
        assert one != different
    assert all(
        one != likeness(function(width)) for key, function in MADE_ANEW.items() if key not in (name, *OF_TENSORS)
    )


def test_numbers_of_another_kind_are_others() -> None:
    assert len({likeness(near(number)) for number in (1, 1.0, True, "1", None, 1 + 0j)}) == 6
    tensors = (torch.ones(1), torch.ones(2), torch.ones(1).double(), torch.ones(1, requires_grad=True))
    assert len({likeness(near(tensor)) for tensor in tensors}) == len(tensors)


def test_a_function_that_calls_itself_has_a_likeness() -> None:
    def make(step: int) -> Callable[[int], bool]:
        def even(number: int) -> bool:
            return number == 0 or (number > 0 and even(number - step))

        return even

    assert likeness(make(2)) == likeness(make(2)) != likeness(make(3))


def test_a_variable_without_a_value_is_none() -> None:
    def early() -> Any:
        return late

    before = likeness(early)
    late = 3
    assert before != likeness(early)


def test_code_that_is_gone_is_like_no_other() -> None:
    def make() -> Any:
        names: dict[str, Any] = {}
        exec("rule = lambda batch, head, q_pos, k_pos: q_pos == k_pos", names)
        return names["rule"]

    rule = make()
    known = likeness(rule)
    assert known == likeness(rule) != likeness(make())
    del rule
    gc.collect()
    assert known != likeness(make())


def attended(layer: nn.Module, x: Tensor, mask: Any) -> list[Tensor]:
    """Output, weights and gradients of a layer."""
    out, weights = layer(x, x, x, attn_mask=mask, average_attn_weights=False)
    return [out, weights.clone(), *torch.autograd.grad(out.square().sum(), list(layer.parameters()))]


def prefix(lengths: Tensor) -> Rule:
    """A prefix-LM: the first tokens of each item see each other, the others what is before them."""
    return Rule(lambda batch, head, q_pos, k_pos: (k_pos <= q_pos) | (k_pos < lengths[batch]))


def documents(lengths: Tensor) -> Mask:
    return Documents(torch.tensor([0, 3, 3, 7])) & causal()


def every_second(lengths: Tensor) -> Mask:
    return Rule(lambda batch, head, q_pos, k_pos: (q_pos + k_pos + head) % 2 == 0) & causal()


@given(
    make=st.sampled_from((prefix, documents, every_second)),
    lengths=st.lists(st.integers(0, 7), min_size=2, max_size=2),
    backend=st.sampled_from((None, "naive", "sdpa")),
    kv_heads=st.sampled_from((None, 1)),
    padded=st.booleans(),
    seed=seeds(),
)
def test_a_layer_takes_any_rule_for_its_tensor(
    make: Callable[[Tensor], Mask],
    lengths: list[int],
    backend: str | None,
    kv_heads: int | None,
    padded: bool,
    seed: int,
) -> None:
    batch = 1 if make is documents else 2
    layer = FlashMultiHeadAttention(8, 2, batch_first=True, num_kv_heads=kv_heads, backend=backend, dtype=torch.float64)
    x, mask = noise(seed, batch, 7, 8), make(torch.tensor(lengths))
    table = ~mask.materialize(batch, 2, 7, 7).expand(batch, 2, 7, 7)
    for one, other in zip(attended(layer, x, mask), attended(layer, x, table)):
        torch.testing.assert_close(one, other, atol=1e-9, rtol=1e-9)
    if padded:
        hidden = torch.arange(7) >= torch.tensor(lengths[:batch])[:, None]
        ours, theirs = (layer(x, x, x, attn_mask=one, key_padding_mask=hidden)[0] for one in (mask, table))
        torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-9)


class Model(nn.Module):
    """A layer that is given its rule, or a width to make a rule of."""

    def __init__(self, make: Callable[[int], MaskMod]) -> None:
        super().__init__()
        self.attention = FlashMultiHeadAttention(8, 2, batch_first=True, dtype=torch.float64)
        self.make = make

    def forward(self, x: Tensor, given: Any) -> Tensor:
        rule = given if isinstance(given, Rule) else Rule(self.make(given))
        out: Tensor = self.attention(x, x, x, attn_mask=rule, need_weights=False)[0]
        return out


@pytest.mark.cpu("the rules make tensors on a CPU while they are traced")
@pytest.mark.parametrize("inside", (False, True), ids=("handed in", "made inside"))
@pytest.mark.parametrize("name", ("a number", "a list", "a tensor", "a tensor of each item", "a method"))
def test_a_compiled_model_compiles_nothing_anew_for_a_rule_made_anew(name: str, inside: bool) -> None:
    torch._dynamo.reset()
    make, counter, known = MADE_ANEW[name], CompileCounter(), set()
    model, x = Model(make), noise(0, 2, 7, 8)
    run = torch.compile(model, backend=counter)
    for width in (1, 1, 3, 3, 1, 0, 3):
        before = counter.frame_count
        given = width if inside else Rule(make(width))
        torch.testing.assert_close(run(x, given), model(x, given), atol=1e-9, rtol=1e-9)
        assert width not in known or counter.frame_count == before, f"compiled again for {width}"
        known.add(width)

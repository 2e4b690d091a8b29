"""Mistakes that callers make, drawn: each is told where it is made, with the value, the limit and the fix."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn

from flashmha import FlashMultiHeadAttention, Mask, Rule, Window, attention, causal, replace_mha
from flashmha.backends import get, names
from flashmha.backends.choice.registry import families
from flashmha.layer.features import HOPS
from flashmha.testing import assert_drop_in, noise, seeds, specs

sizes = st.integers(1, 6)


@pytest.mark.parametrize("name", names())
@given(
    dtype=st.sampled_from((torch.float32, torch.int64, torch.uint8)),
    beside=st.booleans(),
    shape=st.tuples(sizes, sizes),
)
def test_a_rule_that_gives_numbers_is_named(
    name: str, dtype: torch.dtype, beside: bool, shape: tuple[int, int]
) -> None:
    if get(name).why_not_here(torch.device("cpu")) is not None:
        pytest.skip(f"needs a machine on which {name} runs on a CPU")

    def earlier(batch: Tensor, head: Tensor, q_pos: Tensor, k_pos: Tensor) -> Tensor:
        return (k_pos <= q_pos).to(dtype)

    mask = Rule(earlier) & Window(2, 2) if beside else Rule(earlier)
    q, k = (noise(seed, 1, size, 1, 16).float() for seed, size in enumerate(shape))
    said = str(dtype).removeprefix("torch.")
    with pytest.raises(TypeError, match=rf"fn of Rule\(earlier\) must return a bool tensor, .* got {said} of shape"):
        attention(q, k, k, mask=mask, backend=name)
    with pytest.raises(TypeError, match=r"fn of Rule\(earlier\) must return a bool tensor"):
        mask.picture(*shape)


@given(dtype=st.sampled_from((torch.float32, torch.int64)), name=st.sampled_from(("naive", "sdpa")), size=sizes)
def test_a_mask_of_ones_own_that_gives_numbers_is_named(dtype: torch.dtype, name: str, size: int) -> None:
    class Near(Mask):
        feature = "rule"

        def mask_mod(self, seqlen_q: int, seqlen_k: int, documents: Any = None) -> Any:
            return lambda batch, head, q_idx, k_idx: ((q_idx - k_idx).abs() < 2).to(dtype)

        def __repr__(self) -> str:
            return "Near()"

    q = noise(0, 1, size, 1, 8).float()
    with pytest.raises(TypeError, match=r"mask_mod of Near\(\) must return a bool tensor, True = may attend"):
        attention(q, q, q, mask=Near(), backend=name)


@given(taken=st.integers(0, 7), optional=st.integers(0, 3), rest=st.booleans())
def test_a_rule_of_other_arguments_is_told_where_it_is_made(taken: int, optional: int, rest: bool) -> None:
    """Every function that four arguments fit is taken, and no other; the error names the four."""
    words = [f"a{place}" for place in range(taken)] + [f"b{place}=None" for place in range(optional)]
    fn = eval(f"lambda {', '.join([*words, *['*rest'] * rest])}: True")
    if taken <= 4 and (rest or taken + optional >= 4):
        assert Rule(fn).fn is fn
    else:
        with pytest.raises(TypeError, match=r"fn must take \(batch, head, q_pos, k_pos\), got <lambda>\("):
            Rule(fn)


def altered(word: str, way: str, place: int) -> str:
    """A word with one letter doubled, left out or changed."""
    place %= len(word)
    middle = {"doubled": 2 * word[place], "left out": "", "changed": "x"}[way]
    return word[:place] + middle + word[place + 1 :]


@given(hop=st.sampled_from(HOPS), way=st.sampled_from(("doubled", "left out", "changed")), place=st.integers(1, 20))
def test_a_misspelled_hop_is_told_where_its_class_is_written(hop: str, way: str, place: int) -> None:
    name = altered(hop, way, place)
    with pytest.warns(UserWarning, match=rf"Mine\.{name} is no hop, .* the hop is {hop}\.") as told:
        type("Mine", (FlashMultiHeadAttention,), {name: lambda self, *heads: heads})
    assert told[0].filename == __file__


INNOCENT: dict[str, dict[str, Any]] = {
    "beside the hop": {"merge": lambda self, out, query: out, "merged": lambda self, out: out},
    "another word": {"projection": lambda self: None, "attention": lambda self: None, "weights": lambda self: None},
    "private": {"_attent": lambda self: None},
    "no method": {"attent": 3, "merges": property(lambda self: 3)},
    "every hop": {
        "project": lambda self, query, key, value: (query, key, value),
        "process_heads": lambda self, q, k, v: (q, k, v),
        "attend": lambda self, q, k, v, **call: q,
        "process_weights": lambda self, *weights: weights[0],
        "merge": lambda self, out, query: out,
    },
}


@pytest.mark.parametrize("body", INNOCENT.values(), ids=INNOCENT.keys())
def test_a_class_without_a_misspelled_hop_is_written_in_silence(body: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        type("Mine", (FlashMultiHeadAttention,), body)


@given(
    other=st.sampled_from((torch.float64, torch.bfloat16)),
    which=st.sampled_from(("query", "key", "value", "all")),
    own=st.booleans(),
    batch_first=st.booleans(),
)
def test_an_input_of_another_dtype_is_named(other: torch.dtype, which: str, own: bool, batch_first: bool) -> None:
    more: dict[str, Any] = {"kdim": 4, "vdim": 6} if own else {}
    stock = nn.MultiheadAttention(8, 2, batch_first=batch_first, **more)
    ours = FlashMultiHeadAttention.from_torch(nn.MultiheadAttention(8, 2, batch_first=batch_first, **more))
    given_tensors = {"query": noise(0, 3, 3, 8).float(), "key": noise(1, 3, 3, 4 if own else 8).float()}
    given_tensors["value"] = noise(2, 3, 3, 6 if own else 8).float()
    for name in given_tensors:
        if which in (name, "all"):
            given_tensors[name] = given_tensors[name].to(other)
    with pytest.raises(RuntimeError) as theirs:
        stock(**given_tensors)
    first, found = "query" if which == "all" else which, str(other)
    with pytest.raises(RuntimeError) as mine:
        ours(**given_tensors)
    assert type(mine.value) is type(theirs.value)
    assert str(mine.value) == (
        f"{first} must have the dtype of the layer's weights, float32, got {found.removeprefix('torch.')}: "
        f"{first}.to(torch.float32), or layer.to({found})."
    )


@given(width=st.integers(1, 30).filter(lambda width: width != 8), which=st.sampled_from(("query", "key", "value")))
def test_another_width_is_named_behind_the_words_of_stock(width: int, which: str) -> None:
    options: dict[str, Any] = {} if which == "query" else {"kdim": 8, "vdim": 8, "embed_dim": 4, "num_heads": 2}
    options = {"embed_dim": 8, "num_heads": 2, "batch_first": True, **options}
    right = {"query": noise(0, 2, 3, options["embed_dim"]), "key": noise(1, 2, 3, 8), "value": noise(2, 2, 3, 8)}
    right[which] = noise(3, 2, 3, width)
    with pytest.raises(AssertionError) as theirs:
        nn.MultiheadAttention(**options)(**right)
    with pytest.raises(AssertionError) as mine:
        FlashMultiHeadAttention(**options)(**right)
    name = {"query": "embed_dim", "key": "kdim", "value": "vdim"}[which]
    said = str(mine.value).removeprefix(str(theirs.value))
    assert said.startswith(f"; {which} must have {name}=8 features, got shape (2, 3, {width}): build the layer with ")
    assert f"{name}={width}" in said


@given(seed=seeds(), seqlen=sizes, cross=sizes, norm_first=st.booleans(), whole=st.booleans())
def test_a_mask_goes_through_torchs_look_for_causality(
    seed: int, seqlen: int, cross: int, norm_first: bool, whole: bool
) -> None:
    torch.manual_seed(seed)
    options: dict[str, Any] = {"dropout": 0.0, "batch_first": True, "norm_first": norm_first}
    x, memory = noise(seed, 2, seqlen, 8).float(), noise(seed + 1, 2, cross, 8).float()
    model: nn.Module
    if whole:
        model = nn.Transformer(8, 2, 1, 1, 16, **options)
    else:
        model = nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 16, **options), 2)
    inputs = (memory, x) if whole else (x, memory)
    hidden = ~causal().materialize(1, 1, seqlen, seqlen)[0, 0]
    expected = model(*inputs, tgt_mask=hidden, memory_mask=torch.zeros(seqlen, cross, dtype=torch.bool))
    found = replace_mha(model)(*inputs, tgt_mask=causal(), memory_mask=Window(None, None))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


WRONG_DRAWS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no length": ({"longest": 0}, ValueError, "longest must be a whole number of at least 1, got 0."),
    "half a length": ({"longest": 1.5}, ValueError, "longest must be a whole number of at least 1, got 1.5."),
    "a class": ({"limits": type(get("sdpa"))}, TypeError, "limits must be a Limits, such as get(name).limits, or None"),
    "no head dims": ({"head_dims": ()}, ValueError, "head_dims must be whole numbers of at least 1, got ()."),
    "a head dim of 0": (
        {"head_dims": [8, 0]},
        ValueError,
        "head_dims must be whole numbers of at least 1, got (8, 0).",
    ),
}


@pytest.mark.parametrize(("options", "kind", "words"), WRONG_DRAWS.values(), ids=WRONG_DRAWS.keys())
def test_a_draw_of_nothing_is_refused_where_it_is_asked_for(
    options: dict[str, Any], kind: type[Exception], words: str
) -> None:
    with pytest.raises(kind, match=re.escape(words)):
        specs(**options)


@pytest.mark.parametrize("args", [noise(0, 2, 3, 8), "xxx", 3, {"query": 1}])
def test_arguments_that_are_no_tuple_are_refused(args: Any) -> None:
    stock, ours = nn.MultiheadAttention(8, 2), FlashMultiHeadAttention(8, 2)
    with pytest.raises(TypeError, match=r"args must be the arguments of a call in a tuple, such as \(x, x, x\), got "):
        assert_drop_in(stock, ours, args)
    with pytest.raises(TypeError, match="kwargs must be a dict of arguments by name, or None, got "):
        assert_drop_in(stock, ours, (), [args])  # type: ignore[arg-type]


@given(
    batch=st.integers(1, 3),
    seqlen_q=st.integers(1, 4),
    seqlen_k=st.integers(1, 4),
    batch_first=st.booleans(),
    name=st.sampled_from(("key_padding_mask", "attn_mask")),
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    meant=st.sampled_from(("another shape", "the other mask", "another order")),
)
def test_a_mask_that_does_not_fit_is_told_what_fits(
    batch: int, seqlen_q: int, seqlen_k: int, batch_first: bool, name: str, shape: list[int], meant: str
) -> None:
    """The error begins with stock's own text, and goes on with the shapes, this one, and what it may be meant as."""
    layer = FlashMultiHeadAttention(8, 2, batch_first=batch_first)
    stock = nn.MultiheadAttention(8, 2, batch_first=batch_first)
    query, key = (torch.randn((batch, size, 8) if batch_first else (size, batch, 8)) for size in (seqlen_q, seqlen_k))
    padding, dense = (batch, seqlen_k), (seqlen_q, seqlen_k)
    if meant == "the other mask":
        shape = [*(dense if name == "key_padding_mask" else padding)]
    elif meant == "another order" and seqlen_q == seqlen_k:
        shape = [seqlen_k, batch] if name == "key_padding_mask" else [batch, batch]
    mask = torch.zeros(shape, dtype=torch.bool)
    ways: dict[str, tuple[tuple[int, ...], ...]] = {
        "key_padding_mask": (padding,),
        "attn_mask": (
            dense,
            (2 * batch, *dense),
            *((items, heads, *dense) for items in (1, batch) for heads in (1, 2)),
        ),
    }
    call: dict[str, Any] = {name: mask, "need_weights": False}
    if tuple(shape) in ways[name]:
        layer(query, key, key, **call)
        return
    with pytest.raises((AssertionError, RuntimeError)) as caught:
        layer(query, key, key, **call)
    said = str(caught.value)
    assert f"{name} must be (" in said and f", got {tuple(shape)}" in said and said.endswith(".")
    other = "attn_mask" if name == "key_padding_mask" else "key_padding_mask"
    if meant == "the other mask" or f"give it as {other}=" in said:
        assert f"give it as {other}=" in said and tuple(shape) in ways[other]
    if name == "key_padding_mask" or len(shape) < 4:  # stock has no mask of four axes
        with pytest.raises((AssertionError, RuntimeError)) as theirs:
            stock(query, key, key, **call)
        assert type(theirs.value) is type(caught.value) and said.startswith(str(theirs.value).rstrip("."))


@given(name=st.sampled_from(names()), way=st.sampled_from(("doubled", "left out", "changed")), place=st.integers(0, 9))
def test_a_misspelled_backend_is_told_its_name(name: str, way: str, place: int) -> None:
    wrong = altered(name, way, place)
    assume(wrong not in (*names(), *families()))
    with pytest.raises(ValueError, match=rf"^backend must be one of .*, got '{wrong}'; say '\w+'\.$") as caught:
        FlashMultiHeadAttention(8, 2, backend=wrong)
    (near,) = re.findall(r"'(\w+)'\.$", str(caught.value))
    assert near in (*names(), *families())

"""Public functions handed the wrong kind of thing, or a number out of range: an error that names the argument."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

import flashmha
from flashmha import AttentionSpec, FlashMultiHeadAttention, attention, testing

SIZES = {"batch": 1, "seqlen_q": 3, "seqlen_k": 3, "heads": 2, "heads_kv": 2, "head_dim": 4, "head_dim_v": 4}
SPEC = AttentionSpec(**SIZES)
q = torch.zeros(1, 3, 2, 4)
x = torch.zeros(1, 3, 8)
layer = FlashMultiHeadAttention(8, 2, batch_first=True)
LENGTHS, PADDING = flashmha.KeyLengths(torch.tensor([1, 2])), flashmha.KeyPadding(torch.ones(2, 3, dtype=torch.bool))
DENSE, PACKED = flashmha.Dense(torch.ones(2, 2, 3, 3, dtype=torch.bool)), flashmha.Documents(torch.tensor([0, 3]))
MASKS = (flashmha.causal(), LENGTHS, PADDING, DENSE, PACKED)

NOTHING = {
    "a whole number": 3,
    "a fraction": 2.5,
    "a text": "text",
    "a list": [],
    "an object": object(),
    "a class": nn.Linear,
    "nothing": None,
}
"""What no argument below may be."""

CALLS: dict[str, Callable[[Any], Any]] = {
    "model of swap_report": flashmha.swap_report,
    "model of restore_mha": flashmha.restore_mha,
    "model of replace_mha": flashmha.replace_mha,
    "module of from_torch": FlashMultiHeadAttention.from_torch,
    "subject of explain": flashmha.explain,
    "query of explain": lambda wrong: flashmha.explain(layer, wrong, x, x),
    "value of explain": lambda wrong: flashmha.explain(layer, x, x, wrong),
    "k of explain": lambda wrong: flashmha.explain(q, wrong, q),
    "q of attention": lambda wrong: attention(wrong, q, q),
    "v of attention": lambda wrong: attention(q, q, wrong),
    "v of FlashAttentionWrapper": lambda wrong: flashmha.FlashAttentionWrapper()(q, q, wrong),
    "q of compare_outputs": lambda wrong: flashmha.compare_outputs(wrong, q, q),
    "dtype of AttentionSpec": lambda wrong: AttentionSpec(**SIZES, dtype=wrong),
    "device of AttentionSpec": lambda wrong: AttentionSpec(**SIZES, device=wrong),
    "slopes of ALiBi": flashmha.ALiBi,
    "table of RelativeBias": flashmha.RelativeBias,
    "bias of TensorBias": flashmha.TensorBias,
    "valid of KeyPadding": flashmha.KeyPadding,
    "lengths of KeyLengths": flashmha.KeyLengths,
    "cu_seqlens of Documents": flashmha.Documents,
    "dense mask of Dense": flashmha.Dense,
    "devices of Limits": lambda wrong: flashmha.Limits(wrong, (), frozenset()),
    "dtypes of Limits": lambda wrong: flashmha.Limits((), wrong, frozenset()),
    "features of Limits": lambda wrong: flashmha.Limits((), (), wrong),
    "stock of assert_drop_in": lambda wrong: testing.assert_drop_in(wrong, layer),
    "ours of assert_drop_in": lambda wrong: testing.assert_drop_in(layer, wrong),
}
OPTIONAL: dict[str, Callable[[Any], Any]] = {
    "mask of attention": lambda wrong: attention(q, q, q, mask=wrong),
    "bias of attention": lambda wrong: attention(q, q, q, bias=wrong),
    "sinks of attention": lambda wrong: attention(q, q, q, sinks=wrong),
    "mask of AttentionSpec": lambda wrong: AttentionSpec(**SIZES, mask=wrong),
    "bias of AttentionSpec": lambda wrong: AttentionSpec(**SIZES, bias=wrong),
    "sinks of AttentionSpec": lambda wrong: AttentionSpec(**SIZES, sinks=wrong),
}
"""The same, where ``None`` is fine."""


@pytest.mark.parametrize("call", (*CALLS, *OPTIONAL))
@pytest.mark.parametrize("kind", NOTHING)
def test_the_wrong_kind_is_named(call: str, kind: str) -> None:
    if kind == "nothing" and call in OPTIONAL:
        OPTIONAL[call](None)
        return
    with pytest.raises((TypeError, ValueError)) as caught:
        (CALLS | OPTIONAL)[call](NOTHING[kind])
    argument = call.partition(" of ")[0]
    assert f"{argument} must " in str(caught.value), caught.value


NUMBERS: dict[str, Callable[[Any], Any]] = {
    "dropout_p": lambda wrong: attention(q, q, q, dropout_p=wrong),
    "softcap": lambda wrong: attention(q, q, q, softcap=wrong),
    "softmax_scale": lambda wrong: attention(q, q, q, softmax_scale=wrong),
    "seq_len": lambda wrong: flashmha.benchmark_attention(wrong, 8, 2),
    "num_heads": lambda wrong: flashmha.benchmark_attention(8, 8, wrong),
    "num_iterations": lambda wrong: flashmha.benchmark_attention(8, 8, 2, num_iterations=wrong),
    "d_model": lambda wrong: flashmha.benchmark_attention(8, wrong, 2),
    **{name: lambda wrong, name=name: AttentionSpec(**{**SIZES, name: wrong}) for name in SIZES},  # type: ignore[misc]
}


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("wrong", ("text", [], object()))
def test_what_is_no_number_is_named(name: str, wrong: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=f"{name} must "):
        NUMBERS[name](wrong)


@pytest.mark.parametrize("name", SIZES)
def test_a_size_is_not_negative(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} must be a whole number of at least 0, got -1\."):
        AttentionSpec(**{**SIZES, name: -1})


@given(
    mask=st.sampled_from(MASKS),
    seqlen_q=st.integers(-1, 5) | st.sampled_from((2.5, "3", None)),
    seqlen_k=st.integers(-1, 5),
    batch=st.integers(-2, 6),
    head=st.integers(-2, 6),
)
def test_a_picture_is_drawn_of_what_the_mask_has(
    mask: flashmha.Mask, seqlen_q: Any, seqlen_k: int, batch: int, head: int
) -> None:
    assume(0 not in (seqlen_q, seqlen_k))  # no cell is drawn then, and none can be missing
    fits = isinstance(seqlen_q, int) and min(seqlen_q, seqlen_k, batch, head) >= 0
    if mask is LENGTHS or mask is PADDING:
        fits = fits and batch < 2
    if mask is PADDING:
        fits = fits and seqlen_k <= 3
    if mask is DENSE:
        fits = fits and batch < 2 and head < 2 and max(seqlen_q, seqlen_k) <= 3
    if mask is PACKED:
        fits = fits and batch == 0
    if fits:
        rows = [line.split(" ") for line in mask.picture(seqlen_q, seqlen_k, batch=batch, head=head).splitlines()]
        if mask is PADDING or mask is DENSE:
            assert rows == [["■"] * seqlen_k] * seqlen_q
        if mask is LENGTHS:
            assert rows == [["■" if key <= batch else "·" for key in range(seqlen_k)]] * seqlen_q
        assert [len(row) for row in rows] == [seqlen_k] * seqlen_q
    else:
        with pytest.raises(ValueError, match=r"(seqlen_q|seqlen_k|batch|head) must .*, got"):
            mask.picture(seqlen_q, seqlen_k, batch=batch, head=head)


@pytest.mark.parametrize(
    ("arguments", "options"),
    (
        ((layer,), {}),
        ((layer, x), {}),
        ((layer, x, x, x), {"spam": 1}),
        ((q,), {}),
        ((q, q), {}),
        ((q, q, q, None), {}),
        ((q, q, q), {"spam": 1}),
        ((SPEC, None, None, None), {}),
        ((SPEC,), {"spam": 1}),
        ((SPEC, "naive", (9, 0)), {}),
        ((AttentionSpec(**SIZES, device=torch.device("cuda")), None, 9.0), {}),
        ((AttentionSpec(**SIZES, device=torch.device("cuda")), None, (9,)), {}),
    ),
)
def test_explain_says_how_it_is_called(arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError), match=r"(the call|options|capability) must ") as caught:
        flashmha.explain(*arguments, **options)
    assert "explain_" not in str(caught.value)


def test_explain_takes_the_backend_of_a_problem_by_its_name() -> None:
    assert flashmha.explain(SPEC, backend="naive").chosen == "naive"


@pytest.mark.parametrize("file", (3, 2.5, ["tuned.json"], object()))
def test_a_table_comes_from_a_path(file: Any) -> None:
    with pytest.raises(TypeError, match="file must be a path"):
        flashmha.load_tuned(file)

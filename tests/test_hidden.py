"""What hides a key: the mask, or ``-inf`` in the bias's own dtype. Every other number is one to compute with."""

import dataclasses
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from flashmha import AttentionSpec, FlashMultiHeadAttention, KeyPadding, attention, causal
from flashmha.backends import get, names
from flashmha.scores import ALiBi, Bias, RelativeBias, TensorBias, narrowed, plus
from flashmha.testing import assert_agrees, noise, seeds
from flashmha.testing.judge import answer
from flashmha.weights import attention_with_weights

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LOWEST = tuple(torch.finfo(dtype).min for dtype in DTYPES)
NUMBERS = (-1e9, -1e4, -7e4, 7e4, 1e-8, -1e300, *LOWEST)
"""What people write into masks, and what a narrower dtype cannot hold."""
SERVED = [name for name in names() if get(name).limits.aten or name == "flex"]
LAYOUTS = ("(b, h, q, k)", "(1, h, q, k)", "(1, 1, q, k)", "(b, 1, 1, k)")


def table(
    number: float, dtype: torch.dtype, layout: str, seed: int, *, batch: int, heads: int, seqlen_q: int, seqlen_k: int
) -> Tensor:
    """A bias whose rows hold random numbers, nothing but one number, ``-inf`` among them or nothing but ``-inf``."""
    generator = torch.Generator("cpu").manual_seed(seed)
    shape = {
        "(b, h, q, k)": (batch, heads, seqlen_q, seqlen_k),
        "(1, h, q, k)": (1, heads, seqlen_q, seqlen_k),
        "(1, 1, q, k)": (1, 1, seqlen_q, seqlen_k),
        "(b, 1, 1, k)": (batch, 1, 1, seqlen_k),
    }[layout]
    bias = torch.randn(shape, generator=generator, dtype=torch.float64)
    kind = torch.randint(0, 6, (*shape[:3], 1), generator=generator)
    coin = torch.rand(shape, generator=generator) < 0.5
    bias = torch.where((kind < 2) | ((kind == 2) & coin), number, bias)  # two kinds of rows hold nothing else
    hidden = ((kind == 1) & coin) | (kind == 3) | ((kind == 4) & coin)
    limits = torch.finfo(dtype)
    return bias.clamp(limits.min, limits.max).masked_fill(hidden, -math.inf).to(dtype)


@st.composite
def problems(draw: st.DrawFn, *, features: frozenset[str]) -> AttentionSpec:
    """Problems whose bias has a dtype of its own and holds numbers that the heads' has not."""
    sizes = {"batch": draw(st.integers(1, 2)), "seqlen_q": draw(st.integers(1, 6)), "seqlen_k": draw(st.integers(1, 6))}
    heads_kv = draw(st.sampled_from((1, 2)))
    heads = heads_kv * draw(st.sampled_from((1, 2)))
    layout, number = draw(st.sampled_from(LAYOUTS)), draw(st.sampled_from(NUMBERS))
    needs_grad = "backward" in features and draw(st.booleans())
    need_lse = "lse" in features and (not needs_grad or "lse_grad" in features) and draw(st.booleans())
    if need_lse:  # which is float32
        number = max(number, LOWEST[2])
    tensor = table(number, draw(st.sampled_from(DTYPES)), layout, draw(seeds()), heads=heads, **sizes)
    bias: Bias = TensorBias(tensor.requires_grad_(needs_grad and "bias_grad" in features and draw(st.booleans())))
    if not need_lse and draw(st.sampled_from((False, False, True))):
        other = draw(st.sampled_from(("low", "alibi", "relative")))
        if other == "low":
            dtype = draw(st.sampled_from(DTYPES))
            bias = bias + TensorBias(table(number, dtype, "(1, 1, q, k)", 0, heads=heads, **sizes))
        elif other == "alibi" and "alibi" in features:
            bias = bias + ALiBi(torch.rand(heads))
        else:
            bias = bias + RelativeBias(torch.full((heads, 3), max(number, LOWEST[2])))
    valid = torch.rand(sizes["batch"], sizes["seqlen_k"], generator=torch.Generator().manual_seed(draw(seeds()))) < 0.7
    sinks = torch.tensor([draw(st.sampled_from((0.0, 7e4, -math.inf))) for _ in range(heads)])
    return AttentionSpec(
        **sizes,
        heads=heads,
        heads_kv=heads_kv,
        head_dim=8,
        head_dim_v=8,
        dtype=draw(st.sampled_from(DTYPES)),
        mask=draw(st.sampled_from((None, None, causal(), KeyPadding(valid)))),
        bias=bias,
        sinks=sinks if "sinks" in features and draw(st.sampled_from((False, False, True))) else None,
        needs_grad=needs_grad,
        need_lse=need_lse,
    )


@pytest.mark.parametrize("name", SERVED)
@given(data=st.data(), seed=seeds())
def test_a_bias_of_any_dtype_hides_where_it_is_minus_infinity_and_nowhere_else(
    name: str, data: st.DataObject, seed: int
) -> None:
    limits = get(name).limits
    spec = data.draw(problems(features=limits.features - limits.not_on.get("cpu", frozenset())))
    assert_agrees(name, spec, seed)
    found = answer(get(name), spec, seed).named
    blind = blind_rows(spec)
    assert all(tensor.isfinite().all() for part, tensor in found.items() if part != "lse")
    assert not found["out"].masked_select(blind.transpose(1, 2)).any()
    if spec.need_lse:
        assert torch.equal(found["lse"] == -math.inf, blind[..., 0])


def blind_rows(spec: AttentionSpec) -> Tensor:
    """(batch, heads, seqlen_q, 1), from the definition of the word."""
    bias, allowed = spec.added(), spec.allowed()
    assert bias is not None
    shape = (spec.batch, spec.heads, spec.seqlen_q, spec.seqlen_k)
    seen = (bias.detach() != -math.inf).expand(shape)
    seen = seen if allowed is None else seen & allowed.expand(shape)
    blind = ~seen.any(-1, keepdim=True)
    return blind if spec.sinks is None else blind & (spec.sinks == -math.inf).view(1, -1, 1, 1)

"""Biases by distance as modules: the numbers of transformers, gradients on every backend, and no state of their own."""

import copy
from typing import Any

import pytest
import torch
from conftest import Largest, fewer
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from flashmha import ALiBi, AlibiBias, AttentionSpec, Bias, RelativeBias, RelativePositionBias, attention, causal
from flashmha.backends import get, names
from flashmha.problem.positions import IndexGrid
from flashmha.testing import assert_agrees, noise, seeds

LENGTHS = st.integers(1, 40)


@st.composite
def bucketed(draw: st.DrawFn) -> dict[str, Any]:
    """The sizes of a T5 bias."""
    bidirectional = draw(st.booleans())
    buckets = draw(st.integers(4 if bidirectional else 2, 40))
    exact = buckets // (4 if bidirectional else 2)
    return {
        "num_heads": draw(st.integers(1, 3)),
        "num_buckets": buckets,
        "max_distance": draw(st.integers(exact + 1, 200)),
        "bidirectional": bidirectional,
    }


def theirs(sizes: dict[str, Any]) -> Any:
    """transformers' attention of such sizes."""
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5", reason="needs pip install transformers")
    config = t5.T5Config(
        d_model=8,
        d_kv=4,
        num_heads=sizes["num_heads"],
        relative_attention_num_buckets=sizes["num_buckets"],
        relative_attention_max_distance=sizes["max_distance"],
    )
    config.is_decoder = not sizes["bidirectional"]
    return t5.T5Attention(config, has_relative_attention_bias=True, layer_idx=0)


@given(sizes=bucketed(), seqlen_q=st.integers(1, 300), further=st.integers(0, 30))
def test_buckets_are_those_of_transformers(sizes: dict[str, Any], seqlen_q: int, further: int) -> None:
    layer, bias, seqlen_k = theirs(sizes), RelativePositionBias(**sizes), seqlen_q + further
    bias.load_state_dict(layer.relative_attention_bias.state_dict())
    expected = layer.compute_bias(seqlen_q, seqlen_k, past_seen_tokens=further)
    assert torch.equal(made(bias, seqlen_q, seqlen_k), expected)


def made(module: nn.Module, seqlen_q: int, seqlen_k: int) -> Tensor:
    """The bias of a module as a tensor."""
    q, k = (torch.zeros(1, seqlen, module.num_heads, 4) for seqlen in (seqlen_q, seqlen_k))
    bias = module(q, k)
    assert isinstance(bias, Bias)
    return bias.materialize(1, int(module.num_heads), seqlen_q, seqlen_k)  # type: ignore[arg-type]


@given(heads=st.integers(1, 130))
def test_slopes_are_those_of_transformers(heads: int) -> None:
    bloom = pytest.importorskip("transformers.models.bloom.modeling_bloom", reason="needs pip install transformers")
    expected = bloom.build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)[:, 0, 1]
    torch.testing.assert_close(ALiBi.usual(heads).slopes, expected)
    assert torch.equal(AlibiBias(heads).slopes, ALiBi.usual(heads).slopes)


@given(heads=st.integers(1, 3), reach=st.integers(0, 5), data=st.data(), seqlen_q=LENGTHS, seqlen_k=LENGTHS)
def test_a_table_is_made_as_it_is_looked_up(
    heads: int, reach: int, data: st.DataObject, seqlen_q: int, seqlen_k: int
) -> None:
    def part(seqlen: int) -> range | None:
        ends = data.draw(st.none() | st.tuples(st.integers(0, seqlen), st.integers(0, seqlen)))
        return ends if ends is None else range(min(ends), max(ends))

    bias, problem = RelativeBias(noise(0, heads, 2 * reach + 1)), (2, heads, seqlen_q, seqlen_k)
    parts = {"queries": part(seqlen_q), "keys": part(seqlen_k)}
    assert torch.equal(bias.materialize(*problem, **parts), Bias.dense(bias, IndexGrid(*problem, **parts)))


MODULES = {
    "alibi": lambda heads: AlibiBias(heads, dtype=torch.float64),
    "learned alibi": lambda heads: AlibiBias(heads, learned=True, dtype=torch.float64),
    "t5": lambda heads: RelativePositionBias(heads, 8, 11, dtype=torch.float64),
    "t5 of a decoder": lambda heads: RelativePositionBias(heads, 8, 11, False, dtype=torch.float64),
}


def by_hand(module: Any, seqlen_q: int, seqlen_k: int) -> Tensor:
    """What a module adds to the scores, out of its parameters, (heads, seqlen_q, seqlen_k)."""
    distance = torch.arange(seqlen_k)[None] - torch.arange(seqlen_q)[:, None] - (seqlen_k - seqlen_q)
    if isinstance(module, AlibiBias):
        return -module.slopes[:, None, None] * distance.abs()
    places = module.buckets[distance.clamp(-module.max_distance, module.max_distance) + module.max_distance]
    found: Tensor = module.weight[places].movedim(-1, 0)
    return found


@given(
    name=st.sampled_from(sorted(MODULES)),
    heads=st.integers(1, 5),
    seqlen_q=LENGTHS,
    seqlen_k=LENGTHS,
    hidden_future=st.booleans(),
    backend=st.sampled_from(("naive", "sdpa", None)),
    seed=seeds(),
)
def test_a_learned_bias_gets_its_gradient(
    name: str, heads: int, seqlen_q: int, seqlen_k: int, hidden_future: bool, backend: str | None, seed: int
) -> None:
    module: Any = MODULES[name](heads)
    q, k, v = (noise(seed + i, 2, n, heads, 4).requires_grad_() for i, n in enumerate((seqlen_q, seqlen_k, seqlen_k)))
    mask = causal() if hidden_future else None
    out = attention(q, k, v, bias=module(q, k), mask=mask, backend=backend)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / 2 + by_hand(module, seqlen_q, seqlen_k)
    if mask is not None:
        scores = scores.masked_fill(~mask.materialize(2, heads, seqlen_q, seqlen_k), -torch.inf)
    blind = (scores == -torch.inf).all(-1, keepdim=True)
    weights = scores.masked_fill(blind, 0.0).softmax(-1).masked_fill(blind, 0.0)
    expected = torch.einsum("bhqk,bkhd->bqhd", weights, v)
    wanted, cotangent = [q, k, v, *module.parameters()], noise(seed + 3, *out.shape)
    for one, other in zip(
        (out, *torch.autograd.grad(out, wanted, cotangent)),
        (expected, *torch.autograd.grad(expected, wanted, cotangent)),
    ):
        torch.testing.assert_close(one, other, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("name", sorted(MODULES))
@fewer(5)
@given(seqlen_q=st.integers(1, 20), seqlen_k=st.integers(1, 20), needs_grad=st.booleans(), seed=seeds())
def test_every_backend_that_claims_it_agrees(
    name: str, seqlen_q: int, seqlen_k: int, needs_grad: bool, seed: int
) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        with torch.set_grad_enabled(needs_grad):
            x = torch.zeros(1, 1, 2, 16)
            bias: Bias = MODULES[name](2).to(dtype)(x, x)
            spec = AttentionSpec(2, seqlen_q, seqlen_k, 2, 2, 16, 16, dtype, x.device, bias=bias, needs_grad=needs_grad)
        serving = [one for one in names() if get(one).why_not(spec) is None and not get(one).why_not_here(x.device)]
        assert {"naive", "sdpa"} <= set(serving)
        for one in serving:
            if one != "naive":
                assert_agrees(get(one), spec, seed)


@pytest.mark.cpu("on a GPU the kernel's own memory shows in no operator")
@pytest.mark.parametrize("name", sorted(MODULES))
def test_no_bias_is_made_for_each_batch_item(name: str) -> None:
    batch, heads, seqlen = 8, 4, 64
    module = MODULES[name](heads).float()
    q = torch.randn(batch, seqlen, heads, 8)
    with torch.no_grad(), Largest() as largest:
        attention(q, q, q, bias=module(q, q), backend="sdpa")
    assert largest.seen <= 2 * heads * seqlen * seqlen * 4


@given(
    name=st.sampled_from(sorted(MODULES)), heads=st.integers(1, 5), dtype=st.sampled_from((torch.half, torch.double))
)
def test_what_follows_from_sizes_is_in_no_state_and_survives_every_move(
    name: str, heads: int, dtype: torch.dtype
) -> None:
    module = MODULES[name](heads)
    assert set(module.state_dict()) == {key for key, _ in module.named_parameters()}
    with torch.device("meta"):
        empty = MODULES[name](heads)
    moved = empty.to_empty(device=torch.zeros(()).device)
    moved.load_state_dict(module.state_dict())
    for twin in (moved, copy.deepcopy(module)):
        assert torch.equal(made(twin, 5, 7), made(module, 5, 7))
    rounded = copy.deepcopy(module).to(dtype)
    if not list(module.parameters()):
        torch.testing.assert_close(made(rounded, 5, 7), made(module, 5, 7), check_dtype=False)
        assert torch.equal(made(rounded.double(), 5, 7), made(module, 5, 7))


def test_slopes_and_numbers_can_be_drawn_again() -> None:
    alibi, t5 = AlibiBias(3, learned=True), RelativePositionBias(3)
    before = t5.weight.clone()
    with torch.no_grad():
        alibi.slopes.zero_()
    for module in (alibi, t5):
        module.reset_parameters()
    assert torch.equal(alibi.slopes, ALiBi.usual(3).slopes) and not torch.equal(before, t5.weight)


@fewer(10)
@given(name=st.sampled_from(sorted(MODULES)), seed=seeds())
def test_one_graph_holds_them(name: str, seed: int) -> None:
    module = MODULES[name](2).float()

    def run(q: Tensor) -> Tensor:
        return attention(q, q, q, bias=module(q, q))

    torch._dynamo.reset()
    q = noise(seed, 2, 9, 2, 8).float()
    torch.testing.assert_close(torch.compile(run, backend="aot_eager", fullgraph=True)(q), run(q))


BAD = {
    "no heads": lambda: AlibiBias(0),
    "half a head": lambda: RelativePositionBias(1.5),  # type: ignore[arg-type]
    "no slopes": lambda: ALiBi.usual(0),
    "too few buckets": lambda: RelativePositionBias(2, num_buckets=3),
    "one bucket of a decoder": lambda: RelativePositionBias(2, num_buckets=1, bidirectional=False),
    "no far distance": lambda: RelativePositionBias(2, num_buckets=32, max_distance=8),
}


@pytest.mark.parametrize("name", sorted(BAD))
def test_bad_sizes_are_told_what_was_wrong(name: str) -> None:
    with pytest.raises(ValueError, match=r"must be .*got"):
        BAD[name]()

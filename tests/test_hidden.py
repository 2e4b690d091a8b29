"""What hides a key: the mask, or ``-inf`` in the bias's own dtype. Every other number is one to compute with."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flashmha import AttentionSpec, FlashMultiHeadAttention, KeyPadding, attention, causal
from flashmha.backends import get, names
from flashmha.backends.sdpa.backend import attend_on_cuda
from flashmha.backends.sdpa.mask_tensors import dense_mask
from flashmha.problem.bias_values import add_biases, narrow_bias
from flashmha.problem.scores import ALiBi, Bias, RelativeBias, TensorBias
from flashmha.testing import assert_agrees, noise, seeds
from flashmha.testing.judge import answer
from flashmha.weights.attend import attention_with_weights

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
    dtype = draw(st.sampled_from(DTYPES))
    if need_lse and number < -1e30:  # it is float32, and the lowest number of all in a row of those near it
        number = -1e30 if dtype == torch.float64 else torch.finfo(dtype).min
    tensor = table(number, dtype, layout, draw(seeds()), heads=heads, **sizes)
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
    valid = noise(draw(seeds()), sizes["batch"], sizes["seqlen_k"]) < 0.5
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


def heads(dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (noise(seed + place, 2, 5, 2, 8, dtype=dtype) for place in range(3))
    return q, k, v


def textbook(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Output and weights in float64 of scores that were added to the bias in float32, or what is finer."""
    single = torch.promote_types(torch.promote_types(q.dtype, bias.dtype), torch.float32)
    score = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()) / math.sqrt(q.shape[-1])
    score = (score.to(single) + bias).double()
    blind = (bias == -math.inf).all(-1, keepdim=True)
    weights = score.masked_fill(blind, 0.0).softmax(-1).masked_fill(blind, 0.0)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v.double()), weights


def close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    # 7e4 is a number with steps of 0.008 in float32
    torch.testing.assert_close(actual.double(), expected.double(), atol=0.02 + 8 * torch.finfo(dtype).eps, rtol=0.02)


SQUARE: dict[str, Any] = {"batch": 2, "heads": 2, "seqlen_q": 5, "seqlen_k": 5}
drawn_tables = st.builds(
    lambda number, dtype, layout, seed: table(number, dtype, layout, seed, **SQUARE),
    st.sampled_from(NUMBERS),
    st.sampled_from(DTYPES[:3]),  # float64 beside -1e9 still sees the scores, where a kernel in float32 does not
    st.sampled_from(LAYOUTS),
    seeds(),
)


@given(bias=drawn_tables, dtype=st.sampled_from(DTYPES), average=st.booleans(), seed=seeds())
def test_weights_hide_what_the_output_hides(bias: Tensor, dtype: torch.dtype, average: bool, seed: int) -> None:
    q, k, v = (x.requires_grad_() for x in heads(dtype, seed))
    spec = AttentionSpec.of(q, k, v, bias=TensorBias(bias))
    for wanted in ("naive", "sdpa"):
        out, weights = attention_with_weights(q, k, v, spec, wanted, average=average)
        expected_out, expected = textbook(q, k, v, bias)
        close(out, expected_out, dtype)
        close(+weights, expected.mean(1) if average else expected, dtype)
        toward = noise(seed, *weights.shape, dtype=weights.dtype)
        for again in (False, True):  # by blocks, and by the definition in its graph
            made = torch.autograd.grad(weights, (q, k), toward, create_graph=again, retain_graph=True)
            exact = torch.autograd.grad(textbook_weights(q, k, v, bias, average), (q, k), toward.double())
            for one, other in zip(made, exact):
                close(one, other, dtype)


def textbook_weights(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, average: bool) -> Tensor:
    weights = textbook(q, k, v, bias)[1]
    return weights.mean(1) if average else weights


@given(bias=drawn_tables, dtype=st.sampled_from(DTYPES), name=st.sampled_from((None, "naive", "sdpa")), seed=seeds())
def test_every_transform_hides_the_same(bias: Tensor, dtype: torch.dtype, name: str | None, seed: int) -> None:
    q, k, v = heads(dtype, seed)
    bias = bias.expand(2, 2, 5, 5)
    expected = textbook(q, k, v, bias)[0]

    def one(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        out = attention(q[None], k[None], v[None], bias=bias[None], backend=name)
        assert isinstance(out, Tensor)
        return out[0]

    close(torch.func.vmap(one)(q, k, v, bias), expected, dtype)
    made = torch.func.grad(lambda v: one(q[0], k[0], v, bias[0]).sum())(v[0])
    leaf = v[:1].double().requires_grad_()
    exact = torch.autograd.grad(textbook(q[:1], k[:1], leaf, bias[:1])[0].sum(), leaf)[0][0]
    close(made, exact, dtype)
    double = [x.detach().requires_grad_() for x in (q, k, v)]
    out = attention(*double, bias=bias, backend="naive")
    first = torch.autograd.grad(out.float().sum(), double, create_graph=True)
    assert all(x.isfinite().all() for x in torch.autograd.grad(sum(x.float().square().sum() for x in first), double))


@given(
    bias=drawn_tables, dtype=st.sampled_from(DTYPES[:2]), name=st.sampled_from(("naive", "sdpa", "flex")), seed=seeds()
)
def test_autocast_ends_at_the_door(bias: Tensor, dtype: torch.dtype, name: str, seed: int) -> None:
    q, k, v = heads(torch.float32, seed)
    with torch.autocast("cpu", dtype=dtype):
        found = attention(q, k, v, bias=bias, backend=name, return_lse=True)
        q, k, v = (x.to(dtype).requires_grad_() for x in (q, k, v))
        spec = AttentionSpec.of(q, k, v, bias=TensorBias(bias))
        looks = [attention_with_weights(q, k, v, spec, "naive")]
        looks = [(out, +weights, *torch.autograd.grad(weights.sum(), (q, k))) for out, weights in looks]
    plain = attention(q.detach(), k.detach(), v.detach(), bias=bias, backend=name, return_lse=True)
    assert all(torch.equal(one, other) for one, other in zip(found, plain))
    out, weights = attention_with_weights(q, k, v, spec, "naive")
    again = (out, +weights, *torch.autograd.grad(weights.sum(), (q, k)))
    assert all(torch.equal(one, other) for one, other in zip(looks[0], again))


class Watching(Tensor):
    """A tensor that PyTorch's own function computes with."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.filterwarnings("ignore:.*trace:DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("casting", (None, torch.float16, torch.bfloat16))
@pytest.mark.parametrize("need_weights", (True, False))
@given(
    number=st.sampled_from((-1e9, -1e4, -7e4, LOWEST[2])),
    padded=st.sampled_from((None, -math.inf, LOWEST[2])),
    seed=seeds(),
)
def test_pytorchs_own_function_leaves_finite_masks_finite(
    casting: torch.dtype | None, need_weights: bool, number: float, padded: float | None, seed: int
) -> None:
    torch.manual_seed(seed)
    layer = FlashMultiHeadAttention(16, 2, batch_first=True).requires_grad_(False)
    x = torch.randn(2, 5, 16)
    mask = table(number, torch.float32, "(1, 1, q, k)", seed, **SQUARE)[0, 0]
    padding = None if padded is None else torch.zeros(2, 5).masked_fill(torch.rand(2, 5) < 0.3, padded)

    def call(x: Tensor) -> tuple[Tensor, Tensor | None]:
        with torch.autocast("cpu", dtype=casting or torch.bfloat16, enabled=casting is not None):
            made: tuple[Tensor, Tensor | None] = layer(x, x, x, padding, need_weights, mask)
            return made

    eager, watched = call(x), call(x.as_subclass(Watching))
    whole = mask if padding is None else add_biases(mask, padding[:, None])
    usual = (whole.abs() < 100).any(-1).expand(2, 5) | (whole == -math.inf).all(
        -1
    )  # others say the mean, or their scores
    for one, other in zip(eager, watched):
        if one is not None and other is not None:
            assert other.isfinite().all()
            torch.testing.assert_close(
                (+one)[usual].float(), other.as_subclass(Tensor)[usual].float(), atol=0.05, rtol=0.05
            )
    if need_weights:
        blind = (whole == -math.inf).all(-1).expand(2, 5)
        total = watched[1].as_subclass(Tensor).float().sum(-1)
        torch.testing.assert_close(total, (~blind).float(), atol=0.02, rtol=0.0)


@given(
    one=st.sampled_from((*NUMBERS, -math.inf, 0.5)),
    two=st.sampled_from((*NUMBERS, -math.inf, 0.5)),
    dtypes=st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES)),
)
def test_two_masks_hide_what_one_of_them_hides(one: float, two: float, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    masks = []
    for number, dtype in zip((one, two), dtypes):
        limits = torch.finfo(dtype)
        bounded = number if number == -math.inf else min(max(number, limits.min), limits.max)
        masks.append(torch.full((1, 1, 1, 3), bounded, dtype=dtype))
    total = add_biases(*masks)
    assert (total == -math.inf).all() == (-math.inf in (one, two)) and not total.isnan().any()
    for dtype in DTYPES:
        for level in (False, True):
            told = narrow_bias(total, dtype, level=level)
            assert told.dtype == dtype and torch.equal(told == -math.inf, total == -math.inf)


def test_two_float_masks_of_a_layer_add_up_to_finite_numbers() -> None:
    layer = FlashMultiHeadAttention(16, 2, batch_first=True)
    x, low = torch.randn(2, 5, 16), torch.full((5, 5), LOWEST[2])
    out, weights = layer(x, x, x, torch.full((2, 5), LOWEST[2]), attn_mask=low)
    assert weights is not None and torch.allclose(weights, torch.full((2, 5, 5), 0.2))
    assert torch.allclose(out, layer(x, x, x, attn_mask=low)[0], atol=1e-6)


@pytest.mark.cpu("pretends a GPU, which is told a mask in the dtype of the heads")
@given(bias=drawn_tables, dtype=st.sampled_from(DTYPES[:3]), seed=seeds())
def test_a_gpu_is_told_levelled_rows_and_the_gradient_comes_back(bias: Tensor, dtype: torch.dtype, seed: int) -> None:
    bias.requires_grad_()
    q, k, v = heads(dtype, seed)
    spec = AttentionSpec.of(q, k, v, bias=TensorBias(bias)).changed(device=torch.device("cuda"))
    told = dense_mask(spec)
    assert told is not None and told.dtype == dtype and torch.equal(told == -math.inf, bias == -math.inf)
    assert not (told.amax(-1).abs() > 0.0).logical_and(told.amax(-1) > -math.inf).any()
    out = attend_on_cuda(q, k, v, spec)
    assert isinstance(out, Tensor)
    exact = bias.detach().double()  # rows in whose numbers float64 sees the scores, as moved rows do
    exact = exact - exact.amax(-1, keepdim=True).nan_to_num(0.0, neginf=0.0)
    learned = exact.requires_grad_()
    expected = textbook(q.double(), k, v, learned)[0]
    close(out, expected, torch.bfloat16)
    made, wanted = (torch.autograd.grad(x.double().square().sum(), y)[0] for x, y in ((out, bias), (expected, learned)))
    close(made.nan_to_num(0.0), wanted.nan_to_num(0.0), torch.bfloat16)

"""The heads of the pages on heads against a few lines of PyTorch in float64, and wherever a layer of a model goes."""

import copy
import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_docs import PYTHON, run
from torch import Tensor, nn

import flashmha
from flashmha import AlibiBias, Documents, FlashMultiHeadAttention, KeyLengths, RelativePositionBias, Rotary
from flashmha.testing import noise


@functools.cache
def page(name: str = "recipes") -> dict[str, Any]:
    """The names that a page defines."""
    names: dict[str, Any] = {"__name__": __name__}
    for snippet in PYTHON:
        if snippet.page == f"docs/{name}.md":
            run(snippet, names)
    return names


# The heads by hand: q, k and v of a layer in float64, then what the recipe says

Layer = Any
Causal = Callable[[Tensor], Tensor]


def projected(layer: Layer, x: Tensor) -> list[Tensor]:
    """q, k and v (batch, seqlen, heads, head_dim), key heads repeated."""
    counts = [layer.num_heads, *[layer.num_kv_heads] * 2]
    widths = [layer.head_dim, layer.head_dim, layer.value_head_dim]
    sizes = [count * width for count, width in zip(counts, widths)]
    rows = F.linear(x, layer.in_proj_weight, layer.in_proj_bias).split(sizes, dim=-1)
    return [repeated(layer, one.unflatten(-1, (-1, width))) for one, width in zip(rows, widths)]


def repeated(layer: Layer, x: Tensor) -> Tensor:
    """Heads of keys or values as many as those of queries."""
    return x.repeat_interleave(layer.num_heads // x.shape[2], dim=2)


def turned(x: Tensor, dim: int) -> Tensor:
    """The first ``dim`` features turned by their position, half against half."""
    frequency = 10000.0 ** (-torch.arange(0, dim, 2, dtype=x.dtype) / dim)
    angle = torch.arange(x.shape[1], dtype=x.dtype)[:, None, None] * frequency
    first, second, rest = x[..., : dim // 2], x[..., dim // 2 : dim], x[..., dim:]
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


def distance(seqlen: int) -> Tensor:
    """How far a key lies behind its query, (seqlen_q, seqlen_k)."""
    return torch.arange(seqlen)[:, None] - torch.arange(seqlen)


def weights_of(q: Tensor, k: Tensor, bias: Tensor | None = None, *, scale: float | None = None) -> Tensor:
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    score = scale * torch.einsum("bqhd,bkhd->bhqk", q, k)
    return (score if bias is None else score + bias).softmax(dim=-1)


def future(seqlen: int) -> Tensor:
    """A bias that hides what comes later."""
    return torch.zeros(seqlen, seqlen, dtype=torch.float64).masked_fill(distance(seqlen) < 0, -math.inf)


def taken(weights: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bhqk,bkhd->bqhd", weights, v)


def by_rotary(layer: Layer, x: Tensor) -> Tensor:
    q, k, v = projected(layer, x)
    out = taken(weights_of(turned(q, layer.head_dim), turned(k, layer.head_dim), future(x.shape[1])), v)
    return layer.out_proj(out.flatten(2))


def by_normed(layer: Layer, x: Tensor) -> Tensor:
    q, k, v = projected(layer, x)

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.square().mean(dim=-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt() * weight

    return layer.out_proj(taken(weights_of(norm(q, layer.q_norm.weight), norm(k, layer.k_norm.weight)), v).flatten(2))


def by_alibi(layer: Layer, x: Tensor) -> Tensor:
    q, k, v = projected(layer, x)
    slopes = 2.0 ** (-8.0 / 4 * torch.arange(1, 5, dtype=x.dtype))
    bias = future(x.shape[1]) - slopes[:, None, None] * distance(x.shape[1]).abs()
    return layer.out_proj(taken(weights_of(q, k, bias), v).flatten(2))


def by_t5(layer: Layer, x: Tensor) -> Tensor:
    q, k, v = projected(layer, x)
    behind = distance(x.shape[1])
    near = behind.abs().clamp(min=1).double()
    far = 8 + (near.div(8).log() / math.log(128 / 8) * 8).long().clamp(max=7)
    bucket = torch.where(behind.abs() < 8, behind.abs(), far) + 16 * (behind < 0)
    (table,) = layer.position_bias.parameters()
    return layer.out_proj(taken(weights_of(q, k, table[bucket].permute(2, 0, 1), scale=1.0), v).flatten(2))


def by_sinks(layer: Layer, x: Tensor) -> Tensor:
    q, k, v = projected(layer, x)
    score = torch.einsum("bqhd,bkhd->bhqk", q, k) * layer.head_dim**-0.5 + future(x.shape[1])
    sink = layer.sinks[:, None, None].expand(len(x), -1, x.shape[1], 1)
    weights = torch.cat([score, sink], dim=-1).softmax(dim=-1)[..., :-1]
    return layer.out_proj(taken(weights, v).flatten(2))


def by_gated(layer: Layer, x: Tensor) -> Tensor:
    q, k, v = projected(layer, x)
    return layer.out_proj(taken(weights_of(q, k), v).flatten(2) * layer.gate(x).sigmoid())


def by_differential(layer: Layer, x: Tensor) -> Tensor:
    q, k, v = projected(layer, x)
    half = layer.head_dim // 2
    first, second = weights_of(q[..., :half], k[..., :half]), weights_of(q[..., half:], k[..., half:])
    weights = first - layer.share[..., None] * second
    return layer.out_proj(taken(weights, v).flatten(2))


def by_shared(layers: nn.ModuleList, x: Tensor) -> Tensor:
    first, second = layers
    q, k, v = projected(first, x)
    y = first.out_proj(taken(weights_of(q, k, future(x.shape[1])), v).flatten(2))
    q = projected(second, y)[0]
    return second.out_proj(taken(weights_of(q, k, future(x.shape[1])), v).flatten(2))


def by_latent(layer: Layer, x: Tensor) -> Tensor:
    q = layer.to_q(x).unflatten(-1, (4, layer.head_dim))
    one, narrow = layer.down(x)[..., :8], layer.down(x)[..., 8:]
    both = repeated(layer, layer.up(layer.norm(narrow)).unflatten(-1, (layer.num_kv_heads, -1)))
    one, plain = turned(one[:, :, None], 8).expand(-1, -1, 4, -1), layer.head_dim - 8
    k = torch.cat([one, both[..., :plain]], dim=-1)
    return layer.out_proj(taken(weights_of(turned(q, 8), k, future(x.shape[1])), both[..., plain:]).flatten(2))


def by_cosine(layer: Layer, x: Tensor) -> Tensor:
    q, k, v = projected(layer, x)
    q, k = q / q.norm(dim=-1, keepdim=True), k / k.norm(dim=-1, keepdim=True)
    return layer.out_proj(taken(weights_of(q * layer.temperature, k, scale=1.0), v).flatten(2))


def by_prefix(layer: Layer, x: Tensor) -> Tensor:
    q, k, v = projected(layer, x)
    pairs = ((layer.more_k, k), (layer.more_v, v))
    k, v = (torch.cat([repeated(layer, more[None].expand(len(x), -1, -1, -1)), own], dim=1) for more, own in pairs)
    return layer.out_proj(taken(weights_of(q, k), v).flatten(2))


def by_narrow(layer: Layer, x: Tensor) -> Tensor:
    q = layer.to_q(x).unflatten(-1, (4, layer.head_dim))
    both = repeated(layer, layer.up(layer.down(x)).unflatten(-1, (layer.num_kv_heads, -1)))
    out = taken(weights_of(q, both[..., : layer.head_dim]), both[..., layer.head_dim :]).flatten(2)
    return layer.out_proj(out * layer.gate(x).sigmoid())


RECIPES: dict[str, Callable[[Layer, Tensor], Tensor]] = {
    "rotary": by_rotary,
    "normed": by_normed,
    "alibi": by_alibi,
    "t5_layers": by_t5,
    "sinks": by_sinks,
    "gated": by_gated,
    "differential": by_differential,
    "shared": by_shared,
    "latent": by_latent,
    "cosine": by_cosine,
}


Built = Callable[..., Any]
BUILT: dict[str, Built] = {
    "rotary": lambda **heads: plain(rotary=Rotary(heads["head_dim"] or 16), causal=True, **heads),
    "normed": lambda **heads: plain(qk_norm="rms", **heads),
    "alibi": lambda **heads: plain(position_bias=AlibiBias(4), causal=True, **heads),
    "t5_layers": lambda **heads: plain(
        position_bias=RelativePositionBias(4, num_buckets=32, max_distance=128), softmax_scale=1.0, **heads
    ),
    "sinks": lambda **heads: plain(sinks=torch.zeros(4), window=(127, 0), **heads),
    "gated": lambda **heads: page()["Gated"](64, 4, batch_first=True, **heads),
    "differential": lambda **heads: page()["Differential"](64, 4, batch_first=True, **heads),
    "shared": lambda **heads: Shared(plain(causal=True, **heads) for _ in range(2)),
    "latent": lambda **heads: page()["Latent"](
        64, 4, 32, batch_first=True, rotary=Rotary(heads["head_dim"] or 16, dim=8), causal=True, **heads
    ),
    "cosine": lambda **heads: page()["Cosine"](64, 4, batch_first=True, **heads),
    "Prefix": lambda **heads: page("heads")["Prefix"](64, 4, batch_first=True, **heads),
    "Latent": lambda **heads: page("heads")["Latent"](64, 4, latent=16, batch_first=True, **heads),
}
"""The recipes with other heads, and those of `docs/heads.md` that size parameters by the heads."""
FORMULAS = {**RECIPES, "Prefix": by_prefix, "Latent": by_narrow}


def plain(**options: Any) -> FlashMultiHeadAttention:
    return FlashMultiHeadAttention(64, 4, batch_first=True, **options)


class Shared(nn.ModuleList):
    """Two layers, the second with the keys and values of the first."""

    def forward(self, x: Tensor, **told: Any) -> Tensor:
        first, second = self
        kv = first.keys_values(x, x)
        y, _ = first(x, x, x, kv=kv, need_weights=False, **told)
        out: Tensor = second(y, y, y, kv=kv, need_weights=False, **told)[0]
        return out


def recipe(name: str) -> nn.Module:
    """A layer of the page with numbers of its own in every parameter."""
    names = page()
    if name == "shared":
        made: nn.Module = Shared([names["first"], names["second"]])
    else:
        made = names[name][0] if name == "t5_layers" else names[name]
    return moved(copy.deepcopy(made))


def moved(layer: nn.Module) -> nn.Module:
    """A layer with no parameter where it started."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return layer


def called(layer: Layer, x: Tensor, **told: Any) -> Tensor:
    out: Tensor = layer(x, **told) if isinstance(layer, Shared) else layer(x, x, x, need_weights=False, **told)[0]
    return out


def close(got: Tensor | None, want: Tensor | None, largest: float, name: str) -> None:
    """Close for a float32 that was added up out of numbers as large as ``largest``."""
    assert got is not None and want is not None, name
    torch.testing.assert_close(got.double(), want, atol=5e-5 * largest, rtol=2e-4, msg=lambda text: f"{name}: {text}")


@pytest.mark.parametrize("name", RECIPES)
@settings(max_examples=8)
@given(batch=st.integers(1, 3), seqlen=st.integers(1, 40), seed=st.integers(0, 2**16))
def test_a_recipe_computes_what_its_formula_says(name: str, batch: int, seqlen: int, seed: int) -> None:
    check(recipe(name), RECIPES[name], batch, seqlen, seed)


@pytest.mark.parametrize("name", BUILT)
@settings(max_examples=8)
@given(
    num_kv_heads=st.sampled_from((None, 1, 2)),
    head_dim=st.sampled_from((None, 12, 24)),
    value_head_dim=st.sampled_from((None, 8, 20)),
    seed=st.integers(0, 2**16),
)
def test_a_recipe_takes_other_heads(name: str, seed: int, **heads: Any) -> None:
    check(moved(BUILT[name](**heads)), FORMULAS[name], 2, 9, seed)


@pytest.mark.parametrize("name", BUILT)
@settings(max_examples=6)
@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=3), heads=st.sampled_from((None, 1, 2)))
def test_a_recipe_computes_each_item_as_if_it_were_alone(name: str, lengths: list[int], heads: int | None) -> None:
    layer = moved(BUILT[name](num_kv_heads=heads, head_dim=None, value_head_dim=8))
    items = [torch.randn(1, n, 64) for n in lengths]
    alone = [called(layer, item) for item in items]
    cuts = torch.tensor([0, *lengths]).cumsum(0)
    packed = called(layer, torch.cat(items, dim=1), attn_mask=Documents(cuts))
    torch.testing.assert_close(packed, torch.cat(alone, dim=1), atol=1e-5, rtol=1e-4)
    padded = torch.cat([F.pad(item, (0, 0, 0, max(lengths) - item.shape[1]), value=3.0) for item in items])
    out = called(layer, padded, key_padding_mask=KeyLengths(torch.tensor(lengths)))
    for row, want in zip(out, alone):
        torch.testing.assert_close(row[: want.shape[1]], want[0], atol=1e-5, rtol=1e-4)


def check(layer: Layer, formula: Callable[[Layer, Tensor], Tensor], batch: int, seqlen: int, seed: int) -> None:
    """Output and every gradient of a layer are those of a formula."""
    exact = copy.deepcopy(layer).double()
    x = noise(seed, batch, seqlen, 64, dtype=torch.float32).requires_grad_()
    y = x.detach().double().requires_grad_()
    out, want = called(layer, x), formula(exact, y)
    close(out, want, max(1.0, want.abs().max().item()), "out")
    out.square().sum().backward()
    want.square().sum().backward()
    wanted = {"input": y.grad, **{part: parameter.grad for part, parameter in exact.named_parameters()}}
    largest = max(grad.abs().max().item() for grad in wanted.values() if grad is not None)
    got = {"input": x.grad, **{part: parameter.grad for part, parameter in layer.named_parameters()}}
    for part, grad in wanted.items():
        if grad is not None:
            close(got[part], grad, largest, part)
        else:
            assert got[part] is None or not got[part].any(), part


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_copied_saved_and_compiled(name: str) -> None:
    layer = recipe(name)
    x = torch.randn(2, 12, 64)
    want = called(layer, x)
    assert torch.equal(called(copy.deepcopy(layer), x), want)
    other = copy.deepcopy(layer)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.load_state_dict(layer.state_dict(), strict=True)
    assert torch.equal(called(other, x), want)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(called(compiled, x) if name != "shared" else compiled(x), want)


@pytest.mark.parametrize("name", [name for name in RECIPES if name != "shared"])
def test_a_recipe_runs_in_an_encoder_layer_in_eval(name: str) -> None:
    layer = recipe(name)
    encoder = nn.TransformerEncoderLayer(64, 4, 32, dropout=0.0, batch_first=True)
    encoder.self_attn = layer  # type: ignore[assignment]
    x = torch.randn(2, 12, 64)
    by_hand = encoder.norm1(x + called(layer, x))
    by_hand = encoder.norm2(by_hand + encoder.linear2(encoder.linear1(by_hand).relu()))
    with torch.no_grad():
        torch.testing.assert_close(encoder.eval()(x), by_hand, atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("name", [name for name in RECIPES if name != "shared"])
def test_a_recipe_gives_the_weights_of_its_heads(name: str) -> None:
    layer = recipe(name)
    x = torch.randn(2, 12, 64)
    want = called(layer, x)
    out, weights = layer(x, x, x, average_attn_weights=False)
    torch.testing.assert_close(out, want, atol=5e-5, rtol=1e-4)
    assert weights.shape == (2, 4, 12, 12)
    values = projected(layer, x)[2] if name != "latent" else layer.project(x, x, x)[2]
    out = taken(weights, values)
    torch.testing.assert_close(called(layer, x), layer.merge(out, x), atol=1e-5, rtol=1e-4)


def test_the_page_has_ten_recipes() -> None:
    assert len(RECIPES) == 10
    assert all(name in page() for name in RECIPES)
    assert isinstance(page()["rotary"], flashmha.FlashMultiHeadAttention)

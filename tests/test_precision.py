"""Half precision on a CPU that has no unit for it: computed in float32, unless a backend or a hop was named."""

import platform

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from flashmha import FlashMultiHeadAttention, backends, explain
from flashmha.layer import precision
from flashmha.testing import seeds

HALVES = (torch.bfloat16, torch.float16)


def spec_of(layer: nn.Module, x: Tensor) -> torch.dtype:
    with backends.record() as calls:
        layer(x, x, x)
    return calls[0].spec.dtype


@pytest.fixture(params=(True, False))
def emulated(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """An x86 without instructions for half precision, or with all of them."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: not request.param)
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: not request.param)
    return bool(request.param)


@pytest.mark.parametrize("amx", (True, False))
@pytest.mark.parametrize("avx512_bf16", (True, False))
@pytest.mark.parametrize("machine", ("x86_64", "aarch64"))
def test_a_dtype_is_emulated_where_an_x86_has_no_instructions_for_it(
    amx: bool, avx512_bf16: bool, machine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    lacking = machine == "x86_64" and not amx
    assert precision.is_emulated(torch.float16) == lacking
    assert precision.is_emulated(torch.bfloat16) == (lacking and not avx512_bf16)
    assert not precision.is_emulated(torch.float32)


@pytest.mark.usefixtures("emulated")
@given(
    dtype=st.sampled_from(HALVES),
    batch=st.integers(1, 3),
    seqlen=st.integers(1, 9),
    heads=st.integers(1, 3),
    need_weights=st.booleans(),
    seed=seeds(),
)
def test_it_errs_no_more_than_the_stock_layer(
    dtype: torch.dtype, batch: int, seqlen: int, heads: int, need_weights: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    stock = nn.MultiheadAttention(8 * heads, heads, batch_first=True, dtype=dtype)
    ours = FlashMultiHeadAttention.from_torch(stock)
    exact = nn.MultiheadAttention(8 * heads, heads, batch_first=True, dtype=torch.float64)
    exact.load_state_dict(stock.state_dict())
    x = torch.randn(batch, seqlen, 8 * heads).to(dtype)
    answers = {}
    for name, layer in (("stock", stock), ("ours", ours), ("exact", exact)):
        given_x = x.to(next(layer.parameters()).dtype).requires_grad_()
        out, weights = layer(given_x, given_x, given_x, need_weights=need_weights)
        assert out.dtype == given_x.dtype and (weights is None or weights.dtype == given_x.dtype)
        total = out.square().sum() + (0.0 if weights is None else weights.square().sum())
        answers[name] = [out, *torch.autograd.grad(total, [given_x, *layer.parameters()])]
        answers[name] += [] if weights is None else [+weights]
    eps = torch.finfo(dtype).eps
    for theirs, found, reference in zip(*(answers[name] for name in ("stock", "ours", "exact"))):
        assert found.dtype == theirs.dtype
        error, allowed = ((each.double() - reference).abs().max() for each in (found, theirs))
        assert error <= 2 * allowed + 2 * eps * reference.abs().max() + 1e-5


@pytest.mark.cpu("a GPU has units for half precision")
@pytest.mark.parametrize("dtype", HALVES)
def test_what_was_named_stays(emulated: bool, dtype: torch.dtype) -> None:
    class Own(FlashMultiHeadAttention):
        def process_heads(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            assert q.dtype == k.dtype == v.dtype == dtype
            return q, k, v

    x = torch.randn(2, 3, 8).to(dtype)
    layer = FlashMultiHeadAttention(8, 2, batch_first=True, dtype=dtype)
    assert spec_of(layer, x) == (torch.float32 if emulated else dtype)
    assert any("float32" in note for note in explain(layer, x, x, x).notes) == emulated
    assert spec_of(Own(8, 2, batch_first=True, dtype=dtype), x) == dtype
    assert spec_of(FlashMultiHeadAttention(8, 2, batch_first=True, dtype=dtype, backend="sdpa"), x) == dtype
    assert spec_of(FlashMultiHeadAttention(8, 2, batch_first=True, dtype=dtype, call_out_proj=True), x) == dtype
    with backends.use_backend("naive"):
        assert spec_of(layer, x) == dtype


def test_a_mixture_of_dtypes_is_an_error_as_in_stock(emulated: bool) -> None:
    x = torch.randn(2, 3, 8)
    for kind in (nn.MultiheadAttention, FlashMultiHeadAttention):
        with pytest.raises(RuntimeError, match="dtype"):
            kind(8, 2, batch_first=True, dtype=torch.bfloat16)(x, x, x)
        with pytest.raises(RuntimeError, match="dtype"):
            kind(8, 2, batch_first=True, dtype=torch.bfloat16)(x.bfloat16(), x, x)

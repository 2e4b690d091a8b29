"""One rule for the dtype a call is computed in: what is decided before the projection is decided about the heads."""

import contextlib
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_ranking import answering
from torch import nn

import flashmha
from flashmha import FlashMultiHeadAttention, KeyPadding, attention, compare_outputs, explain, record
from flashmha.backends.choice.registry import instead
from flashmha.backends.flash_attn.flash2 import Flash2
from flashmha.backends.flash_attn.flash3 import Flash3
from flashmha.backends.flash_attn.flash4 import Flash4
from flashmha.backends.sdpa import packed
from flashmha.host.torch_state import computed_in, without_autocast
from flashmha.layer import padding

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
CASTS = (None, torch.bfloat16, torch.float16)


@given(
    dtype=st.sampled_from(DTYPES),
    cast=st.sampled_from(CASTS),
    cross=st.booleans(),
    skip=st.booleans(),
    need_weights=st.booleans(),
)
def test_the_dtype_said_before_the_projection_is_that_of_the_heads(
    dtype: torch.dtype, cast: torch.dtype | None, cross: bool, skip: bool, need_weights: bool
) -> None:
    layer = FlashMultiHeadAttention(16, 2, batch_first=True, dtype=dtype, skip_padding=skip)
    stock = nn.MultiheadAttention(16, 2, batch_first=True, dtype=dtype)
    stock.load_state_dict(layer.state_dict())
    x = torch.randn(2, 5, 16, dtype=dtype)
    y = torch.randn(2, 5, 16, dtype=dtype) if cross else x
    hidden = torch.arange(5) >= torch.tensor([[3], [5]])
    given = {"key_padding_mask": hidden, "need_weights": need_weights}
    with torch.autocast("cpu", dtype=cast, enabled=cast is not None):
        with record() as calls:
            out = layer(x, y, y, **given)[0]
        said, expected = explain(layer, x, y, y, **given), stock(x, y, y, **given)[0]
        before = computed_in(x)
    heads = torch.float32 if layer_in_float32(x, cast) else before
    assert calls[0].spec.dtype == heads and said.spec.dtype == heads and out.dtype == expected.dtype
    assert ("documents" in calls[0].spec.features) == (skip and not cross)
    assert any("autocast" in note for note in said.notes) == (heads != dtype and cast is not None)


def layer_in_float32(x: torch.Tensor, cast: torch.dtype | None) -> bool:
    """A layer of half precision without autocast computes in float32 on a CPU that only emulates it."""
    return cast is None and x.dtype in (torch.bfloat16, torch.float16) and flashmha.layer.precision.is_emulated(x.dtype)


@given(cast=st.sampled_from(CASTS[1:]), dtype=st.sampled_from(DTYPES))
def test_the_function_is_told_by_the_same_rule(cast: torch.dtype, dtype: torch.dtype) -> None:
    q = torch.randn(1, 3, 2, 8, dtype=dtype)
    with torch.autocast("cpu", dtype=cast):
        assert attention(q, q, q).dtype == computed_in(q)  # type: ignore[union-attr]
        assert explain(q, q, q).spec.dtype == computed_in(q)
        found = compare_outputs(q, q, q)
        whole = torch.ones(1, 3, 2, 8, dtype=torch.int64)
        with pytest.raises(ValueError, match="floating point"):
            attention(whole, whole, whole)
    assert found["allclose"]


@pytest.mark.parametrize("fails", (False, True))
def test_autocast_is_off_inside_and_on_again_behind(fails: bool) -> None:
    found = []
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with contextlib.suppress(KeyError), without_autocast(torch.device("cpu")):
            found.append(torch.is_autocast_enabled("cpu"))
            if fails:
                raise KeyError
        found.append(torch.is_autocast_enabled("cpu"))
        assert torch.get_autocast_dtype("cpu") == torch.bfloat16
    with without_autocast(torch.device("cpu")):
        found.append(torch.is_autocast_enabled("cpu"))
    assert found == [False, True, False] and not torch.is_autocast_enabled("cpu")


@contextlib.contextmanager
def pretend_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch says that there is a GPU; nothing runs on it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "a pretended GPU")
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    packed.packs_up_to.cache_clear()
    yield
    packed.packs_up_to.cache_clear()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine with a GPU that packs, and no flash-attn."""
    was, dtype = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    absent = [answering(kind, why_not_here=lambda device: "not here") for kind in (Flash2, Flash3, Flash4)]
    with pretend_a_gpu(monkeypatch), instead(*absent):
        yield
    torch.set_autocast_enabled("cuda", was)
    torch.set_autocast_dtype("cuda", dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cast", CASTS)
def test_a_gpu_packs_what_autocast_makes_of_the_heads(dtype: torch.dtype, cast: torch.dtype | None, gpu: None) -> None:
    layer = FlashMultiHeadAttention(16, 2, batch_first=True, skip_padding=True)
    x = types.SimpleNamespace(dtype=dtype, device=torch.device("cuda", 0))
    call: Any = types.SimpleNamespace(query=x, mask=KeyPadding(torch.ones(2, 5, dtype=torch.bool)))
    if cast is not None:
        torch.set_autocast_enabled("cuda", True)
        torch.set_autocast_dtype("cuda", cast)
    heads = dtype if cast is None or dtype == torch.float64 else cast
    assert padding.has_packed_kernel(layer, call) == (heads in (torch.bfloat16, torch.float16))

"""The lab's four names."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import flashmha
from flashmha import (
    Backend,
    FlashAttentionWrapper,
    Limits,
    backends,
    benchmark_attention,
    compare_outputs,
    has_flash_attention,
    record,
)
from flashmha.testing import noise, seeds

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")

shapes = st.tuples(st.integers(1, 3), st.integers(1, 20), st.integers(1, 4), st.sampled_from((1, 8, 16)))
dtypes = st.sampled_from((torch.float64, torch.float32, torch.bfloat16, torch.float16))


def qkv(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = noise(seed, 3, *shape, dtype=dtype).unbind()
    return q, k, v


class TestFlashWrapper:
    """What the lab's users rely on, on any machine."""

    @given(shape=shapes, seed=seeds(), causal=st.booleans(), dropout_p=st.sampled_from((0.0, 0.5)))
    def test_the_wrapper_is_attention_and_keeps_the_shape(
        self, shape: tuple[int, ...], seed: int, causal: bool, dropout_p: float
    ) -> None:
        Q, K, V = (x.requires_grad_() for x in qkv(shape, seed))
        out = FlashAttentionWrapper(dropout_p, causal).eval()(Q, K, V)
        heads_first = [x.transpose(1, 2) for x in (Q, K, V)]
        expected = F.scaled_dot_product_attention(*heads_first, is_causal=causal).transpose(1, 2)
        assert out.shape == shape and out.dtype == Q.dtype
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(
            torch.autograd.grad(out.sum(), (Q, K, V)),
            torch.autograd.grad(expected.sum(), (Q, K, V)),
            atol=1e-4,
            rtol=1e-4,
        )

    @given(seed=seeds(), dropout_p=st.sampled_from((0.2, 0.7)), causal=st.booleans())
    def test_dropout_happens_in_training_only(self, seed: int, dropout_p: float, causal: bool) -> None:
        Q, K, V = qkv((2, 16, 2, 8), seed)
        wrapper, plain = FlashAttentionWrapper(dropout_p, causal), FlashAttentionWrapper(causal=causal)
        torch.manual_seed(seed)
        dropped = wrapper.train()(Q, K, V)
        torch.manual_seed(seed)
        assert torch.equal(wrapper(Q, K, V), dropped)
        assert not torch.equal(dropped, plain(Q, K, V))
        assert torch.equal(wrapper.eval()(Q, K, V), plain(Q, K, V))

    @given(shape=shapes, seed=seeds())
    def test_a_causal_wrapper_sees_no_future(self, shape: tuple[int, ...], seed: int) -> None:
        Q, K, V = qkv(shape, seed)
        now = seed % shape[1]
        changed = [torch.cat((x[:, : now + 1], torch.randn_like(x[:, now + 1 :])), dim=1) for x in (Q, K, V)]
        wrapper = FlashAttentionWrapper(causal=True)
        torch.testing.assert_close(wrapper(*changed)[:, : now + 1], wrapper(Q, K, V)[:, : now + 1])

    @given(dropout_p=st.floats(allow_nan=True).filter(lambda p: not 0.0 <= p <= 1.0))
    def test_a_probability_is_one(self, dropout_p: float) -> None:
        with pytest.raises(ValueError, match=r"dropout_p must be between 0 and 1, got"):
            FlashAttentionWrapper(dropout_p)

    def test_the_wrapper_is_a_module_without_state(self) -> None:
        wrapper = FlashAttentionWrapper(0.25, causal=True)
        assert isinstance(wrapper, nn.Module) and not wrapper.state_dict()
        assert "dropout_p=0.25, causal=True" in repr(nn.Sequential(wrapper))
        with record() as calls:
            wrapper(*qkv((1, 4, 2, 8), 0))
        assert [call.backend for call in calls] == [backends.choose(calls[0].spec).name]

    @given(shape=shapes, seed=seeds(), dtype=dtypes, causal=st.booleans(), scale=st.sampled_from((0.1, 1.0, 10.0)))
    def test_compared_outputs_are_close(
        self, shape: tuple[int, ...], seed: int, dtype: torch.dtype, causal: bool, scale: float
    ) -> None:
        drawn = qkv(shape, seed, dtype)
        # a GPU multiplies float32 as parts of TF32, which large scores show
        assume(scale < 10.0 or dtype != torch.float32 or not drawn[0].is_cuda)
        said = compare_outputs(*(x * scale for x in drawn), causal=causal)
        assert said["allclose"] is True
        assert 0.0 <= said["mean_diff"] <= said["max_diff"] <= said["tolerance"]
        assert said["backend"] in backends.names()

    @given(shape=shapes, seed=seeds(), dtype=dtypes, causal=st.booleans())
    def test_a_wrong_backend_is_not_close(
        self, shape: tuple[int, ...], seed: int, dtype: torch.dtype, causal: bool
    ) -> None:
        class Off(Backend):
            """The definition, off by one."""

            name = "off"
            limits = Limits(devices=(), dtypes=(dtype,), features=frozenset(("causal", "backward")))

            def __call__(self, q: Tensor, k: Tensor, v: Tensor, spec: flashmha.AttentionSpec) -> Tensor:
                out = backends.get("naive")(q, k, v, spec)
                assert isinstance(out, Tensor)
                return out + 1.0

        backends.register(Off)
        try:
            with backends.use_backend("off"):
                said = compare_outputs(*qkv(shape, seed, dtype), causal=causal)
        finally:
            backends.unregister("off")
        assert said["backend"] == "off" and said["allclose"] is False
        assert said["max_diff"] == pytest.approx(1.0, abs=0.1) and said["mean_diff"] == pytest.approx(1.0, abs=0.1)

    def test_nothing_is_close_to_nothing(self) -> None:
        assert compare_outputs(*qkv((1, 0, 2, 8), 0))["allclose"] is True

    @given(
        seq_len=st.sampled_from((1, 7, 64)),
        num_heads=st.sampled_from((1, 4)),
        batch_size=st.integers(1, 2),
        num_iterations=st.integers(1, 2),
    )
    @settings(max_examples=8)
    def test_a_benchmark_says_time_memory_and_what_ran(
        self, seq_len: int, num_heads: int, batch_size: int, num_iterations: int
    ) -> None:
        threads, state = torch.get_num_threads(), torch.get_rng_state()
        said = benchmark_attention(seq_len, 16, num_heads, batch_size, num_iterations)
        assert said["standard_time_ms"] > 0 and said["flash_time_ms"] > 0
        assert said["speedup"] == said["standard_time_ms"] / said["flash_time_ms"]
        out = batch_size * seq_len * 16 * torch.finfo(getattr(torch, said["dtype"])).bits // 8
        assert said["flash_memory_mb"] * 2**20 >= out
        weights = batch_size * num_heads * seq_len**2 * torch.finfo(getattr(torch, said["dtype"])).bits // 8
        assert said["standard_memory_mb"] * 2**20 >= max(out, weights)
        assert said["backend"] in backends.names()
        assert said["device"] == (torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu")
        assert torch.get_num_threads() == threads and torch.equal(torch.get_rng_state(), state)

    @pytest.mark.parametrize("name", ("seq_len", "num_heads", "batch_size", "num_iterations"))
    def test_a_size_is_at_least_one(self, name: str) -> None:
        sizes = {"seq_len": 4, "d_model": 8, "num_heads": 2, name: 0}
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            benchmark_attention(**sizes)

    @given(num_heads=st.integers(1, 9), d_model=st.integers(-2, 30))
    def test_heads_divide_the_model(self, num_heads: int, d_model: int) -> None:
        if d_model >= 1 and d_model % num_heads == 0:
            return
        with pytest.raises(ValueError, match="d_model must be a multiple of num_heads, got"):
            benchmark_attention(4, d_model, num_heads)

    def test_flash_attention_is_there_where_a_flash_backend_is(self) -> None:
        found = has_flash_attention()
        assert isinstance(found, bool)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        reasons = [backends.get(name).why_not_here(device) for name in backends.FAMILIES["flash_attn"]]
        assert found == (None in reasons)
        if not torch.cuda.is_available():
            assert found is False

    def test_the_signatures_are_the_lab_s(self) -> None:
        def defaults(thing: object) -> dict[str, object]:
            return {name: one.default for name, one in inspect.signature(thing).parameters.items()}

        assert defaults(FlashAttentionWrapper) == {"dropout_p": 0.0, "causal": False}
        assert list(defaults(FlashAttentionWrapper.forward)) == ["self", "Q", "K", "V"]
        assert list(defaults(benchmark_attention)) == [
            "seq_len",
            "d_model",
            "num_heads",
            "batch_size",
            "num_iterations",
        ]
        assert defaults(benchmark_attention)["num_iterations"] == 10
        assert list(defaults(compare_outputs)) == ["Q", "K", "V", "causal"]
        assert not defaults(has_flash_attention)

    @needs_gpu
    @given(seed=seeds(), dtype=st.sampled_from((torch.float16, torch.bfloat16)), causal=st.booleans())
    def test_the_wrapper_agrees_on_a_gpu(self, seed: int, dtype: torch.dtype, causal: bool) -> None:
        said = compare_outputs(*(x.cuda() for x in qkv((2, 128, 4, 64), seed, dtype)), causal=causal)
        assert said["allclose"] and math.isfinite(said["max_diff"])

    @pytest.mark.skipif(not has_flash_attention(), reason="no flash-attn package that runs on this machine")
    def test_a_flash_backend_serves_a_named_call(self) -> None:
        Q, K, V = (x.cuda() for x in qkv((2, 128, 4, 64), 0, torch.bfloat16))
        with backends.use_backend("flash_attn"):
            assert compare_outputs(Q, K, V)["backend"] in backends.FAMILIES["flash_attn"]

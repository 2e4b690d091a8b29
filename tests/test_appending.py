"""Tokens written behind those of each row by a kernel: the cache it leaves is the one that plain indexing leaves."""

import pytest
import torch
from conftest import fewer
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flashmha import FlashMultiHeadAttention, StaticCache, register, unregister, use_backend
from flashmha.backends.base import Serve
from flashmha.backends.sdpa.backend import Sdpa
from flashmha.cache.appending import append_on_device
from flashmha.layer.step import PlainStep
from flashmha.problem.spec import AttentionSpec
from flashmha.testing import noise, seeds


@st.composite
def steps(draw: st.DrawFn) -> tuple[list[int], int, int, tuple[int, int, int]]:
    """Tokens that each row holds, tokens that come, slots to spare, and the sizes of heads."""
    held = draw(st.lists(st.integers(0, 9), min_size=1, max_size=4))
    sizes = draw(st.tuples(st.integers(1, 20), st.integers(1, 130), st.integers(1, 130)))
    return held, draw(st.integers(1, 5)), draw(st.integers(0, 3)), sizes


@fewer(3)
@given(step=steps(), batch_first=st.booleans(), dtype=st.sampled_from((torch.float32, torch.bfloat16)), seed=seeds())
def test_a_kernel_writes_what_indexing_writes(
    machine: torch.device,
    step: tuple[list[int], int, int, tuple[int, int, int]],
    batch_first: bool,
    dtype: torch.dtype,
    seed: int,
) -> None:
    held, seqlen, spare, (heads, head_dim, head_dim_v) = step
    batch, capacity = len(held), max(held) + seqlen + spare

    def tokens(seed: int, size: int) -> Tensor:
        """As a projection gives them, with the sequence in front or not."""
        shape = (batch, seqlen) if batch_first else (seqlen, batch)
        made = noise(seed, *shape, heads, size + 3).to(machine, dtype)[..., :size]
        return made if batch_first else made.transpose(0, 1)

    k, v = tokens(seed, head_dim), tokens(seed + 1, head_dim_v)
    caches = [
        StaticCache(batch, capacity, heads, head_dim, head_dim_v=head_dim_v, device=machine, dtype=dtype)
        for _ in range(2)
    ]
    for cache in caches:
        cache.lengths.copy_(torch.tensor(held))
    one, two = caches
    ends = torch.empty_like(two.lengths)
    append_on_device(k, v, two.store, two.lengths, ends)
    assert two.lengths.tolist() == held
    one.update(k, v)
    assert torch.equal(ends, one.lengths) and ends.dtype == one.lengths.dtype
    for mine, theirs in zip(two.store, one.store):
        assert torch.equal(mine, theirs)


@pytest.mark.gpu
def test_a_step_on_a_gpu_waits_for_nothing(device: torch.device) -> None:
    cache = StaticCache(2, 8, 4, 16, device=device, dtype=torch.bfloat16)
    k, v = (torch.randn(2, 1, 4, 16, device=device, dtype=torch.bfloat16) for _ in range(2))
    ends = torch.empty_like(cache.lengths)
    append_on_device(k, v, cache.store, cache.lengths, ends)
    torch.cuda.set_sync_debug_mode("error")
    try:
        append_on_device(k, v, cache.store, cache.lengths, ends)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert ends.tolist() == [1, 1]


def test_a_backend_that_looks_at_lengths_sees_those_behind_the_step(machine: torch.device) -> None:
    """To prepare itself, say: by then the launch has written them."""
    seen = []

    class Looking(Sdpa):
        name = "looking"

        def prepare(self, spec: AttentionSpec) -> Serve:
            lengths = spec.key_lengths()
            seen.append(None if lengths is None else lengths.tolist())
            return super().prepare(spec)

    layer = FlashMultiHeadAttention(16, 2, batch_first=True, need_weights=False, device=machine).eval()
    cache = StaticCache(2, 5, 2, 8, device=machine)
    cache.lengths.copy_(torch.tensor([1, 3]))
    x = noise(0, 2, 2, 16).to(machine, torch.float32)
    register(Looking)
    try:
        with torch.no_grad(), use_backend("looking"):
            step = PlainStep(x)
            step.reads, step.launches = False, True
            assert step.attend_next(layer, x.reshape(-1, 16), cache) is not None
            step.finish()
    finally:
        unregister("looking")
    assert seen == [[3, 5]] and cache.lengths.tolist() == [3, 5]

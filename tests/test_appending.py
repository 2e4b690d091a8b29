"""Tokens written behind those of each row by a kernel: the cache it leaves is the one that plain indexing leaves."""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import fewer
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flashmha import FlashMultiHeadAttention, StaticCache, record, register, unregister, use_backend
from flashmha.backends.base import Serve
from flashmha.backends.sdpa.backend import Sdpa
from flashmha.backends.split_kv.backend import SplitKV
from flashmha.cache.appending import Appending
from flashmha.layer.step import PlainStep
from flashmha.problem.spec import AttentionSpec
from flashmha.testing import assert_same, noise, seeds


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
    append = Appending(two, seqlen)
    append(k, v, two)
    ends = append.ends
    assert two.lengths.tolist() == held
    one.update(k, v)
    assert torch.equal(ends, one.lengths) and ends.dtype == one.lengths.dtype
    for mine, theirs in zip(two.store, one.store):
        assert torch.equal(mine, theirs)


@pytest.mark.gpu
def test_a_step_on_a_gpu_waits_for_nothing(device: torch.device) -> None:
    cache = StaticCache(2, 8, 4, 16, device=device, dtype=torch.bfloat16)
    k, v = (torch.randn(2, 1, 4, 16, device=device, dtype=torch.bfloat16) for _ in range(2))
    append = Appending(cache, 1)
    append(k, v, cache)
    torch.cuda.set_sync_debug_mode("error")
    try:
        append(k, v, cache)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert append.ends.tolist() == [1, 1]


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


class Late(SplitKV):
    """The backend that reads lengths at each call, on a device of any kind."""

    name = "late"
    limits = dataclasses.replace(SplitKV.limits, devices=())

    def why_not_here(self, device: torch.device) -> str | None:
        return None


@pytest.fixture(scope="module")
def late() -> Iterator[None]:
    register(Late)
    yield
    unregister("late")


@fewer(3)
@pytest.mark.usefixtures("late")
@given(
    backend=st.sampled_from(("late", "sdpa")),
    held=st.lists(st.lists(st.integers(0, 4), min_size=2, max_size=2), min_size=2, max_size=3),
    capacities=st.sampled_from(((6, 6, 6), (6, 80, 6))),
    seqlen=st.integers(1, 2),
    recorded=st.booleans(),
    seed=seeds(),
)
def test_each_layer_of_a_step_sees_its_own_lengths(
    machine: torch.device,
    backend: str,
    held: list[list[int]],
    capacities: tuple[int, ...],
    seqlen: int,
    recorded: bool,
    seed: int,
) -> None:
    """Also where a kernel writes those of all layers into one tensor."""
    torch.manual_seed(seed)
    layer = FlashMultiHeadAttention(32, 2, batch_first=True, need_weights=False, device=machine).eval()
    x = noise(seed, 2, seqlen, 32).to(machine, torch.float32)
    calls: list[Any] = []
    with torch.no_grad(), use_backend(backend):
        step = PlainStep(x)
        step.reads, step.launches = False, True
        for lengths, capacity in zip(held, capacities):
            mine, theirs = (StaticCache(2, capacity, 2, 16, device=machine) for _ in range(2))
            for cache in (mine, theirs):
                for salt, store in enumerate(cache.store):
                    store.copy_(noise(seed + salt, *store.shape))
                cache.lengths.copy_(torch.tensor(lengths))
            with record() if recorded else contextlib.nullcontext([]) as noted:
                out = step.attend_next(layer, x.reshape(-1, 32), mine)
            calls += noted
            assert out is not None
            assert_same(out.view(x.shape), layer(x, x, x, cache=theirs)[0])
            assert mine.lengths.tolist() == lengths
        step.finish()
    ends = [[length + seqlen for length in lengths] for lengths in held]
    assert not recorded or [call.spec.key_lengths().tolist() for call in calls] == ends

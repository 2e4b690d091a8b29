"""Keys moved to the front of their row, and their gradients back."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flashmha.backends.rewrites import compact
from flashmha.testing import noise, seeds


@st.composite
def keys(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values as views of one projection or apart, and which of the keys are real."""
    batch, seqlen = draw(st.integers(1, 3)), draw(st.sampled_from((1, 5, 32, 33, 70, 300, 1100)))
    heads, head_dim, seed = draw(st.integers(1, 3)), draw(st.sampled_from((8, 40, 128))), draw(seeds())
    generator = torch.Generator("cpu").manual_seed(seed)
    valid = torch.rand(batch, seqlen, generator=generator, device="cpu") < draw(st.sampled_from((0.0, 0.3, 0.9, 1.0)))
    if draw(st.booleans()):  # on the right, as in most batches
        valid = valid.sort(1, descending=True).values
    packed = noise(seed, batch, seqlen, 3, heads, head_dim, dtype=torch.float16, device="cpu")
    k, v = packed[:, :, 1], packed[:, :, 2]
    return (k, v.contiguous(), valid) if draw(st.booleans()) else (k, v, valid)


@given(drawn=keys())
def test_real_keys_come_first_in_the_order_they_had(machine: torch.device, drawn: tuple[Tensor, ...]) -> None:
    k, v, valid = drawn
    *moved, lengths = compact.compact(*(x.to(machine) for x in drawn))
    assert lengths.dtype == torch.int32 and torch.equal(lengths.cpu(), valid.sum(1, dtype=torch.int32))
    for source, target in zip((k, v), moved):
        for item in range(len(valid)):
            real, rows = source[item, valid[item]], target[item].cpu()
            assert torch.equal(rows[: len(real)], real)
            assert not rows[len(real) : len(real) + compact.LARGEST_TILE].any(), "a tile that a kernel loads is 0"


@given(drawn=keys())
def test_gradients_go_back_to_where_their_keys_were(machine: torch.device, drawn: tuple[Tensor, ...]) -> None:
    k, v, valid = drawn
    there = valid.to(machine)
    *moved, _ = compact.compact(k.to(machine), v.to(machine), there)
    packed = torch.full((2, *k.shape), float("nan"), dtype=k.dtype, device=machine)
    compact.move_back((moved[0], moved[1]), (packed[0], packed[1]), there)
    for source, back in zip((k, v), packed):
        assert torch.equal(back.cpu(), torch.where(valid[:, :, None, None], source, 0.0))

"""What happens to heads before ``process_heads``: norms first, then the rotation."""

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import flashmha
from flashmha.parts.heads import prepare_heads
from flashmha.testing import noise, seeds


def norms(kind: str | None, head_dim: int) -> tuple[nn.Module | None, nn.Module | None]:
    """Norms of q and k whose parameters are not those of a new one."""
    kinds: dict[str | None, Any] = {"rms": nn.RMSNorm, "layer": nn.LayerNorm}
    if kind is None:
        return None, None
    made = kinds[kind](head_dim), kinds[kind](head_dim)
    for seed, norm in enumerate(made):
        for parameter in norm.parameters():
            parameter.data.add_(noise(seed, head_dim).to(parameter))
    return made


def turned(x: Tensor, rotary: flashmha.Rotary) -> Tensor:
    """A few lines of complex numbers in float64."""
    half = rotary.dim // 2
    angles = torch.arange(x.shape[1])[:, None, None] * rotary.inv_freq.double()
    turns = torch.polar(torch.ones_like(angles), angles)
    one, two = (
        (x[..., :half], x[..., half : rotary.dim])
        if not rotary.interleaved
        else (x[..., : rotary.dim : 2], x[..., 1 : rotary.dim : 2])
    )
    made = torch.complex(one, two) * turns
    pairs = (made.real, made.imag)
    first = torch.stack(pairs, -1).flatten(-2) if rotary.interleaved else torch.cat(pairs, -1)
    return torch.cat((first, x[..., rotary.dim :]), -1)


@given(
    kind=st.sampled_from((None, "rms", "layer")),
    rotates=st.booleans(),
    interleaved=st.booleans(),
    dim=st.sampled_from((2, 6, 8)),
    heads=st.sampled_from(((2, 2), (4, 1))),
    swapped=st.booleans(),
    seed=seeds(),
)
def test_heads_are_normalised_then_turned(
    kind: str | None, rotates: bool, interleaved: bool, dim: int, heads: tuple[int, int], swapped: bool, seed: int
) -> None:
    """As in float64, q and k being views of one projection, with the gradients of the projection and the norms."""
    rotary = flashmha.Rotary(8, dim=dim, interleaved=interleaved) if rotates else None
    packed = noise(seed, 3, 5, sum(heads) + heads[1], 8, dtype=torch.float32).requires_grad_()
    exact = packed.detach().double().requires_grad_()
    q_norm, k_norm = norms(kind, 8)
    parameters = [p for norm in (q_norm, k_norm) if norm is not None for p in norm.parameters()]

    def views(x: Tensor) -> tuple[Tensor, ...]:
        x = x.transpose(0, 1) if swapped else x
        return x.split_with_sizes((heads[0], heads[1], heads[1]), 2)[:2]

    q, k = views(packed)
    made = prepare_heads(q, k, q_norm=q_norm, k_norm=k_norm, rotary=rotary)
    grads = torch.autograd.grad(
        [(x**2 * noise(seed, 8).float()).sum() for x in made if x is not None], [packed, *parameters]
    )
    exact_norms = norms(kind, 8)
    expected = []
    for x, norm in zip(views(exact), exact_norms):
        x = x if norm is None else norm.double()(x)
        expected.append(x if rotary is None else turned(x, rotary))
    its = [p for norm in exact_norms if norm is not None for p in norm.parameters()]
    right = torch.autograd.grad([(x**2 * noise(seed, 8).double()).sum() for x in expected], [exact, *its])
    for mine, one in (*zip(made, expected), *zip(grads, right)):
        assert mine is not None and mine.dtype == torch.float32
        torch.testing.assert_close(mine.double(), one, rtol=1e-3, atol=1e-3)


@given(seed=seeds(), which=st.sampled_from("qk"))
def test_one_of_q_and_k_is_prepared_alone(seed: int, which: str) -> None:
    q, k, rotary = noise(seed, 2, 5, 2, 8), noise(seed + 1, 2, 5, 1, 8), flashmha.Rotary(8)
    q_norm, k_norm = norms("rms", 8)
    both = prepare_heads(q, k, q_norm=q_norm, k_norm=k_norm, rotary=rotary)
    given = (q, None) if which == "q" else (None, k)
    alone = prepare_heads(*given, q_norm=q_norm, k_norm=k_norm, rotary=rotary)
    for one, other, asked in zip(alone, both, given):
        assert (one is None) == (asked is None)
        if one is not None:
            assert torch.equal(one, other)


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def test_any_module_is_a_norm_and_its_hooks_run() -> None:
    q, norm, seen = noise(0, 1, 3, 1, 8), Doubled(), []
    norm.register_forward_hook(lambda *given: seen.append(1))
    assert torch.equal(prepare_heads(q, None, q_norm=norm)[0], 2 * q)
    assert seen == [1]


class Halved(flashmha.Rotary):
    def forward(self, *given: Any, **named: Any) -> Any:
        return tuple(None if x is None else x / 2 for x in super().forward(*given, **named))


def test_a_rotary_is_called_with_its_forward_and_hooks() -> None:
    q, mine, seen = noise(0, 1, 3, 1, 8), Halved(8), []
    mine.register_forward_hook(lambda *given: seen.append(1))
    expected = prepare_heads(q, None, rotary=flashmha.Rotary(8))[0]
    made = prepare_heads(q, None, rotary=mine)[0]
    assert made is not None and expected is not None and torch.equal(made, expected / 2)
    assert seen == [1]


def test_a_norm_keeps_the_shape_of_its_heads() -> None:
    with pytest.raises(ValueError, match="a norm must keep the shape"):
        prepare_heads(noise(0, 1, 3, 1, 8), None, q_norm=nn.Linear(8, 4).double())


@pytest.mark.cpu("calls the modules on heads of another dtype, which a GPU's layer norm refuses")
@given(dtype=st.sampled_from((torch.bfloat16, torch.float16)), kind=st.sampled_from(("rms", "layer")), seed=seeds())
def test_norms_beside_heads_of_half_precision_warn_of_nothing(dtype: torch.dtype, kind: str, seed: int) -> None:
    """As under autocast; the numbers are those of the module called on the heads as they are."""
    x, (q_norm, k_norm) = noise(seed, 2, 5, 3, 8).to(dtype), norms(kind, 8)
    assert q_norm is not None
    with warnings.catch_warnings(), always_warning():
        warnings.simplefilter("ignore")
        expected = q_norm(x).to(dtype)
        warnings.simplefilter("error")
        q, k = prepare_heads(x, x, q_norm=q_norm, k_norm=k_norm)
    assert q is not None and k is not None and torch.equal(q, expected) and k.dtype == dtype


@contextlib.contextmanager
def always_warning() -> Iterator[None]:
    """Torch gives a warning each time, not once a process."""
    before = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    try:
        yield
    finally:
        torch.set_warn_always(before)

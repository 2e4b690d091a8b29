"""The kernel of prepared heads: the definition, forward and backward, however the heads lie."""

import pytest
import torch
from conftest import Copies, fewer
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import flashmha
from flashmha.backends.rewrites.heads import split
from flashmha.parts import fused_heads
from flashmha.parts.norms import know
from flashmha.testing import noise, seeds

DTYPES = {torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 5e-3}


def norm_of(kind: str | None, head_dim: int, seed: int, device: torch.device) -> nn.Module | None:
    """A norm whose parameters are not those of a new one."""
    if kind is None:
        return None
    made = (
        nn.RMSNorm(head_dim, eps=1e-5, device="cpu")
        if kind == "rms"
        else nn.LayerNorm(head_dim, bias=kind == "layer", device="cpu")
    )
    for parameter in made.parameters():
        parameter.data.add_(noise(seed, head_dim, dtype=torch.float32, device="cpu"))
    return made.to(device)


@settings(parent=fewer(2))
@given(
    data=st.data(),
    kind=st.sampled_from((None, "rms", "layer", "no bias")),
    head_dim=st.sampled_from((6, 8, 17, 64)),
    heads=st.sampled_from(((2, 2), (9, 1), (1, 1))),
    dtype=st.sampled_from(list(DTYPES)),
    seed=seeds(),
)
def test_one_pass_is_the_definition(
    machine: torch.device,
    data: st.DataObject,
    kind: str | None,
    head_dim: int,
    heads: tuple[int, int],
    dtype: torch.dtype,
    seed: int,
) -> None:
    """In float64, of the same rounded heads; gradients of the projection and of the norms too."""
    draw = data.draw
    batch, seqlen = draw(st.integers(1, 3)), draw(st.sampled_from((1, 3, 40)))
    rotary = None
    if kind is None or draw(st.booleans()):
        dim = 2 * draw(st.integers(1, head_dim // 2))
        rotary = flashmha.Rotary(head_dim, dim=dim, interleaved=draw(st.booleans())).to(machine)
    swapped, explicit = draw(st.booleans()), draw(st.booleans())
    at = None
    if explicit:
        size = (draw(st.sampled_from((1, batch))), seqlen)
        at = torch.randint(0, 999, size, generator=torch.Generator("cpu").manual_seed(seed), device="cpu").to(machine)
    packed = noise(seed, batch, seqlen, sum(heads), head_dim, dtype=dtype, device="cpu").to(machine).requires_grad_()
    q_norm, k_norm = (norm_of(kind, head_dim, seed + i, machine) for i in range(2))
    if draw(st.booleans()):
        q_norm, k_norm = (None if norm is None else norm.to(dtype) for norm in (q_norm, k_norm))
    parameters = [p for norm in (q_norm, k_norm) if norm is not None for p in norm.parameters()]
    known = [None if norm is None else know(norm, head_dim, packed.device) for norm in (q_norm, k_norm)]
    cotangents = [
        noise(seed + 2 + i, batch, seqlen, heads[i], head_dim, dtype=dtype, device="cpu").to(machine) for i in (0, 1)
    ]

    def views(x: Tensor) -> tuple[Tensor, ...]:
        x = x.transpose(0, 1).contiguous().transpose(0, 1) if swapped else x
        return x.split_with_sizes(heads, 2)

    q, k = views(packed)
    rotation = None if rotary is None else rotary.rotation(q, k, at, at)
    made = fused_heads.prepare(q, k, known[0], known[1], rotation)
    grads = torch.autograd.grad(made, [packed, *parameters], cotangents)
    exact = packed.detach().double().requires_grad_()
    wide = [None if norm is None else norm.double() for norm in (q_norm, k_norm)]
    expected = [x if norm is None else norm(x) for x, norm in zip(views(exact), wide)]
    if rotation is not None:
        expected = list(rotation.apply(*expected))
    its = [p for norm in wide if norm is not None for p in norm.parameters()]
    right = torch.autograd.grad(expected, [exact, *its], [x.double() for x in cotangents])
    for mine, one in (*zip(made, expected), *zip(grads, right)):
        allowed = DTYPES[dtype] * max(1.0, float(one.detach().abs().max()))
        assert float((mine.double() - one).abs().max()) <= allowed


@given(kind=st.sampled_from(("rms", "layer")), akin=st.booleans(), seed=seeds())
@settings(parent=fewer(5))
def test_gradients_are_differentiable_again(machine: torch.device, kind: str, akin: bool, seed: int) -> None:
    q = noise(seed, 1, 3, 2, 8, dtype=torch.float32, device="cpu").to(machine).requires_grad_()
    norm, rotary = norm_of(kind, 8, seed, machine), flashmha.Rotary(8).to(machine)
    assert norm is not None
    found = []
    for fused in (True, False):
        k = q.sin() if akin else None  # keys made of queries
        rotation = rotary.rotation(q, k, None, None)
        if fused:
            own = know(norm, 8, q.device)
            made = fused_heads.prepare(q, k, own, own if akin else None, rotation)
        else:
            made = rotation.apply(norm(q), None if k is None else norm(k))
        total = torch.stack([(x**3).sum() for x in made if x is not None]).sum()
        (grad,) = torch.autograd.grad(total, q, create_graph=True)
        found.append(torch.autograd.grad((grad**2).sum(), q)[0])
    scale = max(1.0, float(found[1].abs().max()))
    assert float((found[0] - found[1]).abs().max()) <= 1e-3 * scale


@given(kind=st.sampled_from((None, "rms", "layer")), interleaved=st.booleans(), seed=seeds())
@settings(parent=fewer(5))
def test_many_gradients_come_at_once(machine: torch.device, kind: str | None, interleaved: bool, seed: int) -> None:
    q = noise(seed, 1, 3, 2, 8, dtype=torch.float32, device="cpu").to(machine).requires_grad_()
    norm, rotary = norm_of(kind, 8, seed, machine), flashmha.Rotary(8, interleaved=interleaved).to(machine)
    known = None if norm is None else know(norm, 8, q.device)
    made = fused_heads.prepare(q, None, known, None, rotary.rotation(q, None, None, None))[0]
    cotangents = noise(seed + 1, 2, *q.shape, dtype=torch.float32, device="cpu").to(machine)
    (many,) = torch.autograd.grad(made, q, cotangents, retain_graph=True, is_grads_batched=True)
    for one, cotangent in zip(many, cotangents):
        (alone,) = torch.autograd.grad(made, q, cotangent, retain_graph=True)
        assert float((one - alone).abs().max()) <= 1e-4 * max(1.0, float(alone.abs().max()))


def test_positions_that_changed_before_the_backward_are_an_error(machine: torch.device) -> None:
    q, at = torch.ones(1, 3, 2, 8, device=machine, requires_grad=True), torch.arange(3, device=machine)[None].clone()
    rotary = flashmha.Rotary(8).to(machine)
    made = fused_heads.prepare(q, None, None, None, rotary.rotation(q, None, at, None))[0]
    assert made is not None
    at += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        made.sum().backward()


@pytest.mark.parametrize("kind", ["rms", None])
def test_heads_that_changed_before_the_backward_are_an_error_to_a_norm(machine: torch.device, kind: str | None) -> None:
    """A rotation alone needs none of them: its gradient is the rotation back."""
    whole = noise(0, 1, 3, 2, 8, dtype=torch.float32, device="cpu").to(machine).requires_grad_()
    rotary, norm = flashmha.Rotary(8).to(machine), norm_of(kind, 8, 0, machine)
    known = None if norm is None else know(norm, 8, whole.device)
    found = []
    for changed in (False, True):
        q = whole * 1.0
        made = fused_heads.prepare(q, None, known, None, rotary.rotation(q, None, None, None))[0]
        assert made is not None
        if changed:
            q.zero_()
        if changed and norm is not None:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                torch.autograd.grad((made * made.detach()).sum(), whole)
        else:
            found += torch.autograd.grad((made * made.detach()).sum(), whole)
    assert torch.equal(found[0], found[-1])


@given(data=st.data(), kind=st.sampled_from((None, "rms", "layer")), seed=seeds())
@settings(parent=fewer(3))
def test_gradients_of_a_projection_lie_side_by_side(
    machine: torch.device, data: st.DataObject, kind: str | None, seed: int
) -> None:
    """Those of q, k and v of one matrix are joined by no copy, and are right whatever else needs the heads."""
    draw = data.draw
    heads = draw(st.sampled_from(([2, 2, 2], [4, 1, 1], [1, 1])))
    batch, seqlen, head_dim = draw(st.integers(1, 3)), draw(st.integers(1, 5)), 8
    swapped, twice, before = draw(st.booleans()), draw(st.booleans()), draw(st.booleans())
    shape = (seqlen, batch) if swapped else (batch, seqlen)
    whole = noise(seed, *shape, sum(heads) * head_dim, dtype=torch.float32, device="cpu").to(machine).requires_grad_()
    known = None if kind is None else know(norm_of(kind, head_dim, seed, machine), head_dim, whole.device)
    rotary = flashmha.Rotary(head_dim).to(machine)
    factors = [
        noise(seed + i, batch, seqlen, n, head_dim, device="cpu").float().to(machine) for i, n in enumerate(heads)
    ]

    def loss(packed: Tensor, together: bool) -> tuple[Tensor, Tensor]:
        parts = split(packed * 1.0, head_dim, heads, together)
        *turned, v = [x.transpose(0, 1) for x in parts] if swapped else parts
        q, k = turned if len(turned) == 2 else (None, turned[0])
        made = fused_heads.prepare(q, k, None if q is None else known, known, rotary.rotation(q, k, None, None))
        total = sum((x * factor).sum() for x, factor in zip([x for x in made if x is not None] + [v], factors))
        return total + (k**2).sum() if twice else total, v

    total, v = loss(whole, True)
    kept = early = None
    if before:
        (kept,) = torch.autograd.grad(total, v, retain_graph=True)
        early = kept.clone()
    with Copies() as copies:
        (found,) = torch.autograd.grad(total, whole)
    assert ("cat" in copies.made) == twice  # an interpreter of kernels makes copies of its own
    (right,) = torch.autograd.grad(loss(whole, False)[0], whole)
    assert float((found - right).abs().max()) <= 1e-5 * max(1.0, float(right.abs().max()))
    if kept is not None and early is not None:
        assert torch.equal(kept, early)


@pytest.mark.parametrize("swapped", (False, True))
@pytest.mark.parametrize("kind", ("rms", "layer"))
def test_heads_may_come_back_in_another_order(machine: torch.device, kind: str, swapped: bool) -> None:
    """As from hooks of autograd that put them away."""
    whole = noise(0, 2, 3, 5, 8, dtype=torch.float32, device="cpu").to(machine).requires_grad_()
    rotary, norm = flashmha.Rotary(8).to(machine), norm_of(kind, 8, 0, machine)
    assert norm is not None
    known, found = know(norm, 8, whole.device), []
    for bring_back in (lambda x: x, torch.Tensor.contiguous):
        with torch.autograd.graph.saved_tensors_hooks(lambda x: x, bring_back):
            q, k = ((x.transpose(0, 1) if swapped else x) for x in whole.split_with_sizes((3, 2), 2))
            made = fused_heads.prepare(q, k, known, known, rotary.rotation(q, k, None, None))
        toward = [torch.linspace(-1, 1, x.numel(), device=machine).view(x.shape) for x in made if x is not None]
        found.append(torch.autograd.grad([x for x in made if x is not None], whole, toward)[0])
    torch.testing.assert_close(found[0], found[1])

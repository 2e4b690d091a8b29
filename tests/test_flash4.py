"""flash-attn 4 as it is called: judged on a CPU through pretended kernels that do what they are told, and no more."""

import dataclasses
import functools
import math
import types
from typing import Any

import pytest
import torch
from formula import Formula
from hypothesis import given
from hypothesis import strategies as st
from test_block_tables import Tile, defined, seen, states
from torch import Tensor

from flashmha import AttentionSpec, Dense, KeyLengths, KeyPadding, Mask, Window, causal
from flashmha.backends.flash_attn.flash4 import Flash4, kernel_kind
from flashmha.backends.flash_attn.flash4_tools import Tools
from flashmha.backends.rewrites import block_tables, compact
from flashmha.testing import assert_agrees, noise, seeds, specs
from flashmha.testing.grid import KERNELS_BY_KIND, drawn

pytestmark = pytest.mark.cpu("pretends the kernels")


class Pretended(Flash4):
    """``flash4`` on a CPU, whose kernels do what they are told."""

    name = "pretended"
    limits = dataclasses.replace(Flash4.limits, devices=("cpu",))

    def __init__(self, functions: Any = None, **tools: Any) -> None:
        kernels = functools.partial(types.SimpleNamespace, is_in_interval="within", is_in_table="shown", blocks=blocks)
        own: dict[str, Any] = {"move": move, "masks": kernels, "takes_tables": lambda device: True, "least": 4}
        super().__init__(functions or (pretended_forward, pretended_backward), tools=Tools(**{**own, **tools}))

    def why_not_here(self, device: torch.device) -> str | None:
        return None

    def why_not_built(self, spec: AttentionSpec) -> str | None:
        return None


def pretended_forward(q: Tensor, k: Tensor, v: Tensor, **told: Any) -> tuple[Any, ...]:
    table = told.get("page_table")
    if table is not None:
        assert table.dtype == torch.int32 and table.stride(-1) == 1 and "mask_mod" not in told
        k, v = k[table].flatten(1, 2), v[table].flatten(1, 2)
    formula = Formula.of(q, k, v, told)
    out, lse = formula.out.to(q.dtype).view(q.shape), formula.lse.float()
    if told.get("cu_seqlens_q") is not None:  # rows of no document are never written
        lse = lse[0]
        out[told["cu_seqlens_q"][-1] :] = math.nan
        lse[:, told["cu_seqlens_q"][-1] :] = math.nan
    return out, lse if told["return_lse"] else None, None, None, None


def pretended_backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, dout: Tensor, lse: Tensor, **told: Any
) -> tuple[Any, ...]:
    """``d_score = weights * (d_out @ v.T - rowsum(d_out * out) + d_lse)``."""
    assert not (told["deterministic"] and "block_sparse_tensors" in told)
    formula = Formula.of(q, k, v, told)
    d_out = dout.double().view_as(formula.q)
    if told.get("cu_seqlens_q") is not None:
        d_out[:, told["cu_seqlens_q"][-1] :] = 0.0
    delta = (d_out * formula.out).sum(-1).transpose(1, 2)
    if told["dlse"] is not None:
        delta = delta - told["dlse"].double().view_as(delta).nan_to_num()
    weights, sink = formula.weights[..., : formula.k.shape[1]], formula.weights[..., formula.k.shape[1] :]
    d_score = weights * (torch.einsum("bqhd,bkhd->bhqk", d_out, formula.v) - delta[..., None])
    d_score = d_score * formula.slope * told["softmax_scale"]
    dq = torch.einsum("bhqk,bkhd->bqhd", d_score, formula.k)
    dk = torch.einsum("bhqk,bqhd->bkhd", d_score, formula.q)
    dv = torch.einsum("bhqk,bqhd->bkhd", weights, d_out)
    for grad, into in zip((dq, dk, dv), (told["dq"], told["dk"], told["dv"])):
        into.copy_(grad.unflatten(2, (into.shape[-2], -1)).sum(3).view(into.shape))
    unused = told.get("seqused_k")
    if unused is not None:  # nor are gradients behind a row's last key
        for into in (told["dk"], told["dv"]):
            into[torch.arange(into.shape[1]) >= unused[:, None]] = math.nan
    grads = (told["dq"], told["dk"], told["dv"])
    if told["learnable_sink"] is None:
        return grads
    return (*grads, (-delta * sink[..., 0]).sum((0, 2)).to(told["learnable_sink"].dtype))


Pair = tuple[Tensor, Tensor]


def move(sources: Pair, targets: Pair, valid: Tensor, lengths: Tensor | None, *, scatter: bool) -> None:
    """The kernel of ``compact`` in PyTorch; what it does not write is NaN."""
    places = (~valid).to(torch.int32).argsort(dim=1, stable=True).argsort(dim=1)
    counts = valid.sum(1)
    if lengths is not None:
        lengths.copy_(counts)
    for source, target in zip(sources, targets):
        index = places[:, :, None, None].expand(source.shape)
        real = valid[:, :, None, None]
        if not scatter:
            target.copy_(torch.where(real, source.gather(1, index), 0.0))
            continue
        target.scatter_(1, index, torch.where(real, source, 0.0))
        target[torch.arange(target.shape[1], device=target.device) >= counts[:, None] + compact.LARGEST_TILE] = math.nan


TILES: dict[bool, Tile] = {False: (4, 3), True: (2, 5)}
"""Queries and keys of a tile, forward and backward."""


def blocks(told: dict[str, Any], q: Tensor, k: Tensor, *, backward: bool) -> tuple[block_tables.BlockTables, Tile]:
    """Tables for the tiles above, by their definition."""
    if told["table"] is None:
        allowed = seen(told["first"], told["last"], q.shape[1])
    else:
        allowed = told["table"][told["items"].long(), : q.shape[1], : k.shape[1]].bool()
    return defined(allowed, TILES[backward], by_keys=backward), TILES[backward]


@given(spec=specs(limits=Pretended.limits, head_dims=(24, 32, 64)), seed=seeds())
def test_the_package_is_told_the_whole_problem(spec: AttentionSpec, seed: int) -> None:
    assert_agrees(Pretended(), spec, seed)


@given(data=st.data(), seed=seeds())
def test_every_kind_that_is_compiled_is_told_right(data: st.DataObject, seed: int) -> None:
    spec = data.draw(drawn(st.sampled_from(KERNELS_BY_KIND), torch.device("cpu")))
    assert_agrees(Pretended(), dataclasses.replace(spec, head_dim=24, head_dim_v=24), seed)


@given(data=st.data(), seed=seeds(), heads_kv=st.sampled_from((1, 2, 4)))
def test_gradients_of_one_projection_share_one_tensor(data: st.DataObject, seed: int, heads_kv: int) -> None:
    x = noise(seed, 2, 9, 4 + 2 * heads_kv, 8, dtype=torch.bfloat16).requires_grad_()
    apart = x.detach().clone().requires_grad_()
    q, k, v = x.split((4, heads_kv, heads_kv), dim=2)
    pieces = [piece.contiguous() for piece in apart.split((4, heads_kv, heads_kv), dim=2)]
    mask = data.draw(st.sampled_from((None, causal(), KeyPadding(torch.rand(2, 9) < 0.5))))
    toward = noise(seed + 1, 2, 9, 4, 8, dtype=torch.bfloat16)
    found, wanted = [], []
    for parts, grads in (((q, k, v), found), (pieces, wanted)):
        out = Pretended()(*parts, AttentionSpec.of(*parts, mask=mask))
        assert isinstance(out, Tensor)
        grads += torch.autograd.grad(out, parts, toward)
    assert all(torch.equal(one, other) for one, other in zip(found, wanted))
    assert found[0].untyped_storage().data_ptr() == found[2].untyped_storage().data_ptr()
    assert wanted[0].untyped_storage().data_ptr() != wanted[2].untyped_storage().data_ptr()


@given(spec=specs(limits=Pretended.limits, head_dims=(24, 32)), seed=seeds())
def test_a_kind_is_ready_once_it_ran(spec: AttentionSpec, seed: int) -> None:
    backend = Pretended()
    if backend.why_not(spec) is None:
        assert "not compiled" in str(backend.must_compile(spec))
        assert_agrees(backend, spec, seed)
        assert backend.must_compile(spec) is None and kernel_kind(spec) in backend.compiled
        longer = dataclasses.replace(spec, dtype=torch.float16 if spec.dtype == torch.bfloat16 else torch.bfloat16)
        assert backend.must_compile(longer) is not None


MASKS: dict[str, Mask | None] = {
    "none": None,
    "causal": causal(),
    "padding": KeyPadding(torch.arange(9)[None] % 3 != torch.tensor([[0], [1]])),
    "padded causal": causal() & KeyPadding(torch.arange(9)[None] % 3 != torch.tensor([[0], [1]])),
    "lengths": KeyLengths(torch.tensor([0, 7])),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("needs_grad", (True, False))
def test_compilers_see_one_operator_with_the_same_numbers(mask: str, needs_grad: bool) -> None:
    backend = Pretended()
    q, k = noise(0, 2, 9, 4, 8, dtype=torch.bfloat16), noise(1, 2, 9, 2, 8, dtype=torch.bfloat16)
    q, k = q.requires_grad_(needs_grad), k.requires_grad_(needs_grad)

    def attend(q: Tensor, k: Tensor) -> Any:
        return backend(q, k, k * 2, AttentionSpec.of(q, k, k * 2, mask=MASKS[mask], need_lse=True))

    torch.compiler.reset()
    eager, compiled = attend(q, k), torch.compile(attend, fullgraph=True, backend="aot_eager")(q, k)
    for one, other in zip(eager, compiled):
        assert torch.equal(one, other)
    if needs_grad:
        grads = []
        for out, lse in (eager, compiled):
            grads.append(torch.autograd.grad(out.sum() + lse.nan_to_num(neginf=0.0).sum(), (q, k)))
        assert all(torch.equal(one, other) for one, other in zip(*grads))


PADDED = KeyPadding(torch.arange(40)[None] < torch.tensor([[40], [23]]))


TABLE = Dense(torch.ones(33, 40, dtype=torch.bool).tril(3))


@pytest.mark.parametrize("mask", (PADDED & causal(), PADDED & Window(7, 2), TABLE, TABLE & PADDED, PADDED, causal()))
@pytest.mark.parametrize("seqlen_q", (3, 33))
@pytest.mark.parametrize("deterministic", (False, True))
@pytest.mark.parametrize("here", (False, True))
def test_a_mask_of_ones_own_comes_with_the_tiles_to_look_at(
    mask: Mask, seqlen_q: int, deterministic: bool, here: bool
) -> None:
    listed = []

    def spy(told: dict[str, Any], q: Tensor, k: Tensor, *, backward: bool) -> Any:
        made = blocks(told, q, k, backward=backward)
        listed.append((backward, states(made[0], by_keys=backward)))
        return made

    masks = functools.partial(types.SimpleNamespace, is_in_interval="within", is_in_table="shown", blocks=spy)
    backend = Pretended(masks=masks, takes_tables=lambda device: here)
    if TABLE in mask.parts:  # its rows are as many as there are queries
        own = Dense(TABLE.allowed[:, :, :seqlen_q])
        mask = own if len(mask.parts) == 1 else own & PADDED
    spec = AttentionSpec(2, seqlen_q, 40, 4, 2, 24, 24, torch.bfloat16, mask=mask, deterministic=deterministic)
    assert_agrees(backend, dataclasses.replace(spec, needs_grad=True), 0)
    serves_tables = here and seqlen_q == 33 and ("dense_mask" in spec.features or len(mask.parts) == 2)
    wanted = {False} if deterministic else {False, True}
    assert {backward for backward, _ in listed} == (wanted if serves_tables else set())
    for _, state in listed:
        assert set(state.unique().tolist()) == {0, 1, 2}

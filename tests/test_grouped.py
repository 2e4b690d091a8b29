"""Grouped heads as query rows: folding changes no answer."""

import dataclasses

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from flashmha import AttentionSpec, Dense, KeyPadding, TensorBias, causal
from flashmha.backends import get
from flashmha.backends.base import Backend
from flashmha.backends.flash_attn.flash2 import Flash2
from flashmha.backends.rewrites.grouped import MOST_FOLDED_QUERIES, fold, fold_table, folds, unfold, unfold_lse
from flashmha.backends.sdpa.backend import attend_on_cuda
from flashmha.problem.masks import join_masks
from flashmha.testing import assert_agrees, assert_same, noise, seeds, specs


class Folded(Backend):
    """The definition over folded rows."""

    name = "folded"
    limits = dataclasses.replace(
        get("naive").limits, features=get("naive").limits.features - {"sinks", "dropout", "pages"}
    )

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor | tuple[Tensor, Tensor]:
        groups = spec.heads // spec.heads_kv
        allowed, added = spec.allowed(), spec.added()
        rows = dataclasses.replace(
            spec,
            heads=spec.heads_kv,
            seqlen_q=spec.seqlen_q * groups,
            mask=None if allowed is None else Dense(fold_table(allowed, groups, spec.seqlen_q)),
            bias=None if added is None else TensorBias(fold_table(added, groups, spec.seqlen_q)),
        )
        result = get("naive")(fold(q, groups), k, v, rows)
        if isinstance(result, tuple):
            return unfold(result[0], groups), unfold_lse(result[1], groups)
        return unfold(result, groups)


class OnCuda(Backend):
    """What sdpa does on a GPU, wherever it is tried."""

    name = "sdpa on a GPU"
    limits = dataclasses.replace(get("sdpa").limits, features=get("sdpa").limits.features - {"lse", "pages"})

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor | tuple[Tensor, Tensor]:
        return attend_on_cuda(q, k, v, spec)


@pytest.mark.parametrize("backend", (Folded, OnCuda))
@given(data=st.data(), seed=seeds())
def test_folding_changes_no_answer(backend: type[Backend], data: st.DataObject, seed: int) -> None:
    spec = data.draw(specs(limits=backend.limits, longest=MOST_FOLDED_QUERIES + 1))
    assume(spec.heads != spec.heads_kv and spec.dropout_p == 0.0)
    assert folds(spec) == (0 < spec.seqlen_q <= MOST_FOLDED_QUERIES)
    assert_agrees(backend, spec, seed)


@given(batch=st.integers(0, 3), seqlen_q=st.integers(0, 5), heads_kv=st.integers(1, 3), groups=st.integers(1, 4))
def test_unfold_undoes_fold(batch: int, seqlen_q: int, heads_kv: int, groups: int) -> None:
    q = noise(0, batch, seqlen_q, heads_kv * groups, 3)
    rows = fold(q, groups)
    assert rows.shape == (batch, seqlen_q * groups, heads_kv, 3)
    assert torch.equal(unfold(rows, groups), q)
    assert torch.equal(unfold_lse(rows[..., 0].transpose(1, 2), groups), q[..., 0].transpose(1, 2))


def test_nothing_is_folded_without_groups_beside_dropout_or_for_many_queries() -> None:
    usual = AttentionSpec(1, 4, 64, 4, 2, 8, 8, mask=causal())
    assert folds(usual)
    for changes in ({"heads_kv": 4}, {"dropout_p": 0.1}, {"seqlen_q": MOST_FOLDED_QUERIES + 1}, {"seqlen_q": 0}):
        assert not folds(dataclasses.replace(usual, **changes))


@pytest.mark.cpu("watches what a kernel is told")
@given(
    seqlen_q=st.integers(1, 2 * MOST_FOLDED_QUERIES),
    groups=st.integers(1, 4),
    softcap=st.sampled_from((None, 5.0)),
    seed=seeds(),
)
def test_flash2_folds_two_queries_and_more_and_leaves_one_to_the_package(
    seqlen_q: int, groups: int, softcap: float | None, seed: int
) -> None:
    q = noise(seed, 2, seqlen_q, 2 * groups, 8, dtype=torch.bfloat16)
    k, v = noise(seed + 1, 2, 2, 11, 2, 8, dtype=torch.bfloat16).unbind()
    shapes: list[torch.Size] = []

    def kernel(q: Tensor, k: Tensor, v: Tensor, **options: object) -> tuple[Tensor, ...]:
        shapes.append(q.shape)
        out, lse = get("naive")(q, k, v, AttentionSpec.of(q, k, v, softcap=softcap, need_lse=True))
        return out, lse, q.new_empty(0)

    spec = AttentionSpec.of(q, k, v, softcap=softcap, need_lse=True)
    found = Flash2((kernel, kernel))(q, k, v, spec)
    times = groups if 1 < seqlen_q <= MOST_FOLDED_QUERIES else 1
    assert shapes == [(2, seqlen_q * times, 2 * groups // times, 8)]
    for one, other in zip(found, get("naive")(q, k, v, spec)):
        assert torch.allclose(one, other, atol=0.03)


@pytest.mark.cpu("compiles for a CPU")
@pytest.mark.parametrize("deterministic", (False, True))
def test_a_call_on_a_gpu_is_one_graph_for_sizes_that_are_symbols(deterministic: bool) -> None:
    def call(q: Tensor, k: Tensor, valid: Tensor) -> Tensor:
        spec = AttentionSpec.of(q, k, k, mask=join_masks(KeyPadding(valid), causal()), deterministic=deterministic)
        out = attend_on_cuda(q, k, k, spec)
        assert isinstance(out, Tensor)
        return out

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="eager", dynamic=True)
    for seqlen_q in (3, 5, MOST_FOLDED_QUERIES + 5):
        q, k = noise(0, 2, seqlen_q, 4, 8).float().requires_grad_(), noise(1, 2, 30, 2, 8).float()
        valid = noise(2, 2, 30) > 0.0
        assert_same(compiled(q, k, valid), call(q, k, valid))

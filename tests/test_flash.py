"""flash-attn 2 and 3 as they are called: judged on a CPU through pretended kernels that do what they are told."""

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from formula import Formula
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from flashmha import AttentionSpec, Documents, KeyLengths, KeyPadding, Mask, Pages, Positions, Window, causal
from flashmha.backends import get
from flashmha.backends.flash_attn.flash2 import Flash2, waits_beside_pages
from flashmha.backends.flash_attn.flash3 import Flash3
from flashmha.backends.flash_attn.package import FlashAttn
from flashmha.backends.flash_attn.windows import normal_lse
from flashmha.backends.limits import HALF
from flashmha.backends.rewrites.caches import CACHED, page_table
from flashmha.backends.rewrites.grouped import MOST_FOLDED_QUERIES
from flashmha.backends.sdpa import caches
from flashmha.backends.sdpa import packed as varlen
from flashmha.backends.sdpa.backend import Sdpa
from flashmha.problem.masks import join_masks
from flashmha.testing import assert_agrees, noise, seeds, specs

pytestmark = pytest.mark.cpu("pretends the kernels")


class Unwritten(torch.autograd.Function):
    """A tensor whose gradient is not written behind the last document."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, end: Tensor) -> Tensor:
        ctx.save_for_backward(end)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (end,) = ctx.saved_tensors
        return torch.where(behind(grad, end), math.nan, grad), None


def behind(rows: Tensor, end: Tensor) -> Tensor:
    """Which rows of (total, heads, head_dim) lie behind the last document."""
    return (torch.arange(rows.shape[0]) >= end)[:, None, None]


def read(k: Tensor, starts: Tensor, ends: Tensor) -> Tensor:
    """Keys (total, heads, head_dim) that a kernel reads: those of documents with queries. The others' gradient is 0."""
    documents = torch.bucketize(torch.arange(k.shape[0]), ends[1:], right=True)
    asked = torch.cat((starts.diff() > 0, torch.ones(1, dtype=torch.bool)))[documents]
    return torch.where(asked[:, None, None], k, 0.0)


def attend(q: Tensor, k: Tensor, v: Tensor, empty: float, **told: Any) -> tuple[Tensor, Tensor]:
    """out and lse, which is ``empty`` where a row saw nothing; NaN in whatever a kernel leaves unwritten."""
    offsets = [told.get(name) for name in ("cu_seqlens_q", "cu_seqlens_k")]
    starts, ends = offsets
    if starts is not None and ends is not None:
        q, k, v = Unwritten.apply(q, starts[-1]), Unwritten.apply(k, ends[-1]), Unwritten.apply(v, ends[-1])
        k, v = read(k, starts, ends), read(v, starts, ends)
        if not torch.compiler.is_compiling():
            for cu_seqlens, x, longest in ((starts, q, told["max_seqlen_q"]), (ends, k, told["max_seqlen_k"])):
                assert cu_seqlens.dtype == torch.int32 and cu_seqlens.is_contiguous() and isinstance(longest, int)
                assert cu_seqlens[0] == 0 and cu_seqlens[-1] <= len(x) and cu_seqlens.diff().min() >= 0
                assert cu_seqlens.diff().max() <= longest
    formula = Formula.of(q, k, v, told)
    out, lse = formula.out.to(q.dtype).view(q.shape), formula.lse.detach().float()
    lse = lse.masked_fill(lse == -math.inf, empty)
    if starts is not None:
        out, lse = torch.where(behind(out, starts[-1]), math.nan, out), lse[0]
        lse = lse.masked_fill(behind(q, starts[-1])[:, 0, 0], math.nan)
    return out, lse


def bounds(causal: bool, window_size: tuple[int, int]) -> dict[str, Any]:
    """A window of flash-attn 2 and 3, where -1 is unbounded."""
    left, right = (None if bound < 0 else bound for bound in window_size)
    return {"causal": causal, "window_size_left": left, "window_size_right": right}


def two(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """flash-attn 2, dense and packed."""
    assert dropout_p == 0.0 and (max_seqlen_q != 1 or q.shape[-2] == k.shape[-2])  # flash-attention#1537
    keys = k.shape[-3] if max_seqlen_k is None else max_seqlen_k
    left, right = (-1 if bound >= keys else bound for bound in window_size)  # flash-attention#895
    if left >= 0 > right:
        right = keys
    told = {"softmax_scale": softmax_scale, "softcap": softcap, "alibi_slopes": alibi_slopes}
    told |= {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
    told |= {"max_seqlen_q": max_seqlen_q, "max_seqlen_k": max_seqlen_k}
    out, lse = attend(q, k, v, math.inf, **told, **bounds(causal, (left, right)))
    return (out, lse, None) if return_attn_probs else out


def three(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    num_splits: int = 1,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """flash-attn 3, dense and packed."""
    told = {"softmax_scale": softmax_scale, "softcap": softcap}
    told |= {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
    told |= {"max_seqlen_q": max_seqlen_q, "max_seqlen_k": max_seqlen_k}
    out, lse = attend(q, k, v, -math.inf, **told, **bounds(causal, window_size))
    return (out, lse) if return_attn_probs else out


def cache(empty: float) -> Callable[..., Any]:
    """The function of both for a cache of keys, forward alone."""

    def attend_to_cache(
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        cache_seqlens: Tensor,
        block_table: Tensor | None = None,
        page_table: Tensor | None = None,
        alibi_slopes: Tensor | None = None,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
        num_splits: int = 0,
        return_softmax_lse: bool = False,
    ) -> Any:
        assert cache_seqlens.dtype == torch.int32 and k_cache.stride(-1) == v_cache.stride(-1) == 1
        told = {"softmax_scale": softmax_scale, "softcap": softcap, "seqused_k": cache_seqlens}
        told["alibi_slopes"] = alibi_slopes
        table = block_table if page_table is None else page_table
        if table is not None:
            assert table.dtype == torch.int32 and table.stride(-1) == 1
            assert block_table is None or not k_cache.shape[1] % 256
            k_cache, v_cache = k_cache[table].flatten(1, 2), v_cache[table].flatten(1, 2)
        with torch.no_grad():
            out, lse = attend(q, k_cache, v_cache, empty, **told, **bounds(causal, window_size))
        return (out, lse) if return_softmax_lse else out

    return attend_to_cache


class Pretended2(Flash2):
    """``flash2`` on a CPU."""

    name = "pretended 2"
    limits = dataclasses.replace(
        Flash2.limits,
        devices=("cpu",),
        features=Flash2.limits.features - {"dropout"},  # the formula drops nothing
    )

    def why_not_here(self, device: torch.device) -> str | None:
        return None

    def why_not_built(self, spec: AttentionSpec) -> str | None:
        return None


class Pretended3(Flash3):
    """``flash3`` on a CPU."""

    name = "pretended 3"
    limits = dataclasses.replace(Flash3.limits, devices=("cpu",))

    def why_not_here(self, device: torch.device) -> str | None:
        return None

    def why_not_built(self, spec: AttentionSpec) -> str | None:
        return None


def pretended(kind: type[FlashAttn], caching: bool = True) -> FlashAttn:
    """A backend whose package is pretended, with its function for caches or without."""
    backend = kind()
    function, empty = (two, math.inf) if kind is Pretended2 else (three, -math.inf)
    backend.functions = (function, function)
    backend.cached = cache(empty) if caching else None
    return backend


both = pytest.mark.parametrize("kind", (Pretended2, Pretended3))


@both
@given(data=st.data(), caching=st.booleans(), seed=seeds())
def test_the_package_is_told_the_whole_problem(
    kind: type[FlashAttn], data: st.DataObject, caching: bool, seed: int
) -> None:
    limits = kind.limits if caching else dataclasses.replace(kind.limits, features=kind.limits.features - {*CACHED})
    assert_agrees(pretended(kind, caching), data.draw(specs(limits=limits, head_dims=(8, 16))), seed)


@both
@given(data=st.data(), seed=seeds())
def test_a_window_means_the_same_in_documents_of_more_queries_than_keys(
    kind: type[FlashAttn], data: st.DataObject, seed: int
) -> None:
    ends = st.lists(st.integers(0, 9), min_size=2, max_size=2).map(sorted)
    starts, keys = (torch.tensor([0, *data.draw(ends)]) for _ in range(2))
    bound = st.none() | st.integers(0, 9)
    mask = Documents(starts, keys) & Window(data.draw(bound), data.draw(bound))
    assert_agrees(pretended(kind), AttentionSpec(1, 9, 9, 2, 2, 8, 8, torch.bfloat16, mask=mask, needs_grad=True), seed)


def padded(kind: type[FlashAttn]) -> st.SearchStrategy[AttentionSpec]:
    """Problems with padding that a backend serves."""
    positions = {"causal", "window", "documents", "alibi", *CACHED}
    alone = dataclasses.replace(kind.limits, features=kind.limits.features - positions)
    return specs(limits=alone, head_dims=(8, 16), longest=17).filter(lambda spec: spec.mask is not None)


@both
@given(data=st.data(), caching=st.booleans(), seed=seeds())
def test_padding_of_any_pattern_is_exact_on_every_row(
    kind: type[FlashAttn], data: st.DataObject, caching: bool, seed: int
) -> None:
    assert_agrees(pretended(kind, caching), data.draw(padded(kind)), seed)


@both
@given(data=st.data(), seed=seeds(), real=st.floats(0.0, 1.0))
def test_what_stands_in_padding_reaches_no_other_token(
    kind: type[FlashAttn], data: st.DataObject, seed: int, real: float
) -> None:
    q = noise(seed, 3, 5, 4, 8, dtype=torch.bfloat16).requires_grad_()
    k = noise(seed + 1, 3, 7, 2, 8, dtype=torch.bfloat16)
    valid = torch.rand(3, 7, generator=torch.Generator().manual_seed(seed)) < real
    found = []
    for filler in (0.0, math.nan):
        keys = torch.where(valid[:, :, None, None], k, filler).requires_grad_()
        out = pretended(kind)(q, keys, keys, AttentionSpec.of(q, keys, keys, mask=KeyPadding(valid)))
        assert isinstance(out, Tensor)
        found.append((out, *torch.autograd.grad(out.float().square().sum(), (q, keys))))
    assert all(torch.equal(one, other) for one, other in zip(*found))
    assert not found[0][2][~valid].any()


class PretendedSdpa(Sdpa):
    """``sdpa`` on a CPU, where documents and padding go to the flash-attn 2 inside torch."""

    name = "pretended sdpa"
    limits = dataclasses.replace(
        Sdpa.limits,
        devices=("cpu",),
        dtypes=HALF,
        features=(varlen.BESIDE_DOCUMENTS | varlen.BESIDE_PADDING) - {"dropout", "deterministic"},
        head_dim_step=8,
    )

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor | tuple[Tensor, Tensor]:
        return varlen.attend_packed(q, k, v, spec) if varlen.packable(spec) else super().__call__(q, k, v, spec)


@given(data=st.data(), seed=seeds())
def test_documents_are_packed_for_the_kernel_inside_torch(data: st.DataObject, seed: int) -> None:
    def kernel(q: Tensor, k: Tensor, v: Tensor, *told: Any, scale: float) -> Any:
        *offsets, dropout_p, is_causal, _ = told
        return (two(q, k, v, *offsets, dropout_p=dropout_p, softmax_scale=scale, causal=is_causal),)

    spec = data.draw(specs(limits=PretendedSdpa.limits, head_dims=(8, 16), longest=17))
    with mock.patch.object(torch.ops.aten, "_flash_attention_forward", kernel):
        assert_agrees(PretendedSdpa(), spec, seed)


class PretendedReader(Sdpa):
    """``sdpa`` on a CPU, where rows of a cache go to the flash-attn 2 inside torch, which is given."""

    name = "pretended reader"
    limits = dataclasses.replace(
        Sdpa.limits,
        devices=("cpu",),
        dtypes=HALF,
        features=caches.BESIDE_LENGTHS,
        head_dim_step=8,
        page_step=caches.PAGE_STEP,
        seqlen_min=1,
        batch_min=1,
    )

    def why_not(self, spec: AttentionSpec) -> str | None:
        return super().why_not(spec) or (None if caches.readable_cache(spec) else "not read where it lies")

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
        return caches.attend_to_lengths(q, k, v, spec)


@given(data=st.data(), seed=seeds())
def test_rows_of_a_cache_are_read_where_they_lie_by_the_kernel_inside_torch(data: st.DataObject, seed: int) -> None:
    def kernel(q: Tensor, k: Tensor, v: Tensor, *told: Any, scale: float, **more: Any) -> Any:
        starts, ends, longest_q, longest_k, dropout_p, is_causal, _ = told
        lengths, table = more["seqused_k"], more.get("block_table")
        batch, rows = len(lengths), q.shape[0] // len(lengths)
        assert dropout_p == 0.0 and rows == longest_q and starts.tolist() == [n * rows for n in range(batch + 1)]
        assert ends.tolist() == [n * longest_k for n in range(batch + 1)] and lengths.dtype == torch.int32
        assert all(x.dtype == torch.int32 and x.is_contiguous() for x in (starts, ends))
        if table is not None:
            assert k.shape[1] % 256 == 0 and more["num_splits"] == 1  # pytorch#194167
        keys = [x.view(batch, longest_k, *x.shape[1:]) if table is None else x[table].flatten(1, 2) for x in (k, v)]
        window = more["window_size_left"], more["window_size_right"]
        left, right = (-1 if bound >= longest_k else bound for bound in window)  # flash-attention#895
        right = longest_k if left >= 0 > right else right
        told_of = {"softmax_scale": scale, "softcap": 0.0, "seqused_k": lengths, **bounds(is_causal, (left, right))}
        return (attend(q.view(batch, rows, *q.shape[1:]), *keys, math.inf, **told_of)[0].flatten(0, 1),)

    spec = data.draw(specs(limits=PretendedReader.limits, head_dims=(8, 16)))
    seen = st.sampled_from((None, causal(), Window(2, 0), Window(3, 1), Window(1, None)))
    rule = data.draw(seen) if spec.seqlen_q <= spec.seqlen_k else None
    lengths = (noise(seed, spec.batch).abs() * spec.seqlen_k).long().clamp(max=spec.seqlen_k)
    places = Positions(lengths[:, None] - spec.seqlen_q + torch.arange(spec.seqlen_q), at_end=True)
    pages = spec.pages if caches.takes().issuperset(("block_table", "num_splits")) else None  # not in every torch
    mask = join_masks(KeyLengths(lengths), places, rule, pages)
    heads = {"heads": spec.heads * 64, "heads_kv": spec.heads_kv * 64}  # as many as fill a GPU
    alone = spec.seqlen_q == 1 and spec.heads != spec.heads_kv and pages is None and rule is None
    spec = dataclasses.replace(spec, mask=mask, **({} if alone and data.draw(st.booleans()) else heads))
    assert caches.readable_cache(spec)
    with mock.patch.object(torch.ops.aten, "_flash_attention_forward", kernel):
        assert_agrees(PretendedReader(), spec, seed)


def whole_documents(total: int) -> Documents:
    """Two documents that hold every token."""
    return Documents(torch.tensor([0, total // 2, total], dtype=torch.int32), total=total)


@given(data=st.data(), seed=seeds())
def test_documents_are_prepared_once_for_the_kernel_inside_torch(data: st.DataObject, seed: int) -> None:
    def kernel(q: Tensor, k: Tensor, v: Tensor, *told: Any, scale: float) -> Any:
        *offsets, dropout_p, is_causal, _ = told
        return (two(q, k, v, *offsets, dropout_p=dropout_p, softmax_scale=scale, causal=is_causal),)

    spec = data.draw(specs(limits=PretendedSdpa.limits, head_dims=(8, 16), longest=17))
    lengths = KeyLengths(torch.arange(spec.batch).clamp(max=spec.seqlen_q))
    mask = data.draw(st.sampled_from((whole_documents(spec.seqlen_q), lengths)))
    batch = 1 if isinstance(mask, Documents) else spec.batch
    assume(batch)  # else there is nothing to pack
    spec = dataclasses.replace(spec, mask=mask, batch=batch, seqlen_k=spec.seqlen_q)
    serve = varlen.attend_in_place(spec)
    assert serve is not None
    sizes = (spec.batch, spec.seqlen_q, spec.heads), (spec.batch, spec.seqlen_k, spec.heads_kv)
    with mock.patch.object(torch.ops.aten, "_flash_attention_forward", kernel):
        for salt in range(2):
            q, k, v = (noise(seed + salt, *size, spec.head_dim, dtype=spec.dtype) for size in (*sizes, sizes[1]))
            assert torch.equal(serve(q, k, v), varlen.attend_packed(q, k, v, spec))


@pytest.mark.parametrize("mask", (KeyPadding(torch.arange(11)[None] < torch.tensor([[11], [4]])), None))
def test_the_kernel_inside_torch_gets_dense_heads_and_offsets(mask: Mask | None) -> None:
    mask = Documents(torch.tensor([0, 0, 4, 4, 11, 11])[::2].int()) if mask is None else mask
    batch = 1 if isinstance(mask, Documents) else 2
    q, k, v = (noise(seed, batch, 11, 8, 2, dtype=torch.half).transpose(2, 3) for seed in range(3))
    spec = AttentionSpec.of(q, k, v, mask=mask)

    def kernel(q: Tensor, k: Tensor, v: Tensor, *told: Any, scale: float) -> Any:
        assert all(x.stride(-1) == 1 for x in (q, k, v)) and all(x.is_contiguous() for x in told[:2])
        return (two(q, k, v, *told[:4], softmax_scale=scale, causal=told[5]),)

    with mock.patch.object(torch.ops.aten, "_flash_attention_forward", kernel):
        out = varlen.attend_packed(q, k, v, spec)
    torch.testing.assert_close(out, get("naive")(q, k, v, spec), atol=2e-3, rtol=2e-3)


REAL = KeyPadding(torch.ones(2, 9, dtype=torch.bool))
APART = Documents(torch.tensor([0, 4, 9]))
PACKED: dict[str, tuple[Mask | None, dict[str, Any], bool]] = {
    "padding": (REAL, {"batch": 2}, True),
    "padding for few queries": (REAL, {"batch": 2, "seqlen_q": MOST_FOLDED_QUERIES}, False),
    "padding beside causality": (REAL & causal(), {"batch": 2}, False),
    "documents": (APART, {}, True),
    "causal documents": (APART & causal(align="top_left"), {}, True),
    "causal documents of other keys": (
        Documents(torch.tensor([0, 4, 9]), torch.tensor([0, 2, 9])) & causal(align="top_left"),
        {},
        False,
    ),
    "documents in a window": (APART & Window(2, 0), {}, False),
    "nothing": (None, {}, False),
    "float32": (APART, {"dtype": torch.float32}, False),
    "export": (APART, {"aten_only": True}, False),
}


@pytest.mark.parametrize("name", PACKED)
def test_the_kernel_inside_torch_is_for_documents_and_padding(name: str) -> None:
    mask, changes, packed = PACKED[name]
    sizes: dict[str, Any] = {"batch": 1, "seqlen_q": 9, "seqlen_k": 9, "heads": 2, "heads_kv": 1, "dtype": torch.half}
    spec = AttentionSpec(**{**sizes, "head_dim": 8, "head_dim_v": 8, "mask": mask, **changes})
    assert varlen.packable(spec) == packed
    assert not varlen.packable(dataclasses.replace(spec, head_dim=12, head_dim_v=12))


MASKS: dict[str, Mask] = {
    "padding": KeyPadding(torch.arange(9)[None] % 3 != torch.tensor([[0], [1]])),
    "lengths": KeyLengths(torch.tensor([0, 7])),
    "both": KeyPadding(torch.arange(9)[None] % 3 != torch.tensor([[0], [1]])) & KeyLengths(torch.tensor([9, 4])),
}


@both
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("seqlen_q", (1, 9))
@pytest.mark.parametrize("needs_grad", (True, False))
def test_compilers_see_padding_as_one_graph_with_the_same_numbers(
    kind: type[FlashAttn], mask: str, seqlen_q: int, needs_grad: bool
) -> None:
    backend = pretended(kind)
    q, k = noise(0, 2, seqlen_q, 4, 8, dtype=torch.bfloat16), noise(1, 2, 9, 2, 8, dtype=torch.bfloat16)
    q, k = q.requires_grad_(needs_grad), k.requires_grad_(needs_grad)

    def run(q: Tensor, k: Tensor) -> Any:
        return backend(q, k, k * 2, AttentionSpec.of(q, k, k * 2, mask=MASKS[mask], need_lse=not needs_grad))

    torch.compiler.reset()
    eager, compiled = run(q, k), torch.compile(run, fullgraph=True, backend="aot_eager")(q, k)
    if not needs_grad:
        for one, other in zip(eager, compiled):
            torch.testing.assert_close(one, other)
        return
    torch.testing.assert_close(eager, compiled)
    grads = [torch.autograd.grad(out.float().square().sum(), (q, k)) for out in (eager, compiled)]
    torch.testing.assert_close(*grads)


STEPS = {"keys in rows": None, "keys in pages": torch.tensor([[2], [0]], dtype=torch.int32)}
SEEN = {"all": None, "causal": causal(), "window": Window(2, 0)}


def step_over_cache(where: str, seen: str, seqlen_q: int) -> tuple[Tensor, Mask]:
    """Keys in a cache, and what a step sees of them."""
    table, rule = STEPS[where], SEEN[seen]
    lengths = torch.tensor([9, 255])
    mask = KeyLengths(lengths) & Positions(lengths[:, None] - seqlen_q + torch.arange(seqlen_q), at_end=True)
    mask = mask if rule is None else mask & rule
    k = noise(1, 2 if table is None else 3, 256, 2, 8, dtype=torch.bfloat16)
    return k, mask if table is None else mask & Pages(table, 256)


@both
@pytest.mark.parametrize("where", STEPS)
@pytest.mark.parametrize("seen", SEEN)
@pytest.mark.parametrize("seqlen_q", (1, 4))
def test_a_compiled_step_reads_a_cache_where_it_lies(
    kind: type[FlashAttn], where: str, seen: str, seqlen_q: int
) -> None:
    """As one graph with the same numbers, by the function for caches and no other."""
    backend, calls = pretended(kind), []
    known = backend.cached
    assert known is not None

    def cached(q: Tensor, k: Tensor, *rest: Any, **told: Any) -> Any:
        calls.append(k.data_ptr())
        return known(q, k, *rest, **told)

    if kind is Pretended2:  # the other package's function is an operator itself
        backend.cached = cached
    k, mask = step_over_cache(where, seen, seqlen_q)
    q = noise(0, 2, seqlen_q, 4, 8, dtype=torch.bfloat16)

    def run(q: Tensor, k: Tensor) -> Any:
        return backend(q, k, k, AttentionSpec.of(q, k, k, mask=mask, need_lse=True))

    torch.compiler.reset()
    eager, compiled = run(q, k), torch.compile(run, fullgraph=True, backend="aot_eager")(q, k)
    for one, other in zip(eager, compiled):
        torch.testing.assert_close(one, other)
    assert calls == [k.data_ptr()] * len(calls) and len(calls) == 2 * (kind is Pretended2)


@given(
    version=st.tuples(st.integers(0, 4), st.integers(0, 12), st.integers(0, 12)), end=st.sampled_from(("", ".post1"))
)
def test_releases_that_wait_beside_pages_are_those_behind_one(version: tuple[int, int, int], end: str) -> None:
    assert waits_beside_pages(".".join(map(str, version)) + end) == (version > (2, 8, 3))


@pytest.mark.parametrize("where", STEPS)
@pytest.mark.parametrize("layout", ("contiguous", "heads first"))
def test_the_operator_for_caches_keeps_what_its_fake_one_says(where: str, layout: str) -> None:
    backend = pretended(Pretended2)
    k, mask = step_over_cache(where, "all", 3)
    q = noise(0, 2, 4, 3, 8, dtype=torch.bfloat16).transpose(1, 2)
    spec = AttentionSpec.of(q, k, k, mask=mask)
    q = q.contiguous() if layout == "contiguous" else q
    told = (spec.key_lengths(), page_table(spec), None, 0.3, 0.0, True, -1, -1, backend.key)
    torch.library.opcheck(torch.ops.flashmha.flash2_cache.default, (q, k, k, *told))


@given(head_dim=st.sampled_from((32, 64, 96, 128, 256)), page_size=st.sampled_from((1, 16, 64, 256)))
def test_flash4_says_which_pages_it_cannot_read(head_dim: int, page_size: int) -> None:
    mask = Pages(torch.zeros(2, 2, dtype=torch.int32), page_size) & KeyLengths(torch.ones(2, dtype=torch.int64))
    sizes = (2, 1, 2 * page_size, 2, 2, head_dim, head_dim)
    spec = AttentionSpec(*sizes, torch.bfloat16, torch.device("cuda"), mask=mask)
    why = get("flash4").why_not(spec)
    assert why == (None if head_dim in (64, 128) else f"pages of head_dim={head_dim} (64 or 128)")


NEEDED: dict[str, tuple[dict[str, Any], str]] = {
    "pages of another size": ({"page_size": 128}, "page_size=128 .a multiple of 256."),
    "no lengths": ({"lengths": False}, "pages without key_lengths"),
    "no positions": ({"positions": False, "rule": Window(2, 0)}, "pages beside window without Positions"),
    "positions anywhere": ({"at_end": False}, "Positions anywhere"),
    "a ring": ({"ring": True}, "Positions anywhere"),
    "heads of no multiple": ({"head_dim": 12}, "pages of head_dim=12"),
    "a gradient": ({"needs_grad": True}, "cache and pages beside backward"),
    "padding": ({"rule": KeyPadding(torch.ones(2, 256, dtype=torch.bool))}, "cache and pages beside key_padding"),
    "nothing": ({}, ""),
    "causality": ({"rule": causal()}, ""),
    "a window": ({"rule": Window(3, 0)}, ""),
}


@pytest.mark.parametrize("name", NEEDED)
def test_flash2_says_which_cache_it_cannot_read(name: str) -> None:
    told, said = NEEDED[name]
    size, head_dim = told.get("page_size", 256), told.get("head_dim", 8)
    mask: Mask = Pages(torch.zeros(2, 256 // size, dtype=torch.int32), size)
    if told.get("lengths", True):
        mask = mask & KeyLengths(torch.tensor([3, 256]))
    if told.get("positions", True):
        keys = torch.zeros(2, 256, dtype=torch.int32) if told.get("ring") else None
        mask = mask & Positions(torch.tensor([[2], [255]]), keys, at_end=told.get("at_end", True))
    mask = mask & told["rule"] if "rule" in told else mask
    sizes = (2, 1, 256, 2, 2, head_dim, head_dim)
    spec = AttentionSpec(
        *sizes, torch.bfloat16, torch.device("cuda"), mask=mask, needs_grad=told.get("needs_grad", False)
    )
    why = Flash2().why_not(spec)
    assert (why is None) if not said else (why is not None and re.search(said, why)), why
    assert Flash3().why_not(spec) is None or name not in ("pages of another size", "nothing", "causality", "a window")


@both
def test_a_package_without_a_function_for_caches_says_so(kind: type[FlashAttn]) -> None:
    _, mask = step_over_cache("keys in pages", "causal", 1)
    spec = AttentionSpec(2, 1, 256, 4, 2, 8, 8, torch.bfloat16, mask=mask)
    assert pretended(kind, True).why_no_cache(spec) is None
    assert "no cache, no pages" in str(pretended(kind, False).why_no_cache(spec))


@both
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("needs_grad", (True, False))
def test_no_call_waits_for_the_device_to_read_padding(kind: type[FlashAttn], mask: str, needs_grad: bool) -> None:
    """Tensors without values: a look at one is an error."""
    backend = pretended(kind)

    def kernel(q: Tensor, *rest: Any, **told: Any) -> Any:
        lse = q.new_empty(q.shape[-2], q.shape[0]) if q.dim() == 3 else q.new_empty(q.shape[0], q.shape[2], q.shape[1])
        return (q * 1.0, lse) if told.get("return_attn_probs") or told.get("return_softmax_lse") else q * 1.0

    backend.functions, backend.cached = (kernel, kernel), kernel
    q, k = torch.empty(2, 5, 4, 8, device="meta"), torch.empty(2, 9, 2, 8, device="meta")
    q, k = q.requires_grad_(needs_grad), k.requires_grad_(needs_grad)
    parts = [type(part)(*(x.to("meta") for x in part.tensors())) for part in MASKS[mask].parts]
    there = parts[0] & parts[-1]
    out = backend(q, k, k, AttentionSpec.of(q, k, k, mask=there, need_lse=not needs_grad))
    if needs_grad:
        assert isinstance(out, Tensor) and out.shape == q.shape
        out.sum().backward()
    else:
        assert [x.shape for x in out] == [q.shape, (2, 4, 5)]


@given(rows=st.lists(st.sampled_from((0.5, -3.0, math.inf, -math.inf)), min_size=1, max_size=5), seed=seeds())
def test_a_sink_far_above_its_row_is_the_log_sum_exp(rows: list[float], seed: int) -> None:
    """A kernel whose exponential overflows says inf of such a row, as of one that saw nothing."""
    sinks = torch.randn(3, generator=torch.Generator().manual_seed(seed), requires_grad=True)
    lse = torch.tensor(rows).expand(2, 3, -1).clone().requires_grad_()
    found = normal_lse(lse, sinks)
    lost = lse.detach().isinf()
    assert torch.equal(found[lost], sinks[:, None].expand(2, 3, len(rows))[lost])
    assert torch.equal(found[~lost], lse[~lost])
    of_lse, of_sinks = torch.autograd.grad(found.sum(), (lse, sinks))
    assert torch.equal(of_lse, (~lost).float()) and torch.equal(of_sinks, lost.float().sum((0, 2)))
    seen = normal_lse(lse)
    assert torch.equal(seen == -math.inf, lost) and torch.equal(seen[~lost], lse[~lost])

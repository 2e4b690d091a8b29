"""Kernels of flash-attn 4 that are launched again: a pretended package whose kernels know their arguments alone."""

from __future__ import annotations

import contextlib
import itertools
import math
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from formula import Formula
from hypothesis import assume, given
from test_flash4 import Pretended, move
from torch import Tensor

from flashmha import AttentionSpec, Documents, KeyLengths, KeyPadding, Mask, Window, causal
from flashmha.backends import get
from flashmha.backends.flash_attn import flash4_launches
from flashmha.backends.rewrites import compact
from flashmha.testing import assert_agrees, noise, seeds, specs

pytestmark = pytest.mark.cpu("pretends the kernels")
WIDTH, QUERIES, KEYS = 32, 4, 3
"""What the pretended backward rounds head dims to, and its tile."""


class AuxData(NamedTuple):
    tensors: Any = None
    scalars: Any = None


class LearnableSinkBwdTensors(NamedTuple):
    dpsum: Tensor
    lse: Tensor
    sink: Tensor
    dsink: Tensor


def tiles(x: Tensor, heads: int, size: int) -> Tensor:
    """A workspace with a number for each of a row's, as (batch or 1, rows, heads, head_dim)."""
    x = x if x.dim() == 3 else x[None]
    return x.view(*x.shape[:2], -1, WIDTH).transpose(1, 2)


class Package(types.ModuleType):
    """flash-attn 4 as far as its launches go: kernels are looked up, and hand one another what they work on."""

    AuxData, LearnableSinkBwdTensors = AuxData, LearnableSinkBwdTensors
    BIN_BATCH_SEARCH_THRESH = 3

    def __init__(self, name: str, change: str = "") -> None:
        super().__init__(name)
        self.change, self.served, self.launched = change, 0, 0
        for name in flash4_launches.OWNERS:
            function = self.function(getattr(self, name[1:]))
            setattr(self, name, function)

    def function(self, method: Callable[..., Any]) -> Any:
        """A function with a cache, as the package has them."""

        def call(*arguments: Any, **told: Any) -> Any:
            return method(*arguments, **told)

        call.__module__ = self.__name__
        call.compile_cache = {}  # type: ignore[attr-defined]
        return call

    def _tile_size_bwd_sm90(self, *sizes: Any) -> Any:
        return types.SimpleNamespace(m_block_size=QUERIES, n_block_size=KEYS, dKV_swapAB=False)

    def launch(self, owner: str, key: Any, kernel: Callable[..., Any], *arguments: Any) -> None:
        cache = getattr(self, owner).compile_cache
        if key not in cache:
            cache[key] = kernel
        if self.change == "another order" and owner == "_flash_attn_fwd":
            arguments = (*arguments[:4], arguments[5], arguments[4], *arguments[6:])
        if self.change == "one more" and owner == "_flash_attn_bwd":
            arguments = (*arguments, None)
        if self.change == "another order" and owner == "_flash_attn_bwd":
            arguments = (*arguments[:4], arguments[5], arguments[4], *arguments[6:])
        cache[key](*arguments)

    def flash_attn_fwd(self, q: Tensor, k: Tensor, v: Tensor, **told: Any) -> tuple[Any, ...]:
        self.served += 1
        out, lse = told.get("out"), told.get("lse")
        out = q.new_empty(*q.shape[:-1], v.shape[-1]) if out is None else out
        rows = (q.shape[1], q.shape[0]) if q.dim() == 3 else (q.shape[0], q.shape[2], q.shape[1])
        lse = q.new_empty(rows, dtype=torch.float32) if lse is None else lse
        static = {name: told[name] for name in ("causal", "softcap")}

        def kernel(*given: Any) -> None:
            self.launched += 1
            given = given if not isinstance(given[4], float) else (*given[:4], given[5], given[4], *given[6:])
            q, k, v, out, lse, scale, cu_q, cu_k, _, lengths, _, left, right, sink = given[:14]
            formula = Formula.of(q, k, v, said(static, scale, cu_q, cu_k, lengths, left, right, sink))
            found, total = formula.out.to(q.dtype).view(out.shape), formula.lse.float().view(lse.shape)
            if cu_q is not None:  # rows of no document are never written
                found[cu_q[-1] :], total[:, cu_q[-1] :] = math.nan, math.nan
            out.copy_(found)
            lse.copy_(total)

        if q.numel() and k.numel():
            offsets = [told.get(name) for name in ("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k")]
            window = (None, None) if told["causal"] else (told["window_size_left"], told["window_size_right"])
            given = (q, k, v, out.detach(), lse, told["softmax_scale"], *offsets, None, *window, told["learnable_sink"])
            key = (*static.values(), *(x is None for x in (*offsets, *window)))
            self.launch("_flash_attn_fwd", key, kernel, *given, None, AuxData(), None, None)
        else:
            out.zero_()
            lse.fill_(-math.inf)
            if told["learnable_sink"] is not None:
                lse.copy_(told["learnable_sink"][:, None])
        return out, lse, None, None, None

    def flash_attn_bwd(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, dout: Tensor, lse: Tensor, **told: Any
    ) -> tuple[Any, ...]:
        self.served += 1
        static = {name: told[name] for name in ("causal", "softcap")}
        sink, scale, grouped = told["learnable_sink"], told["softmax_scale"], q.shape[-2] != k.shape[-2]
        if not (q.numel() and k.numel()):
            for name in ("dq", "dk", "dv"):
                told[name].zero_()
            grads = (told["dq"], told["dk"], told["dv"])
            return grads if sink is None else (*grads, torch.zeros_like(sink))
        offsets = [told.get(name) for name in ("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k")]
        window = (None, None) if told["causal"] else (told["window_size_left"], told["window_size_right"])

        def work(x: Tensor, cu: Tensor | None, size: int) -> tuple[int, ...]:
            if cu is None:
                return x.shape[0], x.shape[2], -(-x.shape[1] // size) * size
            return x.shape[1], (x.shape[0] + len(cu) * size - 1) // size * size

        def unwritten(shape: tuple[int, ...]) -> Tensor:
            return torch.full(shape, math.nan, dtype=torch.float32)

        lead, lead_k = work(q, offsets[0], QUERIES), work(k, offsets[1], KEYS)
        wide = -(-q.shape[-1] // WIDTH) * WIDTH
        rows, log2, sum_q = unwritten(lead), unwritten(lead), unwritten((*lead[:-1], lead[-1] * wide))
        targets = [told["dk"], told["dv"]]
        if grouped:
            targets = [torch.zeros((*lead_k[:-1], lead_k[-1] * wide), dtype=torch.float32) for _ in targets]
        turns: list[Tensor | None] = [None] * 3
        if told["deterministic"]:
            batch = q.shape[0] if offsets[0] is None else len(offsets[0]) - 1
            long = (q.shape[1], k.shape[1]) if offsets[0] is None else (told["max_seqlen_q"], told["max_seqlen_k"])
            turns[0] = torch.zeros(batch, q.shape[-2], -(-long[0] // QUERIES), 1, dtype=torch.int32)
            if grouped:
                shape = (batch, k.shape[-2], -(-long[1] // KEYS), 2)
                turns[1:] = [torch.zeros(shape, dtype=torch.int32) for _ in range(2)]
        d_sink = None if sink is None else torch.empty_like(sink)

        def before(
            out: Tensor, dout: Tensor, rows: Tensor, lse: Tensor, log2: Tensor, sum_q: Tensor, *rest: Any
        ) -> None:
            self.launched += 1
            size, d_lse = lse.shape[-1], rest[2]
            delta = (out.double() * dout.double()).sum(-1)
            delta = delta.transpose(-1, -2) - (0.0 if d_lse is None else d_lse.nan_to_num())
            rows[..., :size], log2[..., :size] = delta.nan_to_num(), lse
            sum_q.zero_()

        def main(*given: Any) -> None:
            given = given if given[4].dtype == torch.float32 else (*given[:4], given[5], given[4], *given[6:])
            q, k, v, dout, _, rows, sum_q, dk, dv, scale, cu_q, cu_k, _, lengths, left, right = given[:16]
            formula = Formula.of(q, k, v, said(static, scale, cu_q, cu_k, lengths, left, right, sink))
            d_out = dout.double().view_as(formula.q)
            if cu_q is not None:
                d_out = d_out.clone()
                d_out[:, cu_q[-1] :] = 0.0
            delta = rows[..., : q.shape[-3]].double().view(*formula.lse.shape)
            weights = formula.weights[..., : formula.k.shape[1]]
            d_score = weights * (torch.einsum("bqhd,bkhd->bhqk", d_out, formula.v) - delta[..., None]) * formula.slope
            tiles(sum_q, q.shape[-2], QUERIES)[:, : q.shape[-3], :, : q.shape[-1]] += torch.einsum(
                "bhqk,bkhd->bqhd", d_score, formula.k
            )
            found = (
                torch.einsum("bhqk,bqhd->bkhd", d_score, formula.q),
                torch.einsum("bhqk,bqhd->bkhd", weights, d_out),
            )
            for grad, into, factor in zip(found, (dk, dv), (scale, 1.0)):
                grad = grad.unflatten(2, (k.shape[-2], -1)).sum(3)
                if grouped:
                    tiles(into, k.shape[-2], KEYS)[:, : k.shape[-3], :, : k.shape[-1]] += grad
                    continue
                into.copy_((grad * factor).view(into.shape))
                if lengths is not None:  # gradients behind a row's last key are never written
                    into[torch.arange(into.shape[1]) >= lengths[:, None]] = math.nan

        def after(total: Tensor, into: Tensor, scale: float, *rest: Any) -> None:
            found = tiles(total, into.shape[-2], 0)[:, : into.shape[-3], :, : into.shape[-1]]
            into.copy_((found * scale).reshape(into.shape))
            if rest[2] is not None:
                rows, lse, sink, d_sink = rest[2]
                of_sink = (sink.double()[:, None] - lse.double()).exp() * rows[..., : lse.shape[-1]]
                d_sink.copy_(-of_sink.nan_to_num().sum((0, 2) if lse.dim() == 3 else 1))

        given = (out, dout, rows, lse, log2, sum_q, *offsets[::2], told["dlse"], None, None, 1.0, None, None)
        self.launch("_bwd_preprocess", 0, before, *given)
        key = (*static.values(), grouped, sink is None, *(x is None for x in (*offsets, *window)))
        given = (q, k, v, dout, log2, rows, sum_q, *targets, scale, *offsets, *window, *turns, AuxData(), None, None)
        self.launch("_flash_attn_bwd", key, main, *given)
        own = None if sink is None else LearnableSinkBwdTensors(rows, lse, sink, d_sink)
        post = "_bwd_postprocess_convert"
        self.launch(post, QUERIES, after, sum_q, told["dq"], scale, *offsets[::2], own, None)
        if grouped:
            for total, into, factor in zip(targets, (told["dk"], told["dv"]), (scale, 1.0)):
                self.launch(post, KEYS, after, total, into, factor, *offsets[1::2], None, None)
        grads = (told["dq"], told["dk"], told["dv"])
        return grads if sink is None else (*grads, d_sink)

    def bwd_preprocess(self) -> None: ...

    def bwd_postprocess_convert(self) -> None: ...


def said(
    static: dict[str, Any], scale: float, cu_q: Any, cu_k: Any, lengths: Any, left: Any, right: Any, sink: Any
) -> Any:
    """What a kernel was compiled for and is told, in the words of ``Formula``."""
    window = {"window_size_left": left, "window_size_right": right, "learnable_sink": sink, "softmax_scale": scale}
    return {**static, **window, "cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "seqused_k": lengths}


@contextlib.contextmanager
def installed(change: str = "") -> Iterator[Package]:
    package = Package("pretended_flash_attn_4", change)
    flash4_launches.launches.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, package.__name__, package)
        patch.setattr(get("flash4"), "functions", (package._flash_attn_fwd, package._flash_attn_bwd))
        patch.setattr(torch.cuda, "device", contextlib.nullcontext)
        patch.setattr(compact, "move_rows", move)
        patch.setattr(flash4_launches, "was_read", lambda device: change != "another release")
        yield package
    flash4_launches.launches.cache_clear()


@given(spec=specs(limits=Pretended.limits, head_dims=(24, 32)), seed=seeds())
def test_kernels_that_are_launched_again_say_the_same(spec: AttentionSpec, seed: int) -> None:
    backend = Pretended()
    masked = spec.features & {"dense_mask"} or (spec.features & {"key_padding", "key_lengths"} and spec.window)
    assume(backend.why_not(spec) is None and not masked)
    with installed() as package:
        for _ in range(2):
            assert_agrees(backend, spec, seed)
        assert package.launched or not (spec.batch and spec.seqlen_q and spec.seqlen_k)


MASKS: dict[str, Mask | None] = {
    "none": None,
    "causal": causal(),
    "window": Window(3, 2),
    "padding": KeyPadding(torch.arange(9)[None] % 3 != torch.tensor([[0], [1]])),
    "lengths": KeyLengths(torch.tensor([2, 7])),
    "documents": Documents(torch.tensor([0, 3, 9]), max_seqlen=6),
}
CHANGES = ("", "another order", "one more", "another release")


@pytest.mark.parametrize("heads_kv", (1, 4))
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("change", CHANGES)
def test_the_package_serves_a_kind_once_and_one_that_changed_serves_all(change: str, mask: str, heads_kv: int) -> None:
    batch = 1 if mask == "documents" else 2
    with installed(change) as package:
        seen = []
        for seed in range(3):
            q = noise(seed, batch, 9, 4, 24, dtype=torch.bfloat16).requires_grad_()
            k, v = (noise(seed + n, batch, 9, heads_kv, 24, dtype=torch.bfloat16).requires_grad_() for n in (3, 6))
            spec = AttentionSpec.of(q, k, v, mask=MASKS[mask], need_lse=True)
            out, lse = Pretended()(q, k, v, spec)
            torch.autograd.grad(out.sum() + lse.sum(), (q, k, v))
            seen.append(package.served)
    once = {"": (1, 1), "another order": (0, 0), "one more": (1, 0), "another release": (0, 0)}[change]
    assert [later - sooner for sooner, later in itertools.pairwise(seen)] == [2 - sum(once)] * 2
    assert seen[0] == 2


def test_one_projection_and_gradients_of_any_strides_are_told_right() -> None:
    """Gradients that a kernel cannot read are copied; heads that lie side by side are not."""
    found = []
    with installed():
        for copies in (False, True, False):
            x = noise(0, 2, 9, 12, 24, dtype=torch.bfloat16).requires_grad_()
            q, k, v = (y.contiguous() if copies else y for y in x.split(4, dim=2))
            out = Pretended()(q, k, v, AttentionSpec.of(q, k, v))
            assert isinstance(out, Tensor)
            grads = []
            for toward in (torch.ones(()).to(out).expand(out.shape), torch.ones_like(out.mT).mT):
                grads += torch.autograd.grad(out, x, toward, retain_graph=True)
            found.append((out, *grads))
    assert all(torch.equal(one, other) for others in found[1:] for one, other in zip(found[0], others))
    assert torch.equal(found[0][1], found[0][2])

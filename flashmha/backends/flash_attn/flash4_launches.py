"""The kernels that one call of flash-attn 4 launches, launched again without the Python around them.

Not a backend. Between a call of the package and its compiled kernels lies Python that says the same for every problem
of a kind, some hundred lines a direction. ``Launches`` lets the package serve the first problem of a kind and notes the
kernels that it called, and with what. Where that is, argument by argument, what ``forward_calls`` and
``backward_calls`` say, later problems of the kind call the same kernels at once. Else, and for releases whose
workspaces were not read (``READ_RELEASES``), the package serves every problem.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .flash4_tensors import (
    Tile,
    detached,
    is_contiguous,
    is_taken_as_it_is,
    rules,
    tables_for_heads,
    workspace_rows,
    workspace_shape,
)
from .flash4_watch import LaunchArguments, Watched, is_same

SHORT_LENGTHS = 256
"""Lengths that a kernel may be compiled for, since its tiles are smaller: longer ones share theirs."""
MOST_KINDS = 1024
"""The most kinds that are kept."""

Saved = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor]
"""q, k, v, sinks, out and lse."""


class Noted(NamedTuple):
    """Notes on a kind: its kernels in order, and the tile of its backward."""

    kernels: tuple[Callable[..., Any], ...]
    tile: Tile | None


UNKNOWN = Noted((), None)
"""Notes on a kind before its first problem."""


class Launches:
    """The kernels of the package that a function is from, by kind of problem."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        self.package = sys.modules[forward.__module__]
        self.owners = [getattr(self.package, name) for name in OWNERS]
        self.noted: dict[LaunchArguments, Noted | None] = {}
        self.lock = threading.Lock()

    def forward(
        self,
        told: dict[str, Any],
        heads: tuple[Tensor, Tensor, Tensor],
        sinks: Tensor | None,
        tables: Any,
        serve: Callable[..., Any],
    ) -> tuple[Tensor, Tensor] | None:
        """out and lse; ``None`` where the package has to serve. ``serve(out=..., lse=...)`` is the package.

        ``tables`` are the blocks to look at, as the package takes them, where it is told any.
        """
        q, k, v = heads
        kind = self.kind(told, q, k, v, sinks, None, tables)
        known = None if kind is None else self.noted.get(kind, UNKNOWN)
        if kind is None or known is None:
            return None
        out = q.new_empty((*q.shape[:-1], v.shape[-1]))
        rows = (q.shape[1], q.shape[0]) if q.dim() == 3 else (q.shape[0], q.shape[2], q.shape[1])
        lse = q.new_empty(rows, dtype=torch.float32)
        q, k, v, sinks = detached(q), detached(k), detached(v), detached(sinks)
        calls = self.forward_calls(told, q, k, v, sinks, out, lse, tables)
        if known is UNKNOWN:
            self.note(kind, calls, functools.partial(serve, out=out, lse=lse), None)
        else:
            known.kernels[0](*calls[0])
        return out, lse

    def backward(
        self,
        told: dict[str, Any],
        saved: Saved,
        cotangents: tuple[Tensor, Tensor | None],
        into: tuple[Tensor, Tensor, Tensor],
        tables: Any,
        serve: Callable[[], Any],
    ) -> tuple[Tensor | None] | None:
        """Gradients of q, k and v into three tensors, and that of the sinks in a tuple; ``None`` as above."""
        q, k, v, sinks, out, lse = saved
        kind = (
            self.kind(told, q, k, v, sinks, cotangents, tables)
            if is_taken_as_it_is(out) and is_contiguous(lse)
            else None
        )
        known = None if kind is None else self.noted.get(kind, UNKNOWN)
        if kind is None or known is None:
            return None
        tile = known.tile or self.tile(told, q, v, tables)
        saved = (detached(q), detached(k), detached(v), detached(sinks), out, lse)
        device = torch.device("meta") if known is UNKNOWN else q.device  # workspaces to compare need no memory
        d_sinks = None if sinks is None else torch.empty_like(sinks, device=device)
        calls = self.backward_calls(told, saved, cotangents, into, d_sinks, tables, tile, device)
        if known is UNKNOWN:
            result = self.note(kind, calls, serve, tile)
            return (None if sinks is None else result[3],)
        for kernel, call in zip(known.kernels, calls):
            kernel(*call)
        return (d_sinks,)

    def kind(
        self,
        told: dict[str, Any],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
        cotangents: tuple[Tensor, Tensor | None] | None,
        tables: Any,
    ) -> LaunchArguments | None:
        """All that decides which kernels the package calls; ``None`` where it may do something else first.

        Finer than the keys of its caches, which hold of sizes whether one tile is enough and whether items are many.
        """
        offsets, rule = told["cu_seqlens_q"], rules(told)
        if not (is_taken_as_it_is(q) and is_taken_as_it_is(k) and is_taken_as_it_is(v) and is_contiguous(sinks)):
            return None
        if not (is_contiguous(offsets) and is_contiguous(told["cu_seqlens_k"]) and is_contiguous(told["lengths"])):
            return None
        if rule is not None and not all(map(is_contiguous, rule)):
            return None
        if told["pages"] is not None:
            return None
        if offsets is None:
            sizes, batch = (q.shape[1], k.shape[1]), q.shape[0]
        else:
            sizes, batch = (told["max_seqlen_q"], told["max_seqlen_k"]), offsets.shape[0] - 1
        if not (batch and q.shape[0] and k.shape[0] and sizes[0] and sizes[1]):
            return None
        return (
            None if cotangents is None else cotangents[1] is None,
            q.device,
            q.dtype,
            q.shape[-2:],
            v.shape[-2:],
            min(sizes[0], SHORT_LENGTHS),
            min(sizes[1], SHORT_LENGTHS),
            batch > self.package.BIN_BATCH_SEARCH_THRESH,
            offsets is None,
            told["lengths"] is None,
            told["causal"],
            told["left"] is None,
            told["right"] is None,
            told["softcap"],
            told["deterministic"] and cotangents is not None,
            None if sinks is None else sinks.dtype,
            told["first"] is None,
            None if rule is None else tuple([size == 1 for x in rule for size in x.shape]),
            None if tables is None else tables.block_size,
        )

    def tile(self, told: dict[str, Any], q: Tensor, v: Tensor, tables: Any) -> Tile:
        """The tile of a backward, as the package cuts it on Hopper."""
        windowed = told["left"] is not None or told["right"] is not None
        block = None if tables is None else tables.block_size[0]
        cut = self.package._tile_size_bwd_sm90(q.shape[-1], v.shape[-1], told["causal"], windowed, block)
        return Tile(cut.m_block_size, cut.n_block_size, 64 if cut.dKV_swapAB else 32)

    def forward_calls(
        self,
        told: dict[str, Any],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
        out: Tensor,
        lse: Tensor,
        tables: Any,
    ) -> tuple[LaunchArguments, ...]:
        """The arguments of the one kernel of a forward on Hopper."""
        offsets = (told["cu_seqlens_q"], told["cu_seqlens_k"], None, told["lengths"])
        window = (told["left"], told["right"])
        rule, blocks = self.package.AuxData(rules(told), None), tables_for_heads(tables, q.shape[-2])
        return ((q, k, v, out, lse, told["scale"], *offsets, None, *window, sinks, blocks, rule, None, None),)

    def backward_calls(
        self,
        told: dict[str, Any],
        saved: Saved,
        cotangents: tuple[Tensor, Tensor | None],
        into: tuple[Tensor, Tensor, Tensor],
        d_sinks: Tensor | None,
        tables: Any,
        tile: Tile,
        device: torch.device,
    ) -> tuple[LaunchArguments, ...]:
        """The arguments of the kernels of a backward on Hopper, with workspaces on a device: one before, the backward
        itself, one that rounds the sum for q, and two for k and v where heads share them."""
        q, k, v, sinks, out, lse = saved
        (d_out, d_lse), (dq, dk, dv) = cotangents, into
        grouped = q.shape[-2] != k.shape[-2]
        cu_q, cu_k, lengths, scale = told["cu_seqlens_q"], told["cu_seqlens_k"], told["lengths"], told["scale"]
        real = torch.float32
        lead_q = workspace_rows(q, cu_q, tile.queries)
        rows = torch.empty(lead_q, dtype=real, device=device)
        log2 = torch.empty(lead_q, dtype=real, device=device)
        # the kernel before fills these three, and the zeros of the first are what the second adds to
        sum_q = torch.empty(workspace_shape(lead_q, q.shape[-1], tile), dtype=real, device=device)
        if grouped:
            lead_k = workspace_rows(k, cu_k, tile.keys)
            sum_k = torch.zeros(workspace_shape(lead_k, k.shape[-1], tile), dtype=real, device=device)
            sum_v = torch.zeros(workspace_shape(lead_k, v.shape[-1], tile), dtype=real, device=device)
        turns: LaunchArguments = (None, None, None)
        if told["deterministic"]:
            turns = self.turns(told, q, k, tile, device)
        rule, blocks = self.package.AuxData(rules(told), None), tables_for_heads(tables, q.shape[-2])
        own = None if sinks is None else self.package.LearnableSinkBwdTensors(rows, lse, sinks, d_sinks)
        window = (told["left"], told["right"])
        before = (out, d_out, rows, lse, log2, sum_q, cu_q, None, d_lse, None, None, 1.0, None, None)
        targets = (sum_k, sum_v) if grouped else (dk, dv)
        main = (q, k, v, d_out, log2, rows, sum_q, *targets, scale, cu_q, cu_k, None, lengths)
        calls: tuple[LaunchArguments, ...] = (
            before,
            (*main, *window, *turns, rule, blocks, None),
            (sum_q, dq, scale, cu_q, None, own, None),
        )
        if grouped:
            calls += ((sum_k, dk, scale, cu_k, lengths, None, None), (sum_v, dv, 1.0, cu_k, lengths, None, None))
        return calls

    def turns(self, told: dict[str, Any], q: Tensor, k: Tensor, tile: Tile, device: torch.device) -> LaunchArguments:
        """Counters that make blocks add up in one order: for q, and for k and v where heads share them."""
        offsets = told["cu_seqlens_q"]
        if offsets is None:
            batch, sizes = q.shape[0], (q.shape[1], k.shape[1])
        else:
            batch, sizes = offsets.shape[0] - 1, (told["max_seqlen_q"], told["max_seqlen_k"])
        shapes = [(batch, q.shape[-2], -(-sizes[0] // tile.queries), 1)]
        if q.shape[-2] != k.shape[-2]:
            shapes += [(batch, k.shape[-2], -(-sizes[1] // tile.keys), 2)] * 2
        made = [torch.zeros(shape, dtype=torch.int32, device=device) for shape in shapes]
        return (*made, *(None,) * (3 - len(made)))

    def note(
        self, kind: LaunchArguments, expected: tuple[LaunchArguments, ...], serve: Callable[[], Any], tile: Tile | None
    ) -> Any:
        """Let the package serve a problem; keep what it called, if that was what is expected."""
        with self.lock:
            watched = [Watched(owner.compile_cache) for owner in self.owners]
            calls: list[tuple[Callable[..., Any], LaunchArguments]] = []
            for owner, cache in zip(self.owners, watched):
                cache.calls, owner.compile_cache = calls, cache
            try:
                result = serve()
            finally:
                for owner, cache in zip(self.owners, watched):
                    owner.compile_cache = cache.own
            places: dict[int, int] = {}
            agrees = len(calls) == len(expected) and all(
                is_same(mine, theirs, places) for mine, (_, theirs) in zip(expected, calls)
            )
            if len(self.noted) >= MOST_KINDS:
                self.noted.clear()
            self.noted[kind] = Noted(tuple(kernel for kernel, _ in calls), tile) if agrees else None
        return result


OWNERS = ("_flash_attn_fwd", "_bwd_preprocess", "_flash_attn_bwd", "_bwd_postprocess_convert")
"""Functions of the package with a cache of compiled kernels."""
NEEDED = (*OWNERS, "AuxData", "LearnableSinkBwdTensors", "_tile_size_bwd_sm90", "BIN_BATCH_SEARCH_THRESH")


@functools.lru_cache(maxsize=8)
def launches(
    forward: Callable[..., Any],
    backward: Callable[..., Any],
    device: torch.device,
    known: Callable[[torch.device], bool],
) -> Launches | None:
    """The launches of a package's functions on a device; ``None`` where the package has to serve all of it.

    ``known`` says whether they are known there, as ``was_read``.
    """
    package = sys.modules.get(forward.__module__)
    if getattr(package, OWNERS[0], None) is not forward or getattr(package, OWNERS[2], None) is not backward:
        return None
    if not all(hasattr(package, name) for name in NEEDED) or not known(device):
        return None
    return Launches(forward) if all(hasattr(getattr(package, name), "compile_cache") for name in OWNERS) else None

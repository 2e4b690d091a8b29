"""One step of generating: attention of plain layers over their caches, by the shortest way.

A step brings a token or a few for each row, beside no mask, and is Python around small products of matrices. What its
layers have in common is found once: where the tokens go, what they see, and the backend. Lengths move when all has
run: what is written before lies behind them, so that a step which fails on the way leaves caches as they were.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends import choose
from ..backends.base import Backend, Serve
from ..backends.choice.serve import serve
from ..cache.memory import MemoryCache
from ..cache.static import StaticCache
from ..host.torch_state import is_autocasting, is_transforming, readable
from ..problem.masks import Mask
from ..problem.ragged import KeyLengths, mark_private
from ..problem.spec import AttentionSpec
from .projection import by_one_matrix
from .protocol import Layer
from .shortcut import Linears, linears


class Place(NamedTuple):
    """Where the tokens of a step go in caches that hold equally many: at ``first`` in every row, else at ``positions``.

    ``slots`` are those that are looked at, ``mask`` says which of them hold a token.
    """

    slots: int
    first: int | None
    positions: Tensor | None = None
    mask: Mask | None = None


class Problem(NamedTuple):
    """The problem of layers that are alike, and what serves it."""

    spec: AttentionSpec
    backend: Backend
    call: Serve


class Step:
    """A step of a model, or of one layer: ``attend_next`` and ``attend_memory`` for each layer, then ``finish``.

    Args:
        x: the first layer's input. Those of the others are like it.
    """

    def __init__(self, x: Tensor) -> None:
        self.shape, self.dtype, self.device = x.shape, x.dtype, x.device
        self.plain = readable(x) and len(self.shape) == 3 and not (x.is_nested or is_autocasting() or is_transforming())
        self.wants_grad = torch.is_grad_enabled()
        self.places: dict[tuple[int, ...], Place] = {}
        self.problems: dict[tuple[Any, ...], Problem] = {}
        self.moving: list[Tensor] = []
        self.seqlen = 0

    def attend_next(self, layer: Layer, x: Tensor, cache: object) -> Tensor | None:
        """Self-attention of the next tokens; ``None`` where ``forward`` has to look closer, and nothing has changed.

        Raises:
            ValueError: the cache has no room.
        """
        own = self.linears(layer, x)
        if own is None or type(cache) is not StaticCache:
            return None
        state = layer.__dict__
        batch_first, heads, width = state["batch_first"], state["num_heads"], state["embed_dim"]
        batch, seqlen = self.shape[:2] if batch_first else self.shape[1::-1]
        k_store, v_store, lengths, head_dim = cache.k, cache.v, cache.lengths, width // heads
        capacity = k_store.shape[1]
        if not (k_store.shape == v_store.shape == (batch, capacity, heads, head_dim)) or not self.holds(k_store, v_store):
            return None
        held = lengths.tolist()
        place = self.places.get((seqlen, *held)) or self.place(cache, seqlen, held)
        slots = place.slots
        if slots > capacity:
            cache.check_room(seqlen, held)
        spec, backend, call = self.problem((batch, seqlen, slots), heads, head_dim, place.mask)
        q, k, v = by_one_matrix(x, x, x, own[0], own[1], heads, heads, head_dim, batch_first, False)
        if type(q) is not Tensor:  # a mode makes other tensors of ours
            return None
        if place.first is None:
            assert place.positions is not None
            cache.write(k, v, place.positions)
        else:
            k_store.narrow(1, place.first, seqlen).copy_(k)
            v_store.narrow(1, place.first, seqlen).copy_(v)
        out = serve(backend, q, k_store.narrow(1, 0, slots), v_store.narrow(1, 0, slots), spec, layer, call)
        self.moving.append(lengths)
        self.seqlen = seqlen
        return project_out(out, own, batch_first)

    def attend_memory(
        self, layer: Layer, x: Tensor, memory: Tensor, cache: object, mask: Mask | None = None
    ) -> Tensor | None:
        """Attention to a memory that was projected; ``None`` where ``forward`` has to look closer."""
        own = self.linears(layer, x)
        if own is None or type(cache) is not MemoryCache or not cache.filled or type(memory) is not Tensor:
            return None
        state = layer.__dict__
        batch_first, heads, width = state["batch_first"], state["num_heads"], state["embed_dim"]
        outer, inner, _ = self.shape
        batch, seqlen = (outer, inner) if batch_first else (inner, outer)
        k, v, head_dim = cache.k, cache.v, width // heads
        seqlen_k = k.shape[1]
        if memory.shape != ((batch, seqlen_k, width) if batch_first else (seqlen_k, batch, width)):
            return None
        if not (k.shape == v.shape == (batch, seqlen_k, heads, head_dim) and self.holds(k, v, memory)):
            return None
        spec, backend, call = self.problem((batch, seqlen, seqlen_k), heads, head_dim, mask)
        weight, bias = own[0], own[1]
        q = F.linear(x, weight.narrow(0, 0, width), None if bias is None else bias.narrow(0, 0, width))
        if type(q) is not Tensor:
            return None
        q = q.view(outer, inner, heads, head_dim)
        return project_out(serve(backend, q if batch_first else q.transpose(0, 1), k, v, spec, layer, call), own, batch_first)

    def finish(self) -> None:
        """Move the lengths of the caches that were written to."""
        if self.moving:
            torch._foreach_add_(self.moving, self.seqlen)

    def linears(self, layer: Layer, x: Tensor) -> Linears | None:
        """The projections of a plain layer that fits, computes no gradient and drops nothing."""
        if not self.plain or type(x) is not Tensor or x.shape != self.shape or x.dtype != self.dtype:
            return None
        own, state, width = linears(layer, self.dtype), layer.__dict__, self.shape[2]
        if own is None or width != state["embed_dim"] or width % state["num_heads"] or not x.numel():
            return None
        if (state["training"] and state["dropout"]) or (self.wants_grad and (own[-1] or x.requires_grad)):
            return None
        return own

    def holds(self, *tensors: Tensor) -> bool:
        """Tensors are of the dtype and on the device of the step."""
        dtype, device = self.dtype, self.device
        for tensor in tensors:  # noqa: SIM110  a generator takes two steps more
            if tensor.dtype != dtype or tensor.device != device:
                return False
        return True

    def place(self, cache: StaticCache, seqlen: int, held: list[int]) -> Place:
        """Where the next tokens go behind those ``held``, kept for caches that hold as many."""
        longest = max(held)
        if min(held) == longest:
            found = Place(longest + seqlen, longest)
        else:
            seen = mark_private(KeyLengths(cache.lengths + seqlen))
            found = Place(longest + seqlen, None, cache.positions(seqlen).long(), seen)
        self.places[(seqlen, *held)] = found
        return found

    def problem(self, sizes: tuple[int, int, int], heads: int, head_dim: int, mask: Mask | None) -> Problem:
        """The problem of a layer and its backend, found once for layers that are alike."""
        key = (sizes, heads, head_dim, mask)
        found = self.problems.get(key)
        if found is None:
            spec = AttentionSpec.between(sizes, heads, head_dim, self.dtype, self.device, False, mask)
            backend = choose(spec)
            found = self.problems[key] = Problem(spec, backend, backend.prepare(spec))
        return found


def project_out(out: Tensor, own: Linears, batch_first: bool) -> Tensor:
    """The output of a layer, projected, as the caller's tensors lie."""
    if not batch_first:
        out = out.transpose(0, 1).contiguous()
    return F.linear(out.flatten(2), own[2], own[3])

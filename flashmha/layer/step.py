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
from ..backends.choice.record import recording
from ..backends.choice.serve import serve
from ..cache.appending import Appending
from ..cache.memory import MemoryCache
from ..cache.static import StaticCache
from ..host.kernels import why_no_kernels
from ..host.torch_state import eager, is_autocasting, is_compiling, readable
from ..problem.masks import Mask
from ..problem.ragged import KeyLengths, mark_private
from ..problem.spec import AttentionSpec
from .protocol import Layer
from .shortcut import Linears, learns, linears


class Place(NamedTuple):
    """Where the tokens of a step go in caches that hold equally many: at ``first`` in every row, else at ``positions``.

    ``slots`` are those that are looked at, ``mask`` says which of them hold a token; where ``append`` writes the tokens
    it writes that, too.
    """

    first: int | None
    slots: int
    positions: Tensor | None = None
    mask: Mask | None = None
    append: Appending | None = None


class Problem(NamedTuple):
    """The problem of layers that are alike, and what serves it."""

    spec: AttentionSpec
    backend: Backend
    call: Serve


class PlainStep:
    """A step of a model, or of one layer: ``attend_next`` and ``attend_memory`` for each layer, then ``finish``.

    Between layers tokens lie in one row, (tokens, embed_dim) as they lie in the caller's tensor: a linear layer of few
    tokens is sooner done with those.

    Args:
        x: the first layer's input, (batch, seqlen, embed_dim) or (seqlen, batch, embed_dim). Those of the others are
            like it.
    """

    def __init__(self, x: Tensor) -> None:
        self.shape, self.dtype, self.device = x.shape, x.dtype, x.device
        self.plain = eager(x) and len(self.shape) == 3 and x.numel() > 0 and not (x.is_nested or is_autocasting())
        self.reads = readable(x)
        """Lengths are read, which elsewhere than on a CPU would wait for the device."""
        self.launches = self.plain and not self.reads and why_no_kernels(x.device.type, x.device.index) is None
        self.wants_grad = torch.is_grad_enabled()
        self.places: dict[tuple[Any, ...], Place] = {}
        self.problems: dict[tuple[Any, ...], Problem] = {}
        self.moving: tuple[list[Tensor], list[int]] = ([], [])

    def attend_next(self, layer: Layer, tokens: Tensor, cache: object) -> Tensor | None:
        """Self-attention of the next tokens; ``None`` where ``forward`` has to look closer, and nothing has changed.

        Raises:
            ValueError: the cache has no room.
        """
        own = self.linears(layer, tokens)
        if own is None or type(cache) is not StaticCache:
            return None
        weight, bias, weight_out, bias_out = own
        state, (outer, inner, width) = layer.__dict__, self.shape
        batch_first, heads = state["batch_first"], state["num_heads"]
        batch, seqlen = (outer, inner) if batch_first else (inner, outer)
        k_store, v_store, lengths, head_dim = cache.k, cache.v, cache.lengths, width // heads
        capacity = k_store.shape[1]
        if not (k_store.shape == v_store.shape == (batch, capacity, heads, head_dim) and self.holds(k_store, v_store)):
            return None
        held = lengths.tolist() if self.reads else None
        key = (seqlen, capacity, heads, lengths.dtype) if held is None else (seqlen, *held)
        place = self.places.get(key) or self.place(cache, seqlen, held)
        first, slots, positions, mask, append = place
        if slots > capacity or seqlen > capacity:
            cache.check_room(seqlen, held)
        packed = F.linear(tokens, weight, bias)
        if type(packed) is not Tensor:  # a mode makes other tensors of ours
            return None
        q, k, v = packed.view(outer, inner, 3, heads, head_dim).unbind(2)
        if not batch_first:
            q, k, v = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)
        if first is not None:
            k_store.narrow(1, first, seqlen).copy_(k)
            v_store.narrow(1, first, seqlen).copy_(v)
        elif positions is not None:
            cache.write(k, v, positions)
        elif append is not None:
            append(k, v, cache)
        # behind the launch, which writes the lengths that a backend may look at to prepare itself
        spec, backend, call = self.problem((batch, seqlen, slots), heads, head_dim, mask)
        if held is not None or (append is not None and backend.reads_late and recording.calls is None):
            self.places[key] = place
        if slots < capacity:
            k_store, v_store = k_store.narrow(1, 0, slots), v_store.narrow(1, 0, slots)
        out = serve(backend, q, k_store, v_store, spec, layer, call)
        self.moving[0].append(lengths)
        self.moving[1].append(seqlen)
        return F.linear((out if batch_first else out.transpose(0, 1)).reshape(-1, width), weight_out, bias_out)

    def attend_memory(
        self, layer: Layer, tokens: Tensor, memory: Tensor, cache: object, mask: Mask | None = None
    ) -> Tensor | None:
        """Attention to a memory that was projected; ``None`` where ``forward`` has to look closer."""
        own = self.linears(layer, tokens)
        if own is None or type(cache) is not MemoryCache or not cache.filled or type(memory) is not Tensor:
            return None
        weight, bias, weight_out, bias_out = own
        state, (outer, inner, width) = layer.__dict__, self.shape
        batch_first, heads = state["batch_first"], state["num_heads"]
        batch, seqlen = (outer, inner) if batch_first else (inner, outer)
        k, v, head_dim = cache.k, cache.v, width // heads
        seqlen_k = k.shape[1]
        if memory.shape != ((batch, seqlen_k, width) if batch_first else (seqlen_k, batch, width)):
            return None
        if not (k.shape == v.shape == (batch, seqlen_k, heads, head_dim) and self.holds(k, v, memory)):
            return None
        spec, backend, call = self.problem((batch, seqlen, seqlen_k), heads, head_dim, mask)
        q = F.linear(tokens, weight[:width], None if bias is None else bias[:width])
        if type(q) is not Tensor:
            return None
        q = q.view(outer, inner, heads, head_dim)
        out = serve(backend, q if batch_first else q.transpose(0, 1), k, v, spec, layer, call)
        return F.linear((out if batch_first else out.transpose(0, 1)).reshape(-1, width), weight_out, bias_out)

    def finish(self) -> None:
        """Move the lengths of the caches that were written to."""
        if self.moving[0]:
            torch._foreach_add_(*self.moving)

    def linears(self, layer: Layer, tokens: Tensor) -> Linears | None:
        """The projections of a plain layer that fits, computes no gradient and drops nothing."""
        if not self.plain or type(tokens) is not Tensor:
            return None
        own, state, width = linears(layer, self.dtype), layer.__dict__, self.shape[2]
        if own is None or width != state["embed_dim"] or width % state["num_heads"]:
            return None
        if (state["training"] and state["dropout"]) or (self.wants_grad and learns(own, tokens, tokens, tokens)):
            return None
        return own

    def holds(self, *tensors: Tensor) -> bool:
        """Tensors are of the dtype and on the device of the step."""
        dtype, device = self.dtype, self.device
        for tensor in tensors:  # noqa: SIM110  a generator takes two steps more
            if tensor.dtype != dtype or tensor.device != device:
                return False
        return True

    def place(self, cache: StaticCache, seqlen: int, held: list[int] | None) -> Place:
        """Where the next tokens go behind those ``held``."""
        if held is None and self.launches:
            append = Appending(cache, seqlen)
            return Place(None, cache.capacity, None, mark_private(KeyLengths(append.ends)), append)
        longest = None if held is None else max(held)
        if held is not None and min(held) == longest:
            return Place(longest, longest + seqlen)
        slots = cache.capacity if longest is None else longest + seqlen
        positions = cache.positions(seqlen).long()
        return Place(None, slots, positions, mark_private(KeyLengths(cache.lengths + seqlen)))

    def problem(self, sizes: tuple[int, int, int], heads: int, head_dim: int, mask: Mask | None) -> Problem:
        """The problem of a layer and its backend, found once for layers that are alike."""
        key = (sizes, heads, head_dim, mask)
        found = self.problems.get(key)
        if found is None:
            spec = AttentionSpec.between(sizes, heads, head_dim, self.dtype, self.device, False, mask)
            backend = choose(spec)
            found = self.problems[key] = Problem(spec, backend, backend.prepare(spec))
        return found


def attend_alone(layer: Layer, query: Tensor, key: Tensor, value: Tensor, cache: object) -> Tensor | None:
    """The output of one layer beside no mask; ``None`` where ``forward`` has to look closer, and nothing is changed."""
    if is_compiling() or type(query) is not Tensor or type(key) is not Tensor or key is not value:
        return None
    if query.is_nested or key.is_nested:
        return None
    step = PlainStep(query)
    if not step.plain:
        return None
    tokens = query.reshape(-1, query.shape[2])
    out = step.attend_next(layer, tokens, cache) if query is key else step.attend_memory(layer, tokens, key, cache)
    if out is None:
        return None
    step.finish()
    return out.view(query.shape)

"""Keys that are real, moved to the front of their row: padding of any pattern as a length, for kernels that take one.

Where no mask depends on a key's position the order of keys does not matter, so a kernel that can stop after the first
``lengths[b]`` keys serves every pattern of padding. Not a backend. The kernel (``compact_kernel``) is Triton's, which
comes with torch for CUDA and is imported on first use.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ...host.machine import has_triton
from ...problem.windows import Window

LARGEST_TILE = 256
"""At least as many keys as a kernel loads at a time. What it loads behind the last real key must be finite: a weight of
0 times NaN is NaN."""


KeysAndValues = tuple[Tensor, Tensor]
Mover = Callable[..., None]
"""What ``move_rows`` is: a kernel, or what a test on a CPU has in its place."""


class Intervals(NamedTuple):
    """The queries that may look at each key, ``first`` to ``last`` inclusive, (batch, seqlen_k) int32 each."""

    first: Tensor
    last: Tensor


def intervals(valid: Tensor, window: Window, seqlen_q: int) -> Intervals:
    """Padding and a window in one table: a key is seen by neighbouring queries, a hidden one by none."""
    seqlen_k = valid.shape[1]
    meets = torch.arange(seqlen_k, dtype=torch.int32, device=valid.device) - (seqlen_k - seqlen_q)
    first = torch.zeros_like(meets) if window.right is None else meets - window.right
    last = torch.full_like(meets, seqlen_q) if window.left is None else meets + window.left
    return Intervals(torch.where(valid, first, seqlen_q), torch.where(valid, last, -1))


def why_no_moves() -> str | None:
    """Why keys cannot be moved here."""
    return None if has_triton() else "key_padding moves keys with triton, which is not installed"


why_no_moves._dynamo_marked_constant = True  # type: ignore[attr-defined]  # torch.compiler.assume_constant_result, unimported


def compact(k: Tensor, v: Tensor, valid: Tensor, mover: Mover | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values (batch, seqlen_k, heads_kv, head_dim) with the real ones first, in the order they had.

    Also how many are real, (batch,) int32. One tile behind them is 0. On the current device.
    """
    made = (k.new_empty(k.shape), v.new_empty(v.shape))
    lengths = valid.new_empty(valid.shape[0], dtype=torch.int32)
    (mover or move_rows)((k, v), made, valid, lengths, scatter=True)
    return *made, lengths


def move_back(sources: KeysAndValues, targets: KeysAndValues, valid: Tensor, mover: Mover | None = None) -> None:
    """Gradients of compacted keys and values, written where those were; 0 for padding."""
    (mover or move_rows)(sources, targets, valid, None, scatter=False)


def move_rows(
    sources: KeysAndValues, targets: KeysAndValues, valid: Tensor, lengths: Tensor | None, *, scatter: bool
) -> None:
    """Rows of two tensors of one shape to their slots, or back from them."""
    batch, seqlen, heads, head_dim = sources[0].shape
    if not sources[0].numel():
        if lengths is not None:
            torch.sum(valid, 1, dtype=torch.int32, out=lengths)
        return
    from .compact_kernel import move_keys_kernel

    move_keys_kernel[(batch, -(-seqlen // KEYS), 2)](
        *sources,
        *targets,
        valid,
        lengths,
        *valid.stride(),
        *sources[0].stride(),
        *sources[1].stride(),
        *targets[0].stride(),
        *targets[1].stride(),
        seqlen,
        head_dim,
        heads * head_dim,
        TILE=LARGEST_TILE,
        KEYS=KEYS,
        SCAN=1024,
        BLOCK=256,
        SCATTER=scatter,
    )


KEYS = 32
"""Keys per program."""

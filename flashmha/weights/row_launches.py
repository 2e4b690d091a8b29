"""A few rows of weights, out of their log-sum-exp, in one launch on a GPU.

A row is read in the time of its launch, so every line of Python counts.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ..backends.limits import HALF
from ..host.kernels import padded
from ..problem.spec import AttentionSpec
from ..problem.windows import Window
from .blocks import Box
from .rows import MOST_ROWS
from .tables import window_bounds
from .tiles import LARGEST_HEAD_DIM


def takes_rows(q: Tensor, k: Tensor, lse: Tensor | None, spec: AttentionSpec, box: Box, keys: range) -> bool:
    """A kernel makes the weights of a box and some keys."""
    if lse is None or q.dtype not in HALF or spec.bias is not None or len(box.rows) > MOST_ROWS:
        return False
    if keys.step != 1 or not (keys and all(box)):
        return False
    if spec.mask is not None and not all(isinstance(part, Window) for part in spec.mask.parts):
        return False
    return q.stride(3) == k.stride(3) == 1 and lse.dtype == torch.float32 and spec.head_dim <= LARGEST_HEAD_DIM


def launch_rows(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    spec: AttentionSpec,
    average: bool,
    dtype: torch.dtype,
    box: Box,
    keys: range,
) -> Tensor:
    """The weights of a box and some keys, (batch, heads, rows, keys), or their mean over heads, in one launch."""
    batch, heads, rows = box
    mask, softcap = spec.mask, spec.softcap
    window = None if mask is None else window_bounds(mask.parts, spec.seqlen_q, spec.seqlen_k)  # type: ignore[arg-type]
    low, high = window or (0, 0)
    parts, count = (1, len(heads)) if average else (len(heads), 1)
    items, size, width = len(batch), len(rows), len(keys)
    made = torch.empty((items, parts, size, width), dtype=dtype, device=q.device)
    tile, constants, options = cut_rows(spec.head_dim, average, window is not None, softcap is not None)
    launcher()(
        (q.device.index, q.dtype, dtype, spec.head_dim, average, window is None, softcap is None),
        (items * parts * -(-width // tile), 1, 1),
        (q, k, lse, made),
        (*q.stride()[:3], *k.stride()[:3]),
        (
            *(*lse.stride(), q.shape[2] // k.shape[2], parts, count, batch.start, heads.start, rows.start),
            *(size, rows.step, keys.start, width, float(spec.scale), float(softcap or 0.0), low, high),
        ),
        constants,
        options,
    )
    return made


@functools.cache
def cut_rows(head_dim: int, average: bool, windowed: bool, bent: bool) -> tuple[int, dict[str, Any], dict[str, int]]:
    """The keys of a tile, and what makes the kernel of it.

    A program of a mean goes through all heads, and loads the keys of the next ones meanwhile. Measured on an H200.
    """
    chunk = padded(head_dim)
    keys = 128 if chunk <= 128 else 64
    warps, stages = (4, 3) if average else (2, 2)
    constants = {"WINDOW": windowed, "SOFTCAP": bent, "HEAD_DIM": head_dim, "CHUNK": chunk}
    return keys, {**constants, "BLOCK_M": MOST_ROWS, "BLOCK_N": keys}, {"num_warps": warps, "num_stages": stages}


@functools.cache
def launcher() -> Any:
    """Launches of the kernel; importing it imports triton."""
    from .row_kernel import launch_row_kernel

    return launch_row_kernel

"""The mask and the bias of a problem as the weights' kernels read them."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from ..problem.masks import Dense
from ..problem.positions import IndexGrid
from ..problem.ragged import KeyLengths, KeyPadding
from ..problem.scores import TensorBias
from ..problem.spec import AttentionSpec
from ..problem.windows import Window
from .blocks import Box
from .regions import as_slice


@dataclasses.dataclass(frozen=True)
class Tables:
    """The mask and the bias of a box of a problem as the kernels read them.

    Attributes:
        bounds: keys from ``row + bounds[0]`` to ``row + bounds[1]`` are seen; ``None`` for all.
        valid: (batch, seqlen_k), of bytes.
        dense: (batch, heads, seqlen_q, seqlen_k), with a stride of 0 where it broadcasts; of bytes.
        bias: where its first entry lies; its ``bias_strides`` over the same axes.
        by_head: ``dense`` differs from head to head.
    """

    bounds: tuple[int, int] | None
    valid: Tensor | None
    dense: Tensor | None
    bias: Tensor | None
    bias_strides: tuple[int, ...]
    by_head: bool

    @classmethod
    def of(cls, spec: AttentionSpec, box: Box, keys: range) -> Tables:
        windows: list[Window] = []
        valid: list[Tensor] = []
        dense: list[Tensor] = []
        for part in () if spec.mask is None else spec.mask.parts:
            if isinstance(part, Window):
                windows.append(part)
            elif isinstance(part, KeyPadding):
                valid.append(part.valid)
            elif isinstance(part, KeyLengths):
                valid.append(torch.arange(spec.seqlen_k, device=spec.device) < part.lengths[:, None])
            else:
                assert isinstance(part, Dense)
                dense.append(part.allowed)
        bounds = window_bounds(windows, spec.seqlen_q, spec.seqlen_k)
        if bounds is not None:  # in the box both are counted from its own first row and key
            bounds = tuple(bound + box.rows.start - keys.start for bound in bounds)  # type: ignore[assignment]
        real = functools.reduce(operator.and_, valid)[as_slice(box.batch), as_slice(keys)] if valid else None
        table = functools.reduce(operator.and_, dense) if dense else None
        by_head = table is not None and table.shape[1] > 1
        pattern = None if table is None else box.expand(table.view(torch.uint8), spec, keys)
        bias, strides = place_bias(spec, box, keys)
        return cls(
            bounds, None if real is None else real.contiguous().view(torch.uint8), pattern, bias, strides, by_head
        )


def place_bias(spec: AttentionSpec, box: Box, keys: range) -> tuple[Tensor | None, tuple[int, ...]]:
    """The memory of a bias from its first entry in a box on, and its strides over (batch, heads, rows, keys).

    One of ``BY_DISTANCE`` is a line of numbers a head, from the last query's distance to the first key on: a row is the
    one before it, one number earlier.
    """
    if spec.bias is None:
        return None, (0, 0, 0, 0)
    if isinstance(spec.bias, TensorBias):
        table = box.expand(spec.bias.tensor.detach(), spec, keys)
        return table, table.stride()
    last, longest = spec.seqlen_q - 1, spec.seqlen_q + spec.seqlen_k - 1
    grid = IndexGrid(spec.batch, spec.heads, spec.seqlen_q, longest, spec.device, queries=range(last, spec.seqlen_q))
    distances = spec.bias.bias_mod(spec.seqlen_q, spec.seqlen_k)(*grid.indices())
    whole = distances.detach().to(torch.float32).expand(spec.batch, spec.heads, 1, longest)
    held = whole[as_slice(box.batch), as_slice(box.heads), 0, last - box.rows.start + keys.start :]
    return held, (held.stride(0), held.stride(1), -held.stride(2), held.stride(2))


def window_bounds(windows: Sequence[Window], seqlen_q: int, seqlen_k: int) -> tuple[int, int] | None:
    """The least and the largest ``key - row`` of bottom-right windows, never further out than the problem is long."""
    if not windows:
        return None
    shift, low, high = seqlen_k - seqlen_q, -seqlen_q, seqlen_k
    for window in windows:
        low = low if window.left is None else max(low, shift - window.left)
        high = high if window.right is None else min(high, shift + window.right)
    return low, high


def strides_of(table: Tensor | None) -> tuple[int, ...]:
    """The strides of a table of four axes, 0 where there is no table."""
    return (0, 0, 0, 0) if table is None else table.stride()

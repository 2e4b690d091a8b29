"""Launches of the kernels that prepare heads: how heads lie as rows, how many programs there are, what they add up.

Tokens are taken in the order in which they lie. q and k of the same tokens are one launch; others are one each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends.rewrites.heads import Slots
from ..weights.tiles import use_device
from .norms import KnownNorm
from .rotation import PositionsOrFirst, Rotation

HEADS = 4
"""Heads of a program."""
TILE, BACKWARD_TILE = 1024, 512
"""Pairs of a program at a time, measured on an H200."""
PROGRAMS = 2112
"""Programs at most where each adds up gradients of weights: 16 on each of an H200's processors."""


class Rows(NamedTuple):
    """Heads as rows of one token after another: where they are, and the strides of tokens and of heads."""

    tensor: Tensor
    token: int
    head: int


def is_swapped(x: Tensor) -> bool:
    """Heads (batch, seqlen, heads, head_dim) lie as (seqlen, batch, ...)."""
    return x.shape[0] > 1 and x.shape[1] > 1 and x.stride(0) < x.stride(1)


def as_rows(x: Tensor, swapped: bool) -> Rows:
    """Heads as rows in an order of tokens; copied where they do not lie so."""
    if x.stride(3) == 1 or x.shape[3] == 1:
        (outer, inner), (by_row, by_token) = x.shape[:2], x.stride()[:2]
        if swapped:
            inner, by_row, by_token = outer, by_token, by_row
            outer = x.shape[1]
        if inner == 1:
            return Rows(x, by_row, x.stride(2))
        if outer == 1 or by_row == inner * by_token:
            return Rows(x, by_token, x.stride(2))
    copied = x.transpose(0, 1).contiguous() if swapped else x.contiguous()
    return Rows(copied, copied.stride(1), copied.stride(2))


class Plan(NamedTuple):
    """One launch: the same for the heads of all its tensors.

    Attributes:
        norms: one for each tensor, of one form; or none.
        rotation: ``None`` where heads are normalised alone.
        at: the positions of the tokens.
    """

    norms: tuple[KnownNorm, ...]
    rotation: Rotation | None
    at: PositionsOrFirst

    def options(self, x: Tensor, tile: int) -> dict[str, Any]:
        """What makes a kernel."""
        head_dim = x.shape[-1]
        dim = head_dim // 2 * 2 if self.rotation is None else 2 * self.rotation.inv_freq.shape[0]
        pairs = power_of_two(dim // 2)
        return {
            "NORM": bool(self.norms),
            "LAYER": bool(self.norms) and self.norms[0].layer,
            "INTERLEAVED": self.rotation is not None and self.rotation.interleaved,
            "HEAD_DIM": head_dim,
            "DIM": dim,
            "PAIRS": pairs,
            "REST": power_of_two(max(1, head_dim - dim)),
            "TOKENS": max(1, tile // pairs),
            "HEADS": HEADS,
        }

    def walk(self, x: Tensor, swapped: bool) -> tuple[Tensor | None, list[int]]:
        """Explicit positions; then how many tokens there are and lie side by side, the first position, two steps."""
        batch, seqlen = x.shape[:2]
        table = self.at if isinstance(self.at, Tensor) else None
        start = 0 if isinstance(self.at, Tensor) else self.at
        by_item, by_place = (
            (0, 1) if table is None else (0 if table.shape[0] == 1 else table.stride(0), table.stride(1))
        )
        inner, steps = (batch, [by_place, by_item]) if swapped else (seqlen, [by_item, by_place])
        return table, [batch * seqlen, inner, start, *steps]

    def grid(self, xs: Sequence[Tensor], options: dict[str, Any]) -> tuple[int, int]:
        """Programs: blocks of tokens, and chunks of heads of all tensors."""
        tokens = xs[0].shape[0] * xs[0].shape[1]
        return -(-tokens // options["TOKENS"]), sum(-(-x.shape[2] // HEADS) for x in xs)

    def of_both(self, name: str) -> list[Tensor | None]:
        """A parameter of the first norm and of the second, which may be the first again."""
        found = [getattr(norm, name) for norm in self.norms] or [None]
        return [found[0], found[-1]]

    @property
    def numbers(self) -> list[float]:
        """What cos and sin are multiplied by, and eps."""
        return [1.0 if self.rotation is None else self.rotation.scale, self.norms[0].eps if self.norms else 0.0]


def power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()


def empty_rows(xs: Sequence[Tensor], swapped: bool) -> tuple[Tensor, list[Tensor]]:
    """Memory for heads like those given, and such heads in it, each contiguous: ``torch.cat`` is slow with others."""
    batch, seqlen, _, head_dim = xs[0].shape
    sizes = [x.shape[2] * batch * seqlen * head_dim for x in xs]
    memory = xs[0].new_empty(sum(sizes))
    shape = (seqlen, batch, -1, head_dim) if swapped else (batch, seqlen, -1, head_dim)
    rows = [part.view(shape) for part in memory.split_with_sizes(sizes)]
    return memory, [one.transpose(0, 1) for one in rows] if swapped else rows


def both(rows: Sequence[Rows]) -> tuple[list[Tensor], list[int]]:
    """Two tensors for a kernel and their strides: of one tensor, the first again."""
    first, last = rows[0], rows[-1]
    return [first.tensor, last.tensor], [first.token, first.head, last.token, last.head]


def count_heads(xs: Sequence[Tensor]) -> list[int]:
    """The heads of the first tensor and of the second, 0 where there is none."""
    return [xs[0].shape[2], xs[1].shape[2] if len(xs) > 1 else 0]


def launch(xs: Sequence[Tensor], plan: Plan) -> tuple[Tensor, ...]:
    """One or two tensors of heads of the same tokens, prepared."""
    from .head_kernels import prepare_kernel

    swapped, options = is_swapped(xs[0]), plan.options(xs[0], TILE)
    tensors, strides = both([as_rows(x, swapped) for x in xs])
    heads = count_heads(xs)
    out, made = empty_rows(xs, swapped)
    table, walk = plan.walk(xs[0], swapped)
    inv_freq = None if plan.rotation is None else plan.rotation.inv_freq
    parameters = [*plan.of_both("weight"), *plan.of_both("bias")]
    with use_device(out.device):
        prepare_kernel[plan.grid(xs, options)](
            *tensors, out, table, inv_freq, *parameters, *walk, *heads, *plan.numbers, *strides, **options
        )
    return tuple(made)


def launch_backward(
    grads: Sequence[Tensor], xs: Sequence[Tensor], plan: Plan, slots: Slots | None
) -> tuple[list[Tensor], list[tuple[Tensor | None, Tensor | None]]]:
    """Gradients of what ``launch`` took, in their slots where they have some; those of each norm's weight and bias.

    ``xs`` are what it took where it normalises; elsewhere only their order of tokens counts.
    """
    from .head_kernels import prepare_backward_kernel

    swapped, options = is_swapped(xs[0]), plan.options(xs[0], BACKWARD_TILE)
    of_grads, grad_strides = both([as_rows(grad, swapped) for grad in grads])
    of_xs, strides = both([as_rows(x, swapped) for x in xs]) if plan.norms else ([None, None], [0] * 4)
    heads = count_heads(xs)
    made = empty_rows(xs, swapped)[1] if slots is None else slots.take(xs[0])
    outs, out_strides = both([as_rows(x, swapped) for x in made])
    weights, bias = plan.of_both("weight"), plan.of_both("bias")[0]
    grid = plan.grid(xs, options)
    sums = None
    if weights[0] is not None:
        grid = min(grid[0], -(-PROGRAMS // grid[1])), grid[1]
        sums = xs[0].new_empty(*grid, 1 if bias is None else 2, xs[0].shape[-1], dtype=torch.float32)
    table, walk = plan.walk(xs[0], swapped)
    inv_freq = None if plan.rotation is None else plan.rotation.inv_freq
    options["BIAS"] = bias is not None
    with use_device(xs[0].device):
        prepare_backward_kernel[grid](
            *of_grads,
            *of_xs,
            *outs,
            sums,
            table,
            inv_freq,
            *weights,
            *walk,
            *heads,
            *plan.numbers,
            *grad_strides,
            *strides,
            *out_strides,
            **options,
        )
    return made, add_up(sums, plan.norms, heads)


def add_up(
    sums: Tensor | None, norms: Sequence[KnownNorm], heads: Sequence[int]
) -> list[tuple[Tensor | None, Tensor | None]]:
    """The gradients of each norm's weight and bias, out of what the programs added up."""
    if sums is None:
        return [(None, None)] * len(norms)
    found: list[tuple[Tensor | None, Tensor | None]] = []
    for norm, part in zip(norms, sums.split_with_sizes([-(-count // HEADS) for count in heads[: len(norms)]], 1)):
        total = part.sum((0, 1))
        assert norm.weight is not None
        bias = None if norm.bias is None else total[1].to(norm.bias.dtype)
        found.append((total[0].to(norm.weight.dtype), bias))
    return found

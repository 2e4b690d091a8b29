"""Launches of the kernels that prepare heads: how heads lie as rows, how many programs there are, what they add up.

Tokens are taken in the order in which they lie. q and k of the same tokens are one launch; others are one each.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends.rewrites.heads import Slots
from ..host.kernels import use_device
from .norms import KnownNorm
from .rotation import PositionsOrFirst, Rotation

HEADS = 4
"""Heads of a program."""
TILE, BACKWARD_TILE = 1024, 512
"""Pairs of a program at a time, measured on an H200."""
PROGRAMS = 2112
"""Programs at most where each adds up gradients of weights: 16 on each of an H200's processors."""
Steps = tuple[int, int]
"""The strides of tokens and of heads, where heads lie as rows of one token after another."""


def is_swapped(x: Tensor) -> bool:
    """Heads (batch, seqlen, heads, head_dim) lie as (seqlen, batch, ...)."""
    return x.shape[0] > 1 and x.shape[1] > 1 and x.stride(0) < x.stride(1)


def as_rows(x: Tensor, swapped: bool) -> tuple[Tensor, Steps]:
    """Heads as rows in an order of tokens, and their steps; copied where they do not lie so."""
    outer, inner, _, head_dim = x.shape
    by_row, by_token, by_head, by_feature = x.stride()
    if swapped:
        outer, inner, by_row, by_token = inner, outer, by_token, by_row
    if by_feature == 1 or head_dim == 1:
        if inner == 1:
            return x, (by_row, by_head)
        if outer == 1 or by_row == inner * by_token:
            return x, (by_token, by_head)
    copied = x.transpose(0, 1).contiguous() if swapped else x.contiguous()
    return copied, (copied.stride(1), copied.stride(2))


def empty_rows(x: Tensor, swapped: bool) -> Tensor:
    """Memory for heads like those given, as contiguous rows."""
    batch, seqlen, heads, head_dim = x.shape
    if swapped:
        return x.new_empty(seqlen, batch, heads, head_dim).transpose(0, 1)
    return x.new_empty(batch, seqlen, heads, head_dim)


def power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()


NO_NORM = KnownNorm(False, None, None, 0.0)
NO_HEADS = (None, None), (0, 0, 0, 0)
"""What ``both`` gives where a kernel reads no heads."""


class Plan(NamedTuple):
    """One launch: the same for the heads of all its tensors.

    Attributes:
        norms: one for each tensor, of one form; or none.
        rotation: ``None`` where heads are normalised alone.
        at: the positions of the tokens.
        swapped: the tokens of an item do not lie side by side, but those of a place.
    """

    norms: tuple[KnownNorm, ...]
    rotation: Rotation | None
    at: PositionsOrFirst
    swapped: bool

    @property
    def both(self) -> tuple[KnownNorm, KnownNorm]:
        """The norms of the first tensor and of the second, which may be the first again."""
        return (self.norms[0], self.norms[-1]) if self.norms else (NO_NORM, NO_NORM)

    @property
    def parameters(self) -> list[Tensor]:
        """The weight and the bias of each norm, where it has them."""
        return [one for norm in self.norms for one in (norm.weight, norm.bias) if one is not None]

    def options(self, head_dim: int, tile: int) -> dict[str, int]:
        """What makes a kernel."""
        rotation = self.rotation
        dim = head_dim // 2 * 2 if rotation is None else 2 * rotation.inv_freq.shape[0]
        pairs = power_of_two(dim // 2)
        return {
            "NORM": bool(self.norms),
            "LAYER": self.both[0].layer,
            "INTERLEAVED": rotation is not None and rotation.interleaved,
            "HEAD_DIM": head_dim,
            "DIM": dim,
            "PAIRS": pairs,
            "REST": power_of_two(max(1, head_dim - dim)),
            "TOKENS": max(1, tile // pairs),
            "HEADS": HEADS,
        }

    def numbers(self, xs: Sequence[Tensor]) -> tuple[Any, ...]:
        """Tokens, and those side by side; the first position and two steps; heads; the scale of cos and sin; eps."""
        batch, seqlen, heads, _ = xs[0].shape
        at, scale = self.at, 1.0 if self.rotation is None else self.rotation.scale
        start, by_item, by_place = (0, 0, 1) if isinstance(at, Tensor) else (at, 0, 1)
        if isinstance(at, Tensor):
            by_item, by_place = 0 if at.shape[0] == 1 else at.stride(0), at.stride(1)
        walk = (batch, start, by_place, by_item) if self.swapped else (seqlen, start, by_item, by_place)
        return batch * seqlen, *walk, heads, xs[1].shape[2] if len(xs) == 2 else 0, scale, self.both[0].eps

    @property
    def tables(self) -> tuple[Tensor | None, Tensor | None]:
        """Explicit positions, and frequencies."""
        at, rotation = self.at, self.rotation
        return at if isinstance(at, Tensor) else None, None if rotation is None else rotation.inv_freq


def both(xs: Sequence[Tensor], swapped: bool) -> tuple[tuple[Tensor, Tensor], tuple[int, int, int, int]]:
    """Two tensors for a kernel and their steps: of one tensor, the first again."""
    first = as_rows(xs[0], swapped)
    second = as_rows(xs[1], swapped) if len(xs) == 2 else first
    return (first[0], second[0]), (*first[1], *second[1])


def count_chunks(xs: Sequence[Tensor]) -> list[int]:
    """The programs that share the heads of a token, for each tensor."""
    return [-(-x.shape[2] // HEADS) for x in xs]


@functools.cache
def kernels() -> Any:
    """The module of the kernels; to import it in each launch took a tenth of the launch's Python."""
    from . import head_kernels

    return head_kernels


def launch(xs: Sequence[Tensor], plan: Plan) -> tuple[Tensor, ...]:
    """One or two tensors of heads of the same tokens, prepared."""
    first, norms = xs[0], plan.both
    options, numbers = plan.options(first.shape[3], TILE), plan.numbers(xs)
    tensors, steps = both(xs, plan.swapped)
    made = tuple([empty_rows(x, plan.swapped) for x in xs])
    parameters = norms[0].weight, norms[1].weight, norms[0].bias, norms[1].bias
    grid = -(-numbers[0] // options["TOKENS"]), sum(count_chunks(xs))
    with use_device(first.device):
        kernels().prepare_kernel[grid](
            *tensors, made[0], made[-1], *plan.tables, *parameters, *numbers, *steps, **options
        )
    return made


def launch_backward(
    grads: Sequence[Tensor], xs: Sequence[Tensor], plan: Plan, slots: Slots | None
) -> tuple[Tensor, ...]:
    """Gradients of what ``launch`` took, in their slots where they have some; those of the norms' parameters.

    ``xs`` are what it took where it normalises; a rotation alone needs none of it.
    """
    first, norms, chunks = grads[0], plan.both, count_chunks(grads)
    programs = sum(chunks)
    options, numbers = plan.options(first.shape[3], BACKWARD_TILE), plan.numbers(grads)
    of_grads, grad_steps = both(grads, plan.swapped)
    of_xs, steps = both(xs, plan.swapped) if xs else NO_HEADS
    made = [empty_rows(x, plan.swapped) for x in grads] if slots is None else slots.take(first)
    outs, out_steps = both(made, plan.swapped)
    blocks, parameters, sums = -(-numbers[0] // options["TOKENS"]), plan.parameters, None
    if parameters:
        blocks = min(blocks, -(-PROGRAMS // programs))
        # chunks of q and of k are summed at once where there are as many
        split = (len(chunks), chunks[0]) if chunks[0] == chunks[-1] else (1, programs)
        kinds = (2,) if norms[0].bias is not None else ()
        sums = first.new_empty(blocks, *split, *kinds, first.shape[3], dtype=torch.float32)
    with use_device(first.device):
        kernels().prepare_backward_kernel[blocks, programs](
            *of_grads,
            *of_xs,
            *outs,
            sums,
            *plan.tables,
            norms[0].weight,
            norms[1].weight,
            *numbers,
            *grad_steps,
            *steps,
            *out_steps,
            BIAS=norms[0].bias is not None,
            **options,
        )
    return (*made, *(() if sums is None else add_up(sums, parameters, chunks)))


def add_up(sums: Tensor, parameters: Sequence[Tensor], chunks: Sequence[int]) -> list[Tensor]:
    """The gradients of the norms' parameters, out of what the programs added up.

    ``sums`` is (blocks, 1 or 2 norms, chunks, head_dim), or (.., .., .., 2, head_dim) where there are biases.
    """
    if chunks[0] == chunks[-1]:
        total = sums.sum((0, 2))
    else:
        total = torch.stack([part.sum((0, 1, 2)) for part in sums.split_with_sizes(list(chunks), 2)])
    dtype = parameters[0].dtype
    if dtype != total.dtype and dtype == parameters[-1].dtype:
        total = total.to(dtype)  # all at once
    found = (total if total.dim() == 2 else total.flatten(0, 1)).unbind()
    return [one if one.dtype == of.dtype else one.to(of.dtype) for one, of in zip(found, parameters)]

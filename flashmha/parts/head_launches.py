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
from ..host.kernels import power_of_two, use_device
from .norms import KnownNorm, dtype_of
from .rotation import PositionsOrFirst, Rotation

HEADS = 4
"""Heads of a program."""
TILE, BACKWARD_TILE = 1024, 512
"""Pairs of a program at a time, measured on an H200."""
PROGRAMS = 2112
"""Programs at most where each adds up gradients of weights: 16 on each of an H200's processors."""
Steps = tuple[int, int]
"""The strides of tokens and of heads, where heads lie as rows of one token after another."""
BothSteps = tuple[int, int, int, int]
"""Those of two tensors."""


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
    if not swapped:
        return x.new_empty(x.shape)
    batch, seqlen, heads, head_dim = x.shape
    return x.new_empty(seqlen, batch, heads, head_dim).transpose(0, 1)


NO_NORM = KnownNorm(False, None, None, 0.0)
NO_HEADS: tuple[tuple[Tensor | None, Tensor | None], BothSteps] = (None, None), (0, 0, 0, 0)
"""What ``both`` gives where a kernel reads no heads."""
NO_OPTIONS: dict[str, int] = {}


class Share(NamedTuple):
    """How the heads of a launch are shared among programs.

    Attributes:
        tokens: of the call.
        chunks: the programs that share the heads of a token, for each tensor.
        programs: along the tokens and along the chunks.
        constants: what makes the kernel.
    """

    tokens: int
    chunks: tuple[int, ...]
    programs: tuple[int, int, int]
    constants: dict[str, Any]


@functools.lru_cache(maxsize=1024)
def share(shape: torch.Size, more: int, norm: bool, layer: bool, interleaved: bool, dim: int, backward: bool) -> Share:
    """The cut of a launch for heads of a shape, and ``more`` heads of the same tokens in a second tensor.

    Kept, since to compute it takes longer than to launch the kernel.
    """
    batch, seqlen, heads, head_dim = shape
    tokens, pairs = batch * seqlen, power_of_two(dim // 2)
    some = max(1, (BACKWARD_TILE if backward else TILE) // pairs)
    chunks = tuple(-(-count // HEADS) for count in (heads, more) if count)
    constants = {
        **({"BIAS": False} if backward else {}),
        "NORM": norm,
        "LAYER": layer,
        "INTERLEAVED": interleaved,
        "HEAD_DIM": head_dim,
        "DIM": dim,
        "PAIRS": pairs,
        "REST": power_of_two(max(1, head_dim - dim)),
        "TOKENS": some,
        "HEADS": HEADS,
    }
    return Share(tokens, chunks, (-(-tokens // some), sum(chunks), 1), constants)


class Plan:
    """One launch and its backward: the same for the heads of all tensors, what does not change from one to the other.

    Attributes:
        norms: one for each tensor, of one form; or none.
        rotation: ``None`` where heads are normalised alone.
        at: the positions of the tokens.
        swapped: the tokens of an item do not lie side by side, but those of a place.
        parameters: the weight and the bias of each norm, where it has them.
        slots: where the gradients of the heads belong.
        steps: those of the tensors, where they were read as they lie; known behind the launch.
        strides: those that the tensors had.
    """

    slots: Slots | None = None
    steps: BothSteps | None = None
    strides: tuple[Any, Any] = None, None

    def __init__(
        self,
        xs: Sequence[Tensor],
        norms: tuple[KnownNorm, ...],
        rotation: Rotation | None,
        at: PositionsOrFirst,
        swapped: bool,
    ) -> None:
        self.norms, self.rotation, self.at, self.swapped = norms, rotation, at, swapped
        first = xs[0]
        shape = first.shape
        more = xs[1].shape[2] if len(xs) == 2 else 0
        layer, weight, bias, eps = norms[0] if norms else NO_NORM
        last = norms[-1] if norms else NO_NORM
        self.weights, self.biases = (weight, last.weight), (bias, last.bias)
        self.parameters: list[Tensor] = []
        if weight is not None:
            self.parameters = [one for norm in norms for one in norm[1:3] if one is not None]
        start, by_item, by_place, places, speeds = 0, 0, 1, None, None
        scale, interleaved, dim = 1.0, False, shape[3] // 2 * 2
        if rotation is not None:
            speeds, scale, interleaved, _, _ = rotation
            dim = 2 * speeds.shape[0]
            if isinstance(at, Tensor):
                by_item, by_place, places = 0 if at.shape[0] == 1 else at.stride(0), at.stride(1), at
            else:
                start = at
        self.form = shape, more, bool(norms), layer, interleaved, dim
        self.share = share(*self.form, False)
        walk = (shape[0], start, by_place, by_item) if swapped else (shape[1], start, by_item, by_place)
        self.numbers = (self.share.tokens, *walk, shape[2], more, float(scale), float(eps))
        self.tables = places, speeds
        dtypes = dtype_of(places), dtype_of(speeds), dtype_of(weight), dtype_of(bias)
        self.kind = (first.device.index, first.dtype, *dtypes, shape[3], *self.form[2:])


def both(xs: Sequence[Tensor], swapped: bool) -> tuple[tuple[Tensor, Tensor], BothSteps]:
    """Two tensors for a kernel and their steps: of one tensor, the first again."""
    first = as_rows(xs[0], swapped)
    second = as_rows(xs[1], swapped) if len(xs) == 2 else first
    return (first[0], second[0]), first[1] + second[1]


@functools.cache
def kernels() -> Any:
    """The module of the kernels; to import it in each launch took a tenth of the launch's Python."""
    from . import head_kernels

    return head_kernels


def launch(xs: Sequence[Tensor], plan: Plan) -> tuple[Tensor, ...]:
    """One or two tensors of heads of the same tokens, prepared."""
    swapped, first = plan.swapped, xs[0]
    tensors, steps = both(xs, swapped)
    if tensors[0] is first and tensors[1] is xs[-1]:
        plan.steps, plan.strides = steps, (first.stride(), xs[-1].stride())
    made = tuple([empty_rows(x, swapped) for x in xs])
    with use_device(first.device):
        kernels().launch_prepare(
            plan.kind,
            plan.share.programs,
            (*tensors, made[0], made[-1], *plan.tables, *plan.weights, *plan.biases),
            steps,
            plan.numbers,
            plan.share.constants,
            NO_OPTIONS,
        )
    return made


def launch_backward(grads: Sequence[Tensor], xs: Sequence[Tensor], plan: Plan) -> tuple[Tensor, ...]:
    """Gradients of what ``launch`` took, in their slots where they have some; those of the norms' parameters.

    ``xs`` are what it took where it normalises; a rotation alone needs none of it.
    """
    first, swapped, steps, slots = grads[0], plan.swapped, plan.steps, plan.slots
    _, chunks, (blocks, programs, _), constants = share(*plan.form, True)
    of_grads, grad_steps = both(grads, swapped)
    of_xs, x_steps = NO_HEADS
    if xs:
        # which hooks of autograd may have put away and brought back in another order
        alike = (xs[0].stride(), xs[-1].stride()) == plan.strides
        of_xs, x_steps = ((xs[0], xs[-1]), steps) if steps is not None and alike else both(xs, swapped)
    if slots is None:
        made = [empty_rows(x, swapped) for x in grads]
        outs, out_steps = both(made, swapped)
    else:  # which lie as the heads do
        made = slots.take(first)
        outs, out_steps = both(made, swapped) if steps is None else ((made[0], made[-1]), steps)
    sums, has_bias = None, plan.biases[0] is not None
    if plan.parameters:
        blocks = min(blocks, -(-PROGRAMS // programs))
        # chunks of q and of k are summed at once where there are as many
        split = (len(chunks), chunks[0]) if chunks[0] == chunks[-1] else (1, programs)
        kinds = (2,) if has_bias else ()
        sums = first.new_empty(blocks, *split, *kinds, first.shape[3], dtype=torch.float32)
    with use_device(first.device):
        kernels().launch_prepare_backward(
            plan.kind,
            (blocks, programs, 1),
            (*of_grads, *of_xs, *outs, sums, *plan.tables, *plan.weights),
            grad_steps + x_steps + out_steps,
            plan.numbers,
            {**constants, "BIAS": True} if has_bias else constants,
            NO_OPTIONS,
        )
    return tuple(made) if sums is None else (*made, *add_up(sums, plan.parameters, chunks))


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

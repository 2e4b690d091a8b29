"""Norm and rotation of q and k in one pass over them as they lie, forward and backward; on an NVIDIA GPU, by Triton.

Tokens are taken in the order in which they lie. q and k of the same tokens are one launch; others are one each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..host.torch_state import is_batched
from ..weights.tiles import KERNEL_DTYPES, use_device
from .norms import KnownNorm, normalize_as
from .rotation import PositionsOrFirst, Rotation, rotate

LARGEST_HEAD_DIM = 256
HEADS = 4
"""Heads of a program."""
TILE, BACKWARD_TILE = 1024, 512
"""Pairs of a program at a time, measured on an H200."""


def why_not(x: Tensor) -> str | None:
    """Why no kernel prepares such heads; ``None`` where one does."""
    if x.dtype not in KERNEL_DTYPES:
        return f"dtype must be one of {KERNEL_DTYPES}, got {x.dtype}"
    if not 2 <= x.shape[-1] <= LARGEST_HEAD_DIM:
        return f"head_dim must lie between 2 and {LARGEST_HEAD_DIM}, got {x.shape[-1]}"
    return None if x.numel() else "there are no heads"


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
    grads: Sequence[Tensor], xs: Sequence[Tensor], plan: Plan
) -> tuple[list[Tensor], list[tuple[Tensor | None, Tensor | None]]]:
    """Gradients of what ``launch`` took; those of each norm's weight and bias.

    ``xs`` are what it took where it normalises; elsewhere only their order of tokens counts.
    """
    from .head_kernels import prepare_backward_kernel

    swapped, options = is_swapped(xs[0]), plan.options(xs[0], BACKWARD_TILE)
    of_grads, grad_strides = both([as_rows(grad, swapped) for grad in grads])
    of_xs, strides = both([as_rows(x, swapped) for x in xs]) if plan.norms else ([None, None], [0] * 4)
    heads = count_heads(xs)
    out, made = empty_rows(xs, swapped)
    weights, bias = plan.of_both("weight"), plan.of_both("bias")[0]
    grid = plan.grid(xs, options)
    sums = None
    if weights[0] is not None:
        sums = out.new_empty(*grid, 1 if bias is None else 2, xs[0].shape[-1], dtype=torch.float32)
    table, walk = plan.walk(xs[0], swapped)
    inv_freq = None if plan.rotation is None else plan.rotation.inv_freq
    options["BIAS"] = bias is not None
    with use_device(out.device):
        prepare_backward_kernel[grid](
            *of_grads,
            *of_xs,
            out,
            sums,
            table,
            inv_freq,
            *weights,
            *walk,
            *heads,
            *plan.numbers,
            *grad_strides,
            *strides,
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


class Prepare(torch.autograd.Function):
    """One launch with gradients: of the heads, and of the weights and biases of their norms."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, count: int, *given: Tensor | None) -> tuple[Tensor, ...]:
        xs = [x for x in given[:count] if x is not None]
        ctx.plan, ctx.count = plan, count
        # positions too: torch says where one was written before the backward
        ctx.save_for_backward(*given, plan.at if isinstance(plan.at, Tensor) else None)
        return launch(xs, plan)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (*given, _), plan = ctx.saved_tensors, ctx.plan
        xs = given[: ctx.count]
        if torch.is_grad_enabled() or is_batched(grads[0]):  # differentiated again, or many at once
            return None, None, *define_gradients(grads, given, xs, plan)
        made, of_norms = launch_backward(grads, xs, plan)
        return None, None, *made, *(one for pair in of_norms for one in pair)


def define_gradients(
    grads: Sequence[Tensor], given: Sequence[Tensor | None], xs: Sequence[Tensor], plan: Plan
) -> list[Tensor | None]:
    """Gradients by plain operators, which can be differentiated again and take many at once."""
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        made = define(xs, plan)
    wanted = [x for x in given if x is not None and x.requires_grad]
    found = iter(torch.autograd.grad(made, wanted, grads, create_graph=again))
    return [next(found) if x is not None and x.requires_grad else None for x in given]


def define(xs: Sequence[Tensor], plan: Plan) -> list[Tensor]:
    """What ``launch`` computes, by plain operators."""
    made = [normalize_as(norm, x) for norm, x in zip(plan.norms, xs)] if plan.norms else list(xs)
    if plan.rotation is None:
        return made
    table = plan.rotation.table(plan.at, xs[0].shape[1])
    return [rotate(x, table, plan.rotation.interleaved) for x in made]


def run(xs: Sequence[Tensor], plan: Plan) -> tuple[Tensor, ...]:
    """One launch; differentiable where something wants gradients."""
    parameters = [one for norm in plan.norms for one in (norm.weight, norm.bias)]
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (*xs, *parameters)):
        made: tuple[Tensor, ...] = Prepare.apply(plan, len(xs), *xs, *parameters)  # type: ignore[no-untyped-call]
        return made
    return launch(xs, plan)


def prepare(
    q: Tensor | None,
    k: Tensor | None,
    q_norm: KnownNorm | None,
    k_norm: KnownNorm | None,
    rotation: Rotation | None,
) -> tuple[Tensor | None, Tensor | None]:
    """q and k, normalised and turned, in one launch where they are of the same tokens and norms of one form."""
    q_at, k_at = (0, 0) if rotation is None else (rotation.q_at, rotation.k_at)
    if q is not None and k is not None and are_alike(q, k, q_norm, k_norm, q_at, k_at):
        norms = () if q_norm is None or k_norm is None else (q_norm, k_norm)
        made = run((q, k), Plan(norms, rotation, q_at))
        return made[0], made[1]
    done: list[Tensor | None] = []
    for x, norm, at in ((q, q_norm, q_at), (k, k_norm, k_at)):
        idle = x is None or (norm is None and rotation is None)
        done.append(x if idle else run((x,), Plan(() if norm is None else (norm,), rotation, at))[0])  # type: ignore[arg-type]
    return done[0], done[1]


def are_alike(
    q: Tensor,
    k: Tensor,
    q_norm: KnownNorm | None,
    k_norm: KnownNorm | None,
    q_at: PositionsOrFirst,
    k_at: PositionsOrFirst,
) -> bool:
    """q and k are of the same tokens, and normalised in one way."""
    if q.shape[:2] != k.shape[:2] or q.dtype != k.dtype or q.shape[3] != k.shape[3] or is_swapped(q) != is_swapped(k):
        return False
    if (q_norm is None) != (k_norm is None):
        return False
    if q_norm is not None and k_norm is not None and q_norm.form != k_norm.form:
        return False
    return q_at is k_at or (isinstance(q_at, int) and isinstance(k_at, int) and q_at == k_at)

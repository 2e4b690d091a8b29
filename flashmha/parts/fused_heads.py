"""Norm and rotation of q and k in one pass over them as they lie, forward and backward; on an NVIDIA GPU, by Triton."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends.rewrites.heads import Slots, find_slots
from ..host.torch_state import is_batched
from ..weights.tiles import KERNEL_DTYPES
from .head_launches import Plan, is_swapped, launch, launch_backward
from .norms import KnownNorm, normalize_as
from .rotation import PositionsOrFirst, Rotation, rotate

LARGEST_HEAD_DIM = 256


def why_not(x: Tensor) -> str | None:
    """Why no kernel prepares such heads; ``None`` where one does."""
    if x.dtype not in KERNEL_DTYPES:
        return f"dtype must be one of {KERNEL_DTYPES}, got {x.dtype}"
    if not 2 <= x.shape[-1] <= LARGEST_HEAD_DIM:
        return f"head_dim must lie between 2 and {LARGEST_HEAD_DIM}, got {x.shape[-1]}"
    return None if x.numel() else "there are no heads"


class Prepare(torch.autograd.Function):
    """One launch with gradients: of the heads, and of the weights and biases of their norms."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, count: int, slots: Slots | None, *given: Tensor | None) -> tuple[Tensor, ...]:
        xs = [x for x in given[:count] if x is not None]
        ctx.plan, ctx.count, ctx.slots = plan, count, slots
        # positions too: torch says where one was written before the backward
        ctx.save_for_backward(*given, plan.at if isinstance(plan.at, Tensor) else None)
        return launch(xs, plan)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (*given, _), plan = ctx.saved_tensors, ctx.plan
        xs = given[: ctx.count]
        if torch.is_grad_enabled() or is_batched(grads[0]):  # differentiated again, or many at once
            return None, None, None, *define_gradients(grads, given, xs, plan)
        made, of_norms = launch_backward(grads, xs, plan, ctx.slots)
        return None, None, None, *made, *(one for pair in of_norms for one in pair)


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
        made: tuple[Tensor, ...] = Prepare.apply(plan, len(xs), find_slots(xs), *xs, *parameters)  # type: ignore[no-untyped-call]
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

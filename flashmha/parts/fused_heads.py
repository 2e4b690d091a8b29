"""Norm and rotation of q and k in one pass over them as they lie, forward and backward; on an NVIDIA GPU, by Triton."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends.rewrites.heads import find_slots
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
    """One launch with gradients: of the heads, and of the weights and biases of their norms.

    ``given`` are the tensors of heads, one for each norm, and then the parameters of the norms.
    """

    @staticmethod
    def forward(ctx: Any, plan: Plan, *given: Tensor) -> tuple[Tensor, ...]:
        ctx.plan = plan
        # a rotation alone needs no heads; torch says where positions, too, were written before the backward
        needed = given if plan.norms else ()
        ctx.save_for_backward(*needed, *((plan.at,) if isinstance(plan.at, Tensor) else ()))
        return launch(given[: len(plan.norms)] if plan.norms else given, plan)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        plan: Plan = ctx.plan
        xs = ctx.saved_tensors[: len(plan.norms)]
        if torch.is_grad_enabled() or is_batched(grads[0]):  # differentiated again, or many at once
            return None, *define_gradients(grads, xs, plan)
        return None, *launch_backward(grads, xs, plan)


def define_gradients(grads: Sequence[Tensor], xs: Sequence[Tensor], plan: Plan) -> list[Tensor | None]:
    """Gradients by plain operators, which can be differentiated again and take many at once."""
    if plan.rotation is not None:
        cos, sin = plan.rotation.table(plan.at, grads[0].shape[1])
        grads = [rotate(grad, (cos, -sin), plan.rotation.interleaved) for grad in grads]
    if not plan.norms:
        return list(grads)
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        xs = [x.view_as(x) for x in xs]  # k may be made of q, and its gradient must not go there once more
        given = [*xs, *plan.parameters]
        made = [normalize_as(norm, x) for norm, x in zip(plan.norms, xs)]
    found = iter(torch.autograd.grad(made, [x for x in given if x.requires_grad], grads, create_graph=again))
    return [next(found) if x.requires_grad else None for x in given]


def run(
    xs: tuple[Tensor, ...], norms: tuple[KnownNorm, ...], rotation: Rotation | None, at: PositionsOrFirst
) -> tuple[Tensor, ...]:
    """One launch; differentiable where something wants gradients."""
    plan = Plan(xs, norms, rotation, at, is_swapped(xs[0]))
    if torch.is_grad_enabled():
        given = [*xs, *plan.parameters]
        if any(x.requires_grad for x in given):
            plan.slots = find_slots(xs)
            made: tuple[Tensor, ...] = Prepare.apply(plan, *given)  # type: ignore[no-untyped-call]
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
    if rotation is None and q_norm is None and k_norm is None:
        return q, k
    q_at, k_at = (0, 0) if rotation is None else (rotation.q_at, rotation.k_at)
    if q is not None and k is not None and are_alike(q, k, q_norm, k_norm, q_at, k_at):
        norms = () if q_norm is None or k_norm is None else (q_norm, k_norm)
        made = run((q, k), norms, rotation, q_at)
        return made[0], made[1]
    return prepare_one(q, q_norm, rotation, q_at), prepare_one(k, k_norm, rotation, k_at)


def prepare_one(
    x: Tensor | None, norm: KnownNorm | None, rotation: Rotation | None, at: PositionsOrFirst
) -> Tensor | None:
    """Heads of one tensor, in one launch where there is something to do."""
    if x is None or (norm is None and rotation is None):
        return x
    return run((x,), () if norm is None else (norm,), rotation, at)[0]


def are_alike(
    q: Tensor,
    k: Tensor,
    q_norm: KnownNorm | None,
    k_norm: KnownNorm | None,
    q_at: PositionsOrFirst,
    k_at: PositionsOrFirst,
) -> bool:
    """q and k are of the same tokens, and normalised in one way."""
    q_shape, k_shape = q.shape, k.shape
    if q_shape[:2] != k_shape[:2] or q.dtype != k.dtype or q_shape[3] != k_shape[3] or is_swapped(q) != is_swapped(k):
        return False
    if q_norm is None or k_norm is None:
        if q_norm is not k_norm:
            return False
    elif q_norm.form != k_norm.form:
        return False
    return q_at is k_at or (isinstance(q_at, int) and isinstance(k_at, int) and q_at == k_at)

"""The norms of heads: modules over head_dim, and what a kernel has to know of those that it can compute itself."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from ..problem.wording import spell


def call_norm(norm: nn.Module | None, x: Tensor | None) -> Tensor | None:
    """A module over head_dim, called on heads; they keep their dtype, whatever the module computes in."""
    if norm is None or x is None:
        return x
    made = norm(widen(norm, x))
    if not isinstance(made, Tensor) or made.shape != x.shape:
        raise ValueError(f"a norm must keep the shape of its heads, {tuple(x.shape)}, got {spell(made)}.")
    return made.to(x.dtype)


def widen(norm: nn.Module, x: Tensor) -> Tensor:
    """Heads in the dtype that torch's RMSNorm computes them in beside a wider weight: it warns of two dtypes."""
    weight = getattr(norm, "weight", None)
    if type(norm).forward is not nn.RMSNorm.forward or weight is None or weight.dtype == x.dtype:
        return x
    return x.to(torch.promote_types(x.dtype, weight.dtype))


class KnownNorm(NamedTuple):
    """An RMSNorm or a LayerNorm over head_dim, as numbers."""

    layer: bool
    weight: Tensor | None
    bias: Tensor | None
    eps: float

    @property
    def form(self) -> tuple[object, ...]:
        """What two norms must share to be computed in one launch."""
        return self.layer, self.eps, dtype_of(self.weight), dtype_of(self.bias)


def normalize_as(norm: KnownNorm, x: Tensor) -> Tensor:
    """Heads normalised by plain operators, in float32 at least."""
    wide, shape = x.float(), x.shape[-1:]
    weight, bias = (None if one is None else one.float() for one in (norm.weight, norm.bias))
    if norm.layer:
        return F.layer_norm(wide, shape, weight, bias, norm.eps).to(x.dtype)
    return F.rms_norm(wide, shape, weight, norm.eps).to(x.dtype)


def dtype_of(parameter: Tensor | None) -> torch.dtype | None:
    return None if parameter is None else parameter.dtype


NORM_FORWARDS = {nn.RMSNorm: nn.RMSNorm.forward, nn.LayerNorm: nn.LayerNorm.forward}
"""The modules that a kernel can compute, as torch wrote them."""
PARAMETER_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EPS = torch.finfo(torch.float32).eps
"""Where a norm has none: as torch's, which computes in float32."""
CHANGES = ("forward", "weight", "bias", "_call_impl")
"""What an instance has in its own dictionary only where code outside the class put it there."""


def know(norm: nn.Module, head_dim: int, device: torch.device) -> KnownNorm | None:
    """A norm as numbers; ``None`` where the module has to be called: another class, hooks, other parameters."""
    kind, own = type(norm), norm.__dict__
    if kind.forward is not NORM_FORWARDS.get(kind) or kind.__call__ is not nn.Module.__call__ or has_hooks(norm):
        return None
    if not own.keys().isdisjoint(CHANGES) or own["normalized_shape"] != (head_dim,):
        return None
    weight, bias = own["_parameters"].get("weight", norm), own["_parameters"].get("bias")
    for parameter in (weight, bias):
        if parameter is None:
            continue
        if type(parameter) is not nn.Parameter or parameter.dtype not in PARAMETER_DTYPES or parameter.device != device:
            return None
        if not parameter.is_contiguous():
            return None
    if weight is None and bias is not None:
        return None
    eps = EPS if own["eps"] is None else own["eps"]
    return KnownNorm(kind is nn.LayerNorm, weight, bias, eps)


def has_hooks(module: nn.Module) -> bool:
    """Something runs around a module, or a compiled form in its place."""
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return True
    return module._compiled_call_impl is not None or _has_any_global_hook()

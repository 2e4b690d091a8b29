"""The rotation of heads in plain PyTorch, which is the definition.

Pair ``i`` of a head's first ``dim`` features, seen as a complex number, is multiplied by
``scale * exp(1j * position * inv_freq[i])``. Angles, cos and sin are float32; the product is float32 at least, and is
rounded once, to the dtype of the heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..host.torch_state import eager, is_batched, is_dual, is_inside_transform

PositionsOrFirst = Tensor | int
"""Positions (batch or 1, seqlen), or the first of neighbouring ones."""


class Rotation(NamedTuple):
    """What turns the heads of one call.

    Attributes:
        inv_freq: (dim / 2,), float32.
        scale: what cos and sin are multiplied by.
        interleaved: features 2i and 2i + 1 are a pair, not i and i + dim / 2.
        q_at, k_at: the positions of queries and keys.
    """

    inv_freq: Tensor
    scale: float
    interleaved: bool
    q_at: PositionsOrFirst
    k_at: PositionsOrFirst

    def apply(self, q: Tensor | None, k: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """q and k (batch, seqlen, heads, head_dim), turned."""
        of_q, of_k = self.tables(None if q is None else q.shape[1], None if k is None else k.shape[1])
        return (
            None if q is None else rotate(q, of_q, self.interleaved),
            None if k is None else rotate(k, of_k, self.interleaved),
        )

    def tables(self, seqlen_q: int | None, seqlen_k: int | None) -> tuple[Any, Any]:
        """cos and sin (batch or 1, seqlen, 1, dim / 2) for queries and for keys; made once where they share them."""
        if seqlen_q is None:
            return None, self.table(self.k_at, seqlen_k)
        if seqlen_k is None:
            return self.table(self.q_at, seqlen_q), None
        if isinstance(self.q_at, Tensor) or isinstance(self.k_at, Tensor):
            of_k = self.table(self.k_at, seqlen_k)
            return of_k if self.q_at is self.k_at else self.table(self.q_at, seqlen_q), of_k
        first = min(self.q_at, self.k_at)
        q_at, k_at = self.q_at - first, self.k_at - first
        made = self.table(first, max(q_at + seqlen_q, k_at + seqlen_k))
        return [x[:, q_at : q_at + seqlen_q] for x in made], [x[:, k_at : k_at + seqlen_k] for x in made]

    def table(self, at: PositionsOrFirst, seqlen: int | None) -> tuple[Tensor, Tensor]:
        """cos and sin of ``seqlen`` positions."""
        if not isinstance(at, Tensor):
            assert seqlen is not None
            at = torch.arange(at, at + seqlen, dtype=torch.float32, device=self.inv_freq.device)[None]
        angles = at.to(torch.float32)[..., None, None] * self.inv_freq
        return angles.cos() * self.scale, angles.sin() * self.scale


def rotate(x: Tensor, table: Sequence[Tensor], interleaved: bool) -> Tensor:
    """Heads (batch, seqlen, heads, head_dim) turned by cos and sin."""
    cos, sin = table
    if x.requires_grad and torch.is_grad_enabled() and eager(x) and not (is_dual() or is_inside_transform()):
        made: Tensor = Rotate.apply(x, cos, sin, interleaved)  # type: ignore[no-untyped-call]
        return made
    return turn(x, cos, sin, interleaved)


class Rotate(torch.autograd.Function):
    """``turn``, whose gradient is the rotation back: it needs the table, and none of the heads."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return turn(x, cos, sin, interleaved)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        cos, sin = ctx.saved_tensors
        return rotate(grads[0], (cos, -sin), ctx.interleaved), None, None, None


def turn(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """The rotation itself."""
    half, wide = cos.shape[-1], x.to(torch.promote_types(x.dtype, torch.float32))
    turned, *rest = (
        (wide,) if wide.shape[-1] == 2 * half else wide.split_with_sizes([2 * half, x.shape[-1] - 2 * half], -1)
    )
    if interleaved:
        made = (turn_neighbours(turned, cos, sin), *rest)
    else:
        one, two = turned[..., :half], turned[..., half:]
        made = (torch.addcmul(one * cos, two, sin, value=-1), torch.addcmul(two * cos, one, sin), *rest)
    return (made[0] if len(made) == 1 else torch.cat(made, -1)).to(x.dtype)


def turn_neighbours(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs that lie side by side: complex numbers where nothing traces, which take a quarter of the time on a CPU."""
    if eager(x) and not is_dual() and not is_batched(x):
        flat = x.reshape(-1, 2)
        if flat.storage_offset() % 2 or flat.stride() != (2, 1):  # complex numbers start at even places
            flat = flat.clone(memory_format=torch.contiguous_format)
        pairs = torch.view_as_complex(flat).view(*x.shape[:-1], cos.shape[-1])
        return torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2)
    one, two = x[..., ::2], x[..., 1::2]
    made = torch.addcmul(one * cos, two, sin, value=-1), torch.addcmul(two * cos, one, sin)
    return torch.stack(made, -1).reshape(x.shape)

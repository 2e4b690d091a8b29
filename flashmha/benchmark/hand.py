"""The layer a good engineer writes where heads are grouped, normalised or turned: without options, around a kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cases import Case


class HandLayer(nn.Module):
    """One projection, ``nn.RMSNorm`` or ``nn.LayerNorm`` and a rotation by ``rotate_half``, a kernel, one projection.

    Its parameters bear the names of ours.
    """

    cos: Tensor | None
    sin: Tensor | None

    def __init__(self, case: Case, kernel: Callable[[Tensor, Tensor, Tensor, Any, bool], Tensor]) -> None:
        super().__init__()
        self.heads, self.kernel = (case.heads, case.heads_kv, case.heads_kv), kernel
        rows = sum(self.heads) * case.head_dim
        self.in_proj_weight = nn.Parameter(torch.empty(rows, case.embed_dim))
        self.in_proj_bias = nn.Parameter(torch.empty(rows)) if case.bias else None
        self.out_proj = nn.Linear(case.embed_dim, case.embed_dim, bias=case.bias)
        self.q_norm, self.k_norm = (make_norm(case) for _ in range(2))
        cos, sin = tabulate_angles(case.seqlen_k, case.head_dim) if case.rotary else (None, None)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, query: Tensor, key: Tensor, mask: Any, is_causal: bool) -> Tensor:
        packed = F.linear(query, self.in_proj_weight, self.in_proj_bias).unflatten(-1, (sum(self.heads), -1))
        q, k, v = packed.split(self.heads, dim=2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.cos is not None and self.sin is not None:
            q, k = (x * self.cos + rotate_half(x) * self.sin for x in (q, k))
        projected: Tensor = self.out_proj(self.kernel(q, k, v, mask, is_causal).flatten(2))
        return projected


def make_norm(case: Case) -> nn.Module | None:
    """The norm of heads that a case has."""
    if case.qk_norm is None:
        return None
    if case.qk_norm == "layer":
        return nn.LayerNorm(case.head_dim)
    return nn.RMSNorm(case.head_dim, eps=torch.finfo(torch.float32).eps)  # torch's default in every dtype but float64


def tabulate_angles(seqlen: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin (seqlen, 1, head_dim), each angle in both halves, as models keep them for all their layers."""
    slower = 1.0 / 10000.0 ** (torch.arange(0, head_dim, 2).float() / head_dim)
    angles = (torch.arange(seqlen).float()[:, None] * slower).double()  # rounded once, to the dtype of the layer
    both = torch.cat((angles, angles), dim=-1)[:, None]
    return both.cos(), both.sin()


def rotate_half(x: Tensor) -> Tensor:
    """The second half of the features with the other sign, then the first."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)

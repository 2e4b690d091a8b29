"""Layers as Hypothesis strategies: a ``Blueprint`` is a layer to be built, and its repr says everything."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import nn

from .record import Record, one, randomized
from .values import seeds

LAYER_DTYPES = (torch.float32, torch.float64, torch.bfloat16)
EITHER = (True, False)


@dataclasses.dataclass(frozen=True, repr=False)
class Blueprint(Record):
    """A layer to be built: the constructor's arguments, and the seed of its parameters."""

    embed_dim: int = 8
    num_heads: int = 2
    dropout: float = 0.0
    bias: bool = True
    add_bias_kv: bool = False
    add_zero_attn: bool = False
    kdim: int | None = None
    vdim: int | None = None
    batch_first: bool = True
    device: torch.device | str | None = None
    dtype: torch.dtype = torch.float32
    seed: int = 0

    @property
    def arguments(self) -> dict[str, Any]:
        """Keywords of the constructor, in its order."""
        return {name: value for name, value in vars(self).items() if name != "seed"}

    @property
    def widths(self) -> tuple[int, int, int]:
        """Features of query, key and value."""
        e = self.embed_dim
        return e, e if self.kdim is None else self.kdim, e if self.vdim is None else self.vdim

    @property
    def extra_columns(self) -> int:
        """Keys that the layer adds."""
        return int(self.add_bias_kv) + int(self.add_zero_attn)

    def build(self, kind: type[Any] = nn.MultiheadAttention, **more: Any) -> Any:
        """A layer of a class, with the same parameters whatever the class. None is left at zero, where bugs hide."""
        torch.manual_seed(self.seed)
        return randomized(kind(**{**self.arguments, **more}), self.seed)


@st.composite
def blueprints(
    draw: st.DrawFn,
    *,
    dtypes: Iterable[torch.dtype] = LAYER_DTYPES,
    heads: Iterable[int] = (1, 2, 3, 4),
    head_dims: Iterable[int] = (1, 2, 3, 4, 8),
    bias: Iterable[bool] = EITHER,
    packed: Iterable[bool] = EITHER,
    extra_columns: Iterable[bool] = (False, True),
    batch_first: Iterable[bool] = EITHER,
    device: torch.device | str | None = None,
) -> Blueprint:
    """Layers: any mix of the constructor's arguments, dropout 0. Every option is the values to draw from."""
    num_heads = draw(one(heads))
    embed_dim = num_heads * draw(one(head_dims))
    separate = not draw(one(packed))
    widths = one((None, embed_dim, 1, 5))
    return Blueprint(
        embed_dim=embed_dim,
        num_heads=num_heads,
        bias=draw(one(bias)),
        add_bias_kv=draw(one(extra_columns)),
        add_zero_attn=draw(one(extra_columns)),
        kdim=draw(widths) if separate else None,
        vdim=draw(widths) if separate else None,
        batch_first=draw(one(batch_first)),
        device=device,
        dtype=draw(one(dtypes)),
        seed=draw(seeds()),
    )

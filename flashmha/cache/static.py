"""``StaticCache``: a place for every token from the start."""

from __future__ import annotations

import torch
from torch import Tensor

from ..host.torch_state import keep_address
from ..problem.sizes import check_sizes
from .allocation import allocate, no_tokens
from .base import Cache


class StaticCache(Cache):
    """Keys and values (batch, max_seqlen, heads_kv, head_dim), allocated once and written in place.

    Args:
        batch: rows.
        max_seqlen: tokens that a row has room for, with the padding of the call that comes last.
        heads_kv, head_dim: of keys and values.
        head_dim_v: of values, where that is another.
        device, dtype: of the heads; under autocast its dtype.
    """

    def __init__(
        self,
        batch: int,
        max_seqlen: int,
        heads_kv: int,
        head_dim: int,
        *,
        head_dim_v: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_sizes(batch=batch, max_seqlen=max_seqlen)
        self.k, self.v = allocate(batch, max_seqlen, heads_kv, head_dim, head_dim_v, device, dtype)
        self.lengths = no_tokens(batch, device)
        self.max_seqlen: int | None = max_seqlen
        self.rows = keep_address(torch.arange(batch, device=device)[:, None])

    @property
    def batch(self) -> int:
        return self.k.shape[0]

    @property
    def capacity(self) -> int:
        return self.k.shape[1]

    @property
    def store(self) -> tuple[Tensor, Tensor]:
        return self.k, self.v

    @property
    def nbytes(self) -> int:
        return self.k.nbytes + self.v.nbytes + self.lengths.nbytes + self.rows.nbytes

    def check_room(self, seqlen: int, held: list[int] | None) -> None:
        self.check_end(seqlen, [0] if held is None else held)

    def put(self, k: Tensor, v: Tensor, held: list[int] | None) -> None:
        if held is None or min(held) != max(held):
            super().put(k, v, held)
            return
        here = slice(held[0], held[0] + k.shape[1])
        self.k[:, here] = k
        self.v[:, here] = v

    def write(self, k: Tensor, v: Tensor, positions: Tensor) -> None:
        self.k.index_put_((self.rows, positions), k)
        self.v.index_put_((self.rows, positions), v)

    def take(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        return self.k[self.rows, positions], self.v[self.rows, positions]

    def read(self, slots: int) -> tuple[Tensor, Tensor]:
        return self.k[:, :slots], self.v[:, :slots]

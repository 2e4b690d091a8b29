"""``MemoryCache``: the keys and values of a cross-attention's memory, projected once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..problem.sizes import check_sizes
from .allocation import allocate
from .checks import refuse_gradients
from .rows import Rows


class MemoryCache(Rows):
    """Keys and values of what a cross-attention looks at: the first call projects them, later ones read them.

    Args:
        seqlen: keys of the memory, whose place is allocated here, as CUDA graphs want it. Else the first call does.
        batch, heads_kv, head_dim, head_dim_v, device, dtype: as in ``StaticCache``.
    """

    def __init__(
        self,
        batch: int,
        heads_kv: int,
        head_dim: int,
        *,
        seqlen: int | None = None,
        head_dim_v: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_sizes(batch=batch)
        if seqlen is not None:
            check_sizes(seqlen=seqlen)
        self.fixed = seqlen is not None
        self.k, self.v = allocate(batch, seqlen or 0, heads_kv, head_dim, head_dim_v, device, dtype)
        self.filled = False
        """The memory was projected."""

    @property
    def batch(self) -> int:
        return self.k.shape[0]

    @property
    def seqlen(self) -> int:
        """Keys of the memory."""
        return self.k.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of device memory it holds."""
        return self.k.nbytes + self.v.nbytes

    def get_seq_length(self) -> Tensor:
        """The keys that each row holds, (batch,) int32."""
        held = self.seqlen if self.filled else 0
        return torch.full((self.batch,), held, dtype=torch.int32, device=self.k.device)

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Take the memory's keys and values (batch, seqlen, heads_kv, head_dim).

        Raises:
            ValueError: they do not fit, or want gradients. The cache is as it was.
        """
        for name, x, held in (("k", k, self.k), ("v", v, self.v)):
            wanted = (self.batch, held.shape[1] if self.fixed else x.shape[1], *held.shape[2:])
            if x.shape != wanted or x.dtype != held.dtype or x.device != held.device:
                raise ValueError(
                    f"{name} must be {wanted}, {held.dtype} on {held.device}, as this MemoryCache was made, got "
                    f"{tuple(x.shape)}, {x.dtype} on {x.device}."
                )
        refuse_gradients(k, v)
        if not self.fixed:
            batch, seqlen, heads, head_dim = k.shape
            self.k, self.v = allocate(batch, seqlen, heads, head_dim, v.shape[3], k.device, k.dtype)
        self.k.copy_(k)
        self.v.copy_(v)
        self.filled = True
        return self.k, self.v

    def crop(self, length: Any) -> None:
        """Nothing: the memory is one for every token."""

    def by_row(self) -> list[Tensor]:
        return [self.k, self.v] if self.filled else []

    def reset(self) -> None:
        """Forget the memory, so that the next call projects another."""
        self.filled = False

    def state(self) -> bool:
        """What ``restore`` needs to undo an ``update``."""
        return self.filled

    def restore(self, state: bool) -> None:
        """Go back to a state."""
        self.filled = state

    def __repr__(self) -> str:
        return f"MemoryCache(batch={self.batch}, seqlen={self.seqlen}, heads_kv={self.k.shape[2]})"

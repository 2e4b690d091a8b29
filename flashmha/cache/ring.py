"""``RingCache``: the last tokens of each row, for layers that see no farther back."""

from __future__ import annotations

import torch
from torch import Tensor

from ..host.torch_state import insist
from ..problem.masks import Mask
from ..problem.positions import MaskMod
from ..problem.rules import Rule
from ..problem.sizes import check_sizes
from ..problem.windows import Window
from .allocation import no_tokens
from .static import StaticCache


class RingCache(StaticCache):
    """A sliding window: the keys of ``window + chunk`` tokens, whose places are taken anew in a circle.

    Every call sees what a ``Window(window, None)`` leaves, and the first ``sinks`` tokens of the row beside it
    (arXiv:2309.17453). Positions go on counting: a row may become longer than any memory.

    Args:
        window: keys before a query that it sees, as the left of a ``Window``.
        chunk: tokens that one call may bring, and that ``crop`` may take back.
        sinks: tokens at the start of a row that stay.
        batch, heads_kv, head_dim, head_dim_v, device, dtype: as in ``StaticCache``.
    """

    def __init__(
        self,
        batch: int,
        window: int,
        heads_kv: int,
        head_dim: int,
        *,
        chunk: int = 1,
        sinks: int = 0,
        head_dim_v: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_sizes(0, window=window, sinks=sinks)
        check_sizes(chunk=chunk)
        super().__init__(
            batch, sinks + window + chunk, heads_kv, head_dim, head_dim_v=head_dim_v, device=device, dtype=dtype
        )
        self.max_seqlen = None
        self.window, self.chunk, self.sinks = window, chunk, sinks
        self.written = no_tokens(batch, device)
        """(batch,) one more than the farthest position that was ever written to."""

    @property
    def round(self) -> int:
        """Slots of the circle, behind those of the first tokens."""
        return self.window + self.chunk

    @property
    def nbytes(self) -> int:
        return super().nbytes + self.written.nbytes

    def put(self, k: Tensor, v: Tensor, held: list[int] | None) -> None:
        super().put(k, v, None)

    def check_room(self, seqlen: int, held: list[int] | None) -> None:
        if seqlen > self.chunk:
            raise ValueError(
                f"chunk must be at least the {seqlen} tokens of a call, got {self.chunk}: give the prompt in pieces of "
                f"{self.chunk}, or make the RingCache with chunk={seqlen}."
            )

    def place(self, positions: Tensor) -> Tensor:
        """The slots of positions."""
        around = (positions - self.sinks) % self.round + self.sinks
        return torch.where(positions < self.sinks, positions, around) if self.sinks else around

    def write(self, k: Tensor, v: Tensor, positions: Tensor) -> None:
        super().write(k, v, self.place(positions))
        if positions.shape[1]:
            torch.maximum(self.written, positions[:, -1].int() + 1, out=self.written)

    def take(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        return super().take(self.place(positions))

    def slots(self) -> Tensor:
        places = torch.arange(self.capacity, dtype=torch.int32, device=self.lengths.device)
        last = self.written[:, None] - 1
        held = last - (last - places) % self.round  # the farthest that falls on the slot
        if self.sinks:
            held = torch.where(places < self.sinks, places, held.masked_fill(held < self.sinks, -1))
        return torch.where(held < self.lengths[:, None], held, -1).clamp(min=-1)

    def rule(self) -> Mask:
        if not self.sinks:
            return Window(self.window, None)
        return Rule(keep_first(self.sinks, self.window))

    def cropped(self, length: int | Tensor) -> Tensor:
        """As in ``Cache``, by ``chunk`` tokens behind the farthest at most: those before them are gone.

        Raises:
            ValueError: farther than that; on a GPU an error of the device, which is not waited for.
        """
        left = super().cropped(length)
        insist(
            (self.written - left <= self.chunk) | (self.written <= self.capacity),
            lambda: (
                f"length must take back at most chunk={self.chunk} tokens of a RingCache, whose older ones are gone, "
                f"got {left.tolist()} with {self.written.tolist()} written."
            ),
        )
        return left

    def by_row(self) -> list[Tensor]:
        return [*super().by_row(), self.written]


def keep_first(sinks: int, window: int) -> MaskMod:
    """The rule of a window beside which the first tokens stay."""

    def first_or_near(batch: Tensor, head: Tensor, q_pos: Tensor, k_pos: Tensor) -> Tensor:
        return (k_pos < sinks) | (q_pos - k_pos <= window)

    return first_or_near

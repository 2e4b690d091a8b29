"""``PagedCache``: rows made of pages, which a ``PagePool`` hands out and takes back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..host.torch_state import is_compiling, keep_address
from ..problem.cached import Pages, read_pages
from ..problem.sizes import check_sizes
from .allocation import allocate, no_tokens
from .base import Cache, Moved
from .checks import row_numbers


class PagePool:
    """Memory for keys and values in pages of equal size, for the caches that share it.

    Args:
        pages: how many there are to hand out. One more, of zeros, stands for those that were not.
        page_size: tokens of a page.
        heads_kv, head_dim, head_dim_v, device, dtype: as in ``StaticCache``.
    """

    def __init__(
        self,
        pages: int,
        page_size: int,
        heads_kv: int,
        head_dim: int,
        *,
        head_dim_v: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_sizes(pages=pages, page_size=page_size)
        self.pages, self.page_size = pages, page_size
        self.k, self.v = allocate(pages + 1, page_size, heads_kv, head_dim, head_dim_v, device, dtype)
        self.free = list(reversed(range(pages)))

    @property
    def page_nbytes(self) -> int:
        """Bytes of one page."""
        return (self.k.nbytes + self.v.nbytes) // (self.pages + 1)

    @property
    def nbytes(self) -> int:
        """Bytes of all pages, handed out or not."""
        return self.k.nbytes + self.v.nbytes

    def check_free(self, wanted: int) -> None:
        """Raise ``ValueError`` where there are fewer pages than are wanted."""
        if wanted > len(self.free):
            raise ValueError(
                f"pages must be free for {wanted} more, got {len(self.free)} of {self.pages} (page_size="
                f"{self.page_size}): make a larger PagePool, or release rows that are done."
            )

    def take(self, wanted: int) -> list[int]:
        """Hand out pages, of zeros: none of what an earlier row left is read by a later one."""
        self.check_free(wanted)
        taken = [self.free.pop() for _ in range(wanted)]
        if taken:
            where = torch.tensor(taken, device=self.k.device)
            self.k.index_fill_(0, where, 0.0)
            self.v.index_fill_(0, where, 0.0)
        return taken

    def give_back(self, pages: Iterable[int]) -> None:
        """Take pages back."""
        self.free.extend(pages)

    def __repr__(self) -> str:
        return f"PagePool(pages={self.pages}, page_size={self.page_size}, free={len(self.free)})"


class PagedCache(Cache):
    """Rows whose keys and values lie in pages of a pool, so that each holds as much memory as it has tokens.

    Called eagerly it books pages as rows grow, and waits for the device when it does. Before a compiled step or a CUDA
    graph call ``reserve``.

    Args:
        pool: where pages come from; caches of several layers may share one.
        batch: rows.
        max_seqlen: tokens of the longest row; memory is taken as it is needed.
    """

    def __init__(self, pool: PagePool, batch: int, max_seqlen: int) -> None:
        check_sizes(batch=batch, max_seqlen=max_seqlen)
        self.pool = pool
        self.max_seqlen: int = max_seqlen
        device, width = pool.k.device, -(-max_seqlen // pool.page_size)
        with torch.inference_mode(False):
            self.block_table = keep_address(torch.full((batch, width), pool.pages, dtype=torch.int32, device=device))
        """(batch, pages of a row) int32, the page of zeros where none was booked."""
        self.lengths = no_tokens(batch, device)
        self.booked: list[list[int]] = [[] for _ in range(batch)]
        self.room = 0
        """Tokens for which every row surely has pages, if no compiled step ran since the last ``reserve``."""

    @property
    def batch(self) -> int:
        return self.block_table.shape[0]

    @property
    def capacity(self) -> int:
        return self.block_table.shape[1] * self.pool.page_size

    @property
    def store(self) -> tuple[Tensor, Tensor]:
        return self.pool.k, self.pool.v

    @property
    def nbytes(self) -> int:
        pages = sum(map(len, self.booked)) * self.pool.page_nbytes
        return pages + self.block_table.nbytes + self.lengths.nbytes

    def pages(self) -> Pages:
        return Pages(self.block_table, self.pool.page_size)

    def make_room(self, seqlen: int, held: list[int]) -> None:
        self.book([-(-(length + seqlen) // self.pool.page_size) for length in held])
        self.room = min(len(pages) * self.pool.page_size - length for pages, length in zip(self.booked, held))

    def book(self, wanted: Sequence[int]) -> None:
        """Give each row as many pages as are wanted, where it has fewer."""
        more = [max(0, count - len(pages)) for count, pages in zip(wanted, self.booked)]
        self.pool.check_free(sum(more))
        for pages, count in zip(self.booked, more):
            pages.extend(self.pool.take(count))
        if any(more):
            self.write_table()

    def write_table(self) -> None:
        """The pages of every row on the device."""
        width, none = self.block_table.shape[1], self.pool.pages
        rows = [pages + [none] * (width - len(pages)) for pages in self.booked]
        self.block_table.copy_(torch.tensor(rows, dtype=torch.int32))

    def check_room(self, seqlen: int, held: list[int] | None) -> None:
        if is_compiling():
            return  # a token without a page is an index beyond the pool
        if seqlen > self.room or not self.lengths.is_cuda:
            self.reserve(seqlen)
        self.room -= seqlen

    def write(self, k: Tensor, v: Tensor, positions: Tensor) -> None:
        none, (pages, place) = self.pool.pages, self.place(positions)
        where = pages.masked_fill(pages == none, none + 1), place
        self.pool.k.index_put_(where, k)
        self.pool.v.index_put_(where, v)

    def take(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        where = self.place(positions)
        return self.pool.k[where], self.pool.v[where]

    def place(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """The pages of positions, and the places in them."""
        size = self.pool.page_size
        return self.block_table.long().gather(1, positions // size), positions % size

    def move(self, moved: Moved) -> None:
        source, target = self.place(moved.source), self.place(moved.target)
        for x in self.store:  # an empty row may have no page, and moves zeros inside the page of zeros
            x.index_put_(target, x[source])
        self.lengths.copy_(moved.lengths)

    def read(self, slots: int) -> tuple[Tensor, Tensor]:
        pages = self.block_table[:, : -(-slots // self.pool.page_size)]
        k, v = (read_pages(x, pages)[:, :slots] for x in self.store)
        return k, v

    def trim(self) -> None:
        """Give back the pages in which no token lies; waits for the device."""
        self.unbook([-(-length // self.pool.page_size) for length in self.lengths.tolist()])

    def unbook(self, counts: Sequence[int]) -> None:
        """Give back the pages of each row behind so many."""
        for pages, count in zip(self.booked, counts):
            self.pool.give_back(pages[count:])
            del pages[count:]
        self.room = 0
        self.write_table()

    def release(self, rows: Iterable[int]) -> None:
        rows = row_numbers(rows, self.batch)
        for row in rows:
            self.lengths[row] = 0
        self.unbook([0 if row in rows else len(pages) for row, pages in enumerate(self.booked)])

    def reset(self) -> None:
        self.release(range(self.batch))

    def prepare_reorder(self, rows: Tensor) -> None:
        """Book pages as well: they are copied and none is shared, so that every row gets as many as the longest."""
        super().prepare_reorder(rows)
        self.book([max(map(len, self.booked))] * self.batch)

    def put_in_order(self, rows: Tensor) -> None:
        there = self.block_table[:, : len(self.booked[0])].long()
        here = there[rows.long()]
        for x in self.store:
            x[there] = x[here]
        self.lengths.copy_(self.lengths[rows.long()])
        self.room = 0

    def state(self) -> Any:
        return self.lengths.clone(), [len(pages) for pages in self.booked]

    def restore(self, state: Any) -> None:
        """Go back to a state; pages that were booked since go back to the pool."""
        lengths, counts = state
        self.lengths.copy_(lengths)
        if any(len(pages) > count for pages, count in zip(self.booked, counts)):
            self.unbook(counts)

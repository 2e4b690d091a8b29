"""The grid of ``flashmha tune``: the problems whose times automatic choice may follow."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections.abc import Sequence

import torch

from ..problem.documents import Documents
from ..problem.masks import Dense, Mask
from ..problem.ragged import KeyLengths, KeyPadding
from ..problem.windows import Window, causal
from .cases import Case


@dataclasses.dataclass(frozen=True)
class Grid:
    """The sizes that are measured unless flags say otherwise.

    Attributes:
        dtype, head_dims, seqlens: the grid.
        tokens, width: of every problem but ``STEPS``: batch * seqlen, and heads * head_dim.
        decode: batches, heads, heads_kv, head_dim and numbers of keys of ``STEPS``.
        rounds: turns of every backend in a cell; fewer, but ``rounds.FEWEST``, where its share of the budget is spent.
        budget: seconds in all.
        block: seconds that the calls of one turn take together, about.
    """

    dtype: str
    head_dims: tuple[int, ...]
    seqlens: tuple[int, ...]
    tokens: int
    width: int
    decode: tuple[tuple[int, ...], int, int, int, tuple[int, ...]]
    rounds: int
    budget: float
    block: float


GRIDS = {
    "cuda": Grid(
        dtype="bfloat16",
        head_dims=(64, 128, 256),
        seqlens=(512, 1024, 2048, 4096, 8192, 16384),
        tokens=16384,
        width=2048,
        decode=((1, 8), 32, 8, 128, (1024, 8192, 65536)),
        rounds=7,
        budget=190.0,
        block=2e-3,
    ),
    "cpu": Grid(
        dtype="float32",
        head_dims=(64,),
        seqlens=(128, 512),
        tokens=512,
        width=256,
        decode=((1,), 8, 2, 64, (1024,)),
        rounds=7,
        budget=45.0,
        block=1e-3,
    ),
}
"""By device type; another accelerator has the CPU's."""

STEPS = ("decode", "cached")
"""Kinds of few queries over many keys."""
DECODE_QUERIES = (1, 8)
WINDOW = 256
"""Keys before a query in ``window``, at most; a quarter of the sequence in a short one."""


@dataclasses.dataclass(frozen=True)
class GridCell:
    """One problem to measure: its kind and mode out of ``ranking``, its sizes, and how long its documents are."""

    kind: str
    mode: str
    batch: int
    seqlen_q: int
    seqlen_k: int
    heads: int
    heads_kv: int
    head_dim: int
    document: int | None = None

    def __str__(self) -> str:
        return f"{self.kind}, {self.mode}, head_dim {self.head_dim}, {self.lengths}"

    @property
    def lengths(self) -> str:
        """Queries on keys, of some rows where the kind is one of ``STEPS``; or how long each of the documents is."""
        if self.document is not None:
            return f"{self.document} each"
        rows = f"{self.batch} × " if self.kind in STEPS else ""
        return f"{rows}{self.seqlen_q} on {self.seqlen_k}"

    def end(self, queries: int) -> GridCell:
        """The last queries of its first item, or document, on the first of its key heads."""
        seqlen_k, kind = (self.seqlen_k, self.kind) if self.document is None else (self.document, "causal")
        few, group = min(queries, self.seqlen_q, seqlen_k), self.heads // self.heads_kv
        return GridCell(kind, self.mode, 1, few, seqlen_k, group, 1, self.head_dim)

    def case(self, dtype: str) -> Case:
        """The same sizes as a case of the benchmark, whose mask is left to ``mask``."""
        sizes = {name: getattr(self, name) for name in ("batch", "seqlen_q", "seqlen_k", "heads", "heads_kv")}
        embed_dim = self.heads * self.head_dim
        return Case(suite="tune", level="core", mode=self.mode, embed_dim=embed_dim, dtype=dtype, **sizes)

    def mask(self, device: torch.device, seed: int) -> Mask | None:
        """Its mask; padding is on the right, as in most models, and half of a sequence at most.

        Rows of a cache hold an eighth of it at least. The mask tensor is the causal one, as most of those are that
        long sequences are called with.
        """
        if self.document is not None:
            offsets = torch.arange(0, self.seqlen_k + 1, self.document, dtype=torch.int32)
            return Documents(offsets.to(device), max_seqlen=self.document) & causal()
        if self.kind == "mask tensor":
            seen = torch.ones(self.seqlen_q, self.seqlen_k, dtype=torch.bool, device=device)
            return Dense(seen.tril(self.seqlen_k - self.seqlen_q))
        if self.kind == "window":
            return Window(min(WINDOW, self.seqlen_k // 4), 0)
        generator = torch.Generator().manual_seed(seed)
        if self.kind == "cached":
            lengths = torch.randint(max(1, self.seqlen_k // 8), self.seqlen_k + 1, (self.batch,), generator=generator)
            return KeyLengths(lengths.to(device))
        if self.kind in ("padded", "padded causal"):
            real = torch.randint(max(1, self.seqlen_k // 2), self.seqlen_k + 1, (self.batch, 1), generator=generator)
            padding = KeyPadding((torch.arange(self.seqlen_k) < real).to(device))
            return padding if self.kind == "padded" else padding & causal()
        return causal() if self.kind == "causal" else None


def grid_cells(
    grid: Grid, kinds: Sequence[str], modes: Sequence[str], head_dims: Sequence[int], seqlens: Sequence[int] | None
) -> list[GridCell]:
    """The cells, those that matter most first, and those that share a kernel in a row."""
    cells: list[GridCell] = []
    middle = statistics.median_low(head_dims)
    batches, heads, heads_kv, wide, many = grid.decode
    for kind in STEPS if "eval" in modes else ():
        for seqlen in (seqlens or many) if kind in kinds else ():
            for batch, few in itertools.product(batches, DECODE_QUERIES):
                cells.append(GridCell(kind, "eval", batch, few, seqlen, heads, heads_kv, wide))
    for head_dim in sorted(head_dims, key=lambda one: (one != middle, one)):
        heads = max(1, grid.width // head_dim)
        for kind in kinds:
            if kind in STEPS:
                continue
            for mode in modes:
                for seqlen in seqlens or grid.seqlens:
                    batch = max(1, grid.tokens // seqlen)
                    if kind == "documents":
                        total = batch * seqlen
                        cells.append(GridCell(kind, mode, 1, total, total, heads, heads, head_dim, seqlen))
                    else:
                        cells.append(GridCell(kind, mode, batch, seqlen, seqlen, heads, heads, head_dim))
    return cells

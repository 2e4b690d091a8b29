"""Masks as Hypothesis strategies: every kind, alone and combined."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from hypothesis import strategies as st
from torch import Tensor

from ..backends.limits import FEATURES
from ..problem.cached import OwnTokens, Pages, Positions
from ..problem.documents import Documents
from ..problem.masks import Dense, Mask, join_masks
from ..problem.positions import ALIGNMENTS, MaskMod
from ..problem.ragged import KeyLengths, KeyPadding
from ..problem.rules import Rule
from ..problem.windows import Window, causal
from .choice import Choices, Choose
from .record import placed
from .values import SEEDS, TILE_SIZE, coins, generator

MASK_KINDS = {
    "causal": 2,
    "window": 3,  # two bounds
    "key_padding": 2,
    "key_lengths": 3,
    "dense_mask": 2,
    "rule": 1,
    "documents": 4,  # only a batch of 1 can hold them
    "cache": 1,  # nor beside these
    "own_tokens": 1,
}
"""Kinds of masks, and how many problems in six have one, of those that may have several."""
WINDOW_REACH = (0, 1, 2, 3, 5)
"""How far a window may reach, where it ends at all."""
FAR_REACH = (63, 64, 100, 128)
"""How far it may reach in a long problem, beside that."""


@st.composite
def masks(
    draw: st.DrawFn,
    *,
    batch: int,
    heads: int,
    seqlen_q: int,
    seqlen_k: int,
    features: frozenset[str] = frozenset(FEATURES),
    device: torch.device | str | None = None,
) -> Mask | None:
    """Masks of every kind out of ``features`` for a problem of these sizes, alone and combined."""
    choose = Choices(draw, "mask")
    kinds = [kind for kind in MASK_KINDS if kind in features and (kind != "documents" or batch == 1)]
    longest = max(seqlen_q, seqlen_k)
    steps = ("step",) if features.issuperset(("cache", "key_lengths")) else ()
    how = choose(("none", "several", "several", "one", "one", *steps)) if kinds else "none"
    chosen: list[str] = []
    if how == "step":
        where = placed(device)
        return drawn_step(choose, batch=batch, seqlen_q=seqlen_q, seqlen_k=seqlen_k, features=features, where=where)
    if how == "one":
        often = ["causal"] * 2 + (["window", "key_lengths"] * 3 if longest >= TILE_SIZE else [])
        chosen = [choose(kinds + [kind for kind in often if kind in kinds])]
    elif how == "several":
        chosen = [kind for kind in kinds if choose(range(6)) > 5 - MASK_KINDS[kind]]
    if "documents" in chosen and "cache" in chosen:
        chosen.remove("cache")
    if "causal" in chosen and "window" in features and choose((False, True)):
        chosen[chosen.index("causal")] = "top-left causal"
    sizes = {"batch": batch, "heads": heads, "seqlen_q": seqlen_q, "seqlen_k": seqlen_k}
    ends = (*WINDOW_REACH, longest, None, *(2 * FAR_REACH if longest >= TILE_SIZE else ()))
    return join_masks(
        *[
            drawn_mask(kind, choose, choose(SEEDS), reach=ends, aligns=ALIGNMENTS, device=device, **sizes)
            for kind in chosen
        ]
    )


def drawn_mask(
    kind: str,
    choose: Choose,
    seed: int,
    *,
    batch: int,
    heads: int,
    seqlen_q: int,
    seqlen_k: int,
    reach: Sequence[int | None] = WINDOW_REACH,
    aligns: Sequence[str] = ALIGNMENTS[:1],
    device: torch.device | str | None = None,
) -> Mask:
    """A mask of one kind out of ``MASKS``, or ``top-left causal``, ``mask for all heads``, ``step`` over a cache.

    Its numbers are chosen, its tensors seeded.
    """
    where = placed(device)

    def coin(*shape: int) -> Tensor:
        return coins(seed, choose((0.7, 0.4, 0.9)), *shape, device=where)

    if kind == "causal":
        return causal()
    if kind == "top-left causal":
        return causal(align="top_left")
    if kind == "window":
        return Window(choose(reach), choose((*(0,) * 7, *reach)), align=choose(aligns))
    if kind == "key_padding":
        return KeyPadding(coin(batch, seqlen_k))
    if kind == "key_lengths":
        return KeyLengths(drawn_lengths(batch, seqlen_k, generator(seed), choose((False, *(True,) * 5))).to(where))
    if kind == "mask for all heads":
        return Dense(coin(choose((1, batch)), 1, seqlen_q, seqlen_k))
    if kind == "dense_mask":
        shape = [choose((1, size)) for size in (batch, heads)]
        return Dense(coin(*shape, *(choose((size, size, size, 1)) for size in (seqlen_q, seqlen_k))))
    if kind == "rule":
        return Rule(every(choose((1, 2, 3))), align=choose(aligns))
    if kind == "own_tokens":
        shape = [choose((1, size)) for size in (batch, heads, seqlen_q)]
        start = torch.randint(-1, seqlen_k + 1, (batch,), generator=generator(seed + 1), device="cpu")
        return OwnTokens(coin(*shape, choose((1, max(1, seqlen_q)))), start.to(where))
    if kind == "cache":
        return drawn_positions(choose, generator(seed), batch, seqlen_q, seqlen_k, where)
    if kind == "step":
        return drawn_ends(choose, generator(seed), batch, seqlen_q, seqlen_k, where)
    number, random = choose((1, 2, 3, 4)), generator(seed)
    ends = [drawn_offsets(number, total, random) for total in (seqlen_q, seqlen_k)]
    totals = [int(end[-1]) for end in ends] if choose((False, True)) else [None, None]
    return Documents(*(end.to(where) for end in ends), total=totals[0], total_k=totals[1])


def every(step: int) -> MaskMod:
    """A rule: every ``step``-th diagonal, another one for each batch item and head."""

    def diagonals(batch: Tensor, head: Tensor, q_pos: Tensor, k_pos: Tensor) -> Tensor:
        return (q_pos + k_pos + batch + head) % step == 0

    diagonals.__name__ = f"every({step})"
    return diagonals


def drawn_positions(
    choose: Choose, random: torch.Generator, batch: int, seqlen_q: int, seqlen_k: int, where: torch.device
) -> Positions:
    """Queries that follow one another from anywhere on, and keys in their slots, or as they lie in a ring."""
    starts = torch.randint(-1, seqlen_k + 1, (batch, 1), generator=random, device="cpu")
    queries = starts + torch.arange(seqlen_q, device="cpu")
    if choose((False, True)):
        return Positions(queries.to(where))
    ends = torch.randint(0, 2 * seqlen_k + 1, (batch, 1), generator=random, device="cpu")
    slots = torch.arange(seqlen_k, device="cpu")
    held = ends - 1 - (ends - 1 - slots) % max(seqlen_k, 1)  # the last position before the end that falls on a slot
    return Positions(queries.to(where), held.to(where))


def drawn_ends(
    choose: Choose, random: torch.Generator, batch: int, seqlen_q: int, seqlen_k: int, where: torch.device
) -> Mask:
    """The queries of a row end with its keys."""
    lengths = drawn_lengths(batch, seqlen_k, random, choose((False, *(True,) * 5)))
    queries = lengths[:, None] - seqlen_q + torch.arange(seqlen_q, device="cpu")
    return KeyLengths(lengths.to(where)) & Positions(queries.to(where), at_end=True)


def drawn_step(
    choose: Choose, *, batch: int, seqlen_q: int, seqlen_k: int, features: frozenset[str], where: torch.device
) -> Mask:
    """A step over a cache, which may see neighbours alone."""
    step = drawn_ends(choose, generator(choose(SEEDS)), batch, seqlen_q, seqlen_k, where)
    kinds = [kind for kind in ("causal", "causal", "window") if kind in features]
    kind = choose(("none", *kinds))
    if kind == "none":
        return step
    return step & (causal() if kind == "causal" else Window(choose((*WINDOW_REACH, None)), choose((0, 0, 1, None))))


def drawn_pages(
    choose: Choose, random: torch.Generator, batch: int, seqlen_k: int, page_size: int, where: torch.device
) -> Pages:
    """Rows in pages out of order; a page may be in several rows, or none."""
    width = seqlen_k // page_size
    pool = choose((batch * width, width, 1)) + 1
    table = torch.rand(batch, max(pool, width), generator=random, device="cpu").argsort(1)[:, :width] % pool
    return Pages(table.int().to(where), page_size)


def drawn_lengths(batch: int, longest: int, random: torch.Generator, rounded: bool) -> Tensor:
    """Numbers of keys; rounded to whole tiles where there is one."""
    made = torch.randint(0, longest + 1, (batch,), generator=random, device="cpu")
    return (
        ((made + TILE_SIZE // 2) // TILE_SIZE * TILE_SIZE).clamp(max=longest)
        if rounded and longest >= TILE_SIZE
        else made
    )


def drawn_offsets(documents: int, total: int, random: torch.Generator) -> Tensor:
    """The starts of documents, with empty ones among them and at times a rest that belongs to none."""
    ends = torch.randint(0, total + 1, (documents,), generator=random, device="cpu").sort().values
    return torch.cat((torch.zeros(1, dtype=ends.dtype, device="cpu"), ends)).to(torch.int32)

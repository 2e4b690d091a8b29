"""Problems of attention as a Hypothesis strategy: sizes, dtypes, masks, biases and all else."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from ..backends import get
from ..backends.limits import Limits
from ..problem.masks import join_masks
from ..problem.sizes import check_sizes, is_size
from ..problem.spec import AttentionSpec
from ..problem.wording import spell
from .choice import Choices, Choose
from .drawn_biases import biases
from .drawn_masks import drawn_pages, drawn_step, masks
from .paste import pasted
from .record import placed
from .values import DRAWN_HEAD_DIMS, LONGEST, SEEDS, TILE_SIZE, generator, numbers

MOSTLY_SHORTER = 24
"""The most queries and keys of most problems."""
EDGES = (65, 66, 130, 64, 100, 127, 128, 129, 150, 192, 200, 255, 256, 257, 63, 260, 300)
"""Lengths around the tiles that kernels work in; the first few show what goes wrong in a second or third tile."""
AXES = {None: 4, "batch": 2, "heads_kv": 1, "group": 2, "keys": 4, "queries": 3, "both": 3}
STRETCHED = tuple(axis for axis, often in AXES.items() for _ in range(often))
"""The axis that is longer than it mostly is; the others are short beside it, for the sake of time."""
EMPTY = (*(None,) * 37, "batch", "seqlen_q", "seqlen_k")
"""Which axis is as short as the limits allow, 0 where they can: one problem in thirteen."""
PAGES = ((*(0,) * 24, 1, 2, 3, 16), (0, 0, 0, 1))
"""Keys of a page, 0 where keys lie in rows: of any size; and in steps of those that a backend takes."""
DROPOUT = (*(0.0,) * 16, 0.5, 0.5, 0.1, 0.9, 1.0)


class DrawnSpec(AttentionSpec):
    """A drawn problem: its repr is an expression that builds it again."""

    def __repr__(self) -> str:
        return pasted(self)

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))


def specs(
    *,
    limits: Limits | None = None,
    device: torch.device | str | None = None,
    head_dims: Sequence[int] = DRAWN_HEAD_DIMS,
    longest: int = LONGEST,
) -> st.SearchStrategy[AttentionSpec]:
    """Problems: sizes (0 and 1 among them), dtypes, grouped heads, masks, biases, softcap, sinks, dropout, gradients.

    Args:
        limits: a backend's, to keep the draw to what that backend serves; without it every problem may come.
        device: where the problems live.
        head_dims: the head dims that are drawn, as far as the limits take them; those beyond 64 now and then.
        longest: the most queries and keys. Most problems have at most 24.

    Raises:
        TypeError, ValueError: an argument that nothing can be drawn of.
    """
    if limits is not None and not isinstance(limits, Limits):
        raise TypeError(f"limits must be a Limits, such as get(name).limits, or None, got {spell(limits)}.")
    check_sizes(longest=longest)
    head_dims = tuple(head_dims)
    if not head_dims or not all(map(is_size, head_dims)):
        raise ValueError(f"head_dims must be whole numbers of at least 1, got {head_dims!r}.")
    return drawn_specs(get("naive").limits if limits is None else limits, placed(device), head_dims, longest)


@st.composite
def drawn_specs(
    draw: st.DrawFn, limits: Limits, device: torch.device, head_dims: Sequence[int], longest: int
) -> AttentionSpec:
    """The same, given everything."""
    choose = Choices(draw, "problem")
    features = limits.features - limits.not_on.get(device.type, frozenset())
    stretched = choose(STRETCHED)
    page_size = limits.page_step * choose(PAGES[limits.page_step > 1]) if "pages" in features else 0
    page_size = page_size if page_size <= longest else 0
    sizes = drawn_sizes(choose, limits, "gqa" in features, stretched, longest, cheap=device.type != "cpu")
    heads_kv = sizes.pop("heads_kv")
    empty = choose(EMPTY)
    if empty is not None:
        sizes[empty] = limits.batch_min if empty == "batch" else limits.seqlen_min
    if page_size:
        sizes["seqlen_k"] = min(-(-sizes["seqlen_k"] // page_size), longest // page_size) * page_size
    few = stretched == "both" and device.type == "cpu"
    head_dim, other = (drawn_head_dim(choose, limits, head_dims, few) for _ in range(2))
    head_dim_v = choose((head_dim, other)) if "head_dim_v" in features else head_dim
    dtype = choose(limits.dtypes)
    needs_grad = "backward" in features and choose((False, True, True, True))
    readable = sizes["seqlen_k"] <= 4 * head_dim_v  # in so many calls are dropped weights read
    dropout_p = choose(DROPOUT) if "dropout" in features and readable and not page_size else 0.0
    need_lse = "lse" in features and choose((False, True) if dropout_p else (False, True, True))
    more: dict[str, Any] = sizes
    mask = draw(masks(**sizes, features=features, device=device))
    if page_size:
        lengths = {"batch": sizes["batch"], "seqlen_k": sizes["seqlen_k"]}
        if features.issuperset(("cache", "key_lengths")) and choose((False, True, True)):
            mask = drawn_step(choose, **lengths, seqlen_q=sizes["seqlen_q"], features=features, where=device)
        pages = drawn_pages(choose, generator(choose(SEEDS)), **lengths, page_size=page_size, where=device)
        mask = join_masks(mask, pages)
    return DrawnSpec(
        **more,
        heads_kv=heads_kv,
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        dtype=dtype,
        device=device,
        mask=mask,
        bias=draw(biases(**sizes, dtype=dtype, needs_grad=needs_grad, features=features, device=device)),
        softcap=choose((None, None, None, 1.0, 20.0)) if "softcap" in features else None,
        sinks=drawn_sinks(choose, sizes["heads"], needs_grad, device) if "sinks" in features else None,
        softmax_scale=choose((None, None, 0.05, 1.0)),
        dropout_p=dropout_p,
        needs_grad=needs_grad,
        need_lse=need_lse and not (needs_grad and "lse_grad" not in features),
        deterministic=needs_grad and "deterministic" in features and choose((False, False, True)),
    )


def drawn_sizes(
    choose: Choose, limits: Limits, grouped: bool, stretched: str | None, longest: int, cheap: bool
) -> dict[str, int]:
    """Batch, heads and lengths; one axis may be stretched, which costs little on some devices."""
    least, short = max(1, limits.seqlen_min), min(MOSTLY_SHORTER, longest)
    long = [size for size in EDGES if short < size <= longest]
    long_q = long if cheap else [size for size in long if size <= longest // 2]
    lengthy = stretched in ("keys", "queries", "both")
    most = short if cheap or stretched is None else 9 if lengthy else 14
    beside = range(least, max(least, min(short, most)) + 1)
    few = (1, 2, 3) if cheap or stretched is None else (1, 2)
    alone = few[:1] if stretched == "both" and not cheap else few
    seqlen_q = choose(longer(beside, long_q, stretched in ("queries", "both")))
    seqlen_k = choose(longer(beside, long, stretched in ("keys", "both")))
    equal = choose((True, False, False)) and not (lengthy and long)
    heads_kv = choose((1, 2, 2) if stretched == "group" else longer(alone, (4, 5, 8, 9), stretched == "heads_kv"))
    group = choose(longer(few, (4, 5, 7, 8), stretched == "group"))
    batch = choose(longer((1, 2, 1, *few[2:]), (4, 5, 6), stretched == "batch"))
    return {
        "batch": max(batch if len(alone) > 1 else 1, limits.batch_min),
        "heads": heads_kv * (group if grouped else 1),
        "heads_kv": heads_kv,
        "seqlen_q": seqlen_q,
        "seqlen_k": seqlen_q if equal else seqlen_k,
    }


def longer(usual: Sequence[int], long: Sequence[int], wanted: bool) -> Sequence[int]:
    """The usual sizes, and where they are wanted six times as many long ones; behind them, so that a size shrinks."""
    times = math.ceil(6 * len(usual) / len(long)) if wanted and long else 0
    return (*usual, *tuple(long) * times)


def drawn_head_dim(choose: Choose, limits: Limits, head_dims: Sequence[int], few: bool) -> int:
    """A head dim inside the limits; a large one where not few are wanted, and where there is no other."""
    largest = max(head_dims) if limits.head_dim is None else limits.head_dim
    fit = [d for d in head_dims if limits.head_dim_min <= d <= largest and d % limits.head_dim_step == 0]
    small, large = [d for d in fit if d <= TILE_SIZE], [d for d in fit if d > TILE_SIZE]
    if small and large:
        fit = large if choose((False,) * 4 + (True,)) and not few else small
    size: int = choose(fit)
    return size


def drawn_sinks(choose: Choose, heads: int, needs_grad: bool, device: torch.device) -> Tensor | None:
    """Sinks of a middle size or, among them, very large and very negative ones; they may want a gradient."""
    kind = choose((None, None, "normal", "normal", "wide"))
    if kind is None:
        return None
    return sink_values(choose(SEEDS), heads, device, kind, learned=needs_grad and choose((False, True)))


def sink_values(seed: int, heads: int, device: torch.device, kind: str = "normal", *, learned: bool = False) -> Tensor:
    return numbers(seed, kind, heads, device=device).requires_grad_(learned)

"""Problems of attention as Hypothesis strategies: sizes, masks, biases, and whole specs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from ..backends import get
from ..backends.base import FEATURES, HALF, Limits
from ..problem.masks import (
    ALIGNMENTS,
    Dense,
    Documents,
    KeyLengths,
    KeyPadding,
    Mask,
    MaskMod,
    Rule,
    Window,
    causal,
    joined,
)
from ..problem.scores import ALiBi, Bias, RelativeBias, TensorBias
from ..problem.spec import AttentionSpec
from .choice import Choices, Choose
from .paste import pasted
from .record import placed
from .values import DRAWN_HEAD_DIMS, LONGEST, NUMBER_KINDS, SEEDS, coins, generator, numbers, seeds, tensors

__all__ = ["biases", "masks", "seeds", "specs", "tensors"]

MASK_KINDS = {
    "causal": 2,
    "window": 3,  # two bounds
    "key_padding": 2,
    "key_lengths": 3,
    "dense_mask": 2,
    "rule": 1,
    "documents": 4,  # only a batch of 1 can hold them
}
"""Kinds of masks, and how many problems in six have one, of those that may have several."""
TILE_SIZE = 64
"""Features and rows that a kernel takes at once; a longer problem is what it puts together."""
MOSTLY_SHORTER = 24
"""The most queries and keys of most problems."""
EDGES = (65, 66, 130, 64, 100, 127, 128, 129, 150, 192, 200, 255, 256, 257, 63, 260, 300)
"""Lengths around the tiles that kernels work in; the first few show what goes wrong in a second or third tile."""
AXES = {None: 4, "batch": 2, "heads_kv": 1, "group": 2, "keys": 4, "queries": 3, "both": 3}
STRETCHED = tuple(axis for axis, often in AXES.items() for _ in range(often))
"""The axis that is longer than it mostly is; the others are short beside it, for the sake of time."""
EMPTY = (*(None,) * 37, "batch", "seqlen_q", "seqlen_k")
"""Which axis is as short as the limits allow, 0 where they can: one problem in thirteen."""
WINDOW_REACH = (0, 1, 2, 3, 5)
"""How far a window may reach, where it ends at all."""
FAR_REACH = (63, 64, 100, 128)
"""How far it may reach in a long problem, beside that."""
BIASES = (*("none",) * 3, *("tensor",) * 4, *("alibi",) * 3, *("relative",) * 2)
DROPOUT = (*(0.0,) * 16, 0.5, 0.5, 0.1, 0.9, 1.0)


class DrawnSpec(AttentionSpec):
    """A drawn problem: its repr is an expression that builds it again."""

    def __repr__(self) -> str:
        return pasted(self)

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))


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
    how = choose(("none", "several", "several", "one", "one")) if kinds else "none"
    chosen: list[str] = []
    if how == "one":
        often = ["causal"] * 2 + (["window", "key_lengths"] * 3 if longest >= TILE_SIZE else [])
        chosen = [choose(kinds + [kind for kind in often if kind in kinds])]
    elif how == "several":
        chosen = [kind for kind in kinds if choose(range(6)) > 5 - MASK_KINDS[kind]]
    if "causal" in chosen and "window" in features and choose((False, True)):
        chosen[chosen.index("causal")] = "top-left causal"
    sizes = {"batch": batch, "heads": heads, "seqlen_q": seqlen_q, "seqlen_k": seqlen_k}
    ends = (*WINDOW_REACH, longest, None, *(2 * FAR_REACH if longest >= TILE_SIZE else ()))
    return joined(
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
    """A mask of one kind out of ``MASKS``, or ``top-left causal``, or ``mask for all heads``.

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


def drawn_lengths(batch: int, longest: int, random: torch.Generator, rounded: bool) -> Tensor:
    """Numbers of keys; rounded to whole tiles where there is one."""
    made = torch.randint(0, longest + 1, (batch,), generator=random, device="cpu")
    return (
        ((made + TILE_SIZE // 2) // TILE_SIZE * TILE_SIZE).clamp(max=longest)
        if rounded and longest >= TILE_SIZE
        else made
    )


def drawn_offsets(documents: int, total: int, random: torch.Generator) -> Tensor:
    """Where documents start, with empty ones among them and at times a rest that belongs to none."""
    ends = torch.randint(0, total + 1, (documents,), generator=random, device="cpu").sort().values
    return torch.cat((torch.zeros(1, dtype=ends.dtype, device="cpu"), ends)).to(torch.int32)


@st.composite
def biases(
    draw: st.DrawFn,
    *,
    batch: int,
    heads: int,
    seqlen_q: int,
    seqlen_k: int,
    dtype: torch.dtype,
    needs_grad: bool,
    features: frozenset[str] = frozenset(FEATURES),
    device: torch.device | str | None = None,
) -> Bias | None:
    """Biases of every kind out of ``features``, one or two; what they hold may be ``-inf``, and want a gradient."""
    choose = Choices(draw, "bias")
    first, learns = choose(BIASES), needs_grad and "bias_grad" in features
    second = choose((*("none",) * 5, "tensor", "alibi", "relative")) if first != "none" else "none"
    sizes = {"batch": batch, "heads": heads, "seqlen_q": seqlen_q, "seqlen_k": seqlen_k}
    bias: Bias | None = None
    for kind in (first, second):
        if kind != "none" and ("alibi" if kind == "alibi" else "bias") in features:
            learned = learns and choose((False, True, True))
            more: dict[str, Any] = {
                **sizes,
                "dtype": dtype,
                "learned": learned,
                "first": bias is None,
                "device": device,
            }
            part = drawn_bias(kind, choose, choose(SEEDS), **more)
            bias = part if bias is None else bias + part
    return bias


def drawn_bias(
    kind: str,
    choose: Choose,
    seed: int,
    *,
    batch: int,
    heads: int,
    seqlen_q: int,
    seqlen_k: int,
    dtype: torch.dtype,
    learned: bool,
    first: bool = True,
    device: torch.device | str | None = None,
) -> Bias:
    """A bias of one kind: ``tensor``, ``relative`` or ``alibi``; only the first of a sum may hide a key, or seem to."""
    if kind == "alibi":
        shape = choose(((heads,), (batch, heads), (batch, heads)))
        return ALiBi(numbers(seed, "slopes", *shape, device=device).requires_grad_(learned))
    if kind == "relative":
        width = 2 * choose((0, 1, 2, 3, 4, TILE_SIZE)) + 1
        return RelativeBias(numbers(seed, "normal", heads, width, device=device).requires_grad_(learned))
    strange: tuple[str, ...] = (*NUMBER_KINDS[3:], "low", "low", "lowest", "lowest") if first else ()
    of = choose(("normal", "normal", "normal", *strange))
    shape = [choose((1, batch)), choose((1, heads)), choose((seqlen_q,) * 3 + (1,)), seqlen_k]
    if of in ("normal", "hidden") and not learned:  # what moves a whole row has no gradient but of what cancels
        shape[-1] = choose((seqlen_k, 1))
    finer = dtype in HALF and choose((False, True))
    tensor = numbers(seed, of, *shape, dtype=torch.float32 if finer else dtype, device=device)
    return TensorBias(tensor.requires_grad_(learned))


@st.composite
def specs(
    draw: st.DrawFn,
    *,
    limits: Limits | None = None,
    device: torch.device | str | None = None,
    head_dims: Sequence[int] = DRAWN_HEAD_DIMS,
    longest: int = LONGEST,
) -> AttentionSpec:
    """Problems: sizes (0 and 1 among them), dtypes, grouped heads, masks, biases, softcap, sinks, dropout, gradients.

    Args:
        limits: a backend's, to keep the draw to what that backend serves; without it every problem may come.
        device: where the problems live.
        head_dims: the head dims that are drawn, as far as the limits take them; those beyond 64 now and then.
        longest: the most queries and keys. Most problems have at most 24.
    """
    choose = Choices(draw, "problem")
    limits = get("naive").limits if limits is None else limits
    device = placed(device)
    features = limits.features - limits.not_on.get(device.type, frozenset())
    stretched = choose(STRETCHED)
    sizes = drawn_sizes(choose, limits, "gqa" in features, stretched, longest, cheap=device.type != "cpu")
    heads_kv = sizes.pop("heads_kv")
    empty = choose(EMPTY)
    if empty is not None:
        sizes[empty] = limits.batch_min if empty == "batch" else limits.seqlen_min
    few = stretched == "both" and device.type == "cpu"
    head_dim, other = (drawn_head_dim(choose, limits, head_dims, few) for _ in range(2))
    head_dim_v = choose((head_dim, other)) if "head_dim_v" in features else head_dim
    dtype = choose(limits.dtypes)
    needs_grad = "backward" in features and choose((False, True, True, True))
    readable = sizes["seqlen_k"] <= 4 * head_dim_v  # in so many calls are dropped weights read
    dropout_p = choose(DROPOUT) if "dropout" in features and readable else 0.0
    need_lse = "lse" in features and choose((False, True) if dropout_p else (False, True, True))
    more: dict[str, Any] = sizes
    return DrawnSpec(
        **more,
        heads_kv=heads_kv,
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        dtype=dtype,
        device=device,
        mask=draw(masks(**sizes, features=features, device=device)),
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

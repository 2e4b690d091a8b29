"""Biases as Hypothesis strategies: every kind, one or two, learned or not."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st

from ..backends.limits import FEATURES, HALF
from ..problem.scores import ALiBi, Bias, RelativeBias, TensorBias
from .choice import Choices, Choose
from .values import NUMBER_KINDS, SEEDS, TILE_SIZE, numbers

BIASES = (*("none",) * 3, *("tensor",) * 4, *("alibi",) * 3, *("relative",) * 2)


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

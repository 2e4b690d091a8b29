"""Values of drawn tensors: functions of a seed, so that a failure can name them in a line."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..problem.spec import AttentionSpec
from .record import DRAWN, placed

if TYPE_CHECKING:
    from hypothesis import strategies as st

TILE_SIZE = 64
"""Features and rows that a kernel takes at once; a longer problem is what it puts together."""
SEEDS = range(2**16)
"""The seeds that problems are made of."""
DRAWN_HEAD_DIMS = (1, 3, 8, 16, 20, 40, 64, 72, 96, 100, 128, 192, 256)
"""The head dims that are drawn unless others are named."""
LONGEST = 260
"""The most queries and keys of any problem."""
HEAD_LAYOUTS = ("contiguous", "heads first", "packed", "expanded")
"""How the memory of q, k and v may lie: as named, as SDPA's transposed, as slices of one tensor, with a stride of 0."""
SCORES = ("plain", "plain", "plain", "near zero", "wide", "low", "high")
"""Regimes of scores: as q and k make them, near zero, from -100 to 100, and all far below 0 or above it."""
SPREAD = {"near zero": 1e-3, "wide": 30.0}
LEVEL = {"low": -1.0, "high": 1.0}
FAR, FARTHER = 130.0, 780.0
"""How far that is, the second in float64: the exponential without a maximum taken off is 0 or infinite there.

Farther ones would be no fair test: kernels keep a row's log-sum-exp, whose rounding is an error of all its weights.
Gradients in float64 are held to a bound that such a rounding passes, so their scores stay as they are; those in half
precision do not get wide ones, since kernels take them off a rounded output where the definition has weights of 1.
"""
NUMBER_KINDS = ("normal", "wide", "slopes", "hidden", "low", "lowest")
"""Kinds of drawn numbers."""
LOW = {"low": -1e9, "lowest": -math.inf}
"""What hides a key by convention and is a number all the same; the lowest is that of the dtype.

Not -1e4, beside which float32 keeps three digits of a score: a kernel that computes scores again in its backward rounds
some of them another way, and would be blamed for it.
"""


def seeds(scores: str | None = None) -> st.SearchStrategy[int]:
    """Seeds of the tensors of one problem; ``scores`` is a regime out of ``SCORES``, default any."""
    from hypothesis import strategies as st  # here alone: what else is in this file draws nothing

    if scores is None:
        return st.integers(0, len(SEEDS))
    if scores not in SCORES:
        raise ValueError(f"scores must be one of {', '.join(dict.fromkeys(SCORES))}, got {scores!r}.")
    place, period = SCORES.index(scores), len(SCORES)
    layouts = len(HEAD_LAYOUTS)
    return st.integers(0, len(SEEDS)).map(lambda n: (n // layouts * period + place) * layouts + n % layouts)


def coins(seed: int, share: float, *shape: int, device: torch.device | str | None = None) -> Tensor:
    """Bools of one seed, that share of them ``True``."""
    made = (torch.rand(shape, generator=generator(seed), **DRAWN) < share).to(placed(device))
    return noted(made, f"coins({', '.join(map(str, (seed, share, *shape)))}{device_argument(made)})")


def numbers(
    seed: int,
    kind: str,
    *shape: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Numbers of one seed, of a kind out of ``NUMBERS``.

    ``normal``; ``wide`` is 40 times that; ``slopes`` lie between 0 and 1. What is added to scores may be ``hidden``:
    some are ``-inf``, and whole rows. In ``low`` (-1e9) and ``lowest`` (the dtype's) one number of
    most rows is that low, and in most of them all there is beside ``-inf``: no other key takes its part there. Two in a
    row would not be told apart by their scores, which such numbers swallow.
    """
    random = generator(seed)
    made = torch.randn(shape, generator=random, dtype=torch.float64, device="cpu")
    if kind == "wide":
        made = 40 * made
    elif kind == "slopes":
        made = made.sigmoid()
    elif kind != "normal":
        made = lowered(made, kind, torch.finfo(dtype).min, random)
    made = made.to(placed(device), dtype)
    words = ", ".join((str(seed), repr(kind), *map(str, shape)))
    return noted(made, f"numbers({words}{'' if dtype == torch.float32 else f', dtype={dtype}'}{device_argument(made)})")


def lowered(made: Tensor, kind: str, least: float, random: torch.Generator) -> Tensor:
    """Some numbers and some rows that hide a key, or seem to."""

    def some(share: float, *shape: int) -> Tensor:
        return torch.rand(shape, generator=random, **DRAWN) < share

    rows = (*made.shape[:-1], 1)
    if kind == "hidden":
        return made.masked_fill(some(0.3, *made.shape) | some(0.15, *rows), -math.inf)
    if not made.numel():
        return made
    low = max(LOW[kind], least)
    one = torch.rand(made.shape, generator=random, **DRAWN).argmax(dim=-1, keepdim=True)
    beside = torch.where(some(0.7, *rows), -math.inf, made)
    return torch.where(some(0.85, *rows), beside.scatter(-1, one, low), made)


def generator(seed: int) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)


def device_argument(tensor: Tensor) -> str:
    return "" if tensor.device.type == "cpu" else f", device={str(tensor.device)!r}"


def noted(tensor: Tensor, expression: str) -> Tensor:
    """The tensor, which remembers the expression that makes it, as long as it is not written to."""
    tensor.flashmha_made = expression, tensor._version  # type: ignore[attr-defined]
    return tensor


def expression(tensor: Tensor) -> str | None:
    """The note on a tensor, or about the one of the same shape that it is a view of."""
    for one in (tensor, tensor._base):
        made: tuple[str, int] | None = getattr(one, "flashmha_made", None)
        if made is not None and one is not None and one.shape == tensor.shape and made[1] == one._version:
            return made[0]
    return None


def tensors(spec: AttentionSpec, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v of a problem, out of a seed that also says how their memory lies, and in which regime the scores are.

    See ``LAYOUTS`` and ``SCORES``.
    """
    random = generator(seed)
    layout, scores = HEAD_LAYOUTS[seed % len(HEAD_LAYOUTS)], SCORES[seed // len(HEAD_LAYOUTS) % len(SCORES)]

    def made(batch: int, seqlen: int, heads: int, head_dim: int, sign: float | None) -> Tensor:
        sizes = {
            "contiguous": (batch, seqlen, heads, head_dim),
            "heads first": (batch, heads, seqlen, head_dim),
            "packed": (batch, seqlen, heads + 1, head_dim),
            "expanded": (1, seqlen, heads, head_dim),
        }
        x = torch.randn(sizes[layout], generator=random, **DRAWN)
        if sign is not None:
            move_scores(x, scores, sign, spec)
        if layout == "heads first":
            x = x.transpose(1, 2)
        elif layout == "packed":
            x = x[:, :, 1:]
        elif layout == "expanded":
            x = x.expand(batch, -1, -1, -1)
        return x.to(device=spec.device, dtype=spec.dtype)

    keys = rows_of_keys(spec)
    return (
        made(spec.batch, spec.seqlen_q, spec.heads, spec.head_dim, math.copysign(1.0, LEVEL.get(scores, 1.0))),
        made(*keys, spec.heads_kv, spec.head_dim, 1.0),
        made(*keys, spec.heads_kv, spec.head_dim_v, None),
    )


def rows_of_keys(spec: AttentionSpec) -> tuple[int, int]:
    """The first two axes of k and v: (batch, seqlen_k), or (pages, page_size) of a pool that its table needs."""
    pages = spec.pages
    if pages is None:
        return spec.batch, spec.seqlen_k
    table = pages.block_table
    return 1 + int(table.max()) if table.numel() else 1, pages.page_size


def move_scores(x: Tensor, scores: str, sign: float, spec: AttentionSpec) -> None:
    """Write q or k for scores of a regime over normal numbers; a score adds up ``head_dim`` products of the two."""
    scale, size = abs(spec.scale), spec.head_dim
    exact = spec.dtype == torch.float64
    unfair = spec.needs_grad and (exact or (scores == "wide" and spec.dtype != torch.float32))
    if not scale or not size or unfair:
        return
    if scores in SPREAD:
        x.mul_(math.sqrt(SPREAD[scores] / (scale * math.sqrt(size))))
    elif scores in LEVEL:  # features of one sign, so little apart that a row's scores are so too
        far = FARTHER if exact else FAR
        x.mul_(1.5 * math.sqrt(size) / far).add_(sign).mul_(math.sqrt(far / (scale * size)))

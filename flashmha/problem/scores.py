"""Biases, added to a score before the softmax: tensors, ALiBi, relative position bias.

A score is ``softmax_scale * (q · k)``; then comes the softcap, ``cap * tanh(score / cap)``; then the bias of this
file; then the mask; and sinks join the softmax last, as one more column per head without a value:

    score = softmax_scale * q @ k.T
    score = softcap * tanh(score / softcap)
    score = score + bias
    p     = exp(score) / (exp(score).sum() + exp(sink))

Positions are those of ``masks``: the last query sits at the last key.

A key is hidden where the mask says so, or where the bias is ``-inf`` in the bias's own dtype. Every other number is one
to compute with, also beside heads whose dtype has no such number: scores are added to it in float32 at least, where
-1e9 swallows them, so that a row of nothing else gives the mean. A kernel that takes no finer dtype than the heads'
gets the numbers that ``narrow_bias`` gives.
"""

from __future__ import annotations

import abc
import functools
import math
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from ..host.torch_state import is_compiling, is_dense
from .bias_values import add_biases
from .positions import IndexGrid, Restarts, by_index, check_broadcast, find_device, look_up_in, narrowed_to
from .rebuilding import Rebuild, Several
from .sizes import check_sizes
from .wording import spell

ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
BIAS_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""Of biases and sinks."""


class Bias(abc.ABC):
    """Something added to every score; biases add with ``+``, also to a tensor or ``None``."""

    feature: ClassVar[str]
    by_distance: bool = False
    """It is the same wherever a query and a key stand that far apart, so that padding between items may be left out."""

    @abc.abstractmethod
    def bias_mod(self, seqlen_q: int, seqlen_k: int, documents: Restarts | None = None) -> ScoreMod:
        """The bias as a function of the indices (batch, head, q_idx, k_idx)."""

    def check(self, batch: int, heads: int, seqlen_q: int, seqlen_k: int) -> None:  # noqa: B027
        """Raise ``ValueError`` where the bias's own tensors do not fit the problem."""

    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors the bias holds."""
        return ()

    def flatten(self) -> tuple[tuple[Tensor, ...], Rebuild[Bias]]:
        """The tensors the bias holds, and what makes the same bias of others like them and holds none.

        A class whose constructor takes anything but its tensors, in their order, says more.
        """
        held, kind = self.tensors(), type(self)
        return held, (lambda tensors: kind(*tensors)) if held else (lambda tensors: self)

    @property
    def parts(self) -> tuple[Bias, ...]:
        """The biases that are added."""
        return (self,)

    @property
    def features(self) -> frozenset[str]:
        """The names of what a backend must be able to do for this bias; ``bias_grad`` where it wants a gradient."""
        names = [part.feature for part in self.parts]
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in self.tensors()):
            names.append("bias_grad")
        return frozenset(names)

    def __add__(self, other: Bias | Tensor | None) -> Bias:
        if other is None:
            return self
        other = TensorBias(other) if isinstance(other, Tensor) else other
        if not isinstance(other, Bias):
            return NotImplemented
        return Sum((*self.parts, *other.parts))

    __radd__ = __add__

    def materialize(
        self,
        batch: int,
        heads: int,
        seqlen_q: int,
        seqlen_k: int,
        device: torch.device | str | None = None,
        documents: Restarts | None = None,
        queries: range | None = None,
        keys: range | None = None,
    ) -> Tensor:
        """The bias as a tensor that broadcasts to (batch, heads, seqlen_q, seqlen_k), made where its tensors are.

        Of a range of queries or keys no more is made than broadcasts to it.
        """
        device = find_device(self.tensors()) if device is None else device
        return self.dense(IndexGrid(batch, heads, seqlen_q, seqlen_k, device, documents, queries, keys))

    def dense(self, grid: IndexGrid) -> Tensor:
        """The bias evaluated on a grid of indices."""
        made = self.bias_mod(grid.seqlen_q, grid.seqlen_k, grid.documents)(*grid.indices())
        return made if made.dim() else made.view(1, 1, 1, 1)  # the sum of single numbers


class TensorBias(Bias):
    """A tensor that broadcasts to (batch, heads, seqlen_q, seqlen_k); it may want a gradient.

    ``-inf`` hides a key, and a row of nothing else gives zeros.
    """

    __slots__ = ("tensor",)
    feature = "bias"

    def __init__(self, tensor: Tensor) -> None:
        if not is_dense(tensor) or tensor.dtype not in BIAS_DTYPES or not 2 <= tensor.dim() <= 4:
            hint = "; a bool tensor is a mask: Dense(tensor)" if getattr(tensor, "dtype", None) == torch.bool else ""
            raise ValueError(
                "bias must be a floating point tensor that broadcasts to (batch, heads, seqlen_q, seqlen_k), "
                f"got {spell(tensor)}{hint}."
            )
        self.tensor = tensor[(None,) * (4 - tensor.dim())]

    def check(self, batch: int, heads: int, seqlen_q: int, seqlen_k: int) -> None:
        check_broadcast("bias", self.tensor, (batch, heads, seqlen_q, seqlen_k))

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.tensor,)

    def bias_mod(self, seqlen_q: int, seqlen_k: int, documents: Restarts | None = None) -> ScoreMod:
        return look_up_in(self.tensor)

    def dense(self, grid: IndexGrid) -> Tensor:
        return narrowed_to(self.tensor, grid.queries, grid.keys)

    def __repr__(self) -> str:
        return f"TensorBias({tuple(self.tensor.shape)})"


class ALiBi(Bias):
    """``-slope[h] * |q_pos - k_pos|`` with ``slopes`` (heads,) or (batch, heads), float32 for flash-attn.

    ``ALiBi.usual(heads)`` has the slopes of the paper. Source: Press, Smith, Lewis, "Train Short, Test Long" (2022);
    the distance is flash-attn's, bottom-right.
    """

    __slots__ = ("slopes",)
    feature = "alibi"
    by_distance = True

    def __init__(self, slopes: Tensor) -> None:
        if not is_dense(slopes) or slopes.dtype not in BIAS_DTYPES or slopes.dim() not in (1, 2):
            raise ValueError(
                f"slopes must be a floating point tensor of shape (heads,) or (batch, heads), got {spell(slopes)}."
            )
        self.slopes = slopes

    @classmethod
    def usual(
        cls, heads: int, *, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
    ) -> ALiBi:
        """The slopes of the paper: ``2 ** (-8 * i / heads)`` for i from 1 on where ``heads`` is a power of two.

        Else those of the largest power of two below, and then every other one of twice that many heads.
        """
        check_sizes(heads=heads)
        power = 2 ** math.floor(math.log2(heads))
        slopes = [2.0 ** (-8 * place / power) for place in range(1, power + 1)]
        slopes += [2.0 ** (-4 * place / power) for place in range(1, 2 * (heads - power), 2)]
        return cls(torch.tensor(slopes, device=device, dtype=dtype))

    def check(self, batch: int, heads: int, seqlen_q: int, seqlen_k: int) -> None:
        want = (heads,) if self.slopes.dim() == 1 else (batch, heads)
        if self.slopes.shape != want:
            raise ValueError(f"slopes must have shape {want}, got {tuple(self.slopes.shape)}.")

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.slopes,)

    def bias_mod(self, seqlen_q: int, seqlen_k: int, documents: Restarts | None = None) -> ScoreMod:
        def distance(batch: Tensor, head: Tensor, q_pos: Tensor, k_pos: Tensor) -> Tensor:
            slope = self.slopes[head] if self.slopes.dim() == 1 else self.slopes[batch, head]
            return -slope * (q_pos - k_pos).abs()

        return by_index(distance, seqlen_q, seqlen_k, documents, "bottom_right")

    def __repr__(self) -> str:
        return f"ALiBi({tuple(self.slopes.shape)})"


def slide(line: Tensor, rows: int, columns: int) -> Tensor:
    """Windows (heads, rows, columns) of lines (heads, rows + columns): the first starts at 1, each next one further."""
    if not is_compiling():
        return line.unfold(-1, columns, 1).narrow(1, 1, rows)
    # unfold binds a graph to its size: the line again and again, end to end, and cut into rows of one number more
    line = line[:, 1:]
    width = line.shape[1]
    again = line[:, None].expand(-1, rows + 1, -1).flatten(1)[:, : rows * (width + 1)]
    return again.view(-1, rows, width + 1).narrow(2, 0, columns)


class RelativeBias(Bias):
    """A learned table by distance: ``table[h, clamp(k_pos - q_pos, -reach, reach) + reach]``.

    ``table`` is (heads, 2 * reach + 1); it may want a gradient. Source: Shaw, Uszkoreit, Vaswani, "Self-Attention
    with Relative Position Representations" (2018), with one number in place of a vector.
    """

    __slots__ = ("table",)
    feature = "bias"
    by_distance = True

    def __init__(self, table: Tensor) -> None:
        if not is_dense(table) or table.dtype not in BIAS_DTYPES or table.dim() != 2 or table.shape[1] % 2 == 0:
            raise ValueError(
                f"table must be a floating point tensor of shape (heads, 2 * reach + 1), got {spell(table)}."
            )
        self.table = table

    def check(self, batch: int, heads: int, seqlen_q: int, seqlen_k: int) -> None:
        if self.table.shape[0] != heads:
            raise ValueError(f"table must have one row a head, {heads}, got shape {tuple(self.table.shape)}.")

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.table,)

    def bias_mod(self, seqlen_q: int, seqlen_k: int, documents: Restarts | None = None) -> ScoreMod:
        reach = self.table.shape[1] // 2

        def look_up(batch: Tensor, head: Tensor, q_pos: Tensor, k_pos: Tensor) -> Tensor:
            return self.table[head, (k_pos - q_pos).clamp(-reach, reach) + reach]

        return by_index(look_up, seqlen_q, seqlen_k, documents, "bottom_right")

    def dense(self, grid: IndexGrid) -> Tensor:
        _, _, seqlen_q, seqlen_k, _, documents, queries, keys = grid
        if documents is not None:  # distances start again
            return super().dense(grid)
        # no range of a size, which would bind a compiler's graph to it
        end, rows = (seqlen_q, seqlen_q) if queries is None else (queries.stop, len(queries))
        start, columns = (0, seqlen_k) if keys is None else (keys.start, len(keys))
        # a row is the one before it, one key further on: windows of one line of distances, which takes no index for
        # every score, nor a sum by index in a backward
        reach, first = self.table.shape[1] // 2, start - end - (seqlen_k - seqlen_q)
        distances = torch.arange(first, first + rows + columns, device=self.table.device).clamp(-reach, reach)
        line = self.table[:, distances + reach]
        return slide(line, rows, columns)[None].flip(-2)

    def __repr__(self) -> str:
        return f"RelativeBias({tuple(self.table.shape)})"


class Sum(Several[Bias], Bias):
    """Several biases added; made by ``+``."""

    @property
    def by_distance(self) -> bool:  # type: ignore[override]
        return all(part.by_distance for part in self._parts)

    def bias_mod(self, seqlen_q: int, seqlen_k: int, documents: Restarts | None = None) -> ScoreMod:
        mods = [part.bias_mod(seqlen_q, seqlen_k, documents) for part in self._parts]

        def total(batch: Tensor, head: Tensor, q_idx: Tensor, k_idx: Tensor) -> Tensor:
            bias = mods[0](batch, head, q_idx, k_idx)
            for mod in mods[1:]:
                bias = add_biases(bias, mod(batch, head, q_idx, k_idx))
            return bias

        return total

    def dense(self, grid: IndexGrid) -> Tensor:
        return functools.reduce(add_biases, [part.materialize(*grid) for part in self._parts])

    def __repr__(self) -> str:
        return " + ".join(map(repr, self._parts))

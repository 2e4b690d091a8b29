"""What is added to a score before the softmax: tensors, ALiBi, relative position bias.

A score is ``softmax_scale * (q · k)``; then comes the softcap, ``cap * tanh(score / cap)``; then the bias of this
file; then the mask; and sinks join the softmax last, as one more column per head that nobody reads:

    score = softmax_scale * q @ k.T
    score = softcap * tanh(score / softcap)
    score = score + bias
    p     = exp(score) / (exp(score).sum() + exp(sink))

Positions are those of ``masks``: the last query sits at the last key.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from .masks import Documents, check_broadcast, index_grid, lookup, positional

ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Bias(abc.ABC):
    """Something added to every score; biases add with ``+``."""

    feature: ClassVar[str]

    @abc.abstractmethod
    def bias_mod(self, seqlen_q: int, seqlen_k: int, documents: Documents | None = None) -> ScoreMod:
        """What is added, as a function of the indices (batch, head, q_idx, k_idx)."""

    def check(self, batch: int, heads: int, seqlen_q: int, seqlen_k: int) -> None:  # noqa: B027
        """Raise ``ValueError`` where the bias's own tensors do not fit the problem."""

    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors the bias holds."""
        return ()

    @property
    def parts(self) -> tuple[Bias, ...]:
        """The biases that are added."""
        return (self,)

    @property
    def features(self) -> frozenset[str]:
        """What a backend must be able to do to serve this bias; ``bias_grad`` where it wants a gradient."""
        names = [part.feature for part in self.parts]
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in self.tensors()):
            names.append("bias_grad")
        return frozenset(names)

    def __add__(self, other: Bias) -> Bias:
        if not isinstance(other, Bias):
            return NotImplemented
        return Sum((*self.parts, *other.parts))

    def materialize(
        self,
        batch: int,
        heads: int,
        seqlen_q: int,
        seqlen_k: int,
        device: torch.device | str | None = None,
        documents: Documents | None = None,
    ) -> Tensor:
        """The bias as a tensor that broadcasts to (batch, heads, seqlen_q, seqlen_k)."""
        made = self.bias_mod(seqlen_q, seqlen_k, documents)(*index_grid(batch, heads, seqlen_q, seqlen_k, device))
        return made if made.dim() else made.view(1, 1, 1, 1)  # the sum of single numbers


class TensorBias(Bias):
    """A tensor that broadcasts to (batch, heads, seqlen_q, seqlen_k); it may want a gradient.

    ``-inf`` hides a key, and a row of nothing else gives zeros.
    """

    __slots__ = ("tensor",)
    feature = "bias"

    def __init__(self, tensor: Tensor) -> None:
        if not tensor.is_floating_point() or not 2 <= tensor.dim() <= 4:
            raise ValueError(
                "bias must be a floating point tensor that broadcasts to (batch, heads, seqlen_q, seqlen_k), "
                f"got {tensor.dtype} of shape {tuple(tensor.shape)}; a bool tensor is a mask: Dense(tensor)."
            )
        self.tensor = tensor[(None,) * (4 - tensor.dim())]

    def check(self, batch: int, heads: int, seqlen_q: int, seqlen_k: int) -> None:
        check_broadcast("bias", self.tensor, (batch, heads, seqlen_q, seqlen_k))

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.tensor,)

    def bias_mod(self, seqlen_q: int, seqlen_k: int, documents: Documents | None = None) -> ScoreMod:
        return lookup(self.tensor)

    def materialize(
        self,
        batch: int,
        heads: int,
        seqlen_q: int,
        seqlen_k: int,
        device: torch.device | str | None = None,
        documents: Documents | None = None,
    ) -> Tensor:
        return self.tensor

    def __repr__(self) -> str:
        return f"TensorBias({tuple(self.tensor.shape)})"


class ALiBi(Bias):
    """``-slope[h] * |q_pos - k_pos|`` with ``slopes`` (heads,) or (batch, heads), float32 for flash-attn.

    Source: Press, Smith, Lewis, "Train Short, Test Long" (2022); the distance is flash-attn's, bottom-right.
    """

    __slots__ = ("slopes",)
    feature = "alibi"

    def __init__(self, slopes: Tensor) -> None:
        if not slopes.is_floating_point() or slopes.dim() not in (1, 2):
            raise ValueError(
                "slopes must be a floating point tensor of shape (heads,) or (batch, heads), "
                f"got {slopes.dtype} of shape {tuple(slopes.shape)}."
            )
        self.slopes = slopes

    def check(self, batch: int, heads: int, seqlen_q: int, seqlen_k: int) -> None:
        want = (heads,) if self.slopes.dim() == 1 else (batch, heads)
        if self.slopes.shape != want:
            raise ValueError(f"slopes must have shape {want}, got {tuple(self.slopes.shape)}.")

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.slopes,)

    def bias_mod(self, seqlen_q: int, seqlen_k: int, documents: Documents | None = None) -> ScoreMod:
        def distance(batch: Tensor, head: Tensor, q_pos: Tensor, k_pos: Tensor) -> Tensor:
            slope = self.slopes[head] if self.slopes.dim() == 1 else self.slopes[batch, head]
            return -slope * (q_pos - k_pos).abs()

        return positional(distance, seqlen_q, seqlen_k, documents, "bottom_right")

    def __repr__(self) -> str:
        return f"ALiBi({tuple(self.slopes.shape)})"


class RelativeBias(Bias):
    """A learned table by distance: ``table[h, clamp(k_pos - q_pos, -reach, reach) + reach]``.

    ``table`` is (heads, 2 * reach + 1); it may want a gradient. Source: Shaw, Uszkoreit, Vaswani, "Self-Attention
    with Relative Position Representations" (2018), with one number in place of a vector.
    """

    __slots__ = ("table",)
    feature = "bias"

    def __init__(self, table: Tensor) -> None:
        if not table.is_floating_point() or table.dim() != 2 or table.shape[1] % 2 == 0:
            raise ValueError(
                "table must be a floating point tensor of shape (heads, 2 * reach + 1), "
                f"got {table.dtype} of shape {tuple(table.shape)}."
            )
        self.table = table

    def check(self, batch: int, heads: int, seqlen_q: int, seqlen_k: int) -> None:
        if self.table.shape[0] != heads:
            raise ValueError(f"table must have one row a head, {heads}, got shape {tuple(self.table.shape)}.")

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.table,)

    def bias_mod(self, seqlen_q: int, seqlen_k: int, documents: Documents | None = None) -> ScoreMod:
        reach = self.table.shape[1] // 2

        def look_up(batch: Tensor, head: Tensor, q_pos: Tensor, k_pos: Tensor) -> Tensor:
            return self.table[head, (k_pos - q_pos).clamp(-reach, reach) + reach]

        return positional(look_up, seqlen_q, seqlen_k, documents, "bottom_right")

    def __repr__(self) -> str:
        return f"RelativeBias({tuple(self.table.shape)})"


class Sum(Bias):
    """Several biases added; made by ``+``."""

    __slots__ = ("_parts",)

    def __init__(self, parts: tuple[Bias, ...]) -> None:
        self._parts = parts

    @property
    def parts(self) -> tuple[Bias, ...]:
        return self._parts

    def check(self, batch: int, heads: int, seqlen_q: int, seqlen_k: int) -> None:
        for part in self._parts:
            part.check(batch, heads, seqlen_q, seqlen_k)

    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(tensor for part in self._parts for tensor in part.tensors())

    def bias_mod(self, seqlen_q: int, seqlen_k: int, documents: Documents | None = None) -> ScoreMod:
        mods = [part.bias_mod(seqlen_q, seqlen_k, documents) for part in self._parts]

        def total(batch: Tensor, head: Tensor, q_idx: Tensor, k_idx: Tensor) -> Tensor:
            bias = mods[0](batch, head, q_idx, k_idx)
            for mod in mods[1:]:
                bias = bias + mod(batch, head, q_idx, k_idx)
            return bias

        return total

    def __repr__(self) -> str:
        return " + ".join(map(repr, self._parts))

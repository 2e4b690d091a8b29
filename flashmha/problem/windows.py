"""Windows: how far a query sees to either side; causality is one. And masks with their windows settled."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..host.torch_state import is_compiling
from .masks import Mask, combine
from .positions import ALIGNMENTS, MaskMod, Restarts, by_index


class Window(Mask):
    """Keys at most ``left`` positions before the query and ``right`` after it, both inclusive.

    ``None`` is unbounded, so ``Window(None, 0)`` is causal and ``Window(4, 0)`` sees the query's own key and four
    before it (flash-attn's convention; some libraries count the query itself among the window's size).
    """

    __slots__ = ("align", "left", "right")

    def __init__(self, left: int | None, right: int | None, *, align: str = "bottom_right") -> None:
        if align not in ALIGNMENTS:
            raise ValueError(f"align must be one of {ALIGNMENTS}, got {align!r}.")
        for name, bound in (("left", left), ("right", right)):
            if bound is not None and (not isinstance(bound, (int, torch.SymInt)) or bound < 0):
                raise ValueError(f"{name} must be an integer of at least 0, or None for unbounded, got {bound!r}.")
        self.left, self.right, self.align = left, right, align

    @property
    def feature(self) -> str:  # type: ignore[override]
        return "causal" if self.left is None and self.right == 0 else "window"

    @property
    def sizes(self) -> tuple[Any, ...]:
        """All that there is to know of the window."""
        return self.left, self.right, self.align

    def allowed(self, batch: Tensor, head: Tensor, q_pos: Tensor, k_pos: Tensor) -> Tensor:
        distance = k_pos - q_pos
        if self.right is None:
            return distance >= (distance if self.left is None else -self.left)
        seen = distance <= self.right
        return seen if self.left is None else seen & (distance >= -self.left)

    def mask_mod(self, seqlen_q: int, seqlen_k: int, documents: Restarts | None = None) -> MaskMod:
        return by_index(self.allowed, seqlen_q, seqlen_k, documents, self.align)

    def merged(self, other: Mask) -> Window | None:
        if not isinstance(other, Window) or self.align != other.align:
            return None
        both = Window(None, None, align=self.align)
        both.left, both.right = narrow_bound(self.left, other.left), narrow_bound(self.right, other.right)
        return both

    def hides_nothing(self, seqlen_q: int, seqlen_k: int, documents: Restarts | None) -> bool:
        if documents is not None or is_compiling():  # comparing lengths would bind a graph to them
            return self.left is None and self.right is None
        if self.left is not None and self.left < seqlen_k - 1:
            return False
        return self.right is None or self.right >= seqlen_q - 1

    def to_bottom_right(self, seqlen_q: int, seqlen_k: int) -> Window:
        """The same rule written for bottom-right positions; its bounds may become negative."""
        if self.align == "bottom_right":
            return self
        shift = seqlen_k - seqlen_q
        moved = Window(None, None)
        moved.left = None if self.left is None else self.left + shift
        moved.right = None if self.right is None else self.right - shift
        return moved

    def __repr__(self) -> str:
        align = "" if self.align == "bottom_right" else f", align={self.align!r}"
        if self.left is None and self.right == 0:
            return f"causal({align[2:]})"
        return f"Window({self.left}, {self.right}{align})"


def causal(*, align: str = "bottom_right") -> Window:
    """The window that hides the future: ``Window(None, 0)``."""
    return Window(None, 0, align=align)


def narrow_bound(one: int | None, two: int | None) -> int | None:
    """The smaller of two bounds of a window, of which ``None`` is none."""
    if one is None or two is None:
        return two if one is None else one
    return min(one, two)


def normalize(mask: Mask | None, seqlen_q: int, seqlen_k: int) -> Mask | None:
    """The mask for these lengths: windows bottom-right and merged, rules that hide nothing left out."""
    if mask is None:
        return None
    documents = mask.documents
    if documents is None and not any(isinstance(part, Window) for part in mask.parts):
        return mask
    if documents is None or documents.aligned:  # inside aligned documents both alignments are one
        shift = (seqlen_q, seqlen_k) if documents is None else (0, 0)
        mask = combine(tuple(part.to_bottom_right(*shift) if isinstance(part, Window) else part for part in mask.parts))
    left = tuple(part for part in mask.parts if not part.hides_nothing(seqlen_q, seqlen_k, documents))
    return combine(left) if left else None

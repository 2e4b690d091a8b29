"""Rules that a caller writes."""

from __future__ import annotations

from torch import Tensor

from .likeness import is_settled
from .masks import Mask, check_answer
from .positions import ALIGNMENTS, MaskMod, Restarts, by_index
from .wording import spell


class Rule(Mask):
    """Your own rule: ``fn(batch, head, q_pos, k_pos) -> bool``, on integer tensors that broadcast.

    Written with tensor operators (``&``, ``|``, ``~``, comparisons), as flex_attention wants it.
    """

    __slots__ = ("align", "fn")
    feature = "rule"

    def __init__(self, fn: MaskMod, *, align: str = "bottom_right") -> None:
        if align not in ALIGNMENTS:
            raise ValueError(f"align must be one of {ALIGNMENTS}, got {align!r}.")
        if not callable(fn):
            raise TypeError(f"fn must be a function of (batch, head, q_pos, k_pos), got {spell(fn)}.")
        self.fn, self.align = fn, align

    def mask_mod(self, seqlen_q: int, seqlen_k: int, documents: Restarts | None = None) -> MaskMod:
        return by_index(answering(self), seqlen_q, seqlen_k, documents, self.align)

    def may_change(self) -> bool:
        return not is_settled(self.fn)

    def __repr__(self) -> str:
        return f"Rule({getattr(self.fn, '__name__', 'fn')})"


def answering(rule: Rule) -> MaskMod:
    """The function of a rule, which raises where its answer is no bool tensor: a number is no mask."""
    fn = rule.fn

    def ask(batch: Tensor, head: Tensor, q_pos: Tensor, k_pos: Tensor) -> Tensor:
        return check_answer("fn", rule, fn(batch, head, q_pos, k_pos))

    return ask

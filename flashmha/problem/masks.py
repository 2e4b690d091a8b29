"""Masks: which query may look at which key, as rules that combine with ``&``.

A mask is a rule over positions, ``allowed(batch, head, q_pos, k_pos) -> bool``, and ``True`` means *may attend*
(the convention of flex_attention, flash-attn and ``scaled_dot_product_attention``; ``nn.MultiheadAttention`` says
the opposite, and the translation happens at the module's door and nowhere else).

Positions. Key ``j`` sits at position ``j``. Query ``i`` sits at ``i + seqlen_k - seqlen_q``: the last query meets
the last key, flash-attn's *bottom-right* alignment and the one a cache needs. PyTorch's ``is_causal`` is *top-left*
(query ``i`` at position ``i``); ``Window(..., align="top_left")`` says so, and the two differ whenever
``seqlen_q != seqlen_k``. Key padding and key lengths hide slots and move no position. Inside ``Documents`` positions
start again in every document.

    causal() & KeyLengths(lengths)              decoder with right padding
    Window(256, 0)                              256 keys back, and the query's own
    Documents(cu_seqlens) & causal()            many documents packed into one row ("varlen")
"""

from __future__ import annotations

import abc
import functools
import operator
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from ..host.torch_state import is_dense
from .positions import IndexGrid, MaskMod, Restarts, check_broadcast, find_device, look_up_in, narrowed_to
from .rebuilding import Rebuild, Several
from .sizes import check_sizes
from .wording import spell

Kind = TypeVar("Kind", bound="Mask")


A_RULE = "Rule(fn) says any pattern, with an fn(batch, head, q_pos, k_pos) that returns a bool tensor"


class Mask(abc.ABC):
    """A rule that says which query may look at which key; ``True`` = may attend.

    Combine rules with ``&``: windows merge into one window, equal kinds merge where they can. A query that may
    look at no key gives a row of zeros, and zero gradients, on every backend.
    """

    feature: ClassVar[str]
    documents: Restarts | None = None
    """The rule of where tokens stand, where that is not their slot: documents, or the positions of a cache."""

    @abc.abstractmethod
    def mask_mod(self, seqlen_q: int, seqlen_k: int, documents: Restarts | None = None) -> MaskMod:
        """The rule over *indices*, flex_attention's ``mask_mod(batch, head, q_idx, k_idx)``, for these lengths."""

    def check(self, batch: int, heads: int, seqlen_q: int, seqlen_k: int) -> None:  # noqa: B027
        """Raise ``ValueError`` where the mask's own tensors do not fit the problem."""

    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors the mask holds."""
        return ()

    def flatten(self) -> tuple[tuple[Tensor, ...], Rebuild[Mask]]:
        """The tensors the mask holds, and what makes the same mask of them again and holds none."""
        return (), lambda tensors: self

    def merged(self, other: Mask) -> Mask | None:
        """One rule that says what this and another say, where there is one."""
        return None

    def hides_nothing(self, seqlen_q: int, seqlen_k: int, documents: Restarts | None) -> bool:
        """The rule hides no key at these lengths, as far as that shows without a look at tensors."""
        return False

    def may_change(self) -> bool:
        """The rule reads something beside its tensors, which may be another when weights of the call are read."""
        return False

    @property
    def device(self) -> torch.device | None:
        """Where the mask's tensors are; ``None`` where it has none."""
        return find_device(self.tensors())

    @property
    def dtype(self) -> torch.dtype:
        """That of its values: with ``device`` and ``size`` all that ``nn.TransformerDecoder`` asks of a mask."""
        return torch.bool

    def size(self) -> torch.Size:
        """No axes, since a rule is of no length: not the size of the causal mask that torch compares it with."""
        return torch.Size(())

    @property
    def parts(self) -> tuple[Mask, ...]:
        """The rules that all have to hold."""
        return (self,)

    @property
    def features(self) -> frozenset[str]:
        """The names of what a backend must be able to do to serve this mask."""
        return frozenset([part.feature for part in self.parts])

    def __and__(self, other: Mask | Tensor) -> Mask:
        if isinstance(other, Tensor):
            other = Dense(other)
        if not isinstance(other, Mask):
            return NotImplemented
        return combine((*self.parts, *other.parts))

    __rand__ = __and__

    def __or__(self, other: object) -> Mask:
        raise TypeError(f"masks must be combined with &, got |; {A_RULE}, such as (k_pos <= q_pos) | (k_pos < 4).")

    __ror__ = __or__

    def __invert__(self) -> Mask:
        raise TypeError(f"a mask must be taken as it is, got ~; {A_RULE}, such as ~(k_pos <= q_pos).")

    def materialize(
        self,
        batch: int,
        heads: int,
        seqlen_q: int,
        seqlen_k: int,
        device: torch.device | str | None = None,
        queries: range | None = None,
        keys: range | None = None,
    ) -> Tensor:
        """The mask as a bool tensor that broadcasts to (batch, heads, seqlen_q, seqlen_k).

        Axes on which no rule depends have size 1. Without a ``device`` it is made where the mask's tensors are. Of a
        range of queries or keys no more is made than broadcasts to it.
        """
        device = find_device(self.tensors()) if device is None else device
        grid = IndexGrid(batch, heads, seqlen_q, seqlen_k, device, self.documents, queries, keys)
        return functools.reduce(operator.and_, [part.dense(grid) for part in self.parts])

    def dense(self, grid: IndexGrid) -> Tensor:
        """One rule evaluated on a grid of indices."""
        mod = self.mask_mod(grid.seqlen_q, grid.seqlen_k, grid.documents)
        return check_answer("mask_mod", self, mod(*grid.indices()))

    def picture(self, seqlen_q: int = 8, seqlen_k: int = 8, *, batch: int = 0, head: int = 0) -> str:
        """A small drawing for one batch item and head: one line a query, ``■`` may attend, ``·`` may not.

        Raises:
            ValueError: a length, a batch item or a head that the mask does not have.
        """
        sizes = {"seqlen_q": seqlen_q, "seqlen_k": seqlen_k, "batch": batch, "head": head}
        check_sizes(0, **sizes)
        if batch and "documents" in self.features:
            raise ValueError(f"batch must be 0 with Documents, which are packed into one item, got {batch}.")
        device = find_device(self.tensors()) or torch.device("cpu")
        try:
            item, one = (torch.tensor(place, device=device) for place in (batch, head))
            queries, keys = (torch.arange(size, device=device) for size in (seqlen_q, seqlen_k))
            seen = self.mask_mod(seqlen_q, seqlen_k)(item, one, queries[:, None], keys[None, :])
            rows = seen.expand(seqlen_q, seqlen_k).tolist()
        except (IndexError, RuntimeError) as error:
            said = ", ".join(f"{name}={size}" for name, size in sizes.items())
            raise ValueError(f"{', '.join(sizes)} must lie within the mask {self!r}, got {said}.") from error
        return "\n".join(" ".join("■" if allowed else "·" for allowed in row) for row in rows)


class Dense(Mask):
    """Any pattern: a bool tensor that broadcasts to (batch, heads, seqlen_q, seqlen_k), ``True`` = may attend.

    Two axes are (seqlen_q, seqlen_k), three (heads, seqlen_q, seqlen_k).
    """

    __slots__ = ("allowed",)
    feature = "dense_mask"

    def __init__(self, allowed: Tensor) -> None:
        if not is_dense(allowed) or allowed.dtype != torch.bool or not 2 <= allowed.dim() <= 4:
            raise ValueError(
                "a dense mask must be a bool tensor that broadcasts to (batch, heads, seqlen_q, seqlen_k), "
                f"True = may attend (what is added to the scores goes to bias=), got {spell(allowed)}."
            )
        self.allowed = allowed[(None,) * (4 - allowed.dim())]

    def check(self, batch: int, heads: int, seqlen_q: int, seqlen_k: int) -> None:
        hint = "; a padding mask (batch, seqlen_k) is KeyPadding(tensor)"
        check_broadcast("a dense mask", self.allowed, (batch, heads, seqlen_q, seqlen_k), hint)

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.allowed,)

    def flatten(self) -> tuple[tuple[Tensor, ...], Rebuild[Mask]]:
        return (self.allowed,), lambda tensors: Dense(*tensors)

    def mask_mod(self, seqlen_q: int, seqlen_k: int, documents: Restarts | None = None) -> MaskMod:
        return look_up_in(self.allowed)

    def dense(self, grid: IndexGrid) -> Tensor:
        return narrowed_to(self.allowed, grid.queries, grid.keys)

    def merged(self, other: Mask) -> Dense | None:
        return Dense(self.allowed & other.allowed) if isinstance(other, Dense) else None

    def __repr__(self) -> str:
        return f"Dense({tuple(self.allowed.shape)})"


class Intersection(Several[Mask], Mask):
    """Several rules that all have to hold; made by ``&``."""

    @property
    def documents(self) -> Restarts | None:  # type: ignore[override]
        for part in self._parts:
            if part.documents is not None:
                return part.documents
        return None

    def mask_mod(self, seqlen_q: int, seqlen_k: int, documents: Restarts | None = None) -> MaskMod:
        documents = self.documents
        mods = [part.mask_mod(seqlen_q, seqlen_k, documents) for part in self._parts]

        def every(batch: Tensor, head: Tensor, q_idx: Tensor, k_idx: Tensor) -> Tensor:
            allowed = mods[0](batch, head, q_idx, k_idx)
            for mod in mods[1:]:
                allowed = allowed & mod(batch, head, q_idx, k_idx)
            return allowed

        return every

    def __repr__(self) -> str:
        return " & ".join(map(repr, self._parts))


def check_answer(function: str, mask: Mask, answer: Any) -> Tensor:
    """What a mask's function answered; raise where that is no bool tensor, as a number is no mask."""
    if isinstance(answer, Tensor) and answer.dtype == torch.bool:
        return answer
    raise TypeError(
        f"{function} of {mask!r} must return a bool tensor, True = may attend (what is added to the scores goes to "
        f"bias=), got {spell(answer)}."
    )


def find_rule(mask: Mask | None, kind: type[Kind]) -> Kind | None:
    """The first rule of a kind in a mask."""
    if type(mask) is kind or isinstance(mask, kind):  # the second takes a step in Python
        return mask  # type: ignore[return-value]
    if mask is not None:
        for part in mask.parts:
            if isinstance(part, kind):
                return part
    return None


def join_masks(*masks: Mask | None) -> Mask | None:
    """``&`` of all that are there. (The Dynamo of torch 2.8 and 2.9 traces no ``&`` of objects.)"""
    parts = [part for mask in masks if mask is not None for part in mask.parts]
    return combine(tuple(parts)) if parts else None


def combine(parts: tuple[Mask, ...]) -> Mask:
    """The rules of ``&``, with equal kinds merged where one rule can say both."""
    merged: list[Mask] = []
    for part in parts:
        for place, earlier in enumerate(merged):
            both = earlier.merged(part)
            if both is not None:
                merged[place] = both
                break
        else:
            merged.append(part)
    return merged[0] if len(merged) == 1 else Intersection(tuple(merged))

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
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from ..host.torch_state import is_compiling, is_dense
from .positions import (
    ALIGNMENTS,
    MaskMod,
    Restarts,
    by_index,
    check_broadcast,
    find_device,
    index_grid,
    look_up_in,
    narrowed_to,
)
from .wording import spell

Kind = TypeVar("Kind", bound="Mask")
Rebuild = Callable[[Sequence[Tensor]], "Mask"]


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

    def flatten(self) -> tuple[tuple[Tensor, ...], Rebuild]:
        """The tensors the mask holds, and what makes the same mask of them again and holds none."""
        return (), lambda tensors: self

    def merged(self, other: Mask) -> Mask | None:
        """One rule that says what this and another say, where there is one."""
        return None

    def hides_nothing(self, seqlen_q: int, seqlen_k: int, documents: Restarts | None) -> bool:
        """The rule hides no key at these lengths, as far as that shows without a look at tensors."""
        return False

    def __getattr__(self, name: str) -> Any:
        hint = ""
        if name in ("device", "dtype"):
            hint = (
                ": torch looks whether it is causal, as of a tensor. Say is_causal=False beside a flashmha mask "
                "(src_is_causal, tgt_is_causal, memory_is_causal), or give a tensor."
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}{hint}")

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
        documents = self.documents
        tables = [part.dense(batch, heads, seqlen_q, seqlen_k, device, documents, queries, keys) for part in self.parts]
        return functools.reduce(operator.and_, tables)

    def dense(
        self,
        batch: int,
        heads: int,
        seqlen_q: int,
        seqlen_k: int,
        device: torch.device | str | None,
        documents: Restarts | None,
        queries: range | None = None,
        keys: range | None = None,
    ) -> Tensor:
        """One rule evaluated on the index grid, or on a part of it."""
        grid = index_grid(batch, heads, seqlen_q, seqlen_k, device, queries, keys)
        return self.mask_mod(seqlen_q, seqlen_k, documents)(*grid)

    def picture(self, seqlen_q: int = 8, seqlen_k: int = 8, *, batch: int = 0, head: int = 0) -> str:
        """A small drawing for one batch item and head: one line a query, ``■`` may attend, ``·`` may not.

        Raises:
            ValueError: a length, a batch item or a head that the mask does not have.
        """
        sizes = {"seqlen_q": seqlen_q, "seqlen_k": seqlen_k, "batch": batch, "head": head}
        for name, size in sizes.items():
            if type(size) is not int or size < 0:
                raise ValueError(f"{name} must be a whole number of at least 0, got {size!r}.")
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

    def flatten(self) -> tuple[tuple[Tensor, ...], Rebuild]:
        return (self.allowed,), lambda tensors: Dense(*tensors)

    def mask_mod(self, seqlen_q: int, seqlen_k: int, documents: Restarts | None = None) -> MaskMod:
        return look_up_in(self.allowed)

    def dense(self, *grid: Any) -> Tensor:
        return narrowed_to(self.allowed, *grid[-2:])

    def merged(self, other: Mask) -> Dense | None:
        return Dense(self.allowed & other.allowed) if isinstance(other, Dense) else None

    def __repr__(self) -> str:
        return f"Dense({tuple(self.allowed.shape)})"


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
        return by_index(self.fn, seqlen_q, seqlen_k, documents, self.align)

    def __repr__(self) -> str:
        return f"Rule({getattr(self.fn, '__name__', 'fn')})"


class Intersection(Mask):
    """Several rules that all have to hold; made by ``&``."""

    __slots__ = ("_parts",)

    def __init__(self, parts: tuple[Mask, ...]) -> None:
        self._parts = parts

    @property
    def parts(self) -> tuple[Mask, ...]:
        return self._parts

    @property
    def documents(self) -> Restarts | None:  # type: ignore[override]
        for part in self._parts:
            if part.documents is not None:
                return part.documents
        return None

    def check(self, batch: int, heads: int, seqlen_q: int, seqlen_k: int) -> None:
        for part in self._parts:
            part.check(batch, heads, seqlen_q, seqlen_k)

    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(tensor for part in self._parts for tensor in part.tensors())

    def flatten(self) -> tuple[tuple[Tensor, ...], Rebuild]:
        held = [part.flatten() for part in self._parts]
        counts = [len(tensors) for tensors, _ in held]
        rebuilds = [rebuild for _, rebuild in held]

        def again(tensors: Sequence[Tensor]) -> Mask:
            rest = iter(tensors)
            return Intersection(tuple(make([next(rest) for _ in range(n)]) for make, n in zip(rebuilds, counts)))

        return tuple(tensor for tensors, _ in held for tensor in tensors), again

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


def find_rule(mask: Mask | None, kind: type[Kind]) -> Kind | None:
    """The first rule of a kind in a mask."""
    if isinstance(mask, kind):
        return mask
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

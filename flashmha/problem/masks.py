"""Masks: which query may look at which key, as rules that combine with ``&``.

A mask is a rule over positions, ``allowed(batch, head, q_pos, k_pos) -> bool``, and ``True`` means *may attend*
(the convention of flex_attention, flash-attn and ``scaled_dot_product_attention``; ``nn.MultiheadAttention`` says
the opposite, and the translation happens at the module's door and nowhere else).

Positions. Key ``j`` sits at position ``j``. Query ``i`` sits at ``i + seqlen_k - seqlen_q``: the last query meets
the last key, flash-attn's *bottom-right* alignment and the one a cache needs. PyTorch's ``is_causal`` is *top-left*
(query ``i`` at position ``i``); ``Window(..., align="top_left")`` says so, and the two differ whenever
``seqlen_q != seqlen_k``. Key padding and key lengths hide slots and move nobody. Inside ``Documents`` positions
start again in every document.

    causal() & KeyLengths(lengths)              decoder with right padding
    Window(256, 0)                              256 keys back, and the query's own
    Documents(cu_seqlens) & causal()            many documents packed into one row ("varlen")
"""

from __future__ import annotations

import abc
import functools
import operator
from collections.abc import Callable, Hashable, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from ..host.torch_state import eager, is_compiling, is_dense, is_stream_capturing, readable
from .wording import told

M = TypeVar("M", bound="Mask")
T = TypeVar("T")
MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
Rebuild = Callable[[Sequence[Tensor]], "Mask"]
ALIGNMENTS = ("bottom_right", "top_left")


class Mask(abc.ABC):
    """A rule that says which query may look at which key; ``True`` = may attend.

    Combine rules with ``&``: windows merge into one window, equal kinds merge where they can. A query that may
    look at no key gives a row of zeros, and zero gradients, on every backend.
    """

    feature: ClassVar[str]

    @abc.abstractmethod
    def mask_mod(self, seqlen_q: int, seqlen_k: int, documents: Documents | None = None) -> MaskMod:
        """The rule over *indices*, flex_attention's ``mask_mod(batch, head, q_idx, k_idx)``, for these lengths."""

    def check(self, batch: int, heads: int, seqlen_q: int, seqlen_k: int) -> None:  # noqa: B027
        """Raise ``ValueError`` where the mask's own tensors do not fit the problem."""

    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors the mask holds."""
        return ()

    def flatten(self) -> tuple[tuple[Tensor, ...], Rebuild]:
        """The tensors the mask holds, and what makes the same mask of them again and holds none."""
        return (), lambda tensors: self

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
        """What a backend must be able to do to serve this mask."""
        return frozenset([part.feature for part in self.parts])

    def __and__(self, other: Mask | Tensor) -> Mask:
        if isinstance(other, Tensor):
            other = Dense(other)
        if not isinstance(other, Mask):
            return NotImplemented
        return combine((*self.parts, *other.parts))

    __rand__ = __and__

    def materialize(
        self, batch: int, heads: int, seqlen_q: int, seqlen_k: int, device: torch.device | str | None = None
    ) -> Tensor:
        """The mask as a bool tensor that broadcasts to (batch, heads, seqlen_q, seqlen_k).

        Axes on which no rule depends have size 1. Without a ``device`` it is made where the mask's tensors are.
        """
        device = home(self.tensors()) if device is None else device
        documents = find(self, Documents)
        tables = [part.dense(batch, heads, seqlen_q, seqlen_k, device, documents) for part in self.parts]
        return functools.reduce(operator.and_, tables)

    def dense(
        self,
        batch: int,
        heads: int,
        seqlen_q: int,
        seqlen_k: int,
        device: torch.device | str | None,
        documents: Documents | None,
    ) -> Tensor:
        """One rule evaluated on the whole index grid."""
        return self.mask_mod(seqlen_q, seqlen_k, documents)(*index_grid(batch, heads, seqlen_q, seqlen_k, device))

    def picture(self, seqlen_q: int = 8, seqlen_k: int = 8, *, batch: int = 0, head: int = 0) -> str:
        """A small drawing for one batch item and head: one line a query, ``■`` may attend, ``·`` may not.

        Raises:
            ValueError: a length, a batch item or a head that the mask does not have.
        """
        sizes = {"seqlen_q": seqlen_q, "seqlen_k": seqlen_k, "batch": batch, "head": head}
        for name, size in sizes.items():
            if type(size) is not int or size < 0:
                raise ValueError(f"{name} must be a whole number of at least 0, got {size!r}.")
        if batch and find(self, Documents) is not None:
            raise ValueError(f"batch must be 0 with Documents, which are packed into one item, got {batch}.")
        device = home(self.tensors()) or torch.device("cpu")
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

    def mask_mod(self, seqlen_q: int, seqlen_k: int, documents: Documents | None = None) -> MaskMod:
        return positional(self.allowed, seqlen_q, seqlen_k, documents, self.align)

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


class Padding(Mask):
    """Keys that are real and keys that are padding, and what was computed of them.

    A layer takes one as ``key_padding_mask``. What backends make of its tensor (lengths, an order, a table) is made
    once and kept on the object, so that all layers of a model share it that are handed one. It is made anew once the
    tensor has changed: on a CPU its values are compared, elsewhere its version and address. Copies keep nothing.
    """

    __slots__ = ("_kept", "_private", "lasts")
    _kept: Kept | None
    _private: bool
    lasts: bool
    """More calls than one have this rule: so have the caller's, and one of this package's own that was met before."""

    def real(self, seqlen_k: int) -> Tensor:
        """Which keys are real, (batch, seqlen_k) bool."""
        raise NotImplementedError

    def once(self, name: Hashable, make: Callable[[], T]) -> T:
        """What ``make`` computes of the tensor, made once a name for as long as the tensor and the stream are the same.

        Plain tensors outside autograd, whatever is on around the call. Nothing is kept of what a compiler, a transform
        or a CUDA graph records, but for an object of this package's own, which lives no longer than they do.
        """
        (held,) = self.tensors()
        if is_compiling() and self._private:  # made and used in one graph
            return self.kept_in(self._kept or Kept(held, 0, True), name, make)
        if not eager(held):
            return make()
        stream, captured = queue(held)
        if captured and not self._private:
            return plainly(make)
        kept = self._kept
        if kept is None or kept.stream != stream or not (self._private or kept.fits(held)):
            if not self._private and held.is_inference() and not compares(held):
                return plainly(make)  # such a tensor does not say when it changes
            kept = Kept(held, stream, self._private)
        return self.kept_in(kept, name, functools.partial(plainly, make))

    def kept_in(self, kept: Kept, name: Hashable, make: Callable[[], T]) -> T:
        self._kept = kept
        if name not in kept.values:
            kept.values[name] = make()
        found: T = kept.values[name]
        return found

    def own(self) -> Padding:
        """The same rule over a tensor that is not the caller's, who may change theirs."""
        return self if self._private else self.once("own", self.copied)

    def copied(self) -> Padding:
        tensors, again = self.flatten()
        twin = again([tensor.clone() for tensor in tensors])
        assert isinstance(twin, Padding)
        return private(twin)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self.tensors()


class Kept:
    """What was computed of a tensor, and how to tell that the tensor is another one since."""

    __slots__ = ("seen", "stream", "values", "version")

    def __init__(self, held: Tensor, stream: int, private: bool) -> None:
        self.values: dict[Hashable, Any] = {}
        self.stream, self.version = stream, 0
        self.seen: Tensor | None = None
        if private:
            return
        if compares(held):
            self.seen = plainly(held.clone)
        else:  # an alias, so that no other tensor gets this address
            self.seen, self.version = held.detach(), held._version

    def fits(self, held: Tensor) -> bool:
        """The tensor is what it was."""
        seen = self.seen
        if seen is None or seen.shape != held.shape or seen.device != held.device:
            return False
        if compares(held):
            return torch.equal(seen, held)
        return not held.is_inference() and held._version == self.version and held.data_ptr() == seen.data_ptr()


def compares(tensor: Tensor) -> bool:
    """A tensor's values tell whether it has changed: on a CPU, where NumPy may write, which moves no version."""
    return tensor.device.type == "cpu"


def queue(tensor: Tensor) -> tuple[int, bool]:
    """The stream that operators on a tensor join, 0 where there is one alone, and whether it is captured."""
    if not tensor.is_cuda:
        return 0, False
    return torch._C._cuda_getCurrentRawStream(tensor.get_device()), is_stream_capturing()


P = TypeVar("P", bound="Padding")


def private(rule: P) -> P:
    """A rule over a tensor that its maker alone holds, so that it cannot change."""
    rule._private, rule.lasts = True, False
    return rule


def plainly(make: Callable[[], T]) -> T:
    """What a function makes, as tensors that any later call may use."""
    with torch.inference_mode(False), torch.no_grad():
        return make()


class KeyPadding(Padding):
    """Keys that are real: ``valid`` is a bool tensor (batch, seqlen_k), ``True`` = may be attended to."""

    __slots__ = ("valid",)
    feature = "key_padding"

    def __init__(self, valid: Tensor) -> None:
        if not is_dense(valid) or valid.dtype != torch.bool or valid.dim() != 2:
            raise ValueError(
                f"valid must be a bool tensor of shape (batch, seqlen_k), True = may attend, got {told(valid)}."
            )
        self.valid = valid
        self._kept, self._private, self.lasts = None, False, True

    def real(self, seqlen_k: int) -> Tensor:
        return self.valid

    def check(self, batch: int, heads: int, seqlen_q: int, seqlen_k: int) -> None:
        if self.valid.shape != (batch, seqlen_k):
            raise ValueError(
                f"valid must have shape (batch, seqlen_k) = ({batch}, {seqlen_k}), got {tuple(self.valid.shape)}."
            )

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.valid,)

    def flatten(self) -> tuple[tuple[Tensor, ...], Rebuild]:
        return (self.valid,), lambda tensors: KeyPadding(*tensors)

    def mask_mod(self, seqlen_q: int, seqlen_k: int, documents: Documents | None = None) -> MaskMod:
        valid = self.valid
        return lambda batch, head, q_idx, k_idx: valid[batch, k_idx]

    def materialize(self, *grid: Any) -> Tensor:
        batch, seqlen_k = self.valid.shape
        return self.valid.view(batch, 1, 1, seqlen_k)

    def dense(self, *grid: Any) -> Tensor:
        return self.materialize()

    def __repr__(self) -> str:
        return f"KeyPadding({tuple(self.valid.shape)})"


class KeyLengths(Padding):
    """The first ``lengths[b]`` keys of each batch item are real: an integer tensor (batch,)."""

    __slots__ = ("lengths",)
    feature = "key_lengths"

    def __init__(self, lengths: Tensor) -> None:
        if not is_vector_of_integers(lengths):
            raise ValueError(f"lengths must be an int32 or int64 tensor of shape (batch,), got {told(lengths)}.")
        self.lengths = lengths
        self._kept, self._private, self.lasts = None, False, True

    def real(self, seqlen_k: int) -> Tensor:
        def table() -> Tensor:
            return torch.arange(seqlen_k, device=self.lengths.device) < self.lengths[:, None]

        return self.once(("real", seqlen_k), table)

    def check(self, batch: int, heads: int, seqlen_q: int, seqlen_k: int) -> None:
        if self.lengths.shape != (batch,):
            raise ValueError(f"lengths must have shape (batch,) = ({batch},), got {tuple(self.lengths.shape)}.")
        if not readable(self.lengths) or not batch:
            return
        shortest, longest = self.once("bounds", lambda: (int(self.lengths.min()), int(self.lengths.max())))
        if not 0 <= shortest <= longest <= seqlen_k:
            raise ValueError(f"lengths must lie between 0 and seqlen_k={seqlen_k}, got {self.lengths.tolist()}.")

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.lengths,)

    def flatten(self) -> tuple[tuple[Tensor, ...], Rebuild]:
        return (self.lengths,), lambda tensors: KeyLengths(*tensors)

    def mask_mod(self, seqlen_q: int, seqlen_k: int, documents: Documents | None = None) -> MaskMod:
        lengths = self.lengths
        return lambda batch, head, q_idx, k_idx: k_idx < lengths[batch]

    def __repr__(self) -> str:
        return f"KeyLengths({tuple(self.lengths.shape)})"


class Documents(Mask):
    """Documents packed end to end into one row (batch 1): nobody looks outside the own document ("varlen").

    ``cu_seqlens`` (documents + 1,) holds where each document starts, and the total at the end; ``cu_seqlens_k``
    does so for the keys where they differ. Tokens past the last offset belong to no document and see nothing.
    ``max_seqlen`` (``max_seqlen_k``) is the longest document as a host integer; kernels need it, and without it
    they have to ask the device. ``total`` (``total_k``) is the last offset as a host integer: where it is the number of
    tokens, nothing has to be done about tokens of no document, which takes ten operators on a GPU.
    """

    __slots__ = ("cu_seqlens", "cu_seqlens_k", "max_seqlen", "max_seqlen_k", "total", "total_k")
    feature = "documents"

    def __init__(
        self,
        cu_seqlens: Tensor,
        cu_seqlens_k: Tensor | None = None,
        *,
        max_seqlen: int | None = None,
        max_seqlen_k: int | None = None,
        total: int | None = None,
        total_k: int | None = None,
    ) -> None:
        both = (("cu_seqlens", cu_seqlens), ("cu_seqlens_k", cu_seqlens if cu_seqlens_k is None else cu_seqlens_k))
        for name, offsets in both:
            if not is_vector_of_integers(offsets) or offsets.shape[0] < 2:
                raise ValueError(
                    f"{name} must be an int32 or int64 tensor of shape (documents + 1,), at least (2,), "
                    f"got {told(offsets)}."
                )
        if cu_seqlens_k is not None and cu_seqlens_k.shape != cu_seqlens.shape:
            raise ValueError(
                f"cu_seqlens_k must name as many documents as cu_seqlens, {tuple(cu_seqlens.shape)}, "
                f"got {tuple(cu_seqlens_k.shape)}."
            )
        self.cu_seqlens = cu_seqlens
        self.cu_seqlens_k = cu_seqlens if cu_seqlens_k is None else cu_seqlens_k
        self.max_seqlen = max_seqlen
        self.max_seqlen_k = max_seqlen if cu_seqlens_k is None else max_seqlen_k
        self.total = total
        self.total_k = total if cu_seqlens_k is None else total_k

    def check(self, batch: int, heads: int, seqlen_q: int, seqlen_k: int) -> None:
        if batch != 1:
            raise ValueError(f"batch must be 1 with Documents (pack the documents end to end), got {batch}.")
        if self.total is not None and self.total > seqlen_q:
            raise ValueError(f"total must be at most the {seqlen_q} queries, got {self.total}.")
        if self.total_k is not None and self.total_k > seqlen_k:
            raise ValueError(f"total_k must be at most the {seqlen_k} keys, got {self.total_k}.")
        if not readable(self.cu_seqlens):
            return
        for name, offsets, said, size in (
            ("cu_seqlens", self.cu_seqlens, self.total, seqlen_q),
            ("cu_seqlens_k", self.cu_seqlens_k, self.total_k, seqlen_k),
        ):
            steps = offsets.tolist()
            if steps[0] != 0 or steps != sorted(steps) or steps[-1] > size:
                raise ValueError(f"{name} must rise from 0 to at most {size}, got {steps}.")
            if said is not None and said != steps[-1]:
                raise ValueError(f"{name} must end at its total, {said}, got {steps}.")

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.cu_seqlens, self.cu_seqlens_k)

    def flatten(self) -> tuple[tuple[Tensor, ...], Rebuild]:
        said: dict[str, Any] = {"max_seqlen": self.max_seqlen, "total": self.total}
        if self.aligned:
            return (self.cu_seqlens,), lambda tensors: Documents(*tensors, **said)
        said |= {"max_seqlen_k": self.max_seqlen_k, "total_k": self.total_k}
        return (self.cu_seqlens, self.cu_seqlens_k), lambda tensors: Documents(*tensors, **said)

    @property
    def sizes(self) -> tuple[Any, ...]:
        """All that is known of the documents but their tensors' values."""
        return (
            self.aligned,
            self.cu_seqlens.shape,
            self.max_seqlen,
            self.max_seqlen_k,
            self.total,
            self.total_k,
        )

    @property
    def aligned(self) -> bool:
        """Queries and keys have the same offsets, so that both alignments are one."""
        return self.cu_seqlens is self.cu_seqlens_k

    def membership(self, seqlen_q: int, seqlen_k: int) -> tuple[Tensor, Tensor]:
        """The document of every query and of every key; the number of documents where a token is in none."""
        device = self.cu_seqlens.device
        q_doc = torch.bucketize(torch.arange(seqlen_q, device=device), self.cu_seqlens[1:], right=True)
        k_doc = torch.bucketize(torch.arange(seqlen_k, device=device), self.cu_seqlens_k[1:], right=True)
        return q_doc, k_doc

    def positions(self, seqlen_q: int, seqlen_k: int, align: str) -> tuple[Tensor, Tensor]:
        """The position of every query and of every key inside the own document."""
        q_doc, k_doc = self.membership(seqlen_q, seqlen_k)
        last = self.cu_seqlens.shape[0] - 2  # tokens in no document see nothing: their position does not matter
        q_doc, k_doc = q_doc.clamp(max=last), k_doc.clamp(max=last)
        q_pos = torch.arange(seqlen_q, device=q_doc.device) - self.cu_seqlens[q_doc]
        k_pos = torch.arange(seqlen_k, device=k_doc.device) - self.cu_seqlens_k[k_doc]
        if align == "bottom_right" and not self.aligned:
            q_pos = q_pos + (self.cu_seqlens_k.diff() - self.cu_seqlens.diff())[q_doc]
        return q_pos, k_pos

    def mask_mod(self, seqlen_q: int, seqlen_k: int, documents: Documents | None = None) -> MaskMod:
        last = self.cu_seqlens.shape[0] - 1
        q_doc, k_doc = self.membership(seqlen_q, seqlen_k)

        def same_document(batch: Tensor, head: Tensor, q_idx: Tensor, k_idx: Tensor) -> Tensor:
            return (q_doc[q_idx] == k_doc[k_idx]) & (q_doc[q_idx] < last)

        return same_document

    def __repr__(self) -> str:
        return f"Documents({self.cu_seqlens.shape[0] - 1})"


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
                f"True = may attend (what is added to the scores goes to bias=), got {told(allowed)}."
            )
        self.allowed = allowed[(None,) * (4 - allowed.dim())]

    def check(self, batch: int, heads: int, seqlen_q: int, seqlen_k: int) -> None:
        hint = "; a padding mask (batch, seqlen_k) is KeyPadding(tensor)"
        check_broadcast("a dense mask", self.allowed, (batch, heads, seqlen_q, seqlen_k), hint)

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.allowed,)

    def flatten(self) -> tuple[tuple[Tensor, ...], Rebuild]:
        return (self.allowed,), lambda tensors: Dense(*tensors)

    def mask_mod(self, seqlen_q: int, seqlen_k: int, documents: Documents | None = None) -> MaskMod:
        return lookup(self.allowed)

    def dense(self, *grid: Any) -> Tensor:
        return self.allowed

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
            raise TypeError(f"fn must be a function of (batch, head, q_pos, k_pos), got {told(fn)}.")
        self.fn, self.align = fn, align

    def mask_mod(self, seqlen_q: int, seqlen_k: int, documents: Documents | None = None) -> MaskMod:
        return positional(self.fn, seqlen_q, seqlen_k, documents, self.align)

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

    def mask_mod(self, seqlen_q: int, seqlen_k: int, documents: Documents | None = None) -> MaskMod:
        documents = find(self, Documents)
        mods = [part.mask_mod(seqlen_q, seqlen_k, documents) for part in self._parts]

        def every(batch: Tensor, head: Tensor, q_idx: Tensor, k_idx: Tensor) -> Tensor:
            allowed = mods[0](batch, head, q_idx, k_idx)
            for mod in mods[1:]:
                allowed = allowed & mod(batch, head, q_idx, k_idx)
            return allowed

        return every

    def __repr__(self) -> str:
        return " & ".join(map(repr, self._parts))


def check_broadcast(name: str, tensor: Tensor, want: tuple[int, ...], hint: str = "") -> None:
    """Raise ``ValueError`` where four axes do not broadcast to (batch, heads, seqlen_q, seqlen_k)."""
    for size, target in zip(tensor.shape, want):
        if size != target and size != 1:
            raise ValueError(
                f"{name} must broadcast to (batch, heads, seqlen_q, seqlen_k) = {want}, "
                f"got {tuple(tensor.shape)}{hint}."
            )


def home(tensors: tuple[Tensor, ...]) -> torch.device | None:
    """Where tensors are; ``None`` where there are none."""
    return tensors[0].device if tensors else None


def index_grid(
    batch: int, heads: int, seqlen_q: int, seqlen_k: int, device: torch.device | str | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The indices of every axis, each along its own of four axes, so that they broadcast to the whole problem."""
    return (
        torch.arange(batch, device=device).view(-1, 1, 1, 1),
        torch.arange(heads, device=device).view(1, -1, 1, 1),
        torch.arange(seqlen_q, device=device).view(1, 1, -1, 1),
        torch.arange(seqlen_k, device=device).view(1, 1, 1, -1),
    )


def is_vector_of_integers(thing: object) -> bool:
    return (
        isinstance(thing, Tensor) and is_dense(thing) and thing.dtype in (torch.int32, torch.int64) and thing.dim() == 1
    )


def find(mask: Mask | None, kind: type[M]) -> M | None:
    """The first rule of a kind in a mask."""
    if isinstance(mask, kind):
        return mask
    if mask is not None:
        for part in mask.parts:
            if isinstance(part, kind):
                return part
    return None


def joined(*masks: Mask | None) -> Mask | None:
    """``&`` of all that are there. (The Dynamo of torch 2.8 and 2.9 traces no ``&`` of objects.)"""
    parts = [part for mask in masks if mask is not None for part in mask.parts]
    return combine(tuple(parts)) if parts else None


def combine(parts: tuple[Mask, ...]) -> Mask:
    """The rules of ``&``, with equal kinds merged where one rule can say both."""
    merged: list[Mask] = []
    for part in parts:
        for place, earlier in enumerate(merged):
            both = merge(earlier, part)
            if both is not None:
                merged[place] = both
                break
        else:
            merged.append(part)
    return merged[0] if len(merged) == 1 else Intersection(tuple(merged))


def merge(one: Mask, two: Mask) -> Mask | None:
    """One rule that says what two say, where there is one."""
    if isinstance(one, Window) and isinstance(two, Window) and one.align == two.align:
        both = Window(None, None, align=one.align)
        both.left, both.right = narrower(one.left, two.left), narrower(one.right, two.right)
        return both
    if isinstance(one, KeyPadding) and isinstance(two, KeyPadding) and one.valid.shape == two.valid.shape:
        return private(KeyPadding(one.valid & two.valid))
    if isinstance(one, KeyLengths) and isinstance(two, KeyLengths) and one.lengths.shape == two.lengths.shape:
        return private(KeyLengths(torch.minimum(one.lengths, two.lengths)))
    if isinstance(one, Dense) and isinstance(two, Dense):
        return Dense(one.allowed & two.allowed)
    if isinstance(one, Documents) and isinstance(two, Documents):
        raise ValueError(f"a mask must hold at most one Documents, got {one!r} & {two!r}.")
    return None


def narrower(one: int | None, two: int | None) -> int | None:
    if one is None or two is None:
        return two if one is None else one
    return min(one, two)


def normalize(mask: Mask | None, seqlen_q: int, seqlen_k: int) -> Mask | None:
    """The mask for these lengths: windows bottom-right and merged, rules that hide nothing left out."""
    if mask is None or not any(isinstance(part, (Window, Documents)) for part in mask.parts):
        return mask
    documents = find(mask, Documents)
    if documents is None:
        mask = combine(
            tuple(part.to_bottom_right(seqlen_q, seqlen_k) if isinstance(part, Window) else part for part in mask.parts)
        )
    elif documents.aligned:
        mask = combine(tuple(p.to_bottom_right(0, 0) if isinstance(p, Window) else p for p in mask.parts))
    kept = tuple(part for part in mask.parts if not hides_nothing(part, seqlen_q, seqlen_k, documents))
    return combine(kept) if kept else None


def hides_nothing(part: Mask, seqlen_q: int, seqlen_k: int, documents: Documents | None) -> bool:
    """A window wider than the problem."""
    if not isinstance(part, Window):
        return False
    if documents is not None or is_compiling():  # comparing lengths would bind a graph to them
        return part.left is None and part.right is None
    if part.left is not None and part.left < seqlen_k - 1:
        return False
    return part.right is None or part.right >= seqlen_q - 1


def positional(fn: MaskMod, seqlen_q: int, seqlen_k: int, documents: Documents | None, align: str) -> MaskMod:
    """A rule over positions as a rule over indices."""
    if documents is None:
        shift = seqlen_k - seqlen_q if align == "bottom_right" else 0
        return lambda batch, head, q_idx, k_idx: fn(batch, head, q_idx + shift, k_idx)
    q_pos, k_pos = documents.positions(seqlen_q, seqlen_k, align)
    return lambda batch, head, q_idx, k_idx: fn(batch, head, q_pos[q_idx], k_pos[k_idx])


def lookup(table: Tensor) -> MaskMod:
    """A table of four axes as a function of (batch, head, q_idx, k_idx); an axis of size 1 is the same for all.

    Such an axis is gone, since a number among tensors in an index is copied to their device, which waits for it.
    """
    axes = [axis for axis, size in enumerate(table.shape) if size != 1]
    inner = table[tuple(slice(None) if axis in axes else 0 for axis in range(table.dim()))]

    def read(batch: Tensor, head: Tensor, q_idx: Tensor, k_idx: Tensor) -> Tensor:
        index = (batch, head, q_idx, k_idx)
        return inner[tuple([index[axis] for axis in axes])] if axes else inner

    return read

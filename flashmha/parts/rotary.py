"""``Rotary``: rotary position embedding, as a part of a layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..problem.sizes import check_sizes
from ..problem.wording import spell
from .heads import Norms, prepare
from .rope_scaling import DEFAULT_BASE, read_rope, rescale
from .rotation import PositionsOrFirst, Rotation

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class Rotary(nn.Module):
    """Rotary position embedding: pairs of features of q and k turn by an angle that grows with the position.

    A score then depends on how far key and query lie apart, and on nothing else of their positions (arXiv:2104.09864).
    cos and sin are computed in float32, as transformers does; heads are turned in float32 at least and rounded once, to
    their own dtype. Nothing is kept between calls, and the state_dict gets no entry.

    Args:
        head_dim: features of a head.
        dim: how many of them turn, the first ones; all by default.
        base: the longest wave is about ``2 * pi * base`` tokens.
        interleaved: features 2i and 2i + 1 are a pair (GPT-J), not i and i + dim / 2 (GPT-NeoX, Llama).
        rope_parameters: a dict in the form of transformers, which may say ``rope_theta``, ``partial_rotary_factor`` and
            a scaling: ``rope_type`` is ``default``, ``linear``, ``ntk``, ``dynamic``, ``yarn``, ``llama3`` or
            ``longrope``. What is unknown is an error.
        max_seqlen: ``max_position_embeddings`` of transformers' configuration, which some kinds of scaling need.
    """

    inv_freq: Tensor
    long_inv_freq: Tensor | None
    takes_norms = True
    """``forward`` takes the norms of q and k as well, so that one pass does both; without it they come first."""

    def __init_subclass__(cls, **more: Any) -> None:
        super().__init_subclass__(**more)
        if "forward" in vars(cls):
            cls.takes_norms = False

    def __init__(
        self,
        head_dim: int,
        *,
        dim: int | None = None,
        base: float = DEFAULT_BASE,
        interleaved: bool = False,
        rope_parameters: Mapping[str, Any] | None = None,
        max_seqlen: int | None = None,
    ) -> None:
        super().__init__()
        check_sizes(2, head_dim=head_dim)
        if not isinstance(interleaved, bool):
            raise ValueError(f"interleaved must be True or False, got {spell(interleaved)}.")
        self.dim, self.frequencies = read_rope(head_dim, dim, base, rope_parameters, max_seqlen)
        self.head_dim, self.interleaved = head_dim, interleaved
        given = rope_parameters or {}
        self.rope_type = given.get("rope_type") or given.get("type") or "default"
        self.place(torch.empty(0).device)

    def place(self, device: torch.device) -> None:
        """Put the frequencies on a device, as they were computed."""
        long = self.frequencies.long
        self.register_buffer("inv_freq", self.frequencies.inv_freq.to(device), persistent=False)
        self.register_buffer("long_inv_freq", None if long is None else long.to(device), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Rotary:
        """Move to where ``fn`` moves: frequencies stay float32, and are there again behind ``to_empty``."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.place(self.inv_freq.device)
        return self

    def forward(
        self,
        q: Tensor | None,
        k: Tensor | None,
        positions_q: Tensor | None = None,
        positions_k: Tensor | None = None,
        *,
        norms: Norms | None = None,
        length: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """q and k (batch, seqlen, heads, head_dim), turned; either may be ``None``.

        Args:
            positions_q, positions_k: ints (batch or 1, seqlen). ``None`` is 0, 1, ... for keys, and for queries, of
                which the last is at the last key; without keys they are at 0, 1, ...
            norms: modules over head_dim for q and k, which come first.
            length: that of the call, a tensor (), where it is not the largest position and 1: there is padding.
        """
        return prepare(q, k, norms or (None, None), self.rotation(q, k, positions_q, positions_k, length))

    @property
    def counts_length(self) -> bool:
        """The angles depend on the length of the call."""
        return bool(self.frequencies.original)

    def rotation(
        self,
        q: Tensor | None,
        k: Tensor | None,
        positions_q: Tensor | None,
        positions_k: Tensor | None,
        length: Tensor | None = None,
    ) -> Rotation:
        """What turns the heads of a call."""
        found, inv_freq = self.frequencies, self.inv_freq
        device = inv_freq.device
        if q is not None:
            self.check("q", q, positions_q, device)
        if k is not None:
            self.check("k", k, positions_k, device)
        seqlen_q = 0 if q is None else q.shape[1]
        ends = seqlen_q if k is None else k.shape[1]
        q_at: PositionsOrFirst = ends - seqlen_q if positions_q is None else positions_q
        k_at: PositionsOrFirst = 0 if positions_k is None else positions_k
        if found.original:
            if length is None:
                given = [x for x in (positions_q, positions_k) if x is not None]
                named = (q is None or positions_q is not None) and (k is None or positions_k is not None)
                length = length_of(0 if named else ends, given, device)
            inv_freq = rescale(found, length, inv_freq, self.long_inv_freq)
        return Rotation(inv_freq, found.attention_factor, self.interleaved, q_at, k_at)

    def check(self, name: str, x: Tensor, positions: Tensor | None, device: torch.device) -> None:
        """Raise ``ValueError`` where heads or positions are not what this turns."""
        if x.dim() != 4 or x.shape[-1] != self.head_dim or not x.dtype.is_floating_point:
            raise ValueError(
                f"{name} must be floating point (batch, seqlen, heads, head_dim = {self.head_dim}), got {spell(x)}."
            )
        if x.device != device:
            raise ValueError(f"{name} must be on the device of Rotary, {device}, got {x.device}: move it there.")
        if positions is None:
            return
        if not isinstance(positions, Tensor) or positions.dtype not in INTEGERS:
            raise ValueError(f"positions_{name} must be a tensor of ints, got {spell(positions)}.")
        if positions.dim() != 2 or positions.shape[0] not in (1, x.shape[0]) or positions.shape[1] != x.shape[1]:
            raise ValueError(
                f"positions_{name} must be (batch or 1, seqlen) of {name}, {(x.shape[0], x.shape[1])}, "
                f"got {tuple(positions.shape)}."
            )
        if positions.device != x.device:
            raise ValueError(f"positions_{name} must be on the device of {name}, {x.device}, got {positions.device}.")

    def extra_repr(self) -> str:
        kind = self.rope_type
        return f"head_dim={self.head_dim}, dim={self.dim}, interleaved={self.interleaved}, rope_type={kind!r}"


def length_of(implicit: int, given: list[Tensor], device: torch.device) -> Tensor:
    """The longest position of a call plus 1, as a tensor: the host does not wait for positions on a device."""
    length = torch.full((), implicit, dtype=torch.float32, device=device)
    for positions in given:
        if positions.numel():
            length = torch.maximum(length, positions.amax().to(length.dtype) + 1)  # which int8 has no room for
    return length

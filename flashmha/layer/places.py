"""The positions of a call's tokens, as rotary takes them: integers (batch or 1, seqlen), or ``None`` for the slots.

A token's position is its slot, also where padding is left out; in ``Documents`` positions start again; or the caller
says what they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..parts.rotary import INTEGERS
from ..problem.masks import Mask
from ..problem.packing import take_real
from ..problem.ragged import Padding
from ..problem.wording import spell
from .protocol import Layer

Places = tuple[Tensor | None, Tensor | None]
"""The positions of the queries and of the keys."""


def find_places(
    given: Places,
    mask: Mask | None,
    sizes: tuple[int, int, int],
    real: Tensor | None,
    alone: bool,
    device: torch.device,
) -> Places:
    """The positions of queries and keys; ``sizes`` is (batch, seqlen_q, seqlen_k) before padding was left out.

    ``given`` are those that the caller named, ``real`` the places of the tokens in (batch * seqlen) where padding was
    left out. ``alone`` where there are queries alone, whose keys came ready.
    """
    batch, seqlen_q, seqlen_k = sizes
    queries, keys = given
    if real is not None:
        slots = torch.arange(seqlen_k, device=device)[None] if keys is None else keys
        packed = take_real(slots.expand(batch, -1), real)
        if queries is None or queries is keys:
            return packed, packed
        return take_real(queries.expand(batch, -1), real), packed
    if keys is not None or queries is not None:
        return given
    if mask is None or mask.documents is None:
        return (torch.arange(seqlen_k - seqlen_q, seqlen_k, device=device)[None], None) if alone else given
    q_pos, k_pos = mask.documents.positions(seqlen_q, seqlen_k, "bottom_right")
    return q_pos[None], k_pos[None]


def count_real(layer: Layer, rule: Padding | None, given: Places, seqlen_k: int, alike: bool) -> Tensor | None:
    """The length of a call with padding, which shall not count, for a rotary that asks; ``None`` for no need of it.

    ``given`` are the positions as ``find_places`` found them, ``alike`` where queries and keys are the same tokens.
    """
    if rule is None or not getattr(layer.rotary, "counts_length", False):
        return None
    real = rule.real(seqlen_k)
    keys = torch.arange(seqlen_k, device=real.device)[None] if given[1] is None else given[1].long()
    length = (keys + 1).masked_fill(~real, 0).amax() if real.numel() else real.new_zeros((), dtype=torch.int64)
    if given[0] is not None and given[0] is not given[1] and given[0].numel():
        queries = given[0].long() + 1
        queries = queries.masked_fill(~real, 0) if alike else queries
        length = torch.maximum(length, queries.amax())
    return length.to(torch.float32)


def read_places(
    layer: Layer,
    positions: Tensor | None,
    key_positions: Tensor | None,
    sizes: tuple[int, int, int],
    has_kv: bool,
    device: torch.device,
) -> Places:
    """The positions that a caller named, checked; ``sizes`` is (batch, seqlen_q, seqlen_k).

    Raises:
        TypeError, ValueError: they are no positions of these tokens, or nothing would read them.
    """
    if positions is None and key_positions is None:
        return None, None
    batch, seqlen_q, seqlen_k = sizes
    if layer.rotary is None:
        name = "key_positions" if positions is None else "positions"
        raise ValueError(f"{name} must be None for a layer without rotary, which nothing else reads, got a tensor.")
    if positions is None:
        raise ValueError("positions must be given beside key_positions, got None.")
    queries = check_places("positions", positions, batch, seqlen_q, device)
    if has_kv:
        if key_positions is not None:
            raise ValueError("key_positions must be None beside kv, whose keys were turned already, got a tensor.")
        return queries, None
    if key_positions is not None:
        return queries, check_places("key_positions", key_positions, batch, seqlen_k, device)
    if seqlen_q != seqlen_k:
        raise ValueError(
            f"key_positions must be given beside positions where there are other keys than queries, got None with "
            f"seqlen_q={seqlen_q} and seqlen_k={seqlen_k}."
        )
    return queries, queries


def check_places(name: str, positions: Tensor, batch: int, seqlen: int, device: torch.device) -> Tensor:
    """Positions (seqlen) or (batch or 1, seqlen) as (batch or 1, seqlen)."""
    if not isinstance(positions, Tensor) or positions.dtype not in INTEGERS:
        raise TypeError(f"{name} must be an integer tensor (seqlen,) or (batch, seqlen), got {spell(positions)}.")
    if positions.device != device:
        raise ValueError(f"{name} must be on the device of the query, {device}, got {positions.device}.")
    rows = positions[None] if positions.dim() == 1 else positions
    if rows.dim() != 2 or rows.shape[0] not in (1, batch) or rows.shape[1] != seqlen:
        raise ValueError(
            f"{name} must be (seqlen,) = ({seqlen},) or (batch, seqlen) = ({batch}, {seqlen}), got "
            f"{tuple(positions.shape)}."
        )
    return rows

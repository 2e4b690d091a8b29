"""What a cache is given: rows by number, places of tokens, heads without gradients."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..host.torch_state import insist
from ..problem.sizes import is_size
from ..problem.wording import spell

COUNT_DTYPES = (torch.int32, torch.int64)
MOST_TOKENS = 2**31 - 1
"""As int32 holds them."""


def check_order(rows: Tensor, batch: int) -> None:
    """Raise where an order does not name a row for each row; on a GPU the device does, for rows that are not there."""
    if not isinstance(rows, Tensor) or rows.shape != (batch,) or rows.dtype not in COUNT_DTYPES:
        raise ValueError(f"rows must be integers (batch,) = ({batch},), got {spell(rows)}.")
    inside = (rows >= 0) & (rows < batch)
    insist(inside, lambda: f"rows must lie between 0 and {batch - 1}, got {rows.tolist()}.")


def check_chosen(chosen: Tensor, batch: int) -> None:
    """Raise where places of tokens are no integers, some for each row."""
    fits = isinstance(chosen, Tensor) and chosen.dim() == 2 and chosen.shape[0] == batch
    if not fits or chosen.dtype not in COUNT_DTYPES:
        raise ValueError(f"chosen must be integers (batch={batch}, tokens), got {spell(chosen)}.")


def row_numbers(rows: Iterable[int], batch: int) -> list[int]:
    """Some rows by number, each of them once.

    Raises:
        ValueError: other things than numbers of rows, such as a mask of those that are done.
    """
    told: Any = rows.tolist() if isinstance(rows, Tensor) else rows
    told = list(told) if isinstance(told, Iterable) else told
    if not isinstance(told, list) or not all(is_size(row, 0) and row < batch for row in told):
        raise ValueError(f"rows must be numbers between 0 and {batch - 1}, got {told}.")
    return sorted({int(row) for row in told})


def refuse_gradients(*heads: Tensor) -> None:
    """Raise for heads that want gradients."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in heads):
        raise ValueError(
            "cache must be used where no gradient is wanted, got heads that require one: what a call reads, the next "
            "one writes over. Call the model under torch.no_grad() or torch.inference_mode()."
        )

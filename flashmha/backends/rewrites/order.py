"""Tokens in another order: the real ones of each batch item first, and every token back in its place.

Attention that looks at no position does not care where a key stands, so a kernel that takes lengths serves padding of
any pattern. Sizes stay as they are, and no device is waited for.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...host.torch_state import eager, is_dual
from ...problem.ragged import KeyLengths, KeyPadding, mark_private
from .heads import neighbours


class Order(NamedTuple):
    """An order of (batch * seqlen) rows: which row comes to each place, and where each row went."""

    places: Tensor
    back: Tensor


def undone(order: Order) -> Order:
    """The order that puts every row back."""
    return Order(order.back, order.places)


def real_first(valid: Tensor, batch_first: bool = True) -> Order:
    """The rows of each item of valid (batch, seqlen), real ones first, both kinds as they came.

    They come to lie (batch, seqlen). Rows are counted as they lie before, with ``batch_first=False`` (seqlen, batch).
    """
    batch, seqlen = valid.shape
    slots = torch.arange(seqlen, device=valid.device).expand(batch, -1)
    real = valid.cumsum(1)  # up to a token and with it; sorting would take longer
    back = torch.where(valid, real - 1, real[:, -1:] + slots - real)
    places = torch.zeros_like(back).scatter(1, back, slots)
    items = torch.arange(batch, device=valid.device)[:, None]
    back = back + items * seqlen
    if batch_first:
        return Order((places + items * seqlen).flatten(), back.flatten())
    return Order((places * batch + items).flatten(), back.T.flatten())


def permute_rows(rows: tuple[Tensor, ...], order: Order) -> tuple[Tensor, ...]:
    """Tensors (batch * seqlen, ...) in an order; gradients come back by the order undone, adding nothing up."""
    dual = is_dual()  # which the function below has no rule for; Dynamo traces none with one
    if torch.is_grad_enabled() and not dual and any(x.requires_grad for x in rows):
        made: tuple[Tensor, ...] = Permuted.apply(order.places, order.back, *rows)  # type: ignore[no-untyped-call]
        return made
    return take_rows(rows, order.places)


def take_rows(rows: tuple[Tensor, ...], places: Tensor) -> tuple[Tensor, ...]:
    """Some rows of tensors, in one operator where the tensors are neighbours in one."""
    first = rows[0]
    if len(rows) > 1 and eager(first) and neighbours(rows):
        sizes = [x.shape[-2] for x in rows]
        whole = first.as_strided((*first.shape[:-2], sum(sizes), first.shape[-1]), first.stride())
        return whole.index_select(0, places).split_with_sizes(sizes, -2)
    return tuple([x.index_select(0, places) for x in rows])


class Permuted(torch.autograd.Function):
    """``take_rows``, whose backward moves as well: that of ``index_select`` would add rows up in any order."""

    @staticmethod
    def forward(ctx: Any, places: Tensor, back: Tensor, *rows: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(back, places)
        return take_rows(rows, places)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        back, places = ctx.saved_tensors
        return None, None, *permute_rows(grads, Order(back, places))


class RealFirst:
    """The tokens of a padded batch with the real ones of each item first, and the way back; every row stays.

    The batch is (batch, seqlen, ...), with ``batch_first=False`` (seqlen, batch, ...). ``tokens`` are (batch,
    seqlen, ...) in either case, as kernels want them. ``padding`` is theirs: ``KeyLengths``, which a kernel reads
    where keys lie. Layers whose attention looks at no position, and which treat tokens one by one elsewhere,
    compute what they would have.
    """

    def __init__(self, x: Tensor, padding: KeyPadding, batch_first: bool = True) -> None:
        self.sizes = x.shape
        self.order = padding.once(("real first", batch_first), lambda: real_first(padding.valid, batch_first))
        self.padding = padding.once("lengths", lambda: mark_private(KeyLengths(padding.valid.sum(1))))
        sizes = padding.valid.shape
        self.tokens = permute_rows((x.flatten(0, 1),), self.order)[0].view(*sizes, *x.shape[2:])

    def unpack(self, tokens: Tensor) -> Tensor:
        """Tokens in this order, each back in its place."""
        return permute_rows((tokens.flatten(0, 1),), undone(self.order))[0].view(self.sizes)

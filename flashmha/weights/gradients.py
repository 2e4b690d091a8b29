"""The gradients of what weights are made of, for a gradient of the weights that is 0 but in some boxes.

::

    d_score = weights * (grad - (grad * weights).sum(-1))
    d_sink = -weight_of_sink * (grad * weights).sum(-1)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..host.kernels import why_no_kernels
from ..problem.spec import AttentionSpec
from . import tiles
from .blocks import Band, Box, Score, of_heads
from .learned import Learned
from .regions import as_slice


class GradientPiece(NamedTuple):
    """The gradient of the weights of a box and some keys; over (batch, heads or 1 for their mean, rows, keys)."""

    box: Box
    keys: range
    grad: Tensor


class Gradients:
    """Gradients of q, k and what ``held`` holds, where wanted, added up box by box."""

    def __init__(
        self, q: Tensor, k: Tensor, lse: Tensor | None, spec: AttentionSpec, average: bool, wanted: Sequence[bool]
    ) -> None:
        self.q, self.k, self.lse, self.spec, self.average = q, k, lse, spec, average
        self.wanted = wanted
        self.of_q: Tensor | None = None
        self.of_k: Tensor | None = None
        self.learned: Learned | None = None

    def add(self, box: Box, keys: range, grad: Tensor) -> None:
        """Add what the gradient of one box gives."""
        spec = self.spec
        whole = box == Box.whole(spec) and len(keys) == spec.seqlen_k
        if whole and not any(self.wanted[2:]) and has_kernels(spec):
            grad = grad[:, 0] if self.average else grad
            dq, dk = tiles.make_gradients(self.q, self.k, self.lse, spec, self.average, grad)
            self.of_q = dq if self.of_q is None else self.of_q + dq
            self.of_k = dk if self.of_k is None else self.of_k + dk
            return
        if grad.numel():
            self.add_by_blocks(box, keys, grad)

    def add_by_blocks(self, box: Box, keys: range, grad: Tensor) -> None:
        """``add`` in PyTorch's operators, for any problem on any device."""
        spec = self.spec
        score = Score(self.q, self.k, self.lse, spec, box)
        q, k, dtype = score.q, score.k, score.q.dtype
        self.of_q, self.of_k = (
            torch.zeros(x.shape, dtype=dtype, device=x.device) if made is None else made.to(dtype)
            for made, x in ((self.of_q, self.q), (self.of_k, self.k))
        )
        if self.learned is None:
            self.learned = Learned(spec, self.wanted[2:], dtype)
        learned = self.learned
        group = spec.heads // spec.heads_kv
        owners = range(box.heads.start // group, -(-box.heads.stop // group))
        whole = torch.zeros((len(owners) * group, *k.shape[1:]), dtype=dtype, device=k.device)  # of the groups' heads
        dk = whole[box.heads.start - owners.start * group :]
        dq = box.of_query(self.of_q).permute(2, 0, 1, 3)
        for band in score.bands():
            with learned.band(band.covered) as d_bias:
                for heads in band.head_blocks():
                    numbers, share, sink, slope = band.block(heads)
                    weights = numbers * share
                    d_weights = self.of_block(grad, keys, band, heads)
                    mean = (d_weights * weights).sum(dim=-1, keepdim=True)
                    d_score = weights * (d_weights - mean)
                    if d_bias is not None:
                        part = of_heads(band.box.of_table(d_bias.transpose(0, 1)).transpose(0, 1), heads)
                        part += d_score.sum_to_size(part.shape)
                    if learned.sinks is not None:
                        assert sink is not None
                        learned.sinks[as_slice(box.heads[heads])] -= (sink * mean).sum(dim=(1, 2, 3))
                    d_score = d_score if slope is None else d_score * slope
                    dq[heads, :, band.place] += spec.scale * (d_score @ k[heads])
                    dk[: len(k)][heads] += spec.scale * (d_score.mT @ q[heads, :, band.place])
        dk = whole if group == 1 else torch.unflatten(whole, 0, (len(owners), group)).sum(dim=1)
        self.of_k[as_slice(box.batch), :, as_slice(owners)] += dk.permute(1, 2, 0, 3)

    def of_block(self, grad: Tensor, keys: range, band: Band, heads: slice) -> Tensor:
        """The gradient of a block's weights, heads first."""
        if self.average:
            grad = grad[:, :, band.place] / self.spec.heads
        else:
            grad = grad[:, heads, band.place]
        if len(keys) < self.spec.seqlen_k:
            part, grad = grad, grad.new_zeros((*grad.shape[:3], self.spec.seqlen_k))
            grad[..., as_slice(keys)] = part
        return grad.transpose(0, 1)

    def all(self) -> list[Tensor | None]:
        """The gradients, those of learned scores each in its tensor's dtype."""
        found: list[Tensor | None] = []
        for one, x, wanted in zip((self.of_q, self.of_k), (self.q, self.k), self.wanted):
            found.append((torch.zeros_like(x) if one is None else one) if wanted else None)
        learned = Learned(self.spec, self.wanted[2:], self.q.dtype) if self.learned is None else self.learned
        return [*found, *learned.gradients()]


def has_kernels(spec: AttentionSpec) -> bool:
    """Kernels of this machine make the gradients of a problem's q and k."""
    return why_no_kernels(spec.device.type, spec.device.index) is None and tiles.no_gradients(spec) is None

"""A problem as an expression: what a failure prints can be pasted into Python and builds the same problem again.

The names in it are those of ``from flashmha import *``, ``from flashmha.testing import *`` and ``import torch``.
"""

from __future__ import annotations

import dataclasses
import re

import torch
from torch import Tensor

from ..problem.cached import OwnTokens, Pages, Positions
from ..problem.documents import Documents
from ..problem.masks import Dense, Mask
from ..problem.ragged import KeyLengths, KeyPadding
from ..problem.rules import Rule
from ..problem.scores import ALiBi, Bias, RelativeBias, TensorBias
from ..problem.spec import AttentionSpec
from ..problem.windows import Window
from .values import device_argument, expression

SHORT, LONG = 24, 4096
"""Up to so many numbers are written out, and up to so many where no seed is known; a larger tensor is described."""


def pasted(spec: AttentionSpec) -> str:
    """The expression that builds a problem again."""
    parts = []
    for field in dataclasses.fields(spec):
        if not field.init:
            continue
        value, usual = getattr(spec, field.name), field.default
        if field.name == "softmax_scale":
            usual = max(spec.head_dim, 1) ** -0.5
        if isinstance(value, Mask):
            parts.append(f"mask={pasted_mask(value, spec)}")
        elif isinstance(value, Bias):
            parts.append(f"bias={' + '.join(map(pasted_bias, value.parts))}")
        elif isinstance(value, Tensor):
            parts.append(f"{field.name}={pasted_tensor(value)}")
        elif isinstance(value, torch.device):
            parts += [f"device=torch.device({str(value)!r})"] if value != usual else []
        elif value != usual:
            parts.append(f"{field.name}={value!r}")
    return f"AttentionSpec({', '.join(parts)})"


def pasted_mask(mask: Mask, spec: AttentionSpec) -> str:
    """A mask of any kind; one whose class is not flashmha's is as its repr says."""
    return " & ".join(pasted_rule(part, spec) for part in mask.parts)


def pasted_rule(part: Mask, spec: AttentionSpec) -> str:
    if isinstance(part, Window):
        return pasted_window(part, 0 if spec.documents else spec.seqlen_k - spec.seqlen_q)
    if isinstance(part, KeyPadding):
        return f"KeyPadding({pasted_tensor(part.valid)})"
    if isinstance(part, KeyLengths):
        return f"KeyLengths({pasted_tensor(part.lengths)})"
    if isinstance(part, Dense):
        return f"Dense({pasted_tensor(part.allowed)})"
    if isinstance(part, Documents):
        offsets = part.tensors()[: 1 if part.aligned else 2]
        names = ("max_seqlen", "total") if part.aligned else ("max_seqlen", "max_seqlen_k", "total", "total_k")
        given = [f"{name}={getattr(part, name)}" for name in names if getattr(part, name) is not None]
        return f"Documents({', '.join((*map(pasted_tensor, offsets), *given))})"
    if isinstance(part, Positions):
        end = ", at_end=True" if part.at_end else ""
        return f"Positions({', '.join(map(pasted_tensor, part.tensors()))}{end})"
    if isinstance(part, OwnTokens):
        return f"OwnTokens({', '.join(map(pasted_tensor, part.tensors()))})"
    if isinstance(part, Pages):
        return f"Pages({pasted_tensor(part.block_table)}, {part.page_size})"
    if isinstance(part, Rule):
        align = "" if part.align == "bottom_right" else f", align={part.align!r}"
        return f"Rule({getattr(part.fn, '__name__', 'fn')}{align})"
    return repr(part)


def pasted_window(window: Window, shift: int) -> str:
    """A window, whose bounds may be negative: then they were written for top-left positions."""
    left, right = window.left, window.right
    if min(left or 0, right or 0) >= 0:
        return repr(window)
    moved = (None if left is None else left - shift, None if right is None else right + shift)
    if min(moved[0] or 0, moved[1] or 0) >= 0:
        return repr(Window(*moved, align="top_left"))
    # one bound of each alignment: two windows, which become one again
    bounds = ((left, None, moved[0]), (None, right, moved[1]))
    halves = []
    for one, two, other in bounds:
        bound = one if two is None else two
        assert bound is not None and other is not None
        if bound >= 0:
            halves.append(Window(one, two))
        else:
            halves.append(Window(*((other, None) if two is None else (None, other)), align="top_left"))
    return " & ".join(map(repr, halves))


def pasted_bias(part: Bias) -> str:
    for kind, name in ((TensorBias, "tensor"), (ALiBi, "slopes"), (RelativeBias, "table")):
        if isinstance(part, kind):
            return f"{kind.__name__}({pasted_tensor(getattr(part, name))})"
    return repr(part)


def pasted_tensor(tensor: Tensor) -> str:
    """A tensor written out, or by the seed it was made of."""
    made = expression(tensor)
    if made is None or 0 < tensor.numel() <= SHORT:
        made = literal(tensor)
    return f"{made}.requires_grad_()" if tensor.requires_grad else made


def literal(tensor: Tensor) -> str:
    dtype = "" if tensor.dtype in (torch.bool, torch.int64) else f", dtype={tensor.dtype}"
    if not tensor.numel():
        return f"torch.zeros({tuple(tensor.shape)}, dtype={tensor.dtype}{device_argument(tensor)})"
    if tensor.numel() > LONG:
        return f"<{tensor.dtype} {tuple(tensor.shape)}>"
    values = re.sub(r"\b(inf|nan)\b", r"torch.\1", repr(tensor.detach().tolist()))
    return f"torch.tensor({values}{dtype}{device_argument(tensor)})"

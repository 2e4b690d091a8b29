"""Keys beside those of a call: what ``process_heads`` adds in front and behind, what ``add_bias_kv`` appends.

Every query sees them. They stand outside position space: masks, windows, causality and padding speak of the call's own
keys, and become wider here.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..problem.masks import Dense, Mask
from ..problem.ragged import KeyPadding
from ..problem.scores import Bias, TensorBias
from .features import EXTRA_KEYS
from .protocol import Layer


def count_added_keys(layer: Layer, given: int, made: int, masked: bool) -> tuple[int, int]:
    """How many keys ``process_heads`` put in front of the ``given`` ones and behind them.

    Raises:
        ValueError: the layer says something else, or says nothing where a mask has to know.
    """
    before, after = (number_of_keys(layer, name) for name in EXTRA_KEYS)
    if made == given + before + after:
        return before, after
    if not (before or after or masked):
        return 0, 0  # other keys than the call's, and every one is visible
    declared = f"the call's {given} keys" + f", {before} before and {after} after them" * bool(before or after)
    raise ValueError(
        f"process_heads must return {declared}, got {made} keys; a layer that adds keys says how many, as keys_before "
        "and keys_after on the class or the instance, so that masks know which keys they speak of."
    )


def number_of_keys(layer: Layer, name: str) -> int:
    """``keys_before`` or ``keys_after`` of a layer, checked."""
    keys = getattr(layer, name)
    if isinstance(keys, bool) or not isinstance(keys, (int, torch.SymInt)) or keys < 0:
        raise ValueError(f"{name} must be a number of keys, 0 or more, got {keys!r}.")
    return keys  # type: ignore[return-value]


def widen(
    mask: Mask | None, bias: Bias | None, before: int, behind: int, sizes: tuple[int, int, int, int], q: Tensor
) -> tuple[Mask | None, Bias | None]:
    """A mask and a bias over the call's own keys, over all of them; ``sizes`` is (batch, heads, seqlen_q, seqlen_k)."""
    documents = None if mask is None else mask.documents
    if isinstance(mask, KeyPadding):
        mask.check(*sizes)
        mask = KeyPadding(F.pad(mask.valid, (before, behind), value=True))
    elif mask is not None:
        mask.check(*sizes)
        seen = mask.materialize(*sizes, q.device)
        mask = Dense(F.pad(seen.expand(-1, -1, -1, sizes[3]), (before, behind), value=True))
    if bias is not None:
        bias.check(*sizes)
        added = bias.materialize(*sizes, q.device, documents)
        bias = TensorBias(F.pad(added.expand(-1, -1, -1, sizes[3]), (before, behind)))
    return mask, bias


def append(layer: Layer, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values with the learned column of ``add_bias_kv`` and the zero column of ``add_zero_attn``."""
    batch, _, heads, _ = k.shape
    ks, vs = [k], [v]
    if layer.bias_k is not None and layer.bias_v is not None:
        ks.append(torch.unflatten(layer.bias_k, -1, (heads, -1)).expand(batch, -1, -1, -1).to(k.dtype))
        vs.append(torch.unflatten(layer.bias_v, -1, (heads, -1)).expand(batch, -1, -1, -1).to(v.dtype))
    if layer.add_zero_attn:
        ks.append(k.new_zeros(batch, 1, heads, k.shape[-1]))
        vs.append(v.new_zeros(batch, 1, heads, v.shape[-1]))
    return torch.cat(ks, dim=1), torch.cat(vs, dim=1)

"""The arguments of one call of a layer, and their kinds: tensors where tensors belong, a mask or a rule, flags."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends.choice.wishes import Wanted
from ..cache.base import Cache
from ..cache.memory import MemoryCache
from ..host.torch_state import has_torch_function
from ..problem.masks import Mask
from ..problem.ragged import Padding
from ..problem.wording import spell


class Arguments(NamedTuple):
    """The arguments of one call of a layer, in the order and with the defaults of its ``forward``."""

    query: Tensor
    key: Tensor
    value: Tensor
    key_padding_mask: Padding | Tensor | None = None
    need_weights: bool = True
    attn_mask: Mask | Tensor | None = None
    average_attn_weights: bool = True
    is_causal: bool = False
    backend: Wanted = None
    positions: Tensor | None = None
    key_positions: Tensor | None = None
    kv: tuple[Tensor, Tensor] | None = None
    cache: Cache | MemoryCache | None = None


def check_kinds(given: Arguments) -> None:
    """Raise where an argument of a layer is of a kind that means nothing.

    Raises:
        TypeError: with the argument, what it must be, and what to pass.
    """
    for name in ("query", "key", "value") if given.kv is None else ("query",):
        if not is_tensor(getattr(given, name)):
            raise TypeError(f"{name} must be a tensor, got {spell(getattr(given, name))}.")
    key_padding_mask, attn_mask = given.key_padding_mask, given.attn_mask
    if key_padding_mask is not None and not isinstance(key_padding_mask, Padding) and not is_tensor(key_padding_mask):
        where = (
            "; another flashmha mask is given as attn_mask"
            if isinstance(key_padding_mask, Mask)
            else array_hint(key_padding_mask)
        )
        raise TypeError(
            f"key_padding_mask must be a tensor (batch, seqlen_k), True = hidden, a KeyPadding, True = may attend, "
            f"KeyLengths or None, got {spell(key_padding_mask)}{where}."
        )
    if attn_mask is not None and not isinstance(attn_mask, Mask) and not is_tensor(attn_mask):
        raise TypeError(
            f"attn_mask must be a tensor, True = hidden, a flashmha mask such as causal(), or None, got "
            f"{spell(attn_mask)}{array_hint(attn_mask)}."
        )


def check_flags(**flags: Any) -> None:
    """Raise where a flag is neither true nor false; numbers and single elements are, as in ``nn.MultiheadAttention``.

    Raises:
        TypeError: with the flag.
    """
    for name, flag in flags.items():
        if flag is None or isinstance(flag, (int, torch.SymBool, torch.SymInt)) or getattr(flag, "shape", None) == ():
            continue
        mask = "; give the mask as attn_mask=" if isinstance(flag, (Tensor, Mask)) else ""
        raise TypeError(f"{name} must be True or False, got {spell(flag)}{mask}.")


def is_tensor(thing: Any) -> bool:
    """A tensor, or what stands for one where PyTorch's functions are overridden."""
    return isinstance(thing, Tensor) or has_torch_function((thing,))


def array_hint(thing: Any) -> str:
    """The end of an error about an array or a list in the place of a tensor."""
    arrays = isinstance(thing, (list, tuple)) or hasattr(thing, "__array__")
    return "; torch.as_tensor makes one of it" if arrays else ""

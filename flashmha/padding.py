"""Padding left out of a self-attention call: the real tokens end to end, and every token back in its place."""

from __future__ import annotations

import functools
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from .backends import FAMILIES, get, preference
from .backends.base import HALF
from .backends.sdpa import packs_up_to
from .call import Reading
from .features import overridden
from .masks import Documents, KeyPadding, Mask, Window, eager


def refusal(layer: Any, call: Reading) -> str | None:
    """Why padding cannot be left out of a call, so that every row is computed; ``None`` where it can."""
    if call.valid is None:
        return "no bool key_padding_mask"
    if not (call.query is call.key and call.key is call.value):
        return "query, key and value are not one tensor"
    if not eager(call.query) or (call.query.is_cuda and torch.cuda.is_current_stream_capturing()):
        return "PyTorch records the call (compile, export, torch.func, a CUDA graph)"
    if call.columns:
        return "add_bias_kv or add_zero_attn"
    hops = overridden(layer)
    if hops:
        return f"{', '.join(hops)} overridden, which may count positions"
    if call.bias is not None or any(type(part) not in (KeyPadding, Window) for part in parts(call.mask)):
        return "an attn_mask beside causality"
    if call.query.is_cuda and preference(layer.backend) is None and not packs(layer, call):
        return "no kernel here for packed tokens in this dtype: they would need a dense mask"
    if layer.window is not None and has_holes(call.valid):
        return "a window over padding with holes"
    return None


def packs(layer: Any, call: Reading) -> bool:
    """A kernel for packed documents runs on this GPU and in this dtype."""
    tensor, size = call.query, layer.embed_dim // layer.num_heads
    able = (get(name) for name in FAMILIES["flash_attn"])
    if any(tensor.dtype in kernel.limits.dtypes and kernel.unavailable(tensor.device) is None for kernel in able):
        return True
    whole = all(part.feature != "window" for part in parts(call.mask)) and layer.window is None
    return whole and tensor.dtype in HALF and size % 8 == 0 and size <= packs_up_to(tensor.device.index)


counted: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""Masks that were counted: tensor -> (its version, where its real tokens lie)."""


def places(valid: Tensor, given: Tensor | None) -> Tensor:
    """Where the real tokens lie in (batch * seqlen): counted once a mask ``given`` and version.

    Counting waits for a GPU, and the layers of a model are called with one mask.
    """
    if given is None or given.is_inference():
        return real_tokens(valid)
    known: tuple[int, Tensor] | None = counted.get(given)
    if known is None or known[0] != given._version:
        with torch.inference_mode(False), torch.no_grad():  # who counts first may not be who asks next
            known = (given._version, real_tokens(valid))
        counted[given] = known
    return known[1]


def real_tokens(valid: Tensor) -> Tensor:
    return valid.flatten().nonzero().squeeze(1)


def packed(mask: Mask | None, valid: Tensor) -> Mask:
    """The mask among the real tokens end to end: one document a batch item, and the windows."""
    lengths = valid.sum(dim=1)
    offsets = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    bound = valid.shape[1]  # asking a GPU for the longest would wait for it
    if not valid.is_cuda:
        bound = int(lengths.max()) if len(lengths) else 0
    documents: Mask = Documents(offsets, max_seqlen=bound)
    return functools.reduce(operator.and_, (part for part in parts(mask) if type(part) is Window), documents)


def unpack(tokens: Tensor, places: Tensor, sizes: tuple[int, int]) -> Tensor:
    """(1, tokens, ...) as (batch, seqlen, ...), 0 where there was padding; ``sizes`` is (batch, seqlen)."""
    blank = tokens.new_zeros(sizes[0] * sizes[1], *tokens.shape[2:])
    full: Tensor = blank.index_copy(0, places, tokens[0]).unflatten(0, sizes)
    return full


def has_holes(valid: Tensor) -> bool:
    """Padding between real tokens, where positions would move."""
    starts = (valid[:, 1:] & ~valid[:, :-1]).sum(dim=1) + valid[:, 0]
    return bool((starts > 1).any())


def parts(mask: Mask | None) -> tuple[Mask, ...]:
    return () if mask is None else mask.parts

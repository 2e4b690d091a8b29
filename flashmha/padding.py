"""Padding left out of a self-attention call: the real tokens end to end, and every token back in its place."""

from __future__ import annotations

import functools
import operator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from .backends import FAMILIES, get, preference
from .backends.sdpa import runs_packed, takes_packed
from .call import Reading
from .features import overridden
from .masks import Documents, KeyPadding, Mask, Window, eager, once_a_version


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
    return whole and takes_packed(tensor.dtype, size) and runs_packed(size, tensor.device.index)


class Tokens(NamedTuple):
    """The real tokens of a batch: where they lie in (batch * seqlen), where each item's start among them, the most of
    an item."""

    places: Tensor
    offsets: Tensor
    longest: int


counted: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""The tokens of masks, see ``once_a_version``."""


def tokens(valid: Tensor, given: Tensor | None) -> Tokens:
    """The tokens that are real; on a GPU counted once a mask ``given`` and version.

    Counting waits there, and the layers of a model are called with one mask. One made in inference mode has no version.
    """
    if given is None or not given.is_cuda:
        return count(valid)
    return once_a_version(counted, given, lambda: count(valid))


@torch.inference_mode(False)
@torch.no_grad()
def count(valid: Tensor) -> Tokens:
    """The tokens as plain tensors: who counts first may not be who asks next."""
    lengths = valid.sum(dim=1)
    offsets = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    return Tokens(valid.flatten().nonzero().squeeze(1), offsets, int(lengths.max()) if len(lengths) else 0)


def packed(mask: Mask | None, real: Tokens) -> Mask:
    """The mask among the real tokens end to end: one document a batch item, and the windows."""
    documents: Mask = Documents(real.offsets, max_seqlen=real.longest)
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

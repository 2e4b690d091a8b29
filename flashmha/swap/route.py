"""How padding goes through an encoder: as it was given, or left out once for all layers."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..backends.rewrites.documents import worth_moving
from ..backends.rewrites.order import RealFirst
from ..host.torch_state import eager, is_autocast_enabled, is_compiling
from ..layer import padding
from ..layer.arguments import Arguments
from ..layer.call import Reading, read_call
from ..layer.module import FlashMultiHeadAttention
from ..layer.packed import Packed
from ..problem import packing
from ..problem.computed import make_plain
from ..problem.masks import Mask, join_masks
from ..problem.ragged import KeyPadding, Padding, mark_private
from .known import find_different, find_unknown_call, find_unknown_layers, find_unknown_norm


class Route(NamedTuple):
    """The arguments of an encoder's layers in one call; ``leave`` is the way back.

    ``packed`` holds the tokens where padding is left out, or where it comes last and they lie (batch, seqlen) whatever
    ``batch_first`` says; ``hidden`` the rows to be zeroed where packing would not pay. ``why`` says why neither is done
    where padding was to be left out. With ``padded_norm`` the last norm sees zeros in place of padding, as it does
    behind stock's nested tensors. ``straight`` where every layer is known, so that they may run as functions.
    """

    src: Tensor
    mask: Mask | Tensor | None
    key_padding_mask: Padding | Tensor | None
    is_causal: bool
    packed: Packed | RealFirst | None = None
    hidden: Tensor | None = None
    padded_norm: bool = False
    why: str | None = None
    straight: bool = False


def enter(
    encoder: nn.TransformerEncoder,
    src: Tensor,
    mask: Mask | Tensor | None,
    key_padding_mask: Tensor | None,
    is_causal: bool,
) -> Route:
    """The route of one call of an encoder.

    Padding is left out once where every layer has ``skip_padding``, and in eval without gradients where the stock
    encoder would make nested tensors. Else, where a kernel gains by it, the real tokens of each item come first.
    """
    if not len(encoder.layers):
        return Route(src, mask, key_padding_mask, is_causal)
    given = key_padding_mask.tensors()[0] if isinstance(key_padding_mask, Padding) else key_padding_mask
    if not eager(src) or not (given is None or eager(given)) or src.is_nested or src.is_meta:
        if given is not None:
            key_padding_mask = hand_down(encoder, src, mask, key_padding_mask, False)
        return Route(src, mask, key_padding_mask, is_causal)
    strange = find_unknown_layers(encoder)
    known = strange is None
    if key_padding_mask is None:
        return Route(src, mask, None, is_causal, straight=known)
    way, why = route_without_padding(encoder, src, mask, key_padding_mask, is_causal, strange)
    if way is None:
        rule = hand_down(encoder, src, mask, key_padding_mask, known)
        first = route_real_first(encoder, src, mask, rule, is_causal) if known else None
        way = Route(src, mask, rule, is_causal, why=why)
        if first is not None:
            way = Route(first.tokens, None, first.padding, False, first, None, True, why)
    return way._replace(straight=known)


def route_without_padding(
    encoder: nn.TransformerEncoder,
    src: Tensor,
    mask: Mask | Tensor | None,
    key_padding_mask: Tensor,
    is_causal: bool,
    strange: str | None,
) -> tuple[Route | None, str | None]:
    """The route without padding, or ``None`` and why there is none, where that was asked for.

    ``strange`` is what in a layer may count on (batch, seqlen).
    """
    skipping = [getattr(getattr(layer, "self_attn", None), "skip_padding", False) for layer in encoder.layers]
    nests = would_nest(encoder, src, mask)
    if not (all(skipping) or nests):
        return None, "not every layer has skip_padding" if any(skipping) else None
    norm = find_unknown_norm(encoder)
    nesting = nests and (norm is not None or not all(skipping))  # as stock does, whose last norm sees padding
    why = strange if strange is not None or nesting else norm
    if why is None:
        attentions = attentions_of(encoder)
        call = read_call(attentions[0], make_arguments(src, mask, key_padding_mask, is_causal))
        why = why_rows_stay(attentions, call)
        if why is None and nesting and not ends_in_padding(encoder, call.valid):
            why = "padding before real tokens, where the stock encoder makes no nested tensors"
    if why is not None:
        return (route_zeroed(encoder, src, mask, key_padding_mask, is_causal, why) if nests else None), why
    assert call.padding is not None
    valid: Any = call.valid
    windows = packing.find_windows(call.mask)
    if not pays(encoder, valid):
        hidden = mask_hidden_rows(attentions[0], valid)
        # as a rule, which a layer does not leave out
        return Route(src, join_masks(call.padding, *windows), None, False, None, hidden, nesting), None
    real = packing.tokens_of(call.padding, valid.shape[1])
    if real.places.shape[0] == valid.numel():
        return Route(src, join_masks(*windows), None, False), None
    packed = Packed(src, real, attentions[0].batch_first)
    return Route(packed.tokens, join_masks(packed.documents, *windows), None, False, packed, None, nesting), None


def attentions_of(encoder: nn.TransformerEncoder) -> list[FlashMultiHeadAttention]:
    """The attention of each layer, where the layers are known."""
    layers: Any = encoder.layers
    return [layer.self_attn for layer in layers]


def make_arguments(src: Tensor, mask: Any, key_padding_mask: Any, is_causal: bool) -> Arguments:
    """The arguments with which an encoder layer calls its attention."""
    return Arguments(src, src, src, key_padding_mask, False, mask, is_causal=is_causal)


def route_zeroed(
    encoder: nn.TransformerEncoder, src: Tensor, mask: Any, key_padding_mask: Any, is_causal: bool, why: str
) -> Route | None:
    """Every row computed with the padding as it came, and zeros behind the last layer, as nested tensors give."""
    attention = getattr(encoder.layers[0], "self_attn", None)
    if not isinstance(attention, FlashMultiHeadAttention):
        return None
    call = read_call(attention, make_arguments(src, mask, key_padding_mask, is_causal))
    if call.padding is None or not call.batched:
        return None
    valid: Any = call.valid
    if not ends_in_padding(encoder, valid):
        return None
    return Route(src, mask, key_padding_mask, is_causal, None, mask_hidden_rows(attention, valid), True, why)


def mask_hidden_rows(attention: FlashMultiHeadAttention, valid: Tensor) -> Tensor:
    """Padding as a mask over an encoder's output."""
    hidden = ~valid if attention.batch_first else ~valid.T
    return hidden[..., None]


def route_real_first(
    encoder: nn.TransformerEncoder, src: Tensor, mask: Any, rule: Any, is_causal: bool
) -> RealFirst | None:
    """The tokens with the real ones of each item first, where a kernel then reads keys where they lie.

    Every row stays, and no layer looks at positions; so none notices.
    """
    if mask is not None or type(rule) is not KeyPadding or not eager(src):
        return None
    if is_causal or not moves_keys(src, rule.valid):
        return None
    attentions = attentions_of(encoder)
    for attention in find_different(attentions):
        if attention.batch_first != attentions[0].batch_first:
            return None
        call = read_call(attention, make_arguments(src, None, rule, False))
        if padding.why_order_counts(attention, call) is not None:
            return None
    return RealFirst(src, rule, attentions[0].batch_first)


def moves_keys(src: Tensor, valid: Tensor) -> bool:
    """Kernels here may have keys moved, and gain by it, so that it is worth looking further."""
    batch, seqlen = valid.shape
    return src.is_cuda and worth_moving(batch, seqlen, seqlen, src.shape[2])


def leave(encoder: nn.TransformerEncoder, route: Route, output: Tensor) -> Tensor:
    """The encoder's output of what its last layer returned; zeros where padding was left out."""
    if route.padded_norm:
        output = restore_tokens(route, output)
    if encoder.norm is not None:
        output = encoder.norm(output)
    return output if route.padded_norm else restore_tokens(route, output)


def restore_tokens(route: Route, output: Tensor) -> Tensor:
    """Put tokens back where they were, zeros where padding was."""
    if route.packed is not None:
        return route.packed.unpack(output)
    return output if route.hidden is None else output.masked_fill(route.hidden, 0.0)


ITEM = 2**20
"""Multiplications in a layer's projections that take as long as an item of a packed batch costs more, on a CPU."""


def pays(encoder: nn.TransformerEncoder, valid: Tensor) -> bool:
    """Packing saves more than it costs, which is as much as some more items; on a GPU always, where counting waits."""
    if valid.is_cuda:
        return True
    layer: Any = encoder.layers[0]
    width = layer.self_attn.embed_dim
    weights: int = 2 * width * (2 * width + layer.linear1.out_features)
    return (valid.numel() - int(valid.sum())) * weights > ITEM * (len(valid) + 16)


def would_nest(encoder: nn.TransformerEncoder, src: Tensor, mask: Mask | Tensor | None) -> bool:
    """The stock encoder would make nested tensors of a batch whose padding comes last."""
    if not torch.backends.mha.get_fastpath_enabled() or not getattr(encoder, "use_nested_tensor", False):
        return False
    if encoder.layers[0].training or src.dim() != 3 or mask is not None or is_autocast_enabled():
        return False
    return not (torch.is_grad_enabled() and any(x.requires_grad for x in (src, *encoder.parameters())))


def ends_in_padding(encoder: nn.TransformerEncoder, valid: Any) -> bool:
    """The real tokens of each item come first; looked at where the stock encoder does, which waits for a GPU."""
    return not getattr(encoder, "mask_check", True) or not bool((valid[:, 1:] & ~valid[:, :-1]).any())


def why_rows_stay(attentions: list[FlashMultiHeadAttention], call: Reading) -> str | None:
    """Why the attention of some layer needs every row."""
    first = attentions[0]
    if not call.batched:
        return "src without a batch axis"
    different = find_different(attentions)
    for attention in different:
        if attention.rotary is not None:
            return "rotary, which turns a token by its slot"
        if (attention.batch_first, attention.trust_is_causal) != (first.batch_first, first.trust_is_causal):
            return "layers that differ in batch_first or trust_is_causal"
        why = padding.why_not_packable(attention, call)
        if why is not None:
            return why
    return padding.why_holes_stay(call, *different)


def hand_down(encoder: nn.TransformerEncoder, src: Tensor, mask: Any, padding: Any, known: bool) -> Any:
    """A bool padding mask as one rule for every layer, which keeps what is computed of it; else as it came.

    As a tensor it goes to layers, hooks and patches that may count on one, into a graph, and where it is an error.
    ``known`` of layers that are known to take tokens one by one.
    """
    if not isinstance(padding, Tensor) or padding.dtype != torch.bool:
        return padding
    if not is_compiling() and not (eager(padding) and eager(src)):
        return padding
    if src.is_nested or src.dim() != 3 or (isinstance(mask, Tensor) and mask.dtype != torch.bool):
        return padding
    for layer in encoder.layers:  # not all(...), which Dynamo 2.8 does not trace
        if not (known or find_unknown_call(layer) is None) or not has_sizes(layer.self_attn, src, padding):
            return padding
    if GLOBAL_HOOKS[0] or GLOBAL_HOOKS[1]:
        return padding
    return mark_private(KeyPadding(~padding if is_compiling() else make_plain(lambda: ~padding)))


GLOBAL_HOOKS = (
    torch.nn.modules.module._global_forward_hooks,
    torch.nn.modules.module._global_forward_pre_hooks,
)


def has_sizes(attention: FlashMultiHeadAttention, src: Tensor, padding: Tensor) -> bool:
    """A mask has the sizes (batch, seqlen) of a layer's input."""
    batch, seqlen = src.shape[:2] if attention.batch_first else (src.shape[1], src.shape[0])
    return padding.shape == (batch, seqlen)

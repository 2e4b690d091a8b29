"""How padding goes through an encoder: as it was given, or left out once for all layers."""

from __future__ import annotations

import functools
import operator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.modules.module import _has_any_global_hook

from ..backends.rewrites.documents import worth_moving
from ..backends.rewrites.order import RealFirst
from ..host.torch_state import eager
from ..layer import padding
from ..layer.call import Reading, read_call
from ..layer.features import HOPS, MARK, replaced
from ..layer.module import FlashMultiHeadAttention
from ..layer.packed import Packed
from ..problem import packing
from ..problem.computed import make_plain
from ..problem.masks import Mask, joined
from ..problem.ragged import KeyPadding, Padding, private


class Route(NamedTuple):
    """What the layers of an encoder are called with; ``leave`` is the way back.

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
            key_padding_mask = handed_down(encoder, src, mask, key_padding_mask, False)
        return Route(src, mask, key_padding_mask, is_causal)
    strange = unknown_layers(encoder)
    way = Route(src, mask, None, is_causal)
    if key_padding_mask is not None:
        way = around(encoder, src, mask, key_padding_mask, is_causal, strange)
    return way._replace(straight=strange is None)


def around(
    encoder: nn.TransformerEncoder,
    src: Tensor,
    mask: Mask | Tensor | None,
    key_padding_mask: Tensor,
    is_causal: bool,
    strange: str | None,
) -> Route:
    """The route beside padding. ``strange`` is what in a layer may count on (batch, seqlen)."""
    way, why = left_out(encoder, src, mask, key_padding_mask, is_causal, strange)
    if way is not None:
        return way
    rule = handed_down(encoder, src, mask, key_padding_mask, strange is None)
    first = real_first(encoder, src, mask, rule, is_causal) if strange is None else None
    if first is not None:
        return Route(first.tokens, None, first.padding, False, first, None, True, why)
    return Route(src, mask, rule, is_causal, why=why)


def left_out(
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
    norm = unknown_norm(encoder)
    nesting = nests and (norm is not None or not all(skipping))  # as stock does, whose last norm sees padding
    why = strange if strange is not None or nesting else norm
    if why is None:
        attentions: list[Any] = [layer.self_attn for layer in encoder.layers]
        call = read_call(attentions[0], src, src, src, key_padding_mask, False, mask, is_causal)
        why = refusal(attentions, call)
        if why is None and nesting and not ends_in_padding(encoder, call.valid):
            why = "padding before real tokens, where the stock encoder makes no nested tensors"
    if why is not None:
        return (zeroed(encoder, src, mask, key_padding_mask, is_causal, why) if nests else None), why
    assert call.padding is not None
    valid: Any = call.valid
    windows = packing.find_windows(call.mask)
    if not pays(encoder, valid):
        hidden = hidden_rows(attentions[0], valid)
        # as a rule, which a layer does not leave out
        return Route(src, joined(call.padding, *windows), None, False, None, hidden, nesting), None
    real = packing.tokens_of(call.padding, valid.shape[1])
    if real.places.shape[0] == valid.numel():
        return Route(src, joined(*windows), None, False), None
    packed = Packed(src, real, attentions[0].batch_first)
    return Route(packed.tokens, joined(packed.documents, *windows), None, False, packed, None, nesting), None


def zeroed(
    encoder: nn.TransformerEncoder, src: Tensor, mask: Any, key_padding_mask: Any, is_causal: bool, why: str
) -> Route | None:
    """Every row computed with the padding as it came, and zeros behind the last layer, as nested tensors give."""
    attention = getattr(encoder.layers[0], "self_attn", None)
    if not isinstance(attention, FlashMultiHeadAttention):
        return None
    call = read_call(attention, src, src, src, key_padding_mask, False, mask, is_causal)
    if call.padding is None or not call.batched:
        return None
    valid: Any = call.valid
    if not ends_in_padding(encoder, valid):
        return None
    return Route(src, mask, key_padding_mask, is_causal, None, hidden_rows(attention, valid), True, why)


def hidden_rows(attention: Any, valid: Tensor) -> Tensor:
    """Padding as a mask over an encoder's output."""
    hidden = ~valid if attention.batch_first else ~valid.T
    return hidden[..., None]


def real_first(encoder: nn.TransformerEncoder, src: Tensor, mask: Any, rule: Any, is_causal: bool) -> RealFirst | None:
    """The tokens with the real ones of each item first, where a kernel then reads keys where they lie.

    Every row stays, and no layer looks at positions; so none notices.
    """
    if mask is not None or type(rule) is not KeyPadding or not eager(src):
        return None
    if is_causal or not moves_keys(src, rule.valid):
        return None
    attentions: list[Any] = [layer.self_attn for layer in encoder.layers]
    for attention in different(attentions):
        if attention.batch_first != attentions[0].batch_first:
            return None
        call = read_call(attention, src, src, src, rule, False, None, False)
        if padding.positioned(attention, call) is not None:
            return None
    return RealFirst(src, rule, attentions[0].batch_first)


def moves_keys(src: Tensor, valid: Tensor) -> bool:
    """Kernels here may have keys moved, and gain by it, so that it is worth looking further."""
    batch, seqlen = valid.shape
    return src.is_cuda and worth_moving(batch, seqlen, seqlen, src.shape[2])


def leave(encoder: nn.TransformerEncoder, route: Route, output: Tensor) -> Tensor:
    """The encoder's output of what its last layer returned; zeros where padding was left out."""
    if route.padded_norm:
        output = back(route, output)
    if encoder.norm is not None:
        output = encoder.norm(output)
    return output if route.padded_norm else back(route, output)


def back(route: Route, output: Tensor) -> Tensor:
    """What the layers returned, zeros where padding was."""
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
    if encoder.layers[0].training or src.dim() != 3 or mask is not None or torch.is_autocast_enabled():
        return False
    return not (torch.is_grad_enabled() and any(x.requires_grad for x in (src, *encoder.parameters())))


def ends_in_padding(encoder: nn.TransformerEncoder, valid: Any) -> bool:
    """The real tokens of each item come first; looked at where the stock encoder does, which waits for a GPU."""
    return not getattr(encoder, "mask_check", True) or not bool((valid[:, 1:] & ~valid[:, :-1]).any())


def refusal(attentions: list[Any], call: Reading) -> str | None:
    """Why the attention of some layer needs every row."""
    first = attentions[0]
    if not call.batched:
        return "src without a batch axis"
    for attention in different(attentions):
        if (attention.batch_first, attention.trust_is_causal) != (first.batch_first, first.trust_is_causal):
            return "layers that differ in batch_first or trust_is_causal"
        why = padding.unpackable(attention, call)
        if why is not None:
            return why
    return padding.beside_holes(call, *[attention.window for attention in attentions])


def different(attentions: list[Any]) -> list[Any]:
    """The first layer, and those that are not like it in all that decides whether padding may go."""
    first = attentions[0]
    kind, form = type(first), form_of(first)
    return [first, *(x for x in attentions[1:] if type(x) is not kind or has_more(x) or form_of(x) != form)]


form_of = operator.attrgetter(
    "batch_first", "trust_is_causal", "window", "backend", "num_heads", "embed_dim", "add_zero_attn"
)


def has_more(attention: Any) -> bool:
    """Methods that are the instance's, or a learned key."""
    return attention.bias_k is not None or not attention.__dict__.keys().isdisjoint(HOPS)


def handed_down(encoder: Any, src: Any, mask: Any, padding: Any, known: bool) -> Any:
    """A bool padding mask as one rule for every layer, which keeps what is computed of it; else as it came.

    As a tensor it goes to layers, hooks and patches that may count on one, into a graph, and where it is an error.
    ``known`` of layers that are known to take tokens one by one.
    """
    if not isinstance(padding, Tensor) or padding.dtype != torch.bool:
        return padding
    if not torch.compiler.is_compiling() and not (eager(padding) and eager(src)):
        return padding
    if src.is_nested or src.dim() != 3 or (isinstance(mask, Tensor) and mask.dtype != torch.bool):
        return padding
    for layer in encoder.layers:  # not all(...), which Dynamo 2.8 does not trace
        if not fits(layer.self_attn, src, padding) if known else not takes_rules(layer, src, padding):
            return padding
    if GLOBAL_HOOKS[0] or GLOBAL_HOOKS[1]:
        return padding
    return private(KeyPadding(~padding if torch.compiler.is_compiling() else make_plain(lambda: ~padding)))


GLOBAL_HOOKS = (
    torch.nn.modules.module._global_forward_hooks,
    torch.nn.modules.module._global_forward_pre_hooks,
)


def takes_rules(layer: Any, src: Tensor, padding: Tensor) -> bool:
    """An encoder layer is as this package wrote it, down to its attention, and the padding fits."""
    attention = getattr(layer, "self_attn", None)
    if type(layer) not in KNOWN or not isinstance(attention, FlashMultiHeadAttention):
        return False
    if KNOWN[type(layer)] != tuple([getattr(type(layer), name) for name in BLOCKS]) or replaced(attention):
        return False
    for name in BLOCKS:
        if name in layer.__dict__:
            return False
    modules: tuple[Any, ...] = (layer, attention)
    for module in modules:
        ours = 1 if MARK in module._forward_pre_hooks else 0
        if module._forward_hooks or len(module._forward_pre_hooks) > ours or module._compiled_call_impl is not None:
            return False
    return fits(attention, src, padding)


def fits(attention: Any, src: Tensor, padding: Tensor) -> bool:
    """A mask has the sizes (batch, seqlen) of a layer's input."""
    batch, seqlen = src.shape[:2] if attention.batch_first else (src.shape[1], src.shape[0])
    return padding.shape == (batch, seqlen)


# What is known to take tokens one by one

CALLS = ("forward", "_call_impl")
"""The methods of any module that run."""
BLOCKS = (*CALLS, "__call__", "_sa_block", "_ff_block")
"""Those of an encoder layer."""
blocks_of = operator.attrgetter(*BLOCKS)
KNOWN: dict[type[nn.Module], tuple[Any, ...]] = {}
"""The package's own encoder layers, and those methods as they were written."""

PARTS = ("linear1", "dropout", "linear2", "norm1", "norm2", "dropout1", "dropout2", "activation")
"""The modules of an encoder layer beside ``self_attn``; ``activation`` may be a function."""

# fmt: off
FUNCTIONS = [
    F.relu, F.gelu, F.silu, F.mish, F.elu, F.selu, F.celu, F.leaky_relu, F.relu6, F.hardswish, F.hardtanh, F.softplus,
    F.tanh, F.sigmoid, F.logsigmoid, torch.relu, torch.tanh, torch.sigmoid,
]
MODULES: list[type[nn.Module]] = [
    nn.Linear, NonDynamicallyQuantizableLinear, nn.LayerNorm, nn.RMSNorm, nn.Dropout, nn.Identity,
    nn.ReLU, nn.GELU, nn.SiLU, nn.Mish, nn.ELU, nn.SELU, nn.CELU, nn.LeakyReLU, nn.ReLU6, nn.Hardswish, nn.Hardtanh,
    nn.Softplus, nn.Tanh, nn.Sigmoid, nn.LogSigmoid,
]
# fmt: on
FORWARDS = {kind.forward for kind in MODULES}


def expect(kind: type[nn.Module]) -> None:
    """Know an encoder layer as it is."""
    KNOWN[kind] = blocks_of(kind)


def unknown(encoder: nn.TransformerEncoder) -> str | None:
    """What in an encoder may count on (batch, seqlen), so that padding stays; ``None`` for nothing."""
    return unknown_layers(encoder) or unknown_norm(encoder)


def unknown_layers(encoder: nn.TransformerEncoder) -> str | None:
    """The same of its layers."""
    if _has_any_global_hook():
        return "hooks on every module"
    for number, layer in enumerate(encoder.layers):
        why = unknown_layer(layer)
        if why is not None:
            return f"layers.{number}{why}"
    return None


def unknown_norm(encoder: nn.TransformerEncoder) -> str | None:
    """The same of its last norm."""
    why = None if encoder.norm is None else unknown_part(encoder.norm)
    return None if why is None else f"norm {why}"


def unknown_layer(layer: Any) -> str | None:
    """The same of one layer."""
    kind = type(layer)
    own = layer.__dict__.keys()
    if kind not in KNOWN or KNOWN[kind] != blocks_of(kind) or not own.isdisjoint(BLOCKS):
        return f" is a {kind.__name__} with code of its own, or none of flashmha's"
    if hooked(layer):
        return " has hooks"
    modules = layer._modules
    attention = modules.get("self_attn")
    if not isinstance(attention, FlashMultiHeadAttention):
        return f".self_attn is a {type(attention).__name__}"
    if replaced(attention):
        return f".self_attn has a {', '.join(replaced(attention))} of its own"
    if hooked(attention):
        return ".self_attn has hooks"
    for name in PARTS:
        part = modules[name] if name in modules else getattr(layer, name)
        why = unknown_part(part)
        if why is not None:
            return f".{name} {why}"
    why = unknown_part(attention.out_proj) if attention.call_out_proj else None
    return None if why is None else f".self_attn.out_proj {why}"


def unknown_part(part: Any) -> str | None:
    """The same of a module, or a function, that is no attention."""
    if not isinstance(part, nn.Module):
        function = part.func if isinstance(part, functools.partial) else part
        return None if function in FUNCTIONS else f"is {getattr(part, '__name__', 'a function')}, which is not torch's"
    kind, own = type(part), part.__dict__
    if not own.keys().isdisjoint(CALLS) or kind.forward not in FORWARDS or kind.__call__ is not nn.Module.__call__:
        return f"is a {kind.__name__}, which may mix tokens"
    if "normalized_shape" in own and len(own["normalized_shape"]) != 1:
        return "normalises over more than one token"
    return "has hooks" if hooked(part) else None


def hooked(module: nn.Module) -> bool:
    """Hooks run around a module, but for the package's own mark, or a compiled form in its place."""
    before: dict[Any, Any] = module._forward_pre_hooks
    if len(before) > (MARK in before) or module._forward_hooks or module._backward_hooks or module._backward_pre_hooks:
        return True
    return module._compiled_call_impl is not None

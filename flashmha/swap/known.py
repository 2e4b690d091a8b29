"""What is known of the modules of encoders and decoders: that they take tokens one by one, and run as written."""

from __future__ import annotations

import functools
import operator
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.modules.module import _has_any_global_hook

from ..layer.features import HOPS, MARK, find_replaced
from ..layer.module import FlashMultiHeadAttention
from ..layer.options import owns_parts
from ..layer.written import is_as_written

MODULE_CALLS = ("forward", "_call_impl")
"""The methods of any module that run."""
BLOCKS = (*MODULE_CALLS, "__call__", "_sa_block", "_ff_block")
"""Those of an encoder layer."""
DECODER_BLOCKS = (*BLOCKS, "_mha_block", "_behind", "_attend")
"""Those of a decoder layer."""

BLOCK_PARTS = ("linear1", "dropout", "linear2", "norm1", "norm2", "dropout1", "dropout2", "activation")
"""The modules of an encoder layer beside ``self_attn``; ``activation`` may be a function."""
DECODER_PARTS = (*BLOCK_PARTS, "norm3", "dropout3")
"""Those of a decoder layer beside its two attentions."""

ATTENTIONS = ("self_attn", "multihead_attn")
"""The attentions of a decoder layer; the first is that of an encoder layer."""

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


def is_torchs_own(kind: type[nn.Module]) -> bool:
    """The forward of one of torch's modules is the one in torch's file, which a patch before this import is not."""
    code = getattr(kind.forward, "__code__", None)
    return code is not None and code.co_filename == sys.modules[kind.__module__].__file__


calls_of = operator.attrgetter(*MODULE_CALLS, "__call__")
"""What runs where a module of a class is called."""
CALLS = {(kind.forward, nn.Module._call_impl, nn.Module.__call__) for kind in MODULES if is_torchs_own(kind)}


def find_unknown(encoder: nn.TransformerEncoder) -> str | None:
    """Say what in an encoder may count on (batch, seqlen), so that padding stays; ``None`` for nothing."""
    return find_unknown_layers(encoder) or find_unknown_norm(encoder)


def find_unknown_layers(model: nn.TransformerEncoder | nn.TransformerDecoder) -> str | None:
    """The same of the layers of an encoder, or of a decoder."""
    if _has_any_global_hook():
        return "hooks on every module"
    for number, layer in enumerate(model.layers):
        why = find_unknown_layer(layer)
        if why is not None:
            return f"layers.{number}{why}"
    return None


def find_unknown_norm(encoder: nn.TransformerEncoder) -> str | None:
    """The same of an encoder's last norm."""
    why = None if encoder.norm is None else find_unknown_part(encoder.norm)
    return None if why is None else f"norm {why}"


def find_unknown_layer(layer: nn.Module) -> str | None:
    """The same of one layer."""
    why = find_unknown_call(layer)
    if why is not None:
        return why
    modules, own = layer._modules, layer.__dict__
    decodes = isinstance(layer, nn.TransformerDecoderLayer)
    for name in DECODER_PARTS if decodes else BLOCK_PARTS:
        part = None if name in own else modules.get(name)
        if part is None and name != "activation":
            return f".{name} is not among its modules"
        why = find_unknown_part(getattr(layer, name) if part is None else part)
        if why is not None:
            return f".{name} {why}"
    for name in ATTENTIONS if decodes else ATTENTIONS[:1]:
        attention: Any = modules[name]
        why = find_unknown_part(attention._modules.get("out_proj")) if attention.call_out_proj else None
        if why is not None:
            return f".{name}.out_proj {why}"
    return None


def find_unknown_call(layer: nn.Module) -> str | None:
    """Say what around a layer's attention is not as this package wrote it; ``None`` for nothing. Dynamo traces this."""
    kind = type(layer)
    if not is_intact(layer):
        return f" is a {kind.__name__} with code of its own, or none of flashmha's"
    if is_hooked(layer):
        return " has hooks"
    for name in ATTENTIONS if isinstance(layer, nn.TransformerDecoderLayer) else ATTENTIONS[:1]:
        attention = layer._modules.get(name)
        if not isinstance(attention, FlashMultiHeadAttention):
            return f".{name} is a {type(attention).__name__}"
        own = find_replaced(attention)
        if own:
            return f".{name} has a {', '.join(own)} of its own"
        if is_hooked(attention):
            return f".{name} has hooks"
    return None


def is_intact(layer: nn.Module) -> bool:
    """A layer is of the package's own class, and neither that nor the instance has another method."""
    if not is_as_written(type(layer)) or not isinstance(layer, TORCHS_LAYERS):
        return False
    for name, value in type(layer)._written.values.items():  # type: ignore[union-attr]
        if name in layer.__dict__ or getattr(type(layer), name) is not value:
            return False
    return True


TORCHS_LAYERS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


def find_unknown_part(part: Any) -> str | None:
    """The same of a module, or a function, that is no attention."""
    if not isinstance(part, nn.Module):
        function = part.func if isinstance(part, functools.partial) else part
        return None if function in FUNCTIONS else f"is {getattr(part, '__name__', 'a function')}, which is not torch's"
    kind, own = type(part), part.__dict__
    if calls_of(kind) not in CALLS or "forward" in own or "_call_impl" in own:
        return f"is a {kind.__name__}, which may mix tokens"
    if "normalized_shape" in own and len(own["normalized_shape"]) != 1:
        return "normalises over more than one token"
    return "has hooks" if is_hooked(part) else None


def is_hooked(module: nn.Module) -> bool:
    """Hooks run around a module, but for the package's own mark, or a compiled form in its place."""
    before: dict[Any, Any] = module._forward_pre_hooks
    if len(before) > (MARK in before) or module._forward_hooks or module._backward_hooks or module._backward_pre_hooks:
        return True
    return module._compiled_call_impl is not None


def find_different(attentions: list[FlashMultiHeadAttention]) -> list[FlashMultiHeadAttention]:
    """The first layer, and those that are not like it in all that decides whether padding may go."""
    first = attentions[0]
    kind, form = type(first), form_of(first)
    return [first, *(x for x in attentions[1:] if type(x) is not kind or has_more(x) or form_of(x) != form)]


form_of = operator.attrgetter(
    *("batch_first", "trust_is_causal", "window", "causal", "softcap", "backend", "num_heads", "free_num_kv_heads"),
    *("embed_dim", "free_head_dim", "free_value_head_dim", "add_zero_attn"),
)


def has_more(attention: FlashMultiHeadAttention) -> bool:
    """Methods or parts that are the instance's, or a learned key."""
    return owns_parts(attention) or attention.bias_k is not None or not attention.__dict__.keys().isdisjoint(HOPS)

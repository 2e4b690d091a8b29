"""A layer as a stock module and back: the same parameters, hooks and attributes in an object of another class."""

from __future__ import annotations

from typing import Any

from torch import nn

from .features import EXTRA_KEYS, HOPS, MARK, OWN_PROJECTIONS, find_beyond_stock, find_replaced
from .options import HEAD_SIZES, PARTS, STOCK_VALUES
from .written import find_own_code, find_shadows

STOCK_FORWARD = nn.MultiheadAttention.forward
"""PyTorch's own, as it was when this package was imported."""


def make_stock(layer: Any) -> nn.MultiheadAttention:
    """The stock module of a layer.

    Raises:
        ValueError: something would be lost.
    """
    kept = ("backend", "call_out_proj", "trust_is_causal")
    lacking = [name for name in find_beyond_stock(layer) if name not in kept]
    written = type(layer)._written.kind
    lacking = list(dict.fromkeys((*lacking, *find_replaced(layer), *find_own_code(layer, written))))
    if lacking:
        raise ValueError(
            f"to_torch must not lose anything: nn.MultiheadAttention has no {', no '.join(lacking)}, "
            f"which this {type(layer).__name__} uses."
        )
    twin: nn.MultiheadAttention = make_twin(layer, nn.MultiheadAttention)
    return twin


def make_layer(module: nn.MultiheadAttention, kind: Any) -> Any:
    """The layer of a stock module, of a class without an ``__init__`` of its own.

    Raises:
        TypeError, ValueError: something would be lost.
    """
    if kind.__init__ is not kind._written.kind.__init__:
        raise TypeError(
            f"from_torch must be called on a class without an __init__ of its own, which would not run, got "
            f"{kind.__name__}; build such a layer yourself and load the module's state_dict."
        )
    if type(module) is not nn.MultiheadAttention:
        raise TypeError(f"module must be exactly an nn.MultiheadAttention, got {type(module).__name__}.")
    why = why_not_ours(module)
    if why is not None:
        raise ValueError(f"module must lose nothing as a {kind.__name__}, got one that {why}.")
    return make_twin(module, kind)


def why_not_ours(module: nn.MultiheadAttention) -> str | None:
    """Why a stock module cannot be a layer of ours without losing something; ``None`` where it can."""
    if nn.MultiheadAttention.forward is not STOCK_FORWARD:
        return "runs a patched nn.MultiheadAttention.forward, which would not run after a swap"
    own = find_shadows(module)
    if own:
        return f"has a {', '.join(own)} of its own on the instance, which would run in place of ours"
    names = (*STOCK_VALUES, *HOPS, *EXTRA_KEYS, *OWN_PROJECTIONS, *HEAD_SIZES, *METHODS)
    used = [name for name in names if hasattr(module, name)]
    if used:
        return f"has an attribute {', '.join(used)} of its own, which would mean something else after a swap"
    return None


METHODS = ("keys_values", "to_torch", "from_torch", "_written", "_attend_as_stock")
"""Other names of ours that the stock class has not."""


def make_twin(module: nn.MultiheadAttention, kind: type[Any]) -> Any:
    """A module of another class with the same parameters, hooks and attributes; dicts are copied, tensors not."""
    twin: Any = object.__new__(kind)
    twin.__dict__.update({name: copy_containers(value) for name, value in vars(module).items()})
    vars(twin).pop("_compiled_call_impl", None)  # what ``compile()`` made of the other module
    if kind is nn.MultiheadAttention:
        forget(twin)
    return twin


def forget(module: nn.Module) -> None:
    """Take out of a stock module what means something to a layer of ours alone."""
    for name in (*STOCK_VALUES, *EXTRA_KEYS):
        vars(module).pop(name, None)
    for name in PARTS:
        module._modules.pop(name, None)
        module._parameters.pop(name, None)
    module._forward_pre_hooks.pop(MARK, None)  # type: ignore[call-overload]


def copy_containers(value: Any) -> Any:
    """A shallow copy of a dict or a set; anything else as it is."""
    return value.copy() if isinstance(value, (dict, set)) else value

"""What a layer has beyond ``nn.MultiheadAttention``: features that are set, hops that are overridden.

The class's values mean *absent*, since the state of a stock module has none of these. No annotation here may be
postponed: TorchScript reads them.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from .backends import expand
from .masks import Window

F = TypeVar("F", bound=Callable[..., Any])

ABSENT: dict[str, Any] = {
    "num_kv_heads": None,
    "window": None,
    "backend": None,
    "call_out_proj": False,
    "need_weights": True,
    "trust_is_causal": False,
    "skip_padding": False,
}
"""Every feature, and its value in a layer that has none."""

HOPS = ("project", "process_heads", "merge")
"""What a subclass overrides."""

SWITCHES = tuple(name for name, value in ABSENT.items() if isinstance(value, bool))


def hop(method: F) -> F:
    """A step of the forward that a subclass may override; TorchScript leaves it alone."""
    method.flashmha_hop = True  # type: ignore[attr-defined]
    ignored: F = torch.jit.unused(method)  # type: ignore[assignment]
    return ignored


def overridden(layer: nn.Module) -> list[str]:
    """The hops that are not the package's own."""
    return [name for name in HOPS if not hasattr(getattr(layer, name), "flashmha_hop")]


def changed(layer: nn.Module) -> list[str]:
    """What a layer has that ``nn.MultiheadAttention`` has not: features set, hops overridden."""
    return [name for name, absent in ABSENT.items() if getattr(layer, name) != absent] + overridden(layer)


def mark(layer: nn.Module) -> None:
    """Keep ``nn.TransformerEncoderLayer`` from computing a layer's attention behind its back.

    In eval the encoder layer hands the weights of ``self_attn`` to one fused operator and never calls it, unless a
    module inside has a forward hook. So a layer with something to lose carries one that does nothing.
    """
    hooks = layer._forward_pre_hooks
    if changed(layer):
        hooks[MARK] = keep_forward  # type: ignore[index]
    else:
        hooks.pop(MARK, None)  # type: ignore[call-overload]


MARK = "flashmha"


def keep_forward(layer: nn.Module, arguments: Any) -> None:
    """A forward pre-hook that does nothing; see ``mark``."""


def check_features(features: dict[str, Any]) -> None:
    """Raise where a feature's value means nothing, before anything is changed."""
    if features.get("backend") is not None:
        expand(features["backend"])
    if features.get("window") is not None:
        as_window(features["window"])
    for name in SWITCHES:
        if not isinstance(features.get(name, True), bool):
            raise TypeError(f"{name} must be True or False, got {features[name]!r}.")


def check_kv_heads(num_heads: int, num_kv_heads: int | None) -> None:
    if num_kv_heads is not None and (num_kv_heads < 1 or num_heads % num_kv_heads):
        raise ValueError(
            f"num_kv_heads must be a divisor of num_heads, got num_heads={num_heads} and num_kv_heads={num_kv_heads}."
        )


def as_window(window: Window | Sequence[int | None]) -> Window:
    if isinstance(window, Window):
        return window
    if not isinstance(window, tuple) or len(window) != 2:
        raise ValueError(f"window must be a Window or a pair (left, right), got {window!r}.")
    return Window(*window)

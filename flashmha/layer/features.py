"""What a layer has beyond ``nn.MultiheadAttention``: options that are set, hops that are overridden.

The class's values mean *absent*, since the state of a stock module has none of these. No annotation here may be
postponed: TorchScript reads them.
"""

from typing import Any

from torch import nn

from ..backends.choice.wishes import preference
from .options import find_set
from .protocol import Layer

HOPS = ("project", "process_heads", "attend", "process_weights", "merge")
"""What a subclass overrides."""

EXTRA_KEYS = ("keys_before", "keys_after")
"""What a subclass says about the keys that its ``process_heads`` adds."""

OWN_PROJECTIONS = ("has_in_proj", "has_out_proj")
"""What a subclass says about the projections that its hops use."""

PATCHED = (*HOPS, "window", "causal", "softcap", "softmax_scale", "backend", "call_out_proj")
"""What each call looks for on the class, where a patch may stand. A size of heads comes with parameters, and keys
beside the call's own with a hop."""

SPECIAL = (*PATCHED, "free_num_kv_heads", "free_head_dim", "free_value_head_dim", *EXTRA_KEYS)
"""What a plain layer has as its class was written."""


def is_ours(layer: Layer, name: str) -> bool:
    """A method is the package's own, neither overridden by a subclass nor patched on the class or the instance."""
    return name not in layer.__dict__ and is_written(layer, name)


def is_written(layer: Layer, name: str) -> bool:
    """A method of a layer's class is the package's own."""
    kind: Any = type(layer)
    return getattr(kind, name) is kind._written.values[name]


def has_hops(layer: Layer) -> bool:
    """Some hop is not the package's own; asked in each call, so in one step."""
    kind: Any = type(layer)
    values = kind._written.values
    if (
        kind.project is values["project"]
        and kind.process_heads is values["process_heads"]
        and kind.attend is values["attend"]
        and kind.process_weights is values["process_weights"]
        and kind.merge is values["merge"]
    ):
        own = layer.__dict__
        for name in HOPS:  # noqa: SIM110
            if name in own:
                return True
        return False
    return True


def find_overridden(layer: Layer) -> list[str]:
    """The hops that are not the package's own."""
    return [name for name in HOPS if not is_ours(layer, name)]


def find_beyond_stock(layer: Layer) -> list[str]:
    """List the options set and the hops overridden, which ``nn.MultiheadAttention`` has not."""
    return [name.removeprefix("free_") for name in find_set(layer)] + find_overridden(layer)


def find_replaced(layer: Layer) -> list[str]:
    """The methods around the hops that are not the package's own: ``forward``, and what calls it."""
    kind: Any = type(layer)
    found = [] if is_ours(layer, "forward") else ["forward"]
    if kind.__call__ is not nn.Module.__call__:
        found.append("__call__")
    if kind._call_impl is not nn.Module._call_impl or "_call_impl" in layer.__dict__:
        found.append("_call_impl")
    return found


def has_to_run(layer: Layer) -> bool:
    """Something is lost where a layer's weights are used and its ``forward`` is never called.

    That is a feature, a method of its own, an ``out_proj`` that cannot be read, or a backend that is named at present.
    """
    if find_beyond_stock(layer) or find_replaced(layer) or is_quantised(layer.__dict__["_modules"].get("out_proj")):
        return True
    return preference(None) is not None


def is_quantised(out_proj: nn.Module | None) -> bool:
    """An ``out_proj`` of ``torch.ao``, whose weight is a method."""
    return callable(getattr(type(out_proj), "weight", None))


def mark(layer: Layer) -> None:
    """Keep ``nn.TransformerEncoderLayer`` from computing a layer's attention behind its back.

    In eval the encoder layer hands the weights of ``self_attn`` to one fused operator and never calls it, unless a
    module inside has a forward hook. So a layer that has to run carries one that does nothing. The encoder layer looks
    for hooks on every ``modules()`` of its own, in each call; that is when a layer is marked, as it is then.
    """
    hooks = layer._forward_pre_hooks
    if has_to_run(layer):
        if MARK not in hooks:
            hooks[MARK] = keep_forward
    elif MARK in hooks:
        del hooks[MARK]


MARK = "flashmha"


def keep_forward(layer: nn.Module, arguments: Any) -> None:
    """A forward pre-hook that does nothing; see ``mark``."""

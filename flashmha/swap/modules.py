"""The modules of a model: what is swapped, what is left and why, what is put back."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from torch import nn

from ..layer.twin import why_not_ours
from ..layer.written import find_shadows

UNDO = "_flashmha_undo"
"""On a module that was changed: attribute -> whether it was there before, and its value."""
CLASS = "__class__"
"""Among these: the class that a swap gave, and the one before."""


def check_model(model: object) -> None:
    """Raise ``TypeError`` unless a model is one."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {model!r}.")


def why_stock_stays(module: nn.MultiheadAttention, fsdp: bool) -> str | None:
    """Why a stock layer must stay as it is."""
    if hasattr(module, "parametrizations"):
        return "parametrized: swap first, parametrize then"
    if fsdp:
        return "wrapped by FSDP: swap first, wrap then"
    if type(module) is not nn.MultiheadAttention:
        return "a subclass of nn.MultiheadAttention, whose own code a swap would lose"
    return why_not_ours(module)


def why_not_yet(module: nn.Module) -> str | None:
    """Why a layer or an encoder that was swapped cannot be restored yet."""
    given, before = vars(module).get(UNDO, {}).get(CLASS, (None, None))
    if given is not None and type(module) is not given:
        return "changed class since, which has to be undone before restore_mha can"
    grouped = before is nn.MultiheadAttention and getattr(module, "free_num_kv_heads", None) is not None
    return "got grouped heads since, which nn.MultiheadAttention has not" if grouped else None


def why_own_forward(module: nn.Module) -> str | None:
    """Say which methods of an instance run in place of its class's; ``None`` for none."""
    own = find_shadows(module)
    return f"the instance has a {', '.join(own)} of its own, which runs in place of ours" if own else None


def walk(model: nn.Module) -> Iterator[tuple[str, nn.Module, bool]]:
    """Every module once: its name, itself, and whether FSDP (either version) wraps it or something around it."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # nothing is wrapped where it was not imported
    kinds = tuple(getattr(fsdp, name) for name in ("FullyShardedDataParallel", "FSDPModule") if hasattr(fsdp, name))
    wrapped: set[str] = set()
    for name, module in model.named_modules():
        inside = (bool(name) and name.rpartition(".")[0] in wrapped) or isinstance(module, kinds)
        if inside:
            wrapped.add(name)
        yield name, module, inside


def holds(module: nn.Module | None, kind: type[nn.Module]) -> bool:
    """The module is one of a kind or wraps one, as ``torch.compile`` and adapters do."""
    return module is not None and any(isinstance(inner, kind) for inner in module.modules())


def remember(module: nn.Module, *names: str) -> None:
    """Write down attributes as they are before the first change."""
    before = vars(module).setdefault(UNDO, {})
    for name in names:
        if name not in before:
            before[name] = (name in vars(module), vars(module).get(name))


def set_class(module: nn.Module, kind: type[nn.Module]) -> None:
    """Change a module's class, and write down the one that it had before the first change."""
    before = vars(module).setdefault(UNDO, {})
    _, first = before.get(CLASS, (None, type(module)))
    before[CLASS] = (kind, first)
    module.__class__ = kind

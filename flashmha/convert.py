"""replace_mha: every ``nn.MultiheadAttention`` of a model on flashmha, in place, and back.

A swapped module is the same object with another class. So parameters, hooks, dtype, device, tying, shared
instances, user attributes and the train/eval flag are not copied: they stay. What a swap changes beside the class is
written on the module itself and undone by ``restore_mha``.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from typing import Any, TypeVar, cast

from torch import nn

from .encoder import FlashTransformerEncoder, FlashTransformerEncoderLayer
from .features import ABSENT, HOPS, MARK, changed, check_features, mark
from .module import FlashMultiHeadAttention

M = TypeVar("M", bound=nn.Module)

OPTIONS = tuple(sorted(set(ABSENT) - {"num_kv_heads"}))
"""What ``replace_mha`` can set on every layer; grouped heads would need other parameters."""

UNDO = "_flashmha_undo"
"""On a module that was changed: attribute -> its value before."""


def replace_mha(model: M, **options: Any) -> M:
    """Put every ``nn.MultiheadAttention`` of a model on flashmha, in place; returns the model.

    Parameters stay the same objects, so that optimizers go on. Subclasses of ``nn.MultiheadAttention`` keep their
    own code and are left alone, and so are parametrized and FSDP-wrapped layers: swap first (``swap_report`` says
    which and why). ``nn.TransformerEncoder`` and ``nn.TransformerEncoderLayer`` are kept from bypassing their
    attention in eval. A second call changes nothing, except for the options it names.

    Args:
        model: any module; it may itself be an ``nn.MultiheadAttention``.
        options: ``backend``, ``window``, ``call_out_proj``, ``need_weights``, ``skip_padding`` and
            ``trust_is_causal`` of ``FlashMultiHeadAttention``, for every layer.

    Raises:
        TypeError, ValueError: an option that does not exist or means nothing; the model is as it was.
    """
    check_model(model)
    unknown = sorted(set(options) - set(OPTIONS))
    if unknown:
        raise TypeError(f"options must be among {', '.join(OPTIONS)}, got {', '.join(unknown)}.")
    check_features(options)
    for _, module, fsdp in walk(model):
        if type(module) is nn.MultiheadAttention and refusal(module, fsdp) is None:
            remember(module)
            module.__class__ = FlashMultiHeadAttention
            mark(cast(FlashMultiHeadAttention, module))
        if isinstance(module, FlashMultiHeadAttention) and UNDO in vars(module):
            for name, value in options.items():
                remember(module, name)
                setattr(module, name, value)
    for _, module, _ in walk(model):
        if isinstance(module, nn.TransformerEncoderLayer) and holds(
            getattr(module, "self_attn", None), FlashMultiHeadAttention
        ):
            if type(module) is nn.TransformerEncoderLayer:
                remember(module)
                module.__class__ = FlashTransformerEncoderLayer
            elif type(module) is not FlashTransformerEncoderLayer and getattr(module, "activation_relu_or_gelu", False):
                remember(module, "activation_relu_or_gelu")
                module.activation_relu_or_gelu = 0
    for _, module, _ in walk(model):
        if isinstance(module, nn.TransformerEncoder) and holds(module, FlashMultiHeadAttention):
            if type(module) is nn.TransformerEncoder and all(
                holds(layer, FlashTransformerEncoderLayer) for layer in module.layers
            ):
                remember(module)
                module.__class__ = FlashTransformerEncoder
            elif type(module) is not FlashTransformerEncoder and getattr(module, "use_nested_tensor", False):
                remember(module, "use_nested_tensor")
                module.use_nested_tensor = False
    return model


def restore_mha(model: M) -> M:
    """Undo ``replace_mha``, in place; returns the model. Layers that were built as flashmha's stay.

    A layer that was parametrized or sharded after the swap waits until that is undone (``swap_report`` says so).
    """
    check_model(model)
    for _, module, _ in walk(model):
        if UNDO not in vars(module) or (isinstance(module, OURS) and type(module) not in STOCK):
            continue
        before = vars(module).pop(UNDO)
        for name, (had, value) in before.items():
            if had:
                setattr(module, name, value)
            else:
                vars(module).pop(name, None)
        if type(module) in STOCK:
            if isinstance(module, FlashMultiHeadAttention):
                module._forward_pre_hooks.pop(MARK, None)  # type: ignore[call-overload]
            module.__class__ = STOCK[type(module)]
    return model


STOCK: dict[type[nn.Module], type[nn.Module]] = {
    FlashMultiHeadAttention: nn.MultiheadAttention,
    FlashTransformerEncoderLayer: nn.TransformerEncoderLayer,
    FlashTransformerEncoder: nn.TransformerEncoder,
}


OURS = tuple(STOCK)


@dataclasses.dataclass(frozen=True)
class SwapRow:
    """One attention layer of a model: its name, its class, whether flashmha runs it, and why (not)."""

    name: str
    kind: str
    swapped: bool
    why: str

    def __str__(self) -> str:
        return f"{'swapped' if self.swapped else 'left   '}  {self.name or '(root)'}  {self.kind}: {self.why}"


class SwapReport(tuple[SwapRow, ...]):
    """One row for each ``nn.MultiheadAttention`` of a model, and for each encoder around them; print it."""

    def __str__(self) -> str:
        return "\n".join(map(str, self)) or "no nn.MultiheadAttention in this model"


def swap_report(model: nn.Module) -> SwapReport:
    """What ``replace_mha`` swapped in a model, what not, and why; before a swap, what it would leave."""
    check_model(model)
    rows = []
    for name, module, fsdp in walk(model):
        kind = type(module).__name__
        if isinstance(module, FlashMultiHeadAttention):
            why = "by replace_mha" if UNDO in vars(module) else "built as one"
            if changed(module):
                why += f", with {', '.join(changed(module))}"
            if UNDO in vars(module) and type(module) not in STOCK:
                why += "; changed class since, which has to be undone before restore_mha can"
            if "forward" in vars(module):
                why += "; the instance has a forward of its own, which runs in place of ours"
            rows.append(SwapRow(name, kind, True, why))
        elif isinstance(module, nn.MultiheadAttention):
            why = refusal(module, fsdp) or "replace_mha would swap it"
            rows.append(SwapRow(name, kind, False, why))
        elif isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerEncoder)) and UNDO in vars(module):
            kept = [f"{attribute} set to {getattr(module, attribute)}" for attribute in vars(module)[UNDO]]
            rows.append(SwapRow(name, kind, True, "; ".join(kept) or "calls self_attn in eval too"))
    return SwapReport(rows)


def check_model(model: object) -> None:
    """Raise ``TypeError`` unless a model is one."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {model!r}.")


def refusal(module: nn.MultiheadAttention, fsdp: bool) -> str | None:
    """Why a stock layer must stay as it is."""
    if hasattr(module, "parametrizations"):
        return "parametrized: swap first, parametrize then"
    if fsdp:
        return "wrapped by FSDP: swap first, wrap then"
    if type(module) is not nn.MultiheadAttention:
        return "a subclass of nn.MultiheadAttention, whose own code a swap would lose"
    taken = [name for name in (*ABSENT, *HOPS, "to_torch", "from_torch") if hasattr(module, name)]
    if taken:
        return f"has an attribute {', '.join(taken)} of its own, which would mean something else after a swap"
    return None


def walk(model: nn.Module) -> Iterator[tuple[str, nn.Module, bool]]:
    """Every module once: its name, itself, and whether FSDP (either version) wraps it or something around it."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # nobody has wrapped anything where it was not imported
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

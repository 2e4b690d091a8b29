"""replace_mha: every ``nn.MultiheadAttention`` of a model on flashmha, in place, and back.

A swapped module is the same object with another class. So parameters, hooks, dtype, device, tying, shared
instances, user attributes and the train/eval flag are not copied: they stay. What a swap changes beside the class is
written on the module itself and undone by ``restore_mha``.
"""

from __future__ import annotations

import contextlib
import fnmatch
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from torch import nn

from ..layer.module import FlashMultiHeadAttention
from ..layer.options import CONSTRUCTOR_ONLY, STOCK_VALUES, check_options
from ..layer.twin import forget
from .caches import COMPILED
from .decoder import FlashTransformerDecoder, FlashTransformerDecoderLayer
from .encoder import FlashTransformerEncoder, FlashTransformerEncoderLayer, is_stock
from .modules import CLASS, UNDO, check_model, holds, remember, set_class, walk, why_not_yet, why_stock_stays
from .report import swap_report, why_silent

Model = TypeVar("Model", bound=nn.Module)

LAYER_OPTIONS = tuple(sorted(set(STOCK_VALUES) - set(CONSTRUCTOR_ONLY)))
"""What ``replace_mha`` can set on every layer; the others would need other parameters."""


Where = str | Iterable[str] | Callable[[str, nn.Module], bool] | None


def replace_mha(
    model: Model, *, where: Where = None, to: type[FlashMultiHeadAttention] = FlashMultiHeadAttention, **options: Any
) -> Model:
    """Put every ``nn.MultiheadAttention`` of a model on flashmha, in place; returns the model.

    Parameters stay the same objects, so that optimizers go on. Subclasses of ``nn.MultiheadAttention`` keep their
    own code and are left alone, and so are parametrized and FSDP-wrapped layers: swap first (``swap_report`` says
    which and why). ``nn.TransformerEncoder`` and ``nn.TransformerEncoderLayer`` are kept from bypassing their
    attention in eval; ``nn.TransformerDecoder`` and its layers take a ``cache``. Options reach layers that were
    flashmha's before, too. A second call changes nothing, except for what it names.

    Args:
        model: any module; it may itself be an ``nn.MultiheadAttention``.
        where: which layers: a name, a pattern (``"encoder.layers.*.self_attn"``), a list of them, or a function
            (name, module) -> bool. Default all.
        to: the class of the swapped layers, ``FlashMultiHeadAttention`` or a subclass without an ``__init__`` of its
            own. A layer that is exactly a ``FlashMultiHeadAttention`` already becomes one, too.
        options: ``backend``, ``window``, ``causal``, ``softcap``, ``softmax_scale``, ``call_out_proj``,
            ``need_weights``, ``skip_padding`` and ``trust_is_causal`` of ``FlashMultiHeadAttention``, for every such
            layer.

    Warns:
        UserWarning: the model has no ``nn.MultiheadAttention``; a layer's ``out_proj`` has hooks or an adapter that
            never run without ``call_out_proj=True``, as in the stock class.

    Raises:
        TypeError, ValueError: an option or a class that does not exist or means nothing, or a ``where`` that chooses
            no layer; the model is as it was.
    """
    check_model(model)
    check_target(to)
    unknown = sorted(set(options) - set(LAYER_OPTIONS))
    if unknown:
        raise TypeError(f"options must be among {', '.join(LAYER_OPTIONS)}, got {', '.join(unknown)}.")
    check_options(options)
    layers = {id(module): name for name, module in chosen_layers(model, where)}
    with all_or_nothing(model):
        for _, module, fsdp in walk(model):
            if id(module) in layers:
                swap_layer(module, fsdp, to, options)
        keep_encoders_calling(model)
        let_decoders_cache(model)
    warn_of_silence(model, layers, to, named=where is not None)
    return model


def swap_layer(module: nn.Module, fsdp: bool, to: type[FlashMultiHeadAttention], options: dict[str, Any]) -> None:
    """One layer: its class, where it may change, and its options, where it is ours."""
    given, _ = vars(module).get(UNDO, {}).get(CLASS, (FlashMultiHeadAttention, None))
    stock = type(module) is nn.MultiheadAttention and why_stock_stays(module, fsdp) is None
    if stock or (type(module) is given and to is not FlashMultiHeadAttention):
        set_class(module, to)
    if isinstance(module, FlashMultiHeadAttention):
        for name, value in options.items():
            remember(module, name)
            setattr(module, name, value)


def keep_encoders_calling(model: nn.Module) -> None:
    """Encoders and their layers call an attention of ours in eval too."""
    for _, module, _ in walk(model):
        if isinstance(module, nn.TransformerEncoderLayer) and holds(
            getattr(module, "self_attn", None), FlashMultiHeadAttention
        ):
            if is_stock(module, nn.TransformerEncoderLayer):
                set_class(module, FlashTransformerEncoderLayer)
            elif type(module) is not FlashTransformerEncoderLayer and getattr(module, "activation_relu_or_gelu", False):
                remember(module, "activation_relu_or_gelu")
                module.activation_relu_or_gelu = 0
    for _, module, _ in walk(model):
        if isinstance(module, nn.TransformerEncoder) and holds(module, FlashMultiHeadAttention):
            if is_stock(module, nn.TransformerEncoder) and all(
                holds(layer, FlashTransformerEncoderLayer) for layer in module.layers
            ):
                set_class(module, FlashTransformerEncoder)
            elif type(module) is not FlashTransformerEncoder and getattr(module, "use_nested_tensor", False):
                remember(module, "use_nested_tensor")
                module.use_nested_tensor = False


def let_decoders_cache(model: nn.Module) -> None:
    """Decoders and their layers take a cache where all of their attention is ours."""
    for _, module, _ in walk(model):
        if is_stock(module, nn.TransformerDecoderLayer) and all(
            isinstance(getattr(module, name, None), FlashMultiHeadAttention) for name in ("self_attn", "multihead_attn")
        ):
            set_class(module, FlashTransformerDecoderLayer)
    for _, module, _ in walk(model):
        layers = module.layers if isinstance(module, nn.TransformerDecoder) else ()
        if is_stock(module, nn.TransformerDecoder) and all(
            isinstance(getattr(layer, COMPILED, layer), FlashTransformerDecoderLayer) for layer in layers
        ):
            set_class(module, FlashTransformerDecoder)


def restore_mha(model: Model) -> Model:
    """Undo ``replace_mha``, in place; returns the model. Layers that were built as flashmha's stay, as they were.

    A layer that was parametrized or sharded after the swap waits until that is undone (``swap_report`` says so).
    """
    check_model(model)
    for _, module, _ in walk(model):
        if UNDO not in vars(module) or why_not_yet(module) is not None:
            continue
        before = vars(module).pop(UNDO)
        _, kind = before.pop(CLASS, (None, None))
        for name, (had, value) in before.items():
            if had:
                setattr(module, name, value)
            else:
                vars(module).pop(name, None)
        if kind is nn.MultiheadAttention:
            forget(module)  # what was set by hand since the swap
        if kind is not None:
            module.__class__ = kind
    return model


def check_target(to: Any) -> None:
    """Raise ``TypeError`` unless a swap may give layers this class."""
    if not (isinstance(to, type) and issubclass(to, FlashMultiHeadAttention)):
        raise TypeError(f"to must be FlashMultiHeadAttention or a subclass of it, got {to!r}.")
    if to.__init__ is not FlashMultiHeadAttention.__init__:
        raise TypeError(
            f"to must have no __init__ of its own, since a swap changes the class of a layer and builds none, got "
            f"{to.__name__}; build such layers yourself and put them in place."
        )


def chosen_layers(model: nn.Module, where: Where) -> list[tuple[str, nn.MultiheadAttention]]:
    """The attention layers of a model that ``where`` speaks of."""
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    layers = [(name, module) for name, module, _ in walk(model) if isinstance(module, nn.MultiheadAttention)]
    if where is None:
        return layers
    if callable(where):
        found = [(name, module) for name, module in layers if where(name, module)]
        unknown = [] if found or not layers else [getattr(where, "__name__", repr(where))]
    else:
        patterns = [where] if isinstance(where, str) or not isinstance(where, Iterable) else list(where)
        if not all(isinstance(pattern, str) for pattern in patterns):
            raise TypeError(
                f"where must be names, patterns of names or a function (name, module) -> bool, got {where!r}."
            )

        def called(module: nn.Module, pattern: str) -> bool:
            return any(fnmatch.fnmatchcase(name, pattern) for name in names[id(module)])

        found = [(name, module) for name, module in layers if any(called(module, pattern) for pattern in patterns)]
        unknown = [pattern for pattern in patterns if not any(called(module, pattern) for _, module in layers)]
    if unknown or not found:
        there = ", ".join(name or "(root)" for name, _ in layers) or "none"
        raise ValueError(
            f"where must choose attention layers of this model (there is {there}), got {', '.join(unknown) or where!r}."
        )
    return found


def warn_of_silence(model: nn.Module, layers: dict[int, str], to: type[FlashMultiHeadAttention], named: bool) -> None:
    """Warn of what a caller may take for done: nothing to swap, layers that stayed, adapters that do not run."""
    if not layers:
        warnings.warn(describe_no_layers(model), stacklevel=3)
    elif not named and not holds(model, FlashMultiHeadAttention):
        left = [f"{row.name or '(root)'}: {row.why}" for row in swap_report(model)]
        warnings.warn(f"replace_mha changed nothing: {left[0]}{' ...' * (len(left) > 1)}.", stacklevel=3)
    for _, module, fsdp in walk(model):
        why: str | None = None
        if id(module) not in layers or not isinstance(module, nn.MultiheadAttention):
            continue
        name = layers[id(module)]
        if not isinstance(module, FlashMultiHeadAttention):
            why = f"stays as it is: {why_stock_stays(module, fsdp)}" if named else None
        elif not isinstance(module, to):
            why = f"stays a {type(module).__name__}, whose own code {to.__name__} would replace"
        else:
            why = why_silent(name, module)
        if why is not None:
            warnings.warn(f"{name or type(module).__name__}: {why}.", stacklevel=3)


def describe_no_layers(model: nn.Module) -> str:
    """Say what a model has in place of a stock layer."""
    kinds = ((name or "(root)", type(module).__name__) for name, module in model.named_modules())
    looks = [f"{name} ({kind})" for name, kind in kinds if "attention" in kind.lower() or "attn" in kind.lower()]
    several = f", but {', '.join(looks[:3])}{', ...' * (len(looks) > 3)}, whose own code stays" if looks else ""
    return f"replace_mha changed nothing: there is no nn.MultiheadAttention in this {type(model).__name__}{several}."


@contextlib.contextmanager
def all_or_nothing(model: nn.Module) -> Iterator[None]:
    """Every module's class and attributes are as they were before, if something is raised inside."""
    kinds = (
        nn.MultiheadAttention,
        nn.TransformerEncoderLayer,
        nn.TransformerEncoder,
        nn.TransformerDecoderLayer,
        nn.TransformerDecoder,
    )
    before = [
        (module, type(module), vars(module).copy(), dict(vars(module).get(UNDO, {})))
        for module in model.modules()
        if isinstance(module, kinds)
    ]
    try:
        yield
    except BaseException:
        for module, kind, attributes, undo in before:
            module.__class__ = kind
            vars(module).clear()
            vars(module).update(attributes)
            if UNDO in attributes:
                attributes[UNDO].clear()
                attributes[UNDO].update(undo)
        raise

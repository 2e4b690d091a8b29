"""The options of a layer beyond ``nn.MultiheadAttention``: their names, the values that mean none, what they may be.

There are four kinds: of heads, of positions, of scores, and switches. No annotation here may be postponed: TorchScript
reads them.
"""

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ..backends import expand
from ..problem.scores import BIAS_DTYPES, Bias
from ..problem.sizes import check_sizes, is_size
from ..problem.windows import Window, causal
from ..problem.wording import spell
from .protocol import Layer

PARTS = ("q_norm", "k_norm", "rotary", "position_bias", "sinks")
"""Options that a layer owns as a module or a parameter; a ``position_bias`` may be a plain object."""

HEAD_SIZES = ("num_kv_heads", "value_head_dim")
"""What a layer says of its heads beyond stock: numbers in every layer, out of others where they are not free."""

SWITCHES = ("call_out_proj", "need_weights", "trust_is_causal", "skip_padding")

STOCK_VALUES: dict[str, Any] = {
    # what is free of stock's own; ``num_kv_heads``, ``head_dim`` and ``value_head_dim`` of a layer are always numbers
    "free_num_kv_heads": None,
    "free_head_dim": None,
    "free_value_head_dim": None,
    "window": None,
    "causal": False,
    "softcap": None,
    "softmax_scale": None,
    **dict.fromkeys(PARTS),
    "backend": None,
    "call_out_proj": False,
    "need_weights": True,
    "trust_is_causal": False,
    "skip_padding": False,
}
"""Every option, and its value in a layer that has none."""

MEANT_OPTIONS = {
    **dict.fromkeys(("rope", "rotary_emb", "rope_parameters", "rope_scaling"), "rotary"),
    **dict.fromkeys(("alibi", "alibi_slopes", "attn_bias", "relative_bias"), "position_bias"),
    **dict.fromkeys(("num_key_value_heads", "n_kv_heads", "heads_kv"), "num_kv_heads"),
    **dict.fromkeys(("heads", "n_heads", "nhead", "num_attention_heads"), "num_heads"),
    **dict.fromkeys(("d_model", "hidden_size", "dim"), "embed_dim"),
    **dict.fromkeys(("sliding_window", "window_size"), "window"),
    **dict.fromkeys(("scale", "scaling"), "softmax_scale"),
    **dict.fromkeys(("dropout_p", "attention_dropout"), "dropout"),
    **dict.fromkeys(("qkv_bias", "attention_bias"), "bias"),
    "is_causal": "causal",
}
"""What other libraries call an argument of the constructor."""

CONSTRUCTOR_ONLY = ("free_num_kv_heads", "free_head_dim", "free_value_head_dim", *PARTS)
"""Options of one layer, which come with parameters or objects: a swap sets none of them."""


def part(name: str) -> property:
    """A part of a layer, ``None`` where it has none, as a layer has that was swapped in."""

    def read(layer: Any) -> Any:
        for held in (layer._modules, layer._parameters, layer.__dict__):
            if name in held:
                return held[name]
        return None

    return property(read)


def set_part(layer: Any, name: str, value: Any) -> None:
    """Put a part in its place, after the one before it was taken out."""
    for held in (layer._modules, layer._parameters, layer.__dict__):
        held.pop(name, None)
    if isinstance(value, nn.Module):
        layer._modules[name] = value
    elif isinstance(value, nn.Parameter):
        layer._parameters[name] = value
    elif value is not None:
        layer.__dict__[name] = value


def is_set(layer: Layer, name: str) -> bool:
    """An option of a layer is another than none."""
    value, absent = getattr(layer, name), STOCK_VALUES[name]
    return value is not None if absent is None else bool(value != absent)


def owns_parts(layer: Layer) -> bool:
    """A layer may have parts, as far as a quick look tells."""
    return len(layer._modules) > 1 or "sinks" in layer._parameters or "position_bias" in layer.__dict__


def rule_of(layer: Layer) -> Window | None:
    """How far every query of a layer sees: its window and its causality in one."""
    window: Window | None = layer.window
    if not layer.causal:
        return window
    return causal() if window is None else Window(window.left, 0, align=window.align)


def counted_by(layer: Layer) -> str | None:
    """The option of a layer that counts positions; ``None`` where it has none."""
    for name in ("window", "causal", "rotary", "position_bias"):
        if is_set(layer, name):
            return name
    return None


def describe_options(layer: Layer) -> str:
    """The options that are set, but for those that are modules."""
    names = [name for name in find_set(layer) if not isinstance(getattr(layer, name), nn.Module)]
    return ", ".join(spell_option(layer, name) for name in names)


def find_set(layer: Layer) -> list[str]:
    """The names of the options that are set."""
    return [name for name in STOCK_VALUES if is_set(layer, name)]


def spell_option(layer: Layer, name: str) -> str:
    """An option and its value: the shape of a tensor, the class of a module."""
    value = getattr(layer, name)
    said = type(value).__name__ if isinstance(value, nn.Module) else repr(value)
    return f"{name.removeprefix('free_')}={tuple(value.shape) if isinstance(value, Tensor) else said}"


def check_options(options: dict[str, Any]) -> None:
    """Raise where the value of an option means nothing, before anything is changed."""
    if options.get("backend") is not None:
        expand(options["backend"])
    if options.get("window") is not None:
        as_window(options["window"])
    for name in (*SWITCHES, "causal"):
        if not isinstance(options.get(name, True), bool):
            raise TypeError(f"{name} must be True or False, got {options[name]!r}.")
    for name in ("softcap", "softmax_scale"):
        check_number(name, options.get(name))
    for name in ("head_dim", "value_head_dim"):
        if options.get(name) is not None:
            check_sizes(**{name: options[name]})
    for name in ("q_norm", "k_norm", "rotary"):
        module = options.get(name)
        if module is not None and not isinstance(module, nn.Module):
            raise TypeError(f"{name} must be a module, or None, got {spell(module)}.")
    bias = options.get("position_bias")
    if bias is not None and not isinstance(bias, (nn.Module, Bias)):
        hint = "; TensorBias makes a Bias of a tensor" if isinstance(bias, Tensor) else ""
        raise TypeError(
            f"position_bias must be a module called with q and k, such as AlibiBias, or a Bias, got {spell(bias)}"
            f"{hint}."
        )


def check_number(name: str, number: Any) -> None:
    """Raise where a softcap or a scale is none."""
    if number is None:
        return
    if isinstance(number, bool) or not isinstance(number, (int, float)):
        raise TypeError(f"{name} must be a number or None, got {spell(number)}.")
    if not math.isfinite(number) or number <= 0:
        raise ValueError(f"{name} must be finite and greater than 0, got {number}.")


def find_head_dim(embed_dim: Any, num_heads: Any, head_dim: int | None) -> int:
    """Features of a head.

    Raises:
        TypeError, AssertionError: they make no heads; in the words of ``nn.MultiheadAttention`` where it raises too.
    """
    for name, number in (("embed_dim", embed_dim), ("num_heads", num_heads)):
        if not hasattr(number, "__index__"):
            raise TypeError(f"{name} must be a whole number, got {spell(number)}.")
    if head_dim is not None:
        return head_dim
    if embed_dim <= 0 or num_heads <= 0:
        return 0  # stock's constructor says it
    if embed_dim % num_heads:
        raise AssertionError(
            f"embed_dim must be divisible by num_heads, got embed_dim={embed_dim} and num_heads={num_heads}; give "
            "head_dim=, with which it need not be."
        )
    return int(embed_dim // num_heads)


def check_kv_heads(num_heads: int, num_kv_heads: int | None) -> None:
    """Raise ``ValueError`` where query heads cannot share the heads of keys and values evenly."""
    if num_kv_heads is not None and (not is_size(num_kv_heads) or num_heads % num_kv_heads):
        raise ValueError(
            "num_kv_heads must be a whole number of at least 1 that divides num_heads, got "
            f"num_heads={num_heads} and num_kv_heads={num_kv_heads!r}."
        )


def check_sinks(sinks: Any, num_heads: int, kind: type[Tensor] = Tensor) -> None:
    """Raise where sinks are no number for each head."""
    if sinks is None or (isinstance(sinks, kind) and sinks.dtype in BIAS_DTYPES and sinks.shape == (num_heads,)):
        return
    what = "tensor" if kind is Tensor else "nn.Parameter"
    raise ValueError(
        f"sinks must be a floating point {what} (num_heads,) = ({num_heads},), or None, got {spell(sinks)}."
    )


def check_rotary(rotary: Any, head_dim: int) -> None:
    """Raise where a rotary turns heads of another size."""
    size = getattr(rotary, "head_dim", head_dim)
    if size != head_dim:
        raise ValueError(f"rotary must turn heads of head_dim={head_dim}, got one of head_dim={size}.")


def make_norms(qk_norm: Any, head_dim: int, device: Any, dtype: Any) -> tuple[nn.Module | None, nn.Module | None]:
    """The norms of queries and keys that ``qk_norm`` names."""
    kinds = {"rms": nn.RMSNorm, "layer": nn.LayerNorm}
    if qk_norm is None:
        return None, None
    if isinstance(qk_norm, str) and qk_norm in kinds:
        kind: Any = kinds[qk_norm]
        return tuple(kind(head_dim, device=device, dtype=dtype) for _ in range(2))  # type: ignore[return-value]
    if isinstance(qk_norm, (tuple, list)) and len(qk_norm) == 2 and all(isinstance(x, nn.Module) for x in qk_norm):
        for module in qk_norm:
            over = getattr(module, "normalized_shape", (head_dim,))
            if tuple(over) != (head_dim,):
                raise ValueError(
                    f"qk_norm must be norms over head_dim={head_dim}, got {type(module).__name__} over {tuple(over)}: "
                    f"{type(module).__name__}({head_dim})."
                )
        return qk_norm[0], qk_norm[1]
    raise ValueError(
        f"qk_norm must be 'rms', 'layer' or a pair of modules (q_norm, k_norm) over the last axis, got "
        f"{spell(qk_norm)}."
    )


def as_window(window: Window | Sequence[int | None]) -> Window:
    """A pair (left, right) as a ``Window``."""
    if isinstance(window, Window):
        return window
    if not isinstance(window, tuple) or len(window) != 2:
        raise ValueError(f"window must be a Window or a pair (left, right), got {window!r}.")
    return Window(*window)

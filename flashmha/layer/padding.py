"""Padding left out of a self-attention call: the real tokens end to end, and every token back in its place."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends.choice.registry import any_backend
from ..backends.choice.wishes import preference
from ..host.torch_state import computed_in, eager, is_capturing
from ..problem.packing import has_holes, parts_of, take_real
from ..problem.ragged import KeyPadding, Padding
from ..problem.windows import Window
from ..problem.wording import dtype_name
from .call import Reading, change_each_once
from .checks import extra_columns
from .demands import find_demands
from .features import find_overridden
from .options import counted_by, rule_of
from .projection import sizes_of
from .protocol import Layer


def why_padding_stays(layer: Layer, call: Reading, cached: bool) -> str | None:
    """Why padding cannot be left out of a call, so that every row is computed; ``None`` where it can."""
    if cached:
        return "a cache, which holds no padding"
    return why_not_packable(layer, call) or why_holes_stay(call, layer)


def why_not_packable(layer: Layer, call: Reading) -> str | None:
    """``why_padding_stays`` without a look at where the padding lies."""
    if call.padding is None:
        return "no bool key_padding_mask"
    if not all(map(eager, (call.query, *call.padding.tensors()))):
        return RECORDED
    if is_capturing(call.query.device):
        return RECORDED
    if call.query.is_meta:
        return "tensors without data, whose real tokens cannot be counted"
    if not (same_memory(call.query, call.key) and same_memory(call.key, call.value)):
        return "query, key and value are not one tensor"
    if not call.query.shape[0] or not call.query.shape[1]:
        return "no tokens at all"
    if extra_columns(layer):
        return "add_bias_kv or add_zero_attn"
    hops = find_overridden(layer)
    if hops:
        return f"{', '.join(hops)} overridden, which may count positions"
    if call.bias is not None or any(not isinstance(part, (Padding, Window)) for part in parts_of(call.mask)):
        return "an attn_mask beside causality"
    if layer.position_bias is not None and not getattr(layer.position_bias, "by_distance", False):
        return "a position_bias that is not said to be by_distance"
    if call.query.is_cuda and preference(layer.backend) is None and not has_packed_kernel(layer, call):
        return (
            f"no kernel here for packed tokens in {dtype_name(computed_in(call.query))}: they would need a dense mask"
        )
    call.padding.check(call.key.shape[0], 1, 1, call.key.shape[1])  # the last to look at it, where it is left out
    return None


RECORDED = "PyTorch records the call (compile, export, torch.func, a CUDA graph)"


def why_holes_stay(call: Reading, *layers: Layer) -> str | None:
    """Why padding with holes has to stay: what a window sees would move. Causality alone minds no hole."""
    bounded = any(part.feature == "window" for part in parts_of(call.mask)) or any(map(is_windowed, layers))
    biased = any(layer.position_bias is not None for layer in layers)
    if not (bounded or biased) or call.padding is None:
        return None
    if not call.padding.once("holes", lambda: has_holes(call.valid)):
        return None
    return f"a {'window' if bounded else 'position_bias'} over padding with holes"


def is_windowed(layer: Layer) -> bool:
    """A layer sees no farther than some keys, which is more than causality."""
    rule = rule_of(layer)
    return rule is not None and rule.feature == "window"


def why_order_counts(layer: Layer, call: Reading) -> str | None:
    """Why the order of a call's keys counts, or no kernel gains by another; ``None`` where real ones may come first."""
    if type(call.padding) is not KeyPadding or call.mask is not call.padding or call.bias is not None:
        return "something beside a padding mask"
    if call.columns or counted_by(layer) is not None or find_overridden(layer):
        return "a layer that counts positions, or has keys or methods of its own"
    if not call.query.is_cuda or preference(layer.backend) is not None or not has_packed_kernel(layer, call):
        return "no kernel that keys would be moved for"
    return None


def same_memory(one: Tensor, two: Tensor) -> bool:
    """Two tensors are one, or aliases of one, as hooks on a module's inputs and checkpoints make of it."""
    if one is two:
        return True
    alike = one.shape == two.shape and one.stride() == two.stride() and one.dtype == two.dtype
    return alike and type(two) in (Tensor, torch.nn.Parameter) and one.data_ptr() == two.data_ptr()


def has_packed_kernel(layer: Layer, call: Reading) -> bool:
    """A kernel for packed documents runs on this GPU and in the dtype of the layer's heads."""
    device, dtype, sizes = call.query.device, computed_in(call.query), sizes_of(layer)
    size = max(sizes.head_dim, sizes.head_dim_v)
    windowed = is_windowed(layer) or any(part.feature == "window" for part in parts_of(call.mask))
    needed = find_demands(layer)
    return any_backend(lambda one: one.runs_packed(dtype, size, device, windowed) and needed <= one.limits.features)


def pack_inputs(query: Tensor, key: Tensor, value: Tensor, places: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens at ``places`` as (1, tokens, features), one object where the inputs were."""
    return change_each_once(lambda x: take_real(x, places), query, key, value)

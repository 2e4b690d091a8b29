"""The dtype that a layer computes in."""

import platform

import torch
from torch import Tensor

from ..backends.choice.wishes import Wanted, preference
from ..backends.limits import HALF
from ..host.torch_state import casts_to, needs_aten
from .call import Reading
from .features import has_hops
from .protocol import Layer


def weights_dtype(q: Tensor) -> torch.dtype:
    """The dtype of a softmax of scores of q: on a GPU autocast takes it to float32."""
    if q.is_cuda and casts_to(q.device) is not None:
        return torch.promote_types(q.dtype, torch.float32)
    return q.dtype


def computing_dtype(layer: Layer, call: Reading, wanted: Wanted) -> torch.dtype | None:
    """float32 where this CPU is slower in the half precision the layer is kept in; ``None`` for the layer's own.

    Not for a layer that was told a backend or has hops or norms of its own, which were written for the layer's dtype.
    """
    query, dtype = call.query, call.query.dtype
    if query.device.type != "cpu" or casts_to(query.device) is not None or not is_emulated(dtype):
        return None
    if layer.call_out_proj or has_hops(layer) or layer.q_norm is not None or layer.k_norm is not None:
        return None
    if preference(wanted) is not None or needs_aten(query):
        return None
    weights = (layer.in_proj_weight, layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight)
    tensors = (call.key, call.value, getattr(layer.out_proj, "weight", None), *weights)
    if any(isinstance(x, Tensor) and x.dtype != dtype for x in tensors):
        return None  # an error of the caller's, which the projection reports
    return torch.float32


def is_emulated(dtype: torch.dtype) -> bool:
    """This CPU computes in a half precision dtype more slowly than in float32: an x86 without instructions for it.

    Those are AMX, and AVX512-BF16 for bfloat16. In its own dtype a layer of 512 tokens and more took so many times the
    time of float32 inside (Zen 4, ``benchmarks/results/half_precision_cpu.json``): in float16 3.7 to 16; in bfloat16
    1.7 to 2.3 where oneDNN was kept from AVX512-BF16, 3.3 to 14 with AVX2, 0.6 to 0.9 with AVX512-BF16. There a layer
    of 8 tokens took 1.3 to 1.5, too little to choose by size. Measured on x86 alone: other CPUs are left as they are.
    """
    if platform.machine().lower() not in ("x86_64", "amd64") or dtype not in HALF or torch.cpu._is_amx_tile_supported():
        return False
    return dtype != torch.bfloat16 or not torch.cpu._is_avx512_bf16_supported()


is_emulated._dynamo_marked_constant = True  # type: ignore[attr-defined]

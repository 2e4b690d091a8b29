"""flashmha: ``torch.nn.MultiheadAttention`` on the fastest attention this machine has."""

from .backends import (
    Backend,
    Explanation,
    Limits,
    load_tuned,
    prefer,
    record,
    register,
    unregister,
    use_backend,
)
from .convert import SwapReport, replace_mha, restore_mha, swap_report
from .encoder import FlashTransformerEncoder, FlashTransformerEncoderLayer
from .errors import NoBackendError
from .explain import explain
from .functional import attention
from .masks import Dense, Documents, KeyLengths, KeyPadding, Mask, Rule, Window, causal
from .module import FlashMultiHeadAttention
from .packed import Packed, pack
from .public import publish as _publish
from .scores import ALiBi, Bias, RelativeBias, TensorBias
from .spec import AttentionSpec
from .wrapper import FlashAttentionWrapper, benchmark_attention, compare_outputs, has_flash_attention

__version__ = "0.1.0"

__all__ = [
    "ALiBi",
    "AttentionSpec",
    "Backend",
    "Bias",
    "Dense",
    "Documents",
    "Explanation",
    "FlashAttentionWrapper",
    "FlashMultiHeadAttention",
    "FlashTransformerEncoder",
    "FlashTransformerEncoderLayer",
    "KeyLengths",
    "KeyPadding",
    "Limits",
    "Mask",
    "NoBackendError",
    "Packed",
    "RelativeBias",
    "Rule",
    "SwapReport",
    "TensorBias",
    "Window",
    "attention",
    "benchmark_attention",
    "causal",
    "compare_outputs",
    "explain",
    "has_flash_attention",
    "load_tuned",
    "pack",
    "prefer",
    "record",
    "register",
    "replace_mha",
    "restore_mha",
    "swap_report",
    "unregister",
    "use_backend",
]

_publish(__name__, [globals()[name] for name in __all__])

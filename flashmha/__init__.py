"""flashmha: ``torch.nn.MultiheadAttention`` on the fastest attention this machine has."""

from .backends import Backend, Explanation, Limits, load_tuned, prefer, record, register, unregister, use_backend
from .cache.base import Cache
from .cache.memory import MemoryCache
from .cache.pages import PagedCache, PagePool
from .cache.ring import RingCache
from .cache.static import StaticCache
from .functional import attention
from .host.public import publish as _publish
from .lab import FlashAttentionWrapper, benchmark_attention, compare_outputs, has_flash_attention
from .layer.module import FlashMultiHeadAttention
from .layer.packed import Packed, pack
from .layer.state import fuse_projections, group_heads, repeat_heads, separate_projections
from .parts.relative import AlibiBias, RelativePositionBias
from .parts.rotary import Rotary
from .problem.cached import OwnTokens, Pages, Positions
from .problem.documents import Documents
from .problem.errors import NoBackendError
from .problem.masks import Dense, Mask
from .problem.ragged import KeyLengths, KeyPadding
from .problem.rules import Rule
from .problem.scores import ALiBi, Bias, RelativeBias, TensorBias
from .problem.spec import AttentionSpec
from .problem.windows import Window, causal
from .swap.caches import KVCache
from .swap.convert import replace_mha, restore_mha
from .swap.decoder import FlashTransformerDecoder, FlashTransformerDecoderLayer
from .swap.encoder import FlashTransformerEncoder, FlashTransformerEncoderLayer
from .swap.explain import explain
from .swap.report import SwapReport, swap_report
from .version import __version__ as __version__

__all__ = [
    "ALiBi",
    "AlibiBias",
    "AttentionSpec",
    "Backend",
    "Bias",
    "Cache",
    "Dense",
    "Documents",
    "Explanation",
    "FlashAttentionWrapper",
    "FlashMultiHeadAttention",
    "FlashTransformerDecoder",
    "FlashTransformerDecoderLayer",
    "FlashTransformerEncoder",
    "FlashTransformerEncoderLayer",
    "KVCache",
    "KeyLengths",
    "KeyPadding",
    "Limits",
    "Mask",
    "MemoryCache",
    "NoBackendError",
    "OwnTokens",
    "Packed",
    "PagePool",
    "PagedCache",
    "Pages",
    "Positions",
    "RelativeBias",
    "RelativePositionBias",
    "RingCache",
    "Rotary",
    "Rule",
    "StaticCache",
    "SwapReport",
    "TensorBias",
    "Window",
    "attention",
    "benchmark_attention",
    "causal",
    "compare_outputs",
    "explain",
    "fuse_projections",
    "group_heads",
    "has_flash_attention",
    "load_tuned",
    "pack",
    "prefer",
    "record",
    "register",
    "repeat_heads",
    "replace_mha",
    "restore_mha",
    "separate_projections",
    "swap_report",
    "unregister",
    "use_backend",
]

_publish(__name__, [globals()[name] for name in __all__])


def __getattr__(name: str) -> object:
    """``flashmha.testing``, which wants Hypothesis, when it is first asked for."""
    if name == "testing":
        import importlib

        return importlib.import_module(".testing", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""The layer as the rooms below its class see it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor

from ..problem.windows import Window


class Layer(Protocol):
    """A ``FlashMultiHeadAttention`` as functions of it may touch it: attributes to read and hops to call."""

    embed_dim: int
    kdim: int
    vdim: int
    num_heads: int
    head_dim: int
    dropout: float
    training: bool
    batch_first: bool
    add_zero_attn: bool
    _qkv_same_embed_dim: bool

    # parameters, or what a parametrization or an adapter put in their place
    in_proj_weight: Any
    in_proj_bias: Any
    q_proj_weight: Any
    k_proj_weight: Any
    v_proj_weight: Any
    bias_k: Tensor | None
    bias_v: Tensor | None
    out_proj: Any
    _parameters: dict[str, Any]

    _forward_pre_hooks: dict[Any, Any]

    _modules: dict[str, Any]

    # options
    free_num_kv_heads: int | None
    free_head_dim: int | None
    free_value_head_dim: int | None

    @property
    def num_kv_heads(self) -> int: ...
    @property
    def value_head_dim(self) -> int: ...

    @property
    def q_norm(self) -> Any: ...
    @property
    def k_norm(self) -> Any: ...
    @property
    def rotary(self) -> Any: ...
    @property
    def position_bias(self) -> Any: ...

    causal: bool
    softcap: float | None

    @property
    def sinks(self) -> Any: ...

    softmax_scale: float | None
    window: Window | None
    backend: str | Sequence[str] | None
    call_out_proj: bool
    need_weights: bool
    trust_is_causal: bool
    skip_padding: bool
    keys_before: int
    keys_after: int
    has_in_proj: bool
    has_out_proj: bool

    # hops
    def project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]: ...
    def process_heads(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]: ...
    @property
    def attend(self) -> Callable[..., Tensor]: ...
    @property
    def process_weights(self) -> Callable[..., Tensor]: ...
    def merge(self, out: Tensor, query: Tensor) -> Tensor: ...

    def _attend_as_stock(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        need_weights: bool,
        attn_mask: Tensor | None,
        average_attn_weights: bool,
        is_causal: bool,
    ) -> tuple[Tensor, Tensor | None]: ...

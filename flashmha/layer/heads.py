"""What of a layer is open to change: its options, as attributes, and its hops, which a subclass overrides.

No annotation here may be postponed: TorchScript reads them.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..problem.masks import Mask
from ..problem.scores import Bias
from ..problem.windows import Window
from . import features, options, projection
from .checks import check_dtypes
from .features import find_replaced
from .hops import check_attributes, check_signatures, warn_of_misspelled_hops
from .options import HEAD_SIZES, PARTS, STOCK_VALUES, part
from .problems import Problems, run_problem
from .state import suggest_grouping
from .stock import StockForward, refuse_torchscript


class CustomHeads(StockForward):
    """``nn.MultiheadAttention`` with options, which the class's values lack, and with hops."""

    __jit_unused_properties__ = [*PARTS, *HEAD_SIZES]
    bias_k: Tensor | None
    bias_v: Tensor | None

    # the state of a stock module has none of these
    free_num_kv_heads: int | None = None
    free_head_dim: int | None = None
    free_value_head_dim: int | None = None
    q_norm = part("q_norm")
    k_norm = part("k_norm")
    rotary = part("rotary")
    position_bias = part("position_bias")
    window: Window | None = None
    causal: bool = False
    softcap: float | None = None
    sinks = part("sinks")
    softmax_scale: float | None = None
    backend: str | Sequence[str] | None = None
    call_out_proj: bool = False
    need_weights: bool = True
    trust_is_causal: bool = False
    skip_padding: bool = False

    keys_before: int = 0
    """How many keys ``process_heads`` puts in front of the call's own, as a prefix does: see there."""
    keys_after: int = 0
    """How many it puts behind them, as a sink may."""

    has_in_proj: bool = True
    """``False`` in a subclass whose ``project`` uses no ``in_proj_weight``: then there is none, nor its bias."""
    has_out_proj: bool = True
    """``False`` in a subclass whose ``merge`` uses no ``out_proj``: then it is ``None``."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        check_signatures(cls)
        check_attributes(cls)
        warn_of_misspelled_hops(cls)

    @property
    def num_kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.free_num_kv_heads or self.num_heads

    @num_kv_heads.setter
    def num_kv_heads(self, number: int | None) -> None:
        options.check_kv_heads(self.num_heads, number)
        self.free_num_kv_heads = None if number == self.num_heads else number

    @property
    def value_head_dim(self) -> int:
        """Features of a head of values."""
        return self.free_value_head_dim or self.head_dim

    @value_head_dim.setter
    def value_head_dim(self, size: int | None) -> None:
        options.check_options({"value_head_dim": size})
        self.free_value_head_dim = None if size == self.head_dim else size

    @torch.jit.unused
    def project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of every head. Override for another projection.

        (batch, seqlen, features) in; q (batch, seqlen_q, heads, head_dim), k and v (batch, seqlen_k, heads_kv,
        head_dim) out. The inputs are one object where the caller passed one. Beside ``kv`` key and value are ``None``,
        in ``keys_values`` query is; then so is what is made of them.
        """
        try:
            return projection.project_inputs(self, query, key, value)
        except RuntimeError as error:
            check_dtypes(self, (query, key, value), error)
            raise

    @torch.jit.unused
    def process_heads(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Heads on their way from projection to attention, as they are. Override to change them.

        They are normed and turned by then, where the layer has ``qk_norm`` and ``rotary``. q (batch, seqlen_q, heads,
        head_dim), k and v (batch, seqlen_k, heads_kv, head_dim), whatever ``batch_first`` says; batch and seqlen_q must
        stay. Keys put in front of the call's own, or behind, are declared as ``keys_before`` and ``keys_after``, on the
        class or the instance: every query sees them, and masks, windows and causality go on to speak of the call's own
        keys alone. What ``project`` gave as ``None`` is ``None`` here, in and out.
        """
        return q, k, v

    @torch.jit.unused
    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        mask: Mask | None = None,
        bias: Bias | Tensor | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        softmax_scale: float | None = None,
        dropout_p: float = 0.0,
        call: Problems | None = None,
    ) -> Tensor:
        """Attention: (batch, seqlen_q, heads, head_dim_v) of the heads. Override to add to it, or to run it more often.

        An override names what it changes and hands on the rest, ``call`` among it::

            def attend(self, q, k, v, *, bias=None, **call):
                return super().attend(q, k, v, bias=TensorBias(self.table) + bias, **call)

        All is as in ``flashmha.attention``, with every key in k: those of ``keys_before``, the call's own, those of
        ``keys_after``, of ``add_bias_kv`` and ``add_zero_attn``. ``bias`` is ``None`` or a ``Bias``; ``+`` adds either
        to a ``Bias``. The layer's weights are those of the problem that ran here. Where several ran,
        ``process_weights`` gets the weights of each, in order, and has to be overridden.
        """
        return run_problem(
            self,
            call,
            q,
            k,
            v,
            mask=mask,
            bias=bias,
            softcap=softcap,
            sinks=sinks,
            softmax_scale=softmax_scale,
            dropout_p=dropout_p,
        )

    @torch.jit.unused
    def process_weights(self, weights: Tensor) -> Tensor:
        """The attention weights of the layer, of those of its heads: the same. Override where ``merge`` combines heads.

        weights (batch, heads, seqlen_q, seqlen_k) in, with the heads of ``process_heads`` and the keys it adds;
        (batch, heads of the layer's own, seqlen_q, seqlen_k) out, whose mean over the heads is returned by default.
        Where it is overridden, weights that a call asks for are made at once. Where ``attend`` ran several problems, it
        gets the weights of each.
        """
        return weights

    @torch.jit.unused
    def merge(self, out: Tensor, query: Tensor) -> Tensor:
        """The output projection. Override for another one, or for a gate.

        out (batch, seqlen_q, heads, head_dim_v), and the query (batch, seqlen_q, embed_dim) that ``project`` got, in;
        (batch, seqlen_q, embed_dim) out.
        """
        return projection.merge_heads(self, out)

    @torch.jit.unused
    def __setattr__(self, name: str, value: Any) -> None:
        if name == "window":
            value = None if value is None else options.as_window(value)
        if name in STOCK_VALUES:
            options.check_options({name: value})
            if name == "sinks":
                options.check_sinks(value, self.num_heads, nn.Parameter)
        if name in PARTS:
            options.set_part(self, name, value)
        elif name in STOCK_VALUES and value is getattr(type(self), name):
            self.__dict__.pop(name, None)  # so that the layer is as plain as one that was never told
        else:
            super().__setattr__(name, value)

    @torch.jit.unused
    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """As in ``nn.Module``; where full heads meet grouped ones, an error names what converts them."""
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        hint = suggest_grouping(state_dict, prefix, projection.sizes_of(self))
        if hint is not None:
            error_msgs.append(hint)

    @torch.jit.unused
    def extra_repr(self) -> str:
        """The options that are set, as ``repr`` shows them; parts that are modules follow as such."""
        return options.describe_options(self)

    @torch.jit.unused
    def __prepare_scriptable__(self) -> "CustomHeads":
        """Raise where a script would lose something; ``torch.jit.script`` calls it before it compiles a module."""
        refuse_torchscript(self, None)
        own = find_replaced(self)
        if own:
            raise RuntimeError(
                f"TorchScript has no hooks that keep nn.TransformerEncoderLayer from bypassing {', '.join(own)} of "
                f"this {type(self).__name__} in eval; use torch.compile or torch.export."
            )
        return self

    @torch.jit.unused
    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        """As in ``nn.Module``; a layer that has to run is marked first, see ``features.mark``."""
        if isinstance(self, CustomHeads):  # a scripted layer borrows this method
            features.mark(self)
        yield from nn.MultiheadAttention.named_modules(self, *args, **kwargs)

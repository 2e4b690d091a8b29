"""FlashMultiHeadAttention: ``torch.nn.MultiheadAttention`` on the fastest backend that can serve the call.

The class below only projects, calls and projects. What the arguments of ``nn.MultiheadAttention`` mean (and that
``True`` hides) is read in one place, ``call``, and ends there. No annotation here may be postponed: TorchScript
reads them.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Optional, Union

import torch
import torch.fx
from torch import Tensor, nn

from ..problem.masks import Window
from . import features, projection
from .features import (
    EXTRA_KEYS,
    HOPS,
    MARK,
    SPECIAL,
    STOCK_VALUES,
    as_window,
    check_features,
    check_kv_heads,
    find_beyond_stock,
    find_own_code,
    find_replaced,
    find_shadows,
)
from .forward import attend
from .projection import shrink_kv
from .stock import StockForward, refuse_torchscript
from .written import Written

torch.fx.wrap("attend")  # FX sees one call


class FlashMultiHeadAttention(StockForward):
    """``torch.nn.MultiheadAttention``: same constructor, forward, parameters and numbers, on a chosen backend.

    Differences, all on purpose: a query that may look at nothing gets zeros (``out_proj.bias`` after the output
    projection) and zero gradients where the stock class has NaN; train and eval run the same code; ``attn_mask``
    may be (batch or 1, heads or 1, seqlen_q, seqlen_k) or a flashmha mask; jagged nested tensors are accepted;
    returned weights are those before dropout.

    For custom heads override ``project``, ``process_heads``, ``merge`` or ``process_weights``, never ``forward``.

    Args:
        embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype:
            as in ``nn.MultiheadAttention``.
        num_kv_heads: heads of keys and values, a divisor of ``num_heads`` (grouped-query attention); consecutive
            query heads share one. The projections of keys and values shrink with it. Default ``num_heads``.
        window: ``Window(left, right)`` or the pair (left, right), inclusive, ``None`` unbounded: every call sees
            no further, whatever its masks say. The last query sits at the last key.
        backend: a name, a family (``"flash_attn"``) or a list in order; raises ``NoBackendError`` where it cannot
            serve. Default automatic.
        call_out_proj: call ``out_proj`` as a module, so that hooks and adapters on it run. ``nn.MultiheadAttention``
            reads its weight and bias instead, and so does the default.
        need_weights: ``False`` returns ``None`` for the weights of every call, whatever the call asks for.
        trust_is_causal: believe ``is_causal=True`` in every call, so that ``attn_mask`` is never read and need not be
            given; else it is read beside a ``key_padding_mask`` and for weights, as in the stock class.
        skip_padding: leave padding out of self-attention altogether (``query is key is value`` and a
            ``key_padding_mask`` that only hides): no projection, no attention, and **zeros** in the output rows and
            weights of padded positions, where the default, like the stock class, computes something of no
            use. Every row is computed after all under ``torch.compile``, export and CUDA graph capture, on a GPU
            without a kernel for packed tokens in the dtype, beside an ``attn_mask`` that is not causal,
            ``add_bias_kv``, ``add_zero_attn`` or overridden methods; ``flashmha.explain`` says so. On a GPU
            each call waits once, for the number of real tokens, or each ``KeyPadding`` that is given as the mask.

    Shapes: query (batch, seqlen_q, embed_dim) with ``batch_first``, else (seqlen_q, batch, embed_dim), or
    (seqlen_q, embed_dim) unbatched; key and value likewise with kdim and vdim.
    """

    __constants__ = ["batch_first"]
    __jit_ignored_attributes__ = [*STOCK_VALUES, *EXTRA_KEYS, "_written"]
    bias_k: Optional[Tensor]
    bias_v: Optional[Tensor]

    # the state of a stock module has none of these
    num_kv_heads: Optional[int] = None
    window: Optional[Window] = None
    backend: Union[str, Sequence[str], None] = None
    call_out_proj: bool = False
    need_weights: bool = True
    trust_is_causal: bool = False
    skip_padding: bool = False

    keys_before: int = 0
    """How many keys ``process_heads`` puts in front of the call's own, as a prefix does: see there."""
    keys_after: int = 0
    """How many it puts behind them, as a sink may."""

    _written = Written((*SPECIAL, "forward"))

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: Optional[int] = None,
        vdim: Optional[int] = None,
        batch_first: bool = False,
        device: Any = None,
        dtype: Optional[torch.dtype] = None,
        *,
        num_kv_heads: Optional[int] = None,
        window: Union[Window, tuple[Optional[int], Optional[int]], None] = None,
        backend: Union[str, Sequence[str], None] = None,
        call_out_proj: bool = False,
        need_weights: bool = True,
        trust_is_causal: bool = False,
        skip_padding: bool = False,
    ) -> None:
        check_kv_heads(num_heads, num_kv_heads)
        switches = {
            "call_out_proj": call_out_proj,
            "need_weights": need_weights,
            "trust_is_causal": trust_is_causal,
            "skip_padding": skip_padding,
        }
        check_features({"window": window, "backend": backend, **switches})
        super().__init__(
            embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype
        )
        if num_kv_heads is not None and num_kv_heads != num_heads:
            self.num_kv_heads = num_kv_heads
            shrink_kv(self)
            self._reset_parameters()
        for name, value in {"window": window, "backend": backend, **switches}.items():
            if value != STOCK_VALUES[name]:
                setattr(self, name, value)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Optional[Tensor] = None,
        need_weights: bool = True,
        attn_mask: Optional[Tensor] = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        backend: Optional[str] = None,
    ) -> tuple[Tensor, Optional[Tensor]]:
        """Attention of every query over the keys and values.

        Args:
            query, key, value: see the class.
            key_padding_mask: (batch, seqlen_k), or (seqlen_k) unbatched; bool with ``True`` = *hidden*, or float,
                added to the scores. Or ``KeyPadding(valid)``, whose ``True`` = may attend, or ``KeyLengths(lengths)``,
                which keep what is computed of them: hand one to every layer of a model.
            need_weights: also return the attention weights. They are computed when they are first read.
            attn_mask: (seqlen_q, seqlen_k), (batch * heads, seqlen_q, seqlen_k) or (batch or 1, heads or 1,
                seqlen_q, seqlen_k); bool with ``True`` = *hidden*, or float, added to the scores. Or a flashmha mask,
                such as ``causal()``, whose ``True`` = may attend, taken as it is whatever ``is_causal`` says.
            average_attn_weights: return their mean over the heads.
            is_causal: a promise that ``attn_mask`` is the causal mask, which therefore need not be read; aligned
                to the first key.
            backend: for this call, as in the class.

        Returns:
            The output, shaped like the query, and the weights before dropout: (batch, seqlen_q, seqlen_k), with
            ``average_attn_weights=False`` (batch, heads, seqlen_q, seqlen_k), without batch where unbatched,
            ``None`` without ``need_weights``.

        Raises:
            AssertionError, RuntimeError: what ``nn.MultiheadAttention`` raises for the same input.
            TypeError: an argument of another kind.
            ValueError: a hop returned something else, or changed the heads and does not say what the weights are.
            NoBackendError: the named backend cannot serve; with every reason.
        """
        if torch.jit.is_scripting():
            assert backend is None, "TorchScript runs PyTorch's own attention: backend must be None"
            return self._attend_as_stock(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        return attend(
            self,
            query,
            key,
            value,
            key_padding_mask,
            need_weights,
            attn_mask,
            average_attn_weights,
            is_causal,
            backend,
        )

    @torch.jit.unused
    def project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of every head. Override for another projection.

        (batch, seqlen, features) in; q (batch, seqlen_q, heads, head_dim), k and v (batch, seqlen_k, heads_kv,
        head_dim) out. The inputs are one object where the caller passed one.
        """
        return projection.project_inputs(self, query, key, value)

    @torch.jit.unused
    def process_heads(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What happens to the heads between projection and attention: nothing. Override for rotary, norms, ...

        q (batch, seqlen_q, heads, head_dim), k and v (batch, seqlen_k, heads_kv, head_dim), whatever
        ``batch_first`` says; batch and seqlen_q must stay. Keys put in front of the call's own, or behind, are
        declared as ``keys_before`` and ``keys_after``, on the class or the instance: every query sees them, and masks,
        windows and causality go on to speak of the call's own keys alone.
        """
        return q, k, v

    @torch.jit.unused
    def process_weights(self, weights: Tensor) -> Tensor:
        """The attention weights of the layer, of those of its heads: the same. Override where ``merge`` combines heads.

        weights (batch, heads, seqlen_q, seqlen_k) in, with the heads of ``process_heads`` and the keys it adds;
        (batch, heads of the layer's own, seqlen_q, seqlen_k) out, whose mean over the heads is returned by default.
        Where it is overridden, weights that a call asks for are made at once.
        """
        return weights

    @torch.jit.unused
    def merge(self, out: Tensor) -> Tensor:
        """The output projection. Override for another one.

        out (batch, seqlen_q, heads, head_dim) in; (batch, seqlen_q, embed_dim) out.
        """
        return projection.merge_heads(self, out)

    @torch.jit.unused
    def extra_repr(self) -> str:
        """The features that are set, as ``repr`` shows them."""
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in find_beyond_stock(self) if name in STOCK_VALUES)

    @torch.jit.unused
    def __prepare_scriptable__(self) -> "FlashMultiHeadAttention":
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
    def to_torch(self) -> nn.MultiheadAttention:
        """The stock module with the same parameter objects, hooks and attributes.

        Raises:
            ValueError: the layer has features the stock class lacks, or code of its own (a subclass's, a patched
                method, a parametrization) that would be lost.
        """
        kept = ("backend", "call_out_proj", "trust_is_causal")
        lacking = [name for name in find_beyond_stock(self) if name not in kept]
        lacking = list(dict.fromkeys((*lacking, *find_replaced(self), *find_own_code(self, FlashMultiHeadAttention))))
        if lacking:
            raise ValueError(
                f"to_torch must not lose anything: nn.MultiheadAttention has no {', no '.join(lacking)}, "
                f"which this {type(self).__name__} uses."
            )
        twin: nn.MultiheadAttention = make_twin(self, nn.MultiheadAttention)
        return twin

    @classmethod
    def from_torch(cls, module: nn.MultiheadAttention) -> "FlashMultiHeadAttention":
        """The layer of a stock module, with the same parameter objects, hooks and attributes.

        Raises:
            TypeError: the module is a subclass (a parametrized one is), whose own code would be lost; or this class has
                an ``__init__`` of its own, which would not run.
            ValueError: the module or the stock class has a forward of its own, or an attribute that would mean
                something else.
        """
        if cls.__init__ is not FlashMultiHeadAttention.__init__:
            raise TypeError(
                f"from_torch must be called on a class without an __init__ of its own, which would not run, got "
                f"{cls.__name__}; build such a layer yourself and load the module's state_dict."
            )
        if type(module) is not nn.MultiheadAttention:
            raise TypeError(f"module must be exactly an nn.MultiheadAttention, got {type(module).__name__}.")
        why = why_not_ours(module)
        if why is not None:
            raise ValueError(f"module must lose nothing as a {cls.__name__}, got one that {why}.")
        twin: FlashMultiHeadAttention = make_twin(module, cls)
        return twin

    @torch.jit.unused
    def __setattr__(self, name: str, value: Any) -> None:
        if name == "window":
            value = None if value is None else as_window(value)
        if name in STOCK_VALUES:
            check_features({name: value})
        super().__setattr__(name, value)

    @torch.jit.unused
    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        """As in ``nn.Module``; a layer that has to run is marked first, see ``features.mark``."""
        if isinstance(self, FlashMultiHeadAttention):  # a scripted layer borrows this method
            features.mark(self)
        yield from nn.MultiheadAttention.named_modules(self, *args, **kwargs)


STOCK_FORWARD = nn.MultiheadAttention.forward
"""PyTorch's own, as it was when this package was imported."""


def why_not_ours(module: nn.MultiheadAttention) -> Optional[str]:
    """Why a stock module cannot be a layer of ours without losing something; ``None`` where it can."""
    if nn.MultiheadAttention.forward is not STOCK_FORWARD:
        return "runs a patched nn.MultiheadAttention.forward, which would not run after a swap"
    own = find_shadows(module)
    if own:
        return f"has a {', '.join(own)} of its own on the instance, which would run in place of ours"
    names = (*STOCK_VALUES, *HOPS, *EXTRA_KEYS, "to_torch", "from_torch", "_written", "_attend_as_stock")
    used = [name for name in names if hasattr(module, name)]
    if used:
        return f"has an attribute {', '.join(used)} of its own, which would mean something else after a swap"
    return None


def make_twin(module: nn.MultiheadAttention, kind: type[Any]) -> Any:
    """A module of another class with the same parameters, hooks and attributes; dicts are copied, tensors not."""
    twin: Any = object.__new__(kind)
    twin.__dict__.update({name: copy_containers(value) for name, value in vars(module).items()})
    vars(twin).pop("_compiled_call_impl", None)  # what ``compile()`` made of the other module
    if kind is nn.MultiheadAttention:
        for name in (*STOCK_VALUES, *EXTRA_KEYS):
            vars(twin).pop(name, None)
        twin._forward_pre_hooks.pop(MARK, None)
    return twin


def copy_containers(value: Any) -> Any:
    """A shallow copy of a dict or a set; anything else as it is."""
    return value.copy() if isinstance(value, (dict, set)) else value

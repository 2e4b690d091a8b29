"""FlashMultiHeadAttention: ``torch.nn.MultiheadAttention`` on the fastest backend that can serve the call.

The class below only projects, calls and projects. What the arguments of ``nn.MultiheadAttention`` mean (and that
``True`` hides) is read in one place, ``call``, and ends there. No annotation here may be postponed: TorchScript
reads them.
"""

from collections.abc import Sequence
from typing import Any, Optional, Union

import torch
import torch.fx
from torch import Tensor, nn

from ..problem.keywords import names_what_was_meant
from ..problem.scores import Bias
from ..problem.windows import Window
from . import demands, keys_values, options, projection
from .features import EXTRA_KEYS, HOPS, OWN_PROJECTIONS, PATCHED
from .forward import call_layer
from .heads import CustomHeads
from .hops import check_bias_heads, check_projections
from .options import MEANT_OPTIONS, STOCK_VALUES
from .twin import make_layer, make_stock
from .written import Written

torch.fx.wrap("call_layer")  # FX sees one call


class FlashMultiHeadAttention(CustomHeads):
    """``torch.nn.MultiheadAttention``: same constructor, forward, parameters and numbers, on a chosen backend.

    Differences, all on purpose: a query that may look at nothing gets zeros (``out_proj.bias`` after the output
    projection) and zero gradients where the stock class has NaN; train and eval run the same code; ``attn_mask``
    may be (batch or 1, heads or 1, seqlen_q, seqlen_k) or a flashmha mask; jagged nested tensors are accepted;
    returned weights are those before dropout.

    For custom heads override ``project``, ``process_heads``, ``attend``, ``merge`` or ``process_weights``, never
    ``forward``.

    Args:
        embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype:
            as in ``nn.MultiheadAttention``.

    Heads:
        num_kv_heads: heads of keys and values, a divisor of ``num_heads`` (grouped-query attention); consecutive
            query heads share one. The projections of keys and values shrink with it. Default ``num_heads``.
        head_dim: features of a head of queries and keys. Default ``embed_dim // num_heads``; with it ``embed_dim``
            need not be a multiple of ``num_heads``.
        value_head_dim: features of a head of values. Default ``head_dim``. A size that is given as its default counts
            as not given.
        qk_norm: ``"rms"``, ``"layer"`` or a pair of modules over the last axis: the submodules ``q_norm`` and
            ``k_norm``, applied to queries and keys before rotary.

    Positions, which count slots, in ``Documents`` from the start of each; padding moves no token:
        rotary: a ``Rotary``, which turns queries and keys by their positions, or a module called as one.
        position_bias: an ``AlibiBias``, a ``RelativePositionBias``, or any module that is called with q (batch,
            seqlen_q, heads, head_dim) and k and returns a ``Bias``, or a tensor that broadcasts to (batch, heads,
            seqlen_q, seqlen_k), added to the scores. Or a ``Bias``, whose tensors are not the layer's and stay where
            they are.
        window: ``Window(left, right)`` or the pair (left, right), inclusive, ``None`` unbounded: every call sees
            no further, whatever its masks say. The last query sits at the last key.
        causal: no query sees a key behind its own. The last query sits at the last key.

    Scores:
        softcap: ``softcap * tanh(score / softcap)``, before any bias.
        sinks: (num_heads,), one more score per head, which takes its share of the softmax and gives nothing; a
            parameter of the layer, copied from this tensor.
        softmax_scale: what the products of queries and keys are multiplied by. Default ``head_dim ** -0.5``.

    Switches:
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
    __jit_ignored_attributes__ = [*STOCK_VALUES, *EXTRA_KEYS, *OWN_PROJECTIONS, "_written"]
    _written = Written((*HOPS, "forward"), at_calls=PATCHED)

    @names_what_was_meant(MEANT_OPTIONS)
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
        # heads
        num_kv_heads: Optional[int] = None,
        head_dim: Optional[int] = None,
        value_head_dim: Optional[int] = None,
        qk_norm: Union[str, tuple[nn.Module, nn.Module], None] = None,
        # positions
        rotary: Optional[nn.Module] = None,
        position_bias: Union[nn.Module, Bias, None] = None,
        window: Union[Window, tuple[Optional[int], Optional[int]], None] = None,
        causal: bool = False,
        # scores
        softcap: Optional[float] = None,
        sinks: Optional[Tensor] = None,
        softmax_scale: Optional[float] = None,
        # switches
        backend: Union[str, Sequence[str], None] = None,
        call_out_proj: bool = False,
        need_weights: bool = True,
        trust_is_causal: bool = False,
        skip_padding: bool = False,
    ) -> None:
        """Make a layer; the docstring of the class says what every argument means."""
        said = {
            "rotary": rotary,
            "position_bias": position_bias,
            "window": window,
            "causal": causal,
            "softcap": softcap,
            "softmax_scale": softmax_scale,
            "backend": backend,
            "call_out_proj": call_out_proj,
            "need_weights": need_weights,
            "trust_is_causal": trust_is_causal,
            "skip_padding": skip_padding,
        }
        sizes = {"num_kv_heads": num_kv_heads, "head_dim": head_dim, "value_head_dim": value_head_dim}
        options.check_options({**said, **sizes})
        size = options.find_head_dim(embed_dim, num_heads, head_dim)
        options.check_kv_heads(num_heads, num_kv_heads)
        options.check_sinks(sinks, num_heads)
        options.check_rotary(rotary, size)
        norms = options.make_norms(qk_norm, size, device, dtype)
        check_projections(self)
        check_bias_heads(self, position_bias, num_heads)
        divided = head_dim is None or head_dim * num_heads == embed_dim
        super().__init__(
            embed_dim,
            num_heads if divided else 1,  # more need not divide embed_dim
            dropout,
            bias,
            add_bias_kv,
            add_zero_attn,
            kdim,
            vdim,
            batch_first,
            device,
            dtype,
        )
        if not divided:
            self.num_heads, self.head_dim = num_heads, head_dim
        sizes = {
            "free_num_kv_heads": num_kv_heads if num_kv_heads != num_heads else None,
            "free_head_dim": None if divided else head_dim,
            "free_value_head_dim": value_head_dim if value_head_dim != size else None,
        }
        said |= {**sizes, "q_norm": norms[0], "k_norm": norms[1]}
        for name, value in said.items():
            if value is not None and value != STOCK_VALUES[name]:
                setattr(self, name, value)
        if sinks is not None:
            self.sinks = nn.Parameter(sinks.detach().clone().to(device=device, dtype=dtype))
        projection.settle_parameters(self, bias, device, dtype)
        demands.check_served(self)

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
        positions: Optional[Tensor] = None,
        key_positions: Optional[Tensor] = None,
        kv: Optional[tuple[Tensor, Tensor]] = None,
        cache: Optional[Any] = None,
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
            positions: of the queries, for ``rotary`` alone: integers (seqlen_q) or (batch, seqlen_q). Masks, windows
                and biases count slots all the same.
            key_positions: of the keys, (seqlen_k) or (batch, seqlen_k); without them keys that are as many as the
                queries have the positions of these.
            kv: keys and values (batch, seqlen_k, heads_kv, head_dim) as ``keys_values`` of this layer, or of one with
                the same heads, makes them. ``key`` and ``value`` are not read then, and may be anything.
            cache: what earlier calls left, such as a ``StaticCache``; the call's own keys and values are put behind it.
                Masks and padding that are tensors speak of the call's own keys alone, which every query sees beside
                the earlier ones; rotary, windows, rules and biases by distance go on where the cache stopped. Weights
                are over the cache's slots. A ``MemoryCache`` keeps the keys and values of a cross-attention.

        Returns:
            The output, shaped like the query, and the weights before dropout: (batch, seqlen_q, seqlen_k), with
            ``average_attn_weights=False`` (batch, heads, seqlen_q, seqlen_k), without batch where unbatched,
            ``None`` without ``need_weights``.

        Raises:
            AssertionError, RuntimeError: what ``nn.MultiheadAttention`` raises for the same input.
            TypeError: an argument of another kind.
            ValueError: a hop returned something else, or changed the heads and does not say what the weights are; the
                cache does not fit, is full, or heads that want gradients would go into it.
            NoBackendError: the named backend cannot serve; with every reason.
        """
        if torch.jit.is_scripting():
            assert backend is None, "TorchScript runs PyTorch's own attention: backend must be None"
            assert positions is None and key_positions is None, "TorchScript has no rotary: positions must be None"
            assert kv is None, "TorchScript runs PyTorch's own attention: kv must be None"
            assert cache is None, "TorchScript runs PyTorch's own attention: cache must be None"
            return self._attend_as_stock(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        return call_layer(
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
            positions,
            key_positions,
            kv,
            cache,
        )

    @torch.jit.unused
    def keys_values(
        self, key: Tensor, value: Optional[Tensor] = None, positions: Optional[Tensor] = None
    ) -> tuple[Tensor, Tensor]:
        """Keys and values (batch, seqlen_k, heads_kv, head_dim), projected, normed, turned and processed.

        For ``forward(..., kv=...)`` of this layer and of others that share them. ``value`` is ``key`` by default,
        ``positions`` are as ``key_positions`` there. ``project`` gets ``None`` for the query, ``process_heads`` for q.
        """
        return keys_values.make_keys_values(self, key, key if value is None else value, positions)

    @torch.jit.unused
    def to_torch(self) -> nn.MultiheadAttention:
        """The stock module with the same parameter objects, hooks and attributes.

        Raises:
            ValueError: the layer has features the stock class lacks, or code of its own (a subclass's, a patched
                method, a parametrization) that would be lost.
        """
        return make_stock(self)

    @classmethod
    def from_torch(cls, module: nn.MultiheadAttention) -> "FlashMultiHeadAttention":
        """The layer of a stock module, with the same parameter objects, hooks and attributes.

        Raises:
            TypeError: the module is a subclass (a parametrized one is), whose own code would be lost; or this class has
                an ``__init__`` of its own, which would not run.
            ValueError: the module or the stock class has a forward of its own, or an attribute that would mean
                something else.
        """
        twin: FlashMultiHeadAttention = make_layer(module, cls)
        return twin

"""FlashMultiHeadAttention: ``torch.nn.MultiheadAttention`` on the fastest backend that can serve the call.

The class below only projects, calls and projects. What the arguments of ``nn.MultiheadAttention`` mean (and that
``True`` hides) is read in one place, ``call``, and ends there. No annotation here may be postponed: TorchScript
reads them.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Optional, Union

import torch
import torch.fx
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from . import nested
from .backends import expand
from .call import extra_columns, read_call
from .functional import autocast, run
from .masks import Dense, Window
from .scores import TensorBias
from .spec import AttentionSpec
from .stock import stock_forward
from .weights import attention_with_weights

FEATURES = ("num_kv_heads", "window", "backend", "call_out_proj")
"""What a layer has beyond ``nn.MultiheadAttention``; the class's values mean *absent*."""

HOOKS = ("project", "process_heads", "merge")
"""What a subclass overrides."""


class FlashMultiHeadAttention(nn.MultiheadAttention):
    """``torch.nn.MultiheadAttention``: same constructor, forward, parameters and numbers, on a chosen backend.

    Differences, all on purpose: a query that may look at nothing gets zeros (``out_proj.bias`` after the output
    projection) and zero gradients where the stock class has NaN; train and eval run the same code; ``attn_mask``
    may be (batch, 1, seqlen_q, seqlen_k) or (batch, heads, seqlen_q, seqlen_k); jagged nested tensors are
    accepted; returned weights are those before dropout.

    For custom heads override ``project``, ``process_heads`` or ``merge``, never ``forward``.

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

    Shapes: query (batch, seqlen_q, embed_dim) with ``batch_first``, else (seqlen_q, batch, embed_dim), or
    (seqlen_q, embed_dim) unbatched; key and value likewise with kdim and vdim.
    """

    __constants__ = ["batch_first"]
    __jit_ignored_attributes__ = list(FEATURES)
    bias_k: Optional[Tensor]
    bias_v: Optional[Tensor]

    # the state of a stock module has none of these
    num_kv_heads: Optional[int] = None
    window: Optional[Window] = None
    backend: Union[str, Sequence[str], None] = None
    call_out_proj: bool = False

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
    ) -> None:
        check_kv_heads(num_heads, num_kv_heads)
        check_features({"window": window, "backend": backend})
        super().__init__(
            embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype
        )
        if num_kv_heads is not None and num_kv_heads != num_heads:
            self.num_kv_heads = num_kv_heads
            shrink_kv(self)
            self._reset_parameters()
        if window is not None:
            self.window = as_window(window)
        if backend is not None:
            self.backend = backend
        if call_out_proj:
            self.call_out_proj = True
        mark(self)

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
                added to the scores.
            need_weights: also return the attention weights.
            attn_mask: (seqlen_q, seqlen_k), (batch * heads, seqlen_q, seqlen_k), (batch, 1, seqlen_q, seqlen_k) or
                (batch, heads, seqlen_q, seqlen_k); bool with ``True`` = *hidden*, or float, added to the scores.
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
            NoBackendError: the named backend cannot serve; with every reason.
        """
        if torch.jit.is_scripting():
            assert backend is None, "TorchScript runs PyTorch's own attention: backend must be None"
            return stock_forward(
                query,
                key,
                value,
                self.embed_dim,
                self.num_heads,
                self.in_proj_weight,
                self.in_proj_bias,
                self.bias_k,
                self.bias_v,
                self.add_zero_attn,
                self.dropout,
                self.out_proj.weight,
                self.out_proj.bias,
                self.training,
                key_padding_mask,
                need_weights,
                attn_mask,
                self.q_proj_weight,
                self.k_proj_weight,
                self.v_proj_weight,
                average_attn_weights,
                is_causal,
                self.batch_first,
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
        heads, heads_kv = self.num_heads, self.num_kv_heads or self.num_heads
        head_dim = self.embed_dim // heads
        sizes = [heads, heads_kv, heads_kv]
        if not self._qkv_same_embed_dim:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        elif query is key and key is value:
            qkv = linear(query, self.in_proj_weight, self.in_proj_bias)
            q, k, v = rearrange(qkv, "b s (h d) -> b s h d", d=head_dim).split(sizes, dim=2)
            return q, k, v
        else:
            weights = self.in_proj_weight.split([size * head_dim for size in sizes])
        biases = (None,) * 3
        if self.in_proj_bias is not None:
            biases = self.in_proj_bias.split([size * head_dim for size in sizes])
        if key is value and self._qkv_same_embed_dim:
            bias_kv = None if biases[1] is None else self.in_proj_bias[heads * head_dim :]
            kv = linear(key, self.in_proj_weight[heads * head_dim :], bias_kv)
            q = linear(query, weights[0], biases[0]).unflatten(-1, (heads, head_dim))
            k, v = rearrange(kv, "b s (h d) -> b s h d", d=head_dim).split(sizes[1:], dim=2)
            return q, k, v
        inputs = (query, key, value)
        q, k, v = (
            linear(x, weight, bias).unflatten(-1, (size, head_dim))
            for x, weight, bias, size in zip(inputs, weights, biases, sizes)
        )
        return q, k, v

    @torch.jit.unused
    def process_heads(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What happens to the heads between projection and attention: nothing. Override for rotary, norms, ...

        q (batch, seqlen_q, heads, head_dim), k and v (batch, seqlen_k, heads_kv, head_dim), whatever
        ``batch_first`` says; batch and seqlen_q must stay.
        """
        return q, k, v

    @torch.jit.unused
    def merge(self, out: Tensor) -> Tensor:
        """The output projection. Override for another one.

        out (batch, seqlen_q, heads, head_dim) in; (batch, seqlen_q, embed_dim) out.
        """
        out = rearrange(out, "b s h d -> b s (h d)")
        if self.call_out_proj:
            projected: Tensor = self.out_proj(out)
            return projected
        return linear(out, self.out_proj.weight, self.out_proj.bias)

    @torch.jit.unused
    def __prepare_scriptable__(self) -> "FlashMultiHeadAttention":
        """What ``torch.jit.script`` asks before it compiles a module."""
        refuse_torchscript(self, None)
        return self

    @torch.jit.unused
    def to_torch(self) -> nn.MultiheadAttention:
        """The stock module with the same parameter objects, hooks and attributes.

        Raises:
            ValueError: the layer has features the stock class lacks.
        """
        lacking = [name for name in changed(self) if name not in ("backend", "call_out_proj")]
        if lacking:
            raise ValueError(
                f"to_torch must not lose anything: nn.MultiheadAttention has no {', no '.join(lacking)}, "
                f"which this {type(self).__name__} uses."
            )
        twin: nn.MultiheadAttention = alike(self, nn.MultiheadAttention)
        return twin

    @classmethod
    def from_torch(cls, module: nn.MultiheadAttention) -> "FlashMultiHeadAttention":
        """The layer of a stock module, with the same parameter objects, hooks and attributes.

        Raises:
            TypeError: the module is a subclass, whose own code would be lost.
        """
        if type(module) is not nn.MultiheadAttention:
            raise TypeError(f"module must be exactly an nn.MultiheadAttention, got {type(module).__name__}.")
        twin: FlashMultiHeadAttention = alike(module, cls)
        return twin

    @torch.jit.unused
    def __setattr__(self, name: str, value: Any) -> None:
        if name == "window":
            value = None if value is None else as_window(value)
        if name in ("window", "backend"):
            check_features({name: value})
        super().__setattr__(name, value)
        if name in FEATURES or name in HOOKS:
            mark(self)

    @torch.jit.unused
    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        mark(self)


class Problem(NamedTuple):
    """What one call of a layer asks of attention."""

    q: Tensor
    k: Tensor
    v: Tensor
    spec: AttentionSpec
    batched: bool


def attend(
    layer: FlashMultiHeadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Optional[Tensor],
    need_weights: bool,
    attn_mask: Optional[Tensor],
    average_attn_weights: bool,
    is_causal: bool,
    backend: Union[str, Sequence[str], None],
) -> tuple[Tensor, Optional[Tensor]]:
    """One forward of a layer; a function so that FX sees one call (``torch.fx.wrap``)."""
    if query.is_nested or key.is_nested or value.is_nested:
        nested.check(layer, query, key, value, key_padding_mask, attn_mask)
        if layer.window is not None and query is not key:
            raise AssertionError(
                "window beside nested query and key of their own lengths is not supported: the last query of each item "
                "would have to sit at its own last key; call the layer item by item."
            )
        return attend_nested(layer, query, key, value, need_weights, average_attn_weights, is_causal, backend)
    if torch.jit.is_tracing() or wants_torch_function(layer, query, key, value):
        refuse_torchscript(layer, backend)
        return as_stock(
            layer, query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
        )
    problem = prepare(layer, query, key, value, key_padding_mask, need_weights, attn_mask, is_causal)
    wanted = layer.backend if backend is None else backend
    weights: Optional[Tensor] = None
    if need_weights:
        out, weights = attention_with_weights(*problem[:4], wanted, layer)
        weights = weights.mean(dim=1) if average_attn_weights else weights
    else:
        result = run(*problem[:4], wanted, layer)
        assert isinstance(result, Tensor)
        out = result
    output = layer.merge(out)
    if not problem.batched:
        return output.squeeze(0), None if weights is None else weights.squeeze(0)
    if not layer.batch_first:
        output = output.transpose(0, 1).contiguous()
    return output, weights


torch.fx.wrap("attend")


def prepare(
    layer: FlashMultiHeadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Optional[Tensor] = None,
    need_weights: bool = True,
    attn_mask: Optional[Tensor] = None,
    is_causal: bool = False,
) -> Problem:
    """Hops 1 to 3: the call read and checked, the heads projected and processed."""
    call = read_call(layer, query, key, value, key_padding_mask, need_weights, attn_mask, is_causal)
    q, k, v = layer.process_heads(*layer.project(call.query, call.key, call.value))
    if q.shape[:2] != call.query.shape[:2] or v.shape[0] != k.shape[0]:
        raise ValueError(
            f"project and process_heads must return (batch, seqlen, heads, head_dim), q with batch and seqlen_q = "
            f"{tuple(call.query.shape[:2])}, got {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}."
        )
    q, k, v = autocast(q, k, v)
    mask, bias, columns = call.mask, call.bias, extra_columns(layer)
    if layer.window is not None:
        mask = layer.window if mask is None else mask & layer.window
    if columns:  # always visible, and outside position space
        if mask is not None:
            seen = mask.materialize(q.shape[0], q.shape[2], q.shape[1], k.shape[1], q.device)
            mask = Dense(F.pad(seen, (0, columns), value=True))
        if bias is not None:
            bias = F.pad(bias, (0, columns))
        k, v = append_columns(layer, k, v)
    spec = AttentionSpec.of(
        q,
        k,
        v,
        mask=mask,
        bias=None if bias is None else TensorBias(bias),
        dropout_p=layer.dropout if layer.training else 0.0,
    )
    return Problem(q, k, v, spec, call.batched)


def append_columns(layer: FlashMultiHeadAttention, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values with the learned column of ``add_bias_kv`` and the zero column of ``add_zero_attn``."""
    batch, _, heads, _ = k.shape
    ks, vs = [k], [v]
    if layer.bias_k is not None and layer.bias_v is not None:
        ks.append(layer.bias_k.unflatten(-1, (heads, -1)).expand(batch, -1, -1, -1).to(k.dtype))
        vs.append(layer.bias_v.unflatten(-1, (heads, -1)).expand(batch, -1, -1, -1).to(v.dtype))
    if layer.add_zero_attn:
        ks.append(k.new_zeros(batch, 1, heads, k.shape[-1]))
        vs.append(v.new_zeros(batch, 1, heads, v.shape[-1]))
    return torch.cat(ks, dim=1), torch.cat(vs, dim=1)


def attend_nested(
    layer: FlashMultiHeadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    need_weights: bool,
    average_attn_weights: bool,
    is_causal: bool,
    backend: Union[str, Sequence[str], None],
) -> tuple[Tensor, Optional[Tensor]]:
    """Nested tensors: padded for the layer, and nested again."""
    same_q, same_kv = query is key, key is value
    dense_k, valid_k = nested.padded(key)
    dense_v = dense_k if same_kv else nested.padded(value)[0]
    dense_q, valid_q = (dense_k, valid_k) if same_q else nested.padded(query)
    out, weights = attend(
        layer, dense_q, dense_k, dense_v, ~valid_k, need_weights, None, average_attn_weights, is_causal, backend
    )
    if weights is not None:
        rows = valid_q[:, :, None] if average_attn_weights else valid_q[:, None, :, None]
        weights = weights.masked_fill(~rows, 0.0)
    return nested.like(out, query, valid_q), weights


def refuse_torchscript(layer: FlashMultiHeadAttention, backend: Union[str, Sequence[str], None]) -> None:
    """Raise where PyTorch's own function would lose what a layer or a call asks for."""
    lost = changed(layer) + ([] if backend is None else [f"backend={backend!r}"])
    if lost:
        raise RuntimeError(
            "TorchScript and tensors with __torch_function__ run F.multi_head_attention_forward, which has no "
            f"{', no '.join(lost)}, and this {type(layer).__name__} uses that; use torch.compile or torch.export."
        )


def wants_torch_function(layer: FlashMultiHeadAttention, *inputs: Tensor) -> bool:
    """Some input or weight is a tensor subclass that wants to see the call (a mode alone does not count)."""
    out_proj = layer.out_proj
    outer = (getattr(out_proj, "weight", None), getattr(out_proj, "bias", None))  # an adapter may stand there
    weights = (layer.in_proj_weight, layer.in_proj_bias, *outer)
    if not torch.overrides.has_torch_function((*inputs, *weights)):
        return False
    for tensor in (*inputs, *weights):
        kind = type(tensor)
        if kind is Tensor or kind is nn.Parameter:
            continue
        if getattr(kind, "__torch_function__", None) not in (None, torch._C._disabled_torch_function_impl):
            return True
    return False


def as_stock(
    layer: FlashMultiHeadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Optional[Tensor],
    need_weights: bool,
    attn_mask: Optional[Tensor],
    average_attn_weights: bool,
    is_causal: bool,
) -> tuple[Tensor, Optional[Tensor]]:
    """The call as ``F.multi_head_attention_forward``."""
    return stock_forward(
        query,
        key,
        value,
        layer.embed_dim,
        layer.num_heads,
        layer.in_proj_weight,
        layer.in_proj_bias,
        layer.bias_k,
        layer.bias_v,
        layer.add_zero_attn,
        layer.dropout,
        layer.out_proj.weight,
        layer.out_proj.bias,
        layer.training,
        key_padding_mask,
        need_weights,
        attn_mask,
        layer.q_proj_weight,
        layer.k_proj_weight,
        layer.v_proj_weight,
        average_attn_weights,
        is_causal,
        layer.batch_first,
    )


def linear(x: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tensor:
    """``F.linear``; a bias of another dtype joins in the weight's, as it does in the stock module."""
    return F.linear(x, weight, bias if bias is None or bias.dtype == weight.dtype else bias.to(weight.dtype))


def changed(layer: FlashMultiHeadAttention) -> list[str]:
    """What a layer has that ``nn.MultiheadAttention`` has not: features set, hooks overridden."""
    features = [name for name in FEATURES if getattr(layer, name) != getattr(FlashMultiHeadAttention, name)]
    hooks = [
        name
        for name in HOOKS
        if name in vars(layer) or getattr(type(layer), name) is not getattr(FlashMultiHeadAttention, name)
    ]
    return features + hooks


def mark(layer: FlashMultiHeadAttention) -> None:
    """Keep ``nn.TransformerEncoderLayer`` from computing a layer's attention behind its back.

    In eval the encoder layer hands the weights of ``self_attn`` to one fused operator and never calls it, unless a
    module inside has a forward hook. So a layer with something to lose carries one that does nothing.
    """
    hooks = layer._forward_pre_hooks
    if changed(layer):
        hooks[MARK] = keep_forward  # type: ignore[index]
    else:
        hooks.pop(MARK, None)  # type: ignore[call-overload]


MARK = "flashmha"


def keep_forward(layer: nn.Module, arguments: Any) -> None:
    """A forward pre-hook that does nothing; see ``mark``."""


def alike(module: nn.MultiheadAttention, kind: type[Any]) -> Any:
    """A module of another class with the same parameters, hooks and attributes; dicts are copied, tensors not."""
    twin: Any = object.__new__(kind)
    twin.__dict__.update({name: copied(value) for name, value in vars(module).items()})
    if kind is nn.MultiheadAttention:
        for name in FEATURES:
            vars(twin).pop(name, None)
        twin._forward_pre_hooks.pop(MARK, None)
    else:
        mark(twin)
    return twin


def copied(value: Any) -> Any:
    return value.copy() if isinstance(value, (dict, set)) else value


def check_kv_heads(num_heads: int, num_kv_heads: Optional[int]) -> None:
    if num_kv_heads is not None and (num_kv_heads < 1 or num_heads % num_kv_heads):
        raise ValueError(
            f"num_kv_heads must be a divisor of num_heads, got num_heads={num_heads} and num_kv_heads={num_kv_heads}."
        )


def check_features(features: dict[str, Any]) -> None:
    """Raise where a feature's value means nothing, before anything is changed."""
    if features.get("backend") is not None and not expand(features["backend"]):
        raise ValueError(f"backend must name at least one backend, got {features['backend']!r}.")
    if features.get("window") is not None:
        as_window(features["window"])


def as_window(window: Union[Window, tuple[Optional[int], Optional[int]]]) -> Window:
    if isinstance(window, Window):
        return window
    if not isinstance(window, tuple) or len(window) != 2:
        raise ValueError(f"window must be a Window or a pair (left, right), got {window!r}.")
    return Window(*window)


def shrink_kv(layer: FlashMultiHeadAttention) -> None:
    """Give a new layer the smaller projections of grouped heads; the values are drawn afterwards."""
    width = layer.embed_dim // layer.num_heads * (layer.num_kv_heads or layer.num_heads)

    def rows(parameter: Optional[Tensor], size: int) -> Optional[nn.Parameter]:
        return None if parameter is None else nn.Parameter(parameter.new_empty(size, *parameter.shape[1:]))

    layer.in_proj_weight = rows(layer.in_proj_weight, layer.embed_dim + 2 * width)  # type: ignore[assignment]
    layer.in_proj_bias = rows(layer.in_proj_bias, layer.embed_dim + 2 * width)  # type: ignore[assignment]
    layer.k_proj_weight = rows(layer.k_proj_weight, width)  # type: ignore[assignment]
    layer.v_proj_weight = rows(layer.v_proj_weight, width)  # type: ignore[assignment]
    if layer.bias_k is not None and layer.bias_v is not None:
        layer.bias_k, layer.bias_v = (nn.Parameter(x.new_empty(1, 1, width)) for x in (layer.bias_k, layer.bias_v))

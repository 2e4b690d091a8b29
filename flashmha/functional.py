"""attention: the pure function, usable without a layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .backends import choose
from .backends.choice.serve import serve
from .backends.choice.wishes import Wanted
from .host.torch_state import autocast, is_dense
from .problem.keywords import names_what_was_meant
from .problem.masks import Dense, Mask
from .problem.scores import Bias, TensorBias
from .problem.spec import AttentionSpec
from .problem.wording import spell

MEANT = {
    "causal": "mask=causal()",
    "is_causal": "mask=causal(), or mask=causal(align='top_left') where the first query sits at the first key",
    **dict.fromkeys(("window", "window_size", "sliding_window"), "mask=Window(left, right)"),
    **dict.fromkeys(("attn_mask", "attention_mask"), "mask, whose True = may attend"),
    "key_padding_mask": "mask=KeyPadding(valid), whose True = may attend",
    **dict.fromkeys(("cu_seqlens", "cu_seqlens_q"), "mask=Documents(cu_seqlens)"),
    "alibi_slopes": "bias=ALiBi(slopes)",
    "attn_bias": "bias",
    **dict.fromkeys(("scale", "scaling"), "softmax_scale"),
}
"""What other libraries call an argument of ``attention``."""


@names_what_was_meant(MEANT)
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask | Tensor | None = None,
    bias: Bias | Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    softmax_scale: float | None = None,
    dropout_p: float = 0.0,
    deterministic: bool | None = None,
    return_lse: bool = False,
    backend: Wanted = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Scaled dot product attention on the fastest backend that can serve the call.

    In plain PyTorch, for as many heads_kv as heads::

        score = softmax_scale * torch.einsum("bqhd,bkhd->bhqk", q, k) + bias
        weights = score.masked_fill(~mask, -inf).softmax(-1)          # rows that may look at nothing: zeros
        out = torch.einsum("bhqk,bkhd->bqhd", dropout(weights, dropout_p), v)

    Args:
        q: (batch, seqlen_q, heads, head_dim).
        k: (batch, seqlen_k, heads_kv, head_dim); consecutive query heads share a key head.
        v: (batch, seqlen_k, heads_kv, head_dim_v).
        mask: a ``Mask``, or a bool tensor that broadcasts to (batch, heads, seqlen_q, seqlen_k), ``True`` = may
            attend.
        bias: a ``Bias``, or a floating point tensor that broadcasts to the same shape; it may want a gradient.
        softcap: ``cap * tanh(score / cap)`` before the bias.
        sinks: (heads,), one more score per head that takes its share of the softmax and gives nothing.
        softmax_scale: default ``head_dim ** -0.5``.
        dropout_p: probability of dropping a weight; always applied, so pass 0 in eval.
        deterministic: the same gradients bit by bit; the default is what ``torch.use_deterministic_algorithms`` says,
            but not with ``warn_only``, under which torch's own kernels do no more than warn.
        return_lse: also return the log-sum-exp of the scores, (batch, heads, seqlen_q), in float32 at least. Of a row
            that may look at nothing it is ``-inf``, or its sink where there are sinks.
        backend: a name, a family (``"flash_attn"``) or a list in order; default automatic.

    Returns:
        out (batch, seqlen_q, heads, head_dim_v), or (out, lse).

    Raises:
        ValueError: shapes, dtypes or numbers that make no problem.
        NoBackendError: no backend can serve, or the named one cannot; with every reason.
    """
    check_arguments(q, k, v, sinks, softcap, softmax_scale, dropout_p, deterministic, return_lse)
    q, k, v = autocast(q, k, v)
    spec = AttentionSpec.of(
        q,
        k,
        v,
        mask=as_mask(mask),
        bias=as_bias(bias),
        softcap=softcap,
        sinks=sinks,
        softmax_scale=softmax_scale,
        dropout_p=dropout_p,
        need_lse=return_lse,
        deterministic=deterministic,
    )
    return run_attention(q, k, v, spec, backend)


NUMBERS = (float, int, torch.SymFloat, torch.SymInt)


def check_arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None = None,
    softcap: float | None = None,
    softmax_scale: float | None = None,
    dropout_p: float = 0.0,
    deterministic: bool | None = None,
    return_lse: bool = False,
) -> None:
    """Raise ``TypeError`` where an argument of ``attention`` is not even of the kind it has to be."""
    for name, tensor in (("q", q), ("k", k), ("v", v), ("sinks", sinks)):
        if not is_dense(tensor) and (tensor is not None or name != "sinks"):
            raise TypeError(f"{name} must be a dense tensor, got {spell(tensor)}.")
    for name, number in (("softcap", softcap), ("softmax_scale", softmax_scale), ("dropout_p", dropout_p)):
        if not isinstance(number, NUMBERS) and (number is not None or name == "dropout_p"):
            hint = "; multiply q by a tensor instead" if name == "softmax_scale" else ""
            raise TypeError(f"{name} must be a number, got {spell(number)}{hint}.")
    for name, said in (("deterministic", deterministic), ("return_lse", return_lse)):
        if not isinstance(said, bool) and (said is not None or name == "return_lse"):
            raise TypeError(f"{name} must be True or False, got {spell(said)}.")


def as_mask(mask: Mask | Tensor | None) -> Mask | None:
    """A bool tensor as a mask."""
    if mask is None or isinstance(mask, Mask):
        return mask
    if is_dense(mask):
        return Dense(mask)
    hint = "; call it" if callable(mask) else ""
    raise TypeError(f"mask must be a Mask, such as causal(), or a bool tensor, got {spell(mask)}{hint}.")


def as_bias(bias: Bias | Tensor | None) -> Bias | None:
    """A floating point tensor as a bias."""
    if bias is None or isinstance(bias, Bias):
        return bias
    if is_dense(bias):
        return TensorBias(bias)
    raise TypeError(f"bias must be a Bias, such as ALiBi(slopes), or a floating point tensor, got {spell(bias)}.")


def run_attention(
    q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, wanted: Wanted = None, layer: Any = None
) -> Tensor | tuple[Tensor, Tensor]:
    """Choose a backend for a problem and let it serve."""
    result: Tensor | tuple[Tensor, Tensor] = serve(choose(spec, wanted), q, k, v, spec, layer)
    return result

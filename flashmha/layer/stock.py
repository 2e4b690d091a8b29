"""The forward as PyTorch's own function, for callers that need PyTorch's own graph.

TorchScript, ``torch.jit.trace`` and tensors with ``__torch_function__`` want to see
``F.multi_head_attention_forward``. It answers NaN for a row that may look at nothing; so such rows are found first,
opened, and their share of the output and their weights are zeroed. No annotation here may be postponed: TorchScript
reads them.
"""

from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..host.torch_state import has_torch_function, overrides_functions
from ..problem.masks import Mask
from ..problem.ragged import Padding
from .arguments import Arguments
from .features import find_beyond_stock
from .projection import PARAMETRIC, out_proj_of, parameters
from .protocol import Layer
from .written import is_as_written


class StockForward(nn.MultiheadAttention):
    """``nn.MultiheadAttention`` in one scriptable method, with zeros for rows that may look at nothing."""

    def _attend_as_stock(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Optional[Tensor],
        need_weights: bool,
        attn_mask: Optional[Tensor],
        average_attn_weights: bool,
        is_causal: bool,
    ) -> tuple[Tensor, Optional[Tensor]]:
        """``nn.MultiheadAttention.forward`` without its fast path, with those zeros."""
        batched, num_heads = query.dim() == 3, self.num_heads
        if self.batch_first and batched:
            if key is value:
                if query is key:
                    query = key = value = query.transpose(0, 1)
                else:
                    query, key = query.transpose(0, 1), key.transpose(0, 1)
                    value = key
            else:
                query, key, value = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
        if attn_mask is not None and attn_mask.dim() == 4:
            attn_mask = attn_mask.expand(query.shape[1], num_heads, -1, -1).flatten(0, 1)

        blind: Optional[Tensor] = None
        hint_alone = is_causal and key_padding_mask is None and not need_weights  # the mask will not be read
        extra_columns = self.add_zero_attn or self.bias_k is not None  # every query may look at these
        if hint_alone and extra_columns and attn_mask is not None:
            # the hint alone would hide the extra columns from early queries
            attn_mask = torch.ones(query.shape[0], key.shape[0], dtype=torch.bool, device=query.device).triu(1)
            is_causal = False
        if (attn_mask is not None or key_padding_mask is not None) and not extra_columns and not hint_alone:
            total = sum_masks(attn_mask, key_padding_mask, num_heads, query, key)
            blind = (total == float("-inf")).all(dim=-1, keepdim=True)  # (batch * heads, seqlen_q, 1)
            attn_mask, key_padding_mask, is_causal = centre(total.masked_fill(blind, 0.0), query), None, False

        # the output projection waits where rows have to be zeroed in between
        weight, bias = self.out_proj.weight, self.out_proj.bias
        identity = blind is not None
        out, weights = F.multi_head_attention_forward(
            query,
            key,
            value,
            self.embed_dim,
            num_heads,
            self.in_proj_weight,
            self.in_proj_bias,
            self.bias_k,
            self.bias_v,
            self.add_zero_attn,
            self.dropout,
            torch.eye(self.embed_dim, dtype=query.dtype, device=query.device) if identity else weight,
            None if identity else bias,
            training=self.training,
            key_padding_mask=key_padding_mask,
            need_weights=need_weights,
            attn_mask=attn_mask,
            use_separate_proj_weight=not self._qkv_same_embed_dim,
            q_proj_weight=self.q_proj_weight,
            k_proj_weight=self.k_proj_weight,
            v_proj_weight=self.v_proj_weight,
            average_attn_weights=False,
            is_causal=is_causal,
        )
        if blind is not None:
            dead = torch.unflatten(blind, 0, [-1, num_heads])  # (batch, heads, seqlen_q, 1)
            heads = torch.unflatten(out, -1, [num_heads, -1])
            rows = dead.permute(2, 0, 1, 3) if batched else dead[0].transpose(0, 1)
            out = F.linear(heads.masked_fill(rows, 0.0).flatten(-2), weight, bias)
            if weights is not None:
                weights = weights.masked_fill(dead if batched else dead[0], 0.0)
        if weights is not None and average_attn_weights:
            weights = weights.mean(dim=-3)
        if self.batch_first and batched:
            out = out.transpose(0, 1).contiguous()
        return out, weights


def sum_masks(
    attn_mask: Optional[Tensor], key_padding_mask: Optional[Tensor], num_heads: int, query: Tensor, key: Tensor
) -> Tensor:
    """Both masks as what is added to the scores, (batch * heads, seqlen_q, seqlen_k)."""
    batch = query.shape[1] if query.dim() == 3 else 1
    if attn_mask is None:
        attn_mask = torch.zeros(query.shape[0], key.shape[0], dtype=query.dtype, device=query.device)
    total = as_added_mask(attn_mask, query).expand(batch * num_heads, -1, -1)
    if key_padding_mask is not None:
        padding = as_added_mask(key_padding_mask, query)
        padding = padding if padding.dim() == 2 else padding.unsqueeze(0)
        columns = padding[:, None, None, :].expand(-1, num_heads, -1, -1).flatten(0, 1)
        columns = columns.expand_as(total)
        both = total + columns
        # two finite numbers whose sum is beyond the dtype hide nothing
        hidden = (total == float("-inf")) | (columns == float("-inf"))
        total = torch.where((both == float("-inf")) & ~hidden, torch.minimum(total, columns), both)
    return total


def centre(total: Tensor, query: Tensor) -> Tensor:
    """A mask without blind rows as heads of half precision can be told it; see ``bias_values.narrow_bias``."""
    one = torch.zeros(1, 1, dtype=query.dtype, device=query.device)
    dtype = torch.matmul(one, one).dtype  # autocast may choose another than the query's
    if dtype == total.dtype or (dtype != torch.float16 and dtype != torch.bfloat16) or total.size(-1) == 0:
        return total
    hidden = total == float("-inf")
    total = (total - total.detach().amax(-1, keepdim=True)).clamp(-65504.0, 65504.0)  # what float16 holds
    return total.masked_fill(hidden, float("-inf")).to(dtype)


def as_added_mask(mask: Tensor, query: Tensor) -> Tensor:
    """A mask as what is added to the scores."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=query.dtype).masked_fill(mask, float("-inf"))


def refuse_torchscript(layer: Layer, given: Arguments | None) -> None:
    """Raise where PyTorch's own function would lose what a layer or a call asks for."""
    lost = find_beyond_stock(layer)
    if given is not None:
        lost += [] if given.backend is None else [f"backend={given.backend!r}"]
        lost += [name for name in ("positions", "key_positions", "kv", "cache") if getattr(given, name) is not None]
    if lost:
        raise RuntimeError(
            "TorchScript and tensors with __torch_function__ run F.multi_head_attention_forward, which has no "
            f"{', no '.join(lost)}, and this {type(layer).__name__} uses that; use torch.compile or torch.export."
        )


TENSORS = ("in_proj_weight", "in_proj_bias", "q_proj_weight", "k_proj_weight", "v_proj_weight", "bias_k", "bias_v")
"""Every tensor that a layer itself holds."""


def wants_torch_function(layer: Layer, *inputs: Tensor) -> bool:
    """Some input or weight is a tensor subclass that wants to see the call (a mode alone does not count)."""
    inner, out_proj = layer._parameters, out_proj_of(layer)
    if type(out_proj) in PARAMETRIC:
        outer = parameters(out_proj, "weight", "bias")
    else:  # an adapter may stand there, or anything with a weight and a bias
        outer = getattr(out_proj, "weight", None), getattr(out_proj, "bias", None)
    usual = is_as_written(type(layer)) and "in_proj_weight" in inner and "in_proj_bias" in inner
    held = (*inner.values(), layer.bias_k, layer.bias_v) if usual else [getattr(layer, name) for name in TENSORS]
    tensors: Any = (*inputs, *held, *outer)
    if not has_torch_function(tensors):
        return False
    return any(map(overrides_functions, tensors))


def as_stock(layer: Layer, given: Arguments) -> tuple[Tensor, Tensor | None]:
    """The call as ``F.multi_head_attention_forward``."""
    query, key, value, key_padding_mask, need_weights, attn_mask, average, is_causal, *_ = given
    if isinstance(attn_mask, Mask):
        attn_mask, is_causal = as_tensor(layer, attn_mask, query, key), False
    if isinstance(key_padding_mask, Padding):
        axis = 1 if layer.batch_first and key.dim() == 3 else 0
        key_padding_mask.check(key.shape[1 - axis] if key.dim() == 3 else 1, 1, 1, key.shape[axis])
        hidden = ~key_padding_mask.real(key.shape[axis])
        key_padding_mask = hidden if key.dim() == 3 else hidden[0]
    return layer._attend_as_stock(query, key, value, key_padding_mask, need_weights, attn_mask, average, is_causal)


def as_tensor(layer: Layer, mask: Mask, query: Tensor, key: Tensor) -> Tensor:
    """A rule as a mask tensor of the stock class: (batch * heads, seqlen_q, seqlen_k), ``True`` = hidden."""
    axis = 1 if layer.batch_first and query.dim() == 3 else 0
    batch = query.shape[1 - axis] if query.dim() == 3 else 1
    sizes = batch, layer.num_heads, query.shape[axis], key.shape[axis]
    mask.check(*sizes)
    return ~mask.materialize(*sizes, query.device).expand(sizes).flatten(0, 1)

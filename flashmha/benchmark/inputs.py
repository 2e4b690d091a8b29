"""Inputs: the tensors of a case, the same ones for every contestant."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor, nn

from ..layer.module import FlashMultiHeadAttention
from ..parts.rotary import Rotary
from .cases import Case


@dataclasses.dataclass(frozen=True, eq=False)
class Inputs:
    """The tensors of a case: query, key and value of a layer, at level ``core`` q, k and v, or an encoder's input.

    Attributes:
        case: what is computed.
        query, key, value: (batch, seqlen, embed_dim), batch and seqlen the other way round where the case says so, or
            (batch, seqlen, heads, head_dim) at level core; one object where a layer is called with one. Of a
            decoder the tokens and the memory.
        cotangent: of the output; zero where a query is padding, as with a loss over real tokens.
        attn_mask: (seqlen_q, seqlen_k) bool, ``True`` = hidden, for causal cases; of a decoder (seqlen_q, seqlen_q).
        hidden: (batch, seqlen_k) bool, ``True`` = hidden, for padded cases; see ``padding``.
        state: the parameters, named as in ``FlashMultiHeadAttention``, which are stock's names where stock has them, or
            as in ``nn.TransformerEncoder``; empty at level core.
    """

    case: Case
    query: Tensor
    key: Tensor
    value: Tensor
    cotangent: Tensor
    attn_mask: Tensor | None
    hidden: Tensor | None
    state: dict[str, Tensor]

    def padding(self) -> Tensor | None:
        """The padding mask, a new tensor every time: each batch of a training brings its own."""
        return None if self.hidden is None else self.hidden.clone()

    @functools.cached_property
    def seen(self) -> Tensor | None:
        """``attn_mask`` the other way round, made once, as by a program whose mask stays."""
        return None if self.attn_mask is None else ~self.attn_mask

    def turned(self, x: Tensor) -> Tensor:
        """Between the layout of the case and (batch, seqlen, ...), either way."""
        return x if self.case.batch_first else x.transpose(0, 1)

    def casting(self) -> contextlib.AbstractContextManager[Any]:
        """The autocast that a forward of the case runs under; float64 passes it as it is."""
        if self.case.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self.query.device.type, getattr(torch, self.case.autocast))

    def leaves(self) -> dict[str, Tensor]:
        """The inputs that want a gradient in training."""
        named = {"query": self.query, "key": self.key, "value": self.value}
        kept: dict[str, Tensor] = {}
        for name, x in named.items():
            if not any(x is other for other in kept.values()):
                kept[name] = x
        return kept

    def to(self, dtype: torch.dtype) -> Inputs:
        """The same numbers in a dtype, as leaves of their own, which share the memory where the dtype stays."""
        moved: dict[int, Tensor] = {}
        for x in self.leaves().values():
            moved[id(x)] = x.detach().to(dtype).requires_grad_(x.requires_grad)
        return dataclasses.replace(
            self,
            query=moved[id(self.query)],
            key=moved[id(self.key)],
            value=moved[id(self.value)],
            cotangent=self.cotangent.to(dtype),
            state={name: x.to(dtype) for name, x in self.state.items()},
        )


def draw_inputs(case: Case, device: torch.device, seed: int, one_projection: bool = False) -> Inputs:
    """The tensors of a case out of a seed: normal, padding included.

    With ``one_projection`` q, k and v of level core are views of one tensor, as a layer hands them on.
    """
    generator = torch.Generator(device).manual_seed(seed)
    dtype = getattr(torch, case.dtype)

    def normal(*shape: int) -> Tensor:
        wide = torch.float32 if device.type == "cpu" else dtype  # a GPU holds a cache of 65536 keys once, not thrice
        return torch.randn(shape, generator=generator, device=device, dtype=wide).to(dtype)

    state: dict[str, Tensor] = {}
    if case.level != "core":
        query = normal(case.batch, case.seqlen_q, case.embed_dim)
        own = case.seqlen_q == case.seqlen_k and case.level != "decoder"
        key = query if own else normal(case.batch, case.seqlen_k, case.embed_dim)
        value = key
        with torch.random.fork_rng(devices=[] if device.type == "cpu" else [device]), device:
            torch.manual_seed(seed)
            module = layer_module(case) if case.own_heads else stock_module(case)
            for name, parameter in module.named_parameters():
                if name.endswith("bias") or "norm" in name:  # zeros and ones would hide one that is forgotten
                    nn.init.normal_(parameter, mean=float(name.endswith("weight")), std=0.1)
                elif case.layers:  # stock makes copies of one layer
                    nn.init.xavier_uniform_(parameter)
        state = {name: x.to(device, dtype) for name, x in module.state_dict().items()}
    elif one_projection and case.seqlen_q == case.seqlen_k:
        packed = normal(case.batch, case.seqlen_k, case.heads + 2 * case.heads_kv, case.head_dim)
        query, key, value = (x.detach() for x in packed.split((case.heads, case.heads_kv, case.heads_kv), dim=2))
    else:
        query = normal(case.batch, case.seqlen_q, case.heads, case.head_dim)
        if one_projection:
            packed = normal(case.batch, case.seqlen_k, 2 * case.heads_kv, case.head_dim)
            key, value = (x.detach() for x in packed.chunk(2, dim=2))
        else:
            key, value = (normal(case.batch, case.seqlen_k, case.heads_kv, case.head_dim) for _ in range(2))
            if case.suite == "generate":  # as caches lie on a CPU
                key, value = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (key, value))
    cotangent = normal(*query.shape)
    attn_mask = hidden = None
    decodes = case.level == "decoder"
    if case.causal or decodes:
        seqlen_k = case.seqlen_q if decodes else case.seqlen_k
        attn_mask = torch.ones(case.seqlen_q, seqlen_k, dtype=torch.bool, device=device).triu_(1)
        if case.window is not None:
            attn_mask |= torch.ones_like(attn_mask).tril_(-case.window)
    if case.lengths is not None:
        hidden = torch.arange(case.seqlen_k)[None, :] >= torch.tensor(case.lengths)[:, None]
        if case.holes:
            shuffled = torch.rand(hidden.shape, generator=torch.Generator().manual_seed(seed)).argsort(dim=1)
            hidden = hidden.gather(1, shuffled)
        hidden = hidden.to(device)
        if case.seqlen_q == case.seqlen_k:
            cotangent[hidden] = 0.0
    found = Inputs(case, query, key, value, cotangent, attn_mask, hidden, state)
    if not case.batch_first:
        turned = {id(x): found.turned(x).contiguous() for x in (query, key, value, cotangent)}
        query, key, value, cotangent = (turned[id(x)] for x in (query, key, value, cotangent))
        found = dataclasses.replace(found, query=query, key=key, value=value, cotangent=cotangent)
    for x in (query, key, value):
        x.requires_grad_(case.mode == "train")
    return found


def stock_module(case: Case) -> nn.Module:
    """The stock layer, encoder or decoder that a case is about, without dropout."""
    if not case.layers:
        return nn.MultiheadAttention(case.embed_dim, case.heads, bias=case.bias, batch_first=case.batch_first)
    if case.level == "decoder":
        writing = nn.TransformerDecoderLayer(
            case.embed_dim, case.heads, 4 * case.embed_dim, dropout=0.0, batch_first=case.batch_first
        )
        return nn.TransformerDecoder(writing, case.layers)
    layer = nn.TransformerEncoderLayer(
        case.embed_dim, case.heads, 4 * case.embed_dim, dropout=0.0, batch_first=case.batch_first
    )
    return nn.TransformerEncoder(layer, case.layers, enable_nested_tensor=case.batch_first)


def layer_module(case: Case, **options: Any) -> FlashMultiHeadAttention:
    """Our layer of a case, with what the case says of heads and positions."""
    if case.own_heads:
        options |= {"num_kv_heads": case.heads_kv, "qk_norm": case.qk_norm, "causal": case.causal}
        options["rotary"] = Rotary(case.head_dim) if case.rotary else None
    return FlashMultiHeadAttention(case.embed_dim, case.heads, bias=case.bias, batch_first=case.batch_first, **options)

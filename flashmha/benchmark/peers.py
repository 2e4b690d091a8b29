"""The contestants: ways to compute a case, ours and the others', each from one stock layer's parameters."""

from __future__ import annotations

import abc
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..functional import attention
from ..masks import KeyPadding, Mask, causal
from ..module import FlashMultiHeadAttention
from .cases import Case
from .inputs import Inputs

Answer = tuple[Tensor, Tensor | None]
"""The output, and the attention weights where the case reads them."""

HEADLINE = {"layer": "flashmha_best", "core": "attention"}
"""Whom a verdict is about."""

CONTROL = "control"
"""The headline contestant a second time: what the two differ by is noise."""


class Contestant(abc.ABC):
    """One way to compute a case.

    Attributes:
        name: as shown.
        level: the level it computes.
        ours: it is flashmha.
        every_row: the rows of padded queries hold what stock computes there; else the real rows alone do.
        compiled: it goes through ``torch.compile``.
    """

    name: str
    level = "layer"
    ours = False
    every_row = True
    compiled = False

    def refuses(self, case: Case) -> str | None:
        """Why it does not compute a case."""
        return None if case.level == self.level else f"computes level {self.level} only"

    @abc.abstractmethod
    def build(self, case: Case) -> nn.Module:
        """A module with the parameter names of ``nn.MultiheadAttention``, or with none at level core."""

    @abc.abstractmethod
    def call(self, module: nn.Module, inputs: Inputs) -> Answer:
        """One forward."""


class Stock(Contestant):
    """``nn.MultiheadAttention`` as most programs call it: the masks as tensors, the weights computed."""

    name = "stock"

    def build(self, case: Case) -> nn.Module:
        return nn.MultiheadAttention(case.embed_dim, case.heads, batch_first=True)

    def call(self, module: nn.Module, inputs: Inputs) -> Answer:
        masks = {"key_padding_mask": inputs.padding(), "attn_mask": inputs.attn_mask}
        out, weights = module(inputs.query, inputs.key, inputs.value, **masks)
        return out, weights if inputs.case.weights else None


class StockBest(Stock):
    """``nn.MultiheadAttention`` told all it can be told: no weights, and that the mask is causal."""

    name = "stock_best"

    def call(self, module: nn.Module, inputs: Inputs) -> Answer:
        case = inputs.case
        masks = {"key_padding_mask": inputs.padding(), "attn_mask": inputs.attn_mask, "is_causal": case.causal}
        answer: Answer = module(inputs.query, inputs.key, inputs.value, need_weights=case.weights, **masks)
        return answer


class StockSlow(Stock):
    """``nn.MultiheadAttention`` with weights in eval, without its C++ fast path, which differs in memory too."""

    name = "stock_slow"

    def refuses(self, case: Case) -> str | None:
        if case.level == self.level and not (case.weights and case.mode == "eval"):
            return "for weights that are read in eval"
        return super().refuses(case)

    def call(self, module: nn.Module, inputs: Inputs) -> Answer:
        before = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            return super().call(module, inputs)
        finally:
            torch.backends.mha.set_fastpath_enabled(before)


class LinearSdpa(Contestant):
    """The layer a good engineer writes by hand, for one shape of problem, without options."""

    name = "linear_sdpa"

    class Module(nn.Module):
        def __init__(self, embed_dim: int, heads: int) -> None:
            super().__init__()
            self.heads = heads
            self.in_proj_weight = nn.Parameter(torch.empty(3 * embed_dim, embed_dim))
            self.in_proj_bias = nn.Parameter(torch.empty(3 * embed_dim))
            self.out_proj = nn.Linear(embed_dim, embed_dim)

        def forward(self, query: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
            weight, bias, embed_dim = self.in_proj_weight, self.in_proj_bias, query.shape[-1]
            if query is key:
                packed = F.linear(query, weight, bias).unflatten(-1, (3, self.heads, -1))
                q, k, v = packed.permute(2, 0, 3, 1, 4).unbind()
            else:
                q = F.linear(query, weight[:embed_dim], bias[:embed_dim])
                q = q.unflatten(-1, (self.heads, -1)).transpose(1, 2)
                kv = F.linear(key, weight[embed_dim:], bias[embed_dim:]).unflatten(-1, (2, self.heads, -1))
                k, v = kv.permute(2, 0, 3, 1, 4).unbind()
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal)
            projected: Tensor = self.out_proj(out.transpose(1, 2).flatten(2))
            return projected

    def refuses(self, case: Case) -> str | None:
        return super().refuses(case) or ("SDPA returns no weights" if case.weights else None)

    def build(self, case: Case) -> nn.Module:
        return self.Module(case.embed_dim, case.heads)

    def call(self, module: nn.Module, inputs: Inputs) -> Answer:
        return module(inputs.query, inputs.key, *sdpa_mask(inputs)), None


class Sdpa(Contestant):
    """``F.scaled_dot_product_attention`` called by hand."""

    name, level = "sdpa", "core"

    class Module(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
            q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
            grouped = {"enable_gqa": True} if q.shape[1] != k.shape[1] else {}
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, **grouped)
            return out.transpose(1, 2)

    def build(self, case: Case) -> nn.Module:
        return self.Module()

    def call(self, module: nn.Module, inputs: Inputs) -> Answer:
        return module(inputs.query, inputs.key, inputs.value, *sdpa_mask(inputs)), None


def sdpa_mask(inputs: Inputs) -> tuple[Tensor | None, bool]:
    """``attn_mask`` and ``is_causal`` of SDPA, which takes one of them: causality beside padding joins the mask."""
    hidden = inputs.padding()
    if hidden is None:
        return None, inputs.case.causal
    mask = ~hidden[:, None, None, :]
    return (mask if inputs.attn_mask is None else mask & ~inputs.attn_mask), False


class Flashmha(Contestant):
    """``FlashMultiHeadAttention``, called as ``stock`` or as ``stock_best`` is."""

    ours = True

    def __init__(self, name: str, style: Stock, every_row: bool = True, **options: Any) -> None:
        self.name, self.style, self.every_row, self.options = name, style, every_row, options

    def refuses(self, case: Case) -> str | None:
        if case.level == self.level and not self.every_row and case.lengths is None:
            return "for padded cases"
        return super().refuses(case)

    def build(self, case: Case) -> nn.Module:
        return FlashMultiHeadAttention(case.embed_dim, case.heads, batch_first=True, **self.options)

    def call(self, module: nn.Module, inputs: Inputs) -> Answer:
        return self.style.call(module, inputs)


class Attention(Contestant):
    """``flashmha.attention``."""

    level, ours = "core", True

    class Module(nn.Module):
        def __init__(self, backend: str | None) -> None:
            super().__init__()
            self.backend = backend

        def forward(self, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, is_causal: bool) -> Tensor:
            mask: Mask | None = causal() if is_causal else None
            if hidden is not None:
                real = KeyPadding(~hidden)
                mask = real if mask is None else mask & real
            out = attention(q, k, v, mask=mask, backend=self.backend)
            assert isinstance(out, Tensor)
            return out

    def __init__(self, name: str, backend: str | None = None) -> None:
        self.name, self.backend = name, backend

    def build(self, case: Case) -> nn.Module:
        return self.Module(self.backend)

    def call(self, module: nn.Module, inputs: Inputs) -> Answer:
        case = inputs.case
        return module(inputs.query, inputs.key, inputs.value, inputs.padding(), case.causal), None


class Compiled(Contestant):
    """Another contestant, its module through ``torch.compile``."""

    compiled = True

    def __init__(self, name: str, inner: Contestant) -> None:
        self.name, self.inner, self.level, self.ours = name, inner, inner.level, inner.ours

    def refuses(self, case: Case) -> str | None:
        return self.inner.refuses(case)

    def build(self, case: Case) -> nn.Module:
        return self.inner.build(case)

    def call(self, module: nn.Module, inputs: Inputs) -> Answer:
        return self.inner.call(module, inputs)

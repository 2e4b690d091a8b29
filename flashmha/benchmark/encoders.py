"""Whole encoders: stock's, ours, one written by hand on SDPA, and one that packs its tokens once.

Rows of padding are nothing to any of them: stock in eval and those that pack leave zeros there.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..swap.convert import replace_mha
from .cases import Case
from .inputs import Inputs, stock_module
from .kernels import KernelFunction, Linear, mask_of, sdpa
from .peers import Contestant, OutAndWeights


class StockEncoder(Contestant):
    """``nn.TransformerEncoder``, told all it can be told; in eval it packs padded batches as nested tensors."""

    name, level, every_row = "stock_encoder", "encoder", False

    def build(self, case: Case) -> nn.Module:
        return stock_module(case)

    def call(self, module: nn.Module, inputs: Inputs) -> OutAndWeights:
        masks = {"mask": inputs.attn_mask, "src_key_padding_mask": inputs.padding()}
        return module(inputs.query, **masks, is_causal=inputs.case.causal), None


class FlashmhaEncoder(StockEncoder):
    """The same, swapped by ``replace_mha``."""

    ours = True

    def __init__(self, name: str = "flashmha_encoder", **options: Any) -> None:
        self.name, self.options = name, options

    def refuses(self, case: Case) -> str | None:
        if case.level == self.level and case.lengths is None and self.options.get("skip_padding"):
            return "for padded cases"
        return super().refuses(case)

    def build(self, case: Case) -> nn.Module:
        return replace_mha(super().build(case), **self.options)


class HandEncoder(Contestant):
    """An encoder around ``linear_sdpa``, whose parameters bear stock's names."""

    name, level, every_row = "hand_encoder", "encoder", False

    class Layer(nn.Module):
        def __init__(self, case: Case, kernel: KernelFunction) -> None:
            super().__init__()
            embed_dim = case.embed_dim
            self.self_attn = Linear.Module(embed_dim, case.heads, kernel, case.batch_first)
            self.linear1, self.linear2 = nn.Linear(embed_dim, 4 * embed_dim), nn.Linear(4 * embed_dim, embed_dim)
            self.norm1, self.norm2 = nn.LayerNorm(embed_dim), nn.LayerNorm(embed_dim)

        def forward(self, x: Tensor, mask: Any, is_causal: bool) -> Tensor:
            x = self.norm1(x + self.self_attn(x, x, mask, is_causal))
            out: Tensor = self.norm2(x + self.linear2(F.relu(self.linear1(x))))
            return out

    class Module(nn.Module):
        def __init__(self, case: Case, kernel: KernelFunction) -> None:
            super().__init__()
            self.layers = nn.ModuleList(HandEncoder.Layer(case, kernel) for _ in range(case.layers))

        def forward(self, x: Tensor, mask: Any, is_causal: bool) -> Tensor:
            for layer in self.layers:
                x = layer(x, mask, is_causal)
            return x

    def build(self, case: Case) -> nn.Module:
        return self.Module(case, sdpa)

    def call(self, module: nn.Module, inputs: Inputs) -> OutAndWeights:
        return module(inputs.query, *mask_of(inputs)), None


class Packing(NamedTuple):
    """Sequences end to end: where each starts (and the last ends), and the longest."""

    offsets: Tensor
    longest: int


def attend_packed_tokens(q: Tensor, k: Tensor, v: Tensor, packing: Packing, is_causal: bool) -> Tensor:
    """Attention within each sequence, on (1, total, heads, head_dim): torch's flash-attn 2, on a CPU one by one."""
    offsets, longest = packing
    if q.is_cuda:
        heads = (x.squeeze(0) for x in (q, k, v))
        out: Tensor = torch.ops.aten._flash_attention_forward(
            *heads, offsets, offsets, longest, longest, 0.0, is_causal, False
        )[0]
        return out.unsqueeze(0)
    lengths = offsets.diff().tolist()
    sequences = zip(*(x.split(lengths, dim=1) for x in (q, k, v)))
    return torch.cat([sdpa(q, k, v, None, is_causal) for q, k, v in sequences], dim=1)


class PackedEncoder(HandEncoder):
    """The encoder by hand on real tokens alone: packed before its first layer, unpacked after its last."""

    name = "packed_encoder"

    class Module(HandEncoder.Module):
        def forward(self, x: Tensor, hidden: Tensor, is_causal: bool) -> Tensor:
            lengths = (~hidden).sum(dim=1)
            places = (~hidden).flatten().nonzero().squeeze(1)
            packing = Packing(F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32), int(lengths.max()))
            tokens = super().forward(x.flatten(0, 1).index_select(0, places)[None], packing, is_causal)[0]
            blank = tokens.new_zeros(hidden.numel(), tokens.shape[1])
            out: Tensor = blank.index_copy(0, places, tokens).unflatten(0, hidden.shape)
            return out

    def refuses(self, case: Case) -> str | None:
        return "for padded cases" if case.level == self.level and case.lengths is None else super().refuses(case)

    def build(self, case: Case) -> nn.Module:
        return self.Module(dataclasses.replace(case, batch_first=True), attend_packed_tokens)

    def call(self, module: nn.Module, inputs: Inputs) -> OutAndWeights:
        out = module(inputs.turned(inputs.query), inputs.padding(), inputs.case.causal)
        return inputs.turned(out), None

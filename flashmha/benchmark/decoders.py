"""Decoders that write token by token: stock's, ours over a cache, and one by hand over a static cache of its own."""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..swap.caches import KVCache
from ..swap.convert import replace_mha
from .capture import capture
from .cases import Case
from .inputs import Inputs, stock_module
from .peers import Contestant


class Writer(abc.ABC):
    """A decoder that writes one text after another, the tokens of which are given."""

    nbytes = 0
    """What its cache holds."""
    every = 1
    """It writes every so many parts, since each takes long; what the parts between would take lies between."""

    @abc.abstractmethod
    def begin(self) -> None:
        """Forget the text."""

    @abc.abstractmethod
    def write(self, places: range) -> tuple[range, list[Tensor]]:
        """Go on to the end of ``places``: which of them were computed, and their outputs (batch, 1, embed_dim)."""


class StepByStep(Writer):
    """A writer that computes each token once, by ``step`` of its input (batch, 1, embed_dim)."""

    def __init__(self, inputs: Inputs) -> None:
        self.tokens = inputs.query
        self.step: Callable[[Tensor], Tensor] = self.run

    @abc.abstractmethod
    def run(self, x: Tensor) -> Tensor:
        """One token."""

    def write(self, places: range) -> tuple[range, list[Tensor]]:
        tokens = self.tokens
        return places, [self.step(tokens[:, place : place + 1]) for place in places]

    def capture(self) -> None:
        """Put a step into a CUDA graph, which from the second token on is replayed."""
        self.begin()
        held = self.tokens[:, :1].clone()
        graph, out = capture(lambda: self.run(held))

        def replay(x: Tensor) -> Tensor:
            held.copy_(x)
            graph.replay()
            return out.clone()

        self.begin()
        self.after_first(replay)

    def after_first(self, then: Callable[[Tensor], Tensor]) -> None:
        """Take a text's first token, which projects the memory, as ever, and the others by another step."""
        begin = self.begin

        def first(x: Tensor) -> Tensor:
            self.step = then
            return self.run(x)

        def begin_again() -> None:
            begin()
            self.step = first

        self.begin = begin_again  # type: ignore[method-assign]
        self.begin()


class StockWriter(Writer):
    """Stock's decoder over all of the text.

    It computes the middle one of several tokens, which takes as long as they do on average, in every fifth part.
    """

    every = 5

    def __init__(self, module: nn.Module, inputs: Inputs) -> None:
        self.module, self.inputs = module, inputs
        self.mask = inputs.attn_mask

    def begin(self) -> None:
        pass

    def write(self, places: range) -> tuple[range, list[Tensor]]:
        middle, inputs = places[len(places) // 2], self.inputs
        assert self.mask is not None
        mask = self.mask[: middle + 1, : middle + 1]
        out = self.module(inputs.query[:, : middle + 1], inputs.key, tgt_mask=mask, tgt_is_causal=True)
        return range(middle, middle + 1), [out[:, -1:]]


class CacheWriter(StepByStep):
    """A swapped decoder over a ``KVCache``."""

    def __init__(self, module: nn.Module, inputs: Inputs) -> None:
        super().__init__(inputs)
        case, self.module, self.memory = inputs.case, module, inputs.key
        self.cache = KVCache.of(module, case.batch, case.seqlen_q, memory_seqlen=case.seqlen_k)
        self.nbytes = self.cache.nbytes

    def begin(self) -> None:
        self.cache.reset()

    def run(self, x: Tensor) -> Tensor:
        out: Tensor = self.module(x, self.memory, cache=self.cache)
        return out


class HandWriter(StepByStep):
    """A static cache of a good engineer: keys (batch, heads, tokens, head_dim), written in place, the memory's too.

    Eagerly it knows its place as a number and looks at what is filled. In a CUDA graph the place is on the device, and
    a mask says what is filled.
    """

    def __init__(self, module: nn.Module, inputs: Inputs, counts_on_device: bool) -> None:
        super().__init__(inputs)
        case, self.memory = inputs.case, inputs.key
        self.heads, self.counts_on_device = case.heads, counts_on_device
        shape, like = (case.batch, case.heads, case.seqlen_q, case.head_dim), inputs.query
        self.place, self.where = 0, torch.zeros(1, dtype=torch.long, device=like.device)
        self.slots = torch.arange(case.seqlen_q, device=like.device)
        self.layers: list[Any] = list(module.layers)  # type: ignore[arg-type]
        self.held = [(like.new_zeros(shape), like.new_zeros(shape)) for _ in self.layers]
        empty = like.new_zeros(case.batch, case.heads, case.seqlen_k, case.head_dim)
        self.memories = [(empty.clone(), empty.clone()) for _ in self.layers]
        self.crossing = [split_crossing(layer.multihead_attn, like.shape[2]) for layer in self.layers]
        self.nbytes = sum(x.nbytes for pairs in (self.held, self.memories) for pair in pairs for x in pair)

    def begin(self) -> None:
        self.place = 0
        self.where.zero_()

    def split(self, packed: Tensor, parts: int) -> tuple[Tensor, ...]:
        """(batch, seqlen, parts * embed_dim) as so many tensors (batch, heads, seqlen, head_dim)."""
        batch, seqlen, _ = packed.shape
        return packed.view(batch, seqlen, parts, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)

    def project_memory(self) -> None:
        for (_, _, weight, bias), (k, v) in zip(self.crossing, self.memories):
            for held, made in zip((k, v), self.split(F.linear(self.memory, weight, bias), 2)):
                held.copy_(made)

    def run(self, x: Tensor) -> Tensor:
        if self.place == 0:
            self.project_memory()
        end = self.place + 1
        mask = (self.slots <= self.where).view(1, 1, 1, -1) if self.counts_on_device else None
        for layer, crossing, (k, v), (k_memory, v_memory) in zip(self.layers, self.crossing, self.held, self.memories):
            own, cross = layer.self_attn, layer.multihead_attn
            q, k_new, v_new = self.split(F.linear(x, own.in_proj_weight, own.in_proj_bias), 3)
            if mask is None:
                k[:, :, self.place : end] = k_new
                v[:, :, self.place : end] = v_new
                out = F.scaled_dot_product_attention(q, k[:, :, :end], v[:, :, :end])
            else:
                k.index_copy_(2, self.where, k_new)
                v.index_copy_(2, self.where, v_new)
                out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            x = layer.norm1(x + own.out_proj(out.transpose(1, 2).reshape(x.shape)))
            q = F.linear(x, crossing[0], crossing[1]).view(x.shape[0], 1, self.heads, -1).transpose(1, 2)
            out = F.scaled_dot_product_attention(q, k_memory, v_memory)
            x = layer.norm2(x + cross.out_proj(out.transpose(1, 2).reshape(x.shape)))
            x = layer.norm3(x + layer.linear2(F.relu(layer.linear1(x))))
        self.place = end
        if self.counts_on_device:
            self.where.add_(1)
        return x


class StockDecoder(Contestant):
    """``nn.TransformerDecoder``, which reads the whole text again for each token, told that its mask is causal."""

    name, level = "stock_decoder", "decoder"

    def build(self, case: Case) -> nn.Module:
        return stock_module(case)

    def writer(self, module: nn.Module, inputs: Inputs, how: str) -> Writer:
        """The module as a writer."""
        return StockWriter(module, inputs)


class FlashmhaDecoder(StockDecoder):
    """The same, swapped by ``replace_mha``, over a ``KVCache``."""

    ours = True

    def __init__(self, name: str = "flashmha_decoder") -> None:
        self.name = name

    def build(self, case: Case) -> nn.Module:
        return replace_mha(super().build(case))

    def writer(self, module: nn.Module, inputs: Inputs, how: str) -> Writer:
        writer = CacheWriter(module, inputs)
        if how == "graph":
            writer.capture()
        elif how == "reduced":
            compiled: Any = torch.compile(module, dynamic=False, mode="reduce-overhead")

            def step(x: Tensor) -> Tensor:
                torch.compiler.cudagraph_mark_step_begin()
                out: Tensor = compiled(x, writer.memory, cache=writer.cache)
                return out.clone()

            writer.after_first(step)
        return writer


class HandDecoder(StockDecoder):
    """The layers of stock around a static cache by hand."""

    name = "hand_decoder"

    def writer(self, module: nn.Module, inputs: Inputs, how: str) -> Writer:
        writer = HandWriter(module, inputs, how == "graph")
        if how == "graph":
            writer.capture()
        return writer


def split_crossing(layer: Any, rows: int) -> tuple[Tensor, ...]:
    """Weight and bias of a cross-attention's queries, and of its keys and values."""
    weight, bias = layer.in_proj_weight, layer.in_proj_bias
    return weight[:rows], bias[:rows], weight[rows:], bias[rows:]

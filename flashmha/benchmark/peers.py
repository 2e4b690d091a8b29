"""The contestants: ways to compute a case, ours and stock's, each from one stock layer's parameters."""

from __future__ import annotations

import abc
import contextlib
import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..functional import attention
from ..host.torch_state import without_fast_path
from ..problem.masks import Mask
from ..problem.ragged import KeyPadding
from ..problem.windows import Window, causal
from .cases import HOW, Case
from .inputs import Inputs, layer_module, stock_module

OutAndWeights = tuple[Tensor, Tensor | None]
"""The output, and the attention weights where the case reads them."""

HEADLINES = {
    "flashmha_best": ("layer", "eager"),
    "flashmha_compiled": ("layer", "compiled"),
    "flashmha_graph": ("layer", "graph"),
    "attention": ("core", "eager"),
    "attention_compiled": ("core", "compiled"),
    "flashmha_encoder": ("encoder", "eager"),
    "flashmha_encoder_skip": ("encoder", "eager"),
    "flashmha_encoder_compiled": ("encoder", "compiled"),
    "flashmha_encoder_skip_compiled": ("encoder", "compiled"),
    "flashmha_encoder_reduced": ("encoder", "reduced"),
    "flashmha_decoder": ("decoder", "eager"),
    "flashmha_decoder_graph": ("decoder", "graph"),
    "flashmha_decoder_reduced": ("decoder", "reduced"),
}
"""The contestants that verdicts are about: level, and how it runs."""

CONTROL = "control"
"""The first of them that runs as its case does a second time: what the two differ by is noise."""


def how(name: str) -> str:
    """The way a contestant runs, which its name ends with unless it is eager."""
    last = name.rpartition("_")[2]
    return last if last in HOW else "eager"


class Contestant(abc.ABC):
    """One way to compute a case.

    Attributes:
        name: as shown.
        level: the level it computes.
        ours: it is flashmha.
        every_row: the rows of padded queries hold what stock computes there; else the real rows alone do.
        how: out of ``HOW``.
        yardstick: it is ours, but not in the race: what it computes is less, see ``problem``.
    """

    name: str
    level = "layer"
    ours = False
    every_row = True
    how = "eager"
    yardstick = False

    def problem(self, case: Case) -> Case:
        """What it computes where a case is timed."""
        return case

    def refuses(self, case: Case) -> str | None:
        """The reason why it does not compute a case."""
        return None if case.level == self.level else f"computes level {self.level} only"

    @abc.abstractmethod
    def build(self, case: Case) -> nn.Module:
        """A module of its own kind, without parameters at level core."""

    def translate(self, state: dict[str, Tensor], case: Case) -> dict[str, Tensor]:
        """The module's state_dict out of the parameters of a case.

        PyTorch differentiates it: gradients of the module's own parameters go back the same way.
        """
        return state

    def call(self, module: nn.Module, inputs: Inputs) -> OutAndWeights:
        """One forward."""
        raise NotImplementedError

    def bind(self, module: nn.Module, inputs: Inputs) -> Callable[[], OutAndWeights]:
        """``call`` of these two, in as few steps as there are in a program that calls its layer."""
        return functools.partial(self.call, module, inputs)

    def setting(self) -> contextlib.AbstractContextManager[None]:
        """The switches of the process that its calls want, set before the clock starts."""
        return contextlib.nullcontext()


class Stock(Contestant):
    """``nn.MultiheadAttention`` as most programs call it: the masks as tensors, the weights computed."""

    name = "stock"

    def refuses(self, case: Case) -> str | None:
        return "for what stock computes" if case.own_heads else super().refuses(case)

    def build(self, case: Case) -> nn.Module:
        return stock_module(case)

    def told(self, case: Case) -> dict[str, Any]:
        """The arguments of a call beside its tensors."""
        return {}

    def bind(self, module: nn.Module, inputs: Inputs) -> Callable[[], OutAndWeights]:
        query, key, value, read = inputs.query, inputs.key, inputs.value, inputs.case.weights
        given = {"attn_mask": inputs.attn_mask, **self.told(inputs.case)}

        def call() -> OutAndWeights:
            if inputs.hidden is not None:
                given["key_padding_mask"] = inputs.padding()
            out, weights = module(query, key, value, **given)
            return out, weights if read else None

        return call


class StockBest(Stock):
    """``nn.MultiheadAttention`` told all it can be told: no weights, and that the mask is causal."""

    name = "stock_best"

    def told(self, case: Case) -> dict[str, Any]:
        return {"is_causal": case.causal, "need_weights": case.weights}


class StockSlow(Stock):
    """``nn.MultiheadAttention`` with weights in eval, without its C++ fast path, which differs in memory too."""

    name = "stock_slow"

    def refuses(self, case: Case) -> str | None:
        if case.level == self.level and not (case.weights and case.mode == "eval"):
            return "for weights that are read in eval"
        return super().refuses(case)

    def setting(self) -> contextlib.AbstractContextManager[None]:
        return without_fast_path()


class Flashmha(Contestant):
    """``FlashMultiHeadAttention``, called as ``stock`` or as ``stock_best`` is."""

    ours = True

    def __init__(self, name: str, style: Stock, every_row: bool = True, **options: Any) -> None:
        self.name, self.style, self.every_row, self.options = name, style, every_row, options

    def refuses(self, case: Case) -> str | None:
        if case.own_heads and type(self.style) is Stock:
            return "for what stock computes"
        padded = case.lengths is not None and case.seqlen_q == case.seqlen_k
        if case.level == self.level and not self.every_row and not padded:
            return "for padded self-attention"
        return super().refuses(case)

    def build(self, case: Case) -> nn.Module:
        return layer_module(case, **self.options)

    def bind(self, module: nn.Module, inputs: Inputs) -> Callable[[], OutAndWeights]:
        if inputs.case.own_heads:  # which know of causality themselves
            return functools.partial(module, inputs.query, inputs.key, inputs.value, need_weights=False)
        return self.style.bind(module, inputs)


class AttentionFunction(Contestant):
    """``flashmha.attention``."""

    level, ours = "core", True

    class Module(nn.Module):
        def __init__(self, backend: str | None, window: int | None) -> None:
            super().__init__()
            self.backend = backend
            self.seen = causal() if window is None else Window(window - 1, 0)

        def forward(self, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, is_causal: bool) -> Tensor:
            mask: Mask | None = self.seen if is_causal else None
            if hidden is not None:
                real = KeyPadding(~hidden)
                mask = real if mask is None else mask & real
            out = attention(q, k, v, mask=mask, backend=self.backend)
            assert isinstance(out, Tensor)
            return out

    def __init__(self, name: str, backend: str | None = None) -> None:
        self.name, self.backend = name, backend

    def build(self, case: Case) -> nn.Module:
        return self.Module(self.backend, case.window)

    def call(self, module: nn.Module, inputs: Inputs) -> OutAndWeights:
        case = inputs.case
        return module(inputs.query, inputs.key, inputs.value, inputs.padding(), case.causal), None


class Around(Contestant):
    """Another contestant, run otherwise."""

    def __init__(self, name: str, inner: Contestant) -> None:
        self.name, self.inner = name, inner
        self.level, self.ours, self.every_row = inner.level, inner.ours, inner.every_row

    def refuses(self, case: Case) -> str | None:
        return self.inner.refuses(case)

    def build(self, case: Case) -> nn.Module:
        return self.inner.build(case)

    def translate(self, state: dict[str, Tensor], case: Case) -> dict[str, Tensor]:
        return self.inner.translate(state, case)

    def bind(self, module: nn.Module, inputs: Inputs) -> Callable[[], OutAndWeights]:
        return self.inner.bind(module, inputs)

    def setting(self) -> contextlib.AbstractContextManager[None]:
        return self.inner.setting()


class Through(Around):
    """Its module through ``torch.compile``, or its call through a CUDA graph."""

    def __init__(self, name: str, inner: Contestant, how: str) -> None:
        super().__init__(f"{name}_{how}", inner)
        self.how = how


class Without(Around):
    """On the case without rotary, norms and window: what these cost is measured by it."""

    yardstick = True

    def __init__(self, name: str, inner: Contestant) -> None:
        super().__init__(f"{name}_without", inner)
        self.ours = False

    def problem(self, case: Case) -> Case:
        return case.bare

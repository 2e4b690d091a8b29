"""Calls of a layer as Hypothesis strategies, and what a layer replies.

A ``Call`` says how forward is called: sizes and flags are drawn, and every tensor is made from one drawn seed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from .judge import gradients_of
from .layer import EITHER, Blueprint, blueprints
from .record import DRAWN, Record, one, placed
from .values import seeds

SHARINGS = ("abc", "aaa", "abb", "aab", "aba")
"""Which of query, key and value are one object: equal letters."""
INPUT_LAYOUTS = ("contiguous", "transposed", "sliced", "expanded")
PADDINGS = ("none", "bool", "float")
ATTN_MASKS = ("none", "bool 2-D", "float 2-D", "bool 3-D", "float 3-D", "bool causal", "float causal")


@dataclasses.dataclass(frozen=True)
class Tensors:
    """The arguments of one forward, and the leaves that are to receive gradients."""

    query: Tensor
    key: Tensor
    value: Tensor
    key_padding_mask: Tensor | None
    attn_mask: Tensor | None
    leaves: dict[str, Tensor]

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.query, self.key, self.value

    @property
    def masks(self) -> dict[str, Tensor | None]:
        return {"key_padding_mask": self.key_padding_mask, "attn_mask": self.attn_mask}

    def snapshot(self) -> dict[str, Tensor]:
        """Copies of every tensor by name."""
        named = dict(zip(("query", "key", "value"), self.inputs), **self.masks)
        return {name: tensor.detach().clone() for name, tensor in named.items() if tensor is not None}


@dataclasses.dataclass(frozen=True, repr=False)
class Call(Record):
    """One forward: sizes, which inputs are one object, strides, kinds of masks, flags, and the seed of the values.

    ``batch=None`` is unbatched. With ``blind`` some rows may look at nothing; without, every row sees a key.
    """

    batch: int | None = 2
    seqlen_q: int = 3
    seqlen_k: int = 3
    sharing: str = "abc"
    layout: str = "contiguous"
    padding: str = "none"
    attn_mask: str = "none"
    need_weights: bool = True
    average_attn_weights: bool = True
    is_causal: bool = False
    training: bool = True
    grad: bool = True
    blind: bool = False
    seed: int = 0

    @property
    def hint_alone(self) -> bool:
        """The causal hint is all that stock looks at: its mask stays unread."""
        return self.is_causal and not self.need_weights and self.padding == "none"

    @property
    def mixed(self) -> bool:
        """Masks of both types, which the contract warns of."""
        return "none" not in (self.padding, self.attn_mask) and self.padding != self.attn_mask.split()[0]

    @property
    def stock_fails(self) -> bool:
        """``nn.MultiheadAttention`` cannot reshape some empty masks, and its fast path loses weights of empty calls.

        Accidents, both: empty calls must work.
        """
        masked = self.padding != "none" or (self.attn_mask != "none" and not self.hint_alone)
        fast_path = not self.training and ("3-D" in self.attn_mask or (self.sharing == "aaa" and not self.grad))
        return 0 in (self.batch, self.seqlen_q, self.seqlen_k) and (fast_path or (masked and not self.need_weights))

    def flags(self) -> dict[str, bool]:
        """The arguments that are no tensors."""
        return {name: getattr(self, name) for name in ("need_weights", "average_attn_weights", "is_causal")}

    def arguments(self, blueprint: Blueprint) -> dict[str, Any]:
        """Every argument of forward by name."""
        tensors = self.tensors(blueprint)
        return {**dict(zip(("query", "key", "value"), tensors.inputs)), **tensors.masks, **self.flags()}

    @contextlib.contextmanager
    def mode(self, *layers: nn.Module) -> Iterator[None]:
        """Layers put into train or eval, gradients on or off, and no word about masks of two types."""
        for layer in layers:
            layer.train(self.training)
        with torch.set_grad_enabled(self.grad), warnings.catch_warnings():
            if self.mixed:
                warnings.filterwarnings("ignore", "Support for mismatched")
            yield

    def tensors(self, blueprint: Blueprint, dtype: torch.dtype | None = None) -> Tensors:
        """Fresh tensors; another dtype holds the same values, rounded to the blueprint's first."""
        generator = torch.Generator("cpu").manual_seed(self.seed)
        dtype = dtype or blueprint.dtype
        leaves: dict[str, Tensor] = {}

        def made(name: str, values: Tensor, layout: str) -> Tensor:
            if values.is_floating_point():
                values = values.to(blueprint.dtype).to(dtype)
            leaf, view = strided(
                values.to(device=placed(blueprint.device)), layout, self.grad and values.is_floating_point()
            )
            if leaf.requires_grad:
                leaves[name] = leaf
            return view

        inputs: dict[str, Tensor] = {}
        for letter, width, seqlen in zip(self.sharing, blueprint.widths, (self.seqlen_q, self.seqlen_k, self.seqlen_k)):
            if letter not in inputs:
                shape = [seqlen, width]
                if self.batch is not None:
                    shape.insert(0 if blueprint.batch_first else 1, self.batch)
                values = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
                inputs[letter] = made(f"input {letter}", values, self.layout)
        query, key, value = (inputs[letter] for letter in self.sharing)
        masks = self.hidden(blueprint, generator)
        for name, hidden in masks.items():
            if hidden is None:
                continue
            kind = self.padding if name == "key_padding_mask" else self.attn_mask
            values = as_float_mask(hidden, generator, plain="causal" in kind) if "float" in kind else hidden
            # to repeat one row would make another mask of a causal one, and might blind an unbatched call
            alone = self.layout == "expanded" and (hidden.dim() == 1 or "causal" in kind)
            masks[name] = made(name, values, "contiguous" if alone else self.layout)
        return Tensors(query, key, value, **masks, leaves=leaves)

    def hidden(self, blueprint: Blueprint, generator: torch.Generator) -> dict[str, Tensor | None]:
        """The masks as bool tensors, ``True`` = hidden."""
        batch, heads = 1 if self.batch is None else self.batch, blueprint.num_heads
        seqlen_q, seqlen_k = self.seqlen_q, self.seqlen_k
        anchor = 0 if "causal" in self.attn_mask else self.seed % max(seqlen_k, 1)

        def drawn(*shape: int) -> Tensor:
            hidden = torch.rand(shape, generator=generator, **DRAWN) < 0.4
            if self.blind:
                return hidden | (torch.rand((*shape[:-1], 1), generator=generator, **DRAWN) < 0.4)
            hidden[..., anchor : anchor + 1] = False
            return hidden

        padding = None if self.padding == "none" else drawn(batch, seqlen_k)
        if padding is not None and self.batch is None:
            padding = padding[0]
        attn_mask: Tensor | None = None
        if "causal" in self.attn_mask:
            attn_mask = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool, device="cpu").triu(1)
        elif "2-D" in self.attn_mask:
            attn_mask = drawn(seqlen_q, seqlen_k)
        elif "3-D" in self.attn_mask:
            attn_mask = drawn(batch * heads, seqlen_q, seqlen_k)
        return {"key_padding_mask": padding, "attn_mask": attn_mask}


def strided(values: Tensor, layout: str, requires_grad: bool) -> tuple[Tensor, Tensor]:
    """A leaf, and a view of it with the strides of a layout (``expanded`` repeats the first of the first axis)."""
    leaf = {
        "contiguous": lambda: values.clone(),
        "transposed": lambda: values.transpose(0, -1).contiguous(),
        "sliced": lambda: values.repeat_interleave(2, dim=-1),
        "expanded": lambda: values[:1].clone(),
    }[layout]()
    leaf.requires_grad_(requires_grad)
    if layout == "contiguous":
        return leaf, leaf
    if layout == "transposed":
        return leaf, leaf.transpose(0, -1)
    return leaf, leaf[..., ::2] if layout == "sliced" else leaf.expand(values.shape)


def as_float_mask(hidden: Tensor, generator: torch.Generator, plain: bool) -> Tensor:
    """A float mask that hides the same, and beside that adds something unless ``plain``."""
    values = torch.randn(hidden.shape, generator=generator, dtype=torch.float64, device="cpu")
    values = values.masked_fill(torch.rand(hidden.shape, generator=generator, **DRAWN) < 0.1, -1e4)
    return (torch.zeros_like(values) if plain else values).masked_fill(hidden, -math.inf)


@st.composite
def calls(
    draw: st.DrawFn,
    *,
    blueprint: Blueprint,
    batches: Iterable[int | None] = (2, None, 1, 3, 0),
    seqlens: Iterable[int] = (3, 1, 2, 5, 0),
    sharings: Iterable[str] = SHARINGS,
    layouts: Iterable[str] = INPUT_LAYOUTS,
    paddings: Iterable[str] = PADDINGS,
    attn_masks: Iterable[str] = (*ATTN_MASKS, *ATTN_MASKS[-2:]),
    need_weights: Iterable[bool] = EITHER,
    training: Iterable[bool] = EITHER,
    grad: Iterable[bool] = EITHER,
    blind: bool = False,
) -> Call:
    """Calls that a layer of this blueprint accepts. Every option is the values to draw from."""
    widths = blueprint.widths
    possible = [
        sharing
        for sharing in sharings
        if all(widths[i] == widths[j] for i in range(3) for j in range(i) if sharing[i] == sharing[j])
    ]
    sharing = draw(one(possible))
    seqlen_q = draw(one(seqlens))
    one_length = sharing[0] in sharing[1:]
    attn_mask = draw(one(attn_masks))
    return Call(
        batch=draw(one(batches)),
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_q if one_length else draw(one(seqlens)),
        sharing=sharing,
        layout=draw(one(layouts)),
        padding=draw(one(paddings)),
        attn_mask=attn_mask,
        need_weights=draw(one(need_weights)),
        average_attn_weights=draw(one(EITHER)),
        is_causal="causal" in attn_mask and draw(one((False, True, True, True))),
        training=draw(one(training)),
        grad=draw(one(grad)),
        blind=blind,
        seed=draw(seeds()),
    )


@st.composite
def problems(
    draw: st.DrawFn, /, *, layers: st.SearchStrategy[Blueprint] | None = None, **options: Any
) -> tuple[Blueprint, Call]:
    """A layer and a call that both classes answer; ``options`` are those of ``calls``."""
    blueprint = draw(blueprints() if layers is None else layers)
    call = draw(calls(blueprint=blueprint, **options))
    return blueprint, dataclasses.replace(call, batch=2, seqlen_q=3, seqlen_k=3) if call.stock_fails else call


@dataclasses.dataclass(frozen=True)
class Reply:
    """A layer's answer to a call: output, weights and gradients by name, and the warnings it gave."""

    tensors: dict[str, Tensor | None]
    warnings: list[str]

    def __getitem__(self, name: str) -> Tensor | None:
        return self.tensors[name]


def ask(layer: nn.Module, call: Call, tensors: Tensors, **changes: Any) -> Reply:
    """Call a layer, and with ``call.grad`` differentiate it, for one random cotangent an output."""
    layer.train(call.training)
    with warnings.catch_warnings(record=True) as caught, contextlib.nullcontext() if call.grad else torch.no_grad():
        warnings.simplefilter("always")
        output, weights = layer(*tensors.inputs, **tensors.masks, **{**call.flags(), **changes})
    found: dict[str, Tensor | None] = {"output": output, "weights": weights}
    if call.grad:
        outputs = {name: tensor for name, tensor in found.items() if tensor is not None}
        leaves = {name: parameter for name, parameter in layer.named_parameters() if parameter.requires_grad}
        grads = gradients_of(outputs, {**leaves, **tensors.leaves}, call.seed + 1)
        found |= {f"gradient of {name}": grads.get(name) for name, _ in layer.named_parameters()}
        found |= {f"gradient of {name}": grads[name] for name in tensors.leaves}
    detached = {name: None if tensor is None else tensor.detach() for name, tensor in found.items()}
    return Reply(detached, [str(warning.message) for warning in caught])

"""Layers and calls of layers as Hypothesis strategies, and what a layer answers to a call.

Sizes and flags are drawn; every tensor is made from one drawn seed. A drawn problem is two small records whose repr
says everything: a ``Blueprint`` (the constructor's arguments) and a ``Call`` (how forward is called).
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import warnings
from collections.abc import Iterable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

T = TypeVar("T")

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
SHARINGS = ("aaa", "abb", "aab", "aba", "abc")
"""Which of query, key and value are one object: equal letters."""
LAYOUTS = ("contiguous", "transposed", "sliced", "expanded")
PADDINGS = ("none", "bool", "float")
ATTN_MASKS = ("none", "bool 2-D", "float 2-D", "bool 3-D", "float 3-D", "bool causal", "float causal")
BOTH = (True, False)
INF = float("inf")


@dataclasses.dataclass(frozen=True)
class Blueprint:
    """A layer to be built: the constructor's arguments, and the seed of its parameters."""

    embed_dim: int = 8
    num_heads: int = 2
    dropout: float = 0.0
    bias: bool = True
    add_bias_kv: bool = False
    add_zero_attn: bool = False
    kdim: int | None = None
    vdim: int | None = None
    batch_first: bool = True
    dtype: torch.dtype = torch.float32
    seed: int = 0

    @property
    def arguments(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "seed"}

    @property
    def widths(self) -> tuple[int, int, int]:
        """Features of query, key and value."""
        e = self.embed_dim
        return e, e if self.kdim is None else self.kdim, e if self.vdim is None else self.vdim

    @property
    def extra_columns(self) -> int:
        return int(self.add_bias_kv) + int(self.add_zero_attn)

    def build(self, kind: type[Any] = nn.MultiheadAttention, **more: Any) -> Any:
        """A layer of a class. No parameter is left at zero, where a bug could hide."""
        torch.manual_seed(self.seed)
        layer = kind(**{**self.arguments, **more})
        generator = torch.Generator().manual_seed(self.seed)
        with torch.no_grad():
            for parameter in layer.parameters():
                values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(values if parameter.dim() != 2 else values / math.sqrt(max(parameter.shape[1], 1)))
        return layer

    def twin(self, layer: nn.Module, kind: type[Any], dtype: torch.dtype | None = None) -> Any:
        """A layer of another class, or dtype, with the same parameters and flags."""
        other = kind(**{**self.arguments, "dtype": dtype or self.dtype})
        other.load_state_dict(layer.state_dict(), strict=True)
        return other.train(layer.training)


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
        named = dict(zip(("query", "key", "value"), self.inputs), **self.masks)
        return {name: tensor.detach().clone() for name, tensor in named.items() if tensor is not None}


@dataclasses.dataclass(frozen=True)
class Call:
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
        return self.is_causal and not self.need_weights and self.padding == "none"

    @property
    def mixed(self) -> bool:
        """Masks of both types, which the contract warns of."""
        return "none" not in (self.padding, self.attn_mask) and self.padding != self.attn_mask.split()[0]

    @property
    def stock_fails(self) -> bool:
        """``nn.MultiheadAttention`` cannot reshape some empty masks (an accident: empty calls must work)."""
        masked = self.padding != "none" or (self.attn_mask != "none" and not self.hint_alone)
        fast_path = "3-D" in self.attn_mask and not self.training
        return 0 in (self.batch, self.seqlen_q, self.seqlen_k) and (fast_path or (masked and not self.need_weights))

    def flags(self) -> dict[str, bool]:
        return {name: getattr(self, name) for name in ("need_weights", "average_attn_weights", "is_causal")}

    def tensors(self, blueprint: Blueprint, dtype: torch.dtype | None = None) -> Tensors:
        """Fresh tensors; another dtype holds the same values, rounded to the blueprint's first."""
        generator = torch.Generator().manual_seed(self.seed)
        dtype = dtype or blueprint.dtype
        leaves: dict[str, Tensor] = {}

        def made(name: str, values: Tensor, layout: str) -> Tensor:
            if values.is_floating_point():
                values = values.to(blueprint.dtype).to(dtype)
            leaf, view = strided(values, layout, self.grad and values.is_floating_point())
            if leaf.requires_grad:
                leaves[name] = leaf
            return view

        inputs: dict[str, Tensor] = {}
        for letter, width, seqlen in zip(self.sharing, blueprint.widths, (self.seqlen_q, self.seqlen_k, self.seqlen_k)):
            if letter not in inputs:
                shape = [seqlen, width]
                if self.batch is not None:
                    shape.insert(0 if blueprint.batch_first else 1, self.batch)
                values = torch.randn(shape, generator=generator, dtype=torch.float64)
                inputs[letter] = made(f"input {letter}", values, self.layout)
        query, key, value = (inputs[letter] for letter in self.sharing)
        masks = self.hidden(blueprint, generator)
        for name, hidden in masks.items():
            if hidden is None:
                continue
            kind = self.padding if name == "key_padding_mask" else self.attn_mask
            values = added(hidden, generator, plain="causal" in kind) if "float" in kind else hidden
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
            hidden = torch.rand(shape, generator=generator) < 0.4
            if self.blind:
                return hidden | (torch.rand((*shape[:-1], 1), generator=generator) < 0.4)
            hidden[..., anchor : anchor + 1] = False
            return hidden

        padding = None if self.padding == "none" else drawn(batch, seqlen_k)
        if padding is not None and self.batch is None:
            padding = padding[0]
        attn_mask: Tensor | None = None
        if "causal" in self.attn_mask:
            attn_mask = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool).triu(1)
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


def added(hidden: Tensor, generator: torch.Generator, plain: bool) -> Tensor:
    """A float mask that hides the same, and beside that adds something unless ``plain``."""
    values = torch.randn(hidden.shape, generator=generator, dtype=torch.float64)
    values = values.masked_fill(torch.rand(hidden.shape, generator=generator) < 0.1, -1e4)
    return (torch.zeros_like(values) if plain else values).masked_fill(hidden, -INF)


def one(values: Iterable[T]) -> st.SearchStrategy[T]:
    """One of some values; the first is what Hypothesis shrinks to."""
    return st.sampled_from(tuple(values))


@st.composite
def blueprints(
    draw: st.DrawFn,
    *,
    dtypes: Iterable[torch.dtype] = DTYPES,
    heads: Iterable[int] = (1, 2, 3, 4),
    head_dims: Iterable[int] = (1, 2, 3, 4, 8),
    bias: Iterable[bool] = BOTH,
    packed: Iterable[bool] = BOTH,
    extra_columns: Iterable[bool] = BOTH,
    batch_first: Iterable[bool] = BOTH,
) -> Blueprint:
    """Layers: any mix of the constructor's arguments, dropout 0. Every option is the values to draw from."""
    num_heads = draw(one(heads))
    embed_dim = num_heads * draw(one(head_dims))
    separate = not draw(one(packed))
    widths = one((None, embed_dim, 1, 5))
    return Blueprint(
        embed_dim=embed_dim,
        num_heads=num_heads,
        bias=draw(one(bias)),
        add_bias_kv=draw(one(extra_columns)),
        add_zero_attn=draw(one(extra_columns)),
        kdim=draw(widths) if separate else None,
        vdim=draw(widths) if separate else None,
        batch_first=draw(one(batch_first)),
        dtype=draw(one(dtypes)),
        seed=draw(st.integers(0, 2**16)),
    )


@st.composite
def calls(
    draw: st.DrawFn,
    *,
    blueprint: Blueprint,
    batches: Iterable[int | None] = (2, None, 1, 3, 0),
    seqlens: Iterable[int] = (3, 1, 2, 5, 0),
    sharings: Iterable[str] = SHARINGS,
    layouts: Iterable[str] = LAYOUTS,
    paddings: Iterable[str] = PADDINGS,
    attn_masks: Iterable[str] = ATTN_MASKS,
    need_weights: Iterable[bool] = BOTH,
    training: Iterable[bool] = BOTH,
    grad: Iterable[bool] = BOTH,
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
        average_attn_weights=draw(st.booleans()),
        is_causal="causal" in attn_mask and draw(st.booleans()),
        training=draw(one(training)),
        grad=draw(one(grad)),
        blind=blind,
        seed=draw(st.integers(0, 2**16)),
    )


@st.composite
def problems(
    draw: st.DrawFn, *, layers: st.SearchStrategy[Blueprint] | None = None, **options: Any
) -> tuple[Blueprint, Call]:
    """A layer and a call that both classes answer; ``options`` are those of ``calls``."""
    blueprint = draw(blueprints() if layers is None else layers)
    call = draw(calls(blueprint=blueprint, **options))
    return blueprint, dataclasses.replace(call, batch=2, seqlen_q=3, seqlen_k=3) if call.stock_fails else call


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a layer made of a call: output, weights and gradients by name, and the warnings it gave."""

    tensors: dict[str, Tensor | None]
    warnings: list[str]

    def __getitem__(self, name: str) -> Tensor | None:
        return self.tensors[name]


def ask(layer: nn.Module, call: Call, tensors: Tensors, **changes: Any) -> Answer:
    """Call a layer, and with ``call.grad`` differentiate a random linear function of everything it returned."""
    layer.train(call.training)
    layer.zero_grad()
    for leaf in tensors.leaves.values():
        leaf.grad = None
    with warnings.catch_warnings(record=True) as caught, contextlib.nullcontext() if call.grad else torch.no_grad():
        warnings.simplefilter("always")
        output, weights = layer(*tensors.inputs, **tensors.masks, **{**call.flags(), **changes})
    found: dict[str, Tensor | None] = {"output": output, "weights": weights}
    if call.grad:
        generator = torch.Generator().manual_seed(call.seed + 1)
        total = torch.zeros((), dtype=torch.float64)
        for tensor in (output, weights):
            if tensor is not None:
                total = total + (tensor.double() * torch.randn(tensor.shape, generator=generator).double()).sum()
        if total.requires_grad:
            total.backward()
        found |= {f"gradient of {name}": parameter.grad for name, parameter in layer.named_parameters()}
        found |= {f"gradient of {name}": leaf.grad for name, leaf in tensors.leaves.items()}
    detached = {name: None if tensor is None else tensor.detach() for name, tensor in found.items()}
    return Answer(detached, [str(warning.message) for warning in caught])


def assert_close(ours: Tensor, theirs: Tensor, name: str = "tensor") -> None:
    """Equal to rounding: float64 to 1e-10, float32 to 1e-5, bfloat16 to 2e-2, relative to the largest value."""
    assert ours.shape == theirs.shape, f"{name}: {tuple(ours.shape)} is not {tuple(theirs.shape)}"
    assert ours.dtype == theirs.dtype, f"{name}: {ours.dtype} is not {theirs.dtype}"
    atol = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2}[ours.dtype]
    if theirs.numel():
        torch.testing.assert_close(
            ours, theirs, rtol=0.0, atol=atol * max(1.0, magnitude(theirs)), msg=lambda text: f"{name}: {text}"
        )


def assert_as_good(ours: Tensor, theirs: Tensor, exact: Tensor, name: str) -> None:
    """Our error against float64 is at most twice theirs (three times for gradients), plus a floor of rounding."""
    assert ours.shape == theirs.shape, f"{name}: {tuple(ours.shape)} is not {tuple(theirs.shape)}"
    assert ours.dtype == theirs.dtype, f"{name}: {ours.dtype} is not {theirs.dtype}"
    assert ours.isfinite().all(), f"{name} is not finite: {ours}"
    gradient = name.startswith("gradient")
    floor = {torch.float64: 1e-10, torch.float32: 1e-5}.get(ours.dtype, 8 * torch.finfo(ours.dtype).eps)
    floor *= max(1.0, magnitude(exact))
    error, limit = distance(ours, exact), (3 if gradient else 2) * distance(theirs, exact) + floor
    assert error <= limit, f"{name}: error {error:.3g}, at most {limit:.3g}\n{ours}\n{theirs}"


def assert_answers_agree(ours: Answer, theirs: Answer, exact: Answer) -> None:
    """The same tensors where the other class has them, judged against float64; and the same warnings."""
    for name, tensor in theirs.tensors.items():
        if tensor is None:
            continue
        found, reference = ours[name], exact[name]
        assert found is not None, f"{name} is None"
        assert reference is not None
        assert_as_good(found, tensor, reference, name)
    assert ours.warnings == theirs.warnings


def magnitude(tensor: Tensor) -> float:
    return tensor.abs().max().item() if tensor.numel() else 0.0


def distance(tensor: Tensor, other: Tensor) -> float:
    return magnitude(tensor.double() - other.double())


def definition(
    layer: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Multi-head attention written out, batched and batch first: the output, and the weights of every head.

    A row that may look at nothing gets zeros. Masks as in ``nn.MultiheadAttention``, or 4-D.
    """
    embed_dim, heads = layer.embed_dim, layer.num_heads
    if layer.in_proj_weight is None:
        matrices = (layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight)
    else:
        matrices = layer.in_proj_weight.chunk(3)
    biases = (None,) * 3 if layer.in_proj_bias is None else layer.in_proj_bias.chunk(3)
    q, k, v = (F.linear(x, matrix, bias) for x, matrix, bias in zip((query, key, value), matrices, biases))
    batch, seqlen_q, seqlen_k = len(query), query.shape[1], key.shape[1]
    score = torch.zeros(batch, heads, seqlen_q, seqlen_k, dtype=query.dtype)
    for mask, shape in (
        (key_padding_mask, (batch, 1, 1, seqlen_k)),
        (attn_mask, (1, 1, seqlen_q, seqlen_k) if attn_mask is not None and attn_mask.dim() == 2 else score.shape),
    ):
        if mask is not None:
            mask = mask.reshape(shape) if mask.dim() < 4 else mask
            score = score.masked_fill(mask, -INF) if mask.dtype == torch.bool else score + mask
    if layer.bias_k is not None:
        k, v = (torch.cat((x, one.expand(batch, 1, -1)), dim=1) for x, one in ((k, layer.bias_k), (v, layer.bias_v)))
    if layer.add_zero_attn:
        k, v = (F.pad(x, (0, 0, 0, 1)) for x in (k, v))
    score = F.pad(score, (0, k.shape[1] - seqlen_k))
    q, k, v = (x.reshape(batch, x.shape[1], heads, embed_dim // heads).transpose(1, 2) for x in (q, k, v))
    score = score + q @ k.mT / math.sqrt(embed_dim // heads)
    blind = (score == -INF).all(dim=-1, keepdim=True)
    weights = score.masked_fill(blind, 0.0).softmax(dim=-1).masked_fill(blind, 0.0)
    out = (weights @ v).transpose(1, 2).reshape(batch, seqlen_q, embed_dim)
    return F.linear(out, layer.out_proj.weight, layer.out_proj.bias), weights

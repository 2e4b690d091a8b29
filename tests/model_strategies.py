"""Models as Hypothesis strategies: trees of attention layers, encoders, decoders, and the masks they are called with.

Sizes and flags are drawn; every tensor is made from one drawn seed. What is drawn is a small record whose repr says
everything, and whose ``build()`` makes the same model each time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor, nn

from flashmha.testing import seeds

WIDTH = 8
"""embed_dim of every model: 1, 2, 4 and 8 heads fit."""
INF = float("inf")
BOTH = (True, False)


# Trees of attention layers


class Block(nn.Module):
    """One attention layer, known under several names, and the input beside it.

    ``key`` and ``value`` are the input, cut to kdim and vdim. The weights enter the output where they are asked for.
    """

    def __init__(self, layer: nn.MultiheadAttention, mask: str, need_weights: bool) -> None:
        super().__init__()
        self.layer = layer
        self.alias = layer
        self.by_name = nn.ModuleDict({"layer": layer})
        self.mask, self.need_weights = mask, need_weights

    def forward(self, x: Tensor) -> Tensor:
        """(batch, seqlen, WIDTH) in and out."""
        batch, seqlen, _ = x.shape
        layer = self.alias
        masks: dict[str, Any] = {}
        if self.mask == "causal":
            masks["attn_mask"] = torch.ones(seqlen, seqlen, dtype=torch.bool).triu(1)
        elif self.mask == "padding":
            masks["key_padding_mask"] = torch.arange(seqlen).expand(batch, -1) > torch.arange(batch)[:, None]
        inputs = x if layer.batch_first else x.transpose(0, 1)
        kdim, vdim = layer.kdim or WIDTH, layer.vdim or WIDTH
        key = inputs if kdim == WIDTH else inputs[..., :kdim]
        value = inputs if vdim == WIDTH else inputs[..., :vdim]
        out, weights = layer(inputs, key, value, need_weights=self.need_weights, **masks)
        out = out if layer.batch_first else out.transpose(0, 1)
        return x + out if weights is None else x + out + weights[..., :1]


class Named(nn.Module):
    """Modules one after the other, held in an ``nn.ModuleDict``."""

    def __init__(self, members: dict[str, nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleDict(members)

    def forward(self, x: Tensor) -> Tensor:
        for module in self.members.values():
            x = module(x)
        return x


class Residual(nn.Module):
    """A custom module around a list, with a parameter of its own."""

    def __init__(self, members: list[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.scale = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        for module in self.members:
            x = x + module(x) * self.scale
        return x


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One attention layer of a tree.

    ``again`` takes the layer of an earlier leaf instead of a new one; ``tied`` takes its in_proj_weight.
    """

    num_heads: int = 2
    bias: bool = True
    add_bias_kv: bool = False
    add_zero_attn: bool = False
    kdim: int | None = None
    vdim: int | None = None
    batch_first: bool = True
    mask: str = "none"
    need_weights: bool = False
    frozen: bool = False
    again: bool = False
    tied: bool = False

    def build(self, earlier: list[nn.MultiheadAttention]) -> Block:
        if self.again and earlier:
            return Block(earlier[-1], self.mask, self.need_weights)
        layer = nn.MultiheadAttention(
            WIDTH,
            self.num_heads,
            bias=self.bias,
            add_bias_kv=self.add_bias_kv,
            add_zero_attn=self.add_zero_attn,
            kdim=self.kdim,
            vdim=self.vdim,
            batch_first=self.batch_first,
        )
        packed = [other.in_proj_weight for other in earlier if other.in_proj_weight is not None]
        if self.tied and packed and layer.in_proj_weight is not None:
            layer.in_proj_weight = packed[-1]
        if self.frozen:
            layer.out_proj.requires_grad_(False)
        earlier.append(layer)
        return Block(layer, self.mask, self.need_weights)


@dataclasses.dataclass(frozen=True)
class Group:
    """Leaves and groups below one container."""

    kind: str
    members: tuple[Leaf | Group, ...]

    def build(self, earlier: list[nn.MultiheadAttention]) -> nn.Module:
        modules = [member.build(earlier) for member in self.members]
        if self.kind == "sequential":
            return nn.Sequential(*modules)
        if self.kind == "named":
            return Named({f"member{i}": module for i, module in enumerate(modules)})
        return Residual(modules)


@dataclasses.dataclass(frozen=True)
class Tree:
    """A model of attention layers: its shape, its dtype, whether it trains, and the seed of its parameters."""

    top: Leaf | Group
    dtype: torch.dtype = torch.float64
    training: bool = True
    seed: int = 0

    def build(self) -> nn.Module:
        torch.manual_seed(self.seed)
        return randomized(self.top.build([]), self.seed).to(self.dtype).train(self.training)

    def inputs(self, batch: int = 3, seqlen: int = 4) -> Tensor:
        return noise(self.seed + 1, batch, seqlen, WIDTH, dtype=self.dtype)

    @property
    def tolerance(self) -> float:
        return {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.1}[self.dtype]


def leaves() -> st.SearchStrategy[Leaf]:
    """Attention layers of every construction."""
    widths = st.sampled_from((None, WIDTH, 5))
    return st.builds(
        Leaf,
        num_heads=st.sampled_from((1, 2, 4)),
        bias=st.booleans(),
        add_bias_kv=st.booleans(),
        add_zero_attn=st.booleans(),
        kdim=widths,
        vdim=widths,
        batch_first=st.booleans(),
        mask=st.sampled_from(("none", "causal", "padding")),
        need_weights=st.booleans(),
        frozen=st.booleans(),
        again=st.booleans(),
        tied=st.booleans(),
    )


def groups(*, members: st.SearchStrategy[Any]) -> st.SearchStrategy[Group]:
    """Containers with one to three members."""
    kinds = st.sampled_from(("sequential", "named", "residual"))
    return st.builds(Group, kinds, st.lists(members, min_size=1, max_size=3).map(tuple))


def trees(*, dtypes: tuple[torch.dtype, ...] = (torch.float64,)) -> st.SearchStrategy[Tree]:
    """Models of up to four attention layers in nested containers."""
    tops = st.recursive(leaves(), lambda members: groups(members=members), max_leaves=4)
    return st.builds(Tree, tops, st.sampled_from(dtypes), st.booleans(), seeds())


def options() -> st.SearchStrategy[dict[str, Any]]:
    """What ``replace_mha`` may be told, without what a CPU cannot serve."""
    bounds = st.none() | st.integers(0, 3)
    return st.fixed_dictionaries(
        {},
        optional={
            "backend": st.sampled_from((None, "naive", "sdpa", ["sdpa", "naive"])),
            "window": st.none() | st.tuples(bounds, bounds),
            "call_out_proj": st.booleans(),
        },
    )


# Encoders, decoders, transformers


@dataclasses.dataclass(frozen=True)
class Architecture:
    """The constructor arguments of an encoder, a decoder or both, and the seed of the parameters."""

    num_heads: int = 2
    num_layers: int = 2
    norm_first: bool = False
    batch_first: bool = True
    activation: Any = "relu"
    bias: bool = True
    norm: bool = False
    nested: bool = True
    training: bool = True
    seed: int = 0

    @property
    def arguments(self) -> dict[str, Any]:
        return {
            "d_model": WIDTH,
            "nhead": self.num_heads,
            "dim_feedforward": 12,
            "dropout": 0.0,
            "activation": self.activation,
            "batch_first": self.batch_first,
            "norm_first": self.norm_first,
            "bias": self.bias,
            "dtype": torch.float64,
        }

    def layer(self, kind: type[nn.TransformerEncoderLayer] = nn.TransformerEncoderLayer) -> nn.TransformerEncoderLayer:
        return self.ready(kind(**self.arguments))

    def encoder(
        self,
        kind: type[nn.TransformerEncoder] = nn.TransformerEncoder,
        layer: type[nn.TransformerEncoderLayer] = nn.TransformerEncoderLayer,
    ) -> nn.TransformerEncoder:
        with quiet():
            return self.ready(
                kind(self.layer(layer), self.num_layers, self.last_norm(), enable_nested_tensor=self.nested)
            )

    def decoder(self) -> nn.TransformerDecoder:
        layer = nn.TransformerDecoderLayer(**self.arguments)
        return self.ready(nn.TransformerDecoder(layer, self.num_layers, self.last_norm()))

    def transformer(self) -> nn.Transformer:
        with quiet():
            return self.ready(
                nn.Transformer(**self.arguments, num_encoder_layers=self.num_layers, num_decoder_layers=self.num_layers)
            )

    def last_norm(self) -> nn.LayerNorm | None:
        return nn.LayerNorm(WIDTH, dtype=torch.float64) if self.norm else None

    def ready(self, module: Any) -> Any:
        return randomized(module, self.seed).train(self.training)

    def inputs(self, batch: int | None, seqlen: int, salt: int = 1) -> Tensor:
        shape = (seqlen,) if batch is None else (batch, seqlen) if self.batch_first else (seqlen, batch)
        return noise(self.seed + salt, *shape, WIDTH)

    def batch_major(self, out: Tensor) -> Tensor:
        """(batch, seqlen, features), as a padding mask counts."""
        return out if self.batch_first or out.dim() == 2 else out.transpose(0, 1)


def architectures() -> st.SearchStrategy[Architecture]:
    """Every construction of nn.TransformerEncoder and its kin."""
    return st.builds(
        Architecture,
        num_heads=st.sampled_from((1, 2, 4)),
        num_layers=st.integers(1, 2),
        norm_first=st.booleans(),
        batch_first=st.booleans(),
        activation=st.sampled_from(("relu", "gelu", F.silu)),
        bias=st.booleans(),
        norm=st.booleans(),
        nested=st.booleans(),
        training=st.booleans(),
        seed=seeds(),
    )


def fused_architectures() -> st.SearchStrategy[Architecture]:
    """Those that stock runs as one fused operator in eval, so that ``self_attn`` is never called."""
    return st.builds(
        Architecture,
        num_heads=st.sampled_from((2, 4)),
        num_layers=st.integers(1, 2),
        norm_first=st.booleans(),
        activation=st.sampled_from(("relu", "gelu")),
        norm=st.booleans(),
        nested=st.booleans(),
        training=st.just(False),
        seed=seeds(),
    )


ATTENTION_KINDS = ("none", "bool causal", "float causal", "bool", "bool 3-D", "ALiBi", "ALiBi 3-D")
PADDING_KINDS = ("none", "bool", "float", "holes", "whole items")


@dataclasses.dataclass(frozen=True)
class Masks:
    """An attention mask and a padding mask for self-attention, by kind; ``hint`` adds ``is_causal=True``.

    An attention mask alone lets every query see its own key; ``"whole items"`` pads the first item completely.
    """

    batch: int | None = 2
    seqlen: int = 4
    attention: str = "none"
    padding: str = "none"
    hint: bool = False
    seed: int = 0

    def attention_mask(self, num_heads: int) -> Tensor | None:
        future = torch.ones(self.seqlen, self.seqlen, dtype=torch.bool).triu(1)
        steps = torch.arange(self.seqlen, dtype=torch.float64)
        distance = (steps[:, None] - steps).abs()
        copies = (self.batch or 1) * num_heads
        hidden = noise(self.seed + 3, copies, self.seqlen, self.seqlen) > 0
        hidden &= ~torch.eye(self.seqlen, dtype=torch.bool)
        slopes = 0.5 ** torch.arange(copies, dtype=torch.float64)[:, None, None]
        return {
            "none": None,
            "bool causal": future,
            "float causal": torch.zeros(self.seqlen, self.seqlen, dtype=torch.float64).masked_fill(future, -INF),
            "bool": hidden[0],
            "bool 3-D": hidden,
            "ALiBi": -0.5 * distance,
            "ALiBi 3-D": -slopes * distance,
        }[self.attention]

    def padded(self) -> Tensor:
        """Which positions are padding, (batch, seqlen) or (seqlen)."""
        batch = self.batch or 1
        lengths = 1 + torch.arange(batch) % self.seqlen
        positions = torch.arange(self.seqlen)
        padded = positions >= lengths[:, None]
        if self.padding == "none":
            padded = torch.zeros_like(padded)
        elif self.padding == "holes":
            padded = noise(self.seed + 4, batch, self.seqlen) > 0.5
            padded[:, -1] = False
        elif self.padding == "whole items":
            padded[0] = True
        return padded if self.batch else padded[0]

    def padding_mask(self) -> Tensor | None:
        if self.padding == "none":
            return None
        if self.padding == "float":
            return torch.zeros(self.padded().shape, dtype=torch.float64).masked_fill(self.padded(), -INF)
        return self.padded()

    def arguments(self, num_heads: int, mask: str = "mask", causal: str = "is_causal") -> dict[str, Any]:
        """Keywords of nn.TransformerEncoder, or of a layer with ``mask="src_mask"``."""
        given = {mask: self.attention_mask(num_heads), "src_key_padding_mask": self.padding_mask()}
        return {**given, causal: True} if self.hinted else given

    @property
    def hinted(self) -> bool:
        """The hint is given only where it is true."""
        return self.hint and self.attention in ("bool causal", "float causal")

    @property
    def blind(self) -> bool:
        """Some query, be it a padded one, may look at nothing; stock's NaN then spreads to the next layer."""
        crossed = self.padding != "none" and self.attention in ("bool", "bool 3-D")
        return crossed or self.padding == "whole items" or (self.padding == "holes" and self.attention != "none")

    @property
    def miscast(self) -> bool:
        """Stock's fast path reads a float mask as a bool one, pytorch#118628."""
        return self.attention.startswith("ALiBi")


def masks(
    *,
    batches: tuple[int | None, ...] = (1, 2, 3),
    attention: tuple[str, ...] = ATTENTION_KINDS,
    padding: tuple[str, ...] = PADDING_KINDS,
) -> st.SearchStrategy[Masks]:
    """Masks for self-attention, of every kind and every pair of kinds."""
    return st.builds(
        Masks,
        batch=st.sampled_from(batches),
        seqlen=st.integers(1, 5),
        attention=st.sampled_from(attention),
        padding=st.sampled_from(padding),
        hint=st.booleans(),
        seed=seeds(),
    )


# What tests do with models


def noise(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normal values of one seed; the same in every dtype, up to rounding."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def randomized(module: Any, seed: int) -> Any:
    """No parameter is left at zero or one, where a bug could hide, and no two layers are left equal."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(values / math.sqrt(parameter.shape[1]) if parameter.dim() == 2 else 1.0 + values / 4)
    return module


def gradients(module: nn.Module, out: Tensor) -> dict[str, Tensor]:
    """The gradient of every parameter for a loss that no symmetry makes flat."""
    module.zero_grad()
    (out * noise(7, *out.shape, dtype=out.dtype)).sum().backward()
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    }


def assert_same(actual: Any, expected: Any, tolerance: float = 1e-9) -> None:
    """Equal up to rounding, for tensors and dicts of them; never NaN."""
    if isinstance(expected, dict):
        assert list(actual) == list(expected)
        for name, value in expected.items():
            assert_same(actual[name], value, tolerance)
        return
    actual, expected = actual.detach(), expected.detach()
    assert bool(expected.isfinite().all()), "the reference must be finite for a comparison"
    scale = 1.0 + float(expected.abs().max()) if expected.numel() else 1.0
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=tolerance * scale)


def fewer(divisor: int) -> settings:
    """The profile's number of examples divided, for laws whose examples are slow."""
    return settings(max_examples=max(1, settings().max_examples // divisor))


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Tensors this small wait for a second thread longer than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings of constructors and of masks of two types, which are stock's own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def without_fast_path() -> Iterator[None]:
    """Stock as it computes in training: no fused operator, no nested tensors."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


class Identity:
    """A thing that equals only itself, kept alive so that its id is not given away."""

    def __init__(self, thing: Any) -> None:
        self.thing = thing

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Identity) and self.thing is other.thing

    def __repr__(self) -> str:
        return repr(self.thing)


def anatomy(model: nn.Module) -> dict[str, Any]:
    """Everything a module is, under every name: the object, its class, its attributes and what is in its dicts."""

    def contents(value: Any) -> Any:
        if isinstance(value, dict):
            return type(value), [(key, Identity(inner)) for key, inner in value.items()]
        return Identity(value)

    return {
        name: (Identity(module), type(module), {key: contents(value) for key, value in vars(module).items()})
        for name, module in model.named_modules(remove_duplicate=False)
    }

"""Models as Hypothesis strategies: attention layers in nested containers, shared, tied and frozen."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from ..record import Record, noise, placed, randomized
from ..values import seeds

WIDTH = 8
"""embed_dim of every model: 1, 2, 4 and 8 heads fit."""


class TreeBlock(nn.Module):
    """One attention layer, known under several names, and the input beside it.

    ``key`` and ``value`` are the input, cut to kdim and vdim. The weights enter the output where they are asked for.
    """

    def __init__(self, layer: nn.MultiheadAttention, mask: str, need_weights: bool) -> None:
        super().__init__()
        self.layer = layer
        self.alias = layer
        self.by_name = nn.ModuleDict({"layer": layer})
        self.mask, self.need_weights = mask, need_weights

    def forward(self, input: Tensor) -> Tensor:
        """(batch, seqlen, WIDTH) in and out."""
        batch, seqlen, _ = input.shape
        layer = self.alias
        masks: dict[str, Any] = {}
        if self.mask == "causal":
            masks["attn_mask"] = torch.ones(seqlen, seqlen, dtype=torch.bool, device=input.device).triu(1)
        elif self.mask == "padding":
            rows, keys = (torch.arange(size, device=input.device) for size in (batch, seqlen))
            masks["key_padding_mask"] = keys > rows[:, None]
        inputs = input if layer.batch_first else input.transpose(0, 1)
        kdim, vdim = layer.kdim or WIDTH, layer.vdim or WIDTH
        key = inputs if kdim == WIDTH else inputs[..., :kdim]
        value = inputs if vdim == WIDTH else inputs[..., :vdim]
        out, weights = layer(inputs, key, value, need_weights=self.need_weights, **masks)
        out = out if layer.batch_first else out.transpose(0, 1)
        total: Tensor = input + out if weights is None else input + out + weights[..., :1]
        return total


class NamedModules(nn.Module):
    """Modules one after the other, held in an ``nn.ModuleDict``."""

    def __init__(self, members: dict[str, nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleDict(members)

    def forward(self, input: Tensor) -> Tensor:
        for module in self.members.values():
            input = module(input)
        return input


class Residual(nn.Module):
    """A custom module around a list, with a parameter of its own."""

    def __init__(self, members: list[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.scale = nn.Parameter(torch.ones(WIDTH))

    def forward(self, input: Tensor) -> Tensor:
        for module in self.members:
            input = input + module(input) * self.scale
        return input


@dataclasses.dataclass(frozen=True, repr=False)
class Leaf(Record):
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

    def build(self, earlier: list[nn.MultiheadAttention]) -> TreeBlock:
        if self.again and earlier:
            return TreeBlock(earlier[-1], self.mask, self.need_weights)
        names = ("bias", "add_bias_kv", "add_zero_attn", "kdim", "vdim", "batch_first")
        options: dict[str, Any] = {name: getattr(self, name) for name in names}
        layer = nn.MultiheadAttention(WIDTH, self.num_heads, **options)
        packed = [other.in_proj_weight for other in earlier if other.in_proj_weight is not None]
        if self.tied and packed and layer.in_proj_weight is not None:
            layer.in_proj_weight = packed[-1]
        if self.frozen:
            layer.out_proj.requires_grad_(False)
        earlier.append(layer)
        return TreeBlock(layer, self.mask, self.need_weights)


@dataclasses.dataclass(frozen=True, repr=False)
class ModuleGroup(Record):
    """Leaves and groups below one container."""

    kind: str
    members: tuple[Leaf | ModuleGroup, ...]

    def build(self, earlier: list[nn.MultiheadAttention]) -> nn.Module:
        modules = [member.build(earlier) for member in self.members]
        if self.kind == "sequential":
            return nn.Sequential(*modules)
        if self.kind == "named":
            return NamedModules({f"member{i}": module for i, module in enumerate(modules)})
        return Residual(modules)


@dataclasses.dataclass(frozen=True, repr=False)
class Tree(Record):
    """A model of attention layers: its shape, its dtype, whether it trains, and the seed of its parameters."""

    top: Leaf | ModuleGroup = Leaf()
    dtype: torch.dtype = torch.float64
    training: bool = True
    seed: int = 0
    device: torch.device | str | None = None

    def build(self) -> nn.Module:
        """The model; the same one each time."""
        torch.manual_seed(self.seed)
        model: nn.Module = randomized(self.top.build([]), self.seed)
        return model.to(placed(self.device), self.dtype).train(self.training)

    def inputs(self, batch: int = 3, seqlen: int = 4) -> Tensor:
        """The input of a call: (batch, seqlen, WIDTH)."""
        return noise(self.seed + 1, batch, seqlen, WIDTH, dtype=self.dtype, device=self.device)

    def arguments(self) -> dict[str, Any]:
        """Every argument of a call by name."""
        return {"input": self.inputs()}


def leaves() -> st.SearchStrategy[Leaf]:
    """Attention layers of every construction."""
    widths = st.sampled_from((None, WIDTH, 5))
    return st.builds(
        Leaf,
        num_heads=st.sampled_from((1, 2, 4)),
        bias=st.sampled_from((True, False)),
        add_bias_kv=st.booleans(),
        add_zero_attn=st.booleans(),
        kdim=widths,
        vdim=widths,
        batch_first=st.sampled_from((True, False)),
        mask=st.sampled_from(("none", "causal", "padding")),
        need_weights=st.booleans(),
        frozen=st.booleans(),
        again=st.booleans(),
        tied=st.booleans(),
    )


def groups(*, members: st.SearchStrategy[Any]) -> st.SearchStrategy[ModuleGroup]:
    """Containers with one to three members."""
    kinds = st.sampled_from(("sequential", "named", "residual"))
    return st.builds(ModuleGroup, kinds, st.lists(members, min_size=1, max_size=3).map(tuple))


def trees(
    *, dtypes: Sequence[torch.dtype] = (torch.float64,), device: torch.device | str | None = None
) -> st.SearchStrategy[Tree]:
    """Models of up to four attention layers in nested containers."""
    tops = st.recursive(leaves(), lambda members: groups(members=members), max_leaves=4)
    return st.builds(Tree, tops, st.sampled_from(dtypes), st.sampled_from((True, False)), seeds(), st.just(device))

"""What torch's transformers are built with and masked with, as Hypothesis strategies."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from ..record import Record, noise, randomized
from ..values import seeds
from .tree import WIDTH


@dataclasses.dataclass(frozen=True, repr=False)
class Architecture(Record):
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

    def layer(self, kind: type[nn.TransformerEncoderLayer] = nn.TransformerEncoderLayer) -> Any:
        return self.ready(kind(**self.arguments))

    def encoder(
        self,
        kind: type[nn.TransformerEncoder] = nn.TransformerEncoder,
        layer: type[nn.TransformerEncoderLayer] = nn.TransformerEncoderLayer,
    ) -> Any:
        with without_warnings():  # of nested tensors it will not use
            return self.ready(
                kind(self.layer(layer), self.num_layers, self.last_norm(), enable_nested_tensor=self.nested)
            )

    def decoder(self) -> Any:
        layer = nn.TransformerDecoderLayer(**self.arguments)
        return self.ready(nn.TransformerDecoder(layer, self.num_layers, self.last_norm()))

    def transformer(self) -> Any:
        with without_warnings():
            return self.ready(
                nn.Transformer(**self.arguments, num_encoder_layers=self.num_layers, num_decoder_layers=self.num_layers)
            )

    def last_norm(self) -> nn.LayerNorm | None:
        return nn.LayerNorm(WIDTH, dtype=torch.float64) if self.norm else None

    def ready(self, module: Any) -> Any:
        return randomized(module, self.seed).train(self.training)

    def inputs(self, batch: int | None, seqlen: int, salt: int = 1) -> Tensor:
        """A sequence of a batch, or a single one, in the layout of ``batch_first``."""
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
        batch_first=st.sampled_from((True, False)),
        activation=st.sampled_from(("relu", "gelu", F.silu)),
        bias=st.sampled_from((True, False)),
        norm=st.booleans(),
        nested=st.booleans(),
        training=st.sampled_from((True, False)),
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


@dataclasses.dataclass(frozen=True, repr=False)
class EncoderMasks(Record):
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
        """The mask over queries and keys, bool (``True`` = hidden) or added."""
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
            "float causal": torch.zeros(self.seqlen, self.seqlen, dtype=torch.float64).masked_fill(future, -math.inf),
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
        """The mask over keys, bool (``True`` = hidden) or added."""
        if self.padding == "none":
            return None
        if self.padding == "float":
            return torch.zeros(self.padded().shape, dtype=torch.float64).masked_fill(self.padded(), -math.inf)
        return self.padded()

    def arguments(self, num_heads: int, mask: str = "mask") -> dict[str, Any]:
        """Keywords of nn.TransformerEncoder, or of a layer with ``mask="src_mask"``."""
        given = {mask: self.attention_mask(num_heads), "src_key_padding_mask": self.padding_mask()}
        return {**given, "is_causal": True} if self.hinted else given

    @property
    def hinted(self) -> bool:
        """The hint is given only where it is true."""
        return self.hint and self.attention in ("bool causal", "float causal")

    @property
    def blind(self) -> bool:
        """Some query, be it a padded one, may look at nothing; stock's NaN then spreads to the next layer."""
        crossed = self.padding != "none" and self.attention in ("bool", "bool 3-D")
        return crossed or self.padding == "whole items" or (self.padding == "holes" and self.attention != "none")


def encoder_masks(
    *,
    batches: tuple[int | None, ...] = (1, 2, 3),
    attention: tuple[str, ...] = ATTENTION_KINDS,
    padding: tuple[str, ...] = PADDING_KINDS,
) -> st.SearchStrategy[EncoderMasks]:
    """Masks for self-attention, of every kind and every pair of kinds."""
    return st.builds(
        EncoderMasks,
        batch=st.sampled_from(batches),
        seqlen=st.integers(1, 5),
        attention=st.sampled_from(attention),
        padding=st.sampled_from(padding),
        hint=st.booleans(),
        seed=seeds(),
    )


@contextlib.contextmanager
def without_warnings() -> Iterator[None]:
    """Without the warnings of constructors and of masks of two types, which are stock's own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield

"""Torch's transformers as Hypothesis strategies: layers, encoders and decoders, each with a call; and all models."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from ..record import Record, noise, placed
from .encoder import Architecture, EncoderMasks, architectures, encoder_masks
from .tree import Tree, trees

MODEL_KINDS = ("layer", "encoder", "decoder", "transformer")


@dataclasses.dataclass(frozen=True, repr=False)
class Transformer(Record):
    """One of torch's transformer modules with a call of it; ``target`` is looked at by decoders alone."""

    kind: str = "layer"
    architecture: Architecture = dataclasses.field(default_factory=Architecture)
    source: EncoderMasks = dataclasses.field(default_factory=EncoderMasks)
    target: EncoderMasks = dataclasses.field(default_factory=EncoderMasks)
    dtype: torch.dtype = torch.float64
    device: torch.device | str | None = None

    def build(self) -> nn.Module:
        """The model; the same one each time."""
        model: nn.Module = getattr(self.architecture, self.kind)()
        return model.to(placed(self.device), self.dtype)

    def arguments(self) -> dict[str, Any]:
        """Every argument of a call by name."""
        heads, batch = self.architecture.num_heads, self.source.batch
        source, target = self.source, dataclasses.replace(self.target, batch=batch)
        x = self.architecture.inputs(batch, source.seqlen)
        given: dict[str, Any]
        if self.kind in ("layer", "encoder"):
            given = {"src": x, **source.arguments(heads, "src_mask" if self.kind == "layer" else "mask")}
        else:
            given = {
                "tgt": self.architecture.inputs(batch, target.seqlen, salt=2),
                "tgt_mask": target.attention_mask(heads),
                "tgt_key_padding_mask": target.padding_mask(),
                "tgt_is_causal": target.hinted,
                "memory_mask": noise(source.seed, target.seqlen, source.seqlen),
                "memory_key_padding_mask": source.padding_mask(),
            }
        if self.kind == "decoder":
            given["memory"] = x
        if self.kind == "transformer":
            given |= {
                "src": x,
                "src_mask": source.attention_mask(heads),
                "src_key_padding_mask": source.padding_mask(),
                "src_is_causal": True if source.hinted else None,
            }
        return {name: self.moved(value) for name, value in given.items()}

    def moved(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(placed(self.device), self.dtype if value.is_floating_point() else value.dtype)


def transformers(
    *,
    kinds: tuple[str, ...] = MODEL_KINDS,
    batches: tuple[int | None, ...] = (2, 1, 3, None),
    dtypes: tuple[torch.dtype, ...] = (torch.float64,),
    device: torch.device | str | None = None,
) -> st.SearchStrategy[Transformer]:
    """Torch's transformer modules of every construction, each with a call; dropout 0."""
    return st.builds(
        Transformer,
        kind=st.sampled_from(kinds),
        architecture=architectures(),
        source=encoder_masks(batches=batches),
        target=encoder_masks(),
        dtype=st.sampled_from(dtypes),
        device=st.just(device),
    )


def models(
    *, dtypes: tuple[torch.dtype, ...] = (torch.float64,), device: torch.device | str | None = None
) -> st.SearchStrategy[Tree | Transformer]:
    """Whole models that hold attention: torch's transformers, and attention layers in nested containers.

    What is drawn has ``build()`` and ``arguments()``. In eval stock's encoders bypass their attention: compare with
    them inside ``without_fast_path``, because they fill padded positions with zeros and read some masks wrongly.
    """
    return trees(dtypes=dtypes, device=device) | transformers(dtypes=dtypes, device=device)

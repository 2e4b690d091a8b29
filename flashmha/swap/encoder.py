"""nn.TransformerEncoder and its layer, calling ``self_attn`` in eval too.

In eval the stock layer hands its weights to one fused operator and never calls ``self_attn``; the stock encoder turns
a bool padding mask into a float one and padded batches into nested tensors. These subclasses keep masks as they are,
leave padding out once where stock nests or ``skip_padding`` asks for it, and always call the layer. They add no state:
a stock instance becomes one by its class, and back. No annotation here may be postponed: TorchScript reads them.
"""

from typing import Any, Optional

import torch
import torch.fx
from torch import Tensor, nn

from ..host.torch_state import eager
from ..layer.call import hides_the_future
from ..layer.written import Written
from . import stack
from .known import BLOCKS
from .route import Route, enter, leave

torch.fx.wrap("found_causal")  # FX sees one call, which looks when the graph runs


STOCK_FORWARDS: dict[type[nn.Module], Any] = {
    kind: kind.forward
    for kind in (
        nn.TransformerEncoderLayer,
        nn.TransformerEncoder,
        nn.TransformerDecoderLayer,
        nn.TransformerDecoder,
    )
}
"""PyTorch's own, as they were when this package was imported."""


def is_stock(module: nn.Module, kind: type[nn.Module]) -> bool:
    """A module is exactly of a stock class, whose forward is PyTorch's, as is the instance's."""
    return type(module) is kind and kind.forward is STOCK_FORWARDS[kind] and "forward" not in vars(module)


class FlashTransformerEncoderLayer(nn.TransformerEncoderLayer):
    """``nn.TransformerEncoderLayer`` whose attention always runs in ``self_attn``."""

    __jit_ignored_attributes__ = ["_written"]
    _written = Written(BLOCKS)

    def forward(
        self,
        src: Tensor,
        src_mask: Optional[Tensor] = None,
        src_key_padding_mask: Optional[Tensor] = None,
        is_causal: bool = False,
    ) -> Tensor:
        """(batch, seqlen, embed_dim) with ``batch_first``; masks as in ``nn.TransformerEncoderLayer``."""
        x = src
        if self.norm_first:
            x = x + self._sa_block(self.norm1(x), src_mask, src_key_padding_mask, is_causal=is_causal)
            return x + self._ff_block(self.norm2(x))
        x = self.norm1(x + self._sa_block(x, src_mask, src_key_padding_mask, is_causal=is_causal))
        out: Tensor = self.norm2(x + self._ff_block(x))
        return out


class FlashTransformerEncoder(nn.TransformerEncoder):
    """``nn.TransformerEncoder`` over such layers: no nested tensors, masks handed on as they came.

    Where every layer's attention has ``skip_padding``, padding is left out once, before the first layer, and comes back
    as zeros behind the last: feed-forward, norms and dropout see real tokens alone. In eval without gradients that
    happens by default where the stock encoder would make nested tensors, with its numbers. Every row is computed under
    ``torch.compile``, export and CUDA graph capture, and where something inside may count on (batch, seqlen): a layer
    of another class, a module that is not known, a hook. ``flashmha.explain(encoder, src, ...)`` says so.
    """

    def forward(
        self,
        src: Tensor,
        mask: Optional[Tensor] = None,
        src_key_padding_mask: Optional[Tensor] = None,
        is_causal: Optional[bool] = None,
    ) -> Tensor:
        """Masks as in ``nn.TransformerEncoder``; ``is_causal=None`` looks whether ``mask`` is the causal mask."""
        causal = found_causal(mask, src_key_padding_mask) if is_causal is None else is_causal
        if torch.jit.is_scripting():
            output = src
            for layer in self.layers:
                output = layer(output, src_mask=mask, is_causal=causal, src_key_padding_mask=src_key_padding_mask)
            return output if self.norm is None else self.norm(output)
        way = enter(self, src, mask, src_key_padding_mask, causal)
        if isinstance(way, Route) and way.straight:  # to FX it is a proxy
            return leave(self, way, stack.run_layers(self, way))
        output = way.src
        for layer in self.layers:
            output = layer(
                output, src_mask=way.mask, is_causal=way.is_causal, src_key_padding_mask=way.key_padding_mask
            )
        return leave(self, way, output)


def found_causal(mask: Optional[Tensor], key_padding_mask: Optional[Tensor]) -> bool:
    """The mask hides exactly the future, so that a layer need not read it.

    Not asked beside a padding mask, which makes every layer read both, nor where the answer would break a graph.
    """
    if mask is None or key_padding_mask is not None:
        return False
    # alone in its condition, or TorchScript compiles what stands below
    if not torch.jit.is_scripting():  # noqa: SIM102
        if not isinstance(mask, Tensor) or not eager(mask):
            return False
    return mask.dim() == 2 and mask.shape[0] == mask.shape[1] and not mask.is_meta and hides_the_future(mask)

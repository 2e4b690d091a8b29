"""nn.TransformerEncoder and its layer, calling ``self_attn`` in eval too.

In eval the stock layer hands its weights to one fused operator and never calls ``self_attn``; the stock encoder turns
a bool padding mask into a float one and padded batches into nested tensors. These subclasses keep masks as they are,
never nest and always call the layer. They add no state: a stock instance becomes one by its class, and back. No
annotation here may be postponed: TorchScript reads them.
"""

from typing import Any, Optional

import torch
import torch.fx
from torch import Tensor, nn

from .features import MARK, replaced
from .masks import KeyPadding, eager, plainly, private
from .module import FlashMultiHeadAttention

torch.fx.wrap("found_causal")  # FX sees one call, which looks when the graph runs


STOCK_FORWARDS: dict[type[nn.Module], Any] = {
    kind: kind.forward for kind in (nn.TransformerEncoderLayer, nn.TransformerEncoder)
}
"""PyTorch's own, as they were when this package was imported."""


def is_stock(module: nn.Module, kind: type[nn.Module]) -> bool:
    """A module is exactly of a stock class, whose forward is PyTorch's, as is the instance's."""
    return type(module) is kind and kind.forward is STOCK_FORWARDS[kind] and "forward" not in vars(module)


class FlashTransformerEncoderLayer(nn.TransformerEncoderLayer):
    """``nn.TransformerEncoderLayer`` whose attention always runs in ``self_attn``."""

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
    """``nn.TransformerEncoder`` over such layers: no nested tensors, masks handed on as they came."""

    def forward(
        self,
        src: Tensor,
        mask: Optional[Tensor] = None,
        src_key_padding_mask: Optional[Tensor] = None,
        is_causal: Optional[bool] = None,
    ) -> Tensor:
        """Masks as in ``nn.TransformerEncoder``; ``is_causal=None`` looks whether ``mask`` is the causal mask."""
        causal = found_causal(mask, src_key_padding_mask) if is_causal is None else is_causal
        padding = src_key_padding_mask
        if not torch.jit.is_scripting():
            padding = handed_down(self, src, mask, padding)
        output = src
        for layer in self.layers:
            output = layer(output, src_mask=mask, is_causal=causal, src_key_padding_mask=padding)
        if self.norm is not None:
            output = self.norm(output)
        return output


def handed_down(encoder: Any, src: Any, mask: Any, padding: Any) -> Any:
    """A bool padding mask as one rule for every layer, which keeps what is computed of it; else as it came.

    As a tensor it goes to layers, hooks and patches that may count on one, into a graph, and where it is an error.
    """
    if not isinstance(padding, Tensor) or padding.dtype != torch.bool:
        return padding
    if not torch.compiler.is_compiling() and not (eager(padding) and eager(src)):
        return padding
    if src.is_nested or src.dim() != 3 or (isinstance(mask, Tensor) and mask.dtype != torch.bool):
        return padding
    for layer in encoder.layers:  # not all(...), which Dynamo 2.8 does not trace
        if not takes_rules(layer, src, padding):
            return padding
    if GLOBAL_HOOKS[0] or GLOBAL_HOOKS[1]:
        return padding
    return private(KeyPadding(~padding if torch.compiler.is_compiling() else plainly(lambda: ~padding)))


GLOBAL_HOOKS = (
    torch.nn.modules.module._global_forward_hooks,
    torch.nn.modules.module._global_forward_pre_hooks,
)


def takes_rules(layer: Any, src: Tensor, padding: Tensor) -> bool:
    """An encoder layer is as this package wrote it, down to its attention, and the padding fits."""
    attention = getattr(layer, "self_attn", None)
    if type(layer) is not FlashTransformerEncoderLayer or not isinstance(attention, FlashMultiHeadAttention):
        return False
    if (type(layer).forward, type(layer)._sa_block) != LAYER or replaced(attention):
        return False
    for name in ("forward", "_sa_block", "_call_impl"):
        if name in layer.__dict__:
            return False
    modules: tuple[Any, ...] = (layer, attention)
    for module in modules:
        ours = 1 if MARK in module._forward_pre_hooks else 0
        if module._forward_hooks or len(module._forward_pre_hooks) > ours or module._compiled_call_impl is not None:
            return False
    batch, seqlen = src.shape[:2] if attention.batch_first else (src.shape[1], src.shape[0])
    return padding.shape == (batch, seqlen)


LAYER = (FlashTransformerEncoderLayer.forward, FlashTransformerEncoderLayer._sa_block)
"""What an encoder layer runs, as it was when this package was imported."""


def found_causal(mask: Optional[Tensor], key_padding_mask: Optional[Tensor]) -> bool:
    """The mask hides exactly the future, so that a layer need not read it.

    Not asked beside a padding mask, which makes every layer read both, nor where the answer would break a graph.
    """
    if (
        not isinstance(mask, Tensor)
        or key_padding_mask is not None
        or torch.compiler.is_compiling()
        or torch.jit.is_tracing()
    ):
        return False
    # alone in its condition, or TorchScript compiles what stands below
    if not torch.jit.is_scripting():  # noqa: SIM102
        if not eager(mask):
            return False
    if mask.dim() != 2 or mask.shape[0] != mask.shape[1] or mask.is_meta:
        return False
    future = torch.ones(mask.shape[0], mask.shape[1], dtype=torch.bool, device=mask.device).triu(1)
    if mask.dtype == torch.bool:
        return torch.equal(mask, future)
    causal = torch.zeros_like(mask).masked_fill(future, float("-inf"))
    return torch.equal(mask, causal)

"""nn.TransformerDecoder and its layer, which take a cache.

They add no state: a stock instance becomes one by its class, and back. No annotation here may be postponed: TorchScript
reads them.
"""

import contextlib
from typing import Any, Optional

import torch
import torch.fx
from torch import Tensor, nn

from ..host.torch_state import is_compiling
from ..layer.cached import undone_where_it_fails
from ..layer.written import Written
from .caches import KVCache, check_kv_cache
from .encoder import found_causal
from .known import DECODER_BLOCKS
from .steps import run_step

torch.fx.wrap("found_causal")  # FX sees one call, which looks when the graph runs


class FlashTransformerDecoderLayer(nn.TransformerDecoderLayer):
    """``nn.TransformerDecoderLayer`` that takes a ``KVCache``."""

    __jit_ignored_attributes__ = ["_written"]
    _written = Written(DECODER_BLOCKS)

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Optional[Tensor] = None,
        memory_mask: Optional[Tensor] = None,
        tgt_key_padding_mask: Optional[Tensor] = None,
        memory_key_padding_mask: Optional[Tensor] = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
        cache: Optional[Any] = None,
    ) -> Tensor:
        """Masks as in ``nn.TransformerDecoderLayer``.

        Args:
            cache: ``KVCache.of(layer, ...)``: ``tgt`` holds the new tokens alone, ``tgt_mask`` and
                ``tgt_key_padding_mask`` speak of these, and ``memory`` is projected by the first call.
        """
        # alone in its condition, or TorchScript compiles what stands below
        if not torch.jit.is_scripting():  # noqa: SIM102
            if isinstance(cache, torch.fx.Proxy):  # FX makes one of every argument of its root
                cache = None
        masks = (tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask, tgt_is_causal, memory_is_causal)
        if cache is None:
            out: Tensor = self._blocks(tgt, memory, None, *masks)
        else:
            out = self._over_cache(tgt, memory, masks, cache)
        return out

    @torch.jit.unused
    def _over_cache(self, tgt: Tensor, memory: Tensor, masks: Any, cache: Any) -> Tensor:
        """The blocks over a cache; if one fails, the caches of both attentions are as they were."""
        with undoing(check_kv_cache(cache)):
            out: Tensor = self._blocks(tgt, memory, cache, *masks)
            return out

    def _blocks(
        self,
        x: Tensor,
        memory: Tensor,
        cache: Optional[Any],
        tgt_mask: Optional[Tensor],
        memory_mask: Optional[Tensor],
        tgt_key_padding_mask: Optional[Tensor],
        memory_key_padding_mask: Optional[Tensor],
        tgt_is_causal: bool,
        memory_is_causal: bool,
    ) -> Tensor:
        """Self-attention, attention to the memory and the feed-forward block, each with its norm."""
        if self.norm_first:
            x = x + self._self(self.norm1(x), tgt_mask, tgt_key_padding_mask, tgt_is_causal, cache)
            x = x + self._cross(self.norm2(x), memory, memory_mask, memory_key_padding_mask, memory_is_causal, cache)
            return x + self._ff_block(self.norm3(x))
        x = self.norm1(x + self._self(x, tgt_mask, tgt_key_padding_mask, tgt_is_causal, cache))
        x = self.norm2(x + self._cross(x, memory, memory_mask, memory_key_padding_mask, memory_is_causal, cache))
        out: Tensor = self.norm3(x + self._ff_block(x))
        return out

    def _self(
        self,
        x: Tensor,
        mask: Optional[Tensor],
        key_padding_mask: Optional[Tensor],
        is_causal: bool,
        cache: Optional[Any],
    ) -> Tensor:
        """Self-attention, behind the tokens of a cache where there is one."""
        if cache is None:
            out: Tensor = self._sa_block(x, mask, key_padding_mask, is_causal)
        else:
            out = self.dropout1(self._attend("self_attn", x, x, mask, key_padding_mask, is_causal, cache))
        return out

    def _cross(
        self,
        x: Tensor,
        memory: Tensor,
        mask: Optional[Tensor],
        key_padding_mask: Optional[Tensor],
        is_causal: bool,
        cache: Optional[Any],
    ) -> Tensor:
        """Attention to the memory, whose keys and values a cache keeps where there is one."""
        if cache is None:
            out: Tensor = self._mha_block(x, memory, mask, key_padding_mask, is_causal)
        else:
            out = self.dropout2(self._attend("multihead_attn", x, memory, mask, key_padding_mask, is_causal, cache))
        return out

    @torch.jit.unused
    def _attend(
        self,
        name: str,
        x: Tensor,
        keys: Tensor,
        mask: Optional[Tensor],
        key_padding_mask: Optional[Tensor],
        is_causal: bool,
        cache: Any,
    ) -> Tensor:
        """Attention of one of the two layers over its cache."""
        layer: Any = getattr(self, name)
        out: Tensor = layer(
            x,
            keys,
            keys,
            attn_mask=mask,
            key_padding_mask=key_padding_mask,
            is_causal=is_causal,
            need_weights=False,
            cache=check_kv_cache(cache)[name],
        )[0]
        return out


class FlashTransformerDecoder(nn.TransformerDecoder):
    """``nn.TransformerDecoder`` over such layers.

    With a cache it is called token by token, or with a few at a time, and computes what it would in one call::

        cache = flashmha.KVCache.of(decoder, batch, max_seqlen)
        out = decoder(prompt, memory, tgt_mask=causal, cache=cache)
        out = decoder(next_token, memory, cache=cache)
    """

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Optional[Tensor] = None,
        memory_mask: Optional[Tensor] = None,
        tgt_key_padding_mask: Optional[Tensor] = None,
        memory_key_padding_mask: Optional[Tensor] = None,
        tgt_is_causal: Optional[bool] = None,
        memory_is_causal: bool = False,
        cache: Optional[Any] = None,
    ) -> Tensor:
        """Masks as in ``nn.TransformerDecoder``; ``tgt_is_causal=None`` looks whether ``tgt_mask`` is the causal mask.

        Args:
            cache: ``KVCache.of(decoder, ...)``, as in ``FlashTransformerDecoderLayer``.
        """
        causal = found_causal(tgt_mask, tgt_key_padding_mask) if tgt_is_causal is None else tgt_is_causal
        output = tgt
        if torch.jit.is_scripting():
            assert cache is None, "TorchScript runs PyTorch's own attention: cache must be None"
            for layer in self.layers:
                output = layer(
                    output,
                    memory,
                    tgt_mask=tgt_mask,
                    memory_mask=memory_mask,
                    tgt_key_padding_mask=tgt_key_padding_mask,
                    memory_key_padding_mask=memory_key_padding_mask,
                    tgt_is_causal=causal,
                    memory_is_causal=memory_is_causal,
                )
            return output if self.norm is None else self.norm(output)
        masks = {
            "tgt_mask": tgt_mask,
            "memory_mask": memory_mask,
            "tgt_key_padding_mask": tgt_key_padding_mask,
            "memory_key_padding_mask": memory_key_padding_mask,
            "tgt_is_causal": causal,
            "memory_is_causal": memory_is_causal,
        }
        output = run_decoder(self, tgt, memory, masks, cache)
        return output if self.norm is None else self.norm(output)


def run_decoder(
    decoder: nn.TransformerDecoder, output: Tensor, memory: Tensor, masks: dict[str, Any], cache: Any
) -> Tensor:
    """The layers of a decoder one after the other; if one fails, the caches of all are as they were."""
    if cache is None:
        for layer in decoder.layers:
            output = layer(output, memory, **masks)
        return output
    held = check_kv_cache(cache)
    made = None if is_compiling() else run_step(decoder, output, memory, masks, held["layers"])
    if made is not None:
        return made
    with undoing(held):
        for number, layer in enumerate(decoder.layers):
            output = layer(output, memory, **masks, cache=held["layers"][str(number)])
    return output


def undoing(cache: KVCache) -> contextlib.AbstractContextManager[None]:
    """What puts a cache back where a call fails; nothing under a compiler, whose graph runs as a whole."""
    return contextlib.nullcontext() if is_compiling() else undone_where_it_fails(cache)

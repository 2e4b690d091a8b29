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


Masks = tuple[Optional[Tensor], Optional[Tensor], bool]
"""The mask of an attention, its padding, and the causal hint."""


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
        if cache is not None:
            masks = (tgt_mask, tgt_key_padding_mask, tgt_is_causal)
            of_memory = (memory_mask, memory_key_padding_mask, memory_is_causal)
            out: Tensor = self._behind(tgt, memory, masks, of_memory, cache)
            return out
        x = tgt
        if self.norm_first:
            x = x + self._sa_block(self.norm1(x), tgt_mask, tgt_key_padding_mask, tgt_is_causal)
            x = x + self._mha_block(self.norm2(x), memory, memory_mask, memory_key_padding_mask, memory_is_causal)
            return x + self._ff_block(self.norm3(x))
        x = self.norm1(x + self._sa_block(x, tgt_mask, tgt_key_padding_mask, tgt_is_causal))
        x = self.norm2(x + self._mha_block(x, memory, memory_mask, memory_key_padding_mask, memory_is_causal))
        out = self.norm3(x + self._ff_block(x))
        return out

    @torch.jit.unused
    def _behind(self, x: Tensor, memory: Tensor, masks: Masks, of_memory: Masks, cache: Any) -> Tensor:
        """``forward`` behind the tokens of a cache, which is as it was if something fails on the way."""
        with undoing(check_kv_cache(cache)):
            if self.norm_first:
                y = self.norm1(x)
                x = x + self.dropout1(self._attend("self_attn", y, y, *masks, cache))
                x = x + self.dropout2(self._attend("multihead_attn", self.norm2(x), memory, *of_memory, cache))
                return x + self._ff_block(self.norm3(x))
            x = self.norm1(x + self.dropout1(self._attend("self_attn", x, x, *masks, cache)))
            x = self.norm2(x + self.dropout2(self._attend("multihead_attn", x, memory, *of_memory, cache)))
            out: Tensor = self.norm3(x + self._ff_block(x))
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
            cache=cache[name],
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

"""The layers of a decoder run as functions for one step of generating, as those of an encoder are in ``stack``."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..host.torch_state import eager
from ..layer.shortcut import plain_mask
from ..layer.step import PlainStep
from ..problem.masks import Mask
from .caches import KVCache
from .known import find_unknown_layers
from .stack import feed_forward, run_dropout, run_norm

SILENT = ("tgt_mask", "memory_mask", "tgt_key_padding_mask", "tgt_is_causal", "memory_is_causal")
"""The masks of a decoder that say nothing in a step."""


def run_step(
    decoder: nn.TransformerDecoder, tgt: Tensor, memory: Tensor, masks: dict[str, Any], caches: KVCache
) -> Tensor | None:
    """The output of a decoder's layers for tokens beside no mask but the memory's padding; ``None`` for other calls.

    If a layer fails, the caches of all are as they were.
    """
    for name in SILENT:
        if masks[name] is not None and masks[name] is not False:
            return None
    if tgt.is_nested or not isinstance(memory, Tensor) or memory.is_nested:
        return None
    step = DecoderStep(tgt, memory, masks["memory_key_padding_mask"], caches)
    if not step.plain or not eager(memory) or memory.dim() != 3 or find_unknown_layers(decoder) is not None:
        return None
    x = tgt.reshape(-1, tgt.shape[2])
    try:
        for number, layer in enumerate(decoder.layers):
            x = step.run(layer, x, caches[str(number)])
        step.finish()
    except BaseException:
        if step.before is not None:
            caches.restore(step.before)
        raise
    return x.view(tgt.shape)


class DecoderStep(PlainStep):
    """A step of a decoder whose layers are known.

    ``before`` is the state of the caches before the first layer that has to be called as a module, which moves its own.
    """

    def __init__(self, tgt: Tensor, memory: Tensor, padding: Any, caches: KVCache) -> None:
        super().__init__(tgt)
        self.memory, self.padding, self.caches = memory, padding, caches
        self.rules: dict[tuple[int, int, int], Mask | None] = {}
        self.before: Any = None

    def run(self, layer: Any, x: Tensor, cache: KVCache) -> Tensor:
        """One layer."""
        parts: Any = layer._modules
        if layer.norm_first:
            x = x + run_dropout(parts["dropout1"], self.look_back(layer, run_norm(parts["norm1"], x), cache))
            x = x + run_dropout(parts["dropout2"], self.look_over(layer, run_norm(parts["norm2"], x), cache))
            return x + feed_forward(layer, run_norm(parts["norm3"], x), "dropout3")
        x = run_norm(parts["norm1"], x + run_dropout(parts["dropout1"], self.look_back(layer, x, cache)))
        x = run_norm(parts["norm2"], x + run_dropout(parts["dropout2"], self.look_over(layer, x, cache)))
        return run_norm(parts["norm3"], x + feed_forward(layer, x, "dropout3"))

    def look_back(self, layer: Any, x: Tensor, cache: KVCache) -> Tensor:
        """Self-attention."""
        out = self.attend_next(layer._modules["self_attn"], x, cache.parts.get("self_attn"))
        return self.call("self_attn", layer, x, None, None, cache) if out is None else out

    def look_over(self, layer: Any, x: Tensor, cache: KVCache) -> Tensor:
        """Attention to the memory."""
        attention, padding, memory = layer._modules["multihead_attn"], self.padding, self.memory
        out: Tensor | None = None
        rule = None if padding is None else self.rule(attention, padding)
        if padding is None or rule is not None:
            out = self.attend_memory(attention, x, memory, cache.parts.get("multihead_attn"), rule)
        return self.call("multihead_attn", layer, x, memory, padding, cache) if out is None else out

    def call(self, name: str, layer: Any, x: Tensor, memory: Tensor | None, padding: Any, cache: KVCache) -> Tensor:
        """Attention by its module."""
        if self.before is None:
            self.before = self.caches.state()
        x = x.view(self.shape)
        out: Tensor = layer._attend(name, x, x if memory is None else memory, None, padding, False, cache)
        return out.reshape(-1, self.shape[2])

    def rule(self, attention: Any, padding: Any) -> Mask | None:
        """The memory's padding as a rule, made once for all layers; ``None`` where ``forward`` has to look closer."""
        first = slice(0, 2) if attention.batch_first else slice(1, None, -1)
        (batch, seqlen), (_, seqlen_k) = self.shape[first], self.memory.shape[first]
        sizes = (batch, seqlen, seqlen_k)
        if sizes not in self.rules:
            self.rules[sizes] = plain_mask(padding, None, False, sizes, self.device)
        return None if attention.skip_padding else self.rules[sizes]

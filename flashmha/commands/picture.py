"""Picture: a mask of any size, for the eye."""

from __future__ import annotations

import dataclasses
import math

import torch

from ..problem.masks import Dense, Mask
from ..problem.spec import AttentionSpec

MOST_QUERIES, MOST_KEYS, MOST_ITEMS = 24, 36, 3
"""The most that is drawn: queries in all, keys, and batch items where they differ."""


@dataclasses.dataclass(frozen=True)
class Picture:
    """A mask for the eye: one query and one key out of ``step`` are drawn, for some batch items."""

    step: int
    items: list[list[str]]

    @classmethod
    def of(cls, spec: AttentionSpec, mask: Mask) -> Picture:
        tensors = mask.tensors()
        device = tensors[0].device if tensors else torch.device("cpu")  # a problem on paper is on no device at all
        differ = mask.features & {"key_lengths", "key_padding"}
        many = min(spec.batch, MOST_ITEMS if differ else 1)
        step = max(1, math.ceil(spec.seqlen_q * many / MOST_QUERIES), math.ceil(spec.seqlen_k / MOST_KEYS))
        queries = torch.arange(0, spec.seqlen_q, step, device=device)
        keys = torch.arange(0, spec.seqlen_k, step, device=device)
        rule = mask.mask_mod(spec.seqlen_q, spec.seqlen_k)
        head = torch.zeros((), dtype=torch.int64, device=device)
        items = []
        for item in range(many):
            seen = rule(head + item, head, queries[:, None], keys[None, :]).expand(len(queries), len(keys))
            items.append(Dense(seen).picture(len(queries), len(keys)).splitlines())
        return cls(step, items)

    def __str__(self) -> str:
        parts = [] if self.step == 1 else [f"one query and one key in {self.step}:"]
        for number, lines in enumerate(self.items):
            parts += [f"batch item {number}:"] if len(self.items) > 1 else []
            parts += [f"  {line}" for line in lines]
        return "\n".join(parts)

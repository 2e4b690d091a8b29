"""Biases by the distance of a key from a query, as modules: ALiBi and T5's buckets."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..problem.scores import ALiBi, Bias, RelativeBias
from ..problem.sizes import check_sizes


class Derived(nn.Module):
    """A module with a buffer that follows from its sizes: in no state_dict, and made again wherever the module goes.

    So ``to_empty`` leaves no garbage in it, and ``half`` rounds nothing.
    """

    def derive(self) -> None:
        """Fill in the buffer, where it lies."""
        raise NotImplementedError

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.derive()
        return self


class AlibiBias(Derived):
    """``-slope[h] * |q_pos - k_pos|``, with the slopes of ``ALiBi.usual``, which may be learned from there.

    A layer's ``position_bias``; ``forward(q, k)`` gives the ``ALiBi``, in float32 at least, as kernels take it.

    Args:
        num_heads: heads of the queries.
        learned: make ``slopes`` (num_heads,) a parameter; else it is a buffer outside the state_dict.
        device, dtype: as in PyTorch's own modules.
    """

    slopes: Tensor

    def __init__(
        self,
        num_heads: int,
        learned: bool = False,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes(num_heads=num_heads)
        self.num_heads, self.learned = num_heads, learned
        slopes = ALiBi.usual(num_heads, device=device, dtype=dtype or torch.get_default_dtype()).slopes
        if learned:
            self.slopes = nn.Parameter(slopes)
        else:
            self.register_buffer("slopes", slopes, persistent=False)
        self.derive()

    def reset_parameters(self) -> None:
        """Go back to the usual slopes."""
        with torch.no_grad():
            self.slopes.copy_(ALiBi.usual(self.num_heads, dtype=torch.float64).slopes)

    def derive(self) -> None:
        if not self.learned:
            dtype = torch.promote_types(self.slopes.dtype, torch.float32)
            self.slopes = ALiBi.usual(self.num_heads, device=self.slopes.device, dtype=dtype).slopes

    def forward(self, q: Tensor, k: Tensor) -> Bias:
        return ALiBi(self.slopes.to(torch.promote_types(self.slopes.dtype, torch.float32)))

    def extra_repr(self) -> str:
        return f"{self.num_heads}{', learned=True' if self.learned else ''}"


class RelativePositionBias(Derived):
    """T5's learned bias: one number for each head and bucket of distances.

    Near distances have a bucket each, farther ones share buckets that widen with the logarithm, and one bucket holds
    all from ``max_distance`` on. A layer's ``position_bias``; ``forward(q, k)`` gives a ``RelativeBias``. One module
    handed to several layers is shared by them, as in T5. T5 scales no scores: its layers have ``softmax_scale=1.0``.
    Its ``relative_attention_bias`` has the same state_dict.

    Source: Raffel and others, "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer"
    (2020).

    Args:
        num_heads: heads of the queries.
        num_buckets: how many numbers a head learns.
        max_distance: the distance from which on all are one.
        bidirectional: tell keys behind a query from those before it, each with half of the buckets; without it they
            count as distance 0, as a causal mask beside it would hide them.
        device, dtype: as in PyTorch's own modules.
    """

    buckets: Tensor

    def __init__(
        self,
        num_heads: int,
        num_buckets: int = 32,
        max_distance: int = 128,
        bidirectional: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes(num_heads=num_heads, num_buckets=num_buckets, max_distance=max_distance)
        exact = num_buckets // (4 if bidirectional else 2)
        if exact < 1:
            least = "4 where bidirectional" if bidirectional else "2"
            raise ValueError(f"num_buckets must be at least {least}, got {num_buckets}.")
        if max_distance <= exact:
            raise ValueError(
                f"max_distance must be more than {exact}, as many distances as have a bucket of their own with "
                f"num_buckets={num_buckets}, got {max_distance}."
            )
        self.num_heads, self.num_buckets = num_heads, num_buckets
        self.max_distance, self.bidirectional = max_distance, bidirectional
        self.weight = nn.Parameter(torch.empty(num_buckets, num_heads, device=device, dtype=dtype))
        self.register_buffer("buckets", torch.empty(0, device=device, dtype=torch.long), persistent=False)
        self.derive()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the numbers anew: normal, of standard deviation 0.02."""
        nn.init.normal_(self.weight, std=0.02)

    def derive(self) -> None:
        found = find_buckets(self.num_buckets, self.max_distance, self.bidirectional)
        self.buckets = found.to(self.buckets.device)

    def forward(self, q: Tensor, k: Tensor) -> Bias:
        return RelativeBias(F.embedding(self.buckets, self.weight).t())

    def extra_repr(self) -> str:
        return (
            f"{self.num_heads}, num_buckets={self.num_buckets}, max_distance={self.max_distance}, "
            f"bidirectional={self.bidirectional}"
        )


def find_buckets(num_buckets: int, max_distance: int, bidirectional: bool) -> Tensor:
    """The bucket of each distance ``k_pos - q_pos`` from ``-max_distance`` to ``max_distance``.

    In float32 on a CPU, as where the models were trained: the edge of a bucket may fall on a whole distance, where
    rounding decides.
    """
    distance = torch.arange(-max_distance, max_distance + 1, device="cpu")
    beside, start = num_buckets, torch.zeros_like(distance)
    if bidirectional:
        beside = num_buckets // 2
        start = (distance > 0) * beside
        distance = distance.abs()
    else:
        distance = (-distance).clamp(min=0)
    exact = beside // 2
    octaves = (distance.float() / exact).log() / math.log(max_distance / exact)
    far = exact + (octaves.clamp(min=0) * (beside - exact)).long()
    return start + torch.where(distance < exact, distance, far.clamp(max=beside - 1))

"""The ranking: which backend is asked first, by measurement.

A ``Table`` holds what was measured on one kind of machine, as rows. A row says which problems it is for, which
backends serve them fastest, and which file the figures are in. ``measured.TABLE`` comes with the package; ``flashmha
tune`` makes another one.
"""

from __future__ import annotations

import dataclasses
import itertools

import torch

from ...host.machine import HERE, Machine
from ...problem.spec import AttentionSpec

KINDS = ("dense", "causal", "padded", "padded causal", "window", "documents", "decode", "cached", "mask tensor")
"""Kinds of problems that are measured; nothing is known about the others."""
MODES = ("eval", "train")
"""The forward alone, and the forward with its backward."""

DECODE_QUERIES, DECODE_KEYS = 8, 512
"""The most queries and the fewest keys of ``decode``; ``cached`` has as few queries, and any number of keys."""
UNMEASURED = frozenset(
    "cache rule bias bias_grad alibi softcap sinks dropout head_dim_v deterministic".split()  # noqa: SIM905
)
NO_STEP = frozenset(("backward", "dropout", "key_padding", "documents", "dense_mask"))
"""What no call over a cache has, but for the mask of its own tokens."""
MARGIN = 0.03
"""Two backends whose times differ by less, or by no more than chance, are as fast as one another (see ``beaten``)."""
WORTH = 1e11
"""Operations of a forward from which a kernel is worth seconds of compiling: a fifth of a millisecond on an H200, so
that a tenth of it, in every layer and step, brings the seconds back within an epoch."""
LAST = "naive"
"""The definition, against which answers are held."""


@dataclasses.dataclass(frozen=True)
class Row:
    """A measurement for some problems.

    Attributes:
        kinds, modes: out of ``KINDS`` and ``MODES``.
        order: names of backends, fastest first.
        source: the file the figures are in.
        head_dim: the largest, ``None`` for any.
        keys: the most keys of a query (see ``keys``), ``None`` for any number.
    """

    kinds: tuple[str, ...]
    modes: tuple[str, ...]
    order: tuple[str, ...]
    source: str
    head_dim: int | None = None
    keys: int | None = None

    def covers(self, head_dim: int, keys: int) -> bool:
        """The sizes are within its bounds."""
        if self.head_dim is not None and head_dim > self.head_dim:
            return False
        return self.keys is None or keys <= self.keys


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows for one kind of machine; the first that covers a problem counts.

    Attributes:
        name: what a user knows it by.
        device: a device type.
        dtypes: what the rows are for.
        capability: the CUDA compute capability (major version) they are for, ``None`` for any.
        gpu: the name of the GPU they are for, ``None`` for any.
    """

    name: str
    device: str
    dtypes: tuple[torch.dtype, ...]
    rows: tuple[Row, ...]
    capability: int | None = None
    gpu: str | None = None
    places: dict[tuple[str, str], tuple[Row, ...]] = dataclasses.field(init=False, repr=False)
    """(kind, mode) -> rows."""

    def __post_init__(self) -> None:
        places: dict[tuple[str, str], tuple[Row, ...]] = {}
        for row in self.rows:
            for place in itertools.product(row.kinds, row.modes):
                places[place] = (*places.get(place, ()), row)
        object.__setattr__(self, "places", places)

    def applies(self, device: str, index: int | None, dtype: torch.dtype | None, machine: Machine = HERE) -> bool:
        """It was measured on such a device, in this dtype (``None``: whichever it is)."""
        if device != self.device or (dtype is not None and dtype not in self.dtypes):
            return False
        if self.capability is None and self.gpu is None:
            return True
        name, major = machine.graphics(index)
        return self.capability in (None, major) and self.gpu in (None, name)


def is_step(spec: AttentionSpec) -> bool:
    """A step of inference: few queries over keys whose lengths or positions a cache says."""
    features = spec.features
    if features.isdisjoint(("key_lengths", "cache", "pages")) or features & NO_STEP:
        return False
    return spec.seqlen_q <= DECODE_QUERIES


def kind(spec: AttentionSpec) -> str:
    """Which of ``KINDS`` a problem is, ``other`` for none of them. Pure."""
    features = spec.features
    if is_step(spec):
        return "other" if features & (UNMEASURED - {"cache"}) else "cached"
    if features & UNMEASURED:
        return "other"
    padded = bool(features & {"key_padding", "key_lengths"})
    decodes = not spec.needs_grad and spec.seqlen_k >= DECODE_KEYS and spec.seqlen_q <= DECODE_QUERIES
    if "dense_mask" in features:
        return "other" if decodes else "mask tensor"
    if "documents" in features:
        return "other" if padded or "window" in features else "documents"
    if decodes:
        return "decode"
    if padded:
        return "padded causal" if features & {"causal", "window"} else "padded"
    if "window" in features:
        return "window"
    return "causal" if "causal" in features else "dense"


def mode(spec: AttentionSpec) -> str:
    """Which of ``MODES`` a problem is in."""
    return "train" if spec.needs_grad else "eval"


def keys(spec: AttentionSpec) -> int:
    """The number of keys that a query may meet: those of the longest document where that is known, else all."""
    documents = spec.documents
    return spec.seqlen_k if documents is None or documents.max_seqlen_k is None else documents.max_seqlen_k


def work(spec: AttentionSpec) -> float:
    """Operations of a forward, half of them where the mask is causal; windows and padding count as if all were seen."""
    whole = 4.0 * spec.batch * spec.heads * spec.seqlen_q * keys(spec) * spec.head_dim
    return whole / 2 if "causal" in spec.features else whole


PLACE = ("kind", "mode", "head_dim", "keys")
"""Fields that tell one cell from another."""

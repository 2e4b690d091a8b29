"""The ranking: who is asked first, by measurement.

A ``Table`` holds what was measured on one kind of machine, as rows. A row says which problems it is for, who serves
them fastest, and which file the figures are in. ``TABLE`` comes with the package; ``flashmha tune`` makes another one.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from ...host.machine import graphics
from ...problem.masks import Documents, find
from ...problem.spec import AttentionSpec
from ..base import HALF
from . import registry

KINDS = ("dense", "causal", "padded", "padded causal", "window", "documents", "decode", "mask tensor")
"""Kinds of problems that are measured; nothing is known about the others."""
MODES = ("eval", "train")
"""The forward alone, and the forward with its backward."""

FEW, MANY = 8, 512
"""The most queries and the fewest keys of ``decode``."""
UNMEASURED = frozenset(
    "rule bias bias_grad alibi softcap sinks dropout head_dim_v deterministic".split()  # noqa: SIM905
)
MARGIN = 0.03
"""Two backends whose times differ by less, or by no more than chance, are as fast as one another (see ``beaten``)."""
WORTH = 1e11
"""Operations of a forward from which a kernel is worth seconds of compiling: a fifth of a millisecond on an H200, so
that a tenth of it, in every layer and step, brings the seconds back within an epoch."""
LAST = "naive"
"""The definition, against which answers are held."""


@dataclasses.dataclass(frozen=True)
class Row:
    """What was measured for some problems.

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

    def applies(self, device: str, index: int | None, dtype: torch.dtype | None) -> bool:
        """It was measured on such a device, in this dtype (``None``: whichever it is)."""
        if device != self.device or (dtype is not None and dtype not in self.dtypes):
            return False
        if self.capability is None and self.gpu is None:
            return True
        name, major = graphics(index)
        return self.capability in (None, major) and self.gpu in (None, name)


def kind(spec: AttentionSpec) -> str:
    """Which of ``KINDS`` a problem is, ``other`` for none of them. Pure."""
    features = spec.features
    if features & UNMEASURED:
        return "other"
    padded = bool(features & {"key_padding", "key_lengths"})
    decodes = not spec.needs_grad and spec.seqlen_k >= MANY and spec.seqlen_q <= FEW
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
    """How many keys a query may meet: those of the longest document where that is known, else all."""
    documents = find(spec.mask, Documents)
    return spec.seqlen_k if documents is None or documents.max_seqlen_k is None else documents.max_seqlen_k


def work(spec: AttentionSpec) -> float:
    """Operations of a forward, half of them where the mask is causal; windows and padding count as if all were seen."""
    whole = 4.0 * spec.batch * spec.heads * spec.seqlen_q * keys(spec) * spec.head_dim
    return whole / 2 if "causal" in spec.features else whole


def derive(cells: Iterable[dict[str, Any]], source: str) -> tuple[Row, ...]:
    """The rows of what ``flashmha tune`` measured, as few as say the same within ``MARGIN``.

    A cell has its ``kind``, ``mode``, ``head_dim``, ``keys``, the microseconds ``us`` of each backend, in the order of
    the list, and the ``spread`` of those: half the middle half of the rounds, as a share of the time. A size between
    two that were measured counts as the larger; beyond the largest, as the largest.
    """
    places: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for cell in combined(cells):
        places.setdefault((cell["kind"], cell["mode"]), []).append(cell)
    groups: list[Group] = [((kind,), (mode,), those) for (kind, mode), those in places.items()]
    for axis in (0, 1):
        groups = list(pooled(groups, axis))
    return tuple(row for kinds, modes, those in groups for row in by_head_dim(kinds, modes, those, source))


def combined(cells: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """One cell a place: where several were measured there, as with one query and with eight, the mean of each time, and
    the largest of each spread."""
    places: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for cell in cells:
        places.setdefault(tuple(cell[name] for name in PLACE), []).append(cell)
    found = []
    for those in places.values():
        names = dict.fromkeys(name for cell in those for name in cell["us"])
        times = {name: [cell["us"][name] for cell in those if name in cell["us"]] for name in names}
        means = {name: statistics.geometric_mean(each) for name, each in times.items()}
        spread = {name: max(cell.get("spread", {}).get(name, 0.0) for cell in those) for name in names}
        found.append({**those[0], "us": means, "spread": spread})
    return found


PLACE = ("kind", "mode", "head_dim", "keys")
"""What tells one cell from another."""
Group = tuple[tuple[str, ...], tuple[str, ...], list[dict[str, Any]]]
"""Kinds, modes and their cells."""


def pooled(groups: Sequence[Group], axis: int) -> Iterator[Group]:
    """Groups joined along kinds (0) or modes (1), where that needs no more rows."""
    joined: list[Group] = []
    for group in groups:
        for place, other in enumerate(joined):
            together = join(other, group, axis)
            if together is not None:
                joined[place] = together
                break
        else:
            joined.append(group)
    return iter(joined)


def join(one: Group, two: Group, axis: int) -> Group | None:
    """Two groups as one, ``None`` where they have to stay two."""
    cells = [*one[2], *two[2]]
    if one[1 - axis] != two[1 - axis]:
        return None
    few = max(len(by_head_dim(*group, "")) for group in (one, two))
    both = tuple(dict.fromkeys((*one[axis], *two[axis])))
    kinds, modes = (both, one[1]) if axis == 0 else (one[0], both)
    try:
        together = by_head_dim(kinds, modes, cells, "")
    except Disagreement:
        return None
    return (kinds, modes, cells) if len(together) <= few else None


class Disagreement(Exception):
    """Cells of one size that no order suits."""


def by_head_dim(
    kinds: tuple[str, ...], modes: tuple[str, ...], cells: Sequence[dict[str, Any]], source: str
) -> list[Row]:
    """Rows of one group: head dims share theirs where that needs no more of them."""
    parts: list[tuple[int, list[dict[str, Any]], list[tuple[int, tuple[str, ...]]]]] = []
    for size in sorted({cell["head_dim"] for cell in cells}):
        those = [cell for cell in cells if cell["head_dim"] == size]
        steps = by_keys(those)
        if parts:
            _, before, few = parts[-1]
            try:
                together = by_keys([*before, *those])
            except Disagreement:
                together = None
            if together is not None and len(together) <= max(len(few), len(steps)):
                parts[-1] = (size, [*before, *those], together)
                continue
        parts.append((size, those, steps))
    rows = []
    for size, _, steps in parts:
        bound = None if size == parts[-1][0] else size
        rows += [
            Row(kinds, modes, order, source, bound, None if many == steps[-1][0] else many) for many, order in steps
        ]
    return rows


def by_keys(cells: Sequence[dict[str, Any]]) -> list[tuple[int, tuple[str, ...]]]:
    """The order up to each number of keys at which it changes."""
    steps: list[tuple[int, tuple[str, ...]]] = []
    since: list[dict[str, Any]] = []
    for many in sorted({cell["keys"] for cell in cells}):
        those = [cell for cell in cells if cell["keys"] == many]
        alone = agreed(those)
        if alone is None:
            raise Disagreement
        together = agreed([*since, *those]) if steps else None
        if together is not None:
            since += those
            steps[-1] = (many, together)
        else:
            since = list(those)
            steps.append((many, alone))
    return steps


def agreed(cells: Sequence[dict[str, Any]]) -> tuple[str, ...] | None:
    """One order for some cells: none stands in front of another that beats it in one of them.

    Where the times leave a choice the order of the list stays; ``None`` where they leave none.
    """
    left = list(dict.fromkeys(name for cell in cells for name in cell["us"] if is_ranked(name)))
    order: list[str] = []
    while left:
        for name in left:
            if not any(beaten(name, other, cell) for other in left for cell in cells):
                break
        else:
            return None
        order.append(name)
        left.remove(name)
    return tuple(order)


def is_ranked(name: str) -> bool:
    """A name of a table is ranked: not that of a backend which holds every score."""
    return name not in registry.entries or not registry.entries[name].holds_scores


def beaten(name: str, other: str, cell: dict[str, Any]) -> bool:
    """One is slower than another by more than ``MARGIN``, and by more than chance: the middle halves lie apart."""
    times, spread = cell["us"], cell.get("spread", {})
    if name not in times or other not in times:
        return False
    fast, slow = times[other] * (1 + spread.get(other, 0.0)), times[name] * (1 - spread.get(name, 0.0))
    return bool(slow > fast * (1 + MARGIN))


SOURCE = "benchmarks/results/ranking_h100.json"
MASKS = "benchmarks/results/ranking_masks_h200.json"
PACKED = "benchmarks/results/ranking_documents_h200.json"
WIDE = "benchmarks/results/ranking_192_h200.json"
BOTH = ("eval", "train")
PLAIN = ("dense", "causal")
EVAL, TRAIN = ("eval",), ("train",)

TABLE = Table(
    name=f"built in, of {SOURCE} and those beside it",
    device="cuda",
    dtypes=HALF,
    capability=9,
    rows=(
        # cuDNN, behind sdpa, where there is little to do for each key
        Row(("decode",), EVAL, ("sdpa", "flash2", "flash3", "flash4"), SOURCE, keys=8192),
        Row(("decode",), EVAL, ("flash2", "flash3", "flash4", "sdpa"), SOURCE),
        Row(PLAIN, EVAL, ("sdpa", "flash3", "flash4", "flash2"), SOURCE, keys=1024),
        Row(PLAIN, EVAL, ("flash3", "flash4", "sdpa", "flash2"), SOURCE),
        Row(PLAIN, TRAIN, ("sdpa", "flash4", "flash3", "flash2"), SOURCE, head_dim=64, keys=512),
        Row(PLAIN, TRAIN, ("flash4", "flash3", "sdpa", "flash2"), SOURCE, head_dim=64),
        Row(PLAIN, TRAIN, ("sdpa", "flash4", "flash3", "flash2"), SOURCE, head_dim=128, keys=1024),
        Row(PLAIN, TRAIN, ("flash4", "flash3", "sdpa", "flash2"), SOURCE, head_dim=128),
        Row(("causal",), TRAIN, ("sdpa", "flash4"), WIDE, head_dim=192, keys=1024),
        Row(PLAIN, TRAIN, ("flash4", "sdpa"), WIDE, head_dim=192),
        Row(PLAIN, TRAIN, ("sdpa", "flash4", "flash3", "flash2"), SOURCE),
        Row(("padded",), EVAL, ("flash4", "flash3", "sdpa", "flash2"), MASKS),
        Row(("padded",), TRAIN, ("flash4", "sdpa", "flash3", "flash2"), MASKS),
        Row(("mask tensor",), BOTH, ("flash4", "sdpa", "flex"), MASKS),
        Row(("window",), TRAIN, ("flash4", "flash2", "flash3", "flex", "sdpa"), SOURCE, head_dim=64),
        Row(("window",), TRAIN, ("flash2", "flash4", "flash3", "flex", "sdpa"), SOURCE, head_dim=128),
        Row(("documents",), EVAL, ("flash3", "flash4", "sdpa", "flash2", "flex"), PACKED),
        Row(("documents",), TRAIN, ("flash4", "sdpa", "flash2", "flex"), PACKED, head_dim=64),
        Row(("documents",), TRAIN, ("sdpa", "flash4", "flash2", "flex"), PACKED, keys=1024),
        Row(("documents",), TRAIN, ("flash4", "sdpa", "flash2", "flex"), PACKED),
        Row(("padded causal", "window"), BOTH, ("flash4", "flash3", "flash2", "flex", "sdpa"), SOURCE),
    ),
)
"""The machines this package was measured on: Hopper, in half precision."""
SLACK = 0.2
"""How much slower than the fastest the first of a row may be in a cell it covers. ``MARGIN`` would make 45 rows, and
most of them would tell the noise of one run from that of the next."""

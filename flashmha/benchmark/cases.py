"""The cases: what is computed, at which shape, in which pass."""

from __future__ import annotations

import dataclasses
from fnmatch import fnmatchcase
from typing import Any

LEVELS = ("layer", "core")
"""``layer``: query to output, projections included. ``core``: q, k and v to out."""

PASSES = ("eval", "train")
"""``eval``: the forward in inference mode. ``train``: forward and backward to the inputs and all parameters."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One attention to time.

    Attributes:
        suite: the question the case belongs to, see ``SUITES``.
        level, mode: out of ``LEVELS`` and ``PASSES``.
        batch, seqlen_q, seqlen_k, embed_dim, heads, heads_kv: sizes; ``seqlen_q != seqlen_k`` is cross-attention.
        dtype: its name in torch.
        causal: each query sees the keys up to its own place, which stock is told by a bool mask.
        lengths: the real tokens of every sequence; the rest is padding on the right, told by a bool mask.
        weights: the averaged attention weights are read.
        headline: the README shows the case, and it runs before those that a short budget may drop.
    """

    suite: str
    level: str
    mode: str
    batch: int
    seqlen_q: int
    seqlen_k: int
    embed_dim: int
    heads: int
    heads_kv: int
    dtype: str = "float32"
    causal: bool = False
    lengths: tuple[int, ...] | None = None
    weights: bool = False
    headline: bool = False

    @property
    def id(self) -> str:
        """``suite/level/pass/shape``: the name that ``--case`` matches."""
        cross = self.seqlen_q != self.seqlen_k
        shape = f"b{self.batch}" + (f"q{self.seqlen_q}k{self.seqlen_k}" if cross else f"s{self.seqlen_k}")
        shape += f"e{self.embed_dim}h{self.heads}"
        if self.heads_kv != self.heads:
            shape += f"kv{self.heads_kv}"
        if self.lengths is not None:
            shape += f"f{round(100 * self.fill)}"
        if self.causal and self.suite != "causal":
            shape += "c"
        return f"{self.suite}/{self.level}/{self.mode}/{shape}"

    @property
    def words(self) -> str:
        """The case for a reader of the README, but for its dtype."""
        kinds = ["training" if self.mode == "train" else "eval"]
        kinds += ["causal"] * self.causal + ["weights read"] * self.weights
        if self.lengths is not None:
            kinds.append(f"padded, {self.fill:.0%} real")
        seqlens = str(self.seqlen_k) if self.seqlen_q == self.seqlen_k else f"{self.seqlen_q} on {self.seqlen_k}"
        return f"{', '.join(kinds)}: {self.batch} × {seqlens}, E{self.embed_dim} H{self.heads}"

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.heads

    @property
    def fill(self) -> float:
        """The share of real tokens."""
        return 1.0 if self.lengths is None else sum(self.lengths) / (self.batch * self.seqlen_k)

    @property
    def pairs(self) -> int:
        """How many pairs of a real query and a real key that it may look at, over the batch."""
        lengths = self.lengths or (self.seqlen_k,) * self.batch
        if self.seqlen_q != self.seqlen_k:
            return sum(self.seqlen_q * length for length in lengths)
        return sum(length * (length + 1) // 2 if self.causal else length * length for length in lengths)

    @property
    def flop(self) -> float:
        """Multiplications and additions that one call needs, none of them for padding or hidden pairs.

        Four for each pair, head and head_dim forward, and two and a half times as many backward, where the scores are
        computed again; a projection takes twice as many backward.
        """
        attention = 4 * self.embed_dim * self.pairs
        keys = sum(self.lengths) if self.lengths else self.batch * self.seqlen_k
        queries = keys if self.seqlen_q == self.seqlen_k else self.batch * self.seqlen_q
        projections = 4 * (queries + keys) * self.embed_dim**2 if self.level == "layer" else 0
        return float(3 * projections + 3.5 * attention if self.mode == "train" else projections + attention)

    @classmethod
    def of(cls, row: dict[str, Any]) -> Case:
        """A case back from JSON."""
        lengths = row["lengths"]
        return cls(**{**row, "lengths": None if lengths is None else tuple(lengths)})


SUITES = {
    "small": "short sequences and small layers, where the host's time shows",
    "dense": "no mask",
    "causal": "the causal mask, which stock's default call is handed as a tensor",
    "padded": "sequences of several lengths, padded on the right",
    "weights": "attention weights that are read",
    "cross": "keys and values of another length",
    "decode": "one or a few queries against many keys, grouped heads",
    "odd": "head dims and lengths that no kernel was made for",
    "overhead": "tiny tensors: the microseconds between a call and its kernel",
    "bfloat16": "a dtype the CPU may have no instructions for",
}


def make(suite: str, level: str, modes: str, shape: tuple[int, ...], **fields: Any) -> list[Case]:
    """One case a pass; ``shape`` is (batch, seqlen, embed_dim, heads), ``seqlen_q`` and ``heads_kv`` go by name."""
    batch, seqlen_k, embed_dim, heads = shape
    sizes = {"batch": batch, "seqlen_q": seqlen_k, "seqlen_k": seqlen_k, "embed_dim": embed_dim, "heads": heads}
    sizes["heads_kv"] = heads
    return [Case(suite=suite, level=level, mode=mode, **{**sizes, **fields}) for mode in modes.split()]


def evenly(batch: int, seqlen: int, fill: float) -> tuple[int, ...]:
    """Lengths in equal steps up to ``seqlen``, with this share of real tokens (at least one half)."""
    shortest, steps = 2 * fill - 1, max(batch - 1, 1)
    return tuple(round(seqlen * (1 - (1 - shortest) * place / steps)) for place in range(batch))


F41, F47 = (99, 256, 25, 160, 76, 42, 125, 57), (473, 1024, 127, 301)
"""Real tokens of 8 sequences of up to 256 and of 4 of up to 1024."""

CPU = [
    *make("small", "layer", "train eval", (1, 8, 64, 4), headline=True),
    *make("small", "layer", "train eval", (16, 197, 192, 3), headline=True),
    *make("small", "layer", "train eval", (8, 128, 512, 8)),
    *make("dense", "layer", "train eval", (4, 512, 512, 8), headline=True),
    *make("dense", "layer", "train eval", (2, 1024, 512, 8), headline=True),
    *make("dense", "layer", "train eval", (1, 2048, 512, 8), headline=True),
    *make("causal", "layer", "train eval", (1, 2048, 512, 8), causal=True, headline=True),
    *make("padded", "layer", "train eval", (8, 256, 512, 8), lengths=F41),
    *make("padded", "layer", "train", (8, 256, 512, 8), lengths=F41, causal=True),
    *make("padded", "layer", "train eval", (4, 1024, 512, 8), lengths=F47, headline=True),
    *make("padded", "layer", "train", (4, 1024, 512, 8), lengths=F47, causal=True, headline=True),
    *make("weights", "layer", "eval", (1, 512, 512, 8), weights=True),
    *make("weights", "layer", "train eval", (1, 1024, 512, 8), weights=True),
    *make("weights", "layer", "eval", (1, 2048, 512, 8), weights=True, headline=True),
    *make("cross", "layer", "train eval", (4, 512, 512, 8), seqlen_q=64),
    *make("overhead", "core", "eval", (1, 8, 64, 4), headline=True),
    *make("dense", "core", "train eval", (1, 512, 512, 8)),
    *make("dense", "core", "train eval", (1, 2048, 512, 8)),
    *make("causal", "core", "train eval", (1, 2048, 512, 8), causal=True),
    *make("padded", "core", "train", (4, 1024, 512, 8), lengths=F47),
    *make("decode", "core", "eval", (1, 4096, 512, 8), seqlen_q=1, heads_kv=2),
    *make("bfloat16", "layer", "train", (8, 128, 512, 8), dtype="bfloat16", headline=True),
    *make("bfloat16", "layer", "train", (2, 512, 512, 8), dtype="bfloat16"),
]

BIG = ((8, 2048, 2048, 16), (2, 8192, 2048, 16), (1, 16384, 2048, 32))
BOTH = ((32, 512, 1024, 16), *BIG)
PADDED = (((32, 512, 1024, 16), 0.59), ((8, 2048, 2048, 16), 0.62), ((4, 8192, 2048, 16), 0.75))
"""Shapes, and how much of them is real."""

CUDA = [
    dataclasses.replace(case, dtype="bfloat16")
    for case in (
        *(case for shape in BOTH for case in make("dense", "layer", "train eval", shape, headline=True)),
        *(case for shape in BOTH for case in make("causal", "layer", "train eval", shape, causal=True, headline=True)),
        *(
            case
            for shape, fill in PADDED
            for lengths in [evenly(*shape[:2], fill)]
            for case in make("padded", "layer", "train eval", shape, lengths=lengths, headline=True)
        ),
        *(
            case
            for shape, fill in PADDED[1:2]
            for lengths in [evenly(*shape[:2], fill)]
            for case in make("padded", "layer", "train eval", shape, lengths=lengths, causal=True, headline=True)
        ),
        *(
            case
            for shape in BIG[1:]
            for causal in (False, True)
            for case in make("weights", "layer", "train", shape, causal=causal, weights=True, headline=True)
        ),
        *make("small", "layer", "train eval", (8, 512, 512, 8), headline=True),
        *make("small", "layer", "train eval", (8, 128, 512, 8), headline=True),
        *make("small", "layer", "train eval", (16, 197, 192, 3), headline=True),
        *make("cross", "layer", "train eval", (8, 4096, 2048, 16), seqlen_q=512),
        *make("cross", "layer", "train eval", (8, 4096, 2048, 16), seqlen_q=64),
        *make("overhead", "core", "eval", (1, 8, 64, 4), headline=True),
        *(case for shape in BOTH for case in make("dense", "core", "train eval", shape)),
        *(case for shape in BOTH for case in make("causal", "core", "train eval", shape, causal=True)),
        *(
            case
            for seqlen_q in (1, 8)
            for batch, seqlen_k in ((4, 16384), (16, 16384), (4, 65536), (16, 65536))
            for case in make("decode", "core", "eval", (batch, seqlen_k, 4096, 32), seqlen_q=seqlen_q, heads_kv=8)
        ),
        *(
            case
            for width in (80, 96, 192, 256)
            for case in make("odd", "core", "train eval", (8, 2048, 16 * width, 16))
        ),
        *make("odd", "core", "train eval", (8, 577, 2048, 16)),
        *make("odd", "core", "train eval", (8, 1025, 2048, 16)),
    )
]


def every_case(device: str = "cpu") -> list[Case]:
    """Every case of a kind of device."""
    return list(CUDA if device == "cuda" else CPU)


def select(
    every: list[Case],
    suites: list[str] | None = None,
    globs: list[str] | None = None,
    levels: list[str] | None = None,
    modes: list[str] | None = None,
) -> list[Case]:
    """The cases that fit every wish; ``None`` wishes nothing.

    Raises:
        ValueError: nothing is left.
    """
    chosen = [
        case
        for case in every
        if (suites is None or case.suite in suites)
        and (levels is None or case.level in levels)
        and (modes is None or case.mode in modes)
        and (globs is None or any(fnmatchcase(case.id, glob) for glob in globs))
    ]
    if not chosen:
        raise ValueError(
            f"suites, levels, passes and case globs must leave a case, got {suites}, {levels}, {modes} and {globs}; "
            "--list shows the cases there are."
        )
    return chosen

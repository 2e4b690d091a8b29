"""The cases: what is computed, at which shape, in which pass."""

from __future__ import annotations

import dataclasses
from fnmatch import fnmatchcase
from typing import Any

LEVELS = ("layer", "core", "encoder", "decoder")
"""``layer``: query to output, projections included. ``core``: q, k and v to out. ``encoder``: layers of attention and
feed-forward, from the first input to the last output. ``decoder``: layers that look at a memory too, token by token."""

PASSES = ("eval", "train")
"""``eval``: the forward in inference mode. ``train``: forward and backward to the inputs and all parameters."""


HOW = ("eager", "compiled", "graph", "reduced")
"""How a contestant runs, and is compared with those that run alike. ``graph``: captured in a CUDA graph once, and
replayed. ``reduced``: compiled with ``mode="reduce-overhead"``, which makes CUDA graphs of its own."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One attention to time, one encoder, or one decoder that writes.

    Attributes:
        suite: the question the case belongs to, see ``SUITES``.
        level, mode: out of ``LEVELS`` and ``PASSES``.
        batch, seqlen_q, seqlen_k, embed_dim, heads, heads_kv: sizes; ``seqlen_q != seqlen_k`` is cross-attention. A
            decoder writes ``seqlen_q`` tokens, one after another, beside a memory of ``seqlen_k``.
        dtype: its name in torch.
        causal: each query sees the keys up to its own place, which stock is told by a bool mask.
        lengths: the real tokens of every sequence; the rest is padding on the right, told by a bool mask.
        holes: the padding lies anywhere among the real tokens instead.
        batch_first: query, key, value and output are (batch, seqlen, embed_dim), else (seqlen, batch, embed_dim).
        layers: of an encoder or a decoder, each with a feed-forward of four times ``embed_dim``; 0 at the other levels.
        autocast: the dtype of the autocast that an encoder's forward runs under.
        how: the way to run that the case is about, out of ``HOW``.
        weights: the averaged attention weights are read.
        headline: the README and the site show the case, and it runs before those that a short budget may drop.
        bias: the projections have biases, as stock's do by default.
        rotary: queries and keys of a layer turn by their positions, which all its features take part in.
        qk_norm: ``"rms"`` or ``"layer"``: heads of queries and keys are normalised first.
        window: how many keys a query of a causal case sees, its own the last of them; at level core.
        target: how many times as fast as its yardstick ours has to be: as itself without rotary, norms and window, or
            where it has none of them as the layer written by hand.
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
    holes: bool = False
    batch_first: bool = True
    layers: int = 0
    autocast: str | None = None
    how: str = "eager"
    headline: bool = False
    bias: bool = True
    rotary: bool = False
    qk_norm: str | None = None
    window: int | None = None
    target: float | None = None

    @property
    def id(self) -> str:
        """``suite/level/pass/shape``: the name that ``--case`` matches."""
        cross = self.seqlen_q != self.seqlen_k
        shape = f"n{self.layers}" if self.layers else ""
        shape += f"b{self.batch}" + (f"q{self.seqlen_q}k{self.seqlen_k}" if cross else f"s{self.seqlen_k}")
        shape += f"e{self.embed_dim}h{self.heads}"
        if self.heads_kv != self.heads:
            shape += f"kv{self.heads_kv}"
        if self.lengths is not None:
            shape += f"f{round(100 * self.fill)}"
        if self.causal and self.suite != "causal":
            shape += "c"
        kinds = [kind for kind in ("holes", "autocast") if getattr(self, kind)]
        kinds += ["seqfirst"] * (not self.batch_first and self.suite != "seqfirst")
        kinds += ["reduced"] * (self.how == "reduced") + ["rotary"] * self.rotary
        kinds += [self.qk_norm] if self.qk_norm else []
        kinds += [f"window{self.window}"] if self.window else []
        return f"{self.suite}/{self.level}/{self.mode}/{'-'.join([shape, *kinds])}"

    @property
    def words(self) -> str:
        """The case for a reader, but for its dtype."""
        kinds = ["training" if self.mode == "train" else "eval"]
        kinds += ["causal"] * self.causal + ["weights read"] * self.weights
        if self.lengths is not None:
            kinds.append(f"padded, {self.fill:.0%} real{' with holes' * self.holes}")
        kinds += ["`batch_first=False`"] * (not self.batch_first) + ["autocast"] * (self.autocast is not None)
        kinds += [f"{self.layers} layers"] * (self.layers > 0) + ["rotary"] * self.rotary
        kinds += [f"qk_norm {self.qk_norm}"] if self.qk_norm else []
        kinds += [f"window {self.window}"] if self.window else []
        seqlens = str(self.seqlen_k) if self.seqlen_q == self.seqlen_k else f"{self.seqlen_q} on {self.seqlen_k}"
        if self.level == "decoder":
            seqlens = f"{self.seqlen_q} tokens beside {self.seqlen_k}"
        shared = f" on {self.heads_kv}" if self.heads_kv != self.heads else ""
        return f"{', '.join(kinds)}: {self.batch} × {seqlens}, E{self.embed_dim} H{self.heads}{shared}"

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.heads

    @property
    def bare(self) -> Case:
        """The same without rotary, norms and window."""
        return dataclasses.replace(self, rotary=False, qk_norm=None, window=None)

    @property
    def yardstick(self) -> str:
        """The contestant that ``target`` is about."""
        if self == self.bare:
            return "linear_sdpa"
        return "attention_without" if self.level == "core" else "flashmha_without"

    @property
    def own_heads(self) -> bool:
        """It is about a layer that stock cannot be."""
        return self.level == "layer" and (self.rotary or self.qk_norm is not None or self.heads_kv != self.heads)

    @property
    def fill(self) -> float:
        """The share of real tokens."""
        return 1.0 if self.lengths is None else sum(self.lengths) / (self.batch * self.seqlen_k)

    @property
    def pairs(self) -> int:
        """The number of pairs of a real query and a real key that it may look at, over the batch."""
        lengths = self.lengths or (self.seqlen_k,) * self.batch
        if self.level == "decoder":  # of the text and, beside it, of the memory
            return self.batch * (self.seqlen_q * (self.seqlen_q + 1) // 2 + self.seqlen_q * self.seqlen_k)
        if self.seqlen_q != self.seqlen_k:
            return sum(self.seqlen_q * length for length in lengths)
        if not self.causal:
            return sum(length * length for length in lengths)
        beyond = [max(0, length - self.window) if self.window else 0 for length in lengths]
        return sum((n * (n + 1) - far * (far + 1)) // 2 for n, far in zip(lengths, beyond))

    @property
    def flop(self) -> float:
        """Multiplications and additions that one call needs, none of them for padding or hidden pairs.

        Four for each pair, head and head_dim forward, and two and a half times as many backward, where the scores are
        computed again; a projection takes twice as many backward.
        """
        attention = 4 * self.embed_dim * self.pairs
        if self.level == "decoder":
            tokens, memory = self.batch * self.seqlen_q, self.batch * self.seqlen_k
            return float(self.layers * (attention + 2 * self.embed_dim**2 * (14 * tokens + 2 * memory)))
        keys = sum(self.lengths) if self.lengths else self.batch * self.seqlen_k
        queries = keys if self.seqlen_q == self.seqlen_k else self.batch * self.seqlen_q
        wide = self.embed_dim * self.head_dim
        projections = 4 * (queries * self.heads + keys * self.heads_kv) * wide if self.level != "core" else 0
        if self.layers:  # two more matrices of 4 x embed_dim rows, and all of it once a layer
            projections, attention = 3 * projections * self.layers, attention * self.layers
        return float(3 * projections + 3.5 * attention if self.mode == "train" else projections + attention)

    @classmethod
    def of(cls, row: dict[str, Any]) -> Case:
        """A case back from JSON."""
        lengths = row["lengths"]
        return cls(**{**row, "lengths": None if lengths is None else tuple(lengths)})


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
    near = [
        case
        for case in every
        if (suites is None or case.suite in suites)
        and (levels is None or case.level in levels)
        and (modes is None or case.mode in modes)
    ]
    chosen = [case for case in near if globs is None or any(fnmatchcase(case.id, glob) for glob in globs)]
    if not chosen:
        asked = {"suites": suites, "case globs": globs, "levels": levels, "passes": modes}
        got = "; ".join(f"{name} {', '.join(wanted)}" for name, wanted in asked.items() if wanted is not None)
        there_are = ", ".join(case.id for case in near or every)
        raise ValueError(f"suites, case globs, levels and passes must leave a case, got {got}; there are {there_are}.")
    return chosen

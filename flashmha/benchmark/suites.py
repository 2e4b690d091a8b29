"""The suites: which cases there are on a CPU and on a GPU."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from .cases import Case

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
    "seqfirst": "batch_first=False, stock's default: self- and cross-attention, padded and not",
    "model": "whole encoders, most of them padded",
    "compiled": "whole encoders through torch.compile",
    "heads": "rotary, norms of heads, grouped heads and a window: what they cost, and beside other libraries",
    "generate": "decoders that write token by token, and one query over the keys of a cache",
}

ON_REQUEST = {"model": "encoder", "compiled": "encoder", "heads": None, "generate": "decoder"}
"""Suites that run where they or a case of theirs are named, or the level that only they have: they take long."""


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


def lengths_of(batch: int, seqlen: int, fill: float, seed: int = 0) -> tuple[int, ...]:
    """Drawn lengths up to ``seqlen`` with this share of real tokens, none of them 0."""
    generator = torch.Generator("cpu").manual_seed(seed)
    drawn = torch.rand(batch, generator=generator, dtype=torch.float64, device="cpu")
    drawn[drawn.argmax()] = 1.0  # one sequence is full: nothing could be cut off all of them
    few, many = 0.0, 100.0
    lengths = drawn
    for _ in range(60):  # the higher the power, the shorter
        power = (few + many) / 2
        lengths = (seqlen * drawn**power).round().clamp(min=1)
        few, many = (power, many) if lengths.sum() > fill * batch * seqlen else (few, power)
    return tuple(lengths.long().tolist())


def encoder_cases(
    modes: str, layers: int, shape: tuple[int, ...], fill: float | None = None, **fields: Any
) -> list[Case]:
    """Encoders of one kind; ``fill`` is the share of real tokens."""
    lengths = None if fill is None else lengths_of(shape[0], shape[1], fill)
    fields = {"suite": "compiled" if "how" in fields else "model", "level": "encoder", "lengths": lengths, **fields}
    return make(modes=modes, shape=shape, layers=layers, **fields)


TINY_SELF, TINY_CROSS = (4, 16, 64, 4), (4, 40, 64, 4)
"""The smallest layers that are padded: self-attention, and cross-attention of 10 queries."""


def smallest(modes: str) -> list[Case]:
    """Small padded layers, where what a mask costs the host shows."""
    one, two = (lengths_of(*shape[:2], 0.7) for shape in (TINY_SELF, TINY_CROSS))
    cross = make("small", "layer", modes, TINY_CROSS, lengths=two, seqlen_q=10)
    return make("small", "layer", modes, TINY_SELF, lengths=one) + cross


def seqfirst(modes: str) -> list[Case]:
    """Layers with the sequence first: the smallest, and those of a detector of objects, 100 queries or all."""
    wide = (2, 850, 256, 8)
    cases = []
    for padded in (False, True):
        for shape, queries in ((TINY_SELF, 16), (TINY_CROSS, 10), (wide, 850), (wide, 100)):
            lengths = lengths_of(*shape[:2], 0.7) if padded else None
            told = {"lengths": lengths, "batch_first": False, "headline": padded and queries < 850}
            cases += make("seqfirst", "layer", modes, shape, seqlen_q=queries, **told)
    return cases


def generate_cases(device: str) -> list[Case]:
    """Six layers that write 256 tokens, for one row and for many; on a CPU one query over 4096 keys."""
    dtype = "bfloat16" if device == "cuda" else "float32"
    told = {"layers": 6, "seqlen_q": 256, "headline": True, "dtype": dtype}
    cases = [case for batch in (1, 32) for case in make("generate", "decoder", "eval", (batch, 512, 512, 8), **told)]
    if device == "cuda":
        return cases
    for batch in (1, 8):
        cases += make("generate", "core", "eval", (batch, 4096, 512, 8), seqlen_q=1, headline=True)
        cases += make("generate", "core", "eval", (batch, 4096, 4096, 32), seqlen_q=1, heads_kv=8, headline=True)
    return cases


FORWARD, STEP, NARROW = 1 / 1.08, 1 / 1.05, 8.0
"""Targets: rotary or a norm takes at most 8% of a forward and 5% of a training step, a window of 512 makes attention on
32768 tokens 8 times as fast."""


def heads_cases(shape: tuple[int, ...], heads_kv: int, **fields: Any) -> list[Case]:
    """Layers of one shape with each option, and with all that a language model has."""
    fields = {"bias": False, "headline": True, **fields}
    options: list[dict[str, Any]] = [{"rotary": True}, {"qk_norm": "rms"}, {"qk_norm": "layer"}]
    options.append({"rotary": True, "qk_norm": "rms"})
    cases: list[Case] = []
    for each in options:
        for mode, target in (("train", STEP), ("eval", FORWARD)):
            cases += make("heads", "layer", mode, shape, target=target, **each, **fields)
    cases += make("heads", "layer", "train eval", shape, heads_kv=heads_kv, target=1.0, **fields)
    everything = {"rotary": True, "qk_norm": "rms", "causal": True, "heads_kv": heads_kv}
    return cases + make("heads", "layer", "train eval", shape, **everything, **fields)


def window_cases(shape: tuple[int, ...], **fields: Any) -> list[Case]:
    """The core with a window of 512 keys."""
    fields |= {"window": 512, "causal": True, "bias": False, "headline": True}
    return make("heads", "core", "train eval", shape, target=NARROW if shape[1] >= 32768 else None, **fields)


F41, F47 = (99, 256, 25, 160, 76, 42, 125, 57), (473, 1024, 127, 301)
"""Real tokens of 8 sequences of up to 256 and of 4 of up to 1024."""

CPU_CASES = [
    *make("small", "layer", "train eval", (1, 8, 64, 4), headline=True),
    *make("small", "layer", "train eval", (16, 197, 192, 3), headline=True),
    *make("small", "layer", "train eval", (8, 128, 512, 8)),
    *smallest("train eval"),
    *seqfirst("train eval"),
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
    *(
        case
        for fill in (0.54, 0.39, 0.13)
        for case in encoder_cases("train eval", 4, (16, 256, 256, 4), fill, headline=True)
    ),
    *encoder_cases("train eval", 4, (16, 256, 256, 4), 0.54, holes=True),
    *encoder_cases("train eval", 4, (16, 256, 256, 4), 0.54, batch_first=False),
    *encoder_cases("train eval", 4, (16, 256, 256, 4), headline=True),
    *heads_cases((1, 2048, 256, 4), 2),
    *window_cases((1, 4096, 256, 4)),
    *generate_cases("cpu"),
]

ENCODERS = (
    (6, (32, 512, 768, 12), 0.36),
    (6, (32, 128, 768, 12), 0.57),
    (6, (16, 1024, 768, 12), 0.45),
    (4, (6, 4096, 1024, 16), 0.42),
)
"""Layers, shape and fill of encoders on a GPU."""
PRECISIONS: tuple[dict[str, Any], ...] = ({"autocast": "bfloat16"}, {"dtype": "bfloat16"})
VIT, GPT = (32, 197, 768, 12), (8, 1024, 768, 12)

CUDA_ENCODERS = [
    *(
        case
        for kind in ENCODERS
        for way in PRECISIONS
        for case in encoder_cases("train eval", *kind, **way, headline=True)
    ),
    *encoder_cases("train eval", 6, VIT, dtype="bfloat16", headline=True),
    *encoder_cases("train eval", 6, GPT, causal=True, dtype="bfloat16", headline=True),
    *(case for way in PRECISIONS for case in encoder_cases("train eval", *ENCODERS[0], holes=True, **way)),
    *encoder_cases("train eval", *ENCODERS[0], batch_first=False, dtype="bfloat16"),
    *(
        case
        for way in PRECISIONS
        for case in encoder_cases("train eval", 4, *ENCODERS[0][1:], **way, how="compiled", headline=True)
    ),
    *encoder_cases("train eval", 4, (8, 197, 768, 12), dtype="bfloat16", how="reduced", headline=True),
    *encoder_cases("train eval", 4, VIT, dtype="bfloat16", how="compiled"),
    *encoder_cases("train eval", 4, GPT, causal=True, dtype="bfloat16", how="compiled"),
]

BIG = ((8, 2048, 2048, 16), (2, 8192, 2048, 16), (1, 16384, 2048, 32))
LARGE_SHAPES = ((32, 512, 1024, 16), *BIG)
PADDED_SHAPES = (((32, 512, 1024, 16), 0.59), ((8, 2048, 2048, 16), 0.62), ((4, 8192, 2048, 16), 0.75))
"""Shapes, and how much of them is real."""

CUDA = [
    *CUDA_ENCODERS,
    *window_cases((1, 32768, 2048, 16), dtype="bfloat16"),
    *heads_cases((4, 2048, 4096, 32), 8, dtype="bfloat16"),
    *heads_cases((4, 2048, 2048, 16), 4, dtype="bfloat16"),
    *generate_cases("cuda"),
    *(
        dataclasses.replace(case, dtype="bfloat16")
        for case in (
            *(case for shape in LARGE_SHAPES for case in make("dense", "layer", "train eval", shape, headline=True)),
            *(
                case
                for shape in LARGE_SHAPES
                for case in make("causal", "layer", "train eval", shape, causal=True, headline=True)
            ),
            *(
                case
                for shape, fill in PADDED_SHAPES
                for lengths in [evenly(*shape[:2], fill)]
                for case in make("padded", "layer", "train eval", shape, lengths=lengths, headline=True)
            ),
            *(
                case
                for shape, fill in PADDED_SHAPES[1:2]
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
            *smallest("train eval"),
            *seqfirst("train eval"),
            *make("cross", "layer", "train eval", (8, 4096, 2048, 16), seqlen_q=512),
            *make("cross", "layer", "train eval", (8, 4096, 2048, 16), seqlen_q=64),
            *make("overhead", "core", "eval", (1, 8, 64, 4), headline=True),
            *(case for shape in LARGE_SHAPES for case in make("dense", "core", "train eval", shape)),
            *(case for shape in LARGE_SHAPES for case in make("causal", "core", "train eval", shape, causal=True)),
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
    ),
]


def every_case(device: str = "cpu") -> list[Case]:
    """Every case of a kind of device."""
    return list(CUDA if device == "cuda" else CPU_CASES)

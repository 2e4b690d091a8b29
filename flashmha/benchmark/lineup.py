"""The lineup: who is there on this machine, and who takes part in a case."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch

from ..backends import get, names, origin
from .cases import Case
from .peers import CONTROL, Attention, Compiled, Contestant, Flashmha, LinearSdpa, Sdpa, Stock, StockBest, StockSlow


def everybody(device: torch.device) -> tuple[list[Contestant], dict[str, str]]:
    """All contestants of both levels, every backend this machine has among them; and who is absent, with the reason."""
    absent = {name: why for name in names() if (why := get(name).unavailable(device)) is not None}
    present = [name for name in names() if name not in absent]
    stock, best, linear, sdpa, automatic = Stock(), StockBest(), LinearSdpa(), Sdpa(), Attention("attention")
    ours = Flashmha("flashmha_best", best, trust_is_causal=True)
    compiled = [
        Compiled("stock_compiled", best),
        Compiled("linear_sdpa_compiled", linear),
        Compiled("flashmha_compiled", ours),
        Compiled("sdpa_compiled", sdpa),
        Compiled("attention_compiled", automatic),
    ]
    why = no_compiler(device)
    if why is not None:
        absent |= {contestant.name: why for contestant in compiled}
        compiled = []
    return [
        stock,
        best,
        StockSlow(),
        linear,
        Flashmha("flashmha", stock),
        ours,
        Flashmha("flashmha_skip", best, every_row=False, trust_is_causal=True, skip_padding=True),
        *(Flashmha(f"flashmha:{name}", best, trust_is_causal=True, backend=name) for name in present),
        Flashmha(CONTROL, best, trust_is_causal=True),
        sdpa,
        automatic,
        *(Attention(f"attention:{name}", name) for name in present),
        Attention(CONTROL),
        *compiled,
    ], absent


def no_compiler(device: torch.device) -> str | None:
    """Why ``torch.compile`` cannot make code for a device here."""
    if device.type == "cuda":
        return None if importlib.util.find_spec("triton") else "triton is not installed"
    return None if any(map(shutil.which, ("c++", "g++", "clang++", "cl"))) else "no C++ compiler on this machine"


COMPILED = ("small", "dense", "overhead")
"""Suites that time compiled contestants where none is named: compiling one takes ten seconds and more."""


def contestants(
    everyone: Sequence[Contestant],
    case: Case,
    device: torch.device,
    peers: Sequence[str] | None = None,
    backends: Sequence[str] | None = None,
) -> list[Contestant]:
    """Those who take part in a case.

    ``peers`` are globs over the names of peers and compiled contestants, or ``all``; without it nothing compiled runs
    on a CPU. ``backends`` names those of ours that run by name. Without it all do, except that on a CPU this package's
    own take part at level core alone, where nothing else hides them.
    """

    def wanted(one: Contestant) -> bool:
        _, colon, backend = one.name.partition(":")
        if one.level != case.level:
            return False
        if colon:
            if backends is not None:
                return backend in backends
            return case.level == "core" or device.type != "cpu" or origin(backend) != "flashmha"
        if one.compiled and (peers is None or "all" in peers):
            return case.suite in COMPILED and (peers is not None or device.type != "cpu")
        if one.ours and not one.compiled:
            return True
        return peers is None or "all" in peers or any(fnmatchcase(one.name, glob) for glob in peers)

    return [one for one in everyone if wanted(one)]

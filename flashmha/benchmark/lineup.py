"""The lineup: the contestants that this machine has, and those that take part in a case."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch

from ..backends import get, names, origin
from .cases import Case
from .decoders import FlashmhaDecoder, HandDecoder, StockDecoder
from .encoders import FlashmhaEncoder, HandEncoder, PackedEncoder, StockEncoder
from .kernels import FORCED, ByHand, FlashAttnMha, Linear, flash_attn, fold_by_hand, two_products, with_kvcache
from .libraries import Library, Torchtune, XTransformers
from .peers import CONTROL, AttentionFunction, Contestant, Flashmha, Stock, StockBest, StockSlow, Through, Without

CONTESTANTS_OF_PACKAGES = {
    "flash4": ("flash_attn_4", "linear_flash_attn_4"),
    "flash3": ("flash_attn_3", "flash_attn_3_kvcache"),
    "flash2": ("flash_attn_2", "flash_attn_2_kvcache", FlashAttnMha.name),
}
"""The flash-attn packages by the names of our backends: their dense function, and what else of them takes part."""

FEW_COMPILED = {
    "cpu": ("small/*", "dense/*", "overhead/*"),
    "cuda": ("small/layer/train/b8s512*", "dense/*/train/b8s2048*", "generate/decoder/eval/n6b1q*"),
}
"""Cases that have time for what ``torch.compile`` makes, which takes ten seconds and more each."""

WAYS = {
    "layer": ("compiled", "graph"),
    "core": ("compiled",),
    "encoder": ("compiled", "reduced"),
    "decoder": ("graph",),
}
"""The ways beside eager that contestants of a level run."""

GRAPHED = ("small/layer/*", "generate/decoder/*")
"""Cases whose calls are replayed from CUDA graphs, too."""


def all_contestants(device: torch.device) -> tuple[list[Contestant], dict[str, str]]:
    """All contestants of all levels, every backend this machine has among them; and why others are absent."""
    absent = {name: why for name in names() if (why := get(name).why_not_here(device)) is not None}
    present = [name for name in names() if name not in absent]
    stock, best, linear, sdpa, automatic = Stock(), StockBest(), Linear(), ByHand(), AttentionFunction("attention")
    ours = Flashmha("flashmha_best", best, trust_is_causal=True)
    through: dict[str, Contestant] = {one.name: one for one in encoder_contestants()[:-2]}
    writing, by_hand = FlashmhaDecoder(), HandDecoder()
    through |= {writing.name: writing, by_hand.name: by_hand}
    through |= {"stock": best, "linear_sdpa": linear, "flashmha": ours, "sdpa": sdpa, "attention": automatic}
    compiler, gpu = no_compiler(device), None if device.type == "cuda" else "no CUDA device"
    reasons = {"compiled": compiler, "graph": gpu, "reduced": gpu or compiler}
    others: list[Contestant] = []
    for kind, why in reasons.items():
        every = [Through(name, inner, kind) for name, inner in through.items() if kind in WAYS[inner.level]]
        every += [Through(writing.name, writing, kind)] * (kind == "reduced")
        if why is None:
            others += every
        else:
            absent |= {one.name: why for one in every}
    return [
        stock,
        best,
        StockSlow(),
        linear,
        *package_contestants(device, absent),
        *library_contestants(absent),
        # named ones come first: automatic choice gives a short problem to a kernel that is compiled
        *(Flashmha(f"flashmha:{name}", best, trust_is_causal=True, backend=name) for name in present),
        Flashmha("flashmha", stock),
        ours,
        Flashmha("flashmha_skip", best, every_row=False, trust_is_causal=True, skip_padding=True),
        Flashmha(CONTROL, best, trust_is_causal=True),
        Without("flashmha", ours),
        sdpa,
        ByHand("sdpa_folded", fold_by_hand, takes_masks=False, decodes=True),
        ByHand("two_products", two_products, takes_masks=False, decodes=True),
        *forced(device, absent),
        *(AttentionFunction(f"attention:{name}", name) for name in present),
        automatic,
        AttentionFunction(CONTROL),
        Without("attention", automatic),
        *encoder_contestants(),
        *(StockDecoder(), by_hand, writing, FlashmhaDecoder(CONTROL)),
        *others,
    ], absent


def encoder_contestants() -> list[Contestant]:
    """Whole encoders; the last two run eagerly alone."""
    return [
        StockEncoder(),
        HandEncoder(),
        FlashmhaEncoder(),
        FlashmhaEncoder("flashmha_encoder_skip", skip_padding=True),
        FlashmhaEncoder(CONTROL),
        PackedEncoder(),
    ]


def forced(device: torch.device, absent: dict[str, str]) -> list[Contestant]:
    """SDPA held to each of a GPU's kernels; elsewhere they join ``absent``."""
    if device.type == "cuda":
        return [ByHand(f"sdpa_{name}", forced=kernel) for name, kernel in FORCED.items()]
    absent |= {f"sdpa_{name}": f"device {device.type} (only cuda)" for name in FORCED}
    return []


def package_contestants(device: torch.device, absent: dict[str, str]) -> list[Contestant]:
    """The flash-attn packages called by hand, and flash-attn's layer; what is not here joins ``absent``."""
    found: list[Contestant] = []
    for backend, (name, *others) in CONTESTANTS_OF_PACKAGES.items():
        why = get(backend).why_not_here(device)
        if why is not None:
            absent |= dict.fromkeys((name, *others), why)
            continue
        kernel = flash_attn(backend)
        found.append(ByHand(name, kernel, takes_masks=False))
        for other in others:
            if other == f"linear_{name}":
                found.append(Linear(other, kernel, takes_masks=False))
            elif other == FlashAttnMha.name:
                found.append(FlashAttnMha())
            else:
                found.append(ByHand(other, with_kvcache(backend), takes_masks=False, decodes=True))
    return found


def library_contestants(absent: dict[str, str]) -> list[Contestant]:
    """The layers of other libraries; what is not installed joins ``absent``."""
    every: tuple[Library, ...] = (XTransformers(), Torchtune())
    reasons = {one.name: why for one in every if (why := one.why_not_here()) is not None}
    absent |= reasons
    return [one for one in every if one.name not in reasons]


def no_compiler(device: torch.device) -> str | None:
    """The reason why ``torch.compile`` cannot make code for a device here."""
    if device.type == "cuda":
        return None if importlib.util.find_spec("triton") else "triton is not installed"
    return None if any(map(shutil.which, ("c++", "g++", "clang++", "cl"))) else "no C++ compiler on this machine"


def contestants(
    every: Sequence[Contestant],
    case: Case,
    device: torch.device,
    peers: Sequence[str] | None = None,
    backends: Sequence[str] | None = None,
) -> list[Contestant]:
    """The contestants that take part in a case.

    ``peers`` are globs over the names of peers and of all that are compiled or in a graph, or ``all``; without it
    nothing compiled runs on a CPU. ``backends`` names those of ours that run by name. Without it they all do, but for
    those ``hidden``.
    """

    def wanted(one: Contestant) -> bool:
        _, colon, backend = one.name.partition(":")
        if one.level != case.level or (one.level == "encoder" and one.how != case.how):
            return False
        if one.yardstick:
            return case != case.bare
        if colon:
            return backend in backends if backends is not None else not hidden(backend, case, device)
        if one.how not in ("eager", case.how) and (peers is None or "all" in peers):
            cases = GRAPHED if one.how == "graph" else FEW_COMPILED.get(device.type, ())
            return matches(case, cases) and (peers is not None or device.type != "cpu")
        if one.ours and one.how == case.how:
            return True
        return peers is None or "all" in peers or any(fnmatchcase(one.name, glob) for glob in peers)

    return [one for one in every if wanted(one)]


def hidden(backend: str, case: Case, device: torch.device) -> bool:
    """A backend of this package takes no part by name unless it is asked for.

    On a CPU at level core alone, where nothing else hides it; on a GPU the definition never, and flex, which is
    compiled for every shape, in few cases. In suite heads never.
    """
    if origin(backend) != "flashmha":
        return False
    if case.suite in ("heads", "generate"):
        return True
    if device.type == "cpu":
        return case.level != "core"
    return backend == "naive" or (backend == "flex" and not matches(case, FEW_COMPILED["cuda"]))


def shown_by_name(every: Sequence[Contestant], backends: Sequence[str] | None = None) -> list[str]:
    """The contestants that get rows of their own beside automatic choice: what was asked for, and other packages'."""
    pairs = [(one.name, backend) for one in every if (backend := one.name.partition(":")[2])]
    return [name for name, backend in pairs if backend in (backends or ()) or origin(backend) != "flashmha"]


def matches(case: Case, globs: Sequence[str]) -> bool:
    return any(fnmatchcase(case.id, glob) for glob in globs)

"""The table of suite generate: tokens a second, bytes of a cache, and one query over the keys of one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .peers import HEADLINES
from .report import HOW_WORDS, TextTable, ratio_and_loss, without_empty_columns
from .run_file import Run
from .verdicts import TARGET_WORDS, best_peer, middle, verdict

TARGETS = {"hand": 0.97, "stock": 20.0, "best": 0.9}
"""The least that a ratio may be: to the static cache by hand, to stock, and of one query to torch's best way."""

HAND = {"eager": "hand_decoder", "graph": "hand_decoder_graph", "reduced": "hand_decoder_graph"}
"""The cache by hand that one of ours is beside: what is compiled for reduced overhead runs in CUDA graphs."""

TEXT_COLUMNS = ("case", "tokens a second", "by hand", "stock", "cache MiB", "by hand MiB", "torch's best way")
TEXT_LEGEND = (
    "*tokens a second*: of all rows together. *by hand*: how many times faster ours is than a static cache that a "
    "good engineer writes, in parts of 16 tokens that take turns; *stock*: than `nn.TransformerDecoder`, which reads "
    "the text again for each token, of which it computes one in each fifth part; what the others take lies between. "
    "On a GPU a text before these does not count: cuDNN plans for each new length. "
    "*torch's best way*: how many times faster than the fastest of SDPA (with `enable_gqa` for groups), SDPA on folded "
    "groups, and two products of matrices with a softmax, on keys that lie as a cache's. In brackets the target: at "
    f"least {TARGETS['hand']} of by hand, {TARGETS['stock']:.0f} times stock, {TARGETS['best']} of torch's best way. "
    "LOSS: the whole interval of the rounds lies below the noise."
)


def text_table(run: Run, name_of: Callable[[dict[str, Any]], str] = lambda case: str(case["id"])) -> TextTable:
    """One row for each way that ours ran each case of the suite."""
    rows: list[Sequence[str]] = []
    for case in run["cases"]:
        if case["case"]["suite"] != "generate":
            continue
        ours = [one for one in HEADLINES if one in case["contestants"] and HEADLINES[one][0] == case["case"]["level"]]
        write = text_row if case["case"]["level"] == "decoder" else query_row
        rows += [write(case, one, name_of(case) + HOW_WORDS[HEADLINES[one][1]], run["noise_floor"]) for one in ours]
    return without_empty_columns(TEXT_COLUMNS, rows)


def text_row(case: dict[str, Any], one: str, name: str, floor: float) -> Sequence[str]:
    """A decoder that writes."""
    known, ratios = case["contestants"], case["ratios"].get(one)
    if ratios is None:
        return name, known[one].get("reason", "not timed"), *[""] * 5
    hand = HAND[HEADLINES[one][1]]
    seconds = known[one]["seconds"]
    return (
        name,
        f"{case['case']['batch'] * len(seconds) / sum(seconds):,.0f}",
        judged(ratios.get(hand), TARGETS["hand"], floor),
        judged(ratios.get("stock_decoder"), TARGETS["stock"], floor),
        mebibytes(known[one]),
        mebibytes(known.get(hand, {})),
        "",
    )


def query_row(case: dict[str, Any], one: str, name: str, floor: float) -> Sequence[str]:
    """One query over many keys."""
    best, known = best_peer(case, one), case["contestants"][one]
    if best is None or one not in case["ratios"]:
        return name, *[""] * 5, known.get("reason", "not timed")
    took = f"{1e6 * middle(known['seconds']):.3g} us"
    return name, *[""] * 5, f"{judged(case['ratios'][one][best], TARGETS['best'], floor)} ({best}, {took})"


def judged(ratio: dict[str, float] | None, target: float, floor: float) -> str:
    """A ratio, and whether it is what it has to be."""
    if ratio is None:
        return "-"
    said = TARGET_WORDS[verdict({name: each / target for name, each in ratio.items()}, floor)]
    return f"{ratio_and_loss(ratio, floor)} [{said}]"


def mebibytes(row: dict[str, Any]) -> str:
    """The bytes of a cache."""
    return f"{row['cache_bytes'] / 2**20:.1f}" if "cache_bytes" in row else ""

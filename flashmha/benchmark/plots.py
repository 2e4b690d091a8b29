"""The plots of a run: ratios as a heat map, time and memory against sequence length."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.ticker
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, TwoSlopeNorm
from matplotlib.figure import Figure

from .report import Run, origin_line
from .verdicts import middle

PAIRS = {
    "layer": {
        "stock\nas called": ("flashmha", "stock"),
        "stock\nat its best": ("flashmha_best", "stock_best"),
        "stock\nslow path": ("flashmha_best", "stock_slow"),
        "linear\n+ SDPA": ("flashmha_best", "linear_sdpa"),
        "stock,\nboth compiled": ("flashmha_compiled", "stock_compiled"),
        "linear + SDPA,\nboth compiled": ("flashmha_compiled", "linear_sdpa_compiled"),
        "skip_padding:\nstock": ("flashmha_skip", "stock_best"),
        "skip_padding:\nlinear + SDPA": ("flashmha_skip", "linear_sdpa"),
    },
    "core": {"SDPA\nby hand": ("attention", "sdpa"), "SDPA,\nboth compiled": ("attention_compiled", "sdpa_compiled")},
}
"""The columns of the heat map: who of ours against whom."""

LINES = {
    "stock": ("#9a9a9a", "o", "--"),
    "stock_best": ("#505050", "s", "-"),
    "stock_slow": ("#c4a484", "v", "--"),
    "linear_sdpa": ("#d98a00", "D", "-"),
    "stock_compiled": ("#8c6bb1", "<", ":"),
    "linear_sdpa_compiled": ("#b35806", ">", ":"),
    "flashmha": ("#6baed6", "o", "--"),
    "flashmha_best": ("#08519c", "s", "-"),
    "flashmha_skip": ("#238b45", "^", "-"),
}
"""The contestants of the line plots: color, marker, dashes."""

NARROWEST, WIDEST = 2.0, 8.0
"""Between which ratios the colors of the heat map reach their ends."""

GREY, HIDDEN = "#e3e3e3", "#fafafa"


def draw(run: Run, folder: Path) -> None:
    """Write ``ratios.png``, ``time.png`` and ``memory.png``."""
    matplotlib.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    draw_ratios(run, folder / "ratios.png")
    draw_lines(run, folder / "time.png", "microseconds a token", microseconds_a_token)
    draw_lines(run, folder / "memory.png", "peak KiB a token", kibibytes_a_token)


def draw_ratios(run: Run, path: Path) -> None:
    """How many times faster than every peer: a row a case, white at 1, grey inside the noise."""
    levels = {level: [case for case in run["cases"] if case["case"]["level"] == level] for level in run["summary"]}
    columns = {level: shown(levels[level], PAIRS[level]) for level in levels}
    levels = {level: cases for level, cases in levels.items() if columns[level]}
    if not levels:
        return
    logs = [
        math.log2(case["ratios"][one][peer]["median"])
        for level, cases in levels.items()
        for case in cases
        for one, peer in columns[level].values()
        if peer in case["ratios"].get(one, {})
    ]
    end = min(math.log2(WIDEST), max(math.log2(NARROWEST), *map(abs, logs)))
    colors = LinearSegmentedColormap.from_list("ratios", ["#b2182b", "#ef8a62", "#ffffff", "#67a9cf", "#2166ac"])
    norm = TwoSlopeNorm(0.0, -end, end)
    height = sum(len(cases) for cases in levels.values())
    width = max(map(len, (columns[level] for level in levels)))
    figure = Figure(figsize=(4.2 + 1.15 * width, 1.3 + 0.27 * height + 0.7 * len(levels)))
    axes = figure.subplots(len(levels), 1, squeeze=False, height_ratios=[len(cases) + 1 for cases in levels.values()])
    band = math.log2(1 + run["noise_floor"])
    for ax, (level, cases) in zip(axes[:, 0], levels.items()):
        for y, case in enumerate(cases):
            for x, (one, peer) in enumerate(columns[level].values()):
                found = case["ratios"].get(one, {}).get(peer)
                log = None if found is None else math.log2(found["median"])
                face = HIDDEN if log is None else GREY if abs(log) <= band else colors(norm(log))
                ax.fill_between((x, x + 1), y, y + 1, facecolor=face, edgecolor="white", linewidth=1.5)
                if log is not None and found is not None:
                    ink = "white" if abs(log) > 0.7 * end else "black"
                    ax.text(x + 0.5, y + 0.5, f"{found['median']:.2f}", ha="center", va="center", color=ink)
        ax.set(xlim=(0, width), ylim=(len(cases), 0))
        ax.set_xticks([x + 0.5 for x in range(len(columns[level]))], list(columns[level]))
        ax.set_yticks([y + 0.5 for y in range(len(cases))], [label(case) for case in cases])
        ax.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False)
        ax.set_title(f"level {level}: times faster than", loc="left", fontweight="bold", pad=10)
        for spine in ax.spines.values():
            spine.set_visible(False)
    inch = 1 / figure.get_figheight()
    mappable = matplotlib.cm.ScalarMappable(norm, colors)
    scale = figure.colorbar(
        mappable, ax=list(axes[:, 0]), location="bottom", fraction=0.4 * inch, pad=0.1 * inch, aspect=40
    )
    ticks = [tick for tick in (0.125, 0.25, 0.5, 0.67, 1, 1.5, 2, 4, 8) if abs(math.log2(tick)) <= end + 1e-9]
    scale.set_ticks([math.log2(tick) for tick in ticks], labels=[f"{tick:g}" for tick in ticks])
    scale.set_label(f"red: ours is slower · grey: within the noise, {run['noise_floor']:.1%} · blue: ours is faster")
    caption(figure, run)
    figure.savefig(path, dpi=130)


def shown(cases: list[dict[str, Any]], pairs: dict[str, tuple[str, str]]) -> dict[str, tuple[str, str]]:
    """The columns that hold a number."""
    return {
        title: (one, peer)
        for title, (one, peer) in pairs.items()
        if any(peer in case["ratios"].get(one, {}) for case in cases)
    }


def label(case: dict[str, Any]) -> str:
    """A case's id without its level."""
    suite, _, mode, shape = case["id"].split("/")
    return f"{suite} {mode} {shape}"


def microseconds_a_token(case: dict[str, Any], row: dict[str, Any]) -> float:
    return float(1e6 * middle(row["seconds"]) / tokens(case))


def kibibytes_a_token(case: dict[str, Any], row: dict[str, Any]) -> float:
    return float(row["peak_bytes"] / 1024 / tokens(case))


def tokens(case: dict[str, Any]) -> int:
    return int(case["case"]["batch"] * case["case"]["seqlen_q"])


def draw_lines(run: Run, path: Path, unit: str, measure: Callable[[dict[str, Any], dict[str, Any]], float]) -> None:
    """One panel for each family of cases that differ in length alone, one line a contestant."""
    families: dict[str, dict[int, dict[str, Any]]] = {}
    for case in run["cases"]:
        sizes = case["case"]
        if sizes["level"] == "layer" and sizes["seqlen_q"] == sizes["seqlen_k"]:
            kind = f"{sizes['suite']}{', causal' * (sizes['causal'] and sizes['suite'] != 'causal')}, {sizes['mode']}"
            title = f"{kind}, E{sizes['embed_dim']} H{sizes['heads']}"
            families.setdefault(title, {})[sizes["seqlen_k"]] = case
    if not families:
        return
    most = max(map(len, families.values()))
    families = {title: family for title, family in families.items() if len(family) >= min(2, most)}
    across = min(3, len(families))
    down = math.ceil(len(families) / across)
    figure = Figure(figsize=(3.5 * across + 0.4, 2.9 * down + 1.1))
    axes = figure.subplots(down, across, squeeze=False).flatten()
    handles: dict[str, Any] = {}
    for ax, (title, family) in zip(axes, families.items()):
        for name, (color, marker, dashes) in LINES.items():
            points = [
                (length, measure(case, case["contestants"][name]))
                for length, case in sorted(family.items())
                if "seconds" in case["contestants"].get(name, {})
            ]
            if points:
                (handles[name],) = ax.plot(
                    *zip(*points), color=color, marker=marker, linestyle=dashes, markersize=4.5, linewidth=1.5
                )
        dress(ax, title, sorted(family))
    for ax in axes[len(families) :]:
        ax.set_visible(False)
    figure.supylabel(unit)
    columns = math.ceil(len(handles) / math.ceil(len(handles) / (2 * across)))
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=columns, frameon=False)
    caption(figure, run)
    figure.savefig(path, dpi=130)


def dress(ax: Axes, title: str, lengths: list[int]) -> None:
    """A panel's title, scales and grid: the lengths as powers of 2, values from 0."""
    ax.set_title(title, fontsize=9)
    ax.set_xlabel("sequence length")
    ax.set_xscale("log", base=2)
    ax.set_xticks(lengths, [str(length) for length in lengths])
    ax.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    ax.set_ylim(bottom=0)
    ax.grid(alpha=0.25)


def caption(figure: Figure, run: Run) -> None:
    """Where the numbers come from, below everything, in room of its own."""
    inches = 0.25 / figure.get_figheight()
    figure.set_layout_engine("constrained", rect=(0.0, inches, 1.0, 1.0 - inches))
    figure.text(0.5, 0.25 * inches, origin_line(run), fontsize=6.5, color="#666666", ha="center", va="bottom")

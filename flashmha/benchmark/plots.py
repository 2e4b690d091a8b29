"""The plots of a run: ratios as a heat map, time and memory against sequence length."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.ticker
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, TwoSlopeNorm
from matplotlib.figure import Figure

from .peers import HEADLINES, how
from .report import HOW_WORDS, origin_line
from .run_file import Run, levels
from .verdicts import middle, share_of_gemm

PAIRS = {
    "layer": {
        "stock\nas called": ("flashmha", "stock"),
        "stock\nat its best": ("flashmha_best", "stock_best"),
        "stock\nslow path": ("flashmha_best", "stock_slow"),
        "linear\n+ SDPA": ("flashmha_best", "linear_sdpa"),
        "linear\n+ FA4": ("flashmha_best", "linear_flash_attn_4"),
        "flash_attn\n.MHA": ("flashmha_best", "flash_attn_mha"),
        "x-trans-\nformers": ("flashmha_best", "x_transformers"),
        "torchtune": ("flashmha_best", "torchtune"),
        "itself\nwithout": ("flashmha_best", "flashmha_without"),
        "stock,\nboth compiled": ("flashmha_compiled", "stock_compiled"),
        "linear + SDPA,\nboth compiled": ("flashmha_compiled", "linear_sdpa_compiled"),
        "stock, both in\nCUDA graphs": ("flashmha_graph", "stock_graph"),
        "linear + SDPA,\nboth in graphs": ("flashmha_graph", "linear_sdpa_graph"),
        "skip_padding:\nstock": ("flashmha_skip", "stock_best"),
        "skip_padding:\nlinear + SDPA": ("flashmha_skip", "linear_sdpa"),
    },
    "core": {
        "SDPA\nby hand": ("attention", "sdpa"),
        "SDPA's\ncuDNN": ("attention", "sdpa_cudnn"),
        "SDPA's\nflash": ("attention", "sdpa_flash"),
        "SDPA's\nefficient": ("attention", "sdpa_efficient"),
        "flash-attn\n4": ("attention", "flash_attn_4"),
        "flash-attn\n3": ("attention", "flash_attn_3"),
        "flash-attn\n2": ("attention", "flash_attn_2"),
        "flash-attn 3\nwith_kvcache": ("attention", "flash_attn_3_kvcache"),
        "flash-attn 2\nwith_kvcache": ("attention", "flash_attn_2_kvcache"),
        "SDPA,\nboth compiled": ("attention_compiled", "sdpa_compiled"),
        "itself\nwithout": ("attention", "attention_without"),
    },
    "encoder": {
        "stock": ("flashmha_encoder", "stock_encoder"),
        "by hand": ("flashmha_encoder", "hand_encoder"),
        "packed": ("flashmha_encoder", "packed_encoder"),
        "skip_padding:\nstock": ("flashmha_encoder_skip", "stock_encoder"),
        "skip_padding:\nby hand": ("flashmha_encoder_skip", "hand_encoder"),
        "skip_padding:\npacked": ("flashmha_encoder_skip", "packed_encoder"),
        "stock,\nboth compiled": ("flashmha_encoder_compiled", "stock_encoder_compiled"),
        "by hand,\nboth compiled": ("flashmha_encoder_compiled", "hand_encoder_compiled"),
        "skip_padding: stock,\nboth compiled": ("flashmha_encoder_skip_compiled", "stock_encoder_compiled"),
        "skip_padding: by hand,\nboth compiled": ("flashmha_encoder_skip_compiled", "hand_encoder_compiled"),
        "stock, both\nreduce-overhead": ("flashmha_encoder_reduced", "stock_encoder_reduced"),
        "by hand, both\nreduce-overhead": ("flashmha_encoder_reduced", "hand_encoder_reduced"),
    },
}
"""The columns of the heat map: one of ours against one peer."""

LINES = {
    "stock": ("#9a9a9a", "o", "--"),
    "stock_best": ("#505050", "s", "-"),
    "stock_slow": ("#c4a484", "v", "--"),
    "linear_sdpa": ("#d98a00", "D", "-"),
    "linear_flash_attn_4": ("#b2182b", "X", "-"),
    "flash_attn_mha": ("#c51b7d", "P", "-"),
    "stock_compiled": ("#8c6bb1", "<", ":"),
    "linear_sdpa_compiled": ("#b35806", ">", ":"),
    "flashmha": ("#6baed6", "o", "--"),
    "flashmha_best": ("#08519c", "s", "-"),
    "flashmha_skip": ("#238b45", "^", "-"),
}
"""The contestants of the other plots: color, marker, dashes."""

DRAWN_AT_BEST = ("stock_best", "linear_sdpa", "flashmha_best")
"""Those of them that are compiled or put into a CUDA graph, too."""

NARROWEST, WIDEST = 2.0, 8.0
"""Between which ratios the colors of the heat map reach their ends."""

GREY, HIDDEN = "#e3e3e3", "#fafafa"


def draw_plots(run: Run, folder: Path) -> None:
    """Write ``ratios.png``, ``time.png`` and ``memory.png``, and ``gemm.png`` of a run on a GPU."""
    matplotlib.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    draw_ratios(run, folder / "ratios.png")
    draw_lines(run, folder / "time.png", "microseconds a token", microseconds_a_token)
    draw_lines(run, folder / "memory.png", "peak KiB a token", kibibytes_a_token)
    if run["canaries"]:
        draw_shares(run, folder / "gemm.png")


def draw_ratios(run: Run, path: Path) -> None:
    """Ratios to every peer: a row a case, white at 1, grey inside the noise."""
    rows = {level: [case for case in run["cases"] if case["case"]["level"] == level] for level in levels(run)}
    columns = {level: drawn_columns(cases, PAIRS[level]) for level, cases in rows.items()}
    rows = {level: cases for level, cases in rows.items() if columns[level]}
    if not rows:
        return
    logs = [
        math.log2(case["ratios"][one][peer]["median"])
        for level, cases in rows.items()
        for case in cases
        for one, peer in columns[level].values()
        if peer in case["ratios"].get(one, {})
    ]
    end = min(math.log2(WIDEST), max(math.log2(NARROWEST), *map(abs, logs)))
    colors = LinearSegmentedColormap.from_list("ratios", ["#b2182b", "#ef8a62", "#ffffff", "#67a9cf", "#2166ac"])
    norm = TwoSlopeNorm(0.0, -end, end)
    height = sum(len(cases) for cases in rows.values())
    width = max(map(len, (columns[level] for level in rows)))
    figure = Figure(figsize=(4.2 + 1.15 * width, 1.3 + 0.27 * height + 0.7 * len(rows)))
    axes = figure.subplots(len(rows), 1, squeeze=False, height_ratios=[len(cases) + 1 for cases in rows.values()])
    band = math.log2(1 + run["noise_floor"])
    for ax, (level, cases) in zip(axes[:, 0], rows.items()):
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


def drawn_columns(cases: list[dict[str, Any]], pairs: dict[str, tuple[str, str]]) -> dict[str, tuple[str, str]]:
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
    return float(1e6 * middle(row["seconds"]) / count_tokens(case))


def kibibytes_a_token(case: dict[str, Any], row: dict[str, Any]) -> float:
    return float(row["peak_bytes"] / 1024 / count_tokens(case))


def count_tokens(case: dict[str, Any]) -> int:
    return int(case["case"]["batch"] * case["case"]["seqlen_q"])


def draw_lines(run: Run, path: Path, unit: str, measure: Callable[[dict[str, Any], dict[str, Any]], float]) -> None:
    """One panel for each family of cases that differ in length, and maybe in heads, one line a contestant."""
    families: dict[str, dict[int, dict[str, Any]]] = {}
    for case in run["cases"]:
        sizes = case["case"]
        if sizes["level"] == "layer" and sizes["seqlen_q"] == sizes["seqlen_k"]:
            beside = [name for name, is_so in (("causal", sizes["causal"]), ("padded", sizes["lengths"])) if is_so]
            kind = ", ".join([sizes["suite"], *(name for name in beside if name != sizes["suite"]), sizes["mode"]])
            families.setdefault(f"{kind}, E{sizes['embed_dim']}", {})[sizes["seqlen_k"]] = case
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
        highest = 0.0
        for name, (color, marker, dashes) in LINES.items():
            points = [
                (length, measure(case, case["contestants"][name]))
                for length, case in sorted(family.items())
                if {"seconds", "peak_bytes"} <= set(case["contestants"].get(name, ()))
            ]
            if points:
                highest = max(highest, *(value for _, value in points))
                (handles[name],) = ax.plot(
                    *zip(*points),
                    color=color,
                    marker=marker,
                    linestyle=dashes,
                    markersize=4.5,
                    linewidth=1.5,
                    clip_on=False,
                )
        dress(ax, title, family, highest)
    for ax in axes[len(families) :]:
        ax.set_visible(False)
    figure.supylabel(unit)
    columns = math.ceil(len(handles) / math.ceil(len(handles) / (2 * across)))
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=columns, frameon=False)
    caption(figure, run)
    figure.savefig(path, dpi=130)


def dress(ax: Axes, title: str, family: dict[int, dict[str, Any]], highest: float) -> None:
    """A panel's title, scales and grid: the lengths as powers of 2, values from 0 to a little above the highest."""
    heads = {length: case["case"]["heads"] for length, case in sorted(family.items())}
    same = len(set(heads.values())) == 1
    ax.set_title(f"{title} H{min(heads.values())}" if same else title, fontsize=9)
    ax.set_xlabel("sequence length")
    ax.set_xscale("log", base=2)
    ax.set_xticks(list(heads), [str(length) if same else f"{length}\nH{each}" for length, each in heads.items()])
    ax.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    ax.set_ylim(0, 1.08 * highest or 1.0)
    ax.grid(alpha=0.25)


def draw_shares(run: Run, path: Path) -> None:
    """The operations each layer needs, by the time of each contestant, as a share of a matrix product's rate."""
    ours = [one for one, (level, _) in HEADLINES.items() if level == "layer" and how(one) != "eager"]
    rows = []
    for case in run["cases"]:
        if case["case"]["level"] == "layer":
            rows.append((label(case), case, {name: name for name in LINES if how(name) == "eager"}))
            for one in ours:
                if one in case["ratios"]:
                    names = {name: f"{name.removesuffix('_best')}_{how(one)}" for name in DRAWN_AT_BEST}
                    rows.append((label(case) + HOW_WORDS[how(one)], case, names))
    if not rows:
        return
    figure = Figure(figsize=(9, 1.6 + 0.25 * len(rows)))
    ax = figure.subplots()
    handles: dict[str, Any] = {}
    highest = 100.0
    for y, (_, case, names) in enumerate(rows):
        for name, run_as in names.items():
            color, marker, _ = LINES[name]
            share = share_of_gemm(case, run_as)
            if share is not None:
                (handles[name],) = ax.plot(
                    100 * share, y, color=color, marker=marker, linestyle="", markersize=6, clip_on=False
                )
                highest = max(highest, 100 * share)
    ax.set(xlim=(0, highest), ylim=(len(rows) - 0.5, -0.5), xlabel="% of the rate of a large bfloat16 matrix product")
    ax.set_yticks(range(len(rows)), [title for title, _, _ in rows])
    ax.grid(alpha=0.25)
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=4, frameon=False)
    caption(figure, run)
    figure.savefig(path, dpi=130)


def caption(figure: Figure, run: Run) -> None:
    """The origin of the numbers, below everything, in room of its own."""
    lines = textwrap.wrap(origin_line(run), int(20 * figure.get_figwidth()))
    inches = (0.14 + 0.11 * len(lines)) / figure.get_figheight()
    figure.set_layout_engine("constrained", rect=(0.0, inches, 1.0, 1.0 - inches))
    below = 0.06 / figure.get_figheight()
    figure.text(0.5, below, "\n".join(lines), fontsize=6.5, color="#666666", ha="center", va="bottom")

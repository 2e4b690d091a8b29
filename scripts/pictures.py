"""The picture of the README, drawn from the committed run on a GPU: ``python scripts/pictures.py``.

Each panel shows how many times faster flashmha is than a peer, against sequence length. What was drawn is written into
the picture as JSON, under the keyword ``Description``, so that a test can hold it to the results without drawing again.
"""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.ticker
from matplotlib.figure import Figure

from flashmha.benchmark.report import origin_line
from flashmha.benchmark.run_file import Run, load
from flashmha.benchmark.verdicts import best_peer

ROOT = Path(__file__).parent.parent
RUN = ROOT / "benchmarks" / "results" / "gpu.json"
PICTURE = ROOT / "docs" / "ratios.png"

SUITES = {"dense": "no mask", "causal": "causal", "padded": "padded"}
MODES = {"train": "training", "eval": "eval"}
LINES = {
    "stock as called": ("#9a9a9a", "o", "--"),
    "stock at its best": ("#2166ac", "s", "-"),
    "the fastest peer": ("#d98a00", "D", "-"),
}
"""What ours is compared with: color, marker, dashes."""
SLOWER = "#fbe3df"


@functools.cache
def run() -> Run:
    """The committed run."""
    return load(RUN)


def points() -> dict[str, dict[str, list[tuple[int, float]]]]:
    """For each panel and each line the points (sequence length, how many times faster)."""
    found: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for case in run()["cases"]:
        sizes = case["case"]
        alone = sizes["level"] == "layer" and sizes["suite"] in SUITES
        if not alone or (sizes["suite"] == "padded" and sizes["causal"]):
            continue
        panel = found.setdefault(f"{SUITES[sizes['suite']]}, {MODES[sizes['mode']]}", {name: [] for name in LINES})
        for name, ratio in zip(LINES, ratios(case)):
            panel[name].append((sizes["seqlen_k"], round(ratio, 3)))
    return {title: {name: sorted(line) for name, line in panel.items()} for title, panel in found.items()}


def ratios(case: dict[str, Any]) -> tuple[float, float, float]:
    """Against stock as called, against stock at its best, and against the fastest peer."""
    ours = case["ratios"]
    best = best_peer(case, "flashmha_best")
    found = (ours["flashmha"]["stock"], ours["flashmha_best"]["stock_best"], ours["flashmha_best"][best])
    return tuple(each["median"] for each in found)  # type: ignore[return-value]


def draw(path: Path) -> None:
    """Draw the picture."""
    matplotlib.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    panels = points()
    figure = Figure(figsize=(9, 5.6), layout="constrained")
    axes = figure.subplots(len(MODES), len(SUITES), sharex=True, sharey=True)
    lengths = sorted({length for panel in panels.values() for line in panel.values() for length, _ in line})
    ticks = (0.5, 1, 2, 4, 8, 16)
    for row, mode in zip(axes, MODES.values()):
        for ax, suite in zip(row, SUITES.values()):
            ax.set_title(f"{suite}, {mode}", fontsize=11, loc="left")
            ax.axhspan(0.4, 1, color=SLOWER, linewidth=0)
            ax.axhline(1, color="#404040", linewidth=1)
            for name, (color, marker, dashes) in LINES.items():
                line = panels[f"{suite}, {mode}"][name]
                ax.plot(*zip(*line), color=color, marker=marker, linestyle=dashes, linewidth=2, label=name)
            ax.set_xscale("log", base=2)
            ax.set_yscale("log", base=2)
            ax.set_ylim(0.4, 32)
            ax.set_xticks(lengths, [short(length) for length in lengths])
            ax.set_yticks(ticks, [f"{tick:g}×" for tick in ticks])
            ax.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
            ax.grid(alpha=0.25)
    axes[0, 0].text(lengths[0], 0.46, "flashmha is slower", fontsize=10, color="#a03020")
    figure.supxlabel("sequence length, on an H200 in bfloat16", fontsize=11)
    figure.supylabel("times faster than", fontsize=11)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(LINES), frameon=False)
    figure.savefig(path, dpi=110, metadata={"Description": described(), "Software": None})


def short(length: int) -> str:
    """A length as an axis shows it: 512, 2k, 16k."""
    return str(length) if length < 1024 else f"{length // 1024}k"


def described() -> str:
    """What the picture shows and where it comes from, as JSON."""
    return json.dumps({"points": points(), "origin": origin_line(run())}, ensure_ascii=True, sort_keys=True)


def main() -> int:
    draw(PICTURE)
    print(f"{PICTURE.relative_to(ROOT)}: {PICTURE.stat().st_size / 1024:.0f} KB")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Compare the CPU times of two checkouts of this package, case by case.

The script runs ``flashmha bench`` of both in turns, each in processes of its own. A time is a multiple of the stock
layer's, which takes its turns in the same process; the ratio is that of AFTER over that of BEFORE.

    git worktree add /tmp/before COMMIT
    python scripts/compare_checkouts.py /tmp/before .
    python scripts/compare_checkouts.py /tmp/before . --bench "--case 'small/layer/*' --rounds 12"
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

OURS, PEER = ("flashmha_best", "flashmha", "flashmha_skip"), "stock_best"
SLOWER = 1.03
"""A ratio beyond which a case is marked, where the middle halves of the rounds lie apart, too."""
Times = dict[tuple[str, str], list[float]]
"""(case, contestant) -> multiples of the peer's time, one a round."""


def measure(checkout: Path, flags: Sequence[str], budget: float, seed: int) -> Times:
    """One process of a checkout."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "flashmha", "bench", "--out", folder, "--no-plots"]
        command += ["--peers", PEER, "--backends", "--budget", str(budget), "--seed", str(seed), *flags]
        variables = {**os.environ, "PYTHONPATH": str(checkout.resolve()), "OMP_NUM_THREADS": "1"}
        subprocess.run(command, cwd=folder, env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        cases = json.loads(Path(folder, "run.json").read_text(encoding="utf-8"))["cases"]
    found: Times = {}
    for case in cases:
        rows = case["contestants"]
        if "seconds" in rows.get(PEER, {}):
            for one in OURS:
                pairs = zip(rows.get(one, {}).get("seconds", ()), rows[PEER]["seconds"])
                found[case["id"], one] = [ours / theirs for ours, theirs in pairs]
    return {key: times for key, times in found.items() if times}


def halves(times: Sequence[float]) -> tuple[float, float, float]:
    """The middle half of some times around their median."""
    low, median, high = statistics.quantiles(times, n=4, method="inclusive")
    return low, median, high


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--turns", type=int, default=2, help="processes of each checkout (default 2)")
    parser.add_argument("--budget", type=float, default=75.0, help="seconds of one process (default 75)")
    parser.add_argument(
        "--bench", default="--level layer --rounds 6", metavar="FLAGS", help="of bench (default: %(default)s)"
    )
    options = parser.parse_args()
    before: Times = {}
    after: Times = {}
    for turn in range(options.turns):
        for checkout, times in ((options.before, before), (options.after, after)):
            for key, found in measure(checkout, shlex.split(options.bench), options.budget, turn).items():
                times.setdefault(key, []).extend(found)
    ratios = []
    print(f"{'case':<46} {'contestant':<14} {'before':>7} {'after':>7} {'ratio':>6}")
    for key in [key for key in before if key in after and min(len(before[key]), len(after[key])) > 1]:
        (_, was, most), (least, now, _) = halves(before[key]), halves(after[key])
        ratios.append(now / was)
        mark = "  SLOWER" if now / was > SLOWER and least > most else ""
        print(f"{key[0]:<46} {key[1]:<14} {was:>7.3f} {now:>7.3f} {now / was:>6.3f}{mark}")
    left = sorted({case for case, _ in before.keys() ^ after.keys()})
    print(f"geometric mean of {len(ratios)} ratios: {statistics.geometric_mean(ratios):.3f}" if ratios else "no case")
    print(f"in one of the two alone: {', '.join(left)}" if left else "")


if __name__ == "__main__":
    main()

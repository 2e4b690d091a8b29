"""The tables of the README and of the site: backends out of their limits, figures out of ``benchmarks/results``.

A page that shows a table holds two marks, and the table stands between them::

    <!-- backends: made by `python scripts/tables.py` -->
    <!-- /backends -->

``python scripts/tables.py`` writes every such page again. With ``--check`` it writes nothing and ends with status 1
where a page would change.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from flashmha.backends import FEATURES, Backend, get, names, origin
from flashmha.benchmark.cases import Case
from flashmha.benchmark.costs import COST_LEGEND, SUITE, cost_table
from flashmha.benchmark.peers import HEADLINES
from flashmha.benchmark.report import (
    ENCODER_LEGEND,
    HOW_WORDS,
    TextTable,
    cell,
    cell_of_memory,
    encoder_table,
    extra_microseconds,
    faults,
    markdown_table,
    origin_line,
    percent,
    ratio_and_loss,
    summary_line,
    verdict_table,
    without_empty_columns,
)
from flashmha.benchmark.run_file import Run, levels, load
from flashmha.benchmark.texts import TEXT_LEGEND, text_table
from flashmha.benchmark.verdicts import best_peer, share_of_gemm

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
RUNS = {
    "cpu": "cpu",
    "gpu": "gpu",
    "model": "model_gpu",
    "compiled": "compiled_gpu",
    "model_cpu": "model_cpu",
    "heads_cpu": "heads_cpu",
    "heads_gpu": "heads_gpu",
    "heads_more_gpu": "heads_more_gpu",
    "generate_cpu": "generate_cpu",
    "generate_gpu": "generate_gpu",
}
"""Section -> the run it shows, a file of the results."""


# The backends


def backends_table() -> str:
    """One row a backend of this package, in Markdown."""
    rows = [backend_row(get(name)) for name in names() if origin(name) == "flashmha"]
    return markdown_table(("backend", "runs on", "dtypes", "head_dim", "serves"), rows)


def backend_row(backend: Backend) -> Sequence[str]:
    limits = backend.limits
    devices = ", ".join(limits.devices) or "every device"
    if limits.capability:
        devices += f" ({', '.join(f'sm{major}x' for major in limits.capability)})"
    head_dim = "any" if limits.head_dim is None else f"{limits.head_dim_min} to {limits.head_dim}"
    if limits.head_dim_step > 1:
        head_dim += f", multiples of {limits.head_dim_step}"
    absent = [name for name in FEATURES if name not in limits.features]
    present = [name for name in FEATURES if name in limits.features]
    serves = "everything" if not absent else ", ".join(present)
    if 0 < len(absent) < len(present):
        serves = "all but " + ", ".join(absent)
    for features in dict.fromkeys(limits.not_on.values()):
        where = ", ".join(device for device, absent in limits.not_on.items() if absent == features)
        serves += f"; on {where} no {', no '.join(name for name in FEATURES if name in features)}"
    if backend.remark is not None:
        serves += f"; {backend.remark}"
    dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in limits.dtypes)
    return f"`{backend.name}`", devices, dtypes, head_dim, serves


# The figures of a run

COLUMNS = (
    *("case", "stock as called", "stock at its best", "hand-written layer", "flash-attn's layer", "best peer"),
    *("memory", "of GEMM", "spread"),
)
Pair = tuple[str, str] | None
"""One of ours, and the peer it is compared with."""


def figures(run: Run) -> str:
    """The headline cases of a run, every case of attention alone, and what is said of them all."""
    suites = {case["case"]["suite"] for case in run["cases"]}
    if suites == {SUITE}:
        return suite_figures(run, cost_table, COST_LEGEND)
    if suites == {"generate"}:
        return suite_figures(run, text_table, TEXT_LEGEND)
    parts = []
    if "layer" in levels(run):
        parts += [layer_table(run), " ".join(layer_words(run))]
    if "encoder" in levels(run):
        shown = {**run, "cases": [case for case in run["cases"] if case["case"]["headline"]]}
        parts += [markdown_table(*encoder_table(shown, encoder_words)), ENCODER_LEGEND]
    if "core" in levels(run):
        parts += ["Attention alone, without projections:", markdown_table(*verdict_table(run, "core"))]
    return "\n\n".join([*parts, "\n".join(f"- {line}" for line in summary(run)), origin_line(run)])


def suite_figures(run: Run, table_of: Callable[..., TextTable], legend: str) -> str:
    """The table of a suite that has its own, each case by its words; the lost ones by their names."""
    table = markdown_table(*table_of(run, lambda case: case_name(Case.of(case["case"]))))
    return "\n\n".join([table, legend, "\n".join(f"- {line}" for line in summary(run)), origin_line(run)])


def case_name(case: Case) -> str:
    """A case of such a suite for a reader."""
    return ("attention alone, " if case.level == "core" else "") + case.words


def layer_table(run: Run) -> str:
    rows: list[Sequence[str]] = []
    shown = [case for case in run["cases"] if case["case"]["headline"] and case["case"]["level"] == "layer"]
    dtypes = {case["case"]["dtype"] for case in shown}
    for case in shown:
        words, ratios = Case.of(case["case"]).words, case["ratios"]
        if len(dtypes) > 1 and case["case"]["dtype"] != "float32":
            words += f", {case['case']['dtype']}"
        best, skip = "flashmha_best", "flashmha_skip"
        rows.append(layer_row(case, words, best, ("flashmha", "stock"), "stock_best"))
        if skip in ratios:
            rows.append(layer_row(case, f"{words}, `skip_padding`", skip, (skip, "stock"), "stock_best"))
        if "flashmha_graph" in ratios:
            rows.append(layer_row(case, words + HOW_WORDS["graph"], "flashmha_graph", None, "stock_graph", "_graph"))
        if "stock_slow" in ratios.get("flashmha", {}):
            rows.append(layer_row(case, f"{words}, stock off its fast path", "flashmha", None, "stock_slow"))
    return markdown_table(*without_empty_columns(COLUMNS, rows))


def layer_row(
    case: dict[str, Any], words: str, one: str, as_called: Pair, at_best: str, kind: str = ""
) -> Sequence[str]:
    pairs: list[Pair] = [as_called, (one, at_best)]
    pairs.append(None if at_best == "stock_slow" else (one, f"linear_sdpa{kind}"))
    found = [None if pair is None else case["ratios"].get(pair[0], {}).get(pair[1]) for pair in pairs]
    wide = max((each["q75"] / each["q25"] for each in found if each), default=1.0)
    layer, best = case["ratios"].get(one, {}).get("flash_attn_mha"), best_peer(case, one)
    share = share_of_gemm(case, one)
    against = "" if share is None else cell(case["ratios"].get(one, {}).get(best))
    return (
        words,
        *map(cell, found),
        "" if layer is None or kind else cell(layer),
        against,
        cell_of_memory(case, one, at_best),
        percent(share),
        f"±{50 * (wide - 1):.0f}%",
    )


def layer_words(run: Run) -> list[str]:
    """What is said below a table of layers."""
    said = [
        "How many times faster flashmha is. *stock as called*: both with default arguments, masks as tensors. Every "
        "other column: both told all they can be told, that no weights are wanted (unless they are read) and, with "
        "`is_causal=True`, that a causal mask is causal. *hand-written layer*: two `nn.Linear` around SDPA. *memory*: "
        "our peak as a share of stock's at its best. *spread*: half the width of the middle half of the rounds."
    ]
    for case in run["cases"]:
        if case["case"]["suite"] == "overhead" and "sdpa" in case["ratios"].get("attention", {}):
            extra = extra_microseconds(case, "attention", "sdpa")
            said.append(f"On tiny tensors `attention` takes {extra:.1f} us more than SDPA called by hand.")
    if run["canaries"]:
        dtypes = {case["case"]["dtype"] for case in run["cases"] if case["case"]["headline"]}
        said += [f"All in {dtypes.pop()}."] if len(dtypes) == 1 else []
        said.append(
            "*best peer* is the fastest of all that run as ours does, *of GEMM* our share of the rate of a large "
            "matrix product in the same rounds."
        )
    return said


def encoder_words(case: dict[str, Any]) -> str:
    """An encoder for a reader, dtype included."""
    found = Case.of(case["case"])
    return f"{found.words}, {found.dtype}" if found.autocast is None else found.words


def summary(run: Run) -> list[str]:
    """A line for each way that ours was run, with every case that was lost; and all that went wrong."""
    said = [summary_line(run, one) for one in run["summary"]]
    for case_id, name, status, reason in faults(run):
        first, *more = reason.split("; ")
        said.append(f"{case_id}: {name} is {status}: {first}{f' (and {len(more)} more)' * bool(more)}.")
    if run["dropped"]:
        why = "the run was stopped" if run.get("stopped") else "the time was spent"
        said.append(f"Dropped, since {why}: {len(run['dropped'])} cases ({', '.join(run['dropped'])}).")
    if run["unstable"]:
        drifted = sum(case["drifted"] for case in run["cases"])
        said.append(
            f"UNSTABLE: twins of ours differed by up to {run['noise_floor']:.1%}, and the rate of the machine drifted "
            f"in {drifted} cases: a ratio nearer to 1 than its spread or that floor says nothing."
        )
    return said


# The README's table

CHOSEN = (
    ("gpu", "dense/layer/train/b8s2048e2048h16", "flashmha_best"),
    ("gpu", "causal/layer/eval/b2s8192e2048h16", "flashmha_best"),
    ("gpu", "padded/layer/train/b8s2048e2048h16f62", "flashmha_best"),
    ("gpu", "padded/layer/eval/b4s8192e2048h16f75", "flashmha_best"),
    ("gpu", "weights/layer/train/b1s16384e2048h32c", "flashmha_best"),
    ("gpu", "small/layer/train/b8s512e512h8", "flashmha_best"),
    ("gpu", "padded/layer/train/b32s512e1024h16f59", "flashmha_best"),
    ("model", "model/encoder/train/n4b6s4096e1024h16f42-autocast", "flashmha_encoder_skip"),
    ("model", "model/encoder/train/n6b32s512e768h12f36-autocast", "flashmha_encoder"),
    ("cpu", "causal/layer/eval/b1s2048e512h8", "flashmha_best"),
    ("cpu", "padded/layer/train/b4s1024e512h8f47", "flashmha_best"),
)
"""Section, case and the one of ours: gains and losses of every kind."""

PEERS = {
    "linear_sdpa": "two linears, SDPA",
    "linear_flash_attn_4": "two linears, FA4",
    "stock_best": "stock",
    "packed_encoder": "packed by hand",
    "hand_encoder": "by hand",
}
"""What the README calls a peer; others go by their own name."""


def short_table() -> str:
    """A few cases of a GPU and a CPU, each against stock and against the fastest peer."""
    runs = {section: read(section) for section in dict.fromkeys(section for section, _, _ in CHOSEN)}
    rows = []
    for section, case_id, one in CHOSEN:
        run = runs[section]
        (case,) = [case for case in run["cases"] if case["id"] == case_id]
        best = best_peer(case, one)
        assert best is not None, f"{case_id} was timed with no peer"
        stock = "stock_encoder" if HEADLINES[one][0] == "encoder" else "stock_best"
        where = "H200" if "gpu" in run["env"] else "CPU"
        words = Case.of(case["case"]).words + ", `skip_padding`" * one.endswith("_skip")
        ratios = [ratio_and_loss(case["ratios"][one].get(peer), run["noise_floor"]) for peer in (stock, best)]
        against = f"{ratios[1]} ({PEERS.get(best, best)})"
        rows.append((f"{where}, {words}", ratios[0], against, cell_of_memory(case, one, stock)))
    return markdown_table(("case", "stock", "fastest peer", "memory"), rows)


# Caches

CACHE_RATES = RESULTS / "cache_rates_h200.json"
"""What ``scripts/cache_rates.py`` wrote."""
CACHE_COLUMNS = (
    *("rows × keys", "heads", "MiB", "rate of the best without lengths"),
    *("lengths", "drawn lengths", "pages of 64", "flash-attn 2 with lengths"),
)


def cache_rates() -> str:
    """How fast keys of a cache are read, beside the fastest that reads them without lengths."""
    found = json.loads(CACHE_RATES.read_text(encoding="utf-8"))
    rows = []
    for row in found["rows"]:
        batch, seqlen, heads, heads_kv, head_dim = row["shape"]
        seconds, size = row["seconds"], row["bytes"]
        least = min(seconds[name] for name in ("sdpa", "sdpa folded", "flash-attn 2") if name in seconds)
        shares = [least / seconds[name] for name in ("split_kv", "split_kv pages", "flash-attn 2 with lengths")]
        shares.insert(1, row["drawn"] * least / seconds["split_kv drawn"])
        grouped = f"{heads} on {heads_kv}" if heads != heads_kv else str(heads)
        sizes = (f"{batch} × {seqlen}", f"{grouped}, head_dim {head_dim}", f"{size / 2**20:.0f}")
        rows.append((*sizes, f"{size / least / 1e12:.2f} TB/s", *(f"{share:.2f}" for share in shares)))
    packages = found["env"]["packages"]
    said = (
        f"{found['gpu']}, {found['dtype']}, torch {found['env']['torch']}, flash-attn {packages.get('flash-attn')}, "
        f"{found['date']}; medians of {found['rounds']} rounds."
    )
    return f"{markdown_table(CACHE_COLUMNS, rows)}\n\n{said}"


# Pages


@functools.cache
def read(section: str) -> Run:
    """The run that a section shows."""
    return load(RESULTS / f"{RUNS[section]}.json")


def content(section: str) -> str:
    """What stands between the marks of a section."""
    if section == "backends":
        return backends_table()
    if section == "short":
        return short_table()
    if section == "cache_rates":
        return cache_rates()
    return figures(read(section))


SECTIONS = ("backends", "short", "cache_rates", *RUNS)


def marks(section: str) -> tuple[str, str]:
    """The lines around a section."""
    return f"<!-- {section}: made by `python scripts/tables.py` -->", f"<!-- /{section} -->"


def written(text: str, page: Path) -> str:
    """The text of a page with every section that it has a place for.

    Raises:
        ValueError: the page has half of a section, or one twice.
    """
    for section in SECTIONS:
        begin, end = marks(section)
        if begin not in text and end not in text:
            continue
        if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
            raise ValueError(f"{page} must hold the lines {begin!r} and {end!r} once, in this order.")
        text = f"{text.split(begin)[0]}{begin}\n{content(section)}\n{end}{text.split(end)[1]}"
    return text


def pages() -> list[Path]:
    """The README and every page of the site."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 where a page would change")
    options = parser.parse_args()
    stale = []
    for page in pages():
        text = page.read_text(encoding="utf-8")
        made = written(text, page)
        if made != text:
            stale.append(str(page.relative_to(ROOT)))
            if not options.check:
                page.write_text(made, encoding="utf-8")
    print(f"{'stale' if options.check else 'written'}: {', '.join(stale)}" if stale else "up to date")
    return int(options.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())

"""The tables a README shows: the backends out of their limits, and the figures of the committed benchmark."""

from __future__ import annotations

from pathlib import Path

from ..backends import get, names, origin
from ..backends.base import FEATURES, Backend
from ..benchmark.report import figures
from ..problem.wording import short

RESULTS = {
    "speed": Path("benchmarks", "results", "cpu.json"),
    "gpu": Path("benchmarks", "results", "gpu.json"),
    "model": Path("benchmarks", "results", "model_gpu.json"),
    "compiled": Path("benchmarks", "results", "compiled_gpu.json"),
    "model_cpu": Path("benchmarks", "results", "model_cpu.json"),
}
"""The runs the figures come from, beside the file that shows them."""

SECTIONS = ("backends", *RESULTS)
"""What stands between marks: the table of backends, and the figures of each run."""


def shown(results: Path) -> str:
    """The figures of a run, nothing where nobody has measured it yet."""
    return f"{figures(results)}\n" if results.exists() else ""


def table() -> str:
    """One row a backend of this package, in Markdown."""
    rows = ["| backend | runs on | dtypes | head_dim | serves |", "|---|---|---|---|---|"]
    rows += [row(get(name)) for name in names() if origin(name) == "flashmha"]
    return "\n".join(rows)


def row(backend: Backend) -> str:
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
    dtypes = ", ".join(short(dtype) for dtype in limits.dtypes)
    return f"| `{backend.name}` | {devices} | {dtypes} | {head_dim} | {serves} |"


def marks(section: str) -> tuple[str, str]:
    """The lines around a section."""
    return f"<!-- {section}: made by `python -m flashmha table --write README.md` -->", f"<!-- /{section} -->"


def write(path: Path) -> bool:
    """Put every section between its two marks in a file that has them; whether that changed it.

    Raises:
        ValueError: the file has no section, or half of one.
    """
    text = path.read_text(encoding="utf-8")
    made, found = text, False
    for section in SECTIONS:
        begin, end = marks(section)
        if begin not in text and end not in text:
            continue
        if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
            raise ValueError(f"{path} must hold the lines {begin!r} and {end!r} once, in this order.")
        content = f"{table()}\n" if section == "backends" else shown(path.parent / RESULTS[section])
        made = f"{made.split(begin)[0]}{begin}\n{content}{end}{made.split(end)[1]}"
        found = True
    if not found:
        wanted = " or ".join(repr(line) for section in SECTIONS for line in marks(section)[:1])
        raise ValueError(f"{path} must hold the lines {wanted}, each with its end, got none.")
    path.write_text(made, encoding="utf-8")
    return made != text

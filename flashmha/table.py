"""The table of backends, out of their limits: what ``python -m flashmha table`` prints and the README shows."""

from __future__ import annotations

from pathlib import Path

from .backends import get, names
from .backends.base import FEATURES, Backend
from .masks import short

BEGIN, END = "<!-- backends: made by `python -m flashmha table --write README.md` -->", "<!-- /backends -->"


def table() -> str:
    """One row a backend, in Markdown."""
    rows = ["| backend | runs on | dtypes | head_dim | serves |", "|---|---|---|---|---|"]
    rows += [row(get(name)) for name in names()]
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
    for device, features in limits.not_on.items():
        serves += f"; on {device} no {', no '.join(name for name in FEATURES if name in features)}"
    dtypes = ", ".join(short(dtype) for dtype in limits.dtypes)
    return f"| `{backend.name}` | {devices} | {dtypes} | {head_dim} | {serves} |"


def write(path: Path) -> bool:
    """Put the table between its two marks in a file; whether that changed it."""
    text = path.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        raise ValueError(f"{path} must hold the lines {BEGIN!r} and {END!r}, got neither or one.")
    before, rest = text.split(BEGIN, 1)
    after = rest.split(END, 1)[1]
    made = f"{before}{BEGIN}\n{table()}\n{END}{after}"
    path.write_text(made, encoding="utf-8")
    return made != text

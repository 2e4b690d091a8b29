"""The tuned table: what ``flashmha tune`` measured on this machine, read from its file and held against the machine.

It is asked before the built-in table, for what it holds. A file that was measured with anything else is refused.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import threading
from pathlib import Path
from typing import Any

import torch

from ...host.machine import HERE, KERNEL_PACKAGES, Machine
from ...problem.spec import AttentionSpec
from .measured import TABLE
from .ranking import KINDS, MODES, PLACE, Row, Table, keys, kind, mode
from .rows import derive

TABLE_VARIABLE = "FLASHMHA_TUNED"
SCHEMA = 1
"""The form of the file; a file of another one is measured again."""
DEVICES = ("cpu", "cuda", "mps", "xpu")
"""The device types that ``tune`` measures."""


@dataclasses.dataclass(frozen=True)
class Tuned:
    """A tuned table and what follows from it.

    Attributes:
        table: the table, ``None`` without one.
        path, found: its file and what that holds.
        settled: ``load_tuned`` was called or the variable was read.
        fits: it was held against this machine.
        known: what ``tables`` said.
        machine: what it is held against.
    """

    table: Table | None = None
    path: str = ""
    found: dict[str, Any] = dataclasses.field(default_factory=dict)
    settled: bool = False
    fits: bool = False
    known: dict[Any, list[Table]] = dataclasses.field(default_factory=dict)
    machine: Machine = HERE


state = Tuned()
"""Replaced and never changed, so that a thread reads one state of it."""
state_lock = threading.Lock()


def load_tuned(file: str | os.PathLike[str] | None) -> None:
    """Let automatic choice follow what ``flashmha tune --save FILE`` measured; ``None`` for the built-in table alone.

    It holds for the device type and the dtype that were measured, and takes the place of ``FLASHMHA_TUNED``. What
    ``torch.compile`` has compiled already stays as it is.

    Raises:
        ValueError: there is no such file, it is damaged, or it was measured with another GPU, torch or kernel package.
    """
    if file is not None and not isinstance(file, (str, os.PathLike)):
        raise TypeError(f"file must be a path, or None for the built-in table alone, got {file!r}.")
    replace(Tuned(settled=True, machine=state.machine) if file is None else matched(read(file)))


def replace(new: Tuned, before: Tuned | None = None) -> Tuned:
    """Put a state in the place of any, or of that one alone: what a variable names yields to ``load_tuned``."""
    global state
    with state_lock:
        if before is None or state is before:
            state = new
        return state


def read(file: str | os.PathLike[str]) -> Tuned:
    """A file of ``flashmha tune`` as a table, not yet held against this machine."""
    path = os.fspath(file)
    again = "make one with `flashmha tune --save FILE`"
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} must be a file that can be read, got {error.strerror or error}; {again}.") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} must be a file of `flashmha tune`, got no JSON ({error}); {again}.") from error
    command, schema = (found.get(name) if isinstance(found, dict) else None for name in ("command", "schema"))
    if (command, schema) != ("tune", SCHEMA):
        raise ValueError(
            f"{path} must be a file of `flashmha tune` of schema {SCHEMA}, got command {command!r} and schema "
            f"{schema!r}; {again}."
        )
    try:
        check_measurement(found)
        dtype = getattr(torch, found["dtype"])
        table = Table(
            f"{path}, of {found['date']}", found["device"], (dtype,), derive(found["cells"], path), gpu=found["gpu"]
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        said = f"misses {error}" if isinstance(error, KeyError) else f"holds what `tune` does not write: {error}"
        raise ValueError(f"{path} must be a whole file of `flashmha tune`, but it {said}; {again}.") from error
    return Tuned(table, path, found, settled=True, machine=state.machine)


def check_measurement(found: dict[str, Any]) -> None:
    """Raise where a file's fields are not what ``tune`` writes, or nothing was measured."""
    dtype = getattr(torch, found["dtype"])
    if not isinstance(dtype, torch.dtype) or not isinstance(found["env"]["packages"], dict):
        raise ValueError(f"dtype {dtype!r}")
    if found["device"] not in DEVICES:
        raise ValueError(f"device {found['device']!r}, which is none of {', '.join(DEVICES)}")
    if not any(cell["us"] for cell in found["cells"]):
        raise ValueError("no cell with a time")
    for cell in found["cells"]:
        if cell["kind"] not in KINDS or cell["mode"] not in MODES:
            raise ValueError(f"kind {cell['kind']!r} and mode {cell['mode']!r}")
        if not all(isinstance(cell[name], int) for name in PLACE[2:]):
            raise ValueError(f"sizes {cell['head_dim']!r} and {cell['keys']!r}")
        for name, time in cell["us"].items():
            if not isinstance(time, (int, float)) or not math.isfinite(time) or time <= 0:
                raise ValueError(f"{time!r} microseconds of {name}")


def matched(new: Tuned) -> Tuned:
    """A table that was measured with what this machine has."""
    for name, was, now in differences(new.found, new.machine):
        raise ValueError(
            f"{new.path} must be measured with what runs here: it was measured with {name} {was or 'not installed'} "
            f"and this is {now or 'not installed'}; run `flashmha tune --save {new.path}` again."
        )
    return dataclasses.replace(new, fits=True, known={})


def differences(found: dict[str, Any], machine: Machine = HERE) -> list[tuple[str, Any, Any]]:
    """Differences between what a file was measured with and what is here: name, then, now."""
    env = found["env"]
    rows: list[tuple[str, Any, Any]] = [("torch", env.get("torch"), str(torch.__version__))]
    if found["device"] == "cuda":
        here = (
            [machine.graphics(index)[0] for index in range(torch.cuda.device_count())]
            if torch.cuda.is_available()
            else []
        )
        gpu = found["gpu"]
        rows.append(("the GPU", gpu, gpu if gpu in here else ", ".join(dict.fromkeys(map(str, here))) or None))
        rows.append(("CUDA", env.get("cuda"), torch.version.cuda))
        rows.append(("cuDNN", env.get("cudnn"), torch.backends.cudnn.version() if here else None))
        now = machine.installed()
        rows += [(package, env["packages"].get(package), now.get(package)) for package in KERNEL_PACKAGES]
    return [row for row in rows if row[1] != row[2]]


def state_on(device: str) -> Tuned:
    """The state that holds on a device type; the first call reads the variable.

    Raises:
        ValueError: as ``load_tuned``, for the file that the variable names, each time until there is another one.
    """
    try:
        now = state
        if not now.settled:
            file = os.environ.get(TABLE_VARIABLE)
            now = replace(read(file) if file else Tuned(settled=True, machine=now.machine), now)
        if now.table is not None and now.table.device == device and not now.fits:
            now = replace(matched(now), now)
        return now
    except ValueError as error:
        raise ValueError(f"{TABLE_VARIABLE}: {error}") from error


def tables(device: str, index: int | None, dtype: torch.dtype | None = None) -> list[Table]:
    """The tables for a device and a dtype, ``None`` for any, the strongest first."""
    key = (device, index, dtype)
    found = state.known.get(key)
    if found is None:
        now = state_on(device)
        found = [table for table in (now.table, TABLE) if table is not None and table.applies(*key, now.machine)]
        if index is not None or device == "cpu":  # else the current device, which may be another one next time
            now.known[key] = found
    return found


def measured(device: str, index: int | None, dtype: torch.dtype) -> bool:
    """Some table is for such a device and dtype."""
    return bool(tables(device, index, dtype))


def table_name(device: str, index: int | None, dtype: torch.dtype, kind: str, mode: str) -> str:
    """The name of the table that has rows for a kind of problem: the tuned one, else the built-in one, else empty."""
    return next((table.name for table in tables(device, index, dtype) if (kind, mode) in table.places), "")


# What torch.compiler.assume_constant_result sets: a first choice under fullgraph=True reads the file while it traces.
# Dynamo can hold bools and strings that come from there, and no rows.
measured._dynamo_marked_constant = True  # type: ignore[attr-defined]
table_name._dynamo_marked_constant = True  # type: ignore[attr-defined]


def measured_row(spec: AttentionSpec) -> Row | None:
    """The measurement for a problem, ``None`` where there is none.

    Sizes are compared last: under a compiler that binds a graph to a range of them.
    """
    if spec.aten_only:
        return None
    device, index = spec.device.type, spec.device.index
    if not measured(device, index, spec.dtype):
        return None
    name = kind(spec)
    if name == "other":
        return None
    place = (name, mode(spec))
    strongest, many, table = table_name(device, index, spec.dtype, *place), keys(spec), state.table
    if not strongest:
        return None
    rows = TABLE.places[place] if table is None or table.name != strongest else table.places[place]
    for one in rows:
        if one.covers(spec.head_dim, many):
            return one
    return None

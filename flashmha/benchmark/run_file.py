"""The file of a run: JSON, one line a case."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..problem.wording import summarize_error
from .verdicts import judge_cases

Run = dict[str, Any]
RUN_PARTS = ("run", "env", "absent", "dropped", "unstable", "cases")
"""What a file of a run holds beside what its cases say."""


def save(run: Run, path: Path) -> None:
    """Write a run as JSON, one line a case."""
    head = {name: value for name, value in run.items() if name != "cases"}
    lines = ",\n".join(json.dumps(case, allow_nan=False, separators=(",", ":")) for case in run["cases"])
    text = json.dumps(head, indent=1, allow_nan=False)
    path.write_text(f'{text.rstrip()[:-1].rstrip()},\n "cases": [\n{lines}\n]}}\n', encoding="utf-8")


def load(path: Path) -> Run:
    """A run back from its file, judged again.

    Raises:
        ValueError: the file is no run of this schema.
    """
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} must be a file that can be read, got {error.strerror or error}.") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} must hold JSON, got {error}.") from None
    schema = run.get("schema") if isinstance(run, dict) else None
    if schema != 1:
        raise ValueError(f"{path} must hold a benchmark run of schema 1, got schema {schema}.")
    missing = [name for name in RUN_PARTS if name not in run]
    if missing:
        raise ValueError(f"{path} must hold a whole benchmark run, got one without {', '.join(missing)}.")
    try:
        return {**run, **judge_cases(run["cases"])}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} must hold cases as `bench` writes them, got {summarize_error(error)}.") from error


def levels(run: Run) -> list[str]:
    """The levels a run has cases of."""
    return list(dict.fromkeys(case["case"]["level"] for case in run["cases"]))

"""The page of a run: every table, in Markdown."""

from __future__ import annotations

from .costs import COST_LEGEND, cost_table
from .report import (
    ENCODER_LEGEND,
    LEGEND,
    absences_table,
    contestants_table,
    markdown_table,
    origin_line,
    summary_lines,
    verdict_table,
)
from .run_file import Run, levels
from .texts import TEXT_LEGEND, text_table


def markdown(run: Run) -> str:
    """The whole report as a page."""
    parts = ["# Benchmark", origin_line(run), "\n".join(f"- {line}" for line in summary_lines(run)), LEGEND]
    for level in levels(run):
        parts += [f"## Level {level}", *[ENCODER_LEGEND] * (level == "encoder")]
        parts.append(markdown_table(*verdict_table(run, level)))
    columns, rows = cost_table(run)
    texts, lines = text_table(run)
    parts += ["## Writing with a cache", TEXT_LEGEND, markdown_table(texts, lines)] if lines else []
    parts += ["## What options of heads cost", COST_LEGEND, markdown_table(columns, rows)] if rows else []
    for title, (columns, rows) in (("All that took part", contestants_table(run)), ("Not timed", absences_table(run))):
        parts += [f"## {title}", markdown_table(columns, rows)] if rows else []
    if run["absent"]:
        parts += ["Not here: " + "; ".join(f"`{name}` ({why})" for name, why in run["absent"].items()) + "."]
    return "\n\n".join(parts) + "\n"

"""``flashmha tune``: time every backend of this machine on a grid of problems, for automatic choice to follow."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import datetime
import gc
import json
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..backends import FAMILIES, expand, get, names, origin
from ..backends.choice.choose import reason
from ..backends.choice.ranking import KINDS, LAST, MARGIN, MODES, Row, Table, derive, keys
from ..backends.choice.tuned import SCHEMA, read
from ..benchmark.environment import commit, environment
from ..functional import attention
from ..host.clock import seconds, wait
from ..host.machine import graphics
from ..problem.masks import Dense, Documents, KeyPadding, Mask, Window, causal, find
from ..problem.spec import AttentionSpec
from ..problem.wording import in_one_line, short
from ..version import __version__
from .destination import check_file
from .devices import device
from .explain import DTYPES, at_least
from .screen import add_json, print_json, print_table, progress


@dataclasses.dataclass(frozen=True)
class Grid:
    """What is measured where nobody says.

    Attributes:
        dtype, head_dims, seqlens: the grid.
        tokens, width: of every problem but ``decode``: batch * seqlen, and heads * head_dim.
        decode: batch, heads, heads_kv, head_dim and numbers of keys of ``decode``.
        rounds: turns of every backend in a cell; fewer, but ``FEWEST``, where its share of the budget is spent.
        budget: seconds in all.
        block: seconds that the calls of one turn take together, about.
    """

    dtype: str
    head_dims: tuple[int, ...]
    seqlens: tuple[int, ...]
    tokens: int
    width: int
    decode: tuple[int, int, int, int, tuple[int, ...]]
    rounds: int
    budget: float
    block: float


GRIDS = {
    "cuda": Grid(
        dtype="bfloat16",
        head_dims=(64, 128, 256),
        seqlens=(512, 1024, 2048, 4096, 8192, 16384),
        tokens=16384,
        width=2048,
        decode=(8, 32, 8, 128, (1024, 8192, 65536)),
        rounds=7,
        budget=190.0,
        block=2e-3,
    ),
    "cpu": Grid(
        dtype="float32",
        head_dims=(64,),
        seqlens=(128, 512),
        tokens=512,
        width=256,
        decode=(1, 8, 2, 64, (1024,)),
        rounds=7,
        budget=45.0,
        block=1e-3,
    ),
}
"""By device type; another accelerator has the CPU's."""

FEWEST = 3
QUERIES = (1, 8)
"""Of ``decode``."""
REACH = 256
"""Keys before a query in ``window``, at most; a quarter of the sequence in a short one."""
ROWS = 64
"""Queries of a cell whose answer is held against the definition."""
WRONG = 0.05
"""How far from the definition an answer may lie, as a share of its largest value. No judge of precision, as ``verify``
is: it keeps a kernel that computes something else from winning."""
SPENT, STOPPED = "the budget is spent", "stopped by hand"
LEFT_OUT = {"cpu": frozenset(("flex",))}
"""Who is left out where nobody names them, by device type."""
ELSEWHERE = frozenset(("flex", LAST))
"""The same on a GPU, where flex compiles for every shape and the definition never wins."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--save", type=Path, metavar="FILE", help="where the measurement goes, for load_tuned")
    parser.add_argument("--device", help="default: the first accelerator, or cpu")
    parser.add_argument("--dtype", choices=DTYPES, help="default bfloat16, on a CPU float32")
    size = at_least(1)
    parser.add_argument("--head-dims", nargs="+", type=size, metavar="N", help="default 64 128 256, on a CPU 64")
    parser.add_argument("--seqlens", nargs="+", type=size, metavar="N", help="default 512 to 16384, on a CPU 128 512")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, metavar="KIND", help=f"among {', '.join(KINDS)}")
    parser.add_argument("--pass", nargs="+", choices=MODES, dest="modes", help="only these")
    parser.add_argument("--backends", nargs="+", metavar="NAME", help="default: ours, but flex, and on a GPU naive")
    parser.add_argument("--rounds", type=size, metavar="N", help="turns of every backend in a cell, at most, default 7")
    parser.add_argument(
        "--budget", type=float, metavar="SECONDS", help="drop the last cells to take no longer, default 190 (CPU: 45)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the data and of every round's order, default 0")
    parser.add_argument("--rows", type=Path, metavar="FILE", help="measure nothing: the rows that such a file gives")
    add_json(parser)


@dataclasses.dataclass(frozen=True)
class Cell:
    """One problem to measure: its kind and mode, and its sizes."""

    kind: str
    mode: str
    batch: int
    seqlen_q: int
    seqlen_k: int
    heads: int
    heads_kv: int
    head_dim: int
    document: int | None = None

    def __str__(self) -> str:
        return f"{self.kind}, {self.mode}, head_dim {self.head_dim}, {self.sizes}"

    @property
    def sizes(self) -> str:
        """Queries on keys, or how long each of the documents is."""
        return f"{self.seqlen_q} on {self.seqlen_k}" if self.document is None else f"{self.document} each"


def cells(
    grid: Grid, kinds: Sequence[str], modes: Sequence[str], head_dims: Sequence[int], seqlens: Sequence[int] | None
) -> list[Cell]:
    """The cells, those that matter most first, and those that share a kernel in a row."""
    found: list[Cell] = []
    middle = statistics.median_low(head_dims)
    batch, heads, heads_kv, wide, many = grid.decode
    if "decode" in kinds and "eval" in modes:
        for seqlen in seqlens or many:
            found += [Cell("decode", "eval", batch, few, seqlen, heads, heads_kv, wide) for few in QUERIES]
    for head_dim in sorted(head_dims, key=lambda one: (one != middle, one)):
        heads = max(1, grid.width // head_dim)
        for kind in kinds:
            if kind == "decode":
                continue
            for mode in modes:
                for seqlen in seqlens or grid.seqlens:
                    batch = max(1, grid.tokens // seqlen)
                    if kind == "documents":
                        total = batch * seqlen
                        found.append(Cell(kind, mode, 1, total, total, heads, heads, head_dim, seqlen))
                    else:
                        found.append(Cell(kind, mode, batch, seqlen, seqlen, heads, heads, head_dim))
    return found


def mask_of(cell: Cell, generator: torch.Generator, where: torch.device) -> Mask | None:
    """The mask of a cell; padding is on the right, as in most models, and half of a sequence at most.

    The mask tensor is the causal one, as most of those are that long sequences are called with.
    """
    if cell.document is not None:
        offsets = torch.arange(0, cell.seqlen_k + 1, cell.document, dtype=torch.int32)
        return Documents(offsets.to(where), max_seqlen=cell.document) & causal()
    if cell.kind == "mask tensor":
        return Dense(torch.ones(cell.seqlen_q, cell.seqlen_k, dtype=torch.bool, device=where).tril())
    if cell.kind == "window":
        return Window(min(REACH, cell.seqlen_k // 4), 0)
    if cell.kind == "causal":
        return causal()
    if cell.kind in ("padded", "padded causal"):
        real = torch.randint(max(1, cell.seqlen_k // 2), cell.seqlen_k + 1, (cell.batch, 1), generator=generator)
        padding = KeyPadding((torch.arange(cell.seqlen_k) < real).to(where))
        return padding if cell.kind == "padded" else padding & causal()
    return None


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The tensors of a cell: q, k and v as views of a packed projection, what arrives in the output's gradient."""

    q: Tensor
    k: Tensor
    v: Tensor
    arriving: Tensor
    mask: Mask | None

    @classmethod
    def of(cls, cell: Cell, dtype: torch.dtype, where: torch.device, seed: int) -> Inputs:
        generator = torch.Generator().manual_seed(seed)
        there = torch.Generator(where).manual_seed(seed)

        def draw(seqlen: int, heads: int) -> Tensor:
            shape = (cell.batch, seqlen, heads, cell.head_dim)
            return torch.randn(shape, generator=there, device=where, dtype=torch.float32).to(dtype)

        if cell.seqlen_q == cell.seqlen_k:
            packed = draw(cell.seqlen_k, cell.heads + 2 * cell.heads_kv)
            q, k, v = packed.split((cell.heads, cell.heads_kv, cell.heads_kv), dim=2)
        else:
            q = draw(cell.seqlen_q, cell.heads)
            k, v = draw(cell.seqlen_k, 2 * cell.heads_kv).chunk(2, dim=2)
        train = cell.mode == "train"
        q, k, v = (x.detach().requires_grad_(train) for x in (q, k, v))
        return cls(q, k, v, draw(cell.seqlen_q, cell.heads), mask_of(cell, generator, where))

    def spec(self) -> AttentionSpec:
        return AttentionSpec.of(self.q, self.k, self.v, mask=self.mask)

    def run(self, backend: str) -> list[Tensor]:
        """The output, and the gradients of q, k and v where they are wanted."""
        out = attention(self.q, self.k, self.v, mask=self.mask, backend=backend)
        assert isinstance(out, Tensor)
        return [out, *torch.autograd.grad(out, (self.q, self.k, self.v), self.arriving)] if out.requires_grad else [out]


class Definition:
    """What the definition says of the last queries of a cell's first item, and of the gradient of those, in float32."""

    def __init__(self, inputs: Inputs) -> None:
        group = inputs.q.shape[2] // inputs.k.shape[2]
        self.queries = slice(max(0, inputs.q.shape[1] - ROWS), None)
        self.heads = slice(0, group)
        keys, mask = slice(None), inputs.mask
        documents = find(mask, Documents)
        if documents is not None:  # the last queries are those of the last document
            start = int(documents.cu_seqlens[-2])
            keys, mask = slice(start, None), causal()
            self.queries = slice(max(start, self.queries.start), None)
        dense, padding = find(mask, Dense), find(mask, KeyPadding)
        if dense is not None:
            mask = Dense(dense.allowed[:, :, self.queries])
        if mask is not None and padding is not None:
            first: Mask = KeyPadding(padding.valid[:1])
            mask = first if find(mask, Window) is None else first & causal()
        train = inputs.q.requires_grad
        q = inputs.q.detach()[:1, self.queries, self.heads].float().requires_grad_(train)
        k, v = (x.detach()[:1, keys, :1].float() for x in (inputs.k, inputs.v))
        out = attention(q, k, v, mask=mask, backend=LAST)
        assert isinstance(out, Tensor)
        self.parts = [out.detach()]
        if train:
            self.parts += torch.autograd.grad(out, q, inputs.arriving[:1, self.queries, self.heads].float())

    def error(self, answer: Sequence[Tensor]) -> float:
        """How far an answer lies from it, as a share of its largest value."""
        worst = 0.0
        for part, tensor in zip(self.parts, answer):
            away = (tensor.detach()[:1, self.queries, self.heads].float() - part).abs().max()
            worst = max(worst, float(away / part.abs().max().clamp(min=1e-30)), key=lambda x: math.inf if x != x else x)
        return worst


def measure(
    cell: Cell, wanted: Sequence[str], dtype: torch.dtype, where: torch.device, grid: Grid, share: float, seed: int
) -> dict[str, Any]:
    """A cell measured in a share of the budget: microseconds of a call, their spread, and why nothing of the others."""
    inputs = Inputs.of(cell, dtype, where, seed)
    spec = inputs.spec()
    definition = Definition(inputs)
    row: dict[str, Any] = {**dataclasses.asdict(cell), "keys": keys(spec), "absent": {}}
    calls: dict[str, int] = {}
    for name in wanted:
        why = reason(get(name), spec) or too_large(name, spec, where)
        if why is None:
            try:
                error = definition.error(inputs.run(name))  # compiles, too
                if error <= WRONG:
                    calls[name] = in_a_row(lambda name=name: inputs.run(name), where, grid.block)  # type: ignore[misc]
                else:
                    why = f"wrong: {error:.3g} of the largest value away from the definition (at most {WRONG})"
            except Exception as error:  # a kernel may raise anything, and is then not the fastest
                why = in_one_line(error)
        if why is not None:
            row["absent"][name] = why
    times: dict[str, list[float]] = {name: [] for name in calls}
    shuffler, began = random.Random(seed), time.monotonic()
    for turn in range(grid.rounds):
        if turn >= FEWEST and time.monotonic() - began > share:
            break
        for name in shuffler.sample(list(times), len(times)):
            try:
                times[name].append(taken(lambda name=name: inputs.run(name), calls[name], where))  # type: ignore[misc]
            except Exception as error:
                row["absent"][name] = in_one_line(error)
                del times[name]
    row["us"] = {name: float(f"{statistics.median(each) * 1e6:.5g}") for name, each in times.items()}
    row["spread"] = {name: float(f"{spread(each):.3g}") for name, each in times.items()}
    return row


def spread(times: Sequence[float]) -> float:
    """Half the width of the middle half, as a share of the median."""
    if len(times) < 2:
        return 0.0
    low, median, high = statistics.quantiles(times, n=4, method="inclusive")
    return (high - low) / 2 / median


def too_large(name: str, spec: AttentionSpec, where: torch.device) -> str | None:
    """Why the definition, which holds several tensors of every score in float32, must not be tried here."""
    if name != LAST:
        return None
    needed = 6 * 4 * spec.batch * spec.heads * spec.seqlen_q * spec.seqlen_k
    free = torch.cuda.mem_get_info(where)[0] if where.type == "cuda" else 2**31
    return None if needed < free / 2 else f"needs about {needed / 2**30:.0f} GiB"


def taken(run: Callable[[], object], calls: int, where: torch.device) -> float:
    """Seconds of one of several calls in a row; on a CPU with the threads torch has, as a model runs."""
    if where.type == "cuda" or torch.get_num_threads() == 1:
        return seconds(run, calls, where)
    began = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - began) / calls


def in_a_row(run: Callable[[], object], where: torch.device, block: float) -> int:
    """How many calls take about ``block`` seconds, after one more to warm up."""
    run()
    wait(where)
    return max(1, min(100, round(block / max(1e-6, taken(run, 1, where)))))


def tune(options: argparse.Namespace) -> dict[str, Any]:
    """Measure what the flags say; everything known afterwards, ready for JSON."""
    where = device(options.device)
    grid = GRIDS.get(where.type, GRIDS["cpu"])
    grid = dataclasses.replace(grid, rounds=options.rounds or grid.rounds, budget=options.budget or grid.budget)
    dtype = getattr(torch, options.dtype or grid.dtype)
    wanted = backends(options.backends, where)
    todo = cells(
        grid, options.kinds or KINDS, options.modes or MODES, options.head_dims or grid.head_dims, options.seqlens
    )
    began, date = time.monotonic(), datetime.datetime.now(datetime.timezone.utc)
    measured: list[dict[str, Any]] = []
    dropped: dict[str, str] = {}
    env, share = environment(where), grid.budget / max(1, len(todo))
    with progress(f"{len(todo)} problems", len(todo)) as advance:
        for cell in todo:
            if STOPPED in dropped.values():
                dropped[str(cell)] = STOPPED
            elif time.monotonic() - began < grid.budget:
                try:
                    measured.append(measure(cell, wanted, dtype, where, grid, share, options.seed))
                    gc.collect()
                    if where.type == "cuda":
                        torch.cuda.empty_cache()
                except RuntimeError as error:  # no memory for its tensors, or a kernel has left the GPU in ruins
                    dropped[str(cell)] = in_one_line(error)
                except KeyboardInterrupt:  # what was measured before is kept
                    dropped[str(cell)] = STOPPED
            else:
                dropped[str(cell)] = SPENT
            advance()
    name, major = graphics(where.index) if where.type == "cuda" else (None, None)
    return {
        "schema": SCHEMA,
        "command": "tune",
        "flashmha": __version__,
        **commit(),
        "date": date.date().isoformat(),
        "seconds": round(time.monotonic() - began, 1),
        "device": where.type,
        "gpu": name,
        "capability": major,
        "dtype": short(dtype),
        "rounds": grid.rounds,
        "env": env,
        "dropped": dropped,
        "cells": measured,
    }


def backends(named: Sequence[str] | None, where: torch.device) -> tuple[str, ...]:
    """Who is measured, in the order of the list.

    Raises:
        ValueError: a name that is no backend's, or of one that is not available.
    """
    if named is None:
        ours = [name for name in names() if origin(name) == "flashmha"]
        left_out = LEFT_OUT.get(where.type, ELSEWHERE)
        return tuple(name for name in ours if name not in left_out and get(name).why_not_here(where) is None)
    for name in expand(list(named), "--backends"):
        why = get(name).why_not_here(where)
        if why is not None and not any(one in FAMILIES for one in named):
            raise ValueError(f"--backends must be available on {where}, got {name!r}: {why}.")
    asked = expand(list(named))
    return tuple(name for name in names() if name in asked and get(name).why_not_here(where) is None)


def main(options: argparse.Namespace) -> int:
    if options.rows is not None:
        if options.save is not None:
            raise ValueError(f"--rows measures nothing that --save could write, got --save {options.save}.")
        return show_rows(options.rows, options.json)
    if options.budget is not None and not options.budget > 0:
        raise ValueError(f"--budget must be positive, got {options.budget}.")
    if options.save is not None:
        check_file(options.save, "--save")
    found = tune(options)
    measured = any(cell["us"] for cell in found["cells"])
    if options.save is not None and measured:
        try:
            options.save.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        except OSError:  # the disk is full by now: what took minutes must not be lost
            print_json(found)
            raise
    if options.save is not None and not measured:
        print(f"nothing was measured, so that {options.save} was not written", file=sys.stderr)
    status = 1 if (options.save is not None and not measured) or STOPPED in found["dropped"].values() else 0
    if options.json:
        print_json(found)
        return status
    print_table(*shown(found["cells"]))
    print(LEGEND if found["cells"] else "", end="\n" if found["cells"] else "")
    for why, many in collections.Counter(found["dropped"].values()).items():
        print(f"{many} of {len(found['dropped']) + len(found['cells'])} problems were dropped: {why}", file=sys.stderr)
    if options.save is not None and measured:
        print(f"\nflashmha.load_tuned({str(options.save)!r}) or FLASHMHA_TUNED={options.save} follows it")
    return status


LEGEND = (
    "* what automatic choice takes by these figures; ± half the middle half of the rounds. Where that\n"
    f"or {MARGIN:.0%} is all that tells two apart, the order of the list stands; {LAST} is never put in front."
)


def shown(cells: Sequence[dict[str, Any]]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """A table: a cell a line, microseconds and their spread, and a mark at what the rows of these cells choose."""
    names = tuple(dict.fromkeys(name for cell in cells for name in (*cell["us"], *cell["absent"])))
    table = Table("", "", (), derive(cells, ""))
    rows = []
    for row in cells:
        cell = Cell(**{field.name: row[field.name] for field in dataclasses.fields(Cell)})
        covering = [one for one in table.places[cell.kind, cell.mode] if one.covers(cell.head_dim, row["keys"])]
        chosen = next((name for one in covering[:1] for name in one.order if name in row["us"]), None)
        figures = [
            f"{row['us'][name]:.0f}{'*' * (name == chosen)} ±{row['spread'][name]:.0%}" if name in row["us"] else "-"
            for name in names
        ]
        rows.append((cell.kind, cell.mode, str(cell.head_dim), cell.sizes, *figures))
    return ("kind", "pass", "head_dim", "seqlen", *(f"{name} us" for name in names)), rows


def show_rows(path: Path, json: bool) -> int:
    """The rows that a file gives: as the source of a table, or as JSON."""
    rows = derive(read(path).found["cells"], path.as_posix())
    if json:
        print_json([dataclasses.asdict(row) for row in rows])
    else:
        print("\n".join(map(literal, rows)))
    return 0


def literal(row: Row) -> str:
    """A row as ``ranking.py`` writes it."""
    parts = (row.kinds, row.modes, row.order)
    names = [f"({', '.join(map(json.dumps, part))}{',' * (len(part) == 1)})" for part in parts]
    bounds = [f"{name}={value}" for name in ("head_dim", "keys") if (value := getattr(row, name)) is not None]
    return f"Row({', '.join([*names, 'SOURCE', *bounds])}),"

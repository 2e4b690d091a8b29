"""The command line: what it answers, what it refuses, and a backend package installed for real."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import itertools
import json
import math
import os
import shutil
import site
import subprocess
import sys
import time
import venv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_ranking import answering, nothing
from torch import Tensor

import flashmha
from flashmha import (
    ALiBi,
    AttentionSpec,
    Backend,
    KeyLengths,
    Limits,
    Mask,
    NoBackendError,
    Window,
    attention,
    backends,
)
from flashmha.__main__ import COMMANDS, main
from flashmha.backends import get, names
from flashmha.backends.choice import builtin, ranking, tuned
from flashmha.backends.choice import rows as derived
from flashmha.backends.choice.ranking import KINDS, MODES, Row
from flashmha.backends.choice.registry import instead
from flashmha.backends.flash_attn.flash4 import Flash4
from flashmha.benchmark import tuning
from flashmha.benchmark.grid import GRIDS, STEPS, grid_cells
from flashmha.commands import tune, verify
from flashmha.commands.destination import check_file, check_folder

ROOT = Path(flashmha.__file__).parents[1]
SMALLEST_CASE = "overhead/core/eval/b1s8e64h4"
SMALLEST_BENCH = ("bench", "--case", SMALLEST_CASE, "--rounds", 1, "--budget", "1e9")


class Terminal(io.StringIO):
    """A stdout that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def run(*arguments: Any, out: io.StringIO | None = None) -> tuple[int, str, str]:
    """A command's status, stdout and stderr."""
    out, err = out or io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as left:
            status = int(left.code or 0)
    return status, out.getvalue(), err.getvalue()


def answer(*arguments: Any) -> Any:
    """What a command says with ``--json``: its stdout is JSON and nothing else."""
    status, out, err = run(*arguments, "--json")
    assert status in (0, 1), err
    return json.loads(out, parse_constant=lambda constant: pytest.fail(f"{constant} is no JSON"))


@contextlib.contextmanager
def registered(*kinds: type[Backend]) -> Iterator[None]:
    for kind in kinds:
        backends.register(kind)
    try:
        yield
    finally:
        for kind in kinds:
            backends.unregister(kind.name)


# info and table


@pytest.mark.parametrize("terminal", (False, True))
def test_info_says_what_every_backend_says_of_every_device(terminal: bool) -> None:
    said = answer("info")
    assert said["versions"]["torch"] == torch.__version__
    assert [backend["name"] for backend in said["backends"]] == list(names())
    for device in said["devices"]:
        reasons = {name: get(name).why_not_here(torch.device(device["device"])) for name in names()}
        assert {name: row["reason"] for name, row in device["backends"].items()} == reasons
        assert all(row["available"] == (row["reason"] is None) for row in device["backends"].values())
    assert said["devices"][0]["device"] == "cpu"
    status, out, _ = run("info", out=Terminal() if terminal else None)
    assert status == 0
    assert all(name in out for name in names()) and torch.__version__ in out


@given(named=st.lists(st.sampled_from(names()), min_size=1, max_size=3, unique=True))
def test_info_says_where_every_call_raises(named: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLASHMHA_BACKEND", ",".join(named))
        said = answer("info")
        _, out, _ = run("info")
    for device in said["devices"]:
        there = [name for name in named if device["backends"][name]["available"]]
        raises = device["calls_raise"]
        assert (raises is None) == bool(there)
        if raises is not None:
            assert raises in out and raises.startswith(f"FLASHMHA_BACKEND={','.join(named)}: every call on this device")
            assert all(f"{name}: {device['backends'][name]['reason']}" in raises for name in named)
    q = torch.zeros(1, 2, 1, 8, device="cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLASHMHA_BACKEND", ",".join(named))
        with contextlib.nullcontext() if said["devices"][0]["calls_raise"] is None else pytest.raises(NoBackendError):
            attention(q, q, q)


def test_info_says_where_compiled_kernels_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, folder, wanted in (
        ("0", None, "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED=1 keeps them on disk"),
        ("1", "somewhere", "kernels are kept in somewhere"),
        ("1", None, "flash_attention_cute_dsl_cache"),
    ):
        monkeypatch.setenv("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", value)
        monkeypatch.setenv("FLASH_ATTENTION_CUTE_DSL_CACHE_DIR", folder or "")
        with instead(answering(Flash4, why_not_here=nothing)):
            rows = answer("info")["devices"][0]["backends"]
            assert wanted in rows["flash4"]["on_disk"] and rows["naive"]["on_disk"] is None
            assert f"flash4: {rows['flash4']['on_disk']}" in run("info")[1]


WRONG_VARIABLES = {
    "FLASHMHA_BACKEND": ("nonsense", "sdpa,nonsense", "sdpa,", ",", " "),
    "FLASHMHA_TUNED": ("nowhere.json", ".", "pyproject.toml", "[]", "{}"),
}
"""What cannot be followed; of a table, the name of a file or what stands in one."""


@pytest.fixture
def untuned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No tuned table, before and after."""
    monkeypatch.delenv(tuned.TABLE_VARIABLE, raising=False)
    tuned.replace(tuned.Tuned())
    yield
    tuned.replace(tuned.Tuned())


CALLS = {
    "info": (),
    "explain": ("--device", "cpu"),
    "verify": ("--backend", "naive", "--device", "cpu", "--examples", 1),
    "bench": ("--list",),
}


@pytest.mark.usefixtures("untuned")
@pytest.mark.parametrize("command", CALLS)
@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, those in WRONG_VARIABLES.items() for value in those]
)
def test_a_variable_that_cannot_be_followed_is_an_error_of_every_command(
    name: str, value: str, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if value in ("[]", "{}"):
        (tmp_path / "tuned.json").write_text(value)
        value = str(tmp_path / "tuned.json")
    monkeypatch.setenv(name, value)
    status, out, err = run(command, *CALLS[command])
    assert status == 2 and err.count("\n") == 1 and name in err and "Traceback" not in err
    assert (value in out and "sdpa" in out) if command == "info" else not out, "info shows what there is all the same"
    assert run(command, "--help")[0] == 0


@pytest.mark.usefixtures("untuned")
def test_a_table_is_made_anew_whatever_the_variable_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHMHA_TUNED", str(tmp_path / "tuned.json"))
    status, _, err = run("tune", *TINY, "--kinds", "dense", "--save", tmp_path / "tuned.json")
    assert status == 0, err
    assert run("info")[0] == 0


def test_a_variable_set_to_nothing_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHMHA_BACKEND", "")
    assert run("info")[0] == run("explain", "--device", "cpu")[0] == 0


# explain


@st.composite
def flags(draw: st.DrawFn) -> tuple[list[str], AttentionSpec]:
    """Flags of explain, and the problem they mean."""
    batch, heads_kv, group = draw(st.integers(1, 4)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    seqlen_q, seqlen_k = draw(st.integers(1, 90)), draw(st.integers(1, 90))
    dtype = draw(st.sampled_from(("float32", "float64", "bfloat16", "float16")))
    heads = heads_kv * group
    said = f"--batch {batch} --seqlen-q {seqlen_q} --seqlen-k {seqlen_k} --heads {heads} --heads-kv {heads_kv}".split()
    said += f"--head-dim 8 --dtype {dtype} --device cpu".split()
    more: dict[str, Any] = {}
    mask: Mask | None = None
    align = draw(st.sampled_from(("bottom_right", "top_left")))
    if draw(st.booleans()):
        left, right = draw(st.none() | st.integers(0, 9)), draw(st.none() | st.integers(0, 9))
        mask = Window(left, right, align=align)
        said += ["--window", *("none" if side is None else str(side) for side in (left, right)), "--align", align]
    if draw(st.booleans()):
        lengths = draw(st.lists(st.integers(0, seqlen_k), min_size=batch, max_size=batch))
        mask = KeyLengths(torch.tensor(lengths)) if mask is None else mask & KeyLengths(torch.tensor(lengths))
        said += ["--key-lengths", ",".join(map(str, lengths))]
    if draw(st.booleans()):
        more["bias"] = ALiBi(torch.ones(heads))
        said += ["--alibi"]
    if draw(st.booleans()):
        more["softcap"] = 5.0
        said += ["--softcap", "5"]
    if draw(st.booleans()):
        more["dropout_p"] = 0.25
        said += ["--dropout", "0.25"]
    for flag, name in (("--grad", "needs_grad"), ("--lse", "need_lse"), ("--deterministic", "deterministic")):
        if draw(st.booleans()):
            more[name] = True
            said += [flag]
    if draw(st.booleans()):
        more["sinks"] = torch.zeros(heads)
        said += ["--sinks"]
    sizes = (batch, seqlen_q, seqlen_k, heads, heads_kv, 8, 8)
    return said, AttentionSpec(*sizes, dtype=getattr(torch, dtype), mask=mask, **more)


@given(drawn=flags(), wanted=st.sampled_from((None, "sdpa", "flash_attn, flex", "naive")))
def test_explain_says_what_the_function_says(drawn: tuple[list[str], AttentionSpec], wanted: str | None) -> None:
    arguments, spec = drawn
    arguments = arguments if wanted is None else [*arguments, "--backend", wanted]
    expected = flashmha.explain(spec, None if wanted is None else [name.strip() for name in wanted.split(",")])
    said = answer("explain", *arguments)
    assert (said["chosen"], said["backends"]) == (expected.chosen, expected.rows)
    assert set(said["problem"]["features"]) == spec.features
    status, out, _ = run("explain", *arguments)
    assert status == (0 if expected.chosen else 1)
    lines = out.splitlines()
    assert lines[0] == str(spec)
    places = set()
    for name, row in expected.rows.items():
        (line,) = [line for line in lines if line.startswith(f"{name} ")]
        assert line.endswith(row)
        places.add(line.index(row, len(name)))
    assert len(places) == 1, "the answers are not aligned"


@given(drawn=flags())
def test_the_picture_is_the_mask_at_its_places(drawn: tuple[list[str], AttentionSpec]) -> None:
    arguments, spec = drawn
    picture = answer("explain", *arguments)["mask"]
    if spec.mask is None:
        assert picture is None
        return
    allowed = spec.allowed()
    assert allowed is not None
    allowed = allowed.expand(spec.batch, spec.heads, spec.seqlen_q, spec.seqlen_k)
    step = picture["step"]
    for item, drawing in enumerate(picture["items"]):
        seen = [[cell == "■" for cell in line.split(" ")] for line in drawing]
        assert seen == allowed[item, 0, ::step, ::step].tolist()
        assert len(seen[0]) <= 36
    many = len(picture["items"])
    assert many * len(picture["items"][0]) <= 24
    if step > 1:
        assert many * spec.seqlen_q > 24 or spec.seqlen_k > 36


@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=5), counts=st.lists(st.integers(-7, 7), min_size=1))
def test_documents_and_padding_are_given_by_lengths(lengths: list[int], counts: list[int]) -> None:
    said = answer("explain", f"--documents={','.join(map(str, lengths))}", "--device", "cpu")
    assert said["problem"]["seqlen_q"] == sum(lengths) and said["problem"]["batch"] == 1
    said = answer("explain", f"--key-padding={','.join(map(str, counts))}", "--seqlen-q", 7, "--device", "cpu")
    assert said["problem"]["batch"] == len(counts)
    for count, drawing in zip(counts, said["mask"]["items"]):
        real = [cell == "■" for cell in drawing[0].split(" ")]
        assert real == [key >= 7 + count if count < 0 else key < count for key in range(7)]


@given(
    drawn=flags(), major=st.integers(5, 13), minor=st.integers(0, 9), wanted=st.sampled_from((None, "flash_attn, sdpa"))
)
def test_on_paper_the_limits_answer_and_nothing_is_tried(
    drawn: tuple[list[str], AttentionSpec], major: int, minor: int, wanted: str | None
) -> None:
    arguments, spec = drawn
    place = arguments.index("--device")
    arguments = [*arguments[:place], *arguments[place + 2 :], "--capability", f"{major}.{minor}"]
    arguments += [] if wanted is None else ["--backend", wanted]
    there = dataclasses.replace(spec, device=torch.device("cuda"))
    tried = mock.Mock(side_effect=AssertionError("asked the machine"))
    with instead(
        *(answering(kind, why_not_here=tried, why_not_built=tried, must_compile=tried) for kind in builtin.BUILT_IN)
    ):
        said = answer("explain", *arguments)
        status, out, _ = run("explain", *arguments)
    asked_for = names() if wanted is None else ("flash4", "flash3", "flash2", "sdpa")
    able = []
    for name, row in said["backends"].items():
        limits = get(name).limits
        fits = limits.capability is None or major in limits.capability
        fits = fits and (name != "flash4" or "dense_mask" not in spec.features or major == 9)
        if fits and get(name).why_not(there) is None:
            assert row == ("could serve by its limits" if name in asked_for else "could serve, not asked for")
            able += [name] if name in asked_for else []
        else:
            assert "could serve" not in row and (fits or f"compute capability {major}.{minor} (only" in row)
    assert said["chosen"] is None and status == (0 if able else 1)
    listed = ", ".join(name for name in said["backends"] if name in able) or "none"
    assert said["conclusion"] in out.splitlines()
    assert said["conclusion"].endswith(f"{major}.{minor}: {listed}; this is on paper, nothing was tried")
    explained = flashmha.explain(there, None if wanted is None else wanted.split(", "), (major, minor))
    assert explained.rows == said["backends"] and str(explained).endswith(said["conclusion"])


@given(drawn=flags(), wanted=st.sampled_from((None, "sdpa", "flash2", "naive")))
def test_the_last_word_is_what_was_chosen_or_why_not(
    drawn: tuple[list[str], AttentionSpec], wanted: str | None
) -> None:
    arguments, _ = drawn
    said = answer("explain", *arguments, *([] if wanted is None else ["--backend", wanted]))
    if said["chosen"] is not None:
        assert said["conclusion"] == f"chosen: {said['chosen']}"
    else:
        others = [name for name, row in said["backends"].items() if row.startswith("could serve")]
        assert said["conclusion"].startswith(f"chosen: none, backend={[wanted]!r} cannot serve this problem")
        assert all(name in said["conclusion"] for name in others)


def test_explain_names_the_variable_that_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHMHA_BACKEND", "naive")
    assert answer("explain", "--device", "cpu")["asked"] == {"by": "FLASHMHA_BACKEND", "backends": ["naive"]}
    assert "FLASHMHA_BACKEND=['naive']" in run("explain", "--device", "cpu")[1]


def test_a_pipe_that_knows_no_squares_gets_a_picture_all_the_same() -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "flashmha", "explain", "--causal", "--seqlen-q", "2", "--device", "cpu"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"},
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout.splitlines()[-1] == "  ? ?"


# verify


class Right(Backend):
    """The definition under another name."""

    name = "right"
    limits = Limits(devices=("cpu",), dtypes=(torch.float32,), features=frozenset({"backward", "causal", "gqa"}))

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
        out = get("naive")(q, k, v, spec)
        assert isinstance(out, Tensor)
        return out


class Counting(Right):
    """The definition, with the problems it was called for and the threads it had."""

    name = "counting"
    seen: ClassVar[dict[tuple[Any, ...], int]] = {}

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
        self.seen[(spec.seqlen_q, spec.seqlen_k, spec.needs_grad)] = torch.get_num_threads()
        return super().__call__(q, k, v, spec)


class Larger(Right):
    """Wrong where there is more than one key."""

    name = "larger"

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
        return super().__call__(q, k, v, spec) * (1.5 if spec.seqlen_k > 1 else 1.0)


class Crashing(Right):
    """A kernel that falls over."""

    name = "crashing"

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
        if spec.seqlen_q > 3:
            raise RuntimeError("an illegal memory access")
        return super().__call__(q, k, v, spec)


class Mute(Right):
    """Serves nothing at all."""

    name = "mute"

    def limits_exceeded(self, spec: AttentionSpec) -> list[str]:
        return ["no"]


SMALLEST = {Larger: "seqlen_k=2 ", Crashing: "seqlen_q=4 "}
"""What the smallest problem that fails has."""


@pytest.mark.parametrize("kind", (Right, Larger, Crashing))
def test_verify_tells_right_from_wrong(kind: type[Backend]) -> None:
    with registered(kind):
        status, out, err = run("verify", "--backend", kind.name, "--device", "cpu", "--examples", 20, "--json")
        (verdict,) = json.loads(out)
        plain = run("verify", "--backend", kind.name, "--device", "cpu", "--examples", 20)
    assert err == ""
    assert "backward" not in verdict["refuses"] and "dropout" in verdict["refuses"]
    assert verdict["verdict"] == ("agrees" if kind is Right else "FAILS")
    assert status == plain[0] == (0 if kind is Right else 1)
    if kind is Right:
        assert verdict["examples"] >= 20 and verdict["problem"] is None and "agrees" in plain[1]
    else:
        assert f"{kind.name} on cpu FAILS: {verdict['why']}" in plain[1] and verdict["replay"] in plain[1]
    if kind in SMALLEST:
        assert SMALLEST[kind] in verdict["problem"] and "mask" not in verdict["problem"]
        assert str(verdict["tensors"]) in plain[1] and verdict["problem"] in plain[1]


def test_a_backend_that_refuses_everything_fails() -> None:
    with registered(Mute):
        status, out, _ = run("verify", "--backend", "mute", "--device", "cpu")
    assert status == 1 and "mute on cpu FAILS: it serves no problem inside its limits" in out


def test_a_replayed_failure_is_the_same_failure() -> None:
    with registered(Crashing):
        (first,) = answer("verify", "--backend", "crashing", "--device", "cpu", "--examples", 30, "--seed", 5)
        (again,) = answer(*first["replay"].split()[3:])
    assert again == first


def test_nothing_judged_is_no_success() -> None:
    (verdict,) = answer("verify", "--backend", "flash2", "--device", "cpu")
    assert verdict["verdict"] == "not available" and verdict["why"] == "device cpu (only cuda)"
    assert run("verify", "--backend", "flash2", "--device", "cpu")[0] == 1


# tune

TINY = ("--device", "cpu", "--head-dims", 8, "--seqlens", 16, 32, "--rounds", 1, "--budget", "1e9")
"""A small grid, and all the time there is for it: no machine is too slow."""


@pytest.mark.usefixtures("untuned")
def test_what_tune_saves_is_followed(tmp_path: Path) -> None:
    path = tmp_path / "tuned.json"
    said = answer("tune", "--save", path, *TINY)
    assert json.loads(path.read_text(encoding="utf-8")) == said
    assert {(cell["kind"], cell["mode"]) for cell in said["cells"]} == {
        (kind, mode) for kind in KINDS for mode in MODES if kind not in STEPS or mode == "eval"
    }
    assert said["dropped"] == {} and said["env"]["torch"] == torch.__version__ and said["device"] == "cpu"
    for cell in said["cells"]:
        assert set(cell["us"]) == {"sdpa", "naive"} and cell["absent"] == {}
        assert all(time > 0 for time in cell["us"].values())
    flashmha.load_tuned(path)
    (device,) = [device for device in answer("info")["devices"] if device["device"] == "cpu"]
    assert str(path) in device["measured"][0]
    assert str(path) in run("info")[1]
    x = torch.randn(1, 16, 2, 8)
    with torch.no_grad():
        assert any(str(path) in note for note in flashmha.explain(x, x, x).notes)
        torch.testing.assert_close(flashmha.attention(x, x, x), flashmha.attention(x, x, x, backend="naive"))
    status, out, _ = run("tune", "--rows", path)
    assert status == 0 and out.startswith("Row((")
    rows = eval(f"[{out}]", {"Row": Row, "SOURCE": path.as_posix()})
    assert [json.loads(json.dumps(dataclasses.asdict(row))) for row in rows] == answer("tune", "--rows", path)


@pytest.mark.usefixtures("untuned")
def test_tune_shows_the_fastest_and_names_flags_in_the_table() -> None:
    status, out, err = run("tune", *TINY, "--kinds", "dense", "decode", "--pass", "eval", "--backends", "naive", "flex")
    lines = out.splitlines()
    assert (status, err) == (0, "") and lines[0].split()[-4:] == ["flex", "us", "naive", "us"]
    assert len(lines) == 1 + 2 + 4 + tune.MARKS.count("\n") + 1
    assert all(line.count("*") == 1 for line in lines[1:7])


@given(data=st.data())
def test_a_star_is_what_the_rows_of_the_figures_choose(data: st.DataObject) -> None:
    cells = data.draw(measured_cells())
    table = ranking.Table("", "cpu", (torch.float32,), derived.derive(cells, ""))
    columns, rows = tune.table_of(cells)
    for cell, row in zip(cells, rows):
        stars = [column.split()[0] for column, text in zip(columns, row) if "*" in text]
        (first,) = [
            one for one in table.places[cell["kind"], cell["mode"]] if one.covers(cell["head_dim"], cell["keys"])
        ][:1]
        assert stars == [name for name in first.order if name in cell["us"]][:1]


@st.composite
def measured_cells(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Cells as ``tune`` measures them, of a few problems, with times and spreads of any size."""
    grid = GRIDS["cpu"]
    kinds = draw(st.lists(st.sampled_from(KINDS), min_size=1, max_size=3, unique=True))
    found = []
    for cell in grid_cells(grid, kinds, MODES, [8, 16], [16, 32, 64]):
        here = draw(st.lists(st.sampled_from(("sdpa", "flash2", "naive")), unique=True))
        found.append(
            {
                **dataclasses.asdict(cell),
                "keys": cell.document or cell.seqlen_k,
                "us": {name: draw(st.floats(1.0, 100.0)) for name in sorted(here)},
                "spread": {name: draw(st.floats(0.0, 0.5)) for name in here},
                "absent": {},
            }
        )
    return found


@given(
    times=st.lists(st.floats(0.5, 2.0), min_size=2, max_size=4),
    noise=st.lists(st.lists(st.floats(-1.0, 1.0), min_size=2, max_size=2), min_size=4, max_size=4),
    spread=st.floats(0.05, 0.3),
)
def test_a_lead_within_the_spread_is_a_tie(times: list[float], noise: list[list[float]], spread: float) -> None:
    """Two runs whose times differ by less than they say they may never put two backends in opposite orders."""
    names = [f"b{place}" for place in range(len(times))]
    orders = []
    for turn in range(2):
        us = {name: time * (1 + spread * wave[turn] / 2.5) for name, time, wave in zip(names, times, noise)}
        cell = {"us": us, "spread": dict.fromkeys(names, spread)}
        orders.append([(one, two) for one in names for two in names if derived.beaten(one, two, cell)])
    assert not any((two, one) in orders[1] for one, two in orders[0])


def test_equal_times_keep_the_order_of_the_list_and_clear_ones_do_not() -> None:
    close = {"us": {"sdpa": 11.0, "flash2": 10.0}, "spread": {"sdpa": 0.06, "flash2": 0.06}}
    assert derived.agreed([close]) == ("sdpa", "flash2")
    assert derived.agreed([{**close, "spread": {"sdpa": 0.01, "flash2": 0.01}}]) == ("flash2", "sdpa")
    assert derived.agreed([{"us": close["us"]}]) == ("flash2", "sdpa"), "an older file has no spread"


@pytest.mark.parametrize("threads", (1, 2))
def test_tune_records_the_threads_it_times_with(threads: int) -> None:
    Counting.seen.clear()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with registered(Counting):
            said = answer("tune", *TINY, "--kinds", "dense", "--rounds", 3, "--backends", "sdpa", Counting.name)
    finally:
        torch.set_num_threads(before)
    assert set(Counting.seen.values()) == {said["env"]["threads"]} == {threads}
    for cell in said["cells"]:
        assert cell["spread"].keys() == cell["us"].keys() and min(cell["spread"].values()) >= 0.0


class Later(Right):
    """Falls over at its second call, when it is being timed."""

    name = "later"
    calls = 0

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
        type(self).calls += 1
        if self.calls % 2 == 0:
            raise ValueError("too late")
        return super().__call__(q, k, v, spec)


REASONS = {
    Larger: "wrong: ",
    Crashing: "RuntimeError: an illegal memory access",
    Mute: "no",
    Later: "ValueError: too late",
}


@pytest.mark.parametrize("kind", REASONS)
def test_a_backend_that_is_wrong_or_raises_is_never_the_fastest(kind: type[Backend]) -> None:
    with registered(kind):
        said = answer("tune", *TINY, "--kinds", "dense", "causal", "--backends", kind.name, "sdpa")
    assert said["cells"] and said["dropped"] == {}
    for cell in said["cells"]:
        assert set(cell["us"]) == {"sdpa"} and cell["absent"][kind.name].startswith(REASONS[kind])


class Backwards(Right):
    """Right forward and wrong backward."""

    name = "backwards"

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
        out = super().__call__(q, k, v, spec)
        return out.detach() + 1.2 * (out - out.detach())


def test_a_wrong_gradient_never_wins() -> None:
    with registered(Backwards):
        said = answer("tune", *TINY, "--kinds", "dense", "--backends", "backwards")
    for cell in said["cells"]:
        assert ("backwards" in cell["us"]) == (cell["mode"] == "eval")


@given(kind=st.sampled_from([kind for kind in KINDS if kind not in STEPS]), seqlen=st.integers(8, 90))
def test_the_definition_of_a_cell_is_that_of_its_last_queries(kind: str, seqlen: int) -> None:
    grid = dataclasses.replace(GRIDS["cpu"], width=16, tokens=180)
    for cell in grid_cells(grid, [kind], MODES, [8], [seqlen]):
        plan = tuning.Tuning(grid, [cell], ["naive"], "float64", torch.device("cpu"))
        trial = tuning.Trial.of(cell, plan)
        spec, inputs = trial.spec(), trial.inputs
        assert ranking.kind(spec) == kind and ranking.mode(spec) == cell.mode and ranking.keys(spec) == seqlen
        assert not any(x.is_contiguous() for x in (inputs.query, inputs.key, inputs.value)), (
            "not views of one projection"
        )
        definition, answer = tuning.Definition(cell, trial, plan), trial.run("naive")
        assert definition.error(answer) < 1e-5
        assert definition.error([x * 1.2 for x in answer]) > tuning.TOLERATED


def test_a_budget_drops_the_last_cells_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count()
    monkeypatch.setattr(time, "monotonic", lambda: float(next(ticks)))
    status, out, err = run("tune", *TINY, "--budget", "0.5")
    assert status == 0 and "problems were dropped: the budget is spent" in err
    assert len(out.splitlines()) == 1
    status, out, err = run("tune", *TINY, "--budget", "0.5", "--save", tmp_path / "tuned.json")
    assert status == 1 and "nothing was measured" in err and list(tmp_path.iterdir()) == []


def test_the_grid_of_a_gpu_is_the_one_that_is_documented() -> None:
    grid = GRIDS["cuda"]
    found = grid_cells(grid, KINDS, MODES, grid.head_dims, None)
    assert len({str(cell) for cell in found}) == len(found) == 7 * 2 * 3 * 6 + 2 * 2 * 6
    for cell in found:
        if cell.kind not in STEPS:
            assert cell.batch * cell.seqlen_q == 16384 and cell.heads * cell.head_dim == 2048
    assert found[24].head_dim == 128, "the most common head_dim comes first"


# rich, and what is not installed


@pytest.mark.parametrize("installed", (True, False))
@pytest.mark.parametrize("command", (["info"], ["explain", "--device", "cpu", "--causal"]))
def test_a_terminal_shows_the_same_answers_with_rich_and_without(installed: bool, command: list[str]) -> None:
    missing = {} if installed else dict.fromkeys(("rich", "rich.console", "rich.table", "rich.text", "rich.progress"))
    with mock.patch.dict(sys.modules, missing):
        status, out, err = run(*command, out=Terminal())
    assert (status, err) == (0, "")
    assert all(name in out for name in names())
    assert ("─" in out) == installed


BARE = """
import sys
for name in ("hypothesis", "matplotlib", "rich"):
    sys.modules[name] = None
"""
"""A process without extras."""


def bare(code: str) -> subprocess.CompletedProcess[str]:
    """What a process does where no extra is installed."""
    return subprocess.run([sys.executable, "-c", BARE + code], capture_output=True, text=True, cwd=ROOT)


def test_help_needs_no_extra() -> None:
    code = f"from flashmha.__main__ import main\nfor command in {tuple(COMMANDS)}:\n"
    ran = bare(
        code + "    try: main([command, '--help'])\n    except SystemExit as left: assert not left.code, command"
    )
    assert ran.returncode == 0 and ran.stdout.count("print JSON and nothing else") == len(COMMANDS), ran.stderr


@pytest.mark.parametrize(
    ("command", "package", "instead"),
    (
        ("verify --device cpu", "hypothesis", ""),
        ("bench", "matplotlib", ", or --no-plots"),
        ("bench --report run.json", "matplotlib", ", or --no-plots"),
    ),
)
def test_a_command_names_the_package_it_misses(command: str, package: str, instead: str) -> None:
    ran = bare(f"from flashmha.__main__ import main\nmain({command.split()})")
    assert (ran.returncode, ran.stdout) == (2, "") and ran.stderr.count("\n") == 1
    assert ran.stderr.endswith(f"{package}, which is not installed: pip install {package}{instead}\n")


@pytest.mark.parametrize("command", ("info", "explain --device cpu --causal", "bench --list --device cpu"))
def test_the_other_commands_need_no_extra(command: str) -> None:
    ran = bare(f"import sys\nfrom flashmha.__main__ import main\nsys.exit(main({command.split()}))")
    assert ran.returncode == 0 and "sdpa" in ran.stdout, ran.stderr


def test_the_kit_judges_layers_without_hypothesis() -> None:
    ran = bare(
        """
import torch, flashmha, flashmha.testing as testing
stock = torch.nn.MultiheadAttention(8, 2, batch_first=True)
ours = flashmha.FlashMultiHeadAttention.from_torch(stock)
x = torch.randn(2, 3, 8)
testing.assert_drop_in(stock, ours, (x, x, x))
testing.assert_same(x, x)
testing.randomized(ours, 0), testing.noise(0, 3)
try:
    testing.assert_drop_in(stock, torch.nn.MultiheadAttention(8, 2, batch_first=True), (x, x, x))
except AssertionError:
    pass
else:
    raise SystemExit("two layers that differ pass")
found = []
for name in testing.__all__:
    try:
        getattr(testing, name)
    except ModuleNotFoundError as error:
        assert str(error).endswith("hypothesis, which is not installed: pip install hypothesis"), error
        assert error.name == "hypothesis" and name in str(error)
        found.append(name)
for call in (
    lambda: testing.assert_agrees("sdpa", flashmha.AttentionSpec(1, 3, 3, 2, 2, 4, 4), 0),
    lambda: testing.specs,
):
    try:
        call()
    except ModuleNotFoundError as error:
        assert "pip install hypothesis" in str(error)
    else:
        raise SystemExit("drew without hypothesis")
assert not hasattr(testing, "nonsense")
print(len(found))
"""
    )
    assert ran.returncode == 0 and int(ran.stdout) > 10, ran.stderr


# Where a command writes


WRITERS = {
    "tune --save": (["tune", *TINY], "a file"),
    "bench --out": (["bench", "--case", "small/layer/train/b1s8e64h4"], "a folder"),
}
"""Commands that measure and then write, and what they write."""


def bad_destinations(kind: str, folder: Path) -> dict[str, Path]:
    """Paths where nothing can be written."""
    (folder / "taken").mkdir()
    (folder / "file").write_text("kept")
    found = {
        "inside a file": folder / "file" / "below",
        "a name too long": folder / ("x" * 300),
        "nowhere to write": Path("/proc/nowhere/at/all"),
    }
    if kind == "a file":
        return {
            **found,
            "a folder": folder / "taken",
            "no folder": folder / "missing" / "tuned.json",
            "here": Path("."),
        }
    for name in ("run.json", "table.md", "time.png"):
        (folder / name / name).mkdir(parents=True)
        found[f"{name} is a folder"] = folder / name
    return {**found, "a file": folder / "file"}


@pytest.mark.parametrize("writer", WRITERS)
def test_nothing_is_measured_for_a_destination_that_cannot_be_written(writer: str, tmp_path: Path) -> None:
    arguments, kind = WRITERS[writer]
    flag = writer.split()[1]
    for what, path in bad_destinations(kind, tmp_path).items():
        before = sorted(tmp_path.rglob("*"))
        Counting.seen.clear()
        with registered(Counting):
            status, out, err = run(*arguments, "--backends", Counting.name, flag, path)
        assert not Counting.seen, f"{what}: something was measured"
        assert (status, out, err.count("\n")) == (2, "", 1) and "Traceback" not in err, (what, err)
        assert sorted(tmp_path.rglob("*")) == before, f"{what}: something was left behind"
    assert (tmp_path / "file").read_text() == "kept"


def test_a_destination_is_tried_and_left_as_it_was(tmp_path: Path) -> None:
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    old.write_text("old")
    for path in (old, new):
        check_file(path, "--save")
    assert old.read_text() == "old" and not new.exists()
    made = tmp_path / "made" / "deeper"
    check_folder(made, "--out", ("run.json",))
    assert list(made.iterdir()) == []


class Stopped(Counting):
    """Interrupted from the keyboard at the first problem beyond some."""

    name = "stopped"
    after = 2

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
        out = super().__call__(q, k, v, spec)
        if len(self.seen) > self.after:
            raise KeyboardInterrupt
        return out


def test_a_run_that_is_stopped_keeps_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Counting.seen.clear()
    with registered(Stopped):
        call: tuple[Any, ...] = ("tune", *TINY, "--kinds", "dense", "--backends", Stopped.name)
        status, out, err = run(*call, "--save", tmp_path / "tuned.json")
    found = json.loads((tmp_path / "tuned.json").read_text())
    assert status == 1 and len(found["cells"]) == 2 and set(found["dropped"].values()) == {tuning.STOPPED}
    assert len(found["cells"]) + len(found["dropped"]) == 4 and tuning.STOPPED in err
    Counting.seen.clear()
    monkeypatch.setattr(Stopped, "after", 1)
    call = ("bench", "--case", SMALLEST_CASE, "decode/core/eval/b1q1k4096e512h8kv2", *SMALLEST_BENCH[3:], "--no-plots")
    with registered(Stopped):
        status, out, _ = run(*call, "--backends", Stopped.name, "--out", tmp_path / "made")
    found = json.loads((tmp_path / "made" / "run.json").read_text())
    assert status == 1 and len(found["cases"]) == len(found["dropped"]) == 1
    assert "Dropped, since the run was stopped" in out


def full(*arguments: Any, **options: Any) -> Any:
    raise OSError(28, "No space left on device")


def test_a_disk_that_is_full_at_the_end_loses_no_measurement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "write_text", full)
    status, out, err = run("tune", *TINY, "--kinds", "dense", "--save", tmp_path / "tuned.json")
    assert status == 2 and "No space left" in err and json.loads(out)["cells"]
    status, out, err = run(*SMALLEST_BENCH, "--no-plots", "--out", tmp_path / "made")
    assert status == 1 and "No space left" in err and SMALLEST_CASE in out


def test_a_plot_that_fails_loses_no_measurement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", mock.Mock(side_effect=RuntimeError("no fonts")))
    status, out, err = run(*SMALLEST_BENCH, "--out", tmp_path)
    assert status == 1 and SMALLEST_CASE in out and "no fonts" in err and str(tmp_path / "run.json") in err
    assert json.loads((tmp_path / "run.json").read_text())["cases"] and (tmp_path / "table.md").exists()


# Wrong calls

WRONG = {
    "": "required: command",
    "infos": "invalid choice: 'infos'",
    "info --colour": "unrecognized arguments: --colour",
    "explain --backend falsh --device cpu": "backend must be one of sdpa, ",
    "explain --heads 3 --heads-kv 2": "heads must be a multiple of heads_kv, got heads=3 and heads_kv=2.",
    "explain --heads 0": "must be a whole number of at least 1, got '0'",
    "explain --align top_left": "--align must come with --causal or --window",
    "explain --window 3": "expected 2 arguments",
    "explain --window none x": "must be a whole number of at least 0, got 'x'; none for no bound",
    "explain --documents 3,4 --batch 2": "batch must be 1 with Documents",
    "explain --documents 3,4 --seqlen-q 5": "must rise from 0 to at most 5",
    "explain --key-lengths 5,3 --batch 3": "lengths must have shape (batch,) = (3,)",
    "explain --key-lengths 5,x": "must be whole numbers between commas, got '5,x'",
    "explain --key-padding 5 --seqlen-q 4": "--key-padding must lie between -4 and 4",
    "explain --dropout 1.5": "dropout_p must be between 0 and 1",
    "explain --softcap -1": "softcap must be greater than 0",
    "explain --device cuda:99": "device must be one of cpu",
    "explain --device toaster": "device must be one of cpu",
    "explain --dtype int8": "invalid choice: 'int8'",
    "explain --capability 9.0 --device cpu": "--capability must come with --device cuda",
    "explain --capability sm90": "must be a compute capability such as 9.0, got 'sm90'",
    "explain --capability 9.x": "must be a compute capability such as 9.0, got '9.x'",
    "tune --rows tuned.json --save other.json": "--rows measures nothing that --save could write",
    "tune --budget nan --device cpu": "--budget must be positive, got nan.",
    "bench --budget nan": "rounds and budget must be positive",
    "verify --backend falsh": "backend must be one of sdpa, ",
    "verify --device cpu,cuda:99": "device must be one of cpu",
    "verify --examples 0": "--examples: must be a whole number of at least 1, got '0'",
    "bench --device cuda:99": "device must be one of cpu",
    "bench --suites nothing": "invalid choice: 'nothing'",
    "bench --report . --no-plots": ". must be a file that can be read",
    "bench --report nowhere.json --no-plots": "nowhere.json must be a file that can be read",
    f"explain --seqlen-k {10**30}": "must be at most 281474976710656, got",
    f"explain --window {10**30} 0": "must be at most 281474976710656, got",
    f"explain --key-lengths 3,{10**30}": "must be at most 281474976710656, got",
    "tune --device cuda:99": "device must be one of cpu",
    "tune --kinds sparse": "invalid choice: 'sparse'",
    "tune --backends falsh --device cpu": "--backends must be one of sdpa, ",
    "tune --backends flash2 --device cpu": "--backends must be available on cpu, got 'flash2': device cpu (only cuda).",
    "tune --budget 0 --device cpu": "--budget must be positive, got 0.0.",
    "tune --rounds 0": "must be a whole number of at least 1, got '0'",
    "tune --save nowhere/at/all.json --device cpu": "--save must name a file in a folder that exists",
    "tune --rows nowhere.json": "nowhere.json must be a file that can be read",
}


@given(sizes=st.lists(st.integers(1, 300), min_size=1, max_size=6), data=st.data())
@pytest.mark.parametrize("room", (tune, verify))
def test_sizes_come_between_commas_or_spaces(room: Any, sizes: list[int], data: st.DataObject) -> None:
    marks = [data.draw(st.sampled_from((",", " "))) for _ in sizes[1:]]
    words = "".join(f"{size}{mark}" for size, mark in zip(sizes, [*marks, ""])).split()
    parser = argparse.ArgumentParser()
    room.add_arguments(parser)
    assert parser.parse_args(["--head-dims", *words]).head_dims == sizes


@pytest.mark.parametrize("word", ("none", "None", "NONE"))
def test_a_side_of_a_window_without_a_bound_is_none(word: str) -> None:
    said = answer("explain", "--window", word, "0", "--device", "cpu")
    assert said["mask"]["rule"] == "causal()"


@pytest.mark.parametrize("call", WRONG)
def test_a_wrong_call_gets_one_line_and_status_two(call: str) -> None:
    status, out, err = run(*call.split())
    assert (status, out) == (2, "")
    assert err.count("\n") == 1 and err.endswith("\n") and WRONG[call] in err and "Traceback" not in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
@pytest.mark.parametrize("command", ("explain", "verify", "bench", "tune"))
def test_a_device_that_is_not_there_is_refused(command: str) -> None:
    status, out, err = run(command, "--device", "cuda")
    assert (status, out) == (2, "") and "device must be one of cpu on this machine, got 'cuda'" in err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_and_json(command: str) -> None:
    status, out, _ = run(command, "--help")
    assert status == 0 and "--json" in out


# A backend package, installed for real


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment that has everything this one has, this flashmha, and the backend package."""
    pytest.importorskip("ensurepip", reason="needs ensurepip, to make an environment with pip")
    pytest.importorskip("hatchling", reason="needs pip install hatchling")
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=True, symlinks=os.name != "nt")
    binaries = folder / ("Scripts" if os.name == "nt" else "bin")
    interpreter = binaries / Path(sys.executable).name
    (purelib,) = said(interpreter, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").split("\n")[:1]
    others = [path for path in (*site.getsitepackages(), *sys.path) if path.endswith("-packages")]
    lines = [f"import site; site.addsitedir({path!r})" for path in dict.fromkeys(others)]
    Path(purelib, "this_environment.pth").write_text("\n".join((str(ROOT), *lines)) + "\n", encoding="utf-8")
    sources = folder / "sources"
    shutil.copytree(Path(__file__).parent / "backend_package", sources)
    flags = ("--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check")
    said(interpreter, "-m", "pip", "install", *flags, str(sources))
    return interpreter


def said(interpreter: Path, *arguments: str, folder: Path | None = None, accept: Sequence[int] = (0,)) -> str:
    """What an interpreter prints, in an environment of its own."""
    variables = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "FLASHMHA_BACKEND")}
    ran = subprocess.run(
        [str(interpreter), *arguments], capture_output=True, text=True, cwd=folder, env=variables, encoding="utf-8"
    )
    assert ran.returncode in accept, f"{arguments}\n{ran.stdout}\n{ran.stderr}"
    return ran.stdout


def test_an_installed_backend_is_discovered(python: Path, tmp_path: Path) -> None:
    found = json.loads(said(python, "-m", "flashmha", "info", "--json", folder=tmp_path))
    (mine,) = [backend for backend in found["backends"] if backend["name"] == "einsum"]
    assert mine == {
        "name": "einsum",
        "registered_by": "einsum-backend 1.0",
        "contract": 1,
        "install": "pip install einsum-backend",
    }
    assert found["devices"][0]["backends"]["einsum"] == {"available": True, "reason": None, "on_disk": None}
    assert "einsum" not in names(), "the package must not be in the environment of the tests themselves"


def test_an_installed_backend_is_explained(python: Path, tmp_path: Path) -> None:
    call = (python, "-m", "flashmha", "explain", "--json", "--device", "cpu", "--causal")
    assert json.loads(said(*call, "--backend", "einsum", folder=tmp_path))["chosen"] == "einsum"
    refused = json.loads(said(*call, "--head-dim", "200", "--lse", folder=tmp_path))
    assert refused["backends"]["einsum"] == "no lse; head_dim=200 (at most 128)"
    assert refused["chosen"] != "einsum"


def test_an_installed_backend_is_verified(python: Path, tmp_path: Path) -> None:
    call = ("-m", "flashmha", "verify", "--json", "--device", "cpu", "--backend", "einsum", "--examples", "25")
    (verdict,) = json.loads(said(python, *call, folder=tmp_path))
    assert verdict["verdict"] == "agrees" and verdict["examples"] >= 25
    assert "softcap" in verdict["refuses"] and "causal" not in verdict["refuses"]


def test_an_installed_backend_is_benchmarked(python: Path, tmp_path: Path) -> None:
    listed = said(python, "-m", "flashmha", "bench", "--list", "--json", "--level", "core", folder=tmp_path)
    cases = [case["id"] for case in json.loads(listed) if "attention:einsum" in case["contestants"]]
    assert cases, "einsum takes part in no case"
    smallest = min(cases, key=lambda name: math.prod(int(size) for size in sizes(name)))
    call = ("--case", smallest, "--rounds", "1", "--budget", "1e9", "--no-plots", "--json", "--backends", "einsum")
    found = json.loads(said(python, "-m", "flashmha", "bench", *call, folder=tmp_path, accept=(0, 3)))
    assert "attention:einsum" in json.dumps(found["cases"])


def sizes(case: str) -> list[str]:
    """The numbers in the last part of a case's id."""
    return "".join(character if character.isdecimal() else " " for character in case.rsplit("/", 1)[-1]).split()

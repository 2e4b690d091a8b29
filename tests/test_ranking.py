"""The order of choice: measured tables, SDPA's switches, and backends passed over since they have to compile."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import flashmha
from flashmha import (
    AttentionSpec,
    Backend,
    Dense,
    Documents,
    KeyLengths,
    KeyPadding,
    Limits,
    Mask,
    TensorBias,
    Window,
    attention,
    causal,
)
from flashmha.backends import choose, explain, get, names, order, register, unregister
from flashmha.backends.choice import builtin, ranking, tuned
from flashmha.backends.choice.choose import choices, reason
from flashmha.backends.choice.measured import TABLE
from flashmha.backends.choice.memory import key_of
from flashmha.backends.choice.ranking import KINDS, MODES, Row, Table, kind
from flashmha.backends.choice.registry import instead
from flashmha.backends.choice.rows import agreed, combined, derive
from flashmha.backends.choice.waiting import is_worth_compiling
from flashmha.backends.compiling import waits
from flashmha.backends.sdpa.backend import Sdpa
from flashmha.host.machine import Machine
from flashmha.problem.masks import combine
from flashmha.testing import specs

ROOT = Path(flashmha.__file__).parents[1]
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
HOPPER = ("NVIDIA H200", 9)
BUILT_IN = ("sdpa", "flash4", "flash3", "flash2", "split_kv", "flex", "naive")


@contextlib.contextmanager
def on(graphics: tuple[str, int] = HOPPER) -> Iterator[None]:
    """A machine with such a GPU, on which nothing can run."""
    before = tuned.state.machine
    tuned.replace(dataclasses.replace(tuned.state, machine=Pretended(graphics), known={}))
    yield
    tuned.replace(dataclasses.replace(tuned.state, machine=before, known={}))


class Pretended(Machine):
    """A machine with a GPU and such packages."""

    def __init__(self, gpu: tuple[str, int] = HOPPER, **packages: str) -> None:
        self.gpu, self.packages = gpu, packages

    def graphics(self, index: int | None) -> tuple[str | None, int | None]:
        return self.gpu

    def installed(self) -> dict[str, str]:
        return self.packages


def answering(kind: type[Backend], **answers: Any) -> Backend:
    """A backend of its own with other answers."""
    backend = kind()
    for question, answer in answers.items():
        setattr(backend, question, answer)
    return backend


def willing(kind: type[Backend]) -> Backend:
    """A backend that this machine has, and whose build serves what its limits say."""
    return answering(kind, why_not_here=nothing, why_not_built=nothing)


def nothing(about: Any) -> None:
    """No reason against a backend."""


@pytest.fixture(autouse=True)
def untuned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No tuned table, before and after."""
    monkeypatch.delenv(tuned.TABLE_VARIABLE, raising=False)
    tuned.replace(tuned.Tuned())
    choices.clear()
    waits.begin()
    yield
    waits.begin()
    choices.clear()
    tuned.replace(tuned.Tuned())


def problem(seqlen: int = 128, batch: int = 2, **changes: Any) -> AttentionSpec:
    """A problem on a GPU, in half precision."""
    sizes = {"heads": 8, "heads_kv": 8, "head_dim": 64, "head_dim_v": 64, "seqlen_q": seqlen, "seqlen_k": seqlen}
    return AttentionSpec(**{"batch": batch, "dtype": torch.bfloat16, "device": CUDA, **sizes, **changes})


def on_cuda(spec: AttentionSpec, **changes: Any) -> AttentionSpec:
    """A drawn problem on a GPU; its tensors stay where they are."""
    return spec.changed(device=CUDA, **changes)


# What is remembered of a problem with tensors


def flipped(part: Mask) -> Mask:
    """The same rule with other values in its tensors."""
    if isinstance(part, KeyPadding):
        return KeyPadding(~part.valid)
    if isinstance(part, KeyLengths):
        return KeyLengths(part.lengths.flip(0))
    return Dense(~part.allowed) if isinstance(part, Dense) else part


@given(spec=specs(), cuda=st.booleans(), grad=st.booleans())
def test_our_own_say_the_same_of_problems_with_one_outline(spec: AttentionSpec, cuda: bool, grad: bool) -> None:
    outline = spec.outline
    if outline is None:
        assert not isinstance(spec.bias, TensorBias | None) or spec.sinks is not None or "rule" in spec.features
        return
    hash(outline)
    parts = () if spec.mask is None else spec.mask.parts
    bias = None if spec.bias is None else TensorBias(-spec.bias.tensors()[0])
    twin = spec.changed(mask=combine(tuple(map(flipped, parts))) if parts else None, bias=bias)
    assert twin.outline == outline
    if cuda:
        spec, twin = (on_cuda(one, dtype=torch.bfloat16) for one in (spec, twin))
    assert [get(name).why_not(spec) for name in BUILT_IN] == [get(name).why_not(twin) for name in BUILT_IN]
    with on():
        assert order(spec) == order(twin)
    if grad != spec.needs_grad:
        assert dataclasses.replace(spec, needs_grad=grad, deterministic=False).outline != spec.outline


@pytest.fixture
def asked() -> Iterator[list[AttentionSpec]]:
    """The problems that sdpa judges."""
    found: list[AttentionSpec] = []
    with instead(answering(Sdpa, why_not=lambda spec: [found.append(spec), Sdpa().why_not(spec)][1])):
        yield found


def test_padding_is_judged_once_and_again_under_another_list(asked: list[AttentionSpec]) -> None:

    def padded(value: bool) -> AttentionSpec:
        return AttentionSpec(2, 37, 37, 2, 2, 8, 8, mask=KeyPadding(torch.full((2, 37), value)))

    assert [choose(padded(value)).name for value in (True, False, True)] == ["sdpa"] * 3
    assert len(asked) == 1
    register(passing("curious"), before="sdpa")
    try:
        assert [choose(padded(True)).name for _ in range(3)] == ["curious"] * 3
        assert not choices.get(key_of(padded(True))), "it may look at the tensors"
    finally:
        unregister("curious")
    assert [choose(padded(True)).name for _ in range(2)] == ["sdpa"] * 2
    assert len(asked) == 2, "the list is another one"


# The order


@given(spec=specs(), cuda=st.booleans(), half=st.booleans(), longer=st.sampled_from((1, 600, 4096)))
def test_every_order_is_the_whole_list(spec: AttentionSpec, cuda: bool, half: bool, longer: int) -> None:
    if cuda:
        spec = on_cuda(spec, dtype=torch.float16 if half else spec.dtype, seqlen_k=spec.seqlen_k * longer)
    with on():
        asked = order(spec)
    assert sorted(asked) == sorted(names())
    assert kind(spec) in (*KINDS, "other")


@given(spec=specs(), places=st.lists(st.sampled_from((None, *BUILT_IN)), min_size=1, max_size=3))
def test_a_third_party_stays_where_it_was_registered(spec: AttentionSpec, places: list[str | None]) -> None:
    kinds = [passing(f"other{i}") for i in range(len(places))]
    with contextlib.ExitStack() as stack, on():
        for one, before in zip(kinds, places):
            register(one, before=before)
            stack.callback(unregister, one.name)
        there = on_cuda(spec, dtype=torch.bfloat16)
        asked, plain = order(there), order(there.changed(aten_only=True))
        assert sorted(asked) == sorted(plain)
        assert [asked.index(one.name) for one in kinds] == [plain.index(one.name) for one in kinds]


def test_a_replaced_backend_of_ours_is_a_third_party() -> None:
    with on(), replaced("flash4"):
        assert order(problem(4096, needs_grad=True))[1] == "flash4"


@contextlib.contextmanager
def replaced(name: str) -> Iterator[None]:
    """A backend of ours unregistered, and another package's under its name and in its place."""
    before = dict(flashmha.backends.choice.registry.entries)
    after = names()[names().index(name) + 1]
    unregister(name)
    register(passing(name), before=after)
    try:
        yield
    finally:
        flashmha.backends.choice.registry.entries = before


KINDS_DRAWN = {
    "dense": {},
    "causal": {"mask": causal()},
    "padded": {"mask": KeyPadding(torch.ones(2, 128, dtype=torch.bool))},
    "padded causal": {"mask": KeyLengths(torch.tensor([3, 4])) & causal()},
    "window": {"mask": Window(3, 0)},
    "documents": {"mask": Documents(torch.tensor([0, 128])) & causal(), "batch": 1},
    "decode": {"seqlen_q": 1, "seqlen_k": 1024, "mask": Window(512, 0)},
    "cached": {"seqlen_q": 1, "mask": KeyLengths(torch.tensor([3, 4]))},
    "mask tensor": {"mask": Dense(torch.ones(128, 128, dtype=torch.bool)) & causal()},
    "other": {"dropout_p": 0.1},
}


@pytest.mark.parametrize("name", KINDS_DRAWN)
def test_a_problem_has_one_kind(name: str) -> None:
    assert kind(problem(**KINDS_DRAWN[name])) == name
    assert kind(problem(**{**KINDS_DRAWN[name], "softcap": 5.0})) == "other"


def test_a_row_is_followed_on_its_gpu_and_in_its_dtype_alone() -> None:
    spec = problem(4096, needs_grad=True)
    with on():
        assert order(spec) == ("flash4", "flash3", "sdpa", "flash2", "split_kv", "flex", "naive")
        assert order(spec.changed(dtype=torch.float32)) == names()
        assert order(spec.changed(aten_only=True)) == names()
    with on(("NVIDIA A100", 8)):
        assert order(spec) == names()
    assert order(spec) == names() or torch.cuda.is_available()


def test_documents_count_as_long_as_the_longest() -> None:
    offsets = torch.tensor([0, 100, 4096])
    spec = problem(4096, batch=1, mask=Documents(offsets, max_seqlen=3996))
    assert ranking.keys(spec) == 3996
    assert ranking.keys(problem(4096, batch=1, mask=Documents(offsets))) == 4096


# SDPA's switches


@given(spec=specs(), off=st.sampled_from(("flash", "mem_efficient", "math", "cudnn")))
def test_a_switch_that_is_off_puts_sdpa_first_on_a_gpu(spec: AttentionSpec, off: str) -> None:
    there = on_cuda(spec, dtype=torch.bfloat16)
    row = Row(KINDS, MODES, ("flex", "sdpa"), "a CPU on which flex is faster")
    tuned.replace(tuned.Tuned(Table("of a CPU", "cpu", (spec.dtype,), (row,)), settled=True, fits=True))
    before = order(spec)
    with on(), switch(off):
        assert order(there)[0] == "sdpa"
        assert sorted(order(there)) == sorted(names())
        assert order(spec) == before, "a CPU has one kernel, which no switch turns off"


@contextlib.contextmanager
def switch(name: str) -> Iterator[None]:
    """One of SDPA's kernels switched off."""
    cuda = torch.backends.cuda
    getattr(cuda, f"enable_{name}_sdp")(False)
    try:
        assert not getattr(cuda, f"{name}_sdp_enabled")()
        yield
    finally:
        getattr(cuda, f"enable_{name}_sdp")(True)


@pytest.mark.usefixtures("served")
def test_what_was_remembered_holds_for_its_switches_alone() -> None:
    spec = shared(problem(4096, batch=64, needs_grad=True))  # long enough to wait for a compiler
    with on():
        assert choose(spec).name == "flash4"
        with sdpa_kernel(SDPBackend.MATH):
            assert choose(spec).name == "sdpa"
            assert explain(spec).chosen == "sdpa"
        assert choose(spec).name == "flash4"
        remembered = choices.get(spec)
        torch.use_deterministic_algorithms(True)
        try:
            assert choose(spec).name == "flash4" and choices.get(spec) is not remembered, "it was asked anew"
        finally:
            torch.use_deterministic_algorithms(False)


# What has to compile


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every backend serves every problem inside its limits, as on a machine with all packages."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with instead(*map(willing, builtin.BUILT_IN)):
        yield


def shared(spec: AttentionSpec) -> AttentionSpec:
    """A problem as ``AttentionSpec.of`` keeps it."""
    twin = spec.changed()
    twin.__dict__["shared"] = True
    return twin


def passing(backend_name: str, why: str | None = None, **more: Any) -> type[Backend]:
    """A backend of another package, which has to compile first where ``why`` says so."""

    class Passing(Backend):
        name = backend_name
        limits = Limits(devices=(), dtypes=(torch.bfloat16, torch.float32), features=ALL)
        compiled = why is None

        def must_compile(self, spec: AttentionSpec) -> str | None:
            return None if type(self).compiled else why

        def __call__(self, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
            return q

    return Passing


ALL = frozenset(flashmha.backends.FEATURES)
WHY = "a kernel for bfloat16, head_dim=64"


@pytest.fixture
def slow() -> Iterator[type[Backend]]:
    """A backend in front of all others that has to compile."""
    one = passing("slow", WHY)
    register(one, before="sdpa")
    yield one
    unregister("slow")


def floating(spec: AttentionSpec) -> AttentionSpec:
    return spec.changed(device=CPU, dtype=torch.float32)


SHORT, LONG = floating(problem(128)), floating(problem(4096, batch=64))


def test_a_short_problem_goes_to_a_backend_that_is_ready(slow: type[Backend], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "flashmha"):
        assert choose(SHORT).name == "sdpa"
    assert not caplog.records
    assert explain(SHORT).rows["slow"].startswith(f"not compiled yet: {WHY}; ")
    assert explain(SHORT).chosen == "sdpa" and explain(SHORT).notes == ()
    assert choose(SHORT, "slow").name == "slow" and explain(SHORT, "slow").chosen == "slow"


def test_a_long_problem_waits_for_the_compiler_and_says_so(
    slow: type[Backend], caplog: pytest.LogCaptureFixture
) -> None:
    assert ranking.work(SHORT) < ranking.WORTH < ranking.work(LONG)
    assert explain(LONG).chosen == "slow" and explain(LONG).notes == (f"slow compiles first: {WHY}",)
    assert not caplog.records
    with caplog.at_level(logging.INFO, "flashmha"):
        assert choose(LONG).name == "slow"
    (record,) = caplog.records
    assert WHY in record.getMessage() and str(LONG) in record.getMessage()


def test_a_causal_problem_is_half_as_long() -> None:
    assert ranking.work(problem(mask=causal())) * 2 == ranking.work(problem())


def test_nothing_is_compiled_while_a_graph_is_captured(slow: type[Backend], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not is_worth_compiling(LONG.changed(device=CUDA))
    assert is_worth_compiling(LONG)


def test_the_definition_is_no_replacement(slow: type[Backend]) -> None:
    only_naive = SHORT.changed(needs=SHORT.features | {"softcap", "dropout"}, softcap=5.0, dropout_p=0.1)
    assert reason(flashmha.backends.get("naive"), only_naive) is None
    assert choose(only_naive).name == explain(only_naive).chosen == "slow"
    type(flashmha.backends.get("slow")).compiled = True  # type: ignore[attr-defined]
    assert choose(only_naive).name == "slow"


def test_a_shared_problem_stays_with_whom_it_was_given(slow: Any) -> None:
    spec = shared(SHORT)
    assert choose(spec).name == "sdpa"
    slow.compiled = True
    assert choose(SHORT).name == "slow", "a problem that is not shared is not remembered"
    assert choose(spec).name == "sdpa" and explain(spec).chosen == "sdpa"
    assert explain(spec).rows["slow"] == "could serve"
    unregister("slow")
    register(slow, before="sdpa")
    assert choose(spec).name == "slow", "another list is another choice"


@given(spec=specs(), slow=st.sets(st.sampled_from(BUILT_IN[:-1])), times=st.sampled_from((1, 2**40)))
def test_explain_says_what_choose_does_whatever_compiles(spec: AttentionSpec, slow: set[str], times: int) -> None:
    spec = spec.changed(batch=spec.batch * times)
    worth = ranking.work(spec) >= ranking.WORTH
    compiling = {name: (lambda spec: WHY) if name in slow else nothing for name in BUILT_IN}
    here = {"why_not_here": nothing, "why_not_built": nothing}
    with instead(*(answering(kind, **here, must_compile=compiling[kind.name]) for kind in builtin.BUILT_IN)):
        said, got = explain(spec), choose(spec).name
        able = [name for name in order(spec) if reason(flashmha.backends.get(name), spec) is None]
        assert said.chosen == got and said.rows[got] == "chosen"
        first = able[0]
        ready = [name for name in able if name not in slow and (name != "naive" or first == "naive")]
        assert got == (first if first not in slow or worth or not ready else ready[0])
        passed = [name for name, row in said.rows.items() if row == f"not compiled yet: {WHY}"]
        assert set(passed) <= slow and got not in passed


# Tables


@given(
    times=st.dictionaries(
        st.tuples(st.sampled_from(("dense", "causal")), st.sampled_from(MODES), st.sampled_from((64, 128))),
        st.dictionaries(
            st.sampled_from((512, 1024, 4096)),
            st.lists(st.sampled_from((10.0, 10.2, 11.0, 20.0)), min_size=3, max_size=3),
            min_size=1,
        ),
        min_size=1,
    )
)
def test_rows_say_of_every_cell_what_was_measured(times: dict[Any, dict[int, list[float]]]) -> None:
    """The first is as fast as the fastest; a size in between counts as the larger."""
    cells = [
        {"kind": kind, "mode": mode, "head_dim": head_dim, "keys": many, "us": dict(zip(BUILT_IN, us))}
        for (kind, mode, head_dim), steps in times.items()
        for many, us in steps.items()
    ]
    table = ranking.Table("drawn", "cpu", (torch.float32,), derive(cells, "drawn"))
    assert len(table.rows) <= len(cells)
    for cell in cells:
        best = min(cell["us"].values()) * (1 + ranking.MARGIN)
        for head_dim, many in ((cell["head_dim"], cell["keys"]), (cell["head_dim"] - 1, cell["keys"] - 1)):
            row = next(row for row in table.places[cell["kind"], cell["mode"]] if row.covers(head_dim, many))
            assert cell["us"][row.order[0]] <= best
            assert sorted(row.order) == sorted(cell["us"])
    for rows in table.places.values():
        assert any(row.covers(512, 10**6) for row in rows)


def test_the_definition_is_never_ranked_and_the_list_breaks_a_tie() -> None:
    assert agreed([{"us": {"sdpa": 10.2, "flash4": 10.0, "naive": 1.0}}]) == ("sdpa", "flash4")
    assert agreed([{"us": {"sdpa": 10.4, "flash4": 10.0}}]) == ("flash4", "sdpa")
    assert agreed([{"us": {"sdpa": 2.0, "flash4": 1.0}}, {"us": {"sdpa": 1.0, "flash4": 2.0}}]) is None
    assert agreed([{"us": {"sdpa": 2.0, "flash4": 1.0}}, {"us": {"sdpa": 1.0}}]) == ("flash4", "sdpa")


def test_few_queries_and_one_share_a_cell() -> None:
    place = {"kind": "decode", "mode": "eval", "head_dim": 128, "keys": 1024}
    (cell,) = combined([{**place, "us": {"sdpa": 1.0}}, {**place, "us": {"sdpa": 4.0, "flash2": 3.0}}])
    assert cell["us"] == pytest.approx({"sdpa": 2.0, "flash2": 3.0})


SLACK = 0.2
"""How much slower than the fastest the first of a built-in row may be."""


@pytest.mark.parametrize("row", TABLE.rows, ids=lambda row: " ".join((*row.kinds, *row.modes)))
def test_a_built_in_row_is_what_its_file_says(row: Row) -> None:
    assert set(row.kinds) <= set(KINDS) and set(row.modes) <= set(MODES) and set(row.order) < set(BUILT_IN)
    assert row.source.startswith("benchmarks/results/")
    covered = 0
    for cell in combined(json.loads((ROOT / row.source).read_text(encoding="utf-8"))["cells"]):
        rows = TABLE.places.get((cell["kind"], cell["mode"]), ())
        first = next((one for one in rows if one.covers(cell["head_dim"], cell["keys"])), None)
        if first is row and cell["us"]:
            covered += 1
            fastest = next(name for name in row.order if name in cell["us"])
            assert cell["us"][fastest] <= min(cell["us"].values()) * (1 + SLACK), (cell, fastest)
    assert covered, "no cell of the file"


# Tuned tables


HERE = {"torch": str(torch.__version__), "cuda": None, "cudnn": None, "packages": {}}


def saved(folder: Path, **changes: Any) -> Path:
    """A file as ``tune`` writes it on a CPU, where flex was the fastest."""
    cells = [
        {"kind": "dense", "mode": "eval", "head_dim": 64, "keys": 128, "us": {"sdpa": 9.0, "flex": 2.0, "naive": 1.0}},
        {"kind": "dense", "mode": "eval", "head_dim": 64, "keys": 512, "us": {"sdpa": 5.0, "flex": 9.0, "naive": 1.0}},
    ]
    found = {
        "schema": 1,
        "command": "tune",
        "date": "2026-11-25",
        "device": "cpu",
        "gpu": None,
        "dtype": "float32",
        "env": HERE,
        "cells": cells,
    }
    path = folder / "tuned.json"
    path.write_text(json.dumps({**found, **changes}), encoding="utf-8")
    return path


def plain(seqlen: int, **changes: Any) -> AttentionSpec:
    """A problem of such a file."""
    return floating(problem(seqlen, **changes))


def test_a_tuned_table_is_followed_for_what_it_holds(tmp_path: Path) -> None:
    spec = shared(plain(128))
    assert choose(spec).name == "sdpa"
    flashmha.load_tuned(saved(tmp_path))
    assert choose(spec).name == "flex" and explain(spec).chosen == "flex"
    assert str(tmp_path) in str(explain(spec))
    assert choose(plain(1)).name == "flex" and choose(plain(129)).name == choose(plain(4096)).name == "sdpa"
    assert choose(plain(128, head_dim=256, head_dim_v=256)).name == "flex"
    for other in (plain(128, mask=causal()), plain(128, needs_grad=True), plain(128).changed(dtype=torch.bfloat16)):
        assert order(other) == tuple(name for name in (*BUILT_IN[:5], "naive", "flex"))
    flashmha.load_tuned(None)
    assert choose(spec).name == "sdpa"


def test_a_table_for_a_gpu_holds_on_that_gpu_and_gives_way_to_the_built_in_one(tmp_path: Path) -> None:
    cells = [{"kind": "dense", "mode": "train", "head_dim": 64, "keys": 128, "us": {"sdpa": 2.0, "flash2": 1.0}}]
    path = saved(tmp_path, device="cuda", gpu=HOPPER[0], dtype="bfloat16", cells=cells)
    tuned.state = dataclasses.replace(tuned.read(path), fits=True)
    with on():
        assert order(problem(4096, needs_grad=True))[:2] == ("flash2", "sdpa")
        assert order(problem(4096, needs_grad=True, mask=causal()))[0] == "flash4"
    with on(("NVIDIA H100", 9)):
        assert order(problem(4096, needs_grad=True))[0] == "flash4"
    assert order(plain(4096, needs_grad=True))[0] == "sdpa"


def test_the_definition_never_wins_a_tuned_table(tmp_path: Path) -> None:
    flashmha.load_tuned(saved(tmp_path))
    assert order(plain(128))[-1] == "naive" and "naive" not in next(iter(tuned.tables("cpu", None))).rows[0].order


REFUSED = {
    "another torch": ({"env": {**HERE, "torch": "2.11.0"}}, r"measured with torch 2\.11\.0 and this is 2\."),
    "no torch": ({"env": {"packages": {}}}, "measured with torch not installed and this is"),
    "another schema": ({"schema": 2}, "schema 1, got command 'tune' and schema 2; make one with `flashmha tune --save"),
    "a file of bench": ({"command": "bench"}, "must be a file of `flashmha tune` of schema 1, got command 'bench'"),
    "no dtype": ({"dtype": "float33"}, "must be a whole file"),
    "a module for a dtype": ({"dtype": "nn"}, "must be a whole file"),
    "no cells": ({"cells": None}, "must be a whole file"),
    "nothing measured": ({"cells": []}, "no cell with a time"),
    "a device of no machine": ({"device": "tpu"}, "device 'tpu', which is none of cpu, cuda"),
    "an unknown kind": ({"cells": [{"kind": "x", "mode": "eval"}]}, "must be a whole file"),
    "half a cell": ({"cells": [{"kind": "dense", "mode": "eval"}]}, "must be a whole file"),
    "times that are none": (
        {"cells": [{"kind": "dense", "mode": "eval", "head_dim": 64, "keys": 9, "us": {"sdpa": 0}}]},
        "0 microseconds of sdpa",
    ),
}


@pytest.mark.parametrize("by", ("load_tuned", tuned.TABLE_VARIABLE))
@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_does_not_fit_is_refused(name: str, by: str, tmp_path: Path, monkeypatch: Any) -> None:
    changes, said = REFUSED[name]
    check_refused(saved(tmp_path, **changes), said, by, monkeypatch)


@pytest.mark.parametrize("by", ("load_tuned", tuned.TABLE_VARIABLE))
@pytest.mark.parametrize("text", (None, "", "{", "[]", "3", "{}"))
def test_a_missing_or_damaged_file_is_refused(text: str | None, by: str, tmp_path: Path, monkeypatch: Any) -> None:
    path = tmp_path / "damaged.json"
    if text is not None:
        path.write_text(text)
    check_refused(path, "make one with `flashmha tune --save", by, monkeypatch)


def check_refused(path: Path, said: str, by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file raises where it is loaded, or at every automatic choice until there is another; no choice follows it."""
    if by == "load_tuned":
        with pytest.raises(ValueError, match=said) as caught:
            flashmha.load_tuned(path)
        assert str(path) in str(caught.value) and choose(plain(128)).name == "sdpa"
        return
    monkeypatch.setenv(by, str(path))
    for _ in range(2):
        with pytest.raises(ValueError, match=f"^{by}: .*{said}"):
            choose(plain(128))
    assert choose(plain(128), "naive").name == "naive", "a backend that is named needs no table"
    flashmha.load_tuned(None)
    assert choose(plain(128)).name == "sdpa"


GPU_DIFFERENCES = {
    "the GPU": ({"gpu": "NVIDIA A100"}, "the GPU NVIDIA A100 and this is NVIDIA H200"),
    "CUDA": ({"env": {**HERE, "cuda": "11.8"}}, "CUDA 11.8 and this is"),
    "cuDNN": ({"env": {**HERE, "cudnn": 90100}}, "cuDNN 90100 and this is"),
    "a package that is gone": (
        {"env": {**HERE, "packages": {"flash-attn-4": "4.0"}}},
        "flash-attn-4 4.0 and this is not",
    ),
}


@pytest.mark.parametrize("name", GPU_DIFFERENCES)
def test_a_gpu_or_a_package_that_differs_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes, said = GPU_DIFFERENCES[name]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: None)
    tuned.replace(tuned.Tuned(machine=Pretended()))
    base = {"device": "cuda", "gpu": HOPPER[0]}
    flashmha.load_tuned(saved(tmp_path, **base))
    with pytest.raises(ValueError, match=said):
        flashmha.load_tuned(saved(tmp_path, **{**base, **changes}))


def test_a_new_package_is_a_difference() -> None:
    found = {"device": "cuda", "gpu": None, "env": HERE}
    assert ("flash-attn", None, "2.8.3") in tuned.differences(found, Pretended(**{"flash-attn": "2.8.3"}))


def test_the_variable_is_read_at_the_first_automatic_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(tuned.TABLE_VARIABLE, str(saved(tmp_path)))
    assert not tuned.state.settled
    assert choose(plain(128)).name == "flex"
    (tmp_path / "tuned.json").unlink()
    assert choose(plain(127)).name == "flex", "it is read once"


def test_a_file_for_a_gpu_says_nothing_about_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path, device="cuda", gpu="NVIDIA nothing", dtype="bfloat16")
    monkeypatch.setenv(tuned.TABLE_VARIABLE, str(path))
    assert choose(plain(128)).name == "sdpa"
    for _ in range(2):
        with pytest.raises(ValueError, match="measured with the GPU NVIDIA nothing and this is"):
            order(problem(128))
    assert choose(plain(128)).name == "sdpa"


def packed(x: Tensor, **options: Any) -> Tensor:
    """Attention with two heads, whatever the other sizes are."""
    q = x.unflatten(-1, (2, 8))
    out = attention(q, q, q, **options)
    assert isinstance(out, Tensor)
    return out


def test_a_graph_reads_the_variable_while_it_is_traced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(tuned.TABLE_VARIABLE, str(saved(tmp_path)))
    for dynamic in (False, True):
        torch._dynamo.reset()
        tuned.replace(tuned.Tuned())
        compiled, x = torch.compile(packed, fullgraph=True, backend="eager", dynamic=dynamic), torch.randn(2, 16, 16)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), packed(x, backend="naive"))
        assert tuned.state.settled and tuned.state.table is not None
    torch._dynamo.reset()


@pytest.mark.parametrize("dynamic", (False, True))
def test_a_graph_follows_its_table(dynamic: bool, tmp_path: Path) -> None:
    """Whatever the length, and with a third party on the list."""
    flashmha.load_tuned(saved(tmp_path))
    torch._dynamo.reset()
    register(passing("other"), before="flex")
    try:
        compiled = torch.compile(packed, fullgraph=True, backend="eager", dynamic=dynamic)
        for seqlen in (16, 200, 17):
            x = torch.randn(2, seqlen, 16)
            with torch.no_grad():
                torch.testing.assert_close(compiled(x), packed(x, backend="naive"))
    finally:
        unregister("other")
        torch._dynamo.reset()


@given(threads=st.integers(2, 5))
def test_threads_that_load_and_choose_meet_one_table_or_none(threads: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = saved(Path(folder))
        gate, seen = threading.Barrier(threads), []

        def work(number: int) -> None:
            gate.wait()
            for _ in range(5):
                flashmha.load_tuned(path if number % 2 else None)
                seen.append(choose(plain(128)).name)

        started = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
        for thread in started:
            thread.start()
        for thread in started:
            thread.join()
    assert len(seen) == 5 * threads and set(seen) <= {"sdpa", "flex"}
    flashmha.load_tuned(None)


def test_load_tuned_wins_over_a_variable_that_is_read_meanwhile(tmp_path: Path) -> None:
    before = tuned.state
    flashmha.load_tuned(None)
    after = tuned.state
    tuned.replace(tuned.read(saved(tmp_path)), before)
    assert tuned.state is after

"""The list of backends: decorator, entry points, contract, and where a wish was said."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import textwrap
import threading
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

import flashmha
from flashmha import AttentionSpec, Backend, FlashMultiHeadAttention, Limits, NoBackendError, attention, backends
from flashmha.__main__ import main
from flashmha.backends import explain, get, names, register, use_backend
from flashmha.backends.choice import ranking, registry, tuned
from flashmha.backends.choice.plugins import GROUP
from flashmha.backends.naive import Naive

CPU = torch.device("cpu")
BUILT_IN = ("sdpa", "flash4", "flash3", "flash2", "split_kv", "flex", "naive")
SPEC = AttentionSpec(1, 3, 3, 2, 2, 4, 4)


def q() -> torch.Tensor:
    return torch.randn(1, 3, 2, 4, generator=torch.Generator().manual_seed(0))


@contextlib.contextmanager
def fresh_list() -> Iterator[None]:
    """The list as it is before its first use: our own backends, no plug-in looked for."""
    own = {name: backend for name, backend in registry.entries.items() if name in BUILT_IN}
    with mock.patch.multiple(registry, entries=own, brought_by={}, complete=False, preferred=frozenset()):
        yield


@contextlib.contextmanager
def environment(offers: dict[str, tuple[str, str]]) -> Iterator[None]:
    """An environment where packages offer backends: package -> (the entry point's name, its module's source)."""
    with tempfile.TemporaryDirectory() as folder:
        for package, (name, source) in offers.items():
            Path(folder, f"{package}.py").write_text(textwrap.dedent(source), encoding="utf-8")
            info = Path(folder, f"{package}-1.5.dist-info")
            info.mkdir()
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.5\n")
            (info / "entry_points.txt").write_text(f"[{GROUP}]\n{name} = {package}:Mine\n")
        sys.path.insert(0, folder)
        importlib.invalidate_caches()
        try:
            with fresh_list():
                yield
        finally:
            sys.path.remove(folder)
            for package in offers:
                sys.modules.pop(package, None)


def source(name: str, body: str = "", before: str = "") -> str:
    """A module with one backend, which doubles the first value."""
    return f"""
import torch
from flashmha import Backend, Limits, register
{before}
class Mine(Backend):
    name = {name!r}
    limits = Limits(devices=("cpu",), dtypes=(torch.float32,), features=frozenset())
    {body}
    def __call__(self, q, k, v, spec):
        return q * 2
"""


# Kinds of plug-ins that cannot be taken: the source of one that offers a name, and a part of the reason.
BROKEN = {
    "imports what is not there": lambda name: ("import nowhere_at_all", "No module named 'nowhere_at_all'"),
    "raises": lambda name: ("raise OSError('undefined symbol: _ZN3c10')", "OSError: undefined symbol: _ZN3c10"),
    "leaves": lambda name: ("import sys; sys.exit(3)", "SystemExit: 3"),
    "says nothing": lambda name: ("raise RuntimeError", "RuntimeError: RuntimeError()"),
    "has no such class": lambda name: ("", "no attribute 'Mine'"),
    "is no class": lambda name: ("Mine = 3", "takes a Backend class, got 3"),
    "is another class": lambda name: ("class Mine: name = 'x'", "takes a Backend class, got <class"),
    "is an object": lambda name: (source(name) + "\nMine = Mine()\n", "takes a Backend class, got <backend"),
    "is abstract": lambda name: (source(name) + "\nfrom flashmha import Backend as Mine\n", "abstract"),
    "cannot be made": lambda name: (source(name, "def __init__(self): raise KeyError('gpu')"), "KeyError: 'gpu'"),
    "has no limits": lambda name: (source(name, "limits = None"), "limits must be a Limits, got None"),
    "has no name": lambda name: (source(name, "name = None"), "name must be a string"),
    "has another name": lambda name: (source("other"), f"name must be {name!r}, as the entry point says, got 'other'"),
    "keeps contract 2": lambda name: (source(name, "contract = 2"), "contract must be 1"),
    "keeps no contract": lambda name: (source(name, "contract = None"), "contract must be 1"),
}


@given(
    good=st.integers(0, 2),
    broken=st.lists(st.sampled_from(sorted(BROKEN)), max_size=3),
    takers=st.lists(st.sampled_from((*BUILT_IN, "flash_attn", "good0")), max_size=2, unique=True),
)
def test_a_plug_in_works_or_says_why_and_hurts_no_other(good: int, broken: list[str], takers: list[str]) -> None:
    offers = {f"good_package_{i}": (f"good{i}", source(f"good{i}")) for i in range(good)}
    reasons = {}
    for i, kind in enumerate(broken):
        text, reason = BROKEN[kind](f"broken{i}")
        offers[f"package_{i}"], reasons[f"broken{i}"] = (f"broken{i}", text), reason
    for name in takers:
        if name in BUILT_IN or name == "flash_attn" or good:
            package = f"taker_{name}"
            offers[package] = (name, source(name))
            reasons[f"{name} of {package} 1.5"] = f"name must not be taken, got {name!r}"
    expected = attention(q(), q(), q())
    mine = {name: get(name) for name in BUILT_IN}
    with environment(offers):
        assert names()[: len(BUILT_IN)] == BUILT_IN
        assert all(get(name) is mine[name] and backends.origin(name) == "flashmha" for name in BUILT_IN)
        assert set(names()[len(BUILT_IN) :]) == {f"good{i}" for i in range(good)} | set(reasons)
        assert torch.equal(attention(q(), q(), q()), expected)
        assert explain(SPEC).chosen == "sdpa"
        for i in range(good):
            assert torch.equal(attention(q(), q(), q(), backend=f"good{i}"), q() * 2)
            assert backends.origin(f"good{i}") == f"good_package_{i} 1.5"
        for name, reason in reasons.items():
            assert reason in str(get(name).why_not_here(CPU))
            assert reason in explain(SPEC).rows[name]
            assert backends.origin(name).endswith(" 1.5")
            with pytest.raises(NoBackendError) as caught:
                attention(q(), q(), q(), backend=[name])
            assert reason in caught.value.reasons[name] and reason in str(caught.value)
            with pytest.raises(RuntimeError, match="cannot be used"):
                get(name)(q(), q(), q(), SPEC)


def test_metadata_that_cannot_be_read_is_a_reason_and_no_crash() -> None:
    def damaged(**group: str) -> Any:
        raise ValueError("bad entry_points.txt")

    with fresh_list(), mock.patch.object(metadata, "entry_points", damaged):
        assert names() == (*BUILT_IN, GROUP)
        assert get(GROUP).why_not_here(CPU) == "ValueError: bad entry_points.txt"
        attention(q(), q(), q())


def enter_use_backend() -> None:
    with use_backend("mine"):
        pass


ASKING = {
    "names": lambda: names(),
    "get": lambda: get("mine"),
    "explain": lambda: explain(SPEC).rows["mine"],
    "a named call": lambda: attention(q(), q(), q(), backend="mine"),
    "a layer": lambda: FlashMultiHeadAttention(8, 2, backend="mine"),
    "use_backend": enter_use_backend,
    "unregister": lambda: backends.unregister("mine"),
    "prefer": lambda: flashmha.prefer("mine"),
    "before": lambda: backends.register(kind_of("early"), before="mine"),
}


@pytest.mark.parametrize("how", ASKING)
def test_the_first_question_finds_the_plug_ins(how: str) -> None:
    with environment({"first_package": ("mine", source("mine"))}):
        assert "first_package" not in sys.modules
        ASKING[how]()
        assert "first_package" in sys.modules


@pytest.mark.parametrize("mode", ("compiled", "fake tensors", "inference mode"))
def test_the_first_use_may_be_inside_a_graph_or_a_mode(mode: str) -> None:
    """The plug-in is imported in a clean state, and its tensors are real ones."""
    torch._dynamo.reset()
    text = source("mine", before="MADE = torch.ones(2)")
    with environment({"moded_package": ("mine", text)}):
        if mode == "compiled":
            run = torch.compile(lambda x: attention(x, x, x, backend="mine"), fullgraph=True, backend="eager")
            assert torch.equal(run(q()), q() * 2)
            assert torch.equal(run(q() + 1), (q() + 1) * 2)
            automatic = torch.compile(lambda x: attention(x, x, x), fullgraph=True, backend="eager")
            torch.testing.assert_close(automatic(q()), attention(q(), q(), q()))
        elif mode == "fake tensors":
            with FakeTensorMode(allow_non_fake_inputs=True):
                assert attention(q(), q(), q(), backend="mine").shape == (1, 3, 2, 4)
        else:
            with torch.inference_mode():
                attention(q(), q(), q(), backend="mine")
        made = sys.modules["moded_package"].MADE
        assert type(made) is torch.Tensor and not made.is_inference() and made.sum() == 2


@given(threads=st.integers(2, 6))
def test_threads_that_ask_at_once_all_see_the_whole_list(threads: int) -> None:
    slow = "import time; time.sleep(0.01)"
    with environment({"slow_package": ("mine", source("mine", before=slow))}):
        seen: list[tuple[str, ...]] = []
        objects: list[Backend] = []
        gate = threading.Barrier(threads)

        def ask() -> None:
            gate.wait()
            seen.append(names())
            objects.append(get("mine"))

        started = [threading.Thread(target=ask) for _ in range(threads)]
        for thread in started:
            thread.start()
        for thread in started:
            thread.join()
        assert seen == [(*BUILT_IN, "mine")] * threads
        assert len(set(map(id, objects))) == 1


def test_a_plug_in_may_register_itself_and_ask_for_the_list_while_it_is_imported() -> None:
    text = source("mine", before="import flashmha\nSEEN = flashmha.backends.names()\n@register")
    with environment({"eager_package": ("mine", text)}):
        assert names() == (*BUILT_IN, "mine")
        assert get("mine").why_not_here(CPU) is None
        assert backends.origin("mine") == "eager_package 1.5"
        assert sys.modules["eager_package"].SEEN == BUILT_IN


def test_importing_flashmha_imports_no_plug_in() -> None:
    code = "import sys, flashmha; assert 'quiet_package' not in sys.modules; print(flashmha.backends.names()[-1])"
    with environment({"quiet_package": ("mine", source("mine"))}):
        path = os.pathsep.join((sys.path[0], str(Path(flashmha.__file__).parents[1])))
        ran = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
        )
    assert (ran.returncode, ran.stdout) == (0, "mine\n"), ran.stderr


# The decorator


def kind_of(backend_name: Any, **more: Any) -> type[Backend]:
    """A backend class of a name."""
    limits = Limits(devices=(), dtypes=(torch.float32,), features=frozenset())
    body = {"__module__": __name__, "name": backend_name, "limits": limits, "__call__": lambda self, q, k, v, spec: q}
    return type("Kind", (Backend,), {**body, **more})


steps = st.lists(
    st.tuples(st.sampled_from(("register", "unregister")), st.sampled_from("abc"), st.none() | st.sampled_from("abc"))
)


@given(steps=steps)
def test_the_list_does_what_a_list_does(steps: list[tuple[str, str, str | None]]) -> None:
    with fresh_list():
        model = list(names())
        for step, name, before in steps:
            known = name in model and (step == "unregister" or before is None or before in model)
            if step == "unregister" and known:
                backends.unregister(name)
                model.remove(name)
            elif step == "register" and name not in model and (before is None or before in model):
                backends.register(kind_of(name), before=before)
                model.insert(len(model) if before is None else model.index(before), name)
            else:
                with pytest.raises(ValueError, match="must"):
                    backends.unregister(name) if step == "unregister" else backends.register(
                        kind_of(name), before=before
                    )
            assert names() == tuple(model)
            assert set(explain(SPEC).rows) == set(model)
            assert all(backends.origin(name) == __name__ for name in model if name in "abc")


@given(contract=st.integers() | st.sampled_from((None, "1", 1.5)))
def test_only_a_contract_this_release_keeps_is_taken(contract: Any) -> None:
    with fresh_list():
        if contract == 1:
            assert backends.register(kind_of("mine", contract=contract)).contract == 1
        else:
            with pytest.raises(ValueError, match=r"contract must be 1, .* got .* on Kind; install") as caught:
                backends.register(kind_of("mine", contract=contract))
            assert repr(contract) in str(caught.value)
            assert names() == BUILT_IN


def test_a_class_that_says_nothing_was_written_for_the_first_contract() -> None:
    assert kind_of("mine").contract == 1


@given(name=st.sampled_from(("", " mine", "mine ", "a,b", None, 3)))
def test_a_name_must_fit_into_the_variable(name: Any) -> None:
    with fresh_list(), pytest.raises(TypeError, match="name must be a string without commas"):
        backends.register(kind_of(name))


def test_a_family_without_one_of_its_backends_is_the_rest() -> None:
    with fresh_list():
        backends.unregister("flash4")
        with pytest.raises(NoBackendError) as caught:
            attention(q(), q(), q(), backend="flash_attn")
        assert tuple(caught.value.reasons) == ("flash3", "flash2")


# Questions that raise

QUESTIONS = ("why_not_here", "why_not", "why_not_built", "limits_exceeded")
FAULTS: dict[str, Any] = {
    "KeyError: 'gpu'": KeyError("gpu"),
    "AttributeError: no such thing": AttributeError("no such thing"),
    "OutOfMemoryError: too large": torch.OutOfMemoryError("too large"),
    "RuntimeError: RuntimeError()": RuntimeError(),
    "SystemExit: 3": SystemExit(3),
    "AssertionError: two": AssertionError("two\nlines"),
}
"""What a reason says of an exception, and that."""
NO_TEXT: dict[str, Any] = {"must give text or None, got 3": 3, "must give text or None, got True": True}
"""What a reason says of an answer that is none."""


def faulty(question: str, fault: Any) -> type[Backend]:
    """A backend of which one question raises, or is answered with something else."""

    def answer(self: Backend, about: Any) -> Any:
        if isinstance(fault, BaseException):
            raise fault
        return fault

    return kind_of("mine", **{question: answer})


@contextlib.contextmanager
def on_the_list(kind: type[Backend], before: str | None = None) -> Iterator[None]:
    with fresh_list():
        backends.register(kind, before=before)
        yield


def output(*arguments: str) -> tuple[int, str]:
    """The status and stdout of a command."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        status = main(list(arguments))
    return status, said.getvalue()


@given(
    question=st.sampled_from(QUESTIONS),
    text=st.sampled_from((*FAULTS, *NO_TEXT)),
    before=st.sampled_from((None, "sdpa")),
)
def test_a_question_that_raises_is_a_reason_against_its_backend_alone(
    question: str, text: str, before: str | None
) -> None:
    fault = FAULTS.get(text, NO_TEXT.get(text))
    assume(question != "limits_exceeded" or text in FAULTS)
    text = f"why_not raised {text}" if question == "limits_exceeded" else text
    expected = attention(q(), q(), q())
    with on_the_list(faulty(question, fault), before):
        assert torch.equal(attention(q(), q(), q()), expected)
        said = explain(SPEC)
        assert said.chosen == "sdpa" and text in said.rows["mine"]
        assert all("raised" not in row for name, row in said.rows.items() if name != "mine")
        with pytest.raises(NoBackendError) as caught:
            attention(q(), q(), q(), backend="mine")
        assert list(caught.value.reasons) == ["mine"] and text in caught.value.reasons["mine"]
        assert torch.equal(attention(q(), q(), q(), backend=["mine", "sdpa"]), expected)


@pytest.mark.parametrize("question", (*QUESTIONS, "must_compile"))
def test_no_command_falls_over_a_question_that_raises(question: str) -> None:
    with on_the_list(faulty(question, KeyError("gpu")), "sdpa"):
        status, out = output("info", "--json")
        rows = json.loads(out)["devices"][0]["backends"]
        assert status == 0 and rows["sdpa"]["available"]
        assert rows["mine"]["available"] == (question != "why_not_here")
        assert output("info")[0] == 0
        status, out = output("explain", "--device", "cpu")
        assert status == 0 and "raised KeyError: 'gpu'" in out and out.count("raised") == 1
        call = ("verify", "--backend", "mine,naive", "--device", "cpu", "--examples", "3", "--json")
        mine, naive = json.loads(output(*call)[1])
        assert naive["verdict"] == "agrees"
        assert "raised KeyError: 'gpu'" in str(mine["why"]) or (question, mine["verdict"]) == ("must_compile", "FAILS")
        assert json.loads(output("bench", "--list", "--json", "--device", "cpu")[1])
        call = ("tune", "--device", "cpu", "--kinds", "dense", "--head-dims", "8", "--seqlens", "8", "--rounds", "1")
        if question != "why_not_here":
            found = json.loads(output(*call, "--budget", "1e9", "--backends", "mine", "sdpa", "--json")[1])
            assert all("sdpa" in cell["us"] for cell in found["cells"])
        assert json.loads(output(*call, "--budget", "1e9", "--json")[1])["cells"]


def test_ones_own_object_still_raises() -> None:
    with pytest.raises(KeyError):
        faulty("why_not", KeyError("gpu"))().why_not(SPEC)


# The order that users give


def serving(name: str) -> type[Backend]:
    """A backend that serves the problem, and doubles."""
    return kind_of(name, __call__=lambda self, q, k, v, spec: q * 2)


moves = st.lists(st.tuples(st.sampled_from((*BUILT_IN, "a", "b")), st.none() | st.sampled_from((*BUILT_IN, "a", "b"))))


@given(moves=moves)
def test_a_preferred_backend_is_moved_and_the_others_stay(moves: list[tuple[str, str | None]]) -> None:
    with fresh_list():
        for name in "ab":
            backends.register(serving(name))
        model = list(names())
        for name, before in moves:
            if name == before:
                with pytest.raises(ValueError, match="before must be another backend"):
                    flashmha.prefer(name, before=before)
                continue
            flashmha.prefer(name, before=before)
            model.remove(name)
            model.insert(0 if before is None else model.index(before), name)
            assert names() == tuple(model)
        asked = list(backends.order(SPEC))
        moved = {name for name, before in moves if name != before}
        late = not moved & {"flex", "naive"} and model.index("flex") < model.index("naive")
        if late:  # on a CPU flex waits behind the definition, unless one of the two was put elsewhere
            model.remove("flex")
            model.insert(model.index("naive") + 1, "flex")
        assert asked == model


@contextlib.contextmanager
def forgotten() -> Iterator[None]:
    """What was tuned is forgotten at the end."""
    try:
        yield
    finally:
        tuned.replace(tuned.Tuned())


@given(name=st.sampled_from(("mine", "flex", "naive")), before=st.sampled_from((None, "sdpa")))
def test_a_preference_is_stronger_than_a_measurement(name: str, before: str | None) -> None:
    row = ranking.Row(("dense",), ("eval",), ("sdpa", "flash2", "flex"), "somewhere")
    table = ranking.Table("of this CPU", SPEC.device.type, (SPEC.dtype,), (row,))
    tuned.replace(tuned.Tuned(table, settled=True, fits=True))
    with fresh_list(), forgotten():
        backends.register(serving("mine"))
        assert explain(SPEC).chosen == "sdpa"
        flashmha.prefer(name, before=before)
        assert explain(SPEC).chosen == name and backends.choose(SPEC).name == name
        flashmha.unregister(name)
        assert explain(SPEC).chosen == "sdpa"


def test_a_plug_in_is_chosen_automatically_once_it_is_preferred() -> None:
    with environment({"first_package": ("mine", source("mine"))}):
        assert not torch.equal(attention(q(), q(), q()), q() * 2)
        with pytest.raises(
            ValueError,
            match=r"name must not be taken, got 'mine'; unregister\('mine'\) .* "
            r"or prefer\('mine', before='sdpa'\) to move it",
        ):
            backends.register(type(get("mine")), before="sdpa")
        flashmha.prefer("mine", before="sdpa")
        assert torch.equal(attention(q(), q(), q()), q() * 2)
        compiled = torch.compile(lambda x: attention(x, x, x), fullgraph=True, backend="eager")
        torch._dynamo.reset()
        assert torch.equal(compiled(q()), q() * 2)
        assert backends.origin("mine") == "first_package 1.5"
        flashmha.unregister("mine")
        assert "mine" not in names() and not torch.equal(attention(q(), q(), q()), q() * 2)


@pytest.mark.parametrize("change", (flashmha.prefer, flashmha.unregister))
@pytest.mark.parametrize("name", ("no such name", "flash_attn", 3, None, ["sdpa"]))
def test_only_a_backend_on_the_list_is_moved_or_taken_off(change: Any, name: Any) -> None:
    with fresh_list():
        with pytest.raises(ValueError, match="name must be one of sdpa, flash4") as caught:
            change(name)
        assert repr(name) in str(caught.value) and names() == BUILT_IN


# Where a wish was said


@pytest.mark.parametrize("where", ("backend", "use_backend", "FLASHMHA_BACKEND"))
@given(wanted=st.lists(st.sampled_from(("flash2", "flash3", "flash_attn")), min_size=1, max_size=2))
def test_an_error_names_who_asked(where: str, wanted: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        options: dict[str, Any] = {}
        if where == "backend":
            options["backend"] = wanted
            patch.setenv("FLASHMHA_BACKEND", "naive")  # a weaker wish, which must not be blamed
        elif where == "use_backend":
            stack.enter_context(use_backend(wanted))
            patch.setenv("FLASHMHA_BACKEND", "naive")
        else:
            patch.setenv("FLASHMHA_BACKEND", ", ".join(wanted))
        with pytest.raises(NoBackendError) as caught:
            attention(q(), q(), q(), **options)
        assert str(caught.value).startswith(f"{where}={wanted!r} cannot serve")
        assert caught.value.wanted == f"{where}={wanted!r}"


@given(name=st.text("abcdef_", min_size=1).filter(lambda name: name not in (*names(), *backends.FAMILIES)))
def test_an_unknown_name_in_the_variable_blames_the_variable(name: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLASHMHA_BACKEND", f"sdpa,{name}")
        for ask in (lambda: attention(q(), q(), q()), lambda: explain(SPEC)):
            with pytest.raises(ValueError, match=rf"FLASHMHA_BACKEND must be one of sdpa, .*, got '{name}'"):
                ask()
        with pytest.raises(ValueError, match=rf"^backend must be one of sdpa, .*, got '{name}'"):
            attention(q(), q(), q(), backend=name)


def test_a_result_of_another_dtype_is_refused_by_name() -> None:
    class Wide(Backend):
        name = "wide"
        limits = get("naive").limits

        def __call__(self, q: Any, k: Any, v: Any, spec: AttentionSpec) -> Any:
            return get("naive")(q, k, v, spec).double()

    backends.register(Wide)
    try:
        x = torch.randn(1, 3, 2, 4)
        with pytest.raises(ValueError, match=r"backend wide must return out in torch\.float32, got torch\.float64"):
            flashmha.attention(x, x, x, backend="wide")
    finally:
        backends.unregister("wide")


@pytest.mark.parametrize(
    ("fact", "value"),
    [("unfused_on", None), ("measured_as", ["x"]), ("tolerance", 1.0), ("results_checked", "yes"), ("install", 3)],
)
def test_a_fact_of_another_kind_is_refused_when_a_class_is_registered(fact: str, value: Any) -> None:
    odd = type("Odd", (Naive,), {"name": "odd", fact: value})
    before = names()
    with pytest.raises(TypeError, match=f"{fact} must be .*, got {re.escape(repr(value))} on Odd"):
        register(odd)
    assert names() == before

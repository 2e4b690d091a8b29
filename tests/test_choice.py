"""The choice asks: a backend is what it answers, whatever its name and class, and no answer outlives what it was of."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import example as explicitly
from hypothesis import given
from hypothesis import strategies as st
from test_autocast import pretend_a_gpu
from test_ranking import ALL, BUILT_IN, CUDA, answering, nothing, on, on_cuda, passing, problem, shared
from torch import Tensor

import flashmha
from flashmha import AttentionSpec, Backend, FlashMultiHeadAttention, KeyPadding, attention
from flashmha.backends import FAMILIES, Explanation, choose, explain, get, names, order, prefer, register, unregister
from flashmha.backends.choice import builtin, registry, tuned
from flashmha.backends.choice.choose import choices, pick
from flashmha.backends.choice.memory import Memory, key_of
from flashmha.backends.choice.ranking import Row, Table
from flashmha.backends.choice.registry import instead
from flashmha.backends.compiling import waits
from flashmha.layer import padding
from flashmha.layer.projection import may_join_gradients
from flashmha.problem.spec import SHARED
from flashmha.testing import assert_agrees, seeds, specs
from flashmha.weights.attend import is_defined

QUESTIONS = [name for name, thing in vars(Backend).items() if inspect.isfunction(thing) and not name.startswith("_")]
FACTS = [name for name in Backend.__annotations__ if name != "name"]


@pytest.fixture(autouse=True)
def untuned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No tuned table and nothing remembered, before and after."""
    monkeypatch.delenv(tuned.TABLE_VARIABLE, raising=False)
    before = tuned.state
    tuned.replace(tuned.Tuned())
    choices.clear()
    waits.begin()
    yield
    waits.begin()
    choices.clear()
    tuned.replace(before)


def forwarded(question: str, to: Backend) -> Callable[..., Any]:
    return lambda self, *about, **more: getattr(to, question)(*about, **more)


def delegate(original: Backend, other_name: str = "mine") -> type[Backend]:
    """A class of another package that answers every question as one of ours does."""
    body: dict[str, Any] = {name: getattr(original, name) for name in FACTS}
    body |= {name: forwarded(name, original) for name in (*QUESTIONS, "__call__")}
    return type("Delegate", (Backend,), {"__module__": __name__, "name": other_name, **body})


@contextlib.contextmanager
def in_place_of(name: str, kind: type[Backend]) -> Iterator[None]:
    """The list with a backend of ours replaced by a class in its place."""
    after = [*names(), None][names().index(name) + 1]
    with instead():
        unregister(name)
        register(kind, before=after)
        yield


@contextlib.contextmanager
def machine(served: bool, **answers: Any) -> Iterator[None]:
    """A Hopper GPU on which nothing can run; ``served``: on which every backend runs what its limits allow."""
    answers |= {"why_not_here": nothing, "why_not_built": nothing} if served else {}
    backends = [answering(kind, **answers) for kind in builtin.BUILT_IN]
    with on(), instead(*backends), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        yield


def said_of(spec: AttentionSpec, twin: str) -> dict[str, Any]:
    """All that the choice says of a problem, one backend's name written as it is by itself."""

    def named(name: str | None) -> str | None:
        return "it" if name == twin else name

    def notes(said: Explanation) -> list[str]:
        return [note.removeprefix(f"{twin} ") for note in said.notes]

    waits.begin()
    first = explain(spec)
    chosen = choose(spec)
    kept = None if key_of(spec) is None else choices.get(key_of(spec))
    after = explain(spec)
    return {
        "order": tuple(map(named, order(spec))),
        "chosen": named(chosen.name),
        "remembered": None if kept is None else (named(kept.backend.name), kept.wait is not None, kept.loss),
        "explained": [
            (said.chosen and named(said.chosen), {named(name): row for name, row in said.rows.items()}, notes(said))
            for said in (first, after)
        ],
        "small weights": is_defined(spec, chosen, None),
        "families": {name: tuple(map(named, members)) for name, members in FAMILIES.items()},
    }


@pytest.mark.parametrize("name", BUILT_IN)
@given(spec=specs(), cuda=st.booleans(), served=st.booleans(), longer=st.sampled_from((1, 600)), keeps=st.booleans())
def test_a_class_that_answers_as_ours_is_treated_as_ours(
    name: str, spec: AttentionSpec, cuda: bool, served: bool, longer: int, keeps: bool
) -> None:
    if cuda:
        plain = spec.mask is None and spec.bias is None
        spec = on_cuda(spec, dtype=torch.bfloat16, **({"seqlen_k": spec.seqlen_k * longer} if plain else {}))
    if keeps and spec.mask is None and spec.bias is None and spec.sinks is None:
        spec = shared(spec)
    with machine(served):
        ours = said_of(spec, name)
        with in_place_of(name, delegate(get(name))):
            theirs = said_of(spec, "mine")
    assert ours == theirs


@pytest.mark.parametrize("name", BUILT_IN)
@pytest.mark.parametrize("window", (None, (3, 0)))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32))
def test_a_class_that_runs_packed_tokens_has_padding_left_out(
    name: str, window: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The original runs alone on this machine, under its own name and under another."""
    layer = FlashMultiHeadAttention(128, 2, batch_first=True, window=window, dtype=dtype)
    call: Any = SimpleNamespace(query=SimpleNamespace(device=CUDA, dtype=dtype), mask=None)
    large = torch.zeros((), requires_grad=True).expand(2**11, 2**11, 3)  # worth joining gradients for

    def answers() -> tuple[bool, bool]:
        return padding.has_packed_kernel(layer, call), may_join_gradients(large)

    others = {"why_not_here": lambda device: "no", "runs_packed": lambda *about: False}
    alone = [answering(kind, **{"why_not_here": nothing} if kind.name == name else others) for kind in builtin.BUILT_IN]
    with pretend_a_gpu(monkeypatch), instead(*alone):
        ours = answers()
        expected = dtype == torch.bfloat16 and (name.startswith("flash") or (name == "sdpa" and window is None))
        assert ours == (expected, name == "flash4")
        with in_place_of(name, delegate(get(name))):
            assert answers() == ours


@pytest.mark.parametrize("name", ("sdpa", "naive"))
def test_a_delegate_computes_what_ours_does(name: str) -> None:
    layer, x = FlashMultiHeadAttention(16, 2, batch_first=True), torch.randn(2, 5, 16)
    hidden = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    expected = [layer(x, x, x, key_padding_mask=hidden), layer(x, x, x, hidden, need_weights=False)]
    with in_place_of(name, delegate(get(name))), flashmha.record() as calls:
        found = [layer(x, x, x, key_padding_mask=hidden), layer(x, x, x, hidden, need_weights=False)]
    assert {call.backend for call in calls} == ({"naive", "mine"} if name == "sdpa" else {"naive", "sdpa"})
    for one, other in zip(expected, found):
        assert torch.equal(one[0], other[0]) and (one[1] is None) == (other[1] is None)


def test_a_family_is_of_those_that_say_so() -> None:
    assert FAMILIES == {"flash_attn": ("flash4", "flash3", "flash2")} and "flash_attn" in FAMILIES
    kind = delegate(get("naive"))
    kind.family = "own"  # type: ignore[misc]
    register(kind)
    try:
        assert FAMILIES["own"] == ("mine",) and len(FAMILIES) == 2
        x = torch.randn(1, 3, 2, 4)
        with flashmha.record() as calls:
            attention(x, x, x, backend="own")
        assert [call.backend for call in calls] == ["mine"]
        with pytest.raises(ValueError, match="name must not be taken, got 'own', which stands for mine"):
            register(passing("own"))
    finally:
        unregister("mine")
    assert "own" not in FAMILIES


@pytest.mark.parametrize("family", ("", " own", "a,b", 3, "sdpa"))
def test_a_family_is_a_name_that_no_backend_has(family: Any) -> None:
    kind = delegate(get("naive"))
    kind.family = family  # type: ignore[misc]
    with pytest.raises((TypeError, ValueError), match="family must "):
        register(kind)
    assert names() == BUILT_IN


@pytest.mark.parametrize("question", ("builds_mask", "reads_pages", "runs_packed", "kernel_key"))
@pytest.mark.parametrize("answer", (KeyError("gpu"), SystemExit(3), "a text", [1]), ids=repr)
def test_a_question_without_a_reason_has_an_answer_whatever_happens(question: str, answer: Any) -> None:
    def say(self: Backend, *about: Any) -> Any:
        if isinstance(answer, BaseException):
            raise answer
        return answer

    kind = type("Faulty", (passing("mine"),), {question: say})
    register(kind, before="sdpa")
    try:
        spec = AttentionSpec(1, 3, 3, 2, 2, 4, 4)
        assert order(spec)[0] == "mine" == choose(spec).name
        asked = (torch.float16, 64, CUDA) if question == "runs_packed" else (spec,)
        found = getattr(get("mine"), question)(*asked)
        assert found == (spec.outline if question == "kernel_key" else False) or found == answer != [1]
    finally:
        unregister("mine")


# What is remembered

TABLES = {
    "none": None,
    "flex first": Table("a", "cuda", (torch.bfloat16,), (Row(("dense", "padded"), ("eval",), ("flex", "sdpa"), ""),)),
    "flash2 first": Table("b", "cuda", (torch.bfloat16,), (Row(("dense", "padded"), ("eval",), ("flash2",), ""),)),
}
CHANGES: dict[str, Callable[[], Any]] = {
    **{f"table: {name}": lambda table=table: tuned.replace(loaded(table)) for name, table in TABLES.items()},
    **{f"prefer {name}": lambda name=name: prefer(name) for name in ("flash3", "sdpa", "naive")},
    "register": lambda: "other" in registry.entries or register(passing("other"), before="sdpa"),
    "unregister": lambda: "other" in registry.entries and unregister("other"),
    **{
        f"{switch} {value}": lambda switch=switch, value=value: getattr(torch.backends.cuda, switch)(value)
        for switch in ("enable_flash_sdp", "enable_math_sdp", "enable_cudnn_sdp", "enable_mem_efficient_sdp")
        for value in (False, True)
    },
    **{
        f"deterministic {value} {warn}": lambda value=value, warn=warn: torch.use_deterministic_algorithms(
            value, warn_only=warn
        )
        for value, warn in ((False, False), (True, False), (True, True))
    },
}


def loaded(table: Table | None) -> tuned.Tuned:
    return tuned.Tuned(table, settled=True, fits=True)


@contextlib.contextmanager
def as_it_was() -> Iterator[None]:
    """The list, the table and the switches put back."""
    table = tuned.state
    try:
        with instead():
            yield
    finally:
        tuned.replace(table)
        for switch in ("enable_flash_sdp", "enable_math_sdp", "enable_cudnn_sdp", "enable_mem_efficient_sdp"):
            getattr(torch.backends.cuda, switch)(True)
        torch.use_deterministic_algorithms(False)


PROBLEMS = (
    shared(problem(128)),
    problem(128, mask=KeyPadding(torch.ones(2, 128, dtype=torch.bool))),
    shared(AttentionSpec(1, 3, 3, 2, 2, 4, 4)),
)


@given(changes=st.lists(st.sampled_from(sorted(CHANGES)), max_size=8))
def test_nothing_stale_is_returned_whatever_changes(changes: list[str]) -> None:
    with as_it_was(), machine(True, must_compile=nothing):
        for change in ("table: none", *changes):
            CHANGES[change]()
            for spec in PROBLEMS:
                anew = pick(spec, {})[0]
                assert choose(spec) is anew is choose(spec)
                assert explain(spec).chosen == anew.name


@given(change=st.sampled_from(sorted(CHANGES)), back=st.booleans())
def test_an_answer_holds_under_its_token_alone(change: str, back: bool) -> None:
    memory: Memory[str] = Memory()
    with as_it_was():
        CHANGES["table: none"]()
        token = memory.token()
        CHANGES[change]()
        memory.put("early", token, "found before")
        memory.put("late", memory.token(), "found after")
        now = memory.token()
        moved = token[0] is not now[0] or token[1] is not now[1] or token[2] != now[2]
        assert memory.get("early") == (None if moved else "found before")
        assert memory.get("late") == "found after"
        memory.clear()
        assert memory.get("late") is None


def test_a_memory_is_bounded() -> None:
    memory: Memory[int] = Memory()
    for number in range(3 * SHARED):
        memory.put(number, memory.token(), number)
        assert memory.get(number) == number
        if number % 100 == 0:
            assert sum(memory.get(one) is not None for one in range(number + 1)) <= SHARED


def test_a_list_that_changes_while_a_choice_is_made_is_not_missed() -> None:
    """As by another thread: what is found meanwhile was found on the list before."""

    class Busy(passing("busy")):  # type: ignore[misc]
        def why_not(self, spec: AttentionSpec) -> str | None:
            if "other" not in registry.entries:
                register(passing("other"), before="busy")
            return None

    spec = shared(AttentionSpec(1, 3, 3, 2, 2, 4, 4))
    with as_it_was():
        register(Busy, before="sdpa")
        assert choose(spec).name == "busy"
        assert choose(spec).name == "other"


# The contract


def example(block: int = 128) -> type[Backend]:
    """The class in the docstring of ``Backend``, with so many keys in a block."""
    text = inspect.getdoc(Backend) or ""
    lines = text.split("::\n", 1)[1].split("\n**The contract", 1)[0].splitlines()
    made: dict[str, Any] = {}
    assert sum("128" in line for line in lines) == 2
    exec("\n".join(line.removeprefix("    ").replace("128", str(block)) for line in lines), made)
    kind: type[Backend] = made["Blockwise"]
    return kind


@pytest.mark.parametrize("block", (128, 3))
def test_the_example_in_the_contract_serves_what_it_says(block: int) -> None:
    kind = example(block)
    try:
        assert names()[-1] == "blockwise" and type(get("blockwise")) is kind

        @given(spec=specs(limits=kind.limits), seed=seeds())
        @explicitly(spec=AttentionSpec(1, 3, 65, 2, 2, 8, 8), seed=219)  # 22 blocks, whose rounding adds up
        def law(spec: AttentionSpec, seed: int) -> None:
            assert_agrees("blockwise", spec, seed)

        law()
    finally:
        unregister("blockwise")


def test_the_contract_names_every_question() -> None:
    text = inspect.getdoc(Backend) or ""
    for name in QUESTIONS:
        thing = getattr(Backend, name)
        assert inspect.getdoc(thing), name
        assert name in text or name == "on_disk", name
    source = Path(flashmha.backends.__file__).with_name("base.py").read_text(encoding="utf-8")
    for name in FACTS:
        if name not in ("name", "limits"):
            assert f"    {name}: ClassVar" in source, name
    assert example_features() <= ALL


def example_features() -> frozenset[str]:
    kind = example()
    unregister("blockwise")
    return kind.limits.features


def test_a_result_is_checked_unless_the_backend_says_its_tests_do() -> None:
    def wrong(self: Backend, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
        return q.double()

    x = torch.randn(1, 3, 2, 4)
    for checked in (False, True):
        register(type("Wrong", (passing("wrong"),), {"__call__": wrong, "results_checked": checked}))
        try:
            with contextlib.nullcontext() if checked else pytest.raises(ValueError, match="must return out in"):
                attention(x, x, x, backend="wrong")
        finally:
            unregister("wrong")

"""When a kernel is worth the seconds of compiling it: by arithmetic, on problems nothing runs for."""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_ranking import CUDA, SHORT, WHY, on, passing, problem, shared, willing
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import flashmha
from flashmha import AttentionSpec, Backend, Documents, KeyLengths, KeyPadding, Limits, causal
from flashmha.backends import choose, compiling, explain, get, register, unregister, use_backend
from flashmha.backends.choice import builtin, ranking
from flashmha.backends.choice.choose import choices
from flashmha.backends.choice.registry import instead
from flashmha.backends.choice.waiting import FIRST_CHOICE_VARIABLE, is_worth_compiling, loss
from flashmha.backends.compiling import Wait, Waits, waits
from flashmha.testing import specs

COST = 2.0
"""Seconds of compiling, of which the calls below lose a few millionths each."""
PATIENCE = 3


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[Waits]:
    """Nothing lost and nothing compiled, on a machine where compiling takes no time: patience alone counts."""
    monkeypatch.delenv(FIRST_CHOICE_VARIABLE, raising=False)
    waits.begin(0.0, PATIENCE)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    choices.clear()
    with instead(*map(willing, builtin.BUILT_IN)):
        yield waits
    waits.begin()
    choices.clear()


@pytest.fixture
def slow() -> Iterator[Any]:
    """A backend of another package in front of all, which has to compile."""
    one = passing("slow", WHY)
    register(one, before="sdpa")
    yield one
    unregister("slow")


VALID = torch.ones(2, 600, dtype=torch.bool)
PROBLEMS = {
    "training": shared(problem(600, needs_grad=True)),
    "causal training": shared(problem(600, needs_grad=True, mask=causal())),
    "padding": problem(600, mask=KeyPadding(VALID)),
    "lengths": problem(600, mask=KeyLengths(torch.tensor([600, 3]))),
    "padded training": problem(600, needs_grad=True, mask=KeyPadding(VALID)),
    "documents": problem(600, batch=1, needs_grad=True, mask=Documents(torch.tensor([0, 300, 600]), max_seqlen=300)),
}
"""Problems too short to wait for flash4, which serves them fastest."""


def until(spec: AttentionSpec, most: int = 50) -> int:
    """How many calls go elsewhere before flash4 gets a problem; ``most`` where it does not."""
    for count in range(most):
        if choose(spec).name == "flash4":
            return count
    return most


@pytest.mark.parametrize("name", PROBLEMS)
@given(times=st.floats(0.1, 90.0))
def test_a_kernel_is_compiled_once_it_has_cost_more_than_compiling(name: str, times: float) -> None:
    """``times``: the seconds of compiling, in those that a call loses; a training has two kernels."""
    spec = PROBLEMS[name]
    cost = times * loss(spec) * (2 if spec.needs_grad else 1)
    choices.clear()
    waits.begin(times * loss(spec), PATIENCE)
    with on():
        assert not is_worth_compiling(spec)
        sums = itertools.accumulate(itertools.repeat(loss(spec)))
        calls = next(count for count, total in enumerate(sums, 1) if total >= cost and count >= PATIENCE)
        assert until(spec, 200) == calls
        assert choose(spec).name == "flash4"


def test_the_log_says_why(caplog: pytest.LogCaptureFixture) -> None:
    spec = PROBLEMS["training"]
    waits.begin(4.2 * loss(spec), PATIENCE)
    with on(), caplog.at_level(logging.INFO, "flashmha"):
        calls = until(spec)
        (record,) = caplog.records
        so_far = f"{calls * loss(spec):.3g} of {8.4 * loss(spec):.3g} seconds lost without it so far"
        assert calls == 9 and so_far in record.getMessage()


@pytest.mark.parametrize("name", PROBLEMS)
def test_explain_counts_nothing_and_says_how_far_it_is(name: str) -> None:
    spec = PROBLEMS[name]
    waits.begin(COST, PATIENCE)
    cost = 4 if spec.needs_grad else 2
    with on():
        first = explain(spec)
        assert first.rows["flash4"].startswith("not compiled yet: ") and "lost" not in first.rows["flash4"]
        for count in (1, 2):
            served = choose(spec).name
            for _ in range(5):
                said = explain(spec)
                assert said.chosen == served == first.chosen
                assert said.rows["flash4"].endswith(
                    f"; {loss(spec) * count:.3g} of {cost} seconds lost without it so far"
                )


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("how", ("deterministic", "variable", "named"))
def test_a_training_that_has_to_be_reproduced_keeps_its_first_choice(
    name: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it loses, and even when another problem has the kernel compiled."""
    spec = PROBLEMS[name]
    if how == "variable":
        monkeypatch.setenv(FIRST_CHOICE_VARIABLE, "1")
    torch.use_deterministic_algorithms(how == "deterministic")
    try:
        with on(), use_backend("sdpa") if how == "named" else contextlib.nullcontext():
            first = choose(spec).name
            assert first != "flash4"
            assert {choose(spec).name for _ in range(20)} == {first}
            get("flash4").compiled.add(get("flash4").kernel_key(spec))  # type: ignore[attr-defined]
            assert {choose(spec).name for _ in range(20)} == {first}
            assert explain(spec).chosen == first
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("value", ("", "0"))
def test_a_variable_that_is_off_keeps_nothing(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FIRST_CHOICE_VARIABLE, value)
    with on():
        assert until(PROBLEMS["training"]) < 50


def test_a_variable_that_is_set_later_holds_from_then_on(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = PROBLEMS["training"]
    with on():
        for _ in range(PATIENCE):
            assert choose(spec).name != "flash4"
        monkeypatch.setenv(FIRST_CHOICE_VARIABLE, "1")
        assert until(spec) == 50


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("compiled", (False, True))
def test_a_checkpoint_finds_the_backend_that_its_forward_found(name: str, compiled: bool) -> None:
    """What chooses inside a backward computes a forward again: the kind never moves, even if the kernel is there."""
    spec, x, again = PROBLEMS[name], torch.ones((), requires_grad=True), []
    with on():
        first = choose(spec).name
        for _ in range(20):
            handle = x.register_hook(lambda grad: again.append(choose(spec).name))
            (x * 2).backward()
            handle.remove()
            if compiled:
                get("flash4").compiled.add(get("flash4").kernel_key(spec))  # type: ignore[attr-defined]
                compiling.waits.end("flash4", get("flash4").kernel_key(spec), 1.0)
            assert choose(spec).name == first
        assert set(again) == {first}
        if not compiled:
            assert "never waited for" in explain(spec).rows["flash4"]


def test_checkpoints_of_a_training_save_what_their_forward_saved() -> None:
    """A backend that saves other tensors than the one before it would end the training with an error."""

    class Other(Backend):
        name = "other"
        limits = Limits(devices=("cpu",), dtypes=(torch.float32,), features=frozenset(flashmha.backends.FEATURES))
        compiled = False

        def must_compile(self, spec: AttentionSpec) -> str | None:
            return None if type(self).compiled else WHY

        def __call__(self, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
            type(self).compiled = True
            return (q.sin() * k.cos()).exp() * v

    register(Other, before="sdpa")
    try:
        x, steps = torch.randn(2, 5, 2, 8, requires_grad=True), []
        for _ in range(6):
            out = x
            with flashmha.record() as calls:
                for _ in range(3):
                    out = checkpoint(lambda q: flashmha.attention(q, q, q), out, use_reentrant=False)
                out.sum().backward()
            steps.append({call.backend for call in calls})
        assert steps == [{"sdpa"}] * 6
    finally:
        unregister("other")


def test_nothing_moves_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = PROBLEMS["training"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with on():
        first = choose(spec).name
        choose(spec)
        choose(spec)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert {choose(spec).name for _ in range(20)} == {first}
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        assert choose(spec).name == "flash4"


def test_a_kernel_that_another_problem_brings_along_is_taken_in_time() -> None:
    spec = PROBLEMS["training"]
    waits.begin(COST, PATIENCE)
    with on():
        first = choose(spec).name
        key = get("flash4").kernel_key(spec)
        with waiting_for("flash4", key):
            get("flash4").compiled.add(key)  # type: ignore[attr-defined]
        names = [choose(spec).name for _ in range(PATIENCE + 2)]
        assert names == [first] * (PATIENCE - 1) + ["flash4"] * 3


def waiting_for(backend: str, key: Any) -> Any:
    return waits.ending(backend, key)


def test_another_backend_counts_by_problem(slow: Any) -> None:
    longer = SHORT.changed(seqlen_q=130)
    for _ in range(PATIENCE):
        assert choose(SHORT).name == "sdpa" != "slow"
    assert choose(longer).name == "sdpa"
    assert choose(SHORT).name == "slow" and choose(longer).name == "sdpa"


def test_a_problem_that_has_no_name_is_not_counted(fresh: Waits, slow: Any) -> None:
    spec = SHORT.changed(sinks=torch.zeros(8))
    for _ in range(20):
        choose(spec)
    assert spec.outline is None and not fresh.kernels


def test_what_is_remembered_is_bounded() -> None:
    fresh = Waits(most=5)
    for number in range(20):
        fresh.of("flash4", number, False).lose(1.0)
        assert len(fresh.kernels) <= 5
    assert fresh.find("flash4", 19) is not None and fresh.find("flash4", 0) is None


@given(seconds=st.lists(st.floats(0.0, 100.0), max_size=5))
def test_compiling_costs_what_it_took_here(seconds: list[float]) -> None:
    made = Waits(COST)
    assert made.seconds("flash4") == COST
    for number, one in enumerate(seconds):
        made.end("flash4", number, one)
    took = [one for one in seconds if one >= compiling.NOTHING]
    assert made.seconds("flash4") == pytest.approx(sum(took) / len(took) if took else COST)
    assert made.seconds("flex") == COST
    assert made.of("flash4", "one", True).cost == 2 * made.of("flash4", "two", False).cost


def test_a_first_call_that_fails_compiles_nothing(fresh: Waits) -> None:
    wait = fresh.of("flash4", "kernel", False)
    with pytest.raises(ZeroDivisionError), fresh.ending("flash4", "kernel"):
        _ = 1 / 0
    assert fresh.find("flash4", "kernel") is wait and wait.lost == 0.0 and not fresh.took


@given(spec=specs(), times=st.integers(2, 5))
def test_a_longer_problem_loses_more(spec: AttentionSpec, times: int) -> None:
    assert loss(spec) >= 0.0
    more = spec.changed(batch=spec.batch * times)
    assert loss(more) == pytest.approx(times * loss(spec))
    if not spec.needs_grad:
        assert loss(spec.changed(needs_grad=True)) >= loss(spec)


def test_a_call_that_waits_asks_no_backend_again() -> None:
    asked: list[AttentionSpec] = []

    class Curious(passing("curious", WHY)):  # type: ignore[misc]
        def limits_exceeded(self, spec: AttentionSpec) -> list[str]:
            asked.append(spec)
            return super().limits_exceeded(spec)

    register(Curious, before="sdpa")
    try:
        spec = shared(SHORT)
        assert choose(spec).name == "sdpa" and asked
        asked.clear()
        assert choose(spec).name == "sdpa" and not asked
        assert choose(SHORT).name == "sdpa" and asked, "a problem of its own is judged by itself"
    finally:
        unregister("curious")


def test_threads_count_together(fresh: Waits) -> None:
    found: list[Wait] = []

    def lose() -> None:
        for number in range(200):
            found.append(fresh.of("flash4", number % 7, False))
            found[-1].lose(1.0)

    threads = [threading.Thread(target=lose) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(map(id, found))) == len(fresh.kernels) == 7
    assert 0 < sum(wait.lost for wait in fresh.kernels.values()) <= 800


def test_problems_of_one_kernel_lose_together() -> None:
    """Other batches, heads and lengths share it."""
    several = [shared(problem(600 + 64 * n, batch=n + 1, needs_grad=True)) for n in range(3)]
    assert len({get("flash4").kernel_key(spec) for spec in several}) == 1
    lost = list(itertools.accumulate(map(loss, several * 3)))
    waits.begin((lost[6] + lost[7]) / 4, PATIENCE)  # two kernels, worth it with the eighth call
    with on():
        names = [choose(spec).name for _ in range(3) for spec in several]
    assert "flash4" not in names[:8] and names[8] == "flash4"


def test_no_problem_of_this_file_is_long() -> None:
    assert max(map(ranking.work, PROBLEMS.values())) < ranking.WORTH
    assert {spec.device for spec in PROBLEMS.values()} == {CUDA}

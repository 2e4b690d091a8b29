"""Who is asked first: measured tables, SDPA's switches, and who is passed over because it has to compile."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import flashmha
from flashmha import AttentionSpec, Backend, Documents, KeyLengths, KeyPadding, Limits, Window, causal
from flashmha.backends import choose, chosen, explain, names, order, ranking, reason, register, tuned, unregister
from flashmha.backends.ranking import KINDS, kind
from flashmha.testing import specs

ROOT = Path(flashmha.__file__).parents[1]
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
HOPPER = ("NVIDIA H200", 9)
BUILT_IN = ("sdpa", "flash4", "flash3", "flash2", "flex", "naive")


@contextlib.contextmanager
def on(graphics: tuple[str, int] = HOPPER) -> Iterator[None]:
    """A machine with such a GPU, on which nothing can run."""
    with mock.patch.object(ranking, "graphics", lambda index: graphics):
        yield


@pytest.fixture(autouse=True)
def untuned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No tuned table, before and after."""
    monkeypatch.delenv(tuned.VARIABLE, raising=False)
    monkeypatch.setattr(tuned, "state", tuned.Tuned())
    chosen.clear()
    yield
    chosen.clear()


def problem(seqlen: int = 128, batch: int = 2, **changes: Any) -> AttentionSpec:
    """A problem on a GPU, in half precision."""
    sizes = {"heads": 8, "heads_kv": 8, "head_dim": 64, "head_dim_v": 64, "seqlen_q": seqlen, "seqlen_k": seqlen}
    return AttentionSpec(**{"batch": batch, "dtype": torch.bfloat16, "device": CUDA, **sizes, **changes})


def on_cuda(spec: AttentionSpec, **changes: Any) -> AttentionSpec:
    """A drawn problem on a GPU; its tensors stay where they are."""
    return spec.changed(device=CUDA, **changes)


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
        asked, plain = order(there), flashmha.backends.listed(there, flashmha.backends.registry.entries)
        assert sorted(asked) == sorted(plain)
        assert [asked.index(one.name) for one in kinds] == [plain.index(one.name) for one in kinds]


def test_a_replaced_backend_of_ours_is_a_third_party() -> None:
    with on(), replaced("flash4"):
        assert order(problem(4096, needs_grad=True))[1] == "flash4"


@contextlib.contextmanager
def replaced(name: str) -> Iterator[None]:
    """A backend of ours unregistered, and somebody else's under its name and in its place."""
    before = dict(flashmha.backends.registry.entries)
    after = names()[names().index(name) + 1]
    unregister(name)
    register(passing(name), before=after)
    try:
        yield
    finally:
        flashmha.backends.registry.entries = before


KINDS_DRAWN = {
    "dense": {},
    "causal": {"mask": causal()},
    "padded": {"mask": KeyPadding(torch.ones(2, 128, dtype=torch.bool))},
    "padded causal": {"mask": KeyLengths(torch.tensor([3, 4])) & causal()},
    "window": {"mask": Window(3, 0)},
    "documents": {"mask": Documents(torch.tensor([0, 128])) & causal(), "batch": 1},
    "decode": {"seqlen_q": 1, "seqlen_k": 1024, "mask": Window(512, 0)},
    "other": {"dropout_p": 0.1},
}


@pytest.mark.parametrize("name", KINDS_DRAWN)
def test_a_problem_has_one_kind(name: str) -> None:
    assert kind(problem(**KINDS_DRAWN[name])) == name
    assert kind(problem(**{**KINDS_DRAWN[name], "softcap": 5.0})) == "other"


def test_a_row_is_followed_on_its_gpu_and_in_its_dtype_alone() -> None:
    spec = problem(4096, needs_grad=True)
    with on():
        assert order(spec) == ("flash4", "flash3", "sdpa", "flash2", "flex", "naive")
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
    with on(), switch(off):
        assert order(there)[0] == "sdpa"
        assert sorted(order(there)) == sorted(names())
        assert order(spec) == order(spec.changed())


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
    spec = shared(problem(4096, needs_grad=True))
    with on():
        assert choose(spec).name == "flash4"
        with sdpa_kernel(SDPBackend.MATH):
            assert choose(spec).name == "sdpa"
            assert explain(spec).chosen == "sdpa"
        assert choose(spec).name == "flash4"


# Who has to compile


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every backend serves every problem inside its limits, as on a machine with all packages."""
    monkeypatch.setattr(flashmha.backends, "reason", lambda backend, spec: backend.unsupported(spec))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)


def shared(spec: AttentionSpec) -> AttentionSpec:
    """A problem as ``AttentionSpec.of`` keeps it."""
    twin = spec.changed()
    twin.__dict__["shared"] = True
    return twin


def passing(backend_name: str, why: str | None = None, **more: Any) -> type[Backend]:
    """A backend of somebody else, which has to compile first where it is told why."""

    class Passing(Backend):
        name = backend_name
        limits = Limits(devices=(), dtypes=(torch.bfloat16, torch.float32), features=ALL)
        compiled = why is None

        def unready(self, spec: AttentionSpec) -> str | None:
            return None if type(self).compiled else why

        def __call__(self, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
            return q

    return Passing


ALL = frozenset(flashmha.backends.FEATURES)
WHY = "a kernel for bfloat16, head_dim=64"


@pytest.fixture
def slow() -> Iterator[type[Backend]]:
    """A backend in front of everybody that has to compile."""
    one = passing("slow", WHY)
    register(one, before="sdpa")
    yield one
    unregister("slow")


def floating(spec: AttentionSpec) -> AttentionSpec:
    return spec.changed(device=CPU, dtype=torch.float32)


SHORT, LONG = floating(problem(128)), floating(problem(4096, batch=64))


def test_a_short_problem_goes_to_somebody_who_is_ready(slow: type[Backend], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "flashmha"):
        assert choose(SHORT).name == "sdpa"
    assert not caplog.records
    assert explain(SHORT).rows["slow"] == f"not compiled yet: {WHY}"
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
    assert not flashmha.backends.long(LONG.changed(device=CUDA))
    assert flashmha.backends.long(LONG)


def test_the_definition_is_no_somebody_else(slow: type[Backend]) -> None:
    only_naive = SHORT.changed(features=SHORT.features | {"softcap", "dropout"}, softcap=5.0, dropout_p=0.1)
    assert reason(flashmha.backends.get("naive"), only_naive) is None
    assert choose(only_naive).name == explain(only_naive).chosen == "slow"
    type(flashmha.backends.get("slow")).compiled = True  # type: ignore[attr-defined]
    assert choose(only_naive).name == "slow"


def test_a_shared_problem_stays_with_whom_it_was_given(slow: Any) -> None:
    spec = shared(SHORT)
    assert choose(spec).name == "sdpa"
    slow.compiled = True
    assert choose(SHORT).name == "slow", "nobody remembers a problem that is not shared"
    assert choose(spec).name == "sdpa" and explain(spec).chosen == "sdpa"
    assert explain(spec).rows["slow"] == "could serve"
    unregister("slow")
    register(slow, before="sdpa")
    assert choose(spec).name == "slow", "another list is another choice"


@given(spec=specs(), waits=st.sets(st.sampled_from(BUILT_IN[:-1])), worth=st.sampled_from((0.0, 1e30)))
def test_explain_says_what_choose_does_whoever_compiles(spec: AttentionSpec, waits: set[str], worth: float) -> None:
    def unready(backend: Backend, spec: AttentionSpec) -> str | None:
        return WHY if backend.name in waits else None

    with mock.patch.object(flashmha.backends, "unready", unready), mock.patch.object(flashmha.backends, "WORTH", worth):
        said, got = explain(spec), choose(spec).name
        able = [name for name in order(spec) if reason(flashmha.backends.get(name), spec) is None]
        assert said.chosen == got and said.rows[got] == "chosen"
        first = able[0]
        ready = [name for name in able if name not in waits and (name != "naive" or first == "naive")]
        assert got == (first if first not in waits or worth == 0.0 or not ready else ready[0])
        passed = [name for name, row in said.rows.items() if row == f"not compiled yet: {WHY}"]
        assert set(passed) <= waits and got not in passed

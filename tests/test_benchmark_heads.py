"""Suite heads of the benchmark: costs and targets, the layers of other libraries; a wish that leaves no case."""

import dataclasses
import importlib.util
from typing import Any

import pytest
import torch
from conftest import fewer
from hypothesis import given
from hypothesis import strategies as st
from test_benchmark import CPU, own_heads, times

from flashmha.__main__ import main
from flashmha.benchmark import Case, Plan, every_case, run, select
from flashmha.benchmark.costs import cost_table
from flashmha.benchmark.gate import admit
from flashmha.benchmark.inputs import draw_inputs
from flashmha.benchmark.libraries import Library, Torchtune, XTransformers
from flashmha.benchmark.page import markdown
from flashmha.benchmark.reference import Reference
from flashmha.benchmark.verdicts import judge_cases, noise_floor

HEADS = select(every_case(), ["heads"])
LIBRARIES = (XTransformers(), Torchtune())
unbiased = own_heads.map(lambda case: dataclasses.replace(case, bias=False))


def small(case: Case) -> Case:
    """A case of the suite in a fraction of its time."""
    narrow = None if case.window is None else 5
    return dataclasses.replace(case, seqlen_q=24, seqlen_k=24, embed_dim=64, window=narrow)


def measured(case: Case, seconds: dict[str, list[float]]) -> dict[str, Any]:
    """A case as the runner hands it on, with these times."""
    rows = {
        name: {
            "ours": name in ("flashmha_best", "attention"),
            "yardstick": name.endswith("_without"),
            "status": "ok",
            "seconds": times,
        }
        for name, times in seconds.items()
    }
    return {"id": case.id, "case": dataclasses.asdict(case), "contestants": rows}


def names_of(case: Case) -> tuple[str, str]:
    """Ours, and what its target is about."""
    if case == case.bare:
        return "flashmha_best", "linear_sdpa"
    return ("attention", "attention_without") if case.level == "core" else ("flashmha_best", "flashmha_without")


@given(
    st.sampled_from([case for case in select(every_case("cuda"), ["heads"]) if case.target is not None]),
    st.lists(times, min_size=3, max_size=9),
    st.floats(1.03, 3.0),
    st.booleans(),
)
def test_a_target_is_met_or_missed_where_every_round_says_so(
    case: Case, seconds: list[float], off: float, met: bool
) -> None:
    assert case.target is not None
    one, beside = names_of(case)
    ours = [each / case.target / off if met else each / case.target * off for each in seconds]
    found = measured(case, {one: ours, beside: seconds})
    judge_cases([found])
    assert found["target"] == ("met" if met else "missed")
    run = {"cases": [found], "noise_floor": noise_floor([])}
    columns, ((_, *cells),) = cost_table(run)
    assert cells[columns.index("target") - 1].endswith(found["target"])
    if case != case.bare:
        assert float(cells[columns.index("cost") - 1]) == pytest.approx(ours[0] / seconds[0], rel=1e-2)


@given(st.lists(times, min_size=3, max_size=9), st.lists(times, min_size=9, max_size=9))
def test_what_a_target_is_measured_by_is_no_peer(seconds: list[float], without: list[float]) -> None:
    case = next(case for case in HEADS if case != case.bare and case.level == "layer")
    three = {"flashmha_best": seconds, "linear_sdpa": without[: len(seconds)]}
    plain = measured(case, three)
    judge_cases([plain])
    found = measured(case, {**three, "flashmha_without": [1e-9] * len(seconds)})
    judge_cases([found])
    assert found["verdicts"] == plain["verdicts"] and found["best_peers"] == {"eager": "linear_sdpa"}
    assert plain["target"] is None


@pytest.mark.parametrize("case", HEADS, ids=lambda case: case.id)
def test_each_case_runs_and_is_shown_with_its_cost(case: Case) -> None:
    found = run(Plan([small(case)], CPU, rounds=1, budget=1e9), lambda line: None)
    (row,) = found["cases"]
    statuses = {name: each["status"] for name, each in row["contestants"].items()}
    assert "wrong" not in statuses.values() and "failed" not in statuses.values()
    one, beside = names_of(case)
    assert statuses[one] == statuses[beside] == "ok" and beside in row["ratios"][one]
    assert (row["target"] is None) == (case.target is None)
    page = markdown(found).partition("## What options of heads cost")[2].partition("## All")[0]
    assert f"| {row['id']} |" in page and "LOSS" in page


@fewer(3)
@given(own_heads)
def test_without_options_a_case_keeps_its_shape_and_needs_no_more(case: Case) -> None:
    bare = case.bare
    assert bare.bare == bare and bare.flop == case.flop and bare.heads_kv == case.heads_kv
    assert {case.id, bare.id} == {case.id} or case != bare


@pytest.mark.parametrize("one", LIBRARIES, ids=lambda one: one.name)
@fewer(3)
@given(case=unbiased)
def test_a_librarys_parameters_are_those_of_the_case_in_another_order(one: Library, case: Case) -> None:
    state = draw_inputs(dataclasses.replace(case, dtype="float32"), CPU, 0).state
    own = one.translate(state, case)
    weights = [[x for name, x in each.items() if "norm" not in name] for each in (state, own)]
    mine, theirs = (torch.cat([x.flatten() for x in each]).sort().values for each in weights)
    assert torch.equal(mine, theirs)


@pytest.mark.parametrize("one", LIBRARIES, ids=lambda one: one.name)
@fewer(3)
@given(case=own_heads)
def test_a_library_computes_the_same_or_says_why_not(one: Library, case: Case) -> None:
    if importlib.util.find_spec(one.package) is None:
        pytest.skip(f"needs pip install {one.distribution}")
    inputs = draw_inputs(case, CPU, 0)
    row = admit(one, inputs, Reference.of(inputs))[1]
    assert row["status"] == ("ok" if one.refuses(case) is None else "refused") and "raised" not in row, row


def test_a_library_that_is_not_here_says_how_to_get_it() -> None:
    class Nowhere(Torchtune):
        package = "no_package_has_this_name"

    assert Nowhere().why_not_here() == "not installed: pip install torchtune torchao"


@pytest.mark.parametrize(
    ("asked", "suites"),
    (
        (["--case", "nothing/*"], {case.suite for case in every_case()}),
        (["--suites", "heads", "--case", "small/*"], {"heads"}),
        (["--suites", "small", "--level", "core"], {case.suite for case in every_case()}),
    ),
)
def test_a_wish_without_a_case_lists_the_cases(
    asked: list[str], suites: set[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["bench", "--no-plots", *asked])
    said = capsys.readouterr().err
    assert caught.value.code == 2 and "None" not in said and asked[-1] in said
    for case in every_case():
        assert (f" {case.id}" in said) == (case.suite in suites)

"""Suite generate of the benchmark: decoders that write in turns, and one query over the keys of a cache."""

import dataclasses
from typing import Any

import pytest
import torch
from conftest import fewer
from hypothesis import given
from hypothesis import strategies as st
from test_benchmark import CPU, times
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from flashmha.benchmark import Case, Plan, every_case, run, select
from flashmha.benchmark.decoders import CacheWriter, FlashmhaDecoder, HandDecoder, HandWriter, StockDecoder, Writer
from flashmha.benchmark.gate import build_module
from flashmha.benchmark.inputs import Inputs, draw_inputs
from flashmha.benchmark.page import markdown
from flashmha.benchmark.reference import compute_definition
from flashmha.benchmark.texts import TARGETS, text_table
from flashmha.benchmark.verdicts import judge_cases, noise_floor
from flashmha.benchmark.writing import between, write_in_turns

SUITE = select(every_case(), ["generate"])
WRITING = next(case for case in SUITE if case.level == "decoder")

small = st.builds(
    lambda batch, seqlen_q, seqlen_k, layers: dataclasses.replace(
        WRITING, batch=batch, seqlen_q=seqlen_q, seqlen_k=seqlen_k, layers=layers, embed_dim=16, heads=2, heads_kv=2
    ),
    st.integers(1, 3),
    st.integers(2, 40),
    st.integers(2, 40),
    st.integers(1, 2),
)


@pytest.mark.parametrize("case", SUITE, ids=lambda case: case.id)
def test_each_case_runs_and_is_shown(case: Case) -> None:
    sizes = (
        {"embed_dim": 16 * case.heads // 4} if case.level == "core" else {"embed_dim": 16, "heads": 2, "heads_kv": 2}
    )
    shorter = {"seqlen_q": min(case.seqlen_q, 20), "seqlen_k": 12, "layers": min(case.layers, 1)}
    plan = Plan([dataclasses.replace(case, **sizes, **shorter)], CPU, rounds=1, budget=1e9)
    found = run(plan, lambda line: None)
    (row,) = found["cases"]
    statuses = {name: each["status"] for name, each in row["contestants"].items()}
    assert "wrong" not in statuses.values() and "failed" not in statuses.values()
    wanted = {"flashmha_decoder", "control", "hand_decoder", "stock_decoder"}
    assert wanted <= statuses.keys() if case.level == "decoder" else {"attention", "two_products"} <= statuses.keys()
    page = markdown(found).partition("## Writing with a cache")[2].partition("## All")[0]
    assert f"| {row['id']} |" in page and "LOSS" in page


@fewer(3)
@given(small)
def test_a_text_takes_the_operations_of_its_case(case: Case) -> None:
    """Beside the memory's, projected once, and the scores of the future, which the definition computes."""
    with FlopCounterMode(display=False) as counter:
        compute_definition(draw_inputs(case, CPU, 0))
    unseen = case.batch * case.seqlen_q * (case.seqlen_q - 1) // 2
    assert counter.get_total_flops() == case.flop + 4 * case.layers * case.embed_dim * unseen


@fewer(3)
@given(case=small, seed=st.integers(0, 9))
def test_every_writer_writes_what_the_definition_says(case: Case, seed: int) -> None:
    rows = write_in_turns(case, [StockDecoder(), HandDecoder(), FlashmhaDecoder()], CPU, seed)
    assert {row["status"] for row in rows.values()} == {"ok"}
    assert len({len(row["seconds"]) for row in rows.values()}) == 1


@fewer(3)
@given(small)
def test_the_cache_by_hand_counts_on_a_device_as_it_does_in_numbers(case: Case) -> None:
    inputs = draw_inputs(case, CPU, 0)
    module = build_module(HandDecoder(), inputs)
    with torch.inference_mode():
        outs = [HandWriter(module, inputs, on_device).write(range(case.seqlen_q))[1] for on_device in (False, True)]
    torch.testing.assert_close(torch.cat(outs[0], 1), torch.cat(outs[1], 1))


@fewer(3)
@given(small)
def test_two_caches_hold_as_much(case: Case) -> None:
    inputs = draw_inputs(case, CPU, 0)
    by_hand = HandWriter(build_module(HandDecoder(), inputs), inputs, False)
    ours = CacheWriter(build_module(FlashmhaDecoder(), inputs), inputs)
    counts = case.layers * case.batch * (4 + 8)  # lengths, and the rows' own numbers
    assert by_hand.nbytes == ours.nbytes - counts


def test_a_writer_that_is_wrong_is_not_timed() -> None:
    class Forgetful(HandWriter):
        def run(self, x: Tensor) -> Tensor:
            self.place = max(self.place, 1) if self.place < 5 else 1
            return super().run(x)

    class Wrong(HandDecoder):
        name = "wrong"

        def writer(self, module: torch.nn.Module, inputs: Inputs, how: str) -> Writer:
            return Forgetful(module, inputs, False)

    case = dataclasses.replace(WRITING, seqlen_q=20, seqlen_k=4, embed_dim=16, heads=2, heads_kv=2, layers=1)
    row = write_in_turns(case, [Wrong()], CPU, 0)["wrong"]
    assert row["status"] == "wrong" and "out" in row["reason"] and "seconds" not in row


@given(st.dictionaries(st.integers(1, 30), st.floats(1e-6, 1.0)), st.floats(1e-6, 1.0), st.floats(1e-6, 1.0))
def test_what_was_not_timed_lies_between_its_neighbours(known: dict[int, float], first: float, last: float) -> None:
    known = {**known, 0: first, 31: last}
    for number in range(32):
        near = [known[max(x for x in known if x <= number)], known[min(x for x in known if x >= number)]]
        assert min(near) * 0.999 <= between(known, number) <= max(near) * 1.001


@given(st.lists(times, min_size=3, max_size=9), st.floats(1.05, 3.0), st.booleans(), st.sampled_from(("hand", "stock")))
def test_a_target_is_met_or_missed_where_every_part_says_so(
    seconds: list[float], off: float, met: bool, peer: str
) -> None:
    target = TARGETS[peer]
    ours = [each / target / off if met else each / target * off for each in seconds]
    rows = {
        "flashmha_decoder": {"ours": True, "status": "ok", "seconds": ours, "cache_bytes": 2**20},
        f"{peer}_decoder": {"ours": False, "status": "ok", "seconds": seconds},
    }
    found: dict[str, Any] = {"id": WRITING.id, "case": dataclasses.asdict(WRITING), "contestants": rows}
    judge_cases([found])
    columns, ((_, *cells),) = text_table({"cases": [found], "noise_floor": noise_floor([])})
    column = {"hand": "by hand", "stock": "stock"}[peer]
    assert cells[columns.index(column) - 1].endswith("[met]" if met else "[missed]")
    assert float(cells[0].replace(",", "")) == pytest.approx(len(ours) / sum(ours), rel=1e-2, abs=0.5)

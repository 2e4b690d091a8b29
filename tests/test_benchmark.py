"""The benchmark: verdicts, the gate, the contestants, and a small run from the command to its files."""

import argparse
import contextlib
import dataclasses
import functools
import itertools
import json
import math
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from conftest import fewer, slow
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from test_ranking import answering, nothing
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.utils.flop_counter import FlopCounterMode

from flashmha import Backend, Limits, Rotary, register
from flashmha.__main__ import main
from flashmha.backends import unregister
from flashmha.backends.choice.registry import instead
from flashmha.backends.flash_attn.flash2 import Flash2
from flashmha.backends.flash_attn.flash3 import Flash3
from flashmha.backends.flash_attn.flash4 import Flash4
from flashmha.backends.naive import Naive
from flashmha.benchmark import SUITES, Case, Plan, every_case, run, runner, select
from flashmha.benchmark.encoders import FlashmhaEncoder, HandEncoder, PackedEncoder, StockEncoder
from flashmha.benchmark.gate import Seat, admit, find_faults
from flashmha.benchmark.inputs import draw_inputs
from flashmha.benchmark.kernels import ByHand, Linear, sdpa
from flashmha.benchmark.lineup import all_contestants, contestants
from flashmha.benchmark.page import markdown
from flashmha.benchmark.peers import CONTROL, Contestant, Flashmha, StockBest, Through, how
from flashmha.benchmark.reference import Reference, compute_definition
from flashmha.benchmark.report import absences_table
from flashmha.benchmark.rounds import FEWEST, take_turns
from flashmha.benchmark.run_file import load, save
from flashmha.benchmark.suites import ON_REQUEST, lengths_of
from flashmha.benchmark.verdicts import judge_cases, middle, noise_floor, ratio, share_of_gemm, verdict
from flashmha.commands import bench
from flashmha.host.clock import peak_bytes

CPU = torch.device("cpu")
TINY = "small/layer/train/b1s8e64h4"
PLOTS = {"ratios.png", "time.png", "memory.png"}
ENDLESS = ("--budget", "1e9")
"""However slow a machine is, no case is dropped."""
CASES = [*every_case("cpu"), *every_case("cuda")]

times = st.floats(1e-6, 10.0)
floors = st.floats(0.0, 0.5)


@st.composite
def two(draw: st.DrawFn) -> tuple[list[float], list[float]]:
    """Seconds of two contestants, as many rounds each."""
    rounds = draw(st.integers(1, 15))
    return tuple(draw(st.lists(times, min_size=rounds, max_size=rounds)) for _ in range(2))  # type: ignore[return-value]


@given(two(), floors)
def test_exchanging_two_contestants_inverts_ratio_and_verdict(seconds: Any, floor: float) -> None:
    one, other = seconds
    there, back = ratio(one, other), ratio(other, one)
    for name, mirror in (("median", "median"), ("q25", "q75"), ("low", "high")):
        assert math.isclose(there[name] * back[mirror], 1.0, rel_tol=1e-3)
    for bound in (there["low"], there["high"], back["low"], back["high"]):
        assume(not math.isclose(abs(math.log(bound)), math.log(1 + floor), rel_tol=1e-3, abs_tol=1e-3))
    assert {verdict(there, floor), verdict(back, floor)} in ({"WIN", "LOSS"}, {"TIE"})


@given(two(), floors)
def test_faster_in_every_round_by_more_than_the_noise_is_a_win(seconds: Any, floor: float) -> None:
    peer, gains = seconds
    ours = [one / (1.01 * (1 + floor) * (1 + gain)) for one, gain in zip(peer, gains)]
    assert verdict(ratio(peer, ours), floor) == "WIN"
    assert verdict(ratio(ours, peer), floor) == "LOSS"
    assert verdict(ratio(peer, peer), floor) == "TIE"


@given(two(), st.floats(0.1, 10.0))
def test_a_ratio_has_its_median_inside_and_no_unit(seconds: Any, unit: float) -> None:
    one, other = seconds
    found = ratio(one, other)
    assert min(map(float, found.values())) > 0
    assert found["low"] <= found["median"] * 1.001 and found["median"] <= found["high"] * 1.001
    assert found["q25"] <= found["median"] <= found["q75"]
    again = ratio([unit * each for each in one], [unit * each for each in other])
    assert all(math.isclose(found[name], again[name], rel_tol=1e-3) for name in found)


@given(st.lists(st.floats(0.5, 2.0), min_size=1, max_size=60))
def test_the_noise_floor_lies_above_nearly_all_twins(controls: list[float]) -> None:
    floor = noise_floor(controls)
    beyond = [each for each in controls if abs(math.log(each)) > math.log(1 + floor) + 1e-3]
    assert len(beyond) <= 0.05 * len(controls) + 1
    assert floor == noise_floor([1 / each for each in controls]) > 0


def test_ids_are_unique_and_survive_json() -> None:
    for device in ("cpu", "cuda"):
        cases = every_case(device)
        assert len({case.id for case in cases}) == len(cases)
        assert [select(cases, globs=[case.id]) for case in cases] == [[case] for case in cases]
    for case in CASES:
        again = Case.of(json.loads(json.dumps(dataclasses.asdict(case))))
        assert again == case and again.id == case.id and again.words == case.words


@given(st.sampled_from([case for case in CASES if case.lengths is not None]))
def test_no_padded_case_has_a_blind_query(case: Case) -> None:
    assert case.lengths is not None and len(case.lengths) == case.batch
    assert min(case.lengths) >= 1 and max(case.lengths) == case.seqlen_k
    assert 0 < case.fill < 1


@given(batch=st.integers(1, 40), seqlen=st.integers(2, 500), fill=st.floats(0.1, 0.95), seed=st.integers(0, 9))
def test_drawn_lengths_have_the_fill_they_are_asked_for(batch: int, seqlen: int, fill: float, seed: int) -> None:
    lengths = lengths_of(batch, seqlen, fill, seed)
    assert len(lengths) == batch and min(lengths) >= 1 and max(lengths) == seqlen
    fewest, most = (batch - 1 + seqlen) / (batch * seqlen), 1.0  # one is full, the others are not empty
    found = sum(lengths) / (batch * seqlen)
    assert abs(found - min(max(fill, fewest), most)) <= 1.0 / seqlen


def test_an_encoders_padding_is_what_its_case_says() -> None:
    for case in CASES:
        if case.level != "encoder" or case.lengths is None:
            continue
        small = dataclasses.replace(case, embed_dim=case.heads, layers=1)
        hidden = draw_inputs(small, CPU, 0).hidden
        assert hidden is not None and hidden.shape == (case.batch, case.seqlen_k)
        assert (~hidden).sum(1).tolist() == list(case.lengths)
        assert bool((hidden[:, :-1] & ~hidden[:, 1:]).any()) == case.holes
        assert f"f{round(100 * (~hidden).float().mean().item())}" in case.id


small = st.builds(
    Case,
    suite=st.just("drawn"),
    level=st.sampled_from(("layer", "core")),
    mode=st.sampled_from(("eval", "train")),
    batch=st.just(2),
    seqlen_q=st.just(6),
    seqlen_k=st.just(6),
    embed_dim=st.just(8),
    heads=st.just(2),
    heads_kv=st.just(2),
    dtype=st.sampled_from(("float32", "bfloat16")),
    causal=st.booleans(),
    lengths=st.none() | st.tuples(st.integers(1, 6), st.just(6)),
)
crossed = small.map(lambda case: dataclasses.replace(case, seqlen_k=9, causal=False, lengths=None))
weighed = small.map(lambda case: dataclasses.replace(case, level="layer", weights=True))
turned = small.map(lambda case: dataclasses.replace(case, level="layer", batch_first=False))
windowed = st.builds(
    lambda case, window: dataclasses.replace(case, level="core", causal=True, lengths=None, window=window),
    small,
    st.integers(1, 8),
)
own_heads = st.builds(
    lambda case, **fields: dataclasses.replace(case, level="layer", lengths=None, embed_dim=16, heads=4, **fields),
    small,
    heads_kv=st.sampled_from((1, 2, 4)),
    bias=st.booleans(),
    rotary=st.booleans(),
    qk_norm=st.sampled_from((None, "rms", "layer")),
)
"""Layers that stock cannot be, most of them."""
padded_cross = crossed.map(lambda case: dataclasses.replace(case, level="layer", lengths=(4, 9), batch_first=False))


def encoder(case: Case, kind: dict[str, Any], autocast: bool) -> Case:
    """Two layers, in float32 where they train: where half precision turns a ReLU, a small one errs by luck.

    No causality beside padding anywhere, which would leave queries blind.
    """
    if case.mode == "train" or autocast:
        case = dataclasses.replace(case, dtype="float32")
    if autocast and case.mode == "eval":
        kind = {**kind, "autocast": "bfloat16"}
    return dataclasses.replace(case, level="encoder", layers=2, **{"causal": False, **kind})


KINDS = ({}, {"holes": True}, {"causal": True}, {"batch_first": False}, {"holes": True, "batch_first": False})
stacked = st.builds(encoder, small, st.sampled_from(KINDS), st.booleans())
drawn = st.one_of(
    *(small, crossed, weighed, turned, padded_cross, windowed, own_heads),
    stacked.filter(lambda case: stock_computes(case)),
)


def stock_computes(case: Case) -> bool:
    """Stock's fast path does not notice autocast on a CPU: it returns another dtype, or raises beside padding."""
    return not (case.autocast and case.mode == "eval")


OURS = {"layer": "flashmha_best", "core": "attention", "encoder": "flashmha_encoder"}


@fewer(3)
@given(drawn, st.integers(0, 9))
def test_every_contestant_computes_the_same_or_says_why_not(case: Case, seed: int) -> None:
    inputs = draw_inputs(case, CPU, seed)
    reference = Reference.of(inputs)
    every, _ = all_contestants(CPU)
    taking_part = contestants(every, case, CPU, backends=["naive"])
    assert {CONTROL, OURS[case.level]} <= {one.name for one in taking_part}
    for contestant in taking_part:
        seat, row = admit(contestant, inputs, reference)
        assert row["status"] in ("ok", "refused"), (contestant.name, row)
        assert (seat is not None) == (row["status"] == "ok") == ("reason" not in row)
        assert all(leaf.grad is None for leaf in inputs.leaves().values())


def encoders(case: Case) -> list[Contestant]:
    every: list[Contestant] = [StockEncoder()] if stock_computes(case) else []
    every += [HandEncoder(), FlashmhaEncoder()]
    return every + [FlashmhaEncoder("skip", skip_padding=True), PackedEncoder()] * (case.lengths is not None)


@fewer(3)
@given(stacked, st.integers(0, 9))
def test_every_encoder_is_right_and_the_packed_one_with_holes_too(case: Case, seed: int) -> None:
    inputs = draw_inputs(case, CPU, seed)
    reference = Reference.of(inputs)
    for one in encoders(case):
        seat, row = admit(one, inputs, reference)
        assert row["status"] == "ok", (one.name, row)
        assert seat is not None and seat.module.state_dict().keys() == inputs.state.keys()


@pytest.mark.parametrize("way", ({"dtype": "bfloat16"}, {"autocast": "bfloat16"}), ids=("bfloat16", "autocast"))
def test_every_encoder_trains_in_half_precision(way: dict[str, str]) -> None:
    case = dataclasses.replace(every_case("cuda")[0], batch=4, seqlen_q=64, seqlen_k=64, layers=2)
    case = dataclasses.replace(case, embed_dim=64, heads=2, heads_kv=2, lengths=(20, 64, 3, 41))
    case = dataclasses.replace(case, **{"dtype": "float32", "autocast": None, **way})
    assert case.level == "encoder" and case.mode == "train"
    inputs = draw_inputs(case, CPU, 0)
    reference = Reference.of(inputs)
    for one in encoders(case):
        row = admit(one, inputs, reference)[1]
        assert row["status"] == "ok", (one.name, row)
        assert reference.plain["out"].dtype == getattr(torch, case.dtype)


@given(stacked)
def test_an_encoder_that_forgets_a_token_is_wrong(case: Case) -> None:
    case = dataclasses.replace(case, lengths=(3, 6), autocast=None, dtype="float32", causal=False)
    inputs = draw_inputs(case, CPU, 0)

    class Forgetful(PackedEncoder):
        def call(self, module: torch.nn.Module, inputs: Any) -> tuple[Tensor, None]:
            hidden = inputs.padding()
            hidden[0, int((~hidden[0]).int().argmax())] = True
            return inputs.turned(module(inputs.turned(inputs.query), hidden, case.causal)), None

    reference = Reference.of(inputs)
    assert admit(PackedEncoder(), inputs, reference)[1]["status"] == "ok"
    assert admit(Forgetful(), inputs, reference)[1]["status"] == "wrong"


class Off(Linear):
    """The layer by hand, with one thing wrong."""

    def __init__(self, part: str) -> None:
        super().__init__("off")
        self.part = part

    def call(self, module: torch.nn.Module, inputs: Any) -> tuple[Tensor, None]:
        out, _ = super().call(module, inputs)
        if self.part == "gradient":
            out = out.detach() + 1.2 * (out - out.detach())
        elif self.part == "NaN":
            out = out.where(torch.arange(out.shape[-1]) > 0, math.nan)
        else:
            out = 1.2 * out if self.part == "out" else out[:, :-1]
        return out, None


@given(small, st.sampled_from(("out", "NaN", "gradient", "shape")))
def test_who_is_wrong_has_no_seat(case: Case, part: str) -> None:
    case = dataclasses.replace(case, level="layer", mode="train" if part == "gradient" else "eval")
    inputs = draw_inputs(case, CPU, 0)
    seat, row = admit(Off(part), inputs, Reference.of(inputs))
    assert seat is None and row["status"] == "wrong" and row["reason"], row


@given(small)
def test_the_exact_answer_passes_the_gate(case: Case) -> None:
    reference = Reference.of(draw_inputs(case, CPU, 0))
    rounded = {name: exact.to(reference.plain[name].dtype) for name, exact in reference.exact.items()}
    assert find_faults(rounded, reference)[0] == []


@given(drawn, st.integers(1, 400), st.integers(0, 9))
def test_the_reference_is_stocks_answer_whatever_its_blocks(case: Case, block: int, seed: int) -> None:
    inputs = draw_inputs(case, CPU, seed).to(torch.float64)
    stock = Linear() if case.own_heads else {"layer": StockBest, "core": ByHand, "encoder": StockEncoder}[case.level]()
    seat = Seat(stock, inputs)
    seat.module.train()  # off the fast path
    with torch.inference_mode(not seat.leaves):
        expected = seat.collect(seat.run())
    found = compute_definition(inputs, block)
    assert found.keys() == expected.keys()
    for name, x in found.items():
        torch.testing.assert_close(x, expected[name], rtol=1e-9, atol=1e-11, msg=lambda text, name=name: name + text)


@given(drawn)
def test_the_operations_of_a_forward_are_those_of_its_definition(case: Case) -> None:
    case = dataclasses.replace(case, mode="eval", causal=False, lengths=None)
    inputs = draw_inputs(case, CPU, 0)
    with FlopCounterMode(display=False) as counter:
        compute_definition(inputs)
    assert counter.get_total_flops() == case.flop


@given(st.sampled_from([case for case in CASES if case.level != "decoder"]))
def test_masks_and_padding_need_fewer_operations_and_training_more(case: Case) -> None:
    full = dataclasses.replace(case, causal=False, lengths=None)
    assert case.flop < full.flop if case.causal or case.lengths else case.flop == full.flop
    assert dataclasses.replace(case, mode="eval").flop < dataclasses.replace(case, mode="train").flop


def test_one_wrong_row_at_the_end_is_seen_through_blocks() -> None:
    case = dataclasses.replace(select(every_case(), globs=[TINY])[0], mode="eval")
    inputs = draw_inputs(case, CPU, 0)

    class LastRow(Linear):
        def call(self, module: torch.nn.Module, inputs: Any) -> tuple[Tensor, None]:
            out, _ = super().call(module, inputs)
            out[-1, -1] *= 1.2
            return out, None

    reference = Reference.of(inputs, block=1)
    assert admit(Linear(), inputs, reference)[1]["status"] == "ok"
    assert admit(LastRow(), inputs, reference)[1]["status"] == "wrong"


def test_padded_rows_count_for_those_who_promise_them() -> None:
    case = select(every_case(), ["padded"], modes=["eval"])[0]
    case = dataclasses.replace(case, embed_dim=16, heads=2, heads_kv=2)
    inputs = draw_inputs(case, CPU, 0)
    reference = Reference.of(inputs)

    class Emptied(Linear):
        def call(self, module: torch.nn.Module, inputs: Any) -> tuple[Tensor, None]:
            out, _ = super().call(module, inputs)
            return out.masked_fill(inputs.hidden[..., None], 0.0), None

    contestant: Contestant = Emptied()
    assert admit(contestant, inputs, reference)[1]["status"] == "wrong"
    contestant.every_row = False
    assert admit(contestant, inputs, reference)[1]["status"] == "ok"


@given(st.lists(st.integers(1, 200), min_size=1, max_size=5), st.booleans())
def test_peak_memory_is_that_of_what_lives_at_once(sizes: list[int], kept: bool) -> None:
    def work() -> None:
        alive = []
        for size in sizes:
            alive.append(torch.empty(size, 1024, dtype=torch.uint8))
            if not kept:
                alive.clear()

    assert peak_bytes(work, CPU) == 1024 * (sum(sizes) if kept else max(sizes))


@given(
    broken=st.dictionaries(st.sampled_from("abcd"), st.integers(0, 9)),
    rounds=st.integers(1, 6),
    repeats=st.integers(0, 3),
    late=st.booleans(),
)
def test_what_raises_takes_no_more_turns_and_the_others_take_all(
    broken: dict[str, int], rounds: int, repeats: int, late: bool
) -> None:
    """Each call of a timer is one turn here, and the first one finds out how many calls that takes."""
    turns = dict.fromkeys("abcd", 0)
    told: dict[str, str] = {}

    def timer(name: str, calls: int) -> float:
        turns[name] += 1
        if turns[name] == broken.get(name):
            raise ValueError(name)
        return 1.0

    answers = iter([False] * repeats)
    done = min(rounds, FEWEST) if late else rounds
    timers = {name: functools.partial(timer, name) for name in turns}
    samples = take_turns(
        timers,
        block=1.0,
        most=8,
        rounds=rounds,
        until=-math.inf if late else math.inf,
        seed=0,
        failed=lambda name, error: told.update({name: str(error)}),
        counts=lambda: next(answers, True),
    )
    fell = {name for name, at in broken.items() if 1 <= at <= 1 + done + repeats}
    assert told == {name: name for name in fell} and timers.keys() == samples.keys() == turns.keys() - fell
    if len(fell) < len(turns):
        assert all(turns[name] == 1 + done + repeats for name in samples)
        assert all(times == [1.0] * done for times in samples.values())


@st.composite
def runs(draw: st.DrawFn) -> dict[str, Any]:
    """Runs as they come out of the runner, with drawn times."""
    gpu = draw(st.booleans())
    chosen = draw(st.lists(st.sampled_from(every_case()), min_size=1, max_size=4, unique_by=lambda case: case.id))
    cases = []
    for case in chosen:
        names = ["stock", "stock_best", "linear_sdpa", "flashmha", "flashmha_best"]
        if case.suite == "heads":
            one, beside = ("attention", "sdpa") if case.level == "core" else ("flashmha_best", "linear_sdpa")
            names = [one, beside] + [f"{one.removesuffix('_best')}_without"] * (case != case.bare)
        elif case.level == "core":
            names = ["sdpa", "attention"]
        elif case.level == "encoder":
            names = ["stock_encoder", "hand_encoder", "packed_encoder", "flashmha_encoder", "flashmha_encoder_skip"]
        elif case.level == "decoder":
            names = ["stock_decoder", "hand_decoder", "flashmha_decoder"]
        elif draw(st.booleans()):
            names += ["stock_graph", "linear_sdpa_graph", "flashmha_graph", "linear_sdpa_compiled", "flash_attn_mha"]
        rows: dict[str, dict[str, Any]] = {"absent": {"ours": False, "status": "refused", "reason": "a | in it"}}
        rounds = draw(st.integers(1, 5))
        for name in [*names, CONTROL]:
            rows[name] = {
                "ours": name.startswith(("flashmha", "attention", CONTROL)) and not name.endswith("_without"),
                "yardstick": name.endswith("_without"),
                "status": "ok",
                "error": {"out": 1e-7},
                "peak_bytes": draw(st.integers(1, 2**30)),
                "seconds": draw(st.lists(times, min_size=rounds, max_size=rounds)),
            }
        row = {"id": case.id, "case": dataclasses.asdict(case), "drifted": False, "contestants": rows}
        if gpu:
            canaries = draw(st.lists(st.floats(1.0, 1e3), min_size=rounds, max_size=rounds))
            row |= {"flop": case.flop, "canaries": {"gemm_tflops": canaries, "copy_tbs": canaries}}
        cases.append(row)
    meta = {"version": "0", "git": None, "dirty": None, "options": {}, "utc": "2020-01-01T00:00:00", "rounds": 5}
    env = {"device": "cpu", "cpu": "some", "threads": 1, "torch": "0", "python": "0"}
    found = {"schema": 1, "run": meta, "env": env, "absent": {}, "dropped": [], "unstable": False}
    return {**found, **judge_cases(cases), "cases": cases}


@fewer(3)
@given(found=runs())
def test_a_run_survives_its_file(found: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("run") / "run.json"
    save(found, path)
    again = load(path)
    assert again == json.loads(json.dumps(found))
    assert markdown(again) == markdown(found)
    judge_cases(again["cases"])
    assert again == json.loads(json.dumps(found)), "the verdicts follow from the seconds alone"


def times_of(case: dict[str, Any]) -> dict[str, list[float]]:
    return {name: row["seconds"] for name, row in case["contestants"].items() if "seconds" in row}


@fewer(3)
@given(runs())
def test_a_report_hides_no_case_and_no_loss(found: dict[str, Any]) -> None:
    page = markdown(found)
    for one, summary in found["summary"].items():
        assert summary["win"] + summary["tie"] + summary["loss"] == summary["cases"]
        verdicts = [case["verdicts"][one] for case in found["cases"] if one in case["verdicts"]]
        assert len(verdicts) == summary["cases"] and verdicts.count("LOSS") == summary["loss"]
    for case in found["cases"]:
        assert f"| {case['id']} |" in page
        for kind, best in case["best_peers"].items():
            alike = [name for name in case["contestants"] if how(name) == kind and name in times_of(case)]
            rows = case["contestants"]
            peers = [times_of(case)[name] for name in alike if not rows[name]["ours"] | rows[name]["yardstick"]]
            assert middle(times_of(case)[best]) == min(map(middle, peers))
        for one in case["verdicts"]:
            assert how(case["best_peers"][how(one)]) == how(one)


@given(runs(), st.floats(0.1, 1.0))
def test_the_share_of_a_matrix_product_is_that_of_the_time(found: dict[str, Any], slower: float) -> None:
    for case in found["cases"]:
        assert ("canaries" in case) == (share_of_gemm(case, CONTROL) is not None)
        if "canaries" in case:
            rate = 1e12 * middle(case["canaries"]["gemm_tflops"])
            case["contestants"][CONTROL]["seconds"] = [case["flop"] / rate / slower]
            assert math.isclose(share_of_gemm(case, CONTROL) or 0.0, slower)


WHOLE = '{"schema": 1, "run": {}, "env": {}, "absent": {}, "dropped": [], "unstable": false, "cases": %s}'
NO_RUNS = ("", "[]", "{}", '{"schema": 2}', '{"schema": 1}', "[" * 100_000, WHOLE % "[3]", WHOLE % '[{"id": "a"}]')


@pytest.mark.parametrize("text", NO_RUNS, ids=range(len(NO_RUNS)))
def test_a_file_that_is_no_run_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(ValueError, match="must hold"):
        load(tmp_path / "run.json")


class Mine(Naive):
    """A third party's backend that is right."""

    name = "mine"


class Wrong(Backend):
    """A third party's backend that is not."""

    name = "mine"
    limits = Limits(devices=("cpu",), dtypes=(torch.float32,), features=frozenset({"backward"}))

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, spec: Any) -> Tensor:
        return q + v


@pytest.fixture(params=(Mine, Wrong))
def third_party(request: pytest.FixtureRequest) -> Iterator[type[Backend]]:
    register(request.param)
    yield request.param
    unregister("mine")


def test_a_third_partys_backend_takes_part_by_itself_and_only_if_right(
    third_party: type[Backend], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["bench", "--case", TINY, "overhead/*", "--rounds", "1", "--no-plots", "--out", str(tmp_path)]
    status = main([*arguments, *ENDLESS, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found == load(tmp_path / "run.json")
    rows = [case["contestants"] for case in found["cases"]]
    mine = [rows[0]["flashmha:mine"], rows[1]["attention:mine"]]
    if third_party is Wrong:
        assert status == 1 and all(row["status"] == "wrong" and "seconds" not in row for row in mine)
    else:
        assert status in (0, 3) and all(len(row["seconds"]) == 1 for row in mine)


def test_a_named_backend_has_a_row_of_its_own(
    third_party: type[Backend], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["bench", "--case", TINY, "overhead/*", "--rounds", "1", "--no-plots", "--out", str(tmp_path), *ENDLESS]
    for named, shown in ((["mine"], {"mine"}), (["mine", "naive"], {"mine", "naive"}), (["naive"], {"naive"})):
        main([*arguments, "--backends", *named])
        printed = capsys.readouterr().out
        page = (tmp_path / "table.md").read_text().partition("## All that took part")[0]
        for case in (TINY, "overhead/core/eval/b1s8e64h4"):
            rows = {line.split(", ")[1].split()[0] for line in printed.splitlines() if line.startswith(f"{case}, ")}
            assert rows == shown and all(f"| {case}, {name} |" in page for name in shown)
        assert (" wrong " in printed) == ("mine" in named and third_party is Wrong)
    main(arguments)  # where nothing is said, those of other packages alone
    printed = capsys.readouterr().out
    assert f"{TINY}, mine " in printed and "overhead/core/eval/b1s8e64h4, naive" not in printed


def test_one_command_writes_every_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="needs pip install matplotlib")
    folder, again = tmp_path / "made", tmp_path / "again"
    call = ["bench", "--case", TINY, "overhead/*", "--rounds", "2", "--out", str(folder), *ENDLESS]
    assert main(call) in (0, 3)
    assert {path.name for path in folder.iterdir()} == {"run.json", "table.md", *PLOTS}
    printed = capsys.readouterr().out
    assert TINY in printed and "geometric mean" in printed
    assert main(["bench", "--report", str(folder / "run.json"), "--out", str(again)]) in (0, 3)
    assert capsys.readouterr().out == printed
    for name in ("table.md", *PLOTS):
        assert (again / name).read_bytes() == (folder / name).read_bytes()


@fewer(5)
@given(runs())
def test_no_marker_is_cut_and_no_table_is_empty(found: dict[str, Any]) -> None:
    pytest.importorskip("matplotlib", reason="needs pip install matplotlib")
    from flashmha.benchmark import plots

    figures: list[Any] = []
    with mock.patch("matplotlib.figure.Figure.savefig", lambda figure, *where, **options: figures.append(figure)):
        plots.draw_plots(found, Path("nowhere"))
    for figure in figures:
        for ax in figure.axes:
            for line in ax.lines:
                (left, right), (low, high) = sorted(ax.get_xlim()), sorted(ax.get_ylim())
                inside = [left <= x <= right and low <= y <= high for x, y in line.get_xydata().tolist()]
                assert all(inside) and not line.get_clip_on()
    page = markdown(found)
    lines = page.splitlines()
    for line, following in itertools.pairwise([*lines, ""]):
        assert not line.startswith("| --- |") or following.startswith("| ")
    assert ("## Not timed" in page) == bool(absences_table(found)[1])


def test_a_run_on_a_gpu_has_one_more_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs pip install matplotlib")
    main(["bench", "--case", TINY, "--rounds", "2", "--no-plots", "--out", str(tmp_path), *ENDLESS])
    found = json.loads((tmp_path / "run.json").read_text())
    for case in found["cases"]:
        case["canaries"] = {"gemm_tflops": [0.1, 0.2], "copy_tbs": [0.1, 0.2]}
    save(found, tmp_path / "run.json")
    assert main(["bench", "--report", str(tmp_path / "run.json"), "--out", str(tmp_path / "shown")]) in (0, 3)
    assert {path.name for path in (tmp_path / "shown").iterdir()} == {"table.md", "gemm.png", *PLOTS}


def test_a_spent_budget_drops_cases_and_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count()
    monkeypatch.setattr(time, "monotonic", lambda: float(next(ticks)))
    cases = select(every_case(), ["small", "overhead"])
    found = run(Plan(cases, CPU, budget=0.5, peers=["sdpa"], backends=[]), lambda line: None)
    assert sorted(found["dropped"]) == sorted(case.id for case in cases)
    assert found["cases"] == [] and not found["unstable"]
    assert all(case.id in markdown(found) for case in cases)


def test_threads_and_the_collector_come_back() -> None:
    import gc

    before = torch.get_num_threads(), gc.isenabled()
    run(
        Plan(select(every_case(), ["overhead"]), CPU, rounds=1, budget=1e9, peers=["sdpa"], backends=[]),
        lambda line: None,
    )
    assert (torch.get_num_threads(), gc.isenabled()) == before


def test_the_list_names_every_case(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [row["id"] for row in listed] == [case.id for case in every_case()]
    for row in listed:
        assert CONTROL in row["contestants"] and not any("compiled" in name for name in row["contestants"])


@pytest.mark.parametrize(
    "arguments",
    (
        ["--case", "nothing/*"],
        ["--peers", "no such peer"],
        ["--backends", "no such backend"],
        ["--backends", "flash2"],
        ["--rounds", "0"],
        ["--budget", "0"],
        ["--device", "nowhere"],
        ["--suites", "none"],
        ["--report", "no/such/file.json"],
    ),
)
def test_a_wrong_call_takes_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    if arguments == ["--backends", "flash2"] and torch.cuda.is_available():
        pytest.skip("needs a machine without a CUDA device")
    with pytest.raises(SystemExit) as caught:
        main(["bench", "--no-plots", *arguments])
    assert caught.value.code == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_peers_are_chosen_by_name_and_compiled_ones_only_when_asked() -> None:
    every, absent = all_contestants(CPU)
    small, causal = (select(every_case(), [suite], levels=["layer"])[0] for suite in ("small", "causal"))

    def names(case: Case, *peers: str) -> set[str]:
        return {one.name for one in contestants(every, case, CPU, peers or None)}

    assert names(small, "linear_sdpa") & {"stock", "stock_best", "linear_sdpa"} == {"linear_sdpa"}
    assert "flashmha_best" in names(small, "linear_sdpa")
    if "stock_compiled" not in absent:
        assert "stock_compiled" in names(small, "all") and "stock_compiled" not in names(causal, "all")
        assert "stock_compiled" in names(causal, "*_compiled")


def test_every_contestant_is_here_or_absent_with_a_reason() -> None:
    from flashmha.benchmark.plots import LINES, PAIRS

    every, absent = all_contestants(CPU)
    here = {one.name for one in every}
    assert not here & absent.keys() and all(absent.values())
    shown = {name for pairs in PAIRS.values() for pair in pairs.values() for name in pair} | LINES.keys()
    assert shown <= here | absent.keys()
    assert {"stock_graph", "flash_attn_4", "flash_attn_mha", "sdpa_cudnn", "flash_attn_2_kvcache"} <= absent.keys()


def flash_attn_with_kvcache(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """What a flash-attn package may offer beside its dense function, in whose module it lies."""
    return sdpa(q, k, v, None, causal)


class Mha(torch.nn.Module):
    """``flash_attn.modules.mha.MHA`` on a CPU: its constructor, its parameters and its answer."""

    def __init__(
        self,
        embed_dim: int,
        heads: int,
        num_heads_kv: int,
        qkv_proj_bias: bool,
        out_proj_bias: bool,
        rotary_emb_dim: int,
        causal: bool,
        use_flash_attn: bool,
    ) -> None:
        super().__init__()
        self.heads, self.causal, self.dim = (heads, num_heads_kv, num_heads_kv), causal, rotary_emb_dim
        rows = embed_dim // heads * sum(self.heads)
        self.Wqkv = torch.nn.Linear(embed_dim, rows, bias=qkv_proj_bias)
        self.out_proj = torch.nn.Linear(embed_dim, embed_dim, bias=out_proj_bias)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.Wqkv(x).unflatten(-1, (sum(self.heads), -1)).split(self.heads, dim=2)
        if self.dim:
            q, k = Rotary(self.dim)(q, k)
        return self.out_proj(sdpa(q, k, v, None, self.causal).flatten(2))


@pytest.fixture(params=("right", "wrong", "refuses", "starves"))
def packages(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """flash-attn packages on a CPU, all of one kind."""

    def dense(
        q: Tensor, k: Tensor, v: Tensor, causal: bool, window_size: tuple[int, int] = (-1, -1)
    ) -> tuple[Tensor, Tensor | None]:
        if request.param == "refuses":
            raise RuntimeError("this build has no such head_dim")
        if request.param == "starves":
            raise torch.OutOfMemoryError("tried to allocate everything")
        mask = None
        if window_size != (-1, -1):
            mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(window_size[1]).triu(-window_size[0])
        return sdpa(q, k, v, mask, causal and mask is None) * (1.2 if request.param == "wrong" else 1.0), None

    here = [answering(kind, why_not_here=nothing, public=lambda: dense) for kind in (Flash4, Flash3, Flash2)]
    monkeypatch.setitem(sys.modules, "flash_attn.modules.mha", types.SimpleNamespace(MHA=Mha))  # type: ignore[arg-type]
    kind: str = request.param
    with instead(*here):
        yield kind


@settings(fewer(5), suppress_health_check=[HealthCheck.function_scoped_fixture, *slow])
@given(case=drawn.map(lambda case: dataclasses.replace(case, dtype="bfloat16")))
def test_a_package_called_by_hand_is_timed_if_right_and_else_says_why(packages: str, case: Case) -> None:
    inputs = draw_inputs(case, CPU, 0)
    reference = Reference.of(inputs)
    by_hand = ("flash_attn_4", "flash_attn_3", "flash_attn_2", "linear_flash_attn_4")
    every, absent = all_contestants(CPU)
    assert not absent.keys() & {*by_hand, "flash_attn_mha", "flash_attn_3_kvcache"}
    for one in contestants(every, case, CPU, peers=[*by_hand, "flash_attn_mha"], backends=[]):
        if one.ours or one.yardstick:
            continue
        row = admit(one, inputs, reference)[1]
        plain = case.seqlen_q == case.seqlen_k and case.batch_first and case.qk_norm is None
        if case.lengths or case.weights or (one.name == "flash_attn_mha" and not plain):
            assert row["status"] == "refused" and "raised" not in row
        elif packages == "right" or one.name == "flash_attn_mha":
            assert row["status"] == "ok", row
        elif packages == "wrong":
            assert row["status"] == "wrong"
        else:
            assert row["status"] == "refused" and row["raised"]
            assert ("OutOfMemoryError" if packages == "starves" else "head_dim") in row["reason"]


@pytest.mark.parametrize("packages", ["right"], indirect=True)
def test_a_cache_is_for_decoding(packages: str) -> None:
    case = select(every_case(), ["decode"])[0]
    case = dataclasses.replace(case, seqlen_k=64, embed_dim=64)
    one = next(one for one in all_contestants(CPU)[0] if one.name == "flash_attn_2_kvcache")
    inputs = draw_inputs(case, CPU, 0)
    assert admit(one, inputs, Reference.of(inputs))[1]["status"] == "ok"
    assert one.refuses(dataclasses.replace(case, suite="dense")) is not None


def test_an_encoder_is_run_as_its_case_says() -> None:
    every, absent = all_contestants(CPU)
    for case in every_case("cuda"):
        if case.level == "encoder" and case.how != "reduced" and "stock_encoder_compiled" not in absent:
            names = {one.name for one in contestants(every, case, CPU, backends=[])}
            assert names and {how(name) for name in names} == {case.how}
            wanted = {"compiled": {"hand_encoder_compiled"}, "eager": {CONTROL, "packed_encoder"}}[case.how]
            assert wanted <= names
        elif case.level != "encoder":
            assert case.how == "eager"
    assert {"stock_encoder_reduced", "flashmha_encoder_reduced"} <= absent.keys()


@pytest.mark.parametrize(
    ("asked", "suites"),
    (
        ([], set(SUITES) - {*ON_REQUEST}),
        (["--level", "encoder"], {"model"}),
        (["--level", "layer"], set(SUITES) - {*ON_REQUEST, "overhead", "decode", "odd"}),
        (["--suites", "model"], {"model"}),
        (["--case", "model/*"], {"model"}),
        (["--suites", "heads"], {"heads"}),
        (["--case", "heads/core/*"], {"heads"}),
        (["--suites", "generate"], {"generate"}),
        (["--level", "decoder"], {"generate"}),
    ),
)
def test_what_takes_long_runs_where_it_is_named(asked: list[str], suites: set[str]) -> None:
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    cases = bench.plan_from_flags(parser.parse_args(asked)).cases
    assert {case.suite for case in cases} == suites - {"odd"}  # which is for GPUs


def test_what_is_compiled_is_compiled_and_has_itself_as_a_twin(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"batch": 2, "seqlen_q": 6, "seqlen_k": 6, "embed_dim": 8, "heads": 2, "heads_kv": 2, "lengths": (3, 6)}
    fields: dict[str, Any] = {**sizes, "layers": 1, "autocast": None, "dtype": "float32", "how": "compiled"}
    case = dataclasses.replace(every_case("cuda")[0], **fields)
    compile_, traced = torch.compile, []

    def traces(module: torch.nn.Module, **options: Any) -> Any:
        counter = CompileCounter()
        traced.append(counter)
        return compile_(module, backend=counter, **options)

    monkeypatch.setattr(torch, "compile", traces)
    inner = [StockEncoder(), HandEncoder(), FlashmhaEncoder()]
    taking_part = [Through(one.name, one, "compiled") for one in inner]
    plan = Plan([case], CPU, rounds=2, budget=1e9)
    found = runner.measure(case, taking_part, plan, runner.Canary(CPU), math.inf, 1.0)
    judge_cases([found])
    assert len(traced) == 3 and all(counter.op_count > 0 for counter in traced)
    assert found["control"]["median"] > 0 and len(found["contestants"][CONTROL]["seconds"]) == 2
    assert {row["status"] for row in found["contestants"].values()} == {"ok"}


class Seated:
    """A contestant at no tensors, which finds memory for them or does not."""

    def __init__(self, starves: bool) -> None:
        self.contestant, self.starves = self, starves

    def setting(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def __call__(self) -> None:
        if self.starves:
            raise torch.OutOfMemoryError("tried to allocate everything")


@given(starving=st.lists(st.booleans(), min_size=1, max_size=4))
def test_what_finds_no_memory_beside_the_others_takes_no_part(starving: list[bool]) -> None:
    seats: Any = {f"peer {place}": Seated(starves) for place, starves in enumerate(starving)}
    rows: dict[str, dict[str, Any]] = {name: {"status": "ok"} for name in seats}
    plan = Plan([], CPU, rounds=1)
    samples, _, _ = runner.race(dict(seats), rows, plan, runner.Canary(CPU), math.inf)
    for name, seat in seats.items():
        assert rows[name]["status"] == ("refused" if seat.starves else "ok")
        assert bool(samples.get(name)) is not seat.starves
        assert not seat.starves or "OutOfMemoryError: tried" in rows[name]["reason"]


def test_ours_that_raises_has_failed_and_a_peer_is_refused() -> None:
    case = select(every_case(), globs=[TINY])[0]
    inputs = draw_inputs(case, CPU, 0)

    class Raises(Linear):
        def call(self, module: torch.nn.Module, inputs: Any) -> tuple[Tensor, None]:
            raise RuntimeError("broken")

    peer, ours = Raises(), Raises()
    ours.ours = True
    rows = [admit(one, inputs, Reference.of(inputs))[1] for one in (peer, ours)]
    assert [row["status"] for row in rows] == ["refused", "failed"]
    assert all("broken" in row["reason"] for row in rows)


def test_a_seat_trains_every_parameter_and_leaves_no_gradient() -> None:
    inputs = draw_inputs(select(every_case(), globs=[TINY])[0], CPU, 0)
    seat = Seat(Flashmha("ours", StockBest()), inputs)
    found = seat.collect(seat.run())
    assert {name for name in found if name.startswith("gradient")} == {
        f"gradient of {name}" for name in ("query", *inputs.state)
    }
    seat()
    assert all(leaf.grad is None for leaf in seat.leaves.values())

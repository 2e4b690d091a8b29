"""The split-KV kernel: what it serves and how it cuts a problem, and that it is right however it does.

The kernels run on a GPU (``pytest --device cuda``), and on a CPU where triton is installed and interprets them
(``TRITON_INTERPRET=1 pytest tests/test_split_kv.py``).
"""

import dataclasses
import os
from typing import Any

import pytest
import torch
from conftest import fewer
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_ranking import answering, nothing, on, on_cuda, problem, willing
from test_tiles import SHARED_MEMORY
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from flashmha import AttentionSpec, Dense, KeyLengths, KeyPadding, Window, attention, causal
from flashmha.backends import choose, explain, order
from flashmha.backends.choice import builtin
from flashmha.backends.choice.ranking import DECODE_QUERIES, is_step
from flashmha.backends.choice.registry import instead
from flashmha.backends.limits import HALF
from flashmha.backends.split_kv.backend import SplitKV
from flashmha.backends.split_kv.launches import SplitProblem, attend_split
from flashmha.backends.split_kv.tilings import (
    BESIDE_TILES,
    FEW_TILES,
    MOST_QUERY_BYTES,
    MOST_QUERY_ROWS,
    MOST_SPLITS,
    Cut,
    choose_cut,
    choose_splits,
    deepen,
)
from flashmha.host.kernels import H200, Processors, padded
from flashmha.problem.cached import OwnTokens, Positions
from flashmha.problem.masks import join_masks
from flashmha.problem.scores import ALiBi
from flashmha.testing import assert_agrees, seeds, specs, tensors
from flashmha.testing.grid import KERNELS_OF_STEPS, drawn

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def made_of(name: str) -> Processors:
    """A GPU by name."""
    return Processors(132, SHARED_MEMORY[name], 9 if name == "H200" else 8)


DTYPES = (torch.float32, *HALF)


class Anywhere(SplitKV):
    """The backend on a device of any kind, cut in a way of one's own."""

    limits = dataclasses.replace(
        SplitKV.limits,
        devices=(),
        dtypes=(torch.float32, torch.float16) if INTERPRETED else DTYPES,  # interpreted, bfloat16 is multiplied wrong
    )

    def __init__(self, cut: Cut | None = None) -> None:
        self.cut = cut

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Any:
        if self.cut is None:
            return super().__call__(q, k, v, spec)
        out, lse = attend_split(q, k, v, SplitProblem.of(spec), self.cut)
        return (out, lse) if spec.need_lse else out


@st.composite
def problems(draw: st.DrawFn, device: torch.device, lengths: bool = False) -> AttentionSpec:
    """Problems that the kernel serves: of any kind on a CPU, of few kinds where each has to be compiled."""
    if device.type == "cpu":
        features = Anywhere.limits.features
        more = {"head_dims": (1, 3, 16, 24, 40, 64, 72, 128), "longest": 150}
        spec = draw(specs(limits=dataclasses.replace(Anywhere.limits, features=features), device=device, **more))
    else:
        spec = draw(drawn(st.sampled_from(KERNELS_OF_STEPS), device))
    if lengths and "key_lengths" not in spec.features:
        ends = torch.tensor(draw(st.lists(st.integers(0, spec.seqlen_k), min_size=spec.batch, max_size=spec.batch)))
        rule = KeyLengths(ends.to(device))
        spec = dataclasses.replace(spec, mask=rule if spec.mask is None else spec.mask & rule)
    assume(Anywhere().why_not(spec) is None)
    return spec


@st.composite
def cuts(draw: st.DrawFn, device: torch.device, spec: AttentionSpec) -> Cut:
    """A way to cut a problem: on a GPU one kernel for each, which is split by any number."""
    splits = draw(st.sampled_from((1, 2, 3, 5, 16)))
    if device.type == "cpu":
        return Cut(draw(st.sampled_from((16, 32, 128))), warps=4, stages=1, splits=splits)
    rows = spec.seqlen_q * spec.heads // spec.heads_kv
    chosen = choose_cut(rows, spec.head_dim, spec.head_dim_v, spec.dtype, made_of("A100"))
    return dataclasses.replace(chosen, splits=splits)


FEW = fewer(4) if INTERPRETED else settings()


@settings(FEW)
@given(data=st.data(), seed=seeds())
def test_the_kernel_agrees_with_the_definition_however_it_is_cut(
    machine: torch.device, data: st.DataObject, seed: int
) -> None:
    spec = data.draw(problems(machine))
    assert_agrees(Anywhere(data.draw(cuts(machine, spec))), spec, seed)


@settings(FEW)
@given(data=st.data(), seed=seeds())
def test_the_kernel_agrees_with_the_definition_as_it_cuts_itself(
    machine: torch.device, data: st.DataObject, seed: int
) -> None:
    assert_agrees(Anywhere(), data.draw(problems(machine)), seed)


def answers(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, cut: Cut | None) -> tuple[Tensor, Tensor]:
    return attend_split(q, k, v, SplitProblem.of(spec), cut)


def same(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other))


@settings(FEW)
@given(data=st.data(), seed=seeds(), garbage=st.sampled_from((float("nan"), float("inf"), -float("inf"))))
def test_what_no_row_holds_is_not_looked_at(
    machine: torch.device, data: st.DataObject, seed: int, garbage: float
) -> None:
    """Slots behind a row's length, and those of a ring that hold no key, may hold anything."""
    spec = data.draw(problems(machine, lengths=True))
    cut = data.draw(cuts(machine, spec))
    q, k, v = (x.clone() for x in tensors(spec, seed))
    before = answers(q, k, v, spec, cut)
    valid = spec.valid_keys()
    assert valid is not None
    places = spec.positions
    valid = valid if places is None or places.keys is None else valid & (places.keys >= 0)
    if spec.pages is not None:
        slots = torch.arange(spec.seqlen_k, device=machine)
        pages = spec.pages.block_table.long()[:, slots // spec.pages.page_size]
        owners = valid.new_zeros(k.shape[:2], dtype=torch.int32)
        owners.index_put_((pages, (slots % spec.pages.page_size).expand_as(pages)), valid.int(), accumulate=True)
        valid = owners > 0
    for x in (k, v):
        x.masked_fill_(~valid[:, :, None, None], garbage)
    assert same(before, answers(q, k, v, spec, cut))


@settings(FEW)
@given(data=st.data(), seed=seeds())
def test_how_heads_lie_changes_no_bit(machine: torch.device, data: st.DataObject, seed: int) -> None:
    spec = data.draw(problems(machine))
    cut = data.draw(cuts(machine, spec))
    plain = [x.contiguous() for x in tensors(spec, seed)]
    moved = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in plain]
    beside = [torch.cat((x, x), dim=3)[..., : x.shape[3]] for x in plain]
    across = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in plain]
    expected = answers(*plain, spec, cut)
    for heads in (moved, beside, across):
        assert same(expected, answers(*heads, spec, cut))


@settings(FEW)
@given(data=st.data(), seed=seeds())
def test_a_row_of_a_batch_is_as_it_is_alone(machine: torch.device, data: st.DataObject, seed: int) -> None:
    """Each row is split by its own length: what the others hold does not matter."""
    batch, capacity = data.draw(st.integers(2, 3)), data.draw(st.sampled_from((1, 40, 130)))
    ends = data.draw(st.lists(st.integers(0, capacity), min_size=batch, max_size=batch))
    lengths = torch.tensor(ends, dtype=data.draw(st.sampled_from((torch.int32, torch.int64))), device=machine)
    spec = AttentionSpec(
        batch, 1, capacity, 4, 2, 16, 16, torch.float16, machine, mask=KeyLengths(lengths), need_lse=True
    )
    cut = Cut(32, 4, 2, splits=data.draw(st.sampled_from((1, 3, 7))))
    q, k, v = (x.contiguous() for x in tensors(spec, seed))
    whole = answers(q, k, v, spec, cut)
    for row in range(batch):
        here = slice(row, row + 1)
        alone = dataclasses.replace(spec, batch=1, mask=KeyLengths(lengths[here]))
        assert same(tuple(x[here] for x in whole), answers(q[here], k[here], v[here], alone, cut))
        if not ends[row]:
            assert not whole[0][row].any() and bool((whole[1][row] == -float("inf")).all())


@settings(fewer(20) if INTERPRETED else fewer(4))
@given(data=st.data(), seed=seeds())
def test_the_operator_is_what_compilers_are_told(machine: torch.device, data: st.DataObject, seed: int) -> None:
    spec = data.draw(problems(machine, lengths=True))
    heads, told = tensors(spec, seed), SplitProblem.of(spec)
    torch.library.opcheck(
        torch.ops.flashmha.split_kv.default, (*heads, *told), test_utils=("test_schema", "test_faketensor")
    )
    assert same(torch.ops.flashmha.split_kv(*heads, *told), answers(*heads, spec, None))


@pytest.mark.parametrize("window", (None, 3))
def test_a_compiled_step_is_the_eager_one_and_compiled_once(machine: torch.device, window: int | None) -> None:
    """Whatever the lengths and the positions are: they are tensors."""
    q, k, v = (torch.randn(2, n, heads, 16, device=machine) for n, heads in ((3, 4), (40, 2), (40, 2)))
    kernels = CompileCounterWithBackend("aot_eager")

    def attend_to(lengths: Tensor) -> Tensor:
        at = lengths[:, None] - 3 + torch.arange(3, device=machine)
        mask = join_masks(Window(window, 0), Positions(at, at_end=True), KeyLengths(lengths))
        made: Tensor = attention(q, k, v, mask=mask, backend="split_kv")
        return made

    with instead(answering(Anywhere, why_not_here=nothing)), torch.no_grad():
        compiled = torch.compile(attend_to, backend=kernels, fullgraph=True)
        for ends in ([3, 40], [17, 4], [40, 39]):
            lengths = torch.tensor(ends, device=machine)
            assert torch.equal(compiled(lengths), attend_to(lengths))
    assert kernels.frame_count == 1


@pytest.mark.gpu
@given(data=st.data(), seed=seeds())
@settings(fewer(10))
def test_a_cuda_graph_follows_lengths_and_positions(data: st.DataObject, device: torch.device, seed: int) -> None:
    lengths, at = (torch.zeros(3, dtype=torch.int32, device=device) for _ in range(2))
    mask = causal() & Positions(at[:, None] + torch.arange(2, device=device)) & KeyLengths(lengths)
    queries = mask.documents.queries  # type: ignore[union-attr]
    spec = AttentionSpec(3, 2, 500, 8, 2, 64, 64, torch.float16, device, mask=mask, need_lse=True)
    q, k, v = tensors(spec, seed)
    answers(q, k, v, spec, None)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = answers(q, k, v, spec, None)
    for _ in range(3):
        ends = torch.tensor(data.draw(st.lists(st.integers(2, 500), min_size=3, max_size=3)), device=device)
        lengths.copy_(ends)
        queries.copy_(ends[:, None] - 2 + torch.arange(2, device=device))
        graph.replay()
        assert same(made, answers(q, k, v, spec, None))


# How it is cut


@pytest.mark.parametrize("name", SHARED_MEMORY)
@given(
    rows=st.integers(1, MOST_QUERY_ROWS),
    head_dims=st.tuples(st.integers(1, 256), st.integers(1, 256)),
    dtype=st.sampled_from(DTYPES),
)
def test_tiles_fit_shared_memory(name: str, rows: int, head_dims: tuple[int, int], dtype: torch.dtype) -> None:
    rows = min(rows, MOST_QUERY_BYTES // padded(head_dims[0]) // dtype.itemsize)
    cut = choose_cut(rows, *head_dims, dtype, made_of(name))
    assert cut.shared(rows, *head_dims, dtype.itemsize) <= SHARED_MEMORY[name] - BESIDE_TILES
    assert deepen(cut, rows, *head_dims, dtype, made_of(name)).stages in (cut.stages, cut.stages + 1)
    assert cut.keys >= 16 and cut.keys & (cut.keys - 1) == 0
    assert padded(rows) >= rows and min(map(padded, head_dims)) >= 16


@given(
    groups=st.integers(1, 4096),
    tiles=st.integers(1, 4096),
    number=st.sampled_from((16, 108, 132)),
)
def test_splits_share_what_there_is(groups: int, tiles: int, number: int) -> None:
    """No program is without a tile of a full row, and few long rows are split over all of a GPU, fewer no less."""
    here = H200._replace(number=number)
    splits = choose_splits(groups, tiles, here)
    if tiles <= FEW_TILES:
        assert splits == 1
        return
    assert 1 <= splits <= min(tiles, MOST_SPLITS)
    assert splits in (tiles, MOST_SPLITS) or groups * splits >= number
    if groups <= number:
        assert groups == 1 or choose_splits(groups - 1, tiles, here) >= splits


# What it serves, and when it is chosen


@given(spec=specs(), grad=st.booleans())
def test_it_serves_few_queries_without_gradients(spec: AttentionSpec, grad: bool) -> None:
    spec = on_cuda(spec, dtype=torch.bfloat16)
    rows = spec.seqlen_q * (spec.heads // spec.heads_kv)
    biases = () if spec.bias is None else spec.bias.parts
    sizes = 0 not in (spec.batch, spec.seqlen_q, spec.seqlen_k) and rows <= MOST_QUERY_ROWS
    others = {"key_padding", "documents", "dense_mask", "rule", "bias", "backward", "dropout"}
    asked = sizes and not spec.features & others and len(biases) < 2
    assert (SplitKV().why_not(spec) is None) == asked


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A Hopper GPU on which every backend runs what its limits allow."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with on(), instead(*map(willing, builtin.BUILT_IN)):
        yield


STEPS: dict[str, dict[str, Any]] = {
    "lengths": {},
    "a row of many keys": {"batch": 1, "seqlen_k": 1 << 17},
    "a guess of some tokens": {
        "seqlen_q": 4,
        "mask": lambda rule: rule & causal() & Positions(torch.zeros(2, 4).int()),
    },
    "a tree": {
        "seqlen_q": 4,
        "mask": lambda rule: rule & OwnTokens(torch.eye(4, dtype=torch.bool), torch.zeros(2).int()),
    },
    "a window": {"mask": lambda rule: rule & Window(5, 0) & Positions(torch.zeros(2, 1).int())},
    "a ring": {"mask": lambda rule: Window(5, 0) & Positions(torch.zeros(2, 1).int(), torch.zeros(2, 128).int())},
    "ALiBi": {"bias": ALiBi(torch.ones(8))},
    "a softcap": {"softcap": 5.0},
    "sinks": {"sinks": torch.zeros(8)},
    "groups": {"heads_kv": 2},
    "float32": {"dtype": torch.float32},
}


def step(mask: Any = None, **changes: Any) -> AttentionSpec:
    batch = changes.get("batch", 2)
    rule = KeyLengths(torch.ones(batch, dtype=torch.int32))
    sizes = {"batch": batch, "seqlen_q": 1, "seqlen_k": 128}
    return problem(**{**sizes, **changes, "mask": rule if mask is None else mask(rule)})


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("name", STEPS)
def test_a_step_over_a_cache_is_its_own(name: str) -> None:
    spec = step(**STEPS[name])
    assert is_step(spec) and order(spec)[0] == choose(spec).name == explain(spec).chosen == "split_kv"
    with on(("NVIDIA A100", 8)):
        assert choose(spec.changed()).name == "split_kv"


@pytest.mark.usefixtures("hopper")
@given(spec=specs(), longer=st.sampled_from((1, 600)))
def test_it_is_chosen_for_nothing_else(spec: AttentionSpec, longer: int) -> None:
    """Not beside gradients, nor for many queries, nor first where no cache is."""
    plain = spec.mask is None and spec.bias is None
    spec = on_cuda(spec, dtype=torch.bfloat16, **({"seqlen_k": spec.seqlen_k * longer} if plain else {}))
    if order(spec)[0] == "split_kv":
        assert is_step(spec) and not spec.needs_grad and spec.seqlen_q <= DECODE_QUERIES
    if spec.needs_grad or spec.seqlen_q * spec.heads // spec.heads_kv > MOST_QUERY_ROWS:
        assert choose(spec).name != "split_kv"


@pytest.mark.parametrize(
    ("rule", "said"),
    (
        (KeyPadding(torch.ones(2, 128, dtype=torch.bool)), "no key_padding"),
        (Dense(torch.ones(1, 128, dtype=torch.bool)), "no dense_mask"),
    ),
)
def test_what_it_does_not_serve_has_a_reason(rule: Any, said: str) -> None:
    assert SplitKV().why_not(problem(seqlen_q=1, seqlen_k=128, mask=rule)) == said


def test_many_queries_have_a_reason() -> None:
    why = SplitKV().why_not(problem(seqlen_q=17, seqlen_k=128, heads_kv=2))
    assert why == f"seqlen_q=17 times 4 heads of a group (at most {MOST_QUERY_ROWS})"


@pytest.mark.cpu("a CPU runs no kernels")
def test_a_cpu_has_a_reason() -> None:
    assert SplitKV().why_not_here(torch.device("cpu")) == "device cpu (only cuda)"

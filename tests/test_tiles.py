"""Weights by the kernels of a GPU: what they serve, how they are cut, and that they are right.

The kernels run on a GPU (``pytest --device cuda``), and on a CPU where triton is installed and interprets them
(``TRITON_INTERPRET=1 pytest tests/test_tiles.py``).
"""

import importlib.util
import os
from typing import Any

import pytest
import torch
from conftest import fewer
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from flashmha.backends import get
from flashmha.backends.limits import FEATURES, Limits
from flashmha.backends.naive import log_sum_exp, probabilities, scores
from flashmha.host.kernels import H200, why_no_kernels
from flashmha.problem.cached import OwnTokens, Pages, Positions
from flashmha.problem.documents import Documents
from flashmha.problem.rules import Rule
from flashmha.problem.scores import TensorBias
from flashmha.problem.spec import AttentionSpec
from flashmha.problem.windows import Window
from flashmha.testing import assert_close, seeds, specs, tensors
from flashmha.weights import recipe as weights
from flashmha.weights import row_launches, tiles, tilings
from flashmha.weights import tables as kernel_tables
from flashmha.weights.blocks import Box
from flashmha.weights.learned import held

SHARED_MEMORY = {"A100": 166912, "RTX 4090": 101376, "H200": H200.shared_memory}
"""GPUs, and the bytes of shared memory that a program may have there."""
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
LIMITS = Limits(
    devices=(),
    dtypes=(torch.float32, torch.float16)
    if INTERPRETED
    else tiles.KERNEL_DTYPES,  # interpreted, bfloat16 is multiplied wrong
    features=frozenset(FEATURES) - {"rule", "documents", "cache", "pages", "own_tokens", "backward", "dropout"},
)


@st.composite
def problems(draw: st.DrawFn) -> AttentionSpec:
    """Problems that the kernels serve, longer than a tile."""
    spec = draw(specs(limits=LIMITS, head_dims=(1, 3, 16, 40, 64, 128, 256), longest=150))
    return spec if tiles.why_not(spec) is None else spec.changed(bias=None)


@pytest.fixture(scope="module")
def machine(device: torch.device) -> torch.device:
    """A device that runs the kernels."""
    if device.type == "cuda":
        reason = why_no_kernels(device.type, device.index)
    elif importlib.util.find_spec("triton") is None:
        reason = "triton: pip install triton"
    else:
        reason = None if INTERPRETED else "a GPU (pytest --device cuda), or TRITON_INTERPRET=1"
    if reason is not None:
        pytest.skip(f"needs {reason.removeprefix('needs ')}")
    return device


def defined(
    spec: AttentionSpec, q: Tensor, k: Tensor, average: bool, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """The weights and the log-sum-exp by the definition, computed in a dtype."""
    dtype = spec.dtype if dtype is None else dtype
    score, blind = scores(q.to(dtype), k.to(dtype), spec)
    made = probabilities(score, blind, spec)
    return (made.mean(dim=1) if average else made), log_sum_exp(score, blind)


@settings(max_examples=200)
@given(spec=specs())
def test_a_problem_is_served_unless_its_tables_are_beyond_the_kernels(spec: AttentionSpec) -> None:
    parts = () if spec.mask is None else spec.mask.parts
    strange = any(isinstance(part, (Rule, Documents, Positions, Pages, OwnTokens)) for part in parts)
    added = () if spec.bias is None else spec.bias.parts
    strange = strange or (len(added) > 1 and any(isinstance(part, TensorBias) for part in added))
    strange = strange or any(tensor.dtype == torch.float64 for tensor in held(spec)) or spec.dtype == torch.float64
    assert (tiles.why_not(spec) is not None) == strange


@given(spec=specs(limits=LIMITS))
def test_gradients_want_bfloat16_and_no_softcap(spec: AttentionSpec) -> None:
    served = tiles.why_not(spec) is None and spec.softcap is None
    assert (tiles.no_gradients(spec) is None) == (spec.dtype == torch.bfloat16 and served)


@pytest.mark.cpu("a CPU runs no kernels")
def test_a_cpu_keeps_the_blocks() -> None:
    assert why_no_kernels("cpu", None) == "needs an NVIDIA GPU"


@pytest.mark.parametrize("name", SHARED_MEMORY)
@given(head_dim=st.integers(1, 256), dtype=st.sampled_from(tiles.KERNEL_DTYPES), tables=st.booleans())
def test_operands_fit_shared_memory(name: str, head_dim: int, dtype: torch.dtype, tables: bool) -> None:
    cut = tilings.choose_tiling(head_dim, dtype, SHARED_MEMORY[name], tables)
    assert cut.shared(dtype.itemsize) <= SHARED_MEMORY[name] - tilings.SPARE
    assert all(size >= 16 and size & (size - 1) == 0 for size in (cut.rows, cut.keys, cut.chunk))
    assert cut.chunk >= head_dim or dtype == torch.float32
    columns = tilings.tile_columns(cut, dtype.itemsize, SHARED_MEMORY[name])
    apart = columns != cut
    kept = (columns.stages * columns.rows + columns.keys) * columns.chunk * dtype.itemsize
    assert (kept if apart else columns.shared(dtype.itemsize)) <= SHARED_MEMORY[name] - tilings.SPARE
    backward = tilings.choose_backward_tiling(head_dim)
    assert backward.shared(2) <= SHARED_MEMORY[name] - tilings.SPARE and backward.chunk >= head_dim


@settings(max_examples=100)
@given(spec=specs(limits=LIMITS))
def test_tables_say_what_the_mask_says(spec: AttentionSpec) -> None:
    tables = kernel_tables.Tables.of(spec.changed(bias=None), Box.whole(spec), range(spec.seqlen_k))
    shape = (spec.batch, spec.heads, spec.seqlen_q, spec.seqlen_k)
    seen = torch.ones(shape, dtype=torch.bool, device=spec.device)
    if tables.bounds is not None:
        rows, keys = (torch.arange(size, device=spec.device) for size in shape[2:])
        distance = keys - rows[:, None]
        seen &= (distance >= tables.bounds[0]) & (distance <= tables.bounds[1])
    if tables.valid is not None:
        assert tables.valid.is_contiguous()
        seen &= tables.valid[:, None, None].bool()
    if tables.dense is not None:
        assert tables.dense.shape == shape and (tables.by_head or tables.dense.stride(1) == 0 or spec.heads == 1)
        seen &= tables.dense.bool()
    allowed = spec.allowed()
    assert torch.equal(seen, torch.ones_like(seen) if allowed is None else allowed.expand(shape))


@given(left=st.integers(0, 2**40), right=st.integers(0, 2**40), seqlen_q=st.integers(1, 9), seqlen_k=st.integers(1, 9))
def test_bounds_are_no_larger_than_the_problem(left: int, right: int, seqlen_q: int, seqlen_k: int) -> None:
    window = Window(left, right, align="top_left").to_bottom_right(seqlen_q, seqlen_k)
    found = kernel_tables.window_bounds([window], seqlen_q, seqlen_k)
    assert found is not None and max(map(abs, found)) <= max(seqlen_q, seqlen_k)


@settings(fewer(3) if INTERPRETED else settings())
@given(spec=problems(), average=st.booleans(), with_lse=st.booleans(), wide=st.booleans(), seed=seeds())
def test_weights_are_those_of_the_definition(
    machine: torch.device, spec: AttentionSpec, average: bool, with_lse: bool, wide: bool, seed: int
) -> None:
    q, k, _ = tensors(spec, seed)
    dtype = torch.float32 if wide else spec.dtype
    exact, lse = defined(spec, q, k, average, torch.float64)
    plain, _ = defined(spec, q, k, average)
    given_lse = lse.float() if with_lse and spec.bias is None else None
    actual = tiles.make_weights(q, k, given_lse, spec, average, dtype)
    actual = actual[:, 0] if average else actual
    assert_close("weights", actual, plain.to(dtype), exact, spec.dtype)
    assert not actual[exact.sum(dim=-1) == 0.0].any(), "a blind row has weights"


@st.composite
def parts_of(draw: st.DrawFn, size: int) -> range:
    start = draw(st.integers(0, max(0, size - 1)))
    return range(start, draw(st.integers(min(start + 1, size), size)))


@settings(fewer(3) if INTERPRETED else settings())
@given(spec=problems(), average=st.booleans(), with_lse=st.booleans(), data=st.data(), seed=seeds())
def test_a_box_holds_what_the_whole_holds(
    machine: torch.device, spec: AttentionSpec, average: bool, with_lse: bool, data: st.DataObject, seed: int
) -> None:
    q, k, _ = tensors(spec, seed)
    exact, lse = defined(spec, q, k, False, torch.float64)
    plain = defined(spec, q, k, False)[0]
    given_lse = lse.float() if with_lse and spec.bias is None else None
    heads = range(spec.heads) if average else data.draw(parts_of(spec.heads))
    box = Box(data.draw(parts_of(spec.batch)), heads, data.draw(parts_of(spec.seqlen_q)))
    keys = data.draw(parts_of(spec.seqlen_k))

    def cut(table: Tensor) -> Tensor:
        table = box.expand(table, spec, range(spec.seqlen_k))
        return table.mean(dim=1, keepdim=True) if average else table

    exact, plain = cut(exact), cut(plain)
    pairs = [
        (
            "a part",
            tiles.make_weights(q, k, given_lse, spec, average, torch.float32, box, keys),
            *(x[..., keys.start : keys.stop] for x in (plain, exact)),
        ),
        (
            "a mean over rows",
            tiles.sum_columns(q, k, given_lse, spec, average, box) / max(1, len(box.rows)),
            *(x.sum(dim=2, keepdim=True) / max(1, len(box.rows)) for x in (plain.float(), exact)),
        ),
    ]
    if not average and spec.seqlen_k:
        found = tiles.find_largest(q, k, spec, box)
        pairs.append(("the largest", found, *(x.amax(dim=-1, keepdim=True) for x in (plain, exact))))
    for name, actual, near, right in pairs:
        assert_close(name, actual, near.float(), right, spec.dtype)


@settings(fewer(3) if INTERPRETED else settings())
@given(
    spec=problems(),
    left=st.none() | st.integers(0, 99),
    right=st.none() | st.integers(0, 99),
    step=st.integers(1, 9),
    average=st.booleans(),
    wide=st.booleans(),
    data=st.data(),
    seed=seeds(),
)
def test_a_few_rows_are_those_of_the_whole(
    machine: torch.device,
    spec: AttentionSpec,
    left: int | None,
    right: int | None,
    step: int,
    average: bool,
    wide: bool,
    data: st.DataObject,
    seed: int,
) -> None:
    half = torch.float16 if INTERPRETED or spec.dtype == torch.float32 else spec.dtype
    spec = spec.changed(dtype=half, bias=None, mask=None if left is right is None else Window(left, right))
    q, k, _ = tensors(spec, seed)
    exact, lse = defined(spec, q, k, False, torch.float64)
    plain = defined(spec, q, k, False)[0]
    lse = lse.float().transpose(0, 1).contiguous().transpose(0, 1) if step % 2 else lse.float()
    heads = range(spec.heads) if average else data.draw(parts_of(spec.heads))
    rows = data.draw(parts_of(spec.seqlen_q))[: 16 * step : step]
    box, keys = Box(data.draw(parts_of(spec.batch)), heads, rows), data.draw(parts_of(spec.seqlen_k))
    assume(row_launches.takes_rows(q, k, lse, spec, box, keys))
    dtype = torch.float32 if wide else spec.dtype
    actual = row_launches.launch_rows(q, k, lse, spec, average, dtype, box, keys)
    near, right_ones = (box.expand(x, spec, keys) for x in (plain, exact))
    if average:
        near, right_ones = (x.mean(dim=1, keepdim=True) for x in (near, right_ones))
    assert_close("rows", actual, near.to(dtype), right_ones, spec.dtype)


@given(spec=specs(), data=st.data())
def test_the_rows_that_a_kernel_takes_are_few_and_need_no_table(spec: AttentionSpec, data: st.DataObject) -> None:
    q, k, _ = tensors(spec, 0)
    lse = q.new_zeros(spec.batch, spec.heads, spec.seqlen_q, dtype=torch.float32)
    box, keys = Box.whole(spec), data.draw(parts_of(spec.seqlen_k))
    rules = () if spec.mask is None else spec.mask.parts
    plain = spec.bias is None and all(isinstance(rule, Window) for rule in rules) and tiles.why_not(spec) is None
    there = all((*box, keys)) and len(box.rows) <= 16 and q.dtype in (torch.float16, torch.bfloat16)
    assert row_launches.takes_rows(q, k, lse, spec, box, keys) == (plain and there)


@settings(fewer(3) if INTERPRETED else settings())
@given(spec=problems(), average=st.booleans(), with_lse=st.booleans(), expanded=st.booleans(), seed=seeds())
def test_gradients_are_those_of_the_definition(
    machine: torch.device, spec: AttentionSpec, average: bool, with_lse: bool, expanded: bool, seed: int
) -> None:
    spec = spec.changed(softcap=None) if INTERPRETED else spec.changed(dtype=torch.bfloat16, softcap=None)
    q, k, _ = tensors(spec, seed)
    shape = defined(spec, q, k, average)[0].shape
    generator = torch.Generator("cpu").manual_seed(seed)
    grad = torch.randn(shape[:1] if expanded else shape, generator=generator, device="cpu").to(q)
    grad = grad.view(-1, *(1,) * (len(shape) - 1)).expand(shape) if expanded else grad
    answers = []
    for dtype in (torch.float64, spec.dtype):
        leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k)]
        made, lse = defined(spec, *leaves, average, dtype)
        answers.append(torch.autograd.grad(made, leaves, grad.to(dtype)))
        if dtype == torch.float64:
            statistics = lse.detach().float() if with_lse and spec.bias is None else None
    with torch.no_grad():
        actual = tiles.make_gradients(q, k, statistics, spec, average, grad)
    for name, ours, exact, plain in zip("qk", actual, *answers):
        assert_close(f"gradient of {name}", ours, plain, exact, spec.dtype)


@settings(fewer(3) if INTERPRETED else settings())
@given(spec=problems(), seed=seeds())
def test_rows_sum_to_one(machine: torch.device, spec: AttentionSpec, seed: int) -> None:
    spec = spec.changed(dtype=torch.float32, sinks=None)
    q, k, _ = tensors(spec, seed)
    exact, _ = defined(spec, q, k, False, torch.float64)
    total = tiles.make_weights(q, k, None, spec, False, torch.float32).double().sum(dim=-1)
    torch.testing.assert_close(total, exact.sum(dim=-1).round(), atol=1e-5, rtol=0.0)


@settings(fewer(3) if INTERPRETED else fewer(2))
@given(spec=problems(), average=st.booleans(), seed=seeds())
def test_tiles_give_what_blocks_give(machine: torch.device, spec: AttentionSpec, average: bool, seed: int) -> None:
    q, k, _ = tensors(spec, seed)
    recipe = weights.Recipe(q, k, spec, None, average, True, torch.float32)
    made = tiles.make_weights(q, k, None, spec, average, torch.float32)
    for heads, rows, piece in recipe.by_blocks(q, k, Box.whole(spec)):
        torch.testing.assert_close(made[:, heads, rows], piece, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("spoilt", ("q", "k"))
def test_a_nan_stays_a_nan(machine: torch.device, spoilt: str) -> None:
    spec = AttentionSpec(1, 70, 70, 2, 2, 16, 16, dtype=torch.float32, device=machine, mask=Window(None, 0))
    q, k, _ = tensors(spec, 0)
    (q if spoilt == "q" else k)[0, 40, 0] = float("nan")
    exact, lse = defined(spec, q, k, True)
    for dtype, statistics in ((torch.float32, None), (torch.float16, lse)):
        given_spec = spec.changed(dtype=dtype)
        actual = tiles.make_weights(q.to(dtype), k.to(dtype), statistics, given_spec, True, torch.float32)[:, 0]
        assert torch.equal(actual.isnan().any(dim=-1), exact.isnan().any(dim=-1))


def large(batch: int, seqlen: int, heads: int, head_dim: int, device: torch.device, **fields: Any) -> AttentionSpec:
    sizes = (batch, seqlen, seqlen, heads, heads, head_dim, head_dim)
    return AttentionSpec(*sizes, dtype=torch.bfloat16, device=device, **fields)


@pytest.mark.gpu
def test_no_tensor_holds_the_weights_of_all_heads(device: torch.device) -> None:
    spec = large(2, 1024, 16, 64, device)
    q, k, _ = tensors(spec, 0)
    recipe = weights.Recipe(q, k, spec, None, True, True, spec.dtype)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    made = recipe.make()
    held = torch.cuda.max_memory_allocated(device) - before
    assert held < 2 * made.numel() * made.element_size() + 2**20


@pytest.mark.gpu
def test_no_call_waits_for_the_device_and_a_graph_replays(device: torch.device) -> None:
    spec = large(2, 200, 4, 64, device, mask=Window(None, 0))
    q, k, v = tensors(spec, 0)
    _, lse = get("naive")(q, k, v, spec.changed(need_lse=True))
    recipe = weights.Recipe(q, k, spec, lse, True, True, spec.dtype)
    recipe.make()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = recipe.make()
    q.copy_(torch.randn_like(q))
    lse.copy_(get("naive")(q, k, v, spec.changed(need_lse=True))[1])
    graph.replay()
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = recipe.make()
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    assert torch.equal(made, again)


@pytest.mark.gpu
def test_more_weights_than_32_bits_count(device: torch.device) -> None:
    spec = large(1, 46400, 1, 16, device)
    q, k, _ = tensors(spec, 0)
    made = tiles.make_weights(q, k, None, spec, True, spec.dtype)[:, 0, -8:]
    last = spec.changed(seqlen_q=8)
    exact, _ = defined(last, q[:, -8:], k, True, torch.float64)
    plain, _ = defined(last, q[:, -8:], k, True)
    assert_close("weights", made, plain, exact, spec.dtype)


@pytest.mark.gpu
def test_another_device_than_the_current_one(device: torch.device) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs, and pytest --device cuda")
    spec = large(1, 100, 2, 64, torch.device("cuda", 1), bias=TensorBias(torch.zeros(100, 100, device="cuda:1")))
    q, k, _ = tensors(spec, 0)
    exact, _ = defined(spec, q, k, True, torch.float64)
    plain, _ = defined(spec, q, k, True)
    assert_close("weights", tiles.make_weights(q, k, None, spec, True, plain.dtype)[:, 0], plain, exact, spec.dtype)

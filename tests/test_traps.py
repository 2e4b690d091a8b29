"""The traps of attention kernels, one test each: where two of them differ, what they get wrong, what they leave out.

Judged on every backend that runs on the device, or, where the trap is in how a package is called, by a kernel that
writes down what it was told.
"""

import contextlib
import dataclasses
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

import flashmha
from flashmha import (
    AttentionSpec,
    Documents,
    FlashMultiHeadAttention,
    KeyLengths,
    KeyPadding,
    NoBackendError,
    TensorBias,
    Window,
    attention,
    causal,
)
from flashmha.backends import get, names
from flashmha.backends.choice.registry import instead
from flashmha.backends.flash_attn.flash2 import Flash2
from flashmha.backends.flash_attn.flash3 import Flash3
from flashmha.backends.flash_attn.flash4 import Flash4
from flashmha.backends.flash_attn.flash4_tools import Tools
from flashmha.backends.limits import HALF
from flashmha.backends.rewrites.grouped import MOST_FOLDED_QUERIES
from flashmha.backends.sdpa import backend as sdpa
from flashmha.backends.sdpa.backend import attend_on_cuda
from flashmha.backends.sdpa.switches import kernels_for_masks, without_cudnn
from flashmha.host.machine import Machine
from flashmha.testing import noise, seeds, specs, tensors
from flashmha.testing.grid import KERNEL_GRIDS, drawn

FLASH = ("flash2", "flash3", "flash4")
lengths = st.integers(1, 40)
ON_CUDA = dataclasses.replace(get("sdpa").limits, features=get("sdpa").limits.features - {"lse", "dropout", "pages"})


def problem(**changes: Any) -> AttentionSpec:
    """A problem on a GPU that every flash-attn serves, with changes; it never runs."""
    usual: dict[str, Any] = {"dtype": torch.bfloat16, "device": torch.device("cuda"), "head_dim": 64, "head_dim_v": 64}
    sizes = {"batch": 2, "seqlen_q": 128, "seqlen_k": 128, "heads": 8, "heads_kv": 8}
    return AttentionSpec(**(sizes | usual | changes))


def answers(q: Tensor, k: Tensor, v: Tensor, **more: Any) -> dict[str, Any]:
    """What every backend that serves the problem here makes of it, in bfloat16 where it takes nothing finer."""
    found: dict[str, Any] = {}
    for name in names():
        if q.is_cuda and get(name).compiles == "shapes":
            continue  # a kernel for each drawn length would take minutes; test_backends has a grid of them
        dtype = next((dtype for dtype in (q.dtype, *HALF[::-1]) if dtype in get(name).limits.dtypes), q.dtype)
        with contextlib.suppress(NoBackendError):
            found[name] = attention(q.to(dtype), k.to(dtype), v.to(dtype), backend=name, **more)
    assert {"naive", "sdpa"} <= found.keys() or more.get("return_lse")
    return found


def near(found: Tensor, wanted: Tensor) -> bool:
    eps = torch.finfo(found.dtype).eps
    return torch.allclose(found.double(), wanted.double(), atol=8 * eps, rtol=8 * eps)


Told = list[dict[str, Any]]


@pytest.fixture(scope="module")
def told() -> Iterator[Told]:
    """What the flash-attn packages are told, by a kernel that answers q, and NaN behind the last document."""
    seen: Told = []

    def kernel(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, ...]:
        seen.append({"seqlen_q": q.shape[-3], "seqlen_k": k.shape[-3], **options})
        out, lse = q * 1.0, torch.full_like(q[..., 0].transpose(-1, -2), float("inf"))
        if options.get("cu_seqlens_q") is not None:
            out[options["cu_seqlens_q"][-1] :] = float("nan")
        return out, lse, q.new_empty(0)

    def shorter(*args: Any, **options: Any) -> Any:
        """As flash-attn 2 and 3 answer: out alone, where no more was asked for."""
        result = kernel(*args, **options)
        return result if options["return_attn_probs"] else result[0]

    def cached(*args: Any, **options: Any) -> Any:
        """As flash-attn 2 and 3 answer for a cache of keys."""
        result = kernel(*args, **options)
        return result if options["return_softmax_lse"] else result[0]

    def newer(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        """As flash-attn 4 is asked, under the names the others have."""
        window = (options.pop("window_size_left"), options.pop("window_size_right"))
        return kernel(q, k, v, window_size=window, **options)

    def back(q: Tensor, k: Tensor, v: Tensor, out: Tensor, d_out: Tensor, lse: Tensor, **options: Any) -> Any:
        options["dq"].copy_(d_out)
        return (options["dq"], options["dk"].zero_(), options["dv"].zero_())

    def move(sources: Any, targets: Any, *rest: Any, scatter: bool) -> None:
        for target in targets:
            target.zero_()

    tools = Tools(move, lambda: types.SimpleNamespace(is_in_interval="within", is_in_table="shown"))
    every = [kind((shorter, shorter), cached) for kind in (Flash2, Flash3)]
    with instead(*every, Flash4((newer, back), tools=tools)):
        yield seen


def as_told(told: Told, name: str, spec: AttentionSpec) -> dict[str, Any]:
    """How a flash-attn package is called for a problem."""
    told.clear()
    q = torch.zeros(spec.batch, spec.seqlen_q, spec.heads, spec.head_dim, dtype=spec.dtype)
    k = torch.zeros(spec.batch, spec.seqlen_k, spec.heads_kv, spec.head_dim, dtype=spec.dtype)
    get(name)(q, k, k, spec)
    (options,) = told
    return options


def on_gpu(spec: AttentionSpec) -> AttentionSpec:
    """The same problem as a GPU's backends judge it; its tensors stay where they are."""
    return dataclasses.replace(spec, device=torch.device("cuda"))


@given(seqlen_q=lengths, seqlen_k=lengths, seed=seeds())
def test_trap_01_causality_meets_the_last_key_or_the_first_as_it_says(seqlen_q: int, seqlen_k: int, seed: int) -> None:
    q, k = noise(seed, 1, seqlen_q, 2, 64).float(), noise(seed + 1, 1, seqlen_k, 2, 64).float()
    for out in answers(q, k, k, mask=causal()).values():  # the last query sees every key
        assert near(
            out[:, -1], attention(q[:, -1:].to(out.dtype), k.to(out.dtype), k.to(out.dtype), backend="naive")[:, 0]
        )
    for out in answers(q, k, k, mask=causal(align="top_left")).values():  # the first query sees the first key
        assert near(out[:, 0], k[:, 0])


@given(seqlen_q=lengths, seqlen_k=lengths, left=st.none() | st.integers(0, 50), right=st.none() | st.integers(0, 50))
def test_trap_02_flash2_serves_no_right_bound_past_the_last_key(
    seqlen_q: int, seqlen_k: int, left: int | None, right: int | None
) -> None:
    spec = problem(seqlen_q=seqlen_q, seqlen_k=seqlen_k, mask=Window(left, right))
    window = spec.window
    wrong = window is not None and seqlen_q > seqlen_k and (window.right is None or window.right >= seqlen_k)
    assert ("flash-attention#895" in (get("flash2").why_not(spec) or "")) == wrong
    assert "flash-attention#895" not in (get("flash3").why_not(spec) or "")


@pytest.mark.cpu("asks what a kernel is told")
@pytest.mark.parametrize("name", FLASH)
@given(data=st.data())
def test_trap_03_a_kernel_is_told_the_window_in_its_own_words(name: str, told: Told, data: st.DataObject) -> None:
    spec = data.draw(specs(limits=get(name).limits, head_dims=(24, 32)))
    assume(get(name).why_not(on_gpu(spec)) is None)
    options = as_told(told, name, spec)
    none, pair = (None if name == "flash4" else -1), options["window_size"]
    bounds = [None if bound == none else bound for bound in pair]
    assert all(bound is None or bound >= 0 for bound in bounds)
    if options["causal"]:
        assert bounds == [None, None]
        bounds = [None, 0]
    if spec.window is None:
        assert bounds == [None, None]  # and the rows may be folded heads
        return
    if "documents" in spec.features or options.get("mask_mod") is not None:
        return
    # the same places as the mask's own, once the keys past the window are cut off
    seqlen_q, seqlen_k = options["seqlen_q"], options["seqlen_k"]
    table = Window(*bounds).materialize(1, 1, seqlen_q, seqlen_k)
    wanted = spec.window.materialize(1, 1, spec.seqlen_q, spec.seqlen_k)
    assert torch.equal(F.pad(table, (0, spec.seqlen_k - seqlen_k)), wanted)


@pytest.mark.parametrize("name", FLASH)
@given(left=st.integers(0, 9), shift=st.integers(1, 9))
def test_trap_03_a_window_is_not_unbounded_where_it_holds_nothing(name: str, left: int, shift: int) -> None:
    window = Window(left, None) & Window(None, 0, align="top_left")  # from one end each: they may not meet
    said = str(get(name).why_not(problem(seqlen_q=128, seqlen_k=128 + shift, mask=window)))
    assert (f"window left={left}, right=-{shift} (holds no key)" in said) == (left < shift)


@pytest.mark.cpu("asks what a kernel is told")
@given(data=st.data())
def test_trap_04_a_mask_mod_replaces_causality_and_window(told: Told, data: st.DataObject) -> None:
    spec = data.draw(specs(limits=get("flash4").limits, head_dims=(24, 32)))
    assume(get("flash4").why_not(on_gpu(spec)) is None)
    options = as_told(told, "flash4", spec)
    padded = spec.is_padded and spec.positions is None  # rows of a cache are told as lengths
    mask = "shown" if "dense_mask" in spec.features else "within" if padded and spec.window is not None else None
    assert options.get("mask_mod") == mask
    if mask is not None:
        assert not options["causal"] and options["window_size"] == (None, None)


@pytest.mark.cpu("asks what a kernel is told")
def test_trap_05_flash4_runs_on_the_device_of_its_tensors_and_never_as_mla(told: Told) -> None:
    entered: list[torch.device] = []

    class Watched(Machine):
        def on(self, device: torch.device) -> Any:
            entered.append(device)
            return super().on(device)

    backend: Any = get("flash4")
    with instead(Flash4(backend.functions, Watched(), backend.tools)):
        as_told(told, "flash4", AttentionSpec(1, 4, 4, 2, 2, 8, 8, torch.bfloat16))
    assert entered == [torch.device("cpu")]
    assert "head_dim=512 (at most 256)" in str(get("flash4").why_not(problem(head_dim_v=512)))


@given(seqlen_q=lengths, seqlen_k=lengths, seed=seeds())
def test_trap_06_a_row_that_sees_nothing_has_zeros_and_a_log_sum_exp_of_minus_infinity(
    seqlen_q: int, seqlen_k: int, seed: int
) -> None:
    q, k = noise(seed, 1, seqlen_q, 2, 64).float(), noise(seed + 1, 1, seqlen_k, 2, 64).float()
    blind = max(0, seqlen_q - seqlen_k)
    for out, lse in answers(q, k, k, mask=causal(), return_lse=True).values():
        assert not out[:, :blind].any() and (lse[:, :, :blind] == -float("inf")).all()
        assert out.isfinite().all() and lse[:, :, blind:].isfinite().all()


@pytest.mark.cpu("asks what becomes of rows a kernel does not write")
@pytest.mark.parametrize("name", FLASH)
@given(sizes=st.lists(st.integers(0, 5), min_size=1, max_size=4), rest=st.integers(0, 5), seed=seeds())
def test_trap_07_rows_behind_the_last_document_are_zeros(
    name: str, told: Told, sizes: list[int], rest: int, seed: int
) -> None:
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    total = sum(sizes) + rest
    assume(total)
    q = noise(seed, 1, total, 2, 8, dtype=torch.bfloat16)
    q[:, sum(sizes) :] = float("nan")
    q.requires_grad_()
    spec = AttentionSpec.of(q, q, q, mask=Documents(offsets), need_lse=True)
    out, lse = get(name)(q, q, q, spec)
    (grad,) = torch.autograd.grad(out.sum(), q)
    assert torch.equal(out[:, : sum(sizes)], q[:, : sum(sizes)])
    assert not out[:, sum(sizes) :].any() and not grad[:, sum(sizes) :].any() and grad.isfinite().all()
    assert (lse[..., sum(sizes) :] == -float("inf")).all()


@given(batch=st.integers(0, 3), seqlen=lengths, seed=seeds())
def test_trap_08_an_empty_batch_and_an_item_that_is_all_padding_are_served(batch: int, seqlen: int, seed: int) -> None:
    q = noise(seed, batch, seqlen, 2, 64).float()
    valid = torch.zeros(batch, seqlen, dtype=torch.bool)
    valid[1:, 0] = True  # a row that sees one key gets its value
    for out in answers(q, q, q, mask=KeyPadding(valid)).values():
        assert out.shape == q.shape and not out[:1].any()
        assert near(out[1:], q[1:, :1].expand_as(q[1:]))


@given(p=st.floats(0.01, 0.99), seed=seeds())
def test_trap_09_dropout_is_refused_where_there_is_none_and_off_in_eval(p: float, seed: int) -> None:
    for name in names():
        if "dropout" not in get(name).limits.features:
            assert "no dropout" in str(get(name).why_not(problem(dropout_p=p)))
    layer, x = FlashMultiHeadAttention(8, 2, dropout=p, batch_first=True), noise(seed, 2, 5, 8).float()
    with flashmha.record() as calls:
        layer.train()(x, x, x)
        layer.eval()(x, x, x)
    assert [call.spec.dropout_p for call in calls] == [p, 0.0]


def test_trap_10_cudnn_never_sees_a_mask() -> None:
    """With nothing but cuDNN allowed, SDPA refuses a mask rather than let it through."""
    sdpa = get("sdpa")
    padded = problem(mask=KeyPadding(torch.ones(2, 128, dtype=torch.bool)))
    assert sdpa.why_not(padded) is None
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION]):
        assert sdpa.why_not(padded) == "only cuDNN is enabled, which must not see a mask (pytorch#196678)"
        assert sdpa.why_not(problem(mask=causal())) is None
        for mask in (None, causal()):
            assert "whose dropout is neither" in str(sdpa.why_not(problem(mask=mask, dropout_p=0.5)))
        assert kernels_for_masks() == []
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH]):
        assert kernels_for_masks() == [SDPBackend.MATH]
        with without_cudnn():
            assert not torch.backends.cuda.cudnn_sdp_enabled() and torch.backends.cuda.math_sdp_enabled()
        assert torch.backends.cuda.cudnn_sdp_enabled()


@contextlib.contextmanager
def deterministic_algorithms(switched: bool) -> Iterator[None]:
    """Torch's algorithms are deterministic inside the ``with``, where it is switched on."""
    torch.use_deterministic_algorithms(switched)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


KERNELS = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH, SDPBackend.CUDNN_ATTENTION)


@pytest.mark.cpu("watches what sdpa leaves switched on for a GPU")
@given(
    spec=specs(limits=ON_CUDA, head_dims=(8,), longest=2 * MOST_FOLDED_QUERIES),
    allowed=st.sets(st.sampled_from(KERNELS), min_size=1),
    deterministic=st.booleans(),
    switched=st.booleans(),
    seed=seeds(),
)
def test_trap_10_a_call_takes_no_kernel_that_is_switched_off_and_cudnn_no_mask(
    spec: AttentionSpec, allowed: set[SDPBackend], deterministic: bool, switched: bool, seed: int
) -> None:
    spec = dataclasses.replace(spec, deterministic=deterministic)
    seen: list[tuple[bool, set[SDPBackend]]] = []
    plain = F.scaled_dot_product_attention

    def watched(q: Tensor, k: Tensor, v: Tensor, mask: Any, *rest: Any, **more: Any) -> Tensor:
        barred = mask is not None or sdpa.drops_alike(spec) or (sdpa.overflows(spec) and not rest[1])
        seen.append((barred, set(torch.nn.attention._cur_sdpa_kernel_backends()) & set(KERNELS)))
        with sdpa_kernel(list(KERNELS)):
            return plain(q, k, v, mask, *rest, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", watched)
        with sdpa_kernel(list(allowed)), deterministic_algorithms(switched):
            refused = get("sdpa").why_not(on_gpu(spec))
            if refused is None:
                attend_on_cuda(*tensors(spec, seed), spec)
    math = deterministic and spec.needs_grad and not switched
    if refused is not None:
        assert allowed == {SDPBackend.CUDNN_ATTENTION} or (math and SDPBackend.MATH not in allowed)
    for barred, on in seen if spec.batch else []:
        wanted = {SDPBackend.MATH} if math else allowed - ({SDPBackend.CUDNN_ATTENTION} if barred else set())
        assert on == wanted and on


@pytest.mark.cpu("watches what sdpa leaves switched on for a GPU")
@given(
    seqlen_q=st.integers(1, 3),
    seqlen_k=st.sampled_from((64, 192, 320, 1, 63, 65, 128)) | st.integers(1, 400),
    heads=st.sampled_from((1, 2)),
    dtype=st.sampled_from((*HALF, torch.float32)),
    needs_grad=st.booleans(),
    is_causal=st.booleans(),
)
def test_trap_10_cudnn_makes_no_gradients_of_a_last_tile_that_is_half_empty(
    seqlen_q: int, seqlen_k: int, heads: int, dtype: torch.dtype, needs_grad: bool, is_causal: bool
) -> None:
    mask = causal(align="top_left") if is_causal else None
    spec = AttentionSpec(1, seqlen_q, seqlen_k, heads, 1, 8, 8, dtype, mask=mask, needs_grad=needs_grad)
    seen: list[bool] = []
    plain = F.scaled_dot_product_attention

    def watched(*args: Any, **more: Any) -> Tensor:
        seen.append(torch.backends.cuda.cudnn_sdp_enabled())
        return plain(*args, **more)

    barred = spec.mask is None and needs_grad and dtype in HALF and (seqlen_q == 1 or seqlen_k % 128 == 64)
    with mock.patch.object(F, "scaled_dot_product_attention", watched):
        q, k, v = tensors(spec, seqlen_k)
        attend_on_cuda(q, k, v, spec)
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            refused = get("sdpa").why_not(on_gpu(spec))
    assert seen == [not barred]
    assert (refused or "").count("cudnn-frontend#1072") == barred


@pytest.mark.parametrize("dtype", HALF)
def test_trap_10_a_mask_beside_very_low_scores_leaves_gradients_finite(dtype: torch.dtype) -> None:
    q, k = (torch.full((2, 192, 2, 64), value, dtype=dtype).requires_grad_() for value in (4.0, -4.0))
    valid = torch.ones(2, 192, dtype=torch.bool)
    valid[:, 100:] = False
    out = attention(q, k, k, mask=KeyPadding(valid), backend="sdpa")  # every score is -128
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(out.float().sum(), (q, k)))


@pytest.mark.parametrize("dtype", HALF)
def test_trap_10_a_float32_mask_beside_half_precision_is_read_as_numbers(dtype: torch.dtype) -> None:
    q = noise(0, 2, 64, 2, 64, dtype=dtype)
    future = nn.Transformer.generate_square_subsequent_mask(64, device=q.device)
    for out in answers(q, q, q, bias=TensorBias(future)).values():
        assert near(out, attention(q, q, q, mask=causal(), backend="naive"))


@pytest.mark.gpu
@pytest.mark.parametrize("seqlen_q", (1, 3, 64))
def test_trap_11_grouped_heads_beside_a_mask_take_a_fused_kernel(seqlen_q: int) -> None:
    q, k = noise(0, 2, seqlen_q, 4, 64, dtype=torch.bfloat16), noise(1, 2, 64, 2, 64, dtype=torch.bfloat16)
    valid = torch.rand(2, 64) < 0.5
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        out = attention(q, k, k, mask=KeyPadding(valid), backend="sdpa")
    assert near(out, attention(q, k, k, mask=KeyPadding(valid), backend="naive"))


@pytest.mark.cpu("watches operators on a CPU")
@given(seqlen_q=st.integers(1, 2 * MOST_FOLDED_QUERIES), seqlen_k=lengths, seed=seeds())
def test_trap_11_few_queries_of_grouped_heads_copy_no_keys(seqlen_q: int, seqlen_k: int, seed: int) -> None:
    q, k = noise(seed, 2, seqlen_q, 4, 8).float(), noise(seed + 1, 2, seqlen_k, 2, 8).float()
    spec = AttentionSpec.of(q, k, k, mask=KeyPadding(torch.ones(2, seqlen_k, dtype=torch.bool)))
    heads: list[int] = []
    plain = F.scaled_dot_product_attention

    def watched(q: Tensor, k: Tensor, *rest: Any, **more: Any) -> Tensor:
        heads.append(k.shape[1])
        return plain(q, k, *rest, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", watched)
        attend_on_cuda(q, k, k, spec)
    assert heads == [2 if seqlen_q <= MOST_FOLDED_QUERIES else 4]


@given(spec=specs(limits=get("sdpa").limits, head_dims=(8,)), seed=seeds())
def test_trap_12_sdpa_is_told_a_mask_or_causality_and_never_both(spec: AttentionSpec, seed: int) -> None:
    assume(get("sdpa").why_not(spec) is None)
    plain = F.scaled_dot_product_attention

    def watched(
        q: Tensor, k: Tensor, v: Tensor, mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False, **more: Any
    ) -> Tensor:
        assert mask is None or not is_causal
        return plain(q, k, v, mask, dropout_p, is_causal, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", watched)
        get("sdpa")(*tensors(spec, seed), spec)


class Floats(TorchDispatchMode):
    """Writes down the floating dtypes that operators make."""

    def __init__(self) -> None:
        super().__init__()
        self.made: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.is_floating_point():
            self.made.add(result.dtype)
        return result


@pytest.mark.parametrize("dtype", (*HALF, torch.float32))
def test_trap_13_the_plain_computation_that_bounds_errors_is_in_the_dtype_itself(dtype: torch.dtype) -> None:
    q = noise(0, 2, 16, 2, 8, dtype=dtype)
    with Floats() as floats:
        attention(q, q, q, mask=causal(), backend="naive")
    assert floats.made == {dtype}


@pytest.mark.parametrize("training", (True, False))
@pytest.mark.parametrize("need_weights", (True, False))
@pytest.mark.parametrize("grad", (True, False))
def test_trap_14_a_row_that_sees_nothing_is_never_nan(training: bool, need_weights: bool, grad: bool) -> None:
    layer = FlashMultiHeadAttention(8, 2, bias=False, batch_first=True).train(training)
    x, padding = noise(0, 2, 5, 8).float(), torch.zeros(2, 5, dtype=torch.bool)
    padding[0] = True
    with torch.set_grad_enabled(grad):
        out, weights = layer(x, x, x, key_padding_mask=padding, need_weights=need_weights)
    assert not out[0].any() and out[1].all() and (weights is None or not weights[0].any())


def test_trap_15_no_process_wide_kernel_is_switched_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*names: str) -> None:
        raise AssertionError("a library must not choose SDPA's kernels for the process")

    for name in ("activate_flash_attention_impl", "register_flash_attention_impl"):
        monkeypatch.setattr(torch.nn.attention, name, refuse, raising=False)
    cuda = torch.backends.cuda
    switches = (cuda.flash_sdp_enabled, cuda.mem_efficient_sdp_enabled, cuda.math_sdp_enabled, cuda.cudnn_sdp_enabled)
    before = [switch() for switch in switches]
    q = noise(0, 1, 16, 2, 64).float()
    for mask in (None, causal(), KeyPadding(torch.rand(1, 16) < 0.5)):
        answers(q, q, q, mask=mask)
    assert [switch() for switch in switches] == before


@pytest.mark.cpu("asks what a kernel is told")
@given(deterministic=st.booleans(), packed=st.booleans(), seed=seeds())
def test_trap_16_flash3_is_called_through_functions_that_know_documents_and_determinism(
    told: Told, deterministic: bool, packed: bool, seed: int
) -> None:
    told.clear()
    q = noise(seed, 1, 6, 2, 8, dtype=torch.bfloat16).requires_grad_()
    mask = Documents(torch.tensor([0, 2, 6])) if packed else None
    get("flash3")(q, q, q, AttentionSpec.of(q, q, q, mask=mask, deterministic=deterministic))
    assert told[0]["deterministic"] == deterministic and ("cu_seqlens_q" in told[0]) == packed


@pytest.mark.cpu("asks what a kernel is told")
@pytest.mark.parametrize("name", FLASH[:2])
@given(need_lse=st.booleans(), longest=st.integers(1, 40), seed=seeds())
def test_trap_16_lengths_go_to_the_function_for_caches_and_never_with_a_gradient(
    name: str, told: Told, need_lse: bool, longest: int, seed: int
) -> None:
    mask = KeyLengths(torch.randint(0, longest + 1, (2,), generator=torch.Generator().manual_seed(seed)))
    spec = problem(seqlen_k=longest, mask=mask, need_lse=need_lse)
    options = as_told(told, name, spec)
    assert torch.equal(options["cache_seqlens"], mask.lengths.int()) and options["cache_seqlens"].dtype == torch.int32
    assert options["return_softmax_lse"] == need_lse and not options["causal"]
    assert options.get("num_splits") == (1 if name == "flash3" else None)
    padding = mask & KeyPadding(torch.ones(2, longest, dtype=torch.bool))
    for changes in ({"mask": padding}, {"mask": mask, "needs_grad": True}):
        options = as_told(told, name, problem(seqlen_k=longest, device=torch.device("cpu"), **changes))
        real, rest = options["cu_seqlens_k"].diff().view(2, 2).T
        assert torch.equal(real, mask.lengths.int()) and "cache_seqlens" not in options
        assert torch.equal(real + rest, torch.full_like(real, longest))
        assert options["cu_seqlens_q"].diff().view(2, 2)[:, 1].tolist() == [0, 0]  # padding has no queries


@pytest.mark.cpu("asks what a kernel is told")
@pytest.mark.parametrize("kind", (Flash2, Flash3))
def test_trap_16_a_cache_is_not_copied(kind: type[Flash2 | Flash3]) -> None:
    k, v = noise(0, 2, 2, 9, 4, 8, dtype=torch.bfloat16).unbind()
    q, read = k[:, :1], []

    def cached(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        read.extend((k, v))
        return q

    kind((cached, cached), cached)(q, k, v, AttentionSpec.of(q, k, v, mask=KeyLengths(torch.tensor([5, 0]))))
    assert read[0] is k and read[1] is v


@pytest.mark.cpu("asks what a kernel is told")
@pytest.mark.parametrize("mask", (None, causal(), KeyLengths(torch.tensor([5, 300]))))
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), ((1, 512), (128, 4096), (129, 4096), (1, 511)))
def test_trap_16_flash3_splits_the_keys_of_few_queries_where_the_build_can(
    told: Told, mask: Any, seqlen_q: int, seqlen_k: int
) -> None:
    spec, backend = problem(seqlen_q=seqlen_q, seqlen_k=seqlen_k, mask=mask), get("flash3")
    assert isinstance(backend, Flash3)
    assert as_told(told, "flash3", spec).get("num_splits", 1) == 1
    few = seqlen_q <= 128 and seqlen_k >= 512
    with instead(Flash3(backend.functions, backend.cached, splitting=True)):
        assert as_told(told, "flash3", spec).get("num_splits", 1) == (0 if few else 1)
        if not isinstance(mask, KeyLengths):
            learning = dataclasses.replace(spec, needs_grad=True)
            assert "num_splits" not in as_told(told, "flash3", learning)


@pytest.mark.cpu("asks what a kernel is told")
def test_trap_17_flash2_has_no_softcap_beside_dropout_and_gives_no_weights(told: Told) -> None:
    assert "softcap together with dropout" in str(get("flash2").why_not(problem(softcap=5.0, dropout_p=0.1)))
    q = noise(0, 1, 6, 2, 8, dtype=torch.bfloat16)
    out, lse = get("flash2")(q, q, q, AttentionSpec.of(q, q, q, need_lse=True))
    assert torch.equal(out, q) and lse.shape == (1, 2, 6)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("door", ("layer", "function"))
def test_trap_18_autocast_reaches_kernels_that_do_not_cast(dtype: torch.dtype, door: str) -> None:
    q = noise(0, 2, 8, 2, 64).float()
    layer = FlashMultiHeadAttention(128, 2, batch_first=True)
    run: Callable[[], Any] = lambda: attention(q, q, q) if door == "function" else layer(*[q.flatten(2)] * 3)  # noqa: E731
    with torch.autocast(q.device.type, dtype), flashmha.record() as calls:
        run()
    assert calls[0].spec.dtype == dtype


def test_trap_19_refusals_are_there_without_assertions() -> None:
    code = (
        "import torch, flashmha; from flashmha.backends import get\n"
        "spec = flashmha.AttentionSpec(1, 4, 4, 2, 2, 12, 12, torch.bfloat16, torch.device('cuda'), dropout_p=0.1)\n"
        "print(__debug__, get('flash4').why_not(spec))\n"
    )
    ran = subprocess.run([sys.executable, "-O", "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "False no dropout; head_dim=12 (a multiple of 8)"


@pytest.mark.parametrize(("word", "grid"), KERNEL_GRIDS.items())
@given(data=st.data())
def test_trap_20_a_backend_that_compiles_is_judged_on_few_kernels(
    word: str, grid: Any, data: st.DataObject, device: torch.device
) -> None:
    assert len(set(grid)) == len(grid) <= 24
    kernel = data.draw(st.sampled_from(grid))
    one, other = (data.draw(drawn(st.just(kernel), device)) for _ in range(2))
    fixed = ["head_dim", "dtype", "softcap", "needs_grad", "need_lse", "deterministic"]
    if word == "shapes":
        fixed += ["batch", "heads", "seqlen_q", "seqlen_k"]
        assert repr(one.mask) == repr(other.mask) or "rule" in one.features
    for name in fixed:
        assert getattr(one, name) == getattr(other, name)
    assert one.heads // one.heads_kv == other.heads // other.heads_kv == kernel.group

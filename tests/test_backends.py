"""Every backend that runs here against the definition in float64, and the definition against the textbook."""

import dataclasses
import math

import pytest
import torch
from conftest import fewer
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel

from flashmha import AttentionSpec, Dense, KeyPadding, NoBackendError, attention, backends, causal
from flashmha.backends import get, names
from flashmha.backends.limits import HALF
from flashmha.problem.masks import join_masks
from flashmha.testing import answer, assert_agrees, noise, seeds, served, specs, tensors
from flashmha.testing.grid import KERNEL_GRIDS, DrawnKernel, built, drawn

COMPILED = {name: KERNEL_GRIDS[get(name).compiles] for name in names() if get(name).compiles}
KERNELS = [(name, kernel) for name, grid in COMPILED.items() for kernel in grid]
DROPPING = [name for name in names() if "dropout" in get(name).limits.features]
DETERMINISTIC = [name for name in names() if "deterministic" in get(name).limits.features]


def check_available(name: str, device: torch.device) -> None:
    """Skip a test, with the reason, where a backend does not run."""
    reason = get(name).why_not_here(device)
    if reason is not None:
        pytest.skip(f"needs {name}: {reason}")


def check_any(name: str, device: torch.device) -> None:
    """Skip a test of any problem, with the reason, where a backend does not run or compiles for each."""
    check_available(name, device)
    if device.type != "cpu" and name in COMPILED:
        pytest.skip(f"needs pytest --device cpu, or the grid: {name} compiles for every problem on a GPU")


def check_built(name: str, device: torch.device, *features: str) -> None:
    """Skip a test, with the reason, where the build of a backend that is available leaves a feature out."""
    limits, _ = built(get(name), device)
    missing = [
        feature for feature in features if feature not in limits.features - limits.not_on.get(device.type, set())
    ]
    if missing:
        pytest.skip(f"needs a build of {name} with {', '.join(missing)}")


def refusal(name: str, spec: AttentionSpec) -> str | None:
    """What a backend that is available says against a problem."""
    return get(name).why_not(spec) or get(name).why_not_built(spec)


@pytest.mark.parametrize("name", names())
@given(data=st.data(), seed=seeds())
def test_a_backend_agrees_with_the_definition(name: str, device: torch.device, data: st.DataObject, seed: int) -> None:
    check_any(name, device)
    spec = data.draw(served(get(name), device))
    assume(get(name).why_not_built(spec) is None)
    assert_agrees(name, spec, seed)


WITH_LSE = frozenset(("lse", "causal", "window", "key_padding", "key_lengths", "documents", "gqa"))


@pytest.mark.parametrize("name", names())
@given(data=st.data(), seed=seeds())
def test_a_log_sum_exp_is_as_fine_as_float32(name: str, device: torch.device, data: st.DataObject, seed: int) -> None:
    """Whatever the dtype of q and k is: weights are made of it, and partial results are joined by it."""
    check_any(name, device)
    check_built(name, device, "lse")
    limits, head_dims = built(get(name), device)
    few = dataclasses.replace(limits, features=limits.features & WITH_LSE, seqlen_min=1, batch_min=1)
    drawn = data.draw(specs(limits=few, device=device, head_dims=head_dims, longest=40))
    spec = dataclasses.replace(drawn, need_lse=True)
    assume(refusal(name, spec) is None)
    q, k, v = tensors(spec, seed)
    _, lse = get(name)(q, k, v, spec)
    _, exact = get("naive")(q.double(), k.double(), v.double(), spec)
    seen = exact > -math.inf
    assert torch.equal(lse > -math.inf, seen)
    off = (lse.double() - exact)[seen].abs()
    assert (off <= 1e-4 * (1.0 + exact[seen].abs())).all(), off.max()


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "kernel"), KERNELS, ids=[f"{name}-{n}" for n, (name, _) in enumerate(KERNELS)])
@fewer(16)
@given(data=st.data(), seed=seeds())
def test_a_compiled_kernel_agrees_with_the_definition(
    name: str, kernel: DrawnKernel, device: torch.device, data: st.DataObject, seed: int
) -> None:
    check_available(name, device)
    refused = refusal(name, kernel.example(device))
    if refused is not None:
        pytest.skip(f"needs a device or a build on which {name} serves the kind: {refused}")
    spec = data.draw(drawn(st.just(kernel), device))
    assume(get(name).why_not_built(spec) is None)
    assert_agrees(name, spec, seed)


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH"))
@given(data=st.data(), is_causal=st.booleans(), seed=seeds())
def test_each_kernel_behind_sdpa_agrees_with_the_definition(
    kernel: str, device: torch.device, data: st.DataObject, is_causal: bool, seed: int
) -> None:
    half = dataclasses.replace(get("sdpa").limits, dtypes=HALF, features=frozenset({"backward", "gqa"}), seqlen_min=1)
    spec = data.draw(specs(limits=half, device=device, head_dims=(8, 32, 64, 128), longest=300))
    spec = dataclasses.replace(spec, mask=causal(align="top_left") if is_causal else None)
    assume(spec.batch > 0)
    with sdpa_kernel(getattr(SDPBackend, kernel)):
        try:
            assert_agrees("sdpa", spec, seed)
        except RuntimeError as error:
            assume("No available kernel" not in str(error))
            raise


@pytest.mark.parametrize("name", DETERMINISTIC)
@given(data=st.data(), seed=seeds())
def test_a_deterministic_backward_is_the_same_bit_by_bit(
    name: str, device: torch.device, data: st.DataObject, seed: int
) -> None:
    check_available(name, device)
    kernels = [kernel for kernel in COMPILED.get(name, ()) if kernel.deterministic]
    few = device.type != "cpu" and name in COMPILED
    if not few:
        check_built(name, device, "backward", "deterministic")
    spec = data.draw(drawn(st.sampled_from(kernels), device) if few else served(get(name), device))
    if not few:
        spec = dataclasses.replace(spec, needs_grad=True, need_lse=False, deterministic=True)
    assume(refusal(name, spec) is None)
    once, again = (answer(get(name), spec, seed).named for _ in range(2))
    for part, tensor in once.items():
        assert torch.equal(tensor.nan_to_num(), again[part].nan_to_num()), part


@pytest.mark.gpu
@pytest.mark.parametrize("masked", (False, True))
def test_torchs_own_switch_leaves_sdpa_its_fused_kernels(masked: bool) -> None:
    """Without the switch a deterministic backward takes the math kernel, which no other one would replace."""
    q = torch.randn(2, 64, 4, 64, dtype=torch.bfloat16, requires_grad=True)
    mask = KeyPadding(torch.rand(2, 64) < 0.5) if masked else None
    fused = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
    with sdpa_kernel(fused), pytest.raises(NoBackendError, match=r"torch.use_deterministic_algorithms\(True\)"):
        attention(q, q, q, mask=mask, deterministic=True, backend="sdpa")
    torch.use_deterministic_algorithms(True)
    try:
        with sdpa_kernel(fused):
            once, again = (
                torch.autograd.grad(attention(q, q, q, mask=mask, backend="sdpa").float().sum(), q)[0] for _ in range(2)
            )
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(once, again)


@given(spec=specs(), seed=seeds())
def test_automatic_choice_serves_every_problem(spec: AttentionSpec, seed: int) -> None:
    with backends.record() as calls:
        attention(
            *tensors(spec, seed),
            mask=spec.mask,
            bias=spec.bias,
            softcap=spec.softcap,
            sinks=spec.sinks,
            return_lse=spec.need_lse,
        )
    assert [call.backend for call in calls] == [backends.choose(calls[0].spec).name]
    assert get(calls[0].backend).why_not(calls[0].spec) is None


@given(spec=specs(longest=9, head_dims=(1, 4)), seed=seeds())
def test_the_definition_is_the_textbook_written_with_loops(spec: AttentionSpec, seed: int) -> None:
    """One query, one head, one key at a time, from the rules themselves."""
    spec = dataclasses.replace(spec, dropout_p=0.0)
    spec_64 = answer(get("naive"), spec, seed, torch.float64)
    q, k, v = (x.double() for x in tensors(spec, seed))
    seen = spec.allowed()
    allowed = None if seen is None else seen.expand(spec.batch, spec.heads, spec.seqlen_q, spec.seqlen_k)
    with torch.no_grad():
        added = spec.added()
    bias = None if added is None else added.detach().expand(spec.batch, spec.heads, spec.seqlen_q, spec.seqlen_k)
    out = torch.zeros(spec.batch, spec.seqlen_q, spec.heads, spec.head_dim_v, dtype=torch.float64)
    for b in range(spec.batch):
        for h in range(spec.heads):
            kv = h // (spec.heads // spec.heads_kv)
            for i in range(spec.seqlen_q):
                scores = {}
                for j in range(spec.seqlen_k):
                    score = spec.scale * float(q[b, i, h] @ k[(*place(spec, b, j), kv)])
                    if spec.softcap is not None:
                        score = spec.softcap * math.tanh(score / spec.softcap)
                    score += 0.0 if bias is None else float(bias[b, h, i, j])
                    if (allowed is None or allowed[b, h, i, j]) and score > -math.inf:
                        scores[j] = score
                sink = -math.inf if spec.sinks is None else float(spec.sinks[h].detach())
                top = max((*scores.values(), sink))
                total = sum(math.exp(score - top) for score in (*scores.values(), sink) if score > -math.inf)
                for j, score in scores.items():
                    out[b, i, h] += math.exp(score - top) / total * v[(*place(spec, b, j), kv)]
    torch.testing.assert_close(spec_64.named["out"], out, atol=1e-9, rtol=1e-9)


def place(spec: AttentionSpec, row: int, slot: int) -> tuple[int, int]:
    """Where in k and v the key in a slot of a row lies."""
    if spec.pages is None:
        return row, slot
    size = spec.pages.page_size
    return int(spec.pages.block_table[row, slot // size]), slot % size


def dropping(name: str, device: torch.device, seed: int, learning: bool = False) -> tuple[torch.Tensor, ...]:
    """q, k and v, which may want a gradient, that a backend with dropout takes."""
    check_available(name, device)
    dtype = next(dtype for dtype in (torch.float32, torch.bfloat16) if dtype in get(name).limits.dtypes)
    q, k, v = noise(seed, 3, 1, 64, 4, 64, dtype=dtype, device=device).unbind()
    v.requires_grad_(learning)
    refused = refusal(name, AttentionSpec.of(q, k, v, dropout_p=0.5))
    if refused is not None:
        pytest.skip(f"needs a device or a build on which {name} serves dropout: {refused}")
    return q, k, v


@pytest.mark.parametrize("name", DROPPING)
@given(seed=seeds(), dropout_p=st.sampled_from((0.1, 0.5, 0.9)))
def test_dropout_keeps_the_mean_and_the_seed(name: str, device: torch.device, seed: int, dropout_p: float) -> None:
    q, k, v = dropping(name, device, seed)
    q = q / 8  # scores near 0, so that no few keys make up a row

    def dropped(values: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(seed)
        return attention(q, k, values, dropout_p=dropout_p, backend=name)

    assert torch.equal(dropped(v), dropped(v))
    # every weight is kept with probability 1 - p and divided by it: the sum of a row stays 1 on average
    rows = dropped(torch.ones_like(v))[..., 0].float()
    spread = math.sqrt(dropout_p / (1 - dropout_p) * 0.2 / rows.numel())
    assert abs(rows.mean().item() - 1.0) < 6 * spread
    assert rows.std() > 0


@pytest.mark.parametrize("name", DROPPING)
@given(seed=seeds(), dropout_p=st.sampled_from((0.1, 0.5, 0.9)))
def test_the_gradient_drops_what_the_output_dropped(
    name: str, device: torch.device, seed: int, dropout_p: float
) -> None:
    q, k, v = dropping(name, device, seed, learning=True)
    out = attention(q, k, v, dropout_p=dropout_p, backend=name)
    toward = noise(seed + 1, *out.shape, dtype=out.dtype, device=device)
    (grad,) = torch.autograd.grad(out, v, toward)
    # for one choice of weights the output is linear in v: both sums are that form at the same place
    forward, backward = ((x.double() * y.double()) for x, y in ((out, toward), (v, grad)))
    allowed = torch.finfo(out.dtype).eps * forward.norm() * 30
    assert abs(forward.sum() - backward.sum()) <= allowed


@pytest.mark.parametrize("name", ("naive", "sdpa"))
def test_dropout_of_everything_gives_zeros(name: str) -> None:
    q = torch.randn(1, 4, 2, 8)
    assert torch.equal(attention(q, q, q, dropout_p=1.0, backend=name), torch.zeros_like(q))


@given(spec=specs(), seed=seeds())
def test_a_blind_row_gives_zeros_and_zero_gradients(spec: AttentionSpec, seed: int) -> None:
    q, k, v = (x.detach().requires_grad_() for x in tensors(spec, seed))
    row = seed % max(spec.seqlen_q, 1)
    seen = torch.ones(spec.seqlen_q, spec.seqlen_k, dtype=torch.bool)
    seen[row : row + 1] = False
    out = attention(q, k, v, mask=join_masks(Dense(seen), spec.pages))
    assert not out[:, row : row + 1].any()
    grads = torch.autograd.grad(out[:, row : row + 1].sum(), (q, k, v))
    assert not any(grad.any() for grad in grads)

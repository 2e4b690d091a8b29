"""Property tests for backends: Hypothesis strategies that draw problems, and an assertion that judges them.

Every backend is right when it agrees with ``naive`` in float64. How much it may differ follows from what a plain
computation in its own dtype does to the same inputs::

    error(backend) <= m * error(naive in the same dtype) + 2 * eps * max|reference| + floor

with m and the floor as flash-attention's own tests use them (``Backend.tolerance``). Shapes, dtypes and the places
of non-finite values are compared first.

    @given(flashmha.testing.specs(limits=MyBackend.limits), flashmha.testing.seeds())
    def test_my_backend(spec, seed):
        flashmha.testing.assert_agrees(MyBackend(), spec, seed)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .backends import get
from .backends.base import FEATURES, Backend, Limits
from .masks import Dense, Documents, KeyLengths, KeyPadding, Mask, MaskMod, Rule, Window, causal
from .scores import ALiBi, Bias, RelativeBias, TensorBias
from .spec import AttentionSpec

try:
    from hypothesis import assume, currently_in_test_context, event
    from hypothesis import strategies as st
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("flashmha.testing draws with hypothesis: pip install 'flashmha[test]'") from error

# The first torch.autograd.grad of a process imports this for most of a second, which Hypothesis would blame on a test.
import torch.fx.experimental.symbolic_shapes

MASKS = ("causal", "window", "key_padding", "key_lengths", "dense_mask", "rule", "documents")
LAYOUTS = ("contiguous", "heads first", "packed", "expanded")
"""How the memory of q, k and v may lie: as named, as SDPA's transposed, as slices of one tensor, with a stride of 0."""


def seeds() -> st.SearchStrategy[int]:
    """Seeds of the tensors of one problem."""
    return st.integers(0, 2**16)


@st.composite
def masks(
    draw: st.DrawFn,
    *,
    batch: int,
    heads: int,
    seqlen_q: int,
    seqlen_k: int,
    features: frozenset[str] = frozenset(FEATURES),
    device: torch.device | str = "cpu",
) -> Mask | None:
    """Masks of every kind out of ``features`` for a problem of these sizes, and their combinations."""
    reach = st.none() | st.integers(0, max(seqlen_q, seqlen_k))
    align = st.sampled_from(("bottom_right", "top_left"))
    generator = torch.Generator().manual_seed(draw(seeds()))

    def coin(*shape: int) -> Tensor:
        return (torch.rand(shape, generator=generator) < draw(st.sampled_from((0.2, 0.5, 0.9)))).to(device)

    kinds = draw(st.lists(st.sampled_from(MASKS), max_size=2, unique=True))
    parts: list[Mask] = []
    for kind in kinds:
        if kind not in features:
            continue
        if kind == "causal":
            parts.append(causal(align=draw(align) if "window" in features else "bottom_right"))
        elif kind == "window":
            parts.append(Window(draw(reach), draw(st.just(0) | reach), align=draw(align)))
        elif kind == "key_padding":
            parts.append(KeyPadding(coin(batch, seqlen_k)))
        elif kind == "key_lengths":
            parts.append(KeyLengths(torch.randint(0, seqlen_k + 1, (batch,), generator=generator).to(device)))
        elif kind == "dense_mask":
            shape = (draw(st.sampled_from((1, batch))), draw(st.sampled_from((1, heads))), seqlen_q, seqlen_k)
            parts.append(Dense(coin(*shape)))
        elif kind == "rule":
            parts.append(Rule(every(draw(st.integers(1, 3))), align=draw(align)))
        elif batch == 1:
            number = draw(st.integers(1, 4))
            ends = [offsets(number, total, generator).to(device) for total in (seqlen_q, seqlen_k)]
            parts.append(Documents(*ends))
    mask: Mask | None = None
    for part in parts:
        mask = part if mask is None else mask & part
    return mask


def every(step: int) -> MaskMod:
    """A rule: every ``step``-th diagonal, another one for each batch item and head."""
    return lambda batch, head, q_pos, k_pos: (q_pos + k_pos + batch + head) % step == 0


def offsets(documents: int, total: int, generator: torch.Generator) -> Tensor:
    """Where documents start, with empty ones among them and at times a rest that belongs to none."""
    ends = torch.randint(0, total + 1, (documents,), generator=generator).sort().values
    return torch.cat((torch.zeros(1, dtype=ends.dtype), ends)).to(torch.int32)


@st.composite
def biases(
    draw: st.DrawFn,
    *,
    batch: int,
    heads: int,
    seqlen_q: int,
    seqlen_k: int,
    dtype: torch.dtype,
    needs_grad: bool,
    features: frozenset[str] = frozenset(FEATURES),
    device: torch.device | str = "cpu",
) -> Bias | None:
    """Biases of every kind out of ``features``; tensors may hold ``-inf`` and want a gradient."""
    kind = draw(st.sampled_from(("none", "none", "tensor", "alibi", "relative")))
    generator = torch.Generator().manual_seed(draw(seeds()))
    learned = needs_grad and "bias_grad" in features and draw(st.booleans())
    if kind == "tensor" and "bias" in features:
        shape = (draw(st.sampled_from((1, batch))), draw(st.sampled_from((1, heads))), seqlen_q, seqlen_k)
        tensor = torch.randn(shape, generator=generator).to(dtype)
        if draw(st.booleans()):
            tensor = tensor.masked_fill(torch.rand(shape, generator=generator) < 0.3, float("-inf"))
        return TensorBias(tensor.to(device).requires_grad_(learned))
    if kind == "relative" and "bias" in features:
        table = torch.randn(heads, 2 * draw(st.integers(0, 4)) + 1, generator=generator)
        return RelativeBias(table.to(device).requires_grad_(learned))
    if kind == "alibi" and "alibi" in features:
        return ALiBi(torch.rand(heads, generator=generator).to(device))
    return None


@st.composite
def specs(
    draw: st.DrawFn,
    *,
    limits: Limits | None = None,
    device: torch.device | str = "cpu",
    head_dims: Sequence[int] = (1, 3, 8, 16, 40, 64),
    longest: int = 33,
) -> AttentionSpec:
    """Problems: sizes (0 and 1 among them), dtypes, grouped heads, masks, biases, softcap, sinks, gradients.

    ``limits`` (a backend's) keeps the draw to what that backend serves; without it every problem may come.
    """
    limits = get("naive").limits if limits is None else limits
    device = torch.device(device)
    features = limits.features - limits.not_on.get(device.type, frozenset())
    largest = max(head_dims) if limits.head_dim is None else limits.head_dim
    sizes_d = [d for d in head_dims if limits.head_dim_min <= d <= largest and d % limits.head_dim_step == 0]
    heads_kv, group = draw(st.integers(1, 3)), draw(st.integers(1, 3)) if "gqa" in features else 1
    seqlens = st.integers(max(1, limits.seqlen_min), longest) | st.sampled_from((limits.seqlen_min, 1, longest))
    heads, dtype = heads_kv * group, draw(st.sampled_from(limits.dtypes))
    needs_grad = "backward" in features and draw(st.booleans())
    sizes: dict[str, Any] = {
        "batch": draw(st.integers(limits.batch_min, 3)),
        "heads": heads,
        "seqlen_q": draw(seqlens),
        "seqlen_k": draw(seqlens),
    }
    head_dim = draw(st.sampled_from(sizes_d))
    sinks = torch.randn(heads, generator=torch.Generator().manual_seed(draw(seeds()))).to(device)
    need_lse = "lse" in features and draw(st.booleans())
    return AttentionSpec(
        **sizes,
        heads_kv=heads_kv,
        head_dim=head_dim,
        head_dim_v=draw(st.just(head_dim) | st.sampled_from(sizes_d)) if "head_dim_v" in features else head_dim,
        dtype=dtype,
        device=device,
        mask=draw(masks(**sizes, features=features, device=device)),
        bias=draw(biases(**sizes, dtype=dtype, needs_grad=needs_grad, features=features, device=device)),
        softcap=draw(st.none() | st.sampled_from((1.0, 20.0))) if "softcap" in features else None,
        sinks=draw(st.none() | st.just(sinks)) if "sinks" in features else None,
        softmax_scale=draw(st.none() | st.sampled_from((0.05, 1.0))),
        needs_grad=needs_grad,
        need_lse=need_lse and not (needs_grad and "lse_grad" not in features),
    )


def tensors(spec: AttentionSpec, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v of a problem, out of a seed that also says how their memory lies."""
    generator = torch.Generator().manual_seed(seed)
    layout = LAYOUTS[seed % len(LAYOUTS)]
    shapes = (
        (spec.batch, spec.seqlen_q, spec.heads, spec.head_dim),
        (spec.batch, spec.seqlen_k, spec.heads_kv, spec.head_dim),
        (spec.batch, spec.seqlen_k, spec.heads_kv, spec.head_dim_v),
    )
    made = []
    for batch, seqlen, heads, head_dim in shapes:
        if layout == "heads first":
            x = torch.randn(batch, heads, seqlen, head_dim, generator=generator).transpose(1, 2)
        elif layout == "packed":
            x = torch.randn(batch, seqlen, heads + 1, head_dim, generator=generator)[:, :, 1:]
        elif layout == "expanded":
            x = torch.randn(1, seqlen, heads, head_dim, generator=generator).expand(batch, -1, -1, -1)
        else:
            x = torch.randn(batch, seqlen, heads, head_dim, generator=generator)
        made.append(x.to(device=spec.device, dtype=spec.dtype))
    return made[0], made[1], made[2]


@dataclasses.dataclass
class Answer:
    """What a backend makes of a problem: out, lse where asked for, and the gradients of everything that wants one."""

    named: dict[str, Tensor]


def answer(backend: Backend, spec: AttentionSpec, seed: int, dtype: torch.dtype | None = None) -> Answer:
    """Run a problem, in another dtype if one is given; one cotangent a seed, so that answers can be compared."""
    q, k, v = tensors(spec, seed)
    learned = [x for x in (*(spec.bias.tensors() if spec.bias else ()), spec.sinks) if x is not None]
    learned = [x for x in learned if x.requires_grad]
    if dtype is not None:
        q, k, v = (x.to(dtype) for x in (q, k, v))
        spec = dataclasses.replace(spec, dtype=dtype)
    names = ["q", "k", "v", *(f"learned {place}" for place in range(len(learned)))]
    leaves = [x.detach().requires_grad_(spec.needs_grad) for x in (q, k, v)]
    with torch.set_grad_enabled(spec.needs_grad):
        result = backend(leaves[0], leaves[1], leaves[2], spec)
    out, lse = result if isinstance(result, tuple) else (result, None)
    named = {"out": out.detach()}
    if lse is not None:
        named["lse"] = lse.detach()
    if spec.needs_grad:
        cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed + 1)).to(out)
        grads = torch.autograd.grad(out, [*leaves, *learned], cotangent, allow_unused=True)
        for name, leaf, grad in zip(names, [*leaves, *learned], grads):
            named[f"gradient of {name}"] = torch.zeros_like(leaf) if grad is None else grad
    return Answer(named)


def assert_agrees(backend: Backend, spec: AttentionSpec, seed: int) -> None:
    """A backend gives the definition's answer to a problem: out, lse and every gradient, within its tolerance.

    A problem it refuses is set aside with ``hypothesis.assume``, so a backend that refuses everything fails
    Hypothesis's health check rather than passing.
    """
    refusal = backend.unsupported(spec)
    if currently_in_test_context():
        event(f"{backend.name} {'refuses' if refusal else 'serves'}")
        assume(refusal is None)
    elif refusal is not None:  # somebody replays one problem by hand
        raise ValueError(f"{backend.name} refuses this problem: {refusal}")
    naive = get("naive")
    actual = answer(backend, spec, seed).named
    plain = answer(naive, spec, seed).named
    exact = answer(naive, spec, seed, torch.float64).named
    assert actual.keys() == exact.keys(), f"must return {list(exact)}, got {list(actual)}"
    for name in exact:
        multiple = backend.tolerance[1] if name.startswith("gradient") else backend.tolerance[0]
        assert_close(name, actual[name], plain[name], exact[name], multiple, spec.dtype)


def assert_close(name: str, actual: Tensor, plain: Tensor, exact: Tensor, multiple: float, dtype: torch.dtype) -> None:
    """``actual`` errs at most ``multiple`` times as much as ``plain``, against ``exact`` in float64; and a floor.

    ``dtype`` is the one that was computed in; a learned table may be kept in a finer one.
    """
    assert actual.shape == exact.shape, f"{name} must have shape {tuple(exact.shape)}, got {tuple(actual.shape)}"
    assert actual.dtype == plain.dtype, f"{name} must be {plain.dtype}, got {actual.dtype}"
    if not exact.numel():
        return
    dtype_kept = actual.dtype
    reference = exact.to(actual.dtype).double()
    finite = reference.isfinite()
    strange = actual.double().where(finite, 0.0).isfinite() & (actual.isfinite() == finite)
    assert strange.all(), f"{name} is not finite in {int((~strange).sum())} places where it should be, or the reverse"
    assert torch.equal(actual.double()[~finite], reference[~finite]), f"{name} differs where it is infinite"
    if not finite.any():
        return
    reference, actual, plain = reference[finite], actual.double()[finite], plain.double()[finite]
    eps = max(torch.finfo(dtype).eps, torch.finfo(dtype_kept).eps)
    floor = 1e-11 if eps < 1e-12 else 2e-4 if name.startswith("gradient") else 1e-5
    error, allowed = (actual - reference).abs().max().item(), (plain - reference).abs().nan_to_num(0.0).max().item()
    bound = multiple * allowed + 2 * eps * reference.abs().max().item() + floor
    assert error <= bound, (
        f"{name} is off by {error:.3g}, at most {bound:.3g} allowed "
        f"({multiple:g} times the {allowed:.3g} of a plain {dtype} computation, plus rounding)"
    )

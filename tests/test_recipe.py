"""Weights of every problem beside an output: what they are, and their gradients, against the definition."""

import contextlib
from collections.abc import Iterator

import pytest
import torch
from conftest import fewer
from hypothesis import assume, given
from hypothesis import strategies as st
from test_weights import Largest
from torch import Tensor

from flashmha import ALiBi, AttentionSpec, RelativeBias, TensorBias, register
from flashmha.backends import get, unregister
from flashmha.backends.naive import Naive, probabilities, scores
from flashmha.testing import assert_close, noise, seeds, specs, tensors
from flashmha.weights import blocks
from flashmha.weights.attend import attention_with_weights
from flashmha.weights.learned import held, replace_learned
from flashmha.weights.recipe import Recipe


class WithoutLse(Naive):
    """A backend that gives no log-sum-exp."""

    name = "without_lse"

    def limits_exceeded(self, spec: AttentionSpec) -> list[str]:
        return super().limits_exceeded(spec) + (["no lse"] if spec.need_lse else [])


@pytest.fixture(autouse=True)
def without_lse(every_map_is_deferred: None) -> Iterator[None]:
    """A backend more."""
    register(WithoutLse)
    yield
    unregister("without_lse")


@contextlib.contextmanager
def blocks_of(size: int) -> Iterator[None]:
    """So many scores at a time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "SCORES_IN_A_BLOCK", dict.fromkeys(blocks.SCORES_IN_A_BLOCK, size))
        yield


problems = specs().filter(lambda spec: spec.batch * spec.heads * spec.seqlen_q * spec.seqlen_k > 0)
backends = st.sampled_from(("naive", "without_lse"))


def bare(spec: AttentionSpec) -> AttentionSpec:
    return spec.changed(dropout_p=0.0, need_lse=False)


def widened(spec: AttentionSpec, dtype: torch.dtype) -> tuple[AttentionSpec, list[Tensor]]:
    """The problem over learned tensors of its own in a dtype, and those that want a gradient."""
    own = [x.detach().to(torch.promote_types(dtype, x.dtype)).requires_grad_(x.requires_grad) for x in held(spec)]
    return replace_learned(spec.changed(dtype=dtype), own), [x for x in own if x.requires_grad]


def defined(spec: AttentionSpec, q: Tensor, k: Tensor, average: bool) -> Tensor:
    k, _, spec = spec.in_rows(k, k)
    made = probabilities(*scores(q, k, spec), spec)
    return made.mean(dim=1) if average else made


@given(spec=problems, average=st.booleans(), backend=backends, block=st.sampled_from((1, 2**19)), seed=seeds())
def test_weights_are_those_of_the_definition(
    spec: AttentionSpec, average: bool, backend: str, block: int, seed: int
) -> None:
    spec = bare(spec)
    q, k, v = tensors(spec, seed)
    exact_spec, _ = widened(spec, torch.float64)
    exact = defined(exact_spec, q.double(), k.double(), average).detach()
    plain = defined(spec, q, k, average).detach()
    with torch.no_grad(), blocks_of(block):
        made = +attention_with_weights(q, k, v, spec, backend, average=average)[1]
    assert_close("weights", made, plain.to(spec.dtype), exact, spec.dtype)
    blind = exact.sum(dim=-1) == 0.0
    assert not made[blind].any(), "a row that sees nothing has weights"


@given(spec=problems, average=st.booleans(), backend=backends, block=st.sampled_from((1, 2**19)), seed=seeds())
def test_gradients_are_those_of_the_definition(
    spec: AttentionSpec, average: bool, backend: str, block: int, seed: int
) -> None:
    spec = bare(spec)
    q, k, v = tensors(spec, seed)
    answers = []
    for dtype in (torch.float64, spec.dtype, None):
        problem, learned = widened(spec, spec.dtype if dtype is None else dtype)
        problem = problem.changed(needs_grad=True)
        leaves = [x.detach().to(problem.dtype).requires_grad_() for x in (q, k)] + learned
        if dtype is None:
            with blocks_of(block):
                made = attention_with_weights(*leaves[:2], v, problem, backend, average=average)[1]
                toward = noise(seed, *made.shape, dtype=spec.dtype)
                answers.append(torch.autograd.grad(made, leaves, toward))
        else:
            made = defined(problem, *leaves[:2], average)
            toward = noise(seed, *made.shape, dtype=spec.dtype).to(made.dtype)
            answers.append(torch.autograd.grad(made, leaves, toward))
    for exact, plain, ours in zip(*answers):
        assert_close("gradient", ours, plain, exact.to(torch.float64), spec.dtype)


@fewer(2)
@given(spec=problems, average=st.booleans(), backend=backends, look=st.booleans(), seed=seeds())
def test_both_can_be_differentiated_twice(
    spec: AttentionSpec, average: bool, backend: str, look: bool, seed: int
) -> None:
    spec = bare(spec)
    values = [x.double() for x in tensors(spec, seed)]
    answers = []
    for ours in (False, True):
        problem, learned = widened(spec, torch.float64)
        problem = problem.changed(needs_grad=True)
        leaves = [x.clone().requires_grad_() for x in values] + learned
        q, k, v = leaves[:3]
        if ours:
            out, made = attention_with_weights(q, k, v, problem, backend, average=average)
        else:
            out, made = get("naive")(q, k, v, problem), defined(problem, q, k, average)
        asked = (out, made) if look else (out,)
        toward = [noise(seed + place, *x.shape, dtype=torch.float64) for place, x in enumerate(asked)]
        first = torch.autograd.grad(asked, leaves, toward, create_graph=True)
        total = sum((x * noise(seed, *x.shape, dtype=torch.float64)).sum() for x in first)
        answers.append((*first, *torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)))
    for theirs, ours_too in zip(*answers):
        assume(theirs.isfinite().all())
        scale = max(1.0, theirs.abs().max().item()) if theirs.numel() else 1.0
        torch.testing.assert_close(ours_too / scale, theirs / scale, atol=1e-8, rtol=1e-8)


@given(spec=problems, average=st.booleans(), training=st.booleans(), seed=seeds())
def test_scores_that_change_after_the_call_change_no_weights(
    spec: AttentionSpec, average: bool, training: bool, seed: int
) -> None:
    spec = bare(spec).changed(needs_grad=training)
    q, k, v = tensors(spec, seed)
    with torch.set_grad_enabled(training):
        expected = attention_with_weights(q, k, v, spec, "naive", average=average)[1].detach().clone()
        seen = attention_with_weights(q, k, v, spec, "naive", average=average)[1]
    with torch.no_grad():
        for tensor in held(spec):
            tensor.fill_(0.5)
    assert torch.equal(seen.detach().clone(), expected)


KINDS = {
    "alibi": lambda heads, seqlen: ALiBi(torch.rand(heads).requires_grad_()),
    "relative": lambda heads, seqlen: RelativeBias(torch.randn(heads, 2 * 9 + 1).requires_grad_()),
    "both": lambda heads, seqlen: ALiBi(torch.rand(heads)) + RelativeBias(torch.randn(heads, 7).requires_grad_()),
    "keys": lambda heads, seqlen: ALiBi(torch.rand(heads)) + TensorBias(torch.randn(heads, 1, seqlen).requires_grad_()),
}


@pytest.mark.cpu("watches operators on a CPU")
@pytest.mark.parametrize("kind", KINDS)
def test_no_bias_is_made_for_all_rows_at_once(kind: str) -> None:
    heads, seqlen = 4, 256
    q, k = (torch.randn(1, seqlen, heads, 8) for _ in range(2))
    spec = AttentionSpec.of(q, k, k, bias=KINDS[kind](heads, seqlen), sinks=torch.zeros(heads, requires_grad=True))
    recipe = Recipe(q, k, spec, None, True, True, torch.float32)
    learned = [x.requires_grad for x in held(spec)]
    with blocks_of(heads * seqlen * 16), Largest() as largest:
        made = recipe.make()
        recipe.gradients(torch.ones(()).expand_as(made), (True, True, *learned))
    assert largest.numel == made.numel(), "as large as the scores of several heads"

"""Every backend that runs here against the definition in float64, and the definition against the textbook."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flashmha import AttentionSpec, Dense, attention, backends
from flashmha.backends import get
from flashmha.testing import answer, assert_agrees, seeds, specs, tensors

HERE = ("naive", "sdpa", "flex")


@pytest.mark.parametrize("name", HERE)
@given(data=st.data(), seed=seeds())
def test_a_backend_agrees_with_the_definition(name: str, data: st.DataObject, seed: int) -> None:
    assert_agrees(get(name), data.draw(specs(limits=get(name).limits)), seed)


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
    assert get(calls[0].backend).unsupported(calls[0].spec) is None


@given(spec=specs(longest=9, head_dims=(1, 4)), seed=seeds())
def test_the_definition_is_the_textbook_written_with_loops(spec: AttentionSpec, seed: int) -> None:
    """One query, one head, one key at a time, from the rules themselves."""
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
                    score = spec.scale * float(q[b, i, h] @ k[b, j, kv])
                    if spec.softcap is not None:
                        score = spec.softcap * math.tanh(score / spec.softcap)
                    score += 0.0 if bias is None else float(bias[b, h, i, j])
                    if (allowed is None or allowed[b, h, i, j]) and score > -math.inf:
                        scores[j] = score
                total = sum(math.exp(score) for score in scores.values())
                total += 0.0 if spec.sinks is None else math.exp(float(spec.sinks[h]))
                for j, score in scores.items():
                    out[b, i, h] += math.exp(score) / total * v[b, j, kv]
    torch.testing.assert_close(spec_64.named["out"], out, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("name", ("naive", "sdpa"))
@given(seed=seeds(), dropout_p=st.sampled_from((0.1, 0.5, 0.9)))
def test_dropout_keeps_the_mean_and_the_seed(name: str, seed: int, dropout_p: float) -> None:
    q, k, v = torch.randn(3, 1, 64, 4, 8, generator=torch.Generator().manual_seed(seed)).unbind()
    ones = torch.ones_like(v)

    def dropped(values: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(seed)
        return attention(q, k, values, dropout_p=dropout_p, backend=name)

    assert torch.equal(dropped(v), dropped(v))
    # every weight is kept with probability 1 - p and divided by it: the sum of a row stays 1 on average
    rows = dropped(ones)[..., 0]
    spread = math.sqrt(dropout_p / (1 - dropout_p) * 0.2 / rows.numel())
    assert abs(rows.mean().item() - 1.0) < 6 * spread
    assert rows.std() > 0


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
    out = attention(q, k, v, mask=Dense(seen))
    assert not out[:, row : row + 1].any()
    grads = torch.autograd.grad(out[:, row : row + 1].sum(), (q, k, v))
    assert not any(grad.any() for grad in grads)

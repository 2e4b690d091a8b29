"""Every backend that runs here against the definition in float64, over drawn problems."""

import dataclasses

import pytest
import torch
from hypothesis import given

from flashmha import AttentionSpec, attention, backends
from flashmha.backends import get
from flashmha.testing import assert_agrees, seeds, specs, tensors

HERE = ("naive", "sdpa", "flex")


@pytest.mark.parametrize("name", HERE)
@given(spec=specs(), seed=seeds())
def test_a_backend_agrees_with_the_definition(name: str, spec: AttentionSpec, seed: int) -> None:
    assert_agrees(get(name), without_what_it_lacks(name, spec), seed)


def without_what_it_lacks(name: str, spec: AttentionSpec) -> AttentionSpec:
    """The problem without the features a backend never serves, so that few draws are wasted."""
    lacking: dict[str, object] = {}
    if name == "sdpa":
        lacking = {"softcap": None, "sinks": None, "need_lse": False}
    if name == "flex":
        lacking = {"needs_grad": False, "dtype": torch.float32 if spec.dtype == torch.float64 else spec.dtype}
        lacking |= {"batch": max(spec.batch, 1)} if spec.mask is None and spec.bias is None else {}
    return dataclasses.replace(spec, **lacking)  # type: ignore[arg-type]


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

"""Torch's defaults: where, and as what, it makes tensors by itself is no part of an answer, and is not remembered."""

from __future__ import annotations

import contextlib
import functools
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo  # flex_attention imports it when first called, which torch 2.8 cannot under a default device
from conftest import fewer
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention.flex_attention import flex_attention

import flashmha
from flashmha import AttentionSpec, FlashMultiHeadAttention, attention, explain, replace_mha, use_backend
from flashmha.testing import (
    Blueprint,
    Call,
    answer,
    ask,
    assert_agrees,
    assert_drop_in,
    blueprints,
    models,
    noise,
    problems,
    seeds,
    specs,
    tensors,
    without_fast_path,
)

pytestmark = pytest.mark.filterwarnings("ignore:Support for mismatched")  # masks of two types, stock's own

DEFAULTS = ("meta", torch.float64, torch.float16)
FEATURES: tuple[dict[str, Any], ...] = (
    {},
    {"window": (1, 1)},
    {"num_kv_heads": 1},
    {"skip_padding": True},
    {"trust_is_causal": True},
    {"call_out_proj": True},
    {"backend": "naive"},
    {"backend": "sdpa"},
)
BACKENDS = ("naive", "sdpa", "flex")

defaults = st.sampled_from(DEFAULTS)


@contextlib.contextmanager
def default(value: str | torch.dtype) -> Iterator[None]:
    """Torch makes tensors on a device, or of a dtype, unless it is told otherwise."""
    if isinstance(value, str):
        with torch.device(value):
            yield
        return
    before = torch.get_default_dtype()
    torch.set_default_dtype(value)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def assert_no_matter(value: str | torch.dtype, first: bool, answers: Callable[[], Any]) -> None:
    """The answers, made of fresh tensors each time, are the same under a default, be it asked first or last."""
    found = {}
    for under in (first, not first):
        with default(value) if under else contextlib.nullcontext():
            found[under] = answers()
    compare("answer", found[True], found[False])


def compare(name: str, found: Any, wanted: Any) -> None:
    if isinstance(wanted, dict):
        assert list(found) == list(wanted)
        for key, value in wanted.items():
            compare(f"{name} {key}", found[key], value)
    elif isinstance(wanted, (tuple, list)):
        for one, two in zip(found, wanted, strict=True):
            compare(name, one, two)
    elif isinstance(wanted, Tensor):
        assert isinstance(found, Tensor)
        torch.testing.assert_close(found, wanted, equal_nan=True, msg=lambda told: f"{name}: {told}")
    else:
        assert found == wanted, name


@given(
    problem=problems(layers=blueprints(), blind=True),
    features=st.sampled_from(FEATURES),
    value=defaults,
    first=st.booleans(),
)
def test_a_layer_answers_alike(
    problem: tuple[Blueprint, Call], features: dict[str, Any], value: Any, first: bool
) -> None:
    blueprint, call = problem
    layer = blueprint.build(FlashMultiHeadAttention, **features)
    given_tensors = [call.tensors(blueprint) for _ in range(2)]

    def answers() -> Any:
        reply = ask(layer, call, given_tensors.pop())
        return reply.tensors, reply.warnings

    assert_no_matter(value, first, answers)


@functools.cache
def takes(value: str | torch.dtype) -> bool:
    """Torch's own ``flex_attention`` runs under a default; that of 2.8 makes a tensor of a second scale."""
    torch._dynamo.reset()
    q = torch.ones(1, 1, 2, 4, dtype=torch.float32, device="cpu")
    try:
        with default(value):
            for scale in (0.5, 0.25, 0.125):
                flex_attention(q, q, q, scale=scale)
    except RuntimeError:
        return False
    return True


@given(spec=specs(), name=st.sampled_from(BACKENDS), seed=seeds(), value=defaults, first=st.booleans())
def test_a_backend_answers_alike(spec: AttentionSpec, name: str, seed: int, value: Any, first: bool) -> None:
    backend = flashmha.backends.get(name)
    assume(backend.why_not(spec) is None and (name != "flex" or takes(value)))
    assert_no_matter(value, first, lambda: answer(backend, spec, seed).named)


@pytest.mark.parametrize("way", ("grad of grad", "torch.func", "make_fx"))
@given(
    problem=problems(layers=blueprints(dtypes=(torch.float64,)), need_weights=(True,), grad=(True,)),
    value=defaults,
    first=st.booleans(),
)
@fewer(5)
def test_transforms_answer_alike(way: str, problem: tuple[Blueprint, Call], value: Any, first: bool) -> None:
    blueprint, call = problem
    layer = blueprint.build(FlashMultiHeadAttention).train(call.training)
    given_tensors = [call.tensors(blueprint) for _ in range(2)]

    def answers() -> Any:
        arguments = given_tensors.pop()
        x = arguments.query.detach().requires_grad_()

        def loss(query: Tensor) -> Tensor:
            outputs = layer(query, *arguments.inputs[1:], **arguments.masks, **call.flags())
            return sum((output * output).sum() for output in outputs)  # type: ignore[return-value]

        with call.mode(layer):
            if way == "torch.func":
                return torch.func.grad(loss)(x)
            if way == "make_fx":
                return make_fx(loss)(x)(x)
            (slope,) = torch.autograd.grad(loss(x), x, create_graph=True)
            return torch.autograd.grad((slope * slope).sum(), x)

    assert_no_matter(value, first, answers)


@given(spec=specs(), seed=seeds(), value=defaults)
def test_the_judge_judges_alike(spec: AttentionSpec, seed: int, value: Any) -> None:
    with default(value):
        assert_agrees("naive" if flashmha.backends.get("sdpa").why_not(spec) else "sdpa", spec, seed)


@given(model=models(), value=defaults)
@fewer(2)
def test_a_swapped_model_stands_where_the_stock_one_stood(model: Any, value: Any) -> None:
    stock, mine, given_tensors = model.build(), model.build(), model.arguments()
    with without_fast_path(), default(value):
        assert_drop_in(stock, replace_mha(mine), kwargs=given_tensors)


@given(model=models(), value=defaults, first=st.booleans())
@fewer(2)
def test_a_swapped_model_answers_alike_in_eval(model: Any, value: Any, first: bool) -> None:
    mine = replace_mha(model.build()).eval()
    given_tensors = [model.arguments() for _ in range(2)]
    with torch.no_grad():
        assert_no_matter(value, first, lambda: mine(**given_tensors.pop()))


@given(spec=specs(), seed=seeds(), value=defaults, first=st.booleans())
def test_a_call_is_explained_and_answered_alike(spec: AttentionSpec, seed: int, value: Any, first: bool) -> None:
    def answers() -> Any:
        q, k, v = tensors(spec, seed)
        said = explain(q, k, v, mask=spec.mask, bias=spec.bias, softcap=spec.softcap, sinks=spec.sinks)
        with torch.no_grad(), use_backend("naive"):
            out = attention(q, k, v, mask=spec.mask, bias=spec.bias, softcap=spec.softcap, sinks=spec.sinks)
        return said.chosen, said.rows, out

    assert_no_matter(value, first, answers)


@given(spec=specs(), value=defaults, first=st.booleans())
def test_a_mask_looks_alike(spec: AttentionSpec, value: Any, first: bool) -> None:
    sizes = (spec.batch, spec.heads, spec.seqlen_q, spec.seqlen_k)

    def answers() -> Any:
        allowed = [mask.materialize(*sizes) for mask in (spec.mask, spec.bias) if mask is not None and mask.tensors()]
        drawn = 0 in sizes or spec.mask is None or spec.mask.picture(*sizes[2:], batch=sizes[0] - 1, head=sizes[1] - 1)
        return allowed, drawn

    assert_no_matter(value, first, answers)


@pytest.mark.cpu("compares in float64 what runs on a CPU")
@given(seed=seeds(), is_causal=st.booleans(), value=defaults, first=st.booleans())
@fewer(5)
def test_the_wrapper_answers_alike(seed: int, is_causal: bool, value: Any, first: bool) -> None:
    def answers() -> Any:
        q, k, v = noise(seed, 3, 2, 5, 2, 8, dtype=torch.float32, device="cpu")
        return flashmha.compare_outputs(q, k, v, causal=is_causal)

    assert_no_matter(value, first, answers)


@given(blueprint=blueprints(dtypes=(torch.float64,)), value=defaults, first=st.booleans(), seed=seeds())
@fewer(2)
def test_nested_tensors_are_answered_alike(blueprint: Blueprint, value: Any, first: bool, seed: int) -> None:
    layer = blueprint.build(FlashMultiHeadAttention, batch_first=True, kdim=None, vdim=None)

    def answers() -> Any:
        like = {"device": layer.out_proj.weight.device, "dtype": blueprint.dtype}
        items = [noise(seed + length, length, blueprint.embed_dim, **like) for length in (3, 1)]
        x = torch.nested.nested_tensor(items, layout=torch.jagged, **like)
        return layer(x, x, x, need_weights=False)[0].values()

    assert_no_matter(value, first, answers)


@given(blueprint=blueprints(), value=defaults, features=st.sampled_from(FEATURES))
def test_a_layer_is_built_where_stock_would_be(blueprint: Blueprint, value: Any, features: dict[str, Any]) -> None:
    arguments = {**blueprint.arguments, "device": None, "dtype": None}
    with default(value):
        ours, stock = FlashMultiHeadAttention(**arguments, **features), nn.MultiheadAttention(**arguments)
        swapped = replace_mha(nn.MultiheadAttention(**arguments))
    wanted = {(x.device, x.dtype) for x in stock.parameters()}
    for layer in (ours, swapped):
        assert {(x.device, x.dtype) for x in layer.parameters()} == wanted


IMPORTS = """
import gc, pkgutil, torch
torch.set_default_device("meta")
import flashmha, flashmha.testing
for module in pkgutil.walk_packages(flashmha.__path__, "flashmha."):
    try:
        if not module.name.endswith(".__main__"):
            __import__(module.name)
    except ModuleNotFoundError as error:  # kernels in a language that is not installed
        assert error.name.split(".")[0] in ("triton", "cutlass"), error
print([x for x in gc.get_objects() if isinstance(x, torch.Tensor) and x.is_meta])
"""


@pytest.mark.cpu("asks about an import")
def test_a_default_in_force_at_the_import_is_not_remembered() -> None:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", IMPORTS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"

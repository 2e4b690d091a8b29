"""The assertion that a backend gives the definition's answers."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch

# The first torch.autograd.grad of a process imports this for most of a second, which Hypothesis would blame on a test.
import torch.fx.experimental.symbolic_shapes
from torch import Tensor
from torch.utils._pytree import tree_map

from ..backends import get, names
from ..backends.base import Backend
from ..backends.parity import AGAIN, moved
from ..host.extras import wanted_by
from ..problem.bias_values import narrow_bias
from ..problem.scores import TensorBias
from ..problem.spec import AttentionSpec
from .closeness import assert_close, is_floating
from .definitions import FromOutput, OneByOne
from .dropout import WEIGHTS, KeptWeights, check_drops, drawing, read_weights
from .paste import pasted
from .values import tensors


@dataclasses.dataclass
class Answer:
    """A backend's answer to a problem: out, lse where asked for, and the gradients of everything that wants one.

    Under dropout the weights, too, as ``dropout`` reads them.
    """

    named: dict[str, Tensor]


def answer(
    backend: Backend,
    spec: AttentionSpec,
    seed: int,
    dtype: torch.dtype | None = None,
    nudge: int | None = None,
    told: Callable[[Tensor], Tensor] | None = None,
) -> Answer:
    """Run a problem, in another dtype if one is given; one cotangent a seed, so that answers can be compared.

    ``nudge`` is the seed of a rounding by which q, k, v and the bias are moved; ``told`` changes the bias.
    """
    q, k, v = tensors(spec, seed) if nudge is None else nudged(tensors(spec, seed), nudge)
    learned = [x for x in (*(spec.bias.tensors() if spec.bias else ()), spec.sinks) if x is not None]
    learned = [x for x in learned if x.requires_grad]
    if dtype is not None:
        q, k, v = (x.to(dtype) for x in (q, k, v))
        spec = dataclasses.replace(spec, dtype=dtype)
    if nudge is not None:
        spec = with_changed_bias(spec, functools.partial(nudged_bias, seed=nudge))
    spec = spec if told is None else with_changed_bias(spec, told)
    leaves = {name: x.detach().requires_grad_(spec.needs_grad) for name, x in (("q", q), ("k", k), ("v", v))}
    with torch.set_grad_enabled(spec.needs_grad), drawing(spec, seed):
        result = backend(leaves["q"], leaves["k"], leaves["v"], spec)
    outputs = dict(zip(("out", "lse"), result if isinstance(result, tuple) else (result,)))
    named = {name: tensor.detach() for name, tensor in outputs.items()}
    if spec.needs_grad:
        leaves |= {f"learned {place}": tensor for place, tensor in enumerate(learned)}
        for name, grad in gradients_of(outputs, leaves, seed + 1).items():
            named[f"gradient of {name}"] = torch.zeros_like(leaves[name]) if grad is None else grad
    if spec.dropout_p:
        named[WEIGHTS] = read_weights(backend, q, k, spec, seed)
    return Answer(named)


def bias_roundings(spec: AttentionSpec) -> list[Callable[[Tensor], Tensor]]:
    """Changes of a bias that is finer than what a kernel computes in: to float32, or to the dtype of the heads.

    Where no log-sum-exp and no sinks count on the numbers themselves, its rows may be moved.
    """
    found = [functools.partial(narrow_bias, dtype=torch.promote_types(spec.dtype, torch.float32))]
    if not spec.need_lse and spec.sinks is None:
        found.append(functools.partial(narrow_bias, dtype=spec.dtype, level=True))
    return list(found)


def with_changed_bias(spec: AttentionSpec, change: Callable[[Tensor], Tensor]) -> AttentionSpec:
    """The problem with another tensor for its bias, if it has one."""
    bias = spec.added()
    return spec if bias is None else dataclasses.replace(spec, bias=TensorBias(change(bias)))


def gradients_of(outputs: Mapping[str, Tensor], leaves: Mapping[str, Tensor], seed: int) -> dict[str, Tensor | None]:
    """The gradient of every leaf for one random cotangent an output; ``None`` where no output depends on it.

    The cotangents come from the seed, one after the other, whether an output can be differentiated or not.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    cotangents = {
        name: torch.randn(output.shape, generator=generator, dtype=torch.float64, device="cpu").to(output)
        for name, output in outputs.items()
    }
    tracked = [name for name, output in outputs.items() if output.requires_grad]
    if not tracked or not leaves:
        return dict.fromkeys(leaves)
    grads = torch.autograd.grad(
        [outputs[name] for name in tracked],
        list(leaves.values()),
        [cotangents[name] for name in tracked],
        allow_unused=True,
    )
    return dict(zip(leaves, grads))


def assert_agrees(backend: Backend | type[Backend] | str, spec: AttentionSpec, seed: int) -> float:
    """A backend gives the definition's answer to a problem: out, lse and every gradient, within its tolerance.

    ``backend`` is an object, its class, or the name of one on the list. A problem it refuses is set aside with
    ``hypothesis.assume``, so a backend that refuses everything fails Hypothesis's health check rather than passing.
    Under dropout the definition drops the weights that the backend dropped, and ``assert_drops`` judges which.

    Returns the largest error, as a share of what is allowed. What is raised ends in the line that raises it again.
    """
    with wanted_by("assert_agrees"):
        from hypothesis import assume, currently_in_test_context, event

    if isinstance(backend, str):
        backend = get(backend)
    elif isinstance(backend, type):
        backend = backend()
    refusal = backend.why_not(spec)
    if currently_in_test_context():
        event(f"{backend.name} {'refuses' if refusal else 'serves'}")
        assume(refusal is None)
    elif refusal is not None:  # one problem, replayed by hand
        raise ValueError(f"{backend.name} refuses this problem: {refusal}")
    try:
        return largest_share(backend, spec, seed)
    except AssertionError as error:
        message = f"{backend.name} on {spec}, seed {seed}: {error}\nagain: {replay_line(backend, spec, seed)}"
        raise AssertionError(message) from None


def replay_line(backend: Backend, spec: AttentionSpec, seed: int) -> str:
    """The line that judges a backend on a problem again."""
    known = backend.name in names() and get(backend.name) is backend
    return f"assert_agrees({repr(backend.name) if known else type(backend).__name__}, {pasted(spec)}, {seed})"


def largest_share(backend: Backend, spec: AttentionSpec, seed: int) -> float:
    """The largest error of a backend, as a share of what is allowed."""
    actual = answer(backend, spec, seed).named
    if spec.dropout_p:
        check_drops(actual[WEIGHTS], backend, spec, seed)
    right = KeptWeights(actual[WEIGHTS] != 0) if spec.dropout_p else get("naive")
    plain = answer(right, spec, seed).named
    exact = answer(right, spec, seed, torch.float64).named
    assert actual.keys() == exact.keys(), f"must return {list(exact)}, got {list(actual)}"
    pairs = [(plain, exact)]
    try:
        return worst(actual, pairs, spec, backend)
    except AssertionError:
        factors = [2 ** (step / AGAIN) for step in range(AGAIN)]
        pairs += [(answer(OneByOne(right, factor), spec, seed).named, exact) for factor in factors]
        if spec.needs_grad:
            pairs += [(answer(FromOutput(right, nudge), spec, seed).named, exact) for nudge in range(AGAIN)]
        if spec.bias is not None:
            pairs += [(answer(right, spec, seed, told=told).named, exact) for told in bias_roundings(spec)]
        for nudge in range(AGAIN):
            runs = (answer(right, spec, seed, dtype, nudge).named for dtype in (None, torch.float64))
            pairs.append((next(runs), next(runs)))
    return worst(actual, pairs, spec, backend)


def worst(
    actual: dict[str, Tensor],
    pairs: list[tuple[dict[str, Tensor], dict[str, Tensor]]],
    spec: AttentionSpec,
    backend: Backend,
) -> float:
    """The largest error of an answer as a share of what is allowed, given plain and exact ones; the first is right."""
    (plain, exact), *again = pairs
    shares = [
        assert_close(
            name,
            actual[name],
            plain[name],
            exact[name],
            spec.dtype,
            backend.tolerance,
            again=[(one[name], two[name]) for one, two in again],
        )
        for name in exact
    ]
    return max(shares)


def nudged(call: Any, seed: int) -> Any:
    """A call whose floating inputs are moved by a rounding, up or down; one tensor given twice stays one."""
    generator = torch.Generator("cpu").manual_seed(seed)
    kept: dict[int, Tensor] = {}

    def move(value: Any) -> Any:
        if not is_floating(value):
            return value
        if id(value) not in kept:
            kept[id(value)] = moved(value, generator)
        return kept[id(value)]

    return tree_map(move, call)


def nudged_bias(bias: Tensor, seed: int) -> Tensor:
    """A bias moved by a rounding, in its graph; what is finite stays finite, what hides stays hidden."""
    limits, generator = torch.finfo(bias.dtype), torch.Generator("cpu").manual_seed(seed)
    step = moved(torch.ones_like(bias), generator)
    return torch.where(bias.isfinite(), (bias * step).clamp(limits.min, limits.max), bias)

"""The assertion that a backend keeps the rule of parity (``tolerance``).

Shapes, dtypes and the places of non-finite values are compared first.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

# The first torch.autograd.grad of a process imports this for most of a second, which Hypothesis would blame on a test.
import torch.fx.experimental.symbolic_shapes
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from ..backends import get, names
from ..backends.base import Backend
from ..backends.naive import at_least_single
from ..backends.parity import AGAIN, allowed_error, moved
from ..host.extras import wanted_by
from ..problem.scores import TensorBias, narrow_bias
from ..problem.spec import AttentionSpec
from .dropout import WEIGHTS, Kept, check_drops, drawing, read_weights
from .paste import pasted


@dataclasses.dataclass
class Answer:
    """What a backend makes of a problem: out, lse where asked for, and the gradients of everything that wants one.

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
    with wanted_by("answer"):  # here alone: a layer is judged without drawing
        from .attention import tensors

    q, k, v = tensors(spec, seed) if nudge is None else nudged(tensors(spec, seed), nudge)
    learned = [x for x in (*(spec.bias.tensors() if spec.bias else ()), spec.sinks) if x is not None]
    learned = [x for x in learned if x.requires_grad]
    if dtype is not None:
        q, k, v = (x.to(dtype) for x in (q, k, v))
        spec = dataclasses.replace(spec, dtype=dtype)
    if nudge is not None:
        spec = with_bias(spec, functools.partial(nudged_bias, seed=nudge))
    spec = spec if told is None else with_bias(spec, told)
    leaves = {name: x.detach().requires_grad_(spec.needs_grad) for name, x in (("q", q), ("k", k), ("v", v))}
    with torch.set_grad_enabled(spec.needs_grad), drawing(spec, seed):
        result = backend(leaves["q"], leaves["k"], leaves["v"], spec)
    outputs = dict(zip(("out", "lse"), result if isinstance(result, tuple) else (result,)))
    named = {name: tensor.detach() for name, tensor in outputs.items()}
    if spec.needs_grad:
        leaves |= {f"learned {place}": tensor for place, tensor in enumerate(learned)}
        for name, grad in gradients(outputs, leaves, seed + 1).items():
            named[f"gradient of {name}"] = torch.zeros_like(leaves[name]) if grad is None else grad
    if spec.dropout_p:
        named[WEIGHTS] = read_weights(backend, q, k, spec, seed)
    return Answer(named)


def tellings(spec: AttentionSpec) -> list[Callable[[Tensor], Tensor]]:
    """How a kernel may be told a bias that is finer than what it computes in: float32, or the dtype of the heads.

    Where no log-sum-exp and no sinks count on the numbers themselves, its rows may be moved.
    """
    found = [functools.partial(narrow_bias, dtype=torch.promote_types(spec.dtype, torch.float32))]
    if not spec.need_lse and spec.sinks is None:
        found.append(functools.partial(narrow_bias, dtype=spec.dtype, level=True))
    return list(found)


def with_bias(spec: AttentionSpec, change: Callable[[Tensor], Tensor]) -> AttentionSpec:
    """The problem with another tensor for its bias, if it has one."""
    bias = spec.added()
    return spec if bias is None else dataclasses.replace(spec, bias=TensorBias(change(bias)))


def gradients(outputs: Mapping[str, Tensor], leaves: Mapping[str, Tensor], seed: int) -> dict[str, Tensor | None]:
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
    refusal = backend.unsupported(spec)
    if currently_in_test_context():
        event(f"{backend.name} {'refuses' if refusal else 'serves'}")
        assume(refusal is None)
    elif refusal is not None:  # somebody replays one problem by hand
        raise ValueError(f"{backend.name} refuses this problem: {refusal}")
    try:
        return judged(backend, spec, seed)
    except AssertionError as error:
        message = f"{backend.name} on {spec}, seed {seed}: {error}\nagain: {again(backend, spec, seed)}"
        raise AssertionError(message) from None


def again(backend: Backend, spec: AttentionSpec, seed: int) -> str:
    """The line that judges a backend on a problem again."""
    known = backend.name in names() and get(backend.name) is backend
    return f"assert_agrees({repr(backend.name) if known else type(backend).__name__}, {pasted(spec)}, {seed})"


def judged(backend: Backend, spec: AttentionSpec, seed: int) -> float:
    """The largest error of a backend, as a share of what is allowed."""
    actual = answer(backend, spec, seed).named
    if spec.dropout_p:
        check_drops(actual[WEIGHTS], backend, spec, seed)
    right = Kept(actual[WEIGHTS] != 0) if spec.dropout_p else get("naive")
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
            pairs += [(answer(right, spec, seed, told=told).named, exact) for told in tellings(spec)]
        for nudge in range(AGAIN):
            runs = (answer(right, spec, seed, dtype, nudge).named for dtype in (None, torch.float64))
            pairs.append((next(runs), next(runs)))
    return worst(actual, pairs, spec, backend)


class OneByOne(Backend):
    """A definition by other operations: its matrix products are loops, its weights come from the log-sum-exp.

    A library adds up in several sums at once, which errs a half or a quarter as much over a hundred features. A loop
    drifts where its products are alike, how far is a matter of their size: ``factor`` changes that, as a scale does
    that comes before or after.
    """

    name = "one by one"

    def __init__(self, definition: Backend, factor: float = 1.0) -> None:
        self.definition, self.factor = definition, factor

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor | tuple[Tensor, Tensor]:
        with Loops(self.factor):
            return self.definition(q, k, v, spec)


class Loops(TorchFunctionMode):
    """Products of batches of matrices, and softmax, by other operations, forward and backward."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.bmm:
            return Product.apply(*args, self.factor)  # type: ignore[no-untyped-call]
        if func is Tensor.softmax:
            score = at_least_single(args[0])
            return (score - score.logsumexp(dim=-1, keepdim=True)).exp().to(args[0].dtype)
        return func(*args, **(kwargs or {}))


class Product(torch.autograd.Function):
    """``one @ two``, and its gradients by the same loop."""

    @staticmethod
    def forward(ctx: Any, one: Tensor, two: Tensor, factor: float) -> Tensor:
        ctx.save_for_backward(one, two)
        ctx.factor = factor
        return added_up(one, two, factor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        one, two = ctx.saved_tensors
        return added_up(grad, two.mT, ctx.factor), added_up(one.mT, grad, ctx.factor), None


def added_up(one: Tensor, two: Tensor, factor: float) -> Tensor:
    """``one @ two``, ``factor`` times as large, one product after the other; and divided by it.

    In float32 at least, as matrix products are, and rounded once.
    """
    first, second = at_least_single(one) * factor, at_least_single(two)
    total = first.new_zeros(*first.shape[:-1], second.shape[-1])
    for column, row in zip(first.unbind(-1), second.unbind(-2)):
        total += column[..., :, None] * row[..., None, :]
    return (total / factor).to(one.dtype)


class FromOutput(Backend):
    """A definition whose backward starts from its output as it was rounded, as that of every fused kernel does.

    Such a kernel subtracts ``(grad * out).sum(-1)`` from the gradients of a row's weights. For a row that sees one key
    that should leave 0, and the definition's own backward leaves exactly 0. ``nudge`` is the seed of the roundings.
    """

    name = "from output"

    def __init__(self, definition: Backend, nudge: int) -> None:
        self.definition, self.nudge = definition, nudge

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor | tuple[Tensor, Tensor]:
        out, lse = self.definition(q, k, v, spec.with_lse())
        out, lse = Subtracted.apply(out, lse, self.nudge)  # type: ignore[no-untyped-call]
        return (out, lse) if spec.need_lse else out


class Subtracted(torch.autograd.Function):
    """An output and its log-sum-exp, which takes the gradient that an output off by roundings makes of a row's."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, lse: Tensor, nudge: int) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(moved(out, torch.Generator("cpu").manual_seed(nudge)) - out, lse)
        return out.clone(), lse.clone()

    @staticmethod
    def backward(ctx: Any, of_out: Tensor, of_lse: Tensor) -> tuple[Tensor, Tensor, None]:
        error, lse = ctx.saved_tensors
        return of_out, of_lse + (of_out * error).sum(dim=-1).transpose(1, 2).to(lse.dtype), None


Named = dict[str, Tensor]


def worst(actual: Named, pairs: list[tuple[Named, Named]], spec: AttentionSpec, backend: Backend) -> float:
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


def is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def assert_close(
    name: str,
    actual: Tensor,
    plain: Tensor,
    exact: Tensor,
    dtype: torch.dtype,
    tolerance: tuple[float, float] = Backend.tolerance,
    *,
    again: Sequence[tuple[Tensor, Tensor]] = (),
) -> float:
    """``actual`` errs no more than the rule of parity allows, given ``plain`` and, in float64, ``exact``.

    Returns the error as a share of what is allowed.

    ``dtype`` is the one that was computed in; a learned table may be kept in a finer one. ``again`` holds more plain
    computations, each with an exact one of its own: the largest error counts. A name that starts with "gradient" is
    given the floor of gradients.
    """
    assert actual.shape == exact.shape, f"{name} must have shape {tuple(exact.shape)}, got {tuple(actual.shape)}"
    assert actual.dtype == plain.dtype, f"{name} must be {plain.dtype}, got {actual.dtype}"
    if not exact.numel():
        return 0.0
    eps = max(torch.finfo(dtype).eps, torch.finfo(actual.dtype).eps)
    reference, actual = exact.to(actual.dtype).double(), actual.double()
    finite = reference.isfinite()
    strange = actual.isfinite() != finite
    assert not strange.any(), f"{name} is not finite in {int(strange.sum())} places where it should be, or the reverse"
    infinite, expected = actual[~finite], reference[~finite]
    assert torch.equal(infinite.isnan(), expected.isnan()), f"{name} is NaN where it should be infinite, or the reverse"
    assert torch.equal(infinite.nan_to_num(), expected.nan_to_num()), f"{name} differs where it is infinite"
    if not finite.any():
        return 0.0
    error, largest = (actual - reference)[finite].abs().max().item(), reference[finite].abs().max().item()
    allowed = max(rounding_error(*pair) for pair in ((plain, exact), *again))
    bound = allowed_error(name, allowed, largest, eps, tolerance)
    assert error <= bound, (
        f"{name} is off by {error:.3g}, at most {bound:.3g} allowed "
        f"(a plain {dtype} computation is off by {allowed:.3g})"
    )
    return error / bound


def rounding_error(plain: Tensor, exact: Tensor) -> float:
    """The largest error of a computation where the exact result, in its dtype, is finite."""
    reference = exact.to(plain.dtype).double()
    errors = (plain.double() - reference)[reference.isfinite()].abs()
    return errors.nan_to_num(0.0).max().item() if errors.numel() else 0.0


ROUNDING = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
"""How much two ways to compute one thing may differ, relative to the largest value, and at least absolutely."""


def assert_same(actual: Any, expected: Any, name: str = "tensor") -> None:
    """Equal to rounding, for tensors and dicts of them: two ways to say one thing, in one dtype.

    The difference may be 1e-10 (float64), 1e-5 (float32), 2e-3 (float16) or 2e-2 (bfloat16) times the largest value,
    and times 1 where all are smaller. A reference that is not finite fails.
    """
    if isinstance(expected, Mapping):
        assert list(actual) == list(expected), f"{name} must hold {list(expected)}, got {list(actual)}"
        for key, value in expected.items():
            assert_same(actual[key], value, key)
        return
    assert actual.shape == expected.shape, f"{name} must have shape {tuple(expected.shape)}, got {tuple(actual.shape)}"
    assert actual.dtype == expected.dtype, f"{name} must be {expected.dtype}, got {actual.dtype}"
    if not expected.numel():
        return
    rounding = ROUNDING[expected.dtype]
    actual, expected = actual.detach().double(), expected.detach().double()
    assert expected.isfinite().all(), f"{name} must have a finite reference"
    error, bound = (actual - expected).abs().max().item(), rounding * max(1.0, expected.abs().max().item())
    assert error <= bound, f"{name} is off by {error:.3g}, at most {bound:.3g} allowed"

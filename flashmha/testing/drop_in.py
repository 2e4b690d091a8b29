"""The assertion that one module can stand where another stands: a layer, or a whole model."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, keystr, tree_flatten_with_path, tree_unflatten

from ..backends.parity import AGAIN
from ..problem.wording import spell
from .closeness import assert_close, is_floating
from .judge import gradients_of, nudged

COMPARED_BY_VALUE = (type(None), bool, int, float, str)


def assert_drop_in(
    stock: nn.Module,
    ours: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    seed: int = 0,
    finite_for_nan: bool = False,
) -> None:
    """``ours`` can stand where ``stock`` stands: the same parameters and buffers, and the same answer to one call.

    Both are called with ``args`` and ``kwargs`` in the mode each is in, train or eval, on tensors inside any tuples,
    lists and dicts. Of the answers, structure, shapes, dtypes, ``requires_grad`` and values are compared; where
    gradients are on, so are those of every floating point input and every parameter, for one random cotangent an
    output. Values are judged as those of a backend are (``assert_close``): against a float64 copy of ``stock``, ours
    may err 2 times as much as ``stock`` does, gradients 3 times, plus rounding.

    Args:
        args, kwargs: the call. Inputs are taken as leaves, whatever they were; one tensor given twice stays one.
        seed: of the cotangents, and of the random generators before each forward.
        finite_for_nan: where stock is NaN or infinite, ours may hold any finite number. That is the one documented
            difference: queries that may look at nothing.

    Raises:
        AssertionError: ours differs; the text names the output, the parameter or the input.
        ValueError: stock draws random numbers, as dropout does, so that there is nothing to compare with.
        TypeError: one of the two is no module, the arguments are no tuple or no dict, or an output is neither a tensor
            nor a number, a text, ``None`` or a container of them.
    """
    for name, module in (("stock", stock), ("ours", ours)):
        if not isinstance(module, nn.Module):
            raise TypeError(f"{name} must be an nn.Module, got {module!r}.")
    if isinstance(args, (str, Tensor)) or not isinstance(args, Sequence):
        raise TypeError(f"args must be the arguments of a call in a tuple, such as (x, x, x), got {spell(args)}.")
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise TypeError(f"kwargs must be a dict of arguments by name, or None, got {spell(kwargs)}.")
    assert_same_state(stock, ours)
    copied = copy.deepcopy(stock).double()
    call = (tuple(args), dict(kwargs or {}))
    found, plain = respond("ours", ours, call, seed), respond("stock", stock, call, seed)
    if plain.random:
        raise ValueError("stock must draw no random numbers (dropout 0, or the mode eval), got a call that drew some.")
    assert not found.random, "ours draws random numbers where stock draws none"
    assert not found.written, f"ours writes into {', '.join(found.written)}"
    assert found.structure == plain.structure, f"ours must return {plain}, got {found}"
    for name, value in plain.outputs.items():
        assert_same_kind(name, found.outputs[name], value)
    exact = respond("stock", copied, call, seed, double=True)
    pairs = [(plain.floating(), exact.floating())]
    try:
        assert_parity(found.floating(), pairs, finite_for_nan)
    except AssertionError:
        for place in range(AGAIN):
            moved = nudged(call, seed + place)
            again = respond("stock", stock, moved, seed).floating()
            finer = any(tensor.dtype != torch.float64 for tensor in again.values())
            pairs.append((again, respond("stock", copied, moved if finer else call, seed, double=True).floating()))
        assert_parity(found.floating(), pairs, finite_for_nan)


def assert_same_state(stock: nn.Module, ours: nn.Module) -> None:
    """The same parameters and buffers by name, shape, dtype and value, and parameters in the same order."""
    wanted, found = stock.state_dict(), ours.state_dict()
    missing, unknown = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    assert not missing and not unknown, f"state_dict must have stock's keys, misses {missing}, adds {unknown}"
    for name, value in wanted.items():
        if isinstance(value, Tensor):
            other = found[name]
            for word in ("shape", "dtype", "device"):
                one, two = getattr(value, word), getattr(other, word)
                assert one == two, f"{name} must have {word} {one}, got {two}"
            assert torch.equal(other, value), (
                f"{name} must hold stock's values: ours.load_state_dict(stock.state_dict())"
            )
    trained = [
        [(name, parameter.requires_grad) for name, parameter in model.named_parameters()] for model in (stock, ours)
    ]
    assert trained[1] == trained[0], f"named_parameters must be, with requires_grad, {trained[0]}, got {trained[1]}"


@dataclasses.dataclass
class Response:
    """A module's answer to a call: outputs and gradients by name, and its side effects."""

    structure: TreeSpec
    outputs: dict[str, Any]
    gradients: dict[str, Tensor | None]
    random: bool
    written: list[str]

    def __str__(self) -> str:
        """The structure alone, with dots for what it holds."""
        return repr(tree_unflatten([...] * len(self.outputs), self.structure)).replace("Ellipsis", "...")

    def floating(self) -> dict[str, Tensor]:
        """The tensors that the rule of parity judges."""
        values = {**self.outputs, **self.gradients}
        return {name: value.detach() for name, value in values.items() if is_floating(value)}


def respond(which: str, module: nn.Module, call: Any, seed: int, *, double: bool = False) -> Response:
    """Call a module on leaves made of the tensors of a call, in float64 with ``double``, and differentiate."""
    inputs: dict[int, Tensor] = {}
    names: dict[int, str] = {}
    paths, structure = tree_flatten_with_path(call)

    def taken(path: Any, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) not in inputs:
            leaf = value.detach()
            if is_floating(leaf):
                leaf = (leaf.double() if double else leaf).requires_grad_(torch.is_grad_enabled())
            inputs[id(value)], names[id(value)] = leaf, f"input{keystr(path[1:])}"
        return inputs[id(value)]

    args, kwargs = tree_unflatten([taken(path, value) for path, value in paths], structure)
    before = {key: leaf._version for key, leaf in inputs.items()}
    devices = {tensor.device for tensor in (*inputs.values(), *module.parameters()) if tensor.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)):
        torch.manual_seed(seed)
        state = random_state(devices)
        result = module(*args, **kwargs)
        random = any(not torch.equal(one, two) for one, two in zip(state, random_state(devices)))
    leaves, structure = tree_flatten_with_path(result)
    outputs = {f"output{keystr(path)}": value for path, value in leaves}
    for name, value in outputs.items():
        if not isinstance(value, (Tensor, *COMPARED_BY_VALUE)):
            raise TypeError(
                f"{name} of {which} must be a tensor, a number, a text or None, got {type(value).__name__}."
            )
    wanting = {names[key]: leaf for key, leaf in inputs.items() if leaf.requires_grad}
    wanting |= {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    found = gradients_of({name: x for name, x in outputs.items() if is_floating(x)}, wanting, seed + 1)
    return Response(
        structure,
        outputs,
        {f"gradient of {name}": grad for name, grad in found.items()},
        random,
        [names[key] for key, leaf in inputs.items() if leaf._version != before[key]],
    )


def random_state(devices: set[torch.device]) -> list[Tensor]:
    """The states of the random generators of the CPU and of some GPUs."""
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in devices)]


def describe(thing: Any) -> str:
    return "a tensor" if isinstance(thing, Tensor) else repr(thing)


def assert_same_kind(name: str, found: Any, wanted: Any) -> None:
    """Tensors with the same ``requires_grad`` where they are floating, anything else equal."""
    assert isinstance(found, Tensor) == isinstance(wanted, Tensor), (
        f"{name} must be {describe(wanted)}, got {describe(found)}"
    )
    if is_floating(wanted):
        one, two = wanted.requires_grad, found.requires_grad
        assert one == two, f"{name} must have requires_grad={one}, got {two}"
    elif isinstance(wanted, Tensor):
        assert torch.equal(found, wanted), f"{name} must equal stock's: {wanted}, got {found}"
    else:
        assert found == wanted, f"{name} must be {wanted!r}, got {found!r}"


def assert_parity(
    found: dict[str, Tensor], pairs: list[tuple[dict[str, Tensor], dict[str, Tensor]]], finite_for_nan: bool
) -> None:
    """Every tensor by the rule of parity, against pairs of stock's own and exact ones; the first exact one is right.

    With ``finite_for_nan`` only where stock is finite.
    """
    for name in pairs[0][0]:
        assert name in found, f"{name} must be a tensor, got None"
        actual, ((plain, exact), *again) = found[name], [(one[name], two[name]) for one, two in pairs]
        if finite_for_nan and actual.shape == exact.shape:
            free = ~(plain.isfinite() & exact.isfinite())
            assert actual[free].isfinite().all(), f"{name} must be finite where stock is not"
            actual, plain, exact = (tensor.masked_fill(free, 0.0) for tensor in (actual, plain, exact))
        assert_close(name, actual, plain, exact, plain.dtype, again=again)
    beyond = sorted(found.keys() - pairs[0][0].keys())
    assert not beyond, f"{', '.join(beyond)} must be None, got a tensor"

"""Known encoder layers run as functions: the same operators, numbers and draws as when they are called as modules."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from conftest import fewer
from hypothesis import given
from hypothesis import strategies as st
from test_ranking import WHY, passing
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import flashmha
from flashmha import replace_mha
from flashmha.backends import register, unregister
from flashmha.backends.choice.waiting import loss
from flashmha.backends.compiling import waits
from flashmha.swap.encoder import found_causal
from flashmha.swap.route import enter, leave
from flashmha.testing.models import Architecture, EncoderMasks, architectures, encoder_masks

pytestmark = [
    pytest.mark.filterwarnings("ignore:Support for mismatched:UserWarning"),
    pytest.mark.cpu("computes in float64, for which no GPU has a kernel"),
]

ACTIVATIONS: tuple[Any, ...] = (nn.functional.relu, nn.functional.silu, nn.GELU("tanh"), nn.ReLU(), nn.Tanh())
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"skip_padding": True},
    {"backend": "naive"},
    {"call_out_proj": True},
    {"window": (2, 1)},
    {"trust_is_causal": True},
)


def as_modules(
    encoder: nn.TransformerEncoder,
    src: Tensor,
    mask: Any = None,
    src_key_padding_mask: Any = None,
    is_causal: bool | None = None,
) -> Tensor:
    """The layers of an encoder's route called one after another, as stock's encoder calls them."""
    causal = found_causal(mask, src_key_padding_mask) if is_causal is None else is_causal
    way = enter(encoder, src, mask, src_key_padding_mask, causal)
    x = way.src
    for layer in encoder.layers:
        x = layer(x, src_mask=way.mask, src_key_padding_mask=way.key_padding_mask, is_causal=way.is_causal)
    return leave(encoder, way, x)


class Operators(TorchDispatchMode):
    """The operators that run inside the ``with``, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def trained(
    model: nn.Module, x: Tensor, masks: dict[str, Any], run: Callable[..., Tensor] | None = None
) -> tuple[list[Tensor], list[str]]:
    """Output and gradients of a model, or of another way to ``run`` it, and the operators of that."""
    torch.manual_seed(0)
    x = x.detach().clone().requires_grad_()
    with Operators() as seen:
        out = model(x, **masks) if run is None else run(model, x, **masks)
    given = [x, *(p for p in model.parameters() if p.requires_grad)]
    grads = torch.autograd.grad(out.square().sum(), given, allow_unused=True)
    return [out.detach(), *(g for g in grads if g is not None)], seen.names


@fewer(2)
@given(
    architecture=architectures(),
    masks=encoder_masks(),
    options=st.sampled_from(OPTIONS),
    activation=st.sampled_from(ACTIVATIONS),
    dropout=st.sampled_from((0.0, 0.5)),
    frozen=st.booleans(),
)
def test_functions_of_layers_are_the_layers(
    architecture: Architecture,
    masks: EncoderMasks,
    options: dict[str, Any],
    activation: Any,
    dropout: float,
    frozen: bool,
) -> None:
    model = replace_mha(architecture.encoder(), **options)
    for layer in model.layers:
        layer.activation = activation
        for part in (layer.dropout, layer.dropout1, layer.dropout2):
            part.p = dropout
        layer.linear1.requires_grad_(not frozen)
    x = architecture.inputs(masks.batch, masks.seqlen)
    given = masks.arguments(architecture.num_heads)
    found, ran = trained(model, x, given)
    expected, called = trained(model, x, given, as_modules)
    assert ran == called
    assert len(found) == len(expected)
    for ours, modules in zip(found, expected):
        torch.testing.assert_close(ours, modules, rtol=0.0, atol=0.0, equal_nan=True)


@contextlib.contextmanager
def hooked_everywhere(seen: list[str]) -> Iterator[None]:
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: seen.append("hook"))
    try:
        yield
    finally:
        handle.remove()


class Loud(nn.Linear):
    """A linear layer that says when it runs."""

    seen: list[str]

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append("forward")
        return super().forward(x)


class LoudCall(nn.Linear):
    """A linear layer that says when it is called as a module."""

    seen: list[str]

    def _call_impl(self, *args: Any, **kwargs: Any) -> Any:
        self.seen.append("call")
        return super()._call_impl(*args, **kwargs)


def shout(module: Any, seen: list[str]) -> None:
    """Put a forward that says so on an instance."""
    forward = module.forward

    def said(*args: Any, **kwargs: Any) -> Any:
        seen.append("forward")
        return forward(*args, **kwargs)

    module.forward = said


def loud_linear(layer: Any, seen: list[str], kind: type[Any] = Loud) -> None:
    layer.linear2 = kind(12, 8, dtype=torch.float64)
    layer.linear2.seen = seen


STRANGE: dict[str, Callable[[Any, list[str]], Any]] = {
    "a hook on a layer": lambda layer, seen: layer.register_forward_hook(lambda *a: seen.append("hook")),
    "a hook before a norm": lambda layer, seen: layer.norm2.register_forward_pre_hook(lambda *a: seen.append("hook")),
    "a hook on a dropout": lambda layer, seen: layer.dropout1.register_forward_hook(lambda *a: seen.append("hook")),
    "a hook on attention": lambda layer, seen: layer.self_attn.register_forward_hook(lambda *a: seen.append("hook")),
    "another linear": loud_linear,
    "another linear's call": lambda layer, seen: loud_linear(layer, seen, LoudCall),
    "a forward of an instance": lambda layer, seen: shout(layer.linear1, seen),
    "a block of an instance": lambda layer, seen: setattr(
        layer, "_ff_block", lambda x: seen.append("block") or type(layer)._ff_block(layer, x)
    ),
}


@pytest.mark.parametrize("strange", STRANGE)
@pytest.mark.parametrize("training", [False, True])
def test_what_is_not_known_is_called(strange: str, training: bool) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 12, 0.0, batch_first=True, dtype=torch.float64)
    model = replace_mha(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)).train(training)
    x, seen = torch.randn(2, 3, 8, dtype=torch.float64), []
    before = model(x)
    STRANGE[strange](model.layers[1], seen)
    after = model(x)
    assert seen
    if not strange.startswith("another linear"):
        torch.testing.assert_close(after, before)


def test_a_hook_on_every_module_sees_every_layer() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 12, 0.0, batch_first=True)
    model, seen = replace_mha(nn.TransformerEncoder(layer, 2)), []
    with hooked_everywhere(seen):
        model(torch.randn(2, 3, 8))
    assert len(seen) > 2 * len(model.layers)


def lose(layer: Any, name: str, function: Any) -> None:
    delattr(layer, name)
    setattr(layer, name, function)


@pytest.mark.parametrize("name", ["norm1", "norm2", "dropout", "dropout1", "dropout2"])
def test_a_function_in_place_of_a_part_runs(name: str) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 12, 0.0, batch_first=True)
    model, x = replace_mha(nn.TransformerEncoder(layer, 2)), torch.randn(2, 3, 8)
    seen: list[Tensor] = []
    lose(model.layers[1], name, nn.functional.tanh)
    with mock.patch.object(torch.Tensor, "tanh", lambda x: seen.append(x) or torch.tanh(x)):
        model(x)
    assert len(seen) == 1


PATCHED_BEFORE = """
import torch
from torch import nn

plain, seen = nn.Linear.forward, []


def forward(self, x):
    seen.append(self)
    return 2 * plain(self, x)


nn.Linear.forward = forward
from flashmha import replace_mha

layer = nn.TransformerEncoderLayer(8, 2, 12, 0.0, batch_first=True)
replace_mha(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))(torch.randn(2, 3, 8))
assert len(seen) == 4, seen
"""


def test_a_forward_of_torch_patched_before_the_import_runs() -> None:
    subprocess.run([sys.executable, "-c", PATCHED_BEFORE], check=True)


def test_layers_that_differ_have_problems_of_their_own() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 12, 0.0, batch_first=True)
    model = replace_mha(nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)).eval()
    model.layers[1].self_attn.num_heads, model.layers[1].self_attn.head_dim = 4, 2
    with flashmha.record() as calls:
        model(torch.randn(2, 3, 8))
    assert [call.spec.heads for call in calls] == [2, 4, 2]
    assert [call.layer for call in calls] == [each.self_attn for each in model.layers]


def test_layers_in_turns_share_their_problems() -> None:
    """The calls of all layers count once, however many problems they have."""
    layer = nn.TransformerEncoderLayer(8, 2, 12, 0.0, batch_first=True)
    model = replace_mha(nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)).train()
    for number, each in enumerate(model.layers):
        each.self_attn.dropout = 0.25 if number % 2 else 0.0
    waits.begin()
    register(passing("slow", WHY), before="sdpa")
    try:
        with flashmha.record() as calls:
            model(torch.randn(2, 3, 8))
        lost = [wait.lost for wait in waits.kernels.values()]
    finally:
        unregister("slow")
        waits.begin()
    assert len(lost) == 2 and sum(lost) == pytest.approx(sum(loss(call.spec) for call in calls), rel=1e-9)

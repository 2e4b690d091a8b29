"""A layer on the kernels of a GPU: compiled, captured, without waiting and without copies."""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import Copies
from torch import Tensor

from flashmha import AlibiBias, FlashMultiHeadAttention, NoBackendError, Rotary, record
from flashmha.backends.choice.registry import instead
from flashmha.backends.flash_attn.flash4 import Flash4
from flashmha.testing import assert_same, noise

pytestmark = pytest.mark.gpu

BACKENDS = ("sdpa", "flash4", "flash3", "flash2", "flex")
MASKS = ("none", "causal", "padding", "table")
BATCH, SEQLEN, HEADS, HEAD_DIM = 2, 512, 4, 64


def hidden() -> Tensor:
    """Padding with holes."""
    return torch.arange(SEQLEN)[None] % torch.tensor([[3], [5]]) == 0


def arguments(mask: str) -> dict[str, Any]:
    """The masks of a call, as nn.MultiheadAttention takes them."""
    future = torch.ones(SEQLEN, SEQLEN, dtype=torch.bool).triu(1)
    return {
        "none": {},
        "causal": {"attn_mask": future, "is_causal": True},
        "padding": {"key_padding_mask": hidden()},
        "table": {"attn_mask": future},
    }[mask]


def layer(
    name: str | None, training: bool, seqlen: int = SEQLEN, **options: Any
) -> tuple[FlashMultiHeadAttention, Tensor]:
    """A layer held to a backend, and its input."""
    torch.manual_seed(0)
    options |= {"batch_first": True, "need_weights": False, "trust_is_causal": True, "dtype": torch.bfloat16}
    made = FlashMultiHeadAttention(HEADS * HEAD_DIM, HEADS, **options).train(training)
    made.backend = name
    return made, noise(1, BATCH, seqlen, HEADS * HEAD_DIM, dtype=torch.bfloat16).requires_grad_(training)


def step(module: Any, x: Tensor, given: dict[str, Any], training: bool) -> dict[str, Tensor]:
    """The output, and in training every gradient."""
    with torch.set_grad_enabled(training):
        out = module(x, x, x, **given)[0]
    if not training:
        return {"out": out}
    wanted = {"x": x, **dict(getattr(module, "_orig_mod", module).named_parameters())}
    gradients = torch.autograd.grad(out, list(wanted.values()), torch.ones_like(out))
    return {"out": out.detach(), **dict(zip(wanted, gradients))}


@contextlib.contextmanager
def refusing() -> Iterator[None]:
    """Skip a test with the reason where the backend cannot serve."""
    try:
        yield
    except NoBackendError as error:
        reasons = "; ".join(f"{name}: {why}" for name, why in error.reasons.items())
        pytest.skip(f"needs a backend that serves: {reasons}")


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


every = pytest.mark.parametrize("name", BACKENDS)
masks = pytest.mark.parametrize("mask", MASKS)
training = pytest.mark.parametrize("training", (True, False), ids=("train", "eval"))


@every
@masks
@training
def test_a_compiled_layer_is_one_graph_with_the_numbers_of_the_eager_one(name: str, mask: str, training: bool) -> None:
    module, x = layer(name, training)
    with refusing():
        eager = step(module, x, arguments(mask), training)
    compiled = step(torch.compile(module, fullgraph=True), x, arguments(mask), training)
    for part, tensor in eager.items():
        assert_same(compiled[part], tensor, part)


@every
@masks
@training
def test_a_captured_step_gives_the_numbers_of_the_eager_one_at_every_replay(
    name: str, mask: str, training: bool
) -> None:
    module, x = layer(name, training)
    given = arguments(mask)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), refusing():
        for _ in range(3):
            step(module, x, given, training)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(module, x, given, training)
    for seed in (2, 3):
        x.data.copy_(noise(seed, *x.shape, dtype=x.dtype))
        graph.replay()
        for part, tensor in step(module, x, given, training).items():
            assert_same(captured[part], tensor, part)


@pytest.mark.parametrize("name", (*BACKENDS, None))
@masks
@training
def test_no_call_waits_for_the_device(name: str | None, mask: str, training: bool) -> None:
    module, x = layer(name, training)
    given = arguments(mask)
    with refusing():
        step(module, x, given, training)
    step_without_waiting(module, x, given, training)


def step_without_waiting(module: Any, x: Tensor, given: dict[str, Any], training: bool) -> None:
    """A step in which a wait for the device is an error."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(module, x, given, training)
    finally:
        torch.cuda.set_sync_debug_mode("default")


LONGER = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
"""A scaling that depends on the largest position."""


@training
@pytest.mark.parametrize("scores", ("plain", "alibi", "sinks"))
def test_no_layer_with_parts_waits_for_the_device(scores: str, training: bool) -> None:
    options: dict[str, Any] = {
        "plain": {},
        "alibi": {"position_bias": AlibiBias(HEADS)},
        "sinks": {"sinks": torch.zeros(HEADS), "softcap": 20.0},
    }[scores]
    rotary = Rotary(HEAD_DIM, rope_parameters=LONGER, max_seqlen=SEQLEN // 2)
    module, x = layer(None, training, rotary=rotary, qk_norm="rms", causal=True, **options)
    given = {"positions": torch.arange(SEQLEN)[None].expand(BATCH, -1)}
    step(module, x, given, training)
    step_without_waiting(module, x, given, training)


@pytest.mark.parametrize("name", BACKENDS[:-1])
@pytest.mark.parametrize("mask", ("none", "causal"))
def test_no_copy_stands_in_front_of_a_kernel_or_behind_it(name: str, mask: str) -> None:
    module, x = layer(name, False)
    given = arguments(mask)
    with refusing():
        step(module, x, given, False)
    with torch.no_grad(), Copies() as copies, record() as calls:
        module(x, x, x, **given)
    assert copies.made == [] and calls[0].backend == name


@pytest.mark.parametrize("qk_norm", (None, "rms"))
@pytest.mark.parametrize("turned", (False, True))
def test_gradients_of_one_projection_are_not_copied_together(qk_norm: str | None, turned: bool) -> None:
    """flash4 writes them side by side, and with it the norms and the rotation; other kernels' are joined by a copy."""
    long = 2**22 // (3 * BATCH * HEADS * HEAD_DIM) + 1
    module, x = layer("flash4", True, seqlen=long, qk_norm=qk_norm, rotary=Rotary(HEAD_DIM) if turned else None)
    with refusing():
        out = module(x, x, x)[0]
    toward = torch.ones_like(out)
    with Copies() as copies:
        torch.autograd.grad(out, (x, module.in_proj_weight), toward)
    assert set(copies.made) <= ({"_to_copy"} if qk_norm else set())  # a sum as a norm's weight has it


def test_a_short_first_problem_waits_for_no_compiler() -> None:
    module, x = layer(None, True)
    with instead(Flash4()), record() as calls:  # one that has compiled nothing yet
        for mask in MASKS:
            step(module, x, arguments(mask), True)
    assert {call.backend for call in calls} <= {"sdpa", "flash2", "flash3"}

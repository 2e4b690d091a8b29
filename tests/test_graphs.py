"""A layer where PyTorch makes graphs of it or transforms it: compile, export, TorchScript, FX, torch.func, modes."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.fx
import torch.nn.functional as F
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.func import functional_call, grad, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from flashmha import AlibiBias, AttentionSpec, FlashMultiHeadAttention, Mask, RelativePositionBias, Rotary, Rule, Window
from flashmha.backends import get, register, unregister
from flashmha.backends.choice.builtin import BUILT_IN
from flashmha.backends.naive import Naive
from flashmha.testing import Blueprint, Call, ask, assert_same, blueprints, problems

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.*is deprecated:DeprecationWarning")

EXACT = (torch.float64,)
SIZED = {"batches": (2, 1, 3), "seqlens": (3, 1, 2, 5)}
MASKS_OF_ONE_TYPE = (
    ("none", "none"),
    ("bool", "none"),
    ("none", "bool 2-D"),
    ("none", "float 3-D"),
    ("bool", "bool causal"),
    ("float", "float 2-D"),
)
PARTS: tuple[dict[str, Any], ...] = (
    {},
    {"window": (2, 1)},
    {"num_kv_heads": 1},
    {"softcap": 3.0},
    {"sinks": torch.zeros(2)},
    {"position_bias": RelativePositionBias(2, num_buckets=8, max_distance=6)},
    {"position_bias": AlibiBias(2, learned=True), "causal": True},
    {"qk_norm": "rms", "rotary": Rotary(4), "causal": True},
)
HIDING = ("none", "bool 2-D", "float 2-D", "bool 3-D", "bool causal")

slow = settings(max_examples=3, phases=(Phase.explicit, Phase.generate))  # to shrink would compile for minutes
exact_problems = problems(layers=blueprints(dtypes=EXACT), batches=(2, None, 1), seqlens=(3, 1, 2, 5))


@contextlib.contextmanager
def quiet(call: Call) -> Iterator[None]:
    """Mixed masks warn, as ``test_module`` checks; here they may."""
    with warnings.catch_warnings():
        if call.mixed:
            warnings.filterwarnings("ignore", "Support for mismatched")
        yield


def arguments(blueprint: Blueprint, call: Call) -> dict[str, Any]:
    """Of a call by name; no tensor wants a gradient."""
    return dataclasses.replace(call, grad=False).arguments(blueprint)


def assert_outputs_agree(found: Any, wanted: Any) -> None:
    """Two pairs (output, weights) agree."""
    assert_same(found[0].detach(), wanted[0].detach(), "output")
    assert (found[1] is None) == (wanted[1] is None)
    if wanted[1] is not None:
        assert_same(found[1].detach(), wanted[1].detach(), "weights")


def gradients(layer: nn.Module, result: Any) -> dict[str, Tensor]:
    """The gradients of the parameters for the sum of squares of all that was returned."""
    layer.zero_grad()
    sum((tensor * tensor).sum() for tensor in result if tensor is not None).backward()
    return {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}


# torch.compile


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@given(
    problem=problems(layers=blueprints(dtypes=(torch.float32,)), **SIZED, blind=True),
    features=st.sampled_from(({}, {"window": (1, 1)}, {"backend": "sdpa"}, {"call_out_proj": True})),
)
@settings(slow, max_examples=5)
def test_a_compiled_layer_is_one_graph_with_the_numbers_of_the_eager_one(
    problem: tuple[Blueprint, Call], features: dict[str, Any]
) -> None:
    blueprint, call = problem
    assume(not call.mixed)  # the warning breaks a graph, in stock too
    torch._dynamo.reset()
    layer = blueprint.build(FlashMultiHeadAttention, **features).train(call.training)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    eager = layer(**arguments(blueprint, call))
    wanted = gradients(layer, eager)
    for _ in range(3):
        found = compiled(**arguments(blueprint, call))
    assert counter.frame_count == 1
    assert_outputs_agree(found, eager)
    for name, gradient in gradients(layer, found).items():
        assert_same(gradient, wanted[name], name)


@given(mask=st.builds(Window, st.none() | st.integers(0, 9), st.none() | st.integers(0, 9)), other=st.booleans())
@settings(slow, max_examples=4)
def test_one_frame_makes_a_mask_of_every_size(mask: Mask, other: bool) -> None:
    torch._dynamo.reset()
    counter, rule = CompileCounter(), mask & Rule(no_two_apart) if other else mask
    compiled = torch.compile(
        lambda x: rule.materialize(1, 1, x.shape[0], x.shape[1], x.device),
        fullgraph=True,
        backend=counter,
        dynamic=True,
    )
    for seqlen_q, seqlen_k in ((5, 6), (7, 9), (6, 11), (12, 13)):
        wanted = rule.materialize(1, 1, seqlen_q, seqlen_k)
        assert torch.equal(compiled(torch.empty(seqlen_q, seqlen_k, device=wanted.device)), wanted)
    assert counter.frame_count == 1


def no_two_apart(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return (query - key).abs() != 2


BOUNDS = st.none() | st.integers(0, 4)


@pytest.mark.parametrize("name", [kind.name for kind in BUILT_IN])
@given(
    window=st.builds(Window, BOUNDS, BOUNDS, align=st.sampled_from(("top_left", "bottom_right"))), longer=st.booleans()
)
@settings(slow, max_examples=4)
def test_one_frame_asks_about_windows_over_every_size(name: str, window: Mask, longer: bool) -> None:
    """Sizes so far apart that comparing them always says the same."""
    torch._dynamo.reset()
    counter = CompileCounter()

    def ask_about(q: Tensor, k: Tensor) -> Tensor:
        spec = AttentionSpec.of(q, k, k, mask=window)
        return q + len(get(name).why_not(spec) or "")

    compiled = torch.compile(ask_about, fullgraph=True, backend=counter, dynamic=True)
    for place in range(4):
        sizes = 5 + place, 11 + 3 * place
        q, k = (torch.empty(2 + place, size, 4, 64, dtype=torch.half) for size in (sizes[::-1] if longer else sizes))
        compiled(q, k)
    assert counter.frame_count == 1


@pytest.mark.parametrize("features", PARTS, ids=str)
@given(
    masks=st.sampled_from(MASKS_OF_ONE_TYPE),
    need_weights=st.booleans(),
    training=st.booleans(),
    seed=st.integers(0, 9),
)
# Dynamo keeps floats in tensors of the default type, which the suite makes one of the GPU there, and cannot read them
@torch._dynamo.config.patch(specialize_float=True)
@settings(slow, max_examples=2)
def test_one_frame_serves_every_size(
    features: dict[str, Any], need_weights: bool, training: bool, masks: tuple[str, str], seed: int
) -> None:
    torch._dynamo.reset()
    blueprint = Blueprint(dtype=torch.float64, seed=seed)  # masks hold -1e4, beside which float32 is coarse
    layer = blueprint.build(FlashMultiHeadAttention, **copy.deepcopy(features)).train(training)
    counter = CompileCounter()
    compiled = torch.compile(layer, fullgraph=True, backend=counter, dynamic=True)
    for batch, seqlen in ((2, 5), (3, 7), (4, 6), (5, 11)):
        call = Call(batch, seqlen, seqlen, "aaa", "contiguous", *masks, need_weights=need_weights, seed=seed)
        found = compiled(**arguments(blueprint, call))
        assert_outputs_agree(found, layer(**arguments(blueprint, call)))
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    "features",
    [
        {},
        {"num_kv_heads": 1},
        {"add_bias_kv": True},
        {"add_zero_attn": True},
        {"backend": "naive"},
        {"kdim": 3},
        {"skip_padding": True},
        {"window": (1, 1)},
    ],
    ids=str,
)
@given(
    seqlen=st.sampled_from((5, 70)),
    call=st.sampled_from((Call(), Call(padding="bool"), Call(attn_mask="bool 2-D"), Call(need_weights=False))),
    training=st.booleans(),
)
@settings(slow, max_examples=2)
def test_a_default_device_breaks_no_graph(features: dict[str, Any], seqlen: int, call: Call, training: bool) -> None:
    torch._dynamo.reset()
    blueprint = Blueprint()
    layer = blueprint.build(FlashMultiHeadAttention, **features).train(training)
    call = dataclasses.replace(call, seqlen_q=seqlen, seqlen_k=seqlen)
    given = arguments(blueprint, call)
    if "kdim" in features:
        given["key"] = given["key"][..., :3]
    eager = layer(**given)
    with torch.device(given["query"].device):  # a mode in Python, under which Dynamo traces Tensor's own methods
        found = torch.compile(layer, fullgraph=True, backend="aot_eager")(**given)
    assert_outputs_agree(found, eager)


@pytest.mark.parametrize("training", [False, True])
def test_inductor_gives_the_numbers_of_the_eager_layer(training: bool) -> None:
    blueprint, call = Blueprint(embed_dim=16), Call(2, 5, 5, "aaa", padding="bool", need_weights=False)
    layer = blueprint.build(FlashMultiHeadAttention).train(training)
    eager = layer(**arguments(blueprint, call))
    found = torch.compile(layer, fullgraph=True, backend="inductor")(**arguments(blueprint, call))
    assert_outputs_agree(found, eager)


@pytest.mark.parametrize("training", [False, True])
def test_a_compiled_layer_reads_attributes_set_between_calls(training: bool) -> None:
    blueprint, call = Blueprint(embed_dim=12), Call()
    layer = blueprint.build(FlashMultiHeadAttention).train(training)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for num_heads, window in ((2, None), (3, None), (3, (0, 0)), (2, None)):
        layer.num_heads, layer.window = num_heads, window
        assert_outputs_agree(compiled(**arguments(blueprint, call)), layer(**arguments(blueprint, call)))


def broken(name: str) -> Any:
    """A method of the layer, or of a backend, that breaks the graph first, as one that prints does."""

    def method(self: Any, *given: Any) -> Any:
        torch._dynamo.graph_break()
        return getattr(super(type(self), self), name)(*given)

    return method


class BrokenBackend(Naive):
    name = "broken"
    __call__ = broken("__call__")


@pytest.fixture(scope="module")
def broken_backend() -> Iterator[str]:
    """The name of a backend that nothing traces."""
    register(BrokenBackend)
    yield BrokenBackend.name
    unregister(BrokenBackend.name)


@pytest.mark.parametrize("broke", ["project", "process_heads", "merge", "backend"])
@given(problem=problems(layers=blueprints(dtypes=(torch.float32,)), **SIZED, blind=True))
@slow
def test_a_graph_broken_inside_a_layer_gives_the_numbers_of_the_eager_one(
    broken_backend: str, broke: str, problem: tuple[Blueprint, Call]
) -> None:
    blueprint, call = problem
    assume(not call.mixed)
    torch._dynamo.reset()
    kind = type("Broken", (FlashMultiHeadAttention,), {} if broke == "backend" else {broke: broken(broke)})
    layer = blueprint.build(kind, backend=broken_backend if broke == "backend" else None).train(call.training)
    counter = CompileCounterWithBackend("aot_eager")
    found = torch.compile(layer, backend=counter)(**arguments(blueprint, call))
    assert_outputs_agree(found, layer(**arguments(blueprint, call)))
    assert counter.frame_count > 1


# torch.export


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
@given(
    need_weights=st.booleans(),
    training=st.booleans(),
    padding=st.sampled_from(("none", "bool")),
    features=st.sampled_from(PARTS),
    seed=st.integers(0, 9),
)
@slow
def test_an_exported_layer_holds_aten_alone_and_takes_other_sizes(
    strict: bool, need_weights: bool, training: bool, padding: str, features: dict[str, Any], seed: int
) -> None:
    blueprint = Blueprint(seed=seed)
    layer = blueprint.build(FlashMultiHeadAttention, **copy.deepcopy(features)).train(training)
    # torch pads a mask for its GPU kernel to a multiple of 8 keys, and fixes the length it was exported with
    assume(next(layer.parameters()).device.type == "cpu" or (padding == "none" and "window" not in features))
    model = Exported(layer, need_weights).train(training)

    def made(batch: int, seqlen: int) -> tuple[Tensor, Tensor | None]:
        tensors = Call(batch, seqlen, seqlen, "aaa", padding=padding, grad=False, seed=seed).tensors(blueprint)
        return tensors.query, tensors.key_padding_mask

    batch, seqlen = torch.export.Dim("batch", min=2, max=64), torch.export.Dim("seqlen", min=2, max=64)
    sizes = {0: batch, 1: seqlen}
    program = torch.export.export(
        model, made(3, 5), dynamic_shapes=(sizes, sizes if padding != "none" else None), strict=strict
    )
    operators = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    outside = {name for name in operators if not name.startswith(("aten.", "<built-in function", "_operator"))}
    assert not outside
    assert not any("_native_multi_head_attention" in name for name in operators)
    for sizes_now in ((3, 5), (2, 9), (7, 2)):
        assert_outputs_agree(program.module()(*made(*sizes_now)), model(*made(*sizes_now)))


class Exported(nn.Module):
    """Self-attention with a padding mask as a model of two inputs."""

    def __init__(self, layer: FlashMultiHeadAttention, need_weights: bool) -> None:
        super().__init__()
        self.layer, self.need_weights = layer, need_weights

    def forward(self, x: Tensor, padding: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self.layer(x, x, x, key_padding_mask=padding, need_weights=self.need_weights)


# TorchScript


@given(
    problem=problems(layers=blueprints(dtypes=EXACT, bias=(True,)), **SIZED, attn_masks=HIDING, blind=True),
    saved=st.booleans(),
)
@settings(max_examples=15)
def test_a_scripted_layer_answers_like_the_eager_one(problem: tuple[Blueprint, Call], saved: bool) -> None:
    blueprint, call = problem
    assume(not call.mixed)
    layer = blueprint.build(FlashMultiHeadAttention).train(call.training)
    scripted: Any = torch.jit.script(layer)
    if saved:
        file = io.BytesIO()
        torch.jit.save(scripted, file)
        file.seek(0)
        scripted = torch.jit.load(file)
    wanted = layer(**arguments(blueprint, call))
    found = scripted(**arguments(blueprint, call))
    assert_outputs_agree(found, wanted)
    other = gradients(layer, layer(**arguments(blueprint, call)))
    for name, gradient in gradients(scripted, scripted(**arguments(blueprint, call))).items():
        if name in other:
            assert_same(gradient, other[name], name)


@given(problem=problems(layers=blueprints(dtypes=EXACT, bias=(True,)), **SIZED), training=st.booleans())
@settings(max_examples=8)
def test_one_scripted_layer_goes_between_train_and_eval(problem: tuple[Blueprint, Call], training: bool) -> None:
    blueprint, call = problem
    assume(not call.mixed)
    layer = dataclasses.replace(blueprint, dropout=1.0).build(FlashMultiHeadAttention)
    scripted: Any = torch.jit.script(layer)
    for mode in (training, not training):
        layer.train(mode)
        scripted.train(mode)
        assert_outputs_agree(
            (scripted(**arguments(blueprint, call))[0], None), (layer(**arguments(blueprint, call))[0], None)
        )


@given(problem=problems(layers=blueprints(dtypes=EXACT), **SIZED, sharings=("aaa", "abc"), blind=True))
@settings(max_examples=15)
def test_a_traced_layer_answers_like_the_eager_one(problem: tuple[Blueprint, Call]) -> None:
    blueprint, call = problem
    layer = blueprint.build(FlashMultiHeadAttention).train(call.training)
    model = Closed(layer, call)
    tensors = dataclasses.replace(call, grad=False).tensors(blueprint)
    given_tensors = {
        name: tensor
        for name, tensor in {**dict(zip(("query", "key", "value"), tensors.inputs)), **tensors.masks}.items()
        if tensor is not None
    }
    with quiet(call), warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        traced = torch.jit.trace(model, example_kwarg_inputs=given_tensors, check_trace=False)
        found, wanted = traced(**given_tensors), model(**given_tensors)
    for mine, theirs in zip(found, wanted, strict=True):
        assert_same(mine.detach(), theirs.detach(), "traced")


class Closed(nn.Module):
    """A layer with its flags, of tensors alone, returning tensors alone."""

    def __init__(self, layer: FlashMultiHeadAttention, call: Call) -> None:
        super().__init__()
        self.layer, self.flags = layer, call.flags()

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        masks = {"key_padding_mask": key_padding_mask, "attn_mask": attn_mask}
        return tuple(x for x in self.layer(query, key, value, **masks, **self.flags) if x is not None)


@given(
    features=st.sampled_from(({"window": (1, 0)}, {"num_kv_heads": 1}, {"backend": "naive"}, {"call_out_proj": True})),
    way=st.sampled_from(("script", "trace")),
    training=st.booleans(),
)
@settings(max_examples=10)
def test_a_layer_with_features_refuses_torch_jit_loudly(features: dict[str, Any], way: str, training: bool) -> None:
    layer, x = FlashMultiHeadAttention(4, 2, **features).train(training), torch.ones(3, 2, 4)
    (name,) = features
    with pytest.raises(RuntimeError, match=rf"has no {name}, .* uses that; use torch\.compile or torch\.export"):
        if way == "script":
            torch.jit.script(layer)(x, x, x)
        else:
            torch.jit.trace(layer, (x, x, x))


# FX


@given(
    problem=exact_problems,
    features=st.sampled_from(({}, {"window": (1, 1)}, {"num_kv_heads": 1}, {"backend": "naive"})),
)
@settings(max_examples=20)
def test_fx_traces_a_model_that_holds_the_layer(problem: tuple[Blueprint, Call], features: dict[str, Any]) -> None:
    blueprint, call = problem
    layer = blueprint.build(FlashMultiHeadAttention, **features)
    model = Masked(layer, call)
    traced = torch.fx.symbolic_trace(model)
    for training in (True, False):
        model.train(training)
        traced.train(training)
        tensors = dataclasses.replace(call, grad=False).tensors(blueprint)
        given_tensors = (*tensors.inputs, tensors.key_padding_mask, tensors.attn_mask)
        with quiet(call):
            assert_outputs_agree(traced(*given_tensors), model(*given_tensors))
    assert {id(parameter) for parameter in traced.parameters()} == {id(parameter) for parameter in model.parameters()}


class Masked(nn.Module):
    """A layer with its flags as a model that FX can trace."""

    def __init__(self, layer: FlashMultiHeadAttention, call: Call) -> None:
        super().__init__()
        self.layer, self.flags = layer, call.flags()

    def forward(self, query: Tensor, key: Tensor, value: Tensor, padding: Any, attn_mask: Any) -> Any:
        output, weights = self.layer(query, key, value, padding, attn_mask=attn_mask, **self.flags)
        return output + 0, weights


# torch.func and higher derivatives


@given(problem=exact_problems, scale=st.sampled_from((0.5, -2.0)))
def test_functional_call_uses_the_parameters_it_is_given(problem: tuple[Blueprint, Call], scale: float) -> None:
    blueprint, call = problem
    layer = blueprint.build(FlashMultiHeadAttention).train(call.training)
    parameters = {name: parameter.detach() * scale for name, parameter in layer.named_parameters()}
    other = blueprint.build(FlashMultiHeadAttention).train(call.training)
    other.load_state_dict(parameters)
    with quiet(call):
        found = functional_call(layer, parameters, (), arguments(blueprint, call))
        assert_outputs_agree(found, other(**arguments(blueprint, call)))


vmap_problems = problems(
    layers=blueprints(dtypes=EXACT), batches=(2, None, 1), seqlens=(3, 1, 2), layouts=("contiguous",)
)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@given(problem=vmap_problems, count=st.sampled_from((2, 1, 3)), tracked=st.booleans())
@settings(max_examples=30)
def test_vmap_over_inputs_is_a_loop(problem: tuple[Blueprint, Call], count: int, tracked: bool) -> None:
    blueprint, call = problem
    layer = blueprint.build(FlashMultiHeadAttention).train(call.training)
    good = arguments(blueprint, call)
    stacked = torch.stack([good["query"] * (1 + i) for i in range(count)])
    rest = {name: value for name, value in good.items() if name not in ("query", "key", "value")}
    inputs = (good["key"], good["value"])

    def one_output(query: Tensor) -> Tensor:
        key, value = (query, query) if call.sharing == "aaa" else inputs
        return layer(query, key, value, **rest)[0]

    with quiet(call), torch.set_grad_enabled(tracked):
        found = vmap(one_output)(stacked)
        wanted = torch.stack([one_output(query) for query in stacked])
    assert_same(found.detach(), wanted.detach(), "output")


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@given(problem=vmap_problems)
@settings(max_examples=20)
def test_per_sample_gradients_are_gradients_of_samples(problem: tuple[Blueprint, Call]) -> None:
    blueprint, call = problem
    call = dataclasses.replace(call, need_weights=True, is_causal=False)
    layer = blueprint.build(FlashMultiHeadAttention).train(call.training)
    good = arguments(blueprint, call)
    query = good["query"]
    queries = torch.stack((query, 2 * query, query - 1))
    rest = {name: value for name, value in good.items() if name != "query"}
    parameters = dict(layer.named_parameters())

    def loss(values: dict[str, Tensor], query: Tensor) -> Tensor:
        return functional_call(layer, values, (query,), rest)[0].square().sum()

    detached = {name: parameter.detach() for name, parameter in parameters.items()}
    with quiet(call):
        found = vmap(grad(loss), in_dims=(None, 0))(detached, queries)
        for place, sample in enumerate(queries):
            layer.zero_grad()
            loss(parameters, sample).backward()
            for name, parameter in parameters.items():
                wanted = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                assert_same(found[name][place], wanted, name)


@given(problem=exact_problems, seed=st.integers(0, 99))
@settings(max_examples=25)
def test_forward_derivatives_are_the_backward_ones(problem: tuple[Blueprint, Call], seed: int) -> None:
    blueprint, call = problem
    call = dataclasses.replace(call, need_weights=True)
    layer = blueprint.build(FlashMultiHeadAttention).train(call.training)
    good = arguments(blueprint, call)
    x = good.pop("query").clone()
    torch.manual_seed(seed)
    direction = torch.randn_like(x)

    def outputs(query: Tensor) -> tuple[Tensor, Tensor]:
        return layer(query, **good)

    with quiet(call):
        values, tangents = jvp(outputs, (x,), (direction,))
        query = x.requires_grad_()
        for tangent, value, again in zip(tangents, values, outputs(query), strict=True):
            cotangent = torch.randn_like(value)
            (backward,) = torch.autograd.grad(again, query, cotangent, retain_graph=True)
            forward_mode, reverse_mode = (tangent * cotangent).sum(), (backward * direction).sum()
            assert_same(forward_mode.detach(), reverse_mode.detach(), "derivative")


@given(
    problem=problems(
        layers=blueprints(dtypes=EXACT, heads=(1, 2), head_dims=(1, 2)),
        batches=(2, None, 1),
        seqlens=(2, 1, 3),
        layouts=("contiguous",),
        need_weights=(True,),
        blind=True,
    )
)
@settings(max_examples=6)
def test_a_layer_with_weights_can_be_differentiated_twice(problem: tuple[Blueprint, Call]) -> None:
    blueprint, call = problem
    layer = blueprint.build(FlashMultiHeadAttention).train(call.training)
    good = arguments(blueprint, call)
    query = good.pop("query").clone().requires_grad_()

    def output(query: Tensor) -> Tensor:
        return layer(query, **good)[0]

    with quiet(call):
        assert torch.autograd.gradgradcheck(output, (query,))


@given(problem=exact_problems, p=st.sampled_from((0.0, 0.5)), reentrant=st.booleans())
@settings(max_examples=25)
def test_checkpoint_draws_the_same_dropout_again(problem: tuple[Blueprint, Call], p: float, reentrant: bool) -> None:
    blueprint, call = problem
    layer = dataclasses.replace(blueprint, dropout=p).build(FlashMultiHeadAttention)
    good = arguments(blueprint, call)
    rest = {name: value for name, value in good.items() if name != "query"}

    def run(query: Tensor) -> Tensor:
        return layer(query, **rest)[0]

    found = []
    with quiet(call):
        for recompute in (True, False):
            torch.manual_seed(call.seed)
            query = good["query"].clone().requires_grad_()
            output = checkpoint(run, query, use_reentrant=reentrant) if recompute else run(query)
            torch.rand(3)
            found.append((gradients(layer, (output,)), query.grad))
    (parameters, mine), (wanted, theirs) = found
    assert_same(mine, theirs, "query")
    for name, gradient in wanted.items():
        assert_same(parameters[name], gradient, name)


# autocast, meta, fake tensors


@given(
    problem=problems(
        layers=blueprints(dtypes=(torch.float32,)), **SIZED, paddings=("none", "bool"), attn_masks=HIDING, grad=(False,)
    ),
)
def test_autocast_gives_the_dtypes_of_stock_and_the_values(problem: tuple[Blueprint, Call]) -> None:
    """The values of float32, which stock misses beside a float mask that shifts a row far."""
    blueprint, call = problem
    assume(not (call.hint_alone and blueprint.extra_columns))
    stock = blueprint.build()
    ours = blueprint.build(FlashMultiHeadAttention)
    exact = ask(stock, call, call.tensors(blueprint))
    with torch.autocast(exact["output"].device.type, torch.bfloat16):
        found, wanted = ask(ours, call, call.tensors(blueprint)), ask(stock, call, call.tensors(blueprint))
    for name in ("output", "weights"):
        if wanted[name] is None:
            continue
        assert found[name].dtype == wanted[name].dtype, name
        scale = max(1.0, exact[name].abs().max().item())
        torch.testing.assert_close(found[name].float(), exact[name], atol=0.1 * scale, rtol=0.0)


@given(problem=problems(), way=st.sampled_from(("meta", "fake")), training=st.booleans())
def test_meta_and_fake_tensors_get_the_shapes_of_real_ones(
    problem: tuple[Blueprint, Call], way: str, training: bool
) -> None:
    blueprint, call = problem
    real = blueprint.build(FlashMultiHeadAttention).train(training)
    good = arguments(blueprint, call)
    with quiet(call):
        wanted = real(**good)
        if way == "meta":
            layer = FlashMultiHeadAttention(**{**blueprint.arguments, "device": "meta"}).train(training)
            moved: dict[int, Tensor] = {}
            sent = {
                name: moved.setdefault(id(value), value.to("meta")) if isinstance(value, Tensor) else value
                for name, value in good.items()
            }
            found = layer(**sent)
        else:
            with FakeTensorMode() as mode:
                layer = FlashMultiHeadAttention(**blueprint.arguments).train(training)
                sent = {
                    name: mode.from_tensor(value) if isinstance(value, Tensor) else value
                    for name, value in good.items()
                }
                found = layer(**sent)
    for mine, theirs in zip(found, wanted, strict=True):
        assert (mine is None) == (theirs is None)
        if theirs is not None:
            assert (mine.shape, mine.dtype) == (theirs.shape, theirs.dtype)
            assert mine.device.type == ("meta" if way == "meta" else theirs.device.type)


# Subclasses and modes


class Watching(Tensor):
    """A tensor that writes down the functions it sees."""

    seen: list[str] = []

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.seen.append(getattr(func, "__name__", str(func)))
        return super().__torch_function__(func, types, args, kwargs or {})


@given(
    problem=problems(layers=blueprints(dtypes=EXACT), **SIZED, sharings=("abc", "aaa"), attn_masks=HIDING, blind=True),
    which=st.sampled_from(("query", "weight")),
)
@settings(max_examples=25)
def test_a_tensor_subclass_sees_multi_head_attention_forward(problem: tuple[Blueprint, Call], which: str) -> None:
    blueprint, call = problem
    assume(not call.mixed)
    layer = blueprint.build(FlashMultiHeadAttention).train(call.training)
    good = arguments(blueprint, call)
    wanted = layer(**good)
    if which == "query":
        watched = good["query"].as_subclass(Watching)
        for name in ("query", "key", "value") if call.sharing == "aaa" else ("query",):
            good[name] = watched
    else:
        assume(layer.in_proj_weight is not None)
        weight = layer.in_proj_weight.detach()
        del layer.in_proj_weight
        layer.in_proj_weight = weight.as_subclass(Watching)
    Watching.seen.clear()
    found = layer(**good)
    assert "multi_head_attention_forward" in Watching.seen
    assert_same(found[0].detach().as_subclass(Tensor), wanted[0].detach(), "output")


@given(features=st.sampled_from(({"window": (1, 0)}, {"num_kv_heads": 1}, {"backend": "naive"})))
@settings(max_examples=6)
def test_a_layer_with_features_does_not_lose_them_to_a_tensor_subclass(features: dict[str, Any]) -> None:
    layer, x = FlashMultiHeadAttention(4, 2, **features), torch.ones(3, 2, 4).as_subclass(Watching)
    with pytest.raises(RuntimeError, match=next(iter(features))):
        layer(x, x, x)


class Passing(TorchFunctionMode):
    """A mode that changes nothing."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@given(
    problem=problems(),
    context=st.sampled_from(("mode", "cpu", "meta")),
    features=st.sampled_from(({}, {"window": (1, 1)})),
)
def test_a_layer_works_under_modes_and_device_contexts(
    problem: tuple[Blueprint, Call], context: str, features: dict[str, Any]
) -> None:
    blueprint, call = problem
    call = dataclasses.replace(call, grad=False)
    layer = blueprint.build(FlashMultiHeadAttention, **features)
    tensors = call.tensors(blueprint)
    wanted = ask(layer, call, tensors)
    with Passing() if context == "mode" else torch.device(context):
        found = ask(layer, call, tensors)
    for name, tensor in wanted.tensors.items():
        if tensor is not None:
            assert_same(found[name], tensor, name)


@given(problem=problems(grad=(True,)), p=st.sampled_from((0.0, 0.3)))
def test_deterministic_algorithms_give_bit_equal_gradients(problem: tuple[Blueprint, Call], p: float) -> None:
    blueprint, call = problem
    layer = dataclasses.replace(blueprint, dropout=p).build(FlashMultiHeadAttention)
    torch.use_deterministic_algorithms(True)
    try:
        answers = []
        for _ in range(2):
            torch.manual_seed(call.seed)
            answers.append(ask(layer, call, call.tensors(blueprint)))
    finally:
        torch.use_deterministic_algorithms(False)
    for name, tensor in answers[0].tensors.items():
        if tensor is not None:
            assert torch.equal(answers[1][name], tensor), name


@given(problem=problems(layers=blueprints(dtypes=EXACT)), training=st.booleans())
@settings(max_examples=20)
def test_the_switch_of_the_stock_fast_path_changes_nothing(problem: tuple[Blueprint, Call], training: bool) -> None:
    blueprint, call = problem
    call = dataclasses.replace(call, training=training, grad=False)
    layer = blueprint.build(FlashMultiHeadAttention)
    wanted = ask(layer, call, call.tensors(blueprint))
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        found = ask(layer, call, call.tensors(blueprint))
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    assert torch.equal(found["output"], wanted["output"])


@given(problem=exact_problems)
@settings(slow, max_examples=10)
def test_make_fx_records_a_graph_that_answers_alike(problem: tuple[Blueprint, Call]) -> None:
    blueprint, call = problem
    layer = blueprint.build(FlashMultiHeadAttention).train(call.training)
    good = arguments(blueprint, call)
    rest = {name: value for name, value in good.items() if name not in ("query", "key", "value")}

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.relu(layer(query, key, value, **rest)[0])

    inputs = (good["query"], good["key"], good["value"])
    with quiet(call):
        found = make_fx(run)(*inputs)(*inputs)
        assert_same(found.detach(), run(*inputs).detach(), "output")

"""Attention weights that are computed when they are read: what they are, what they cost, what they survive."""

import copy
import dataclasses
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import fewer
from functorch.compile import aot_function, nop
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import flashmha
from flashmha import AttentionSpec, Backend, FlashMultiHeadAttention, Rule, register
from flashmha.backends import get, unregister
from flashmha.testing import noise, seeds
from flashmha.testing.record import placed
from flashmha.weights import attend
from flashmha.weights.deferred import Deferred


@dataclasses.dataclass(frozen=True)
class Case:
    """A call that asks for weights: no row is blind, so that the stock layer has numbers everywhere."""

    batch: int = 2
    seqlen_q: int = 5
    seqlen_k: int = 7
    heads: int = 2
    average: bool = True
    batched: bool = True
    mask: str = "none"
    padding: str = "none"
    backend: str | None = None
    seed: int = 0

    def layers(self, dtype: torch.dtype = torch.float64) -> tuple[nn.MultiheadAttention, FlashMultiHeadAttention]:
        torch.manual_seed(self.seed)
        stock = nn.MultiheadAttention(4 * self.heads, self.heads, batch_first=True, dtype=dtype)
        ours = FlashMultiHeadAttention.from_torch(stock)
        ours.backend = self.backend
        return stock, ours

    def call(self, dtype: torch.dtype = torch.float64) -> tuple[dict[str, Any], list[Tensor]]:
        """The call's arguments, and what wants a gradient."""
        generator = torch.Generator("cpu").manual_seed(self.seed)
        where = {"generator": generator, "device": "cpu"}

        def noise(*shape: int) -> Tensor:
            made = torch.randn(shape, **where, dtype=torch.float64).to(placed(None), dtype)
            return made if self.batched else made[0]

        query = noise(self.batch, self.seqlen_q, 4 * self.heads).requires_grad_()
        key = noise(self.batch, self.seqlen_k, 4 * self.heads).requires_grad_()
        hidden = torch.rand(self.seqlen_q, self.seqlen_k, **where).to(placed(None)) < 0.5
        hidden[:, 0] = False
        padded = torch.rand(self.batch, self.seqlen_k, **where).to(placed(None)) < 0.4
        padded[:, 0] = False
        wanted = [query, key]
        call: dict[str, Any] = {"query": query, "key": key, "value": key, "average_attn_weights": self.average}
        if self.mask == "bool":
            call["attn_mask"] = hidden
        elif self.mask == "causal":
            call["attn_mask"] = torch.ones(self.seqlen_q, self.seqlen_k, dtype=torch.bool).triu(1)
        elif self.mask != "none":
            call["attn_mask"] = torch.randn(hidden.shape, **where, dtype=torch.float64).to(placed(None), dtype)
            if self.mask == "learned":
                wanted.append(call["attn_mask"].requires_grad_())
        if self.padding != "none":
            padded = padded if self.batched else padded[0]
            floating = torch.zeros(padded.shape, dtype=dtype).masked_fill(padded, float("-inf"))
            call["key_padding_mask"] = padded if self.padding == "bool" else floating
        return call, wanted


@st.composite
def cases(draw: st.DrawFn, **fixed: Any) -> Case:
    batched = draw(st.booleans())
    mask = draw(st.sampled_from(("none", "bool", "causal", "float", "learned")))
    drawn = {
        "batch": draw(st.integers(1, 3)) if batched else 1,
        "seqlen_q": draw(st.integers(1, 33)),
        "seqlen_k": draw(st.integers(1, 33)),
        "heads": draw(st.integers(1, 5)),
        "average": draw(st.booleans()),
        "batched": batched,
        "mask": mask,
        # stock warns beside masks of two types
        "padding": draw(st.sampled_from(("none", "float" if mask in ("float", "learned") else "bool"))),
        "backend": draw(st.sampled_from((None, "sdpa", "naive"))),
        "seed": draw(seeds()),
    }
    return Case(**{**drawn, **fixed})


def cotangents(case: Case, *tensors: Tensor) -> list[Tensor]:
    return [noise(case.seed + 1 + place, *x.shape, dtype=x.dtype) for place, x in enumerate(tensors)]


def assert_as_stock(case: Case) -> None:
    answers = []
    for layer in case.layers():
        call, wanted = case.call()
        out, seen = layer(**call)
        grads = torch.autograd.grad((out, seen), [*wanted, *layer.parameters()], cotangents(case, out, seen))
        answers.append((out, seen, *grads))
    for theirs, ours in zip(*answers):
        torch.testing.assert_close(+ours, theirs, atol=1e-10, rtol=1e-10)


@given(case=cases())
def test_values_and_gradients_are_those_of_the_stock_layer(case: Case) -> None:
    assert_as_stock(case)


@fewer(8)
@given(case=st.integers(17, 40).flatmap(lambda rows: cases(seqlen_q=rows, seqlen_k=2**15 + rows, batch=1)))
def test_a_map_of_several_blocks_is_that_of_the_stock_layer(case: Case) -> None:
    assert_as_stock(case)


@given(case=cases())
def test_both_can_be_differentiated_twice(case: Case) -> None:
    answers = []
    for layer in case.layers():
        call, wanted = case.call()
        out, seen = layer(**call)
        first = torch.autograd.grad((out, seen), wanted, cotangents(case, out, seen), create_graph=True)
        answers.append(torch.autograd.grad(first, wanted, cotangents(case, *first), allow_unused=True))
    for theirs, ours in zip(*answers):
        if theirs is None or ours is None:
            assert (theirs if ours is None else ours) is None or not (theirs if ours is None else ours).any()
        else:
            torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-9)


class Once(torch.autograd.Function):
    """Attention as fused kernels are: its backward cannot be differentiated."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
        ctx.spec = spec
        ctx.save_for_backward(q, k, v)
        return get("naive")(q, k, v, spec)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        inputs = [x.detach().requires_grad_() for x in ctx.saved_tensors]
        with torch.enable_grad():
            out = get("naive")(*inputs, ctx.spec)
        return *torch.autograd.grad(out, inputs, grad), None


class Fused(Backend):
    name = "fused"
    limits = get("naive").limits

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
        return Once.apply(q, k, v, spec.changed(need_lse=False))

    def limits_exceeded(self, spec: AttentionSpec) -> list[str]:
        return super().limits_exceeded(spec) + (["no lse"] if spec.need_lse else [])


@given(case=cases(backend="fused", mask="none"), look=st.booleans())
def test_an_output_of_a_fused_kernel_can_be_differentiated_twice(case: Case, look: bool) -> None:
    answers = []
    register(Fused)
    try:
        for layer in case.layers():
            call, wanted = case.call()
            found = layer(**call)[: 1 + look]
            once = torch.autograd.grad(found, wanted, cotangents(case, *found), retain_graph=True)
            first = torch.autograd.grad(found, wanted, cotangents(case, *found), create_graph=True)
            answers.append((*once, *first, *torch.autograd.grad(first, wanted, cotangents(case, *first))))
    finally:
        unregister("fused")
    for theirs, ours in zip(*answers):
        torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-9)


class Akin(FlashMultiHeadAttention):
    """Heads made of one another, as a layer's own hops may make them."""

    kin = ""

    def process_heads(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.kin == "keys are queries":
            return q, q, v
        return (q, k, k) if self.kin == "values are keys" else (q, k, v)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, bias: Any = None, **call: Any) -> Tensor:
        if self.kin == "a bias of keys":
            bias = flashmha.TensorBias(k.sum(-1).transpose(1, 2)[:, :, None]) + bias
        return super().attend(q, k, v, bias=bias, **call)


@given(
    kin=st.sampled_from(("keys are queries", "values are keys", "a bias of keys")),
    backend=st.sampled_from((None, "naive", "fused")),
    seqlen=st.sampled_from((3, 60)),  # weights at once, and those that wait
    average=st.booleans(),
    look=st.booleans(),
    seed=seeds(),
)
def test_heads_made_of_one_another_get_their_gradient_once(
    kin: str, backend: str | None, seqlen: int, average: bool, look: bool, seed: int
) -> None:
    assume((kin, backend) != ("a bias of keys", "fused"))  # which has no gradient of a bias
    torch.manual_seed(seed)
    layer = Akin(8, 2, batch_first=True, dtype=torch.float64)
    layer.kin = kin
    x = noise(seed, 1, seqlen, 8, dtype=torch.float64).requires_grad_()
    register(Fused)
    try:
        found = layer(x, x, x, average_attn_weights=average, backend=backend)[: 1 + look]
        toward = [noise(seed + 1 + i, *one.shape, dtype=one.dtype) for i, one in enumerate(found)]
        (once,) = torch.autograd.grad(found, x, toward, retain_graph=True)
        (again,) = torch.autograd.grad(found, x, toward, create_graph=True)
        (many,) = torch.autograd.grad(found, x, [one[None] for one in toward], is_grads_batched=True)
    finally:
        unregister("fused")
    torch.testing.assert_close(again, once, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(many[0], once, atol=1e-9, rtol=1e-9)


class Largest(TorchDispatchMode):
    """The most elements any operator's result held, also inside of a deferred tensor, and the operators that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0
        self.ran: set[Any] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(type(x) is Deferred for x in torch.utils._pytree.tree_leaves((args, kwargs))):
            with self:
                return Deferred.__torch_dispatch__(func, types, args, kwargs)
        self.ran.add(func.overloadpacket)
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor) and not isinstance(tensor, Deferred) and not tensor.is_meta:
                held = [size for size, stride in zip(tensor.shape, tensor.stride()) if stride]  # others are expanded
                self.numel = max(self.numel, math.prod(held))
        return result


@pytest.mark.parametrize("training", (True, False))
@pytest.mark.parametrize("look", (False, True))
@pytest.mark.cpu("blocks of a size for a CPU; test_tiles asks how much a GPU holds")
@given(heads=st.integers(2, 4), seqlen=st.integers(64, 96), masked=st.booleans(), seed=seeds())
def test_no_tensor_is_as_large_as_all_the_weights(
    look: bool, training: bool, heads: int, seqlen: int, masked: bool, seed: int
) -> None:
    case = Case(batch=1, seqlen_q=seqlen, seqlen_k=seqlen, heads=heads, mask="bool" if masked else "none", seed=seed)
    layer = case.layers(torch.float32)[1].train(training)
    call, _ = case.call(torch.float32)
    with Largest() as largest, torch.set_grad_enabled(training):
        out, seen = layer(**call)
        asked = (out.sum() + (seen**2).sum()) if look else out.sum()
        if training:
            asked.backward()
    assert largest.numel < heads * seqlen * seqlen, "a tensor held (batch, heads, seqlen_q, seqlen_k)"
    if not look and not masked:
        assert largest.numel < seqlen * seqlen, "the weights were computed and not read"


@given(case=cases(mask="float"), training=st.booleans())
def test_masks_that_change_after_the_call_change_no_weights(case: Case, training: bool) -> None:
    layer = case.layers()[1].train(training)
    call, _ = case.call()
    call = {name: value.detach() if isinstance(value, Tensor) else value for name, value in call.items()}
    with torch.set_grad_enabled(training):
        expected = layer(**call)[1].clone()
        seen = layer(**call)[1]
        for name in ("attn_mask", "key_padding_mask", "query", "key"):
            if name in call:
                call[name].fill_(1.0)
        for parameter in layer.parameters():
            parameter.data.zero_()
        torch.testing.assert_close(seen.detach().clone(), expected.detach(), atol=0.0, rtol=0.0)


REACH = torch.zeros((), dtype=torch.int64)


def test_what_a_rule_reads_or_a_caller_keeps_changes_no_weights_later() -> None:
    """A tensor, a number or an object that a rule captures or finds; keys and values that were handed in."""
    layer, x = FlashMultiHeadAttention(32, 4, batch_first=True), torch.randn(1, 64, 32)
    held, reach = [3], 3

    def near(batch: Tensor, head: Tensor, q_pos: Tensor, k_pos: Tensor) -> Tensor:
        return (q_pos - k_pos).abs() <= reach

    def listed(batch: Tensor, head: Tensor, q_pos: Tensor, k_pos: Tensor) -> Tensor:
        return (q_pos - k_pos).abs() <= held[0]

    rules = [
        Rule(near),
        Rule(listed),
        Rule(lambda batch, head, q_pos, k_pos: (q_pos - k_pos).abs() <= REACH),
        Rule(lambda batch, head, q_pos, k_pos, held=held: (q_pos - k_pos).abs() <= held[0]),
        Rule(lambda batch, head, q_pos, k_pos: near(batch, head, q_pos, k_pos) & (k_pos > 0)),
    ]
    expected = [layer(x, x, x, attn_mask=rule)[1].clone() for rule in rules]
    seen = [layer(x, x, x, attn_mask=rule)[1] for rule in rules]
    kv = layer.keys_values(x)
    expected.append(layer(x, x, x, kv=kv)[1].clone())
    seen.append(layer(x, x, x, kv=kv)[1])
    held[0], reach = 9, 9
    REACH.fill_(9)
    kv[0].data.fill_(1.0)
    try:
        for mine, wanted in zip(seen, expected):
            torch.testing.assert_close(mine.clone(), wanted, atol=0.0, rtol=0.0)
    finally:
        REACH.zero_()


class Cached(FlashMultiHeadAttention):
    """Keys and values of every call so far, in one buffer that is written in place."""

    def process_heads(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if "keys" not in vars(self):
            self.keys = torch.zeros(2, k.shape[0], 8, *k.shape[2:], dtype=k.dtype)
            self.length = 0
        self.length += k.shape[1]
        self.keys[0, :, self.length - k.shape[1] : self.length] = k
        self.keys[1, :, self.length - k.shape[1] : self.length] = v
        return q, self.keys[0, :, : self.length], self.keys[1, :, : self.length]


@pytest.mark.parametrize("context", (torch.no_grad, torch.inference_mode))
def test_a_cache_that_changes_after_the_call_changes_no_weights(context: Callable[[], Any]) -> None:
    torch.manual_seed(0)
    layer = Cached(8, 2, batch_first=True).eval()
    with context():
        first, second = torch.randn(1, 3, 8), torch.randn(1, 2, 8)
        expected = copy.deepcopy(layer)(first, first, first)[1].clone()
        seen = layer(first, first, first)[1]
        layer(second, second, second)
        layer.keys.zero_()
        torch.testing.assert_close(seen.clone(), expected)


LOOKS: dict[str, Callable[[Tensor], Any]] = {
    "repr": repr,
    "numpy": lambda x: x.detach().numpy(force=True),
    "array": lambda x: np.asarray(x.detach().cpu()),
    "tolist": lambda x: x.tolist(),
    "item": lambda x: x[0, 0, 0].item(),
    "deepcopy": lambda x: copy.deepcopy(x.detach()),
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
    "iteration": list,
    "stack": lambda x: torch.stack([x, x]),
    "out": lambda x: torch.empty(0).new_empty(x.shape).copy_(x),
    "vmap": lambda x: torch.vmap(lambda row: row.sum())(x),
    "equal": lambda x: torch.equal(x, x.clone()),
    "dlpack": lambda x: torch.from_dlpack(x.detach()),
    "to": lambda x: x.to(torch.float64),
}


@pytest.mark.parametrize("name", LOOKS)
def test_a_look_sees_an_ordinary_tensor(name: str) -> None:
    case = Case()
    call, _ = case.call(torch.float32)
    seen = case.layers(torch.float32)[1](**call)[1]
    expected = seen.clone().detach()
    found, wanted = LOOKS[name](seen), LOOKS[name](expected.requires_grad_())
    if name == "repr":
        assert str(found).split("grad_fn")[0] == str(wanted.replace("requires_grad", "grad_fn")).split("grad_fn")[0]
    elif isinstance(found, (np.ndarray, float, bool)) or name == "tolist":
        np.testing.assert_array_equal(found, wanted)
    else:
        torch.testing.assert_close(found, wanted)


EXPONENTIALS = (torch.ops.aten.exp2, torch.ops.aten.exp2_, torch.ops.aten._softmax)
"""Operators without which weights are not made."""


@pytest.mark.cpu("watches operators on a CPU")
def test_shapes_and_hooks_compute_nothing() -> None:
    case = Case(seqlen_q=64, seqlen_k=64)
    layer = case.layers()[1]
    fired = []
    layer.register_full_backward_hook(lambda *_: fired.append(True))
    layer.register_forward_hook(lambda module, arguments, output: None)
    call, _ = case.call()
    with Largest() as largest:
        out, seen = layer(**call)
        assert (seen.shape, seen.dtype, seen.device.type, seen.requires_grad) == (
            (2, 64, 64),
            torch.float64,
            placed(None).type,
            True,
        )
        out.sum().backward()
        assert fired and largest.ran.isdisjoint(EXPONENTIALS)
        torch.testing.assert_close(seen.detach().sum(dim=-1), torch.ones(2, 64, dtype=torch.float64))
        assert not largest.ran.isdisjoint(EXPONENTIALS)


def test_saved_weights_load_as_an_ordinary_tensor() -> None:
    case = Case()
    seen = case.layers()[1](**case.call()[0])[1]
    file = io.BytesIO()
    torch.save(seen, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert type(loaded) is Tensor and loaded.requires_grad
    torch.testing.assert_close(loaded, seen.clone())


def test_a_change_in_place_stays() -> None:
    case = Case()
    with torch.no_grad():
        seen = case.layers()[1](**case.call()[0])[1]
        before = seen.clone()
        seen.mul_(2.0).add_(1.0)
        seen[0, 0, 0] = 5.0
        expected = before * 2.0 + 1.0
        expected[0, 0, 0] = 5.0
        torch.testing.assert_close(seen.clone(), expected)


@pytest.mark.parametrize("reentrant", (True, False))
@given(case=cases(mask="none"))
def test_checkpoints_recompute_the_same(reentrant: bool, case: Case) -> None:
    layer = case.layers()[1]
    answers = []
    for recompute in (False, True):
        call, wanted = case.call()
        rest = {name: value for name, value in call.items() if name not in ("query", "key", "value")}

        def run(query: Tensor, key: Tensor, rest: dict[str, Any] = rest) -> tuple[Tensor, Tensor]:
            return layer(query, key, key, **rest)

        out, seen = checkpoint(run, *wanted, use_reentrant=reentrant) if recompute else run(*wanted)
        answers.append(torch.autograd.grad((out, seen), wanted, cotangents(case, out, seen)) if not reentrant else ())
        if reentrant:
            (out.sum() + (seen * seen).sum()).backward()
            answers[-1] = tuple(x.grad for x in wanted)
    for plain, again in zip(*answers):
        torch.testing.assert_close(again, plain)


def test_a_compiled_function_may_be_given_deferred_weights() -> None:
    case = Case()
    with torch.no_grad():
        seen = case.layers()[1](**case.call()[0])[1]
        compiled = torch.compile(lambda x: (x * 2).sum(dim=-1), backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(seen), (seen.clone() * 2).sum(dim=-1))


def test_a_graph_can_be_walked_twice() -> None:
    case = Case()
    call, wanted = case.call()
    out, seen = case.layers()[1](**call)
    total = out.sum() + (seen * seen).sum()
    first = torch.autograd.grad(total, wanted, retain_graph=True)
    for one, two in zip(first, torch.autograd.grad(total, wanted)):
        torch.testing.assert_close(one, two)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(total, wanted)


@given(case=cases())
def test_a_layer_told_to_gives_no_weights(case: Case) -> None:
    stock, ours = case.layers()
    ours.need_weights = False
    call, _ = case.call()
    out, seen = ours(**call)
    assert seen is None
    torch.testing.assert_close(out, stock(**call)[0], atol=1e-10, rtol=1e-10)
    model = flashmha.replace_mha(nn.Sequential(stock), need_weights=False)
    assert model[0](**call)[1] is None
    assert flashmha.restore_mha(model)[0](**call)[1] is not None


@given(case=cases(batched=True))
def test_many_gradients_may_be_asked_for_at_once(case: Case) -> None:
    answers = []
    for layer in case.layers():
        call, wanted = case.call()
        out, seen = layer(**call)
        grads = [torch.stack([x, -2 * x]) for x in cotangents(case, out, seen)]
        answers.append(torch.autograd.grad((out, seen), wanted, grads, is_grads_batched=True))
    for theirs, ours in zip(*answers):
        torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("mask", ("none", "bool", "float"))
def test_a_nan_stays_a_nan(mask: str) -> None:
    case = Case(mask=mask)
    stock, ours = case.layers()
    call, _ = case.call()
    with torch.no_grad():
        call["query"][0, 0, 0] = float("nan")
        found, wanted = ours(**call)[1].clone(), stock(**call)[1]
    strange = wanted.isnan().any(dim=-1)
    assert strange.any() and torch.equal(found.isnan().any(dim=-1), strange)
    torch.testing.assert_close(found[~strange], wanted[~strange])


@given(case=cases(backend=None), training=st.booleans())
def test_explain_names_the_backend_that_runs(case: Case, training: bool) -> None:
    layer = case.layers()[1].train(training)
    call, _ = case.call()
    with torch.set_grad_enabled(training):
        said = flashmha.explain(layer, call["query"], call["key"], call["key"], **others(call))
        with flashmha.record() as calls:
            layer(**call)
    assert [one.backend for one in calls] == [said.chosen]
    assert said.rows[said.chosen] == "chosen" and list(said.rows.values()).count("chosen") == 1


def others(call: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in call.items() if name not in ("query", "key", "value")}


@fewer(4)
@given(case=cases(backend=None))
def test_gradients_that_are_traced_are_those_of_a_call(case: Case) -> None:
    """PyTorch's own test of AOTAutograd over nn.MultiheadAttention: both ways run the same operators."""
    assume(case.batch * case.heads * case.seqlen_q * case.seqlen_k <= attend.FEW_SCORES)
    layer, answers = case.layers(torch.float32)[1], []
    names = [name for name, _ in layer.named_parameters()]
    for traced in (False, True):
        call, wanted = case.call(torch.float32)
        given = {name: value for name, value in call.items() if name != "value" and isinstance(value, Tensor)}
        rest = {name: value for name, value in call.items() if name not in ("value", *given)}

        def run(*tensors: Tensor, given: Any = given, rest: Any = rest) -> tuple[Tensor, Tensor]:
            inputs = dict(zip(given, tensors))
            parameters = dict(zip(names, tensors[len(given) :]))
            return torch.func.functional_call(layer, parameters, kwargs={**rest, **inputs, "value": inputs["key"]})

        out, seen = (aot_function(run, nop) if traced else run)(*given.values(), *layer.parameters())
        leaves = [*wanted, *layer.parameters()]
        answers.append((out, seen, *torch.autograd.grad((out, seen), leaves, cotangents(case, out, seen))))
    for eager, other in zip(*answers):
        torch.testing.assert_close(other, eager, atol=1e-6, rtol=1e-6)

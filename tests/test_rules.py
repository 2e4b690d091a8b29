"""Padding given as a rule: the numbers of the tensor, prepared once, and never for another tensor than it was."""

import contextlib
import copy
import itertools
import pickle
import threading
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from conftest import fewer
from hypothesis import given
from hypothesis import strategies as st
from test_flash import Pretended2, pretended, two
from test_padding import CHANGES
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import flashmha
from flashmha import AttentionSpec, FlashMultiHeadAttention, KeyLengths, KeyPadding, replace_mha
from flashmha.backends.choice.registry import instead
from flashmha.backends.rewrites import documents as packing
from flashmha.backends.rewrites.heads import neighbours
from flashmha.backends.rewrites.order import RealFirst, permute_rows, real_first
from flashmha.backends.sdpa import packed as varlen
from flashmha.backends.sdpa import pieces as blocks
from flashmha.backends.sdpa.backend import Sdpa
from flashmha.problem import ragged
from flashmha.problem.computed import Computed
from flashmha.swap import encoder, route
from flashmha.testing import noise, seeds

PATTERNS = ("right", "left", "holes", "whole items", "none")


def validity(pattern: str, batch: int, seqlen: int, seed: int) -> Tensor:
    """Which tokens are real, (batch, seqlen)."""
    generator = torch.Generator("cpu").manual_seed(seed)
    places = torch.arange(seqlen, device="cpu")
    lengths = torch.randint(1, seqlen + 1, (batch, 1), generator=generator, device="cpu")
    made = {
        "right": places < lengths,
        "left": places >= seqlen - lengths,
        "holes": torch.rand(batch, seqlen, generator=generator, device="cpu") < 0.5,
        "whole items": (places < lengths) & (torch.arange(batch, device="cpu")[:, None] > 0),
        "none": places < lengths * 0 + seqlen,
    }
    return made[pattern].to(torch.get_default_device() if torch.empty(0).device.type == "cpu" else "cuda")


def answers(layer: Any, x: Tensor, *rest: Tensor, need_weights: bool, **masks: Any) -> list[Tensor]:
    """Output, weights and gradients of one call."""
    x = x.detach().clone().requires_grad_()
    inputs = (x, *(rest or (x, x)))
    out, seen = layer(*inputs, need_weights=need_weights, **masks)
    total = out.square().sum() if seen is None else out.square().sum() + seen.square().sum()
    grads = torch.autograd.grad(total, [x, *layer.parameters()])
    return [out, *([] if seen is None else [seen.clone()]), *grads]


def assert_all_close(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other, atol=1e-9, rtol=1e-9)


@given(
    pattern=st.sampled_from(PATTERNS),
    batch=st.integers(1, 3),
    seqlen=st.integers(1, 9),
    batch_first=st.booleans(),
    need_weights=st.booleans(),
    cross=st.booleans(),
    causal=st.sampled_from((None, "mask", "rule")),
    skip=st.booleans(),
    worth=st.sampled_from((0, blocks.MIN_MULTIPLICATIONS)),
    features=st.sampled_from(({}, {"add_bias_kv": True}, {"add_zero_attn": True}, {"window": (1, 2)}, {"kdim": 8})),
    seed=seeds(),
)
def test_a_rule_gives_the_numbers_of_the_tensor_mask(
    pattern: str,
    batch: int,
    seqlen: int,
    batch_first: bool,
    need_weights: bool,
    cross: bool,
    causal: str | None,
    skip: bool,
    worth: int,
    features: dict[str, Any],
    seed: int,
) -> None:
    layer = FlashMultiHeadAttention(8, 2, batch_first=batch_first, dtype=torch.float64, skip_padding=skip, **features)
    shape = (batch, seqlen, 8) if batch_first else (seqlen, batch, 8)
    x, valid = noise(seed, *shape), validity(pattern, batch, seqlen, seed)
    rest = (noise(seed + 1, *shape),) * 2 if cross else ()
    more: dict[str, Any] = {"need_weights": need_weights}
    if causal is not None:
        more["attn_mask"] = torch.ones(seqlen, seqlen, dtype=torch.bool).triu(1)
        if causal == "rule":
            more["attn_mask"] = flashmha.causal()
    with instead(Sdpa(blocks.Costs(item=worth))):
        expected = answers(layer, x, *rest, key_padding_mask=~valid, **more)
        rule = KeyPadding(valid)
        for _ in range(2):  # what is made, and what was kept
            assert_all_close(answers(layer, x, *rest, key_padding_mask=rule, **more), expected)
        if pattern in ("right", "whole items", "none"):
            rule = KeyLengths(valid.sum(1))
            for _ in range(2):
                assert_all_close(answers(layer, x, *rest, key_padding_mask=rule, **more), expected)
        if batch == 1:
            alone = {**more, "key_padding_mask": KeyPadding(valid)}
            flat = answers(layer, x.reshape(seqlen, 8), *(y.reshape(seqlen, 8) for y in rest), **alone)
            assert_all_close([flat[0].view(shape)], expected[:1])


def small(skip: bool = False, layers: int = 3, training: bool = True, **more: Any) -> nn.TransformerEncoder:
    """An encoder after the swap."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True, dtype=torch.float64, **more)
    model = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False).train(training)
    return replace_mha(model, skip_padding=skip)


def of_model(model: nn.Module, x: Tensor, hidden: Tensor, run: Any = None, **more: Any) -> list[Tensor]:
    """Output and gradients of an encoder, or of another way to ``run`` it."""
    x = x.detach().clone().requires_grad_()
    out = (run or model)(x, src_key_padding_mask=hidden, **more)
    return [out, *torch.autograd.grad(out.square().sum(), [x, *model.parameters()])]


def layer_by_layer(model: nn.TransformerEncoder, skip: bool = False) -> Callable[..., Tensor]:
    """The layers of an encoder called by hand, each with the padding mask as it came."""

    def run(x: Tensor, src_key_padding_mask: Tensor, mask: Tensor | None = None) -> Tensor:
        for layer in model.layers:
            x = layer(x, src_mask=mask, src_key_padding_mask=src_key_padding_mask)
        return x.masked_fill(src_key_padding_mask[..., None], 0.0) if skip else x

    return run


@fewer(2)
@given(
    pattern=st.sampled_from(PATTERNS),
    skip=st.booleans(),
    causal=st.booleans(),
    norm_first=st.booleans(),
    inference=st.booleans(),
    seed=seeds(),
)
def test_an_encoder_that_hands_one_rule_down_computes_what_its_layers_do(
    pattern: str, skip: bool, causal: bool, norm_first: bool, inference: bool, seed: int
) -> None:
    model, x = small(skip, norm_first=norm_first), noise(seed, 2, 6, 8)
    hidden = ~validity(pattern, 2, 6, seed)
    more = {"mask": torch.ones(6, 6, dtype=torch.bool).triu(1)} if causal else {}
    zeros = skip and not x.is_cuda  # no kernel there takes packed tokens of float64, so that every row is computed
    expected = of_model(model, x, hidden, layer_by_layer(model, zeros), **more)
    with torch.inference_mode(inference):
        inside = model(x, src_key_padding_mask=hidden, **more)
    found = of_model(model, x, hidden, **more)
    torch.testing.assert_close(inside.detach().clone(), expected[0].detach(), atol=1e-9, rtol=1e-9)
    assert_all_close(found, expected)


@pytest.mark.parametrize("training", (False, True))
def test_a_whole_transformer_takes_rules_where_it_takes_padding(training: bool) -> None:
    model = nn.Transformer(8, 2, 2, 2, 16, 0.0, batch_first=True, dtype=torch.float64).train(training)
    replace_mha(model)
    x, y = noise(0, 2, 6, 8), noise(1, 2, 5, 8)
    source, target = validity("holes", 2, 6, 3), validity("right", 2, 5, 4)
    source[:, 0] = target[:, 0] = True
    names = ("src_key_padding_mask", "tgt_key_padding_mask", "memory_key_padding_mask")
    memory = KeyPadding(source)
    given = dict(zip(names, (~source, ~target, ~source))), dict(zip(names, (memory, KeyLengths(target.sum(1)), memory)))
    expected, found = (
        torch.autograd.grad(model(x, y, **masks).square().sum(), [*model.parameters()]) for masks in given
    )
    assert_all_close(list(found), list(expected))


@pytest.mark.parametrize("skip", (False, True))
def test_explain_takes_a_rule(skip: bool) -> None:
    layer, x = FlashMultiHeadAttention(8, 2, batch_first=True, skip_padding=skip), torch.randn(2, 6, 8)
    valid = validity("right", 2, 6, 1)
    said = [flashmha.explain(layer, x, x, x, key_padding_mask=given) for given in (~valid, KeyPadding(valid))]
    assert str(said[0]) == str(said[1])
    assert "KeyLengths" in str(flashmha.explain(layer, x, x, x, key_padding_mask=KeyLengths(valid.sum(1)))) or skip


def patched(layer: Any) -> None:
    layer._sa_block = lambda x, mask, padding, is_causal=False: layer.self_attn(
        x, x, x, attn_mask=mask, key_padding_mask=padding.logical_not().logical_not(), is_causal=is_causal
    )[0]


def watch(module: nn.Module) -> None:
    def look(module: nn.Module, args: Any, kwargs: Any) -> None:
        given = [x for x in (*args, *kwargs.values()) if x is not None and not isinstance(x, bool)]
        assert all(isinstance(x, Tensor) for x in given)

    module.register_forward_pre_hook(look, with_kwargs=True)


COUNTS_ON_TENSORS: dict[str, Callable[[Any], Any]] = {
    "a hook on an encoder layer": lambda model: watch(model.layers[1]),
    "a hook on an attention": lambda model: watch(model.layers[1].self_attn),
    "another block of an instance": lambda model: patched(model.layers[1]),
    "another class of layer": lambda model: setattr(model.layers[1], "__class__", Checked),
}


class Checked(encoder.FlashTransformerEncoderLayer):
    """An encoder layer of a subclass, which looks at the mask."""

    def _sa_block(self, x: Tensor, attn_mask: Any, key_padding_mask: Any, is_causal: bool = False) -> Tensor:
        assert key_padding_mask.dtype == torch.bool
        return super()._sa_block(x, attn_mask, key_padding_mask, is_causal)


@pytest.mark.parametrize("change", COUNTS_ON_TENSORS)
def test_what_counts_on_a_tensor_gets_one(change: str) -> None:
    model, x, hidden = small(), noise(0, 2, 6, 8), ~validity("holes", 2, 6, 0)
    expected = of_model(model, x, hidden, layer_by_layer(model))
    COUNTS_ON_TENSORS[change](model)
    assert_all_close(of_model(model, x, hidden), expected)


@pytest.mark.parametrize("shape", ((2, 7), (3, 6), (6, 2), (6,)))
def test_a_padding_mask_of_another_shape_is_stock_s_error(shape: tuple[int, ...]) -> None:
    with pytest.raises(AssertionError, match="key_padd"):
        small()(noise(0, 2, 6, 8), src_key_padding_mask=torch.zeros(shape, dtype=torch.bool))


@pytest.mark.cpu("lengths are looked at there alone")
@pytest.mark.parametrize(
    ("rule", "why"),
    (
        (lambda: KeyPadding(torch.ones(2, 5, dtype=torch.bool)), r"valid must have shape .* = \(3, 5\), got \(2, 5\)"),
        (lambda: KeyPadding(torch.ones(3, 4, dtype=torch.bool)), r"valid must have shape .* = \(3, 5\), got \(3, 4\)"),
        (lambda: KeyLengths(torch.tensor([1, 2])), r"lengths must have shape .* = \(3,\), got \(2,\)"),
        (lambda: KeyLengths(torch.tensor([1, 2, 6])), "lengths must lie between 0 and seqlen_k=5"),
    ),
)
def test_a_rule_that_does_not_fit_is_an_error(rule: Callable[[], Any], why: str) -> None:
    x = torch.zeros(3, 5, 8)
    for need_weights, skip in itertools.product((True, False), (True, False)):
        layer = FlashMultiHeadAttention(8, 2, batch_first=True, skip_padding=skip)
        with pytest.raises(ValueError, match=why):
            layer(x, x, x, key_padding_mask=rule(), need_weights=need_weights)


@pytest.mark.cpu("changes the memory of a CPU")
@given(
    seed=seeds(),
    change=st.sampled_from(sorted(CHANGES)),
    inference=st.booleans(),
    skip=st.booleans(),
    need_weights=st.booleans(),
    worth=st.sampled_from((0, blocks.MIN_MULTIPLICATIONS)),
)
def test_a_rule_whose_tensor_changes_is_read_again(
    seed: int, change: str, inference: bool, skip: bool, need_weights: bool, worth: int
) -> None:
    layer = FlashMultiHeadAttention(8, 2, batch_first=True, dtype=torch.float64, skip_padding=skip)
    x, tables = noise(seed, 3, 6, 8), [validity("holes", 3, 6, seed + step) for step in range(3)]
    valid = tables[0].clone()
    rule = KeyPadding(valid)
    with instead(Sdpa(blocks.Costs(item=worth))):
        for table in (*tables, tables[0]):
            CHANGES[change](valid, table)
            expected = answers(layer, x, key_padding_mask=~table, need_weights=need_weights)
            with torch.inference_mode(inference):
                layer(x, x, x, key_padding_mask=rule, need_weights=need_weights)
            assert_all_close(answers(layer, x, key_padding_mask=rule, need_weights=need_weights), expected)


def test_weights_that_are_read_late_are_those_of_the_call() -> None:
    layer = FlashMultiHeadAttention(8, 2, batch_first=True, dtype=torch.float64)
    x, valid = noise(0, 2, 60, 8), validity("right", 2, 60, 0)
    rule = KeyPadding(valid)
    expected = layer(x, x, x, key_padding_mask=~valid)[1].clone()
    late = layer(x, x, x, key_padding_mask=rule)[1]
    valid.fill_(True)
    torch.testing.assert_close(late.clone(), expected)


MOVES: dict[str, Callable[[Tensor], Any]] = {
    "written": lambda valid: valid.fill_(True),
    "other data": lambda valid: setattr(valid, "data", valid.clone()),
    "swapped": lambda valid: torch.utils.swap_tensors(valid, valid.clone()),
}


@pytest.mark.parametrize("move", MOVES)
def test_away_from_a_cpu_version_and_address_tell_a_change(move: str) -> None:
    valid = torch.ones(2, 3, dtype=torch.bool)
    kept = Computed(valid, 0, private=False, by_values=False)
    assert kept.fits(valid)
    MOVES[move](valid)
    assert not kept.fits(valid)


def test_a_captured_graph_keeps_nothing_of_a_caller_s_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    here = {"queue": (1, False)}
    monkeypatch.setattr(ragged, "stream_of", lambda tensor: here["queue"])
    valid = torch.ones(2, 3, dtype=torch.bool)
    # another stream, other tensors
    for rule, expected in (
        (KeyPadding(valid), [0, 0, 1, 2, 0, 3]),
        (ragged.mark_private(KeyPadding(valid)), [0, 0, 1, 1, 2, 3]),
    ):
        numbers, found = itertools.count(), []
        for now in ((1, False), (1, False), (7, True), (7, True), (1, False), (2, False)):
            here["queue"] = now
            found.append(rule.once("number", lambda numbers=numbers: next(numbers)))  # type: ignore[misc]
        assert found == expected


def test_nothing_is_kept_of_what_is_recorded() -> None:
    valid = torch.ones(2, 3, dtype=torch.bool)
    rule = KeyPadding(valid)

    def once(valid: Tensor) -> Tensor:
        return KeyPadding(valid).once("sum", lambda: valid.sum())

    torch.vmap(once)(valid[None])
    torch.fx.experimental.proxy_tensor.make_fx(lambda x: rule.once("sum", lambda: x + rule.valid.sum()))(torch.ones(2))
    assert rule._kept is None


def test_what_was_kept_in_inference_trains_and_copies_keep_nothing() -> None:
    layer = FlashMultiHeadAttention(8, 2, batch_first=True, dtype=torch.float64, skip_padding=True)
    x, valid = noise(0, 2, 6, 8), validity("holes", 2, 6, 3)
    rule = KeyPadding(valid)
    with torch.inference_mode():
        layer(x, x, x, key_padding_mask=rule)
    expected = answers(layer, x, key_padding_mask=~valid, need_weights=True)
    twins = (rule, copy.copy(rule), copy.deepcopy(rule), pickle.loads(pickle.dumps(rule)))
    assert rule._kept is not None and all(twin._kept is None for twin in twins[1:])
    assert twins[1].valid is valid and twins[2].valid is not valid
    for twin in twins:
        assert_all_close(answers(layer, x, key_padding_mask=twin, need_weights=True), expected)
    lengths = copy.deepcopy(KeyLengths(torch.tensor([2, 6])))
    assert lengths.lengths.tolist() == [2, 6]
    assert not weakref.getweakrefs(valid)


def test_models_and_threads_share_one_rule() -> None:
    models = [small(skip) for skip in (False, True)]
    x, valid = noise(0, 2, 6, 8), validity("holes", 2, 6, 3)

    def through(model: Any, padding: Any) -> list[Tensor]:
        y = x.clone().requires_grad_()
        out = y
        for layer in model.layers:
            out = layer(out, src_key_padding_mask=padding)
        return [out, *torch.autograd.grad(out.square().sum(), [y, *model.parameters()])]

    expected = [through(model, ~valid) for model in models]
    rule = KeyPadding(valid)
    found: dict[int, list[Tensor]] = {}

    def run(place: int) -> None:
        found[place] = through(models[place % 2], rule)

    threads = [threading.Thread(target=run, args=(place,)) for place in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for place in range(6):
        assert_all_close(found[place], expected[place % 2])


def test_a_checkpoint_takes_a_rule() -> None:
    layer = FlashMultiHeadAttention(8, 2, batch_first=True, dtype=torch.float64)
    x, valid = noise(0, 2, 6, 8).requires_grad_(), validity("holes", 2, 6, 3)
    grads = []
    for rule in (~valid, KeyPadding(valid)):
        out = checkpoint(lambda y, rule=rule: layer(y, y, y, key_padding_mask=rule)[0], x, use_reentrant=False)
        grads.append(torch.autograd.grad(out.square().sum(), [x, *layer.parameters()]))
    assert_all_close(list(grads[1]), list(grads[0]))


# What it costs


class Ran(TorchDispatchMode):
    """Operators that make or change a tensor's memory, counted; views are not."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and func.overloadpacket._qualified_op_name not in ("aten::detach", "aten::_unsafe_view"):
            self.names[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.cpu("counts operators of a CPU's route")
@pytest.mark.parametrize("training", (False, True))
@pytest.mark.parametrize("kind", (KeyPadding, KeyLengths))
def test_a_rule_costs_two_operators_at_most(kind: Any, training: bool) -> None:
    layer, x = FlashMultiHeadAttention(8, 2, batch_first=True), torch.randn(2, 6, 8, requires_grad=training)
    valid = validity("right", 2, 6, 1)
    counts = []
    for rule in (None, kind(valid if kind is KeyPadding else valid.sum(1))):
        with torch.set_grad_enabled(training):
            layer(x, x, x, key_padding_mask=rule, need_weights=False)
            with Ran() as ran:
                layer(x, x, x, key_padding_mask=rule, need_weights=False)
        counts.append(ran.names)
    assert (counts[1] - counts[0]).total() <= 2, counts


@pytest.mark.cpu("counts operators of a CPU's route")
@pytest.mark.parametrize("pattern", PATTERNS[:3])
@pytest.mark.parametrize("hooked", (False, True))
def test_padding_costs_a_layer_more_of_an_encoder_two_operators_at_most(pattern: str, hooked: bool) -> None:
    """Also where a hook inside has the layers called one by one."""
    x, hidden = noise(0, 2, 6, 8).requires_grad_(), ~validity(pattern, 2, 6, 1)
    counts = {}
    for layers in (3, 6):
        for padding in (None, hidden):
            model = small(layers=layers)
            if hooked:
                model.layers[0].linear1.register_forward_hook(lambda *_: None)
            with Ran() as ran:
                model(x, src_key_padding_mask=padding)
            counts[layers, padding is None] = ran.names.total()
    assert counts[6, False] - counts[3, False] <= counts[6, True] - counts[3, True] + 3 * 2, counts


@pytest.mark.cpu("counts operators of a CPU's route")
def test_a_mask_of_one_call_is_made_no_table() -> None:
    layer, x = FlashMultiHeadAttention(8, 2, batch_first=True), torch.randn(2, 6, 8)
    rule, hidden = KeyPadding(validity("right", 2, 6, 1)), ~validity("right", 2, 6, 1)
    tables = []
    for padding in (hidden, hidden, rule, rule):
        with torch.no_grad(), Ran() as ran:
            layer(x, x, x, key_padding_mask=padding, need_weights=False)
        tables.append(ran.names["aten::masked_fill_"])
    assert tables == [0, 0, 1, 0]


def kernel(q: Tensor, k: Tensor, v: Tensor, *told: Any, scale: float) -> Any:
    """The flash-attn 2 inside torch, by the formula."""
    return (two(q, k, v, *told[:4], softmax_scale=scale, causal=told[5]),)


@pytest.mark.cpu("pretends a kernel of a GPU")
@pytest.mark.parametrize("side_by_side", (True, False))
@pytest.mark.parametrize("kind", (KeyPadding, KeyLengths))
def test_a_gpu_moves_keys_in_one_operator_and_a_prefix_in_none(kind: Any, side_by_side: bool) -> None:
    packed = noise(0, 2, 17, 3, 4, 8, dtype=torch.bfloat16).requires_grad_()
    q, k, v = packed.unbind(2)
    if not side_by_side:
        v = v.contiguous()
    valid = validity("right", 2, 17, 1)
    spec = AttentionSpec.of(q, k, v, mask=kind(valid if kind is KeyPadding else valid.sum(1)))
    empty = mock.Mock(side_effect=lambda q, *rest, **more: (q * 1.0,))
    with mock.patch.object(torch.ops.aten, "_flash_attention_forward", empty):
        varlen.attend_packed(q, k, v, spec)
        with Ran() as ran:
            out = varlen.attend_packed(q, k, v, spec)
    del ran.names["aten::mul"]  # the kernel
    ran.names.pop("aten::equal", None)  # how a CPU tells that nothing changed
    moves = 0 if kind is KeyLengths else 1 if side_by_side else 2
    assert ran.names == ({"aten::index_select": moves} if moves else {})
    with mock.patch.object(torch.ops.aten, "_flash_attention_forward", kernel):
        out = varlen.attend_packed(q, k, v, spec)
        with Ran() as ran:
            torch.autograd.grad(out.float().square().sum(), packed)
    assert ran.names["aten::index_select"] <= 2 and not ran.names["aten::index_add_"]


@pytest.mark.cpu("looks at real tokens, which a GPU packs in half precision alone")
def test_a_model_looks_for_its_tokens_once() -> None:
    model, x, valid = small(skip=True), noise(0, 2, 6, 8), validity("holes", 2, 6, 3)
    rule, out = KeyPadding(valid), x
    with Ran() as ran:
        for layer in model.layers:
            out = layer(out, src_key_padding_mask=rule)
    assert ran.names["aten::nonzero_static"] == 1


@pytest.mark.cpu("pretends a kernel of a GPU")
def test_a_compiler_prepares_a_mask_once_for_all_layers() -> None:
    backend, graphs = pretended(Pretended2), []

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(Counter(str(node.target) for node in graph.graph.nodes))
        return graph

    def run(q: Tensor, hidden: Tensor) -> Tensor:
        rule = ragged.mark_private(KeyPadding(~hidden))
        for _ in range(3):
            q = backend(q, q, q, AttentionSpec.of(q, q, q, mask=rule))  # type: ignore[assignment]
        return q

    torch.compiler.reset()
    q, hidden = noise(0, 2, 9, 4, 8, dtype=torch.bfloat16), ~validity("holes", 2, 9, 3)
    compiled = torch.compile(run, fullgraph=True, backend=aot_autograd(fw_compiler=count))
    torch.testing.assert_close(compiled(q, hidden), run(q, hidden))
    other = ~validity("left", 2, 9, 4)
    torch.testing.assert_close(compiled(q, other), run(q, other))
    assert len(graphs) == 1 and graphs[0]["aten.cumsum.default"] == graphs[0]["aten.scatter.src"] == 1


@pytest.mark.parametrize("training", (False, True))
def test_a_rule_goes_through_a_compiled_layer_without_recompiling(training: bool) -> None:
    torch.compiler.reset()
    layer = FlashMultiHeadAttention(8, 2, batch_first=True, dtype=torch.float64)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = noise(0, 2, 6, 8)
    for pattern in PATTERNS:
        valid = validity(pattern, 2, 6, 5)
        for kind in (KeyPadding(valid), KeyPadding(valid)):
            with (
                torch._dynamo.config.patch(error_on_recompile=pattern != PATTERNS[0]),
                torch.set_grad_enabled(training),
            ):
                found = compiled(x, x, x, key_padding_mask=kind, need_weights=False)[0]
            torch.testing.assert_close(found, layer(x, x, x, key_padding_mask=~valid, need_weights=False)[0])


@pytest.mark.parametrize("skip", (False, True))
def test_an_encoder_compiles_once_for_every_mask(skip: bool) -> None:
    torch.compiler.reset()
    model, x = small(skip, layers=2), noise(0, 2, 6, 8)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    exact = small(layers=2)
    exact.load_state_dict(model.state_dict())
    for pattern in PATTERNS:
        hidden = ~validity(pattern, 2, 6, 5)
        with torch._dynamo.config.patch(error_on_recompile=pattern != PATTERNS[0]):
            found = of_model(compiled, x, hidden)
        assert_all_close(found, of_model(exact, x, hidden))


def test_documents_of_padding_hold_every_key() -> None:
    assert packing.query_offsets(2, 5, torch.device("cpu")).tolist() == [0, 5, 5, 10, 10]
    assert packing.key_offsets(torch.tensor([3, 0]), 4).tolist() == [0, 3, 4, 4, 8]


# Real tokens first, once for all layers


@fewer(2)
@given(
    pattern=st.sampled_from(PATTERNS),
    batch=st.integers(1, 3),
    seqlen=st.integers(1, 7),
    batch_first=st.booleans(),
    norm_first=st.booleans(),
    seed=seeds(),
)
def test_layers_over_real_tokens_first_give_every_row(
    pattern: str, batch: int, seqlen: int, batch_first: bool, norm_first: bool, seed: int
) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, F.gelu, 1e-5, batch_first, norm_first, dtype=torch.float64)
    model = replace_mha(nn.TransformerEncoder(layer, 2, nn.LayerNorm(8, dtype=torch.float64), False))
    valid = validity(pattern, batch, seqlen, seed)
    x = noise(seed, *((batch, seqlen) if batch_first else (seqlen, batch)), 8)
    expected = of_model(model, x, ~valid)
    x = x.clone().requires_grad_()
    first = RealFirst(x, KeyPadding(valid), batch_first)
    assert torch.equal(first.padding.lengths, valid.sum(1)) and torch.equal(first.unpack(first.tokens), x)
    out = first.tokens if batch_first else first.tokens.transpose(0, 1)
    for each in model.layers:
        out = each(out, src_key_padding_mask=first.padding)
    out = model.norm(out)
    out = first.unpack(out if batch_first else out.transpose(0, 1))
    assert_all_close([out, *torch.autograd.grad(out.square().sum(), [x, *model.parameters()])], expected)


def test_an_order_is_made_once_and_moves_back_without_adding() -> None:
    rule, x = KeyPadding(validity("holes", 2, 6, 3)), noise(0, 2, 6, 8).requires_grad_()
    assert RealFirst(x, rule).order is RealFirst(x, rule).order
    assert RealFirst(x, rule).padding is RealFirst(x, rule).padding
    out = RealFirst(x, rule).tokens
    with Ran() as ran:
        torch.autograd.grad(out.sum(), x)
    assert ran.names["aten::index_select"] == 1 and not ran.names["aten::index_add_"]
    assert torch.autograd.gradgradcheck(lambda x: RealFirst(x, rule).tokens.square(), x)
    assert torch.autograd.gradcheck(lambda x: RealFirst(x, rule).tokens.square(), x, check_forward_ad=True)


@given(batch=st.integers(0, 4), seqlen=st.integers(0, 9), seed=seeds(), batch_first=st.booleans())
def test_an_order_is_stable_and_its_own_inverse_s_inverse(
    batch: int, seqlen: int, seed: int, batch_first: bool
) -> None:
    valid = validity("holes", batch, seqlen, seed) if seqlen else torch.ones(batch, 0, dtype=torch.bool)
    order = real_first(valid, batch_first)
    rows = torch.arange(batch * seqlen)
    assert torch.equal(order.places[order.back], rows) and torch.equal(order.back[order.places], rows)
    tokens = rows.view(batch, seqlen) if batch_first else rows.view(seqlen, batch).T
    first = order.places.view(batch, seqlen)
    for own, real, found in zip(tokens, valid, first):
        assert torch.equal(found, torch.cat((own[real], own[~real])))


def test_an_order_is_part_of_one_graph() -> None:
    torch.compiler.reset()
    model = small(layers=2)

    def run(x: Tensor, hidden: Tensor) -> Tensor:
        first = RealFirst(x, KeyPadding(~hidden))
        out = first.tokens
        for layer in model.layers:
            out = layer(out, src_key_padding_mask=first.padding)
        return first.unpack(out)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for pattern in PATTERNS:
        x, hidden = noise(0, 2, 6, 8), ~validity(pattern, 2, 6, 5)
        with torch._dynamo.config.patch(error_on_recompile=pattern != PATTERNS[0]):
            torch.testing.assert_close(compiled(x, hidden), model(x, src_key_padding_mask=hidden))


@contextlib.contextmanager
def a_gpu_that_moves_keys() -> Any:
    """Tokens take another order as they would on a GPU."""
    whole = route.padding.why_order_counts

    def on_a_gpu(layer: Any, call: Any) -> str | None:
        why = whole(layer, call)
        return None if why is not None and why.startswith("no kernel") else why

    moves = mock.patch.object(route, "moves_keys", lambda src, valid: True)
    with mock.patch.object(route.padding, "why_order_counts", on_a_gpu), moves:
        yield


@pytest.mark.cpu("pretends a GPU")
@fewer(2)
@given(
    pattern=st.sampled_from(PATTERNS),
    batch_first=st.booleans(),
    norm_first=st.booleans(),
    training=st.booleans(),
    seed=seeds(),
)
def test_an_encoder_puts_real_tokens_first_where_keys_would_be_moved(
    pattern: str, batch_first: bool, norm_first: bool, training: bool, seed: int
) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, F.gelu, 1e-5, batch_first, norm_first, dtype=torch.float64)
    model = replace_mha(nn.TransformerEncoder(layer, 2, nn.LayerNorm(8, dtype=torch.float64), False)).train(training)
    valid = validity(pattern, 2, 6, seed)
    x = noise(seed, *((2, 6) if batch_first else (6, 2)), 8)
    expected = of_model(model, x, ~valid)
    with a_gpu_that_moves_keys(), flashmha.record() as calls:
        found = of_model(model, x, ~valid)
    assert_all_close(found, expected)
    assert [call.spec.features & {"key_padding", "key_lengths"} for call in calls] == [{"key_lengths"}] * 2


BESIDE: dict[str, Callable[[Any], dict[str, Any]]] = {
    "a causal mask": lambda model: {"mask": torch.ones(6, 6, dtype=torch.bool).triu(1)},
    "a causal mask and its hint": lambda model: {
        "mask": torch.ones(6, 6, dtype=torch.bool).triu(1),
        "is_causal": True,
    },
    "a hint that is trusted": lambda model: replace_mha(model, trust_is_causal=True) and {"is_causal": True},
    "a window": lambda model: setattr(model.layers[1].self_attn, "window", (2, 2)) or {},
    "a hook": lambda model: model.layers[0].linear1.register_forward_hook(lambda *_: None) and {},
    "a module that may mix tokens": lambda model: setattr(model.layers[0], "dropout", nn.Sequential()) or {},
}


@pytest.mark.cpu("pretends a GPU")
@pytest.mark.parametrize("beside", BESIDE)
def test_tokens_stay_where_their_order_counts(beside: str) -> None:
    model, x, hidden = small(layers=2), noise(0, 2, 6, 8), ~validity("holes", 2, 6, 3)
    more = BESIDE[beside](model)
    expected = of_model(model, x, hidden, **more)
    with a_gpu_that_moves_keys(), flashmha.record() as calls:
        assert_all_close(of_model(model, x, hidden, **more), expected)
    assert calls and not any("key_lengths" in call.spec.features for call in calls)


@pytest.mark.cpu("pretends a GPU")
def test_a_hint_without_its_mask_stays_an_error() -> None:
    model, x, hidden = small(layers=2), noise(0, 2, 6, 8), ~validity("holes", 2, 6, 3)
    with a_gpu_that_moves_keys(), pytest.raises(RuntimeError, match="is_causal hint"):
        model(x, src_key_padding_mask=hidden, is_causal=True)


@pytest.mark.cpu("lays tensors out in memory of its own")
def test_tensors_of_their_own_are_no_neighbours_however_they_lie() -> None:
    memory, size = memoryview(bytearray(2 * 6 * 2 * 4 * 4)), 6 * 2 * 4 * 4
    halves = [torch.frombuffer(memory[start : start + size], dtype=torch.float32) for start in (0, size)]
    first, second = (half.view(2, 6, 4).transpose(0, 1) for half in halves)
    assert first.data_ptr() + first.nbytes == second.data_ptr()
    assert not neighbours((first, second))
    order = real_first(validity("holes", 1, 6, 3))
    for moved, x in zip(permute_rows((first, second), order), (first, second)):
        assert torch.equal(moved, x[order.places])
    whole = torch.randn(6, 4, 4)
    assert neighbours((whole[:, :2], whole[:, 2:]))

"""FlashMultiHeadAttention against nn.MultiheadAttention, over drawn layers and drawn calls."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_operators import Operators
from torch import Tensor, nn

from flashmha import Documents, FlashMultiHeadAttention, KeyPadding, Window, record, replace_mha
from flashmha.layer import shortcut
from flashmha.testing import Blueprint, Call, ask, assert_drop_in, assert_same, blueprints, noise, problems
from flashmha.testing.call import ATTN_MASKS, INPUT_LAYOUTS, SHARINGS

EXACT = (torch.float64,)
WARNING = "Support for mismatched key_padding_mask and attn_mask is deprecated. Use same type for both instead."
SIZES = (2, 1, 3)
LENGTHS = (3, 1, 2, 5)


def pair(blueprint: Blueprint, **more: Any) -> tuple[FlashMultiHeadAttention, nn.MultiheadAttention]:
    """Our layer and the stock layer with the same parameters."""
    stock = blueprint.build()
    ours = FlashMultiHeadAttention(**{**blueprint.arguments, **more})
    ours.load_state_dict(stock.state_dict(), strict=True)
    return ours, stock


def assert_layer_drops_in(blueprint: Blueprint, call: Call) -> None:
    """Our layer can stand where the stock layer stands, in the mode of a call."""
    ours, stock = pair(blueprint)
    with call.mode(ours, stock):
        assert_drop_in(stock, ours, kwargs=call.arguments(blueprint))


# The numbers of the stock class


@given(problem=problems())
def test_output_weights_and_gradients_are_those_of_the_stock_layer(problem: tuple[Blueprint, Call]) -> None:
    blueprint, call = problem
    assume(not (call.hint_alone and blueprint.extra_columns))  # stock hides the extra columns there, by accident
    assert_layer_drops_in(blueprint, call)


@given(
    problem=problems(
        layers=blueprints(dtypes=(torch.float32, torch.bfloat16), heads=(2, 4), packed=(True,), extra_columns=(False,)),
        sharings=("aaa",),
        paddings=("none", "bool"),
        attn_masks=("none", "bool 2-D", "bool 3-D", "bool causal"),
        training=(False,),
        grad=(False,),
    )
)
def test_eval_without_gradients_gives_the_numbers_of_the_fast_path(problem: tuple[Blueprint, Call]) -> None:
    assert_layer_drops_in(*problem)


@given(problem=problems(layers=blueprints(dtypes=EXACT)))
def test_eval_and_training_and_no_grad_answer_alike(problem: tuple[Blueprint, Call]) -> None:
    blueprint, call = problem
    layer = blueprint.build(FlashMultiHeadAttention)
    call = dataclasses.replace(call, training=True, grad=True)
    first = ask(layer, call, call.tensors(blueprint))
    for training, grad in ((True, False), (False, True), (False, False)):
        other = dataclasses.replace(call, training=training, grad=grad)
        found = ask(layer, other, other.tensors(blueprint))
        for name, tensor in found.tensors.items():
            if tensor is None:
                assert first[name] is None
            else:
                assert_same(tensor, first[name], name)


@given(problem=problems(layers=blueprints(dtypes=EXACT)))
def test_the_weights_are_asked_for_without_changing_the_output(problem: tuple[Blueprint, Call]) -> None:
    blueprint, call = problem
    layer = blueprint.build(FlashMultiHeadAttention)
    tensors = call.tensors(blueprint)
    found = ask(layer, call, tensors, need_weights=True)
    without = ask(layer, call, tensors, need_weights=False)
    assert without["weights"] is None
    assert_same(without["output"], found["output"], "output")


@given(
    problem=problems(layers=blueprints(dtypes=EXACT), attn_masks=("bool causal", "float causal"), need_weights=(False,))
)
def test_the_causal_hint_says_what_the_causal_mask_says(problem: tuple[Blueprint, Call]) -> None:
    blueprint, call = problem
    layer = blueprint.build(FlashMultiHeadAttention)
    hinted = ask(layer, call, call.tensors(blueprint), is_causal=True)
    plain = ask(layer, call, call.tensors(blueprint), is_causal=False)
    for name, tensor in hinted.tensors.items():
        if tensor is not None:
            assert_same(tensor, plain[name], name)


@given(
    problem=problems(
        layers=blueprints(dtypes=EXACT, extra_columns=(False,)), paddings=("none",), need_weights=(False,)
    ),
    training=st.booleans(),
)
def test_the_causal_hint_alone_leaves_the_mask_unread(problem: tuple[Blueprint, Call], training: bool) -> None:
    blueprint, call = problem
    call = dataclasses.replace(call, attn_mask="float causal", is_causal=True, need_weights=False, training=training)
    layer, tensors = blueprint.build(FlashMultiHeadAttention), call.tensors(blueprint)
    seen = ask(layer, call, tensors)
    unread = ask(layer, call, dataclasses.replace(tensors, attn_mask=torch.full((7, 9), math.nan).double()))
    assert_same(unread["output"], seen["output"], "output")


@given(problem=problems(layers=blueprints(dtypes=EXACT)), seed=st.integers(0, 9))
def test_one_object_or_equal_ones_give_the_same_numbers(problem: tuple[Blueprint, Call], seed: int) -> None:
    blueprint, call = problem
    call = dataclasses.replace(call, grad=False)
    layer, tensors = blueprint.build(FlashMultiHeadAttention), call.tensors(blueprint)
    apart = dataclasses.replace(tensors, key=tensors.key.clone(), value=tensors.value.clone())
    one_object, copies = ask(layer, call, tensors), ask(layer, call, apart)
    assert_same(copies["output"], one_object["output"], "output")


@given(problem=problems())
def test_inputs_and_masks_are_not_modified(problem: tuple[Blueprint, Call]) -> None:
    blueprint, call = problem
    tensors = call.tensors(blueprint)
    before = tensors.snapshot()
    ask(blueprint.build(FlashMultiHeadAttention), call, tensors)
    for name, tensor in tensors.snapshot().items():
        assert torch.equal(tensor, before[name]), name


@given(problem=problems(grad=(False,)))
def test_the_output_can_be_viewed(problem: tuple[Blueprint, Call]) -> None:
    blueprint, call = problem
    output = ask(blueprint.build(FlashMultiHeadAttention), call, call.tensors(blueprint))["output"]
    assert output is not None
    assert output.view(-1).shape == (output.numel(),)


@given(problem=problems())
def test_only_mixed_masks_warn_and_as_the_stock_class_does(problem: tuple[Blueprint, Call]) -> None:
    blueprint, call = problem
    for layer in pair(blueprint):
        found = ask(layer, call, call.tensors(blueprint)).warnings
        assert found == ([WARNING] if call.mixed else [])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@given(
    seed=st.integers(0, 99),
    need_weights=st.booleans(),
    head_dim=st.sampled_from((1, 3, 5, 64, 81)),
    training=st.booleans(),
)
@settings(max_examples=10)
def test_half_precision_is_no_worse_than_the_stock_layer(
    dtype: torch.dtype, seed: int, need_weights: bool, head_dim: int, training: bool
) -> None:
    blueprint = Blueprint(embed_dim=2 * head_dim, dtype=dtype, seed=seed)
    call = Call(2, 33, 33, "aaa", attn_mask="float 2-D", need_weights=need_weights, training=training, seed=seed)
    layers = pair(blueprint)
    ours, stock = (ask(layer, call, call.tensors(blueprint)) for layer in layers)
    exact = ask(layers[1].double(), call, call.tensors(blueprint, torch.float64))
    for name, reference in exact.tensors.items():
        if reference is None:
            continue
        assert ours[name] is not None and stock[name] is not None
        error = (ours[name].double() - reference).norm().item()
        limit = 2 * (stock[name].double() - reference).norm().item()
        assert error <= limit + torch.finfo(dtype).eps * reference.norm().item() / 2, name


@given(
    head_dim=st.sampled_from((1, 3, 5, 81, 257, 512)),
    heads=st.sampled_from((1, 2)),
    need_weights=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=12)
def test_every_head_dim_works(head_dim: int, heads: int, need_weights: bool, seed: int) -> None:
    blueprint = Blueprint(embed_dim=head_dim * heads, num_heads=heads, seed=seed)
    assert_layer_drops_in(blueprint, Call(need_weights=need_weights, padding="bool", seed=seed))


# Gradients


@given(problem=problems(layers=blueprints(dtypes=EXACT), grad=(True,)), frozen=st.integers(0, 2**8 - 1))
def test_a_partly_frozen_layer_trains_the_rest(problem: tuple[Blueprint, Call], frozen: int) -> None:
    blueprint, call = problem
    assume(not (call.hint_alone and blueprint.extra_columns))
    ours, stock = pair(blueprint)
    for layer in (ours, stock):
        for place, parameter in enumerate(layer.parameters()):
            parameter.requires_grad_(not frozen >> place & 1)
    found, wanted = ask(ours, call, call.tensors(blueprint)), ask(stock, call, call.tensors(blueprint))
    for name, tensor in wanted.tensors.items():
        if tensor is not None:
            assert_same(found[name], tensor, name)
    for name, parameter in ours.named_parameters():
        assert parameter.requires_grad or found[f"gradient of {name}"] is None


@given(problem=problems(grad=(False,)), training=st.booleans())
def test_a_frozen_layer_on_plain_inputs_gives_an_output_without_gradient(
    problem: tuple[Blueprint, Call], training: bool
) -> None:
    blueprint, call = problem
    layer = blueprint.build(FlashMultiHeadAttention).requires_grad_(False).train(training)
    tensors = call.tensors(blueprint)
    with pytest.warns(UserWarning) if call.mixed else pytest.MonkeyPatch.context():
        output, weights = layer(*tensors.inputs, **tensors.masks, **call.flags())
    assert not output.requires_grad
    assert weights is None or not weights.requires_grad


@given(problem=problems(grad=(True,)))
def test_every_parameter_that_stock_trains_gets_a_gradient(problem: tuple[Blueprint, Call]) -> None:
    blueprint, call = problem
    # on a GPU stock's SDPA gives None for an empty batch in half precision
    assume(call.batch != 0 or not torch.cuda.is_available())
    ours, stock = pair(blueprint)
    found, wanted = ask(ours, call, call.tensors(blueprint)), ask(stock, call, call.tensors(blueprint))
    for name, _ in stock.named_parameters():
        assert (found[f"gradient of {name}"] is None) == (wanted[f"gradient of {name}"] is None), name


# Rows that may look at nothing

blind_problems = problems(
    layers=blueprints(dtypes=EXACT, extra_columns=(False,), batch_first=(True,)),
    batches=SIZES,
    seqlens=LENGTHS,
    attn_masks=tuple(kind for kind in ATTN_MASKS if "causal" not in kind),
    layouts=INPUT_LAYOUTS[:3],
    blind=True,
)


@given(problem=blind_problems)
def test_blind_rows_are_zeros_and_the_others_untouched(problem: tuple[Blueprint, Call]) -> None:
    blueprint, call = problem
    layer, tensors = blueprint.build(FlashMultiHeadAttention), call.tensors(blueprint)
    found = ask(layer, call, tensors)
    with torch.no_grad():
        output, weights = definition(layer, *tensors.inputs, **tensors.masks)
    assert_same(found["output"], output, "output")
    if call.need_weights:
        assert_same(found["weights"], weights.mean(dim=1) if call.average_attn_weights else weights, "weights")


@given(problem=blind_problems)
def test_blind_rows_leave_every_gradient_finite_and_right(problem: tuple[Blueprint, Call]) -> None:
    blueprint, call = problem
    call = dataclasses.replace(call, grad=True)
    layer = blueprint.build(FlashMultiHeadAttention)
    found = ask(layer, call, call.tensors(blueprint))
    wanted = ask(Written(layer), call, call.tensors(blueprint))
    for name, tensor in found.tensors.items():
        if tensor is not None:
            reference = wanted[name] if name in wanted.tensors else wanted[name.replace(" of ", " of layer.")]
            assert_same(tensor, torch.zeros_like(tensor) if reference is None else reference, name)


def definition(
    layer: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Multi-head attention written out, batched and batch first: the output, and the weights of every head.

    A row that may look at nothing gets zeros. Masks as in ``nn.MultiheadAttention``, or 4-D.
    """
    embed_dim, heads = layer.embed_dim, layer.num_heads
    if layer.in_proj_weight is None:
        matrices = (layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight)
    else:
        matrices = layer.in_proj_weight.chunk(3)
    biases = (None,) * 3 if layer.in_proj_bias is None else layer.in_proj_bias.chunk(3)
    q, k, v = (nn.functional.linear(x, matrix, bias) for x, matrix, bias in zip((query, key, value), matrices, biases))
    batch, seqlen_q, seqlen_k = len(query), query.shape[1], key.shape[1]
    score = torch.zeros(batch, heads, seqlen_q, seqlen_k, dtype=query.dtype)
    for mask, shape in (
        (key_padding_mask, (batch, 1, 1, seqlen_k)),
        (attn_mask, (1, 1, seqlen_q, seqlen_k) if attn_mask is not None and attn_mask.dim() == 2 else score.shape),
    ):
        if mask is not None:
            mask = mask.reshape(shape) if mask.dim() < 4 else mask
            score = score.masked_fill(mask, -math.inf) if mask.dtype == torch.bool else score + mask
    if layer.bias_k is not None:
        k, v = (
            torch.cat((x, column.expand(batch, 1, -1)), dim=1) for x, column in ((k, layer.bias_k), (v, layer.bias_v))
        )
    if layer.add_zero_attn:
        k, v = (nn.functional.pad(x, (0, 0, 0, 1)) for x in (k, v))
    score = nn.functional.pad(score, (0, k.shape[1] - seqlen_k))
    q, k, v = (x.reshape(batch, x.shape[1], heads, embed_dim // heads).transpose(1, 2) for x in (q, k, v))
    score = score + q @ k.mT / math.sqrt(embed_dim // heads)
    blind = (score == -math.inf).all(dim=-1, keepdim=True)
    weights = score.masked_fill(blind, 0.0).softmax(dim=-1).masked_fill(blind, 0.0)
    out = (weights @ v).transpose(1, 2).reshape(batch, seqlen_q, embed_dim)
    return nn.functional.linear(out, layer.out_proj.weight, layer.out_proj.bias), weights


class Written(nn.Module):
    """A layer whose forward is the definition."""

    def __init__(self, layer: FlashMultiHeadAttention) -> None:
        super().__init__()
        self.layer = layer

    def forward(
        self, *inputs: Tensor, need_weights: bool, average_attn_weights: bool, is_causal: bool, **masks: Any
    ) -> tuple[Tensor, Tensor | None]:
        output, weights = definition(self.layer, *inputs, **masks)
        weights = weights.mean(dim=1) if average_attn_weights else weights
        return output, weights if need_weights else None


@given(problem=blind_problems)
def test_a_loss_on_blind_rows_alone_has_no_gradient_but_that_of_the_output_bias(
    problem: tuple[Blueprint, Call],
) -> None:
    blueprint, call = problem
    call = dataclasses.replace(call, grad=True, need_weights=True, average_attn_weights=False, padding="bool")
    layer, tensors = blueprint.build(FlashMultiHeadAttention), call.tensors(blueprint)
    assert tensors.key_padding_mask is not None
    tensors.key_padding_mask[0] = True
    output, weights = layer(*tensors.inputs, tensors.key_padding_mask, need_weights=True, average_attn_weights=False)
    assert not weights[0].any()
    bias = layer.out_proj.bias
    assert torch.equal(output[0], (torch.zeros_like(output[0]) if bias is None else bias.expand_as(output[0])))
    (output[0].sum() + weights[0].sum()).backward()
    for name, parameter in layer.named_parameters():
        if name != "out_proj.bias":
            assert parameter.grad is None or not parameter.grad.any(), name
    for name, leaf in tensors.leaves.items():
        assert leaf.grad is None or not leaf.grad.any(), name


@given(problem=blind_problems, batch_first=st.booleans(), training=st.booleans())
def test_unbatched_and_batch_second_calls_treat_blind_rows_alike(
    problem: tuple[Blueprint, Call], batch_first: bool, training: bool
) -> None:
    blueprint, call = problem
    call = dataclasses.replace(call, grad=False, training=training, batch=1, padding="none", layout="contiguous")
    layer, tensors = blueprint.build(FlashMultiHeadAttention), call.tensors(blueprint)
    whole = ask(layer, call, tensors)
    layer.batch_first = batch_first
    alone = ask(layer, call, Unbatched.of(tensors))
    assert_same(alone["output"], whole["output"][0], "output")
    if call.need_weights:
        assert_same(alone["weights"], whole["weights"][0], "weights")


class Unbatched:
    """The only item of a batch of one, as arguments of an unbatched call."""

    @staticmethod
    def of(tensors: Any) -> Any:
        seen: dict[int, Tensor] = {}
        query, key, value = (seen.setdefault(id(x), x[0]) for x in tensors.inputs)
        return dataclasses.replace(tensors, query=query, key=key, value=value)


# Construction and state


@given(blueprint=blueprints(), seed=st.integers(0, 2**16))
def test_the_same_seed_gives_the_same_layer_and_leaves_the_same_generator(blueprint: Blueprint, seed: int) -> None:
    torch.manual_seed(seed)
    stock = nn.MultiheadAttention(**blueprint.arguments)
    after = torch.get_rng_state()
    torch.manual_seed(seed)
    ours = FlashMultiHeadAttention(**blueprint.arguments)
    assert torch.equal(torch.get_rng_state(), after)
    for (name, mine), (other, theirs) in zip(ours.named_parameters(), stock.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(mine, theirs), name
    for layer in (ours, stock):
        torch.manual_seed(seed + 1)
        layer._reset_parameters()
    for mine, theirs in zip(ours.parameters(), stock.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@given(blueprint=blueprints())
def test_state_goes_both_ways_in_the_order_of_the_stock_class(blueprint: Blueprint) -> None:
    stock, ours = blueprint.build(), FlashMultiHeadAttention(**blueprint.arguments)
    assert list(ours.state_dict()) == list(stock.state_dict())
    assert ours.state_dict()._metadata == stock.state_dict()._metadata
    assert list(ours._parameters) == list(stock._parameters)
    assert [tuple(p.shape) for p in ours.parameters()] == [tuple(p.shape) for p in stock.parameters()]
    assert [name for name, _ in ours.named_modules()] == [name for name, _ in stock.named_modules()]
    assert not list(ours.buffers())
    ours.load_state_dict(stock.state_dict(), strict=True)
    back = nn.MultiheadAttention(**blueprint.arguments)
    back.load_state_dict(ours.state_dict(), strict=True)
    for name, tensor in stock.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor)
        assert torch.equal(back.state_dict()[name], tensor)


@given(blueprint=blueprints())
def test_repr_and_attributes_are_those_of_the_stock_class(blueprint: Blueprint) -> None:
    ours, stock = pair(blueprint)
    assert repr(ours) == repr(stock).replace("MultiheadAttention", "FlashMultiHeadAttention", 1)
    assert ours.extra_repr() == ""
    assert isinstance(ours, nn.MultiheadAttention)
    assert type(ours.out_proj) is type(stock.out_proj)
    for name, value in vars(stock).items():
        if not name.startswith("_") or name == "_qkv_same_embed_dim":
            assert getattr(ours, name) == value, name
    for name in ("in_proj_weight", "in_proj_bias", "q_proj_weight", "k_proj_weight", "v_proj_weight"):
        assert (getattr(ours, name) is None) == (getattr(stock, name) is None), name
    assert (ours.bias_k is None) == (stock.bias_k is None)


@given(blueprint=blueprints(), dropout=st.sampled_from((0.0, 0.5, 1.5, -1.0)))
def test_the_constructor_takes_its_arguments_by_place(blueprint: Blueprint, dropout: float) -> None:
    blueprint = dataclasses.replace(blueprint, dropout=dropout, device="cpu")
    values = list(blueprint.arguments.values())
    ours, stock = FlashMultiHeadAttention(*values), nn.MultiheadAttention(*values)
    assert list(ours.state_dict()) == list(stock.state_dict())
    assert (ours.dropout, ours.batch_first) == (stock.dropout, stock.batch_first)


@given(problem=problems(layers=blueprints(dtypes=EXACT), grad=(False,)))
def test_forward_takes_its_arguments_by_place(problem: tuple[Blueprint, Call]) -> None:
    blueprint, call = problem
    layer, tensors = blueprint.build(FlashMultiHeadAttention), call.tensors(blueprint)
    wanted = ask(layer, call, tensors)
    with torch.no_grad(), pytest.warns(UserWarning) if call.mixed else pytest.MonkeyPatch.context():
        output, weights = layer(
            *tensors.inputs,
            tensors.key_padding_mask,
            call.need_weights,
            tensors.attn_mask,
            call.average_attn_weights,
            call.is_causal,
        )
    assert_same(output, wanted["output"], "output")
    if weights is not None:
        assert_same(weights, wanted["weights"], "weights")


# Dropout


@given(problem=problems(layers=blueprints(dtypes=EXACT), need_weights=(True,)), p=st.sampled_from((0.5, 0.1, 0.9)))
def test_with_weights_training_draws_the_dropout_of_the_stock_layer(problem: tuple[Blueprint, Call], p: float) -> None:
    blueprint, call = problem
    call = dataclasses.replace(call, training=True)
    found = []
    for layer in pair(dataclasses.replace(blueprint, dropout=p)):
        torch.manual_seed(call.seed)
        output, _ = forward(layer, call, blueprint)
        output.sum().backward()
        parameters = {name: parameter.grad for name, parameter in layer.named_parameters()}
        found.append((output.detach(), torch.get_rng_state(), parameters))
    (ours, our_state, our_grads), (theirs, state, grads) = found
    assert_same(ours, theirs, "output")
    assert torch.equal(our_state, state)
    for name, grad in grads.items():
        if grad is not None:
            assert_same(our_grads[name], grad, name)


def forward(layer: Any, call: Call, blueprint: Blueprint, **changes: Any) -> tuple[Tensor, Tensor | None]:
    """One plain forward, mixed masks made quiet by ``pytest.warns``."""
    tensors = call.tensors(blueprint)
    layer.train(call.training)
    with pytest.warns(UserWarning, match="mismatched") if call.mixed else pytest.MonkeyPatch.context():
        return layer(*tensors.inputs, **tensors.masks, **{**call.flags(), **changes})


@given(problem=problems(layers=blueprints(dtypes=EXACT)))
def test_certain_dropout_leaves_the_output_bias(problem: tuple[Blueprint, Call]) -> None:
    blueprint, call = problem
    layer = dataclasses.replace(blueprint, dropout=1.0).build(FlashMultiHeadAttention)
    output, _ = forward(layer, dataclasses.replace(call, training=True), blueprint)
    bias = layer.out_proj.bias
    assert_same(output, torch.zeros_like(output) if bias is None else bias.expand_as(output), "output")


@given(problem=problems(layers=blueprints(dtypes=EXACT)), p=st.sampled_from((0.5, 1.0)))
def test_eval_ignores_dropout_and_draws_nothing(problem: tuple[Blueprint, Call], p: float) -> None:
    blueprint, call = problem
    call = dataclasses.replace(call, training=False)
    plain = forward(blueprint.build(FlashMultiHeadAttention), call, blueprint)[0]
    layer = dataclasses.replace(blueprint, dropout=p).build(FlashMultiHeadAttention)
    before = torch.get_rng_state()
    assert_same(forward(layer, call, blueprint)[0], plain, "output")
    assert torch.equal(torch.get_rng_state(), before)


@given(problem=problems(layers=blueprints(dtypes=EXACT)))
def test_dropout_is_read_at_each_call(problem: tuple[Blueprint, Call]) -> None:
    blueprint, call = problem
    call = dataclasses.replace(call, training=True)
    layer = blueprint.build(FlashMultiHeadAttention)
    plain, _ = forward(layer, call, blueprint)
    layer.dropout = 1.0
    dropped, _ = forward(layer, call, blueprint)
    layer.dropout = 0.0
    again, _ = forward(layer, call, blueprint)
    bias = layer.out_proj.bias
    assert_same(dropped, torch.zeros_like(plain) if bias is None else bias.expand_as(plain), "output")
    assert_same(again, plain, "output")


@given(problem=problems(layers=blueprints(dtypes=EXACT), need_weights=(True,)))
def test_returned_weights_are_those_before_dropout(problem: tuple[Blueprint, Call]) -> None:
    blueprint, call = problem
    call = dataclasses.replace(call, training=True)
    _, weights = forward(dataclasses.replace(blueprint, dropout=0.7).build(FlashMultiHeadAttention), call, blueprint)
    _, wanted = forward(blueprint.build(FlashMultiHeadAttention), call, blueprint)
    assert_same(weights.detach(), wanted.detach(), "weights")


@given(p=st.sampled_from((0.2, 0.5)), need_weights=st.booleans(), masked=st.booleans(), seed=st.integers(0, 99))
@settings(max_examples=10)
def test_the_mean_over_many_dropouts_is_the_output_without(
    p: float, need_weights: bool, masked: bool, seed: int
) -> None:
    blueprint = Blueprint(dtype=torch.float64, seed=seed)
    call = Call(1, 4, 4, "aaa", attn_mask="bool 2-D" if masked else "none", need_weights=need_weights, seed=seed)
    layer = dataclasses.replace(blueprint, dropout=p).build(FlashMultiHeadAttention)
    tensors = call.tensors(blueprint)
    x, times = tensors.query.detach().expand(4000, -1, -1), 4000
    torch.manual_seed(seed)
    with torch.no_grad():
        samples = layer(x, x, x, attn_mask=tensors.attn_mask, need_weights=need_weights)[0]
        plain = layer.eval()(x[:1], x[:1], x[:1], attn_mask=tensors.attn_mask, need_weights=need_weights)[0]
    error = (samples.mean(dim=0) - plain[0]).abs() / (samples.std(dim=0) / math.sqrt(times) + 1e-12)
    assert error.max() < 6, "six standard errors of the mean"
    assert samples.std(dim=0).max() > 0, "nothing was dropped"


@given(problem=problems(layers=blueprints(dtypes=EXACT)), p=st.sampled_from((0.3, 0.5)))
def test_dropout_comes_again_under_the_same_seed(problem: tuple[Blueprint, Call], p: float) -> None:
    blueprint, call = problem
    layer = dataclasses.replace(blueprint, dropout=p).build(FlashMultiHeadAttention)
    call = dataclasses.replace(call, training=True)
    outputs = []
    for _ in range(2):
        torch.manual_seed(call.seed)
        outputs.append(forward(layer, call, blueprint)[0])
    assert torch.equal(*outputs)


# Attributes are read at each call


@given(
    problem=problems(layers=blueprints(dtypes=EXACT, heads=(4,), head_dims=(3,))),
    heads=st.sampled_from((1, 2, 3, 6, 12)),
)
def test_num_heads_is_read_at_each_call(problem: tuple[Blueprint, Call], heads: int) -> None:
    blueprint, call = problem
    assume(not (call.hint_alone and blueprint.extra_columns))
    call = dataclasses.replace(call, attn_mask=call.attn_mask.replace("3-D", "2-D"))
    ours, stock = pair(blueprint)
    ours.num_heads = stock.num_heads = heads
    assert_layers_agree(ours, stock, call, blueprint)


def assert_layers_agree(ours: Any, theirs: Any, call: Call, blueprint: Blueprint, **changes: Any) -> None:
    """Two float64 layers answer alike: output, weights, gradients where the second has them, warnings."""
    found = ask(ours, call, call.tensors(blueprint))
    wanted = ask(theirs, call, call.tensors(blueprint), **changes)
    for name, tensor in wanted.tensors.items():
        if tensor is not None:
            assert found[name] is not None, name
            assert_same(found[name], tensor, name)
    assert found.warnings == wanted.warnings


@given(problem=problems(layers=blueprints(dtypes=EXACT)))
def test_batch_first_is_read_at_each_call(problem: tuple[Blueprint, Call]) -> None:
    blueprint, call = problem
    assume(not (call.hint_alone and blueprint.extra_columns))
    ours, stock = pair(blueprint)
    ours.batch_first = stock.batch_first = not blueprint.batch_first
    assert_layers_agree(ours, stock, call, dataclasses.replace(blueprint, batch_first=not blueprint.batch_first))


@given(problem=problems(layers=blueprints(dtypes=EXACT, extra_columns=(False,))))
def test_add_zero_attn_and_extra_keys_are_read_at_each_call(problem: tuple[Blueprint, Call]) -> None:
    blueprint, call = problem
    call = dataclasses.replace(call, is_causal=False)
    ours, stock = pair(blueprint)
    column = torch.linspace(-1.0, 1.0, blueprint.embed_dim).double().view(1, 1, -1)
    for layer in (ours, stock):
        layer.add_zero_attn = True
        layer.bias_k, layer.bias_v = nn.Parameter(column.clone()), nn.Parameter(-column)
    assert_layers_agree(ours, stock, dataclasses.replace(call, need_weights=True), blueprint)


@given(problem=problems(layers=blueprints(dtypes=EXACT)), scale=st.sampled_from((0.5, -1.0)))
def test_weights_may_be_deleted_and_set_to_plain_tensors(problem: tuple[Blueprint, Call], scale: float) -> None:
    blueprint, call = problem
    assume(not (call.hint_alone and blueprint.extra_columns))
    ours, stock = pair(blueprint)
    for layer in (ours, stock):
        for module, name in [(layer, name) for name in WEIGHTS] + [(layer.out_proj, "weight")]:
            parameter = getattr(module, name)
            if parameter is not None:
                delattr(module, name)
                setattr(module, name, parameter.detach() * scale)
    assert_layers_agree(ours, stock, call, blueprint)


WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


@given(problem=problems(layers=blueprints(dtypes=EXACT)))
def test_a_subclass_may_have_properties_for_weights(problem: tuple[Blueprint, Call]) -> None:
    class Doubled(FlashMultiHeadAttention):
        @property
        def in_proj_weight(self) -> Tensor | None:
            held = self.__dict__["_parameters"].get("in_proj_weight")
            return None if held is None else 2 * held

    blueprint, call = problem
    layer, twin = (blueprint.build(FlashMultiHeadAttention) for _ in range(2))
    layer.__class__ = Doubled
    if twin.in_proj_weight is not None:
        with torch.no_grad():
            twin.in_proj_weight.mul_(2)
    tensors = call.tensors(blueprint)
    assert_same(ask(layer, call, tensors)["output"], ask(twin, call, tensors)["output"], "output")


@given(problem=problems(layers=blueprints(dtypes=EXACT)))
def test_out_proj_may_be_anything_with_a_weight_and_a_bias(problem: tuple[Blueprint, Call]) -> None:
    blueprint, call = problem
    assume(not (call.hint_alone and blueprint.extra_columns))
    ours, stock = pair(blueprint)
    for layer in (ours, stock):
        torch.manual_seed(call.seed)
        layer.out_proj = nn.Linear(blueprint.embed_dim, blueprint.embed_dim, dtype=torch.float64)
    assert_layers_agree(ours, stock, call, blueprint)


# The shortest way through a layer


class Longer(FlashMultiHeadAttention):
    """The same layer, which as a subclass does not take the shortest way."""


WAYS = (FlashMultiHeadAttention, Longer)
PROJECTIONS = {"aaa": 2, "abb": 3}
"""Of what is one object, one; the output's among them."""


@given(
    seqlen=st.integers(1, 5),
    heads=st.sampled_from((1, 2, 4)),
    batch=st.integers(1, 3),
    batch_first=st.booleans(),
    sharing=st.sampled_from(SHARINGS),
    padding=st.booleans(),
    way=st.sampled_from(WAYS),
)
def test_a_projection_is_one_operator_and_nothing_is_copied_but_heads(
    seqlen: int,
    heads: int,
    batch: int,
    batch_first: bool,
    sharing: str,
    padding: bool,
    way: type[FlashMultiHeadAttention],
) -> None:
    layer = way(16, heads, batch_first=batch_first).eval()
    given = {name: torch.randn(*((batch, seqlen) if batch_first else (seqlen, batch)), 16) for name in "abc"}
    inputs = [given[name] for name in sharing]
    mask = torch.zeros(batch, seqlen, dtype=torch.bool) if padding else None
    with torch.no_grad(), Operators() as operators:
        out, _ = layer(*inputs, key_padding_mask=mask, need_weights=False)
    names = [name.split(".")[0] for name in operators.names]
    assert names.count("addmm") == PROJECTIONS.get(sharing, 4)
    assert {"mm", "bmm", "add", "add_", "copy_", "cat", "stack"}.isdisjoint(names)
    assert out.is_contiguous()
    if not out.is_cuda:  # where a mask is copied too
        # what attention gave, where its kernel gives batch by batch and the output lies otherwise
        assert names.count("clone") <= (not batch_first)


FEATURES: tuple[dict[str, Any], ...] = (
    {},
    {"trust_is_causal": True, "need_weights": False},
    {"window": (1, 0)},
    {"num_kv_heads": 1},
    {"backend": "naive"},
    {"call_out_proj": True},
)


@given(
    problem=problems(attn_masks=("none", "bool causal", "float causal")),
    features=st.sampled_from(FEATURES),
    change=st.sampled_from((None, "weights", "frozen", "hop", "class", "class window")),
)
def test_the_shortest_way_through_a_layer_is_the_way_of_every_call(
    problem: tuple[Blueprint, Call], features: dict[str, Any], change: str | None
) -> None:
    blueprint, call = problem
    layer, found = FlashMultiHeadAttention(**{**blueprint.arguments, **features}), []
    if change == "hop":
        layer.process_heads = lambda q, k, v: (q * 2, k, v)  # type: ignore[method-assign]
    elif change == "frozen":
        layer.requires_grad_(False)
    elif change == "weights" and layer.in_proj_weight is not None:
        held = layer.in_proj_weight
        del layer.in_proj_weight
        layer.in_proj_weight = held * 2  # type: ignore[assignment]
    patch: Any = contextlib.nullcontext()
    if change == "class":
        patch = mock.patch.object(FlashMultiHeadAttention, "process_heads", lambda self, q, k, v: (q * 3, k, v))
    elif change == "class window":
        patch = mock.patch.object(FlashMultiHeadAttention, "window", Window(0, 0))
    for way in WAYS:
        layer.__class__ = way
        with patch, record() as ran:
            found.append((ask(layer, call, call.tensors(blueprint)), ran))
    (short, one), (long, other) = found
    for name, tensor in long.tensors.items():
        if tensor is not None:
            assert_same(short[name], tensor, name)
    assert [(str(each.spec), each.backend) for each in one] == [(str(each.spec), each.backend) for each in other]


@given(
    heads=st.sampled_from((1, 2, 4)),
    bias=st.booleans(),
    batch_first=st.booleans(),
    sharing=st.sampled_from(SHARINGS),
    padding=st.booleans(),
    training=st.booleans(),
    grad=st.booleans(),
)
def test_the_shortest_way_is_taken_where_nothing_is_asked(
    heads: int, bias: bool, batch_first: bool, sharing: str, padding: bool, training: bool, grad: bool
) -> None:
    layer = FlashMultiHeadAttention(8, heads, bias=bias, batch_first=batch_first).train(training)
    given = {name: torch.randn(2, 3, 8) for name in "abc"}
    inputs = [given[name] if batch_first else given[name].transpose(0, 1) for name in sharing]
    inputs = [inputs[sharing.index(name)] for name in sharing]  # one object where letters are equal
    mask = torch.arange(3) > torch.tensor([[0], [2]]) if padding else None
    with torch.set_grad_enabled(grad):
        for need_weights, average in ((False, True), (True, True), (True, False)):
            call = {"need_weights": need_weights, "attn_mask": None, "average": average, "is_causal": False}
            found = shortcut.attend_plain(layer, *inputs, mask, **call)
            assert found is not None
            options = {"need_weights": need_weights, "average_attn_weights": average, "key_padding_mask": mask}
            for mine, stock in zip(found, nn.MultiheadAttention.forward(layer, *inputs, **options)):
                assert (mine is None) == (stock is None)
                if mine is not None and stock is not None:
                    assert_same(mine, stock, "output or weights")
            for change in (lambda x: x[0], Tensor.double):
                assert shortcut.attend_plain(layer, *map(change, inputs), mask, **call) is None
            if padding:
                for other in (mask[:, :2], mask[:1], mask.float(), mask[None]):
                    assert shortcut.attend_plain(layer, *inputs, other, **call) is None


@given(
    lengths=st.lists(st.integers(0, 4), min_size=1, max_size=3).filter(any),
    tail=st.integers(0, 2),
    cast=st.booleans(),
    batch_first=st.booleans(),
    training=st.booleans(),
    kind=st.sampled_from(("documents", "padding", "hint", "rule")),
)
def test_masks_and_autocast_take_the_shortest_way(
    lengths: list[int], tail: int, cast: bool, batch_first: bool, training: bool, kind: str
) -> None:
    layer = FlashMultiHeadAttention(8, 2, batch_first=batch_first).train(training)
    size = sum(lengths) + tail
    x = noise(0, 1, size, 8, dtype=torch.float32)
    x = (x if batch_first else x.transpose(0, 1)).requires_grad_()
    valid = torch.arange(size)[None] < sum(lengths)
    masks: dict[str, dict[str, Any]] = {
        "documents": {"attn_mask": Documents(torch.tensor([0, *lengths]).cumsum(0))},
        "padding": {"key_padding_mask": ~valid},
        "hint": {"attn_mask": torch.ones(size, size, dtype=torch.bool).triu(1), "is_causal": True},
        "rule": {"attn_mask": KeyPadding(valid)},
    }
    given: dict[str, Any] = {"key_padding_mask": None, "attn_mask": None, "is_causal": False, **masks[kind]}
    given |= {"need_weights": False, "average": True}
    found = []
    with torch.autocast(x.device.type, torch.bfloat16, enabled=cast):
        assert shortcut.attend_plain(layer, x, x, x, **given) is not None
        for way in WAYS:
            layer.__class__ = way
            out, _ = layer(x, x, x, need_weights=False, **masks[kind])
            found.append([out, *torch.autograd.grad(out.float().square().sum(), [x, *layer.parameters()])])
    assert shortcut.attend_plain(layer, x, x, x, **given) is None
    for short, long in zip(*found):
        assert torch.equal(short, long)


OPTIONS: tuple[dict[str, Any], ...] = (
    *({name: True} for name in ("call_out_proj", "causal", "skip_padding", "trust_is_causal")),
    *({"window": (1, 0)}, {"softcap": 2.0}, {"softmax_scale": 0.5}, {"backend": "naive"}, {"need_weights": False}),
)


@given(options=st.lists(st.sampled_from(OPTIONS), max_size=4), swapped=st.booleans())
def test_an_option_that_is_taken_back_was_never_given(options: list[dict[str, Any]], swapped: bool) -> None:
    """The layer's own dictionary is as it was, and its calls are the shortest again."""
    layer: Any = nn.MultiheadAttention(8, 4) if swapped else FlashMultiHeadAttention(8, 4)
    layer = replace_mha(layer, window=None, causal=False) if swapped else layer
    before, x = dict(vars(layer)), torch.randn(3, 1, 8)
    for option in options:
        for name, value in option.items():
            setattr(layer, name, value)
    for option in options:
        for name in option:
            setattr(layer, name, getattr(FlashMultiHeadAttention, name))
    assert vars(layer) == before
    call: dict[str, Any] = {"key_padding_mask": None, "need_weights": False, "attn_mask": None}
    assert shortcut.attend_plain(layer, x, x, x, **call, average=True, is_causal=False) is not None


@given(features=st.sampled_from(FEATURES))
def test_a_layer_shows_what_it_has_beyond_the_stock_one(features: dict[str, Any]) -> None:
    shown = repr(FlashMultiHeadAttention(8, 2, **features))
    bare = repr(nn.MultiheadAttention(8, 2)).replace("MultiheadAttention", "FlashMultiHeadAttention", 1)
    assert (shown == bare) == (not features)
    assert all(f"{name}=" in shown for name in features)


# What the stock class does not have


@given(
    problem=problems(
        layers=blueprints(dtypes=EXACT),
        batches=SIZES,
        seqlens=LENGTHS,
        layouts=INPUT_LAYOUTS[:3],
        attn_masks=ATTN_MASKS[3:5],
    ),
    one_head=st.booleans(),
)
def test_masks_with_four_axes_mean_what_three_axes_mean(problem: tuple[Blueprint, Call], one_head: bool) -> None:
    blueprint, call = problem
    layer, tensors = blueprint.build(FlashMultiHeadAttention), call.tensors(blueprint)
    assert tensors.attn_mask is not None and call.batch is not None
    four = tensors.attn_mask.detach().unflatten(0, (call.batch, blueprint.num_heads))
    if one_head:
        four = four[:, :1]
    three = four.expand(-1, blueprint.num_heads, -1, -1).flatten(0, 1)
    call = dataclasses.replace(call, grad=False)
    found = ask(layer, call, dataclasses.replace(tensors, attn_mask=four))
    wanted = ask(layer, call, dataclasses.replace(tensors, attn_mask=three))
    assert_same(found["output"], wanted["output"], "output")
    if call.need_weights:
        assert_same(found["weights"], wanted["weights"], "weights")


lengths = st.lists(st.integers(1, 5), min_size=1, max_size=4)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
@given(
    blueprint=blueprints(dtypes=EXACT, packed=(True,), batch_first=(True,)),
    lengths=lengths,
    sharing=st.sampled_from(SHARINGS),
    need_weights=st.booleans(),
    training=st.booleans(),
    average=st.booleans(),
)
def test_nested_tensors_answer_like_their_items(
    layout: torch.layout,
    blueprint: Blueprint,
    lengths: list[int],
    sharing: str,
    need_weights: bool,
    training: bool,
    average: bool,
) -> None:
    layer = blueprint.build(FlashMultiHeadAttention).train(training)
    items = nested_items(blueprint, lengths, sharing)
    grad = layout == torch.jagged
    letters = {letter: [x.clone().requires_grad_(grad) for x in items[letter]] for letter in set(sharing)}
    nested = {letter: as_nested(rows, layout, grad) for letter, rows in letters.items()}
    with torch.set_grad_enabled(grad):
        output, weights = layer(
            *(nested[letter] for letter in sharing), need_weights=need_weights, average_attn_weights=average
        )
        assert output.is_nested and output.layout == layout
        rows = output.unbind()
        assert len(rows) == len(lengths)
        alone = [
            layer(*(letters[letter][i] for letter in sharing), average_attn_weights=average)
            for i in range(len(lengths))
        ]
    for row, (wanted, _) in zip(rows, alone, strict=True):
        assert_same(row.detach(), wanted.detach(), "output")
    if weights is not None:
        longest = max(len(row) for row in rows)
        for i, (_, wanted) in enumerate(alone):
            queries, keys = wanted.shape[-2:]
            columns = blueprint.extra_columns
            found = weights[i].detach()
            assert found.shape[-2] == longest
            assert_same(found[..., :queries, : keys - columns], wanted.detach()[..., : keys - columns], "weights")
            assert not found[..., queries:, :].any()
    assert (weights is None) == (not need_weights)
    if grad:
        assert_gradients_agree(layer, rows, [wanted for wanted, _ in alone], letters, nested)


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@torch.no_grad()
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_a_nested_call_loses_no_argument(layout: torch.layout) -> None:
    layer = FlashMultiHeadAttention(8, 2, batch_first=True).eval()
    short, long = ([torch.randn(length, 8) for length in lengths] for lengths in ((2, 4), (3, 6)))
    x, y = (torch.nested.nested_tensor(rows, layout=layout) for rows in (short, long))
    with record() as calls:
        layer(x, y, y, backend="naive", need_weights=False)
    assert [call.backend for call in calls] == ["naive"]
    with pytest.raises(RuntimeError, match="Need attn_mask"):
        layer(x, x, x, is_causal=True)
    layer.window = (1, 0)
    seen = layer(x, x, x)[0]
    for rows, found in zip(short, seen.unbind()):
        assert_same(found, layer(rows, rows, rows)[0], "an item under a window")
    with pytest.raises(AssertionError, match="window beside nested query and key"):
        layer(x, y, y)


def nested_items(blueprint: Blueprint, lengths: list[int], sharing: str) -> dict[str, list[Tensor]]:
    """Items for every letter; where queries are no keys, their lengths are other ones."""
    torch.manual_seed(blueprint.seed)
    items: dict[str, list[Tensor]] = {}
    for place, letter in enumerate(sharing):
        own = [1 + n % 3 for n in lengths] if place == 0 and letter not in sharing[1:] else lengths
        if letter not in items:
            shapes = [(n, blueprint.widths[place]) for n in own]
            items[letter] = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    return items


def as_nested(rows: list[Tensor], layout: torch.layout, requires_grad: bool) -> Tensor:
    leaves = [row.detach() for row in rows]
    return torch.nested.nested_tensor(leaves, layout=layout, requires_grad=requires_grad)


def assert_gradients_agree(
    layer: FlashMultiHeadAttention,
    rows: list[Tensor],
    alone: list[Tensor],
    items: dict[str, list[Tensor]],
    nested: dict[str, Tensor],
) -> None:
    """The gradients of the parameters and of every item, through a nested call and through calls of the items."""
    sum((row * row).sum() for row in rows).backward()
    found = {name: parameter.grad.clone() for name, parameter in layer.named_parameters()}
    layer.zero_grad()
    sum((row * row).sum() for row in alone).backward()
    for name, parameter in layer.named_parameters():
        assert_same(found[name], parameter.grad, name)
    for letter, tensor in nested.items():
        for mine, item in zip(tensor.grad.unbind(), items[letter], strict=True):
            assert_same(mine, item.grad, f"gradient of {letter}")


@given(
    problem=problems(layers=blueprints(dtypes=EXACT, heads=(2, 3, 4, 6)), batches=(2, 1, 3), seqlens=LENGTHS),
    kv_heads=st.sampled_from((1, 2, 3)),
)
def test_grouped_heads_are_repeated_heads(problem: tuple[Blueprint, Call], kv_heads: int) -> None:
    blueprint, call = problem
    assume(blueprint.num_heads % kv_heads == 0)
    grouped = blueprint.build(FlashMultiHeadAttention, num_kv_heads=kv_heads)
    whole = FlashMultiHeadAttention(**blueprint.arguments)
    head_dim, times = blueprint.embed_dim // blueprint.num_heads, blueprint.num_heads // kv_heads

    def repeated(rows: Tensor) -> Tensor:
        return rows.unflatten(0, (kv_heads, head_dim)).repeat_interleave(times, dim=0).flatten(0, 1)

    state = grouped.state_dict()
    for name, tensor in state.items():
        if name.startswith("in_proj"):
            q, k, v = tensor.split([blueprint.embed_dim, kv_heads * head_dim, kv_heads * head_dim])
            state[name] = torch.cat((q, repeated(k), repeated(v)))
        elif name in ("k_proj_weight", "v_proj_weight"):
            state[name] = repeated(tensor)
        elif name in ("bias_k", "bias_v"):
            state[name] = repeated(tensor.flatten())[None, None]
    whole.load_state_dict(state, strict=True)
    found = ask(grouped, call, call.tensors(blueprint))
    wanted = ask(whole, call, call.tensors(blueprint))
    shared = [name for name in wanted.tensors if not name.startswith(("gradient of in_", "gradient of k_proj"))]
    for name in shared:
        if "bias_" in name or "v_proj" in name or wanted[name] is None:
            continue
        assert_same(found[name], wanted[name], name)


@given(
    problem=problems(
        layers=blueprints(dtypes=EXACT), seqlens=LENGTHS, attn_masks=("none", "bool 2-D", "bool 3-D", "float 2-D")
    ),
    left=st.none() | st.integers(0, 4),
    right=st.none() | st.integers(0, 4),
    as_pair=st.booleans(),
)
def test_a_window_is_a_mask_that_hides_what_lies_outside(
    problem: tuple[Blueprint, Call], left: int | None, right: int | None, as_pair: bool
) -> None:
    blueprint, call = problem
    window: Any = (left, right) if as_pair else Window(left, right)
    windowed, plain = blueprint.build(FlashMultiHeadAttention, window=window), blueprint.build(FlashMultiHeadAttention)
    tensors = call.tensors(blueprint)
    place = torch.arange(call.seqlen_k) - (torch.arange(call.seqlen_q) + call.seqlen_k - call.seqlen_q)[:, None]
    outside = torch.zeros_like(place, dtype=torch.bool)
    if left is not None:
        outside |= place < -left
    if right is not None:
        outside |= place > right
    mask = tensors.attn_mask
    if mask is None:
        mask = outside
    else:
        mask = mask | outside if mask.dtype == torch.bool else mask.masked_fill(outside, -math.inf)
    found = ask(windowed, call, tensors)
    wanted = ask(plain, call, dataclasses.replace(call.tensors(blueprint), attn_mask=mask))
    for name, tensor in found.tensors.items():
        if tensor is not None and name != "gradient of attn_mask":
            assert_same(tensor, wanted[name], name)


@given(problem=problems(layers=blueprints(dtypes=EXACT)), blind=st.booleans())
def test_named_backends_agree_however_they_are_named(problem: tuple[Blueprint, Call], blind: bool) -> None:
    blueprint, call = problem
    call = dataclasses.replace(call, blind=blind)
    automatic = blueprint.build(FlashMultiHeadAttention)
    wanted = ask(automatic, call, call.tensors(blueprint))
    for name in ("naive", "sdpa"):
        layer = blueprint.build(FlashMultiHeadAttention, backend=name)
        with record() as ran:
            found = ask(layer, call, call.tensors(blueprint))
            per_call = ask(automatic, call, call.tensors(blueprint), backend=name)
        assert {one_call.backend for one_call in ran} == {name}
        assert [one_call.layer for one_call in ran] == [layer, automatic]
        for answer in (found, per_call):
            for part, tensor in wanted.tensors.items():
                if tensor is not None:
                    assert_same(answer[part], tensor, part)


@given(problem=problems(layers=blueprints(dtypes=EXACT), grad=(False,)), order=st.permutations(("naive", "sdpa")))
def test_the_first_backend_of_a_list_that_can_serves(problem: tuple[Blueprint, Call], order: list[str]) -> None:
    blueprint, call = problem
    layer = blueprint.build(FlashMultiHeadAttention, backend=["flash_attn", *order])
    with record() as ran:
        ask(layer, call, call.tensors(blueprint))
    assert [one_call.backend for one_call in ran] == order[:1]


@given(problem=problems(layers=blueprints(dtypes=EXACT), blind=True))
def test_every_call_is_the_definition(problem: tuple[Blueprint, Call]) -> None:
    blueprint, call = problem
    call = dataclasses.replace(call, grad=False)
    layer, tensors = blueprint.build(FlashMultiHeadAttention), call.tensors(blueprint)
    inputs, masks = tensors.inputs, tensors.masks
    if call.batch is None:
        inputs = tuple(x[None] for x in inputs)
    elif not blueprint.batch_first:
        inputs = tuple(x.transpose(0, 1) for x in inputs)
    with torch.no_grad():
        output, weights = definition(layer, *inputs, **masks)
    weights = weights.mean(dim=1) if call.average_attn_weights else weights
    if call.batch is None:
        output, weights = output[0], weights[0]
    elif not blueprint.batch_first:
        output = output.transpose(0, 1)
    found = ask(layer, call, tensors)
    assert_same(found["output"], output, "output")
    if call.need_weights:
        assert_same(found["weights"], weights, "weights")

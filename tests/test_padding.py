"""Padding: exact on every row by default, left out altogether where skip_padding says so."""

import dataclasses
import weakref
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import Largest
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import flashmha
from flashmha import (
    FlashMultiHeadAttention,
    KeyLengths,
    KeyPadding,
    Positions,
    Window,
    attention,
    backends,
    causal,
    explain,
)
from flashmha.backends.choice.registry import instead
from flashmha.backends.sdpa.backend import Sdpa
from flashmha.backends.sdpa.pieces import Costs
from flashmha.testing import assert_agrees, noise, seeds, specs


@dataclasses.dataclass(frozen=True)
class Batch:
    """A padded batch for a self-attention layer; every sequence has a real first token."""

    batch: int = 3
    seqlen: int = 6
    heads: int = 2
    batch_first: bool = True
    is_causal: bool = False
    window: int | None = None
    pattern: str = "right"
    floating: bool = False
    seed: int = 0

    @property
    def hidden(self) -> Tensor:
        torch.manual_seed(self.seed)
        if self.pattern == "holes":
            hidden = torch.rand(self.batch, self.seqlen) < 0.5
            hidden[:, 0] = False
            return hidden
        lengths = torch.randint(1, self.seqlen + 1, (self.batch, 1))
        places = torch.arange(self.seqlen)
        return (places >= lengths) if self.pattern == "right" else (places < self.seqlen - lengths)

    def layer(self, **features: Any) -> FlashMultiHeadAttention:
        torch.manual_seed(self.seed)
        layer = FlashMultiHeadAttention(
            4 * self.heads, self.heads, batch_first=self.batch_first, dtype=torch.float64, **features
        )
        nn.init.normal_(layer.in_proj_bias)
        nn.init.normal_(layer.out_proj.bias)
        if self.window is not None:
            layer.window = (self.window, self.window)
        return layer

    def call(self) -> dict[str, Any]:
        shape = (self.batch, self.seqlen) if self.batch_first else (self.seqlen, self.batch)
        x = noise(self.seed, *shape, 4 * self.heads).requires_grad_()
        mask = self.hidden
        if self.floating:
            mask = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(mask, float("-inf"))
        call: dict[str, Any] = {"query": x, "key": x, "value": x, "key_padding_mask": mask}
        if self.is_causal:
            call["attn_mask"] = torch.ones(self.seqlen, self.seqlen, dtype=torch.bool).triu(1)
            if self.floating:
                future = call["attn_mask"]
                call["attn_mask"] = torch.zeros(future.shape, dtype=torch.float64).masked_fill(future, float("-inf"))
        return call

    def real(self, out: Tensor) -> Tensor:
        """Output rows of real tokens, (tokens, features)."""
        return (out if self.batch_first else out.transpose(0, 1))[~self.hidden]


@st.composite
def batches(draw: st.DrawFn, **fixed: Any) -> Batch:
    drawn = {
        "batch": draw(st.integers(1, 4)),
        "seqlen": draw(st.integers(1, 12)),
        "heads": draw(st.integers(1, 3)),
        "batch_first": draw(st.booleans()),
        "is_causal": draw(st.booleans()),
        "window": draw(st.none() | st.integers(0, 3)),
        "pattern": draw(st.sampled_from(("right", "left", "holes"))),
        "floating": draw(st.booleans()),
        "seed": draw(seeds()),
    }
    return Batch(**{**drawn, **fixed})


@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=4), grad=st.booleans(), seed=st.integers(0, 2**16))
def test_padding_is_cut_off_a_cpu_where_enough_is_left_out(lengths: list[int], grad: bool, seed: int) -> None:
    batch, seqlen, heads, head_dim = len(lengths), 12, 2, 4
    torch.manual_seed(seed)
    q, k, v = (torch.randn(batch, seqlen, heads, head_dim, device="cpu", requires_grad=grad) for _ in range(3))
    mask = KeyPadding(torch.arange(seqlen, device="cpu") < torch.tensor(lengths, device="cpu")[:, None])
    cuts = Sdpa(Costs(item=seqlen * heads * head_dim))  # a key of every query
    with instead(cuts), mock.patch.object(F, "scaled_dot_product_attention") as call:
        call.side_effect = lambda q, *others, **options: torch.zeros_like(q)
        attention(q, k, v, mask=mask, backend="sdpa")
    hidden = batch * seqlen - sum(lengths)
    assert call.call_count == (batch if hidden * (1 + grad) > 2 * batch else 1)
    masked = [arguments.args[3] is not None for arguments in call.call_args_list]
    assert masked == [0 < hidden * (1 + grad) <= 2 * batch] * call.call_count


@pytest.mark.parametrize("costs", (Costs(0, 0, 1), Costs()))
@given(spec=specs(limits=backends.get("sdpa").limits), seed=seeds())
def test_problems_that_are_cut_up_give_the_same_numbers(costs: Costs, spec: flashmha.AttentionSpec, seed: int) -> None:
    assert_agrees(Sdpa(costs), spec, seed)


@given(
    held=st.lists(st.integers(3, 20), min_size=1, max_size=3),
    seqlen_q=st.integers(1, 3),
    window=st.builds(Window, st.integers(0, 4), st.integers(0, 2)),
    keys_said=st.booleans(),
    seed=seeds(),
)
def test_a_window_in_blocks_counts_the_positions_of_a_cache(
    held: list[int], seqlen_q: int, window: Window, keys_said: bool, seed: int
) -> None:
    """A row of a cache ends where it ends, and not at the last slot."""
    lengths, slots = torch.tensor(held), torch.arange(20)
    queries = lengths[:, None] + torch.arange(seqlen_q) - seqlen_q
    keys = torch.where(slots < lengths[:, None], slots, -1) if keys_said else None
    mask = KeyLengths(lengths) & Positions(queries, keys, at_end=True) & window
    sizes = (len(held), seqlen_q, 20, 2, 2, 4, 4)
    assert_agrees(Sdpa(Costs(0, 0, 1)), flashmha.AttentionSpec(*sizes, device=lengths.device, mask=mask), seed)


@pytest.mark.cpu("a kernel of a GPU skips what a window hides")
@given(left=st.integers(0, 60), right=st.integers(0, 60), padded=st.booleans(), fewer=st.integers(0, 300))
def test_a_window_on_a_cpu_makes_nothing_as_large_as_all_scores(
    left: int, right: int, padded: bool, fewer: int
) -> None:
    """Gradients neither: they are as local as the window."""
    seqlen = 1024
    q, k, v = (noise(i, 1, seqlen - fewer * (i == 0), 2, 32, dtype=torch.float32).requires_grad_() for i in range(3))
    mask = Window(left, right)
    if padded:
        mask = mask & KeyPadding(torch.arange(seqlen)[None] % 7 != 3)
    with Largest() as largest:
        out = attention(q, k, v, mask=mask, backend="sdpa")
        torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    assert largest.seen <= q.element_size() * seqlen * 2 * 32  # the heads themselves


@given(batch=batches(window=None), need_weights=st.booleans())
def test_real_rows_are_exact_and_padded_rows_are_zero(batch: Batch, need_weights: bool) -> None:
    answers, whole = [], []
    for layer in (batch.layer(), batch.layer(skip_padding=True)):
        call = batch.call()
        out, seen = layer(**call, need_weights=need_weights)
        whole.append(out)
        total = batch.real(out).square().sum()
        if seen is not None:
            total = total + seen[~batch.hidden].square().sum()
        grads = torch.autograd.grad(total, [call["query"], *layer.parameters()])
        answers.append((batch.real(out), *grads, *(() if seen is None else (seen[~batch.hidden],))))
    for exact, skipped in zip(*answers):
        torch.testing.assert_close(skipped, exact, atol=1e-9, rtol=1e-9)
    if out.device.type != "cpu":  # no kernel of a GPU packs float64, so nothing is left out
        torch.testing.assert_close(whole[1], whole[0], atol=1e-9, rtol=1e-9)
        return
    padded = (out if batch.batch_first else out.transpose(0, 1))[batch.hidden]
    assert not padded.any()
    if seen is not None:
        assert not seen[batch.hidden].any() and not seen.transpose(1, 2)[batch.hidden].any()


@pytest.mark.gpu
@pytest.mark.parametrize("pattern", ("right", "left", "holes"))
def test_padded_rows_are_zero_where_a_kernel_of_a_gpu_packs(pattern: str) -> None:
    hidden = Batch(pattern=pattern).hidden
    layer = FlashMultiHeadAttention(64, 2, batch_first=True, skip_padding=True, dtype=torch.bfloat16)
    x = noise(0, *hidden.shape, 64, dtype=torch.bfloat16)
    with backends.record() as calls:
        out, _ = layer(x, x, x, key_padding_mask=hidden, need_weights=False)
    assert "documents" in calls[0].spec.features
    assert not out[hidden].any() and out[~hidden].any(dim=-1).all()


@given(batch=batches(window=2))
def test_a_window_counts_slots_with_and_without_padding(batch: Batch) -> None:
    outs = [layer(**batch.call())[0] for layer in (batch.layer(), batch.layer(skip_padding=True))]
    torch.testing.assert_close(batch.real(outs[0]), batch.real(outs[1]), atol=1e-9, rtol=1e-9)


@given(batch=batches(pattern="right"), backend=st.sampled_from(("naive", "sdpa")))
def test_a_named_backend_serves_the_packed_tokens(batch: Batch, backend: str) -> None:
    # on a GPU no call looks whether a float mask hides alone, or an attn_mask is causality
    assume(batch.hidden.device.type == "cpu" or not (batch.floating or batch.is_causal))
    with backends.record() as calls:
        batch.layer(skip_padding=True, backend=backend)(**batch.call())
    assert [call.backend for call in calls] == [backend]
    assert calls[0].spec.seqlen_q == int((~batch.hidden).sum()) and "documents" in calls[0].spec.features


CHANGES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "NumPy": lambda mask, values: np.copyto(mask.numpy(), values.numpy()),
    "data": lambda mask, values: mask.data.copy_(values),
    "storage": lambda mask, values: mask.untyped_storage().copy_(values.clone().untyped_storage()),
    "set_data": lambda mask, values: setattr(mask, "data", values.clone()),
    "copy_": lambda mask, values: mask.copy_(values),
    "swap_tensors": lambda mask, values: torch.utils.swap_tensors(mask, values.clone()),
}
"""Ways to change a mask, most of which torch's version counter does not see."""


@pytest.mark.cpu("changes the memory of a CPU")
@given(
    batch=batches(window=None, floating=False, is_causal=False, pattern="holes"),
    seed=seeds(),
    inference=st.booleans(),
    change=st.sampled_from(sorted(CHANGES)),
)
def test_padding_that_changes_is_read_again(batch: Batch, seed: int, inference: bool, change: str) -> None:
    first, second = batch.layer(skip_padding=True), batch.layer(skip_padding=True)
    other = dataclasses.replace(batch, seed=seed)
    call = batch.call()
    mask = call["key_padding_mask"].clone()
    for hidden in (batch.hidden, other.hidden):
        CHANGES[change](mask, hidden)
        with torch.inference_mode(inference):
            inside = first(**{**call, "key_padding_mask": mask})[0]
        after = second(**{**call, "key_padding_mask": mask})[0]
        torch.testing.assert_close(after.detach(), inside.detach().clone())
        exact = batch.layer()(**{**call, "key_padding_mask": hidden})[0]
        shown = (~hidden) if batch.batch_first else (~hidden).T
        torch.testing.assert_close(after[shown], exact[shown], atol=1e-9, rtol=1e-9)


@pytest.mark.cpu("changes the memory of a CPU")
@given(seqlen=st.integers(1, 9), seed=seeds(), change=st.sampled_from(sorted(CHANGES)), floating=st.booleans())
def test_a_mask_that_changes_is_read_again(seqlen: int, seed: int, change: str, floating: bool) -> None:
    layer, x = FlashMultiHeadAttention(8, 2, batch_first=True), noise(seed, 2, seqlen, 8, dtype=torch.float32)
    causal = torch.ones(seqlen, seqlen, dtype=torch.bool).triu(1)
    other = (torch.rand(seqlen, seqlen) < 0.5).fill_diagonal_(False)
    tables = [torch.zeros(t.shape).masked_fill(t, float("-inf")) if floating else t for t in (causal, other, causal)]
    mask = tables[0].clone()
    for table in tables:
        CHANGES[change](mask, table)
        expected = layer(x, x, x, attn_mask=table.clone())[0]
        torch.testing.assert_close(layer(x, x, x, attn_mask=mask)[0], expected)
        torch.testing.assert_close(layer(x, x, x, attn_mask=mask, need_weights=False)[0], expected)


@pytest.mark.parametrize("features", ({}, {"skip_padding": True}, {"window": (2, 2)}))
def test_a_call_leaves_no_reference_to_its_masks(features: dict[str, Any]) -> None:
    """Module.load_state_dict under torch.__future__.set_swap_module_params_on_conversion, too, refuses weak ones."""
    layer, x = FlashMultiHeadAttention(8, 2, batch_first=True, **features), torch.randn(2, 5, 8)
    masks = {"attn_mask": torch.ones(5, 5, dtype=torch.bool).triu(1), "key_padding_mask": torch.zeros(2, 5).bool()}
    layer(x, x, x, **masks)[0].sum().backward()
    for mask in masks.values():
        assert not weakref.getweakrefs(mask)
        torch.utils.swap_tensors(mask, mask.clone())


@pytest.mark.cpu("leaves padding out, which a GPU does in half precision alone")
@given(batch=batches(window=None, floating=False), hook=st.sampled_from(("full backward", "pre", "checkpoint")))
def test_hooks_that_only_watch_change_nothing(batch: Batch, hook: str) -> None:
    """A full backward hook hands the layer three aliases of one tensor, and so does a checkpoint."""
    answers = []
    for watched in (False, True):
        layer, call = batch.layer(skip_padding=True), batch.call()
        x = call["query"]
        rest = {name: value for name, value in call.items() if name not in ("query", "key", "value")}

        def run(x: Tensor, y: Tensor, z: Tensor, layer: Any = layer, rest: dict[str, Any] = rest) -> Tensor:
            return layer(x, y, z, **rest)[0]

        if watched and hook == "full backward":
            layer.register_full_backward_hook(lambda *_: None)
        elif watched and hook == "pre":
            layer.register_forward_pre_hook(lambda module, inputs: tuple(one.view_as(one) for one in inputs))
        out = checkpoint(run, x, x, x, use_reentrant=True) if watched and hook == "checkpoint" else run(x, x, x)
        out.square().sum().backward()
        answers.append((out, x.grad, *(p.grad for p in layer.parameters())))
        padded = (out if batch.batch_first else out.transpose(0, 1))[batch.hidden]
        assert not padded.any()
    for plain, other in zip(*answers):
        torch.testing.assert_close(other, plain, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("batch, seqlen", ((0, 5), (3, 0), (0, 0)))
@pytest.mark.parametrize("need_weights", (False, True))
def test_a_batch_of_nothing_gives_nothing(batch: int, seqlen: int, need_weights: bool) -> None:
    layer = FlashMultiHeadAttention(8, 2, batch_first=True, skip_padding=True)
    x = torch.zeros(batch, seqlen, 8, requires_grad=True)
    out, seen = layer(x, x, x, key_padding_mask=torch.zeros(batch, seqlen, dtype=torch.bool), need_weights=need_weights)
    assert out.shape == x.shape and (seen is None or seen.shape == (batch, seqlen, seqlen))
    out.sum().backward()
    assert x.grad.shape == x.shape


@pytest.mark.cpu("leaves padding out, which a GPU does in half precision alone")
def test_an_empty_batch_of_tokens_gives_zeros() -> None:
    batch = Batch()
    call = {**batch.call(), "key_padding_mask": torch.ones(3, 6, dtype=torch.bool)}
    out, seen = batch.layer(skip_padding=True)(**call)
    assert not out.any() and not seen.clone().any()
    out.sum().backward()
    assert not call["query"].grad.any()


@pytest.mark.cpu("leaves padding out, which a GPU does in half precision alone")
def test_every_row_is_computed_under_compile_and_explain_says_so() -> None:
    batch = Batch()
    layer = batch.layer(skip_padding=True).eval()
    with torch.no_grad():
        compiled = torch.compile(layer, backend="eager", fullgraph=True)(**batch.call(), need_weights=False)[0]
        torch.testing.assert_close(compiled, batch.layer().eval()(**batch.call(), need_weights=False)[0])
        assert batch.hidden.any() and compiled[batch.hidden].any()
    said = str(explain(layer, **batch.call()))
    assert f"{int(batch.hidden.sum())} of {batch.hidden.numel()} positions" in said and "compiling" in said


@pytest.mark.parametrize(
    ("change", "why"),
    (
        ({"key": torch.zeros(3, 6, 8, dtype=torch.float64), "value": torch.zeros(3, 6, 8, dtype=torch.float64)}, "one"),
        ({"attn_mask": torch.eye(6, dtype=torch.bool)}, "attn_mask"),
    ),
)
def test_where_padding_cannot_be_left_out_explain_says_why(change: dict[str, Any], why: str) -> None:
    batch = Batch()
    call = {**batch.call(), **change}
    torch.testing.assert_close(batch.layer(skip_padding=True)(**call)[0], batch.layer()(**call)[0])
    assert why in explain(batch.layer(skip_padding=True), **call).notes[0]


def test_layers_with_hops_of_their_own_keep_their_positions() -> None:
    class Shifted(FlashMultiHeadAttention):
        def process_heads(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            places = torch.arange(k.shape[1], dtype=k.dtype)[:, None, None]
            return q, k * places, v

    batch = Batch(pattern="left")
    plain, skipping = (Shifted(8, 2, batch_first=True, dtype=torch.float64, skip_padding=s) for s in (False, True))
    skipping.load_state_dict(plain.state_dict())
    torch.testing.assert_close(skipping(**batch.call())[0], plain(**batch.call())[0])


def test_replace_mha_switches_every_layer_and_back() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()
    flashmha.replace_mha(model, skip_padding=True, trust_is_causal=True)
    layers = [m for m in model.modules() if isinstance(m, FlashMultiHeadAttention)]
    assert len(layers) == 2 and all(layer.skip_padding and layer.trust_is_causal for layer in layers)
    flashmha.restore_mha(model)
    assert all(not hasattr(m, "skip_padding") for m in model.modules())


@given(batch=batches(window=None, is_causal=True, floating=False))
def test_a_trusted_hint_is_not_checked_against_the_mask(batch: Batch) -> None:
    """The mask is never read: another one gives the same numbers."""
    layer = batch.layer(trust_is_causal=True)
    call = batch.call()
    honest = layer(**call, is_causal=True)
    other = layer(**{**call, "attn_mask": torch.zeros_like(call["attn_mask"])}, is_causal=True)
    expected = batch.layer()(**call)
    for found in (honest, other):
        torch.testing.assert_close(found[0], expected[0], atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(+found[1], +expected[1], atol=1e-9, rtol=1e-9)


@pytest.mark.cpu("to look into a mask would wait for a GPU")
@given(seqlen_q=st.integers(1, 9), seqlen_k=st.integers(1, 9), floating=st.booleans(), flip=st.none() | seeds())
def test_the_causal_mask_is_recognised(seqlen_q: int, seqlen_k: int, floating: bool, flip: int | None) -> None:
    layer = FlashMultiHeadAttention(8, 2, batch_first=True)
    query, key = torch.randn(1, seqlen_q, 8), torch.randn(1, seqlen_k, 8)
    future = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool).triu(1)
    mask = torch.zeros(future.shape).masked_fill(future, float("-inf")) if floating else future
    with backends.record() as calls:
        layer(query, key, key, attn_mask=mask, need_weights=False)
        if flip is not None:
            place = (flip % seqlen_q, flip // seqlen_q % seqlen_k)
            mask[place] = (0.0 if future[place] else -1.0) if floating else not future[place]
            layer(query, key, key, attn_mask=mask, need_weights=False)
    expected = flashmha.problem.windows.normalize(causal(align="top_left"), seqlen_q, seqlen_k)
    assert repr(calls[0].spec.mask) == repr(expected) and calls[0].spec.bias is None
    if flip is not None:
        assert "dense_mask" in calls[1].spec.features or "bias" in calls[1].spec.features


@given(lengths=st.lists(st.integers(0, 5), min_size=1, max_size=4), seed=seeds())
def test_lengths_and_patterns_of_padding_are_one(lengths: list[int], seed: int) -> None:
    q, k, v = noise(seed, 3, len(lengths), 5, 2, 4).unbind()
    counts = torch.tensor(lengths)
    out = flashmha.attention(q, k, v, mask=KeyLengths(counts) & causal())
    valid = torch.arange(5) < counts[:, None]
    torch.testing.assert_close(flashmha.attention(q, k, v, mask=KeyPadding(valid) & causal()), out)

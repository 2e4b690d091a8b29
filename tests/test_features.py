"""A layer's options of heads, positions and scores, all of them composed, against the definition in ``plain_layer``."""

from __future__ import annotations

from typing import Any, NamedTuple

import plain_layer
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from flashmha import (
    ALiBi,
    Documents,
    FlashMultiHeadAttention,
    KeyLengths,
    NoBackendError,
    RelativeBias,
    Rotary,
)

WIDTH, LONGEST = 12, 6


class Table(nn.Module):
    """A learned number for each head and distance."""

    by_distance = True

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(heads, 5))

    def forward(self, q: Tensor, k: Tensor) -> RelativeBias:
        return RelativeBias(self.table)

    def written(self, own: dict[str, Tensor], distance: Tensor) -> Tensor:
        return own["position_bias.table"][:, distance.clamp(-2, 2) + 2].transpose(0, 1)


class Slots(nn.Module):
    """A learned number for each head, query and key, as a tensor."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(heads, LONGEST, LONGEST))

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        return self.table[:, : q.shape[1], : k.shape[1]]

    def written(self, own: dict[str, Tensor], distance: Tensor) -> Tensor:
        return own["position_bias.table"][None, :, : distance.shape[1], : distance.shape[2]]


def alibi(bias: Any, distance: Tensor) -> Tensor:
    """The bias of plain slopes (batch or 1, heads, seqlen_q, seqlen_k)."""
    return -bias.slopes.double()[:, None, None] * distance.abs()[:, None]


# What is drawn


class Drawn(NamedTuple):
    """A layer's options, and how it is called."""

    heads: int
    arguments: dict[str, Any]
    positions: dict[str, Any]
    scores: dict[str, Any]
    batch: int
    seqlens: tuple[int, int] | int
    mask: str
    named: bool
    need_weights: bool
    average: bool
    training: bool
    seed: int

    def build(self, **more: Any) -> FlashMultiHeadAttention:
        torch.manual_seed(self.seed)
        made = {**self.arguments, **self.positions, **self.scores, **more}
        dtype = made["dtype"]
        if made.get("rotary"):
            made["rotary"] = Rotary(made["head_dim"] or WIDTH // self.heads, **made["rotary"])
        bias = made.get("position_bias")
        if bias is not None:
            made["position_bias"] = {
                "alibi": lambda: ALiBi(torch.rand(self.heads, dtype=torch.float32)),
                "table": lambda: Table(self.heads).to(dtype),
                "slots": lambda: Slots(self.heads).to(dtype),
            }[bias]()
        if made.pop("sinks", False):
            made["sinks"] = torch.randn(self.heads)
        layer = FlashMultiHeadAttention(WIDTH, self.heads, **made).train(self.training)
        with torch.no_grad():
            for parameter in layer.parameters():  # none is left at zero or one, where bugs hide
                parameter.add_(0.3 * torch.randn_like(parameter))
        return layer


@st.composite
def drawn_layers(draw: st.DrawFn) -> Drawn:
    heads = draw(st.sampled_from((1, 2, 4)))
    head_dim = draw(st.sampled_from((None, None, 4, 5)))
    seqlens = draw(st.one_of(st.integers(1, LONGEST), st.tuples(st.integers(1, LONGEST), st.integers(1, LONGEST))))
    alone = isinstance(seqlens, int)
    masks = ("none", "bool", "float", "causal", "padding", "lengths") + ("documents",) * alone
    mask = draw(st.sampled_from(masks))
    whole = {"dim": (head_dim or WIDTH // heads) // 2 * 2}
    rotary = draw(st.sampled_from((None, whole, {"dim": 2})))
    return Drawn(
        heads=heads,
        arguments={
            "num_kv_heads": draw(st.sampled_from([n for n in (None, 1, 2) if n is None or heads % n == 0])),
            "head_dim": head_dim,
            "value_head_dim": draw(st.sampled_from((None, None, 3, 7))),
            "qk_norm": draw(st.sampled_from((None, "rms", "layer"))),
            "bias": draw(st.booleans()),
            "add_bias_kv": draw(st.sampled_from((False, False, True))),
            "add_zero_attn": draw(st.sampled_from((False, False, True))),
            "kdim": None if alone else draw(st.sampled_from((None, 5))),
            "batch_first": draw(st.booleans()),
            "dtype": draw(st.sampled_from((torch.float64, torch.float64, torch.float32))),
        },
        positions={
            "rotary": rotary,
            "position_bias": draw(st.sampled_from((None, "alibi", "table", "slots"))),
            "window": draw(st.sampled_from((None, (2, 0), (1, 1), (None, 1)))),
            "causal": draw(st.booleans()),
        },
        scores={
            "softcap": draw(st.sampled_from((None, 1.5))),
            "sinks": draw(st.booleans()),
            "softmax_scale": draw(st.sampled_from((None, 0.4))),
            "skip_padding": draw(st.booleans()),
            "backend": draw(st.sampled_from((None, None, "naive", "sdpa"))),
        },
        batch=1 if mask == "documents" else draw(st.integers(1, 3)),
        seqlens=seqlens,
        mask=mask,
        named=rotary is not None and draw(st.booleans()),
        need_weights=draw(st.booleans()),
        average=draw(st.booleans()),
        training=draw(st.booleans()),
        seed=draw(st.integers(0, 2**16)),
    )


class Masked(NamedTuple):
    """One mask of a call: as the layer is told, which pairs it allows, what it adds, and which rows are real."""

    told: dict[str, Any]
    allowed: Tensor
    bias: Tensor
    real: Tensor
    slots: tuple[Tensor, Tensor]


def mask_of(drawn: Drawn, seqlen_q: int, seqlen_k: int, dtype: torch.dtype) -> Masked:
    """The mask of a call, told and written."""
    shape = (drawn.batch, 1, seqlen_q, seqlen_k)
    allowed, bias = torch.ones(shape, dtype=torch.bool), torch.zeros(shape).double()
    real = torch.ones(drawn.batch, seqlen_q, dtype=torch.bool)
    slots = torch.arange(seqlen_k - seqlen_q, seqlen_k)[None], torch.arange(seqlen_k)[None]
    told: dict[str, Any] = {}
    if drawn.mask == "bool":
        hidden = torch.rand(seqlen_q, seqlen_k) < 0.4
        told, allowed = {"attn_mask": hidden}, allowed & ~hidden
    elif drawn.mask == "float":
        bias = torch.randn(seqlen_q, seqlen_k).to(dtype).double().expand(shape)
        told = {"attn_mask": bias[0, 0].to(dtype)}
    elif drawn.mask == "causal":
        future = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool).triu(1)
        told, allowed = {"attn_mask": future, "is_causal": True}, allowed & ~future
    elif drawn.mask in ("padding", "lengths"):
        lengths = torch.randint(0, seqlen_k + 1, (drawn.batch,))
        valid = torch.arange(seqlen_k) < lengths[:, None]
        if drawn.mask == "padding":
            valid = torch.rand(valid.shape) < 0.6 if drawn.seed % 2 else valid
            told = {"key_padding_mask": ~valid}
        else:
            told = {"key_padding_mask": KeyLengths(lengths)}
        allowed = allowed & valid[:, None, None]
        if isinstance(drawn.seqlens, int):
            real = valid
    elif drawn.mask == "documents":
        cuts = [0, *sorted(torch.randint(0, seqlen_k + 1, (2,)).tolist()), seqlen_k]
        told = {"attn_mask": Documents(torch.tensor(cuts))}
        places = torch.bucketize(torch.arange(seqlen_k), torch.tensor(cuts)[1:], right=True)
        allowed = allowed & (places[:, None] == places)
        slots = ((torch.arange(seqlen_k) - torch.tensor(cuts)[places])[None],) * 2
    return Masked(told, allowed, bias, real, slots)


def compare(name: str, found: Tensor, wanted: Tensor, exact: bool) -> None:
    close = {"rtol": 1e-6, "atol": 1e-7} if exact else {"rtol": 2e-4, "atol": 5e-5}
    torch.testing.assert_close(found.double(), wanted, msg=lambda told: f"{name}: {told}", **close)


def check(drawn: Drawn, **more: Any) -> None:
    """Output, weights and every gradient of a call agree with the definition."""
    try:
        layer = drawn.build(**more)
    except NoBackendError:
        assert drawn.scores["backend"] == "sdpa"
        return
    alone = isinstance(drawn.seqlens, int)
    seqlen_q, seqlen_k = (drawn.seqlens,) * 2 if alone else drawn.seqlens  # type: ignore[misc]
    dtype = drawn.arguments["dtype"]
    query = torch.randn(drawn.batch, seqlen_q, WIDTH, dtype=dtype)
    key = query if alone else torch.randn(drawn.batch, seqlen_k, layer.kdim, dtype=dtype)
    value = query if alone else torch.randn(drawn.batch, seqlen_k, layer.vdim, dtype=dtype)
    masked = mask_of(drawn, seqlen_q, seqlen_k, dtype)
    turned = masked.slots
    told = dict(masked.told)
    if drawn.named:
        positions = (
            torch.randint(0, 50, (drawn.batch, seqlen_q)) if drawn.seed % 3 else torch.randint(0, 50, (seqlen_q,))
        )
        told["positions"], turned = positions, (positions.reshape(-1, seqlen_q),) * 2
        if not alone:
            told["key_positions"] = torch.randint(0, 50, (drawn.batch, seqlen_k))
            turned = turned[0], told["key_positions"]

    given = [x.detach().requires_grad_() for x in ((query,) if alone else (query, key, value))]
    ours = [x if layer.batch_first else x.transpose(0, 1) for x in given]
    ours = ours * 3 if alone else ours
    flags = {"need_weights": drawn.need_weights, "average_attn_weights": drawn.average}
    try:
        out, weights = layer(*ours, **told, **flags)
    except NoBackendError:
        assert layer.backend == "sdpa"
        return
    out = out if layer.batch_first else out.transpose(0, 1)

    own = {name: p.detach().double().requires_grad_() for name, p in layer.named_parameters()}
    exact = [x.detach().double().requires_grad_() for x in given]
    distance = masked.slots[1][:, None, :] - masked.slots[0][:, :, None]
    bias = masked.bias
    if isinstance(layer.position_bias, ALiBi):
        bias = bias + alibi(layer.position_bias, distance)
    elif layer.position_bias is not None:
        bias = bias + layer.position_bias.written(own, distance)
    wanted, maps = plain_layer.answer(
        layer, own, tuple(exact * 3 if alone else exact), masked.allowed, bias, masked.slots, turned
    )
    maps = maps.mean(1) if drawn.average else maps

    rows = masked.real if layer.skip_padding else torch.ones_like(masked.real)
    precise = dtype == torch.float64
    compare("output", out[rows], wanted[rows], precise)
    loss = (out * out.detach().cos() * rows[..., None]).sum()
    loss_wanted = (wanted * out.detach().double().cos() * rows[..., None]).sum()
    assert (weights is not None) == drawn.need_weights
    if weights is not None:
        shown = rows[..., None] if drawn.average else rows[:, None, :, None]
        compare("weights", weights * shown, maps * shown, precise)
        slope = torch.randn(weights.shape).double() * shown
        loss, loss_wanted = loss + (weights * slope).sum(), loss_wanted + (maps * slope).sum()
    names = [*own, *("query", "key", "value")[: len(given)]]
    found = torch.autograd.grad(loss, [*layer.parameters(), *given], allow_unused=True, materialize_grads=True)
    exactly = torch.autograd.grad(loss_wanted, [*own.values(), *exact], allow_unused=True, materialize_grads=True)
    for name, one, two in zip(names, found, exactly, strict=True):
        compare(f"gradient of {name}", one, two, precise)


@given(drawn_layers())
def test_options_of_a_layer_mean_what_they_say(drawn: Drawn) -> None:
    check(drawn)

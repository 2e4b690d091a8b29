"""``Rotary``: transformers' own numbers for each scaling, and the laws of rotations."""

import copy
import pickle
from typing import Any

import pytest
import torch
from conftest import fewer
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import flashmha
from flashmha.testing import noise, seeds


def drawn_scaling(draw: st.DrawFn, kind: str, dim: int, original: int) -> dict[str, Any]:
    """``rope_parameters`` of a kind, all that transformers reads of them."""
    factor = draw(st.floats(1.0, 16.0))
    given: dict[str, Any] = {"rope_type": kind, "rope_theta": draw(st.sampled_from((10000.0, 500000.0)))}
    if kind in ("linear", "dynamic", "yarn", "llama3"):
        given["factor"] = factor
    if kind in ("yarn", "llama3", "longrope"):
        given["original_max_position_embeddings"] = original
    if kind == "yarn":
        given |= draw(
            st.fixed_dictionaries(
                {},
                optional={
                    "beta_fast": st.sampled_from((16, 32)),
                    "beta_slow": st.sampled_from((1, 2)),
                    "truncate": st.booleans(),
                    "attention_factor": st.floats(0.5, 2.0),
                },
            )
        )
        if draw(st.booleans()):
            given |= {"mscale": draw(st.floats(0.5, 1.5)), "mscale_all_dim": draw(st.floats(0.5, 1.5))}
    if kind == "llama3":
        given |= {"low_freq_factor": 1.0, "high_freq_factor": draw(st.sampled_from((2.0, 4.0)))}
    if kind == "longrope":
        factors = st.lists(st.floats(1.0, 8.0), min_size=dim // 2, max_size=dim // 2)
        given |= {"short_factor": draw(factors), "long_factor": draw(factors), "factor": factor}
    return given


KINDS = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")


@pytest.mark.parametrize("kind", KINDS)
@settings(parent=fewer(3))
@given(data=st.data(), seed=seeds())
def test_each_scaling_is_that_of_transformers(kind: str, data: st.DataObject, seed: int) -> None:
    """Its modules for Llama, forward and gradients; where length matters, lengths on both sides of the limit."""
    llama = pytest.importorskip("transformers.models.llama.modeling_llama", reason="needs transformers")
    draw = data.draw
    head_dim, original = draw(st.sampled_from((8, 16, 64))), draw(st.sampled_from((16, 48)))
    scaling = draw(st.composite(drawn_scaling)(kind, head_dim, original))
    config = llama.LlamaConfig(
        hidden_size=2 * head_dim,
        num_attention_heads=2,
        head_dim=head_dim,
        max_position_embeddings=original if kind == "dynamic" else 4 * original,
        rope_parameters=dict(scaling),
    )
    theirs = llama.LlamaRotaryEmbedding(config)
    ours = flashmha.Rotary(head_dim, rope_parameters=scaling, max_seqlen=config.max_position_embeddings)
    seqlen = draw(st.integers(1, 2 * original))
    q, k = (noise(seed + i, 2, seqlen, 2, head_dim).requires_grad_() for i in range(2))
    places = torch.arange(seqlen)[None]
    cos, sin = theirs(q.transpose(1, 2), places)
    expected = [x.transpose(1, 2) for x in llama.apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos, sin)]
    made = ours(q, k, *draw(st.sampled_from(((None, None), (places, places)))))
    cotangent = noise(seed + 2, 2, seqlen, 2, head_dim)
    for mine, right, x in zip(made, expected, (q, k)):
        torch.testing.assert_close(mine, right, rtol=1e-4, atol=1e-4)
        (grad,), (its) = torch.autograd.grad(mine, x, cotangent), torch.autograd.grad(right, x, cotangent)
        torch.testing.assert_close(grad, its[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ("default", "linear", "yarn", "llama3"))
def test_the_older_name_of_a_kind_is_read(kind: str) -> None:
    scaling = {"factor": 4.0, "original_max_position_embeddings": 32, "low_freq_factor": 1, "high_freq_factor": 4}
    read = {
        "default": (),
        "linear": ("factor",),
        "yarn": ("factor", "original_max_position_embeddings"),
        "llama3": tuple(scaling),
    }
    given = {name: scaling[name] for name in read[kind]}
    new, old = (flashmha.Rotary(16, rope_parameters={name: kind, **given}) for name in ("rope_type", "type"))
    assert torch.equal(new.inv_freq, old.inv_freq)


WRONG = (
    ({"rope_type": "fast"}, "rope_type must be one of"),
    (
        {"full_attention": {"rope_type": "default"}, "sliding_attention": {"rope_type": "default"}},
        r"one kind of layer, got one for each of full_attention, sliding_attention: pass rope_parameters\['full_att",
    ),
    ({"rope_type": "linear"}, "must have factor"),
    ({"rope_type": "linear", "factor": 0}, "positive number"),
    ({"rope_type": "default", "factor": 2.0}, "no other keys"),
    ({"rope_type": "yarn", "factor": 2.0}, "original_max_position_embeddings"),
    ({"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0], "factor": 2.0}, "must"),
)


@pytest.mark.parametrize(("scaling", "says"), WRONG, ids=lambda given: str(given)[:40])
def test_what_is_unknown_or_missing_is_an_error(scaling: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        flashmha.Rotary(16, rope_parameters=scaling)


FLOATS = (torch.float64, torch.float32, torch.bfloat16)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


@st.composite
def rotaries(draw: st.DrawFn) -> flashmha.Rotary:
    head_dim = draw(st.sampled_from((2, 6, 8, 17, 32)))
    dim = 2 * draw(st.integers(1, head_dim // 2))
    return flashmha.Rotary(
        head_dim, dim=dim, base=draw(st.sampled_from((100.0, 10000.0))), interleaved=draw(st.booleans())
    )


def heads(rotary: flashmha.Rotary, seed: int, seqlen: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return noise(seed, 2, seqlen, 3, rotary.head_dim, dtype=dtype)


@given(rotary=rotaries(), seed=seeds(), seqlen=st.integers(1, 20))
def test_a_rotation_keeps_norms_and_what_lies_behind_dim(rotary: flashmha.Rotary, seed: int, seqlen: int) -> None:
    q = heads(rotary, seed, seqlen)
    made, none = rotary(q, None)
    assert none is None
    torch.testing.assert_close(made.norm(dim=-1), q.norm(dim=-1), rtol=1e-6, atol=1e-6)
    assert torch.equal(made[..., rotary.dim :], q[..., rotary.dim :])
    assert torch.equal(made[:, 0], q[:, 0]), "position 0 turns nothing"


@given(rotary=rotaries(), seed=seeds(), seqlen=st.integers(1, 12), shift=st.integers(0, 500))
def test_scores_depend_on_differences_of_positions_alone(
    rotary: flashmha.Rotary, seed: int, seqlen: int, shift: int
) -> None:
    q, k = heads(rotary, seed, seqlen), heads(rotary, seed + 1, seqlen)
    places = torch.arange(seqlen)[None]

    def scores(at: Tensor) -> Tensor:
        turned = rotary(q, k, at, at)
        return torch.einsum("bqhd,bkhd->bhqk", *turned)

    torch.testing.assert_close(scores(places), scores(places + shift), rtol=1e-3, atol=1e-3)


@given(rotary=rotaries(), seed=seeds(), lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4))
def test_documents_that_restart_are_each_alone(rotary: flashmha.Rotary, seed: int, lengths: list[int]) -> None:
    q = heads(rotary, seed, sum(lengths))
    at = torch.cat([torch.arange(length) for length in lengths])[None]
    whole = rotary(q, None, at)[0]
    for mine, alone in zip(whole.split(lengths, 1), q.split(lengths, 1)):
        torch.testing.assert_close(mine, rotary(alone, None)[0])


@given(rotary=rotaries(), seed=seeds(), seqlen_q=st.integers(1, 8), more=st.integers(0, 8))
def test_the_last_query_is_at_the_last_key(rotary: flashmha.Rotary, seed: int, seqlen_q: int, more: int) -> None:
    q, k = heads(rotary, seed, seqlen_q), heads(rotary, seed + 1, seqlen_q + more)
    places = torch.arange(seqlen_q + more)[None]
    for mine, right in zip(rotary(q, k), rotary(q, k, places[:, more:], places)):
        torch.testing.assert_close(mine, right)


@given(rotary=rotaries(), seed=seeds(), seqlen=st.integers(1, 12))
def test_layouts_differ_by_a_permutation_of_features(rotary: flashmha.Rotary, seed: int, seqlen: int) -> None:
    other = flashmha.Rotary(rotary.head_dim, dim=rotary.dim, interleaved=not rotary.interleaved)
    other.inv_freq.copy_(rotary.inv_freq)
    half = rotary.dim // 2
    order = torch.stack((torch.arange(half), torch.arange(half) + half), 1).flatten()  # neighbours of a pair, in halves
    if not rotary.interleaved:
        order = order.argsort()
    order = torch.cat((order, torch.arange(rotary.dim, rotary.head_dim)))
    q = heads(rotary, seed, seqlen)
    back = order.argsort()
    torch.testing.assert_close(rotary(q, None)[0], other(q[..., back], None)[0][..., order])


@given(rotary=rotaries(), seed=seeds(), seqlen=st.integers(1, 12))
def test_the_gradient_is_the_rotation_back(rotary: flashmha.Rotary, seed: int, seqlen: int) -> None:
    q = heads(rotary, seed, seqlen).requires_grad_()
    places = torch.arange(seqlen)[None]
    (grad,) = torch.autograd.grad(rotary(q, None, places)[0], q, heads(rotary, seed + 1, seqlen))
    torch.testing.assert_close(grad, rotary(heads(rotary, seed + 1, seqlen), None, -places)[0])
    assert torch.autograd.gradgradcheck(lambda x: rotary(x, None)[0], (q[:1, :2, :1].detach().requires_grad_(),))


@given(rotary=rotaries(), seed=seeds(), first=st.integers(0, 3), last=st.integers(0, 3), dtype=st.sampled_from(FLOATS))
def test_heads_may_lie_anywhere(rotary: flashmha.Rotary, seed: int, first: int, last: int, dtype: torch.dtype) -> None:
    """At an odd place of a tensor, and with odd steps from token to token."""
    wide = noise(seed, 1, 1, 2, first + rotary.head_dim + last, dtype=dtype)
    q = wide[..., first : first + rotary.head_dim]
    for heads_of in (q, q[:, :, :1]):
        assert torch.equal(rotary(heads_of, None)[0], rotary(heads_of.clone(), None)[0])
    leaf, ones = q.clone().requires_grad_(), torch.ones((), dtype=dtype, device=q.device)
    made = rotary(leaf, None)[0]
    (grad,) = torch.autograd.grad(made, leaf, ones.expand_as(made))  # that of a sum
    assert torch.equal(grad, rotary(ones.expand_as(made).contiguous(), None, -torch.arange(1)[None])[0])


@given(rotary=rotaries(), seed=seeds(), dtype=st.sampled_from((torch.float16, torch.bfloat16)))
def test_heads_are_rounded_once(rotary: flashmha.Rotary, seed: int, dtype: torch.dtype) -> None:
    q = heads(rotary, seed, 9, dtype)
    assert torch.equal(rotary(q, None)[0], rotary(q.float(), None)[0].to(dtype))


LONG = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [3.0] * 4, "factor": 2.0}
SCALED = (
    None,
    {"rope_type": "dynamic", "factor": 2.0},
    {**LONG, "original_max_position_embeddings": 8},
)
SCALES = {one["rope_type"]: one for one in SCALED if one is not None}
scaled = pytest.mark.parametrize("scaling", SCALED, ids=lambda one: "default" if one is None else one["rope_type"])


def built(scaling: Any) -> flashmha.Rotary:
    return flashmha.Rotary(8, rope_parameters=scaling, max_seqlen=8)


@given(seed=seeds(), kind=st.sampled_from(sorted(SCALES)), dtype=st.sampled_from(INTEGERS), padded=st.booleans())
def test_positions_are_one_in_every_dtype(seed: int, kind: str, dtype: torch.dtype, padded: bool) -> None:
    """Up to the largest that it holds, one more than which is the length of the call."""
    largest = min(torch.iinfo(dtype).max, 255)
    layer = flashmha.FlashMultiHeadAttention(8, 1, batch_first=True, rotary=built(SCALES[kind])).eval()
    x, places = noise(seed, 2, 4, 8, dtype=torch.float32), torch.arange(largest - 3, largest + 1)[None]
    hidden = torch.arange(4) > torch.tensor([[3], [2]]) if padded else None
    right = layer(x, x, x, key_padding_mask=hidden, positions=places)[0]
    made = layer(x, x, x, key_padding_mask=hidden, positions=places.to(dtype), key_positions=places.to(dtype))[0]
    torch.testing.assert_close(made, right)


@scaled
def test_a_rotary_survives_what_happens_to_modules(scaling: Any) -> None:
    rotary = built(scaling)
    q = noise(0, 1, 12, 2, 8)
    right = rotary(q, None)[0]
    assert not rotary.state_dict()
    with torch.device("meta"):
        empty = built(scaling)
    changed = (
        copy.deepcopy(rotary),
        pickle.loads(pickle.dumps(rotary)),
        built(scaling).to(torch.bfloat16),
        built(scaling).half().float(),
        empty.to_empty(device=q.device),
        built(scaling).to("meta").to_empty(device=q.device),
    )
    for one in changed:
        assert one.inv_freq.dtype == torch.float32
        assert torch.equal(one(q, None)[0], right)


@scaled
def test_transforms_see_operators_alone(scaling: Any) -> None:
    rotary = built(scaling)
    q = noise(0, 3, 2, 12, 2, 8, dtype=torch.float64)
    turn = lambda x: rotary(x, None)[0]  # noqa: E731
    torch.testing.assert_close(torch.func.vmap(turn)(q), torch.stack([turn(x) for x in q]))
    loss = lambda x: (turn(x) ** 3).sum()  # noqa: E731
    torch.testing.assert_close(torch.func.grad(loss)(q[0]), gradient(loss, q[0]))
    tangent = torch.func.jvp(turn, (q[0],), (q[1],))[1]
    torch.testing.assert_close(tangent, turn(q[1]))


def gradient(loss: Any, x: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(loss(leaf), leaf)[0]


@scaled
def test_one_graph_serves_every_length(scaling: Any) -> None:
    rotary, graphs = built(scaling), []

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda q, k: rotary(q, k), backend=count, fullgraph=True, dynamic=True)
    for seqlen in (5, 7, 12, 20):
        q, k = noise(0, 1, seqlen, 2, 8), noise(1, 1, seqlen, 1, 8)
        for mine, right in zip(compiled(q, k), rotary(q, k)):
            torch.testing.assert_close(mine, right)
    assert len(graphs) == 1


class Turned(torch.nn.Module):
    def __init__(self, rotary: flashmha.Rotary) -> None:
        super().__init__()
        self.rotary = rotary

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        made: tuple[Tensor, Tensor] = self.rotary(q, k)
        return made


@scaled
def test_an_export_serves_every_length(scaling: Any) -> None:
    module = Turned(built(scaling))
    q, k = noise(0, 1, 6, 2, 8), noise(1, 1, 6, 1, 8)
    length = torch.export.Dim("length", min=2, max=64)
    program = torch.export.export(module, (q, k), dynamic_shapes=({1: length}, {1: length})).module()
    for seqlen in (6, 20):
        q, k = noise(0, 1, seqlen, 2, 8), noise(1, 1, seqlen, 1, 8)
        for mine, right in zip(program(q, k), module(q, k)):
            torch.testing.assert_close(mine, right)


def test_wrong_heads_and_positions_are_named() -> None:
    rotary, q = flashmha.Rotary(8), noise(0, 2, 5, 1, 8)
    for wrong, says in (
        ((noise(0, 2, 5, 1, 6), None), "q must be floating point"),
        ((q, None, torch.zeros(1, 4, dtype=torch.int64)), "positions_q must be"),
        ((q, None, torch.zeros(1, 5)), "positions_q must be a tensor of ints"),
    ):
        with pytest.raises(ValueError, match=says):
            rotary(*wrong)
    for options in ({"dim": 3}, {"dim": 10}, {"base": 0.5}, {"interleaved": 1}):
        with pytest.raises(ValueError, match="must"):
            flashmha.Rotary(8, **options)


@given(rotary=rotaries(), seed=seeds())
def test_many_gradients_come_at_once(rotary: flashmha.Rotary, seed: int) -> None:
    q = noise(seed, 1, 3, 2, rotary.head_dim).requires_grad_()
    made, cotangents = rotary(q, None)[0], noise(seed + 1, 2, *q.shape)
    (many,) = torch.autograd.grad(made, q, cotangents, retain_graph=True, is_grads_batched=True)
    for one, cotangent in zip(many, cotangents):
        torch.testing.assert_close(one, torch.autograd.grad(made, q, cotangent, retain_graph=True)[0])

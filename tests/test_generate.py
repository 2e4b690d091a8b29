"""Whole decoders over caches: swapped ones of torch, compiled ones, and models of one's own."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import pytest
import torch
from conftest import fewer
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import flashmha
from flashmha import (
    FlashMultiHeadAttention,
    FlashTransformerDecoder,
    FlashTransformerDecoderLayer,
    KVCache,
    MemoryCache,
    PagedCache,
    PagePool,
    RingCache,
    StaticCache,
    replace_mha,
    restore_mha,
    swap_report,
)
from flashmha.testing import assert_same, noise
from flashmha.testing.models import Architecture, architectures
from flashmha.testing.models.encoder import WIDTH

KINDS: dict[str, dict[str, Any]] = {
    "static": {},
    "paged": {"page_size": 3},
    "place for the memory": {"memory_seqlen": 5},
}
SEQLEN, MEMORY, BATCH = 7, 5, 2


@pytest.fixture(autouse=True)
def without_gradients() -> Any:
    with torch.no_grad():
        yield


def future(seqlen: int, kind: str = "float") -> Any:
    if kind == "rule":
        return flashmha.causal()
    hidden = torch.ones(seqlen, seqlen, dtype=torch.bool).triu(1)
    if kind == "bool":
        return hidden
    return torch.zeros(seqlen, seqlen, dtype=torch.float64).masked_fill(hidden, float("-inf"))


def part(architecture: Architecture, x: Tensor, at: slice) -> Tensor:
    return x[:, at] if architecture.batch_first else x[at]


@given(
    architecture=architectures(),
    kind=st.sampled_from(sorted(KINDS)),
    mask=st.sampled_from(("float", "bool", "rule")),
    prompt=st.integers(1, SEQLEN),
    padded=st.booleans(),
)
def test_a_decoder_writes_what_it_reads(
    architecture: Architecture, kind: str, mask: str, prompt: int, padded: bool
) -> None:
    """Prompt and steps are the one call of torch's own decoder, for every norm order, layout and kind of cache."""
    stock = architecture.decoder().eval()
    ours = replace_mha(copy.deepcopy(stock))
    assert type(ours) is FlashTransformerDecoder
    x, memory = architecture.inputs(BATCH, SEQLEN), architecture.inputs(BATCH, MEMORY, 2)
    more: dict[str, Any] = {}
    if padded:
        more["memory_key_padding_mask"] = torch.arange(MEMORY) >= torch.tensor([[MEMORY], [MEMORY - 2]])
    wanted = stock(x, memory, tgt_mask=future(SEQLEN), **more)
    cache = KVCache.of(ours, BATCH, SEQLEN, **KINDS[kind])
    hint = {"tgt_is_causal": False} if mask == "rule" else {}
    made = [
        ours(
            part(architecture, x, slice(0, prompt)), memory, tgt_mask=future(prompt, mask), cache=cache, **hint, **more
        )
    ]
    for place in range(prompt, SEQLEN):
        made.append(ours(part(architecture, x, slice(place, place + 1)), memory, cache=cache, **more))
    assert_same(torch.cat(made, dim=1 if architecture.batch_first else 0), wanted)
    assert cache.get_seq_length().tolist() == [SEQLEN] * BATCH


@given(
    architecture=architectures(),
    lengths=st.lists(st.integers(0, 4), min_size=BATCH, max_size=BATCH),
    left=st.booleans(),
)
def test_prompts_of_several_lengths_go_on_together(architecture: Architecture, lengths: list[int], left: bool) -> None:
    stock = architecture.decoder().eval()
    ours = replace_mha(copy.deepcopy(stock))
    x, memory = architecture.inputs(BATCH, 4 + 3), architecture.inputs(BATCH, MEMORY, 2)
    slots, counts = torch.arange(4), torch.tensor(lengths)[:, None]
    hidden = slots < 4 - counts if left else slots >= counts
    cache = KVCache.of(ours, BATCH, 4 + 3)
    made = [
        ours(
            part(architecture, x, slice(0, 4)),
            memory,
            tgt_mask=future(4, "bool"),
            tgt_key_padding_mask=hidden,
            cache=cache,
        )
    ]
    made += [ours(part(architecture, x, slice(place, place + 1)), memory, cache=cache) for place in range(4, 7)]
    out = architecture.batch_major(torch.cat(made, dim=1 if architecture.batch_first else 0))
    rows = architecture.batch_major(x)
    real = torch.cat([~hidden, torch.ones(BATCH, 3, dtype=torch.bool)], dim=1)
    for row in range(BATCH):
        alone, its = rows[row, real[row]], architecture.batch_major(memory)[row]
        assert_same(out[row, real[row]], stock(alone, its, tgt_mask=future(len(alone))))


@settings(parent=fewer(2))
@given(architecture=architectures(), data=st.data())
def test_beams_guesses_and_copies(architecture: Architecture, data: st.DataObject) -> None:
    """Reordered, cropped and copied, a cache goes on as one that was fed that way."""
    ours = replace_mha(architecture.decoder().eval())
    x, memory = architecture.inputs(BATCH, SEQLEN), architecture.inputs(BATCH, MEMORY, 2)
    kind, axis = data.draw(st.sampled_from(sorted(KINDS))), 0 if architecture.batch_first else 1
    rows = torch.tensor([data.draw(st.integers(0, BATCH - 1)) for _ in range(BATCH)])
    cache = KVCache.of(ours, BATCH, SEQLEN, **KINDS[kind])
    ours(part(architecture, x, slice(0, 4)), memory, tgt_mask=future(4), cache=cache)
    twin = copy.deepcopy(cache)
    cache.crop(3)
    cache.reorder(rows)
    turned = x.index_select(axis, rows)
    made = ours(part(architecture, turned, slice(3, 5)), memory, tgt_mask=future(2), cache=cache)
    wanted = ours(turned, memory.index_select(axis, rows), tgt_mask=future(SEQLEN))
    assert_same(made, part(architecture, wanted, slice(3, 5)))
    made = ours(part(architecture, x, slice(4, 7)), memory, tgt_mask=future(3), cache=twin)
    assert_same(made, part(architecture, ours(x, memory, tgt_mask=future(SEQLEN)), slice(4, 7)))
    cache.reset()
    made = ours(part(architecture, x, slice(0, 2)), 2 * memory, tgt_mask=future(2), cache=cache)
    assert_same(made, part(architecture, ours(x, 2 * memory, tgt_mask=future(SEQLEN)), slice(0, 2)))


class Stumbles(RuntimeError):
    """What a hook raises."""


def stumble(*_: Any) -> None:
    raise Stumbles


@settings(parent=fewer(2))
@given(architecture=architectures(), where=st.sampled_from(("self_attn", "multihead_attn", "linear2")), data=st.data())
def test_a_call_that_fails_on_the_way_leaves_every_layer_as_it_was(
    architecture: Architecture, where: str, data: st.DataObject
) -> None:
    """In a decoder, and in one of its layers alone; in a prompt and in a step."""
    decoder = replace_mha(architecture.decoder().eval())
    last = data.draw(st.sampled_from(list(decoder.layers)))
    ours: Any = data.draw(st.sampled_from((decoder, last)))
    x, memory = architecture.inputs(BATCH, SEQLEN), architecture.inputs(BATCH, MEMORY, 2)
    cache = KVCache.of(ours, BATCH, SEQLEN, **KINDS[data.draw(st.sampled_from(sorted(KINDS)))])
    begun, step = data.draw(st.booleans()), data.draw(st.booleans())
    made = [ours(part(architecture, x, slice(0, 2)), memory, tgt_mask=future(2), cache=cache)] if begun else []
    free = [len(one.pool.free) for one in cache.paged()]
    hook = getattr(last, where).register_forward_pre_hook(stumble)
    with pytest.raises(Stumbles):
        wrong = part(architecture, x, slice(2, 3 if step else 6))
        ours(wrong, 2 * memory, tgt_mask=None if step else future(4), cache=cache)
    hook.remove()
    assert free == [len(one.pool.free) for one in cache.paged()]
    start = 2 if begun else 0
    made.append(ours(part(architecture, x, slice(start, 4)), memory, tgt_mask=future(4 - start), cache=cache))
    wanted = ours(x, memory, tgt_mask=future(SEQLEN))
    assert_same(torch.cat(made, dim=1 if architecture.batch_first else 0), part(architecture, wanted, slice(0, 4)))


@given(architecture=architectures(), kind=st.sampled_from(sorted(KINDS)), begun=st.booleans())
def test_a_layer_that_fails_on_the_way_leaves_its_caches_as_they_were(
    architecture: Architecture, kind: str, begun: bool
) -> None:
    layer = replace_mha(architecture.decoder().eval()).layers[0]
    x, memory = architecture.inputs(BATCH, SEQLEN), architecture.inputs(BATCH, MEMORY, 2)
    cache = KVCache.of(layer, BATCH, SEQLEN, **KINDS[kind])
    made = [layer(part(architecture, x, slice(0, 2)), memory, tgt_mask=future(2), cache=cache)] if begun else []
    start = 2 * begun
    with pytest.raises((RuntimeError, ValueError)):
        layer(part(architecture, x, slice(start, 4)), memory[:1, :1], tgt_mask=future(4 - start), cache=cache)
    made.append(layer(part(architecture, x, slice(start, 4)), memory, tgt_mask=future(4 - start), cache=cache))
    wanted = layer(x, memory, tgt_mask=future(SEQLEN))
    assert_same(torch.cat(made, dim=1 if architecture.batch_first else 0), part(architecture, wanted, slice(0, 4)))


@given(st.lists(st.integers(0, BATCH - 1), min_size=BATCH, max_size=BATCH))
def test_rows_are_reordered_in_all_layers_or_none(rows: list[int]) -> None:
    """Where the pool of one layer has pages for them, and that of the next has not."""
    caches = [PagedCache(flashmha.PagePool(pages, 1, 1, 4), BATCH, 4) for pages in (4, 3)]
    k, before = noise(1, BATCH, 2, 1, 4).float(), []
    for cache in caches:
        for length in (1, 2):  # a page for each token of the first row, and none for the other
            cache.update(k[:, length - 1 : length], k[:, length - 1 : length])
            cache.crop(torch.tensor([length, 0]))
            cache.trim()
        before.append(cache.read(2)[0])
    with pytest.raises(ValueError, match="pages must be free"):
        KVCache(dict(zip("ab", caches))).reorder(torch.tensor(rows))
    for cache, keys in zip(caches, before):
        assert torch.equal(cache.read(2)[0], keys) and cache.get_seq_length().tolist() == [2, 0]


@pytest.mark.cpu("elsewhere an error of the device, which is not waited for")
@pytest.mark.parametrize("change", ("crop", "keep"))
def test_layers_are_cropped_all_or_none(change: str) -> None:
    model = Model().eval()
    cache, x = KVCache.of(model, 1, 30, chunk=2), noise(1, 1, 12, 8)
    for place in range(12):
        model(x[:, place : place + 1], cache)
    with pytest.raises(ValueError, match="must take back at most chunk=2"):
        cache.crop(-5) if change == "crop" else cache.keep(-5, torch.tensor([[0, 3]]))
    assert all(one.get_seq_length().tolist() == [12] for one in cache.caches())


@given(longer=st.integers(2, 5), data=st.data())
def test_layers_of_one_pool_are_reordered_all_or_none(longer: int, data: st.DataObject) -> None:
    """Where there are pages for the beams of the first layer and not of the second, all is as it was."""
    pool = PagePool(4 * longer, 1, 2, 4, dtype=torch.float64)
    cache = KVCache({name: PagedCache(pool, 2, longer) for name in ("one", "two")})
    k, real = noise(1, 2, longer, 2, 4), torch.arange(longer) < torch.tensor([[longer], [1]])
    for one in cache.paged():
        one.update(k, k, real)
    cache.trim()
    spare = data.draw(st.integers(0, 2 * (longer - 1) - 1))
    pool.take(len(pool.free) - spare)
    before = [one.read(longer)[0].clone() for one in cache.paged()]
    with pytest.raises(ValueError, match="pages must be free"):
        cache.reorder(torch.tensor([0, 0]))
    assert len(pool.free) == spare and cache.get_seq_length().tolist() == [longer, 1]
    assert all(torch.equal(one.read(longer)[0], keys) for one, keys in zip(cache.paged(), before))


@given(architectures())
def test_without_a_cache_a_decoder_is_torchs_own(architecture: Architecture) -> None:
    stock = architecture.decoder().eval()
    ours = replace_mha(copy.deepcopy(stock))
    x, memory = architecture.inputs(BATCH, SEQLEN), architecture.inputs(BATCH, MEMORY, 2)
    mask = future(SEQLEN)
    assert_same(ours(x, memory, tgt_mask=mask), stock(x, memory, tgt_mask=mask))
    assert_same(ours(x, memory, memory_mask=mask[:, :MEMORY]), stock(x, memory, memory_mask=mask[:, :MEMORY]))
    assert pickle.loads(pickle.dumps(ours)).state_dict().keys() == stock.state_dict().keys()
    restored = restore_mha(ours)
    assert type(restored) is nn.TransformerDecoder and type(restored.layers[0]) is nn.TransformerDecoderLayer


@pytest.mark.filterwarnings("ignore:.torch.jit.*is deprecated")
def test_a_scripted_decoder_has_no_cache_and_computes_the_same() -> None:
    ours = replace_mha(nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 16), 2).eval())
    x, memory = torch.randn(3, 2, 8), torch.randn(4, 2, 8)
    scripted = torch.jit.script(ours)
    assert_same(scripted(x, memory), ours(x, memory))
    with pytest.raises(Exception, match="cache must be None"):
        scripted(x, memory, cache=torch.ones(1))


@pytest.mark.filterwarnings("ignore")
def test_fx_sees_a_layer_without_a_cache() -> None:
    layer = replace_mha(nn.TransformerDecoderLayer(8, 2, 16).eval())
    x, memory = torch.randn(3, 2, 8), torch.randn(4, 2, 8)
    traced = torch.fx.symbolic_trace(layer, concrete_args={"tgt_is_causal": False, "memory_is_causal": False})
    assert_same(traced(x, memory), layer(x, memory))


# Compiled


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("backend", ("eager", "aot_eager"))
def test_one_graph_serves_every_step(kind: str, backend: str) -> None:
    torch.manual_seed(0)
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 16, batch_first=True, dtype=torch.float64), 2)
    ours, counter = replace_mha(decoder.eval()), CompileCounterWithBackend(backend)
    x, memory = (torch.randn(BATCH, n, 8, dtype=torch.float64) for n in (SEQLEN, MEMORY))
    cache = KVCache.of(ours, BATCH, SEQLEN, **KINDS[kind])
    torch._dynamo.reset()
    compiled = torch.compile(ours, backend=counter, fullgraph=True)
    made = [ours(x[:, :2], memory, tgt_mask=future(2), cache=cache)]
    cache.reserve(SEQLEN - 2)
    made += [compiled(x[:, place : place + 1], memory, cache=cache) for place in range(2, SEQLEN)]
    assert_same(torch.cat(made, dim=1), ours(x, memory, tgt_mask=future(SEQLEN)))
    assert counter.frame_count == 1


def test_a_compiled_prompt_takes_its_memory() -> None:
    torch.manual_seed(0)
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 16, batch_first=True, dtype=torch.float64), 1)
    ours = replace_mha(decoder.eval())
    x, memory = (torch.randn(BATCH, n, 8, dtype=torch.float64) for n in (4, MEMORY))
    cache = KVCache.of(ours, BATCH, SEQLEN)
    torch._dynamo.reset()
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    made = [compiled(x[:, :2], memory, tgt_mask=future(2), tgt_is_causal=True, cache=cache)]
    made += [compiled(x[:, place : place + 1], memory, cache=cache) for place in (2, 3)]
    assert_same(torch.cat(made, dim=1), ours(x, memory, tgt_mask=future(4)))


@pytest.mark.parametrize("sizes", ({}, {"chunk": 2}), ids=("static", "ring"))
def test_one_graph_serves_every_step_of_a_model_with_everything(sizes: dict[str, int]) -> None:
    torch.manual_seed(0)
    model, counter = Model().eval(), CompileCounterWithBackend("aot_eager")
    x = torch.randn(BATCH, 9, 8, dtype=torch.float64)
    cache = KVCache.of(model, BATCH, 10, **sizes)
    kinds = {type(one) for one in cache.caches()}
    assert kinds == ({RingCache, StaticCache} if sizes else {StaticCache})
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    made = [compiled(x[:, place : place + 1], cache) for place in range(3)]
    made += [compiled(x[:, place : place + 2], cache) for place in range(3, 9, 2)]
    assert_same(torch.cat(made, dim=1), model(x))
    assert counter.frame_count == 2


# Models of one's own


class Model(nn.Module):
    """Two layers that count positions, the second of which sees no farther than three tokens."""

    def __init__(self) -> None:
        super().__init__()
        told: dict[str, Any] = {"batch_first": True, "causal": True, "dtype": torch.float64, "need_weights": False}
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16)
        self.one = FlashMultiHeadAttention(8, 2, rotary=flashmha.Rotary(4), qk_norm="rms", num_kv_heads=1, **told)
        self.two = FlashMultiHeadAttention(8, 2, position_bias=flashmha.AlibiBias(2), window=(3, 0), **told)

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        for name in ("one", "two"):
            x = x + getattr(self, name)(x, x, x, cache=None if cache is None else cache[name])[0]
        return x


@given(
    batch=st.integers(1, 3),
    chunk=st.integers(1, 3),
    page_size=st.integers(1, 4),
    where=st.sampled_from(("static", "ring", "paged")),
)
def test_of_makes_each_layer_its_cache(batch: int, chunk: int, page_size: int, where: str) -> None:
    model = replace_mha(Model())
    told: dict[str, Any] = {"static": {}, "ring": {"chunk": chunk}, "paged": {"page_size": page_size}}[where]
    cache = KVCache.of(model, batch, 10, **told)
    assert cache.names() == ["one", "two"]  # and none for the encoder, which takes no cache
    kind = {"static": StaticCache, "ring": StaticCache, "paged": PagedCache}[where]
    assert type(cache["one"]) is kind and type(cache["two"]) is (RingCache if where == "ring" else kind)
    assert cache["one"].store[0].shape[-2:] == (1, 4) and cache["two"].store[0].shape[-2:] == (2, 4)
    assert cache.nbytes == sum(one.nbytes for one in cache.caches())
    x = noise(0, batch, 10, 8)
    made = [model(x[:, place : place + 1], cache) for place in range(10)]
    assert_same(torch.cat(made, dim=1), model(x))
    cache.trim()
    cache.release(range(batch))
    assert all(not one.get_seq_length().any() for one in cache.caches() if isinstance(one, PagedCache))


@pytest.mark.parametrize("where", ("decoder", "layer", "layer before the swap", "attention of a layer", "inside"))
def test_what_is_compiled_finds_its_caches(where: str) -> None:
    """``KVCache.of`` may be given the compiled module, or what holds one."""
    ours: Any = Architecture(training=False, batch_first=True).decoder().eval()
    if where == "layer before the swap":
        ours.layers[0] = torch.compile(ours.layers[0], backend="eager")
    replace_mha(ours)
    x, memory = noise(1, BATCH, 4, WIDTH), noise(2, BATCH, MEMORY, WIDTH)
    wanted = ours(x, memory, tgt_mask=future(4))
    if where == "layer":
        ours.layers[0] = torch.compile(ours.layers[0], backend="eager")
    for name in ("self_attn", "multihead_attn") if "attention" in where else ():
        setattr(ours.layers[0], name, torch.compile(getattr(ours.layers[0], name), backend="eager"))
    model: Any = ours if "layer" in where else torch.compile(ours, backend="eager")
    held = nn.ModuleDict({"decoder": model})
    cache = KVCache.of(held, BATCH, 4)["decoder"] if where == "inside" else KVCache.of(model, BATCH, 4)
    made = [model(x[:, place : place + 1], memory, cache=cache) for place in range(4)]
    assert_same(torch.cat(made, dim=1), wanted)


def test_a_decoder_inside_a_model_finds_its_own_caches() -> None:
    model = replace_mha(nn.Transformer(8, 2, 1, 2, 16, batch_first=True, dtype=torch.float64).eval())
    cache = KVCache.of(model, BATCH, 4)
    assert cache.names() == [
        f"decoder.layers.{number}.{name}" for number in (0, 1) for name in ("self_attn", "multihead_attn")
    ]
    assert isinstance(cache["decoder.layers.0.multihead_attn"], MemoryCache)
    x, memory = noise(1, BATCH, 4, 8), noise(2, BATCH, 3, 8)
    wanted = model.decoder(x, memory, tgt_mask=future(4))
    made = [model.decoder(x[:, place : place + 1], memory, cache=cache["decoder"]) for place in range(4)]
    assert_same(torch.cat(made, dim=1), wanted)
    layer = model.decoder.layers[0]
    assert type(layer) is FlashTransformerDecoderLayer
    own = KVCache.of(layer, BATCH, 4)
    made = [layer(x[:, place : place + 1], memory, cache=own) for place in range(4)]
    assert_same(torch.cat(made, dim=1), layer(x, memory, tgt_mask=future(4)))


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16))
def test_caches_have_the_dtype_of_the_heads_under_autocast(dtype: torch.dtype) -> None:
    """Which autocast leaves as it is in float64."""
    decoder = replace_mha(nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 16, dtype=dtype), 1).eval())
    x = noise(1, 2, BATCH, 8).to(dtype)
    with torch.autocast(x.device.type, torch.bfloat16):
        cache = KVCache.of(decoder, BATCH, SEQLEN)
        decoder(x, x, cache=cache)
    assert cache.get_seq_length().tolist() == [2] * BATCH


def test_what_a_model_cannot_have_is_an_error_that_says_so() -> None:
    with pytest.raises(ValueError, match="model must hold a FlashMultiHeadAttention outside encoders"):
        KVCache.of(nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2), 1), 2, 4)
    with pytest.raises(ValueError, match="page_size must be a whole number"):
        KVCache.of(Model(), 2, 4, page_size=0)
    with pytest.raises(ValueError, match="page_size must be given beside pages"):
        KVCache.of(Model(), 2, 4, pages=3)
    with pytest.raises(TypeError, match="caches must be of one layer each, got int 1 under 'a'"):
        KVCache({"a": 1})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="caches must be of layers beside one another, got 'a'"):
        KVCache({name: StaticCache(1, 1, 1, 1) for name in ("a", "a.b")})
    cache = KVCache.of(Model(), 2, 4)
    with pytest.raises(KeyError, match="cache must hold 'three', got only one, two"):
        cache["three"]
    decoder = replace_mha(nn.TransformerDecoder(nn.TransformerDecoderLayer(WIDTH, 2), 1))
    x = torch.zeros(1, 1, WIDTH)
    with pytest.raises(TypeError, match="cache must be a KVCache"):
        decoder(x, x, cache=[])
    with pytest.raises(ValueError, match="cache must be used where no gradient is wanted"), torch.enable_grad():
        decoder.eval()(x, x, cache=KVCache.of(decoder, 1, 4))


class Layer(nn.TransformerDecoderLayer):
    """A layer with code of its own."""


class Decoder(nn.TransformerDecoder):
    """A decoder with code of its own."""


@pytest.mark.parametrize("layer", (nn.TransformerDecoderLayer, Layer))
@pytest.mark.parametrize("kind", (nn.TransformerDecoder, Decoder))
@pytest.mark.parametrize("where", (None, "*.self_attn"))
def test_the_report_says_what_takes_a_cache_and_why_not(layer: Any, kind: Any, where: str | None) -> None:
    decoder = replace_mha(kind(layer(WIDTH, 2, 8), 1), where=where).eval()
    x, told = torch.zeros(1, 1, WIDTH), {row.name: row for row in swap_report(decoder)}
    for name, module in (("", decoder), ("layers.0", decoder.layers[0])):
        own = type(module) in (Layer, Decoder)
        row = told[name]
        assert row.swapped == (row.why == "takes a cache") and row.swapped == takes_a_cache(module)
        assert own == ("whose own code a swap would lose" in row.why)
    if told[""].swapped:
        decoder(x, x, cache=KVCache.of(decoder, 1, 4))
    else:
        with pytest.raises(TypeError, match="cache"):
            decoder(x, x, cache=KVCache.of(decoder, 1, 4))


def takes_a_cache(module: nn.Module) -> bool:
    """A module's forward has an argument ``cache``."""
    return "cache" in inspect.signature(module.forward).parameters

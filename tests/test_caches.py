"""A layer over a cache: in pieces and steps it computes what it computes in one call."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
from conftest import fewer
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import flashmha
from flashmha import (
    AlibiBias,
    Cache,
    Dense,
    Documents,
    FlashMultiHeadAttention,
    KeyLengths,
    KeyPadding,
    Mask,
    MemoryCache,
    NoBackendError,
    PagedCache,
    PagePool,
    Pages,
    Positions,
    RelativePositionBias,
    RingCache,
    Rotary,
    Rule,
    StaticCache,
    TensorBias,
    Window,
    attention,
    causal,
)
from flashmha.backends import Backend, get, unregister
from flashmha.problem.spec import AttentionSpec
from flashmha.testing import assert_same, noise, randomized, seeds

WIDTH, LONGEST, CHUNK = 12, 9, 4


class Drawn(NamedTuple):
    """A layer that hides the future, and the pieces that its tokens come in."""

    heads: int
    arguments: dict[str, Any]
    rotary: bool
    bias: str
    batch: int
    cuts: list[int]
    kind: str
    weights: bool
    seed: int

    @property
    def seqlen(self) -> int:
        return self.cuts[-1]

    @property
    def pieces(self) -> list[slice]:
        return [slice(a, b) for a, b in zip([0, *self.cuts], self.cuts)]

    def build(self, **more: Any) -> FlashMultiHeadAttention:
        # with weights every slot is looked at, as on a GPU
        made = {"causal": True, "batch_first": True, "need_weights": self.weights, **self.arguments, **more}
        dtype, head_dim = made.setdefault("dtype", torch.float64), WIDTH // self.heads
        if self.rotary:
            made["rotary"] = Rotary(head_dim)
        if self.bias != "none":
            made["position_bias"] = {"alibi": AlibiBias, "relative": RelativePositionBias}[self.bias](self.heads)
        if made.pop("sinks", False):
            made["sinks"] = noise(self.seed + 7, self.heads)
        layer: FlashMultiHeadAttention = randomized(FlashMultiHeadAttention(WIDTH, self.heads, **made), self.seed)
        return layer.eval().to(dtype)

    def tokens(self, seqlen: int | None = None, dtype: torch.dtype = torch.float64) -> Tensor:
        return noise(self.seed + 1, self.batch, self.seqlen if seqlen is None else seqlen, WIDTH).to(dtype)

    def cache(self, layer: FlashMultiHeadAttention, max_seqlen: int = 2 * LONGEST) -> Any:
        heads_kv = layer.num_kv_heads or layer.num_heads
        sizes = heads_kv, WIDTH // layer.num_heads
        told: dict[str, Any] = {"dtype": layer.in_proj_weight.dtype}
        return make_cache(self.kind, self.batch, max_seqlen, sizes, layer.window, told)


def make_cache(
    kind: str, batch: int, max_seqlen: int, sizes: tuple[int, int], window: Window | None, told: dict[str, Any]
) -> Any:
    if kind == "static":
        return StaticCache(batch, max_seqlen, *sizes, **told)
    if kind == "ring":
        left = max_seqlen if window is None or window.left is None else window.left
        return RingCache(batch, left, *sizes, chunk=LONGEST, **told)
    return PagedCache(PagePool(batch * max_seqlen, 3, *sizes, **told), batch, max_seqlen)


KINDS = ("static", "ring", "paged")


@st.composite
def drawn(draw: st.DrawFn, kinds: tuple[str, ...] = KINDS, plain: bool = False) -> Drawn:
    heads = draw(st.sampled_from((1, 2, 4) if plain else (2, 4)))
    one_of = st.sampled_from
    arguments = {
        "num_kv_heads": draw(one_of((None, 1, 2))),
        "bias": draw(st.booleans()),
        "batch_first": True,
        "add_zero_attn": draw(one_of((False, False, True))),
        "window": draw(one_of((None, (2, 0), (0, 0), (3, 2)))),
        "softcap": draw(one_of((None, 1.0))),
        "sinks": draw(one_of((False, True))),
        "qk_norm": draw(one_of((None, "rms"))),
        "softmax_scale": draw(one_of((None, 0.5))),
    }
    steps = draw(st.lists(st.integers(1, CHUNK), min_size=1, max_size=4))
    cuts = torch.tensor(steps, device="cpu").cumsum(0)
    return Drawn(
        heads,
        {} if plain else arguments,
        draw(st.booleans()) and WIDTH // heads % 2 == 0,
        draw(one_of(("none", "alibi", "relative"))),
        draw(st.integers(1, 3)),
        cuts[cuts <= LONGEST].tolist(),
        draw(one_of(kinds)),
        draw(st.booleans()),
        draw(seeds()),
    )


def whole(layer: nn.Module, x: Tensor, **more: Any) -> Tensor:
    out: Tensor = layer(x, x, x, **more)[0]
    return out


def in_pieces(
    layer: nn.Module, x: Tensor, cache: Any, pieces: list[slice], say: Callable[[slice], dict[str, Any]] = lambda at: {}
) -> Tensor:
    return torch.cat([whole(layer, x[:, at], cache=cache, **say(at)) for at in pieces], dim=1)


@pytest.fixture(autouse=True)
def without_gradients() -> Any:
    with torch.no_grad():
        yield


# Steps


@given(drawn())
def test_in_pieces_it_is_the_call_of_all(problem: Drawn) -> None:
    layer, x = problem.build(), problem.tokens()
    cache = problem.cache(layer)
    assert_same(in_pieces(layer, x, cache, problem.pieces), whole(layer, x))
    assert cache.get_seq_length().tolist() == [problem.seqlen] * problem.batch


@given(problem=drawn(), layout=st.sampled_from(("seqlen first", "unbatched")))
def test_in_any_layout(problem: Drawn, layout: str) -> None:
    problem = problem if layout == "seqlen first" else problem._replace(batch=1)
    layer, x = problem.build(batch_first=False), problem.tokens()
    x = x.transpose(0, 1) if layout == "seqlen first" else x[0]
    cache = problem.cache(layer)
    made = torch.cat([whole(layer, x[at], cache=cache) for at in problem.pieces])
    assert_same(made, whole(layer, x))


@settings(parent=fewer(2))
@given(problem=drawn(), dtype=st.sampled_from((torch.float32, torch.bfloat16, torch.float16)))
def test_in_every_dtype(problem: Drawn, dtype: torch.dtype) -> None:
    layer, x = problem.build(dtype=dtype), problem.tokens(dtype=dtype)
    cache = problem.cache(layer)
    assert_same(in_pieces(layer, x, cache, problem.pieces), whole(layer, x))


@given(drawn(plain=True))
def test_under_autocast_a_cache_has_its_dtype(problem: Drawn) -> None:
    layer, x = problem.build(dtype=torch.float32), problem.tokens(dtype=torch.float32)
    with torch.autocast(x.device.type, torch.bfloat16):
        cache = flashmha.KVCache.of(layer, problem.batch, LONGEST)[""]
        assert cache.k.dtype == torch.bfloat16
        assert_same(in_pieces(layer, x, cache, problem.pieces), whole(layer, x), "out")


def nearby(batch: Tensor, head: Tensor, q_pos: Tensor, k_pos: Tensor) -> Tensor:
    """A rule of its own for each row and head, which sees the first key and hides the future."""
    return (k_pos <= q_pos) & ((k_pos == 0) | ((q_pos * 3 + k_pos + batch + head) % 3 != 0))


def future(seqlen: int) -> Tensor:
    return torch.ones(seqlen, seqlen, dtype=torch.bool).triu(1)


MASKS: dict[str, Callable[[Drawn, Tensor, slice], dict[str, Any]]] = {
    "rule": lambda problem, table, at: {"attn_mask": causal()},
    "rule aligned to the first": lambda problem, table, at: {"attn_mask": causal(align="top_left")},
    "rule of one's own": lambda problem, table, at: {"attn_mask": Rule(nearby)},
    "window": lambda problem, table, at: {"attn_mask": Window(3, 0)},
    "bool tensor": lambda problem, table, at: {"attn_mask": future(at.stop - at.start)},
    "float tensor": lambda problem, table, at: {
        "attn_mask": torch.zeros(2 * [at.stop - at.start], dtype=torch.float64).masked_fill(
            future(at.stop - at.start), float("-inf")
        )
    },
    "hint": lambda problem, table, at: {"attn_mask": future(at.stop - at.start), "is_causal": True},
    "table of all positions": lambda problem, table, at: {"attn_mask": Dense(table[:, :, at])},
}


@given(problem=drawn(), name=st.sampled_from(sorted(MASKS)))
def test_beside_every_kind_of_mask(problem: Drawn, name: str) -> None:
    if name.startswith("table") and problem.kind == "ring":
        problem = problem._replace(kind="static")  # a ring has no place for every position
    layer, x, say = problem.build(causal=False, window=None), problem.tokens(), MASKS[name]
    table = noise(problem.seed + 3, problem.batch, problem.heads, LONGEST, 2 * LONGEST) > -0.5
    table[..., :LONGEST] &= ~future(LONGEST)
    given_whole = say(problem, table, slice(0, problem.seqlen))
    if name.startswith("table"):
        given_whole = {"attn_mask": Dense(table[:, :, : problem.seqlen, : problem.seqlen])}
    cache = problem.cache(layer)
    made = in_pieces(layer, x, cache, problem.pieces, lambda at: say(problem, table, at))
    assert_same(made, whole(layer, x, **given_whole))


@given(problem=drawn(), scale=st.floats(0.1, 3.0))
def test_numbers_added_to_scores_are_of_the_own_keys(problem: Drawn, scale: float) -> None:
    """0 on what came before: the same as one call with such a table."""
    layer, x = problem.build(), problem.tokens()
    added = scale * noise(problem.seed + 2, problem.seqlen, problem.seqlen)
    for at in problem.pieces:
        added[at, : at.start] = 0.0
    cache = problem.cache(layer)
    made = in_pieces(layer, x, cache, problem.pieces, lambda at: {"attn_mask": added[at, at]})
    assert_same(made, whole(layer, x, attn_mask=added))


@given(problem=drawn(kinds=("static", "paged")), average=st.booleans())
def test_weights_are_over_the_slots(problem: Drawn, average: bool) -> None:
    layer, x = problem.build(add_zero_attn=False, need_weights=True), problem.tokens()
    cache = problem.cache(layer)
    _, wanted = layer(x, x, x, average_attn_weights=average)
    found = [layer(x[:, at], x[:, at], x[:, at], cache=cache, average_attn_weights=average)[1] for at in problem.pieces]
    made = torch.cat(found, dim=-2)
    assert_same(made[..., : problem.seqlen], wanted)
    assert not made[..., problem.seqlen :].any()


@given(drawn())
def test_named_positions_turn_heads_and_nothing_else(problem: Drawn) -> None:
    problem = problem._replace(rotary=True, heads=2)
    layer, x = problem.build(), problem.tokens()
    places = 5 + 3 * torch.arange(problem.seqlen)
    cache = problem.cache(layer)
    made = in_pieces(layer, x, cache, problem.pieces, lambda at: {"positions": places[at]})
    assert_same(made, whole(layer, x, positions=places))


# Rows of different lengths


def padding_of(problem: Drawn, how: str) -> Tensor:
    """Which tokens are real, (batch, seqlen)."""
    lengths = (noise(problem.seed + 4, problem.batch).abs() * problem.seqlen).long() % (problem.seqlen + 1)
    slots = torch.arange(problem.seqlen)
    if how == "right":
        return slots < lengths[:, None]
    if how == "left":
        return slots >= problem.seqlen - lengths[:, None]
    return noise(problem.seed + 5, problem.batch, problem.seqlen) > 0


@given(
    problem=drawn(),
    how=st.sampled_from(("right", "left", "holes")),
    given_as=st.sampled_from(("mask", "KeyPadding", "KeyLengths")),
    more=st.integers(1, 3),
)
def test_a_padded_row_is_as_it_is_alone(problem: Drawn, how: str, given_as: str, more: int) -> None:
    """A padded prompt in pieces, and tokens behind it: each row is one call of its real tokens."""
    layer, total = problem.build(), problem.seqlen + more
    x = problem.tokens(total)
    if given_as == "KeyLengths":
        how = "right"
    real = torch.cat([padding_of(problem, how), torch.ones(problem.batch, more, dtype=torch.bool)], dim=1)
    pieces = [*problem.pieces, *(slice(place, place + 1) for place in range(problem.seqlen, total))]
    rules: dict[str, Callable[[Tensor], Any]] = {
        "mask": lambda held: ~held,
        "KeyPadding": KeyPadding,
        "KeyLengths": lambda held: KeyLengths(held.sum(1)),
    }
    cache = problem.cache(layer)
    made = in_pieces(layer, x, cache, pieces, lambda at: {"key_padding_mask": rules[given_as](real[:, at].clone())})
    assert cache.get_seq_length().tolist() == real.sum(1).tolist()
    for row in range(problem.batch):
        alone = x[row : row + 1, real[row]]
        assert_same(made[row : row + 1, real[row]], whole(layer, alone))
    assert made.isfinite().all()


# Speculation, beams, and other changes of mind


@given(problem=drawn(), branches=st.lists(st.integers(-1, 6), min_size=1, max_size=8), taken=st.integers(0, 7))
def test_a_tree_of_guesses_is_each_path_alone(problem: Drawn, branches: list[int], taken: int) -> None:
    """Each token sees the prompt and its own ancestors, and stands behind its parent; then one path is kept."""
    problem = problem._replace(bias="none")  # a distance is one of slots, which a tree has not
    layer = problem.build(window=None, causal=False)
    parents = [min(parent, place - 1) for place, parent in enumerate(branches)]
    count = len(parents)
    seen = torch.eye(count, dtype=torch.bool)
    depth = torch.zeros(count, dtype=torch.long)
    for place, parent in enumerate(parents):
        if parent >= 0:
            seen[place] |= seen[parent]
            depth[place] = depth[parent] + 1
    x = problem.tokens(problem.seqlen + count)
    prompt, guesses = x[:, : problem.seqlen], x[:, problem.seqlen :]
    cache = problem.cache(layer)
    whole(layer, prompt, cache=cache, attn_mask=causal())
    named = {"positions": problem.seqlen + depth} if problem.rotary else {}
    made = whole(layer, guesses, cache=cache, attn_mask=~seen, **named)
    for place in range(count):
        path = torch.cat([prompt, guesses[:, seen[place]]], dim=1)
        assert_same(made[:, place], whole(layer, path, attn_mask=causal())[:, -1])
    chosen = [place for place in range(count) if seen[taken % count, place]]
    named = torch.tensor(chosen + [-1] * (count - len(chosen))).expand(problem.batch, -1)
    cache.keep(problem.seqlen, named)
    assert cache.get_seq_length().tolist() == [problem.seqlen + len(chosen)] * problem.batch
    more = noise(problem.seed + 8, problem.batch, 2, WIDTH)
    text = torch.cat([prompt, guesses[:, chosen], more], dim=1)
    made = whole(layer, more, cache=cache, attn_mask=causal())
    assert_same(made, whole(layer, text, attn_mask=causal())[:, -2:])


@given(problem=drawn(), wrong=st.integers(1, CHUNK), by_row=st.booleans())
def test_what_was_cropped_was_never_there(problem: Drawn, wrong: int, by_row: bool) -> None:
    layer, x = problem.build(), problem.tokens()
    cache, first = problem.cache(layer, 2 * LONGEST + CHUNK), problem.pieces[0]
    out = [whole(layer, x[:, first], cache=cache)]
    guesses = noise(problem.seed + 6, problem.batch, wrong, WIDTH)
    whole(layer, guesses, cache=cache)
    cache.crop(torch.full((problem.batch,), first.stop) if by_row else -wrong)
    for more in (LONGEST, 2**40, torch.full((problem.batch,), 2**33)):  # than there are
        cache.crop(more)
    out += [whole(layer, x[:, at], cache=cache) for at in problem.pieces[1:]]
    assert_same(torch.cat(out, dim=1), whole(layer, x))


@given(problem=drawn(), data=st.data())
def test_reordered_rows_go_on_as_the_rows_they_became(problem: Drawn, data: st.DataObject) -> None:
    layer, x = problem.build(), problem.tokens()
    lengths = padding_of(problem, "right")
    rows = torch.tensor([data.draw(st.integers(0, problem.batch - 1)) for _ in range(problem.batch)])
    cache, other = problem.cache(layer), problem.cache(layer)
    whole(layer, x, cache=cache, key_padding_mask=~lengths)
    cache.reorder(rows)
    whole(layer, x[rows], cache=other, key_padding_mask=~lengths[rows])
    more = noise(problem.seed + 8, problem.batch, 3, WIDTH)
    assert_same(whole(layer, more, cache=cache), whole(layer, more, cache=other))
    assert cache.get_seq_length().tolist() == other.get_seq_length().tolist()


@given(drawn())
def test_a_reset_cache_is_a_new_one_and_a_copy_goes_its_own_way(problem: Drawn) -> None:
    layer, x = problem.build(), problem.tokens()
    cache, first = problem.cache(layer), problem.pieces[0]
    whole(layer, x.flip(1) * float("nan"), cache=cache)
    cache.reset()
    assert not cache.get_seq_length().any()
    whole(layer, x[:, first], cache=cache)
    twin = copy.deepcopy(cache)
    whole(layer, x[:, first].flip(0) + 1, cache=twin)
    assert cache.get_seq_length().tolist() == [first.stop] * problem.batch
    rest = [whole(layer, x[:, at], cache=cache) for at in problem.pieces[1:]]
    if rest:
        assert_same(torch.cat(rest, dim=1), whole(layer, x)[:, first.stop :])


@given(drawn())
def test_a_call_of_no_tokens_changes_nothing(problem: Drawn) -> None:
    """Whatever its masks are, which hold no number then."""
    layer, x = problem.build(), problem.tokens()
    cache, nothing = problem.cache(layer), x[:, :0]
    out = [whole(layer, x[:, at], cache=cache) for at in problem.pieces[:-1]]
    table, hidden = torch.ones(0, 0, dtype=torch.bool), torch.ones(problem.batch, 0, dtype=torch.bool)
    for mask, padding in ((None, None), (table, None), (table.to(x.dtype), None), (None, hidden), (table, hidden)):
        made = whole(layer, nothing, cache=cache, attn_mask=mask, key_padding_mask=padding)
        assert made.shape == nothing.shape
    out.append(whole(layer, x[:, problem.pieces[-1]], cache=cache))
    assert_same(torch.cat(out, dim=1), whole(layer, x))


# Rings


@given(problem=drawn(kinds=("ring",)), window=st.integers(0, 4), chunk=st.integers(1, 3), sinks=st.integers(0, 3))
def test_a_ring_sees_its_window_and_the_first_tokens(problem: Drawn, window: int, chunk: int, sinks: int) -> None:
    """For as long as one likes, in little memory: longer than all it holds, three times around."""
    layer = problem.build(window=None)
    total = 3 * (window + chunk + sinks)
    x = problem.tokens(total)
    sizes = layer.num_kv_heads or layer.num_heads, WIDTH // layer.num_heads
    cache = RingCache(problem.batch, window, *sizes, chunk=chunk, sinks=sinks, dtype=torch.float64)
    assert cache.k.shape[1] == window + chunk + sinks
    pieces = [slice(start, min(start + chunk, total)) for start in range(0, total, chunk)]

    def near_or_first(batch: Tensor, head: Tensor, q_pos: Tensor, k_pos: Tensor) -> Tensor:
        return (q_pos - k_pos <= window) | (k_pos < sinks)

    assert_same(in_pieces(layer, x, cache, pieces), whole(layer, x, attn_mask=Rule(near_or_first)))


@pytest.mark.cpu("elsewhere an error of the device, which is not waited for")
@given(problem=drawn(kinds=("ring",)), window=st.integers(0, 3), chunk=st.integers(1, 3), back=st.integers(1, 5))
def test_a_ring_is_cropped_by_a_chunk_or_not_at_all(problem: Drawn, window: int, chunk: int, back: int) -> None:
    layer = problem.build(window=None)
    total = 4 * (window + chunk)
    x = problem.tokens(total + 1)
    sizes = layer.num_kv_heads or layer.num_heads, WIDTH // layer.num_heads
    cache = RingCache(problem.batch, window, *sizes, chunk=chunk, dtype=torch.float64)
    in_pieces(layer, x, cache, [slice(place, place + 1) for place in range(total)])
    if back > chunk:
        with pytest.raises(ValueError, match="must take back at most"):
            cache.crop(-back)
        back = 0
    else:
        cache.crop(-back)
    left = [slice(place, place + 1) for place in range(total - back, total + 1)]
    wanted = whole(layer, x, attn_mask=Window(window, 0))[:, total - back :]
    assert_same(in_pieces(layer, x, cache, left), wanted)


# Pages


@given(problem=drawn(kinds=("paged",)), data=st.data())
def test_pages_are_as_many_as_tokens_need_and_come_back(problem: Drawn, data: st.DataObject) -> None:
    layer, x = problem.build(), problem.tokens()
    cache, real = problem.cache(layer), padding_of(problem, "right")
    pool, size = cache.pool, cache.pool.page_size
    whole(layer, x, cache=cache, key_padding_mask=~real)
    cache.trim()
    need = [-(-length // size) for length in real.sum(1).tolist()]
    assert [len(pages) for pages in cache.booked] == need
    assert len(pool.free) == pool.pages - sum(need)
    held = [page for pages in cache.booked for page in pages] + pool.free
    assert sorted(held) == list(range(pool.pages))
    assert cache.nbytes == sum(need) * pool.page_nbytes + cache.block_table.nbytes + cache.lengths.nbytes
    row = data.draw(st.integers(0, problem.batch - 1))
    cache.release([row])
    assert cache.get_seq_length()[row] == 0 and len(pool.free) == pool.pages - sum(need) + need[row]
    more = noise(problem.seed + 8, problem.batch, 2, WIDTH)
    alone = whole(layer, more[row : row + 1])
    assert_same(whole(layer, more, cache=cache)[row : row + 1], alone)
    cache.reset()
    assert sorted(pool.free) == list(range(pool.pages))


@given(problem=drawn(kinds=("paged",)), pages=st.integers(1, 4))
def test_over_booking_is_an_error_and_changes_nothing(problem: Drawn, pages: int) -> None:
    layer = problem.build()
    sizes = layer.num_kv_heads or layer.num_heads, WIDTH // layer.num_heads
    pool = PagePool(pages, 2, *sizes, dtype=torch.float64)
    cache = PagedCache(pool, problem.batch, 100)
    room = pages // problem.batch * 2
    x = problem.tokens(room + 1)
    whole(layer, x[:, :room], cache=cache)
    free, table = list(pool.free), cache.block_table.clone()
    with pytest.raises(ValueError, match=f"pages must be free for .*, got {len(free)} of {pages}"):
        whole(layer, x[:, room:].expand(-1, 2 * pages + 1, -1), cache=cache)
    assert pool.free == free and torch.equal(cache.block_table, table)
    assert cache.get_seq_length().tolist() == [room] * problem.batch


@given(problem=drawn(kinds=("paged",)), row=st.integers(0, 3), wrong=st.sampled_from((-1, 4)))
def test_rows_that_are_not_there_are_released_with_none(problem: Drawn, row: int, wrong: int) -> None:
    layer, x = problem.build(), problem.tokens()
    cache = problem.cache(layer)
    whole(layer, x, cache=cache)
    free, booked = list(cache.pool.free), copy.deepcopy(cache.booked)
    with pytest.raises(ValueError, match="rows must be numbers between 0 and"):
        cache.release([row % problem.batch, wrong])
    assert cache.pool.free == free and cache.booked == booked
    assert cache.get_seq_length().tolist() == [problem.seqlen] * problem.batch


class Unseen(PagedCache):
    """A cache whose lengths the host does not look at, as on a GPU."""

    def held(self) -> list[int] | None:
        return None


class Reader(Backend):
    """A backend that reads keys where they lie, and notes what it was given."""

    name = "reader"
    limits = dataclasses.replace(get("naive").limits, aten=False)
    given: ClassVar[list[tuple[Tensor, AttentionSpec]]] = []

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Any:
        self.given.append((k, spec))
        return get("naive")(q, k, v, spec)


class Rows(Reader):
    """A backend of keys in rows."""

    name = "rows"
    limits = dataclasses.replace(Reader.limits, features=Reader.limits.features - {"pages"})


@pytest.fixture
def readers() -> Any:
    for kind in (Reader, Rows):
        flashmha.register(kind, before="sdpa")
        kind.given = []
    yield
    for kind in (Reader, Rows):
        unregister(kind.name)


@pytest.mark.usefixtures("readers")
@given(problem=drawn(kinds=("paged",)), named=st.sampled_from((None, "reader", "rows", "naive")))
def test_pages_go_to_a_backend_that_reads_them_and_rows_to_others(problem: Drawn, named: Any) -> None:
    """Whichever is named, or chosen; and to no call that wants every slot, or more keys behind them."""
    layer, x = problem.build(), problem.tokens()
    sizes = layer.num_kv_heads, WIDTH // layer.num_heads
    cache = Unseen(PagePool(20 * problem.batch, 3, *sizes, dtype=torch.float64), problem.batch, 2 * LONGEST)
    Reader.given, Rows.given = [], []
    more = {} if named is None else {"backend": named}
    made = in_pieces(layer, x, cache, problem.pieces, lambda at: more)
    assert_same(made, whole(layer, x))
    if problem.weights:
        return
    there = named in (None, "reader") and not layer.add_zero_attn
    for k, spec in Reader.given[: len(problem.pieces)] if there else ():
        assert k is cache.pool.k and spec.pages is not None and spec.seqlen_k == cache.capacity
    assert len(Reader.given) >= len(problem.pieces) * there
    assert all(k is not cache.pool.k and spec.pages is None for k, spec in Rows.given)
    said = flashmha.explain(layer, x[:, :1], x[:, :1], x[:, :1], cache=cache, **more)
    assert said.chosen == (named or "reader")


@settings(max_examples=4, phases=(Phase.explicit, Phase.generate))  # to shrink would compile for minutes
@given(problem=drawn(kinds=("paged",), plain=True))
def test_a_compiled_step_reads_pages(problem: Drawn) -> None:
    torch.compiler.reset()
    layer, x = problem._replace(weights=False).build(), problem.tokens()
    cache = problem.cache(layer)
    cache.reserve(problem.seqlen)
    step = torch.compile(lambda x: whole(layer, x, cache=cache), backend="eager", fullgraph=True)
    made = torch.cat([step(x[:, at]) for at in problem.pieces], dim=1)
    assert_same(made, whole(layer, x))


# A memory


class Counting(FlashMultiHeadAttention):
    """Counts how often keys are projected."""

    projected = 0

    def project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self.projected += key is not None
        return super().project(query, key, value)


@given(problem=drawn(plain=True), seqlen_k=st.integers(1, 5), masked=st.booleans(), fixed=st.booleans())
def test_a_memory_is_projected_once(problem: Drawn, seqlen_k: int, masked: bool, fixed: bool) -> None:
    layer = Counting(WIDTH, problem.heads, batch_first=True, dtype=torch.float64).eval()
    x, memory = problem.tokens(), noise(problem.seed + 2, problem.batch, seqlen_k, WIDTH)
    hidden = noise(problem.seed + 3, problem.batch, seqlen_k) > 0.5
    more = {"key_padding_mask": hidden} if masked else {}
    wanted = layer(x, memory, memory, **more)[0]
    size = WIDTH // problem.heads
    cache = MemoryCache(problem.batch, problem.heads, size, seqlen=seqlen_k if fixed else None, dtype=torch.float64)
    layer.projected = 0
    made = [layer(x[:, at], memory, memory, cache=cache, **more)[0] for at in problem.pieces]
    assert_same(torch.cat(made, dim=1), wanted)
    assert layer.projected == 1
    rows = torch.arange(problem.batch).flip(0)
    cache.reorder(rows)
    assert_same(layer(x, memory, memory, cache=cache)[0], layer(x, memory[rows], memory[rows])[0])
    cache.reset()
    assert_same(layer(x, 2 * memory, 2 * memory, cache=cache)[0], layer(x, 2 * memory, 2 * memory)[0])


# What is refused


def plain_layer(**more: Any) -> FlashMultiHeadAttention:
    return FlashMultiHeadAttention(8, 2, batch_first=True, **more).eval()


def static(batch: int = 2, **more: Any) -> StaticCache:
    return StaticCache(batch, 5, 2, 4, **more)


X = noise(0, 2, 3, 8).float()


def call(layer: FlashMultiHeadAttention, cache: Any, x: Tensor = X, **more: Any) -> Any:
    return layer(x, x, x, cache=cache, **more)


class Prefix(FlashMultiHeadAttention):
    keys_before = 1

    def process_heads(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return q, torch.cat([k[:, :1], k], 1), torch.cat([v[:, :1], v], 1)


class ByPlace(nn.Module):
    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        return q.new_zeros(1, 1, q.shape[1], k.shape[1])


def memory(**more: Any) -> MemoryCache:
    return MemoryCache(2, 2, 4, **more)


def of_three() -> StaticCache:
    """A cache of two rows of three tokens."""
    cache = static()
    call(plain_layer(), cache)
    return cache


def filled() -> MemoryCache:
    """A memory of two rows of three tokens that was projected."""
    cache = memory()
    plain_layer()(X, X, X, cache=cache)
    return cache


def decoder_step(memory: Any) -> Tensor:
    """A step of a decoder whose memory was projected, beside what it is given now."""
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 8, batch_first=True), 1).eval()
    cache = flashmha.KVCache.of(flashmha.replace_mha(decoder), 2, 5)
    decoder(X[:, :1], X, cache=cache)
    return decoder(X[:, :1], memory, cache=cache)


def paged(table: list[list[int]], mask: Mask | None = None, page_size: int = 4) -> Any:
    """Attention over pages of a pool of three."""
    q, pool = noise(0, 1, 1, 2, 4), noise(1, 3, 4, 2, 4)
    pages = Pages(torch.tensor(table, dtype=torch.int32), page_size)
    return attention(q, pool, pool, mask=pages if mask is None else pages & mask)


REFUSED: dict[str, tuple[str, Callable[[], Any]]] = {
    "a list": ("cache must be the cache of this one layer", lambda: call(plain_layer(), [])),
    "the caches of a model": (
        "a KVCache holds one for each layer",
        lambda: call(plain_layer(), flashmha.KVCache.of(plain_layer(), 2, 5)),
    ),
    "another batch": ("cache must have the batch of the query, 2", lambda: call(plain_layer(), static(3))),
    "another dtype": ("k must be float64 on", lambda: call(plain_layer(), static(dtype=torch.float64))),
    "other heads": ("k must be .batch=2, seqlen, heads_kv=2", lambda: call(plain_layer(num_kv_heads=1), static())),
    "kv beside it": ("kv must be None beside a cache", lambda: call(plain_layer(), static(), kv=(X, X))),
    "a float padding mask": (
        "key_padding_mask must be bool or a rule",
        lambda: call(plain_layer(), static(), key_padding_mask=torch.zeros(2, 3)),
    ),
    "padding as attn_mask": (
        "attn_mask must hold no KeyPadding",
        lambda: call(plain_layer(), static(), attn_mask=KeyPadding(torch.ones(2, 3, dtype=torch.bool))),
    ),
    "documents": (
        "attn_mask must hold no Documents",
        lambda: call(plain_layer(), static(1), X[:1], attn_mask=Documents(torch.tensor([0, 3]))),
    ),
    "a mask of another width": (
        "attn_mask must be 3 keys wide beside a cache, the call's own or 5",
        lambda: call(plain_layer(), static(), attn_mask=Dense(torch.ones(3, 4, dtype=torch.bool))),
    ),
    "other keys": (
        "key must be the tokens of the query",
        lambda: plain_layer()(X, X[:, :2], X[:, :2], cache=static()),
    ),
    "keys of its own": (
        "process_heads must return the call's 3 keys",
        lambda: call(Prefix(8, 2, batch_first=True), static()),
    ),
    "a bias by place": (
        "position_bias must go by distance",
        lambda: call(plain_layer(position_bias=ByPlace()), static()),
    ),
    "too many for a ring": (
        "chunk must be at least the 3 tokens",
        lambda: call(plain_layer(), RingCache(2, 4, 2, 4, chunk=2)),
    ),
    "a ring that forgets": (
        "window of a RingCache must reach as far",
        lambda: call(plain_layer(window=(5, 0)), RingCache(2, 4, 2, 4, chunk=3)),
    ),
    "too many for pages": (
        "max_seqlen must be at least 3",
        lambda: call(plain_layer(), PagedCache(PagePool(9, 2, 2, 4), 2, 2)),
    ),
    "a window over a memory": (
        "window must not count positions",
        lambda: call(plain_layer(window=(1, 0)), memory()),
    ),
    "rotary over a memory": (
        "rotary must not count positions",
        lambda: call(plain_layer(rotary=Rotary(4)), memory()),
    ),
    "causality over a memory": (
        "attn_mask must not count positions",
        lambda: call(plain_layer(), memory(), attn_mask=causal()),
    ),
    "a memory of other sizes": (
        "key must be the memory of the cache, batch=2 seqlen=3, got batch=1 seqlen=3",
        lambda: plain_layer()(X[:, :1], X[:1], X[:1], cache=filled()),
    ),
    "no memory": ("key must be a tensor, got NoneType None", lambda: decoder_step(None)),
    "half a memory": (
        "key must be the memory of the cache, batch=2 seqlen=3, got batch=2",
        lambda: decoder_step(X[:, :2]),
    ),
    "rows that cannot be released": (
        "rows must be numbers between 0 and 1, got .0, 2.",
        lambda: static().release([0, 2]),
    ),
    "a row that is in no list": ("rows must be numbers between 0 and 1, got 1.", lambda: static().release(1)),  # type: ignore[arg-type]
    "a mask of rows": (
        "rows must be numbers between 0 and 1, got .True, False.",
        lambda: static().release(torch.tensor([True, False])),  # type: ignore[arg-type]
    ),
    "no list of places": (
        "chosen must be integers .batch=2, tokens., got list",
        lambda: static().keep(0, [[0], [0]]),  # type: ignore[arg-type]
    ),
    "one cache for two layers": (
        "caches must be one for each layer, got one StaticCache for a and b",
        lambda: flashmha.KVCache(dict.fromkeys(("a", "b"), static())),
    ),
    "another memory's length": ("k must be .2, 4, 2, 4.", lambda: call(plain_layer(), memory(seqlen=4))),
    "no size": ("max_seqlen must be a whole number", lambda: StaticCache(2, 0, 2, 4)),
    "keys that are none": ("k must be .batch=2, seqlen, heads_kv=2", lambda: static().update([1], [1])),  # type: ignore[arg-type]
    "padding that is none": (
        "real must be bool .batch, seqlen. = .2, 3.",
        lambda: static().update(*torch.zeros(2, 2, 3, 2, 4), [True]),  # type: ignore[misc]
    ),
    "a window of less than nothing": (
        "window must be a whole number of at least 0, got -1",
        lambda: RingCache(2, -1, 2, 4),
    ),
    "first tokens less than none": (
        "sinks must be a whole number of at least 0, got -1",
        lambda: RingCache(2, 4, 2, 4, sinks=-1),
    ),
    "pages of no token": (
        "page_size must be a whole number of at least 1, got 0",
        lambda: flashmha.KVCache.of(plain_layer(), 2, 5, page_size=0),
    ),
    "a chunk of none": (
        "chunk must be a whole number of at least 1, got 0",
        lambda: flashmha.KVCache.of(plain_layer(), 2, 5, chunk=0),
    ),
    "a memory of less than nothing": (
        "seqlen must be a whole number of at least 1, got -1",
        lambda: memory(seqlen=-1),
    ),
    "pages for less than nothing": (
        "seqlen must be a whole number of at least 0, got -1",
        lambda: PagedCache(PagePool(9, 2, 2, 4), 2, 4).reserve(-1),
    ),
    "half a token": ("length must be an int", lambda: static().crop(1.5)),  # type: ignore[arg-type]
    "rows of another number": ("rows must be integers", lambda: static().reorder(torch.tensor([0]))),
    "a table of other numbers": ("block_table must be an int32 tensor", lambda: Pages(torch.zeros(2, 2), 4)),
    "pages of nothing": ("page_size must be a whole number", lambda: Pages(torch.zeros(2, 2, dtype=torch.int32), 0)),
    "pages of other rows": ("block_table must have shape .batch, pages. = .1, seqlen_k", lambda: paged([[0], [1]])),
    "pages of another size": ("k and v must be pools .pages, page_size=5, ", lambda: paged([[0]], page_size=5)),
    "two tables of pages": (
        "a mask must hold at most one table of pages",
        lambda: paged([[0]], Pages(torch.zeros(1, 1, dtype=torch.int32), 4)),
    ),
    "two rules of places": (
        "a mask must hold at most one rule of where tokens stand",
        lambda: Positions(torch.zeros(1, 2, dtype=torch.int64)) & Documents(torch.tensor([0, 2])),
    ),
}


@pytest.mark.parametrize("cross", (False, True))
def test_nested_tensors_beside_a_cache_are_refused_by_name(cross: bool) -> None:
    x = torch.nested.nested_tensor([torch.randn(2, 8), torch.randn(3, 8)])
    query, cache = (torch.randn(2, 1, 8), memory()) if cross else (x, static())
    with torch.no_grad(), pytest.raises(Exception, match="NestedTensor") as raised:
        FlashMultiHeadAttention(8, 2, batch_first=True, need_weights=False)(query, x, x, cache=cache)
    assert "Internal error" not in str(raised.value)
    assert cross or "key_padding_mask" in str(raised.value)


SEEN: dict[str, tuple[str, Callable[[], Any]]] = {
    "too many tokens": ("max_seqlen must be at least 6", lambda: call(plain_layer(), static(), torch.cat([X, X], 1))),
    "guesses that are not there": (
        "chosen must be places of the .0, 0. tokens",
        lambda: static().keep(0, torch.tensor([[0], [0]])),
    ),
    "guesses out of order": (
        "chosen must be places of the .3, 3. tokens, in order, and -1 behind them, got ..1, 0., .0, -1..",
        lambda: of_three().keep(0, torch.tensor([[1, 0], [0, -1]])),
    ),
    "guesses behind none": (
        "chosen must be places of the .3, 3. tokens, in order, and -1 behind them, got ..-1, 0., .0, 1..",
        lambda: of_three().keep(0, torch.tensor([[-1, 0], [0, 1]])),
    ),
    "pages beyond the pool": ("block_table must name pages between 0 and 2, got", lambda: paged([[0, 3]])),
    "a page before the pool": ("block_table must name pages between 0 and 2, got", lambda: paged([[-1, 0]])),
    "rows that are not there": ("rows must lie between 0 and 1", lambda: static().reorder(torch.tensor([0, 2]))),
    "rows of a memory that are not there": (
        "rows must lie between 0 and 1",
        lambda: memory().reorder(torch.tensor([0, -1])),
    ),
}


@pytest.mark.cpu("elsewhere an error of the device, which is not waited for")
@pytest.mark.parametrize("name", sorted(SEEN))
def test_what_is_seen_without_waiting_is_an_error_that_says_so(name: str) -> None:
    said, make = SEEN[name]
    with pytest.raises(ValueError, match=said):
        make()


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_a_cache_cannot_serve_is_an_error_that_says_so(name: str) -> None:
    said, make = REFUSED[name]
    with pytest.raises((TypeError, ValueError), match=said):
        make()


@given(batches=st.lists(st.integers(1, 3), min_size=1, max_size=3), rows=st.sets(st.integers(-1, 3), max_size=3))
def test_rows_are_released_in_every_cache_or_in_none(batches: list[int], rows: set[int]) -> None:
    caches = flashmha.KVCache({str(place): StaticCache(batch, 5, 2, 4) for place, batch in enumerate(batches)})
    for cache in caches.caches():
        cache.update(*torch.ones(2, cache.batch, 1, 2, 4))
    there = all(0 <= row < min(batches) for row in rows)
    with contextlib.nullcontext() if there else pytest.raises(ValueError, match="rows must be numbers between 0 and"):
        caches.release(rows)
    for cache, batch in zip(caches.growing(), batches):
        assert cache.lengths.tolist() == [int(not (there and row in rows)) for row in range(batch)]


@given(problem=drawn(), inside=st.booleans())
def test_a_cache_goes_in_and_out_of_inference_mode(problem: Drawn, inside: bool) -> None:
    layer, x = problem.build(), problem.tokens()
    with torch.inference_mode(inside):
        cache = problem.cache(layer)
    made = []
    for number, at in enumerate(problem.pieces):
        with torch.inference_mode() if number % 2 else torch.no_grad():
            made.append(whole(layer, x[:, at], cache=cache).clone())
    with torch.inference_mode():
        assert_same(torch.cat(made, dim=1), whole(layer, x))


@given(drawn())
def test_gradients_are_refused_with_a_reason(problem: Drawn) -> None:
    layer, x = problem.build(), problem.tokens()
    cache = problem.cache(layer)
    with torch.enable_grad(), pytest.raises(ValueError, match="cache must be used where no gradient is wanted"):
        whole(layer, x, cache=cache)
    with torch.enable_grad(), torch.inference_mode():
        whole(layer, x, cache=cache)


@pytest.mark.cpu("elsewhere a full cache is an error of the device, which is not waited for")
@given(problem=drawn(), how=st.sampled_from(("backend", "full", "mask")))
def test_a_call_that_fails_leaves_the_cache_as_it_was(problem: Drawn, how: str) -> None:
    layer, x = problem.build(), problem.tokens()
    cache, last = problem.cache(layer), problem.pieces[-1]
    out = [whole(layer, x[:, at], cache=cache) for at in problem.pieces[:-1]]
    held = cache.get_seq_length().tolist()
    wrong = x.repeat(1, 20, 1) if how == "full" else x[:, last]
    more = {"backend": {"backend": "flash2"}, "mask": {"attn_mask": Dense(torch.ones(1, 7, dtype=torch.bool))}}
    with pytest.raises((NoBackendError, ValueError)):
        whole(layer, wrong, cache=cache, **more.get(how, {}))
    assert cache.get_seq_length().tolist() == held
    out.append(whole(layer, x[:, last], cache=cache))
    assert_same(torch.cat(out, dim=1), whole(layer, x))


@given(drawn())
def test_explaining_a_call_changes_no_cache(problem: Drawn) -> None:
    layer, x = problem.build(), problem.tokens()
    cache, last = problem.cache(layer), problem.pieces[-1]
    out = [whole(layer, x[:, at], cache=cache) for at in problem.pieces[:-1]]
    said = flashmha.explain(layer, x[:, last], x[:, last], x[:, last], cache=cache)
    with flashmha.record() as calls:
        out.append(whole(layer, x[:, last], cache=cache))
    assert [one.backend for one in calls] == [said.chosen]
    assert_same(torch.cat(out, dim=1), whole(layer, x))


@given(drawn())
def test_explaining_says_why_padding_stays(problem: Drawn) -> None:
    layer, x = problem.build(), problem.tokens()[:, problem.pieces[0]]
    layer.skip_padding = True
    hidden = torch.zeros(x.shape[:2], dtype=torch.bool)
    said = flashmha.explain(layer, x, x, x, key_padding_mask=hidden, cache=problem.cache(layer))
    assert "skip_padding: every row is computed (a cache, which holds no padding)" in said.notes


@given(drawn(kinds=("static", "ring")))
def test_bytes_are_those_of_the_tensors(problem: Drawn) -> None:
    layer = problem.build()
    cache: Cache = problem.cache(layer)
    tensors = [x for x in vars(cache).values() if isinstance(x, Tensor)]
    assert cache.nbytes == sum(x.nbytes for x in tensors)


# The rule beneath


@given(seed=seeds(), batch=st.integers(1, 3), seqlen_q=st.integers(1, 3), seqlen_k=st.integers(1, 6), data=st.data())
def test_positions_say_what_alignment_says_and_more(
    seed: int, batch: int, seqlen_q: int, seqlen_k: int, data: st.DataObject
) -> None:
    """Keys in any order, each where it says, are the keys in order."""
    q, k, v = (noise(seed + i, batch, n, 2, 4) for i, n in enumerate((seqlen_q, seqlen_k, seqlen_k)))
    mask = data.draw(st.sampled_from((causal(), Window(1, 1), Window(2, None) & Rule(nearby))))
    bias = data.draw(st.sampled_from((None, flashmha.ALiBi(torch.ones(2)), TensorBias(noise(seed, seqlen_q, 1)))))
    order = torch.stack([torch.randperm(seqlen_k) for _ in range(batch)])
    queries = (torch.arange(seqlen_q) + seqlen_k - seqlen_q).expand(batch, -1)
    index = order[:, :, None, None].expand(-1, -1, 2, 4)
    made = attention(q, k.gather(1, index), v.gather(1, index), mask=Positions(queries, order) & mask, bias=bias)
    assert_same(made, attention(q, k, v, mask=mask, bias=bias))

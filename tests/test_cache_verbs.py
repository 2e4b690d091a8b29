"""Every verb of a cache in any order: rows go on as lists of tokens do."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor, nn

from flashmha import AlibiBias, FlashMultiHeadAttention, KVCache, PagedCache, PagePool, Rotary
from flashmha.testing import assert_same, noise, randomized

WIDTH, LONGEST, CHUNK, MOST = 8, 16, 3, 3
"""``LONGEST`` is a row's room, ``CHUNK`` the most tokens of a call, ``MOST`` the most rows."""

KINDS: dict[str, Callable[[nn.Module, int], KVCache]] = {
    "static": lambda model, batch: KVCache.of(model, batch, LONGEST),
    "paged": lambda model, batch: KVCache.of(model, batch, LONGEST, page_size=3),
    "ring": lambda model, batch: KVCache.of(model, batch, LONGEST, chunk=CHUNK),
    "ring and pages": lambda model, batch: KVCache.of(model, batch, LONGEST, chunk=CHUNK, page_size=2),
    "one pool": lambda model, batch: share_pool(batch, 2 * MOST * LONGEST),
    "a small pool": lambda model, batch: share_pool(batch, 5 * batch),
}


def share_pool(batch: int, pages: int) -> KVCache:
    pool = PagePool(pages, 2, 2, 4, dtype=torch.float64)
    return KVCache({name: PagedCache(pool, batch, LONGEST) for name in ("one", "two")})


class Model(nn.Module):
    """Two layers that hide the future; the second sees three tokens back, or turns its heads."""

    def __init__(self, turns: bool, seed: int) -> None:
        super().__init__()
        told: dict[str, Any] = {"batch_first": True, "causal": True, "dtype": torch.float64, "need_weights": False}
        near: dict[str, Any] = {"window": (3, 0), "position_bias": AlibiBias(2)}
        self.one = randomized(FlashMultiHeadAttention(WIDTH, 2, **told), seed)
        self.two = randomized(FlashMultiHeadAttention(WIDTH, 2, **told, **({} if turns else near)), seed + 1)
        if turns:
            self.one.rotary = self.two.rotary = Rotary(4)
        self.eval()

    def forward(self, x: Tensor, cache: KVCache | None = None, **more: Any) -> Tensor:
        for name in ("one", "two"):
            x = x + getattr(self, name)(x, x, x, cache=None if cache is None else cache[name], **more)[0]
        return x


class Verbs(RuleBasedStateMachine):
    """A cache beside plain lists of tokens, which are read again from their start for every answer."""

    @initialize(
        kind=st.sampled_from(sorted(KINDS)),
        batch=st.integers(1, MOST),
        turns=st.booleans(),
        seed=st.integers(0, 99),
        begun=st.lists(st.booleans(), min_size=MOST * LONGEST // 2, max_size=MOST * LONGEST // 2),
    )
    def start(self, kind: str, batch: int, turns: bool, seed: int, begun: list[bool]) -> None:
        self.scarce, self.rings = kind == "a small pool", "ring" in kind
        self.batch, self.turns, self.seed = batch, turns and not self.rings, seed  # a ring is for a window
        self.model = Model(self.turns, seed)
        self.cache = KINDS[kind](self.model, batch)
        self.rows: list[list[Tensor]] = [[] for _ in range(batch)]
        for place in range(0, len(begun), MOST):
            self.write([begun[place : place + MOST]])

    @property
    def free(self) -> list[int]:
        """Pages to hand out, by pool."""
        return [len(one.pool.free) for one in self.cache.paged()]

    @property
    def lengths(self) -> list[int]:
        return [len(row) for row in self.rows]

    def tokens(self, seqlen: int) -> Tensor:
        self.seed += 1
        return noise(self.seed, self.batch, seqlen, WIDTH)

    def call(self, x: Tensor, **more: Any) -> Tensor | None:
        """The model's answer; ``None`` where it was refused for want of room, which has to be so."""
        before, free = self.cache.state(), self.free
        try:
            if x.is_cuda:  # where a step sees no lengths
                self.cache.reserve(x.shape[1])
            with torch.no_grad():
                return self.model(x, self.cache, **more)
        except ValueError as error:
            full = max(self.lengths) + x.shape[1] > LONGEST
            assert "pages must be free" in str(error) if self.scarce and not full else full, error
            self.cache.restore(before)
            assert self.free == free
            return None

    def assert_answers(self, out: Tensor, row: int, at: list[int]) -> None:
        """What the model said of a row's last tokens is what it says of the row alone."""
        if at:
            with torch.no_grad():
                alone = self.model(torch.stack(self.rows[row])[None])[0]
            assert_same(out[row, at], alone[len(self.rows[row]) - len(at) :])

    @rule(hidden=st.lists(st.lists(st.booleans(), min_size=MOST, max_size=MOST), min_size=1, max_size=CHUNK))
    def write(self, hidden: list[list[bool]]) -> None:
        x, padding = self.tokens(len(hidden)), torch.tensor(hidden)[:, : self.batch].t()
        out = self.call(x, **({"key_padding_mask": padding} if bool(padding.any()) else {}))
        if out is not None:
            for row in range(self.batch):
                real = [place for place, one in enumerate(hidden) if not one[row]]
                self.rows[row] += [x[row, place] for place in real]
                self.assert_answers(out, row, real)

    @precondition(lambda self: self.turns)
    @rule(
        guesses=st.integers(1, CHUNK),
        chosen=st.lists(st.integers(-1, CHUNK - 1), min_size=MOST, max_size=MOST),
        done=st.sets(st.integers(0, MOST - 1)),
    )
    def guess(self, guesses: int, chosen: list[int], done: set[int]) -> None:
        """Guesses of one next token, of which each row that is not done keeps one or none."""
        start, x = torch.tensor(self.lengths), self.tokens(guesses)
        padding = torch.tensor([row in done for row in range(self.batch)])[:, None].expand(-1, guesses)
        out = self.call(
            x,
            attn_mask=~torch.eye(guesses, dtype=torch.bool),
            key_padding_mask=padding,
            positions=start[:, None].expand(-1, guesses),
        )
        if out is None:
            return
        kept = [-1 if row in done else min(chosen[row], guesses - 1) for row in range(self.batch)]
        self.cache.keep(start, torch.tensor(kept)[:, None])
        for row, place in enumerate(kept):
            if place >= 0:
                self.rows[row].append(x[row, place])
                self.assert_answers(out, row, [place])

    @precondition(lambda self: not (self.rings and torch.empty(0).is_cuda))  # a refusal there is an error of the device
    @rule(
        back=st.lists(st.integers(1, CHUNK), min_size=MOST, max_size=MOST), how=st.sampled_from(("all", "back", "to"))
    )
    def crop(self, back: list[int], how: str) -> None:
        """A ring may have lost what stood there, and then nothing is cropped at all."""
        back = [back[0]] * self.batch if how == "all" else back[: self.batch]
        left = [max(0, held - less) for held, less in zip(self.lengths, back)]
        told = {"all": -back[0], "back": torch.tensor(back).neg(), "to": torch.tensor(left)}
        try:
            self.cache.crop(told[how])
        except ValueError as error:
            assert "of a RingCache" in str(error)
            return
        self.rows = [row[:held] for row, held in zip(self.rows, left)]

    @rule(data=st.data())
    def reorder(self, data: st.DataObject) -> None:
        order, free = [data.draw(st.integers(0, self.batch - 1)) for _ in range(self.batch)], self.free
        try:
            self.cache.reorder(torch.tensor(order))
        except ValueError as error:
            assert self.scarce and "pages must be free" in str(error) and self.free == free
            return
        self.rows = [list(self.rows[row]) for row in order]

    @rule(done=st.sets(st.integers(0, MOST - 1), max_size=2), told=st.sampled_from((list, iter, torch.tensor)))
    def release(self, done: set[int], told: Callable[[list[int]], Any]) -> None:
        rows = [row for row in done if row < self.batch]
        self.cache.release(told(rows))
        for row in rows:
            self.rows[row] = []

    @rule(tokens=st.integers(0, LONGEST))
    def reserve(self, tokens: int) -> None:
        """Room that was made sure of is there: pages are booked for as many tokens."""
        try:
            self.cache.reserve(tokens)
        except ValueError as error:
            full = max(self.lengths) + tokens > LONGEST
            assert "pages must be free" in str(error) if self.scarce and not full else full, error
            return
        for one in self.cache.paged():
            for length, pages in zip(self.lengths, one.booked):
                assert length + tokens <= min(LONGEST, len(pages) * one.pool.page_size) or not tokens

    @rule(verb=st.sampled_from(("reset", "trim", "keep", "copy", "pickle")))
    def other(self, verb: str) -> None:
        if verb == "copy":
            self.cache = copy.deepcopy(self.cache)
        elif verb == "pickle":
            self.cache = pickle.loads(pickle.dumps(self.cache))
        elif verb == "keep":  # of no guesses none, also where a row has no memory
            self.cache.keep(torch.tensor(self.lengths), torch.full((self.batch, 2), -1))
        else:
            getattr(self.cache, verb)()
        if verb == "reset":
            self.rows = [[] for _ in self.rows]

    @invariant()
    def every_layer_holds_the_rows(self) -> None:
        if hasattr(self, "cache"):
            assert all(one.get_seq_length().tolist() == self.lengths for one in self.cache.caches())
            for pool in {id(one.pool): one.pool for one in self.cache.paged()}.values():
                booked = [page for one in self.cache.paged() if one.pool is pool for row in one.booked for page in row]
                assert sorted(booked + pool.free) == list(range(pool.pages))

    @invariant()
    def a_copy_goes_on_as_the_rows_would(self) -> None:
        if hasattr(self, "cache"):
            held, rows = self.cache, self.rows
            self.cache, self.rows = copy.deepcopy(held), [list(row) for row in rows]
            self.write([[False] * MOST])
            self.cache, self.rows = held, rows


TestVerbs = Verbs.TestCase
TestVerbs.settings = settings(stateful_step_count=20, suppress_health_check=list(HealthCheck))

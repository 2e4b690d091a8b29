"""Tables of blocks: what they list, by a definition in PyTorch, and the kernel that makes them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flashmha.backends.rewrites import block_tables
from flashmha.backends.rewrites.block_tables import EDGE, BlockTables

POISON = 1_000_000
"""What lies behind a count, and is never to be read."""
Tile = tuple[int, int]


def seen(first: Tensor, last: Tensor, seqlen_q: int) -> Tensor:
    """Which key a query sees, (batch, seqlen_q, seqlen_k)."""
    rows = torch.arange(seqlen_q, device=first.device)[:, None]
    return (rows >= first[:, None]) & (rows <= last[:, None])


def defined(allowed: Tensor, tile: Tile, *, by_keys: bool) -> BlockTables:
    """The tables of a mask (batch, seqlen_q, seqlen_k) by their definition, tile by tile."""
    if by_keys:
        allowed, tile = allowed.mT, (tile[1], tile[0])
    blocks = [[part.split(tile[1], dim=1) for part in item.split(tile[0])] for item in allowed]
    shape = (len(blocks), 1, len(blocks[0]), len(blocks[0][0]))
    like = {"dtype": torch.int32, "device": allowed.device}
    made = BlockTables(*(torch.full(shape[:length], POISON, **like) for length in (3, 4, 3, 4)))
    for item, rows in enumerate(blocks):
        for row, tiles in enumerate(rows):
            full = [column for column, tile in enumerate(tiles) if tile.all()]
            some = [column for column, tile in enumerate(tiles) if tile.any() and not tile.all()]
            for at, found in ((0, some if some or full else [0]), (2, full)):
                made[at][item, 0, row] = len(found)
                made[at + 1][item, 0, row, : len(found)] = torch.tensor(found, **like)
    return made


def states(tables: BlockTables, *, by_keys: bool) -> Tensor:
    """The state of each tile (batch, blocks of queries, blocks of keys): 0 is listed nowhere, 1 partial, 2 full."""
    batch, _, rows, columns = tables.mask_block_idx.shape
    found = torch.zeros(batch, rows, columns, dtype=torch.int64, device=tables[0].device)
    for state, counts, blocks in ((1, *tables[:2]), (2, *tables[2:4])):
        assert counts.shape == (batch, 1, rows) and blocks.shape == (batch, 1, rows, columns)
        assert counts.dtype == blocks.dtype == torch.int32
        for item in range(batch):
            for row in range(rows):
                listed = blocks[item, 0, row, : counts[item, 0, row]].tolist()
                assert listed == sorted(set(listed)), "a list ascends"
                for column in listed:
                    assert found[item, row, column] == 0, "a tile is listed once"
                    found[item, row, column] = state
    return found.mT if by_keys else found


def spread(found: Tensor, tile: Tile, seqlen_q: int, seqlen_k: int) -> Tensor:
    """The state of each pair's tile (batch, seqlen_q, seqlen_k)."""
    return found.repeat_interleave(tile[0], 1).repeat_interleave(tile[1], 2)[:, :seqlen_q, :seqlen_k]


Problem = tuple[Tensor, Tensor, int, Tile]


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Intervals of any kind: windows with padding, and some without order."""
    batch, seqlen_q, seqlen_k = draw(st.integers(1, 3)), draw(st.integers(1, 70)), draw(st.integers(1, 70))
    tile = (draw(st.sampled_from((1, 2, 4, 7, 16))), draw(st.sampled_from((1, 3, 4, 8, 20))))
    numbers = {"generator": torch.Generator("cpu").manual_seed(draw(st.integers(0, 2**31))), "device": "cpu"}
    places = torch.arange(seqlen_k, device="cpu")
    meets = places - (seqlen_k - seqlen_q)
    left, right = (draw(st.sampled_from((0, 3, 20, 100))) for _ in range(2))
    first, last = (meets - right).expand(batch, -1).int(), (meets + left).expand(batch, -1).int()
    if draw(st.booleans()):
        moved = torch.randint(-5, 6, (2, batch, seqlen_k), dtype=torch.int32, **numbers)
        first, last = torch.minimum(first + moved[0], last + moved[1]), torch.maximum(first + moved[0], last + moved[1])
    kept = draw(st.sampled_from((0.0, 0.5, 0.95, 1.0)))
    hidden = torch.rand(batch, seqlen_k, **numbers) >= kept
    if draw(st.booleans()):
        hidden |= places >= torch.randint(0, seqlen_k + 1, (batch, 1), **numbers)
    return first.masked_fill(hidden, seqlen_q), last.masked_fill(hidden, -1), seqlen_q, tile


@pytest.mark.cpu("judges a definition")
@given(problem=problems(), by_keys=st.booleans())
def test_every_pair_is_looked_at_once_and_none_too_many(problem: Problem, by_keys: bool) -> None:
    first, last, seqlen_q, tile = problem
    allowed = seen(first, last, seqlen_q)
    tables = defined(allowed, tile, by_keys=by_keys)
    state = spread(states(tables, by_keys=by_keys), tile, seqlen_q, first.shape[1])
    assert state[allowed].all(), "what a query sees is listed"
    assert allowed[state == 2].all(), "a full tile hides nothing"
    assert (tables.mask_block_cnt + tables.full_block_cnt).min() > 0, "no row is without work"


@given(problem=problems(), by_keys=st.booleans(), apart=st.booleans())
def test_the_kernel_lists_what_the_definition_lists(
    machine: torch.device, problem: Problem, by_keys: bool, apart: bool
) -> None:
    first, last, seqlen_q, tile = problem
    wanted = defined(seen(first, last, seqlen_q), tile, by_keys=by_keys)
    if apart:  # in another order of memory
        first = first.mT.contiguous().mT
    first, last = first.to(machine), last.to(machine)
    found = block_tables.block_tables(first, last, seqlen_q, tile, by_keys=by_keys)
    assert_lists(BlockTables(*(table.cpu() for table in found)), wanted, by_keys)


def assert_lists(found: BlockTables, wanted: BlockTables, by_keys: bool) -> None:
    """The same counts, and in them the same tiles."""
    assert torch.equal(found.mask_block_cnt, wanted.mask_block_cnt)
    assert torch.equal(found.full_block_cnt, wanted.full_block_cnt)
    assert torch.equal(states(found, by_keys=by_keys), states(wanted, by_keys=by_keys))


@pytest.mark.cpu("judges a definition")
@given(problem=problems(), broadcast=st.sampled_from((None, 2, 3)))
def test_a_mask_has_room_behind_its_edges(problem: Problem, broadcast: int | None) -> None:
    first, last, seqlen_q, _ = problem
    allowed = seen(first, last, seqlen_q)[:, None]
    sizes = (seqlen_q, allowed.shape[3])
    allowed = allowed if broadcast is None else allowed.narrow(broadcast, 0, 1)
    table, whole = block_tables.edged(allowed, *sizes), allowed[:, 0].expand(-1, *sizes)
    assert torch.equal(table[:, : sizes[0], : sizes[1]].bool(), whole)
    assert table.sum() == whole.sum() and min(table.shape[1] - sizes[0], table.shape[2] - sizes[1]) >= EDGE


@given(problem=problems(), by_keys=st.booleans(), shared=st.booleans())
def test_the_kernels_for_a_mask_list_what_the_definition_lists(
    machine: torch.device, problem: Problem, by_keys: bool, shared: bool
) -> None:
    first, last, seqlen_q, tile = problem
    allowed = seen(first, last, seqlen_q)
    items = torch.arange(len(allowed), dtype=torch.int32, device="cpu").flip(0)
    if shared:
        allowed, items = allowed[:1], torch.zeros_like(items)
    table = block_tables.edged(allowed[:, None].to(machine), *allowed.shape[1:])
    found = block_tables.mask_tables(table, items.to(machine), *allowed.shape[1:], tile, by_keys=by_keys)
    wanted = defined(allowed[items.long()], tile, by_keys=by_keys)
    assert_lists(BlockTables(*(each.cpu() for each in found)), wanted, by_keys)

"""Masks as flash-attn 4 takes them: compiled into a kernel, and as the blocks that a kernel looks at.

Imported where one is needed, with the package.
"""

import functools
from typing import Any

import cutlass
import cutlass.cute as cute
from flash_attn.cute import interface, utils
from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch
from torch import Tensor

from ..rewrites.block_tables import block_tables, mask_tables


@cute.jit  # type: ignore[untyped-decorator]
def is_in_interval(batch, head, q_idx, kv_idx, seqlen_info, aux_tensors):  # type: ignore[no-untyped-def]
    """The query lies between the first and the last that may look at the key; see ``compact.Intervals``."""
    first = utils.scalar_to_ssa(aux_tensors[0][batch[0], kv_idx[0]], cutlass.Int32)
    last = utils.scalar_to_ssa(aux_tensors[1][batch[0], kv_idx[0]], cutlass.Int32)
    return (q_idx >= first) & (q_idx <= last)


@cute.jit  # type: ignore[untyped-decorator]
def is_in_table(batch, head, q_idx, kv_idx, seqlen_info, aux_tensors):  # type: ignore[no-untyped-def]
    """The item's table is not 0 there; see ``block_tables.edged``."""
    item = aux_tensors[1][batch[0]]
    value = cutlass.Int32(aux_tensors[0][item, q_idx[0], kv_idx[0]])
    return utils.scalar_to_ssa(value, cutlass.Int32) > 0


def blocks(told: dict[str, Any], q: Tensor, k: Tensor, *, backward: bool) -> Any:
    """The blocks that a direction looks at on Hopper; ``None`` where it cannot be told any."""
    size = tile(q.shape[-1], backward)
    if size is None:
        return None
    if told["table"] is None:
        tables = block_tables(told["first"], told["last"], q.shape[1], size, by_keys=backward)
    else:
        tables = mask_tables(told["table"], told["items"], q.shape[1], k.shape[1], size, by_keys=backward)
    return BlockSparseTensorsTorch(*tables, block_size=size)


@functools.cache
def tile(head_dim: int, backward: bool) -> tuple[int, int] | None:
    """Queries and keys of a tile as the package itself cuts them, so that a block is one tile."""
    if not backward:
        config = interface._tile_size_fwd_sm90(head_dim, head_dim, False, False)
    elif 192 < head_dim < 256:
        # compiles with the tile that it takes without blocks alone, see the comment in _tile_size_bwd_sm90
        return None
    else:
        config = interface._tile_size_bwd_sm90(head_dim, head_dim, False, False, sparse_block_size_q=64)
    return config.m_block_size, config.n_block_size

"""Grouped heads folded into query rows: the same problem without groups, for few queries.

A group of query heads looks at one key head, so its heads may as well be rows of it. A kernel works on tiles of 64 or
128 rows of one head: with few queries the group fills a tile that would stand empty, and keys are read once a group.
"""

from __future__ import annotations

from torch import Tensor

from ...host.torch_state import surely
from ...problem.spec import AttentionSpec

MOST_FOLDED_QUERIES = 8
"""Queries up to which a group is folded: eight heads a group make 64 rows of them, a tile of the smallest kernel.
Above, one head fills tiles by itself, and the mask of the folded rows grows where causality alone would need none."""


def folds(spec: AttentionSpec) -> bool:
    """Folding gives the answer of the problem itself, and is worth it.

    Not beside dropout, which would drop other places than without, nor in an exported graph, which serves every length.
    """
    if spec.heads == spec.heads_kv or spec.dropout_p > 0.0 or spec.aten_only:
        return False
    return surely(spec.seqlen_q > 0) and surely(spec.seqlen_q <= MOST_FOLDED_QUERIES)


def fold(q: Tensor, groups: int) -> Tensor:
    """(batch, seqlen_q, heads, head_dim) as (batch, seqlen_q * groups, heads // groups, head_dim).

    The heads of one key head, which are neighbours, become the neighbouring rows of one query.
    """
    batch, seqlen_q, heads, head_dim = q.shape
    rows = q.reshape(batch, seqlen_q, heads // groups, groups, head_dim).transpose(2, 3)
    return rows.reshape(batch, seqlen_q * groups, heads // groups, head_dim)


def unfold(out: Tensor, groups: int) -> Tensor:
    """``fold`` undone."""
    batch, rows, heads_kv, head_dim = out.shape
    heads = out.reshape(batch, rows // groups, groups, heads_kv, head_dim).transpose(2, 3)
    return heads.reshape(batch, rows // groups, heads_kv * groups, head_dim)


def unfold_lse(lse: Tensor, groups: int) -> Tensor:
    """The log-sum-exp of folded rows (batch, heads_kv, seqlen_q * groups) as (batch, heads, seqlen_q)."""
    batch, heads_kv, rows = lse.shape
    heads = lse.reshape(batch, heads_kv, rows // groups, groups).transpose(2, 3)
    return heads.reshape(batch, heads_kv * groups, rows // groups)


def fold_table(table: Tensor, groups: int, seqlen_q: int) -> Tensor:
    """A mask or bias that broadcasts to (batch, heads, seqlen_q, seqlen_k), for the folded rows.

    One that is the same for all heads and queries stays as small as it is.
    """
    batch, heads, _, seqlen_k = table.shape
    if heads == 1:
        return table if table.shape[2] == 1 else table.repeat_interleave(groups, dim=2)
    table = table.expand(batch, heads, seqlen_q, seqlen_k)
    rows = table.reshape(batch, heads // groups, groups, seqlen_q, seqlen_k).transpose(2, 3)
    return rows.reshape(batch, heads // groups, seqlen_q * groups, seqlen_k)

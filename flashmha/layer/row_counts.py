"""How many rows of a projection are those of queries, of keys and of values, found in a state dict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from ..problem.sizes import check_sizes

SEPARATE = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
"""PyTorch's names, beside which the bias stays ``in_proj_bias``."""


class HeadCounts(NamedTuple):
    """The heads of the layers of a state dict, as far as a caller says; without ``num_heads`` nothing is said."""

    num_heads: int | None = None
    num_kv_heads: int = 0
    value_head_dim: int | None = None

    @classmethod
    def of(cls, num_heads: int | None, num_kv_heads: int | None, value_head_dim: int | None) -> HeadCounts:
        """The same, checked; as many heads of keys and values as of queries by default."""
        if num_heads is None:
            for name, number in (("num_kv_heads", num_kv_heads), ("value_head_dim", value_head_dim)):
                if number is not None:
                    raise ValueError(f"num_heads must be given beside {name}={number!r}, got None.")
            return cls()
        heads_kv = num_heads if num_kv_heads is None else num_kv_heads
        check_groups(num_heads, heads_kv)
        if value_head_dim is not None:
            check_sizes(value_head_dim=value_head_dim)
        return cls(num_heads, heads_kv, value_head_dim)

    def __str__(self) -> str:
        values = "" if self.value_head_dim is None else f" with value_head_dim={self.value_head_dim}"
        return f"{self.num_heads} heads of queries and {self.num_kv_heads} of keys and values{values}"


HINT = "pass num_heads and num_kv_heads of the layer that it is of, and value_head_dim where that has one"


def count_rows(
    prefix: str, state_dict: Mapping[str, Tensor], heads: HeadCounts, names: Sequence[str] | None = None
) -> list[int]:
    """Rows of queries, keys and values in the layer of a prefix; raise where they are not those of its heads.

    They may stand under these ``names``, apart under PyTorch's, or fused.
    """
    out = state_dict.get(f"{prefix}out_proj.weight")  # (embed_dim, features of all heads)
    out = out if isinstance(out, Tensor) and out.dim() == 2 else None
    for parts in (name_parts("weight", names), SEPARATE):
        keys = [prefix + part for part in parts]
        if any(key in state_dict for key in keys):
            rows = [part.shape[0] for part in require_parts(keys, state_dict)]
            if heads.num_heads is not None and not fits(rows, heads, out):
                raise ValueError(f"{', '.join(keys)} must have rows of {heads}, got {rows}{say_width(out)}: {HINT}.")
            return rows
    key = prefix + ("in_proj_weight" if f"{prefix}in_proj_weight" in state_dict else "in_proj_bias")
    total = state_dict[key].shape[0]
    if heads.num_heads is None:
        guessed = guess_rows(total, out)
        if guessed is None:
            raise ValueError(
                f"{key} must have rows that out_proj.weight tells apart, got {total} of them{say_width(out)}: {HINT}."
            )
        return guessed
    rows = divide_rows(total, heads)
    if not fits(rows, heads, out) or sum(rows) != total:
        raise ValueError(f"{key} must have rows of {heads}, got {total} of them{say_width(out)}: {HINT}.")
    return rows


def divide_rows(total: int, heads: HeadCounts) -> list[int]:
    """The rows of such heads; their sum is another where there are no such ones."""
    assert heads.num_heads is not None
    if heads.value_head_dim is None:
        value_head_dim = head_dim = total // (heads.num_heads + 2 * heads.num_kv_heads)
    else:
        value_head_dim = heads.value_head_dim
        head_dim = (total - heads.num_kv_heads * value_head_dim) // (heads.num_heads + heads.num_kv_heads)
    return [heads.num_heads * head_dim, heads.num_kv_heads * head_dim, heads.num_kv_heads * value_head_dim]


def guess_rows(total: int, out: Tensor | None) -> list[int] | None:
    """The rows of heads of one size, given ``out_proj.weight``; ``None`` where that leaves them open.

    Where the heads together are as wide as the layer, or a third of the rows, these are the rows of queries.
    """
    if out is None:
        return None
    embed_dim, width = out.shape
    rest, odd = divmod(total - width, 2)
    if odd or rest < 1 or width % rest or (width != embed_dim and width != rest):
        return None
    return [width, rest, rest]


def fits(rows: Sequence[int], heads: HeadCounts, out: Tensor | None) -> bool:
    """Whether rows are those of such heads, and the output projection takes their values."""
    assert heads.num_heads is not None
    head_dim, rest = divmod(rows[0], heads.num_heads)
    head_dim_v, rest_v = divmod(rows[2], heads.num_kv_heads)
    return (
        not rest
        and not rest_v
        and min(head_dim, head_dim_v) > 0
        and rows[1] == heads.num_kv_heads * head_dim
        and heads.value_head_dim in (None, head_dim_v)
        and (out is None or out.shape[1] == heads.num_heads * head_dim_v)
    )


def say_width(out: Tensor | None) -> str:
    """What the output projection says of the heads, put into words."""
    return " and no out_proj.weight" if out is None else f" beside out_proj.weight of shape {tuple(out.shape)}"


def require_parts(keys: Sequence[str], state_dict: Mapping[str, Tensor]) -> list[Tensor]:
    """Three tensors that belong together; raise where one is missing."""
    missing = [key for key in keys if key not in state_dict]
    if not missing:
        return [state_dict[key] for key in keys]
    hint = ""
    if keys[0].endswith(".bias"):
        key = missing[0]
        weight = state_dict.get(key.removesuffix("bias") + "weight")
        rows = "rows" if weight is None else weight.shape[0]
        hint = f": a projection without a bias has one of zeros, state_dict[{key!r}] = torch.zeros({rows})"
    raise ValueError(f"state_dict must hold {', '.join(keys)} together, got no {', no '.join(missing)}{hint}.")


def name_parts(kind: str, names: Sequence[str] | None) -> tuple[str, ...]:
    """The names of the three parts of a weight or bias."""
    return SEPARATE if names is None else tuple(f"{name}.{kind.removeprefix('in_proj_')}" for name in names)


def find_name(key: str, names: Sequence[str]) -> str | None:
    """Which of these names a key of a state dict ends in, alone or behind a dot."""
    for name in names:
        if key == name or key.endswith(f".{name}"):
            return name
    return None


def check_groups(num_heads: int, num_kv_heads: int) -> int:
    """How many heads share one of keys and values; raise where that is no whole number."""
    check_sizes(num_heads=num_heads, num_kv_heads=num_kv_heads)
    if num_heads % num_kv_heads:
        raise ValueError(f"num_kv_heads must divide num_heads={num_heads}, got {num_kv_heads}.")
    return num_heads // num_kv_heads

"""State dicts with other projections: fused and separate ones, full and grouped heads.

Each function takes the state dict of a layer or of a whole model, finds the attention layers by the names of their
parameters, and returns a new dict in the same order; what it does not know stays, and the input is not changed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

State = dict[str, Tensor]
FUSED = ("in_proj_weight", "in_proj_bias")
SEPARATE = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
"""PyTorch's names, beside which the bias stays ``in_proj_bias``."""


def separate_projections(
    state_dict: Mapping[str, Tensor],
    num_heads: int = 1,
    num_kv_heads: int | None = None,
    value_head_dim: int | None = None,
    *,
    names: Sequence[str] | None = None,
) -> State:
    """The state dict with a projection each for queries, keys and values in place of every ``in_proj_weight``.

    Args:
        state_dict: of a layer or a model.
        num_heads, num_kv_heads: of the layers; needed where heads are grouped.
        value_head_dim: of the layers, where it is not their ``head_dim``.
        names: of three linear modules, such as ``("q_proj", "k_proj", "v_proj")``, which get ``.weight`` and ``.bias``.
            Default PyTorch's ``q_proj_weight``, ``k_proj_weight`` and ``v_proj_weight``, and ``in_proj_bias`` as it is.

    Raises:
        ValueError: rows that are not those of such heads.
    """
    names = check_names(names)
    made: State = {}
    for key, tensor in state_dict.items():
        kind = find_name(key, FUSED)
        if kind is None or (kind == "in_proj_bias" and names is None):
            made[key] = tensor
            continue
        prefix = key.removesuffix(kind)
        parts = split_rows(key, tensor, num_heads, num_kv_heads, value_head_dim)
        made.update(zip((prefix + name for name in name_parts(kind, names)), parts))
    return made


def fuse_projections(state_dict: Mapping[str, Tensor], *, names: Sequence[str] | None = None) -> State:
    """The state dict with an ``in_proj_weight`` in place of three projections: what ``separate_projections`` undoes.

    Raises:
        ValueError: one of the three is missing, or they take features of different sizes.
    """
    names = check_names(names)
    kinds = ("in_proj_weight",) if names is None else FUSED
    made: State = {}
    for key, tensor in state_dict.items():
        for kind in kinds:
            parts = name_parts(kind, names)
            name = find_name(key, parts)
            if name is not None:
                break
        else:
            made[key] = tensor
            continue
        prefix = key.removesuffix(name)
        if prefix + kind not in made:
            made[prefix + kind] = join_rows([prefix + part for part in parts], state_dict)
    return made


def group_heads(
    state_dict: Mapping[str, Tensor], num_heads: int, num_kv_heads: int, value_head_dim: int | None = None
) -> State:
    """The state dict of full heads for layers of ``num_kv_heads``: keys and values are the mean of each group's.

    Consecutive heads make a group. What follows needs some training. Source: Ainslie and others, "GQA: Training
    Generalized Multi-Query Transformer Models from Multi-Head Checkpoints" (2023).

    Raises:
        ValueError: heads that make no such groups, or rows that are not those of ``num_heads``.
    """
    groups = check_groups(num_heads, num_kv_heads)

    def group(rows: Tensor) -> Tensor:
        return torch.unflatten(rows, 0, (num_kv_heads, groups, -1)).mean(dim=1).flatten(0, 1)

    return with_kv(state_dict, group, num_heads, num_heads, value_head_dim)


def repeat_heads(
    state_dict: Mapping[str, Tensor], num_heads: int, num_kv_heads: int, value_head_dim: int | None = None
) -> State:
    """The state dict of ``num_kv_heads`` for layers of full heads, which give the same output.

    Raises:
        ValueError: heads that make no such groups, or rows that are not those of ``num_kv_heads``.
    """
    groups = check_groups(num_heads, num_kv_heads)

    def repeat(rows: Tensor) -> Tensor:
        return torch.unflatten(rows, 0, (num_kv_heads, -1)).repeat_interleave(groups, dim=0).flatten(0, 1)

    return with_kv(state_dict, repeat, num_heads, num_kv_heads, value_head_dim)


def with_kv(
    state_dict: Mapping[str, Tensor],
    change: Callable[[Tensor], Tensor],
    num_heads: int,
    num_kv_heads: int,
    value_head_dim: int | None,
) -> State:
    """The state dict with the rows of keys and values changed, wherever they stand."""
    made: State = {}
    for key, tensor in state_dict.items():
        if find_name(key, FUSED):
            q, k, v = split_rows(key, tensor, num_heads, num_kv_heads, value_head_dim)
            tensor = torch.cat([q, change(k), change(v)])
        elif find_name(key, SEPARATE[1:]):
            check_rows(key, tensor, tensor.shape[0], num_kv_heads)
            tensor = change(tensor)
        elif find_name(key, ("bias_k", "bias_v")):  # (1, 1, features)
            check_rows(key, tensor, tensor.shape[-1], num_kv_heads)
            tensor = change(tensor.flatten())[None, None]
        made[key] = tensor
    return made


def split_rows(
    key: str, tensor: Tensor, num_heads: int, num_kv_heads: int | None, value_head_dim: int | None
) -> list[Tensor]:
    """The rows of queries, keys and values in a fused projection, each a tensor of its own."""
    heads_kv = num_heads if num_kv_heads is None else num_kv_heads
    check_groups(num_heads, heads_kv)
    rows = tensor.shape[0]
    if value_head_dim is None:
        head_dim, rest = divmod(rows, num_heads + 2 * heads_kv)
        value_head_dim = head_dim
    else:
        head_dim, rest = divmod(rows - heads_kv * value_head_dim, num_heads + heads_kv)
    if rest or head_dim < 1:
        raise ValueError(
            f"{key} must have rows of {num_heads} heads of queries and {heads_kv} of keys and values"
            f"{'' if value_head_dim == head_dim else f' with value_head_dim={value_head_dim}'}, "
            f"got shape {tuple(tensor.shape)}."
        )
    sizes = [num_heads * head_dim, heads_kv * head_dim, heads_kv * value_head_dim]
    return [part.clone() for part in tensor.split(sizes)]


def join_rows(keys: list[str], state_dict: Mapping[str, Tensor]) -> Tensor:
    """Three projections as one."""
    missing = [key for key in keys if key not in state_dict]
    if missing:
        raise ValueError(f"state_dict must hold {', '.join(keys)} together, got no {', no '.join(missing)}.")
    parts = [state_dict[key] for key in keys]
    if len({part.shape[1:] for part in parts}) > 1:
        shapes = ", ".join(str(tuple(part.shape)) for part in parts)
        raise ValueError(f"{', '.join(keys)} must take features of one size to be one projection, got shapes {shapes}.")
    return torch.cat(parts)


def name_parts(kind: str, names: Sequence[str] | None) -> tuple[str, ...]:
    """The names of the three parts of a fused weight or bias."""
    return SEPARATE if names is None else tuple(f"{name}.{kind.removeprefix('in_proj_')}" for name in names)


def find_name(key: str, names: Sequence[str]) -> str | None:
    """Which of these names a key of a state dict ends in, alone or behind a dot."""
    for name in names:
        if key == name or key.endswith(f".{name}"):
            return name
    return None


def check_names(names: Sequence[str] | None) -> tuple[str, ...] | None:
    """Raise where these are not the names of three modules."""
    if names is None:
        return None
    if isinstance(names, str) or len(names) != 3 or not all(isinstance(name, str) for name in names):
        raise ValueError(f"names must be those of three modules, for queries, keys and values, got {names!r}.")
    return tuple(names)


def check_groups(num_heads: int, num_kv_heads: int) -> int:
    """How many heads share one of keys and values; raise where that is no whole number."""
    for name, number in (("num_heads", num_heads), ("num_kv_heads", num_kv_heads)):
        if type(number) is not int or number < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, got {number!r}.")
    if num_heads % num_kv_heads:
        raise ValueError(f"num_kv_heads must divide num_heads={num_heads}, got {num_kv_heads}.")
    return num_heads // num_kv_heads


def check_rows(key: str, tensor: Tensor, rows: int, heads: int) -> None:
    """Raise where rows are not those of so many heads."""
    if rows % heads:
        raise ValueError(f"{key} must have rows of {heads} heads, got shape {tuple(tensor.shape)}.")

"""State dicts with other projections: fused and separate ones, full and grouped heads.

Each function takes the state dict of a layer or of a whole model, finds the attention layers by the names of their
parameters, and returns a new dict in the same order; what it does not know stays, and the input is not changed. A layer
with ``kdim`` or ``vdim`` holds its projections apart beside one bias, in whichever form the others are.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..problem.wording import spell
from .projection import Sizes
from .row_counts import SEPARATE, HeadCounts, check_groups, count_rows, find_name, name_parts, require_parts

State = dict[str, Tensor]
FUSED = ("in_proj_weight", "in_proj_bias")
LEARNED = ("bias_k", "bias_v")
"""Of ``add_bias_kv``, (1, 1, features)."""
NAMES_HINT = ": names= says what three linear modules are called"


def separate_projections(
    state_dict: Mapping[str, Tensor],
    num_heads: int | None = None,
    num_kv_heads: int | None = None,
    value_head_dim: int | None = None,
    *,
    names: Sequence[str] | None = None,
) -> State:
    """The state dict with a projection each for queries, keys and values in place of every ``in_proj_weight``.

    Args:
        state_dict: of a layer or a model.
        num_heads, num_kv_heads: of the layers; ``num_kv_heads`` is ``num_heads`` by default. Without either, heads are
            taken to be of one size, and the width of ``out_proj.weight`` tells their rows.
        value_head_dim: of the layers, where it is not their ``head_dim``; then ``num_heads`` is needed, too.
        names: of three linear modules, such as ``("q_proj", "k_proj", "v_proj")``, which get ``.weight`` and ``.bias``.
            Default PyTorch's ``q_proj_weight``, ``k_proj_weight`` and ``v_proj_weight``, and ``in_proj_bias`` as it is.

    Raises:
        TypeError: no state dict.
        ValueError: rows that are not those of such heads, or that may be those of several; no projection to separate;
            a name that is taken.
    """
    heads, names = HeadCounts.of(num_heads, num_kv_heads, value_head_dim), check_names(names)
    check_state(state_dict, (*FUSED, *SEPARATE), hint="")
    made: State = {}
    for key, tensor in state_dict.items():
        kind = find_name(key, (*FUSED, *SEPARATE))
        if kind is None or (names is None and kind != "in_proj_weight"):
            made[key] = tensor
            continue
        prefix = key.removesuffix(kind)
        if kind in SEPARATE:
            count_rows(prefix, state_dict, heads)  # raises where these are the rows of other heads
            new = {prefix + name_parts("weight", names)[SEPARATE.index(kind)]: tensor.clone()}
        else:
            parts = split_rows(key, tensor, count_rows(prefix, state_dict, heads))
            new = {prefix + name: part.clone() for name, part in zip(name_parts(kind, names), parts)}
        add_new(made, new, state_dict)
    return made


def fuse_projections(state_dict: Mapping[str, Tensor], *, names: Sequence[str] | None = None) -> State:
    """The state dict with an ``in_proj_weight`` in place of three projections: what ``separate_projections`` undoes.

    Three that take features of different sizes get PyTorch's names for such a layer, ``q_proj_weight``,
    ``k_proj_weight`` and ``v_proj_weight``, beside one ``in_proj_bias``.

    Raises:
        TypeError: no state dict.
        ValueError: one of the three is missing, or there is none at all; a name that is taken.
    """
    names = check_names(names)
    weights, biases = name_parts("weight", names), () if names is None else name_parts("bias", names)
    check_state(state_dict, (*weights, *FUSED, *SEPARATE))
    made: State = {}
    for key, tensor in state_dict.items():
        name = find_name(key, (*weights, *biases))
        if name is None:
            made[key] = tensor
            continue
        prefix, parts = key.removesuffix(name), weights if name in weights else biases
        keys = [prefix + part for part in parts]
        found = require_parts(keys, state_dict)
        if len({part.shape[1:] for part in found}) == 1:
            kind = prefix + FUSED[name in biases]
            if kind in state_dict or kind not in made:  # once for the three
                add_new(made, {kind: torch.cat(found)}, state_dict)
        elif names is None:
            made[key] = tensor
        else:
            add_new(made, {prefix + SEPARATE[weights.index(name)]: tensor.clone()}, state_dict)
    return made


def group_heads(
    state_dict: Mapping[str, Tensor],
    num_heads: int,
    num_kv_heads: int,
    value_head_dim: int | None = None,
    *,
    names: Sequence[str] | None = None,
) -> State:
    """The state dict of full heads for layers of ``num_kv_heads``: keys and values are the mean of each group's.

    Consecutive heads make a group. What follows needs some training. Source: Ainslie and others, "GQA: Training
    Generalized Multi-Query Transformer Models from Multi-Head Checkpoints" (2023).

    Args:
        state_dict: of a layer or a model.
        num_heads, num_kv_heads, value_head_dim: of the layers that it becomes, as in ``separate_projections``.
        names: of three linear modules which stand for the projections, as in ``separate_projections``.

    Raises:
        TypeError: no state dict.
        ValueError: heads that make no such groups, rows that are not those of ``num_heads``, or no projections.
    """
    groups = check_groups(num_heads, num_kv_heads)

    def group(rows: Tensor) -> Tensor:
        return torch.unflatten(rows, 0, (num_kv_heads, groups, -1)).mean(dim=1).flatten(0, 1)

    return with_kv(state_dict, group, HeadCounts.of(num_heads, num_heads, value_head_dim), names)


def repeat_heads(
    state_dict: Mapping[str, Tensor],
    num_heads: int,
    num_kv_heads: int,
    value_head_dim: int | None = None,
    *,
    names: Sequence[str] | None = None,
) -> State:
    """The state dict of ``num_kv_heads`` for layers of full heads, which give the same output.

    Args:
        state_dict: of a layer or a model.
        num_heads, num_kv_heads, value_head_dim: of the layers that it is of, as in ``separate_projections``.
        names: of three linear modules which stand for the projections, as in ``separate_projections``.

    Raises:
        TypeError: no state dict.
        ValueError: heads that make no such groups, rows that are not those of ``num_kv_heads``, or no projections.
    """
    groups = check_groups(num_heads, num_kv_heads)

    def repeat(rows: Tensor) -> Tensor:
        return torch.unflatten(rows, 0, (num_kv_heads, -1)).repeat_interleave(groups, dim=0).flatten(0, 1)

    return with_kv(state_dict, repeat, HeadCounts.of(num_heads, num_kv_heads, value_head_dim), names)


def with_kv(
    state_dict: Mapping[str, Tensor],
    change: Callable[[Tensor], Tensor],
    heads: HeadCounts,
    names: Sequence[str] | None,
) -> State:
    """The state dict with the rows of keys and values changed, wherever they stand."""
    names = check_names(names)
    weights, biases = name_parts("weight", names), () if names is None else name_parts("bias", names)
    known = (*FUSED, *SEPARATE, *weights, *biases)
    check_state(state_dict, known)
    layers = {key.removesuffix(name) for key in state_dict if (name := find_name(key, known))}
    made: State = {}
    for key, tensor in state_dict.items():
        kind = find_name(key, (*known, *LEARNED))
        prefix = key.removesuffix(kind or "")
        if kind is not None and prefix in layers:
            rows = count_rows(prefix, state_dict, heads, names)
            if kind in FUSED:
                q, k, v = split_rows(key, tensor, rows)
                tensor = torch.cat([q, change(k), change(v)])
            elif kind in LEARNED:
                (part,) = split_rows(key, tensor.flatten(), [rows[1 + LEARNED.index(kind)]])
                tensor = change(part)[None, None]
            else:
                place = next(parts.index(kind) for parts in (SEPARATE, weights, biases) if kind in parts)
                if place:
                    (part,) = split_rows(key, tensor, [rows[place]])
                    tensor = change(part)
        made[key] = tensor
    return made


def suggest_grouping(state_dict: Mapping[str, Any], prefix: str, sizes: Sizes) -> str | None:
    """How projections of full heads come to fit a layer of grouped ones; ``None`` where these are no such two."""
    if sizes.heads == sizes.heads_kv:
        return None
    full = sizes._replace(heads_kv=sizes.heads).rows
    for name, rows in (("in_proj_weight", sum(full)), ("k_proj_weight", full[1])):
        tensor = state_dict.get(prefix + name)
        if isinstance(tensor, Tensor) and tensor.shape[:1] == (rows,):
            counts = [sizes.heads, sizes.heads_kv] + [sizes.head_dim_v] * (sizes.head_dim_v != sizes.head_dim)
            return (
                f"{prefix}{name} must have the rows of {sizes.heads_kv} heads of keys and values, got those of "
                f"{sizes.heads}: flashmha.group_heads(state_dict, {', '.join(map(str, counts))}) groups them."
            )
    return None


def split_rows(key: str, tensor: Tensor, rows: list[int]) -> tuple[Tensor, ...]:
    """So many rows each; raise where a tensor has others."""
    if tensor.shape[0] != sum(rows):
        raise ValueError(f"{key} must have {sum(rows)} rows, as its layer's projections do, got {spell(tensor)}.")
    return torch.split(tensor, rows)


def add_new(made: State, new: State, state_dict: Mapping[str, Tensor]) -> None:
    """Add tensors under new names; raise where the state dict has such a name already."""
    taken = [key for key in new if key in state_dict]
    if taken:
        raise ValueError(f"names must be new in the state dict, got {', '.join(taken)}, which it holds already.")
    made.update(new)


def check_state(state_dict: object, names: Iterable[str], hint: str = NAMES_HINT) -> None:
    """Raise where this is no state dict, or holds nothing under these names, or something in another form."""
    if not isinstance(state_dict, Mapping) or not all(isinstance(key, str) for key in state_dict):
        if isinstance(state_dict, nn.Module):
            raise TypeError(f"state_dict must be a dict, got a {type(state_dict).__name__}: pass its state_dict().")
        raise TypeError(f"state_dict must be a dict of tensors by name, got {spell(state_dict)}.")
    names = tuple(names)
    check_plain(state_dict, names)
    if not any(find_name(key, names) for key in state_dict):
        held = ", ".join(list(state_dict)[:4]) + (", ..." if len(state_dict) > 4 else "")
        raise ValueError(
            f"state_dict must hold projections under one of {', '.join(dict.fromkeys(names))}, got "
            f"{held or 'an empty one'}{hint}."
        )


def check_plain(state_dict: Mapping[str, Tensor], names: Sequence[str]) -> None:
    """Raise where a projection is there as what a parametrization, a norm or a pruning computes it of, not itself."""
    for key in state_dict:
        head, parametrized, tail = key.rpartition("parametrizations.")
        plain = head + tail.partition(".")[0] if parametrized else COMPUTED_OF.sub("", key)
        if plain != key and find_name(plain, names):
            raise ValueError(
                f"state_dict must hold {plain} itself, got {key}: convert the state dict of a layer without the "
                "parametrization, norm or pruning, as remove_parametrizations, remove_weight_norm and prune.remove "
                "leave it."
            )


COMPUTED_OF = re.compile("_(orig|g|v)$")
"""How the names of tensors end of which ``prune``, ``spectral_norm`` and ``weight_norm`` compute another."""


def check_names(names: Sequence[str] | None) -> tuple[str, ...] | None:
    """Raise where these are not the names of three modules."""
    if names is None:
        return None
    if (
        isinstance(names, str)
        or not isinstance(names, Sequence)
        or len(names) != 3
        or not all(isinstance(name, str) and name for name in names)
        or len(set(names)) != 3
    ):
        raise ValueError(f"names must be three, of different modules for queries, keys and values, got {names!r}.")
    return tuple(names)

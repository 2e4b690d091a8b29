"""What the hops of a layer return, checked: a subclass may override them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .features import find_overridden, is_ours
from .protocol import Layer


def take_three(name: str, heads: Any) -> tuple[Any, Any, Any]:
    """q, k and v as a hop returned them."""
    if not isinstance(heads, (tuple, list)) or len(heads) != 3:
        kind = f"{len(heads)} of them" if isinstance(heads, (tuple, list)) else type(heads).__name__
        raise ValueError(f"{name} must return the three tensors q, k and v, got {kind}.")
    return heads[0], heads[1], heads[2]


def check_heads(layer: Layer, projected: Any, heads: Any, batch: int, seqlen_q: int) -> None:
    """Raise where q, k and v are not heads; the error names the first hop that made them so."""
    if are_heads(heads, batch, seqlen_q):
        return
    for name, made in (("project", projected), ("process_heads", heads)):
        if not is_ours(layer, name) and not are_heads(made, batch, seqlen_q):
            raise ValueError(
                f"{name} must return q (batch={batch}, seqlen_q={seqlen_q}, heads, head_dim) and k and v "
                f"(batch={batch}, seqlen_k, heads_kv, head_dim), got {', '.join(map(describe_shape, made))}."
            )


def are_heads(heads: Any, batch: int, seqlen_q: int) -> bool:
    """q, k and v are heads of one batch that fit one another."""
    if not all(isinstance(x, Tensor) and x.dim() == 4 and x.shape[0] == batch for x in heads):
        return False
    q, k, v = heads
    return bool(q.shape[1] == seqlen_q and k.shape[1:3] == v.shape[1:3] and q.shape[3] == k.shape[3])


def check_output(layer: Layer, output: Any, batch: int, seqlen_q: int) -> None:
    """Raise where ``merge``, or ``out_proj`` as it is called, returned no output.

    An ``out_proj`` may be of another width than ``embed_dim``, as in the stock class; what a subclass returns may not.
    """
    own = is_ours(layer, "merge")
    right = isinstance(output, Tensor) and output.dim() == 3 and output.shape[:2] == (batch, seqlen_q)
    if right and (own or output.shape[2] == layer.embed_dim):
        return
    name, width = ("out_proj", "features") if own else ("merge", f"embed_dim={layer.embed_dim}")
    raise ValueError(f"{name} must return (batch={batch}, seqlen_q={seqlen_q}, {width}), got {describe_shape(output)}.")


def check_weights(layer: Layer, weights: Any, sizes: tuple[int, int, int]) -> None:
    """Raise where ``process_weights`` returned no weights; ``sizes`` is (batch, seqlen_q, seqlen_k)."""
    right = isinstance(weights, Tensor) and weights.dim() == 4
    if not right or (weights.shape[0], weights.shape[2], weights.shape[3]) != sizes:
        raise ValueError(
            "process_weights must return (batch={}, heads, seqlen_q={}, seqlen_k={}), got {}.".format(
                *sizes, describe_shape(weights)
            )
        )


def refuse_weights(layer: Layer, heads: int) -> None:
    """Raise where the weights of the heads are not the layer's, and the layer does not say what its weights are."""
    hops = " and ".join(find_overridden(layer))
    raise ValueError(
        f"need_weights must be False for this {type(layer).__name__}, got True: its {hops} "
        f"make {heads} heads where the layer has num_heads={layer.num_heads}, so the weights of these heads are not "
        "the layer's. Override process_weights, which says what they are, or build the layer with need_weights=False."
    )


def describe_shape(thing: Any) -> str:
    """The shape of a tensor, the type of anything else, for an error."""
    return str(tuple(thing.shape)) if isinstance(thing, Tensor) else type(thing).__name__

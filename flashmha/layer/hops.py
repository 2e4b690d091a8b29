"""What the hops of a layer return, checked: a subclass may override them."""

from __future__ import annotations

import difflib
import inspect
import warnings
from typing import Any

from torch import Tensor

from .features import HOPS, find_overridden, is_ours, is_written
from .protocol import Layer

TAKEN = {
    "project": ("query", "key", "value"),
    "process_heads": ("q", "k", "v"),
    "attend": ("q", "k", "v"),
    "merge": ("out", "query"),
}
"""What each hop is called with, in order, but for ``process_weights``; ``attend`` with keywords beside."""


def check_signatures(kind: type[Any]) -> None:
    """Raise ``TypeError`` where a class defines a hop that cannot be called as one."""
    for name, taken in TAKEN.items():
        hop = vars(kind).get(name)
        if not inspect.isfunction(hop):
            continue
        more = {"mask": None, "call": None} if name == "attend" else {}
        try:
            inspect.signature(hop).bind(kind, *taken, **more)
        except TypeError as error:
            keywords = ", *, bias=None, **call" if name == "attend" else ""
            raise TypeError(
                f"{name} must take (self, {', '.join(taken)}{keywords}) in {kind.__name__}, got "
                f"{inspect.signature(hop)}: {error}."
            ) from None


ALIKE, LETTERS = 0.8, 2
"""How alike two names are of which one is taken for a misspelling, and by how many letters one may be the longer."""


def warn_of_misspelled_hops(kind: type[Any]) -> None:
    """Warn of a public method that is called nearly as a hop which the class leaves as it is, since it never runs."""
    for name, method in vars(kind).items():
        if name.startswith("_") or name in HOPS or not inspect.isfunction(method):
            continue
        for hop in difflib.get_close_matches(name, HOPS, n=1, cutoff=ALIKE):
            near = abs(len(name) - len(hop)) <= LETTERS
            if near and is_left(kind, hop) and not any(name in vars(above) for above in kind.__mro__[1:]):
                warnings.warn(
                    f"{kind.__name__}.{name} is no hop, so that no call of the layer runs it; the hop is {hop}.",
                    stacklevel=3,
                )


def is_left(kind: type[Any], hop: str) -> bool:
    """A class has the hop of the package's own."""
    written = getattr(kind, "_written", None)  # the package's own class is being made while it has none
    return written is not None and getattr(kind, hop) is written.values[hop]


def check_projections(layer: Layer) -> None:
    """Raise where a layer without a projection has the package's own hop, which uses it."""
    for name, hop in (("has_in_proj", "project"), ("has_out_proj", "merge")):
        if not getattr(layer, name) and is_written(layer, hop):
            raise TypeError(f"{name} must be True unless {hop} is overridden, got False in {type(layer).__name__}.")


def take_three(name: str, heads: Any) -> tuple[Any, Any, Any]:
    """q, k and v as a hop returned them."""
    if not isinstance(heads, (tuple, list)) or len(heads) != 3:
        kind = f"{len(heads)} of them" if isinstance(heads, (tuple, list)) else type(heads).__name__
        raise ValueError(f"{name} must return the three tensors q, k and v, got {kind}.")
    return heads[0], heads[1], heads[2]


def check_absent(name: str, made: Any, wanted: Any) -> None:
    """Raise where a hop made something of ``None``: heads that were not asked for."""
    for tensor, one, letter in zip(made, wanted, "qkv"):
        if (tensor is None) != (one is None):
            raise ValueError(
                f"{name} must return None for {letter} where it gets None, as beside kv, and only there, "
                f"got {describe_shape(tensor)}."
            )


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


def check_attended(out: Any, batch: int, seqlen_q: int) -> None:
    """Raise where ``attend`` returned no heads."""
    if not isinstance(out, Tensor) or out.dim() != 4 or out.shape[:2] != (batch, seqlen_q):
        raise ValueError(
            f"attend must return (batch={batch}, seqlen_q={seqlen_q}, heads, head_dim_v), got {describe_shape(out)}."
        )


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


def check_weights(weights: Any, sizes: tuple[int, int, int]) -> None:
    """Raise where ``process_weights`` returned no weights; ``sizes`` is (batch, seqlen_q, seqlen_k)."""
    right = isinstance(weights, Tensor) and weights.dim() == 4
    if not right or (weights.shape[0], weights.shape[2], weights.shape[3]) != sizes:
        raise ValueError(
            "process_weights must return (batch={}, heads, seqlen_q={}, seqlen_k={}), got {}.".format(
                *sizes, describe_shape(weights)
            )
        )


def refuse_weights(layer: Layer, why: str) -> None:
    """Raise where the weights of what ran are not the layer's, and the layer does not say what its weights are."""
    hops = " and ".join(find_overridden(layer))
    raise ValueError(
        f"need_weights must be False for this {type(layer).__name__}, got True: its {hops} {why}. "
        "Override process_weights, which says what they are, or build the layer with need_weights=False."
    )


def say_heads(layer: Layer, heads: int) -> str:
    """Why weights of so many heads are not the layer's."""
    return (
        f"make {heads} heads where the layer has num_heads={layer.num_heads}, so the weights of these heads are not "
        "the layer's"
    )


def describe_shape(thing: Any) -> str:
    """The shape of a tensor, the type of anything else, for an error."""
    return str(tuple(thing.shape)) if isinstance(thing, Tensor) else type(thing).__name__

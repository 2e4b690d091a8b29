"""What the hops of a layer return, checked: a subclass may override them."""

from __future__ import annotations

import difflib
import inspect
import warnings
from typing import Any

from torch import Tensor

from .features import HOPS, find_overridden, is_ours, is_written
from .options import HEAD_SIZES
from .protocol import Layer

TAKEN = {
    "project": ("query", "key", "value"),
    "process_heads": ("q", "k", "v"),
    "attend": ("q", "k", "v"),
    "merge": ("out", "query"),
}
"""What each hop is called with, in order, but for ``process_weights``."""
BESIDE = ("mask", "bias", "softcap", "sinks", "softmax_scale", "dropout_p", "call")
"""What ``attend`` is called with by keyword, always all of it."""


def check_signatures(kind: type[Any]) -> None:
    """Raise ``TypeError`` where a class defines a hop that cannot be called as one."""
    for name, taken in TAKEN.items():
        hop = vars(kind).get(name)
        if not inspect.isfunction(hop):
            continue
        more = dict.fromkeys(BESIDE) if name == "attend" else {}
        try:
            inspect.signature(hop).bind(kind, *taken, **more)
        except TypeError as error:
            keywords = ", *, bias=None, **call" if name == "attend" else ""
            raise TypeError(
                f"{name} must take (self, {', '.join(taken)}{keywords}) in {kind.__name__}, got "
                f"{inspect.signature(hop)}: {error}."
            ) from None


def check_attributes(kind: type[Any]) -> None:
    """Raise ``TypeError`` where a class says the sizes of its heads beside the constructor, which reads them alone."""
    for name in HEAD_SIZES:
        if name in vars(kind):
            raise TypeError(
                f"{name} must be an argument of the constructor, got an attribute of {kind.__name__}: hand it to "
                "super().__init__, or give it another name."
            )


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


def check_bias_heads(layer: Layer, bias: Any, num_heads: int) -> None:
    """Raise where a ``position_bias`` says that it is for another number of heads than the package's hops make."""
    heads = getattr(bias, "num_heads", num_heads)
    if heads != num_heads and all(is_written(layer, name) for name in ("project", "process_heads", "attend")):
        raise ValueError(
            f"position_bias must be for num_heads={num_heads} heads, got {type(bias).__name__} for {heads}."
        )


def take_three(name: str, heads: Any) -> tuple[Any, Any, Any]:
    """q, k and v as a hop returned them."""
    if not isinstance(heads, (tuple, list)) or len(heads) != 3:
        kind = f"{len(heads)} of them" if isinstance(heads, (tuple, list)) else type(heads).__name__
        raise ValueError(f"{name} must return the three tensors q, k and v, got {kind}.")
    return heads[0], heads[1], heads[2]


def run_project(layer: Layer, *inputs: Tensor) -> tuple[Any, Any, Any]:
    """q, k and v of an overridden ``project``, checked."""
    made = take_three("project", run_hop(layer, "project", inputs))
    check_absent("project", made, inputs)
    check_projected(layer, made)
    return made


def run_process_heads(layer: Layer, heads: Any) -> tuple[Any, Any, Any]:
    """q, k and v of an overridden ``process_heads``, checked."""
    made = take_three("process_heads", run_hop(layer, "process_heads", heads))
    check_absent("process_heads", made, heads)
    return made


def run_hop(layer: Layer, name: str, inputs: Any) -> Any:
    """``project`` or ``process_heads``; ``TypeError`` where it takes no ``None`` among its inputs, as beside ``kv``."""
    hop = getattr(layer, name)
    if is_ours(layer, name) or all(x is not None for x in inputs):
        return hop(*inputs)
    try:
        return hop(*inputs)
    except (AttributeError, TypeError) as error:
        missing = ", ".join(argument for argument, x in zip(TAKEN[name], inputs) if x is None)
        raise TypeError(
            f"{name} of {type(layer).__name__} must take None for {missing}, which kv= and keys_values leave out, and "
            f"give None back for it, got {type(error).__name__}: {error}."
        ) from error


OPTIONS = (("num_kv_heads", 1, 2), ("head_dim", 1, 3), ("value_head_dim", 2, 3))
"""Each option that says what keys and values are like: of which of q, k and v, and on which axis."""


def check_projected(layer: Layer, heads: Any) -> None:
    """Raise where an overridden ``project`` made other heads than the constructor was told."""
    for option, place, axis in OPTIONS:
        told, made = getattr(layer, f"free_{option}"), heads[place]
        if told is not None and isinstance(made, Tensor) and made.dim() == 4 and made.shape[axis] != told:
            raise ValueError(
                f"project must return {'qkv'[place]} of {option}={told}, which {type(layer).__name__} was built with, "
                f"got {made.shape[axis]} in shape {describe_shape(made)}: use self.{option} in project, or build the "
                f"layer without {option}."
            )


def check_kv(layer: Layer, k: Tensor, v: Tensor) -> None:
    """Raise where keys and values that were made before are none that the layer itself would make."""
    if not is_ours(layer, "process_heads"):
        return  # which may make any, see check_heads
    whole = is_ours(layer, "project")
    for option, place, axis in OPTIONS:
        wanted, found = getattr(layer, option), (k, v)[place - 1].shape[axis]
        if found != wanted and (whole or getattr(layer, f"free_{option}") is not None):
            raise ValueError(
                f"kv must have {option}={wanted}, as this layer has, got {found} in shapes {tuple(k.shape)} and "
                f"{tuple(v.shape)}: build the layers that share it with one {option}."
            )


def check_absent(name: str, made: Any, wanted: Any) -> None:
    """Raise where a hop made something of ``None``: heads that were not asked for."""
    if all(one is not None for one in wanted):
        return  # of a usual call, see check_heads
    for tensor, one, letter in zip(made, wanted, "qkv"):
        if (tensor is None) != (one is None):
            raise ValueError(
                f"{name} must return None for {letter} where it gets None, as beside kv, and only there, "
                f"got {describe_shape(tensor)}."
            )


def check_heads(layer: Layer, projected: Any, heads: Any, batch: int, seqlen_q: int, has_kv: bool) -> None:
    """Raise where q, k and v are not heads; the error names the first hop that made them so."""
    if are_heads(heads, batch, seqlen_q):
        return
    if has_kv and isinstance(heads[0], Tensor) and are_heads((heads[0],) * 3, batch, seqlen_q):
        raise ValueError(
            f"kv must have keys of head_dim={heads[0].shape[3]}, as q has, got {heads[1].shape[3]}: take it from "
            "keys_values of a layer like this one."
        )
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

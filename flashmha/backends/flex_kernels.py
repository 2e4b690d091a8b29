"""Functions that flex has compiled, by what makes another kernel."""

from __future__ import annotations

import collections
import functools
import itertools
import threading
import types
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..host.torch_state import is_inference
from ..problem.likeness import likeness
from ..problem.masks import Mask
from ..problem.rules import Rule
from ..problem.scores import Bias
from ..problem.spec import AttentionSpec
from .compiling import waits

MOST_KERNELS = 64
"""How many compiled functions are kept."""
Key = tuple[Any, ...]


class Kernels:
    """At most ``MOST_KERNELS`` compiled functions by all that makes another kernel; the longest unused goes first.

    One compiled function for all shapes would not do: Dynamo keeps what it compiled for a function on the function's
    code object, and beyond eight versions there it runs the function as it is, unfused, with no more than a line in
    the log. So each function here has a code object of its own, and ``fullgraph`` makes a limit an error.
    """

    def __init__(self, backend: str) -> None:
        self.backend = backend
        self.functions: collections.OrderedDict[Key, Callable[..., Any]] = collections.OrderedDict()
        self.numbers = itertools.count()
        self.lock = threading.Lock()

    def serve(self, problem: Key) -> bool:
        """There is a kernel for a problem, however its tensors lay in memory."""
        with self.lock:
            return any(key[0] == problem for key in self.functions)

    def run(self, key: Key, *args: Any, **kwargs: Any) -> Any:
        """Call the function of a key, which is kept from its first success on."""
        with self.lock:
            made = self.functions.get(key)
            if made is not None:
                self.functions.move_to_end(key)
        if made is not None:
            try:
                return made(*args, **kwargs)
            except recompile_limit():
                warn_rule("what a rule's function reads, an attribute, a list or a global, has had too many values")
        made = compiled(next(self.numbers))
        with waits.ending(self.backend, key[0]):
            result = made(*args, **kwargs)
        with self.lock:
            self.functions[key] = made
            while len(self.functions) > MOST_KERNELS:
                self.functions.popitem(last=False)
            alike = sum(one[0][1:] == key[0][1:] and one[1] == key[1] for one in self.functions)
        if key[0][0] and alike == MOST_ALIKE:
            warn_rule(f"{alike} kernels of one shape differ in the numbers of a rule alone")
        return result


MOST_ALIKE = 8
"""Kernels that differ in their rules alone, before a warning says so."""


def warn_rule(what: str) -> None:
    """Say that rules are compiled again and again, and what spares that."""
    warnings.warn(
        f"flex: {what}, and each takes seconds to compile. A rule whose function captures a tensor is compiled once: "
        "its values are read at each call.",
        stacklevel=2,
    )


@functools.cache
def recompile_limit() -> type[Exception]:
    """What Dynamo raises where a function has too many versions."""
    from torch._dynamo.exc import FailOnRecompileLimitHit

    return FailOnRecompileLimitHit


def problem_key(spec: AttentionSpec) -> Key:
    """Everything about a problem that makes another kernel, its rules first; the values of tensors do not."""
    sizes = (spec.batch, spec.seqlen_q, spec.seqlen_k, spec.heads, spec.heads_kv, spec.head_dim, spec.head_dim_v)
    parts = () if spec.mask is None else spec.mask.parts
    rules = tuple((likeness(part.fn), part.align) for part in parts if isinstance(part, Rule))
    holders = [holder for holder in (spec.mask, spec.bias) if holder is not None]
    kinds = tuple(name_kind(part) for holder in holders for part in holder.parts)
    held = [tensor for holder in holders for tensor in holder.tensors()]
    layouts = tuple((x.shape, x.stride(), x.dtype, x.requires_grad) for x in held)
    rest = (spec.dtype, spec.device, spec.features, spec.softcap, spec.scale)
    return (rules, *sizes, *rest, kinds, layouts)


def name_kind(part: Mask | Bias) -> Key:
    """The class of a mask or a bias, and what its ``repr`` says where it is more than an address."""
    kind = type(part)
    return kind, None if kind.__repr__ is object.__repr__ else repr(part)


def tensors_key(q: Tensor, k: Tensor, v: Tensor) -> Key:
    """The rest of what a compiler looks at: how the tensors lie, which want a gradient, and the modes of autograd."""
    layouts = tuple((x.stride(), x.requires_grad, x.is_inference()) for x in (q, k, v))
    return (*layouts, torch.is_grad_enabled(), is_inference())


def compiled(number: int) -> Callable[..., Any]:
    """flex_attention for one shape: the same few lines under a code object of their own."""
    from torch.nn.attention.flex_attention import flex_attention

    def attend(*args: Any, **kwargs: Any) -> Any:
        return flex_attention(*args, **kwargs)

    # replace gives a new code object, where each run of this def would share one; the name keeps them unequal too
    code = attend.__code__.replace(co_name=f"flex_{number}")
    function = types.FunctionType(code, attend.__globals__, code.co_name, None, attend.__closure__)
    # dynamic shapes would make head_dim a symbol, which the kernel's templates refuse
    made: Callable[..., Any] = torch.compile(function, dynamic=False, fullgraph=True)
    return made

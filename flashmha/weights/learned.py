"""What a problem's scores hold that may be learned: the tensors of a bias, and sinks."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ..problem.bias_values import add_biases
from ..problem.positions import narrowed_to
from ..problem.scores import TensorBias
from ..problem.spec import AttentionSpec

Put = Callable[[AttentionSpec, Sequence[Tensor]], AttentionSpec]


def held(spec: AttentionSpec) -> tuple[Tensor, ...]:
    """The tensors of a problem's bias, and its sinks last."""
    tensors = () if spec.bias is None else spec.bias.tensors()
    return tensors if spec.sinks is None else (*tensors, spec.sinks)


def take_apart_scores(spec: AttentionSpec) -> tuple[tuple[Tensor, ...], Put]:
    """What ``held`` gives, and what puts others like them into the same problem, which holds none of it."""
    over = None if spec.bias is None else spec.bias.flatten()[1]
    tensors, has_sinks = held(spec), spec.sinks is not None

    def put(problem: AttentionSpec, others: Sequence[Tensor]) -> AttentionSpec:
        bias = others[:-1] if has_sinks else others
        return problem.changed(
            bias=None if over is None else over(bias), sinks=others[len(bias)] if has_sinks else None
        )

    return tensors, put


def replace_learned(spec: AttentionSpec, others: Sequence[Tensor | None]) -> AttentionSpec:
    """The same problem over other tensors, in the order of ``held``; ``None`` leaves one as it is."""
    if all(other is None for other in others):
        return spec
    tensors, put = take_apart_scores(spec)
    return put(spec, [old if new is None else new for old, new in zip(tensors, others)])


class Learned:
    """Gradients of what a problem's scores hold, added up band by band.

    A tensor bias is read a band at a time. What positions make of slopes and tables goes back through their own
    operators, which make the band's bias once more.
    """

    def __init__(self, spec: AttentionSpec, wanted: Sequence[bool], dtype: torch.dtype) -> None:
        self.spec, self.dtype = spec, dtype
        self.tensors = held(spec)
        zeros = [torch.zeros_like(x, dtype=dtype) if want else None for x, want in zip(self.tensors, wanted)]
        self.made: list[Tensor | None] = zeros
        self.sinks = None if spec.sinks is None else self.made[-1]
        self.biases = self.made if spec.sinks is None else self.made[:-1]

    @contextlib.contextmanager
    def band(self, rows: range) -> Iterator[Tensor | None]:
        """Where the gradient of the bias of some rows is added up, heads first; ``None`` where none is wanted."""
        if all(made is None for made in self.biases):
            yield None
            return
        bias, rest = self.spec.bias, iter(zip(self.tensors, self.biases))
        parts: list[Tensor] = []
        leaves: list[Tensor] = []
        places: list[Tensor] = []
        assert bias is not None
        with torch.enable_grad():
            for part in bias.parts:
                mine, again = part.flatten()
                own: list[Tensor] = []
                for tensor, made in [next(rest) for _ in mine]:
                    if isinstance(part, TensorBias):
                        tensor = narrowed_to(tensor, rows, None)
                        made = None if made is None else narrowed_to(made, rows, None)
                    own.append(tensor.detach().to(self.dtype).requires_grad_(made is not None))
                    if made is not None:
                        leaves.append(own[-1])
                        places.append(made)
                moved = own[0] if isinstance(part, TensorBias) else self.spec.changed(bias=again(own)).added(rows)
                assert moved is not None
                parts.append(moved)
            total = functools.reduce(add_biases, parts)
        grad = torch.zeros_like(total)
        yield grad.transpose(0, 1)
        found = torch.autograd.grad(total, leaves, grad, allow_unused=True)
        for place, one in zip(places, found):
            if one is not None:
                place += one

    def gradients(self) -> list[Tensor | None]:
        """The gradients, each in its tensor's dtype."""
        return [None if made is None else made.to(x.dtype) for x, made in zip(self.tensors, self.made)]

"""The law of dropout, for any backend: which weights were dropped is read off its output.

With one-hot values an output is the weights themselves. Under one seed of torch's generator a backend drops the same
weights whatever the values are, so its output and its gradients have to be those of the definition with just these
weights dropped. And over some seeds the dropped ones are as many as asked for, and independent.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..backends import get
from ..backends.base import Backend
from ..backends.naive import Naive, probabilities, scores, weigh
from ..problem.spec import AttentionSpec
from .values import tensors

WEIGHTS = "weights under dropout"
SEEN = 1e-3
"""Weights below are not looked at: a narrow dtype may have lost them."""
STEP = 1 / 255
"""How far the rate may be from the one asked for; flash-attention keeps a probability in one byte."""
ALARM = 1e-12
"""How likely a right backend fails on one problem, at most."""
ENOUGH, MOST_SEEDS = 3000, 6
"""How many weights are looked at, and under how many other seeds of torch's generator at most."""


class KeptWeights(Naive):
    """The definition, with given weights dropped: a bool tensor (batch, heads, seqlen_q, seqlen_k)."""

    def __init__(self, keep: Tensor) -> None:
        self.keep = keep

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor | tuple[Tensor, Tensor]:
        whole = spec.changed(dropout_p=0.0)
        weights = probabilities(*scores(q, k, spec), spec) * self.keep * scale(spec)
        out = weigh(weights.to(v.dtype), v, whole)
        if not spec.need_lse:
            return out
        return out, super().__call__(q, k, v, whole)[1]


def scale(spec: AttentionSpec) -> float:
    """The factor of a kept weight."""
    return 0.0 if spec.dropout_p == 1.0 else 1.0 / (1.0 - spec.dropout_p)


@contextlib.contextmanager
def drawing(spec: AttentionSpec, seed: int) -> Iterator[None]:
    """Torch's generators at a seed, where the problem draws, and as they were afterwards."""
    if spec.dropout_p == 0.0:
        yield
        return
    generators = [torch.default_generator]
    if spec.device.type == "cuda":
        index = torch.cuda.current_device() if spec.device.index is None else spec.device.index
        generators.append(torch.cuda.default_generators[index])
    before = [generator.get_state() for generator in generators]
    try:
        for generator in generators:  # torch.manual_seed asks every kind of device, which takes a millisecond
            generator.manual_seed(seed)
        yield
    finally:
        for generator, state in zip(generators, before):
            generator.set_state(state)


def read_weights(backend: Backend, q: Tensor, k: Tensor, spec: AttentionSpec, seed: int) -> Tensor:
    """The weights of a call under a seed (batch, heads, seqlen_q, seqlen_k), dropped ones 0: as many calls as it takes.

    ``v`` is one-hot in as many keys a call as it has features.
    """
    width = spec.head_dim_v
    parts = [q.new_zeros(spec.batch, spec.heads, spec.seqlen_q, 0)]
    for start in range(0, spec.seqlen_k, width):
        v = q.new_zeros(spec.batch, spec.seqlen_k, spec.heads_kv, width)
        places = range(min(width, spec.seqlen_k - start))
        for place in places:
            v[:, start + place, :, place] = 1.0
        one, two, three = (x.detach().requires_grad_(spec.needs_grad) for x in (q, k, v))
        with torch.set_grad_enabled(spec.needs_grad), drawing(spec, seed):
            result = backend(one, two, three, spec)
        out = result[0] if isinstance(result, tuple) else result
        parts.append(out.detach().transpose(1, 2)[..., : len(places)])
    return torch.cat(parts, dim=-1)


def assert_drops(backend: Backend, spec: AttentionSpec, seed: int) -> None:
    """A backend drops as many weights as a problem asks for, each on its own, and the same ones under the same seed.

    The rate is held to a bound over all weights and for every batch item, head, query and key; and two neighbours, or
    two that are half an axis apart, must not be alike more often than chance has it. A right backend fails with a
    probability below 1e-12 a problem.
    """
    q, k, _ = tensors(spec, seed)
    check_drops(read_weights(backend, q, k, spec, seed), backend, spec, seed)


def check_drops(weights: Tensor, backend: Backend, spec: AttentionSpec, seed: int) -> None:
    """``assert_drops``, where the weights under the seed were read already."""
    if spec.dropout_p in (0.0, 1.0):
        return
    q, k, _ = tensors(spec, seed)
    seen = visible_pairs(q, k, spec).cpu()
    seeds = min(MOST_SEEDS, 1 + ENOUGH // max(int(seen.sum()), 1))
    one = weights != 0
    again, *others = (read_weights(backend, q, k, spec, seed + more) != 0 for more in range(seeds + 1))
    assert torch.equal(one, again), "the same torch.manual_seed must drop the same weights"
    kept = torch.stack((one, *others)).cpu()
    seen = seen.expand_as(kept)
    low, high = 1 - spec.dropout_p - STEP, 1 - spec.dropout_p + STEP
    counts: list[tuple[str, Tensor, Tensor, tuple[float, float]]] = [
        ("weights kept", (kept & seen).sum(), seen.sum(), (low, high))
    ]
    chances = chances_of_alike(low, high)
    for axis, name in enumerate(("seeds", "batch items", "heads", "queries", "keys")):
        rest = [other for other in range(kept.dim()) if other != axis]
        counts.append((f"weights kept in one of the {name}", (kept & seen).sum(rest), seen.sum(rest), (low, high)))
        for one, two, apart in pairs(kept.shape[axis]):
            both = seen.index_select(axis, one) & seen.index_select(axis, two)
            same = both & (kept.index_select(axis, one) == kept.index_select(axis, two))
            counts.append((f"pairs of weights alike in {apart} {name}", same.sum(), both.sum(), chances))
    limit = math.log(2 * sum(numbers.numel() for _, numbers, _, _ in counts) / ALARM)
    for name, hits, number, chance in counts:
        strange = surprise(hits.double(), number.double(), *chance).flatten()
        worst = int(strange.argmax()) if strange.numel() else 0
        assert not strange.numel() or strange[worst] <= limit, (
            f"dropout_p={spec.dropout_p} is not kept to: {name}: {int(hits.flatten()[worst])} of "
            f"{int(number.flatten()[worst])}, the expected share is {sum(chance) / 2:.3f}"
        )


def visible_pairs(q: Tensor, k: Tensor, spec: AttentionSpec) -> Tensor:
    """Which weights are large enough to be looked at, in every dtype."""
    whole = spec.changed(dropout_p=0.0, head_dim_v=max(spec.seqlen_k, 1), needs_grad=False, need_lse=False)
    naive = get("naive")
    exact = read_weights(naive, q.double(), k.double(), whole.changed(dtype=torch.float64), 0)
    return (exact > SEEN) & (read_weights(naive, q, k, whole, 0) > SEEN)


def pairs(size: int) -> Iterator[tuple[Tensor, Tensor, str]]:
    """Places along an axis in pairs, none twice: neighbours, and those half the axis apart."""
    places, half = torch.arange(size, device="cpu"), size // 2
    if size > 1:
        yield places[: 2 * half : 2], places[1 : 2 * half : 2], "neighbouring"
    if size > 3:
        yield places[:half], places[half : 2 * half], "distant"


def chances_of_alike(low: float, high: float) -> tuple[float, float]:
    """The chance that two independent weights are both kept or both dropped, for a rate between two bounds."""
    ends = [rate * rate + (1 - rate) * (1 - rate) for rate in (low, high)]
    return (0.5 if low <= 0.5 <= high else min(ends)), max(ends)


def surprise(hits: Tensor, number: Tensor, low: float, high: float) -> Tensor:
    """The surprise of a share, in nats, for a chance between two bounds: it or a stranger one has at most exp(-that).

    Source: Chernoff's bound by the divergence of two coins.
    """
    share = hits / number.clamp(min=1.0)
    chance = share.clamp(max(low, 1e-9), min(high, 1 - 1e-9))
    divergence = torch.xlogy(share, share / chance) + torch.xlogy(1 - share, (1 - share) / (1 - chance))
    return number * divergence

"""Problems of attention as Hypothesis strategies: sizes, masks, biases, whole specs, and the tensors of a seed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends import get
from ..backends.base import FEATURES, Limits
from ..masks import ALIGNMENTS, Dense, Documents, KeyLengths, KeyPadding, Mask, MaskMod, Rule, Window, causal, joined
from ..scores import ALiBi, Bias, RelativeBias, TensorBias
from ..spec import AttentionSpec
from .record import DRAWN, placed

try:
    from hypothesis import strategies as st
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("flashmha.testing draws with hypothesis: pip install 'flashmha[test]'") from error

MASKS = {
    "causal": 3,
    "window": 4,  # two bounds
    "key_padding": 3,
    "key_lengths": 3,
    "dense_mask": 3,
    "rule": 2,
    "documents": 5,  # only a batch of 1 can hold them
}
"""Kinds of masks, and how many problems in six have one.

Hypothesis makes most examples by changing a few things in one before, so that of fifty no more than a dozen are
strangers to one another. What is to be met in every run must be common.
"""
EMPTY = (*(None,) * 37, "batch", "seqlen_q", "seqlen_k")
"""Which axis is as short as the limits allow, 0 where they can: one problem in thirteen."""
REACH = (0, 1, 2, 3, 5)
"""How far a window may reach, where it ends at all."""
LAYOUTS = ("contiguous", "heads first", "packed", "expanded")
"""How the memory of q, k and v may lie: as named, as SDPA's transposed, as slices of one tensor, with a stride of 0."""
Choose = Callable[[Sequence[Any]], Any]
"""Takes one of some options: drawn, or always the same."""


def seeds() -> st.SearchStrategy[int]:
    """Seeds of the tensors of one problem."""
    return st.integers(0, 2**16)


@st.composite
def masks(
    draw: st.DrawFn,
    *,
    batch: int,
    heads: int,
    seqlen_q: int,
    seqlen_k: int,
    features: frozenset[str] = frozenset(FEATURES),
    device: torch.device | str | None = None,
) -> Mask | None:
    """Masks of every kind out of ``features`` for a problem of these sizes, alone and combined."""
    seed = draw(seeds())
    kinds = [kind for kind in MASKS if kind in features and (kind != "documents" or batch == 1)]
    if kinds and draw(st.sampled_from((False, False, False, True))):
        chosen = [draw(st.sampled_from([kind for kind in kinds for _ in range(4 if kind == "causal" else 1)]))]
    else:
        chosen = [kind for kind in kinds if draw(st.integers(1, 6)) > 6 - MASKS[kind]]
    if "causal" in chosen and "window" in features and draw(st.booleans()):
        chosen[chosen.index("causal")] = "top-left causal"
    sizes = {"batch": batch, "heads": heads, "seqlen_q": seqlen_q, "seqlen_k": seqlen_k}
    ends = (*REACH, max(seqlen_q, seqlen_k), None)
    return joined(
        *[rule(kind, chooser(draw), seed, reach=ends, aligns=ALIGNMENTS, device=device, **sizes) for kind in chosen]
    )


def chooser(draw: st.DrawFn) -> Choose:
    return lambda options: draw(st.sampled_from(options))


def rule(
    kind: str,
    choose: Choose,
    seed: int,
    *,
    batch: int,
    heads: int,
    seqlen_q: int,
    seqlen_k: int,
    reach: Sequence[int | None] = REACH,
    aligns: Sequence[str] = ALIGNMENTS[:1],
    device: torch.device | str | None = None,
) -> Mask:
    """A mask of one kind out of ``MASKS``, or ``top-left causal``, or ``mask for all heads``.

    Its numbers are chosen, its tensors seeded.
    """
    where = placed(device)
    generator = torch.Generator("cpu").manual_seed(seed)

    def coin(*shape: int) -> Tensor:
        share: float = choose((0.7, 0.4, 0.9))
        return (torch.rand(shape, generator=generator, **DRAWN) < share).to(where)

    if kind == "causal":
        return causal()
    if kind == "top-left causal":
        return causal(align="top_left")
    if kind == "window":
        return Window(choose(reach), choose((*(0,) * len(reach), *reach)), align=choose(aligns))
    if kind == "key_padding":
        return KeyPadding(coin(batch, seqlen_k))
    if kind == "key_lengths":
        return KeyLengths(torch.randint(0, seqlen_k + 1, (batch,), generator=generator, device="cpu").to(where))
    if kind in ("dense_mask", "mask for all heads"):
        return Dense(coin(choose((1, batch)), choose((1, heads)) if kind == "dense_mask" else 1, seqlen_q, seqlen_k))
    if kind == "rule":
        return Rule(every(choose((1, 2, 3))), align=choose(aligns))
    number = choose((1, 2, 3, 4))
    return Documents(*(offsets(number, total, generator).to(where) for total in (seqlen_q, seqlen_k)))


def every(step: int) -> MaskMod:
    """A rule: every ``step``-th diagonal, another one for each batch item and head."""
    return lambda batch, head, q_pos, k_pos: (q_pos + k_pos + batch + head) % step == 0


def offsets(documents: int, total: int, generator: torch.Generator) -> Tensor:
    """Where documents start, with empty ones among them and at times a rest that belongs to none."""
    ends = torch.randint(0, total + 1, (documents,), generator=generator, device="cpu").sort().values
    return torch.cat((torch.zeros(1, dtype=ends.dtype, device="cpu"), ends)).to(torch.int32)


@st.composite
def biases(
    draw: st.DrawFn,
    *,
    batch: int,
    heads: int,
    seqlen_q: int,
    seqlen_k: int,
    dtype: torch.dtype,
    needs_grad: bool,
    features: frozenset[str] = frozenset(FEATURES),
    device: torch.device | str | None = None,
) -> Bias | None:
    """Biases of every kind out of ``features``; tensors may hold ``-inf`` and want a gradient."""
    kind = draw(st.sampled_from(("none", "none", "tensor", "alibi", "relative")))
    seed = draw(seeds())
    learned = needs_grad and "bias_grad" in features and draw(st.booleans())
    if kind == "none" or ("alibi" if kind == "alibi" else "bias") not in features:
        return None
    sizes = {"batch": batch, "heads": heads, "seqlen_q": seqlen_q, "seqlen_k": seqlen_k}
    return added(kind, chooser(draw), seed, dtype=dtype, learned=learned, device=device, **sizes)


def added(
    kind: str,
    choose: Choose,
    seed: int,
    *,
    batch: int,
    heads: int,
    seqlen_q: int,
    seqlen_k: int,
    dtype: torch.dtype,
    learned: bool,
    device: torch.device | str | None = None,
) -> Bias:
    """A bias of one kind: ``tensor``, ``relative`` or ``alibi``, which nobody learns."""
    device = placed(device)
    generator = torch.Generator("cpu").manual_seed(seed)
    if kind == "tensor":
        shape = (choose((1, batch)), choose((1, heads)), seqlen_q, seqlen_k)
        tensor = torch.randn(shape, generator=generator, **DRAWN).to(dtype)
        if choose((False, True)):
            hidden = torch.rand(shape, generator=generator, **DRAWN) < 0.3
            tensor = tensor.masked_fill(hidden, float("-inf"))
        return TensorBias(tensor.to(device).requires_grad_(learned))
    if kind == "relative":
        table = torch.randn(heads, 2 * choose(range(5)) + 1, generator=generator, **DRAWN)
        return RelativeBias(table.to(device).requires_grad_(learned))
    return ALiBi(torch.rand(heads, generator=generator, **DRAWN).to(device))


@st.composite
def specs(
    draw: st.DrawFn,
    *,
    limits: Limits | None = None,
    device: torch.device | str | None = None,
    head_dims: Sequence[int] = (1, 3, 8, 16, 40, 64),
    longest: int = 33,
) -> AttentionSpec:
    """Problems: sizes (0 and 1 among them), dtypes, grouped heads, masks, biases, softcap, sinks, gradients.

    ``limits`` (a backend's) keeps the draw to what that backend serves; without it every problem may come.
    """
    limits = get("naive").limits if limits is None else limits
    device = placed(device)
    features = limits.features - limits.not_on.get(device.type, frozenset())
    largest = max(head_dims) if limits.head_dim is None else limits.head_dim
    sizes_d = [d for d in head_dims if limits.head_dim_min <= d <= largest and d % limits.head_dim_step == 0]
    heads_kv, group = draw(st.integers(1, 3)), draw(st.integers(1, 3)) if "gqa" in features else 1
    seqlens = st.integers(max(1, limits.seqlen_min), longest)
    empty = draw(st.sampled_from(EMPTY))
    heads, dtype = heads_kv * group, draw(st.sampled_from(limits.dtypes))
    likely = st.sampled_from((False, True, True))
    needs_grad = "backward" in features and draw(likely)
    seqlen_q = draw(seqlens)
    sizes: dict[str, Any] = {
        "batch": max(draw(st.sampled_from((1, 2, 1, 3))), limits.batch_min),
        "heads": heads,
        "seqlen_q": seqlen_q,
        "seqlen_k": draw(st.just(seqlen_q) | seqlens | seqlens),
    }
    if empty is not None:
        sizes[empty] = limits.batch_min if empty == "batch" else limits.seqlen_min
    head_dim = draw(st.sampled_from(sizes_d))
    sinks = sink_values(heads, draw(seeds()), device)
    need_lse = "lse" in features and draw(likely)
    return AttentionSpec(
        **sizes,
        heads_kv=heads_kv,
        head_dim=head_dim,
        head_dim_v=draw(st.just(head_dim) | st.sampled_from(sizes_d)) if "head_dim_v" in features else head_dim,
        dtype=dtype,
        device=device,
        mask=draw(masks(**sizes, features=features, device=device)),
        bias=draw(biases(**sizes, dtype=dtype, needs_grad=needs_grad, features=features, device=device)),
        softcap=draw(st.none() | st.sampled_from((1.0, 20.0))) if "softcap" in features else None,
        sinks=draw(st.none() | st.just(sinks)) if "sinks" in features else None,
        softmax_scale=draw(st.none() | st.sampled_from((0.05, 1.0))),
        needs_grad=needs_grad,
        need_lse=need_lse and not (needs_grad and "lse_grad" not in features),
        deterministic=needs_grad and "deterministic" in features and draw(st.sampled_from((False, False, True))),
    )


def sink_values(heads: int, seed: int, device: torch.device) -> Tensor:
    return torch.randn(heads, generator=torch.Generator("cpu").manual_seed(seed), **DRAWN).to(device)


def tensors(spec: AttentionSpec, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v of a problem, out of a seed that also says how their memory lies."""
    generator = torch.Generator("cpu").manual_seed(seed)
    layout = LAYOUTS[seed % len(LAYOUTS)]
    shapes = (
        (spec.batch, spec.seqlen_q, spec.heads, spec.head_dim),
        (spec.batch, spec.seqlen_k, spec.heads_kv, spec.head_dim),
        (spec.batch, spec.seqlen_k, spec.heads_kv, spec.head_dim_v),
    )
    made = []
    for batch, seqlen, heads, head_dim in shapes:
        if layout == "heads first":
            x = torch.randn(batch, heads, seqlen, head_dim, generator=generator, **DRAWN).transpose(1, 2)
        elif layout == "packed":
            x = torch.randn(batch, seqlen, heads + 1, head_dim, generator=generator, **DRAWN)[:, :, 1:]
        elif layout == "expanded":
            x = torch.randn(1, seqlen, heads, head_dim, generator=generator, **DRAWN).expand(batch, -1, -1, -1)
        else:
            x = torch.randn(batch, seqlen, heads, head_dim, generator=generator, **DRAWN)
        made.append(x.to(device=spec.device, dtype=spec.dtype))
    return made[0], made[1], made[2]

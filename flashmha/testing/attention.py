"""Problems of attention as Hypothesis strategies: sizes, masks, biases, whole specs, and the tensors of a seed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends import get
from ..backends.base import FEATURES, Limits
from ..masks import Dense, Documents, KeyLengths, KeyPadding, Mask, MaskMod, Rule, Window, causal
from ..scores import ALiBi, Bias, RelativeBias, TensorBias
from ..spec import AttentionSpec

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
LAYOUTS = ("contiguous", "heads first", "packed", "expanded")
"""How the memory of q, k and v may lie: as named, as SDPA's transposed, as slices of one tensor, with a stride of 0."""


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
    device: torch.device | str = "cpu",
) -> Mask | None:
    """Masks of every kind out of ``features`` for a problem of these sizes, and their combinations."""
    reach = st.sampled_from((0, 1, 2, 3, 5, max(seqlen_q, seqlen_k), None))
    align = st.sampled_from(("bottom_right", "top_left"))
    generator = torch.Generator()
    seed = draw(seeds())

    def coin(*shape: int) -> Tensor:
        return (torch.rand(shape, generator=generator) < draw(st.sampled_from((0.7, 0.4, 0.9)))).to(device)

    parts: list[Mask] = []
    for kind, often in MASKS.items():
        generator.manual_seed(seed)  # of each its own, so that one can be left out without changing the others
        if kind not in features or draw(st.integers(1, 6)) <= 6 - often or (kind == "documents" and batch != 1):
            continue
        if kind == "causal":
            parts.append(causal(align=draw(align) if "window" in features else "bottom_right"))
        elif kind == "window":
            parts.append(Window(draw(reach), draw(st.just(0) | reach), align=draw(align)))
        elif kind == "key_padding":
            parts.append(KeyPadding(coin(batch, seqlen_k)))
        elif kind == "key_lengths":
            parts.append(KeyLengths(torch.randint(0, seqlen_k + 1, (batch,), generator=generator).to(device)))
        elif kind == "dense_mask":
            shape = (draw(st.sampled_from((1, batch))), draw(st.sampled_from((1, heads))), seqlen_q, seqlen_k)
            parts.append(Dense(coin(*shape)))
        elif kind == "rule":
            parts.append(Rule(every(draw(st.integers(1, 3))), align=draw(align)))
        else:
            number = draw(st.integers(1, 4))
            ends = [offsets(number, total, generator).to(device) for total in (seqlen_q, seqlen_k)]
            parts.append(Documents(*ends))
    mask: Mask | None = None
    for part in parts:
        mask = part if mask is None else mask & part
    return mask


def every(step: int) -> MaskMod:
    """A rule: every ``step``-th diagonal, another one for each batch item and head."""
    return lambda batch, head, q_pos, k_pos: (q_pos + k_pos + batch + head) % step == 0


def offsets(documents: int, total: int, generator: torch.Generator) -> Tensor:
    """Where documents start, with empty ones among them and at times a rest that belongs to none."""
    ends = torch.randint(0, total + 1, (documents,), generator=generator).sort().values
    return torch.cat((torch.zeros(1, dtype=ends.dtype), ends)).to(torch.int32)


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
    device: torch.device | str = "cpu",
) -> Bias | None:
    """Biases of every kind out of ``features``; tensors may hold ``-inf`` and want a gradient."""
    kind = draw(st.sampled_from(("none", "none", "tensor", "alibi", "relative")))
    generator = torch.Generator().manual_seed(draw(seeds()))
    learned = needs_grad and "bias_grad" in features and draw(st.booleans())
    if kind == "tensor" and "bias" in features:
        shape = (draw(st.sampled_from((1, batch))), draw(st.sampled_from((1, heads))), seqlen_q, seqlen_k)
        tensor = torch.randn(shape, generator=generator).to(dtype)
        if draw(st.booleans()):
            tensor = tensor.masked_fill(torch.rand(shape, generator=generator) < 0.3, float("-inf"))
        return TensorBias(tensor.to(device).requires_grad_(learned))
    if kind == "relative" and "bias" in features:
        table = torch.randn(heads, 2 * draw(st.integers(0, 4)) + 1, generator=generator)
        return RelativeBias(table.to(device).requires_grad_(learned))
    if kind == "alibi" and "alibi" in features:
        return ALiBi(torch.rand(heads, generator=generator).to(device))
    return None


@st.composite
def specs(
    draw: st.DrawFn,
    *,
    limits: Limits | None = None,
    device: torch.device | str = "cpu",
    head_dims: Sequence[int] = (1, 3, 8, 16, 40, 64),
    longest: int = 33,
) -> AttentionSpec:
    """Problems: sizes (0 and 1 among them), dtypes, grouped heads, masks, biases, softcap, sinks, gradients.

    ``limits`` (a backend's) keeps the draw to what that backend serves; without it every problem may come.
    """
    limits = get("naive").limits if limits is None else limits
    device = torch.device(device)
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
    sinks = torch.randn(heads, generator=torch.Generator().manual_seed(draw(seeds()))).to(device)
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
    )


def tensors(spec: AttentionSpec, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v of a problem, out of a seed that also says how their memory lies."""
    generator = torch.Generator().manual_seed(seed)
    layout = LAYOUTS[seed % len(LAYOUTS)]
    shapes = (
        (spec.batch, spec.seqlen_q, spec.heads, spec.head_dim),
        (spec.batch, spec.seqlen_k, spec.heads_kv, spec.head_dim),
        (spec.batch, spec.seqlen_k, spec.heads_kv, spec.head_dim_v),
    )
    made = []
    for batch, seqlen, heads, head_dim in shapes:
        if layout == "heads first":
            x = torch.randn(batch, heads, seqlen, head_dim, generator=generator).transpose(1, 2)
        elif layout == "packed":
            x = torch.randn(batch, seqlen, heads + 1, head_dim, generator=generator)[:, :, 1:]
        elif layout == "expanded":
            x = torch.randn(1, seqlen, heads, head_dim, generator=generator).expand(batch, -1, -1, -1)
        else:
            x = torch.randn(batch, seqlen, heads, head_dim, generator=generator)
        made.append(x.to(device=spec.device, dtype=spec.dtype))
    return made[0], made[1], made[2]

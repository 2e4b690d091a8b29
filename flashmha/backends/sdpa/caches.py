"""Rows of a cache, up to their lengths, for the flash-attn 2 inside torch, which reads keys where they lie."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ...host.kernels import lined_up
from ...host.torch_state import surely
from ...problem.spec import AttentionSpec
from ..rewrites.caches import CACHED, caches_exceeded, lies_in_cache, page_table
from ..rewrites.grouped import MOST_FOLDED_QUERIES, fold, folds, unfold
from .packed import runs_packed, takes_packed

BESIDE_LENGTHS = frozenset((*CACHED, "key_lengths", "causal", "window", "gqa"))
"""Features of the problems that it reads so."""
PAGE_STEP = 256
"""What that kernel wants the size of a page to be a multiple of."""
FULL = 64
"""Batch items times heads from which on a kernel that splits no keys keeps a GPU busy."""
DEAR_KEYS = 2**22
"""Numbers in the keys of a problem that a GPU reads for as long as Python launches a kernel."""


@functools.cache
def takes() -> frozenset[str]:
    """The arguments of torch's kernel, which grew from release to release."""
    schema = torch.ops.aten._flash_attention_forward.default._schema
    return frozenset(argument.name for argument in schema.arguments)


takes._dynamo_marked_constant = True  # type: ignore[attr-defined]  # torch.compiler.assume_constant_result, unimported


def reads_cache(spec: AttentionSpec) -> bool:
    """A problem on a GPU is read where its keys lie; else SDPA is handed a mask, and keys are copied out of pages."""
    return spec.device.type == "cuda" and readable_cache(spec) and runs_packed(spec.head_dim, spec.device.index)


def readable_cache(spec: AttentionSpec) -> bool:
    """Such a kernel serves a problem, and keeps a GPU busy with it: on paper."""
    if "key_lengths" not in spec.needs or not spec.features <= BESIDE_LENGTHS or spec.aten_only:
        return False
    if not takes_packed(spec.dtype, spec.head_dim) or 0 in (spec.batch, spec.seqlen_q, spec.seqlen_k):
        return False
    if not lies_in_cache(spec) and not surely(spec.seqlen_q <= MOST_FOLDED_QUERIES):
        return False  # padding, which is packed
    # beyond it a bound of a window turns unbounded inside the kernel (flash-attention#895)
    if caches_exceeded(spec) or (spec.window is not None and not surely(spec.seqlen_q <= spec.seqlen_k)):
        return False
    pages = spec.pages
    if pages is not None:
        fits = not pages.page_size % PAGE_STEP and takes().issuperset(("block_table", "num_splits"))
        return fits and fills(spec)
    return fills(spec) or (surely(spec.seqlen_q == 1) and spec.heads != spec.heads_kv and spec.window is None)


def fills(spec: AttentionSpec) -> bool:
    """A program for each batch item and head fills a GPU; for one query of grouped heads the kernel splits keys."""
    return surely(spec.batch * (spec.heads_kv if folded(spec) else spec.heads) >= FULL)


def folded(spec: AttentionSpec) -> bool:
    """Heads of a group go to the kernel as rows; of one query it folds them by itself."""
    return spec.window is None and folds(spec) and not surely(spec.seqlen_q == 1)


def masks_dear_keys(spec: AttentionSpec) -> bool:
    """A mask would hide keys of a cache from few queries, and all of them would be read."""
    if lies_in_cache(spec):
        return True
    few = "key_lengths" in spec.needs and not spec.needs_grad and surely(spec.seqlen_q <= MOST_FOLDED_QUERIES)
    return few and surely(spec.batch * spec.seqlen_k * spec.heads_kv * spec.head_dim >= DEAR_KEYS)


def attend_to_lengths(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
    """A problem of ``reads_cache``: rows end where their length says, causality and windows with them.

    Splits of keys in pages leave rows unwritten (pytorch#194167).
    """
    groups = spec.heads // spec.heads_kv if folded(spec) else 1
    rows = fold(q, groups) if groups > 1 else q
    batch, seqlen_q = rows.shape[:2]
    table, window = page_table(spec), spec.window
    left, right = (None, None) if window is None else (window.left, window.right)
    causal = left is None and right == 0
    if table is None:
        k, v = k.flatten(0, 1), v.flatten(0, 1)
    k, v = lined_up(k), lined_up(v)
    out: Tensor = torch.ops.aten._flash_attention_forward(
        rows.flatten(0, 1).contiguous(),
        k,
        v,
        starts(batch, seqlen_q, q.device),
        starts(batch, spec.seqlen_k, q.device),
        seqlen_q,
        spec.seqlen_k,
        0.0,
        causal,
        False,
        scale=spec.scale,
        window_size_left=-1 if left is None else left,
        window_size_right=-1 if right is None or causal else right,
        seqused_k=spec.key_lengths(),
        **({} if table is None else {"block_table": table, "num_splits": 1}),
    )[0]
    out = out.view(batch, seqlen_q, *out.shape[1:])
    return unfold(out, groups) if groups > 1 else out


def starts(rows: int, length: int, device: torch.device) -> Tensor:
    """Where rows of one length begin, and the last ends: (rows + 1,) int32."""
    return torch.arange(0, rows * length + 1, length, dtype=torch.int32, device=device)

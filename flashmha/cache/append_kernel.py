"""The Triton kernel that puts tokens behind those of each row; importing this imports triton."""

from __future__ import annotations

import triton
import triton.language as tl

ANY_SIZE = "heads seqlen capacity".split()  # noqa: SIM905
"""Arguments whose value shall not make another kernel."""


@triton.jit(do_not_specialize=ANY_SIZE)
def append_kernel(
    k: tl.tensor,
    v: tl.tensor,
    k_store: tl.tensor,
    v_store: tl.tensor,
    lengths: tl.tensor,
    ends: tl.tensor,
    k_b: tl.tensor,
    k_s: tl.tensor,
    k_h: tl.tensor,
    v_b: tl.tensor,
    v_s: tl.tensor,
    v_h: tl.tensor,
    to_k_b: tl.tensor,
    to_k_s: tl.tensor,
    to_k_h: tl.tensor,
    to_v_b: tl.tensor,
    to_v_s: tl.tensor,
    to_v_h: tl.tensor,
    heads: tl.tensor,
    seqlen: tl.tensor,
    capacity: tl.tensor,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    DIMS: tl.constexpr,
    DIMS_V: tl.constexpr,
) -> None:
    """Copy one token of a row, all its heads; ``ends`` are the lengths behind the step.

    One program a token. A token for which there is no slot stops the device, as an index out of bounds does.
    """
    row, token = (tl.program_id(0) // seqlen).to(tl.int64), (tl.program_id(0) % seqlen).to(tl.int64)
    length = tl.load(lengths + row)
    slot = length.to(tl.int64) + token
    if slot >= capacity:
        tl.inline_asm_elementwise("trap; mov.u32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1)
    if token == 0:
        tl.store(ends + row, length + seqlen)
    dims, dims_v = tl.arange(0, DIMS), tl.arange(0, DIMS_V)
    for first in range(0, heads, HEADS):
        head = first + tl.arange(0, HEADS)
        inside = (head < heads)[:, None]
        steps = head[:, None].to(tl.int64)
        real, real_v = inside & (dims < HEAD_DIM)[None, :], inside & (dims_v < HEAD_DIM_V)[None, :]
        taken = tl.load(k + row * k_b + token * k_s + steps * k_h + dims[None, :], mask=real)
        tl.store(k_store + row * to_k_b + slot * to_k_s + steps * to_k_h + dims[None, :], taken, mask=real)
        taken_v = tl.load(v + row * v_b + token * v_s + steps * v_h + dims_v[None, :], mask=real_v)
        tl.store(v_store + row * to_v_b + slot * to_v_s + steps * to_v_h + dims_v[None, :], taken_v, mask=real_v)

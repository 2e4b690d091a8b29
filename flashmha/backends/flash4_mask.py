"""The mask of intervals as flash-attn 4 compiles it into a kernel; imported where one is needed, with the package."""

import cutlass
import cutlass.cute as cute
from flash_attn.cute import utils


@cute.jit  # type: ignore[untyped-decorator]
def within(batch, head, q_idx, kv_idx, seqlen_info, aux_tensors):  # type: ignore[no-untyped-def]
    """The query lies between the first and the last that may look at the key; see ``compact.Intervals``."""
    first = utils.scalar_to_ssa(aux_tensors[0][batch[0], kv_idx[0]], cutlass.Int32)
    last = utils.scalar_to_ssa(aux_tensors[1][batch[0], kv_idx[0]], cutlass.Int32)
    return (q_idx >= first) & (q_idx <= last)

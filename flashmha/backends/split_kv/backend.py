"""split_kv: few queries over many keys, which are read once and where they lie, as in a cache."""

from __future__ import annotations

import torch
from torch import Tensor

from ...host.kernels import padded, why_no_kernels
from ...host.torch_state import is_compiling, surely
from ...problem.cached import OwnTokens
from ...problem.spec import AttentionSpec
from ...problem.wording import say_size
from ..base import Backend, Serve
from ..limits import Limits
from .launches import SplitCall, attend
from .tilings import MOST_QUERY_BYTES, MOST_QUERY_ROWS


class SplitKV(Backend):
    """A kernel of this package's own, in Triton: the keys of each row are split among programs by its own length.

    Lengths stay on the device. A tile of keys is read once for all queries of a group of heads.
    """

    name = measured_as = "split_kv"
    compiles, reads_caches, reads_late = "steps", True, True
    judges_by_outline = results_checked = yields_small_weights = True
    limits = Limits(
        devices=("cuda",),
        dtypes=(torch.float32, torch.bfloat16, torch.float16),
        features=frozenset(
            "causal window key_lengths cache pages own_tokens alibi softcap sinks gqa head_dim_v lse".split()  # noqa: SIM905
        ),
        head_dim=256,
        seqlen_min=1,
        batch_min=1,
    )
    remark = f"inference; at most {MOST_QUERY_ROWS} queries times heads of a group"

    def limits_exceeded(self, spec: AttentionSpec) -> list[str]:
        reasons = super().limits_exceeded(spec)
        group = spec.heads // spec.heads_kv
        most = min(MOST_QUERY_ROWS, MOST_QUERY_BYTES // (padded(max(1, spec.head_dim)) * spec.dtype.itemsize))
        if not surely(spec.seqlen_q * group <= most):
            reasons.append(f"{say_size('seqlen_q', spec.seqlen_q)} times {group} heads of a group (at most {most})")
        if spec.mask is not None and sum(isinstance(part, OwnTokens) for part in spec.mask.parts) > 1:
            reasons.append("more than one table of own tokens (one)")
        if spec.bias is not None and len(spec.bias.parts) > 1:
            reasons.append("more than one bias (one ALiBi)")
        return reasons

    def why_not_here(self, device: torch.device) -> str | None:
        return super().why_not_here(device) or why_no_kernels(device.type, device.index)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor | tuple[Tensor, Tensor]:
        return attend(q, k, v, spec)

    def prepare(self, spec: AttentionSpec) -> Serve:
        return super().prepare(spec) if is_compiling() else SplitCall.of(spec, spec.device)

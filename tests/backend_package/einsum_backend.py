"""einsum: a backend of another package."""

import torch
from torch import Tensor

from flashmha import AttentionSpec, Backend, Limits


class Einsum(Backend):
    """Two einsums and a softmax."""

    name = "einsum"
    contract = 1
    install = "pip install einsum-backend"
    limits = Limits(
        devices=("cpu", "cuda"),
        dtypes=(torch.float32, torch.float64),
        features=frozenset({"backward", "causal", "window", "key_lengths", "dense_mask"}),
        head_dim=128,
    )

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
        score = torch.einsum("bqhd,bkhd->bhqk", q, k) * spec.scale
        allowed = spec.allowed()
        if allowed is None:
            return torch.einsum("bhqk,bkhd->bqhd", score.softmax(-1), v)
        blind = ~allowed.any(-1, keepdim=True)
        weights = score.masked_fill(~allowed, float("-inf")).masked_fill(blind, 0.0).softmax(-1)
        return torch.einsum("bhqk,bkhd->bqhd", weights.masked_fill(blind, 0.0), v)

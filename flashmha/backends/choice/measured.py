"""The measured table for Hopper in half precision, out of the committed files."""

from __future__ import annotations

from ..base import HALF
from .ranking import Row, Table

SOURCE = "benchmarks/results/ranking_h100.json"
MASKS = "benchmarks/results/ranking_masks_h200.json"
PACKED = "benchmarks/results/ranking_documents_h200.json"
WIDE = "benchmarks/results/ranking_192_h200.json"
BOTH = ("eval", "train")
PLAIN = ("dense", "causal")
EVAL, TRAIN = ("eval",), ("train",)

TABLE = Table(
    name=f"built in, of {SOURCE} and those beside it",
    device="cuda",
    dtypes=HALF,
    capability=9,
    rows=(
        # cuDNN, behind sdpa, where there is little to do for each key
        Row(("decode",), EVAL, ("sdpa", "flash2", "flash3", "flash4"), SOURCE, keys=8192),
        Row(("decode",), EVAL, ("flash2", "flash3", "flash4", "sdpa"), SOURCE),
        Row(PLAIN, EVAL, ("sdpa", "flash3", "flash4", "flash2"), SOURCE, keys=1024),
        Row(PLAIN, EVAL, ("flash3", "flash4", "sdpa", "flash2"), SOURCE),
        Row(PLAIN, TRAIN, ("sdpa", "flash4", "flash3", "flash2"), SOURCE, head_dim=64, keys=512),
        Row(PLAIN, TRAIN, ("flash4", "flash3", "sdpa", "flash2"), SOURCE, head_dim=64),
        Row(PLAIN, TRAIN, ("sdpa", "flash4", "flash3", "flash2"), SOURCE, head_dim=128, keys=1024),
        Row(PLAIN, TRAIN, ("flash4", "flash3", "sdpa", "flash2"), SOURCE, head_dim=128),
        Row(("causal",), TRAIN, ("sdpa", "flash4"), WIDE, head_dim=192, keys=1024),
        Row(PLAIN, TRAIN, ("flash4", "sdpa"), WIDE, head_dim=192),
        Row(PLAIN, TRAIN, ("sdpa", "flash4", "flash3", "flash2"), SOURCE),
        Row(("padded",), EVAL, ("flash4", "flash3", "sdpa", "flash2"), MASKS),
        Row(("padded",), TRAIN, ("flash4", "sdpa", "flash3", "flash2"), MASKS),
        Row(("mask tensor",), BOTH, ("flash4", "sdpa", "flex"), MASKS),
        Row(("window",), TRAIN, ("flash4", "flash2", "flash3", "flex", "sdpa"), SOURCE, head_dim=64),
        Row(("window",), TRAIN, ("flash2", "flash4", "flash3", "flex", "sdpa"), SOURCE, head_dim=128),
        Row(("documents",), EVAL, ("flash3", "flash4", "sdpa", "flash2", "flex"), PACKED),
        Row(("documents",), TRAIN, ("flash4", "sdpa", "flash2", "flex"), PACKED, head_dim=64),
        Row(("documents",), TRAIN, ("sdpa", "flash4", "flash2", "flex"), PACKED, keys=1024),
        Row(("documents",), TRAIN, ("flash4", "sdpa", "flash2", "flex"), PACKED),
        Row(("padded causal", "window"), BOTH, ("flash4", "flash3", "flash2", "flex", "sdpa"), SOURCE),
    ),
)
"""The machines this package was measured on: Hopper, in half precision.

The first of a row is at most a fifth slower than the fastest in the cells it covers. ``MARGIN`` would make 54 rows of
the first file, most of which tell the noise of one run from that of the next.
"""

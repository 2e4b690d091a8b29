"""The measured table for Hopper in half precision, out of the committed files."""

from __future__ import annotations

from ..limits import HALF
from .ranking import Row, Table

ON_H100 = "benchmarks/results/ranking_h100.json"
MASKS_ON_H200 = "benchmarks/results/ranking_masks_h200.json"
DOCUMENTS_ON_H200 = "benchmarks/results/ranking_documents_h200.json"
WINDOWS_ON_H200 = "benchmarks/results/ranking_windows_h200.json"
WIDE_ON_H200 = "benchmarks/results/ranking_192_h200.json"
STEPS_ON_H200 = "benchmarks/results/ranking_steps_h200.json"
BOTH_MODES = ("eval", "train")
UNMASKED = ("dense", "causal")
EVAL, TRAIN = ("eval",), ("train",)

TABLE = Table(
    name=f"built in, of {ON_H100} and those beside it",
    device="cuda",
    dtypes=HALF,
    capability=9,
    rows=(
        Row(("decode", "cached"), EVAL, ("split_kv", "flash2", "flash3", "flash4", "sdpa"), STEPS_ON_H200),
        Row(UNMASKED, EVAL, ("sdpa", "flash3", "flash4", "flash2"), ON_H100, keys=1024),
        Row(UNMASKED, EVAL, ("flash3", "flash4", "sdpa", "flash2"), ON_H100),
        Row(UNMASKED, TRAIN, ("sdpa", "flash4", "flash3", "flash2"), ON_H100, head_dim=64, keys=512),
        Row(UNMASKED, TRAIN, ("flash4", "flash3", "sdpa", "flash2"), ON_H100, head_dim=64),
        Row(UNMASKED, TRAIN, ("sdpa", "flash4", "flash3", "flash2"), ON_H100, head_dim=128, keys=1024),
        Row(UNMASKED, TRAIN, ("flash4", "flash3", "sdpa", "flash2"), ON_H100, head_dim=128),
        Row(("causal",), TRAIN, ("sdpa", "flash4"), WIDE_ON_H200, head_dim=192, keys=1024),
        Row(UNMASKED, TRAIN, ("flash4", "sdpa"), WIDE_ON_H200, head_dim=192),
        Row(UNMASKED, TRAIN, ("sdpa", "flash4", "flash3", "flash2"), ON_H100),
        Row(("padded",), EVAL, ("flash4", "flash3", "sdpa", "flash2"), MASKS_ON_H200),
        Row(("padded",), TRAIN, ("flash4", "sdpa", "flash3", "flash2"), MASKS_ON_H200),
        Row(("mask tensor",), BOTH_MODES, ("flash4", "sdpa", "flex"), MASKS_ON_H200),
        Row(("window",), TRAIN, ("flash4", "flash2"), WINDOWS_ON_H200, head_dim=128),
        Row(("documents",), EVAL, ("flash3", "flash4", "sdpa", "flash2", "flex"), DOCUMENTS_ON_H200),
        Row(("documents",), TRAIN, ("flash4", "sdpa", "flash2", "flex"), DOCUMENTS_ON_H200, head_dim=64),
        Row(("documents",), TRAIN, ("sdpa", "flash4", "flash2", "flex"), DOCUMENTS_ON_H200, keys=1024),
        Row(("documents",), TRAIN, ("flash4", "sdpa", "flash2", "flex"), DOCUMENTS_ON_H200),
        Row(("padded causal", "window"), BOTH_MODES, ("flash4", "flash3", "flash2", "flex", "sdpa"), ON_H100),
    ),
)
"""The machines this package was measured on: Hopper, in half precision.

The first of a row is at most a fifth slower than the fastest in the cells it covers. ``MARGIN`` would make 54 rows of
the first file, most of which tell the noise of one run from that of the next.
"""

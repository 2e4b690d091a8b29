"""Measure half-precision layers on a CPU, computed in their own dtype and in float32 between input and output.

``python scripts/half_precision.py FILE`` writes the ratios that ``layer/precision.py`` cites: one thread, both ways and
the stock layer in alternation within one process, one process for each set of instructions.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

import flashmha
from flashmha.benchmark.environment import processor
from flashmha.host.clock import quiet_machine, seconds
from flashmha.problem.wording import dtype_name

CPU = torch.device("cpu")
INSTRUCTIONS = {
    "all of this CPU": {},
    "AVX512 without BF16": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
    "AVX2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"},
}
"""What oneDNN and PyTorch are told to use."""
SHAPES = ((1, 8, 64, 4), (4, 197, 192, 3), (4, 128, 512, 8), (1, 512, 512, 8))
"""(batch, seqlen, embed_dim, heads)."""
ROUNDS, BLOCK = 30, 0.005
"""Turns of each way, and the seconds that the calls of one turn take together, about."""


def measure(dtype: torch.dtype, training: bool, shape: tuple[int, ...]) -> dict[str, float]:
    """Times of the layer's own dtype and of stock, as multiples of the time in float32."""
    batch, seqlen, embed_dim, heads = shape
    torch.manual_seed(0)
    stock = nn.MultiheadAttention(embed_dim, heads, batch_first=True, dtype=dtype).train(training)
    ours = flashmha.FlashMultiHeadAttention(embed_dim, heads, batch_first=True, dtype=dtype).train(training)
    ours.load_state_dict(stock.state_dict())
    x = torch.randn(batch, seqlen, embed_dim).to(dtype).requires_grad_(training)
    arriving = torch.randn(x.shape).to(dtype)

    def call(layer: nn.Module, in_float32: bool) -> None:
        without = mock.patch.multiple(  # AMX serves both dtypes
            torch.cpu, _is_amx_tile_supported=lambda: not in_float32, _is_avx512_bf16_supported=lambda: False
        )
        with without, torch.inference_mode(not training):
            out = layer(x, x, x, need_weights=False)[0]
            if training:
                out.backward(arriving)

    ways = {
        "float32": lambda: call(ours, True),
        "own dtype": lambda: call(ours, False),
        "stock": lambda: call(stock, False),
    }
    calls = {}
    for name, way in ways.items():
        way()
        calls[name] = max(1, min(200, round(BLOCK / max(1e-6, seconds(way, 1, CPU)))))
    times: dict[str, list[float]] = {name: [] for name in ways}
    shuffler = random.Random(0)
    for _ in range(ROUNDS):
        for name in shuffler.sample(list(ways), len(ways)):
            times[name].append(seconds(ways[name], calls[name], CPU))
    middle = {name: statistics.median(each) for name, each in times.items()}
    found = {name: round(middle[name] / middle["float32"], 2) for name in ("own dtype", "stock")}
    return {"float32_us": float(f"{middle['float32'] * 1e6:.3g}"), **found}


def rows() -> list[dict[str, Any]]:
    """Every dtype, pass and shape with the instructions of this process."""
    found = []
    with quiet_machine(CPU):
        for dtype, mode, shape in itertools.product((torch.bfloat16, torch.float16), ("eval", "train"), SHAPES):
            ratios = measure(dtype, mode == "train", shape)
            found.append({"dtype": dtype_name(dtype), "pass": mode, "shape": shape, **ratios})
            print(found[-1], file=sys.stderr, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path, nargs="?", help="where the figures go; none: print this process's rows")
    file = parser.parse_args().file
    if file is None:
        print(json.dumps(rows()))
        return
    found: dict[str, Any] = {
        "what": "times of a layer in half precision as multiples of its time in float32 inside (above 1: float32 wins)",
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "cpu": processor(),
        "amx": torch.cpu._is_amx_tile_supported(),
        "avx512_bf16": torch.cpu._is_avx512_bf16_supported(),
        "torch": str(torch.__version__),
        "flashmha": flashmha.__version__,
        "threads": 1,
        "rounds": ROUNDS,
    }
    measured = {}
    for name, variables in INSTRUCTIONS.items():
        ran = subprocess.run(
            [sys.executable, __file__], env={**os.environ, **variables}, stdout=subprocess.PIPE, text=True, check=True
        )
        measured[name] = json.loads(ran.stdout)
    found["instructions"] = measured
    text = json.dumps(found, indent=1)
    for each in measured.values():  # a row a line
        for row in each:
            text = text.replace(json.dumps(row, indent=1).replace("\n", "\n   "), json.dumps(row))
    file.write_text(f"{text}\n", encoding="utf-8")


if __name__ == "__main__":
    main()

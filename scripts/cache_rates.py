"""How fast a GPU reads the keys of a cache, one query a row, in CUDA graphs: ours, and others.

``python scripts/cache_rates.py FILE`` measures, prints a table and writes FILE as JSON. It takes half a minute.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import flashmha
from flashmha import KeyLengths, Pages
from flashmha.backends import get
from flashmha.benchmark.capture import capture
from flashmha.benchmark.environment import commit, environment
from flashmha.host.clock import seconds
from flashmha.problem.spec import AttentionSpec

SHAPES = (
    (64, 4096, 32, 8, 128),
    (32, 4096, 32, 8, 128),
    (32, 4096, 16, 16, 64),
    (128, 2048, 12, 12, 64),
    (8, 4096, 32, 8, 128),
    (1, 1024, 32, 8, 128),
    (1, 16384, 32, 8, 128),
    (1, 131072, 32, 8, 128),
)
"""Batch, keys, heads, heads of keys, head_dim."""
ROUNDS, PAGE_SIZE = 7, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("file", type=Path)
    file = parser.parse_args().file
    device = torch.device("cuda")
    rows = [measure(shape, device) for shape in SHAPES]
    for row in rows:
        print(row["shape"], {name: f"{1e6 * took:.1f} us" for name, took in row["seconds"].items()})
    found = {
        "date": datetime.date.today().isoformat(),
        "gpu": torch.cuda.get_device_name(),
        "dtype": "bfloat16",
        "rounds": ROUNDS,
        "flashmha": flashmha.__version__,
        **commit(),
        "env": environment(device),
        "rows": rows,
    }
    file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def measure(shape: tuple[int, ...], device: torch.device) -> dict[str, Any]:
    """The seconds of each way to read the keys of one shape, medians of rounds in which all take turns."""
    batch, seqlen, heads, heads_kv, head_dim = shape
    torch.manual_seed(0)
    q = torch.randn(batch, 1, heads, head_dim, device=device, dtype=torch.bfloat16)
    k, v = (torch.randn(batch, seqlen, heads_kv, head_dim, device=device, dtype=torch.bfloat16) for _ in range(2))
    full = torch.full((batch,), seqlen, device=device, dtype=torch.int32)
    drawn = torch.randint(seqlen // 8, seqlen + 1, (batch,), device=device, dtype=torch.int32)
    graphs = {name: in_a_graph(call, device) for name, call in ways(q, k, v, full, drawn).items()}
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(ROUNDS):
        for name, (graph, calls) in graphs.items():
            times[name].append(seconds(graph.replay, 1, device) / calls)
    return {
        "shape": shape,
        "bytes": k.nbytes + v.nbytes,
        "drawn": drawn.double().mean().item() / seqlen,
        "seconds": {name: statistics.median(each) for name, each in times.items()},
    }


def ways(q: Tensor, k: Tensor, v: Tensor, full: Tensor, drawn: Tensor) -> dict[str, Callable[[], Any]]:
    """Calls by name; ``drawn`` are lengths between an eighth and all of a row."""
    ours, group = get("split_kv"), q.shape[2] // k.shape[2]

    def serve(mask: flashmha.Mask, k: Tensor = k, v: Tensor = v) -> Callable[[], Any]:
        spec = AttentionSpec.of(q, k, v, mask=mask)
        return lambda: ours(q, k, v, spec)

    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    folded = [q.view(q.shape[0], k.shape[2], group, q.shape[3]), *heads_first[1:]]
    found = {
        "split_kv": serve(KeyLengths(full)),
        "split_kv drawn": serve(KeyLengths(drawn)),
        "split_kv pages": serve(*in_pages(full, k, v)),
        "sdpa": lambda: F.scaled_dot_product_attention(*heads_first, enable_gqa=group > 1),
    }
    if group > 1:
        found["sdpa folded"] = lambda: F.scaled_dot_product_attention(*folded)
    try:
        from flash_attn import flash_attn_with_kvcache
    except ImportError:
        return found
    found["flash-attn 2"] = lambda: flash_attn_with_kvcache(q, k, v)
    found["flash-attn 2 with lengths"] = lambda: flash_attn_with_kvcache(q, k, v, cache_seqlens=full)
    return found


def in_pages(lengths: Tensor, k: Tensor, v: Tensor) -> tuple[flashmha.Mask, Tensor, Tensor]:
    """The same keys in a pool, its pages in no order."""
    batch, seqlen = k.shape[:2]
    order = torch.randperm(batch * seqlen // PAGE_SIZE, device=k.device)
    pools = []
    for x in (k, v):
        pool = torch.empty(order.shape[0], PAGE_SIZE, *x.shape[2:], device=x.device, dtype=x.dtype)
        pool[order] = x.reshape(pool.shape)
        pools.append(pool)
    return KeyLengths(lengths) & Pages(order.int().view(batch, -1), PAGE_SIZE), pools[0], pools[1]


def in_a_graph(call: Callable[[], Any], device: torch.device) -> tuple[torch.cuda.CUDAGraph, int]:
    """A graph of some calls, and how many: about two milliseconds."""
    call()  # which compiles
    calls = max(4, min(40, int(2e-3 / seconds(call, 5, device))))
    return capture(call, calls)[0], calls


if __name__ == "__main__":
    main()

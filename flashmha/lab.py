"""The four names of the flash-attention lab this package grew out of: is it there, use it, time it, check it.

Tensors are ``(batch, seq_len, num_heads, d_head)``, as everywhere here.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .backends import Backend, expand, get, record
from .backends.parity import AGAIN, allowed_error, moved
from .functional import attention
from .host.torch_state import computed_in
from .problem.windows import causal
from .problem.wording import dtype_name


def has_flash_attention() -> bool:
    """A flash-attn package, of any version, ran a forward on the current CUDA device and its numbers agreed.

    ``False`` on a machine without CUDA. The trial runs once a device; ``python -m flashmha info`` shows its outcome.
    """
    if not torch.cuda.is_available():
        return False
    device = torch.device("cuda", torch.cuda.current_device())
    return any(get(name).why_not_here(device) is None for name in expand("flash_attn"))


class FlashAttentionWrapper(nn.Module):
    """Attention without projections, on the fastest backend that can serve; ``attention`` as a module.

    Args:
        dropout_p: probability of dropping a weight while the module is training; nothing is dropped in eval.
        causal: no key after the query, the last query at the last key.
    """

    def __init__(self, dropout_p: float = 0.0, causal: bool = False) -> None:
        super().__init__()
        if not isinstance(dropout_p, (int, float)) or not 0.0 <= dropout_p <= 1.0:
            raise ValueError(f"dropout_p must be between 0 and 1, got {dropout_p!r}.")
        self.dropout_p = dropout_p
        self.causal = causal

    def forward(self, Q: Tensor, K: Tensor, V: Tensor) -> Tensor:
        """Q, K and V (batch, seq_len, num_heads, d_head) in, the output in the shape of Q."""
        out = attention(
            Q, K, V, mask=causal() if self.causal else None, dropout_p=self.dropout_p if self.training else 0.0
        )
        assert isinstance(out, Tensor)
        return out

    def extra_repr(self) -> str:
        return f"dropout_p={self.dropout_p}, causal={self.causal}"


def compare_outputs(Q: Tensor, K: Tensor, V: Tensor, causal: bool = False) -> dict[str, Any]:
    """The distance of the wrapper's output from the definition's in float64.

    Returns ``max_diff`` and ``mean_diff``, absolute; ``allclose``, whether ``max_diff`` is at most ``tolerance``, the
    rule of parity against the plain formula in the dtype of Q (``backends.parity``); and the ``backend`` that ran.
    """
    with torch.no_grad():
        with record() as calls:
            out = FlashAttentionWrapper(causal=causal)(Q, K, V).double()
        exact, rounding = explicit_attention(Q, K, V, causal)
        eps = torch.finfo(computed_in(Q)).eps
        # one plain run may err little by luck: more of them, on inputs moved by a rounding
        generator = torch.Generator("cpu").manual_seed(0)
        for _ in range(AGAIN):
            q, k, v = (moved(x, generator) for x in (Q, K, V))
            rounding = max(rounding, explicit_attention(q, k, v, causal)[1])
    found: dict[str, Any] = {"max_diff": 0.0, "mean_diff": 0.0, "allclose": True, "tolerance": 1e-5}
    if out.numel():
        diff = (out - exact).abs()
        tolerance = allowed_error("out", rounding, exact.abs().max().item(), eps, Backend.tolerance)
        largest = diff.max().item()
        found = {
            "max_diff": largest,
            "mean_diff": diff.mean().item(),
            "allclose": largest <= tolerance,
            "tolerance": tolerance,
        }
    return {**found, "backend": calls[0].backend}


def explicit_attention(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> tuple[Tensor, float]:
    """The definition in float64, and how far a computation of it in the dtype of q is off."""
    exact = standard(q.double(), k.double(), v.double(), is_causal)
    off = (standard(q, k, v, is_causal).double() - exact).abs()
    return exact, off.max().item() if off.numel() else 0.0


def standard(q: Tensor, k: Tensor, v: Tensor, is_causal: bool = False) -> Tensor:
    """Attention by its definition, with every weight in memory."""
    out = attention(q, k, v, mask=causal() if is_causal else None, backend="naive")
    assert isinstance(out, Tensor)
    return out


def benchmark_attention(
    seq_len: int, d_model: int, num_heads: int, batch_size: int = 1, num_iterations: int = 10
) -> dict[str, Any]:
    """Forward time and peak memory of the plain formula ("standard") and of the wrapper ("flash").

    The two take turns, and each time is the median over ``num_iterations``: on CUDA between events, in bfloat16; on a
    CPU this thread's own time with one thread, in float32. Memory is what a call allocates at its peak, inputs not
    counted.

    Returns ``standard_time_ms``, ``flash_time_ms``, ``speedup`` (standard over flash), ``standard_memory_mb``,
    ``flash_memory_mb`` (2**20 bytes), and what the numbers depend on: ``backend``, ``device``, ``dtype``.
    """
    sizes = {"seq_len": seq_len, "num_heads": num_heads, "batch_size": batch_size, "num_iterations": num_iterations}
    for name, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"{name} must be at least 1, got {size!r}.")
    if not isinstance(d_model, int) or d_model < 1 or d_model % num_heads:
        raise ValueError(f"d_model must be a multiple of num_heads, got d_model={d_model} and num_heads={num_heads}.")
    from .host.clock import peak_bytes, quiet_machine, seconds

    cuda = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    dtype = torch.bfloat16 if cuda else torch.float32
    shape = (3, batch_size, seq_len, num_heads, d_model // num_heads)
    q, k, v = (
        torch.randn(shape, generator=torch.Generator("cpu").manual_seed(0), device="cpu").to(device, dtype).unbind()
    )
    wrapper = FlashAttentionWrapper()
    runs: dict[str, Callable[[], Any]] = {"standard": lambda: standard(q, k, v), "flash": lambda: wrapper(q, k, v)}
    times: dict[str, list[float]] = {name: [] for name in runs}
    memory: dict[str, float] = {}
    with torch.no_grad(), quiet_machine(device):
        with record() as calls:
            wrapper(q, k, v)
        for name, run in runs.items():
            run()
            memory[name] = peak_bytes(run, device) / 2**20
        for _ in range(num_iterations):
            for name, run in runs.items():
                times[name].append(1e3 * seconds(run, 1, device))
    standard_ms, flash_ms = (statistics.median(times[name]) for name in ("standard", "flash"))
    return {
        "standard_time_ms": standard_ms,
        "flash_time_ms": flash_ms,
        "speedup": standard_ms / flash_ms if flash_ms else math.nan,
        "standard_memory_mb": memory["standard"],
        "flash_memory_mb": memory["flash"],
        "backend": calls[0].backend,
        "device": torch.cuda.get_device_name(device) if cuda else "cpu",
        "dtype": dtype_name(dtype),
    }

"""The weights of a problem, tile by tile on the tensor cores of a GPU.

``why_not`` judges the problem and ``why_not_here`` the machine, as a backend's do. The kernels are Triton's, which
torch's builds for CUDA bring; they stand in ``kernels``, imported when the first weights are made.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import operator
from typing import Any

import torch
from torch import Tensor

from ..host.machine import has_triton
from ..problem.masks import Dense, Window
from ..problem.ragged import KeyLengths, KeyPadding
from ..problem.scores import TensorBias
from ..problem.spec import AttentionSpec
from ..problem.wording import dtype_name

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LARGEST_HEAD_DIM = 256
KERNEL_MASKS = (Window, KeyPadding, KeyLengths, Dense)
OLDEST = (8, 0)
"""The compute capability that has tensor cores for bfloat16."""
BAND = 16
"""Tiles of rows whose programs run side by side."""
SPARE = 4096
"""Bytes of shared memory that a kernel needs beside its operands."""


def why_not(spec: AttentionSpec) -> str | None:
    """Why no kernel makes the weights of a problem; ``None`` where one does."""
    if spec.dtype not in KERNEL_DTYPES:
        return f"dtype must be one of {', '.join(map(dtype_name, KERNEL_DTYPES))}, got {dtype_name(spec.dtype)}"
    if not 1 <= spec.head_dim <= LARGEST_HEAD_DIM:
        return f"head_dim must lie between 1 and {LARGEST_HEAD_DIM}, got {spec.head_dim}"
    for part in () if spec.mask is None else spec.mask.parts:
        if not isinstance(part, KERNEL_MASKS):
            return f"no kernel has the mask {part!r}"
    if spec.bias is not None and not isinstance(spec.bias, TensorBias):
        return f"no kernel has the bias {spec.bias!r}"
    if spec.bias is not None and spec.bias.tensor.dtype not in KERNEL_DTYPES:
        return f"no kernel has a bias of {dtype_name(spec.bias.tensor.dtype)}"
    if spec.softcap is not None:
        return "no kernel has a softcap"
    return None if spec.sinks is None else "no kernel has sinks"


def no_gradients(spec: AttentionSpec) -> str | None:
    """Why no kernel makes the gradients of a problem's q and k; ``None`` where one does.

    A tile's gradient has the dtype of q on its way to the tensor cores. float16 has no room for numbers as small as
    those, and nothing multiplies float32 faster than PyTorch.
    """
    return why_not(spec) if spec.dtype == torch.bfloat16 else f"dtype must be bfloat16, got {dtype_name(spec.dtype)}"


@functools.cache
def why_not_here(device: torch.device) -> str | None:
    """Why no kernel runs on a device; found out once."""
    if device.type != "cuda" or torch.version.cuda is None:
        return "needs an NVIDIA GPU"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST:
        return f"compute capability must be at least {OLDEST}, got {capability}"
    if not has_triton():
        return "triton is not installed"
    try:
        import triton

        triton.runtime.driver.active.get_current_device()
    except Exception as error:  # it compiles C here, and a machine without a compiler or Python's headers cannot
        return f"triton does not work: {error}"
    return None


@dataclasses.dataclass(frozen=True)
class Tiling:
    """The cut of a kernel: the rows and keys of a tile, how much of head_dim at a time, warps and pipeline stages."""

    rows: int
    keys: int
    chunk: int
    warps: int
    stages: int

    def shared(self, itemsize: int) -> int:
        """Bytes of shared memory that its operands fill."""
        return self.stages * (self.rows + self.keys) * self.chunk * itemsize

    def options(self) -> dict[str, int]:
        return {
            "CHUNK": self.chunk,
            "BLOCK_M": self.rows,
            "BLOCK_N": self.keys,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }


def choose_tiling(head_dim: int, dtype: torch.dtype, limit: int, tables: bool = False) -> Tiling:
    """The tiling for a problem on a device with ``limit`` bytes of shared memory a program, measured on an H200.

    ``tables``: the kernel reads another tile for each head, a bias or a dense mask, and wants room for it.
    """
    padded = max(16, 1 << (head_dim - 1).bit_length())
    if dtype == torch.float32:  # no tensor core multiplies these exactly
        cut = Tiling(64, 64, min(padded, 32), warps=4, stages=3)
    elif padded <= 64:
        cut = Tiling(64, 128, padded, warps=4, stages=3)
    elif padded == 128:
        cut = Tiling(128, 128, padded, warps=8, stages=3)
    else:
        cut = Tiling(64, 128, padded, warps=4, stages=2)
    if tables:
        cut = dataclasses.replace(cut, rows=64, keys=64, warps=4, stages=2)
    while cut.stages > 1 and cut.shared(dtype.itemsize) > limit - SPARE:
        cut = dataclasses.replace(cut, stages=cut.stages - 1)
    if cut.shared(dtype.itemsize) > limit - SPARE:
        cut = dataclasses.replace(cut, rows=64, keys=64)
    return cut


def choose_backward_tiling(head_dim: int) -> Tiling:
    """The tiling of the gradients' kernels, small enough for every device."""
    padded = max(16, 1 << (head_dim - 1).bit_length())
    if padded <= 64:
        return Tiling(64, 64, padded, warps=4, stages=2)
    return Tiling(64, 64, 128, warps=4, stages=2) if padded == 128 else Tiling(64, 32, padded, warps=8, stages=1)


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program may have; those of an H200 where an interpreter runs."""
    if device.type != "cuda":
        return 232448
    import triton

    index = torch.cuda.current_device() if device.index is None else device.index
    limit: int = triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"]
    return limit


@dataclasses.dataclass(frozen=True)
class Tables:
    """A problem's mask and bias as the kernels read them.

    Attributes:
        bounds: keys from ``row + bounds[0]`` to ``row + bounds[1]`` are seen; ``None`` for all.
        valid: (batch, seqlen_k), of bytes.
        dense, bias: (batch, heads, seqlen_q, seqlen_k), with a stride of 0 where they broadcast; the first of bytes.
        by_head: ``dense`` differs from head to head.
    """

    bounds: tuple[int, int] | None
    valid: Tensor | None
    dense: Tensor | None
    bias: Tensor | None
    by_head: bool

    @classmethod
    def of(cls, spec: AttentionSpec) -> Tables:
        windows: list[Window] = []
        valid: list[Tensor] = []
        dense: list[Tensor] = []
        for part in () if spec.mask is None else spec.mask.parts:
            if isinstance(part, Window):
                windows.append(part)
            elif isinstance(part, KeyPadding):
                valid.append(part.valid)
            elif isinstance(part, KeyLengths):
                valid.append(torch.arange(spec.seqlen_k, device=spec.device) < part.lengths[:, None])
            else:
                assert isinstance(part, Dense)
                dense.append(part.allowed)
        shape = (spec.batch, spec.heads, spec.seqlen_q, spec.seqlen_k)
        keys = functools.reduce(operator.and_, valid).contiguous().view(torch.uint8) if valid else None
        table = functools.reduce(operator.and_, dense) if dense else None
        bias = None if spec.bias is None else spec.bias.tensors()[0].detach().expand(shape)
        by_head = table is not None and table.shape[1] > 1
        pattern = None if table is None else table.view(torch.uint8).expand(shape)
        return cls(window_bounds(windows, spec.seqlen_q, spec.seqlen_k), keys, pattern, bias, by_head)


def window_bounds(windows: list[Window], seqlen_q: int, seqlen_k: int) -> tuple[int, int] | None:
    """The least and the largest ``key - row`` of bottom-right windows, never further out than the problem is long."""
    if not windows:
        return None
    shift, low, high = seqlen_k - seqlen_q, -seqlen_q, seqlen_k
    for window in windows:
        low = low if window.left is None else max(low, shift - window.left)
        high = high if window.right is None else min(high, shift + window.right)
    return low, high


class KernelProblem:
    """One problem as the kernels take it: its tensors, sizes and strides."""

    def __init__(self, q: Tensor, k: Tensor, lse: Tensor | None, spec: AttentionSpec) -> None:
        self.q, self.k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
        self.spec = spec
        self.tables = tables = Tables.of(spec)
        self.masks = (tables.valid, tables.dense, tables.bias)
        self.sizes = (spec.seqlen_q, spec.seqlen_k, spec.heads, spec.heads // spec.heads_kv)
        self.window = (0, 0) if tables.bounds is None else tables.bounds
        strides = (self.q.stride()[:3], self.k.stride()[:3], strides_of(tables.dense), strides_of(tables.bias))
        self.strides = tuple(itertools.chain(*strides))
        self.cut = choose_tiling(
            spec.head_dim, q.dtype, shared_memory(q.device), tables.by_head or tables.bias is not None
        )
        self.options = {"WINDOW": tables.bounds is not None, "HEAD_DIM": spec.head_dim}
        exact = lse is None or spec.bias is not None or q.dtype == torch.float32
        self.lse = None if exact or lse is None else lse.to(torch.float32).contiguous()

    def statistics(self) -> tuple[Tensor, Tensor | None]:
        """Compute what makes weights of scores: the log-sum-exp, or each row's largest score and 1 / its sum."""
        if self.lse is not None:
            return self.lse, None
        from .kernels import statistics_kernel

        spec, cut = self.spec, self.cut
        shift, factor = self.q.new_empty(2, spec.batch, spec.heads, spec.seqlen_q, dtype=torch.float32)
        programs = spec.batch * spec.heads * -(-spec.seqlen_q // cut.rows)
        tensors = (self.q, self.k, shift, factor, *self.masks)
        numbers = (*self.sizes, spec.scale, *self.window, *self.strides)
        statistics_kernel[(programs,)](*tensors, *numbers, **self.options, **cut.options())
        return shift, factor


def make_weights(
    q: Tensor, k: Tensor, lse: Tensor | None, spec: AttentionSpec, average: bool, dtype: torch.dtype
) -> Tensor:
    """The weights (batch, heads, seqlen_q, seqlen_k) of a supported problem, or their mean over heads.

    Args:
        q, k: (batch, seqlen, heads, head_dim), outside autograd.
        lse: (batch, heads, seqlen_q), float32, ``-inf`` in blind rows. Without it, beside a bias, and in float32, where
            its rounding would show, each row's largest score and sum are computed first.
        average: (batch, seqlen_q, seqlen_k) instead.
        dtype: of the weights.
    """
    shape = (spec.batch, spec.seqlen_q) if average else (spec.batch, spec.heads, spec.seqlen_q)
    made = torch.empty(*shape, spec.seqlen_k, dtype=dtype, device=q.device)
    if not made.numel():
        return made
    from .kernels import weights_kernel

    with use_device(q.device):
        problem = KernelProblem(q, k, lse, spec)
        cut, count = problem.cut, spec.heads if average else 1
        programs = spec.batch * (spec.heads // count) * -(-spec.seqlen_q // cut.rows) * -(-spec.seqlen_k // cut.keys)
        tensors = (problem.q, problem.k, *problem.statistics(), *problem.masks, made)
        numbers = (*problem.sizes, count, spec.scale, *problem.window, *problem.strides)
        options = {**problem.options, **cut.options(), "BY_HEAD": problem.tables.by_head, "BAND": BAND}
        weights_kernel[(programs,)](*tensors, *numbers, **options)
    return made


def make_gradients(
    q: Tensor, k: Tensor, lse: Tensor | None, spec: AttentionSpec, average: bool, grad: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of q and k for one of the weights, which has their shape; see ``make_weights``."""
    dq, dk = (torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    if not (grad.numel() and spec.heads):
        return dq, dk
    from .gradient_kernels import gradient_of_k_kernel, gradient_of_q_kernel

    with use_device(q.device):
        problem = KernelProblem(q, k, lse, spec)
        cut = choose_backward_tiling(spec.head_dim)
        mean = q.new_empty(spec.batch, spec.heads, spec.seqlen_q, dtype=torch.float32)
        tensors = (problem.q, problem.k, *problem.statistics(), *problem.masks, grad, mean)
        along = (grad.stride(0), 0, *grad.stride()[1:]) if average else grad.stride()
        count = spec.heads if average else 1
        numbers = (*problem.sizes, count, spec.scale, *problem.window, *problem.strides, *along)
        options = {**problem.options, **cut.options()}
        gradient_of_q_kernel[(spec.batch * spec.heads * -(-spec.seqlen_q // cut.rows),)](
            *tensors, dq, *numbers, **options
        )
        gradient_of_k_kernel[(spec.batch * spec.heads_kv * -(-spec.seqlen_k // cut.keys),)](
            *tensors, dk, *numbers, **options
        )
    return dq, dk


def strides_of(table: Tensor | None) -> tuple[int, ...]:
    """The strides of a table of four axes, 0 where there is no table."""
    return (0, 0, 0, 0) if table is None else table.stride()


def use_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Make a device the current one, on which kernels are launched."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()

"""The weights of a problem, tile by tile on the tensor cores of a GPU.

``why_not`` judges the problem, as a backend's does, and ``host.kernels`` the machine. The kernels are Triton's, which
torch's builds for CUDA bring; they stand in ``kernels``, imported when the first weights are made.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..host.kernels import lined_up, processors, use_device
from ..host.launcher import DIVISOR, Launcher
from ..problem.masks import Dense
from ..problem.ragged import KeyLengths, KeyPadding
from ..problem.scores import ALiBi, RelativeBias, TensorBias
from ..problem.spec import AttentionSpec
from ..problem.windows import Window
from ..problem.wording import dtype_name
from .blocks import Box, narrowed
from .regions import as_slice
from .tables import Tables, strides_of
from .tilings import Tiling, choose_backward_tiling, choose_tiling, tile_columns

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LARGEST_HEAD_DIM = 256
BY_DISTANCE = (ALiBi, RelativeBias)
"""Biases that are one number for each head and distance, a line of numbers instead of a table."""
KERNEL_MASKS = (Window, KeyPadding, KeyLengths, Dense)
BAND = 16
"""Tiles of rows whose programs run side by side."""


def why_not(spec: AttentionSpec) -> str | None:
    """Why no kernel makes the weights of a problem; ``None`` where one does."""
    if spec.dtype not in KERNEL_DTYPES:
        return f"dtype must be one of {', '.join(map(dtype_name, KERNEL_DTYPES))}, got {dtype_name(spec.dtype)}"
    if not 1 <= spec.head_dim <= LARGEST_HEAD_DIM:
        return f"head_dim must lie between 1 and {LARGEST_HEAD_DIM}, got {spec.head_dim}"
    for part in () if spec.mask is None else spec.mask.parts:
        if not isinstance(part, KERNEL_MASKS):
            return f"no kernel has the mask {part!r}"
    parts = () if spec.bias is None else spec.bias.parts
    if not (all(type(part) in BY_DISTANCE for part in parts) or isinstance(spec.bias, TensorBias)):
        return f"no kernel has the bias {spec.bias!r}"
    for name, tensors in (("a bias", () if spec.bias is None else spec.bias.tensors()), ("sinks", (spec.sinks,))):
        for tensor in tensors:
            if tensor is not None and tensor.dtype not in KERNEL_DTYPES:
                return f"no kernel has {name} of {dtype_name(tensor.dtype)}"
    return None


def no_gradients(spec: AttentionSpec) -> str | None:
    """Why no kernel makes the gradients of a problem's q and k; ``None`` where one does.

    A tile's gradient has the dtype of q on its way to the tensor cores. float16 has no room for numbers as small as
    those, and nothing multiplies float32 faster than PyTorch.
    """
    if spec.dtype != torch.bfloat16:
        return f"dtype must be bfloat16, got {dtype_name(spec.dtype)}"
    return why_not(spec) if spec.softcap is None else "no kernel has the gradient of a softcap"


class KernelProblem:
    """One box of a problem, or some of its keys, as the kernels take it: its tensors, sizes and strides."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        lse: Tensor | None,
        spec: AttentionSpec,
        box: Box | None = None,
        keys: range | None = None,
    ) -> None:
        box = Box.whole(spec) if box is None else box
        keys = range(spec.seqlen_k) if keys is None else keys
        q, (k, group) = box.of_query(q), box.of_grouped_key(k, spec.heads)
        k = narrowed(k, 1, keys)
        self.q, self.k = lined_up(q), lined_up(k)
        self.spec, self.box, self.shape = spec, box, (len(box.batch), len(box.heads), len(box.rows))
        self.tables = tables = Tables.of(spec, box, keys)
        self.masks = (tables.valid, tables.dense, tables.bias)
        self.sizes = (len(box.rows), len(keys), len(box.heads), group)
        softcap = 0.0 if spec.softcap is None else float(spec.softcap)
        self.numbers = (float(spec.scale), softcap, *(tables.bounds or (0, 0)))
        self.steps = (*self.q.stride()[:3], *self.k.stride()[:3])
        self.table_steps = (*strides_of(tables.dense), *tables.bias_strides)
        by_head = tables.by_head
        self.bent = spec.softcap is not None
        limit = processors(q.device).shared_memory
        self.cut = choose_tiling(spec.head_dim, q.dtype, limit, by_head or tables.bias is not None)
        self.options = {"WINDOW": tables.bounds is not None, "HEAD_DIM": spec.head_dim}
        exact = lse is None or spec.bias is not None or q.dtype == torch.float32
        self.lse = None if exact or lse is None else box.of_row(lse).to(torch.float32).contiguous()
        divides = len(keys) % DIVISOR == 0, len(keys) == 1  # of which Triton makes forms of their own
        there = *divides, tables.bounds is None, self.bent, tables.valid is None, tables.dense is None, by_head
        self.kind = (q.device.index, q.dtype, spec.head_dim, *there, None if tables.bias is None else tables.bias.dtype)

    def launch(
        self,
        launcher: Launcher,
        kind: tuple[object, ...],
        programs: int,
        tensors: tuple[Tensor | None, ...],
        count: tuple[int, ...],
        cut: Tiling,
        **constants: int,
    ) -> None:
        """Launch a kernel on its tensors; ``kind`` says of them what ``Launcher`` wants to know.

        ``count`` are the heads that a program adds up, where the kernel takes that; ``constants`` what only it has.
        """
        bent = {"WINDOW": self.options["WINDOW"], "SOFTCAP": self.bent}
        launcher(
            (*self.kind, *kind),
            (programs, 1, 1),
            (self.q, self.k, *tensors),
            self.steps,
            (*self.sizes, *count, *self.numbers, *self.table_steps),
            {**bent, **constants, "HEAD_DIM": self.spec.head_dim, **cut.constants},
            cut.options,
        )

    def statistics(self) -> tuple[Tensor, Tensor | None]:
        """Compute what makes weights of scores: the log-sum-exp, or each row's largest score and 1 / its sum."""
        if self.lse is not None:
            return self.lse, None
        from .kernels import launch_statistics

        sinks = self.spec.sinks
        shift, factor = self.q.new_empty(2, *self.shape, dtype=torch.float32)
        if sinks is not None:
            sinks = sinks.detach()[as_slice(self.box.heads)].to(torch.float32).contiguous()
        programs = math.prod(self.shape[:2]) * -(-self.sizes[0] // self.cut.rows)
        self.launch(launch_statistics, (sinks is None,), programs, (shift, factor, sinks, *self.masks), (), self.cut)
        return shift, factor


def make_weights(
    q: Tensor,
    k: Tensor,
    lse: Tensor | None,
    spec: AttentionSpec,
    average: bool,
    dtype: torch.dtype,
    box: Box | None = None,
    keys: range | None = None,
) -> Tensor:
    """The weights (batch, heads, seqlen_q, seqlen_k) of a supported problem, or their mean over heads.

    Args:
        q, k: (batch, seqlen, heads, head_dim), outside autograd.
        lse: (batch, heads, seqlen_q), float32, ``-inf`` in blind rows. Without it, beside a bias, and in float32, where
            its rounding would show, each row's largest score and sum are computed first.
        average: (batch, 1, seqlen_q, seqlen_k) instead.
        dtype: of the weights.
        box, keys: the part of the weights that is made, default all; a mean wants all heads.
    """
    box = Box.whole(spec) if box is None else box
    keys = range(spec.seqlen_k) if keys is None else keys
    shape = (len(box.batch), 1 if average else len(box.heads), len(box.rows), len(keys))
    made = torch.empty(shape, dtype=dtype, device=q.device)
    if not made.numel():
        return made
    from .kernels import launch_weights

    with use_device(q.device):
        problem = KernelProblem(q, k, lse, spec, box)
        statistics = problem.statistics()
        if len(keys) < spec.seqlen_k:
            problem = KernelProblem(q, k, lse, spec, box, keys)
        cut, by_head, count = problem.cut, problem.tables.by_head, len(box.heads) // shape[1]
        programs = math.prod(shape[:2]) * -(-shape[2] // cut.rows) * -(-shape[3] // cut.keys)
        kind, tensors = (statistics[1] is None, dtype), (*statistics, *problem.masks, made)
        problem.launch(launch_weights, kind, programs, tensors, (count,), cut, BAND=BAND, BY_HEAD=by_head)
    return made


MOST_PROGRAMS = 512
"""Programs that keep a GPU busy: more share the heads of a mean among them no further."""


def sum_columns(
    q: Tensor, k: Tensor, lse: Tensor | None, spec: AttentionSpec, average: bool, box: Box | None = None
) -> Tensor:
    """The weights of a supported problem summed over the queries of a box, float32; see ``make_weights``.

    (batch, heads, 1, seqlen_k), or the mean over heads (batch, 1, 1, seqlen_k).
    """
    box = Box.whole(spec) if box is None else box
    batch, heads = len(box.batch), len(box.heads)
    if not (batch and heads and len(box.rows) and spec.seqlen_k):
        return torch.zeros(batch, 1 if average else heads, 1, spec.seqlen_k, dtype=torch.float32, device=q.device)
    from .column_kernel import launch_columns

    with use_device(q.device):
        problem = KernelProblem(q, k, lse, spec, box)
        tables, limit = problem.tables, processors(q.device).shared_memory
        cut = tile_columns(problem.cut, q.dtype.itemsize, limit)
        tiles = -(-spec.seqlen_k // cut.keys)
        shares = [n for n in range(1, heads + 1) if heads % n == 0 and batch * tiles * n >= MOST_PROGRAMS]
        parts = min([*shares, heads]) if average else heads
        made = q.new_empty(batch, parts, 1, spec.seqlen_k, dtype=torch.float32)
        statistics = problem.statistics()
        kind, tensors = (statistics[1] is None,), (*statistics, *problem.masks, made)
        masked = tables.bounds is not None or tables.dense is not None
        problem.launch(launch_columns, kind, batch * parts * tiles, tensors, (heads // parts,), cut, MASKED=masked)
    return made.sum(dim=1, keepdim=True).div_(heads) if average else made


def find_largest(q: Tensor, k: Tensor, spec: AttentionSpec, box: Box | None = None) -> Tensor:
    """The largest weight of each row of a box of a supported problem, (batch, heads, seqlen_q, 1), float32.

    It is that of the row's largest score: 1 / the sum of the exponentials of all scores less that one.
    """
    box = Box.whole(spec) if box is None else box
    if not (len(box.batch) and len(box.heads) and len(box.rows) and spec.seqlen_k):
        shape = (len(box.batch), len(box.heads), len(box.rows), 1)
        return torch.zeros(shape, dtype=torch.float32, device=q.device)
    with use_device(q.device):
        factor = KernelProblem(q, k, None, spec, box).statistics()[1]
    assert factor is not None
    return factor[..., None]


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
        window = problem.tables.bounds or (0, 0)
        numbers = (*problem.sizes, count, spec.scale, *window, *problem.steps, *problem.table_steps, *along)
        options = {**problem.options, **cut.constants, **cut.options}
        gradient_of_q_kernel[(spec.batch * spec.heads * -(-spec.seqlen_q // cut.rows),)](
            *tensors, dq, *numbers, **options
        )
        gradient_of_k_kernel[(spec.batch * spec.heads_kv * -(-spec.seqlen_k // cut.keys),)](
            *tensors, dk, *numbers, **options
        )
    return dq, dk

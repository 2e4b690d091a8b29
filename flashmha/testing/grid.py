"""Problems that a backend serves on a device, as a strategy: its limits, its build, and a grid where it compiles."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from hypothesis import strategies as st

from ..backends.base import Backend
from ..backends.limits import Limits
from ..problem.documents import Documents
from ..problem.masks import join_masks
from ..problem.spec import AttentionSpec
from ..problem.windows import Window, causal
from .attention import DrawnSpec, sink_values, specs
from .choice import Choices, Choose
from .drawn_biases import drawn_bias
from .drawn_masks import drawn_mask, drawn_pages
from .record import placed
from .values import DRAWN_HEAD_DIMS, LONGEST, SEEDS, generator

FLOAT16, FLOAT32 = torch.float16, torch.float32
ON_A_GPU = (1, 8, 16, 36, 40, 64, 80, 96, 112, 128, 160, 192, 256)
LONGEST_ON_A_GPU = 300
"""A GPU's kernels work in tiles of up to 192 rows: what is shorter shows no bug between two of them."""
FEW_SIZES, SHORT_LENGTHS, LONG_LENGTHS = range(1, 4), range(1, 65), range(129, 301)


@dataclasses.dataclass(frozen=True)
class DrawnKernel:
    """The problems that a backend compiles one kernel for. Sizes are drawn from ranges, values and offsets from seeds.

    Where every range holds one size, the mask's and the bias's own numbers are fixed as well.
    """

    head_dim: int = 64
    dtype: torch.dtype = torch.bfloat16
    mask: tuple[str, ...] = ()
    bias: str | None = None
    group: int = 1
    softcap: float | None = None
    sinks: bool = False
    needs_grad: bool = True
    need_lse: bool = False
    deterministic: bool = False
    page_size: int = 0
    batch: range = FEW_SIZES
    heads_kv: range = FEW_SIZES
    seqlen_q: range = LONG_LENGTHS
    seqlen_k: range = LONG_LENGTHS

    @property
    def whole(self) -> bool:
        """Every size is fixed."""
        return all(len(sizes) == 1 for sizes in (self.batch, self.heads_kv, self.seqlen_q, self.seqlen_k))

    def example(self, device: torch.device) -> AttentionSpec:
        """One of its problems, always the same."""
        return self.problem(middle_option, 0, device)

    def problem(self, choose: Choose, seed: int, device: torch.device) -> AttentionSpec:
        """One problem that this kernel serves."""
        heads_kv = choose(self.heads_kv)
        sizes = {
            "batch": 1 if "documents" in self.mask else choose(self.batch),
            "heads": heads_kv * self.group,
            "seqlen_q": choose(self.seqlen_q),
            "seqlen_k": choose(self.seqlen_k),
        }
        if self.page_size:
            sizes["seqlen_k"] = -(-sizes["seqlen_k"] // self.page_size) * self.page_size
        choose = middle_option if self.whole else choose
        more: dict[str, Any] = {**sizes, "device": device}
        bias = pages = None
        if self.page_size:
            rows, where = (sizes["batch"], sizes["seqlen_k"]), placed(device)
            pages = drawn_pages(choose, generator(seed), *rows, self.page_size, where)
        if self.bias is not None:
            bias = drawn_bias(self.bias, choose, seed, dtype=self.dtype, learned=self.needs_grad, **more)
        return DrawnSpec(
            **more,
            heads_kv=heads_kv,
            head_dim=self.head_dim,
            head_dim_v=self.head_dim,
            dtype=self.dtype,
            mask=join_masks(*[drawn_mask(kind, choose, seed, **more) for kind in self.mask], pages),
            bias=bias,
            softcap=self.softcap,
            sinks=sink_values(seed, sizes["heads"], device, learned=self.needs_grad) if self.sinks else None,
            needs_grad=self.needs_grad,
            need_lse=self.need_lse,
            deterministic=self.deterministic,
        )


def middle_option(options: Any) -> Any:
    """One choice out of some options, always the same."""
    return options[len(options) // 2]


KERNELS_BY_KIND = (
    DrawnKernel(),
    DrawnKernel(seqlen_q=SHORT_LENGTHS, seqlen_k=SHORT_LENGTHS),
    DrawnKernel(mask=("causal",)),
    DrawnKernel(mask=("causal",), seqlen_q=SHORT_LENGTHS, seqlen_k=LONG_LENGTHS, group=2),
    DrawnKernel(mask=("causal",), seqlen_q=LONG_LENGTHS, seqlen_k=SHORT_LENGTHS, needs_grad=False, need_lse=True),
    DrawnKernel(mask=("top-left causal",), seqlen_q=SHORT_LENGTHS, seqlen_k=LONG_LENGTHS, dtype=FLOAT16),
    DrawnKernel(mask=("top-left causal",), seqlen_q=LONG_LENGTHS, seqlen_k=SHORT_LENGTHS, needs_grad=False),
    DrawnKernel(mask=("window",)),
    DrawnKernel(mask=("window",), head_dim=128, group=3, needs_grad=False, need_lse=True),
    DrawnKernel(mask=("key_lengths",)),
    DrawnKernel(mask=("key_padding",), head_dim=128),
    DrawnKernel(mask=("key_padding", "causal"), dtype=FLOAT16),
    DrawnKernel(mask=("documents",), need_lse=True),
    DrawnKernel(mask=("documents", "causal"), head_dim=128, group=2),
    DrawnKernel(mask=("causal",), softcap=20.0, dtype=FLOAT16),
    DrawnKernel(mask=("causal",), sinks=True, need_lse=True),
    DrawnKernel(head_dim=24, mask=("causal",), seqlen_q=SHORT_LENGTHS, seqlen_k=SHORT_LENGTHS),
    DrawnKernel(head_dim=88, dtype=FLOAT16, group=3, mask=("mask for all heads",)),
    DrawnKernel(head_dim=96, mask=("causal",), deterministic=True),
    DrawnKernel(head_dim=128, mask=("mask for all heads",), dtype=FLOAT16, need_lse=True, deterministic=True),
    DrawnKernel(head_dim=128, mask=("step", "causal"), group=4, seqlen_q=range(1, 17), needs_grad=False),
    DrawnKernel(head_dim=128, mask=("step", "causal"), page_size=64, seqlen_q=range(1, 17), needs_grad=False),
    DrawnKernel(head_dim=192, mask=("causal",)),
    DrawnKernel(head_dim=256),
)
"""For a backend that compiles for kinds: 24 at most, since each costs seconds."""


def kernel_of_shape(batch: int, heads_kv: int, seqlen_q: int, seqlen_k: int, **more: Any) -> DrawnKernel:
    """A kernel for one shape."""
    sizes = (range(size, size + 1) for size in (batch, heads_kv, seqlen_q, seqlen_k))
    more |= zip(("batch", "heads_kv", "seqlen_q", "seqlen_k"), sizes)
    return DrawnKernel(**more)


KERNELS_BY_SHAPE = (
    kernel_of_shape(2, 2, 128, 128),
    kernel_of_shape(1, 1, 1, 1, dtype=FLOAT32, head_dim=16),
    kernel_of_shape(2, 2, 65, 200, mask=("causal",), need_lse=True),
    kernel_of_shape(1, 2, 200, 65, mask=("causal",), dtype=FLOAT16),
    kernel_of_shape(2, 1, 96, 160, mask=("window",), group=3, dtype=FLOAT32),
    kernel_of_shape(2, 2, 1, 300, mask=("key_lengths",), group=4, needs_grad=False),
    kernel_of_shape(3, 2, 130, 130, mask=("key_padding",), head_dim=128),
    kernel_of_shape(3, 1, 70, 190, mask=("key_padding", "causal"), head_dim=32, dtype=FLOAT16),
    kernel_of_shape(1, 3, 257, 257, mask=("documents",), need_lse=True, dtype=FLOAT32),
    kernel_of_shape(1, 2, 190, 140, mask=("documents", "causal"), group=2),
    kernel_of_shape(2, 2, 50, 77, mask=("dense_mask",), dtype=FLOAT32),
    kernel_of_shape(2, 2, 129, 129, mask=("rule",), head_dim=80),
    kernel_of_shape(2, 2, 64, 64, bias="tensor", dtype=FLOAT32, head_dim=32),
    kernel_of_shape(2, 2, 140, 140, bias="alibi", mask=("causal",), needs_grad=False),
    kernel_of_shape(1, 2, 100, 120, bias="relative", dtype=FLOAT32),
    kernel_of_shape(2, 2, 128, 128, softcap=20.0, mask=("causal",), dtype=FLOAT16),
    kernel_of_shape(2, 2, 80, 140, sinks=True, mask=("window",), need_lse=True),
    kernel_of_shape(1, 2, 33, 150, head_dim=256, needs_grad=False),
    kernel_of_shape(2, 1, 150, 150, head_dim=192, mask=("causal",), needs_grad=False),
)
"""For a backend that compiles for shapes."""


def served(
    backend: Backend,
    device: torch.device | str | None = None,
    *,
    head_dims: Sequence[int] | None = None,
    longest: int | None = None,
) -> st.SearchStrategy[AttentionSpec]:
    """The problems to judge a backend by on a device where it is available.

    They lie inside its limits and what its build has; ``head_dims`` and ``longest`` are those of ``specs``. On a GPU a
    backend that ``compiles`` gets problems of a grid of at most 24 kernels, as many of them as it serves, whatever
    ``head_dims`` and ``longest`` say.
    """
    where = placed(device)
    if where.type != "cpu" and backend.compiles is not None:
        kernels = grid(backend, where)
        if kernels:
            return drawn(st.sampled_from(kernels), where)
    limits, built_dims = built(backend, where, head_dims)
    longest = (LONGEST if where.type == "cpu" else LONGEST_ON_A_GPU) if longest is None else longest
    return specs(limits=limits, device=where, head_dims=built_dims, longest=longest)


def grid(backend: Backend, device: torch.device) -> list[DrawnKernel]:
    """The kernels of the grid that a backend serves on a device."""
    kernels = KERNELS_BY_KIND if backend.compiles == "kinds" else KERNELS_BY_SHAPE
    examples = [(kernel, kernel.example(device)) for kernel in kernels]
    return [kernel for kernel, spec in examples if not (backend.why_not(spec) or backend.why_not_built(spec))]


@st.composite
def drawn(draw: st.DrawFn, kernels: st.SearchStrategy[DrawnKernel], device: torch.device) -> AttentionSpec:
    """Problems of some kernels."""
    choose = Choices(draw, "kernel")
    return draw(kernels).problem(choose, choose(SEEDS), device)


ALONE: dict[str, dict[str, Any]] = {
    "backward": {"needs_grad": True},
    "causal": {"mask": causal()},
    "window": {"mask": Window(1, 1)},
    "documents": {"mask": Documents(torch.tensor([0, 3], device="cpu"))},
    "softcap": {"softcap": 1.0},
    "deterministic": {"needs_grad": True, "deterministic": True},
}
"""Features that builds leave out, and a problem that needs each."""


def built(backend: Backend, device: torch.device, wanted: Sequence[int] | None = None) -> tuple[Limits, list[int]]:
    """A backend's limits less what its build lacks, asked for one thing at a time, and the head dims there are."""
    limits = backend.limits
    if wanted is None:
        wanted = DRAWN_HEAD_DIMS if device.type == "cpu" else ON_A_GPU
    largest = limits.head_dim or max(wanted)
    head_dims = [d for d in wanted if limits.head_dim_min <= d <= largest and d % limits.head_dim_step == 0]

    def has(dtype: torch.dtype, head_dim: int, **more: Any) -> bool:
        spec = AttentionSpec(1, 3, 3, 1, 1, head_dim, head_dim, dtype, device, **more)
        return backend.why_not_built(spec) is None

    pairs = [(dtype, head_dim) for dtype in limits.dtypes for head_dim in head_dims if has(dtype, head_dim)]
    if not pairs:
        return limits, head_dims
    missing = {name for name, more in ALONE.items() if name in limits.features and not has(*pairs[0], **more)}
    dtypes = tuple(dtype for dtype in limits.dtypes if any(dtype == each for each, _ in pairs))
    less = dataclasses.replace(limits, dtypes=dtypes, features=limits.features - missing)
    return less, [d for d in head_dims if any(d == each for _, each in pairs)]

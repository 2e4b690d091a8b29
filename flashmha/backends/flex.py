"""flex: torch's flex_attention, where rules and biases become one compiled kernel."""

from __future__ import annotations

import functools
import operator
import warnings
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from ..host.torch_state import is_compiling
from ..problem.bias_values import level_bias, narrow_bias
from ..problem.masks import Dense
from ..problem.scores import Bias, TensorBias
from ..problem.spec import AttentionSpec
from .base import Backend
from .flex_kernels import Kernels, problem_key, tensors_key
from .limits import FEATURES, Limits

Question = Callable[[AttentionSpec], bool]


class Flex(Backend):
    """``flex_attention``: any rule and any bias without a (seqlen_q, seqlen_k) tensor on a GPU; forward on a CPU.

    The first call of a shape compiles for some seconds on a GPU; ``MOST_KERNELS`` shapes stay compiled.
    """

    name = measured_as = "flex"
    unfused_on = ("cpu",)
    judges_by_outline = results_checked = yields_small_weights = True
    compiles = "shapes"
    limits = Limits(
        devices=("cuda", "cpu", "xpu"),
        dtypes=(torch.float32, torch.bfloat16, torch.float16),
        features=frozenset(FEATURES) - {"cache", "pages", "own_tokens", "dropout", "deterministic"},
        not_on={"cpu": frozenset(("backward", "bias_grad", "lse_grad"))},
        seqlen_min=1,
        batch_min=1,
    )
    head_dim_min_gpu = 16
    """Triton's smallest matrix product; the unfused form on a CPU takes any head_dim."""

    def __init__(self, compiles: Question | None = None, joins: Question | None = None) -> None:
        """``compiles`` and ``joins`` are ``fuses`` and ``fused_into_graph`` of a machine that is not this one."""
        self.kernels = Kernels(self.name)
        self.fuses, self.joins = compiles or fuses, joins or fused_into_graph

    def must_compile(self, spec: AttentionSpec) -> str | None:
        if not self.fuses(spec) or self.kernels.serve(problem_key(spec)):
            return None
        return "not compiled for this shape yet (some seconds)"

    def kernel_key(self, spec: AttentionSpec) -> Hashable:
        return problem_key(spec)

    def limits_exceeded(self, spec: AttentionSpec) -> list[str]:
        reasons = super().limits_exceeded(spec)
        smallest = min(spec.head_dim, spec.head_dim_v)
        if spec.device.type != "cpu" and smallest < self.head_dim_min_gpu:
            reasons.append(f"head_dim={smallest} (at least {self.head_dim_min_gpu} on {spec.device.type})")
        return reasons

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor | tuple[Tensor, Tensor]:
        need_lse = spec.need_lse or spec.sinks is not None
        if need_lse and spec.device.type == "cpu":  # torch 2.8 and 2.9 make lse of half-precision scores
            q, k, v = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q, k, v))
        spec, shift = levelled_spec(spec) if spec.bias is not None and spec.needs_grad else (spec, None)
        out: Tensor
        lse: Tensor | None
        result = self.kernel(q, k, v, spec)(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            score_mod=score_mod(spec),
            block_mask=block_mask(spec, self.joins(spec)),
            scale=spec.scale,
            enable_gqa=spec.heads != spec.heads_kv,
            **(asking_for_lse() if need_lse else {}),
        )
        out, lse = result if need_lse else (result, None)
        lse = getattr(lse, "lse", lse)
        if lse is not None and spec.bias is not None:
            lse = lowest(lse, spec.bias)
        out = out.transpose(1, 2).to(spec.dtype)
        if spec.sinks is not None and lse is not None:
            # a sink is one more column: it takes its share of every row and gives nothing back
            sink = spec.sinks[:, None] if shift is None else spec.sinks[:, None] - shift
            sink = narrow_bias(sink, lse.dtype)
            share = torch.sigmoid(lse - sink).masked_fill(lse == float("-inf"), 0.0)  # even beside a sink of -inf
            out = out * share.transpose(1, 2).unsqueeze(-1).to(out.dtype)
            lse = torch.logaddexp(lse, sink)
        if lse is not None and shift is not None:
            lse = narrow_bias(lse + shift, lse.dtype)
        return out if not spec.need_lse or lse is None else (out, lse)

    def kernel(self, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Callable[..., Any]:
        """flex_attention, compiled where that makes a kernel."""
        from torch.nn.attention.flex_attention import flex_attention

        if self.fuses(spec):
            return functools.partial(self.kernels.run, (problem_key(spec), tensors_key(q, k, v)))
        traced: Callable[..., Any] = flex_attention
        return traced if is_compiling() else unfused


def fuses(spec: AttentionSpec) -> bool:
    """A call compiles a kernel: on a GPU, outside a graph that is being compiled."""
    return spec.device.type != "cpu" and not is_compiling()


@functools.cache
def asking_for_lse() -> dict[str, Any]:
    """How flex_attention is asked for the log-sum-exp; a warning of the old way would be compiled in, and out again."""
    from torch.nn.attention import flex_attention as module

    request = getattr(module, "AuxRequest", None)  # since torch 2.9
    return {"return_lse": True} if request is None else {"return_aux": request(lse=True)}


def levelled_spec(spec: AttentionSpec) -> tuple[AttentionSpec, Tensor]:
    """The problem with the tensors among its biases levelled for a backward, and by how much in all."""
    assert spec.bias is not None
    parts, shift = [], torch.zeros(1, 1, 1, 1, device=spec.device)
    for part in spec.bias.parts:
        if isinstance(part, TensorBias):
            tensor, largest = level_bias(part.tensor)
            part, shift = TensorBias(tensor), shift + largest
        parts.append(part)
    return spec.changed(bias=functools.reduce(operator.add, parts)), shift.squeeze(-1)


def score_mod(spec: AttentionSpec) -> Callable[..., Tensor] | None:
    """Softcap and biases as flex's ``score_mod``."""
    cap = spec.softcap
    bias = None
    if spec.bias is not None:
        bias = spec.bias.bias_mod(spec.seqlen_q, spec.seqlen_k, spec.documents)
    if cap is None and bias is None:
        return None

    def modify(score: Tensor, batch: Tensor, head: Tensor, q_idx: Tensor, k_idx: Tensor) -> Tensor:
        if cap is not None:
            score = cap * torch.tanh(score / cap)
        if bias is None:
            return score
        added = bias(batch, head, q_idx, k_idx)
        return score + torch.where(
            added == float("-inf"), float("-inf"), added.to(torch.float32).clamp(LOWEST_ADDED, LARGEST_ADDED)
        )

    return modify


def lowest(lse: Tensor, bias: Bias) -> Tensor:
    """The log-sum-exp of rows that hold nothing above ``LOWEST_ADDED``: the lowest number of the bias."""
    there = max(LARGEST_ADDED * -1.0, min(torch.finfo(tensor.dtype).min for tensor in bias.tensors()))
    low = (lse < 0.999 * LOWEST_ADDED) & (lse != float("-inf"))
    return lse + torch.where(low, there - lse.detach(), 0.0)


LARGEST_ADDED, LOWEST_ADDED = torch.finfo(torch.float32).max, torch.finfo(torch.float32).min / 2
"""The most and the least that is added to a score. The kernel takes scores to powers of two: lower ones would be
``-inf`` there, which hides."""


def block_mask(spec: AttentionSpec, joins: bool) -> Any:
    """The mask as flex's ``BlockMask``; ``joins`` where it is made in one graph with the kernel that reads it."""
    if spec.mask is None:
        return None
    from torch.nn.attention.flex_attention import create_block_mask

    mod = spec.mask.mask_mod(spec.seqlen_q, spec.seqlen_k)
    tables = [part.allowed.shape for part in spec.mask.parts if isinstance(part, Dense)]
    per_batch = spec.mask.features & {"key_padding", "key_lengths", "rule"} or any(shape[0] > 1 for shape in tables)
    per_head = "rule" in spec.mask.features or any(shape[1] > 1 for shape in tables)
    made = create_block_mask(
        mod,
        spec.batch if per_batch else None,
        spec.heads if per_head else None,
        spec.seqlen_q,
        spec.seqlen_k,
        device=str(spec.device),
    )
    if joins:
        # the kernel finds a batch item by the stride of the heads, and a compiler may give that axis, of size 1, any
        # stride: torch 2.11 read past the tables of padding in inference
        for name in TABLES:
            setattr(made, name, contiguous_whole(getattr(made, name)))
    return made


TABLES = ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices")
"""Tables of a ``BlockMask`` that the forward kernel reads."""


def fused_into_graph(spec: AttentionSpec) -> bool:
    """The block mask, and a kernel that reads it, are made in one graph that is being compiled."""
    return spec.device.type != "cpu" and is_compiling()


@torch.library.custom_op("flashmha::whole", mutates_args=())
def contiguous_whole(x: Tensor) -> Tensor:
    """A contiguous copy, as an operator whose strides no compiler changes."""
    return x.clone(memory_format=torch.contiguous_format)


@contiguous_whole.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def unfused(*args: Any, **kwargs: Any) -> Any:
    """flex_attention in plain operators; its advice to compile is for GPUs."""
    from torch.nn.attention.flex_attention import flex_attention

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return flex_attention(*args, **kwargs)

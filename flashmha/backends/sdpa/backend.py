"""sdpa: torch's own scaled_dot_product_attention, and the kernels behind it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from ...host.torch_state import is_compiling
from ...problem.ragged import PADDING_CLASSES, Padding
from ...problem.spec import AttentionSpec
from ...problem.wording import say_size
from ..base import Backend, Serve
from ..limits import FEATURES, HALF, Limits
from ..rewrites.grouped import fold, fold_table, folds, unfold
from .bands import cut_into_bands
from .caches import attend_to_lengths, masks_dear_keys, reads_cache
from .calls import attend_by_math, call_sdpa, for_every_head
from .cut import attend_bands, attend_cut
from .mask_tensors import coarse, dense_mask, mask_and_bias
from .one_query import is_plain, serve_plainly, takes_products
from .packed import attend_in_place, attend_packed, packs_here, runs_packed, takes_packed
from .pieces import Costs, cut_up
from .switches import by_math, kernels_for_masks, only, switches, without_cudnn


def top_left_causal(spec: AttentionSpec) -> bool:
    """The mask is causality alone, aligned as SDPA aligns it: to the first key."""
    window = spec.window
    if window is None or spec.mask is None or len(spec.mask.parts) > 1:
        return False
    # dynamic shapes make this comparison a symbol; the branch turns it into a bool
    if window.left is None and window.right == spec.seqlen_q - spec.seqlen_k:  # noqa: SIM103
        return True
    return False


class Sdpa(Backend):
    """``F.scaled_dot_product_attention``; masks and biases become one dense tensor, top-left causality none.

    On a CPU padding is cut off, windows run in blocks and documents one by one; and its kernel there returns the
    log-sum-exp. On a GPU of NVIDIA's documents, padding as documents, and the rows of a cache go to torch's own
    flash-attn 2 in half precision.
    """

    name = measured_as = "sdpa"
    obeys_switches = launched_by_cpp = True
    judges_by_outline = results_checked = yields_small_weights = True
    limits = Limits(
        devices=(),
        dtypes=(torch.float64, torch.float32, torch.bfloat16, torch.float16),
        features=frozenset(FEATURES) - {"softcap", "sinks", "lse_grad"},
        not_on=dict.fromkeys(("cuda", "mps", "xpu"), frozenset({"lse"})),
        aten=True,
    )

    def __init__(self, costs: Costs = Costs()) -> None:  # noqa: B008  a tuple
        self.costs = costs
        """From what size on a problem is cut up on a CPU."""

    def limits_exceeded(self, spec: AttentionSpec) -> list[str]:
        reasons = super().limits_exceeded(spec)
        if spec.need_lse:
            reasons += limits_of_lse(spec)
        if spec.device.type == "cuda" and needs_tensor(spec) and not kernels_for_masks():
            reasons.append("only cuDNN is enabled, which must not see a mask (pytorch#196678)")
        elif spec.device.type == "cuda" and drops_alike(spec) and not kernels_for_masks():
            reasons.append("only cuDNN is enabled, whose dropout is neither exact nor independent (pytorch#174245)")
        elif spec.device.type == "cuda" and spec.mask is None and overflows(spec) and not kernels_for_masks():
            sizes = f"{say_size('seqlen_q', spec.seqlen_q)}, {say_size('seqlen_k', spec.seqlen_k)}"
            reasons.append(f"only cuDNN is enabled, whose backward of {sizes} may give NaN (cudnn-frontend#1072)")
        if spec.device.type == "cuda" and by_math(spec) and not switches()[1]:
            reasons.append(
                "a deterministic backward with the math kernel switched off (torch.use_deterministic_algorithms(True) "
                "makes the fused ones deterministic)"
            )
        return reasons

    def builds_mask(self, spec: AttentionSpec) -> bool:
        if spec.device.type == "cpu" or (MASKED.isdisjoint(spec.features) and not masks_dear_keys(spec)):
            return False
        return not packs_here(spec) and not reads_cache(spec)

    def reads_pages(self, spec: AttentionSpec) -> bool:
        return reads_cache(spec)

    def runs_packed(self, dtype: torch.dtype, head_dim: int, device: torch.device, windowed: bool = False) -> bool:
        return not windowed and takes_packed(dtype, head_dim) and runs_packed(head_dim, device.index)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor | tuple[Tensor, Tensor]:
        if "pages" in spec.needs and not reads_cache(spec):
            return self(q, *spec.in_rows(k, v))
        if q.is_cuda:
            return attend_on_cuda(q, k, v, spec)
        if spec.seqlen_k == 0 and spec.dtype == torch.float16:
            return attend_by_math(q, k, v, None, spec)  # the fused kernel gives NaN where queries are large
        if spec.bias is not None:
            mask = dense_mask(spec)
            return attend_by_math(q, k, v, mask, spec) if coarse(mask, spec) else call_sdpa(q, k, v, mask, spec)
        if spec.mask is None:
            if spec.seqlen_q == 1 and takes_products(spec) and is_plain(spec) and not is_compiling():
                return serve_plainly(spec)(q, k, v)
            grouped = spec.heads != spec.heads_kv
            return attend_grouped(q, k, v, spec) if grouped else call_sdpa(q, k, v, None, spec)
        padding: Padding | None = spec.mask if type(spec.mask) in PADDING_CLASSES else None  # type: ignore[assignment]
        if padding is None and top_left_causal(spec):
            return call_sdpa(q, k, v, None, spec, is_causal=True)
        items = cut_up(spec, self.costs)
        if items is not None:
            return attend_cut(q, k, v, items, spec)
        bands = cut_into_bands(spec, self.costs.rows, self.costs.item) if padding is None else None
        if bands is not None:
            return attend_bands(q, k, v, bands, spec)
        if padding is None:
            return call_sdpa(q, k, v, spec.allowed() if q.is_cpu else dense_mask(spec), spec)
        if q.is_cpu and not (is_compiling() or padding.lasts):
            padding.lasts = True  # SDPA makes numbers of bools in each call, cheaper than a table for one call alone
            return call_sdpa(q, k, v, spec.allowed(), spec)
        return call_sdpa(q, k, v, mask_and_bias(spec), spec)

    def prepare(self, spec: AttentionSpec) -> Serve:
        if spec.device.type == "cuda" and spec.mask is not None and spec.bias is None and spec.dropout_p < 1.0:
            serve = attend_in_place(spec) if packs_here(spec) else None
            if serve is not None:
                return serve
        return serve_plainly(spec) if is_plain(spec) else super().prepare(spec)


MASKED = frozenset(("window", "documents", "softcap"))
"""Features beside which SDPA makes a dense mask on a GPU unless it packs documents, or does nothing."""


def attend_grouped(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor | tuple[Tensor, Tensor]:
    """SDPA of grouped heads without a mask, elsewhere than on a GPU.

    Few queries are folded on a CPU as well: one over 4,096 keys, in groups of four, in half the time.
    """
    if spec.need_lse or not q.is_cpu or not folds(spec):
        return call_sdpa(q, k, v, None, spec)
    groups = spec.heads // spec.heads_kv
    out = call_sdpa(fold(q, groups), k, v, None, spec)
    assert isinstance(out, Tensor)
    return unfold(out, groups)


def attend_on_cuda(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor | tuple[Tensor, Tensor]:
    """SDPA by a kernel of a GPU that serves the problem."""
    if spec.batch == 0:
        with only([SDPBackend.MATH]):  # the fused kernels give nothing at all for an empty batch
            return call_sdpa(q, k, v, None, spec)
    if not spec.needs:  # the commonest call, in the fewest steps
        return call_sdpa(q, k, v, None, spec)
    if spec.dropout_p == 1.0:
        # the fused kernels multiply the zeros that are left by 1 / (1 - 1)
        k, v = for_every_head(k, v, spec)
        with only([SDPBackend.MATH]):
            return call_sdpa(q, k, v, dense_mask(spec), spec)
    masked = spec.mask is not None or spec.bias is not None
    if masked and reads_cache(spec):
        return attend_to_lengths(q, k, v, spec)
    if masked and packs_here(spec):
        return attend_packed(q, k, v, spec)
    if masked and spec.bias is None and top_left_causal(spec):
        return attend_by_choice(q, k, v, None, spec, is_causal=True)
    mask = dense_mask(spec) if masked else None
    if spec.heads != spec.heads_kv and folds(spec):
        groups = spec.heads // spec.heads_kv
        rows = None if mask is None else fold_table(mask, groups, spec.seqlen_q)
        return unfold(attend_by_choice(fold(q, groups), k, v, rows, spec), groups)
    if mask is not None and spec.heads != spec.heads_kv:
        # with a mask, grouped heads land in the math kernel up to torch 2.13 (pytorch#191085)
        k, v = for_every_head(k, v, spec)
    return attend_by_choice(q, k, v, mask, spec)


def attend_by_choice(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, spec: AttentionSpec, is_causal: bool = False
) -> Tensor:
    """SDPA by those of a GPU's kernels that are switched on and may serve the problem."""
    if by_math(spec):
        kernels = only([SDPBackend.MATH] if switches()[1] else [])
    elif mask is None and not drops_alike(spec) and (is_causal or not overflows(spec)):
        return call_sdpa(q, k, v, None, spec, is_causal)  # type: ignore[return-value]
    else:
        # cuDNN must not see a mask: NaN gradients (pytorch#196678), misread float masks (pytorch#191612)
        kernels = without_cudnn()
    with kernels:
        out = call_sdpa(q, k, v, mask, spec, is_causal)
    assert isinstance(out, Tensor)
    return out


def drops_alike(spec: AttentionSpec) -> bool:
    """cuDNN's dropout would drop the same weights in several queries: of four in those two apart, of eight four apart.

    So on an H200 with cuDNN 9.19, for every weight and seed. Some of its kernels know rates in sixteenths alone.
    Source: pytorch#174245.
    """
    return spec.dropout_p > 0.0 and spec.dtype in HALF


def overflows(spec: AttentionSpec) -> bool:
    """cuDNN's backward without a mask and causality gives NaN where a row's scores are all far below 0.

    Half of its last tile of keys is padding then, whose exp(0 - lse) overflows below a log-sum-exp of -88.7: gradients
    of q at seqlen_k % 128 == 64, whatever the head_dim (a sweep of 3,372 problems on an H200 with cuDNN 9.19). A single
    query gives NaN in those of k and v, there at seqlen_k % 64 == 0, and with cuDNN 9.25 and 9.26.
    Source: NVIDIA/cudnn-frontend, issue 1072 and pull request 628.
    """
    if not spec.needs_grad or spec.dtype not in HALF:
        return False
    if spec.aten_only and is_compiling():
        return True  # an exported graph serves every length
    if spec.seqlen_q == 1 or spec.seqlen_k % 128 == 64:  # noqa: SIM103  symbols that a branch makes a bool
        return True
    return False


def limits_of_lse(spec: AttentionSpec) -> list[str]:
    """Limits of the CPU kernel where SDPA would take another one."""
    reasons = []
    if spec.dropout_p > 0.0:
        reasons.append("lse beside dropout")
    if spec.head_dim != spec.head_dim_v:
        reasons.append(f"lse with head_dim_v={spec.head_dim_v} (the {spec.head_dim} of head_dim)")
    if "bias_grad" in spec.features:
        reasons.append("lse beside a bias that wants a gradient")
    if 0 in (spec.batch, spec.seqlen_q, spec.seqlen_k):
        reasons.append("lse of an empty problem")
    if spec.aten_only:
        reasons.append("lse under export, torch.func or a tensor subclass")
    return reasons


def needs_tensor(spec: AttentionSpec) -> bool:
    """SDPA is handed a mask tensor."""
    return spec.bias is not None or (spec.mask is not None and not top_left_causal(spec))

"""Backend and Limits: what one implementation of attention can do, as data, and the call.

A backend is one self-contained file with one class. It imports neither another backend nor the registry. Its contract
is the docstring of ``Backend``.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Hashable
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..problem.spec import AttentionSpec
from .limits import Limits

Serve = Callable[[Tensor, Tensor, Tensor], Tensor | tuple[Tensor, Tensor]]
"""A problem served: its q, k and v in, out or (out, lse)."""

CONTRACTS = (1,)
"""The versions of ``Backend``'s contract that this release keeps."""


class Backend(abc.ABC):
    """One implementation of attention.

    Subclass it, fill ``name`` and ``limits``, and write ``__call__``; every other question has an answer. This one
    looks at a block of keys at a time, so that it holds no tensor of all scores::

        import torch
        from flashmha import Backend, Limits, register

        @register
        class Blockwise(Backend):
            name = "blockwise"
            limits = Limits(
                devices=("cpu", "cuda"),
                dtypes=(torch.float32, torch.float64),
                features=frozenset({"causal", "window", "key_lengths", "key_padding", "documents", "lse"}),
            )

            def __call__(self, q, k, v, spec):
                rows = (spec.batch, spec.heads, spec.seqlen_q, 1)
                largest, total = q.new_full(rows, float("-inf")), q.new_zeros(rows)
                out = q.new_zeros(*rows[:3], spec.head_dim)
                for start in range(0, spec.seqlen_k, 128):
                    keys = range(start, min(start + 128, spec.seqlen_k))
                    k_block, v_block = k[:, keys.start : keys.stop], v[:, keys.start : keys.stop]
                    score = torch.einsum("bqhd,bkhd->bhqk", q, k_block) * spec.scale
                    allowed = spec.allowed(keys=keys)
                    if allowed is not None:
                        score = score.masked_fill(~allowed, float("-inf"))
                    top = torch.maximum(largest, score.amax(-1, keepdim=True))
                    shift = top.masked_fill(top == float("-inf"), 0.0)  # rows that may look at nothing so far
                    kept, part = (largest - shift).exp(), (score - shift).exp()
                    total = total * kept + part.sum(-1, keepdim=True)
                    out = out * kept + part @ v_block.transpose(1, 2)
                    largest = top
                out = (out / total.masked_fill(total == 0.0, 1.0)).transpose(1, 2)
                lse = largest + total.log()
                return (out, lse.squeeze(-1)) if spec.need_lse else out

    **The contract, version 1.** A backend may rely on this, and whatever breaks it gets another number.

    - The class is made without arguments, once, when it is registered.
    - ``__call__`` sees only problems for which ``why_not(spec)``, ``why_not_here(spec.device)`` and
      ``why_not_built(spec)`` all gave ``None``; the last is asked only where the other two did.
    - ``spec`` describes q, k and v exactly and is checked: one dtype and device, heads a multiple of heads_kv, a mask
      and biases that fit. q, k and v are ``(batch, seqlen, heads, head_dim)`` with any strides and must not be written
      to. Autocast is off.
    - ``spec.features`` is a subset of ``limits.features`` on that device. A feature that a later release adds is a new
      name, so a class that does not list it refuses it: nothing is dropped in silence.
    - ``spec.mask`` is normalised: windows are bottom-right and merged, with bounds that may be negative; a rule that
      hides nothing is gone. ``spec.allowed()`` and ``spec.added()`` give mask and bias as tensors, for a range of
      queries and keys where one is named; ``spec.scale`` is a number.
    - Gradients are asked for only with ``"backward"`` among the features, and go through autograd: those of q, k and v,
      and of sinks that want one. What a bias holds (slopes, a table, a tensor) wants one only with ``"bias_grad"``.
    - What it answers about a problem without tensors (no mask, bias or sinks) may be remembered while the list of
      backends, the tuned table and torch's switches stay as they are; see ``judges_by_outline`` for other problems.
    - What a question of another package's backend raises is a reason against it (``builds_mask``, ``reads_pages`` and
      ``runs_packed``: no; ``kernel_key``: the outline). What ``prepare`` and ``__call__`` raise reaches the caller.

    It owes: the answer of ``naive`` within ``tolerance``; zeros (and zero gradients) in rows that may look at nothing;
    dropout wherever ``spec.dropout_p`` is not 0, which under one seed of torch's generator drops the same weights
    whatever the values are; no fallback in silence; and answers that cost nothing to ask for.

    **The questions**, in the order automatic choice asks them, but for ``builds_mask``, out of which that order is
    made, and ``reads_pages`` and ``runs_packed``, which layers ask. A reason is a short phrase that carries the value
    and the limit, such as ``head_dim=320 (at most 256)``; ``None`` means that there is none.

    - ``why_not(spec)``: what the limits say of a problem. Extend ``limits_exceeded`` for a limit that is no number.
    - ``why_not_here(device)``: what the machine says.
    - ``why_not_built(spec)``: what the installed build says.
    - ``must_compile(spec)``: what a call compiles first. A short problem goes to another backend until that is worth
      it; ``kernel_key(spec)`` tells which problems share a kernel.
    - ``builds_mask(spec)``: where it is slow, so that others come before it.
    - ``reads_pages(spec)``: whether layers hand it the pages of a cache, rather than rows copied out of them.
    - ``runs_packed(...)``: whether layers leave padding out for it.
    - ``prepare(spec)``: the call of one problem, for the layers of a model.
    """

    name: str
    limits: Limits
    contract: ClassVar[int] = 1
    """The version of the contract it was written for; a class that says nothing was written for 1."""
    family: ClassVar[str | None] = None
    """A name shared by several backends. Asking for it asks for all of them, in the order of the list."""
    install: ClassVar[str | None] = None
    """How to get it, said when it is not there."""
    remark: ClassVar[str | None] = None
    """A note of tables beside the limits, for what these cannot say."""
    tolerance: ClassVar[tuple[float, float]] = (2.0, 3.0)
    """How much worse than a plain computation in the same dtype it may be: the output, and gradients."""
    compiles: ClassVar[Literal["kinds", "shapes", "steps"] | None] = None
    """Compiles a kernel, which takes seconds, for each kind of problem or each shape, or for each kind of few queries
    over many keys: tests draw from a fixed grid."""
    unfused_on: ClassVar[tuple[str, ...]] = ()
    """Device types where it has no kernel but operators that hold every score. There it comes after the definition."""
    joins_gradients: ClassVar[bool] = False
    """Where q, k and v lie side by side in one tensor, it writes their gradients side by side, too."""
    measured_as: ClassVar[str | None] = None
    """The name under which measured tables know it. A table puts such backends into another order, in the places that
    they hold on the list. All others stay where they were registered."""
    holds_scores: ClassVar[bool] = False
    """It holds every score in memory, made by PyTorch's own operators: never ranked, and no replacement for a backend
    that must compile."""
    obeys_switches: ClassVar[bool] = False
    """It obeys ``sdpa_kernel`` and torch's other switches of SDPA: first of the measured on a GPU while one is off."""
    launched_by_cpp: ClassVar[bool] = False
    """A graph compiled for a GPU launches its kernel by C++: first of the measured there for short problems."""
    reads_caches: ClassVar[bool] = False
    """Made for few queries over keys in a cache: first of the measured there, where no table says more."""
    reads_late: ClassVar[bool] = False
    """What it prepared for a problem looks at the lengths of rows at each call, so that it serves the next layer of a
    step too, once the lengths of that one stand in the same tensor."""
    judges_by_outline: ClassVar[bool] = False
    """Its answers about a problem depend on ``spec.outline`` alone and on no value of a tensor: a choice is
    remembered beside padding, documents, mask tensors and a ``TensorBias`` too."""
    results_checked: ClassVar[bool] = False
    """Its own tests check kind, shape and dtype of every result; the package does not check them again."""
    yields_small_weights: ClassVar[bool] = False
    """Where attention weights of a small problem are asked for and no backend was named, the definition may make them
    and the output in its place."""

    def why_not(self, spec: AttentionSpec) -> str | None:
        """Why it cannot serve this problem, out of ``limits``; ``None`` where it can. Pure: it looks at no machine."""
        reasons = self.limits_exceeded(spec)
        return "; ".join(reasons) if reasons else None

    def limits_exceeded(self, spec: AttentionSpec) -> list[str]:
        """One phrase for each limit that a problem exceeds; extend it for a limit that is no number."""
        return self.limits.exceeded_by(spec)

    def why_not_here(self, device: torch.device) -> str | None:
        """Why this machine cannot run it on this device; ``None`` where it can."""
        if self.limits.devices and device.type not in self.limits.devices:
            return f"device {device.type} (only {', '.join(self.limits.devices)})"
        return None

    def why_not_built(self, spec: AttentionSpec) -> str | None:
        """Why the installed build cannot serve a problem the package can; asked only where it is available."""
        return None

    def must_compile(self, spec: AttentionSpec) -> str | None:
        """The kernel that a call compiles first, and waits for; ``None`` where it is there.

        Automatic choice asks, so that a short problem goes to a backend that is ready; one that was named compiles.
        """
        return None

    def kernel_key(self, spec: AttentionSpec) -> Hashable:
        """A name of what it compiles for a problem: problems with one answer share a kernel. ``None`` for no name."""
        return spec.outline

    def on_disk(self, device: torch.device) -> str | None:
        """Where compiled kernels outlive the process, or what turns that on; ``None`` where there is nothing to say."""
        return None

    def builds_mask(self, spec: AttentionSpec) -> bool:
        """It makes a (seqlen_q, seqlen_k) mask for this problem and computes what that hides: asked behind the measured
        backends that do not."""
        return False

    def reads_pages(self, spec: AttentionSpec) -> bool:
        """It reads keys where they lie in ``Pages``, in a problem that it serves; else it copies them into rows, which
        a layer does before, so that every backend may be chosen."""
        return "pages" in self.limits.features

    def runs_packed(self, dtype: torch.dtype, head_dim: int, device: torch.device, windowed: bool = False) -> bool:
        """It runs packed tokens (``Documents``) of such heads here without a mask, beside a window too where it is
        ``windowed``: on a GPU padding is left out, or real tokens put first, where a backend says so."""
        return False

    @abc.abstractmethod
    def __call__(self, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor | tuple[Tensor, Tensor]:
        """Attention: (batch, seqlen, heads, head_dim) in, (batch, seqlen_q, heads, head_dim_v) out.

        With ``spec.need_lse`` the pair (out, lse), lse (batch, heads, seqlen_q) in float32 (float64 for float64),
        ``-inf`` for a row that may look at nothing, its sink where there are sinks.
        """

    def prepare(self, spec: AttentionSpec) -> Serve:
        """A function of q, k and v that serves one problem, for several calls of it in a row: the layers of a model.

        What follows from the problem alone may be found here, once for all of them.
        """

        def serve(q: Tensor, k: Tensor, v: Tensor) -> Tensor | tuple[Tensor, Tensor]:
            return self(q, k, v, spec)

        return serve

    def __repr__(self) -> str:
        return f"<backend {self.name}>"

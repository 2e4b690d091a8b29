"""The kernels of flash-attn 4 as functions of tensors: eagerly, in an autograd graph, and as operators for compilers.

Not a backend: ``flash4`` says what a problem needs, and this file calls the package.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...host.torch_state import is_compiling
from ...problem.spec import AttentionSpec
from ..rewrites.compact import compact, move_back
from ..rewrites.heads import find_slots, neighbours
from .flash4_launches import launches
from .flash4_tensors import is_contiguous, is_taken_as_it_is
from .package import FlashAttn, Functions, probed_packages

TOLD: dict[str, tuple[str, Any]] = {
    "cu_seqlens_q": ("Tensor?", None),
    "cu_seqlens_k": ("Tensor?", None),
    "lengths": ("Tensor?", None),
    "valid": ("Tensor?", None),
    "first": ("Tensor?", None),
    "last": ("Tensor?", None),
    "table": ("Tensor?", None),
    "items": ("Tensor?", None),
    "pages": ("Tensor?", None),
    "max_seqlen_q": ("SymInt", 0),
    "max_seqlen_k": ("SymInt", 0),
    "scale": ("float", 1.0),
    "causal": ("bool", False),
    "left": ("SymInt?", None),
    "right": ("SymInt?", None),
    "softcap": ("float", 0.0),
    "deterministic": ("bool", False),
    "package": ("str", "flash4"),
}
"""Arguments of the kernels beside tensors that may want a gradient, in the order of ``forward``: type and default.

``lengths`` (batch,) are key lengths; ``valid`` (batch, seqlen_k) is padding, whose real keys are moved to the front;
``first`` and ``last`` (batch, seqlen_k) are intervals; ``table`` is a mask as ``block_tables.edged`` makes it, and
``items`` (batch,) say which of its items counts for each of the batch; ``pages`` (batch, pages) are those of a row's
keys; both bounds of a window are ``None`` where it is causal or there is none.
"""


UNTOLD = {name: default for name, (_, default) in TOLD.items()}


def call_kernels(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, told: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp; eagerly, or as an operator where a compiler traces."""
    told = {**UNTOLD, **told}
    if is_compiling():
        made = torch.ops.flashmha.flash4(q, k, v, spec.sinks, *[told[name] for name in TOLD])
    elif spec.needs_grad:
        made = Attend.apply(q, k, v, spec.sinks, told)  # type: ignore[no-untyped-call]
    else:
        made = forward(q, k, v, spec.sinks, told)
    return made[0], made[1]


def forward(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, told: dict[str, Any]) -> tuple[Tensor, ...]:
    """out, lse, and the keys and values as the kernel saw them where they were moved."""
    package: Any = probed_packages[told["package"]]
    moved: tuple[Tensor, ...] = ()
    if told["valid"] is not None:
        with package.machine.on(q.device):
            k, v, lengths = compact(k, v, told["valid"], package.tools.move)
        moved, told = (k, v), {**told, "lengths": lengths}

    tables = tiles_to_visit(told, q, k)

    def serve(**places: Tensor) -> tuple[Tensor, ...]:
        more = {"learnable_sink": sinks, "num_splits": 1, "return_lse": True, **places}
        # the package asks the current device, not the tensors', which kernels to build, and so does triton
        with package.machine.on(q.device):
            made: tuple[Tensor, ...] = package_kernels(package)[0](q, k, v, **options(told, tables), **more)
        return made

    again = launches(*package_kernels(package), q.device, package.tools.was_read)
    made = None if again is None else again.forward(told, (q, k, v), sinks, tables, serve)
    out, lse = serve()[:2] if made is None else made
    return out, lse, *moved


def backward(
    d_out: Tensor | None, d_lse: Tensor | None, saved: tuple[Tensor | None, ...], told: dict[str, Any], into: Any
) -> Tensor | None:
    """Gradients of q, k and v into three tensors; that of the sinks is returned."""
    q, k, v, sinks, out, lse = saved
    assert q is not None and k is not None and v is not None and out is not None and lse is not None
    dq, dk, dv = into
    package: Any = probed_packages[told["package"]]
    valid, made = told["valid"], (dk, dv)
    if valid is not None:
        told = {**told, "lengths": valid.sum(1, dtype=torch.int32)}  # counted again rather than kept
        made = (dk.new_empty(dk.shape), dv.new_empty(dv.shape))
    d_out = torch.zeros_like(out) if d_out is None else d_out if is_taken_as_it_is(d_out) else contiguous_copy(d_out)
    d_lse = d_lse if d_lse is None or is_contiguous(d_lse) else contiguous_copy(d_lse)

    tables = tiles_to_visit(told, q, k, backward=True)

    def serve() -> tuple[Tensor, ...]:
        more: dict[str, Any] = {"deterministic": told["deterministic"], "learnable_sink": sinks, "dlse": d_lse}
        more |= {"dq": dq, "dk": made[0], "dv": made[1]}
        with package.machine.on(q.device):
            result: tuple[Tensor, ...] = package_kernels(package)[1](
                q, k, v, out, d_out, lse, **options(told, tables), **more
            )
        return result

    again = launches(*package_kernels(package), q.device, package.tools.was_read)
    given = (q, k, v, sinks, out, lse)
    found = None if again is None else again.backward(told, given, (d_out, d_lse), (dq, *made), tables, serve)
    d_sinks = serve()[3:] if found is None else found
    if valid is not None:
        with package.machine.on(q.device):
            move_back(made, (dk, dv), valid, package.tools.move)
    if valid is None and told["lengths"] is not None:
        # gradients of keys past their length are never written (flash-attention#2167)
        past = torch.arange(dk.shape[1], device=dk.device) >= told["lengths"][:, None]
        for grad in (dk, dv):
            grad.masked_fill_(past[:, :, None, None], 0.0)
    return d_sinks[0] if sinks is not None else None


def contiguous_copy(x: Tensor) -> Tensor:
    """A gradient as kernels take it."""
    return x.clone(memory_format=torch.contiguous_format)


def options(told: dict[str, Any], tables: Any) -> dict[str, Any]:
    """Arguments of both directions, in the package's words."""
    found: dict[str, Any] = {
        "softmax_scale": told["scale"],
        "causal": told["causal"],
        "window_size_left": told["left"],
        "window_size_right": told["right"],
        "softcap": told["softcap"],
    }
    if told["cu_seqlens_q"] is not None:
        found |= {name: told[name] for name in ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")}
    elif told["lengths"] is not None:
        found["seqused_k"] = told["lengths"]
    if told["pages"] is not None:
        found["page_table"] = told["pages"]
    # a mask of one's own makes the kernel forget causality and windows: it holds both
    if told["first"] is not None:
        found |= {"mask_mod": masks_for(told).is_in_interval, "aux_tensors": [told["first"], told["last"]]}
    elif told["table"] is not None:
        found |= {"mask_mod": masks_for(told).is_in_table, "aux_tensors": [told["table"], told["items"]]}
    return found if tables is None else {**found, "block_sparse_tensors": tables}


def masks_for(told: dict[str, Any]) -> Any:
    """``flash4_masks``, or what a test has in its place."""
    package: Any = probed_packages[told["package"]]
    return package.tools.masks()


def tiles_to_visit(told: dict[str, Any], q: Tensor, k: Tensor, *, backward: bool = False) -> Any:
    """The tiles that a direction has to look at beside a mask of one's own; ``None`` where it looks at all of them."""
    if told["first"] is None and told["table"] is None:
        return None
    # flash_bwd_sm90 has no order of writing for a gradient of q that arrives tile by tile
    package: Any = probed_packages[told["package"]]
    tools = package.tools
    if (backward and told["deterministic"]) or min(q.shape[1], k.shape[1]) < tools.least:
        return None
    if not tools.takes_tables(q.device):
        return None
    with package.machine.on(q.device):
        return masks_for(told).blocks(told, q, k, backward=backward)


def package_kernels(package: FlashAttn) -> Functions:
    """The package's forward and backward."""
    return package.functions or package.load()


class Attend(torch.autograd.Function):
    """``forward`` and ``backward`` outside a compiler, where gradients may lie side by side in one tensor."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, told: dict[str, Any]) -> Any:
        out, lse, *moved = forward(q, k, v, sinks, told)
        ctx.told, ctx.side_by_side = told, neighbours((q, k, v))
        ctx.slots = [None] * 3 if ctx.side_by_side else [find_slots([x]) for x in (q, k, v)]
        ctx.save_for_backward(q, *(moved or (k, v)), sinks, out, lse)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, d_out: Any, d_lse: Any) -> Any:
        saved = ctx.saved_tensors
        heads: Any = saved[:3]
        sizes = [x.shape[-2] for x in heads]
        if ctx.side_by_side:
            grads = heads[0].new_empty(*heads[0].shape[:-2], sum(sizes), heads[0].shape[-1]).split(sizes, dim=-2)
        else:
            grads = tuple(x.new_empty(x.shape) if at is None else at.take(x)[0] for x, at in zip(heads, ctx.slots))
        return (*grads, backward(d_out, d_lse, saved, ctx.told, grads), None)


# The same two functions as operators, for compilers.

TOLD_SCHEMA = ", ".join(f"{type_} {name}" for name, (type_, _) in TOLD.items())
HEADS = "Tensor q, Tensor k, Tensor v, Tensor? sinks"


def four_forward(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, *arguments: Any) -> tuple[Tensor, ...]:
    """``forward`` with empty keys and values where they were not moved."""
    made = forward(q, k, v, sinks, dict(zip(TOLD, arguments)))
    return made if len(made) == 4 else (*made, k.new_empty(0), v.new_empty(0))


def fake_forward(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, *arguments: Any) -> tuple[Tensor, ...]:
    told = dict(zip(TOLD, arguments))
    rows = (q.shape[1], q.shape[0]) if q.dim() == 3 else (q.shape[0], q.shape[2], q.shape[1])
    lse = q.new_empty(rows, dtype=torch.float32)
    moved = told["valid"] is not None
    return q.new_empty(*q.shape[:-1], v.shape[-1]), lse, *(x.new_empty(x.shape if moved else 0) for x in (k, v))


def separate_backward(d_out: Tensor | None, d_lse: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    """``backward`` into tensors of its own."""
    saved, arguments = rest[:6], rest[6:]
    grads = fake_backward(d_out, d_lse, *rest)
    d_sinks = backward(d_out, d_lse, saved, dict(zip(TOLD, arguments)), grads[:3])
    return (*grads[:3], grads[3] if d_sinks is None else d_sinks)


def fake_backward(d_out: Tensor | None, d_lse: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    q, k, v, sinks = rest[:4]
    return (
        *(x.new_empty(x.shape) for x in (q, k, v)),
        q.new_empty(0) if sinks is None else sinks.new_empty(sinks.shape),
    )


def save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Save what the backward of the operator needs."""
    q, k, v, sinks, *arguments = inputs
    out, lse, *moved = output
    keys = moved if moved[0].dim() > 1 else (k, v)
    ctx.given = tuple(None if isinstance(x, Tensor) else x for x in arguments)
    ctx.holds = tuple(isinstance(x, Tensor) for x in arguments)
    tensors = [x for x in arguments if isinstance(x, Tensor)]
    ctx.save_for_backward(q, *keys, sinks, out, lse, *tensors)
    ctx.set_materialize_grads(False)


def traced_backward(ctx: Any, d_out: Any, d_lse: Any, *unused: Any) -> Any:
    saved, rest = ctx.saved_tensors[:6], iter(ctx.saved_tensors[6:])
    arguments = tuple(next(rest) if held else value for held, value in zip(ctx.holds, ctx.given))
    made = torch.ops.flashmha.flash4_backward(d_out, d_lse, *saved, *arguments)
    return (*made[:3], None if saved[3] is None else made[3], *(None,) * len(arguments))


FOUR = "(Tensor, Tensor, Tensor, Tensor)"
LIBRARY = torch.library.Library("flashmha", "FRAGMENT")
"""``torch.library.custom_op`` looks for outputs that alias inputs at every call, which costs more than a launch."""


def operator(name: str, inputs: str, run: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Make a function an operator for every device."""
    LIBRARY.define(
        f"{name}({inputs}) -> {FOUR}", tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)
    )
    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"flashmha::{name}", fake, lib=LIBRARY)


operator("flash4", f"{HEADS}, {TOLD_SCHEMA}", four_forward, fake_forward)
operator(
    "flash4_backward",
    f"Tensor? d_out, Tensor? d_lse, {HEADS}, Tensor out, Tensor lse, {TOLD_SCHEMA}",
    separate_backward,
    fake_backward,
)
torch.library.register_autograd("flashmha::flash4", traced_backward, setup_context=save_for_backward, lib=LIBRARY)

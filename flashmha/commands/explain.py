"""``flashmha explain``: which backend serves a problem given by flags, why not the others, and what its mask hides."""

from __future__ import annotations

import argparse
import dataclasses

import torch
from torch import Tensor

from ..backends import explain, origin
from ..backends.choice.explanation import BY_LIMITS
from ..backends.choice.wishes import asked
from ..problem.documents import Documents
from ..problem.masks import Dense, Mask
from ..problem.positions import ALIGNMENTS
from ..problem.ragged import KeyLengths, KeyPadding
from ..problem.scores import ALiBi, Bias, TensorBias
from ..problem.spec import AttentionSpec
from ..problem.windows import Window, causal
from ..problem.wording import dtype_name
from .devices import device
from .flags import DTYPE_NAMES, at_least, bound, version, whole_numbers
from .picture import Picture
from .screen import add_json, print_json, print_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    size, length = at_least(1), at_least(0)
    sizes = parser.add_argument_group("sizes")
    sizes.add_argument("--batch", type=length, help="default: as many as --key-lengths or --key-padding name, or 1")
    sizes.add_argument("--seqlen-q", type=length, help="default: the sum of --documents, or 128")
    sizes.add_argument("--seqlen-k", type=length, help="default: seqlen_q")
    sizes.add_argument("--heads", type=size, default=8, help="default 8")
    sizes.add_argument("--heads-kv", type=size, help="default: heads")
    sizes.add_argument("--head-dim", type=size, default=64, help="default 64")
    sizes.add_argument("--head-dim-v", type=size, help="default: head_dim")
    sizes.add_argument("--dtype", choices=DTYPE_NAMES, default=DTYPE_NAMES[0], help=f"default {DTYPE_NAMES[0]}")
    sizes.add_argument("--device", help="default: the first accelerator, or cpu")
    sizes.add_argument(
        "--capability",
        type=version,
        metavar="9.0",
        help="answer on paper, out of limits, for a CUDA GPU of this compute capability that need not be here",
    )
    masks = parser.add_argument_group("mask: all of these have to hold")
    masks.add_argument("--causal", action="store_true", help="no key after the query")
    masks.add_argument("--window", nargs=2, type=bound, metavar=("LEFT", "RIGHT"), help="keys around it; none: all")
    masks.add_argument("--align", choices=ALIGNMENTS, help=f"of --causal and --window, default {ALIGNMENTS[0]}")
    masks.add_argument("--key-lengths", type=whole_numbers, metavar="5,3", help="the first keys of each batch item")
    masks.add_argument(
        "--key-padding", type=whole_numbers, metavar="5,3", help="the same as a bool tensor; -3: the last three keys"
    )
    masks.add_argument("--documents", type=whole_numbers, metavar="4,2,6", help="lengths of documents packed in a row")
    masks.add_argument("--dense-mask", action="store_true", help="a tensor (seqlen_q, seqlen_k) of any pattern")
    scores = parser.add_argument_group("scores")
    scores.add_argument("--alibi", action="store_true", help="ALiBi, one slope a head")
    scores.add_argument(
        "--bias", nargs="?", const="fixed", choices=("fixed", "learned"), help="a tensor added to the scores"
    )
    scores.add_argument("--softcap", type=float, metavar="CAP")
    scores.add_argument("--sinks", action="store_true", help="one more score a head, which gives nothing")
    scores.add_argument("--dropout", type=float, default=0.0, metavar="P")
    asks = parser.add_argument_group("what is asked for")
    asks.add_argument("--grad", action="store_true", help="gradients")
    asks.add_argument("--lse", action="store_true", help="the log-sum-exp beside the output")
    asks.add_argument("--deterministic", action="store_true", help="the same gradients every time")
    asks.add_argument("--backend", metavar="NAME[,NAME]", help="as backend= of a call; default automatic")
    add_json(parser)


def problem(options: argparse.Namespace) -> AttentionSpec:
    """The problem of the flags; ``ValueError`` where they contradict each other.

    On paper its tensors are on the CPU, where the mask can be looked at, and it says that it is on a GPU.
    """
    paper = options.capability is not None
    if paper and options.device not in (None, "cuda"):
        raise ValueError(f"--capability must come with --device cuda or without it, got --device {options.device}.")
    where = torch.device("cpu") if paper else device_of(options.device)
    counts = options.key_lengths or options.key_padding
    batch = options.batch if options.batch is not None else len(counts) if counts else 1
    total = sum(options.documents) if options.documents else 128
    seqlen_q = total if options.seqlen_q is None else options.seqlen_q
    seqlen_k = seqlen_q if options.seqlen_k is None else options.seqlen_k
    heads = options.heads
    return AttentionSpec(
        batch=batch,
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        heads=heads,
        heads_kv=heads if options.heads_kv is None else options.heads_kv,
        head_dim=options.head_dim,
        head_dim_v=options.head_dim if options.head_dim_v is None else options.head_dim_v,
        dtype=getattr(torch, options.dtype),
        device=torch.device("cuda") if paper else where,
        mask=read_mask(options, seqlen_q, seqlen_k, where),
        bias=read_bias(options, seqlen_q, seqlen_k, where),
        softcap=options.softcap,
        sinks=torch.zeros(1, device=where).expand(heads) if options.sinks else None,
        dropout_p=options.dropout,
        needs_grad=options.grad or options.bias == "learned",
        need_lse=options.lse,
        deterministic=options.deterministic,
    )


def device_of(name: str | None) -> torch.device:
    """The device of the flag, with what to do about a GPU that is not here."""
    try:
        return device(name)
    except ValueError as error:
        if not str(name).startswith("cuda"):
            raise
        raise ValueError(f"{error} For one that is not here, on paper: --capability 9.0.") from error


def read_mask(options: argparse.Namespace, seqlen_q: int, seqlen_k: int, where: torch.device) -> Mask | None:
    """The mask of the flags."""
    if options.align is not None and not options.causal and options.window is None:
        raise ValueError(f"--align must come with --causal or --window, got --align {options.align} alone.")
    align = options.align or ALIGNMENTS[0]
    parts: list[Mask] = []
    if options.causal:
        parts.append(causal(align=align))
    if options.window is not None:
        parts.append(Window(*options.window, align=align))
    if options.key_lengths is not None:
        parts.append(KeyLengths(torch.tensor(options.key_lengths, device=where)))
    if options.key_padding is not None:
        parts.append(KeyPadding(valid_keys(options.key_padding, seqlen_k).to(where)))
    if options.documents is not None:
        offsets = torch.tensor([0, *options.documents]).cumsum(0)
        parts.append(Documents(offsets.to(where), max_seqlen=max(options.documents)))
    if options.dense_mask:
        parts.append(Dense(torch.ones(1, 1, dtype=torch.bool, device=where).expand(seqlen_q, seqlen_k)))
    mask: Mask | None = None
    for part in parts:
        mask = part if mask is None else mask & part
    return mask


def valid_keys(counts: list[int], seqlen_k: int) -> Tensor:
    """The first keys of each batch item, the last ones where a count is negative: (batch, seqlen_k)."""
    if any(abs(count) > seqlen_k for count in counts):
        raise ValueError(f"--key-padding must lie between -{seqlen_k} and {seqlen_k}, got {counts}.")
    many, key = torch.tensor(counts)[:, None], torch.arange(seqlen_k)
    return torch.where(many < 0, key >= seqlen_k + many, key < many)


def read_bias(options: argparse.Namespace, seqlen_q: int, seqlen_k: int, where: torch.device) -> Bias | None:
    """The bias of the flags."""
    parts: list[Bias] = []
    if options.alibi:
        parts.append(ALiBi(torch.ones(1, device=where).expand(options.heads)))
    if options.bias is not None:
        zero = torch.zeros((), dtype=getattr(torch, options.dtype), device=where)
        zero.requires_grad_(options.bias == "learned")
        parts.append(TensorBias(zero.expand(options.heads, seqlen_q, seqlen_k)))
    bias: Bias | None = None
    for part in parts:
        bias = part if bias is None else bias + part
    return bias


def main(options: argparse.Namespace) -> int:
    spec = problem(options)
    wanted = None if options.backend is None else [name.strip() for name in options.backend.split(",")]
    said, named = asked(wanted)
    answer = explain(spec, wanted, options.capability)
    picture = None if spec.mask is None else Picture.of(spec, spec.mask)
    if options.json:
        print_json(
            {
                "problem": explanation_data(spec),
                "asked": None if named is None else {"by": said, "backends": named},
                "chosen": answer.chosen,
                "conclusion": answer.conclusion,
                "backends": answer.rows,
                "notes": answer.notes,
                "registered_by": {name: origin(name) for name in answer.rows},
                "mask": picture and {"rule": repr(spec.mask), "step": picture.step, "items": picture.items},
            }
        )
    else:
        print(spec)
        if named is not None:
            print(f"{said}={named!r}")
        print_table(("backend", "answer"), list(answer.rows.items()))
        print("\n".join((*answer.notes, answer.conclusion)))
        if picture is not None and picture.items:
            print(f"\n{spec.mask!r}, ■ may attend\n{picture}")
    if options.capability is not None:
        return 0 if BY_LIMITS in answer.rows.values() else 1
    return 0 if answer.chosen else 1


def explanation_data(spec: AttentionSpec) -> dict[str, object]:
    """A problem as JSON knows it: plain fields, and what it needs."""
    found: dict[str, object] = {}
    for field in dataclasses.fields(spec):
        value = getattr(spec, field.name)
        if value is None or isinstance(value, (bool, int, float)):
            found[field.name] = value
    found |= {"dtype": dtype_name(spec.dtype), "device": str(spec.device)}
    found |= {"mask": spec.mask and repr(spec.mask), "bias": spec.bias and repr(spec.bias)}
    found |= {"sinks": spec.sinks is not None, "features": sorted(spec.features)}
    return found

"""Backends with one bug each, of the kinds that kernels have: what ``flashmha.testing`` has to catch in any run."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flashmha import ALiBi, AttentionSpec, Dense, KeyLengths, Pages, RelativeBias, TensorBias, Window
from flashmha.backends import get
from flashmha.backends.naive import log_sum_exp, probabilities, scores, weigh
from flashmha.problem.masks import Mask
from flashmha.problem.scores import Bias

Bug = Callable[[Tensor, Tensor, Tensor, AttentionSpec], Any]
"""A wrong backend: the definition, asked something else or answering something else."""
BLOCK = 64
naive = get("naive")


def asked(change: Callable[[AttentionSpec], AttentionSpec]) -> Bug:
    """The right answer to another problem."""
    return lambda q, k, v, spec: naive(q, k, v, change(spec))


def with_mask(spec: AttentionSpec, change: Callable[[Mask], Mask | None]) -> AttentionSpec:
    """The problem with every rule of its mask changed, or left out."""
    parts = [change(part) for part in spec.mask.parts] if spec.mask is not None else []
    kept = [part for part in parts if part is not None]
    return dataclasses.replace(spec, mask=functools.reduce(lambda one, two: one & two, kept) if kept else None)


def with_pages(change: Callable[[Pages], Pages]) -> Bug:
    """Keys in other pages."""
    bug = asked(lambda spec: with_mask(spec, lambda part: change(part) if isinstance(part, Pages) else part))
    bug.in_pages = True  # type: ignore[attr-defined]
    return bug


def pages_of_the_first_row(pages: Pages) -> Pages:
    return Pages(pages.block_table[:1].expand_as(pages.block_table), pages.page_size)


def pages_in_order(pages: Pages) -> Pages:
    """Rows lie one after another in the pool."""
    table = pages.block_table
    some = torch.arange(table.numel(), dtype=torch.int32).view(table.shape)
    return Pages(torch.minimum(some, table.max()) if table.numel() else table, pages.page_size)


def with_bias(change: Callable[[Bias, AttentionSpec], Bias]) -> Bug:
    """Every part of the bias changed."""

    def other(spec: AttentionSpec) -> AttentionSpec:
        if spec.bias is None:
            return spec
        parts = [change(part, spec) for part in spec.bias.parts]
        return dataclasses.replace(spec, bias=functools.reduce(lambda one, two: one + two, parts))

    return asked(other)


def fixed(kind: type[Bias]) -> Bug:
    """No gradient for what biases of a kind hold."""
    return with_bias(lambda part, spec: type(part)(part.tensors()[0].detach()) if isinstance(part, kind) else part)


def with_numbers(change: Callable[[Tensor], Tensor]) -> Bug:
    """The numbers of tensors that are added to scores changed."""
    return with_bias(lambda part, spec: TensorBias(change(part.tensor)) if isinstance(part, TensorBias) else part)


def hiding(below: Callable[[Tensor], Tensor]) -> Bug:
    """Low numbers read as hidden keys."""
    return with_numbers(lambda x: x.masked_fill(below(x.detach()), -math.inf))


def hidden_tables(change: Callable[[Tensor, AttentionSpec], Tensor]) -> Bug:
    """The whole mask as another table (batch, heads, seqlen_q, seqlen_k)."""

    def other(spec: AttentionSpec) -> AttentionSpec:
        allowed = spec.allowed()
        if allowed is None:
            allowed = torch.ones(1, 1, 1, 1, dtype=torch.bool)
        whole = allowed.expand(spec.batch, spec.heads, spec.seqlen_q, spec.seqlen_k)
        return dataclasses.replace(spec, mask=Dense(change(whole.clone(), spec)))

    return asked(other)


def weighing(change: Callable[[Tensor, AttentionSpec], Tensor]) -> Bug:
    """Other weights out of the scores; the log-sum-exp is right."""

    def bug(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Any:
        score, blind = scores(q, k, spec)
        weights = change(score, spec)
        weights = weights if blind is None else weights.masked_fill(blind, 0.0)
        out = weigh(weights[..., : spec.seqlen_k].to(v.dtype), v, spec)
        return (out, log_sum_exp(score, blind)) if spec.need_lse else out

    return bug


def without_a_maximum(score: Tensor, spec: AttentionSpec) -> Tensor:
    return score.exp() / score.exp().sum(dim=-1, keepdim=True)


def without_rescaling(score: Tensor, spec: AttentionSpec) -> Tensor:
    """What earlier blocks of keys added up stays as it was when a later one has a larger score."""
    blocks = score.split(BLOCK, dim=-1)
    largest = functools.reduce(
        lambda seen, block: [*seen, torch.maximum(seen[-1], block.amax(-1, keepdim=True))],
        blocks[1:],
        [blocks[0].amax(-1, keepdim=True)] if score.shape[-1] else [],
    )
    if not largest:
        return score.softmax(-1)
    parts = [(block - most.nan_to_num(neginf=0.0)).exp() for block, most in zip(blocks, largest)]
    weights = torch.cat(parts, dim=-1)
    return weights / weights.sum(dim=-1, keepdim=True)


def zeros_where_all_is_low(score: Tensor, spec: AttentionSpec) -> Tensor:
    low = (score < -100.0).all(dim=-1, keepdim=True)
    return score.softmax(-1).masked_fill(low, 0.0)


def nan_where_all_is_low(score: Tensor, spec: AttentionSpec) -> Tensor:
    return score.softmax(-1).masked_fill((score < -100.0).all(dim=-1, keepdim=True), math.nan)


def by_blocks_alone(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Any:
    """The log-sum-exp of the last block of keys."""
    result = naive(q, k, v, spec)
    score, blind = scores(q, k, spec)
    last = (spec.seqlen_k - 1) // BLOCK * BLOCK if spec.seqlen_k else 0
    return (result[0], log_sum_exp(score[..., last:], blind)) if spec.need_lse else result


def cut(features: int, *which: int) -> Bug:
    """Some of q, k and v without what lies past some features."""

    def bug(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Any:
        all_three = [q, k, v]
        for place in which:
            x = all_three[place]
            kept = torch.arange(x.shape[-1]) < features
            all_three[place] = torch.where(kept, x, torch.zeros_like(x))
        return naive(*all_three, spec)

    return bug


def cut_to_eights(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Any:
    return cut(max(8, spec.head_dim // 8 * 8), 0)(q, k, v, spec)


def moved_heads(change: Callable[[Tensor, AttentionSpec], Tensor]) -> Bug:
    """Another key head for some heads: a table of key heads by heads, changed."""

    def bug(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Any:
        table = change(torch.arange(spec.heads) // (spec.heads // spec.heads_kv), spec)
        return naive(q, k[:, :, table], v[:, :, table], dataclasses.replace(spec, heads_kv=spec.heads))

    return bug


def groups_of_four(table: Tensor, spec: AttentionSpec) -> Tensor:
    group = spec.heads // spec.heads_kv
    return torch.where(torch.arange(spec.heads) % group > 3, (table + 1) % spec.heads_kv, table)


def items_of_three(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Any:
    items = torch.arange(spec.batch) % 3
    return naive(q, k[items], v[items], spec)


def rows_from_the_start(allowed: Tensor, spec: AttentionSpec) -> Tensor:
    """Each tile of queries masked as the first."""
    return allowed[:, :, torch.arange(spec.seqlen_q) % BLOCK]


def open_beyond(rows: int, keys: int) -> Callable[[Tensor, AttentionSpec], Tensor]:
    """Queries and keys beyond some see, and are seen, whatever the mask says."""

    def change(allowed: Tensor, spec: AttentionSpec) -> Tensor:
        allowed[:, :, rows:, keys:] = True
        return allowed

    return change


def without_the_last_tile(allowed: Tensor, spec: AttentionSpec) -> Tensor:
    whole = spec.seqlen_k // BLOCK * BLOCK
    if whole:
        allowed[..., whole:] = False
    return allowed


def lengths_of_whole_tiles(part: Mask) -> Mask:
    if not isinstance(part, KeyLengths):
        return part
    whole = (part.lengths > 0) & (part.lengths % BLOCK == 0)
    return KeyLengths(torch.where(whole, part.lengths - BLOCK, part.lengths))


def window_of_tiles(part: Mask) -> Mask:
    """A window that reaches beyond a tile reaches without an end."""
    if not isinstance(part, Window):
        return part
    other = Window(None, None, align=part.align)
    for name in ("left", "right"):
        bound = getattr(part, name)
        setattr(other, name, None if bound is None or bound >= BLOCK - 1 else bound)
    return other


def softcap_forgotten_at_large_scores(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Any:
    if spec.softcap is None:
        return naive(q, k, v, spec)
    plain, _ = scores(q, k, dataclasses.replace(spec, softcap=None, mask=None, bias=None, sinks=None))
    capped, _ = scores(q, k, dataclasses.replace(spec, mask=None, bias=None, sinks=None))
    large = (plain.detach().abs() > 60.0).expand_as(plain)
    wrong = torch.where(large, plain - capped, torch.zeros_like(plain))
    bias = TensorBias(wrong) if spec.bias is None else spec.bias + TensorBias(wrong)
    return naive(q, k, v, dataclasses.replace(spec, bias=bias))


def sum_of_the_first_bias(spec: AttentionSpec) -> AttentionSpec:
    return spec if spec.bias is None else dataclasses.replace(spec, bias=spec.bias.parts[0])


def slopes_of_the_first_item(part: Bias, spec: AttentionSpec) -> Bias:
    return ALiBi(part.slopes[0]) if isinstance(part, ALiBi) and part.slopes.dim() == 2 and spec.batch else part


def along(axis: int) -> Bug:
    """A bias that is the same along an axis, read at its first place alone."""

    def change(part: Bias, spec: AttentionSpec) -> Bias:
        size = (spec.batch, spec.heads, spec.seqlen_q, spec.seqlen_k)[axis]
        if not isinstance(part, TensorBias) or part.tensor.shape[axis] == size:
            return part
        first = torch.arange(size).view([-1 if other == axis else 1 for other in range(4)]) == 0
        return TensorBias(torch.where(first, part.tensor, torch.zeros_like(part.tensor)))

    return with_bias(change)


def sinks_within(bound: float) -> Bug:
    def other(spec: AttentionSpec) -> AttentionSpec:
        return spec if spec.sinks is None else dataclasses.replace(spec, sinks=spec.sinks.clamp(-bound, bound))

    return asked(other)


def gradient_of_the_first_tile(which: int) -> Bug:
    """Keys or values hear from the first tile of queries alone."""

    def bug(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Any:
        if spec.seqlen_q <= BLOCK or spec.need_lse:
            return naive(q, k, v, spec)
        known = [q, k, v]
        known[which] = known[which].detach()
        return torch.cat((naive(q, k, v, spec)[:, :BLOCK], naive(*known, spec)[:, BLOCK:]), dim=1)

    return bug


# Dropout


def dropping(change: Callable[[Tensor, AttentionSpec], Tensor]) -> Bug:
    """Weights dropped in another way; the log-sum-exp is right."""

    def bug(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Any:
        if not spec.dropout_p:
            return naive(q, k, v, spec)
        score, blind = scores(q, k, spec)
        out = weigh(change(probabilities(score, blind, spec), spec).to(v.dtype), v, spec.changed(dropout_p=0.0))
        return (out, log_sum_exp(score, blind)) if spec.need_lse else out

    return bug


def dropped(weights: Tensor, spec: AttentionSpec, *axes: int, rate: float | None = None) -> Tensor:
    """Weights dropped alike along some axes."""
    shape = [1 if axis in axes else size for axis, size in enumerate(weights.shape)]
    return weights * F.dropout(weights.new_ones(shape), spec.dropout_p if rate is None else rate)


def alike(*axes: int) -> Bug:
    return dropping(lambda weights, spec: dropped(weights, spec, *axes))


def unscaled(weights: Tensor, spec: AttentionSpec) -> Tensor:
    return F.dropout(weights, spec.dropout_p) * (1 - spec.dropout_p)


def of_one_seed(weights: Tensor, spec: AttentionSpec) -> Tensor:
    with torch.random.fork_rng([]):
        torch.default_generator.manual_seed(0)
        return F.dropout(weights, spec.dropout_p)


def too_many(weights: Tensor, spec: AttentionSpec) -> Tensor:
    """The scale is right, and a fifth too many are dropped."""
    rate = min(1.0, 1.2 * spec.dropout_p)
    return weights * (F.dropout(torch.ones_like(weights), rate) > 0) / max(1 - spec.dropout_p, 1e-9)


OWN = torch.Generator().manual_seed(0)


def of_no_seed(weights: Tensor, spec: AttentionSpec) -> Tensor:
    keep = torch.rand(weights.shape, generator=OWN) >= spec.dropout_p
    return weights * keep / max(1 - spec.dropout_p, 1e-9)


def of_each_tile(weights: Tensor, spec: AttentionSpec) -> Tensor:
    """The first key is never dropped."""
    kept = F.dropout(weights, spec.dropout_p)
    return torch.cat((weights[..., :1] * (0.0 if spec.dropout_p == 1 else 1 / (1 - spec.dropout_p)), kept[..., 1:]), -1)


def of_the_output(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Any:
    result = naive(q, k, v, spec.changed(dropout_p=0.0))
    if not spec.need_lse:
        return F.dropout(result, spec.dropout_p)
    return F.dropout(result[0], spec.dropout_p), result[1]


def of_another_backward(weights: Tensor, spec: AttentionSpec) -> Tensor:
    there, back = F.dropout(weights, spec.dropout_p), F.dropout(weights, spec.dropout_p)
    return back + (there - back).detach()


PLANTED: dict[str, Bug] = {
    "sinks without a gradient": asked(
        lambda spec: spec if spec.sinks is None else dataclasses.replace(spec, sinks=spec.sinks.detach())
    ),
    "slopes without a gradient": fixed(ALiBi),
    "a table without a gradient": fixed(RelativeBias),
    "a bias without a gradient": fixed(TensorBias),
    "no maximum taken off": weighing(without_a_maximum),
    "no rescaling between blocks": weighing(without_rescaling),
    "scores above 88 cut": weighing(lambda score, spec: score.clamp(max=88.0).softmax(-1)),
    "zeros where all scores are low": weighing(zeros_where_all_is_low),
    "NaN where all scores are low": weighing(nan_where_all_is_low),
    "the log-sum-exp of the last block": by_blocks_alone,
    "features of q and k past 64 cut off": cut(64, 0, 1),
    "features of v past 64 cut off": cut(64, 2),
    "features past 128 cut off": cut(128, 0, 1, 2),
    "features past a multiple of 8 cut off": cut_to_eights,
    "a group of four heads at most": moved_heads(groups_of_four),
    "eight heads at most": moved_heads(lambda table, spec: table[torch.arange(spec.heads) % 8]),
    "three batch items at most": items_of_three,
    "every tile of queries masked as the first": hidden_tables(rows_from_the_start),
    "no mask beyond 64 queries": hidden_tables(open_beyond(BLOCK, 0)),
    "no mask beyond 64 keys": hidden_tables(open_beyond(0, BLOCK)),
    "no mask beyond 128 keys": hidden_tables(open_beyond(0, 2 * BLOCK)),
    "the last tile of keys dropped": hidden_tables(without_the_last_tile),
    "pages of the first row in all": with_pages(pages_of_the_first_row),
    "pages in the order of the pool": with_pages(pages_in_order),
    "lengths of whole tiles one tile short": asked(lambda spec: with_mask(spec, lengths_of_whole_tiles)),
    "windows beyond a tile unbounded": asked(lambda spec: with_mask(spec, window_of_tiles)),
    "softcap forgotten at large scores": softcap_forgotten_at_large_scores,
    "-1e4 hides": hiding(lambda x: x <= -1e4),
    "-1e9 hides": hiding(lambda x: x <= -9e8),
    "the lowest number hides": hiding(lambda x: x <= torch.finfo(x.dtype).min),
    "-inf hides nearly": with_numbers(lambda x: x.clamp(min=-1e9 if x.dtype != torch.float16 else -6e4)),
    "the first of two biases": asked(sum_of_the_first_bias),
    "slopes of the first batch item": with_bias(slopes_of_the_first_item),
    "a bias of one batch item for the first alone": along(0),
    "a bias of one head for the first alone": along(1),
    "a bias of one query for the first alone": along(2),
    "a bias of one key for the first alone": along(3),
    "sinks within 30": sinks_within(30.0),
    "keys hear of the first tile of queries": gradient_of_the_first_tile(1),
    "values hear of the first tile of queries": gradient_of_the_first_tile(2),
    "dropout ignored": asked(lambda spec: spec.changed(dropout_p=0.0)),
    "dropout not scaled": dropping(unscaled),
    "dropout of twice as many": dropping(lambda weights, spec: dropped(weights, spec, rate=min(1, 2 * spec.dropout_p))),
    "dropout of a fifth too many": dropping(too_many),
    "dropout alike in all batch items": alike(0),
    "dropout alike in all heads": alike(1),
    "dropout alike in all queries": alike(2),
    "dropout alike in all keys": alike(3),
    "dropout of one seed": dropping(of_one_seed),
    "dropout of no seed": dropping(of_no_seed),
    "dropout without the first key": dropping(of_each_tile),
    "dropout of the output": of_the_output,
    "dropout of another backward": dropping(of_another_backward),
}
"""What is wrong, and the backend."""

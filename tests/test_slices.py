"""Slices of a map that was not made yet: the same numbers, made alone, and views all the same."""

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import fewer
from hypothesis import assume, given
from hypothesis import strategies as st
from test_recipe import blocks_of, problems
from test_reductions import rounding, told
from test_weights import Largest
from torch import Tensor

from flashmha import AttentionSpec, FlashMultiHeadAttention, KeyLengths, causal
from flashmha.testing import noise, seeds, tensors
from flashmha.weights import attend
from flashmha.weights.attend import attention_with_weights
from flashmha.weights.deferred import Deferred


@pytest.fixture(autouse=True)
def every_map_is_deferred() -> Iterator[None]:
    """Also the small ones, which are ordinary tensors otherwise."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attend, "FEW_SCORES", 0)
        yield


def is_unmade(tensor: Tensor) -> bool:
    return type(tensor) is Deferred and tensor.cell is not None and tensor.cell.made is None


places = st.integers(-4, 3)
ends = st.none() | st.integers(-5, 5)
slices = st.builds(slice, ends, ends, st.none() | st.integers(1, 3))
indices = st.lists(places | slices | slices | st.just(slice(None)) | st.just(None), min_size=1, max_size=4).map(tuple)
indices = indices | st.tuples(st.just(...), places | slices) | st.tuples(st.just(...), places | slices, slices)


def reduced(name: str, dim: int) -> Callable[[Tensor], Tensor]:
    return lambda x: getattr(x, name)(dim)


others = {
    "unsqueeze": lambda x: x.unsqueeze(0),
    "transpose": lambda x: x.transpose(0, -1),
    "flatten": lambda x: x.flatten(),
    "unbind": lambda x: x.unbind(0)[-1],
    "split": lambda x: x.split(2, -1)[0],
    "select": lambda x: x.select(1, -1),
    "narrow": lambda x: x.narrow(-2, 0, 1),
    "expand": lambda x: x.expand(2, *x.shape),
    "list": lambda x: x[:, [-1]],
    "detach": lambda x: x.detach(),
}
one_step = (
    indices.map(lambda index: lambda x: x[index])
    | st.builds(reduced, st.sampled_from(("sum", "mean", "amax")), st.integers(-3, 2))
    | st.sampled_from(sorted(others)).map(others.__getitem__)
)
steps = st.lists(one_step, min_size=1, max_size=4)


def followed(x: Tensor, chain: list[Any]) -> Any:
    """What a chain of operators gives, or the error that it raises."""
    try:
        for step in chain:
            x = step(x)
        return x
    except (IndexError, RuntimeError) as error:
        return type(error)


@given(
    spec=problems,
    average=st.booleans(),
    batched=st.booleans(),
    some=st.booleans(),
    chain=steps,
    block=st.sampled_from((1, 2**19)),
    seed=seeds(),
)
def test_what_is_read_is_what_the_map_has(
    spec: AttentionSpec, average: bool, batched: bool, some: bool, chain: list[Any], block: int, seed: int
) -> None:
    """Within the rounding of the map's dtype, of sums that count as many of its numbers."""
    spec = spec.changed(dropout_p=0.0, need_lse=False)
    q, k, v = tensors(spec, seed)
    more = told(spec, average, batched, some, seed)
    with torch.no_grad(), blocks_of(block):
        read = attention_with_weights(q, k, v, spec, "naive", **more)[1].clone()
        expected = followed(read, chain)
        unread = attention_with_weights(q, k, v, spec, "naive", **more)[1]
        found = followed(unread, chain)
        if not isinstance(expected, Tensor):
            assert found == expected
            return
        assert found.dtype == expected.dtype and found.shape == expected.shape
        if type(found) is Deferred and found._is_view():
            strides = [[n for n, size in zip(x.stride(), x.shape) if size > 1] for x in (found, expected)]
            assert strides[0] == strides[1] and found.storage_offset() == expected.storage_offset()
        seen, again = found.clone(), found.clone()
        torch.testing.assert_close(seen, again, equal_nan=True)
        torch.testing.assert_close(unread.clone(), read, msg="reading it whole afterwards")
        after = found.clone()
    error, scale = rounding(spec, q, k), max(1.0, expected.nan_to_num().abs().max().item()) if expected.numel() else 1.0
    for one in (seen, after):
        torch.testing.assert_close(one.double(), expected.double(), atol=error * scale, rtol=error, equal_nan=True)


def plain_maps(average: bool = False, mask: Any = None, seqlen: int = 24) -> tuple[Tensor, Tensor]:
    """A map that was not read, and the ordinary tensor that it stands for."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, seqlen, 4, 8) for _ in range(3))
    spec = AttentionSpec.of(q, k, v, mask=mask)
    with torch.no_grad():
        return tuple(attention_with_weights(q, k, v, spec, "naive", average=average)[1] for _ in range(2))  # type: ignore[return-value]


SIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "map": lambda x: x,
    "row": lambda x: x[:, :, -1],
    "rows": lambda x: x[:, 1, 2:9:3],
    "head": lambda x: x[:, 2],
    "keys": lambda x: x[..., -1, :5],
    "turned": lambda x: x[0, :, 3].mT,
    "parted": lambda x: x[1, :, 4].view(2, 2, -1),
    "detached": lambda x: x[1].detach()[..., -1],
}
DEEDS: dict[str, Callable[[Tensor], Any]] = {
    "read": lambda x: x.sum(),
    "copied": lambda x: x.clone(),
    "mul_": lambda x: x.mul_(2.0),
    "setitem": lambda x: x.__setitem__(..., x[..., :1] + 1.0),
    "out": lambda x: torch.add(x.clone(), 1.0, out=x),
    "foreach": lambda x: torch._foreach_add_([x], 1.0),
    "numpy": lambda x: x.numpy().__iadd__(3.0),
    "data": lambda x: x.data.mul_(3.0),
    "storage": lambda x: x.untyped_storage().fill_(0),
    "view": lambda x: x[..., 1:].neg_(),
    "copy_": lambda x: torch.zeros(x.shape).copy_(x),
    "detach": lambda x: x.detach().add_(0.5),
    "set_": lambda x: torch.empty(0).set_(x).mul_(1.5),
    "compiled": lambda x: torch.compile(lambda y: y * 2.0, backend="eager", dynamic=False)(x),
    "written by a compiled function": lambda x: torch.compile(lambda y: y.mul_(2.0), backend="eager", dynamic=False)(x),
    "pickled": lambda x: pickle.loads(pickle.dumps(x)),
    "deepcopy": lambda x: copy.deepcopy(x),
}


@pytest.mark.cpu("changes the memory of a CPU")
@given(
    names=st.lists(st.sampled_from(sorted(SIGHTS)), min_size=1, max_size=4),
    deeds=st.lists(st.tuples(st.integers(0, 3), st.sampled_from(sorted(DEEDS))), max_size=4),
)
def test_a_write_reaches_every_view_as_it_would_in_an_ordinary_map(
    names: list[str], deeds: list[tuple[int, str]]
) -> None:
    unread, other = plain_maps()
    read = other.clone()
    ours, theirs = ([x, *(SIGHTS[name](x) for name in names)] for x in (unread, read))
    for which, name in deeds:
        answers = []
        for sights in (ours, theirs):
            try:
                answers.append(DEEDS[name](sights[which % len(sights)]))
            except (RuntimeError, ValueError) as error:
                answers.append(type(error))
        if isinstance(answers[1], Tensor):
            torch.testing.assert_close(answers[0].detach().clone(), answers[1], msg=name)
        else:
            assert type(answers[0]) is type(answers[1])
    for one, two in zip(ours, theirs):
        assert one.stride() == two.stride() and one._is_view() == two._is_view()
        torch.testing.assert_close(one.clone(), two)


def test_a_view_that_was_read_and_saved_says_that_it_changed() -> None:
    unread, _ = plain_maps()
    factor = torch.ones(24, requires_grad=True)
    made = (unread[:, :, -1] * factor).sum()
    unread.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        made.backward()


@fewer(2)
@given(spec=problems, average=st.booleans(), chain=steps, block=st.sampled_from((1, 2**19)), seed=seeds())
def test_gradients_pass_what_is_read(
    spec: AttentionSpec, average: bool, chain: list[Any], block: int, seed: int
) -> None:
    spec = spec.changed(dropout_p=0.0, need_lse=False, needs_grad=True, dtype=torch.float64, bias=None, sinks=None)
    values = [x.double() for x in tensors(spec, seed)]
    answers = []
    for read in (True, False):
        q, k, v = (x.clone().requires_grad_() for x in values)
        with blocks_of(block):
            weights = attention_with_weights(q, k, v, spec, "naive", average=average)[1]
            found = followed(weights * 1.0 if read else weights, chain)
            assume(isinstance(found, Tensor))
            if not found.requires_grad:
                continue
            more = weights[..., -1:, :].square().sum()  # two ways back to one map
            toward = noise(seed, *found.shape, dtype=torch.float64)
            answers.append((found.detach().clone(), *torch.autograd.grad((found, more), (q, k), (toward, None))))
    for expected, actual in zip(*answers):
        torch.testing.assert_close(actual, expected, atol=1e-9, rtol=1e-9)


@given(spec=problems, average=st.booleans(), head=st.booleans(), seed=seeds())
def test_learned_scores_get_the_gradients_of_what_was_read(
    spec: AttentionSpec, average: bool, head: bool, seed: int
) -> None:
    spec = spec.changed(dropout_p=0.0, need_lse=False, needs_grad=True, dtype=torch.float64)
    q, k, v = (x.double().requires_grad_() for x in tensors(spec, seed))
    held = [*(spec.bias.tensors() if spec.bias else ()), *([spec.sinks] if spec.sinks is not None else [])]
    wanted = [q, k, *(x for x in held if x.requires_grad)]
    answers = []
    for read in (True, False):
        weights = attention_with_weights(q, k, v, spec, "naive", average=average)[1]
        weights = weights * 1.0 if read else weights
        found = weights[:, -1] if head else weights[..., ::2, :].sum(-2)
        answers.append(torch.autograd.grad(found.square().sum(), wanted, allow_unused=True, materialize_grads=True))
    for expected, actual in zip(*answers):
        assume(expected.isfinite().all())
        eps = torch.finfo(expected.dtype).eps
        torch.testing.assert_close(actual, expected, atol=1e-9 + 8 * eps, rtol=1e-9 + 8 * eps)


SEQLEN, HEADS = 256, 4
PARTS: dict[str, Callable[[Tensor], Tensor]] = {
    "w[:, :, -1]": lambda w: w[:, :, -1],
    "w[..., -1, :5]": lambda w: w[..., -1, :5],
    "w[..., 3:7, :]": lambda w: w[..., 3:7, :],
    "w[..., :3]": lambda w: w[..., :3],
    "w[:, :, ::64]": lambda w: w[:, :, ::64],
    "w[:, :, -1].mean(1)": lambda w: w[:, :, -1].mean(1),
    "w.mean(1)[:, -1]": lambda w: w.mean(1)[:, -1],
    "w[:, 1].mean(1)": lambda w: w[:, 1].mean(1),
    "w[0].sum(-2)": lambda w: w[0].sum(-2),
    "w[:, :, -4:].sum(2)": lambda w: w[:, :, -4:].sum(2),
    "w.mean(2)": lambda w: w.mean(2),
    "w.mean((0, 1, 2))": lambda w: w.mean((0, 1, 2)),
    "w.sum(2)": lambda w: w.sum(2),
    "w.select(2, 5)": lambda w: w.select(2, 5),
    "w.narrow(2, 5, 2)": lambda w: w.narrow(2, 5, 2),
    "w[:, :, [0, -1]]": lambda w: w[:, :, [0, -1]],
    "w[0, :, 0, 1:].reshape(4, 5, -1)": lambda w: w[0, :, 0, 1:].reshape(4, 5, -1),
    "w.detach()[:, :, -1]": lambda w: w.detach()[:, :, -1],
}


@pytest.mark.cpu("blocks of a size for a CPU")
@pytest.mark.parametrize("mask", (None, causal(), KeyLengths(torch.tensor([SEQLEN - 7]))))
@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("training", (False, True))
def test_neither_reading_nor_training_makes_the_map(name: str, mask: Any, training: bool) -> None:
    q, k, v = (torch.randn(1, SEQLEN, HEADS, 8).requires_grad_(training) for _ in range(3))
    spec = AttentionSpec.of(q, k, v, mask=mask)
    unread = attention_with_weights(q, k, v, spec, "sdpa", average=False)[1]
    with blocks_of(SEQLEN * 16), Largest() as largest:
        found = PARTS[name](unread)
        loss = (found * 1.0).square().sum()
        if loss.requires_grad:
            loss.backward()
    assert is_unmade(unread) and found.numel() <= SEQLEN * 16
    assert largest.numel <= max(SEQLEN * 16, q.numel()), "more than a block, or the keys"
    assert not training or q.grad is not None or "detach" in name


def test_one_head_is_made_of_its_own_scores() -> None:
    unread, read = plain_maps()
    one = unread[:, 2]
    torch.testing.assert_close(one * 1.0, read.clone()[:, 2])
    assert is_unmade(unread) and is_unmade(one), "until something wants its memory"
    assert one.data_ptr() == unread.data_ptr() + 2 * 24 * 24 * 4 and not is_unmade(unread)


def test_a_map_that_is_read_row_by_row_is_made_in_the_end() -> None:
    unread, read = plain_maps(seqlen=64)
    expected = read.clone()
    for row in range(64):
        torch.testing.assert_close(unread[:, :, row] * 1.0, expected[:, :, row])
    assert not is_unmade(unread)


def test_the_gradient_of_a_largest_value_finds_it_after_the_map_was_made() -> None:
    q, k, v = (torch.randn(1, 24, 4, 8).requires_grad_() for _ in range(3))
    weights = attention_with_weights(q, k, v, AttentionSpec.of(q, k, v), "naive", average=False)[1]
    largest = weights[:, :, -1].amax(-1)
    assert weights.clone().isfinite().all()
    (found,) = torch.autograd.grad(largest.sum(), q, retain_graph=True)
    (expected,) = torch.autograd.grad((weights * 1.0)[:, :, -1].amax(-1).sum(), q)
    torch.testing.assert_close(found, expected)


class Work(Largest):
    """The operators whose results are no views, and how many numbers those hold."""

    def __init__(self) -> None:
        super().__init__()
        self.done: list[tuple[Any, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        given = [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if type(result) is not Tensor or result.is_meta or any(type(x) is Deferred for x in given):
            return result
        if result.untyped_storage().data_ptr() not in [x.untyped_storage().data_ptr() for x in given]:
            self.done.append((func, result.numel()))
        return result


@pytest.mark.cpu("blocks of a size for a CPU")
@pytest.mark.parametrize("average", (False, True))
def test_a_copy_of_a_part_is_made_once_and_its_own(average: bool) -> None:
    unread, read = plain_maps(average)
    expected = read.clone()[0, 1] if average else read.clone()[:, 1]
    part = unread[0, 1] if average else unread[:, 1]
    with blocks_of(24), Work() as work:
        copied = part.clone()
    assert [size for _, size in work.done].count(expected.numel()) == 1 or average
    assert is_unmade(unread) and not copied._is_view() and copied.is_contiguous()
    copied.fill_(7.0)
    torch.testing.assert_close(part.clone(), expected)
    torch.testing.assert_close(part * 1.0, expected)
    torch.testing.assert_close(part.clone(), expected)
    torch.testing.assert_close(part.clone(memory_format=torch.contiguous_format), expected)


@pytest.mark.cpu("counts the operators of a CPU")
@pytest.mark.parametrize("mask", (None, causal()))
@pytest.mark.parametrize("average", (False, True))
def test_a_row_takes_few_operators(mask: Any, average: bool) -> None:
    unread, _ = plain_maps(average, mask)
    with Work() as work:
        unread[..., -1, :].clone()
    assert len(work.done) <= 5 + average, work.done  # q scaled, q and k laid out, product, softmax, mean


COMPILED: dict[str, Callable[[Tensor], Tensor]] = {
    "sliced": lambda w: w[:, :, -1] * 2.0,
    "summed": lambda w: w.mean(1) + w.sum(2).mean(1, keepdim=True),
    "picked": lambda w: w[:, [1, 0]] + 1.0,
    "selected": lambda w: w.select(1, 0).narrow(1, 0, 2) * 1.0,
    "detached": lambda w: w.detach()[0] * 1.0,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("training", (False, True))
@pytest.mark.parametrize("name", COMPILED)
def test_a_compiled_function_gets_the_values(name: str, training: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 24, 16)
    layer = FlashMultiHeadAttention(16, 4, batch_first=True)
    function = torch.compile(COMPILED[name], backend="aot_eager", dynamic=False)
    with torch.set_grad_enabled(training):
        unread, read = (layer(x, x, x, average_attn_weights=False)[1] for _ in range(2))
        expected = COMPILED[name](read.clone())
        torch.testing.assert_close(function(unread), expected)
        torch.testing.assert_close(function(read[:, :2].contiguous()), COMPILED[name](read.clone()[:, :2]))
        part = layer(x, x, x, average_attn_weights=False)[1][0]
        torch.testing.assert_close(
            torch.compile(lambda y: y * 2.0, backend="aot_eager", dynamic=False)(part), 2.0 * read.clone()[0]
        )


def test_gradients_that_are_kept_or_seen_by_hooks_are_whole() -> None:
    q, k, v = (torch.randn(1, 24, 4, 8).requires_grad_() for _ in range(3))
    weights = attention_with_weights(q, k, v, AttentionSpec.of(q, k, v), "naive", average=False)[1]
    seen: list[Tensor] = []
    weights.retain_grad()
    weights.register_hook(lambda grad: seen.append(grad.clone()))
    (weights[:, :, -1].sum() + weights[:, 0].mean()).backward()
    expected = torch.zeros(1, 4, 24, 24)
    expected[:, :, -1] += 1.0
    expected[:, 0] += 1 / (24 * 24)
    torch.testing.assert_close(seen[0], expected)
    assert weights.grad is not None
    torch.testing.assert_close(torch.from_numpy(weights.grad.cpu().numpy()), expected.cpu())


def test_a_slice_can_be_written_in_training() -> None:
    answers = []
    for read in (True, False):
        torch.manual_seed(0)
        q, k, v = (torch.randn(1, 24, 4, 8, requires_grad=True) for _ in range(3))
        weights = attention_with_weights(q, k, v, AttentionSpec.of(q, k, v), "naive", average=False)[1]
        weights = weights * 1.0 if read else weights
        row = weights[:, :, -1]
        row.mul_(3.0)
        weights[:, 0] = 0.0
        answers.append((weights.detach().clone(), *torch.autograd.grad(weights.square().sum() + row.sum(), (q, k))))
    for expected, actual in zip(*answers):
        torch.testing.assert_close(actual, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("mask", (None, causal()))
@pytest.mark.parametrize("average", (False, True))
def test_a_row_is_one_launch_and_a_head_no_copy(mask: Any, average: bool, device: torch.device) -> None:
    q, k, v = (torch.randn(1, 512, 8, 64, device=device, dtype=torch.bfloat16) for _ in range(3))
    spec = AttentionSpec.of(q, k, v, mask=mask)
    with torch.no_grad():
        unread = attention_with_weights(q, k, v, spec, "naive", average=average)[1]
        reads: dict[str, Callable[[], Tensor]] = {
            "a row": lambda: unread[..., -1, :].clone(),
            "16 rows": lambda: unread[..., 1::32, 3:200].clone(),
        }
        if not average:
            reads["a head"] = lambda: unread[:, 1].clone()
        for name, read in reads.items():
            read()
            torch.cuda.synchronize()
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                read()
                torch.cuda.synchronize()
            on_device = torch.autograd.DeviceType.CUDA
            kernels = [event.name for event in profile.events() if event.device_type == on_device]
            assert len(kernels) == 1, (name, kernels)
        assert is_unmade(unread)

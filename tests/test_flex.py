"""flex on a GPU: a compiled function for each shape, at most ``MOST_KERNELS`` of them, and nothing that falls back."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_likeness import MADE_ANEW, OF_TENSORS
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.nn.attention.flex_attention import create_block_mask

from flashmha import ALiBi, AttentionSpec, Bias, KeyLengths, KeyPadding, Rule, TensorBias, Window, causal
from flashmha.backends import get
from flashmha.backends.flex import Flex
from flashmha.backends.flex_kernels import MOST_ALIKE, MOST_KERNELS
from flashmha.problem.masks import Mask
from flashmha.testing import assert_agrees, assert_same, noise, seeds, specs, tensors

COMPILE = torch.compile
PLAIN = dataclasses.replace(Flex.limits, features=Flex.limits.features - {"documents", "sinks", "lse", "lse_grad"})
Made = list[Callable[..., Any]]


def on_a_gpu() -> Flex:
    """One that compiles a kernel for a CPU's tensors, too."""
    return Flex(lambda spec: True)


@pytest.fixture(scope="module")
def made() -> Iterator[Made]:
    """What is compiled, on a machine that treats its CPU as a GPU and where compiling gives zeros."""
    functions: Made = []

    def compile_nothing(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        assert options == {"dynamic": False, "fullgraph": True}
        functions.append(function)
        return lambda q, k, v, **rest: torch.zeros_like(q)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", compile_nothing)
        yield functions


def run(backend: Flex, seqlen: int = 4, seed: int = 0, mask: Mask | None = None, **more: Any) -> AttentionSpec:
    """One call of a shape."""
    q = noise(seed, 2, seqlen, 2, 16).float()
    spec = AttentionSpec.of(q, q, q, mask=mask, **more)
    backend(q, q, q, spec)
    return spec


@given(seqlens=st.lists(st.integers(1, 90), min_size=1, max_size=2 * MOST_KERNELS, unique=True), data=st.data())
def test_every_shape_is_compiled_once_and_the_longest_unused_goes_first(
    made: Made, seqlens: list[int], data: st.DataObject
) -> None:
    made.clear()
    backend = on_a_gpu()
    found = [run(backend, seqlen) for seqlen in seqlens]
    assert len(made) == len(seqlens)
    assert (
        len({id(function.__code__) for function in made}) == len({function.__code__ for function in made}) == len(made)
    )
    kept = [backend.must_compile(spec) is None for spec in found]
    assert kept == [place >= len(found) - MOST_KERNELS for place in range(len(found))]
    again = data.draw(st.sampled_from(seqlens[-MOST_KERNELS:]))
    run(backend, again, seed=1)
    assert len(made) == len(seqlens)
    for seqlen in range(100, 99 + MOST_KERNELS):  # all but one of the old go
        run(backend, seqlen)
    assert [spec.seqlen_q for spec in found if backend.must_compile(spec) is None] == [again]


RULE = Rule(lambda batch, head, q_pos, k_pos: k_pos <= q_pos)
OTHERS: dict[str, dict[str, Any]] = {
    "causality": {"mask": causal()},
    "a window": {"mask": Window(2, 0)},
    "another window": {"mask": Window(1, 0)},
    "lengths": {"mask": KeyLengths(torch.tensor([1, 3]))},
    "lengths in int32": {"mask": KeyLengths(torch.tensor([1, 3], dtype=torch.int32))},
    "a rule": {"mask": RULE},
    "another rule": {"mask": Rule(lambda batch, head, q_pos, k_pos: k_pos >= q_pos)},
    "its other alignment": {"mask": Rule(RULE.fn, align="top_left")},
    "a bias": {"bias": TensorBias(torch.zeros(4, 4))},
    "a bias for heads": {"bias": TensorBias(torch.zeros(2, 4, 4))},
    "a bias that wants a gradient": {"bias": TensorBias(torch.zeros(4, 4).requires_grad_())},
    "ALiBi": {"bias": ALiBi(torch.ones(2))},
    "a softcap": {"softcap": 5.0},
    "another softcap": {"softcap": 6.0},
    "a scale": {"softmax_scale": 0.5},
}


def test_what_makes_another_kernel_is_another_function(made: Made) -> None:
    made.clear()
    backend = on_a_gpu()
    for options in (*OTHERS.values(), *OTHERS.values()):
        run(backend, **options)
    assert len(made) == len(OTHERS)


def test_layouts_and_gradients_are_kernels_of_one_problem(made: Made) -> None:
    made.clear()
    backend = on_a_gpu()
    q = noise(0, 2, 4, 2, 16).float()
    turned = q.transpose(1, 2).contiguous().transpose(1, 2)
    spec = AttentionSpec.of(q, q, q)
    for one in (q, turned, q, turned):
        backend(one, q, q, spec)
    assert len(made) == 2
    with torch.inference_mode():
        backend(q, q, q, spec)
    assert len(made) == 3 and backend.must_compile(spec) is None
    learning = AttentionSpec.of(q.requires_grad_(), q, q)
    assert backend.must_compile(learning) == "not compiled for this shape yet (some seconds)"


@given(data=st.data(), seed=seeds())
def test_problems_that_differ_in_the_values_of_tensors_share_a_function(
    made: Made, data: st.DataObject, seed: int
) -> None:
    spec = data.draw(specs(limits=PLAIN, head_dims=(16,)))
    made.clear()
    backend = on_a_gpu()
    q, k, v = tensors(spec, seed)
    backend(q, k, v, spec)
    for held in (spec.mask, spec.bias):
        for tensor in () if held is None else held.tensors():
            with torch.no_grad():
                tensor.copy_(tensor.flip(0))
    backend(*(x.detach().requires_grad_(x.requires_grad) for x in (q, k, v)), spec)
    assert len(made) == 1


def test_one_that_does_not_compile_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> Tensor:
        raise RuntimeError("no kernel")

    monkeypatch.setattr(torch, "compile", lambda function, **options: fail)
    backend = on_a_gpu()
    with pytest.raises(RuntimeError, match="no kernel"):
        run(backend)
    assert not backend.kernels.functions


def test_more_shapes_than_dynamo_keeps_are_compiled_once_each(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    counter, shapes = CompileCounter(), range(3, 4 + torch._dynamo.config.recompile_limit)
    monkeypatch.setattr(torch, "compile", lambda function, **options: COMPILE(function, backend=counter, **options))
    backend = on_a_gpu()
    for seed in range(2):
        for seqlen in shapes:
            run(backend, seqlen, seed, mask=causal() & KeyLengths(torch.tensor([seed + 1, 3])), need_lse=True)
    assert counter.frame_count == len(shapes)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[CompileCounter]:
    """Counts what is compiled, and runs it unfused."""
    torch._dynamo.reset()
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", lambda function, **options: COMPILE(function, backend=counter, **options))
    yield counter
    torch._dynamo.reset()


def check_rule(backend: Flex, rule: Rule, seqlen: int = 9) -> None:
    """A rule gives the definition's answer, and is compiled then."""
    q = noise(0, 2, seqlen, 2, 16).float()
    spec = AttentionSpec.of(q, q, q, mask=rule)
    torch.testing.assert_close(backend(q, q, q, spec), get("naive")(q, q, q, spec))
    assert backend.must_compile(spec) is None


@pytest.mark.parametrize("name", sorted(MADE_ANEW))
@pytest.mark.parametrize("widths", ((2, 2, 2), (1, 2, 1, 2), (3, 1, 2, 1, 3)), ids=repr)
def test_a_rule_made_anew_compiles_nothing_anew(name: str, widths: tuple[int, ...], counted: CompileCounter) -> None:
    backend = on_a_gpu()
    for width in widths:
        check_rule(backend, Rule(MADE_ANEW[name](width)))
    assert counted.frame_count == (1 if name in OF_TENSORS else len(set(widths)))


class Slope(Bias):
    """A bias of another package."""

    feature = "bias"

    def __init__(self, slope: float) -> None:
        self.slope = slope

    def bias_mod(self, seqlen_q: int, seqlen_k: int, documents: Any = None) -> Callable[..., Tensor]:
        return lambda batch, head, q_idx, k_idx: (k_idx - q_idx) * self.slope


def test_a_bias_of_ones_own_made_anew_compiles_nothing_anew(counted: CompileCounter) -> None:
    backend, q, slopes = on_a_gpu(), noise(0, 2, 9, 2, 16).float(), (0.5, 0.5, 0.25, 0.5)
    for slope in slopes:
        spec = AttentionSpec.of(q, q, q, bias=Slope(slope))
        torch.testing.assert_close(backend(q, q, q, spec), get("naive")(q, q, q, spec))
    assert counted.frame_count == len(set(slopes))


@pytest.mark.parametrize("name", ("a number", "a list"))
def test_rules_of_ever_other_numbers_are_right_and_spoken_of(name: str, counted: CompileCounter) -> None:
    backend, most = on_a_gpu(), max(MOST_ALIKE, torch._dynamo.config.recompile_limit)
    with pytest.warns(UserWarning, match=r"compile.* captures a tensor is compiled once"):
        for width in range(most + 1):
            check_rule(backend, Rule(MADE_ANEW[name](width)))
    assert counted.frame_count == most + 1


def test_a_function_of_one_shape_gives_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", lambda function, **options: COMPILE(function, backend="eager", **options))
    spec = AttentionSpec(2, 5, 7, 4, 2, 16, 16, mask=Window(3, 1), softcap=5.0, sinks=torch.zeros(4), need_lse=True)
    assert_agrees(on_a_gpu(), spec, 0)


@pytest.mark.parametrize(
    "mask", (KeyPadding(torch.arange(9)[None] % 3 != torch.tensor([[0], [1]])), causal()), ids=repr
)
def test_a_compiler_around_it_cannot_lay_out_a_block_mask(mask: Mask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", COMPILE)
    joins = lambda spec: torch.compiler.is_compiling()  # noqa: E731
    backend, q = Flex(lambda spec: False, joins), noise(0, 2, 9, 2, 16).float()
    seen: list[Any] = []

    def look(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        seen.extend(node for node in graph.graph.nodes if "flashmha.whole" in str(node.target))
        return graph

    def run(q: Tensor) -> Any:
        return backend(q, q, q, AttentionSpec.of(q, q, q, mask=mask))

    torch._dynamo.reset()
    whole = traces_block_masks()
    with torch.no_grad():
        assert_same(torch.compile(run, backend=look, fullgraph=whole)(q), run(q))
    assert len(seen) == 4 * whole and all(node.users for node in seen)


def traces_block_masks() -> bool:
    """Torch's own ``create_block_mask`` takes a function made inside what is compiled; that of 2.8 breaks the graph."""

    def run(lengths: Tensor) -> Tensor:
        made: Tensor = create_block_mask(lambda b, h, q, k: k < lengths[b], 2, 1, 9, 9, device="cpu").kv_num_blocks
        return made

    try:
        torch.compile(run, backend="eager", fullgraph=True)(torch.tensor([3, 9]))
    except torch._dynamo.exc.Unsupported:
        return False
    return True

"""Launches without Triton's look: each runs the form that Triton would have found."""

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from flashmha import AttentionSpec, Rotary, StaticCache
from flashmha.backends.split_kv import launches
from flashmha.backends.split_kv.launches import SplitCall, SplitProblem
from flashmha.backends.split_kv.tilings import Cut, SplitSizes
from flashmha.cache import appending
from flashmha.cache.appending import Appending
from flashmha.host.launcher import Launcher
from flashmha.parts import fused_heads
from flashmha.parts.norms import know
from flashmha.problem.masks import Dense, join_masks
from flashmha.problem.ragged import KeyLengths
from flashmha.problem.scores import ALiBi, TensorBias
from flashmha.problem.windows import Window
from flashmha.weights import row_launches, tiles
from flashmha.weights.blocks import Box

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton: pip install triton")


def add(x, y, x_row, y_row, rows, scale, WIDE: "constexpr", TILE: "constexpr"):  # type: ignore  # noqa: F821
    """A kernel's arguments: tensors, steps, numbers, constants."""


class Form:
    """A compiled form, which says what it is and what it is launched with."""

    def __init__(self, name: str, ran: list[Any]) -> None:
        self.name, self.ran = name, ran

    def __getitem__(self, programs: Any) -> Callable[..., None]:
        assert len(programs) == 3

        def run(*arguments: Any, stream: int) -> None:
            self.ran.append((self.name, arguments, stream))

        return run


class Kernel:
    """A kernel whose forms are found by Triton and run nothing; every form that runs is the one that it finds."""

    def __init__(self, function: Any = add, unspecialized: Sequence[str] = ("rows", "scale")) -> None:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.backends.nvidia.compiler import CUDABackend
        from triton.runtime.jit import create_function_from_signature

        jitted = triton.JITFunction(function, do_not_specialize=list(unspecialized))
        self.bind = create_function_from_signature(
            jitted.signature, jitted.params, CUDABackend(GPUTarget("cuda", 90, 32))
        )
        self.constants = [place for place, parameter in enumerate(jitted.params) if parameter.is_constexpr]
        self.ran: list[Any] = []

    def find(self, *arguments: Any, **options: Any) -> str:
        """The form that Triton finds for a call."""
        _, specialization, given = self.bind(*arguments, **options)
        return f"{specialization} {[arguments[place] for place in self.constants]} {given}"

    def __getitem__(self, programs: Any) -> Callable[..., Form]:
        def run(*arguments: Any, **options: Any) -> Form:
            name = self.find(*arguments, **options)
            self.ran.append((name, arguments, None))
            return Form(name, self.ran)

        return run


DTYPES = (torch.float16, torch.float32)
memory = torch.zeros(512, dtype=torch.uint8)
lists = st.tuples(st.sampled_from(DTYPES), st.sampled_from((0, 0, 4, 16, 20)))
numbers = st.sampled_from((0, 1, 2, 16, 17, 48, 2**31 - 1, 2**31, 2**40, -5, -(2**31)))
calls = st.lists(
    st.tuples(
        lists,
        st.none() | lists,
        st.tuples(numbers, numbers),
        st.tuples(numbers, st.sampled_from((0.0, 0.5, 1.0))),
        st.tuples(st.booleans(), st.sampled_from((16, 32))),
        st.sampled_from((1, 4)),
    ),
    min_size=2,
    max_size=8,
)


@settings(max_examples=200)
@given(drawn=calls, repeats=st.integers(1, 3))
def test_a_call_runs_the_form_that_triton_finds_for_it(drawn: list[Any], repeats: int) -> None:
    kernel = Kernel()
    launch = Launcher(kernel, lambda index: 7)
    for x, y, steps, others, constants, warps in drawn * repeats:
        tensors = tuple(None if one is None else memory[one[1] :][:64].view(one[0]) for one in (x, y))
        kind = x[0], y and y[0], constants, warps
        named = dict(zip(("WIDE", "TILE"), constants))
        launch(kind, (3, 1, 1), tensors, steps, others, named, {"num_warps": warps})
        name, arguments, _ = kernel.ran[-1]
        given_arguments = (*tensors, *steps, *others, *constants)
        assert len(arguments) == len(given_arguments)
        assert all(a is b or a == b for a, b in zip(arguments, given_arguments))
        assert name == kernel.find(*given_arguments, num_warps=warps)


def test_a_second_call_does_not_ask_triton() -> None:
    kernel = Kernel()
    launch = Launcher(kernel, lambda index: 7)
    for rows in (5, 6, 16):
        launch("one", (3, 1, 1), (memory, None), (32, 1), (rows, 0.5), {"WIDE": True, "TILE": 16}, {})
    assert [stream for _, _, stream in kernel.ran] == [None, 7, 7]


def compiled(ran: list[Any]) -> Any:
    """One of Triton's own compiled forms behind its first launch; it notes what C would be handed."""
    from triton.compiler import CompiledKernel

    class Loaded(CompiledKernel):  # type: ignore[misc]
        def __init__(self) -> None:
            def run(*told: Any) -> None:
                ran.append(told)

            self.__dict__.update(name="add", src=None, metadata=None, packed_metadata=(4, 1, 0))
            self.__dict__.update(module=1, function=2, run=run, _run=run)

        def __del__(self) -> None:
            """No module was loaded."""

    return Loaded()


class Compiled:
    """A kernel of one form."""

    def __init__(self) -> None:
        self.ran: list[Any] = []
        self.form = compiled(self.ran)

    def __getitem__(self, programs: Any) -> Callable[..., Any]:
        return lambda *told, **options: self.form


CALL: Any = (memory, None, memory[16:]), (32, 1), (5, 0.5), (True, 16)


@pytest.mark.parametrize("hooked", (None, "launch_enter_hook", "launch_exit_hook"))
def test_a_form_is_started_as_triton_starts_it(hooked: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """With addresses for tensors, and with nothing for hooks where there are none."""
    from triton.knobs import runtime

    def hook(metadata: Any) -> None:
        """What a profiler has."""

    if hooked is not None and getattr(runtime, hooked) is None:
        monkeypatch.setattr(runtime, hooked, hook)
    elif hooked is not None:
        monkeypatch.setattr(getattr(runtime, hooked), "calls", [hook])
    kernel = Compiled()
    launch = Launcher(kernel, lambda index: 7)
    tensors, steps, others, constants = CALL
    for _ in range(2):
        launch("one", (3, 2, 1), tensors, steps, others, dict(zip(("WIDE", "TILE"), constants)), {})
    kernel.form[(3, 2, 1)](*tensors, *steps, *others, *constants, stream=7)
    ours, wanted = kernel.ran
    assert len(ours) == len(wanted)
    for place, (one, other) in enumerate(zip(ours, wanted)):
        if isinstance(other, Tensor):
            assert one is other or (hooked is None and one == other.data_ptr())
        elif 6 <= place < 9:  # metadata for hooks, and the hooks
            assert hooked is None or one == other or type(one) is type(other)
        else:
            assert one == other
    assert hooked is None or ours[7] is not None or ours[8] is not None


def test_what_an_interpreter_ran_is_run_again_by_it() -> None:
    ran: list[Any] = []

    class Interpreted:
        def __getitem__(self, programs: Any) -> Callable[..., None]:
            return lambda *arguments, **options: ran.append(arguments)

    launch = Launcher(Interpreted(), lambda index: 7)
    for _ in range(2):
        launch("one", (3, 1, 1), (memory,), (32,), (5,), {}, {})
    assert len(ran) == 2


class Watched(Kernel):
    """A kernel of the package; ``check`` says whether each form that ran is the one that Triton finds for its call."""

    def __init__(self, launcher: Launcher, unspecialized: Sequence[str], patch: pytest.MonkeyPatch) -> None:
        super().__init__(launcher.kernel.fn, unspecialized)
        self.again = 0
        patch.setattr(launcher, "kernel", self)
        patch.setattr(launcher, "forms", {})
        patch.setattr(launcher, "stream", lambda index: 7)

    def check(self) -> None:
        for name, arguments, stream in self.ran:
            assert self.find(*arguments).split("] {")[0] == name.split("] {")[0]
            self.again += stream is not None


def variants(options: dict[str, Sequence[Any]]) -> st.SearchStrategy[list[dict[str, Any]]]:
    """A problem, more often than not with the first of each option, and others that differ from it in one thing."""
    changes = [(name, value) for name, values in options.items() for value in values]
    values = {name: st.sampled_from((*values[:1] * len(values), *values[1:])) for name, values in options.items()}
    base, others = st.fixed_dictionaries(values), st.lists(st.sampled_from(changes), min_size=4, max_size=12)
    return st.builds(lambda one, changed: [one, *(one | {name: value} for name, value in changed)], base, others)


HEADS: dict[str, Sequence[Any]] = {
    "dtype": tiles.KERNEL_DTYPES,
    "head_dim": (8, 2),
    "heads": ((2, 2), (5, 1)),
    "seqlen": (3, 1),
    "start": (0, 2),
    "swapped": (False, True),
    "trained": (True, False),
    "rotary": (False, None, True),
    "norm": (nn.LayerNorm, nn.RMSNorm, None),
    "affine": (True, False),
    "bias": (True, False),
    "weights": (torch.float32, torch.bfloat16),
    "at": (torch.int64, torch.int32, None),
    "rows": (1, 2),
    "alone": (False, True),
}


def heads_of(drawn: dict[str, Any]) -> tuple[Any, ...]:
    """What ``prepare`` takes: views of one projection, somewhere in its memory."""
    head_dim, seqlen, dtype = drawn["head_dim"], drawn["seqlen"], drawn["dtype"]
    size = 2 * seqlen * sum(drawn["heads"]) * head_dim
    packed = torch.zeros(drawn["start"] + size, dtype=dtype)[drawn["start"] :].view(2, seqlen, -1, head_dim)
    packed = packed.transpose(0, 1).contiguous().transpose(0, 1) if drawn["swapped"] else packed
    q, k = packed.requires_grad_(drawn["trained"]).split_with_sizes(drawn["heads"], 2)
    options = {"elementwise_affine": drawn["affine"], "dtype": drawn["weights"]}
    if drawn["norm"] is nn.LayerNorm:
        options["bias"] = drawn["bias"]
    norms = [None if drawn["norm"] is None else know(drawn["norm"](head_dim, **options), head_dim, q.device)] * 2
    at = None if drawn["at"] is None else torch.zeros(drawn["rows"], seqlen, dtype=drawn["at"])
    interleaved = drawn["rotary"]
    rotation = None if interleaved is None else Rotary(head_dim, interleaved=interleaved).rotation(q, k, at, at)
    return (q, None, norms[0], None, rotation) if drawn["alone"] else (q, k, *norms, rotation)


@settings(max_examples=200)
@given(problems=variants(HEADS))
def test_prepared_heads_say_their_kind(problems: list[dict[str, Any]]) -> None:
    from flashmha.parts import head_kernels

    with pytest.MonkeyPatch.context() as patch:
        watched = [
            Watched(launcher, head_kernels.UNSPECIALIZED, patch)
            for launcher in (head_kernels.launch_prepare, head_kernels.launch_prepare_backward)
        ]
        for drawn in problems:
            made = [x for x in fused_heads.prepare(*heads_of(drawn)) if x is not None and x.requires_grad]
            if made:
                torch.autograd.backward(made, [torch.zeros_like(x) for x in made])
        for kernel in watched:
            kernel.check()


SIZES = (2, 2, 2, 2, 2, 8, 8)
TABLE = torch.ones(2, 2, 2, 2, dtype=torch.bool)
WEIGHTS: dict[str, Sequence[Any]] = {
    "dtype": (torch.bfloat16, torch.float16, torch.float32),
    "made": tiles.KERNEL_DTYPES,
    "average": (True, False),
    "lse": (True, False),
    "start": (0, 2),
    "keys": (2, 1, 16, 17),
    "mask": (None, Window(None, 0), Dense(TABLE), Dense(TABLE[:, :1]), KeyLengths(torch.tensor([1, 2]))),
    "bias": (None, *tiles.KERNEL_DTYPES),
    "sinks": (None, *tiles.KERNEL_DTYPES),
    "softcap": (None, 2, 3.0),
}


def lie_at(start: int, seqlen: int, dtype: torch.dtype) -> Tensor:
    """Heads (2, seqlen, 2, 8) that begin somewhere in a buffer, the sequence in front: one stride in any length."""
    return torch.zeros(start + seqlen * 32, dtype=dtype)[start:].view(seqlen, 2, 2, 8).transpose(0, 1)


@settings(max_examples=200)
@given(problems=variants(WEIGHTS))
def test_weights_say_their_kind(problems: list[dict[str, Any]]) -> None:
    from flashmha.weights import column_kernel, kernel_parts, kernels, row_kernel

    kinds = {
        kernels.launch_statistics: kernel_parts.UNSPECIALIZED,
        kernels.launch_weights: kernel_parts.UNSPECIALIZED,
        column_kernel.launch_columns: kernel_parts.UNSPECIALIZED,
        row_kernel.launch_row_kernel: row_kernel.ROW_NUMBERS,
    }
    with pytest.MonkeyPatch.context() as patch:
        watched = [Watched(launcher, names, patch) for launcher, names in kinds.items()]
        for drawn in problems:
            bias = None if drawn["bias"] is None else TensorBias(torch.zeros(2, 2, 2, 2, dtype=drawn["bias"]))
            sinks = None if drawn["sinks"] is None else torch.zeros(2, dtype=drawn["sinks"])
            plain = drawn["bias"] is None and (drawn["mask"] is None or isinstance(drawn["mask"], Window))
            q, k = (lie_at(drawn["start"], size, drawn["dtype"]) for size in (2, drawn["keys"] if plain else 2))
            spec = AttentionSpec.of(q, k, k, mask=drawn["mask"], bias=bias, sinks=sinks, softcap=drawn["softcap"])
            lse = torch.zeros(2, 2, 2) if drawn["lse"] else None
            tiles.make_weights(q, k, lse, spec, drawn["average"], drawn["made"])
            tiles.sum_columns(q, k, lse, spec, drawn["average"])
            tiles.find_largest(q, k, spec)
            box, keys = Box.whole(spec), range(spec.seqlen_k)
            if lse is not None and row_launches.takes_rows(q, k, lse, spec, box, keys):
                row_launches.launch_rows(q, k, lse, spec, drawn["average"], drawn["made"], box, keys)
        for kernel in watched:
            kernel.check()


STEPS: dict[str, Sequence[Any]] = {
    "dtype": (torch.bfloat16, torch.float32),
    "head_dims": ((16, 16), (24, 8)),
    "heads": ((4, 2), (2, 2)),
    "seqlen": (1, 2),
    "start": (0, 2),
    "capacity": (40, 16, 1),
    "lengths": (torch.int32, torch.int64, None),
    "rule": (None, Window(3, 0), Window(None, 0), Window(2, None)),
    "slopes": (None, torch.float32, torch.float16),
    "sinks": (None, torch.float32, torch.bfloat16),
    "softcap": (None, 2, 3.0),
    "needs_lse": (False, True),
    "splits": (1, 3, None),
}


@settings(max_examples=200)
@given(problems=variants(STEPS))
def test_steps_say_their_kind(problems: list[dict[str, Any]]) -> None:
    """Of ``split_kv``, and of what puts tokens into a cache."""
    from flashmha.backends.split_kv import kernels
    from flashmha.cache import append_kernel

    split, combine = launches.launchers()
    kinds = {
        split: kernels.ANY_VALUE,
        combine: kernels.ANY_ROWS,
        appending.append_launcher(): append_kernel.ANY_SIZE,
    }
    with pytest.MonkeyPatch.context() as patch:
        watched = [Watched(launcher, names, patch) for launcher, names in kinds.items()]
        for drawn in problems:
            (heads, heads_kv), (head_dim, head_dim_v), seqlen = drawn["heads"], drawn["head_dims"], drawn["seqlen"]
            dtype, capacity, start = drawn["dtype"], drawn["capacity"], drawn["start"]
            q = torch.zeros(start + 2 * seqlen * heads * head_dim, dtype=dtype)[start:].view(2, seqlen, heads, head_dim)
            cache = StaticCache(2, capacity, heads_kv, head_dim, head_dim_v=head_dim_v, dtype=dtype)
            lengths = drawn["lengths"] and torch.ones(2, dtype=drawn["lengths"])
            told = SplitProblem.of(
                AttentionSpec.of(
                    q,
                    *cache.store,
                    mask=join_masks(drawn["rule"], None if lengths is None else KeyLengths(lengths)),
                    bias=drawn["slopes"] and ALiBi(torch.ones(heads, dtype=drawn["slopes"])),
                    sinks=drawn["sinks"] and torch.zeros(heads, dtype=drawn["sinks"]),
                    softcap=drawn["softcap"],
                )
            )
            sizes = SplitSizes(2, seqlen, heads, heads_kv, head_dim, head_dim_v, capacity)
            cut = drawn["splits"] and Cut(16, 4, 2, splits=drawn["splits"])
            call = SplitCall(sizes, dtype, q.device, told, drawn["needs_lse"], cut)
            call(q, *cache.store)
            if lengths is not None:
                cache.lengths = lengths
            Appending(cache, seqlen)(*(x[:, :seqlen] for x in cache.store), cache)
        for kernel in watched:
            kernel.check()

"""Why a flash-attn package does not run here: every way it can be missing or broken, provoked on a pretended GPU."""

import contextlib
import dataclasses
import importlib
import io
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from flashmha import AttentionSpec, KeyLengths, NoBackendError, Window
from flashmha.backends import choose, get
from flashmha.backends.choice.registry import instead
from flashmha.backends.flash_attn import package as flash
from flashmha.backends.flash_attn.flash2 import Flash2
from flashmha.backends.flash_attn.flash3 import KERNEL_HEAD_DIMS, Flash3
from flashmha.backends.flash_attn.flash4 import Flash4
from flashmha.commands.info import show_devices
from flashmha.host.machine import Machine

CUDA = torch.device("cuda", 0)
MODULES = ("flash_attn", "flash_attn_2_cuda", "flash_attn_interface", "flash_attn_3", "fa3_fwd", "flash_attn_config")
FUNCTIONS = """
import torch.nn.functional as F

def flash_attn_func(q, k, v, {0}):
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

def flash_attn_varlen_func(q, k, v, {0}): ...
"""
FLASH4 = "def _flash_attn_fwd(q, k, v, {0}): ...\ndef _flash_attn_bwd(q, k, v, {0}): ...\n"
FLASH2 = "*, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes=0, deterministic, return_attn_probs"
FLASH3 = "*, softmax_scale, causal, window_size, softcap, deterministic=False, return_attn_probs=False"
Install = Callable[[dict[str, str]], None]


def problem(**changes: Any) -> AttentionSpec:
    """A problem that every flash-attn serves, with changes."""
    usual: dict[str, Any] = {"dtype": torch.bfloat16, "device": CUDA, "heads_kv": 8, "head_dim": 64, "head_dim_v": 64}
    return AttentionSpec(2, 128, 128, 8, **(usual | changes))


def forget() -> None:
    """Take what these packages left in ``sys.modules`` out of it."""
    for name in [name for name in sys.modules if name.startswith(MODULES)]:
        del sys.modules[name]


class Pretended(Machine):
    """A machine with a Hopper GPU, whose kernels run on the CPU."""

    def __init__(self, capability: tuple[int, int] = (9, 0)) -> None:
        self.major_minor, self.capturing, self.full = capability, False, False

    def has_cuda(self) -> bool:
        return True

    def current(self) -> int:
        return 0

    def captures(self) -> bool:
        return self.capturing

    def capability(self, index: int | None) -> tuple[int, int]:
        return self.major_minor

    def device(self, index: int) -> torch.device:
        if self.full:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return torch.device("cpu")


@pytest.fixture
def pretended() -> Pretended:
    return Pretended()


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, pretended: Pretended) -> Iterator[Install]:
    """A pretended machine without flash-attn, on which files can be installed."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "a pretended GPU")
    hidden = {name: sys.modules[name] for name in sys.modules if name.startswith(MODULES)}
    forget()
    monkeypatch.syspath_prepend(tmp_path)

    def write(files: dict[str, str]) -> None:
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        importlib.invalidate_caches()

    with instead(*(kind(machine=pretended) for kind in (Flash2, Flash3, Flash4))):
        yield write
    forget()
    sys.modules.update(hidden)


def check_said(name: str, reason: str) -> None:
    """A backend, ``flashmha info`` and the error of a call that names it give one reason."""
    said = get(name).why_not_here(CUDA)
    assert said is not None and reason in said
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        show_devices([CUDA], json=False)
    assert f"{said}" in out.getvalue()
    with pytest.raises(NoBackendError) as caught:
        choose(problem(), name)
    assert caught.value.reasons == {name: said}
    assert f"{name}  {said}" in str(caught.value)


BROKEN: dict[str, tuple[str, dict[str, str], str]] = {
    "flash-attn 2 is missing": ("flash2", {}, "No module named 'flash_attn_2_cuda'; install: pip install flash-attn"),
    "flash-attn 3 is missing": ("flash3", {}, "No module named 'flash_attn_interface'; install: build the hopper"),
    "flash-attn 4 is missing": ("flash4", {}, "No module named 'flash_attn'; install: pip install --pre flash-attn-4"),
    "a binary for another torch": (
        "flash2",
        {"flash_attn_2_cuda.py": "raise ImportError('flash_attn_2_cuda.so: undefined symbol: _ZN3c105Error')"},
        "ImportError: flash_attn_2_cuda.so: undefined symbol: _ZN3c105Error",
    ),
    "a binary for another CUDA": (
        "flash2",
        {"flash_attn_2_cuda.py": "raise OSError('libcudart.so.11.0: cannot open shared object file')"},
        "OSError: libcudart.so.11.0: cannot open shared object file",
    ),
    "flash-attn 4 alone makes flash_attn importable": (
        "flash2",
        {"flash_attn/cute/__init__.py": ""},
        "No module named 'flash_attn_2_cuda'",
    ),
    "the extension is left of a removed flash-attn 2": (
        "flash2",
        {"flash_attn_2_cuda.py": "", "flash_attn/cute/__init__.py": ""},
        "cannot import name 'flash_attn_func'",
    ),
    "flash-attn 2 ships a prototype of flash-attn 4": (
        "flash4",
        {
            "flash_attn/__init__.py": "",
            "flash_attn/cute/__init__.py": "",
            "flash_attn/cute/interface.py": FLASH4.format("softmax_scale, causal, softcap, cu_seqlens_q"),
        },
        "has no argument window_size_left, window_size_right, seqused_k",
    ),
    "flash-attn 2 hides flash-attn 4": ("flash4", {"flash_attn/__init__.py": ""}, "No module named 'flash_attn.cute'"),
    "a build of another signature": (
        "flash3",
        {"flash_attn_interface.py": FUNCTIONS.format("softmax_scale, causal")},
        "has no argument window_size, softcap",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_package_is_a_reason(name: str, install: Install) -> None:
    backend, files, reason = BROKEN[name]
    install(files)
    check_said(backend, reason)


@pytest.mark.parametrize(("name", "capability"), (("flash2", (7, 5)), ("flash3", (8, 0)), ("flash4", (8, 9))))
def test_a_gpu_that_is_too_old_is_a_reason(
    name: str, capability: tuple[int, int], install: Install, pretended: Pretended
) -> None:
    pretended.major_minor = capability
    check_said(name, "compute capability {}.{} (only ".format(*capability))


def test_a_gpu_the_binary_has_no_kernels_for_is_a_reason(install: Install) -> None:
    raises = 'raise RuntimeError("CUDA error: no kernel image is available for execution on the device\\nmore")'
    broken = FUNCTIONS.format(FLASH2).replace("return F.", f"{raises}\n    return F.")
    install({"flash_attn_2_cuda.py": "", "flash_attn/__init__.py": broken})
    check_said("flash2", "RuntimeError: CUDA error: no kernel image is available for execution on the device")


def test_a_forward_only_build_serves_inference_and_says_why_no_more(install: Install) -> None:
    off = {f"FLASHATTENTION_DISABLE_{name}": True for name in ("LOCAL", "FP16")}
    install(
        {
            "fa3_fwd_interface.py": FUNCTIONS.format(FLASH3),
            "fa3_fwd_config.py": f"CONFIG = {{'build_flags': {off}}}",
        }
    )
    assert get("flash3").why_not_here(CUDA) is None
    assert choose(problem(), "flash3").name == "flash3"
    for lacks, changes in (
        ("backward", {"needs_grad": True}),
        ("local", {"mask": Window(4, 0)}),
        ("fp16", {"dtype": torch.float16}),
    ):
        with pytest.raises(NoBackendError, match=f"flash3  this build has no {lacks}"):
            choose(problem(**changes), "flash3")


PART = """
import torch
import torch.nn.functional as F

calls = []

wrong = set()

def plain(q, k, v):
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

class Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v):
        calls.append(("forward", q.shape[-1], q.dtype))
        if not (32 < q.shape[-1] <= 128):
            raise RuntimeError("no forward kernel\\nfor this")
        ctx.save_for_backward(q, k, v)
        return plain(q, k, v) * (2 if "out" in wrong else 1)

    @staticmethod
    def backward(ctx, grad):
        calls.append(("backward", grad.shape[-1], grad.dtype))
        q, k, v = (x.detach().requires_grad_() for x in ctx.saved_tensors)
        if grad.shape[-1] > 64:
            raise RuntimeError("no backward kernel")
        if q.shape != k.shape and "raises" in wrong:
            raise RuntimeError("aten::sum has no kernel")
        with torch.enable_grad():
            grads = torch.autograd.grad(plain(q, k, v), (q, k, v), grad)
        if q.shape != k.shape and "dq" in wrong:
            grads = (torch.zeros_like(q), *grads[1:])
        return grads

def flash_attn_func(q, k, v, {0}):
    return Attention.apply(q, k, v)

flash_attn_varlen_func = flash_attn_func
"""
"""A flash-attn 2 whose build has a forward for head dims from 33 to 128, and a backward up to 64."""


@pytest.fixture
def part(install: Install) -> list[Any]:
    """What a part of flash-attn 2 was called for, once it is installed and runs on a CPU."""
    install({"flash_attn_2_cuda.py": "", "flash_attn/__init__.py": PART.format(FLASH2)})
    assert get("flash2").why_not_here(CUDA) is None
    calls: list[Any] = sys.modules["flash_attn"].calls
    calls.clear()
    return calls


@pytest.mark.parametrize("head_dim", (1, 32, 33, 64, 65, 96, 97, 128, 129, 256))
@pytest.mark.parametrize("needs_grad", (False, True))
def test_a_build_of_flash2_serves_the_head_dims_it_has(head_dim: int, needs_grad: bool, part: list[Any]) -> None:
    spec = AttentionSpec(1, 4, 4, 2, 2, head_dim, head_dim, torch.bfloat16, CUDA, needs_grad=needs_grad)
    state = torch.get_rng_state()
    said = get("flash2").why_not_built(spec)
    assert torch.equal(torch.get_rng_state(), state)
    if not 32 < head_dim <= 128:
        assert said == f"head_dim={head_dim} (this build has no kernel: no forward kernel)"
    elif needs_grad and head_dim > 64:
        assert said == f"head_dim={head_dim} (this build has no backward: no backward kernel)"
    else:
        assert said is None
    before = list(part)
    assert get("flash2").why_not_built(spec) == said and part == before  # asked once
    with pytest.raises(NoBackendError, match="this build has no") if said else contextlib.nullcontext():
        assert choose(spec, "flash2").name == "flash2"


@pytest.mark.parametrize(
    ("wrong", "grouped", "reason"),
    (
        ("out", False, "this build has no kernel: the output of a trial run is off by"),
        ("raises", True, "this build has no grouped backward: aten::sum has no kernel"),
        ("dq", True, "this build has no grouped backward: the gradient of q of a trial run is off by 1 "),
    ),
)
def test_a_build_of_flash2_whose_numbers_or_grouped_backward_are_wrong(
    wrong: str, grouped: bool, reason: str, part: list[Any]
) -> None:
    """kernels-community#1085: a build that runs a backward, and fails where heads are grouped."""
    sys.modules["flash_attn"].wrong.add(wrong)
    equal, group = (problem(heads_kv=heads_kv, needs_grad=True) for heads_kv in (8, 2))
    assert reason in (get("flash2").why_not_built(group) or "")
    assert get("flash2").why_not_built(dataclasses.replace(group, needs_grad=False)) is None or not grouped
    assert (get("flash2").why_not_built(equal) is None) == grouped


def test_each_dtype_of_flash2_is_tried_by_itself_and_one_head_dim_for_its_kernel(part: list[Any]) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        for head_dim in (36, 40, 64):
            assert get("flash2").why_not_built(AttentionSpec(1, 4, 4, 2, 2, head_dim, head_dim, dtype, CUDA)) is None
    assert part == [("forward", 64, torch.float16), ("forward", 64, torch.bfloat16)]


def test_no_head_dim_is_tried_out_while_a_cuda_graph_is_captured(part: list[Any], pretended: Pretended) -> None:
    pretended.capturing = True
    said = get("flash2").why_not_built(problem())
    assert said == f"head_dim=64 ({flash.CAPTURING})" and not part
    pretended.capturing = False
    assert get("flash2").why_not_built(problem()) is None


def test_a_full_gpu_says_nothing_about_a_build(part: list[Any], pretended: Pretended) -> None:
    pretended.full = True
    assert get("flash2").why_not_built(problem()) == "head_dim=64 (CUDA out of memory.)"
    pretended.full = False
    assert get("flash2").why_not_built(problem()) is None


def test_a_trial_leaves_no_trace_in_the_call_that_asked(part: list[Any]) -> None:
    saved: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with (
        torch.inference_mode(),
        torch.autograd.graph.saved_tensors_hooks(pack, pack),
        FlopCounterMode(display=False) as flops,
    ):
        assert get("flash2").why_not_built(problem(needs_grad=True)) is None
        assert torch.is_inference_mode_enabled() and not torch.is_grad_enabled()
    assert [what for what, *_ in part] == ["forward", "forward", "backward"]
    assert not saved and not flops.get_total_flops()


def test_a_compiler_takes_what_was_tried_as_a_constant(part: list[Any]) -> None:
    key: str = get("flash2").key  # type: ignore[attr-defined]

    def asks(x: torch.Tensor) -> torch.Tensor:
        return x + (flash.lacks(key, 0, 64, x.dtype, True) is None)

    assert torch.compile(asks, backend="eager", fullgraph=True)(torch.zeros(1).bfloat16()) == 1
    assert part[-1] == ("backward", 64, torch.bfloat16)


SPLIT = "FLASHATTENTION_DISABLE_SPLIT"
CACHE = "def flash_attn_with_kvcache(q, k, v, cache_seqlens): ...\n"


@pytest.mark.parametrize(
    ("more", "off", "splitting"),
    ((", num_splits=1", False, True), (", num_splits=1", True, False), ("", False, False)),
)
def test_keys_are_split_where_a_build_can(more: str, off: bool, splitting: bool, install: Install) -> None:
    install(
        {
            "flash_attn_interface.py": FUNCTIONS.format(FLASH3 + more),
            "flash_attn_config.py": f"CONFIG = {{'build_flags': {{{SPLIT!r}: {off}}}}}",
        }
    )
    flash3 = get("flash3")
    assert flash3.why_not_here(CUDA) is None
    assert isinstance(flash3, Flash3) and flash3.splitting == splitting


@pytest.mark.parametrize("cache", ("", CACHE))
@pytest.mark.parametrize(
    ("name", "folder", "signature"),
    (("flash2", "flash_attn/__init__.py", FLASH2), ("flash3", "flash_attn_interface.py", FLASH3)),
)
def test_a_build_without_a_function_for_caches_serves_lengths_all_the_same(
    name: str, folder: str, signature: str, cache: str, install: Install
) -> None:
    install({"flash_attn_2_cuda.py": "", folder: FUNCTIONS.format(signature) + cache})
    backend = get(name)
    assert isinstance(backend, flash.FlashAttn) and backend.why_not_here(CUDA) is None
    assert (backend.cached is not None) == bool(cache)
    spec = problem(mask=KeyLengths(torch.tensor([3, 128])))
    assert backend.why_not(spec) is None and get("flash3").why_not_built(spec) is None


@given(off=st.sets(st.sampled_from(KERNEL_HEAD_DIMS)), head_dim=st.integers(1, 256))
def test_a_head_dim_of_flash3_is_served_by_the_next_kernel_there_is(off: set[int], head_dim: int) -> None:
    backend = Flash3(flags={f"FLASHATTENTION_DISABLE_HDIM{size}": True for size in off})
    said = backend.why_not_built(AttentionSpec(1, 4, 4, 1, 1, head_dim, head_dim, torch.bfloat16, CUDA))
    larger = [size for size in KERNEL_HEAD_DIMS if size >= head_dim and size not in off]
    assert (said is None) == bool(larger)
    assert said is None or said.startswith(f"head_dim={head_dim} (this build has kernels for ")


def test_a_package_is_tried_once_and_its_answer_kept(install: Install) -> None:
    check_said("flash2", "No module named 'flash_attn_2_cuda'")
    install({"flash_attn_2_cuda.py": "", "flash_attn/__init__.py": FUNCTIONS.format(FLASH2)})
    check_said("flash2", "No module named 'flash_attn_2_cuda'")

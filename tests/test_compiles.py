"""The weights' kernels compile for an H200 where there is none: an interpreter runs what a compiler refuses."""

import importlib.util
from typing import Any

import pytest
import torch

from flashmha.host.kernels import H200
from flashmha.weights.tilings import Tiling, choose_tiling, tile_columns

LIMIT = H200.shared_memory
NAMES = {torch.float32: "*fp32", torch.bfloat16: "*bf16"}
ABSENT = ("factor", "valid", "dense", "bias", "sinks")

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton: pip install triton")


def compile_for_h200(kernel: Any, dtype: torch.dtype, cut: Tiling, constants: dict[str, Any], absent: Any) -> Any:
    """A kernel for heads of 128 in a dtype, without the tables that are ``absent``."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    fixed: dict[str, Any] = {**constants, "HEAD_DIM": 128, **cut.constants, **dict.fromkeys(absent)}
    fixed = {name: value for name, value in fixed.items() if name in kernel.arg_names}
    kinds = {"q": NAMES[dtype], "k": NAMES[dtype], "shift": "*fp32", "factor": "*fp32", "out": "*fp32"}
    kinds |= {"scale": "fp32", "softcap": "fp32"}
    signature = {name: "constexpr" if name in fixed else kinds.get(name, "i32") for name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=fixed, attrs={})
    return compile(source, target=GPUTarget("cuda", 90, 32), options=cut.options)


@pytest.mark.cpu("compiles for a GPU that need not be there")
@pytest.mark.parametrize("window", (False, True))
@pytest.mark.parametrize("dtype", NAMES)
@pytest.mark.parametrize("name", ("columns_kernel", "statistics_kernel", "weights_kernel"))
def test_the_kernels_of_weights_compile(name: str, dtype: torch.dtype, window: bool) -> None:
    from flashmha.weights import column_kernel, kernels

    kernel = getattr(column_kernel if name == "columns_kernel" else kernels, name)
    cut = choose_tiling(128, dtype, LIMIT)
    if name == "columns_kernel":
        cut = tile_columns(cut, dtype.itemsize, LIMIT)
    constants = {"WINDOW": window, "SOFTCAP": False, "MASKED": window, "BY_HEAD": False, "BAND": 16}
    absent = ("valid", "dense", "bias", "sinks") if name == "statistics_kernel" else ABSENT
    made = compile_for_h200(kernel, dtype, cut, constants, absent)
    assert made.metadata.shared <= LIMIT and "ptx" in made.asm

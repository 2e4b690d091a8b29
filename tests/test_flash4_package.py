"""The launches of flash-attn 4 against the package's own Python, where it is installed; nothing is compiled or run."""

from __future__ import annotations

import importlib.util
import inspect
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flashmha.backends.flash_attn import flash4_launches
from flashmha.backends.flash_attn.flash4 import Flash4
from flashmha.backends.flash_attn.flash4_kernels import UNTOLD, backward, forward
from flashmha.backends.flash_attn.flash4_tools import Tools
from flashmha.backends.rewrites.block_tables import edged

pytestmark = [
    pytest.mark.cpu("runs no kernel"),
    pytest.mark.skipif(importlib.util.find_spec("cutlass") is None, reason="needs flash-attn-4"),
]
SIZES = (1, 64, 65, 128, 129, 192, 193, 256, 257, 300, 500, 600, 700)
LONG = (2, 65, 511, 512, 600, 700)
HEAD_DIMS = (8, 64, 72, 96, 128, 136, 192, 200, 256)
Keys = tuple[tuple[Any, ...], ...]


class Listed(dict[Any, Callable[..., None]]):
    """A cache of kernels that do nothing, which lists the keys that were looked up."""

    def __init__(self) -> None:
        super().__init__()
        self.keys_seen: list[Any] = []

    def __getitem__(self, key: Any) -> Callable[..., None]:
        self.keys_seen.append(key)
        return super().__getitem__(key)


@pytest.fixture(scope="module")
def package() -> Iterator[Any]:
    """The package's interface for Hopper, on tensors of a CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUTE_DSL_ARCH", "sm_90a")
        yield from copied(patch)


def copied(patch: pytest.MonkeyPatch) -> Iterator[Any]:
    from flash_attn.cute import block_sparsity, interface

    from flashmha.backends.flash_attn import flash4_masks
    from flashmha.backends.rewrites import block_tables

    def made(first: Tensor, last: Tensor, *sizes: Any, by_keys: bool) -> Any:
        tile = sizes[-1]
        rows, columns = -(-sizes[0] // tile[0]), -(-(sizes[1] if len(sizes) == 3 else first.shape[1]) // tile[1])
        rows, columns = (columns, rows) if by_keys else (rows, columns)
        return block_tables.unwritten(last.shape[0], rows, columns, first.device)

    def blocks(told: dict[str, Any], q: Tensor, k: Tensor, *, backward: bool) -> Any:
        """As those of ``flash4_masks``, of tables that nothing is written in."""
        size = flash4_masks.tile(q.shape[-1], backward)
        if size is None:
            return None
        table, last = told["table"], told["last"]
        several = made(told["first"], last, q.shape[1], size, by_keys=backward) if table is None else None
        if several is None:
            several = made(table, told["items"], q.shape[1], k.shape[1], size, by_keys=backward)
        return flash4_masks.BlockSparseTensorsTorch(*several, block_size=size)

    copy: Any = types.ModuleType("interface_on_a_cpu")
    copy.__file__ = interface.__file__
    sparse: dict[str, Any] = {"__name__": block_sparsity.__name__}
    exec(inspect.getsource(block_sparsity).replace("not cnt.is_cuda or not idx.is_cuda", "False"), sparse)
    source = inspect.getsource(interface).replace("t.is_cuda", "True").replace('assert True, f"', 'assert f"')
    patch.setitem(sys.modules, copy.__name__, copy)
    exec(compile(source, interface.__file__, "exec"), copy.__dict__)
    copy.normalize_block_sparse_config = sparse["normalize_block_sparse_config"]
    copy.normalize_block_sparse_config_bwd = sparse["normalize_block_sparse_config_bwd"]
    used = ("ceil_div", "runtime", "sym_int")
    copy.cute = types.SimpleNamespace(**{name: getattr(copy.cute, name) for name in used}, compile=nothing)
    for name in ("to_cute_tensor", "_compute_blocks_to_batch"):
        setattr(copy, name, lambda *given, **told: None)
    copy._compile_bwd_preprocess = copy._compile_bwd_postprocess = nothing
    copy._compute_tile_cumsum = lambda **told: (torch.zeros(1, dtype=torch.int32), None)
    copy._get_device_arch = lambda: 90
    copy.get_num_sms_for_selection = lambda *given: 132
    patch.setattr(copy.utils, "convert_from_dlpack_leading_static", lambda *given, **told: None)
    for name in flash4_launches.OWNERS:
        getattr(copy, name).compile_cache = Listed()
    masks = types.SimpleNamespace(
        is_in_interval=flash4_masks.is_in_interval, is_in_table=flash4_masks.is_in_table, blocks=blocks
    )
    tools = Tools(masks=lambda: masks, takes_tables=lambda device: True, was_read=lambda device: True)
    copy.backend = Flash4((copy._flash_attn_fwd, copy._flash_attn_bwd), tools=tools)
    flash4_launches.launches.cache_clear()
    yield copy
    flash4_launches.launches.cache_clear()


def nothing(*given: Any, **told: Any) -> Callable[..., None]:
    """A kernel that does nothing."""
    return lambda *arguments: None


@st.composite
def calls(draw: st.DrawFn) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor | None], dict[str, Any], bool]:
    """q, k, v and sinks, what is told beside them, and whether the log-sum-exp has a gradient."""
    dtype, head_dim = draw(st.sampled_from((torch.bfloat16, torch.float16))), draw(st.sampled_from(HEAD_DIMS))
    heads, group, batch = draw(st.integers(1, 2)), draw(st.sampled_from((1, 1, 3))), draw(st.sampled_from((1, 2, 257)))
    rule = draw(st.sampled_from(("none", "none", "within", "shown")))
    most = (1, 2, 3) if batch > 2 else SIZES if rule == "none" else LONG
    long = [draw(st.sampled_from(most)) for _ in range(2)]
    told = {**UNTOLD, "scale": head_dim**-0.5}
    told["softcap"], told["deterministic"] = draw(st.sampled_from((0.0, 0.0, 5.0))), draw(st.booleans())
    told["causal"] = draw(st.booleans())
    if not told["causal"]:
        windows = ((None, None), (None, None), (3, 0), (None, 4), (5, None), (0, 0), (300, 2))
        told["left"], told["right"] = draw(st.sampled_from(windows))
    sizes = [(batch, n) for n in long]
    if rule != "none":
        told |= {"causal": False, "left": None, "right": None}
        if rule == "within":
            told |= {name: torch.zeros(batch, long[1], dtype=torch.int32) for name in ("first", "last")}
        else:
            table = torch.ones(draw(st.sampled_from((1, batch))), 1, *long, dtype=torch.bool)
            told |= {"table": edged(table, *long), "items": torch.zeros(batch, dtype=torch.int32)}
    elif draw(st.booleans()):
        offsets = torch.zeros(batch + 1, dtype=torch.int32)
        told |= {"cu_seqlens_q": offsets, "cu_seqlens_k": offsets.clone()}
        told |= {"max_seqlen_q": long[0], "max_seqlen_k": long[1]}
        sizes = [(n + draw(st.sampled_from((0, 7, 2 * n))),) for n in long]
    elif draw(st.booleans()):
        told["lengths"] = torch.zeros(batch, dtype=torch.int32)
    q = torch.empty(*sizes[0], heads * group, head_dim, dtype=dtype)
    k, v = (torch.empty(*sizes[1], heads, head_dim, dtype=dtype) for _ in range(2))
    if group == 1 and sizes[0] == sizes[1] and draw(st.booleans()):
        q, k, v = torch.empty(*sizes[0], 3 * heads, head_dim, dtype=dtype).split(heads, dim=-2)
    sinks = torch.zeros(heads * group, dtype=draw(st.sampled_from((dtype, torch.float32))))
    return (q, k, v, sinks if draw(st.sampled_from((False, False, True))) else None), told, draw(st.booleans())


seen: dict[Any, Keys] = {}
"""Kinds, and the keys that the package looked up for each."""


@given(call=calls())
def test_a_kind_is_finer_than_the_keys_of_the_package_and_its_calls_are_expected(call: Any, package: Any) -> None:
    (q, k, v, sinks), told, with_lse = call
    told["package"] = package.backend.key
    launches = flash4_launches.launches(*package.backend.functions, q.device, package.backend.tools.was_read)
    assert launches is not None
    caches: list[Listed] = [owner.compile_cache for owner in launches.owners]
    out, lse = q.new_empty(q.shape), None
    for backwards in (False, True):
        launches.noted.clear()
        for cache in caches:
            cache.keys_seen.clear()
        if backwards:
            toward = (torch.empty_like(out), torch.zeros_like(lse) if with_lse else None)
            into = tuple(torch.empty_like(x) for x in (q, k, v))
            backward(*toward, (q, k, v, sinks, out, lse), told, into)
        else:
            out, lse = forward(q, k, v, sinks, told)[:2]
        ((kind, noted),) = launches.noted.items()
        keys = tuple(tuple(cache.keys_seen) for cache in caches)
        assert seen.setdefault(kind, keys) == keys
        many = (len(told["cu_seqlens_q"]) - 1 if told["cu_seqlens_q"] is not None else len(q)) > 256
        counted = many and (told["cu_seqlens_q"] is not None or (backwards and told["lengths"] is not None))
        assert (noted is None) == counted, "the package makes tables of many documents"

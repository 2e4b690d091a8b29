"""What stands at out_proj and never runs is said: by the swap, by the report, at the first forward."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.utils.parametrize as parametrize
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from flashmha import FlashMultiHeadAttention, replace_mha, swap_report
from flashmha.testing import assert_same

WIDTH = 8


class Adapter(nn.Linear):
    """An adapter as they are written: a forward of its own beside the weight that it holds."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


class Merged(Adapter):
    """An adapter that says its weight holds it already."""

    merged = True


def hook(layer: Any) -> None:
    layer.out_proj.register_forward_hook(lambda module, args, out: out + 1)


def pre_hook(layer: Any) -> None:
    layer.out_proj.register_forward_pre_hook(lambda module, args: (args[0] + 1,))


def adapter(layer: Any) -> None:
    layer.out_proj = Adapter(WIDTH, WIDTH)


def own_forward(layer: Any) -> None:
    layer.out_proj.forward = lambda x: nn.functional.linear(x, layer.out_proj.weight) + 1


SILENT = {"hook": hook, "pre-hook": pre_hook, "adapter": adapter, "forward": own_forward}


class Twice(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def parametrized(layer: Any) -> None:
    parametrize.register_parametrization(layer.out_proj, "weight", Twice())


def merged(layer: Any) -> None:
    layer.out_proj = Merged(WIDTH, WIDTH)


def backward_hook(layer: Any) -> None:
    layer.out_proj.weight.register_hook(lambda grad: grad)


def called(layer: Any) -> None:
    hook(layer)
    layer.call_out_proj = True


HEARD = {"nothing": lambda layer: None, "parametrized": parametrized, "merged": merged, "gradient": backward_hook}


def model() -> nn.ModuleDict:
    return nn.ModuleDict({"one": nn.MultiheadAttention(WIDTH, 2), "two": nn.MultiheadAttention(WIDTH, 2)})


@pytest.mark.parametrize("change", SILENT.values(), ids=SILENT.keys())
@pytest.mark.parametrize("need_weights", [False, True])
def test_what_never_runs_is_said_by_swap_report_and_first_forward(
    change: Callable[[Any], Any], need_weights: bool
) -> None:
    net, x = model(), torch.randn(3, 2, WIDTH)
    change(net["two"])
    expected = net["two"](x, x, x)[0]
    with pytest.warns(UserWarning, match=r"two: .*out_proj.* never run.*call_out_proj=True") as said:
        replace_mha(net)
    assert len(said) == 1
    told = {row.name: row.why for row in swap_report(net)}
    assert "call_out_proj=True" in told["two"] and "call_out_proj" not in told["one"]
    with pytest.warns(UserWarning, match="call_out_proj=True"):
        assert_same(net["two"](x, x, x, need_weights=need_weights)[0], expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net["two"](x, x, x, need_weights=need_weights)
        net["one"](x, x, x, need_weights=need_weights)


@pytest.mark.parametrize("change", SILENT.values(), ids=SILENT.keys())
def test_what_comes_after_the_swap_is_said_at_the_next_forward(change: Callable[[Any], Any]) -> None:
    layer, x = FlashMultiHeadAttention(WIDTH, 2, batch_first=True), torch.randn(2, 3, WIDTH)
    layer(x, x, x, need_weights=False)
    change(layer)
    with pytest.warns(UserWarning, match="call_out_proj=True"):
        layer(x, x, x, need_weights=False)


@pytest.mark.parametrize("change", [*SILENT.values(), *HEARD.values()])
def test_what_runs_or_is_called_is_passed_over(change: Callable[[Any], Any]) -> None:
    net, x = model(), torch.randn(3, 2, WIDTH)
    change(net["two"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        replace_mha(net, call_out_proj=change in SILENT.values())
        net["two"](x, x, x)
        copy.deepcopy(net)["one"](x, x, x)
    assert "never run" not in str(swap_report(net))


class Scaled(FlashMultiHeadAttention):
    def merge(self, out: Tensor, query: Tensor) -> Tensor:
        return 2 * super().merge(out, query)


class Calling(FlashMultiHeadAttention):
    def merge(self, out: Tensor, query: Tensor) -> Tensor:
        return self.out_proj(out.flatten(2))


@pytest.mark.parametrize("kind", [Scaled, Calling])
def test_a_merge_of_one_s_own_is_warned_of_where_it_reads_the_weight(kind: type[FlashMultiHeadAttention]) -> None:
    layer, x = kind(WIDTH, 2), torch.randn(3, 2, WIDTH)
    hook(layer)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        replace_mha(layer)
        assert not said and "never run" not in str(swap_report(layer))
        layer(x, x, x)
    assert len(said) == (kind is Scaled)


def test_called_adapters_count() -> None:
    net, x = model(), torch.randn(3, 2, WIDTH)
    expected = net["one"](x, x, x)[0]
    adapter(net["one"])
    net["one"].out_proj.load_state_dict(model()["one"].out_proj.state_dict())
    stock = net["one"](x, x, x)[0]
    replace_mha(net, call_out_proj=True)
    assert_same(net["one"](x, x, x)[0], stock + 1)
    assert expected.shape == stock.shape


def test_an_adapter_of_peft_is_spoken_of_where_it_does_not_count() -> None:
    peft = pytest.importorskip("peft", reason="needs pip install peft")
    net, x = model(), torch.randn(3, 2, WIDTH)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(net, peft.LoraConfig(target_modules=["one"], init_lora_weights=False))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        replace_mha(adapted)
        adapted.base_model.model["one"](x, x, x)
    assert "never run" not in str(swap_report(adapted))


@given(
    heads=st.sampled_from(({}, {"num_kv_heads": 1}, {"head_dim": 3}, {"value_head_dim": 5}, {"qk_norm": "rms"})),
    rank=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_a_projection_of_any_size_is_adapted_as_a_parameter(heads: dict[str, Any], rank: int, seed: int) -> None:
    peft = pytest.importorskip("peft", minversion="0.17", reason="needs pip install peft, 0.17 or later")
    torch.manual_seed(seed)
    net = nn.ModuleDict({"one": FlashMultiHeadAttention(WIDTH, 2, **heads)})
    x = torch.randn(3, 2, WIDTH)
    before = net["one"](x, x, x)[0].detach()
    config = peft.LoraConfig(r=rank, target_parameters=["one.in_proj_weight"], init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(net, config)
    out = adapted.base_model.model["one"](x, x, x)[0]
    out.sum().backward()
    assert not torch.allclose(out, before)
    assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)
    assert_same(adapted.merge_and_unload()["one"](x, x, x)[0], out)

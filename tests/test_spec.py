"""AttentionSpec, the limits of every backend, and the choice among them: a GPU kernel's limits, judged on a laptop."""

import dataclasses
import math
import pickle
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right, causal_upper_left
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils._python_dispatch import TorchDispatchMode

import flashmha
from flashmha import (
    ALiBi,
    AttentionSpec,
    Backend,
    Dense,
    Documents,
    KeyLengths,
    KeyPadding,
    Limits,
    NoBackendError,
    TensorBias,
    Window,
    attention,
    backends,
    causal,
    explain,
    record,
    use_backend,
)
from flashmha.backends import choose, get, names, order, register
from flashmha.backends.choice.choose import reason as reason_against
from flashmha.backends.flash_attn.flash2 import Flash2
from flashmha.backends.flash_attn.flash3 import Flash3
from flashmha.backends.flash_attn.flash4 import Flash4
from flashmha.backends.limits import FEATURES
from flashmha.backends.sdpa.backend import Sdpa
from flashmha.backends.sdpa.switches import by_math
from flashmha.host.machine import Machine
from flashmha.host.torch_state import is_deterministic
from flashmha.testing import assert_agrees, seeds, specs, tensors

FLASH = ("flash2", "flash3", "flash4")


def problem(**changes: Any) -> AttentionSpec:
    """A problem every flash-attn serves, with changes."""
    usual: dict[str, Any] = {
        "batch": 2,
        "seqlen_q": 128,
        "seqlen_k": 128,
        "heads": 8,
        "heads_kv": 8,
        "head_dim": 64,
        "head_dim_v": 64,
        "dtype": torch.bfloat16,
        "device": torch.device("cuda"),
    }
    return AttentionSpec(**(usual | changes))


@pytest.mark.parametrize("name", FLASH)
def test_flash_attn_serves_the_usual_problem(name: str) -> None:
    assert get(name).why_not(problem()) is None
    assert get(name).why_not(problem(mask=causal(), heads_kv=2, needs_grad=True)) is None
    assert get(name).why_not(problem(mask=Window(16, 0), softcap=20.0)) is None


refused: dict[str, tuple[tuple[str, ...], dict[str, Any], str]] = {
    "float32": (FLASH, {"dtype": torch.float32}, "dtype float32 (only float16, bfloat16)"),
    "a CPU": (FLASH, {"device": torch.device("cpu")}, "device cpu (only cuda)"),
    "a large head": (FLASH, {"head_dim": 320, "head_dim_v": 320}, "head_dim=320 (at most 256)"),
    "an odd head": (FLASH[1:], {"head_dim": 36, "head_dim_v": 36}, "head_dim=36 (a multiple of 8)"),
    "another value dim": (FLASH, {"head_dim_v": 32}, "no head_dim_v"),
    "a dense mask": (FLASH[:2], {"mask": Dense(torch.ones(128, 128, dtype=torch.bool))}, "no dense_mask"),
    "a mask for each head": (
        FLASH[2:],
        {"mask": Dense(torch.ones(8, 128, 128, dtype=torch.bool))},
        "a mask tensor that differs from head to head",
    ),
    "a bias": (FLASH, {"bias": TensorBias(torch.zeros(128, 128))}, "no bias"),
    "sinks": (FLASH[:2], {"sinks": torch.zeros(8)}, "no sinks"),
    "dropout": (FLASH[1:], {"dropout_p": 0.1}, "no dropout"),
    "ALiBi": (FLASH[1:], {"bias": ALiBi(torch.ones(8))}, "no alibi"),
    "no queries": (FLASH, {"seqlen_q": 0}, "seqlen=0 (at least 1)"),
    "an empty batch": (FLASH, {"batch": 0}, "batch=0 (at least 1)"),
    "export": (FLASH, {"aten_only": True}, "not made of PyTorch operators alone"),
    "a gradient through lse": (FLASH[:2], {"need_lse": True, "needs_grad": True}, "no lse_grad"),
    # a right bound of seqlen_k or more turns unbounded inside flash-attn 2 (flash-attention#895)
    "a wide window over few keys": (
        ("flash2",),
        {"seqlen_q": 200, "seqlen_k": 100, "mask": Window(10, 100)},
        "flash-attention#895",
    ),
    "a left window over few keys": (
        ("flash2",),
        {"seqlen_q": 200, "seqlen_k": 100, "mask": Window(10, None)},
        "flash-attention#895",
    ),
    "top-left causality over few keys": (
        ("flash2",),
        {"seqlen_q": 200, "seqlen_k": 100, "mask": causal(align="top_left")},
        "flash-attention#895",
    ),
    "ALiBi beside a window that ends before the query": (
        ("flash2",),
        {"seqlen_q": 100, "mask": causal(align="top_left"), "bias": ALiBi(torch.ones(8))},
        "ALiBi beside a window with right=-28 (at least 0)",
    ),
    "the log-sum-exp of ALiBi": (("flash2",), {"need_lse": True, "bias": ALiBi(torch.ones(8))}, "lse beside ALiBi"),
    "softcap with dropout": (("flash2",), {"softcap": 5.0, "dropout_p": 0.1}, "softcap together with dropout"),
    "a deterministic backward of large heads": (
        ("flash3",),
        {"head_dim": 256, "head_dim_v": 256, "needs_grad": True, "deterministic": True},
        "a deterministic backward at head_dim=256 (at most 192)",
    ),
    "the backward of a window over few keys": (
        ("flash4",),
        {"seqlen_k": 64, "mask": causal(), "needs_grad": True},
        "seqlen_k=64 < seqlen_q=128",
    ),
    # real keys are packed end to end, where no rule can tell which slots they were in
    "lengths beside causality": (
        FLASH[:2],
        {"mask": causal() & KeyLengths(torch.tensor([3, 5]))},
        "key_lengths beside causal",
    ),
    "both kinds of padding beside a window": (
        FLASH[:2],
        {"mask": Window(3, 0) & KeyLengths(torch.tensor([3, 5])) & KeyPadding(torch.ones(2, 128, dtype=torch.bool))},
        "key_lengths and key_padding beside window",
    ),
    "padding inside documents": (
        FLASH,
        {"batch": 1, "mask": Documents(torch.tensor([0, 9])) & KeyPadding(torch.ones(1, 128, dtype=torch.bool))},
        "ocuments",
    ),
    "ALiBi beside padding": (
        ("flash2",),
        {"mask": KeyPadding(torch.ones(2, 128, dtype=torch.bool)), "bias": ALiBi(torch.ones(8))},
        "key_padding beside alibi",
    ),
    "a window that starts after the query": (
        FLASH,
        {"seqlen_k": 100, "mask": Window(0, None, align="top_left")},
        "window left=-28 (at least 0)",
    ),
    "a top-left window inside documents": (
        FLASH,
        {"batch": 1, "mask": Documents(torch.tensor([0, 9]), torch.tensor([0, 5])) & causal(align="top_left")},
        "top-left",
    ),
}


@pytest.mark.parametrize("name", refused)
def test_flash_attn_refuses_with_the_value_and_the_limit(name: str) -> None:
    refusing, changes, reason = refused[name]
    for backend in refusing:
        said = get(backend).why_not(problem(**changes))
        assert said is not None and reason in said, f"{backend} said {said!r}"


def test_flash2_takes_what_the_others_lack() -> None:
    assert get("flash2").why_not(problem(dropout_p=0.1, bias=ALiBi(torch.ones(8)), head_dim=36, head_dim_v=36)) is None


@pytest.mark.parametrize("name", FLASH)
@pytest.mark.parametrize("mask", (KeyLengths(torch.tensor([3, 5])), KeyPadding(torch.ones(2, 128, dtype=torch.bool))))
@pytest.mark.parametrize("needs_grad", (False, True))
def test_every_flash_attn_takes_padding_alone(name: str, mask: Any, needs_grad: bool) -> None:
    assert get(name).why_not(problem(mask=mask, needs_grad=needs_grad)) is None


def test_flex_names_its_limits_on_each_device() -> None:
    flex, cpu = get("flex"), torch.device("cpu")
    assert flex.why_not(problem(dtype=torch.float32, needs_grad=True)) is None
    assert flex.why_not(problem(device=cpu, needs_grad=True)) == "no backward on cpu"
    assert flex.why_not(problem(head_dim=8, head_dim_v=8)) == "head_dim=8 (at least 16 on cuda)"
    assert flex.why_not(problem(device=cpu, head_dim=8, head_dim_v=8)) is None
    assert flex.why_not(problem(dropout_p=0.5)) == "no dropout"


@pytest.mark.parametrize("name", names())
@given(data=st.data())
def test_limits_and_reasons_say_the_same(name: str, data: st.DataObject) -> None:
    """A problem drawn inside a backend's limits is refused at most for an odd rule, never for a missing feature."""
    limits = get(name).limits
    device = torch.device((limits.devices or ("cpu",))[0])
    everywhere = dataclasses.replace(limits, not_on={})
    spec = data.draw(specs(limits=everywhere, head_dims=(8, 16, 64)))
    spec = dataclasses.replace(spec, device=device)  # its tensors stay on the CPU, unread
    said = get(name).why_not(spec) or ""
    assert not any(f"no {feature}" in said for feature in FEATURES), said
    assert "dtype" not in said and "device" not in said and "batch" not in said


@given(spec=specs())
def test_a_reason_appears_for_every_feature_taken_away(spec: AttentionSpec) -> None:
    for feature in spec.features:
        lacking = type(
            "Lacking",
            (type(get("naive")),),
            {"limits": dataclasses.replace(get("naive").limits, features=frozenset(FEATURES) - {feature})},
        )()
        assert lacking.why_not(spec) == f"no {feature}"


def test_no_gpu_is_a_reason_and_not_a_crash() -> None:
    class Bare(Machine):
        def has_cuda(self) -> bool:
            return False

    for kind in (Flash2, Flash3, Flash4):
        said = kind(machine=Bare()).why_not_here(torch.device("cuda"))
        assert said == "no CUDA device (torch.cuda.is_available() is False)"


@given(seed=seeds())
def test_the_error_prints_the_problem_and_every_reason(seed: int) -> None:
    q, k, v = tensors(AttentionSpec(2, 3, 3, 4, 2, 8, 8), seed)
    with pytest.raises(NoBackendError) as caught:
        attention(q, k, v, backend="flash_attn")
    error = caught.value
    assert set(error.reasons) == set(FLASH)
    for name, reason in error.reasons.items():
        assert f"{name}  {reason}" in str(error)
    assert "seqlen_q=3" in str(error) and "heads_kv=2" in str(error) and "'flash_attn'" in str(error)
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error) and again.reasons == error.reasons


def test_choice_goes_call_context_environment_automatic(monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.randn(1, 4, 2, 8)

    def ran(**options: Any) -> str:
        with record() as calls:
            attention(q, q, q, **options)
        return calls[0].backend

    assert ran() == "sdpa"
    monkeypatch.setenv("FLASHMHA_BACKEND", "flash_attn, flex")
    assert ran() == "flex"
    with use_backend("naive"):
        assert ran() == "naive"
        with use_backend(["flash4", "sdpa"]):
            assert ran() == "sdpa"
        assert ran(backend="flex") == "flex"
    assert ran() == "flex"
    monkeypatch.setenv("FLASHMHA_BACKEND", "flash_attn")
    with pytest.raises(NoBackendError):
        ran()


@pytest.mark.parametrize(
    "call", (lambda: get("falsh4"), lambda: choose(problem(), "falsh4"), lambda: use_backend("falsh4").__enter__())
)
def test_an_unknown_name_is_told_the_names(call: Any) -> None:
    with pytest.raises(ValueError, match=r"must be one of sdpa.*flash_attn, got 'falsh4'"):
        call()


@given(spec=specs())
def test_explain_says_what_choose_does(spec: AttentionSpec) -> None:
    said = explain(spec)
    assert said.chosen == choose(spec).name
    assert set(said.rows) == set(names())
    assert said.rows[said.chosen] == "chosen"
    for name, row in said.rows.items():
        assert (row in ("chosen", "could serve")) == (reason_against(get(name), spec) is None)
        assert name in str(said)


def test_explain_takes_a_call_a_spec_and_a_layer() -> None:
    layer = flashmha.FlashMultiHeadAttention(8, 2, batch_first=True, window=(1, 0))
    x = torch.randn(1, 4, 8)
    q = torch.randn(1, 4, 2, 4)
    assert explain(layer, x, x, x, need_weights=False).chosen == "sdpa"
    assert explain(layer, x, x, x).chosen == "naive", "weights of a small problem"
    long = torch.randn(1, 64, 8)
    assert explain(layer, long, long, long).chosen == "sdpa"
    assert "Window(1, 0)" in str(explain(layer, x, x, x))
    assert explain(q, q, q, mask=torch.ones(4, 4, dtype=torch.bool), backend="flash_attn").chosen is None
    assert explain(q, q, q, return_lse=True).chosen == "sdpa"
    with pytest.raises(TypeError, match="subject must be"):
        explain(3)  # type: ignore[arg-type]


def test_a_third_party_backend_registers_is_chosen_and_leaves() -> None:
    class Half(Backend):
        """Half of the definition's answer, to tell them apart."""

        name = "half"
        limits = Limits(devices=("cpu",), dtypes=(torch.float32,), features=frozenset(FEATURES))

        def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec) -> torch.Tensor:
            out = get("naive")(q, k, v, spec)
            assert isinstance(out, torch.Tensor)
            return out / 2

    before = names()
    register(Half, before="sdpa")
    try:
        assert names() == ("half", *before)
        q = torch.randn(1, 3, 1, 4)
        torch.testing.assert_close(attention(q, q, q, backend="half") * 2, attention(q, q, q, backend="naive"))
        with pytest.raises(ValueError, match="must not be taken, got 'half'; unregister"):
            register(Half)
        with pytest.raises(TypeError, match="takes a Backend class"):
            register(Half())  # type: ignore[arg-type]
        assert "half" in order(AttentionSpec(1, 3, 3, 1, 1, 4, 4))
    finally:
        backends.unregister("half")
    assert names() == before


def test_record_lists_layer_spec_and_backend_and_nests() -> None:
    layer = flashmha.FlashMultiHeadAttention(8, 2, batch_first=True)
    x = torch.randn(2, 3, 8)
    with record() as outer:
        layer(x, x, x, need_weights=False)
        with record() as inner:
            layer(x, x, x, need_weights=False)
    assert [(call.layer, call.backend) for call in outer] == [(layer, "sdpa")]
    assert [(call.layer, call.backend) for call in inner] == [(layer, "sdpa")]
    assert outer[0].spec.batch == 2 and "FlashMultiHeadAttention: sdpa" in str(outer[0])


wrong: dict[str, tuple[dict[str, Any], str]] = {
    "three axes": ({"q": torch.zeros(2, 3, 8)}, "q must be 4-D"),
    "two dtypes": ({"k": torch.zeros(1, 3, 2, 8, dtype=torch.float64)}, "one dtype and device"),
    "integers": ({name: torch.zeros(1, 3, 2, 8, dtype=torch.int64) for name in "qkv"}, "floating point"),
    "head dims that differ": ({"q": torch.zeros(1, 3, 2, 4)}, "must agree"),
    "batches that differ": ({"q": torch.zeros(2, 3, 2, 8)}, "must agree"),
    "keys without values": ({"v": torch.zeros(1, 4, 2, 8)}, "must agree"),
    "heads that do not divide": ({"q": torch.zeros(1, 3, 3, 8)}, "multiple of heads_kv"),
    "a negative softcap": ({"softcap": -1.0}, "softcap must be greater than 0"),
    "a probability above 1": ({"dropout_p": 1.5}, "dropout_p must be between 0 and 1, got 1.5"),
    "sinks of another size": ({"sinks": torch.zeros(3)}, "sinks must have shape"),
    "a mask of another size": ({"mask": torch.ones(5, 3, dtype=torch.bool)}, "must broadcast"),
    "a bias of another size": ({"bias": torch.ones(5, 3)}, "must broadcast"),
    "lengths past the end": ({"mask": KeyLengths(torch.tensor([4]))}, "between 0 and seqlen_k=3, got"),
    "negative lengths": ({"mask": KeyLengths(torch.tensor([-1]))}, "between 0 and seqlen_k=3, got"),
    "a float mask": ({"mask": torch.zeros(3, 3)}, "bias="),
    "padding as a dense mask": ({"mask": torch.ones(2, 3, dtype=torch.bool)}, "KeyPadding"),
    "padding of another size": ({"mask": KeyPadding(torch.ones(1, 5, dtype=torch.bool))}, "valid must have shape"),
    "lengths of another batch": ({"mask": KeyLengths(torch.ones(2, dtype=torch.int64))}, "lengths must have shape"),
    "slopes of other heads": ({"bias": ALiBi(torch.ones(3))}, "slopes must have shape"),
    "offsets past the end": ({"mask": Documents(torch.tensor([0, 9]))}, "must rise from 0 to at most 3"),
    "offsets that fall": ({"mask": Documents(torch.tensor([0, 3, 1]))}, "must rise"),
    "packed batches": (
        {**{name: torch.zeros(2, 3, 2, 8) for name in "qkv"}, "mask": Documents(torch.tensor([0, 3]))},
        "batch must be 1 with Documents",
    ),
    "a mask on another device": (
        {"mask": KeyPadding(torch.ones(1, 3, dtype=torch.bool, device="meta"))},
        "mask must be on the device of q",
    ),
}


@pytest.mark.parametrize("name", wrong)
def test_a_bad_call_is_told_what_was_wrong(name: str) -> None:
    changes, message = wrong[name]
    call = {**{name: torch.zeros(1, 3, 2, 8) for name in "qkv"}, **changes}
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match=message):
        attention(call.pop("q"), call.pop("k"), call.pop("v"), **call)
    assert torch.equal(torch.get_rng_state(), state)


THINGS: dict[str, Any] = {
    "a list": [[0.0] * 3] * 3,
    "an array": np.zeros((3, 3)),
    "a word": "causal",
    "a function": causal,
    "a pair": (1, 0),
    "nan": math.nan,
    "a block mask": create_block_mask(lambda b, h, q, k: q >= k, None, None, 3, 3, device="cpu"),
    "torch's causal bias": causal_upper_left(3, 3),
    "torch's other causal bias": causal_lower_right(3, 5),
    "integers": torch.zeros(3, 3, dtype=torch.int64),
    "complex numbers": torch.zeros(3, 3, dtype=torch.complex64),
    "eight bits": torch.zeros(3, 3).to(torch.float8_e4m3fn),
    "another device": torch.zeros(2, device="meta"),
    "a sparse tensor": torch.zeros(3, 3).to_sparse(),
    "a nested tensor": torch.nested.nested_tensor([torch.zeros(3, 3)]),
    "a module": torch.nn.Linear(2, 2),
}
"""Nothing of which is a mask, a bias, sinks, a number or a tensor of four axes."""
ARGUMENTS = ("mask", "bias", "sinks", "softcap", "softmax_scale", "dropout_p", "deterministic", "return_lse")


@pytest.mark.parametrize("argument", (*"qkv", *ARGUMENTS))
@pytest.mark.parametrize("thing", THINGS)
def test_an_argument_of_another_kind_is_named(argument: str, thing: str) -> None:
    call = {**{name: torch.zeros(1, 3, 2, 8) for name in "qkv"}, argument: THINGS[thing]}
    q, k, v = (call.pop(name) for name in "qkv")
    for asked in (attention, explain):
        if asked is explain and not isinstance(q, torch.Tensor):
            continue  # says what else it explains
        with pytest.raises((TypeError, ValueError), match=r"must ((?!\n).){1,250}$"):
            asked(q, k, v, **call)


@pytest.mark.parametrize(("made", "align"), ((causal_upper_left, "align='top_left'"), (causal_lower_right, "")))
def test_torchs_causal_bias_is_told_which_mask_it_is(made: Any, align: str) -> None:
    q = torch.zeros(1, 3, 2, 8)
    for argument in ("mask", "bias"):
        with pytest.raises(TypeError, match=re.escape(f"(say mask=causal({align}))")):
            attention(q, q, q, **{argument: made(3, 3)})
    for holder in (Dense, TensorBias):
        with pytest.raises(ValueError, match="CausalBias"):
            holder(made(3, 3))


@pytest.mark.parametrize("warn_only", (False, True))
def test_a_mode_that_only_warns_asks_for_nothing(warn_only: bool) -> None:
    q = torch.zeros(1, 3, 2, 8, requires_grad=True)
    layer = flashmha.FlashMultiHeadAttention(16, 2, batch_first=True)
    x = torch.randn(1, 3, 16)

    def claimed() -> list[bool]:
        with record() as calls:
            attention(q, q, q)
            attention(q, q, q, mask=causal())
            layer(x, x, x, need_weights=False)
            layer(x, x, x)
        return ["deterministic" in call.spec.features for call in calls]

    assert claimed() == [False] * 4
    torch.use_deterministic_algorithms(True, warn_only=warn_only)
    try:
        assert claimed() == [not warn_only] * 4
        asked = torch.compile(lambda x: x + is_deterministic(), backend="eager", fullgraph=True)(torch.zeros(1))
        assert asked == (not warn_only)
        told = AttentionSpec.of(q, q, q, deterministic=True)
        assert "deterministic" in told.features and by_math(told) == warn_only  # fused kernels only warn
    finally:
        torch.use_deterministic_algorithms(False)
    assert claimed() == [False] * 4


@pytest.mark.parametrize("name", names())
def test_the_log_sum_exp_of_a_blind_row_is_its_sink(name: str) -> None:
    q = torch.zeros(1, 3, 2, 16, dtype=torch.bfloat16)
    sinks = torch.tensor([0.5, -2.0])
    spec = AttentionSpec.of(q, q, q, mask=KeyPadding(torch.zeros(1, 3, dtype=torch.bool)), sinks=sinks, need_lse=True)
    backend = get(name)
    why = backend.why_not(spec) or backend.why_not_here(spec.device)
    if why is not None:
        pytest.skip(f"needs a device on which {name} serves sinks: {why}")
    out, lse = backend(q, q, q, spec)
    assert not out.any() and torch.equal(lse, sinks[None, :, None].expand(1, 2, 3))


CHANGES: dict[str, Callable[[AttentionSpec], Any]] = {
    "head_dim": lambda spec: spec.head_dim + 8,
    "head_dim_v": lambda spec: spec.head_dim_v + 8,
    "dtype": lambda spec: torch.float16 if spec.dtype == torch.float64 else torch.float64,
    "device": lambda spec: torch.device("cuda"),
    "mask": lambda spec: causal() & Window(1, 0) if spec.mask is None else None,
    "bias": lambda spec: ALiBi(torch.ones(spec.heads)) if spec.bias is None else None,
    "sinks": lambda spec: torch.zeros(spec.heads) if spec.sinks is None else None,
    "softcap": lambda spec: 5.0 if spec.softcap is None else None,
    "dropout_p": lambda spec: 0.5 if spec.dropout_p == 0.0 else 0.0,
    "needs_grad": lambda spec: not spec.needs_grad,
    "need_lse": lambda spec: not spec.need_lse,
}


@given(spec=specs(), name=st.sampled_from(sorted(CHANGES)))
def test_two_problems_that_differ_print_differently(spec: AttentionSpec, name: str) -> None:
    other = dataclasses.replace(spec, **{name: CHANGES[name](spec)})
    assume(name != "mask" or (other.mask is None) != (spec.mask is None))  # a window that hides nothing is gone
    assert str(spec) != str(other)


@pytest.mark.parametrize("mask", (causal, (4, 0), "causal"))
def test_a_mask_that_is_none_is_told_what_one_is(mask: Any) -> None:
    q = torch.zeros(1, 3, 2, 8)
    with pytest.raises(TypeError, match=r"mask must be a Mask, such as causal\(\), or a bool tensor, got"):
        attention(q, q, q, mask=mask)
    with pytest.raises(TypeError, match="bias must be a Bias"):
        attention(q, q, q, bias=mask)


@pytest.mark.parametrize("backend", (3, get("naive")))
def test_a_backend_that_is_no_name_is_told_so(backend: Any) -> None:
    q = torch.zeros(1, 3, 2, 8)
    with pytest.raises(TypeError, match="backend must be a name, a family or a list of them, got"):
        attention(q, q, q, backend=backend)


def test_limits_know_their_features() -> None:
    with pytest.raises(ValueError, match=r"features must be among .* got casual"):
        Limits(devices=(), dtypes=(torch.float32,), features=frozenset({"casual"}))


told_windows: dict[Any, tuple[bool, tuple[int, int]]] = {
    None: (False, (-1, -1)),
    causal(): (True, (-1, -1)),
    Window(3, 0): (False, (3, 0)),
    Window(None, 2): (False, (-1, 2)),
    Window(2, None): (False, (2, -1)),
    Window(20, 0): (True, (-1, -1)),  # wider than the problem
}


@pytest.mark.parametrize("kind", (Flash2, Flash3))
@pytest.mark.parametrize("mask", told_windows, ids=repr)
def test_flash_attn_is_told_a_window_as_it_counts_it(kind: type[Flash2 | Flash3], mask: Any) -> None:
    seen: dict[str, Any] = {}

    def kernel(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
        seen.update(options)
        return q

    q = torch.zeros(1, 9, 2, 8)
    kind((kernel, kernel))(q, q, q, AttentionSpec.of(q, q, q, mask=mask))
    assert (seen["causal"], seen["window_size"]) == told_windows[mask]


# A range of queries and keys


class Sizes(TorchDispatchMode):
    """The most elements of a tensor that an operator makes."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(tensor, Tensor) and not func.is_view:
                self.most = max(self.most, tensor.numel())
        return made


@given(spec=specs(), data=st.data())
def test_a_range_is_a_part_of_the_whole_and_makes_no_more(spec: AttentionSpec, data: st.DataObject) -> None:
    ranges = []
    for size in (spec.seqlen_q, spec.seqlen_k):
        start = data.draw(st.integers(0, size))
        ranges.append(data.draw(st.sampled_from((None, range(start, data.draw(st.integers(start, size)))))))
    rows, keys = (range(size) if part is None else part for part, size in zip(ranges, spec_lengths(spec)))
    batch, queries, seen = (max(size, 1) for size in (spec.batch, len(rows), len(keys)))  # what broadcasts has one
    # a bias by distance is made of one line of distances, as long as queries and keys together
    bound = batch * max(spec.heads * max(queries * seen, queries + seen), *spec_lengths(spec))
    for ask in (spec.allowed, spec.added):
        whole = ask()
        with Sizes() as sizes:
            part = ask(*ranges)
        if whole is None:
            assert part is None
            continue
        full = (spec.batch, spec.heads, *spec_lengths(spec))
        wanted = whole.expand(full)[:, :, rows.start : rows.stop, keys.start : keys.stop]
        assert torch.equal(part.expand(wanted.shape), wanted) and part.dtype == whole.dtype
        assert sizes.most <= bound, "no tensor is larger than the range"


def spec_lengths(spec: AttentionSpec) -> tuple[int, int]:
    return spec.seqlen_q, spec.seqlen_k


@pytest.mark.parametrize("part", (3, slice(0, 1), [0], (0, 1), range(0, 4, 2), range(-1, 2), range(2, 1), range(6)))
@pytest.mark.parametrize("name", ("queries", "keys"))
@pytest.mark.parametrize("question", ("allowed", "added"))
def test_a_range_that_is_none_is_refused(part: Any, name: str, question: str) -> None:
    spec = AttentionSpec(1, 5, 5, 2, 2, 4, 4, mask=causal(), bias=ALiBi(torch.ones(2)))
    with pytest.raises((TypeError, ValueError), match=rf"^{name} must be a range.*, got "):
        getattr(spec, question)(**{name: part})


@given(spec=specs(), factor=st.sampled_from((0.5, 1.0, 3.0)), seed=seeds())
def test_a_scale_that_is_changed_or_given_counts(spec: AttentionSpec, factor: float, seed: int) -> None:
    """SDPA is not told the default scale; every other one it is, however the problem came to it."""
    scale = factor * max(spec.head_dim, 1) ** -0.5
    for one in (spec.changed(softmax_scale=scale), dataclasses.replace(spec, softmax_scale=scale)):
        assert one.scale == scale and not one.usual_scale
        if get("sdpa").why_not(one) is None:
            assert_agrees(Sdpa, one, seed)

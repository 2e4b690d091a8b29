"""A returned map of weights behaves as the tensor it stands for, and holds no more memory than that tensor would."""

import copy
import io
import os
import pickle
import threading
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from flashmha import Dense, FlashMultiHeadAttention, KeyLengths
from flashmha.backends.sdpa.switches import switches
from flashmha.testing import noise, seeds
from flashmha.weights import cell
from flashmha.weights.deferred import Deferred
from flashmha.weights.storage import fill

SEQLEN = 23
"""With four heads and two items a map large enough to be deferred; smaller ones are ordinary tensors."""


def maps(grad: bool = False, average: bool = True, batch: int = 2, seqlen: int = SEQLEN) -> tuple[Tensor, Tensor]:
    """A map that was not read yet, and the ordinary tensor it stands for."""
    torch.manual_seed(0)
    layer, x = FlashMultiHeadAttention(16, 4, batch_first=True), torch.randn(batch, seqlen, 16)
    with torch.set_grad_enabled(grad):
        unread = layer(x, x, x, average_attn_weights=average)[1]
        read = layer(x, x, x, average_attn_weights=average)[1].clone()
    assert type(unread) is Deferred and unread.cell is not None
    return unread, read


OTHERWISE = {
    *("bernoulli", "bernoulli_", "cauchy_", "exponential_", "geometric_", "log_normal_", "multinomial", "normal_"),
    *("random_", "uniform_", "empty_like"),  # random
    *("data_ptr", "const_data_ptr", "_cdata", "__hash__", "__sizeof__", "__dir__", "_python_dispatch"),  # its identity
    *(
        "__cuda_array_interface__",
        "storage",
        "untyped_storage",
        "_typed_storage",
        "__dlpack__",
        "__iter__",
        "__dlpack_c_exchange_api__",
    ),  # below
    *("__class__", "__dict__", "__weakref__", "__new__", "__init_subclass__", "__subclasshook__", "__module__"),
    *("__doc__", "__annotations__", "__reduce__", "__getstate__", "grad_fn", "_grad_fn", "output_nr", "backward"),
    *("cell", "foreign", "plain", "is_shared"),
}
"""Attributes of a tensor that two equal tensors need not share, or that other tests ask for."""
NAMES = sorted(set(dir(Tensor)) - OTHERWISE)


def outcome(tensor: Tensor, name: str) -> Any:
    """What an attribute gives, called where it can be called without arguments; an error's type."""
    try:
        found = getattr(tensor, name)
        return found() if callable(found) else found
    except Exception as error:
        return type(error)


def assert_alike(one: Any, two: Any) -> None:
    if isinstance(two, Tensor):
        assert isinstance(one, Tensor) and one.requires_grad == two.requires_grad and one.layout == two.layout
        if two.layout != torch.strided:
            one, two = one.to_dense(), two.to_dense()
        if one is not None and not two.is_meta:
            assert one.stride() == two.stride()
            torch.testing.assert_close(one.detach().clone(), two.detach(), equal_nan=True)
    elif isinstance(two, (tuple, list)):
        assert len(one) == len(two)
        for pair in zip(one, two):
            assert_alike(*pair)
    elif isinstance(two, np.ndarray):
        np.testing.assert_array_equal(one, two)
    elif not callable(two) or isinstance(two, type):
        assert one == two


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("grad", (False, True))
def test_every_attribute_is_that_of_an_ordinary_tensor(grad: bool) -> None:
    for name in NAMES:
        unread, read = maps(grad)
        try:
            assert_alike(outcome(unread, name), outcome(read, name))
            assert_alike(unread, read)  # also where the attribute changed it in place
        except AssertionError as error:
            raise AssertionError(f"Tensor.{name}: {error}") from None


CHANGES: dict[str, Callable[[Tensor], Any]] = {
    "unsqueeze_": lambda x: x.unsqueeze_(0),
    "squeeze_": lambda x: x.squeeze_(),
    "transpose_": lambda x: x.transpose_(0, -1),
    "swapaxes_": lambda x: x.swapaxes_(0, 1),
    "t_": lambda x: x.t_(),
    "resize_": lambda x: x.resize_(2, 2),
    "as_strided_": lambda x: x.as_strided_((2, 3), (3, 1)),
    "set_": lambda x: x.set_(torch.arange(6.0)),
    "data": lambda x: setattr(x, "data", torch.arange(4.0).view(2, 2)),
    "data.zero_": lambda x: x.data.zero_(),
    "mul_": lambda x: x.mul_(2.0),
    "index": lambda x: x.__setitem__(0, 3.0),
    "view": lambda x: x.view(-1)[1:].fill_(7.0),
    "detach": lambda x: x.detach().add_(1.0),
    "numpy": lambda x: x.numpy().__setitem__(..., 5.0),
    "storage": lambda x: x.untyped_storage().fill_(0),
    "out": lambda x: torch.add(x.clone(), 1.0, out=x),
    "foreach": lambda x: torch._foreach_add_([x], 1.0),
    "swap": lambda x: torch.utils.swap_tensors(x, torch.arange(6.0)),  # as many as any size below asks for
    "read": lambda x: x.sum(),
    "compiled": lambda x: torch.compile(lambda y: y * 2.0, backend="eager")(x),
}


@pytest.mark.cpu("changes the memory of a CPU")
@given(names=st.lists(st.sampled_from(sorted(CHANGES)), min_size=1, max_size=5))
def test_changes_in_place_are_those_of_an_ordinary_tensor(names: list[str]) -> None:
    unread, read = maps()
    for name in names:
        said = []
        for tensor in (unread, read):
            try:
                CHANGES[name](tensor)
                said.append(None)
            except (RuntimeError, IndexError) as error:
                said.append(type(error))
        assert said[0] == said[1], names
        assert_alike(unread, read)


class Holder(nn.Module):
    def __init__(self, tensor: Tensor, buffer: bool) -> None:
        super().__init__()
        if buffer:
            self.register_buffer("held", tensor.detach())
        else:
            self.held = nn.Parameter(tensor)


def saved(thing: Any) -> Any:
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file)


def stepped(module: Holder) -> Tensor:
    """A parameter after a step that changes nothing in the end."""
    before = module.held.detach().clone()
    module.held.square().sum().backward()
    torch.optim.SGD(module.parameters(), 0.5).step()
    module.held.data = before
    return module.held


HANDED: dict[str, Callable[[Tensor], Any]] = {
    "parameter": lambda x: Holder(x, False).held,
    "copied module": lambda x: copy.deepcopy(Holder(x, False)).held,
    "copied buffer": lambda x: copy.deepcopy(Holder(x, True)).held,
    "pickled module": lambda x: pickle.loads(pickle.dumps(Holder(x, False))).held,
    "saved state": lambda x: saved(Holder(x, False).state_dict())["held"],
    "converted module": lambda x: Holder(x, False).double().held.float(),
    "optimised": lambda x: stepped(Holder(x, False)),
    "copied": lambda x: copy.copy(x),
    "subclass": lambda x: x.as_subclass(type("Sub", (Tensor,), {})).as_subclass(Tensor),
    "constructor": lambda x: torch.Tensor(x),
    "torch.tensor": lambda x: torch.tensor(x.detach()),
    "torch.as_tensor": lambda x: torch.as_tensor(x),
    "set_": lambda x: torch.empty(0).set_(x.detach()),
    "DLPack": lambda x: torch.from_dlpack(x.detach()),
    "NumPy": lambda x: torch.from_numpy(np.asarray(x.detach().cpu())),
    "scripted": lambda x: torch.jit.script(nn.Identity())(x),
    "vmap": lambda x: torch.vmap(lambda row: row * 1.0)(x),
    "torch.func": lambda x: torch.func.grad(lambda y: y.square().sum() / 2)(x),
    "compiled": lambda x: torch.compile(lambda y: y * 1.0, backend="aot_eager", fullgraph=True)(x),
    "foreach": lambda x: torch._foreach_mul([x], 1.0)[0],
    "stack": lambda x: torch.stack([x])[0],
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("grad", (False, True))
@pytest.mark.parametrize("name", HANDED)
def test_whatever_it_is_handed_to_gets_the_values(name: str, grad: bool) -> None:
    unread, read = maps(grad)
    found = HANDED[name](unread)
    torch.testing.assert_close(found.detach().clone().to(read.device), read.detach())


@pytest.mark.cpu("shares the memory of a CPU")
@pytest.mark.parametrize("grad", (False, True))
def test_its_memory_can_be_shared_and_exported(grad: bool) -> None:
    unread, read = maps(grad)
    assert unread.share_memory_().is_shared()
    torch.testing.assert_close(unread, read)
    unread, _ = maps(grad)
    exported = torch.utils.dlpack.from_dlpack(unread.detach().__dlpack__())
    unread.detach().fill_(2.0)
    assert (exported == 2.0).all(), "one memory"
    unread, _ = maps(grad)
    assert unread.data_ptr() == unread.untyped_storage().data_ptr() == unread.detach().data_ptr() != 0


def test_safetensors_writes_it() -> None:
    safetensors = pytest.importorskip("safetensors.torch", reason="needs pip install safetensors")
    unread, read = maps()
    torch.testing.assert_close(safetensors.load(safetensors.save({"map": unread}))["map"], read.cpu())


def test_code_that_takes_the_address_unread_gets_an_error() -> None:
    unread, read = maps()
    try:
        capsule = torch._C._to_dlpack(unread)  # as a C++ extension does
    except RuntimeError as error:
        assert "data pointer" in str(error)
    else:
        torch.testing.assert_close(torch.from_dlpack(capsule), read)
    torch.testing.assert_close(unread, read)
    torch.testing.assert_close(torch.from_dlpack(torch._C._to_dlpack(unread)), read)


def test_threads_that_look_at_once_see_one_tensor() -> None:
    for _ in range(20):
        unread, read = maps()
        found: list[Any] = []

        def look(unread: Tensor = unread, found: list[Any] = found) -> None:
            found.append((unread.data_ptr(), unread.sum()))

        threads = [threading.Thread(target=look) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == 8 and len({pointer for pointer, _ in found}) == 1
        torch.testing.assert_close(found[0][1], read.sum())


@pytest.mark.cpu("forks a process, which no GPU survives")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork, which this system lacks")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork")
def test_a_forked_process_may_be_the_first_to_look() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        torch.randn(512, 512) @ torch.randn(512, 512)  # starts the second one
        unread, read = maps(batch=4, seqlen=512)
        child = os.fork()
        if not child:
            os._exit(0 if unread[0, 0].tolist() == pytest.approx(read[0, 0].tolist(), abs=1e-5) else 1)
        assert os.waitpid(child, 0)[1] == 0
        torch.testing.assert_close(unread, read)
    finally:
        torch.set_num_threads(threads)


@given(mask=st.sampled_from(("none", "bool", "float", "padding")), average=st.booleans(), seed=seeds())
def test_autograd_saves_every_tensor_that_the_graph_holds(mask: str, average: bool, seed: int) -> None:
    """So that checkpoints and offloading find them: with every saved tensor dropped, none of the call is alive."""
    layer = FlashMultiHeadAttention(16, 4, batch_first=True)
    x = noise(seed, 2, SEQLEN, 16, dtype=torch.float32).requires_grad_()
    hidden = torch.ones(SEQLEN, SEQLEN, dtype=torch.bool).triu(2)
    call: dict[str, Any] = {"average_attn_weights": average}
    if mask == "padding":
        call["key_padding_mask"] = hidden[:2]
    elif mask != "none":
        call["attn_mask"] = hidden if mask == "bool" else torch.zeros(SEQLEN, SEQLEN).masked_fill(hidden, -9.0)
    made: list[Any] = []

    class Watched(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            for tensor in torch.utils._pytree.tree_leaves(result):
                if isinstance(tensor, Tensor) and type(tensor) is Tensor and tensor.numel():
                    made.append(weakref.ref(tensor.untyped_storage()))
            return result

    with Watched(), saved_tensors_hooks(lambda tensor: tuple(tensor.shape), lambda shape: torch.zeros(shape)):
        out, unread = layer(x, x, x, **call)
        assert type(unread) is Deferred
        del unread
    mine = weakref.ref(out.untyped_storage())
    alive = [storage for storage in made if storage() is not None and storage() is not mine()]
    parameters = {
        p.untyped_storage().data_ptr() for p in (*layer.parameters(), x, *call.values()) if isinstance(p, Tensor)
    }
    assert not [s for s in alive if s().data_ptr() not in parameters and s().data_ptr() != out.data_ptr()]


@pytest.mark.parametrize("look", ("keep", "detach", "cpu", "hook"))
@pytest.mark.parametrize("grad", (False, True))
def test_maps_that_are_kept_hold_little_more_than_their_values(look: str, grad: bool) -> None:
    layer, kept, cells = FlashMultiHeadAttention(256, 4, batch_first=True), [], []
    layer.register_forward_hook(lambda module, arguments, output: kept.append(output[1]) if look == "hook" else None)
    x = torch.randn(2, SEQLEN, 256)
    for _ in range(3 * cell.MOST_UNREAD):
        with torch.set_grad_enabled(grad):
            out, unread = layer(x, x, x)
        assert type(unread) is Deferred and unread.cell is not None
        cells.append(unread.cell)
        kept.append({"keep": unread, "detach": unread.detach(), "cpu": unread.cpu(), "hook": None}[look])
        if grad:
            out.sum().backward()
    unread = None
    assert sum(one.made is None for one in cells) <= cell.MOST_UNREAD
    assert all(cell.source is None for cell in cells if cell.made is not None)


def test_maps_that_are_dropped_are_not_computed() -> None:
    layer, x, cells = FlashMultiHeadAttention(256, 4, batch_first=True), torch.randn(2, SEQLEN, 256), []
    for _ in range(3 * cell.MOST_UNREAD):
        out, unread = layer(x, x, x)
        cells.append(weakref.ref(unread.cell))
    assert sum(cell() is not None for cell in cells) == 1 and cells[-1]().made is None
    assert out is not None


def test_a_map_smaller_unread_than_read_waits_for_a_look() -> None:
    layer, x = FlashMultiHeadAttention(4, 2, batch_first=True), torch.randn(1, 64, 4)
    kept = [layer(x, x, x)[1] for _ in range(3 * cell.MOST_UNREAD)]
    assert all(unread.cell is not None and unread.cell.made is None for unread in kept)


@pytest.mark.gpu
def test_another_stream_reads_the_values() -> None:
    for _ in range(20):
        unread, read = maps(batch=4, seqlen=256)
        other = torch.cuda.Stream()
        other.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(other):
            found = unread.clone()
            fill(unread)
        torch.cuda.current_stream().wait_stream(other)
        torch.testing.assert_close(found, read)


def test_a_flashmha_mask_that_changes_after_the_call_changes_no_weights() -> None:
    layer, x = FlashMultiHeadAttention(16, 4, batch_first=True), torch.randn(2, SEQLEN, 16)
    allowed = torch.ones(SEQLEN, SEQLEN, dtype=torch.bool).tril()
    lengths = torch.tensor([7, SEQLEN])
    for mask, tensor in ((Dense(allowed), allowed), (KeyLengths(lengths), lengths)):
        with torch.no_grad():
            expected = layer(x, x, x, attn_mask=mask)[1].clone()
            unread = layer(x, x, x, attn_mask=mask)[1]
            assert type(unread) is Deferred and unread.cell is not None
            tensor.fill_(1)
            torch.testing.assert_close(unread.clone(), expected)


def test_heads_that_are_views_of_an_input_are_read_at_once() -> None:
    class Plain(FlashMultiHeadAttention):
        def project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return tuple(x.unflatten(-1, (4, 4)) for x in (query, key, value))  # type: ignore[return-value]

    layer, x = Plain(16, 4, batch_first=True), torch.randn(2, SEQLEN, 16)
    with torch.no_grad():
        expected = layer(x, x, x)[1].clone()
        seen = layer(x, x, x)[1]
        x.mul_(3.0)
        torch.testing.assert_close(seen.clone(), expected)


def test_weights_on_the_meta_device_are_there() -> None:
    layer, x = FlashMultiHeadAttention(16, 4, batch_first=True, device="meta"), torch.randn(2, 40, 16, device="meta")
    assert (layer(x, x, x)[1] * 2).shape == (2, 40, 40) and layer(x, x, x)[1].detach().is_meta


@pytest.mark.cpu("the switches of a GPU's kernels, seen from a CPU")
def test_threads_leave_the_switches_of_sdpa_as_they_were() -> None:
    layer, x = FlashMultiHeadAttention(16, 4, batch_first=True), torch.randn(2, 64, 16)
    mask, before = torch.full((64, 64), -1e9), switches()

    def run() -> None:
        for _ in range(30):
            layer(x, x, x, attn_mask=mask, need_weights=False)[0].sum().backward()

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert switches() == before

"""A swapped model in DistributedDataParallel: two processes, against one process on the joined batch."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from flashmha import FlashMultiHeadAttention, replace_mha, restore_mha
from flashmha.testing import assert_same
from flashmha.testing.models import Architecture, EncoderMasks

RANKS = 2
STEPS = 2
PATIENCE = datetime.timedelta(days=1)
"""However slow a machine is, the ranks wait for each other."""
ORDERS = ("stock", "swap, wrap", "wrap, swap", "wrap, swap, restore", "step, swap")
ARCHITECTURE = Architecture(num_layers=1, norm=True, nested=False, seed=5)


def test_both_ranks_get_the_gradients_of_one_process_on_the_joined_batch(runs: dict[str, Any]) -> None:
    for order in ORDERS:
        for rank in range(RANKS):
            for step in range(STEPS):
                assert_same(runs[order][rank]["gradients"][step], runs["one process"]["gradients"][step])


def test_both_ranks_end_with_the_parameters_of_one_process(runs: dict[str, Any]) -> None:
    for order in ORDERS:
        for rank in range(RANKS):
            assert_same(runs[order][rank]["parameters"], runs["one process"]["parameters"])


def test_the_layers_are_swapped_whatever_the_order(runs: dict[str, Any]) -> None:
    for order in ORDERS:
        swapped = "swap" in order and "restore" not in order
        assert all(runs[order][rank]["swapped"] == [swapped] for rank in range(RANKS))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What every rank of every order got, and what one process gets."""
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("this build of torch has no gloo")
    folder = tmp_path_factory.mktemp("ddp")
    torch.multiprocessing.spawn(one_rank, args=(str(folder),), nprocs=RANKS)
    results: dict[str, Any] = {order: [] for order in ORDERS}
    for rank in range(RANKS):
        got = torch.load(folder / f"rank{rank}")
        for order in ORDERS:
            results[order].append(got[order])
    model = ARCHITECTURE.encoder()
    results["one process"] = train(model, model, "stock", slice(None))
    return results


def one_rank(rank: int, folder: str) -> None:
    """Every order in one process of the group, written to a file."""
    store = dist.FileStore(str(Path(folder) / "store"), RANKS)
    store.set_timeout(PATIENCE)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=PATIENCE)
    torch.set_num_threads(1)
    results = {}
    for order in ORDERS:
        model = ARCHITECTURE.encoder()
        if order == "swap, wrap":
            replace_mha(model)
        wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=False)
        if order.startswith("wrap, swap"):
            replace_mha(wrapped)
        if order.endswith("restore"):
            restore_mha(wrapped)
        results[order] = train(wrapped, model, order, slice(rank, None, RANKS))
    torch.save(results, Path(folder) / f"rank{rank}")
    dist.destroy_process_group()


def train(wrapped: nn.Module, model: nn.Module, order: str, share: slice) -> dict[str, Any]:
    """Two steps on a share of the batch; a parameter left without a gradient makes the second one raise."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    masks = EncoderMasks(batch=4, seqlen=5, padding="bool")
    x, padding = ARCHITECTURE.inputs(masks.batch, masks.seqlen), masks.padding_mask()
    assert padding is not None
    gradients: list[dict[str, Tensor]] = []
    for step in range(STEPS):
        if order == "step, swap" and step == 1:
            replace_mha(wrapped)
        optimizer.zero_grad()
        out = wrapped(x[share], src_key_padding_mask=padding[share])
        torch.tanh(out).square().mean().backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
        optimizer.step()
    return {
        "gradients": gradients,
        "parameters": {name: parameter.detach() for name, parameter in model.named_parameters()},
        "swapped": [type(layer.self_attn) is FlashMultiHeadAttention for layer in model.layers],
    }

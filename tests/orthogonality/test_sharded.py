"""The regularizer on sharded weights, here on one process; real shards are in tests/training/test_fsdp.py."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from hf_ssl_or.models.configuration_ssl import OrthogonalityConfig
from hf_ssl_or.orthogonality import OrthogonalityRegularizer, regularizer


@pytest.fixture
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def encoder() -> nn.Sequential:
    torch.manual_seed(0)
    grouped = nn.Conv2d(4, 6, 3, groups=2)
    return nn.Sequential(nn.Conv2d(3, 40, 3), nn.Conv2d(40, 4, 3), grouped, nn.Linear(5, 7), nn.Linear(5, 7)).double()


@pytest.mark.parametrize("penalty", ["so", "srip", "mutual_coherence"])
def test_gradients_land_in_the_local_parts_and_one_shape_is_whole_at_a_time(
    group: None, monkeypatch: pytest.MonkeyPatch, penalty: str
):
    plain = encoder()
    sharded = fully_shard(copy.deepcopy(plain), mesh=init_device_mesh("cpu", (1,)))
    gathered = []

    def count(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        gathered.append(sum(tensor.numel() for tensor in tensors))
        return gather_full_tensors(tensors)

    gather_full_tensors = regularizer.gather_full_tensors
    monkeypatch.setattr(regularizer, "gather_full_tensors", count)
    regularizers = [
        OrthogonalityRegularizer(module, OrthogonalityConfig(penalty=penalty, weight=0.1))
        for module in (plain, sharded)
    ]
    values = [each.add_gradients() for each in regularizers]
    torch.testing.assert_close(values[1], values[0], rtol=0, atol=0)
    for layer, other in zip(plain, sharded, strict=True):
        assert isinstance(other.weight.grad, DTensor)
        torch.testing.assert_close(other.weight.grad.to_local(), layer.weight.grad, rtol=1e-14, atol=1e-14)
    assert regularizers[1].errors() == pytest.approx(regularizers[0].errors(), rel=1e-12)
    assert max(gathered) == plain[1].weight.numel() < sum(gathered) / 4


def test_vectors_do_not_depend_on_the_memory_format():
    plain = encoder()[:2]  # a tall and a wide matrix
    last = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    config = OrthogonalityConfig(penalty="srip", weight=0.1)
    states = []
    for module in (plain, last):
        regularizer = OrthogonalityRegularizer(module, config)
        for _ in range(3):
            regularizer.add_gradients()
        states.append(regularizer.state_dict())
    torch.testing.assert_close(states[1], states[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(last[0].weight.grad, plain[0].weight.grad, rtol=1e-12, atol=1e-12)

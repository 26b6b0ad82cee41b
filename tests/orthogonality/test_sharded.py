"""The regularizer on sharded weights; in the trainer they are in tests/training/test_fsdp.py."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import run_all
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from hf_ssl_or.distributed import full_tensor
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


FORMS = [("so", "identity"), ("so", "scaled"), ("so", "relaxed"), ("so", "start"), ("srip", "scaled")]


def steps_of_a_strength(shards: int) -> dict[str, torch.Tensor]:
    """Weights and states after three steps of each form."""
    result = {}
    for penalty, target in FORMS:
        module = encoder()
        if shards:
            module = fully_shard(module, mesh=init_device_mesh("cpu", (shards,)))
        config = OrthogonalityConfig(penalty=penalty, target=target, strength=0.5)
        regularizer = OrthogonalityRegularizer(module, config)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.mul_(1.5)
        for step in range(3):
            regularizer.set_progress(step, 3)
            regularizer.step()
        for name, parameter in module.named_parameters():
            result[f"{penalty}-{target}/{name}"] = full_tensor(parameter.detach()).contiguous().clone()
        sizes = regularizer.step_sizes()
        result[f"{penalty}-{target}/sizes"] = torch.tensor(list(sizes.values()), dtype=torch.float64)
        result |= {f"{penalty}-{target}/state/{name}": x for name, x in regularizer.state_dict().items()}
    return result


def worker(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    result = steps_of_a_strength(2)
    if dist.get_rank() == 0:
        save_file(result, folder / "two.safetensors")
    dist.destroy_process_group()


def test_two_processes_with_half_of_each_weight_step_as_one(tmp_path: Path):
    run_all(worker, tmp_path, log=tmp_path / "log", count=2)
    got, wanted = load_file(tmp_path / "two.safetensors"), steps_of_a_strength(0)
    assert got.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], rtol=1e-12, atol=1e-12, msg=name)

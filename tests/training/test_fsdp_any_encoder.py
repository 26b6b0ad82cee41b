"""Encoders of other libraries in parts: two sharded processes train them as one process that has all."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from processes import run_all
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import Dinov2Config, Dinov2Model

from hf_ssl_or.distributed import use_global_batch_norm
from hf_ssl_or.models.adapters import adapt_encoder
from hf_ssl_or.models.auto import create_encoder
from hf_ssl_or.training.fsdp import shard, update_full

CASES = {"convnext_atto": 5, "test_efficientnet": 4, "dinov2": 2}  # and their blocks


class Holder(nn.Module):
    """What `shard` needs of a method."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def encoders(self) -> list[nn.Module]:
        return [self.encoder]

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        return self.encoder(x_BCHW).pooler_output.square().mean()


def build(name: str) -> Any:
    torch.manual_seed(0)
    if name == "dinov2":
        config = Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8)
        return adapt_encoder(Dinov2Model(config)).double()
    slim = {"dims": [8, 8, 8, 16], "depths": [1, 1, 2, 1]} if name == "convnext_atto" else {}
    return use_global_batch_norm(create_encoder(name, image_size=32, **slim).double())


def train(folder: Path, *, sharded: bool) -> None:
    for name, blocks in CASES.items():
        encoder = build(name)
        assert len(encoder.blocks()) == blocks
        full = copy.deepcopy(encoder)
        encoder.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        holder: Any = Holder(encoder).train()
        if sharded:
            holder = shard(holder, torch.device("cpu"))
            assert all(isinstance(p, DTensor) for p in holder.parameters())
        optimizer = torch.optim.SGD([p for p in holder.parameters() if p.requires_grad], lr=0.1)
        images = torch.randn(3, 8, 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        for x_BCHW in images:
            own = x_BCHW.chunk(2)[dist.get_rank()] if sharded else x_BCHW
            holder(own).backward()
            optimizer.step()
            optimizer.zero_grad()
        update_full(full, holder.encoder)
        if not sharded or dist.get_rank() == 0:
            save_file({key: x.contiguous() for key, x in full.state_dict().items()}, folder / f"{name}.safetensors")


def train_sharded(folder: Path) -> None:
    dist.init_process_group("gloo")
    train(folder, sharded=True)
    dist.destroy_process_group()


def test_two_sharded_processes_train_as_one(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
    train(tmp_path / "one", sharded=False)
    run_all(train_sharded, tmp_path / "two", log=tmp_path / "log", count=2)
    for name in CASES:
        start = build(name).state_dict()
        one, two = (load_file(tmp_path / folder / f"{name}.safetensors") for folder in ("one", "two"))
        assert any(not torch.equal(one[key], start[key]) for key in one)
        for key, value in one.items():
            assert two[key].allclose(value, rtol=1e-9, atol=1e-9), f"{name}: {key}"

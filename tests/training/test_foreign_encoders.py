"""Encoders of other libraries under AdamW: the same features on two processes as on one, and exact resume.

Features are compared, not losses alone. A bias whose shift the projector's BatchNorm takes out has no true gradient;
Adam divides what rounding leaves of it by its own size, so in float32 it moves, and with it all features by one
constant vector. Compared are features without their mean over images, and in float64 the features themselves.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from processes import run_all
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import Dataset
from transformers import Dinov2Config, Dinov2Model
from world_worker import DTYPES, without_kinks

from hf_ssl_or import OrthogonalityConfig, SSLTrainer, SSLTrainingArguments
from hf_ssl_or.methods import BarlowTwins
from hf_ssl_or.training.optim import OptimizerArguments

STEPS = 8
ENCODERS = ("convnext", "dinov2")


class Noise(Dataset):
    """A torch data set of one's own."""

    def __len__(self) -> int:
        return 48

    def __getitem__(self, i: int) -> np.ndarray:
        coarse = np.random.default_rng(i).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        return coarse.repeat(8, axis=0).repeat(8, axis=1)


def encoder_of(name: str) -> nn.Module:
    if name == "dinov2":
        return Dinov2Model(
            Dinov2Config(
                hidden_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8, mlp_ratio=2
            )
        )
    return timm.create_model("convnext_atto", num_classes=0, depths=(1, 1, 1, 1), dims=(8, 8, 16, 24))


def trainer_of(name: str, folder: Path, dtype: torch.dtype, **more: object) -> SSLTrainer:
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        method = BarlowTwins(encoder_of(name), projector_dim=16, projector_hidden=32)
        without_kinks(method)
    finally:
        torch.set_default_dtype(torch.float32)
    return SSLTrainer(
        model=method,
        args=SSLTrainingArguments(
            **{
                "output_dir": folder,
                "max_steps": STEPS,
                "batch_size": 16,
                "device": "cpu",
                "monitor_images": 16,
                "optimizer": OptimizerArguments(name="adamw", lr=1e-3),
                **more,
            }
        ),
        train_dataset=Noise(),
        data={"image_size": 32},
        views=2,
        orthogonality=OrthogonalityConfig(penalty="so", weight=1e-3),
    )


@torch.no_grad()
def features_of(encoder: nn.Module, dtype: torch.dtype) -> torch.Tensor:
    encoder.eval()
    pixels = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(5), dtype=dtype)
    return encoder(pixel_values=pixels).pooler_output


def work(folder: Path) -> None:
    torch.set_num_threads(1)
    for name in ENCODERS:
        for kind, dtype in DTYPES.items():
            trainer = trainer_of(name, folder / f"{name}-{kind}", dtype)
            losses = []
            for batch in trainer.loader.batches(0, STEPS):
                batch.views_VBCHW = batch.views_VBCHW.to(dtype)
                losses.append(trainer.training_step(batch).loss.detach())
            found = {"features": features_of(trainer.encoder, dtype).contiguous(), "losses": torch.stack(losses)}
            if trainer.accelerator.is_main_process:
                save_file(found, folder / f"{name}-{kind}.safetensors")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("foreign")
    for count in (1, 2):
        (root / str(count)).mkdir()
        run_all(work, root / str(count), log=root / f"{count}.log", count=count)
    return root


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).norm() / want.norm())


@pytest.mark.parametrize("name", ENCODERS)
def test_two_processes_give_the_features_of_one(root: Path, name: str) -> None:
    for kind, tolerance in (("float64", 1e-9), ("float32", 1e-4)):
        one, two = (load_file(root / str(count) / f"{name}-{kind}.safetensors") for count in (1, 2))
        assert one["losses"].unique().numel() == STEPS
        assert relative(two["losses"], one["losses"]) <= tolerance
        centered = [file["features"] - file["features"].mean(0) for file in (two, one)]
        assert relative(*centered) <= tolerance, kind
        if kind == "float64":
            assert relative(two["features"], one["features"]) <= 1e-7  # the constant drifts by 1e-9


@pytest.mark.parametrize("name", ENCODERS)
def test_resumed_equals_uninterrupted_bitwise(tmp_path: Path, name: str) -> None:
    full = trainer_of(name, tmp_path / "full", torch.float32)
    full.train()
    first = trainer_of(name, tmp_path / "parts", torch.float32, save_steps=3, keep_last=None)
    first.train()
    again = trainer_of(name, tmp_path / "parts", torch.float32, save_steps=3, keep_last=None)
    again.train(resume_from_checkpoint=tmp_path / "parts" / "checkpoints" / "step-3")
    for key, weight in full.method.state_dict().items():
        assert torch.equal(weight, again.method.state_dict()[key]), key


def print_differences(folder: Path) -> None:
    """Prints what docs/python.md says."""
    for count in (1, 2):
        (folder / str(count)).mkdir()
        run_all(work, folder / str(count), log=folder / f"{count}.log", count=count)
    for name in ENCODERS:
        for kind in DTYPES:
            one, two = (load_file(folder / str(count) / f"{name}-{kind}.safetensors") for count in (1, 2))
            centered = [file["features"] - file["features"].mean(0) for file in (two, one)]
            losses, features = relative(two["losses"], one["losses"]), relative(two["features"], one["features"])
            print(f"| {name} | {kind} | {losses:.1e} | {features:.1e} | {relative(*centered):.1e} |")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        print_differences(Path(made))

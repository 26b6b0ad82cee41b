"""Trains every method for some steps on this process's shard and saves losses and states; run by test_world_size."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from small_methods import small_settings
from torch import nn

from hf_ssl_or.data.loading import load_images
from hf_ssl_or.methods import available_methods, get_method
from hf_ssl_or.recipe import recipe_from_dict
from hf_ssl_or.run import build_trainer

STEPS = 5
DTYPES = {"float32": torch.float32, "float64": torch.float64}
LEARNING_RATE = {torch.float32: 0.001, torch.float64: 0.02}  # rounding grows with the steps' length
# Also with statistics per view: one method without and one with local views.
CASES = [*((name, "global") for name in available_methods()), ("byol", "per_view"), ("dino", "per_view")]
RESNET = {"name": "resnet18", "stem": "small", "channels": [8, 8, 16, 16], "model_args": {"layers": [1, 1, 1, 1]}}
VIT = {"name": "vit_tiny", "patch_size": 4, "model_args": {"embed_dim": 16, "depth": 2, "num_heads": 2}}


def recipe_of(name: str, accumulation: int, batch_norm: str, learning_rate: float, steps: int = STEPS) -> dict:
    method = get_method(name)
    views = {"count": 3}
    if method.takes_local_views:
        views |= {"local_count": 2, "local_specs": [{"size": 8, "crop_scale": [0.1, 0.4]}]}
    return {
        "data": {"dataset": "shapes", "image_size": 16, "shapes_train": 64, "shapes_test": 0},
        "encoder": VIT if method.needs_patches else RESNET,
        "method": {"name": name, **small_settings(name)},
        "feature_whitening": {"weight": 0.01},
        "views": views,
        "orthogonality": {"penalty": "so", "weight": 1e-3},
        "training": {
            "batch_size": 16,
            "max_steps": steps,
            "forward_chunks": accumulation,
            "batch_norm": batch_norm,
            "max_grad_norm": 5.0,
            "device": "cpu",
            "optimizer": {"name": "sgd", "lr": learning_rate},
        },
    }


def without_kinks(method: nn.Module) -> None:
    """Puts GELU in place of every ReLU, whose gradient jumps where rounding moves an activation of 1e-7 over zero."""
    for module in list(method.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU):
                setattr(module, name, nn.GELU())


def train(name: str, accumulation: int, batch_norm: str, folder: Path, dtype: torch.dtype, steps: int = STEPS):
    recipe = recipe_from_dict(recipe_of(name, accumulation, batch_norm, LEARNING_RATE[dtype], steps))
    images = load_images(recipe.data, "train")
    torch.set_default_dtype(dtype)  # weights of the method are made in it
    try:
        trainer = build_trainer(recipe, folder, images)
    finally:
        torch.set_default_dtype(torch.float32)
    without_kinks(trainer.method)
    losses = []
    for batch in trainer.loader.batches(0, steps):
        batch.views_VBCHW = batch.views_VBCHW.to(dtype)
        if batch.local_views_VBCHW is not None:
            batch.local_views_VBCHW = batch.local_views_VBCHW.to(dtype)
        losses.append(trainer.training_step(batch).loss.detach())
    state = {key: value.contiguous().clone() for key, value in trainer.method.state_dict().items()}
    return {"losses": torch.stack(losses), **state}, trainer.accelerator.is_main_process


def main(folder: Path, accumulation: int, steps: int, runs: dict[str, list[tuple[str, str]]]) -> None:
    """Trains the methods, each with its batch norm, that `runs` names for each type of numbers."""
    torch.set_num_threads(1)
    for dtype, cases in runs.items():
        for name, batch_norm in cases:
            result, is_main = train(name, accumulation, batch_norm, folder / "run", DTYPES[dtype], steps)
            if is_main:
                save_file(result, folder / f"{name}-{batch_norm}-{dtype}.safetensors")

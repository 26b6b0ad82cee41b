"""Trains every method for five steps on this process's shard and saves losses and states; run by test_world_size."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from hf_ssl_or.data.cache import load_images
from hf_ssl_or.methods import available_methods
from hf_ssl_or.recipe import recipe_from_dict
from hf_ssl_or.run import build_trainer

STEPS = 5
DTYPES = {"float32": torch.float32, "float64": torch.float64}
# Large steps in float64 alone: in float32 a ReLU that rounding switches over is a jump, which they blow up.
LEARNING_RATE = {torch.float32: 0.001, torch.float64: 0.02}


def recipe_of(method: str, accumulation: int, batch_norm: str = "global") -> dict:
    return {
        "data": {"dataset": "shapes", "image_size": 32, "shapes_train": 64, "shapes_test": 0},
        "encoder": {"name": "resnet18", "stem": "small", "channels": [8, 8, 16, 16]},
        "method": {"name": method},
        "views": {"count": 3},
        "orthogonality": {"penalty": "so", "weight": 1e-3},
        "training": {
            "batch_size": 16,
            "max_steps": STEPS,
            "gradient_accumulation_steps": accumulation,
            "batch_norm": batch_norm,
            "max_grad_norm": 5.0,
            "device": "cpu",
            "optimizer": {"name": "sgd"},
        },
    }


def train(method: str, accumulation: int, batch_norm: str, folder: Path, dtype: torch.dtype):
    tree = recipe_of(method, accumulation, batch_norm)
    tree["training"]["optimizer"]["lr"] = LEARNING_RATE[dtype]
    recipe = recipe_from_dict(tree)
    images = load_images(recipe.data, "train")
    torch.set_default_dtype(dtype)  # weights of the method are made in it
    try:
        trainer = build_trainer(recipe, folder, images)
    finally:
        torch.set_default_dtype(torch.float32)
    losses = []
    for batch in trainer.loader.batches(0, STEPS):
        batch.views_VBCHW = batch.views_VBCHW.to(dtype)
        losses.append(trainer.training_step(batch).loss.detach())
    state = {name: value.contiguous().clone() for name, value in trainer.method.state_dict().items()}
    return {"losses": torch.stack(losses), **state}, trainer.accelerator.is_main_process


def main(folder: str, accumulation: str) -> None:
    torch.set_num_threads(1)
    for dtype_name, dtype in DTYPES.items():
        for method in available_methods():
            for batch_norm in ("global", "per_view") if method == "byol" else ("global",):
                result, is_main = train(method, int(accumulation), batch_norm, Path(folder) / "run", dtype)
                if is_main:
                    save_file(result, Path(folder) / f"{method}-{batch_norm}-{dtype_name}.safetensors")


if __name__ == "__main__":
    main(*sys.argv[1:])

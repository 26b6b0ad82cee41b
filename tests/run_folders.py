"""Run folders made by hand, as `hf-ssl-or train` leaves them, with everything that a report can draw."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image
from safetensors.numpy import save_file

STAGES = ("layer1", "layer2", "layer3", "layer4")
WEIGHTS = tuple(f"timm_model.{stage}.0.conv2.weight" for stage in STAGES)

EVIL = "</title><script>alert(1)</script>\"'><img src=x onerror=alert(2)>{{7*7}}"


def write_run(
    folder: Path, *, seed: int = 0, decay: float = 1.0, finished: bool = True, dataset: str = "shapes", steps: int = 40
) -> Path:
    """Writes a run whose spectra fall as index^-decay."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    recipe = {
        "data": {"dataset": dataset, "image_size": 32},
        "encoder": {"name": "resnet18", "stem": "small"},
        "method": {"name": "barlow_twins", "projector_dim": 64},
        "views": {"count": 4, "local_count": 0},
        "orthogonality": {"penalty": "so" if seed else "none", "weight": 1e-6},
        "training": {"seed": seed, "epochs": 4, "batch_size": 256, "optimizer": {"name": "adamw", "lr": 6e-3}},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    _write_metrics(folder / "metrics.jsonl", rng, steps)
    for step, slope in ((10, 0.4 * decay), (steps, decay)):
        _write_spectra(folder / "spectra" / f"step-{step}.npz", slope)
    if finished:
        (folder / "results.json").write_text(json.dumps(_results(recipe, dataset, seed)))
        _write_material(folder, rng)
    return folder


def _write_metrics(path: Path, rng: np.random.Generator, steps: int) -> None:
    lines: list[dict[str, Any]] = []
    for step in range(steps):
        loss = 30 * np.exp(-step / 10) + rng.uniform(0, 1)
        rates = {"images_per_second": 1000 + 50 * rng.uniform(), "data_wait_percent": 10 * rng.uniform()}
        terms = {"loss": loss, "invariance": 0.7 * loss, "redundancy": 0.3 * loss, "penalty": 3e-3, "lr": 1e-3}
        lines.append({"kind": "train", "step": step, **terms, **rates, "epoch": step / 10})
        if step % 10 == 9:
            ranks = {"rankme": 20 + step + rng.uniform(), "alpha_req": 2 - step / 60, "feature_std": 1.1}
            others = {"orthogonality_error": 11 - step / 10, "knn": 30.0 + step}
            lines.append({"kind": "monitor", "step": step, **ranks, **others})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def _write_spectra(path: Path, slope: float) -> None:
    path.parent.mkdir(exist_ok=True)
    spectra = {"input": _power(300, 2.0)}
    for i, (stage, weight) in enumerate(zip(STAGES, WEIGHTS, strict=True)):
        spectra[f"hidden/{stage}"] = _power(32 * 2**i, slope + 0.2 * i)
        spectra[f"weight/{weight}"] = _power(32 * 2**i, 0.3 * slope * (i + 1))
    spectra["representation"] = _power(256, slope + 0.8)
    spectra[f"weight/{WEIGHTS[-1]}"][-12:] = 0  # collapsed
    np.savez(path, **spectra)


def _power(n: int, slope: float) -> np.ndarray:
    return np.arange(1, n + 1, dtype=np.float64) ** -slope


def _results(recipe: dict[str, Any], dataset: str, seed: int) -> dict[str, Any]:
    data = {side: {"name": dataset, "fingerprint": "f6be", "size": n} for side, n in (("train", 2000), ("test", 500))}
    linear = {"mean": 71.25 + seed, "std": 0.5, "values": [71.0, 71.25, 71.5]}
    knn = {"mean": 60.0 + seed, "std": None, "values": [60.0 + seed]}
    shared = {"settings": {}, "seeds": []}
    by_knn = {"protocol": "knn", "protocol_hash": "53a583e01993", "headline": "top1_k20", **shared}
    untrained = {**by_knn, "metrics": {"top1_k20": {"mean": 23.0, "std": None, "values": [23.0]}}}
    names = [weight.replace("conv2", conv) for weight in WEIGHTS for conv in ("conv1", "conv2")]
    return {
        "schema_version": 1,
        "recipe": recipe,
        "run": {"steps": 40, "train_seconds_this_session": 3725.0},
        "data": {"name": dataset, "fingerprint": "f6be", "images": 2000},
        "evaluations": [
            {**by_knn, "metrics": {"top1_k20": knn}, "data": data},
            {"protocol": "linear-sgd", "protocol_hash": "e8ba6cb5e662", "headline": "top1", **shared}
            | {"seeds": [0, 1, 2], "metrics": {"top1": linear, "train_top1": linear}, "data": data},
        ],
        "collapse": {"rankme": 25.0, "alpha_req": 1.2, "dimension": 256, "samples": 2000, "notes": []},
        "weights": {name: {"stable_rank": 9.0, "orthogonality_error": 2.0 + i} for i, name in enumerate(names)},
        "weights_before": {name: {"stable_rank": 9.0, "orthogonality_error": 4.0 + i} for i, name in enumerate(names)},
        "baselines": {"untrained": [untrained]},
        "environment": {"python": "3.11.7", "packages": {"torch": "2.15.0"}, "device": "cpu (x86_64)", "processes": 1},
    }


def _write_material(folder: Path, rng: np.random.Generator) -> None:
    labels = rng.integers(0, 5, 300)
    features = rng.standard_normal((300, 32)) + 3 * np.eye(32)[labels]
    names = np.array(["circle", "square", "triangle", "star", "cross"])
    np.savez(folder / "features.npz", features=features.astype(np.float16), labels=labels, class_names=names)
    tiles = rng.integers(0, 256, (3, 5, 3, 16, 16), dtype=np.uint8)
    neighbors = {
        "distances": np.sort(rng.uniform(0, 0.5, (3, 4)).astype(np.float32)),
        "labels": rng.integers(0, 3, (3, 5)),
    }
    np.savez(folder / "neighbors.npz", images=tiles, **neighbors)
    (folder / "figures").mkdir()
    Image.fromarray(rng.integers(0, 256, (200, 500, 3), dtype=np.uint8)).save(folder / "figures" / "views.png")
    (folder / "encoder").mkdir()
    filters = rng.standard_normal((64, 32, 3, 3)).astype(np.float32)
    filters[32:] = filters[:32] + 0.3 * filters[32:]  # each filter twice
    save_file({WEIGHTS[-1]: filters}, folder / "encoder" / "model.safetensors")

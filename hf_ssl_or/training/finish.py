"""What a run leaves beside its training: the encoder's folder, its results, and what a report shows."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from hf_ssl_or.data.image_dataset import ImageSet
from hf_ssl_or.evaluation.collapse import collapse_report, weight_report
from hf_ssl_or.evaluation.evaluator import evaluate_encoder, evaluate_features
from hf_ssl_or.evaluation.features import extract_features, pixel_features
from hf_ssl_or.evaluation.neighbors import write_samples
from hf_ssl_or.evaluation.protocols import get_protocol
from hf_ssl_or.hub.run_folder import SHARD_SIZE
from hf_ssl_or.hub.snippets import describe_encoder
from hf_ssl_or.hub.weight_files import weights_sha256
from hf_ssl_or.models.image_processing_ssl import build_image_processor, stock_processor
from hf_ssl_or.models.modeling_ssl import SSLModel
from hf_ssl_or.report.preview import plot_preview
from hf_ssl_or.runs import layout
from hf_ssl_or.runs.results import Results
from hf_ssl_or.structures import ViewSpec

_ALL, _UNLABELED = 100_000, 4096  # without labels, collapse is measured on all images, or on so many of a large set
PACKAGES = ("hf-ssl-or", "torch", "torchvision", "timm", "transformers", "accelerate", "datasets", "huggingface-hub")

Labeled = tuple[ImageSet, ImageSet] | None


def write_encoder(encoder: Any, folder: Path, *, recipe: dict[str, Any], images: ImageSet, steps: int) -> None:
    """Writes the folder that `from_pretrained` loads: weights, configuration with provenance, image processor."""
    method = dict(recipe["method"])
    encoder.config.pretraining = {
        "method": method.pop("name"),
        "settings": method,
        "views": recipe["views"]["count"],
        "steps": steps,
        "batch_size": recipe["training"]["batch_size"],
        "dataset": images.name,
        "images": len(images),
        "seed": recipe["training"]["seed"],
        "hf_ssl_or": importlib.metadata.version("hf-ssl-or"),
    }
    encoder.config.preprocessing = images.preprocessing.to_dict()
    encoder.save_pretrained(folder, max_shard_size=SHARD_SIZE)
    stock = None if isinstance(encoder, SSLModel) else stock_processor(images.preprocessing)
    if stock is None or encoder.description["library"] == "torch":
        build_image_processor(images.preprocessing).save_pretrained(folder)
        return
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["image_processor_type"] = stock["image_processor_type"]  # which transformers reads here, not there
    config["pretrained_cfg"] = {**config.get("pretrained_cfg", {}), **stock["pretrained_cfg"]}
    for name, content in (("config.json", config), ("preprocessor_config.json", stock)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def evaluate(trainer: Any, labeled: Labeled) -> dict[str, Any]:
    """Returns `evaluations` and `collapse` of the encoder as it is; without labels, no evaluations."""
    encoder, device, settings = trainer.encoder, trainer.device, trainer.evaluation
    if labeled is not None:
        return evaluate_encoder(encoder, *labeled, settings, evaluators=trainer.evaluators, device=device)
    images = trainer.images
    many = trainer.recipe["data"]["streaming"] or len(images) > _ALL
    sample = images.sample(_UNLABELED, "collapse") if many else images
    features = extract_features(encoder, sample, batch_size=settings.batch_size, device=device)
    return {"evaluations": [], "collapse": collapse_report(features)}


def measure_baselines(trainer: Any) -> dict[str, Any]:
    """Evaluates raw pixels and the untrained encoder by the protocols that train nothing: kNN."""
    if trainer.labeled is None:
        return {}
    (bank, test), settings, device = trainer.labeled, trainer.evaluation, trainer.device
    names = [name for name in settings.protocols if not get_protocol(name).seeded]
    arguments = replace(settings, protocols=names)
    untrained = evaluate_encoder(trainer.encoder, bank, test, arguments, device=device)["evaluations"]
    features = pixel_features(bank), pixel_features(test)
    pixels = [
        evaluate_features(get_protocol(name), features[0], bank.labels, features[1], test.labels, device=device)
        for name in names
    ]
    return {"untrained": untrained, "pixels": pixels}


def write_results(trainer: Any, measured: dict[str, Any]) -> Results | None:
    """Writes `results.json` and what a report shows of the encoder; returns None on all processes but the main one."""
    images, run_dir, results = trainer.images, trainer.run_dir, None
    described = describe_encoder(trainer.encoder)
    found = {
        "recipe": trainer.recipe,
        "run": {
            "steps": trainer.state.global_step,
            "train_seconds_this_session": round(trainer.train_seconds, 1),
        },
        "data": {
            "name": images.name,
            "fingerprint": images.fingerprint,
            "images": len(images),
            "preprocessing": images.preprocessing.to_dict(),
        },
        "encoder": None if described is None else described.to_dict(),
        **measured,
        "skipped": trainer.regularizer.skipped(),
        "weights": weight_report(trainer.encoder),
        "weights_before": trainer.weights_before,
        "baselines": trainer.baselines,
        "environment": environment(trainer.device, trainer.accelerator.num_processes),
    }
    if trainer.accelerator.is_main_process:
        results = Results.from_dict(found | {"weights_sha256": weights_sha256(run_dir / layout.ENCODER)})
        results.write(run_dir / layout.RESULTS)
        write_preview(trainer)
    shown = trainer.labeled[1] if trainer.labeled else images
    write_samples(trainer.encoder, shown, run_dir, device=trainer.device)
    return results


def flat_metrics(measured: dict[str, Any]) -> dict[str, float]:
    """Returns an evaluation as one level of names, with transformers' prefix."""
    flat = {
        f"eval_{entry['protocol']}_{name}": value["mean"]
        for entry in measured["evaluations"]
        for name, value in entry["metrics"].items()
    }
    collapse = {f"eval_{key}": value for key, value in measured["collapse"].items() if isinstance(value, int | float)}
    return flat | collapse


def write_preview(trainer: Any) -> None:
    """Draws some images with their views, as the method will see them."""
    if all(isinstance(view, ViewSpec) for view in trainer.views):
        (trainer.run_dir / "figures").mkdir(exist_ok=True)
        path, groups = trainer.run_dir / "figures" / "views.png", (trainer.views, trainer.local_views)
        plot_preview(trainer.images, groups, path, seed=trainer.args.seed)


def environment(device: torch.device, processes: int) -> dict[str, Any]:
    """Names the software and the kind of device that made a result; no host, user or path."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "python": platform.python_version(),
        "packages": {package: importlib.metadata.version(package) for package in PACKAGES},
        "device": f"{device.type} ({name})",
        "processes": processes,
        "threads": torch.get_num_threads(),
    }

"""From a recipe to a run's folder: train, save the encoder, judge it, write the results."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoModel, PreTrainedModel

from hf_ssl_or.data.cache import load_images
from hf_ssl_or.data.images import ImageSet
from hf_ssl_or.data.sources import list_splits
from hf_ssl_or.errors import InputError
from hf_ssl_or.evaluation.collapse import collapse_report, weight_report
from hf_ssl_or.evaluation.features import extract_features, pixel_features
from hf_ssl_or.evaluation.protocols import evaluate_encoder, get_protocol, judge_features
from hf_ssl_or.methods import get_method
from hf_ssl_or.methods.base import SSLMethod
from hf_ssl_or.models.auto import create_encoder
from hf_ssl_or.models.image_processing_ssl import build_image_processor
from hf_ssl_or.randomness import hashed_seed
from hf_ssl_or.recipe import Recipe, load_recipe, recipe_from_dict, write_recipe
from hf_ssl_or.structures import ViewSpec
from hf_ssl_or.training.trainer import Trainer, build_accelerator

PACKAGES = ("hf-ssl-or", "torch", "torchvision", "timm", "transformers", "accelerate", "datasets", "huggingface-hub")


def recipe_and_folder(
    path: str, overrides: Sequence[str], *, output: Path | None, resume: bool
) -> tuple[Recipe, Path]:
    """Finds the recipe and the run's folder: `path` is a recipe or, to resume, the folder of a run."""
    recipe_path = Path(path)
    if recipe_path.is_dir():
        if not resume:
            raise InputError(f"{path}: is a folder; give a recipe, or --resume to continue the run in it")
        output, recipe_path = output or recipe_path, recipe_path / "recipe.yaml"
    return load_recipe(recipe_path, overrides), output or Path("runs") / recipe_path.stem


def pretrain(recipe: Recipe, run_dir: str | Path, *, resume: bool = False) -> dict[str, Any] | None:
    """Runs a recipe from images to results.

    Args:
        recipe: What to run.
        run_dir: Folder of the run; it must be new or empty unless `resume`.
        resume: Continues from the folder's newest checkpoint.

    Returns:
        What `results.json` holds; None on all processes but the main one.

    Raises:
        InputError: Something from outside is wrong; the message names it.
    """
    run_dir = Path(run_dir)
    is_main = os.environ.get("RANK", "0") == "0"
    if is_main:
        _claim(run_dir, resume)
    accelerator = build_accelerator(recipe.training, run_dir)
    with accelerator.local_main_process_first():  # which decodes the images for the others
        images = load_images(recipe.data, recipe.data.train_split)
        labelled = _labelled_images(recipe, images)
    bank, test = labelled or (None, None)
    trainer = build_trainer(recipe, run_dir, images, bank=bank, test=test)
    baselines = _baselines(recipe, trainer, labelled) if labelled and recipe.evaluation.baselines else {}
    if is_main:
        write_recipe(recipe, run_dir / "recipe.yaml")
    started = time.perf_counter()
    trainer.train(resume=resume)
    seconds = time.perf_counter() - started
    if is_main:
        save_encoder(recipe, trainer, images, run_dir / "encoder")
    trainer.accelerator.wait_for_everyone()
    results = {
        "recipe": recipe.to_dict(),
        "run": {"steps": trainer.total_steps, "train_seconds_this_session": round(seconds, 1)},
        "data": {"name": images.name, "fingerprint": images.fingerprint, "images": len(images)},
        **_judge(recipe, trainer, labelled),
        "weights": weight_report(trainer.encoder),
        "baselines": baselines,
        "environment": environment(trainer.device, trainer.accelerator.num_processes),
    }
    if is_main:
        (run_dir / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    trainer.accelerator.end_training()
    return results if is_main else None


def build_trainer(
    recipe: Recipe,
    run_dir: Path,
    images: ImageSet,
    *,
    bank: ImageSet | None = None,
    test: ImageSet | None = None,
) -> Trainer:
    """Builds encoder, method and trainer of a recipe; the initial weights depend on the seed alone."""
    views, local_views = view_specs(recipe)
    return Trainer(
        build_method(recipe),
        recipe.training,
        images,
        run_dir,
        views=views,
        local_views=local_views,
        orthogonality=recipe.orthogonality,
        bank_images=bank,
        test_images=test,
        recipe=recipe.identity(),
    )


def build_method(recipe: Recipe) -> SSLMethod:
    """Builds the recipe's encoder and method."""
    encoder = recipe.encoder
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(hashed_seed(recipe.training.seed, "weights"))
        try:
            model = create_encoder(
                encoder.name,
                stem=encoder.stem,
                image_size=recipe.data.image_size,
                patch_size=encoder.patch_size,
                channels=encoder.channels,
                init_from=encoder.init_from,
                orthogonality=recipe.orthogonality,
                **encoder.model_args,
            )
        except (ValueError, TypeError, OSError) as error:
            raise InputError(f"encoder: {' '.join(str(error).split())}") from error
        return get_method(recipe.method_name)(
            model,
            recipe.method,
            num_views=recipe.views.count,
            batch_size=recipe.training.batch_size,
            num_local_views=recipe.views.local_count,
            whitening=recipe.feature_whitening,
        )


def view_specs(recipe: Recipe) -> tuple[list[ViewSpec], list[ViewSpec]]:
    """Gives one spec per view: the recipe's, or the method's, repeated in turn."""
    specs = recipe.views.specs or list(get_method(recipe.method_name).views)
    local = recipe.views.local_specs or []
    views = [specs[i % len(specs)] for i in range(recipe.views.count)]
    return views, [local[i % len(local)] for i in range(recipe.views.local_count)]


def save_encoder(recipe: Recipe, trainer: Trainer, images: ImageSet, folder: Path) -> None:
    """Writes the folder that `from_pretrained` loads: weights, configuration with provenance, image processor."""
    encoder = cast(PreTrainedModel, trainer.method.encoder)
    encoder.config.pretraining = {
        "method": recipe.method_name,
        "settings": recipe.to_dict()["method"],
        "views": recipe.views.count,
        "steps": trainer.total_steps,
        "batch_size": recipe.training.batch_size,
        "dataset": images.name,
        "images": len(images),
        "seed": recipe.training.seed,
        "hf_ssl_or": importlib.metadata.version("hf-ssl-or"),
    }
    encoder.save_pretrained(folder)
    build_image_processor(recipe.data.image_size, images.mean, images.std).save_pretrained(folder)


def evaluate(
    encoder: str,
    overrides: Sequence[str] = (),
    *,
    dataset: str | None = None,
    protocols: list[str] | None = None,
    output: Path | None = None,
) -> dict[str, Any]:
    """Judges an encoder: a run's folder, an encoder's folder or a Hub id.

    Args:
        encoder: What to judge.
        overrides: `data.*` and `evaluation.*` settings.
        dataset: Images to judge on; None takes those of the run.
        protocols: Names of protocols; None takes those of the run.
        output: Where to write the results.
    """
    folder = Path(encoder)
    run_recipe = folder / "recipe.yaml"
    is_run = run_recipe.exists()
    if not is_run and dataset is None:
        raise InputError(f"{encoder}: is no run's folder, so say which images to judge on with --dataset")
    model, mean, std, size = _load_for_evaluation(folder / "encoder" if is_run else folder, encoder)
    tree: dict[str, Any] = load_recipe(run_recipe).to_dict() if is_run else {"data": {"image_size": size}}
    if dataset is not None:
        tree["data"] = {**tree["data"], "dataset": dataset}
        tree["evaluation_data"] = None
    chosen = [f"evaluation.protocols=[{', '.join(protocols)}]"] if protocols else []
    recipe = recipe_from_dict(tree, encoder).override([*overrides, *chosen])
    labelled = _labelled_images(recipe, None, required=True)
    assert labelled is not None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    judged = evaluate_encoder(model, *labelled, recipe.evaluation, mean=mean, std=std, device=device, image_size=size)
    results = {"encoder": folder.name if folder.exists() else encoder, **judged, "environment": environment(device, 1)}
    if output is not None:
        output.write_text(json.dumps(results, indent=2) + "\n")
    return results


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


def _claim(run_dir: Path, resume: bool) -> None:
    """Refuses a folder that holds something else, before anything is loaded."""
    if run_dir.exists() and not run_dir.is_dir():
        raise InputError(f"{run_dir}: is a file; give another --output")
    if not resume and run_dir.exists() and any(run_dir.iterdir()):
        raise InputError(f"{run_dir}: is not empty; add --resume to continue that run, or give another --output")
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{run_dir}: cannot be made ({error.strerror}); give another --output") from error


def _labelled_images(
    recipe: Recipe, images: ImageSet | None, *, required: bool = False
) -> tuple[ImageSet, ImageSet] | None:
    """Loads the labelled training and test images that judge the encoder, or None where there are none.

    All labelled training images are used, also when pretraining takes a fraction of them.
    """
    data = recipe.evaluation_data or replace(recipe.data, fraction=1.0)
    required = required or recipe.evaluation_data is not None
    if not required and data.test_split not in list_splits(data):
        return None
    statistics = (images.mean, images.std) if images is not None else None
    bank = load_images(data, data.train_split, statistics=statistics)
    if bank.labels is None and not required:
        return None
    test = load_images(data, data.test_split, statistics=statistics)
    if bank.labels is None or test.labels is None:
        raise InputError(
            f"{data.dataset}: has no labels, which kNN and probes need; set data.label_column, or judge on another set"
        )
    return bank, test


def _judge(recipe: Recipe, trainer: Trainer, labelled: tuple[ImageSet, ImageSet] | None) -> dict[str, Any]:
    """Gives `evaluations` and `collapse` of the encoder as it is; without labels, no evaluations."""
    images = trainer.images
    shared: dict[str, Any] = {"mean": images.mean, "std": images.std, "device": trainer.device}
    if labelled is not None:
        return evaluate_encoder(trainer.encoder, *labelled, recipe.evaluation, **shared)
    features = extract_features(trainer.encoder, images, batch_size=recipe.evaluation.batch_size, **shared)
    return {"evaluations": [], "collapse": collapse_report(features)}


def _baselines(recipe: Recipe, trainer: Trainer, labelled: tuple[ImageSet, ImageSet]) -> dict[str, Any]:
    """Judges raw pixels and the untrained encoder by the recipe's protocols that train nothing: kNN."""
    bank, test = labelled
    names = [name for name in recipe.evaluation.protocols if not get_protocol(name).seeded]
    arguments = replace(recipe.evaluation, protocols=names)
    untrained = _judge(replace(recipe, evaluation=arguments), trainer, labelled)
    features = pixel_features(bank), pixel_features(test)
    pixels = [
        judge_features(get_protocol(name), features[0], bank.labels, features[1], test.labels, device=trainer.device)
        for name in names
    ]
    return {"untrained": untrained["evaluations"], "pixels": pixels}


def _load_for_evaluation(folder: Path, name: str) -> tuple[nn.Module, Sequence[float], Sequence[float], int]:
    from transformers import AutoImageProcessor

    source = str(folder) if folder.exists() else name
    try:
        model = AutoModel.from_pretrained(source)
        processor = AutoImageProcessor.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise InputError(f"{name}: cannot be loaded as an encoder: {' '.join(str(error).split())[:300]}") from error
    return model, processor.image_mean, processor.image_std, processor.size["height"]

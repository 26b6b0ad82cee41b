"""From a recipe to a run's folder: train, save the encoder, evaluate it, write the results."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import platform
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_ssl_or.data.augmentation_sampling import check_channels, without_color
from hf_ssl_or.data.image_dataset import ImageSet
from hf_ssl_or.data.loading import load_images
from hf_ssl_or.data.pixel_kind import default_bound
from hf_ssl_or.errors import InputError
from hf_ssl_or.evaluation.collapse import collapse_report, weight_report
from hf_ssl_or.evaluation.encoder_loading import load_encoder
from hf_ssl_or.evaluation.evaluator import evaluate_encoder, evaluate_features
from hf_ssl_or.evaluation.features import extract_features, pixel_features
from hf_ssl_or.evaluation.labeled import find_dataset, load_labeled
from hf_ssl_or.evaluation.neighbors import write_samples
from hf_ssl_or.evaluation.protocols import get_protocol
from hf_ssl_or.evaluation.transfer import evaluate_transfer, markdown_table
from hf_ssl_or.hub.background import push_finished, pushing_checkpoints
from hf_ssl_or.hub.push import check_destination
from hf_ssl_or.hub.run_folder import SHARD_SIZE
from hf_ssl_or.hub.weight_files import weights_sha256
from hf_ssl_or.launcher import cpu_is_forced, refuse_launcher_settings
from hf_ssl_or.methods import get_method
from hf_ssl_or.methods.base import SSLMethod
from hf_ssl_or.models.auto import create_encoder
from hf_ssl_or.models.image_processing_ssl import build_image_processor
from hf_ssl_or.preview import plot_preview
from hf_ssl_or.randomness import hashed_seed
from hf_ssl_or.recipe import Recipe, load_recipe, recipe_from_dict, write_recipe
from hf_ssl_or.show import print_start
from hf_ssl_or.structures import ViewSpec
from hf_ssl_or.training.checkpoint_choice import Choice, Sample, select_checkpoint, write_choice
from hf_ssl_or.training.trainer import SSLTrainer, build_accelerator

_ALL, _UNLABELED = 100_000, 4096  # without labels, collapse is measured on all images, or on so many of a large set
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
    accelerator = build_accelerator(recipe.training, run_dir)
    is_main = accelerator.is_main_process
    if is_main:  # after the processes have met: one that ends before that is waited for
        _claim(run_dir, resume)
        if recipe.training.push_to is not None:
            check_destination(recipe.training.push_to)
    with accelerator.local_main_process_first():  # which decodes the images for the others
        images = load_training_images(recipe)
        labeled = _labeled_images(recipe, images)
    bank, test = labeled or (None, None)
    trainer = build_trainer(recipe, run_dir, images, bank=bank, test=test)
    baselines = _baselines(recipe, trainer, labeled) if labeled and recipe.evaluation.baselines else {}
    weights_before = weight_report(trainer.encoder)

    def begin() -> None:
        write_recipe(recipe, run_dir / "recipe.yaml")
        print_start(images)

    started = time.perf_counter()
    with _pushing(recipe, trainer, images, run_dir) if is_main else nullcontext():
        trainer.train(resume=resume, on_start=begin)
    seconds = time.perf_counter() - started
    if is_main:
        save_encoder(recipe, trainer, images, run_dir / "encoder")
    trainer.accelerator.wait_for_everyone()
    results = {
        "recipe": recipe.to_dict(),
        "run": {"steps": trainer.total_steps, "train_seconds_this_session": round(seconds, 1)},
        "data": {
            "name": images.name,
            "fingerprint": images.fingerprint,
            "images": len(images),
            "preprocessing": images.preprocessing.to_dict(),
        },
        **_evaluate(recipe, trainer, labeled),
        "weights": weight_report(trainer.encoder),
        "weights_before": weights_before,
        "baselines": baselines,
        "environment": environment(trainer.device, trainer.accelerator.num_processes),
    }
    if is_main:
        results["weights_sha256"] = weights_sha256(run_dir / "encoder")
        (run_dir / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    _write_report_material(recipe, trainer, test or images, run_dir)
    trainer.accelerator.end_training()
    if is_main and recipe.training.push_to is not None:
        push_finished(run_dir, recipe.training.push_to)
    return results if is_main else None


def load_training_images(recipe: Recipe) -> ImageSet:
    """Loads the images that a recipe trains on, stored as large as its views need."""
    data = recipe.data
    if data.cache_size is None:
        views, local_views = view_specs(recipe)
        data = replace(data, cache_size=default_bound(data.image_size, [*views, *local_views]))
    return load_images(data, data.train_split, num_channels=recipe.encoder.num_channels)


def build_trainer(
    recipe: Recipe,
    run_dir: Path,
    images: ImageSet,
    *,
    bank: ImageSet | None = None,
    test: ImageSet | None = None,
) -> SSLTrainer:
    """Builds encoder, method and trainer of a recipe; the initial weights depend on the seed alone."""
    views, local_views = view_specs(recipe)
    return SSLTrainer(
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
                num_channels=encoder.num_channels,
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
    """Returns one spec per view: the recipe's, or the method's (without color, where there is none), in turn.

    Raises:
        InputError: A spec of the recipe asks for what the encoder's images do not have.
    """
    channels, own = recipe.encoder.num_channels, list(get_method(recipe.method_name).views)
    specs = recipe.views.specs or (own if channels == 3 else [without_color(spec) for spec in own])
    local = recipe.views.local_specs or []
    if (problem := check_channels([*specs, *local], channels)) is not None:
        raise InputError(f"views.specs: {problem}")
    views = [specs[i % len(specs)] for i in range(recipe.views.count)]
    return views, [local[i % len(local)] for i in range(recipe.views.local_count)]


def save_encoder(recipe: Recipe, trainer: SSLTrainer, images: ImageSet, folder: Path) -> None:
    """Writes the folder that `from_pretrained` loads: weights, configuration with provenance, image processor."""
    _write_encoder(recipe, trainer.method.encoder, images, folder, steps=trainer.total_steps)


def _write_encoder(recipe: Recipe, encoder: nn.Module, images: ImageSet, folder: Path, *, steps: int) -> None:
    model = cast(PreTrainedModel, encoder)
    model.config.pretraining = {
        "method": recipe.method_name,
        "settings": recipe.to_dict()["method"],
        "views": recipe.views.count,
        "steps": steps,
        "batch_size": recipe.training.batch_size,
        "dataset": images.name,
        "images": len(images),
        "seed": recipe.training.seed,
        "hf_ssl_or": importlib.metadata.version("hf-ssl-or"),
    }
    model.config.preprocessing = images.preprocessing.to_dict()
    model.save_pretrained(folder, max_shard_size=SHARD_SIZE)
    build_image_processor(images.preprocessing).save_pretrained(folder)


def evaluate(
    encoder: str,
    overrides: Sequence[str] = (),
    *,
    dataset: str | None = None,
    protocols: list[str] | None = None,
    output: Path | None = None,
) -> dict[str, Any]:
    """Evaluates one encoder.

    Args:
        encoder: A run's folder, or any name that `evaluation.encoders` knows.
        overrides: `data.*` and `evaluation.*` settings.
        dataset: Images to evaluate on; None takes those of the run.
        protocols: Names of protocols; None takes those of the run.
        output: Where to write the results.
    """
    run_recipe = Path(encoder) / "recipe.yaml"
    is_run = run_recipe.exists()
    if not is_run and dataset is None:
        raise InputError(f"{encoder}: is no run's folder, so say which images to evaluate on with --dataset")
    frozen = load_encoder(encoder)
    tree: dict[str, Any] = load_recipe(run_recipe).to_dict() if is_run else {"data": {"image_size": frozen.image_size}}
    if dataset is not None:
        tree["data"] = {**tree["data"], "dataset": find_dataset(dataset)}
        tree["evaluation_data"] = None
    recipe = recipe_from_dict(tree, encoder).override([*overrides, *_chosen(protocols)])
    data, like = frozen.prepare(recipe.evaluation_data or recipe.data)
    labeled = load_labeled(data, num_channels=frozen.processing.num_channels, like=like)
    assert labeled is not None
    device = _device()
    evaluated = evaluate_encoder(frozen.model.to(device), *labeled, recipe.evaluation, device=device)
    name = Path(encoder).name if Path(encoder).exists() else encoder
    results = {"encoder": name, **evaluated, "environment": environment(device, 1)}
    if output is not None:
        output.write_text(json.dumps(results, indent=2) + "\n")
    return results


def transfer(
    encoders: Sequence[str],
    datasets: Sequence[str],
    overrides: Sequence[str] = (),
    *,
    protocols: list[str] | None = None,
    output: Path | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Evaluates encoders on data sets, see `evaluation.transfer`; the same call continues where a killed one was.

    Args:
        encoders: Names as for `evaluate`.
        datasets: Names of data sets.
        overrides: `data.*` and `evaluation.*` settings.
        protocols: Names of protocols; None takes the default ones.
        output: A `.json` file, or a folder for `results.json` and `table.md`.
        report: Is told a line about each cell.
    """
    recipe = recipe_from_dict({"data": {"dataset": datasets[0], "image_size": 224}}, "evaluate")
    recipe = recipe.override([*overrides, *_chosen(protocols)])
    device = _device()
    results = evaluate_transfer(
        encoders, datasets, recipe.evaluation, data=recipe.data, device=device, report=report
    ) | {"environment": environment(device, 1)}
    if output is not None and output.suffix == ".json":
        output.write_text(json.dumps(results, indent=2) + "\n")
    elif output is not None:
        output.mkdir(parents=True, exist_ok=True)
        (output / "results.json").write_text(json.dumps(results, indent=2) + "\n")
        (output / "table.md").write_text(markdown_table(results))
    return results


def select(run_dir: Path, measure: str, *, output: Path | None = None) -> Choice:
    """Chooses a checkpoint of a run by a measure, see `training.selection`.

    Args:
        run_dir: Folder of the run, finished or not.
        measure: Name of the measure.
        output: New or empty folder for the chosen encoder, which `from_pretrained` loads, and `selection.json`.
    """
    if not (run_dir / "recipe.yaml").exists():
        raise InputError(f"{run_dir}: is no run's folder (it has no recipe.yaml); --select chooses among checkpoints")
    if output is not None:
        _claim(output, resume=False)
    recipe, device = load_recipe(run_dir / "recipe.yaml"), _device()
    encoder = build_method(recipe).encoder.to(device)
    images = functools.cache(lambda: load_training_images(recipe))

    def sample() -> Sample:
        bank, test = (measure == "knn" and _labeled_images(recipe, images())) or (None, None)
        return Sample(
            images=images(),
            bank=bank,
            test=test,
            views=view_specs(recipe)[0],
            seed=recipe.training.seed,
            count=recipe.training.monitor_images,
            batch_size=recipe.evaluation.batch_size,
            device=device,
        )

    choice = select_checkpoint(run_dir, measure, encoder, sample)
    if output is not None:
        _write_encoder(recipe, encoder, images(), output, steps=choice.step)
        write_choice(choice, output / "selection.json")
    return choice


def _chosen(protocols: list[str] | None) -> list[str]:
    return [f"evaluation.protocols=[{', '.join(protocols)}]"] if protocols else []


def _device() -> torch.device:
    device = torch.device("cuda" if torch.cuda.is_available() and not cpu_is_forced() else "cpu")
    refuse_launcher_settings(device=device.type)
    return device


def _pushing(recipe: Recipe, trainer: SSLTrainer, images: ImageSet, run_dir: Path) -> AbstractContextManager[None]:
    """Pushes checkpoints while it is entered, where the recipe asks for that."""
    if recipe.training.push != "every":
        return nullcontext()
    repo_id = cast(str, recipe.training.push_to)
    return pushing_checkpoints(run_dir, repo_id, functools.partial(save_encoder, recipe, trainer, images))


def _write_report_material(recipe: Recipe, trainer: SSLTrainer, evaluated: ImageSet, run_dir: Path) -> None:
    """Writes what `hf-ssl-or report` draws and numbers do not hold: views, features and nearest neighbors."""
    write_samples(trainer.encoder, evaluated, run_dir, device=trainer.device)
    if trainer.accelerator.is_main_process:
        (run_dir / "figures").mkdir(exist_ok=True)
        plot_preview(trainer.images, view_specs(recipe), run_dir / "figures" / "views.png", seed=recipe.training.seed)


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


def _labeled_images(recipe: Recipe, images: ImageSet) -> tuple[ImageSet, ImageSet] | None:
    """Loads the labeled training and test images that evaluate the encoder, or None where there are none."""
    data = recipe.evaluation_data or recipe.data
    own = recipe.evaluation_data is None and recipe.data.fraction == 1 and not recipe.data.streaming
    return load_labeled(
        data, like=images.preprocessing, train=images if own else None, required=recipe.evaluation_data is not None
    )


def _evaluate(recipe: Recipe, trainer: SSLTrainer, labeled: tuple[ImageSet, ImageSet] | None) -> dict[str, Any]:
    """Returns `evaluations` and `collapse` of the encoder as it is; without labels, no evaluations."""
    if labeled is not None:
        return evaluate_encoder(trainer.encoder, *labeled, recipe.evaluation, device=trainer.device)
    images = trainer.images
    many = recipe.data.streaming or len(images) > _ALL
    evaluated = images.sample(_UNLABELED, "collapse") if many else images
    batch = recipe.evaluation.batch_size
    features = extract_features(trainer.encoder, evaluated, batch_size=batch, device=trainer.device)
    return {"evaluations": [], "collapse": collapse_report(features)}


def _baselines(recipe: Recipe, trainer: SSLTrainer, labeled: tuple[ImageSet, ImageSet]) -> dict[str, Any]:
    """Evaluates raw pixels and the untrained encoder by the recipe's protocols that train nothing: kNN."""
    bank, test = labeled
    names = [name for name in recipe.evaluation.protocols if not get_protocol(name).seeded]
    arguments = replace(recipe.evaluation, protocols=names)
    untrained = _evaluate(replace(recipe, evaluation=arguments), trainer, labeled)
    features = pixel_features(bank), pixel_features(test)
    pixels = [
        evaluate_features(
            get_protocol(name), features[0], bank.labels, features[1], test.labels, device=trainer.device
        )
        for name in names
    ]
    return {"untrained": untrained["evaluations"], "pixels": pixels}

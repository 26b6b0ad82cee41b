"""From a recipe to a run's folder: the recipe becomes an `SSLTrainer`, which trains, evaluates and saves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import TrainerCallback, TrainerControl, TrainerState

from hf_ssl_or.data.image_dataset import ImageSet
from hf_ssl_or.data.loading import load_images
from hf_ssl_or.errors import InputError
from hf_ssl_or.evaluation.labeled import load_labeled
from hf_ssl_or.hub.background import push_finished
from hf_ssl_or.hub.push import check_destination
from hf_ssl_or.methods import get_method
from hf_ssl_or.methods.base import SSLMethod
from hf_ssl_or.models.auto import create_encoder
from hf_ssl_or.randomness import hashed_seed
from hf_ssl_or.recipe import Recipe, load_recipe, recipe_from_dict
from hf_ssl_or.runs.results import Results
from hf_ssl_or.show import print_start
from hf_ssl_or.structures import ViewSpec
from hf_ssl_or.training.accelerator import build_accelerator
from hf_ssl_or.training.setup import resolve_views, stored_size
from hf_ssl_or.training.trainer import SSLTrainer


def recipe_and_folder(
    path: str, overrides: Sequence[str], *, output: Path | None, resume: bool
) -> tuple[Recipe, Path]:
    """Finds the recipe and the run's folder: `path` is a recipe or, to resume, the folder of a run."""
    recipe_path = Path(path)
    if recipe_path.is_dir():
        if not resume:
            raise InputError(f"{path}: is a folder; give a recipe, or --resume to continue the run in it")
        output, recipe_path = output or recipe_path, recipe_path / "recipe.yaml"
    recipe = load_recipe(recipe_path, overrides)
    return recipe, output or Path(recipe.training.output_dir or Path("runs") / recipe_path.stem)


def pretrain(
    recipe: Recipe | Mapping[str, Any] | str | Path,
    output_dir: str | Path | None = None,
    *,
    overrides: Sequence[str] = (),
    resume: bool = False,
) -> Results | None:
    """Runs a recipe from images to results: trains, saves the encoder, evaluates it.

    Args:
        recipe: What to run: the path of a recipe, its content as a mapping, or a `Recipe`.
        output_dir: Folder of the run, new or empty unless `resume`; None takes `training.output_dir`, else
            "runs/<name of the recipe>".
        overrides: Settings that win over the recipe, such as "training.epochs=5".
        resume: Continues from the folder's newest checkpoint.

    Returns:
        What `results.json` holds; None on all processes but the main one.

    Raises:
        InputError: Something from outside is wrong; the message names it.
    """
    name = Path(recipe).stem if isinstance(recipe, str | Path) else "recipe"
    if isinstance(recipe, str | Path):
        recipe = load_recipe(recipe, overrides)
    elif isinstance(recipe, Mapping):
        recipe = recipe_from_dict(recipe).override(overrides)
    elif overrides:
        recipe = recipe.override(overrides)
    run_dir = Path(output_dir or recipe.training.output_dir or Path("runs") / name)
    accelerator = build_accelerator(recipe.training, run_dir)
    if accelerator.is_main_process:  # after the processes have met: one that ends before that is waited for
        claim(run_dir, resume)
        if recipe.training.push_to is not None:
            check_destination(recipe.training.push_to)
    with accelerator.local_main_process_first():  # which decodes the images for the others
        images = load_training_images(recipe)
        labeled = labeled_images(recipe, images)
    trainer = build_trainer(recipe, run_dir, images, labeled=labeled, accelerator=accelerator)
    trainer.add_callback(_Announcement)
    trainer.train(resume_from_checkpoint=resume)
    trainer.evaluate()
    accelerator.end_training()
    if accelerator.is_main_process and recipe.training.push_to is not None:
        push_finished(run_dir, recipe.training.push_to)
    return trainer.results


class _Announcement(TrainerCallback):
    """Says what a run trains on, once it begins."""

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            trainer = kwargs["trainer"]
            sizes, per_epoch = trainer.size_schedule, trainer.loader.steps_per_epoch
            print_start(trainer.images, *([sizes.describe(per_epoch, trainer.total_steps)] if sizes else []))


def load_training_images(recipe: Recipe) -> ImageSet:
    """Loads the images that a recipe trains on, stored as large as its views need."""
    views, local_views = view_specs(recipe)
    data = stored_size(recipe.data, views, local_views, recipe.views.size_schedule)
    return load_images(data, data.train_split, num_channels=recipe.encoder.num_channels)


def build_trainer(
    recipe: Recipe,
    run_dir: Path,
    images: ImageSet,
    *,
    labeled: tuple[ImageSet, ImageSet] | None = None,
    accelerator: Accelerator | None = None,
) -> SSLTrainer:
    """Builds the trainer of a recipe; the initial weights depend on the seed alone."""
    views, local_views = view_specs(recipe)
    return SSLTrainer(
        model=build_method(recipe),
        args=replace(recipe.training, output_dir=str(run_dir)),
        train_dataset=images,
        eval_dataset=labeled,
        views=views,
        local_views=local_views,
        size_schedule=recipe.views.size_schedule,
        orthogonality=recipe.orthogonality,
        evaluation=recipe.evaluation,
        recipe=recipe.to_dict(),
        accelerator=accelerator,
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
        method = get_method(recipe.method_name)(model, recipe.method, whitening=recipe.feature_whitening)
        method.prepare(
            num_views=recipe.views.count,
            batch_size=recipe.training.batch_size,
            num_local_views=recipe.views.local_count,
        )
        return method


def view_specs(recipe: Recipe) -> tuple[list[ViewSpec], list[ViewSpec]]:
    """Returns one spec per view: the recipe's, or the method's (without color, where there is none), in turn.

    Raises:
        InputError: A spec of the recipe asks for what the encoder's images do not have.
    """
    channels, specs = recipe.encoder.num_channels, recipe.views.specs
    local = recipe.views.local_specs or []
    in_turn = [specs[i % len(specs)] for i in range(recipe.views.count)] if specs else recipe.views.count
    views: Any = resolve_views(in_turn, get_method(recipe.method_name), channels)
    resolve_views([*views, *local], get_method(recipe.method_name), channels)  # the smaller ones alike
    return views, [local[i % len(local)] for i in range(recipe.views.local_count)]


def claim(run_dir: Path, resume: bool) -> None:
    """Refuses a folder that holds something else, before anything is loaded."""
    if run_dir.exists() and not run_dir.is_dir():
        raise InputError(f"{run_dir}: is a file; give another --output")
    if not resume and run_dir.exists() and any(run_dir.iterdir()):
        raise InputError(f"{run_dir}: is not empty; add --resume to continue that run, or give another --output")
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{run_dir}: cannot be made ({error.strerror}); give another --output") from error


def labeled_images(recipe: Recipe, images: ImageSet) -> tuple[ImageSet, ImageSet] | None:
    """Loads the labeled training and test images that evaluate the encoder, or None where there are none."""
    data = recipe.evaluation_data or recipe.data
    own = recipe.evaluation_data is None and recipe.data.fraction == 1 and not recipe.data.streaming
    return load_labeled(
        data, like=images.preprocessing, train=images if own else None, required=recipe.evaluation_data is not None
    )

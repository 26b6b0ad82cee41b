"""Evaluates encoders by their names: one on a data set, several on several, or the checkpoints of a run."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from hf_ssl_or.errors import InputError
from hf_ssl_or.evaluation.encoder_loading import load_encoder
from hf_ssl_or.evaluation.evaluator import evaluate_encoder
from hf_ssl_or.evaluation.labeled import load_labeled
from hf_ssl_or.evaluation.transfer import evaluate_transfer, markdown_table
from hf_ssl_or.launcher import cpu_is_forced, refuse_launcher_settings
from hf_ssl_or.recipe import Recipe, load_recipe, recipe_from_dict
from hf_ssl_or.run import build_method, claim, labeled_images, load_training_images, view_specs
from hf_ssl_or.runs.results import EncoderResults
from hf_ssl_or.training import finish
from hf_ssl_or.training.checkpoint_choice import Choice, Sample, select_checkpoint, write_choice


def evaluate(
    encoder: str,
    overrides: Sequence[str] = (),
    *,
    dataset: str | None = None,
    protocols: list[str] | None = None,
    output: Path | None = None,
) -> EncoderResults:
    """Evaluates one encoder.

    Args:
        encoder: A run's folder, or any name that `evaluation.encoder_loading` knows.
        overrides: `data.*` and `evaluation.*` settings.
        dataset: Images to evaluate on; None takes those of the run.
        protocols: Names of protocols; None takes those of the run.
        output: Where to write the results.
    """
    own = _recipe_of(Path(encoder))
    if own is None and dataset is None:
        raise InputError(f"{encoder}: names no images of its own, so say which to evaluate on with --dataset")
    frozen = load_encoder(encoder)
    tree: dict[str, Any] = {"data": {"image_size": frozen.image_size}} if own is None else own.to_dict()
    if dataset is not None:
        tree["data"] = {**tree["data"], "dataset": dataset, "classes": None}
        tree["evaluation_data"] = None
    recipe = recipe_from_dict(tree, encoder).override([*overrides, *_chosen(protocols)])
    data, like = frozen.prepare(recipe.evaluation_data or recipe.data)
    labeled = load_labeled(data, num_channels=frozen.processing.num_channels, like=like)
    assert labeled is not None
    device = _device()
    measured = evaluate_encoder(frozen.model.to(device), *labeled, recipe.evaluation, device=device)
    name = Path(encoder).name if Path(encoder).exists() else encoder
    results = EncoderResults.from_dict({"encoder": name, **measured, "environment": finish.environment(device, 1)})
    if output is not None:
        results.write(output)
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
    ) | {"environment": finish.environment(device, 1)}
    if output is not None and output.suffix == ".json":
        output.write_text(json.dumps(results, indent=2) + "\n")
    elif output is not None:
        output.mkdir(parents=True, exist_ok=True)
        (output / "results.json").write_text(json.dumps(results, indent=2) + "\n")
        (output / "table.md").write_text(markdown_table(results))
    return results


def select(run_dir: Path, measure: str, *, output: Path | None = None) -> Choice:
    """Chooses a checkpoint of a run by a measure, see `training.checkpoint_choice`.

    Args:
        run_dir: Folder of the run, finished or not.
        measure: Name of the measure.
        output: New or empty folder for the chosen encoder, which `from_pretrained` loads, and `selection.json`.
    """
    if not (run_dir / "recipe.yaml").exists():
        raise InputError(f"{run_dir}: is no run's folder (it has no recipe.yaml); --select chooses among checkpoints")
    if output is not None:
        claim(output, resume=False)
    recipe, device = load_recipe(run_dir / "recipe.yaml"), _device()
    encoder = build_method(recipe).encoder.to(device)
    images = functools.cache(lambda: load_training_images(recipe))

    def sample() -> Sample:
        labeled = labeled_images(recipe, images()) if measure == "knn" else None
        return Sample(
            images=images(),
            labeled=labeled[0] if labeled else None,
            views=view_specs(recipe)[0],
            seed=recipe.training.seed,
            count=recipe.training.monitor_images,
            batch_size=recipe.evaluation.batch_size,
            device=device,
        )

    choice = select_checkpoint(run_dir, measure, encoder, sample)
    if output is not None:
        finish.write_encoder(encoder, output, recipe=recipe.to_dict(), images=images(), steps=choice.step)
        write_choice(choice, output / "selection.json")
    return choice


def _chosen(protocols: list[str] | None) -> list[str]:
    return [f"evaluation.protocols=[{', '.join(protocols)}]"] if protocols else []


def _device() -> torch.device:
    device = torch.device("cuda" if torch.cuda.is_available() and not cpu_is_forced() else "cpu")
    refuse_launcher_settings(device=device.type)
    return device


def _recipe_of(run_dir: Path) -> Recipe | None:
    """Reads a run's recipe; None where there is none, or where the run was made from Python objects."""
    path = run_dir / "recipe.yaml"
    if not path.is_file() or (yaml.safe_load(path.read_text(encoding="utf-8")) or {}).get("objects"):
        return None
    return load_recipe(path)

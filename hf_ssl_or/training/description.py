"""A run in plain data: what `recipe.yaml` holds, for runs from a recipe and for runs from Python objects."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from hf_ssl_or.data.arguments import DataArguments
from hf_ssl_or.errors import InputError
from hf_ssl_or.methods.base import SSLMethod
from hf_ssl_or.methods.whitening import WhiteningConfig
from hf_ssl_or.models.modeling_ssl import SSLModel
from hf_ssl_or.structures import ViewSpec

_IDENTITY = ("data", "encoder", "method", "feature_whitening", "views", "orthogonality", "training")
_NO_INFLUENCE = {
    "data": ("cache", "cache_dir", "num_workers"),
    "training": (
        *("log_every", "monitor_every", "monitor_images", "save_every", "save_steps", "keep_last", "keep_best"),
        *("trackers", "forward_chunks", "gradient_checkpointing", "fsdp", "push", "push_to"),
    ),
}


def plain(value: Any) -> Any:
    """Returns settings as plain data that YAML and JSON hold."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        own = getattr(value, "to_dict", None)
        return plain(own() if own else {f.name: getattr(value, f.name) for f in dataclasses.fields(value)})
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return {key: plain(item) for key, item in value.items()} if isinstance(value, Mapping) else value


def identity(recipe: dict[str, Any]) -> dict[str, Any]:
    """Returns the part of a run that decides its weights: what only logs, saves, stores or evaluates is left out."""
    kept = {section: dict(recipe[section]) for section in _IDENTITY}
    kept["data"]["original_resolution"] = recipe["data"]["cache"] == "none"  # views are cut from larger images then
    if kept["orthogonality"].get("target") == "identity":  # the only one of version 0.1, whose runs do not name it
        kept["orthogonality"].pop("target")
    for section, keys in _NO_INFLUENCE.items():
        for key in keys:
            kept[section].pop(key)
    return kept


def first_difference(old: Any, new: Any, path: str = "") -> str | None:
    """Names the first key where two recipes differ, with both values; None when they agree."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            found = first_difference(old.get(key), new.get(key), f"{path}.{key}" if path else key)
            if found:
                return found
        return None
    return None if old == new else f"{path} was {old!r}, is {new!r}"


def describe(
    method: SSLMethod,
    *,
    data: DataArguments,
    views: Sequence[Any],
    local_views: Sequence[ViewSpec],
    size_schedule: Any,
    orthogonality: Any,
    training: Any,
    evaluation: Any,
    objects: list[str],
) -> dict[str, Any]:
    """Describes a run that was put together in Python as a recipe does.

    Args:
        method: The method, prepared.
        data: Settings of the images; `dataset` is the name of an object where it is one.
        views: Specs and callables.
        local_views: Specs of the smaller views.
        size_schedule: Sizes of the views over the run; None for one size.
        orthogonality: Settings of the penalty.
        training: Settings of the loop.
        evaluation: Settings of the evaluation.
        objects: What was handed over as an object, so that this recipe alone does not make the run again.
    """
    specs = [plain(view) if isinstance(view, ViewSpec) else {"callable": name_of(view)} for view in views]
    return {
        "data": plain(data),
        "evaluation_data": None,
        "encoder": describe_encoder(method.encoder),
        "method": {"name": method.name, **method.settings()},
        "feature_whitening": plain(method.whitening or WhiteningConfig()),
        "views": {
            "count": len(views),
            "specs": specs,
            "local_count": len(local_views),
            "local_specs": plain(list(local_views)) or None,
            "size_schedule": size_schedule,
        },
        "orthogonality": plain(orthogonality),
        "training": plain(training),
        "evaluation": plain(evaluation),
        "objects": objects,
    }


def describe_encoder(encoder: nn.Module) -> dict[str, Any]:
    """Returns an encoder's part of a recipe; of a foreign one its library and name."""
    config: Any = encoder.config
    named: dict[str, Any] = {
        "name": None,
        "stem": None,
        "patch_size": None,
        "num_channels": config.num_channels,
        "channels": None,
        "init_from": None,
        "model_args": {},
    }
    if isinstance(encoder, SSLModel):
        known = {key: getattr(config, key) for key in named if hasattr(config, key)}
        return named | known | {"name": config.architecture}
    description: Any = encoder.description
    return named | {"name": description["name"], "library": description["library"]}


def name_of(value: Any) -> str:
    """Names an object by its class, or a function by its own name."""
    return getattr(value, "__name__", None) or type(value).__name__


def write_recipe(recipe: dict[str, Any], path: Path) -> None:
    """Writes a recipe as YAML; a kill leaves the old file or the new one.

    Raises:
        InputError: The file cannot be written.
    """
    temporary = path.with_suffix(".tmp")
    try:
        temporary.write_text(yaml.safe_dump(recipe, sort_keys=False, width=119))
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from error

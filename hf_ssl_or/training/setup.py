"""From what people hand to `SSLTrainer` to what the loop needs: method, settings of the images, views, optimizer."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_ssl_or.data.arguments import DataArguments
from hf_ssl_or.data.augmentation_sampling import check_channels, without_color
from hf_ssl_or.data.image_dataset import ImageSet
from hf_ssl_or.data.objects import load_dataset_object, load_eval_object
from hf_ssl_or.data.pixel_kind import default_bound
from hf_ssl_or.data.size_schedule import SizeSchedule, check_size_schedule, full_size
from hf_ssl_or.errors import InputError
from hf_ssl_or.evaluation.labeled import load_labeled
from hf_ssl_or.methods import get_method
from hf_ssl_or.methods.base import SSLMethod
from hf_ssl_or.models.adapters import patch_side, refused_size
from hf_ssl_or.models.auto import create_encoder
from hf_ssl_or.models.configuration_ssl import OrthogonalityConfig
from hf_ssl_or.randomness import hashed_seed
from hf_ssl_or.settings import unknown_setting
from hf_ssl_or.structures import ViewSpec
from hf_ssl_or.training.description import name_of

View = ViewSpec | Callable[[torch.Tensor], torch.Tensor]
Views = int | View | Sequence[View] | None
_SCHEDULED = ("lr", "momentum", "betas", "weight_decay")  # what torch's schedulers change in a group of an optimizer
_DEFAULT_SIZE = 224  # pixels, where neither the data nor the encoder says one


def resolve_method(
    model: Any, method: Any, encoder: Any, *, seed: int, image_size: int | None = None
) -> tuple[SSLMethod, list[str]]:
    """Returns the method that is trained, and which parts of it were handed over as objects.

    Args:
        model: A method with its encoder; or None, then:
        method: Name of a method, or its class.
        encoder: A name, a Hub id, or a module.
        seed: Key of new weights.
        image_size: Side of the images, for an encoder that is made by its name.

    Raises:
        InputError: Both or neither were given, or one is of another kind.
    """
    if (model is None) == (method is None):
        given = "both" if model is not None else "neither"
        raise InputError(
            f"SSLTrainer: {given} of model and method given; give model=BYOL(encoder), or method='byol' and encoder="
        )
    if model is not None:
        if encoder is not None:
            raise InputError("SSLTrainer: encoder goes with method=; the model has an encoder already")
        if not isinstance(model, SSLMethod):
            raise InputError(
                f"SSLTrainer: model is a {name_of(model)}, no method; give model=BYOL(encoder), or method='byol' and "
                "encoder=encoder"
            )
        return model, ["model"]
    if encoder is None:
        raise InputError("SSLTrainer: method= needs encoder=, a name ('resnet18'), a Hub id or a module")
    method_class = get_method(method) if isinstance(method, str) else method
    if not (isinstance(method_class, type) and issubclass(method_class, SSLMethod)):
        raise InputError(f"SSLTrainer: method is {method!r:.60}; give a name ('byol') or a class of hf_ssl_or.methods")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(hashed_seed(seed, "weights"))
        if isinstance(encoder, nn.Module):
            return method_class(encoder), ["encoder"]
        try:
            made = create_encoder(os.fspath(encoder), image_size=image_size)
        except (ValueError, TypeError, OSError) as error:
            raise InputError(f"encoder: {' '.join(str(error).split())}") from error
        return method_class(made), []


def resolve_data(dataset: Any, data: Any, encoder: Any) -> DataArguments:
    """Returns the settings of the images: those given, and for the rest what the encoder was made for.

    Args:
        dataset: What was given as `train_dataset`.
        data: Settings of `DataArguments` in a mapping, or such an object; None for none.
        encoder: The encoder, adapted.

    Raises:
        InputError: There are no images, or a setting is unknown.
    """
    if dataset is None:
        raise InputError("SSLTrainer: train_dataset is missing; give a Hub id, a folder, a list or a data set")
    name = os.fspath(dataset) if isinstance(dataset, str | os.PathLike) else None
    if isinstance(data, DataArguments):
        return data if name is None else replace(data, dataset=name)
    known = [field.name for field in fields(DataArguments)]
    given = dict(data or {})
    for key in given:
        if key not in known:
            raise unknown_setting("key in data", str(key), known)
    own = dict(getattr(encoder, "preprocessing", None) or {})
    values: dict[str, Any] = {key: own[key] for key in ("crop_pct", "interpolation") if own.get(key) is not None}
    if own.get("mean") is not None and own.get("std") is not None:
        values |= {"mean": list(own["mean"]), "std": list(own["std"])}
    if isinstance(dataset, ImageSet):
        values |= {"image_size": dataset.image_size, "mean": list(dataset.mean), "std": list(dataset.std)}
    else:
        values["image_size"] = encoder.config.image_size or own.get("image_size") or _DEFAULT_SIZE
    described = getattr(dataset, "name", None) or name_of(dataset)
    return DataArguments(**{"dataset": name or str(described), **values, **given})


def stored_size(
    data: DataArguments, views: Sequence[View], local_views: Sequence[ViewSpec] = (), size_schedule: Any = None
) -> DataArguments:
    """Sets how large images are stored, where the settings leave that to the views, when these are largest."""
    if data.cache_size:
        return data
    side = data.image_size
    every: list[Any] = [*views, *local_views]
    if size_schedule is not None:
        schedule = SizeSchedule(steps=check_size_schedule(size_schedule), full_size=full_size(every, side))
        every = list(schedule.resized(every, max(schedule.sizes), side))
    specs = [view for view in every if isinstance(view, ViewSpec)]
    return replace(data, cache_size=default_bound(side, specs or (ViewSpec(),)))


def resolve_size_schedule(
    steps: Any, views: Sequence[View], local_views: Sequence[ViewSpec], *, encoder: Any, image_size: int
) -> SizeSchedule | None:
    """Returns the sizes of the views over the run, after the encoder has taken images of each of them.

    Args:
        steps: Pairs [share of the run, size]; None for one size.
        views: The global views.
        local_views: The smaller ones.
        encoder: The encoder, adapted.
        image_size: Side of views that name no size.

    Raises:
        InputError: The schedule is none, views are made by callables, or the encoder does not take such views.
    """
    if steps is None:
        return None
    every: list[Any] = [*views, *local_views]
    patch = patch_side(encoder)
    schedule = SizeSchedule(steps=check_size_schedule(steps), full_size=full_size(every, image_size), multiple=patch)
    for size in schedule.sizes:
        if size % patch:
            raise InputError(
                f"views.size_schedule: {size} is no multiple of the side of the encoder's patches, {patch}"
            )
    for size in schedule.sizes:
        specs = schedule.resized(every, size, image_size)
        for side in dict.fromkeys(spec.size or image_size for spec in specs):
            if (problem := refused_size(encoder, side)) is not None:
                raise InputError(
                    f"views.size_schedule: the encoder takes no views of {side} x {side} pixels ({problem}); "
                    "give other sizes, or none"
                )
    return schedule


def resolve_views(views: Views, method: type[SSLMethod], num_channels: int) -> list[View]:
    """Returns one spec or callable per view.

    Args:
        views: A number of the method's own views, in turn; a spec or a callable for two alike; or one item per view.
        method: The method.
        num_channels: Channels of an image; without color the method's own views leave out what needs RGB.

    Raises:
        InputError: Something else was given, or a spec asks for what the images do not have.
    """
    if views is None or isinstance(views, int) and not isinstance(views, bool):
        count = 2 if views is None else views
        if count < 1:
            raise InputError(f"views: at least 1 view, not {count}")
        own = list(method.views) if num_channels == 3 else [without_color(spec) for spec in method.views]
        return [own[i % len(own)] for i in range(count)]
    items: list[Any] = list(views) if isinstance(views, Sequence) and not isinstance(views, str) else [views, views]
    for item in items:
        if not isinstance(item, ViewSpec) and not callable(item):
            raise InputError(f"views: a number, ViewSpec objects or callables are wanted, not {item!r:.60}")
    if not items:
        raise InputError("views: the list is empty; give one ViewSpec or callable per view")
    specs = [item for item in items if isinstance(item, ViewSpec)]
    if (problem := check_channels(specs, num_channels)) is not None:
        raise InputError(f"views.specs: {problem}")
    return items


def take_optimizer(
    optimizer: torch.optim.Optimizer, scheduler: Any, module: nn.Module, *, fsdp: bool
) -> torch.optim.Optimizer:
    """Prepares an optimizer that was handed over: names its parameters, and notes each group's peak learning rate.

    Args:
        optimizer: Built from parameters of the method.
        scheduler: A torch scheduler of it, or None for the schedule of the settings.
        module: The method.
        fsdp: Whether the method's weights are spread over processes.

    Raises:
        InputError: It holds other parameters, or its state could not be saved.
    """
    if fsdp:
        raise InputError("optimizers: with training.fsdp weights are split after you made it; set training.optimizer")
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise InputError(f"optimizers: (optimizer, scheduler) is wanted, not a {name_of(optimizer)}")
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    strange = sum(id(parameter) not in names for parameter in held)
    if strange:
        raise InputError(
            f"optimizers: {strange} of the optimizer's {len(held)} parameters are not the model's; build it from "
            "model.parameters() of the method that is trained"
        )
    wanted = {id(parameter) for parameter in module.parameters() if parameter.requires_grad}
    if left := len(wanted - {id(parameter) for parameter in held}):
        warnings.warn(
            f"optimizers: {left} trainable parameters are not in the optimizer and stay as they are", stacklevel=3
        )
    for group in optimizer.param_groups:
        group["param_names"] = [names[id(parameter)] for parameter in group["params"]]
        group.setdefault("base_lr", group["lr"])
    if scheduler is not None:
        try:
            json.dumps(scheduler.state_dict())
        except (TypeError, ValueError, AttributeError) as error:
            raise InputError(f"optimizers: the state of {name_of(scheduler)} is not plain data ({error})") from error
    return optimizer


def scheduler_state(scheduler: Any) -> dict[str, Any]:
    """Returns a scheduler's state, and the values of its optimizer that it changes from step to step."""
    changed = [
        {
            key: value
            for key, value in group.items()
            if isinstance(value, int | float | list | tuple) and key in _SCHEDULED
        }
        for group in scheduler.optimizer.param_groups
    ]
    return {"state": scheduler.state_dict(), "groups": changed}


def load_scheduler(scheduler: Any, state: dict[str, Any]) -> None:
    """Puts back what `scheduler_state` returned."""
    scheduler.load_state_dict(state["state"])
    for group, values in zip(scheduler.optimizer.param_groups, state["groups"], strict=True):
        group.update(values)


def default_folder(method: SSLMethod) -> Path:
    """Returns the folder of a run that names none."""
    return Path("runs") / method.name


def load_sets(
    train_dataset: Any, eval_dataset: Any, data: Any, num_channels: int
) -> tuple[ImageSet, tuple[ImageSet, ImageSet] | None]:
    """Loads the training images, and the labeled ones that the encoder is evaluated on, where there are any."""
    images = load_dataset_object(train_dataset, data, split=data.train_split, num_channels=num_channels)
    like = images.preprocessing
    if eval_dataset is not None:
        return images, load_eval_object(eval_dataset, data, num_channels=num_channels, like=like)
    if isinstance(train_dataset, str | Path):
        own = images if data.fraction == 1 and not data.streaming else None
        return images, load_labeled(data, num_channels=num_channels, like=like, train=own, required=False)
    return images, None


def penalty_settings(given: OrthogonalityConfig | Mapping[str, Any] | None) -> OrthogonalityConfig:
    """Returns the settings of the penalty; None is no penalty."""
    if given is None:
        return OrthogonalityConfig(penalty="none")
    if isinstance(given, OrthogonalityConfig):
        return given
    try:
        return OrthogonalityConfig.from_dict(dict(given))
    except ValueError as error:
        raise InputError(str(error)) from error


def objects_of(
    objects: list[str], train: Any, test: Any, views: Sequence[Any], optimizers: tuple[Any, Any], callbacks: Any
) -> list[str]:
    """Names what of a run was handed over as Python objects."""
    paths = str | Path
    found = {
        "train_dataset": not isinstance(train, paths),
        "eval_dataset": test is not None and not isinstance(test, paths),
        "views": not all(isinstance(view, ViewSpec) for view in views),
        "optimizers": optimizers[0] is not None,
        "callbacks": bool(callbacks),
    }
    return [*objects, *(name for name, is_object in found.items() if is_object)]

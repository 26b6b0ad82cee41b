"""A run as data: YAML with dotted overrides, read into strict typed settings.

A recipe may start from another with `defaults: ../resnet18.yaml` (a path relative to itself); its own keys win, key by
key. Its `variants` are named changes: where `resnet18-srip.yaml` is no file, it is `resnet18.yaml` with the changes
that its variant `srip` lists. An unknown key is an error that names the nearest valid one. What was resolved is
written into the run's folder.
"""

from __future__ import annotations

import copy
import dataclasses
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.dataclasses import type_validator
from huggingface_hub.errors import StrictDataclassError

from hf_ssl_or.data.arguments import DataArguments
from hf_ssl_or.data.size_schedule import check_size_schedule
from hf_ssl_or.errors import InputError, unknown
from hf_ssl_or.evaluation.evaluator import EvaluationArguments
from hf_ssl_or.methods import get_method
from hf_ssl_or.methods.whitening import WhiteningConfig
from hf_ssl_or.models.configuration_ssl import OrthogonalityConfig
from hf_ssl_or.settings import settings, unknown_setting
from hf_ssl_or.structures import ViewSpec
from hf_ssl_or.training.arguments import SSLTrainingArguments
from hf_ssl_or.training.description import plain


@settings
class EncoderArguments:
    """Which encoder is trained, see `hf_ssl_or.create_encoder`.

    Attributes:
        name: Architecture, see `hf-ssl-or list encoders`.
        stem: ResNets: "standard", or "small" (3x3, stride 1, no max-pool) for images of 32-64 pixels.
        patch_size: ViTs: side of a patch in pixels.
        num_channels: Channels of an image: 3 for RGB, 1 for grayscale, up to 32. The weights of `init_from` are summed
            or repeated to them, as timm does.
        channels: ResNets: channels of each stage, for slimmer or wider nets.
        init_from: Starts from these weights: a timm name, a Hub id ("org/name", "org/name@revision") or a folder.
        model_args: Further keyword arguments of the timm model.
    """

    name: str = "resnet18"
    stem: str | None = None
    patch_size: int | None = None
    num_channels: int = 3
    channels: list[int] | None = None
    init_from: str | None = None
    model_args: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True)
class ViewArguments:
    """How many views each image gives, and how they are sampled.

    Attributes:
        count: Number of views.
        specs: Augmentation of the views, repeated in turn when shorter than `count`; None takes the method's.
        local_count: Number of smaller views, for methods with multi-crop.
        local_specs: Augmentation of the smaller views, which must set `size`.
        size_schedule: Side of the views over the run, as pairs [share of the run, pixels]: [[0, 16], [0.5, 24],
            [0.8, 32]]. An epoch has the size of the last pair that begins before the epoch ends. Local views and blur
            scale by the same factor; what a crop shows of its image does not change. None: one size.
    """

    count: int = 2
    specs: list[ViewSpec] | None = None
    local_count: int = 0
    local_specs: list[ViewSpec] | None = None
    size_schedule: list[Any] | None = None

    def __post_init__(self) -> None:
        if self.size_schedule is not None:
            self.size_schedule = check_size_schedule(self.size_schedule)
        if self.count < 1:
            raise InputError(f"views.count: at least 1 view, not {self.count}")
        if self.local_count and not self.local_specs:
            raise InputError("views.local_specs: local_count needs at least one spec that sets size")


@dataclass(kw_only=True)
class Recipe:
    """Everything that a run depends on.

    Attributes:
        data: Images to train on.
        evaluation_data: Labeled images to evaluate the encoder on; None takes the splits of `data`.
        encoder: The encoder.
        method_name: Name of the method.
        method: Settings of the method, of its own strict type.
        feature_whitening: Variance and covariance terms added to the method's loss, the usual remedy for collapse.
        views: The views.
        orthogonality: The penalty on the encoder's weights.
        training: The loop.
        evaluation: The protocols that evaluate the result.
    """

    data: DataArguments
    evaluation_data: DataArguments | None = None
    encoder: EncoderArguments = field(default_factory=EncoderArguments)
    method_name: str = "barlow_twins"
    method: Any = None
    feature_whitening: WhiteningConfig = field(default_factory=WhiteningConfig)
    views: ViewArguments = field(default_factory=ViewArguments)
    orthogonality: OrthogonalityConfig = field(default_factory=OrthogonalityConfig)
    training: SSLTrainingArguments = field(default_factory=SSLTrainingArguments)
    evaluation: EvaluationArguments = field(default_factory=EvaluationArguments)

    def to_dict(self) -> dict[str, Any]:
        """Returns the resolved recipe as plain data, as it would be written in YAML."""
        values = {f.name: plain(getattr(self, f.name)) for f in dataclasses.fields(self)}
        values["method"] = {"name": values.pop("method_name"), **values["method"]}
        return values

    def override(self, overrides: Sequence[str]) -> Recipe:
        """Returns a recipe with dotted settings replaced, say "training.epochs=5"."""
        return recipe_from_dict(self.to_dict(), overrides=overrides)


_MOST_VALUES, _MOST_NESTED = 10_000, 20


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe.

    Args:
        path: A YAML file, or the name of one with variants appended: "resnet18-srip.yaml".
        overrides: Dotted settings that win over the file, say "training.epochs=5"; values are read as YAML.

    Raises:
        InputError: A file, key or value is wrong; the message names it.
    """
    return recipe_from_dict(read_variant(Path(path)), str(path), overrides)


def recipe_from_dict(tree: Mapping[str, Any], source: str = "recipe", overrides: Sequence[str] = ()) -> Recipe:
    """Builds a recipe from plain data, as `Recipe.to_dict` gives it.

    Args:
        tree: The data; it stays as it is.
        source: Its name in errors.
        overrides: Dotted settings that win over it.
    """
    _check_plain(tree, source)
    own: dict[str, Any] = copy.deepcopy(dict(tree))
    for override in overrides:
        _apply(own, override)
    return _from_plain(own, source)


def _from_plain(tree: dict[str, Any], source: str) -> Recipe:
    _check_plain(tree, source)
    if objects := tree.pop("objects", None):
        raise InputError(
            f"{source}: its run was made from Python objects ({', '.join(map(str, objects))}), which no recipe holds; "
            "continue it in Python: train(resume_from_checkpoint=True)"
        )
    if tree.get("data") is None:
        raise InputError(f"{source}: the key data is missing; say which images, for example data: {{dataset: shapes}}")
    hints = typing.get_type_hints(Recipe)
    known = set(hints) - {"method_name"}
    for key in tree:
        if key not in known:
            raise _in(source, unknown_setting("key", str(key), list(known)))
    values: dict[str, Any] = {}
    for key in tree.keys() - {"method"}:
        if tree[key] is not None:
            values[key] = _convert(hints[key], tree[key], key, source)
    method = tree.get("method") or {}
    method = dict(_mapping({"name": method} if isinstance(method, str) else method, "method", source))
    values["method_name"] = method.pop("name", "barlow_twins")
    try:
        config_class = get_method(values["method_name"]).config_class
    except (InputError, TypeError, ValueError) as error:  # the last two: no name of a module at all
        raise _in(source, error) from error
    values["method"] = _build(config_class, method, "method", source)
    return Recipe(**values)


# ---------------------------------------------------------------------------------------------------------------------
# From plain data to typed settings


def _build(cls: type, tree: Any, path: str, source: str) -> Any:
    tree = _mapping(tree, path, source)
    hints = typing.get_type_hints(cls)
    names = {f.name for f in dataclasses.fields(cls)}
    for key in tree:
        if key not in names:
            raise _in(source, unknown_setting(f"key in {path}", str(key), list(names)))
    values = {key: _convert(hints[key], value, f"{path}.{key}", source) for key, value in tree.items()}
    try:
        for key, value in values.items():  # before the class's own checks, which compare numbers
            type_validator(f"{path}.{key}", value, hints[key])
        return cls(**values)
    except (StrictDataclassError, ValueError, TypeError) as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise InputError(f"{source}: {reason if reason.startswith(path) else f'{path}: {reason}'}") from error


def _convert(hint: Any, value: Any, path: str, source: str) -> Any:
    """Turns mappings into the dataclass that `hint` wants, alone, optional or in a list, and lists into tuples."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    for option in options:
        if dataclasses.is_dataclass(option) and value is not None:
            return _build(typing.cast(type, option), value, path, source)
        arguments = typing.get_args(option)
        if typing.get_origin(option) is list and dataclasses.is_dataclass(arguments[0]) and value is not None:
            if not isinstance(value, list):
                raise InputError(f"{source}: {path}: a list is wanted, not {value!r:.80}")
            item_class = typing.cast(type, arguments[0])
            return [_build(item_class, item, f"{path}[{i}]", source) for i, item in enumerate(value)]
        if typing.get_origin(option) is tuple and isinstance(value, list):
            return tuple(value)
    return value


def _mapping(tree: Any, path: str, source: str) -> Mapping[str, Any]:
    if not isinstance(tree, Mapping):
        raise InputError(f"{source}: {path}: key: value pairs are wanted, not {tree!r:.80}")
    return tree


def _in(source: str, error: Exception) -> InputError:
    return InputError(f"{source}: {error}")


def _check_plain(tree: Any, source: str) -> None:
    """Refuses what would not come back from YAML or JSON as it was: a checkpoint keeps the recipe to compare."""
    count = 0

    def check(value: Any, path: str, within: tuple[int, ...]) -> None:
        nonlocal count
        count += 1
        if count > _MOST_VALUES or len(within) > _MOST_NESTED:
            raise InputError(f"{source}: more than {_MOST_VALUES} values, or nested {_MOST_NESTED} deep; write less")
        if id(value) in within:
            raise InputError(f"{source}: {path}: contains itself")
        items: Iterable[tuple[Any, Any]] = ()
        if isinstance(value, Mapping):
            items = value.items()
        elif isinstance(value, list | tuple):
            items = enumerate(value)
        elif not (value is None or isinstance(value, str | int | float)) or value != value:
            raise InputError(f"{source}: {path}: a number, a word, a list or key: value pairs, not {value!r:.60}")
        for key, item in items:
            if isinstance(value, Mapping) and not isinstance(key, str):
                raise InputError(f"{source}: {path or 'the file'}: {key!r:.60} is no word; put quotes around it")
            check(item, f"{path}.{key}" if path else str(key), (*within, id(value)))

    check(tree, "", ())


# ---------------------------------------------------------------------------------------------------------------------
# Reading YAML


class _Loader(yaml.SafeLoader):
    """Safe YAML with two rules of YAML 1.2 that people expect: 1e-6 is a number, and no is a word."""


_Loader.yaml_implicit_resolvers = {
    first: [rule for rule in rules if rule[0] != "tag:yaml.org,2002:bool"]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _pattern, _first in (
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("float", r"^[-+]?\d+(?:\.\d*)?[eE][-+]?\d+$", "-+0123456789"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), list(_first))


def _parse(text: str, source: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader: plain data only
    except RecursionError as error:
        raise InputError(f"{source}: not valid YAML: nested too deep") from error
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, LookupError) as error:  # a date that is none, say
        raise InputError(f"{source}: not valid YAML: {' '.join(str(error).split())}") from error


def read_variant(path: Path) -> dict[str, Any]:
    """Reads a YAML file, with the changes of the variants in its name where only a shorter name is a file.

    Args:
        path: "resnet18-srip.yaml" is resnet18.yaml with what its variant `srip` changes, if it is no file itself.

    Raises:
        InputError: It cannot be read, or has no such variant.
    """
    file, names = path, list[str]()
    while not file.exists() and "-" in file.stem[1:]:
        stem, _, name = file.stem.rpartition("-")
        file, names = file.with_stem(stem), [name, *names]
    tree = read_yaml(file if file.exists() else path)
    variants = _mapping(tree.pop("variants", {}), "variants", str(file))
    for name in names:
        if name not in variants:
            raise _in(str(path), unknown(f"variant of {file.name}", name, variants))
        tree = _merge(tree, _mapping(variants[name], f"variants.{name}", str(file)))
    return tree


def recipe_variants(path: Path) -> list[str]:
    """Names the variants of a recipe file."""
    return list(_mapping(read_yaml(path).get("variants", {}), "variants", str(path)))


def read_yaml(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Reads a YAML file of key: value pairs, which may start from another with `defaults`.

    Args:
        path: The file.
        above: Files whose `defaults` led to it.

    Raises:
        InputError: It cannot be read, or is no such file.
    """
    if path.resolve() in above:
        raise InputError(f"{path}: defaults leads back to itself")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        near = ", ".join(sorted(str(p) for p in path.parent.glob("*.yaml"))[:5])
        raise InputError(f"{path}: cannot be read ({error}){f'; beside it: {near}' if near else ''}") from error
    tree = _mapping(_parse(text, str(path)) or {}, "the file", str(path))
    return with_defaults(tree, path.parent, (*above, path.resolve()))


def with_defaults(tree: Mapping[str, Any], folder: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Returns a recipe's keys over those of the file that its `defaults` names, if it has any.

    Args:
        tree: The keys.
        folder: Where `defaults` starts from.
        above: Files whose `defaults` led here.
    """
    own = dict(tree)
    base = own.pop("defaults", None)
    return own if base is None else _merge(read_yaml(folder / str(base), above), own)


def _merge(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in top.items():
        if key == "method" and isinstance(value, Mapping) and isinstance(merged.get(key), str):  # method: byol
            merged[key] = {"name": merged[key]}
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _apply(tree: dict[str, Any], override: str) -> None:
    name, separator, text = override.partition("=")
    if not separator or not name:
        raise InputError(f"{override!r}: an override looks like training.epochs=5")
    *sections, key = name.split(".")
    for section in sections:
        if not isinstance(tree.get(section), dict):
            tree[section] = {"name": tree[section]} if isinstance(tree.get(section), str) else {}
        tree = tree[section]
    tree[key] = _parse(text, override)

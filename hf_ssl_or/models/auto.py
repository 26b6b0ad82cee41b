"""Encoders by name, `create_encoder("resnet18", stem="small", image_size=32)`, and where their weights start from.

resnet18, vit_small, convnext_atto          an architecture, untrained, or with weights by `init_from`
facebook/dinov2-small, path/to/encoder      a repository of the Hub, also at a revision ("org/name@v2"), or a folder
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import re
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    StrictDataclassError,
)
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.layers import PatchEmbed
from timm.models import adapt_input_conv
from timm.models.resnet import ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from transformers import AutoConfig, AutoImageProcessor, AutoModel

from hf_ssl_or.models.adapters import EncoderAdapter, adapt_encoder
from hf_ssl_or.models.configuration_ssl import (
    OWN_RESNETS,
    SHORT_VITS,
    OrthogonalityConfig,
    SSLConfig,
    list_architectures,
    nearest,
)
from hf_ssl_or.models.image_conversion import Preprocessing
from hf_ssl_or.models.image_processing_ssl import SSLImageProcessor, preprocessing_of
from hf_ssl_or.models.modeling_ssl import SSLModel
from hf_ssl_or.models.modeling_ssl_resnet import SSLResNetModel
from hf_ssl_or.models.modeling_ssl_timm import SSLTimmModel
from hf_ssl_or.models.modeling_ssl_vit import SSLViTModel

SHARD_INDEX = "model.safetensors.index.json"
Family = type[SSLResNetModel] | type[SSLViTModel] | type[SSLTimmModel]
FAMILIES: tuple[Family, ...] = (SSLResNetModel, SSLViTModel, SSLTimmModel)


def list_encoders(pattern: str = "*") -> list[str]:
    """Lists the architectures that `create_encoder` makes: our own, then every architecture of timm.

    Args:
        pattern: Glob pattern that the names must match.
    """
    names = [name for family in FAMILIES for name in list_architectures(family.config_class.model_type)]
    return fnmatch.filter(dict.fromkeys(names), pattern)


def create_encoder(
    name: str,
    *,
    stem: str | None = None,
    image_size: int | None = None,
    patch_size: int | None = None,
    channels: list[int] | None = None,
    pooling: str | None = None,
    num_channels: int | None = None,
    init_from: str | os.PathLike[str] | None = None,
    orthogonality: OrthogonalityConfig | dict[str, Any] | None = None,
    **model_args: Any,
) -> Any:
    """Makes an encoder. An option left at None takes the architecture's value, or that of `init_from`.

    Args:
        name: Architecture, see `list_encoders`; or the Hub id or the folder of a model of transformers, of timm or of
            this package, whose weights are loaded.
        stem: ResNets: "standard", or "small" (3x3, stride 1, no max-pool) for images of 32-64 pixels.
        image_size: Side of the square images in pixels.
        patch_size: ViTs: side of a patch in pixels.
        channels: ResNets: width of each stage.
        pooling: ViTs: features of the class "token", or the "avg" of the patches.
        num_channels: Channels of an image. Where the weights of `init_from` are for others, the first layer's are
            summed up for one channel, and repeated for several.
        init_from: Where the weights come from: a timm name with a tag ("resnet18.a1_in1k"), a Hub id, also with its
            revision ("org/name@v2"), or a folder, in this package's layout or timm's. Only safetensors are read.
        orthogonality: Settings to keep in the configuration.
        **model_args: Further keyword arguments of the timm model.

    Returns:
        A model of this package, or an `EncoderAdapter` around a model of transformers.

    Raises:
        ValueError: A name or an option is unknown or refused, or the weights do not fit; the message names it.
    """
    options: dict[str, Any] = {
        "stem": stem,
        "image_size": image_size,
        "patch_size": patch_size,
        "channels": channels,
        "pooling": pooling,
        "num_channels": num_channels,
    }
    options = {key: value for key, value in options.items() if value is not None}
    is_published = name not in (*OWN_RESNETS, *SHORT_VITS) and ("/" in name or Path(name).is_dir())
    if is_published and init_from is not None:
        raise ValueError(f"init_from: {name} brings its own weights; give an architecture, or no init_from")
    checkpoint = _Checkpoint(name, "encoder") if is_published else _Checkpoint(init_from) if init_from else None
    if is_published and checkpoint is not None:
        if "architecture" not in checkpoint.config:
            return _of_transformers(name, {**options, **model_args}, orthogonality)
        name = checkpoint.config["architecture"]
    family = _family(name, pooling)
    config_class = family.config_class
    known = {field.name for field in fields(config_class)}
    for option in options:
        if option not in known:
            raise ValueError(f"{option}: {name} is of the family {config_class.model_type}, which has no such option")
    if checkpoint is not None:
        checkpoint.check(name)
        saved_options, saved_args = checkpoint.settings(config_class)
        options, model_args = saved_options | options, saved_args | model_args
    try:
        config = config_class(architecture=name, orthogonality=orthogonality, model_args=model_args, **options)
    except StrictDataclassError as error:  # a wrong type, which is no ValueError
        raise ValueError(" ".join(str(error).split())) from error
    model = family(config)
    if isinstance(model, SSLTimmModel) and image_size is not None:
        model.check_image_size()
    if checkpoint is not None:
        _load(model, checkpoint)
        model.config.name_or_path = checkpoint.source  # as from_pretrained notes it
    return model


def _of_transformers(name: str, options: dict[str, Any], orthogonality: Any) -> Any:
    for option in options.keys() - {"image_size", "num_channels"}:
        raise ValueError(f"{option}: {name} is a model of transformers, which has no such option")
    try:
        encoder, *_ = load_transformers(name, image_size=options.get("image_size"))
    except OSError as error:
        raise ValueError(f"encoder: {name} cannot be loaded: {' '.join(str(error).split())[:300]}") from error
    channels = encoder.config.num_channels
    if options.get("num_channels", channels) != channels:
        raise ValueError(f"num_channels: {name} takes {channels}, not {options['num_channels']}")
    encoder.config.orthogonality = orthogonality
    return encoder


def load_transformers(
    source: str | os.PathLike[str], *, image_size: int | None = None, trainable: bool = True, pretrained: bool = True
) -> tuple[Any, Preprocessing | None, bool]:
    """Loads a model of transformers, or of this package, from safetensors and without remote code.

    Args:
        source: A folder, or a Hub id, also with its revision.
        image_size: Side of its images in pixels; None takes its image processor's.
        trainable: As for `adapt_encoder`.
        pretrained: False takes its configuration alone.

    Returns:
        The encoder in float32; what becomes of its images, None where no image processor says it; and whether that is
        what it was trained with by this package, range of values included.

    Raises:
        ValueError: Weights are missing, damaged or in another format.
    """
    name, revision = split_revision(os.fspath(source))
    where: dict[str, Any] = {"revision": revision} if revision is not None else {}
    try:
        processor = AutoImageProcessor.from_pretrained(name, trust_remote_code=False, **where)
    except (OSError, ValueError):
        processor = None
    missing: list[str] = []
    if pretrained:
        if (index := Path(name) / SHARD_INDEX).is_file():
            shard_names(index)
        net, loading = AutoModel.from_pretrained(
            name,
            dtype=torch.float32,
            output_loading_info=True,
            use_safetensors=True,
            trust_remote_code=False,
            **where,
        )
        _check_downloads(name, revision)
        missing = sorted(loading["missing_keys"])
    else:
        net = AutoModel.from_config(AutoConfig.from_pretrained(name, trust_remote_code=False, **where))
    lost = [key for key in missing if "pooler" not in key]
    if lost:
        raise ValueError(f"{name}: its files lack {len(lost)} of the model's weights, the first: {lost[0]}")
    trained_with = getattr(net.config, "preprocessing", None)
    preprocessing: Preprocessing | None = Preprocessing(**trained_with) if trained_with else None
    if preprocessing is None and processor is not None:
        preprocessing = preprocessing_of(processor)
    size = image_size or (None if preprocessing is None else preprocessing.image_size)
    encoder = adapt_encoder(net, image_size=size, untrained=missing, trainable=trainable)
    if isinstance(encoder, EncoderAdapter):
        encoder.preprocessing = None if preprocessing is None else preprocessing.to_dict()
    return encoder, preprocessing, bool(trained_with) or isinstance(processor, SSLImageProcessor)


def _check_downloads(name: str, revision: str | None) -> None:
    """Refuses weights from the Hub's cache that are not what the Hub has."""
    folder = Path(name)
    if not folder.is_dir():
        cached = try_to_load_from_cache(name, "config.json", revision=revision)
        folder = Path(cached).parent if isinstance(cached, str) else folder
    for path in folder.glob("*.safetensors"):
        check_download(path)


def _family(name: str, pooling: str | None) -> Family:
    if name in OWN_RESNETS:
        return SSLResNetModel
    if name not in SHORT_VITS and (not timm.is_model(name) or "." in name):
        raise ValueError(f"unknown encoder {name!r}{nearest(name, list_encoders())}")
    with torch.device("meta"):
        net: Any = timm.create_model(SHORT_VITS.get(name, name))
    if type(net) is ResNet:
        return SSLResNetModel
    if type(net) is VisionTransformer and type(net.patch_embed) is PatchEmbed:
        return SSLViTModel if (pooling or net.global_pool) in ("token", "avg") else SSLTimmModel
    return SSLTimmModel


def split_revision(source: str) -> tuple[str, str | None]:
    """Splits "org/name@revision"; a folder's name is left whole, and without "@" the revision is None."""
    name, separator, revision = source.partition("@")
    return (source, None) if not separator or not revision or Path(source).exists() else (name, revision)


def shard_names(index: Path) -> list[str]:
    """Lists the files that an index of sharded safetensors names, all of which must be its neighbors.

    Raises:
        ValueError: The index is damaged, or names a file elsewhere or of another kind.
    """
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index}: is no index of safetensors ({error!r})") from error
    for name in names:
        if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]*\.safetensors", name):
            raise ValueError(f"{index}: names {name!r}, which is no safetensors file beside it")
    return names


def check_download(path: Path) -> None:
    """Compares a large file in the Hub's cache with the SHA-256 that it is stored under; a damaged one is removed.

    Raises:
        ValueError: It is damaged.
    """
    blob = path.resolve()
    if not re.fullmatch(r"[0-9a-f]{64}", blob.name):
        return
    with open(blob, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != blob.name:
        blob.unlink()
        path.unlink(missing_ok=True)
        raise ValueError(f"{path.name} was damaged on its way from the Hub, and was removed; run the command again")


_FILTER = "checkpoint_filter_fn"  # timm's function that fits weights to a net, in the file of a family
_SHAPING = {"stem", "image_size", "patch_size", "channels", "pooling", "num_channels"}
_TIMM_NAMES = {"img_size": "image_size", "global_pool": "pooling", "in_chans": "num_channels"}


def _read_config(path: Path) -> dict[str, Any]:
    """Reads a `config.json` that others wrote."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"init_from: {path} is no JSON ({error})") from error
    if not isinstance(config, dict) or not isinstance(config.get("architecture", ""), str):
        raise ValueError(f"init_from: {path} is no configuration of an encoder")
    for key in ("model_args", "pretrained_cfg"):
        if not isinstance(config.get(key, {}), dict):
            raise ValueError(f"init_from: {path}: {key} holds no key: value pairs")
    return config


def _read_weights(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"init_from: {path} is damaged: {error}") from error


class _Checkpoint:
    """A folder on disk or on the Hub that holds a configuration and safetensors, in our layout or timm's."""

    def __init__(self, source: str | os.PathLike[str], option: str = "init_from") -> None:
        self.source, self._option = os.fspath(source), option
        self._name, self._revision = split_revision(self.source)
        path = self._fetch("config.json")
        if path is None:
            raise ValueError(
                f"{self._option}: {self.source} has no config.json, or is not in the cache of this offline machine"
            )
        self.config = _read_config(path)
        self.is_ours = str(self.config.get("model_type", "")).startswith("ssl_")

    def check(self, name: str) -> None:
        """Refuses weights of another architecture or layout."""
        if "architecture" not in self.config:
            raise ValueError(f"init_from: {self.source} is neither of this package's layout nor of timm's")
        theirs = self.config["architecture"]
        if self.is_ours and SHORT_VITS.get(theirs, theirs) != SHORT_VITS.get(name, name):
            raise ValueError(f"init_from: {self.source} is a {self.config['architecture']}, not a {name}")

    def settings(self, config_class: type[SSLConfig]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Returns the options that shape the net, and the further arguments of timm."""
        saved = self.config if self.is_ours else self.config.get("model_args", {})
        named = {_TIMM_NAMES.get(key, key): value for key, value in saved.items() if value is not None}
        known = {field.name for field in fields(config_class)}
        options = {key: value for key, value in named.items() if key in known & _SHAPING}
        for key in ("image_size", "patch_size"):
            if options.get(key) and isinstance(options[key], list):  # timm writes [height, width]
                options[key] = options[key][0]
        taken = {*config_class.fixed_arguments, *options}
        arguments = self.config.get("model_args", {})
        return options, {key: value for key, value in arguments.items() if key not in taken}

    def read(self) -> dict[str, Tensor]:
        """Returns the weights by timm's names, without a head."""
        weights, marker = self._read_files(), "timm_model."
        if any(marker in key for key in weights):
            return {key.split(marker, 1)[1]: value for key, value in weights.items() if marker in key}
        head = self.config.get("pretrained_cfg", {}).get("classifier") or ("fc", "head")
        prefixes = tuple(f"{part}." for part in _names(head))
        return {key: value for key, value in weights.items() if not key.startswith(prefixes)}

    def _read_files(self) -> dict[str, Tensor]:
        whole = self._fetch("model.safetensors")
        if whole is not None:
            return _read_weights(whole)
        index = self._fetch(SHARD_INDEX)
        if index is None:
            raise ValueError(f"init_from: {self.source} has no model.safetensors; only safetensors are read")
        weights: dict[str, Tensor] = {}
        for name in shard_names(index):
            shard = self._fetch(name)
            if shard is None:
                raise ValueError(f"init_from: {self.source} has no {name}, which its index names")
            weights.update(_read_weights(shard))
        return weights

    def _fetch(self, name: str) -> Path | None:
        folder = Path(self.source)
        if folder.is_dir():
            return folder / name if (folder / name).is_file() else None
        repository = self._name if "/" in self._name else f"timm/{self._name}"
        try:
            path = Path(hf_hub_download(repository, name, revision=self._revision))
        except EntryNotFoundError:
            return None
        except RevisionNotFoundError as error:
            raise ValueError(f"{self._option}: {repository} has no revision {self._revision!r} on the Hub") from error
        except (HFValidationError, RepositoryNotFoundError) as error:
            raise ValueError(
                f"{self._option}: {self.source} is neither a folder nor a repository on the Hub"
            ) from error
        check_download(path)
        return path


def _names(value: str | list[str] | tuple[str, ...] | None) -> tuple[str, ...]:
    """Returns the layers that timm's configuration names, one or several."""
    return (value,) if isinstance(value, str) else tuple(value or ())


def _load(model: SSLModel, checkpoint: _Checkpoint) -> None:
    """Copies the weights; timm adapts a ViT's patches and positions to other sizes, and the first layer to channels.

    Weights of colors are summed up for gray images, and repeated for more channels, divided so that sums stay alike.
    """
    net, weights = model.timm_model, checkpoint.read()
    of_timm = getattr(sys.modules[timm.model_entrypoint(model.config.timm_arguments()[0]).__module__], _FILTER, None)
    if of_timm is not None and not isinstance(model, SSLResNetModel):
        weights = of_timm(weights, net)
    expected = net.state_dict()
    for layer in _names(net.pretrained_cfg.get("first_conv")):
        first = f"{layer}.weight"
        if first in weights and weights[first].ndim == 4:
            weights[first] = adapt_input_conv(model.config.num_channels, weights[first], weights[first].shape[1])
    for key in sorted(expected.keys() ^ weights.keys()):
        side = "has no" if key in expected else "has an unknown"
        raise ValueError(f"init_from: {checkpoint.source} {side} {key}")
    for key, value in expected.items():
        if value.shape != weights[key].shape:
            shapes = f"{tuple(weights[key].shape)} there, {tuple(value.shape)} here"
            raise ValueError(f"init_from: {key} of {checkpoint.source} does not fit: {shapes}")
    net.load_state_dict(weights)

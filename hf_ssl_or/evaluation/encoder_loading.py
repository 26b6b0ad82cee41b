"""Any encoder by its name, ready to be evaluated: ours, timm's, transformers', or an untrained one.

    runs/try                        a run's folder                  random:runs/try     its net, untrained
    path/to/encoder, org/name       a folder or a Hub id that transformers' AutoModel loads; org/name@v2 at a revision
    timm:resnet18, timm/resnet18.a1_in1k                            timm's pretrained weights
    random:resnet18, random:timm:convnext_nano                      an architecture, untrained
    ...@64                          the same, for images of 64 x 64 pixels

Weights come from the disk, from the cache, or from the Hub if it can be reached.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import snapshot_download
from torch import nn
from transformers import AutoConfig

from hf_ssl_or.data.arguments import DataArguments
from hf_ssl_or.errors import InputError, unknown
from hf_ssl_or.models.adapters import POOLER, adapt_encoder
from hf_ssl_or.models.auto import create_encoder, list_encoders, load_transformers, split_revision
from hf_ssl_or.models.image_conversion import Preprocessing
from hf_ssl_or.models.modeling_ssl import SSLModel
from hf_ssl_or.models.modeling_ssl_resnet import SSLResNetModel
from hf_ssl_or.randomness import hashed_seed

_SMALL_STEM = 64  # pixels up to which an untrained ResNet gets the small stem
_DEFAULT_SIZE = 224

Loaded = tuple[nn.Module, "Processing"]


@dataclass(frozen=True, kw_only=True)
class Processing:
    """What an encoder wants its images to be; None takes what the data set's images have.

    Attributes:
        image_size: Side in pixels.
        mean: Mean of each channel, of values in [0, 1].
        std: Standard deviation of each channel.
        num_channels: Channels of an image.
        crop_pct: Share of the resized shorter side that the center crop keeps.
        interpolation: Filter of the resize.
        exact: All of it, where the encoder was trained by this package: the range of pixel values included.
    """

    image_size: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    num_channels: int = 3
    crop_pct: float | None = None
    interpolation: str | None = None
    exact: Preprocessing | None = None

    @classmethod
    def of(cls, preprocessing: Preprocessing, *, exact: bool) -> Processing:
        """Takes over what an image processor does; all of it where `exact`."""
        names = ("image_size", "mean", "std", "num_channels", "crop_pct", "interpolation")
        known = {name: getattr(preprocessing, name) for name in names}
        return cls(**known, exact=preprocessing if exact else None)


@dataclass(frozen=True, kw_only=True)
class FrozenEncoder:
    """An encoder that is evaluated.

    Attributes:
        name: What the user calls it.
        model: Its output has `pooler_output` (B, F).
        pooling: Where the features come from: "pooler output", "class token" or "mean".
        image_size: Side of the images that it gets, in pixels.
        processing: What it wants its images to be.
    """

    name: str
    model: nn.Module
    pooling: str
    image_size: int
    processing: Processing

    def prepare(self, data: DataArguments) -> tuple[DataArguments, Preprocessing | None]:
        """Returns settings of the data that suit the encoder, and what becomes of pixels where that is known."""
        own, wanted = self.processing, dict[str, Any](image_size=self.image_size)
        if own.exact is not None:
            return dataclasses.replace(data, **wanted), dataclasses.replace(own.exact, **wanted)
        wanted |= {"crop_pct": own.crop_pct, "interpolation": own.interpolation}
        if own.mean is not None and own.std is not None:
            wanted |= {"mean": list(own.mean), "std": list(own.std)}
        return dataclasses.replace(data, **{name: value for name, value in wanted.items() if value is not None}), None

    def key(self) -> str:
        """Hash of what its features depend on: the weights, the sizes, the pooling."""
        digest = hashlib.sha256(f"{self.pooling}/{self.image_size}/{self.processing}".encode())
        digest.update(type(self.model).__name__.encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:24]

    def describe(self) -> dict[str, Any]:
        """Returns what a reader of the results must know."""
        return {
            "name": self.name,
            "weights": self.key(),
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "image_size": self.image_size,
            "mean": self.processing.mean,
            "std": self.processing.std,
            "features": self.pooling,
        }


def load_encoder(name: str, *, image_size: int = _DEFAULT_SIZE) -> FrozenEncoder:
    """Loads an encoder by any of the names above, in evaluation mode, float32, on the CPU.

    Args:
        name: The encoder.
        image_size: Side of the images where neither the encoder nor its name says one.

    Raises:
        InputError: There is no such encoder, its weights are out of reach, or it does not take images alone.
    """
    source, wanted = _split_size(name)
    try:
        if source.startswith("random:"):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(hashed_seed("random encoder"))
                model, own = _untrained(source.removeprefix("random:"), wanted)
        elif source.startswith(("timm:", "timm/")):
            model, own = _timm(source.removeprefix("timm:"), True, wanted)
        else:
            model, own = _transformers(source, wanted)
        size = wanted or own.image_size or image_size
    except InputError:
        raise
    except Exception as error:  # three libraries and any architecture: what they raise cannot be listed
        raise InputError(f"{name}: cannot be loaded as an encoder: {_reason(error)}") from error
    pooling = getattr(model, "pooling", POOLER)
    return FrozenEncoder(name=name, model=model.eval(), pooling=pooling, image_size=size, processing=own)


def _split_size(name: str) -> tuple[str, int | None]:
    found = re.fullmatch(r"(.+)@([1-9]\d*)", name)
    return (name, None) if found is None or Path(name).exists() else (found[1], int(found[2]))


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())[:300] or type(error).__name__
    chain: BaseException | None = error
    while chain is not None:
        if type(chain).__name__ in ("OfflineModeIsEnabled", "LocalEntryNotFoundError", "ConnectError"):
            return "its files are neither on this disk nor in the cache, and the Hub cannot be reached"
        chain = chain.__cause__ or chain.__context__
    return text


# ---------------------------------------------------------------------------------------------------------------------
# timm


def _timm(name: str, pretrained: bool, size: int | None) -> Loaded:
    """Makes a timm net; a name with a slash is a folder or a repository of the Hub."""
    shown = name if "/" in name else f"timm:{name}"
    if "/" in name:
        name = f"local-dir:{name}" if Path(name).is_dir() else f"hf-hub:{name}"
    elif not timm.is_model(name):
        raise unknown("timm model", name, timm.list_models())
    try:
        net: Any = timm.create_model(name, pretrained=pretrained, num_classes=0)
        own = timm.data.resolve_model_data_config(net)
        wanted = size or own["input_size"][-1]
        try:
            encoder = adapt_encoder(net, image_size=wanted, trainable=False)
        except ValueError:  # most take images of any size, ViTs and their like must be told
            net = timm.create_model(name, pretrained=pretrained, num_classes=0, img_size=wanted)
            encoder = adapt_encoder(net, image_size=wanted, trainable=False)
    except Exception as error:
        if not pretrained:
            raise
        raise InputError(
            f"{shown}: cannot load its weights: {_reason(error)}; random:timm:<architecture> is an untrained net"
        ) from error
    if not pretrained:
        return encoder, Processing(image_size=own["input_size"][-1])
    processing = Processing(
        image_size=own["input_size"][-1],
        mean=tuple(own["mean"]),
        std=tuple(own["std"]),
        num_channels=own["input_size"][0],
        crop_pct=own["crop_pct"],
        interpolation=own["interpolation"],
    )
    return encoder, processing


# ---------------------------------------------------------------------------------------------------------------------
# transformers, ours among them


def _transformers(name: str, size: int | None, *, pretrained: bool = True) -> Loaded:
    source = _encoder_folder(name)
    if AutoConfig.from_pretrained(source).model_type == "timm_wrapper":  # what timm wrote
        return _timm(source, pretrained, size)
    encoder, how, exact = load_transformers(source, image_size=size, trainable=False, pretrained=pretrained)
    if how is None:
        raise InputError(f"{name}: has no preprocessor_config.json, which says what its images must be")
    return encoder, Processing.of(how, exact=exact)


def _encoder_folder(name: str) -> str:
    """Returns the folder of a run's encoder, another folder, or of a revision's snapshot; or the Hub id as it is."""
    folder = Path(name).expanduser()
    if (folder / "recipe.yaml").exists():
        if not (folder / "encoder" / "config.json").exists():
            raise InputError(f"{name}: the run has not ended, there is no encoder in it; use --select rankme")
        return str(folder / "encoder")
    if folder.is_dir() and not (folder / "config.json").exists():
        raise InputError(f"{name}: is neither a run's nor an encoder's folder: no recipe.yaml, no config.json")
    if not folder.is_dir() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise InputError(f"{name}: there is no such folder")
    repository, revision = split_revision(name)
    if revision is not None:
        return snapshot_download(repository, revision=revision, allow_patterns=["*.json", "*.safetensors"])
    return str(folder) if folder.is_dir() else name


# ---------------------------------------------------------------------------------------------------------------------
# Untrained


def _untrained(name: str, size: int | None) -> Loaded:
    if name.startswith("timm:"):
        return _timm(name.removeprefix("timm:"), False, size)
    if name in list_encoders():
        model: SSLModel = create_encoder(name, image_size=size)
        if isinstance(model, SSLResNetModel) and size is not None and size <= _SMALL_STEM:
            model = create_encoder(name, image_size=size, stem="small")
        return model, Processing(image_size=model.config.image_size)
    if "/" not in name and not Path(name).exists():
        return _timm(name, False, size)
    return _transformers(name, size, pretrained=False)

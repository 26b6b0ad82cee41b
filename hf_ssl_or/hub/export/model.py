"""An encoder of this package with all that another library must be told of it, and how that library loads it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification

from hf_ssl_or.errors import InputError
from hf_ssl_or.hub.export.pixels import OPEN_RGB, is_rgb
from hf_ssl_or.models import image_conversion
from hf_ssl_or.models.configuration_ssl import OWN_RESNETS, SHORT_VITS
from hf_ssl_or.models.image_conversion import Preprocessing
from hf_ssl_or.models.image_processing_ssl import SSLImageProcessor, preprocessing_of
from hf_ssl_or.models.modeling_ssl import SSLForImageClassification, SSLModel

CONVERSION = Path(image_conversion.__file__)

_LOAD_CONVERSION = """\
sys.path.append("FOLDER")
from image_conversion import Preprocessing

with open("FOLDER/config.json") as file:
    preprocessing = Preprocessing(**json.load(file)["preprocessing"])
"""


class Lines(NamedTuple):
    """Lines of Python by which a library loads and runs what was written; a check runs the very lines that are shown.

    Attributes:
        library: Who reads the files.
        packages: What to install.
        imports: Import statements of `load` and `prepare`.
        load: Loads the files from the folder FOLDER.
        prepare: Makes `pixel_values` (1, C, H, W) of the image file PHOTO.
        call: Makes `features` (B, hidden_size) of `pixel_values`, and with a head `logits` (B, num_labels).
    """

    library: str
    packages: str
    imports: tuple[str, ...]
    load: str
    prepare: str
    call: str


@dataclass(frozen=True, kw_only=True)
class Portable:
    """An encoder, or a classifier, as it was read from its folder.

    Attributes:
        name: The folder's name.
        model: On the CPU, float32, in evaluation mode.
        processor: What it wants its images to be.
    """

    name: str
    model: SSLModel | SSLForImageClassification
    processor: SSLImageProcessor

    @property
    def config(self) -> Any:
        """The configuration."""
        return self.model.config

    @property
    def encoder(self) -> Any:
        """The model without a head."""
        return self.model.base_model

    @property
    def net(self) -> Any:
        """The net as timm builds it, without a head."""
        return self.encoder.timm_model

    @property
    def labels(self) -> list[str] | None:
        """Names of the classes by their numbers; None without a head."""
        if not isinstance(self.model, SSLForImageClassification) or not self.config.num_labels:
            return None
        return [str(self.config.id2label[k]) for k in range(self.config.num_labels)]

    @property
    def head_name(self) -> str:
        """What timm calls the head of such a net."""
        return self.net.pretrained_cfg["classifier"]

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        """All weights by timm's names, the head's among them."""
        weights = {name: tensor.contiguous() for name, tensor in self.net.state_dict().items()}
        if isinstance(self.model, SSLForImageClassification):
            for name, tensor in self.model.classifier.state_dict().items():
                weights[f"{self.head_name}.{name}"] = tensor
        return weights

    @cached_property
    def preprocessing(self) -> Preprocessing:
        """What becomes of an image's pixels."""
        return preprocessing_of(self.processor)

    def prepare(self, files: Sequence[Path]) -> Tensor:
        """Returns image files as the encoder's own image processor prepares them, (B, C, S, S)."""
        processor: Any = self.processor
        return processor(files, return_tensors="pt").pixel_values

    @property
    def takes_rgb(self) -> bool:
        """Whether images are 8-bit RGB, see `pixels.is_rgb`."""
        return is_rgb(self.preprocessing)

    @property
    def timm_name(self) -> str:
        """What timm calls the architecture."""
        return SHORT_VITS.get(self.config.architecture, self.config.architecture)

    def describe(self) -> dict[str, Any]:
        """Returns a small config.json for libraries that know none."""
        labels = {} if self.labels is None else {"id2label": dict(enumerate(self.labels))}
        return {
            "architecture": self.timm_name,
            "hidden_size": self.config.hidden_size,
            "image_size": self.config.image_size,
            "num_channels": self.config.num_channels,
            "preprocessing": self.preprocessing.to_dict(),
            **labels,
            "pretraining": self.config.pretraining,
        }

    def with_images(self, lines: Lines, *, into: str = "pixel_values = preprocessing.tensor({})[None]\n") -> Lines:
        """Completes the lines of a library, whose `prepare` takes `image`, upright RGB, by those that read a file.

        Images of other kinds are converted by the file `image_conversion.py` in the folder, see `write_conversion`.

        Args:
            lines: The lines.
            into: Makes `pixel_values` of `preprocessing` and a file's name.
        """
        if self.takes_rgb:
            imports = (*lines.imports, "from PIL import Image, ImageOps")
            return lines._replace(imports=imports, prepare=OPEN_RGB + lines.prepare)
        readers = "" if self.preprocessing.eight_bit else " tifffile pydicom"
        return lines._replace(
            packages=f"{lines.packages}{readers}",
            imports=("import json", "import sys", *lines.imports),
            load=lines.load + _LOAD_CONVERSION,
            prepare=into.format('"PHOTO"'),
        )

    def write_conversion(self, folder: Path) -> None:
        """Copies `image_conversion.py` for encoders of images that other libraries cannot prepare."""
        if not self.takes_rgb:
            shutil.copyfile(CONVERSION, folder / CONVERSION.name)

    def refusal(self, library: str, reason: str, instead: Sequence[str]) -> InputError:
        """Makes the error for an encoder that a library cannot express."""
        others = "".join(f", or export --to {target}" for target in instead)
        return InputError(
            f"{self.name}: {library} cannot express it: {reason}; load it with transformers' "
            f"trust_remote_code=True{others}"
        )


def read_portable(source: str | Path) -> Portable:
    """Reads an encoder or a classifier of this package.

    Args:
        source: A run's folder, an encoder's folder, or a Hub id.

    Raises:
        InputError: There is none, or it is of another package.
    """
    folder = Path(source).expanduser()
    is_run = (folder / "recipe.yaml").is_file() and (folder / "encoder").is_dir()
    where = str(folder / "encoder" if is_run else folder) if folder.exists() else str(source)
    if folder.exists() and not (Path(where) / "config.json").is_file():
        raise InputError(f"{source}: is neither a run that has ended nor an encoder's folder: there is no config.json")
    try:
        config = AutoConfig.from_pretrained(where)
        with_head = any("ForImageClassification" in name for name in config.architectures or ())
        auto: Any = AutoModelForImageClassification if with_head else AutoModel
        model = auto.from_pretrained(where, dtype=torch.float32).eval()
        processor = AutoImageProcessor.from_pretrained(where)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise InputError(f"{source}: cannot be loaded: {' '.join(str(error).split())[:300]}") from error
    if not isinstance(model, (SSLModel, SSLForImageClassification)):
        raise InputError(f"{source}: is a {type(model).__name__}; only encoders of this package are exported")
    return Portable(name=folder.resolve().name, model=model, processor=processor)


def why_not_timm(config: Any) -> str | None:
    """Says why timm cannot build an encoder from its configuration, in a phrase; None where it can."""
    if config.architecture in OWN_RESNETS:
        return f"{config.architecture} is no architecture of timm's"
    if getattr(config, "stem", None) == "small":
        return "the small stem (3x3, stride 1, no max-pool) is no option of timm's ResNet"
    return None


def timm_lines(portable: Portable) -> Lines:
    """Returns the lines by which timm loads the folder."""
    call = "with torch.inference_mode():\n"
    if portable.labels is None:
        call += "    features = model(pixel_values)\n"
    else:
        call += "    features = model.forward_head(model.forward_features(pixel_values), pre_logits=True)\n"
        call += "    logits = model(pixel_values)\n"
    lines = Lines(
        library="timm",
        packages="timm",
        imports=("import timm", "import torch"),
        load='model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()\n',
        prepare=(
            "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)\n"
            "pixel_values = transform(image)[None]\n"
        ),
        call=call,
    )
    return portable.with_images(lines)


def renamed(weights: dict[str, Tensor], rules: Sequence[tuple[str, str]]) -> tuple[dict[str, Tensor], list[str]]:
    """Renames weights by the first pattern that matches each, and lists the names that none matches."""
    found, lost = {}, []
    for name, tensor in weights.items():
        for pattern, replacement in rules:
            if re.match(pattern, name):
                found[re.sub(pattern, replacement, name, count=1)] = tensor
                break
        else:
            lost.append(name)
    return found, lost


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Writes plain values as JSON."""
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")

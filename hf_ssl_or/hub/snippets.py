"""The lines of a card that load the encoder."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from torch import nn

from hf_ssl_or.hub.export.model import why_not_timm
from hf_ssl_or.hub.export.pixels import OPEN_RGB, is_rgb, photo_name
from hf_ssl_or.hub.markdown import block
from hf_ssl_or.hub.published_run import encoder_config
from hf_ssl_or.models.image_conversion import Preprocessing
from hf_ssl_or.models.modeling_ssl import SSLModel
from hf_ssl_or.runs.reader import RunRecord
from hf_ssl_or.runs.results import OWN_LIBRARY, EncoderDescription

_LOAD = """\
from transformers import AutoImageProcessor, AutoModel

encoder = AutoModel.from_pretrained({source}, trust_remote_code=True)
processor = AutoImageProcessor.from_pretrained({source}, trust_remote_code=True)
pixel_values = processor("{photo}", return_tensors="pt").pixel_values
features = encoder(pixel_values).pooler_output  # (1, {width})"""

_PIPELINES = """\
from transformers import pipeline

extract = pipeline("image-feature-extraction", {source}, pool=True, trust_remote_code=True)
features = extract("{photo}")"""

_FINE_TUNE = """\
from transformers import AutoModelForImageClassification

model = AutoModelForImageClassification.from_pretrained(
    {source}, num_labels=10, trust_remote_code=True
)"""

_PACKAGE = """\
import hf_ssl_or
from transformers import AutoModel

encoder = AutoModel.from_pretrained({source})"""

_TIMM = """\
import timm

encoder = timm.create_model("{place}", pretrained=True).eval()
features = encoder(pixel_values)  # (1, {width}), of the pixels from above"""

_TIMM_RGB = f"""\
import timm
from PIL import Image, ImageOps

encoder = timm.create_model("{{place}}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(encoder))
{OPEN_RGB.replace("PHOTO", "{photo}")}features = encoder(transform(image).unsqueeze(0))  # (1, {{width}})"""

_STOCK_PIXELS = f"""\
from PIL import Image, ImageOps
from transformers import AutoImageProcessor

processor = AutoImageProcessor.from_pretrained({{source}})
{OPEN_RGB.replace("PHOTO", "{photo}")}pixel_values = processor(image, return_tensors="pt").pixel_values"""

_PIXELS = """\
from transformers import AutoImageProcessor

processor = AutoImageProcessor.from_pretrained({source}, trust_remote_code=True)
pixel_values = processor("{photo}", return_tensors="pt").pixel_values"""

EXPORTED = "encoder-timm"


def usage(run: RunRecord, repo_id: str | None) -> dict[str, Any]:
    """Returns what the template shows of loading: `snippets`, (heading, block of code) pairs; and two notes on them.

    A push to the Hub makes the repository one that timm reads; a run's folder is exported first.
    """
    encoder = described_encoder(run)
    width = "features" if run.results is None else f"{run.results.collapse.dimension:d}"
    named = {"source": f'"{repo_id or "encoder"}"', "width": width}
    named["place"] = f"local-dir:{EXPORTED}" if repo_id is None else f"hf-hub:{repo_id}"
    named["photo"] = "photo.jpg" if run.preprocessing is None else photo_name(run.preprocessing)
    if encoder.library != OWN_LIBRARY:
        stock = has_stock_processor(encoder, run.preprocessing)
        pixels = (_STOCK_PIXELS if stock else _PIXELS).format(**named)
        lines = [("", pixels), ("", "\n".join(_foreign_lines(encoder, repo_id)))]
        return {"snippets": _blocks(lines), "why_not_timm": "", "remote_code": "" if stock else "processor"}
    lines = [
        ("", _LOAD),
        ("With the package hf_ssl_or installed, no such code runs:", _PACKAGE),
        ("As a pipeline:", _PIPELINES),
        ("To fine-tune, with `transformers.Trainer` or any loop:", _FINE_TUNE),
    ]
    reason = _why_not_timm(run)
    if reason is None:
        exported = "" if repo_id else f", after `hf-ssl-or export encoder --to timm --output {EXPORTED}`"
        rgb = run.preprocessing is not None and is_rgb(run.preprocessing)
        lines.append((f"In timm{exported}:", _TIMM_RGB if rgb else _TIMM))
    blocks = _blocks([(heading, text.format(**named)) for heading, text in lines])
    return {"snippets": blocks, "why_not_timm": reason or "", "remote_code": "model"}


def describe_encoder(encoder: nn.Module) -> EncoderDescription | None:
    """Returns how an encoder will be loaded once it is saved; None for one of this package."""
    if isinstance(encoder, SSLModel):
        return None
    adapter: Any = encoder
    lines, origin = adapter.loading_lines("FOLDER"), adapter.description
    return EncoderDescription(library=origin["library"], name=origin["name"], loading_lines=lines)


def has_stock_processor(encoder: EncoderDescription, preprocessing: Preprocessing | None) -> bool:
    """Says whether an encoder that is saved as itself comes with an image processor of transformers' own."""
    return encoder.library != "torch" and preprocessing is not None and is_rgb(preprocessing)


def described_encoder(run: RunRecord) -> EncoderDescription:
    """Returns how the encoder is loaded, from the results or, for a run that has not ended, from its configuration."""
    if run.results is not None and run.results.encoder is not None:
        return run.results.encoder
    config = encoder_config(run.folder)
    name = str(config.get("class", config.get("model_type", "")))
    if "library" in config:
        lines = [f"model = ...  # the {name} that was trained", 'load_model(model, "FOLDER/model.safetensors")']
        lines = ["from safetensors.torch import load_model", "", *lines, "features = model.eval()(pixel_values)"]
        return EncoderDescription(library="torch", name=name, loading_lines=lines)
    if "pretrained_cfg" in config and "model_type" not in config:
        lines = ["import timm", "", 'model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()']
        return EncoderDescription(library="timm", name=name, loading_lines=[*lines, "features = model(pixel_values)"])
    if not name or name.startswith("ssl_"):
        return EncoderDescription(library=OWN_LIBRARY, name=name)
    lines = ["from transformers import AutoModel", "", 'model = AutoModel.from_pretrained("FOLDER").eval()']
    return EncoderDescription(
        library="transformers", name=name, loading_lines=[*lines, "output = model(pixel_values)"]
    )


def _foreign_lines(encoder: EncoderDescription, repo_id: str | None) -> list[str]:
    """Puts the place of the files into the lines of another library."""
    lines = encoder.loading_lines
    if repo_id is None:
        return [line.replace("FOLDER", "encoder") for line in lines]
    lines = [line.replace("local-dir:FOLDER", f"hf-hub:{repo_id}") for line in lines]
    file = '"FOLDER/model.safetensors"'
    if any(file in line for line in lines):
        download = f'hf_hub_download("{repo_id}", "model.safetensors")'
        lines = ["from huggingface_hub import hf_hub_download", *(line.replace(file, download) for line in lines)]
    return [line.replace("FOLDER", repo_id) for line in lines]


def _blocks(lines: list[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(heading, block(text, "python")) for heading, text in lines]


def _why_not_timm(run: RunRecord) -> str | None:
    """Says why timm cannot build the encoder, or nothing where the recipe does not tell; None where it can."""
    encoder = run.recipe["encoder"]
    if encoder["init_from"] and encoder["stem"] is None:  # whose stem it may have
        return ""
    return why_not_timm(SimpleNamespace(architecture=encoder["name"], stem=encoder["stem"]))

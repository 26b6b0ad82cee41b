"""The lines of a card that load the encoder."""

from __future__ import annotations

from types import SimpleNamespace

from hf_ssl_or.hub.export.model import why_not_timm
from hf_ssl_or.hub.export.pixels import OPEN_RGB, is_rgb, photo_name
from hf_ssl_or.hub.markdown import block
from hf_ssl_or.hub.run_record import RunFacts

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

EXPORTED = "encoder-timm"


def usage(facts: RunFacts, repo_id: str | None) -> dict[str, str]:
    """Returns the blocks of code by their name in the template; `timm` is empty where it cannot be said how.

    A push to the Hub makes the repository one that timm reads; a run's folder is exported first.
    """
    source = "encoder" if repo_id is None else repo_id
    width = facts.results.get("collapse", {}).get("dimension")
    place = f"local-dir:{EXPORTED}" if repo_id is None else f"hf-hub:{repo_id}"
    named = {"source": f'"{source}"', "place": place, "width": f"{width:d}" if width else "features"}
    named["photo"] = "photo.jpg" if facts.preprocessing is None else photo_name(facts.preprocessing)
    timm = _TIMM_RGB if facts.preprocessing is not None and is_rgb(facts.preprocessing) else _TIMM
    lines = {"load": _LOAD, "package": _PACKAGE, "pipelines": _PIPELINES, "fine_tune": _FINE_TUNE, "timm": timm}
    blocks = {name: block(text.format(**named), "python") for name, text in lines.items()}
    refusal = _refusal(facts)
    return blocks | {"exported": EXPORTED, "why_not_timm": refusal or "", **({} if refusal is None else {"timm": ""})}


def _refusal(facts: RunFacts) -> str | None:
    """Says why timm cannot build the encoder, or nothing where the recipe does not tell; None where it can."""
    encoder = facts.recipe["encoder"]
    if encoder["init_from"] and encoder["stem"] is None:  # whose stem it may have
        return ""
    return why_not_timm(SimpleNamespace(architecture=encoder["name"], stem=encoder["stem"]))

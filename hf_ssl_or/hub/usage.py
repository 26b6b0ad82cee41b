"""The lines of a card that load the encoder."""

from __future__ import annotations

from hf_ssl_or.hub.facts import RunFacts
from hf_ssl_or.hub.markdown import block

_LOAD = """\
from transformers import AutoImageProcessor, AutoModel

encoder = AutoModel.from_pretrained({source}, trust_remote_code=True)
processor = AutoImageProcessor.from_pretrained({source}, trust_remote_code=True)
features = encoder(**processor(images, return_tensors="pt")).pooler_output  # (images, {width})"""

_PIPELINES = """\
from transformers import pipeline

extract = pipeline("image-feature-extraction", {source}, pool=True, trust_remote_code=True)
features = extract("photo.jpg")"""

_FINE_TUNE = """\
from transformers import AutoModelForImageClassification

model = AutoModelForImageClassification.from_pretrained(
    {source}, num_labels=10, trust_remote_code=True
)"""

_PACKAGE = """\
import hf_ssl_or
from transformers import AutoModel

encoder = AutoModel.from_pretrained({source})"""


def usage(facts: RunFacts, repo_id: str | None) -> dict[str, str]:
    """Gives the blocks of code by their name in the template."""
    source = '"encoder"' if repo_id is None else f'"{repo_id}"'
    width = facts.results.get("collapse", {}).get("dimension")
    named = {"source": source, "width": f"{width:d}" if width else "features"}
    lines = {"load": _LOAD, "package": _PACKAGE, "pipelines": _PIPELINES, "fine_tune": _FINE_TUNE}
    return {name: block(text.format(**named), "python") for name, text in lines.items()}

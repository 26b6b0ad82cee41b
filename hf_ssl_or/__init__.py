"""Self-supervised image encoders without dimensional collapse, for the Hugging Face stack.

`import hf_ssl_or` tells transformers' Auto classes about the encoders; the public names are loaded when first used.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

_HOMES = {
    "models.auto": ("create_encoder", "list_encoders"),
    "models.configuration_ssl": ("OrthogonalityConfig", "SSLResNetConfig", "SSLTimmConfig", "SSLViTConfig"),
    "models.image_processing_ssl": ("SSLImageProcessor",),
    "models.modeling_ssl_resnet": ("SSLResNetBackbone", "SSLResNetForImageClassification", "SSLResNetModel"),
    "models.modeling_ssl_timm": ("SSLTimmBackbone", "SSLTimmForImageClassification", "SSLTimmModel"),
    "models.modeling_ssl_vit": ("SSLViTBackbone", "SSLViTForImageClassification", "SSLViTModel"),
    "embedding": ("embed",),
    "methods": ("available_methods", "get_method"),
    "orthogonality": ("OrthogonalityCallback", "OrthogonalityRegularizer"),
    "training.arguments": ("SSLTrainingArguments",),
    "training.trainer": ("SSLTrainer",),
    "recipe": ("Recipe", "load_recipe"),
    "run": ("pretrain",),
    "structures": ("ViewSpec",),
    "sweeps.sweep": ("sweep",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME_OF)


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return __all__


if Path(sys.argv[0] if sys.argv else "").name not in ("hf-ssl-or", "-m"):  # the command line answers --help at once
    importlib.import_module(f"{__name__}.models")

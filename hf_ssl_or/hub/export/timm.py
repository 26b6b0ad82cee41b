"""timm's layout: a folder of its own, and the keys that let timm read the folder of an encoder of this package."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from hf_ssl_or.hub.export.model import Lines, Portable, read_portable, timm_lines, why_not_timm, write_json
from hf_ssl_or.hub.verify import compare

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"


def write(portable: Portable, folder: Path) -> list[Lines]:
    """Writes the encoder as timm would, so that transformers' wrapper of timm reads it too.

    Raises:
        InputError: timm cannot express the encoder.
    """
    reason = why_not_timm(portable.config)
    if reason is not None:
        raise portable.refusal("timm", reason, ["onnx"])
    save_file(portable.weights, folder / _WEIGHTS, {"format": "pt"})
    provenance = {"preprocessing": portable.preprocessing.to_dict(), "pretraining": portable.config.pretraining}
    write_json(folder / "config.json", {**timm_config(portable), **provenance})
    return [timm_lines(portable), _wrapper_lines(portable)]


def timm_config(portable: Portable) -> dict[str, Any]:
    """Returns the keys of config.json that timm reads.

    `num_classes` stands at the root alone: transformers' wrapper would pass it on twice if `model_args` had it too.
    """
    config, classes = portable.config, len(portable.labels or [])
    _, arguments = config.timm_arguments()
    if config.num_channels == 3:
        arguments.pop("in_chans")
    arguments.pop("num_classes")
    labels = {} if portable.labels is None else {"label_names": portable.labels}
    return {
        "architecture": portable.timm_name,
        "num_classes": classes,
        "num_features": config.hidden_size,
        "model_args": arguments,
        "pretrained_cfg": {
            **transform_settings(portable),
            "num_classes": classes,
            "first_conv": portable.net.pretrained_cfg["first_conv"],
            "classifier": portable.head_name,
            "pool_size": None,
        },
        **labels,
    }


def transform_settings(portable: Portable) -> dict[str, Any]:
    """Returns what `timm.data.create_transform` is told."""
    p = portable.preprocessing
    return {
        "input_size": [p.num_channels, p.image_size, p.image_size],
        "interpolation": p.interpolation,
        "crop_pct": p.crop_pct,
        "crop_mode": "center",
        "mean": list(p.mean),
        "std": list(p.std),
    }


def add_timm_files(folder: str | Path, *, check: bool = True) -> str | None:
    """Lets timm load the folder of an encoder too, by `create_model("hf-hub:owner/name", pretrained=True)`.

    One config.json and one model.safetensors then serve all: timm reads `architecture`, `model_args`, `pretrained_cfg`
    and `num_classes` and knows the weights by its own names; transformers reads `model_type` and `auto_map`, and our
    models take weights by either name. The folder is changed only after timm has given the same features from it in a
    fresh process.

    Args:
        folder: Folder of an encoder or a classifier, with its image processor.
        check: False leaves that out, for a caller that compares the folder itself.

    Returns:
        None, or in a phrase why timm cannot build the encoder; the folder is then as it was.

    Raises:
        InputError: It is no such folder, or timm gives other features.
    """
    folder = Path(folder)
    portable = read_portable(folder)
    reason = why_not_timm(portable.config)
    if reason is not None:
        return reason
    ours = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    processor = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
    # Where a local config.json has `pretrained_cfg`, transformers asks it for the class of the image processor.
    auto_map = {**ours.get("auto_map", {}), **processor.get("auto_map", {})}
    staging = folder / ".timm"
    staging.mkdir(exist_ok=True)
    try:
        save_file(portable.weights, staging / _WEIGHTS, {"format": "pt"})
        preprocessing = {"preprocessing": portable.preprocessing.to_dict()}
        write_json(staging / "config.json", {**ours, **timm_config(portable), **preprocessing, "auto_map": auto_map})
        portable.write_conversion(staging)
        if check:
            compare(portable, staging, [timm_lines(portable)])
        shards = [path for path in folder.glob("model-*.safetensors")] + [folder / _INDEX]
        for name in (_WEIGHTS, "config.json"):
            os.replace(staging / name, folder / name)
        for path in shards:
            path.unlink(missing_ok=True)
    finally:
        shutil.rmtree(staging)
    return None


def _wrapper_lines(portable: Portable) -> Lines:
    classes = ["AutoModel"] if portable.labels is None else ["AutoModel", "AutoModelForImageClassification"]
    load = 'encoder = AutoModel.from_pretrained("FOLDER").eval()\n'
    call = "with torch.inference_mode():\n    features = encoder(pixel_values).pooler_output\n"
    if portable.labels is not None:
        load += 'classifier = AutoModelForImageClassification.from_pretrained("FOLDER").eval()\n'
        call += "    logits = classifier(pixel_values).logits\n"
    return processor_lines(portable, Lines("transformers", "transformers timm", tuple(classes), load, "", call))


def processor_lines(portable: Portable, lines: Lines) -> Lines:
    """Completes lines of transformers, whose imports are names yet, by its image processor where that is the same."""
    names = lines.imports
    if portable.takes_rgb:
        names = ("AutoImageProcessor", *names)
        load = 'processor = AutoImageProcessor.from_pretrained("FOLDER")\n'
        prepare = 'pixel_values = processor(image, return_tensors="pt").pixel_values\n'
        lines = lines._replace(load=load + lines.load, prepare=prepare)
    return portable.with_images(
        lines._replace(imports=("import torch", f"from transformers import {', '.join(names)}"))
    )

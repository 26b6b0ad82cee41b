"""ONNX: the graph of any encoder, for batches of any size; images have the side that it was pretrained on."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_ssl_or.errors import InputError
from hf_ssl_or.hub.export.model import Lines, Portable, write_json


class _Outputs(nn.Module):
    """Features of images, and logits where there is a head, as a tuple."""

    def __init__(self, portable: Portable) -> None:
        super().__init__()
        self.encoder: Any = portable.encoder
        self.classifier: Any = None if portable.labels is None else portable.model.classifier

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        features_BF = self.encoder(pixel_values).pooler_output
        return (features_BF,) if self.classifier is None else (features_BF, self.classifier(features_BF))


def write(portable: Portable, folder: Path) -> list[Lines]:
    """Writes `model.onnx` with the input `pixel_values` and the outputs `features` and, of a head, `logits`.

    Raises:
        InputError: The packages of the extra `onnx` are not installed.
    """
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise InputError(f"--to onnx: {error.name} is not installed; pip install 'hf-ssl-or[onnx]'") from error
    size, channels = portable.config.image_size, portable.config.num_channels
    outputs = ["features"] if portable.labels is None else ["features", "logits"]
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            _Outputs(portable).eval(),
            (torch.zeros(2, channels, size, size),),
            folder / "model.onnx",
            input_names=["pixel_values"],
            output_names=outputs,
            dynamic_shapes={"pixel_values": {0: torch.export.Dim("batch")}},
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    write_json(folder / "config.json", portable.describe())
    return [_lines(portable, outputs)]


def _lines(portable: Portable, outputs: list[str]) -> Lines:
    p = portable.preprocessing
    side, names = p.image_size, "(features,)" if outputs == ["features"] else ", ".join(outputs)
    lines = Lines(
        library="ONNX Runtime",
        packages="onnxruntime pillow" if portable.takes_rgb else "onnxruntime pillow torch torchvision",
        imports=("import numpy as np", "import onnxruntime") if portable.takes_rgb else ("import onnxruntime",),
        load='session = onnxruntime.InferenceSession("FOLDER/model.onnx", providers=["CPUExecutionProvider"])\n',
        prepare=(
            f"mean = np.array({list(p.mean)}, dtype=np.float32)\n"
            f"std = np.array({list(p.std)}, dtype=np.float32)\n"
            "shorter = min(image.size)\n"
            f"size = [{p.resize_to} * side // shorter for side in image.size]\n"
            f"image = image.resize(size, Image.Resampling.{p.interpolation.upper()})\n"
            f"left, top = (round((side - {side}) / 2) for side in size)\n"
            f"pixels = np.asarray(image.crop((left, top, left + {side}, top + {side})), dtype=np.float32) / 255\n"
            "pixel_values = ((pixels - mean) / std).transpose(2, 0, 1)[None]\n"
        ),
        call=f'{names} = session.run(None, {{"pixel_values": pixel_values}})\n',
    )
    return portable.with_images(lines, into="pixel_values = preprocessing.tensor({})[None].numpy()\n")

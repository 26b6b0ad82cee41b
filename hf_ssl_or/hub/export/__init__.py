"""Writes an encoder for another library, checks it there, and only then gives it its name."""

from __future__ import annotations

import importlib
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hf_ssl_or.errors import InputError, unknown
from hf_ssl_or.hub.export.model import Lines, Portable, read_portable
from hf_ssl_or.hub.export.pixels import photo_name, pixel_table
from hf_ssl_or.hub.verify import at, compare

TARGETS = ("timm", "transformers", "torchvision", "onnx")  # each is a module of this package
_PICTURES = 4


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What an export wrote.

    Attributes:
        folder: Where.
        differences: For each library that loads it, the largest difference of features, logits and prepared pixels.
        lines: How each of them loads it.
    """

    folder: Path
    differences: dict[str, dict[str, float]]
    lines: list[Lines]

    def describe(self) -> str:
        """Says what was written and how far each library is from the encoder."""
        said = [f"wrote {self.folder}: README.md there shows the lines that load it"]
        for library, differences in self.differences.items():
            far = ", ".join(f"{what} {value:.1e}" for what, value in sorted(differences.items()))
            said.append(f"  checked with {library}, largest difference: {far}")
        return "\n".join(said)


def export(source: str | Path, to: str, output: str | Path | None = None) -> Exported:
    """Writes an encoder or a classifier so that another library loads it with no code of this package.

    The files are written beside the output, loaded by the other library in a fresh process without this package, and
    compared on noise and on image files; a folder that differs never appears under the output's name.

    Args:
        source: A run's folder, an encoder's folder, or a Hub id.
        to: The library, one of `TARGETS`.
        output: The folder to make, new or empty; None takes `<name of the source>-<to>`.

    Raises:
        InputError: The library cannot express the encoder, or features or logits differ by more than 1e-5.
    """
    if to not in TARGETS:
        raise unknown("library", to, TARGETS)
    portable = read_portable(source)
    folder = Path(output) if output is not None else Path(f"{portable.name}-{to}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder}: is not empty; give another --output")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as name:
        draft = Path(name) / "draft"
        draft.mkdir()
        lines = importlib.import_module(f"hf_ssl_or.hub.export.{to}").write(portable, draft)
        portable.write_conversion(draft)
        differences = compare(portable, draft, lines, _pictures(Path(source)))
        (draft / "README.md").write_text(_readme(portable, folder, lines, differences), encoding="utf-8")
        draft.rename(folder)
    return Exported(folder=folder, differences=differences, lines=lines)


def _pictures(run: Path) -> list[np.ndarray] | None:
    """Takes images of the run's own data where the run kept some, (H, W, 3) uint8 each."""
    path = run / "neighbors.npz"
    if not path.is_file():
        return None
    with np.load(path) as file:
        images_QPCHW = file["images"]
    return list(images_QPCHW[:_PICTURES, 0].transpose(0, 2, 3, 1))


def _readme(portable: Portable, folder: Path, every: list[Lines], differences: dict[str, dict[str, float]]) -> str:
    config, origin = portable.config, portable.config.pretraining or {}
    trained = f", pretrained by {origin['method']} on {origin['dataset']}" if "method" in origin else ""
    parts = [
        f"# {folder.resolve().name}\n",
        f"A {config.architecture} for images of {config.image_size} x {config.image_size} pixels that gives "
        f"{config.hidden_size} features{trained}.\n",
        f"{pixel_table(portable.preprocessing)}\n",
    ]
    for lines in every:
        worst = max(differences[lines.library].get(what, 0.0) for what in ("features", "logits"))
        parts.append(
            f"## By {lines.library}\n\n    pip install {lines.packages}\n\n"
            f"```python\n{_program(portable, folder, lines)}```\n\n"
            f"Run as it stands when this folder was written: largest difference {worst:.1e}.\n"
        )
    return "\n".join(parts)


def _program(portable: Portable, folder: Path, lines: Lines) -> str:
    imports = sorted(set(lines.imports), key=lambda line: (line.startswith("from"), line.lower()))
    load, prepare = at(lines.load, FOLDER=folder.name), at(lines.prepare, PHOTO=photo_name(portable.preprocessing))
    return "\n".join(("\n".join(imports) + "\n", load, prepare, lines.call))

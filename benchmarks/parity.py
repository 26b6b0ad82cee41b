"""One set of weights, loaded by every library: how far are its features from those of the encoder that was saved?

    python benchmarks/parity.py --machine cpu --threads 2

Each encoder has running statistics and gains drawn at random, so that no layer is idle. Features of four images of
noise and four drawn ones are compared; each library runs in fresh processes that cannot import this package.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import AutoModel

from hf_ssl_or.errors import InputError
from hf_ssl_or.hub.export import TARGETS, export
from hf_ssl_or.hub.export.model import read_portable
from hf_ssl_or.hub.verify import REMOTE_CODE, compare
from hf_ssl_or.models.auto import create_encoder
from hf_ssl_or.models.image_conversion import Preprocessing
from hf_ssl_or.models.image_processing_ssl import build_image_processor

ENCODERS = {
    "ResNet-18": ("resnet18", {}),
    "ResNet-18, small stem": ("resnet18", {"stem": "small"}),
    "ResNet-18, slim": ("resnet18", {"channels": [32, 64, 128, 128], "image_size": 32}),
    "ResNet-50": ("resnet50", {}),
    "WideResNet-28-2": ("wide_resnet28_2", {}),
    "ViT-tiny": ("vit_tiny", {}),
    "ViT-small": ("vit_small", {}),
    "ViT-small, average pooling, 32 px": ("vit_small", {"image_size": 32, "patch_size": 4, "pooling": "avg"}),
}
COLUMNS = {"timm": "timm", "transformers": "transformers", "torchvision": "torchvision", "onnx": "ONNX Runtime"}


def make(folder: Path, name: str, options: dict) -> torch.nn.Module:
    torch.manual_seed(0)
    model = create_encoder(name, **options)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
            module.weight.data.uniform_(0.5, 1)
    model.save_pretrained(folder)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    how = Preprocessing(image_size=model.config.image_size, mean=mean, std=std)
    build_image_processor(how).save_pretrained(folder)
    return model.eval()


@torch.no_grad()
def reloaded(model: torch.nn.Module, folder: Path) -> float:
    size = model.config.image_size
    images_BCHW = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(0))
    found_BF = AutoModel.from_pretrained(folder)(images_BCHW).pooler_output
    return float((found_BF - model(images_BCHW).pooler_output).abs().max())


def row(name: str, options: dict) -> dict[str, float | str]:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "net"
        model = make(folder, name, options)
        found: dict[str, float | str] = {"ours, reloaded": reloaded(model, folder)}
        found["ours, remote code"] = compare(read_portable(folder), folder, [REMOTE_CODE])["transformers"]["features"]
        for target in TARGETS:
            try:
                differences = export(folder, target, Path(temporary) / target).differences
                found[target] = differences[COLUMNS[target]]["features"]
                if target == "timm":
                    found["transformers, by timm"] = differences["transformers"]["features"]
            except InputError as error:
                found[target] = re.sub(r".*cannot express it: (.*); load it with.*", r"\1", str(error))
    return found


def table(rows: dict[str, dict[str, float | str]]) -> str:
    columns = ["ours, reloaded", "ours, remote code", "timm", "transformers, by timm", *TARGETS[1:]]
    lines = [f"| | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
    notes: list[str] = []
    for name, found in rows.items():
        cells = []
        for column in columns:
            value = found.get(column, "-")
            if isinstance(value, float):
                cells.append(f"{value:.0e}" if value else "0")
            elif value == "-":
                cells.append("-")
            else:
                notes.append(value) if value not in notes else None
                cells.append(f"no ({notes.index(value) + 1})")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(f"({i + 1}) {note}  " for i, note in enumerate(notes))])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--machine", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows: dict[str, dict[str, float | str]] = {}
    for title, (name, options) in ENCODERS.items():
        rows[title] = row(name, options)
        print(title, rows[title], flush=True)
        write(rows, arguments)
    print(table(rows))


def write(rows: dict[str, dict[str, float | str]], arguments: argparse.Namespace) -> None:
    packages = ("torch", "torchvision", "timm", "transformers", "onnxruntime")
    record = {
        "cpu": platform.processor() or platform.machine(),
        **vars(arguments),
        "versions": {name: version(name) for name in packages},
        "largest_difference_of_features": rows,
    }
    out = Path(__file__).parent / "results" / arguments.machine / "parity.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()

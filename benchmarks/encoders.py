"""Encoders of timm, transformers, torchvision and one's own: trained, resumed, measured, saved, loaded elsewhere.

    python benchmarks/encoders.py

Each encoder is made small, trained for three steps with BYOL and soft orthogonality, trained again with a stop after
two, and saved. A process that cannot import this package loads it with the lines that its library takes. A figure is
the largest difference: of weights after the resumed run, of features in the other process.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
import torchvision
import transformers
from own_net import OwnNet
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel

from hf_ssl_or import SSLTrainer, SSLTrainingArguments, create_encoder
from hf_ssl_or.hub.export.model import read_portable
from hf_ssl_or.hub.export.timm import write as write_timm
from hf_ssl_or.methods import BYOL
from hf_ssl_or.models.adapters import EncoderAdapter

SIDE = 32
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
PATCHES = {"image_size": SIDE, "patch_size": 8}
STAGES = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "image_size": SIDE}
TIMM: dict[str, dict[str, Any]] = {  # of twelve families, at a size that a test can pay
    "convnext_atto": {"dims": [8, 16, 24, 32], "depths": [1, 1, 1, 1]},
    "densenet121": {"growth_rate": 8, "block_config": [1, 1, 1, 1]},
    "eva02_tiny_patch14_224": {"image_size": 28, "depth": 2, "embed_dim": 48, "num_heads": 3},
    "gmlp_ti16_224": {},
    "mobilenetv3_small_050": {},
    "mobilevitv2_050": {},
    "regnetx_002": {},
    "resnetv2_18": {"layers": [1, 1, 1, 1]},
    "starnet_s1": {},
    "swin_tiny_patch4_window7_224": {"embed_dim": 24, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 3, 4]},
    "test_efficientnet": {},
    "xcit_nano_12_p16_224": {},
}
TRANSFORMERS: dict[str, dict[str, Any]] = {
    "Dinov2Config": {**SMALL, **PATCHES},
    "DINOv3ViTConfig": {**SMALL, **PATCHES},
    "DINOv3ConvNextConfig": STAGES,
    "ConvNextV2Config": STAGES,
    "SwinConfig": {
        **{"image_size": SIDE, "patch_size": 2, "embed_dim": 16, "window_size": 4},
        **{"depths": [1, 1], "num_heads": [2, 2]},
    },
    "ViTMAEConfig": {**SMALL, **PATCHES},
    "SiglipVisionConfig": {**SMALL, **PATCHES},
    "CLIPVisionConfig": {**SMALL, **PATCHES},
    "BeitConfig": {**SMALL, **PATCHES},
}
TORCHVISION = ("resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5")
COLUMNS = {
    "name": ("encoder", ""),
    "features": ("features", "d"),
    "trained": ("trains 3 steps", ""),
    "resumed": ("resumed", ""),
    "stages": ("stages seen", "d"),
    "errors": ("weights with an OR error", "d"),
    "transformers": ("transformers", ""),
    "timm": ("timm", ""),
    "lines": ("own lines", ""),
    "notes": ("left out", ""),
}
LOADING = """
import json, sys
sys.modules["hf_ssl_or"] = None
import torch
from safetensors.torch import load_file, save_file
torch.set_num_threads(1)
found = {}
for key, (images, lines) in json.loads(sys.argv[1]).items():
    scope = {"pixel_values": load_file(images)["x"]}
    try:
        exec("\\n".join(lines), scope)
        found[key] = scope["features"].contiguous().clone()
    except Exception as error:
        print(json.dumps([key, " ".join(str(error).split())[:150]]))
save_file(found, sys.argv[2])
"""


def encoders() -> dict[str, Callable[[], nn.Module]]:
    """Returns what makes each encoder, by its name in the table."""
    made: dict[str, Callable[[], nn.Module]] = {}
    for name, slim in TIMM.items():
        options = {"image_size": SIDE, **slim}
        made[f"timm {name}"] = lambda name=name, options=options: create_encoder(name, **options)
    for name, options in TRANSFORMERS.items():
        made[f"transformers {name.removesuffix('Config')}"] = lambda name=name, options=options: AutoModel.from_config(
            getattr(transformers, name)(**options)
        )
    for name in TORCHVISION:
        made[f"torchvision {name}"] = torchvision.models.get_model_builder(name)
    made["own OwnNet"] = OwnNet
    return made


def images() -> list[np.ndarray]:
    """Returns 32 images of smooth noise."""
    x = np.random.default_rng(0).normal(size=(32, 8, 8, 3)).repeat(6, 1).repeat(6, 2)
    return [(255 / (1 + np.exp(-picture))).astype(np.uint8) for picture in x]


def trainer(make: Callable[[], nn.Module], folder: Path) -> SSLTrainer:
    torch.manual_seed(0)
    return SSLTrainer(
        model=BYOL(make(), projector_dim=32),
        args=SSLTrainingArguments(
            output_dir=str(folder), max_steps=3, batch_size=8, save_steps=2, monitor_images=16, device="cpu"
        ),
        train_dataset=images(),
        views=2,
        orthogonality={"penalty": "so", "weight": 1e-3},
    )


def lines_of(encoder: Any, folder: Path) -> dict[str, list[str]]:
    """Returns the lines by which each library loads what was saved."""
    if isinstance(encoder, EncoderAdapter):
        own = "transformers" if encoder.description["library"] == "transformers" else "lines"
        return {own: encoder.loading_lines(folder)}
    portable = folder.parent / f"{folder.name}-timm"
    portable.mkdir()
    write_timm(read_portable(folder), portable)
    call = ["with torch.inference_mode():"]
    wrapper = f'model = AutoModel.from_pretrained("{portable}").eval()'
    return {
        "timm": [
            "import timm, torch",
            f'model = timm.create_model("local-dir:{portable}", pretrained=True).eval()',
            *call,
            "    features = model(pixel_values)",
        ],
        "transformers": [
            "import torch",
            "from transformers import AutoModel",
            wrapper,
            *call,
            "    features = model(pixel_values).pooler_output",
        ],
    }


def furthest(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return max(float((a[key].double() - b[key].double()).abs().max()) for key in a if a[key].numel())


def row_of(name: str, make: Callable[[], nn.Module], root: Path) -> tuple[common.Row, dict[str, Any]]:
    """Trains, stops and resumes an encoder; returns its row and the lines that must give its features."""
    row: common.Row = {
        "name": name,
        "transformers": "no class",
        "timm": "no net of timm",
        "lines": "as by its library",
    }
    folder, again = root / name.replace(" ", "-"), root / f"{name.replace(' ', '-')}-again"
    whole = trainer(make, folder)
    row["features"] = whole.encoder.config.hidden_size
    whole.train()
    losses = [line["loss"] for line in whole.log_history if "loss" in line]
    row["trained"] = "yes" if losses and np.isfinite(losses).all() else "no"
    stopped = trainer(make, again)
    shutil.copytree(folder / "checkpoints" / "step-2", again / "checkpoints" / "step-2")
    shutil.copy(folder / "recipe.yaml", again / "recipe.yaml")
    stopped.train(resume_from_checkpoint=True)
    row["resumed"] = f"{furthest(whole.method.state_dict(), stopped.method.state_dict()):.0e}"
    spectra = sorted((folder / "spectra").glob("*.npz"))[-1]
    with np.load(spectra) as arrays:
        row["stages"] = sum(key.startswith("hidden/") for key in arrays.files)
    row["errors"] = len(whole.regularizer.errors())
    encoder: Any = whole.encoder.eval()
    config = encoder.config
    shape = (4, config.num_channels, config.image_size or SIDE, config.image_size or SIDE)
    x_BCHW = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        features = encoder(x_BCHW).pooler_output.clone()
    save_file({"x": x_BCHW, "features": features}, folder / "features.safetensors")
    row["notes"] = "; ".join(getattr(encoder, "left_out", []))
    checks = {
        f"{name}|{by}": (str(folder / "features.safetensors"), lines)
        for by, lines in lines_of(encoder, folder / "encoder").items()
    }
    return row, checks


def check(rows: list[common.Row], checks: dict[str, Any], root: Path) -> None:
    """Loads all encoders in a process without this package, and notes how far their features are from ours."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", LOADING, json.dumps(checks), str(root / "found.safetensors")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=root, check=True)
    reasons = dict(json.loads(line) for line in done.stdout.splitlines() if line.startswith("["))
    found = load_file(root / "found.safetensors")
    by_name = {row["name"]: row for row in rows}
    for key, (file, _) in checks.items():
        name, by = key.split("|")
        ours = load_file(file)["features"]
        difference = reasons.get(key, "other features")
        if key in found and found[key].shape == ours.shape:
            difference = f"{float((found[key] - ours).abs().max()):.0e}"
        by_name[name][by] = difference


def main() -> None:
    args = common.parser(__doc__ or "", seconds=0).parse_args()
    common.prepare(args)
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    rows, checks = [], {}
    made = encoders()
    if args.quick:
        made = {name: make for i, (name, make) in enumerate(made.items()) if i % 6 == 0}
    with tempfile.TemporaryDirectory() as folder:
        for name, make in made.items():
            said = io.StringIO()
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                row, more = row_of(name, make, Path(folder))
            rows.append(row)
            checks |= more
            print(name, row["trained"], row["resumed"], flush=True)
        check(rows, checks, Path(folder))
    table = common.Table(COLUMNS)
    for row in rows:
        table.add(row)
    common.write(__file__, args, packages=("timm", "transformers", "torchvision"), rows=rows)


if __name__ == "__main__":
    main()

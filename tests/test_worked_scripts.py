"""The worked scripts of docs/ run as a user would run them, on real files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageClassification, pipeline

from hf_ssl_or.data.shapes import SHAPES, ShapesSource
from hf_ssl_or.models.auto import create_encoder
from hf_ssl_or.models.image_conversion import Preprocessing
from hf_ssl_or.models.image_processing_ssl import build_image_processor
from tests.voc import SQUARE, write_annotation, write_voc

DOCS = Path(__file__).resolve().parent.parent / "docs"
KINDS = ["crescent", "disk", "triangle"]


def run(script: str, *arguments: object) -> dict:
    command = [sys.executable, str(DOCS / script), *map(str, arguments)]
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, env=alone)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def refusal(*arguments: object) -> str:
    """Runs detection.py, which refuses, and returns the line that says why."""
    command = [sys.executable, str(DOCS / "detection.py"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 2
    return done.stderr.splitlines()[-1]


def save_encoder(folder: Path, channels: list[int], mean: float, std: float) -> Path:
    torch.manual_seed(0)
    options = {"layers": [1, 1, 1, 1], "zero_init_last": False}
    create_encoder("resnet18", channels=channels, image_size=32, **options).save_pretrained(folder)
    how = Preprocessing(image_size=32, mean=(mean,) * 3, std=(std,) * 3)
    build_image_processor(how).save_pretrained(folder)
    return folder


def write_images(folder: Path) -> list[tuple[Path, str]]:
    """Writes shapes of three kinds as PNG files, a folder for each kind, and lists those of the test split."""
    written = []
    for split, seed, n in (("train", 0, 1200), ("test", 1, 400)):
        source = ShapesSource(n, seed=seed)
        for i, label in enumerate(source.labels):
            kind = list(SHAPES)[label]
            if kind in KINDS:
                path = folder / split / kind / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(source.read(i)).save(path)
                written.append((path, kind))
    return [(path, kind) for path, kind in written if path.parent.parent.name == "test"]


@pytest.mark.slow
def test_fine_tuning_learns_and_gives_a_classifier(tmp_path: Path) -> None:
    test = write_images(tmp_path / "images")
    encoder = save_encoder(tmp_path / "encoder", [16, 32, 32, 32], 0.5, 0.25)
    options = ("--epochs", 15, "--batch-size", 32, "--learning-rate", 5e-3, "--output", tmp_path / "tuned")
    result = run("fine_tune.py", encoder, tmp_path / "images", *options)
    assert result["accuracy"] > 0.6  # chance is 0.33
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "tuned")
    assert model.config.id2label == dict(enumerate(KINDS))
    classify = pipeline("image-classification", model=str(tmp_path / "tuned"))
    answers = classify([str(path) for path, _ in test])
    correct = sum(answer[0]["label"] == kind for answer, (_, kind) in zip(answers, test, strict=True))
    assert correct / len(test) == pytest.approx(result["accuracy"], abs=0.01)


@pytest.mark.slow
def test_detection_on_real_images(real_data: Path, tmp_path: Path) -> None:
    """Too short to learn much: the boxes of real images go through, and the precisions are in order."""
    pytest.importorskip("torchmetrics")
    pytest.importorskip("pycocotools")
    encoder = save_encoder(tmp_path / "encoder", [8, 8, 16, 16], 0.06, 0.07)
    options = "--epochs 1 --limit 8 --batch-size 4 --width 16 --image-size 160 --smallest-anchor 8"
    result = run("detection.py", encoder, real_data / "cellbody_detection", *options.split())
    assert 0 <= result["AP"] <= result["AP50"] <= 100
    assert result["encoder"] == str(encoder) and not result["from_scratch"]


@pytest.mark.slow
def test_c4_detection_on_voc(tmp_path: Path) -> None:
    """Two steps with the published proposals; a test without objects that count; what is refused, in one line each."""
    pytest.importorskip("torchmetrics")
    pytest.importorskip("pycocotools")
    encoder = save_encoder(tmp_path / "encoder", [8, 8, 16, 16], 0.5, 0.25)
    voc = write_voc(tmp_path, trainval=["000001", "000002", "000003"], test=["000004"])
    options = [
        "--voc",
        tmp_path,
        "--head",
        "c4",
        "--image-size",
        64,
        96,
        "--max-steps",
        2,
        "--json",
        tmp_path / "a.json",
    ]
    result = run("detection.py", encoder, *options, "--batch-size", 2)
    assert 0 <= result["AP"] <= result["AP50"] <= 100 and 0 <= result["AP75"] <= result["AP50"]
    assert result == json.loads((tmp_path / "a.json").read_text())
    assert (result["steps"], result["learning_rate"], result["batch_size"], result["head"]) == (24_000, 0.01, 2, "c4")
    write_annotation(voc / "Annotations" / "000004.xml", [("dog", 1, SQUARE[2])])  # difficult
    result = run("detection.py", encoder, *options, "--batch-size", 2)
    assert (result["AP"], result["AP50"], result["AP75"]) == (None, None, None)
    assert "its folder does not exist" in refusal(encoder, "--voc", tmp_path, "--json", tmp_path / "none" / "a.json")
    vit = tmp_path / "vit"
    create_encoder("vit_tiny", image_size=32, patch_size=8, depth=1).save_pretrained(vit)
    assert "--head c4: takes a ResNet" in refusal(vit, *options, "--batch-size", 2)
    assert "--width: no setting of --head c4" in refusal(encoder, *options, "--width", 16)

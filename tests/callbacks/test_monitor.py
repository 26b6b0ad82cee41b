"""What a look at the encoder measures and writes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from hf_ssl_or.callbacks.monitor import Monitor
from hf_ssl_or.data.arguments import DataArguments
from hf_ssl_or.data.loading import load_images
from hf_ssl_or.evaluation.collapse import collapse_report
from hf_ssl_or.evaluation.collapse.spectra import normalized_eigenvalues
from hf_ssl_or.evaluation.collapse.weight_spectra import weight_spectra
from hf_ssl_or.evaluation.features import extract_features
from hf_ssl_or.models.auto import create_encoder
from hf_ssl_or.training.arguments import SSLTrainingArguments


@pytest.fixture(scope="module")
def encoder() -> nn.Module:
    torch.manual_seed(0)
    return create_encoder("resnet18", stem="small", image_size=16, channels=[8, 8, 8, 8]).eval()


@pytest.fixture
def monitor() -> Monitor:
    images = load_images(DataArguments(dataset="shapes", shapes_train=90, shapes_test=10, image_size=16), "train")
    return Monitor(images, None, SSLTrainingArguments(monitor_images=60), torch.device("cpu"))


def test_spectra_are_written_under_their_names(monitor: Monitor, encoder: nn.Module, tmp_path: Path) -> None:
    values = monitor.evaluate(encoder, tmp_path / "spectra" / "step-1.npz")
    features = extract_features(encoder, monitor.sample, device="cpu", progress=False)
    report = collapse_report(features)
    for name, value in values.items():
        if name != "orthogonality_error":
            assert value == pytest.approx(report[name], rel=1e-5), name
    assert {"rankme", "alpha_req", "unit_std", "dead_dimensions"} <= values.keys()
    json.dumps(values, allow_nan=False)
    with np.load(tmp_path / "spectra" / "step-1.npz") as spectra:
        stages = ["stem", "stage1", "stage2", "stage3", "stage4"]
        weights = weight_spectra(encoder)
        assert list(spectra) == [
            "input",
            *(f"hidden/{stage}" for stage in stages),
            "representation",
            *(f"weight/{name}" for name in weights),
        ]
        assert len(weights) == 4 and spectra["input"].shape == (3 * 16 * 16,)
        for spectrum in spectra.values():
            assert spectrum[0] == 1 and (np.diff(spectrum) <= 0).all() and (spectrum >= 0).all()
        np.testing.assert_allclose(spectra["representation"], normalized_eigenvalues(features), rtol=1e-3, atol=1e-6)
        np.testing.assert_array_equal(spectra[f"weight/{next(iter(weights))}"], next(iter(weights.values())))


def test_the_input_is_measured_once(
    monitor: Monitor, encoder: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monitor.evaluate(encoder, tmp_path / "step-1.npz")
    monkeypatch.setattr("hf_ssl_or.callbacks.monitor.input_spectrum", lambda images: pytest.fail("measured again"))
    monitor.evaluate(encoder, tmp_path / "step-2.npz")
    with np.load(tmp_path / "step-1.npz") as first, np.load(tmp_path / "step-2.npz") as second:
        np.testing.assert_array_equal(first["input"], second["input"])

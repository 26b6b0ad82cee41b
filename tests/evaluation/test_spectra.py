"""Streaming moments against numpy, spectra against the definition, and which weights are drawn."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from torch import nn

from hf_ssl_or.errors import InputError
from hf_ssl_or.evaluation.spectra import CovarianceAccumulator, feature_spectrum, select_weights, weight_spectra


def features(n: int = 500, d: int = 12) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, d, generator=generator, dtype=torch.float64) * torch.linspace(0.1, 2, d).double() + 1000


def accumulate(batches: tuple[torch.Tensor, ...]) -> CovarianceAccumulator:
    accumulator = CovarianceAccumulator(batches[0].shape[1])
    for batch in batches:
        accumulator.update(batch)
    return accumulator


@pytest.mark.parametrize("sizes", [500, [1, 2, 3, 494], 37])
def test_streaming_equals_numpy(sizes: int | list[int]) -> None:
    z = features()
    stream = accumulate(z.split(sizes))
    assert stream.count == 500
    np.testing.assert_allclose(stream.mean_D, z.numpy().mean(0), rtol=1e-13)
    covariance = np.cov(z.numpy().T)
    np.testing.assert_allclose(stream.covariance_DD, covariance, rtol=1e-8, atol=1e-12)  # mean 1000 does not cancel
    np.testing.assert_allclose(stream.second_moment_DD, z.numpy().T @ z.numpy() / 500, rtol=1e-12)
    np.testing.assert_allclose(stream.eigenvalues(), np.linalg.eigvalsh(covariance)[::-1], rtol=1e-8)


def test_rounding_is_no_direction() -> None:
    z = torch.randn(3000, 5, dtype=torch.float64) @ torch.randn(5, 100, dtype=torch.float64)
    assert int((CovarianceAccumulator.of(z).eigenvalues() > 0).sum()) == 5
    assert int((CovarianceAccumulator.of(z + 50).eigenvalues() > 0).sum()) == 5
    assert int((CovarianceAccumulator.of(z + 50).eigenvalues(centred=False) > 0).sum()) == 6
    assert int((CovarianceAccumulator.of(torch.randn(20, 100)).eigenvalues() > 0).sum()) == 19


def test_bad_streams_are_refused() -> None:
    accumulator = CovarianceAccumulator(4)
    with pytest.raises(InputError, match="no images"):
        accumulator.eigenvalues()
    with pytest.raises(InputError, match=r"\(images, 4\)"):
        accumulator.update(torch.zeros(3, 5))
    accumulator.update(torch.full((3, 4), torch.inf))
    with pytest.raises(InputError, match="NaN or infinite"):
        accumulator.eigenvalues()


def test_feature_spectrum_is_normalised() -> None:
    z = features()
    eig = np.linalg.eigvalsh(np.cov(z.numpy().T))[::-1]
    np.testing.assert_allclose(feature_spectrum(z), eig / eig[0], rtol=1e-8)
    assert not feature_spectrum(torch.ones(10, 3)).any()


def test_resnets_show_the_last_convolution_of_each_stage() -> None:
    class Wrapped(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.encoder = timm.create_model(name, num_classes=0)

    stages = [f"encoder.layer{i}" for i in (1, 2, 3, 4)]
    r18, r50 = select_weights(Wrapped("resnet18")), select_weights(timm.create_model("resnet50", num_classes=0))
    assert list(r18) == [f"{stage}.1.conv2.weight" for stage in stages]
    assert list(r50) == [f"layer{i}.{n}.conv3.weight" for i, n in ((1, 2), (2, 3), (3, 5), (4, 2))]
    assert r18["encoder.layer4.1.conv2.weight"].shape == (512, 512 * 9)


def test_transformers_show_first_middle_and_last_block() -> None:
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=5, img_size=32)
    assert list(select_weights(vit)) == [f"blocks.{i}.{n}.weight" for i in (0, 2, 4) for n in ("attn.proj", "mlp.fc2")]


def test_weight_spectra_take_inputs_as_samples() -> None:
    encoder = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 4))
    spectra = weight_spectra(encoder)
    assert list(spectra) == ["0.weight", "2.weight"]
    eig = np.linalg.eigvalsh(np.cov(encoder[0].weight.detach().double().flatten(1).numpy()))[::-1]
    np.testing.assert_allclose(spectra["0.weight"], eig / eig[0], rtol=1e-10)

"""Features of images against a plain loop; augmentations keyed by image; one process against two."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from processes import run_all
from torch import Tensor, nn

from hf_ssl_or.data.augmentation_sampling import ViewGroup
from hf_ssl_or.data.image_dataset import ImageSet
from hf_ssl_or.data.views import clean_views, render_views, sample_parameters
from hf_ssl_or.errors import InputError
from hf_ssl_or.evaluation.collapse.spectra import CovarianceAccumulator
from hf_ssl_or.evaluation.features import extract_features, pixel_features
from hf_ssl_or.models.image_conversion import Preprocessing
from hf_ssl_or.randomness import hashed_seed
from hf_ssl_or.structures import ViewSpec

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
NORMAL = {"device": "cpu", "progress": False}
VIEWS = (ViewSpec(), ViewSpec(crop_scale=(0.5, 1.0), jitter=0))


class Encoder(nn.Module):
    """Two layers, with a batch normalization and a dropout that betray the training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(2))
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            nn.init.normal_(parameter, generator=generator)

    def forward(self, pixel_values: Tensor) -> SimpleNamespace:
        return SimpleNamespace(pooler_output=self.net(pixel_values).mean(2))


def noise(n: int, side: int) -> Tensor:
    """Pixels (n, side, side, 3)."""
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(256, (n, 3, side, side), dtype=torch.uint8, generator=generator)
    return pixels.permute(0, 2, 3, 1).contiguous()


def image_set(n: int = 23, side: int = 12, labels: bool = True, size: int | None = None) -> ImageSet:
    return ImageSet.from_arrays(
        noise(n, side).numpy(),
        torch.arange(n) % 3 if labels else None,
        class_names=["a", "b", "c"] if labels else None,
        name="noise",
        preprocessing=Preprocessing(image_size=size or side, mean=MEAN, std=STD),
    )


def plain_loop(images: ImageSet, num_views: int, seed: int = 0) -> Tensor:
    encoder, rows, how = Encoder().eval(), [], images.preprocessing
    with torch.no_grad():
        for i, image in enumerate(noise(len(images), 12).split(1)):
            row = [encoder(clean_views(image, how)).pooler_output]
            for view in range(num_views - 1):
                key = hashed_seed("evaluation", seed)
                group = ViewGroup(specs=(VIEWS[view % 2],), size=12, seed=key, epoch=0, first_view=view)
                drawn = sample_parameters(group, np.array([i]), original_size=(12, 12))
                row.append(encoder(render_views(image, drawn, how)[0]).pooler_output)
            rows.append(torch.stack(row).mean(0))
    return torch.cat(rows)


def test_a_module_without_features_is_refused_in_one_line() -> None:
    with pytest.raises(InputError, match=r"^a Flatten returns no pooler_output .*adapt_encoder\(module\)$"):
        extract_features(nn.Flatten(), image_set(), **NORMAL)


@pytest.mark.parametrize("num_views", [1, 4])
@pytest.mark.parametrize("batch_size", [5, 23, 512])
def test_features_are_those_of_a_plain_loop(num_views: int, batch_size: int) -> None:
    images = image_set()
    features = extract_features(
        Encoder(), images, **NORMAL, batch_size=batch_size, num_views=num_views, views=VIEWS if num_views > 1 else ()
    )
    assert features.dtype == torch.float32 and features.shape == (23, 6) and not features.requires_grad
    torch.testing.assert_close(features, plain_loop(images, num_views), rtol=1e-4, atol=1e-5)


def test_the_seed_draws_the_augmented_views() -> None:
    runs = [extract_features(Encoder(), image_set(), **NORMAL, num_views=3, views=VIEWS, seed=s) for s in (0, 0, 1)]
    assert torch.equal(runs[0], runs[1]) and not torch.allclose(runs[0], runs[2])


def test_images_are_resized_to_what_the_encoder_takes() -> None:
    images, how = image_set(size=20), Preprocessing(image_size=20, mean=MEAN, std=STD)
    squares = torch.from_numpy(np.stack([how.square(pixels.numpy()) for pixels in noise(23, 12)]))
    expected = Encoder().eval()(clean_views(squares, how)).pooler_output
    torch.testing.assert_close(extract_features(Encoder(), images, **NORMAL), expected.detach())


def test_the_encoder_keeps_its_modes_and_statistics() -> None:
    encoder = Encoder().train()
    encoder.net[1].eval()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    extract_features(encoder, image_set(), **NORMAL)
    assert encoder.training and encoder.net[3].training and not encoder.net[1].training
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())


def test_a_probe_can_be_trained_on_the_features() -> None:
    layer = nn.Linear(6, 2)
    layer(extract_features(Encoder(), image_set(), **NORMAL)).sum().backward()
    assert layer.weight.grad is not None


def test_bf16_gives_float32_near_the_same() -> None:
    full = extract_features(Encoder(), image_set(), **NORMAL)
    half = extract_features(Encoder(), image_set(), **NORMAL, mixed_precision="bf16")
    assert half.dtype == torch.float32 and not torch.equal(half, full)
    torch.testing.assert_close(half, full, rtol=0.05, atol=0.05)


def test_pixels_as_features() -> None:
    images = image_set()
    torch.testing.assert_close(pixel_features(images), noise(23, 12).permute(0, 3, 1, 2).reshape(23, 432) / 255)


def test_bad_input_is_refused() -> None:
    with pytest.raises(InputError, match="num_views=3: needs views"):
        extract_features(Encoder(), image_set(), **NORMAL, num_views=3)
    with pytest.raises(InputError, match="noise: no images"):
        extract_features(Encoder(), image_set(n=0), **NORMAL)

    class Broken(Encoder):
        def forward(self, pixel_values: Tensor) -> SimpleNamespace:
            features = super().forward(pixel_values).pooler_output
            return SimpleNamespace(pooler_output=torch.where(features[:, :1] > features[:, :1].median(), torch.nan, 1))

    with pytest.raises(InputError, match="features are NaN or infinite for 11 of 23 images"):
        extract_features(Broken(), image_set(), **NORMAL)


def _work(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    features = extract_features(Encoder(), image_set(), **NORMAL, batch_size=5, num_views=2, views=VIEWS)
    accumulator = CovarianceAccumulator(6)
    accumulator.update((features + 1000).split((7, 16))[rank])
    merged = accumulator.over_ranks()
    torch.save((features, merged.count, merged.mean_D, merged.scatter_DD), folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_processes_share_the_work_and_agree(tmp_path) -> None:
    run_all(_work, tmp_path, log=tmp_path / "log", count=2)
    expected = extract_features(Encoder(), image_set(), **NORMAL, num_views=2, views=VIEWS)
    whole = CovarianceAccumulator.of(expected + 1000)
    for rank in range(2):
        features, count, mean_D, scatter_DD = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)
        assert count == 23
        torch.testing.assert_close(mean_D, whole.mean_D, rtol=1e-6, atol=0)
        torch.testing.assert_close(scatter_DD, whole.scatter_DD, rtol=1e-3, atol=1e-3)

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

from hf_ssl_or.data import views as views_module
from hf_ssl_or.data.views import ViewParameters, clean_views, draw_parameters, render_views
from hf_ssl_or.structures import ViewSpec

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
FULL = ViewSpec(blur=0.5, solarize=0.3, hue=0.2)
CLEAN = ViewSpec(crop_scale=(1, 1), flip=0, jitter=0, grayscale=0)


def draw(specs: list[ViewSpec], n: int = 24, source_size: int = 20, **keys: int) -> ViewParameters:
    keys = {"seed": 1, "epoch": 2, **keys}
    return draw_parameters(specs, index_B=np.arange(100, 100 + n), source_size=source_size, **keys)


def some_images(n: int = 24, side: int = 20) -> torch.Tensor:
    """Smooth coloured images: noise would hide a wrong crop."""
    coarse = torch.rand(n, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.interpolate(coarse, (side, side), mode="bicubic", align_corners=False)
    return (smooth.clamp(0, 1) * 255).byte()


def reference_view(image: torch.Tensor, p: ViewParameters, v: int, b: int) -> torch.Tensor:
    """One view of one image by torchvision's functions, one after the other."""
    x = TF.resized_crop(image.double() / 255, *p.box_VB4[v, b].tolist(), size=[p.size, p.size], antialias=True)
    x = TF.horizontal_flip(x) if p.flip_VB[v, b] else x
    adjust = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)
    for kind in p.order_VB4[v, b] if p.jitter_VB[v, b] else ():
        x = adjust[kind](x, float(p.factor_VB4[v, b, kind]))
    x = TF.rgb_to_grayscale(x, num_output_channels=3) if p.grayscale_VB[v, b] else x
    if p.sigma_VB[v, b] > 0:
        x = TF.gaussian_blur(x, [2 * p.blur_radius + 1] * 2, [float(p.sigma_VB[v, b])] * 2)
    x = TF.solarize(x, float(p.threshold_VB[v, b])) if np.isfinite(p.threshold_VB[v, b]) else x
    return TF.normalize(x, MEAN, STD)


@pytest.mark.parametrize(
    "specs",
    [
        [FULL, FULL],
        [FULL, dataclasses.replace(FULL, hue=0.0, blur=0.0), CLEAN],
        [dataclasses.replace(FULL, size=8), dataclasses.replace(FULL, size=8, jitter=1.0, brightness=0.0)],
        [dataclasses.replace(FULL, size=37, crop_scale=(0.05, 0.4))] * 2,
    ],
    ids=["all", "mixed", "small", "enlarged"],
)
def test_a_rendered_view_is_what_torchvision_makes_of_the_same_parameters(specs):
    images, parameters = some_images(), draw(specs)
    views = render_views(images, parameters, MEAN, STD)
    assert views.dtype == torch.float32
    assert views.shape == (len(specs), 24, 3, parameters.size, parameters.size)
    for v in range(len(specs)):
        for b, image in enumerate(images):
            wanted = reference_view(image, parameters, v, b)
            error = (views[v, b] - wanted).abs()
            if np.isfinite(parameters.threshold_VB[v, b]):  # a value at the threshold may fall on either side
                assert error.gt(1e-3).float().mean() < 0.01
            else:
                assert error.max() < 1e-3


def test_parts_of_the_work_change_nothing(monkeypatch):
    images, parameters = some_images(), draw([FULL, FULL])
    whole = render_views(images, parameters, MEAN, STD)
    monkeypatch.setitem(views_module._CHUNK_PIXELS, "cpu", 7 * 20 * 20)
    assert torch.equal(render_views(images, parameters, MEAN, STD), whole)


def test_parameters_belong_to_the_image_and_not_to_the_batch():
    index = np.array([5, 900, 31, 2])
    keys = {"seed": 3, "epoch": 1, "source_size": 32}
    together = draw_parameters([FULL, FULL], index_B=index, **keys)
    alone = draw_parameters([FULL, FULL], index_B=index[2:3], **keys)
    for name, values in vars(together).items():
        if isinstance(values, np.ndarray):
            np.testing.assert_array_equal(values[:, 2:3], getattr(alone, name))


@pytest.mark.parametrize("other", [{"seed": 9}, {"epoch": 9}, {"first_view": 9}])
def test_parameters_change_with_each_key(other):
    assert (draw([FULL]).factor_VB4 != draw([FULL], **other).factor_VB4).all()


def test_views_of_one_image_differ():
    first, second = draw([FULL, FULL]).factor_VB4
    assert (first != second).all()


def test_clean_spec_gives_the_clean_image():
    images = some_images()
    views = render_views(images, draw([CLEAN, CLEAN]), MEAN, STD)
    torch.testing.assert_close(views[1], clean_views(images, 20, MEAN, STD), atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [20, 12, 30])
def test_clean_views_are_torchvisions_resize(size):
    images = some_images()
    wanted = TF.normalize(TF.resize(images.float() / 255, [size, size], antialias=True), MEAN, STD)
    torch.testing.assert_close(clean_views(images, size, MEAN, STD), wanted, atol=1e-5, rtol=0)


def test_views_of_two_sizes_are_refused():
    with pytest.raises(ValueError, match="sizes"):
        draw([ViewSpec(size=16), ViewSpec(size=20)])


def test_autocast_does_not_coarsen_the_views():
    images, parameters = some_images(), draw([FULL])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        views = render_views(images, parameters, MEAN, STD)
    assert torch.equal(views, render_views(images, parameters, MEAN, STD))


# ---------------------------------------------------------------------------------------------------------------------
# Distributions


def agree(ours: np.ndarray, theirs: np.ndarray, sigmas: float = 4.5) -> None:
    """Means and second moments of two samples agree within their standard errors."""
    for power in (1, 2):
        a, b = np.asarray(ours, dtype=float) ** power, np.asarray(theirs, dtype=float) ** power
        error = np.sqrt(a.var() / len(a) + b.var() / len(b))
        assert abs(a.mean() - b.mean()) <= sigmas * error + 1e-9, (power, a.mean(), b.mean(), error)


@pytest.mark.parametrize(
    ("scale", "ratio", "side"),
    [((0.2, 1.0), (3 / 4, 4 / 3), 32), ((0.9, 1.0), (0.5, 2.0), 20), ((0.5, 1), (3, 4), 32)],
)
def test_crops_are_distributed_as_torchvisions(scale, ratio, side):
    """The second case often finds no crop in a few tries, the third never finds one."""
    torch.manual_seed(0)
    crop, image = v2.RandomResizedCrop(side, scale=scale, ratio=ratio), torch.empty(3, side, side)
    drawn = [crop.make_params([image]) for _ in range(4000)]
    theirs = np.array([[params[key] for key in ("top", "left", "height", "width")] for params in drawn])
    ours = draw([ViewSpec(crop_scale=scale, crop_ratio=ratio)], n=12000, source_size=side).box_VB4[0]
    for k in range(4):
        agree(ours[:, k], theirs[:, k])
    agree(ours[:, 2] * ours[:, 3], theirs[:, 2] * theirs[:, 3])
    agree(np.log(ours[:, 3] / ours[:, 2]), np.log(theirs[:, 3] / theirs[:, 2]))
    assert (ours[:, :2] >= 0).all() and (ours[:, :2] + ours[:, 2:] <= side).all()


def test_jitter_is_distributed_as_torchvisions():
    torch.manual_seed(0)
    jitter = v2.ColorJitter(0.4, 0.6, 0.2, 0.1)
    drawn = [jitter.make_params([]) for _ in range(4000)]
    spec = ViewSpec(brightness=0.4, contrast=0.6, saturation=0.2, hue=0.1)
    ours = draw([spec], n=12000)
    for k, name in enumerate(("brightness", "contrast", "saturation", "hue")):
        agree(ours.factor_VB4[0, :, k], np.array([float(params[f"{name}_factor"]) for params in drawn]))
    orders, counts = np.unique(ours.order_VB4[0], axis=0, return_counts=True)
    assert len(orders) == 24 and abs(counts / 12000 - 1 / 24).max() < 4.5 * np.sqrt(1 / 24 / 12000)


def test_chances_are_those_of_the_spec():
    spec = ViewSpec(flip=0.5, jitter=0.8, grayscale=0.2, blur=0.3, solarize=0.1)
    p = draw([spec], n=12000)
    chosen = (p.flip_VB, p.jitter_VB, p.grayscale_VB, p.sigma_VB > 0, np.isfinite(p.threshold_VB))
    for flags, chance in zip(chosen, (0.5, 0.8, 0.2, 0.3, 0.1), strict=True):
        assert abs(flags.mean() - chance) < 4.5 * np.sqrt(chance * (1 - chance) / 12000)
    agree(p.sigma_VB[p.sigma_VB > 0], np.random.default_rng(0).uniform(0.1, 2.0, 20000))


def test_pixels_are_distributed_as_torchvisions():
    """The whole chain, image by image through torchvision's transforms: moments of each channel over many views."""
    torch.manual_seed(0)
    images = some_images(8, 16)
    chain = v2.Compose(
        [
            v2.ToDtype(torch.float32, scale=True),
            v2.RandomResizedCrop(16, scale=(0.2, 1), antialias=True),
            v2.RandomHorizontalFlip(0.5),
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], 0.8),
            v2.RandomGrayscale(0.2),
        ]
    )
    theirs = torch.stack([chain(images[i % 8]) for i in range(800)])
    parameters = draw([ViewSpec()], n=4000, source_size=16)
    ours = render_views(images.repeat(500, 1, 1, 1), parameters, (0, 0, 0), (1, 1, 1))[0]
    for statistic in (
        lambda x: x.mean((2, 3)),
        lambda x: x.std((2, 3)),
        lambda x: x[:, :, :, 1:].sub(x[:, :, :, :-1]),
    ):
        a, b = (statistic(x).abs().reshape(len(x), 3, -1).mean(-1).numpy() for x in (ours, theirs))
        for channel in range(3):
            agree(a[:, channel], b[:, channel])

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

from hf_ssl_or.data import views as views_module
from hf_ssl_or.data.augmentation_sampling import ViewGroup, check_channels, sample_boxes, without_color
from hf_ssl_or.data.views import ViewParameters, clean_views, crop_views, render_views, sample_parameters
from hf_ssl_or.models.image_conversion import Preprocessing
from hf_ssl_or.structures import ViewSpec

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
RGB = Preprocessing(image_size=20, mean=MEAN, std=STD)
FULL = ViewSpec(blur=0.5, solarize=0.3, hue=0.2)
CLEAN = ViewSpec(crop_scale=(1, 1), flip=0, jitter=0, grayscale=0)
STILL = dataclasses.replace(CLEAN, crop_ratio=(1, 1))


def group_of(specs: list[ViewSpec], size: int = 20, **keys: int) -> ViewGroup:
    return ViewGroup(specs=tuple(specs), size=size, **{"seed": 1, "epoch": 2, **keys})


def sample(specs: list[ViewSpec], n: int = 24, source_size: int = 20, **keys: int) -> ViewParameters:
    group = group_of(specs, source_size, **keys)
    return sample_parameters(group, np.arange(100, 100 + n), original_size=(source_size, source_size))


def some_images(n: int = 24, side: int = 20) -> torch.Tensor:
    """Smooth color images (n, H, W, C): noise would hide a wrong crop."""
    coarse = torch.rand(n, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.interpolate(coarse, (side, side), mode="bicubic", align_corners=False)
    return (smooth.clamp(0, 1) * 255).byte().permute(0, 2, 3, 1).contiguous()


def reference_view(image: torch.Tensor, p: ViewParameters, v: int, b: int) -> torch.Tensor:
    """One view of one image by torchvision's functions, one after the other."""
    x = TF.resized_crop(
        image.permute(2, 0, 1).double() / 255, *map(int, p.box_VB4[v, b]), size=[p.size, p.size], antialias=True
    )
    x = TF.horizontal_flip(x) if p.flip_columns_VB[v, b] else x
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
    images, parameters = some_images(), sample(specs)
    views = render_views(images, parameters, RGB)
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
    images, parameters = some_images(), sample([FULL, FULL])
    whole = render_views(images, parameters, RGB)
    monkeypatch.setitem(views_module._CHUNK_PIXELS, "cpu", 7 * 20 * 20)
    assert torch.equal(render_views(images, parameters, RGB), whole)


def test_parameters_belong_to_the_image_and_not_to_the_batch():
    index, spec = np.array([5, 900, 31, 2]), dataclasses.replace(FULL, noise=0.5, rotate=0.5)
    group = group_of([spec, dataclasses.replace(spec, channel_brightness=0.3)])
    together, alone = (sample_parameters(group, some, original_size=(32, 40)) for some in (index, index[2:3]))
    for name, values in vars(together).items():
        if isinstance(values, np.ndarray):
            np.testing.assert_array_equal(values[:, 2:3], getattr(alone, name))


@pytest.mark.parametrize("other", [{"seed": 9}, {"epoch": 9}, {"first_view": 9}])
def test_parameters_change_with_each_key(other):
    assert (sample([FULL]).factor_VB4 != sample([FULL], **other).factor_VB4).all()


def test_views_of_one_image_differ():
    first, second = sample([FULL, FULL]).factor_VB4
    assert (first != second).all()


def test_clean_spec_gives_the_clean_image():
    images = some_images()
    views = render_views(images, sample([CLEAN, CLEAN]), RGB)
    torch.testing.assert_close(views[1], clean_views(images, RGB), atol=1e-5, rtol=0)


def test_views_of_two_sizes_are_refused():
    with pytest.raises(ValueError, match="sizes"):
        sample([ViewSpec(size=16), ViewSpec(size=20)])


def test_autocast_does_not_coarsen_the_views():
    images, parameters = some_images(), sample([FULL])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        views = render_views(images, parameters, RGB)
    assert torch.equal(views, render_views(images, parameters, RGB))


# ---------------------------------------------------------------------------------------------------------------------
# Distributions


def agree(ours: np.ndarray, theirs: np.ndarray, sigmas: float = 4.5, atol: float = 1e-9) -> None:
    """Means and second moments of two samples agree within their standard errors, and `atol` of the mean."""
    for power in (1, 2):
        a, b = np.asarray(ours, dtype=float) ** power, np.asarray(theirs, dtype=float) ** power
        error = np.sqrt(a.var() / len(a) + b.var() / len(b))
        assert abs(a.mean() - b.mean()) <= sigmas * error + atol * (2 * a.max()) ** (power - 1), (
            power,
            a.mean(),
            b.mean(),
            error,
        )


SHAPES = [(32, 32), (400, 1600), (1600, 400), (3000, 4000), (3000, 3000)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("scale", "ratio"), [((0.2, 1.0), (3 / 4, 4 / 3)), ((0.9, 1.0), (0.5, 2.0)), ((0.5, 1), (3, 4))]
)
def test_crops_are_distributed_as_torchvisions(scale, ratio, shape):
    """Share of the area, aspect and position on the original; the second case often finds no crop in a few tries."""
    torch.manual_seed(0)
    height, width = shape
    crop, image = v2.RandomResizedCrop(32, scale=scale, ratio=ratio), torch.empty(1, 1, 1).expand(3, height, width)
    made = [crop.make_params([image]) for _ in range(4000)]
    theirs = np.array([[params[key] for key in ("top", "left", "height", "width")] for params in made])
    group = group_of([ViewSpec(crop_scale=scale, crop_ratio=ratio)])
    ours = group.boxes(np.arange(12000), np.tile(shape, (12000, 1)))[0]
    for k in range(4):
        agree(ours[:, k], theirs[:, k])
    agree(ours[:, 2] * ours[:, 3] / (height * width), theirs[:, 2] * theirs[:, 3] / (height * width))
    agree(np.log(ours[:, 3] / ours[:, 2]), np.log(theirs[:, 3] / theirs[:, 2]))
    assert (ours[:, :2] >= 0).all() and (ours[:, :2] + ours[:, 2:] <= shape).all()


def test_where_no_crop_fits_the_largest_central_one_is_taken():
    spec, uniform = ViewSpec(crop_scale=(0.9, 1.0)), np.full((3, 22), 0.5)
    boxes = sample_boxes(spec, uniform, np.array([[100, 1000], [1000, 100], [4, 400]]))
    assert boxes.tolist() == [[0, 433, 100, 133], [433, 0, 133, 100], [0, 197, 4, 5]]


@pytest.mark.parametrize("shape", [(40, 160), (160, 40), (90, 120), (64, 64)], ids=str)
@pytest.mark.parametrize("stored", [1.0, 0.6], ids=["as it was", "stored smaller"])
def test_pixels_of_crops_are_distributed_as_torchvisions_on_the_original(shape, stored):
    """Moments of the crops of one picture: those cut from what is stored against those of the original file."""
    torch.manual_seed(0)
    coarse = torch.rand(1, 3, 6, 6, generator=torch.Generator().manual_seed(5))
    original = torch.nn.functional.interpolate(coarse, shape, mode="bicubic").clamp(0, 1)[0].mul(255).byte()
    transform = v2.RandomResizedCrop(16, scale=(0.2, 1.0), antialias=True)
    theirs = torch.stack([transform(original) for _ in range(1500)]).float().numpy()
    pixels = original.permute(1, 2, 0).numpy()
    if stored < 1:
        size = [round(side * stored) for side in shape]
        pixels = TF.resize(original, size, antialias=True).permute(1, 2, 0).contiguous().numpy()
    boxes_4000 = group_of([ViewSpec()]).boxes(np.arange(4000), np.tile(shape, (4000, 1)))[0]
    ours = np.empty((4000, 16, 16, 3), dtype=np.uint8)
    crop_views(np.ascontiguousarray(pixels), shape, boxes_4000, 16, ours)
    ours = ours.transpose(0, 3, 1, 2).astype(np.float64)
    for statistic in (
        lambda x: x.mean((2, 3)),
        lambda x: x.std((2, 3)),
        lambda x: x[:, :, 0, 0],
        lambda x: x[:, :, 8],
    ):
        a, b = (statistic(x).reshape(len(x), 3, -1).mean(-1) for x in (ours, theirs))
        for channel in range(3):
            agree(a[:, channel], b[:, channel], atol=0.25 if stored == 1 else 1.0)  # resized twice: a little softer


@pytest.mark.parametrize(
    "spec", [FULL, dataclasses.replace(FULL, vertical_flip=0.5, rotate=0.7)], ids=["rgb", "turned"]
)
def test_crops_cut_on_the_host_are_those_of_the_matrices(spec):
    """PIL rounds to bytes after each of its two passes, and may look past the edge of the crop."""
    images, size = some_images(16, 60), 24
    group, index, whole = group_of([spec, spec], size), np.arange(16), (60, 60)
    crops = torch.empty(2, 16, size, size, 3, dtype=torch.uint8)
    boxes_VB4 = group.boxes(index, np.tile(whole, (16, 1)))
    for b in range(16):
        crop_views(images[b].numpy(), whole, boxes_VB4[:, b], size, crops.numpy()[:, b])
    ours = render_views(crops, sample_parameters(group, index), RGB)
    wanted = render_views(images, sample_parameters(group, index, original_size=whole), RGB)
    error = (ours - wanted).abs()
    assert error.median() < 0.01 and error.gt(0.15).float().mean() < 0.03


def test_jitter_is_distributed_as_torchvisions():
    torch.manual_seed(0)
    jitter = v2.ColorJitter(0.4, 0.6, 0.2, 0.1)
    made = [jitter.make_params([]) for _ in range(4000)]
    spec = ViewSpec(brightness=0.4, contrast=0.6, saturation=0.2, hue=0.1)
    ours = sample([spec], n=12000)
    for k, name in enumerate(("brightness", "contrast", "saturation", "hue")):
        agree(ours.factor_VB4[0, :, k], np.array([float(params[f"{name}_factor"]) for params in made]))
    orders, counts = np.unique(ours.order_VB4[0], axis=0, return_counts=True)
    assert len(orders) == 24 and abs(counts / 12000 - 1 / 24).max() < 4.5 * np.sqrt(1 / 24 / 12000)


def test_chances_are_those_of_the_spec():
    spec = ViewSpec(flip=0.5, jitter=0.8, grayscale=0.2, blur=0.3, solarize=0.1)
    p = sample([spec], n=12000)
    chosen = (p.flip_columns_VB, p.jitter_VB, p.grayscale_VB, p.sigma_VB > 0, np.isfinite(p.threshold_VB))
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
    theirs = torch.stack([chain(images[i % 8].permute(2, 0, 1)) for i in range(800)])
    parameters = sample([ViewSpec()], n=4000, source_size=16)
    ours = render_views(images.repeat(500, 1, 1, 1), parameters, Preprocessing(image_size=16))[0]
    for statistic in (
        lambda x: x.mean((2, 3)),
        lambda x: x.std((2, 3)),
        lambda x: x[:, :, :, 1:].sub(x[:, :, :, :-1]),
    ):
        a, b = (statistic(x).abs().reshape(len(x), 3, -1).mean(-1).numpy() for x in (ours, theirs))
        for channel in range(3):
            agree(a[:, channel], b[:, channel])


# ---------------------------------------------------------------------------------------------------------------------
# Other images than 8-bit RGB

SIX = Preprocessing(
    image_size=20, num_channels=6, eight_bit=False, value_range=(100.0, 1100.0), mean=(0.5,) * 6, std=(0.25,) * 6
)


def wide_images(n: int = 12, channels: int = 6) -> torch.Tensor:
    values = torch.rand(n, 20, 20, channels, generator=torch.Generator().manual_seed(1)) * 1200
    return values.round().to(torch.uint16)


def rendered(
    spec: ViewSpec, images: torch.Tensor, preprocessing: Preprocessing = SIX
) -> tuple[torch.Tensor, ViewParameters]:
    index, channels = np.arange(len(images)), images.shape[-1]
    parameters = sample_parameters(group_of([spec]), index, num_channels=channels, original_size=(20, 20))
    return render_views(images, parameters, preprocessing)[0] * 0.25 + 0.5, parameters


def unit(images: torch.Tensor) -> torch.Tensor:
    return ((images.double() - 100) / 1000).clamp(0, 1).permute(0, 3, 1, 2)


def test_sixteen_bits_and_six_channels_keep_their_values_and_are_clipped():
    images = wide_images()
    result, _ = rendered(STILL, images)
    torch.testing.assert_close(result.double(), unit(images), atol=1e-5, rtol=0)
    crops = images[None].float()
    flat = render_views(crops, sample_parameters(group_of([STILL]), np.arange(12), num_channels=6), SIX)
    torch.testing.assert_close(flat[0].double() * 0.25 + 0.5, unit(images), atol=1e-5, rtol=0)


def test_each_channel_has_a_brightness_and_a_contrast_of_its_own():
    spec = dataclasses.replace(STILL, jitter=1, brightness=0, contrast=0, saturation=0, hue=0)
    spec = dataclasses.replace(spec, channel_brightness=0.4, channel_contrast=0.3)
    images = wide_images()
    result, parameters = rendered(spec, images)
    factors = torch.from_numpy(parameters.channel_factor_VB2C[0])[..., None, None]
    x = (unit(images) * factors[:, 0]).clamp(0, 1)
    mean = x.mean((2, 3), keepdim=True)
    wanted = (mean + (x - mean) * factors[:, 1]).clamp(0, 1)
    torch.testing.assert_close(result.double(), wanted, atol=1e-5, rtol=0)
    assert len(np.unique(parameters.channel_factor_VB2C)) == 12 * 2 * 6
    assert abs(parameters.channel_factor_VB2C[..., 0, :] - 1).max() <= 0.4


def test_the_eight_symmetries_come_as_often_as_the_spec_says():
    images = wide_images(1, 2).repeat(4000, 1, 1, 1)
    pair = dataclasses.replace(SIX, num_channels=2, mean=(0.5,) * 2, std=(0.25,) * 2)
    result, _ = rendered(dataclasses.replace(STILL, vertical_flip=0.3, rotate=0.6), images, pair)
    plain, counts = unit(images[:1])[0], []
    for flipped in (False, True):
        for turns in range(4):
            x = torch.rot90(plain.flip(1) if flipped else plain, turns, (1, 2))
            counts.append(int(((result - x).abs().amax((1, 2, 3)) < 1e-4).sum()))
    chances = [(0.3 if flipped else 0.7) * (0.4 if turns == 0 else 0.2) for flipped in (0, 1) for turns in range(4)]
    assert sum(counts) == 4000
    for count, chance in zip(counts, chances, strict=True):
        assert abs(count - 4000 * chance) < 4.5 * np.sqrt(4000 * chance * (1 - chance))


def test_noise_has_its_standard_deviation_and_belongs_to_the_image():
    images = torch.full((300, 20, 20, 6), 600, dtype=torch.uint16)
    spec = dataclasses.replace(STILL, noise=0.5, noise_std=(0.05, 0.05))
    result, p = rendered(spec, images)
    noise, noisy = result - 0.5, p.noise_VB[0] > 0
    assert abs(noisy.mean() - 0.5) < 0.13 and not noise[~noisy].abs().gt(1e-5).any()
    assert noise[noisy].std() == pytest.approx(0.05, rel=0.01) and abs(noise[noisy].mean()) < 3e-4
    lag = (noise[noisy][..., 1:] * noise[noisy][..., :-1]).mean() / 0.05**2
    assert abs(lag) < 0.01
    parameters = sample_parameters(group_of([spec]), np.array([7]), num_channels=6, original_size=(20, 20))
    alone = render_views(images[:1], parameters, SIX)[0, 0] * 0.25 + 0.5
    assert torch.equal(alone, result[7])


def test_a_dropped_channel_is_the_mean_of_the_set():
    result, p = rendered(dataclasses.replace(STILL, channel_drop=0.5), wide_images(400))
    gone = (result == 0.5).all(-1).all(-1)
    assert set(gone.sum(1).tolist()) == {0, 1} and abs(gone.any(1).float().mean() - 0.5) < 0.12
    assert gone.sum(0).min() > 15
    assert ((p.dropped_VB[0] >= 0) == gone.any(1).numpy()).all()


@pytest.mark.parametrize("channels", [1, 2, 6])
def test_what_needs_rgb_is_refused_by_name(channels):
    assert check_channels([ViewSpec()], 3) is None
    assert f"hue need RGB images, not {channels} channel" in check_channels(
        [ViewSpec(saturation=0, grayscale=0)], channels
    )
    assert check_channels([without_color(ViewSpec())], channels) is None


def test_dropping_the_only_channel_is_refused():
    assert "channel_drop" in check_channels([dataclasses.replace(STILL, saturation=0, hue=0, channel_drop=0.1)], 1)


@pytest.mark.parametrize("field", ["vertical_flip", "rotate", "noise", "channel_drop", "channel_brightness"])
def test_bad_values_of_the_new_fields_name_them(field):
    with pytest.raises(ValueError, match=field):
        ViewSpec(**{field: 1.5})

from __future__ import annotations

import dataclasses
import random
from itertools import pairwise

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from hf_ssl_or.data.arguments import DataArguments
from hf_ssl_or.data.image_dataset import ImageSet, Storage
from hf_ssl_or.data.loader import ViewLoader
from hf_ssl_or.data.objects import load_dataset_object
from hf_ssl_or.errors import InputError
from hf_ssl_or.models.image_conversion import Preprocessing
from hf_ssl_or.structures import MultiViewBatch, ViewSpec
from tests.data.image_writing import save
from tests.data.stream_shards import rows_of, write_tables
from tests.data.test_loader import image_set

SIZE = 12
COMPOSE = v2.Compose(
    [
        v2.RandomResizedCrop(SIZE, antialias=True),
        v2.RandomHorizontalFlip(),
        v2.ColorJitter(0.4, 0.4, 0.2, 0.1),
        v2.ToDtype(torch.float32, scale=True),
    ]
)


def noisy_center(image: torch.Tensor) -> torch.Tensor:
    """A function of all three random states; it writes to its input."""
    image[:] = torch.flip(image, dims=(-1,)) if random.random() < 0.5 else image
    shift = int(np.random.randint(8)) + torch.randint(8, ())
    return v2.functional.center_crop((image // 2 + shift).to(torch.uint8), [SIZE, SIZE])


def crop(image: torch.Tensor) -> torch.Tensor:
    return v2.functional.center_crop(image, [SIZE, SIZE])


def kornia_views() -> torch.nn.Module:
    augmentation = pytest.importorskip("kornia.augmentation")
    return torch.nn.Sequential(
        augmentation.RandomResizedCrop((SIZE, SIZE)),
        augmentation.RandomHorizontalFlip(),
        augmentation.ColorJiggle(0.4, 0.4, 0.2, 0.1),
    )


def batches(images: ImageSet, views: list, start: int = 0, stop: int = 4, **more: object) -> list[MultiViewBatch]:
    return list(ViewLoader(images, views, **{"batch_size": 8, "seed": 3, **more}).batches(start, stop))


MIXED = [ViewSpec(), COMPOSE, ViewSpec(blur=1.0), noisy_center]


@pytest.mark.parametrize("side", [16, None])
@pytest.mark.parametrize("kind", ["compose", "kornia", "mixed", "lambda"])
def test_views_do_not_depend_on_processes_or_restarts(kind, side):
    views = {"compose": [COMPOSE] * 2, "mixed": MIXED, "lambda": [lambda x: noisy_center(x)] * 2}.get(kind)
    views = views or [kornia_views()] * 2
    images = image_set(24, side=side)
    full = batches(images, views, local_views=[noisy_center, ViewSpec(size=SIZE)])
    parts = [
        batches(images, views, local_views=[noisy_center, ViewSpec(size=SIZE)], rank=r, world_size=2) for r in (0, 1)
    ]
    for batch, *shards in zip(full, *parts, strict=True):
        assert batch.views_VBCHW.shape == (len(views), 8, 3, SIZE, SIZE) and batch.local_views_VBCHW.shape[0] == 2
        for name, dim in (("views_VBCHW", 1), ("local_views_VBCHW", 1), ("index_B", 0), ("labels_B", 0)):
            joined = torch.cat([getattr(shard, name) for shard in shards], dim=dim)
            assert torch.equal(joined, getattr(batch, name)), name
    resumed = batches(images, views, local_views=[noisy_center, ViewSpec(size=SIZE)], start=2)
    for first, second in zip(full[2:], resumed, strict=True):
        assert torch.equal(first.views_VBCHW, second.views_VBCHW)


def test_each_image_view_epoch_and_seed_samples_anew():
    image = np.random.default_rng(0).integers(0, 256, (20, 20, 3), np.uint8)
    images = ImageSet.from_arrays([image] * 8, name="same", preprocessing=Preprocessing(image_size=SIZE))
    found = [
        view for run in (batches(images, [COMPOSE] * 2, stop=2), batches(images, [COMPOSE] * 2, stop=1, seed=4))
        for batch in run for view in batch.views_VBCHW.flatten(0, 1)
    ]  # fmt: skip
    assert len({view.numpy().tobytes() for view in found}) == len(found) == 3 * 16


def test_mixed_views_are_those_of_the_parts():
    images = image_set(24, side=None)
    mixed = batches(images, MIXED)
    specs = batches(images, [MIXED[0], MIXED[2]])
    called = batches(images, [crop, COMPOSE, crop, noisy_center])
    for batch, of_specs, of_callables in zip(mixed, specs, called, strict=True):
        assert torch.equal(batch.views_VBCHW[::2], of_specs.views_VBCHW)
        assert torch.equal(batch.views_VBCHW[1::2], of_callables.views_VBCHW[1::2])


def test_values_against_a_formula():
    images = image_set(8, side=SIZE)
    before = images.load_full().flat.copy()
    for function in (crop, lambda x: crop(x).float() / 255, lambda x: crop(x).double() / 255):
        batch = batches(images, [function], stop=1)[0]
        for view, i in zip(batch.views_VBCHW[0], batch.index_B, strict=True):
            wanted = (torch.from_numpy(images.load_full()[int(i)]).permute(2, 0, 1) / 255 - 0.5) / 0.25
            torch.testing.assert_close(view, wanted)
    batches(images, [noisy_center], stop=1)
    assert np.array_equal(before, images.load_full().flat)


def test_images_of_16_bits_come_as_floats_at_their_own_aspect():
    rng = np.random.default_rng(0)
    seen = []

    def note(image: torch.Tensor) -> torch.Tensor:
        seen.append((image.dtype, image.shape, float(image.min()) >= 0 and float(image.max()) <= 1))
        return crop(image)

    arrays = [rng.integers(0, 4096, (14, 14 + i, 1), np.uint16) for i in range(8)]
    images = load_dataset_object(arrays, DataArguments(dataset="-", image_size=SIZE), num_channels=1)
    batches(images, [note], stop=1)
    assert {shape[-1] for _, shape, _ in seen} == set(range(14, 22))
    assert all(dtype == torch.float32 and shape[:3] == (1, 1, 14) and unit for dtype, shape, unit in seen)


def test_images_that_are_decoded_in_each_step(tmp_path):
    save(tmp_path, *(f"{i}.png" for i in range(9)))
    images = load_dataset_object(tmp_path, DataArguments(dataset="-", image_size=8, num_workers=1, max_corrupt=0.2))
    views = [lambda x: x, ViewSpec(crop_scale=(1, 1))]
    wanted = batches(images, views, stop=1, batch_size=9)[0]
    images = dataclasses.replace(images, full=None, full_storage=Storage("on_the_fly"), _on_device={})
    found = batches(images, views, stop=1, batch_size=9)[0]
    assert torch.equal(wanted.views_VBCHW[0], found.views_VBCHW[0]) and torch.equal(wanted.index_B, found.index_B)
    (tmp_path / "4.png").write_bytes(b"")
    replaced = batches(images, views, stop=1, batch_size=9)[0]
    place = int((wanted.index_B == 4).nonzero())
    assert replaced.index_B[place] == 5 and len(images.failures) == 1
    assert torch.equal(replaced.views_VBCHW[0, place], wanted.views_VBCHW[0, int((wanted.index_B == 5).nonzero())])


def test_images_that_are_streamed(tmp_path):
    write_tables(tmp_path / "set", [20, 12], 4)
    data = DataArguments(
        dataset=f"{tmp_path}/set/train-*.parquet",
        image_size=8,
        streaming=True,
        stream_lanes=2,
        cache_dir=str(tmp_path),
    )
    images = load_dataset_object(data.dataset, data)
    views = [lambda x: x, v2.RandomCrop(8, padding=2), ViewSpec(crop_scale=(1, 1), jitter=0, flip=0, grayscale=0)]
    full = batches(images, views)
    parts = [batches(images, views, rank=rank, world_size=2) for rank in (0, 1)]
    for batch, *shards in zip(full, *parts, strict=True):
        assert torch.equal(torch.cat([shard.views_VBCHW for shard in shards], dim=1), batch.views_VBCHW)
        torch.testing.assert_close(batch.views_VBCHW[0], batch.views_VBCHW[2])
        std_C11, mean_C11 = (torch.tensor(values).view(-1, 1, 1) for values in (images.std, images.mean))
        bytes_BCHW = ((batch.views_VBCHW[0] * std_C11 + mean_C11) * 255).round()
        assert rows_of(bytes_BCHW.permute(0, 2, 3, 1)) == batch.index_B.tolist()
    with pytest.raises(InputError, match="views: Fails fails on image .*: no"):
        batches(images, [Fails(ValueError("no"))])


def test_random_states_are_left_as_they_were():
    def states() -> list[float]:
        return [random.random(), float(np.random.rand()), float(torch.rand(()))]

    def seed() -> None:
        random.seed(1), np.random.seed(1), torch.manual_seed(1)

    seed()
    wanted = [states(), states()]
    seed()
    loader = ViewLoader(image_set(8), [lambda x: noisy_center(x)], batch_size=8, seed=3)
    found = [states()]
    batches = loader.batches(0, 2)
    seed()
    states()
    # torch's DataLoader takes one number of its generator for itself
    next(batches)
    found.append([random.random(), float(np.random.rand())])
    assert found[0] == wanted[0] and found[1] == wanted[1][:2]


def sized(image: torch.Tensor) -> torch.Tensor:
    return image[..., :9, : 9 + int(image.sum()) % 2]


class Fails:
    """A function that works on the first image and not on others."""

    def __init__(self, result: object) -> None:
        self.result, self.calls = result, 0

    def __call__(self, image: torch.Tensor) -> object:
        self.calls += 1
        return crop(image) if self.calls == 1 else give(self.result)


def give(result: object) -> object:
    if isinstance(result, Exception):
        raise result
    return result


ZERO = torch.zeros(1, 3, SIZE, SIZE)
BAD = {
    "images": (torch.zeros(2, 3, SIZE, SIZE), r"returns \(2, 3, 12, 12\) for one image"),
    "rank": (torch.zeros(3, SIZE, SIZE), r"returns \(3, 12, 12\) for one image"),
    "empty": (torch.zeros(1, 3, 0, 5), r"returns \(1, 3, 0, 5\)"),
    "channels": (torch.zeros(1, 1, SIZE, SIZE), "returns 1 channels for an image of 3"),
    "type": (None, "returns NoneType, not a tensor"),
    "dtype": (ZERO.long(), "returns torch.int64; return uint8, or floats"),
    "range": (ZERO - 2, r"returns values from -2 to -2, not in \[0, 1\]; leave normalization to the trainer"),
    "nan": (ZERO * torch.nan, "returns values from nan to nan"),
    "raises": (ValueError("no way\nmore"), "fails on image .*: no way$"),
}


@pytest.mark.parametrize("side", [SIZE, None])
@pytest.mark.parametrize("kind", BAD)
def test_wrong_views_are_one_line(kind, side):
    result, message = BAD[kind]
    images = image_set(8, side=side)
    with pytest.raises(InputError, match=f"views: <lambda> {message}"):
        ViewLoader(images, [lambda _: give(result)], batch_size=8, seed=0)
    later = Fails(result)
    with pytest.raises(InputError, match=f"views: Fails {message}") as caught:
        batches(images, [later], stop=1)
    assert "\n" not in str(caught.value)
    if kind == "raises":
        assert isinstance(caught.value.__cause__, ValueError) and str(caught.value.__cause__) == "no way\nmore"


def test_wrong_lists_are_one_line():
    images = image_set(8, side=None)
    for views, message in [
        ([sized], "sized makes a view of 9 x .* pixels of image .*, of others 9 x"),
        ([crop, lambda x: x[..., :9, :9]], "<lambda> makes views of 9 x 9 pixels, crop of 12 x 12"),
        ([ViewSpec(), lambda x: x[..., :9, :9]], "callables return views of 9 x 9 pixels, specs of 12 x 12"),
        ([3], "view 0 is a int; give a ViewSpec, or a callable"),
    ]:
        with pytest.raises(InputError, match=message):
            batches(images, views, stop=1)


def test_sizes_of_views_need_not_be_square_or_the_sets():
    batch = batches(image_set(8), [lambda x: x[..., :9, :5]] * 2, stop=1)[0]
    assert batch.views_VBCHW.shape == (2, 8, 3, 9, 5)
    assert all(not torch.equal(a, b) for a, b in pairwise(batch.views_VBCHW[0]))

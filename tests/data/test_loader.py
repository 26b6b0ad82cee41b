from __future__ import annotations

import numpy as np
import pytest
import torch

from hf_ssl_or.data.image_dataset import ImageSet
from hf_ssl_or.data.loader import ViewLoader
from hf_ssl_or.errors import InputError
from hf_ssl_or.models.image_conversion import Preprocessing
from hf_ssl_or.structures import MultiViewBatch, ViewSpec

VIEW = ViewSpec(blur=0.5, solarize=0.2)
LOCAL = ViewSpec(size=6, crop_scale=(0.05, 0.3))


def image_set(n: int = 50, side: int | None = 12, labeled: bool = True) -> ImageSet:
    """Noise; with no side, images of many sizes, whose crops are cut on the host."""
    rng = np.random.default_rng(0)
    sizes = [(side, side) if side else (int(rng.integers(9, 40)), int(rng.integers(9, 40))) for _ in range(n)]
    return ImageSet.from_arrays(
        [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes],
        torch.arange(n) % 5 if labeled else None,
        name="noise",
        preprocessing=Preprocessing(image_size=12, mean=(0.5,) * 3, std=(0.25,) * 3),
    )


def loader(images: ImageSet, **more: object) -> ViewLoader:
    settings = {"views": [VIEW, VIEW], "batch_size": 8, "seed": 3, **more}
    return ViewLoader(images, settings.pop("views"), **settings)


def assert_equal(first: MultiViewBatch, second: MultiViewBatch) -> None:
    for name, value in vars(first).items():
        other = getattr(second, name)
        assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other, name


def test_a_batch_is_what_was_asked_for():
    images = image_set(side=16)
    batch = next(loader(images, local_views=[LOCAL] * 3).batches(4, 5))
    assert batch.views_VBCHW.shape == (2, 8, 3, 12, 12) and batch.local_views_VBCHW.shape == (3, 8, 3, 6, 6)
    assert batch.index_B.dtype == torch.int64 and torch.equal(batch.labels_B, images.labels[batch.index_B])
    assert (batch.seed, batch.step) == (3, 4)


def test_unlabeled_images_give_no_labels():
    batch = next(loader(image_set(labeled=False)).batches(0, 1))
    assert batch.labels_B is None and batch.local_views_VBCHW is None


def test_an_epoch_takes_each_image_once_and_the_next_another_order():
    run = loader(image_set(48))
    assert run.steps_per_epoch == 6
    index = torch.stack([batch.index_B for batch in run.batches(0, 12)]).view(2, -1)
    assert torch.equal(index[0].sort().values, torch.arange(48)) and not torch.equal(index[0], index[1])
    assert torch.equal(index[1].sort().values, torch.arange(48))


def test_an_incomplete_batch_is_dropped():
    run = loader(image_set(50))
    assert run.steps_per_epoch == 6
    assert len({int(i) for batch in run.batches(0, 6) for i in batch.index_B}) == 48


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("side", [12, 17, 26, None])
def test_the_processes_batches_together_are_the_single_process_batch(world_size, side):
    """Bit by bit, across the border of an epoch."""
    images = image_set(side=side)
    whole = loader(images, local_views=[LOCAL])
    parts = [loader(images, local_views=[LOCAL], rank=rank, world_size=world_size) for rank in range(world_size)]
    for batch, *shards in zip(whole.batches(3, 9), *(part.batches(3, 9) for part in parts), strict=True):
        for name, dim in (("views_VBCHW", 1), ("local_views_VBCHW", 1), ("index_B", 0), ("labels_B", 0)):
            joined = torch.cat([getattr(shard, name) for shard in shards], dim=dim)
            assert torch.equal(joined, getattr(batch, name)), name


@pytest.mark.parametrize("side", [12, None])
def test_any_step_can_be_the_first(side):
    straight = list(loader(image_set(side=side)).batches(0, 14))
    for start in (1, 6, 13):
        resumed = list(loader(image_set(side=side)).batches(start, 14))
        assert len(resumed) == 14 - start
        for first, second in zip(straight[start:], resumed, strict=True):
            assert_equal(first, second)


def test_views_and_epochs_and_seeds_differ():
    images = image_set(8)
    first, second = loader(images).batches(0, 2)
    assert not torch.equal(first.views_VBCHW[0], first.views_VBCHW[1])
    order = [torch.argsort(batch.index_B) for batch in (first, second)]
    assert not torch.equal(first.views_VBCHW[:, order[0]], second.views_VBCHW[:, order[1]])
    other = next(loader(images, seed=4).batches(0, 1))
    assert not torch.equal(first.index_B, other.index_B)


def test_local_views_sample_numbers_of_their_own():
    batch = next(loader(image_set(), local_views=[VIEW]).batches(0, 1))
    for view in batch.views_VBCHW:
        assert not torch.equal(view, batch.local_views_VBCHW[0])


def test_waiting_is_counted():
    run = loader(image_set())
    assert run.wait_s == 0
    list(run.batches(0, 3))
    assert run.wait_s > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"views": []}, "at least 1 view"),
        ({"batch_size": 51}, "51 is more than the 50 images of noise"),
        ({"batch_size": 9, "world_size": 2}, "9 images do not divide among 2 processes"),
        ({"batch_size": 1, "world_size": 2}, "1 images do not divide among 2 processes"),
    ],
)
def test_bad_settings_are_one_line(settings, message):
    with pytest.raises(InputError, match=message):
        loader(image_set(), **settings)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_rendering_ahead_on_a_gpu_is_the_same_and_never_waits():
    images = image_set()
    wanted = list(loader(images, device="cuda", prefetch=False).batches(0, 9))
    run = loader(images, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = list(run.batches(0, 9))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for first, second in zip(wanted, found, strict=True):
        assert_equal(first, second)
    on_cpu = list(loader(images).batches(0, 9))
    for first, second in zip(on_cpu, found, strict=True):
        error = (first.views_VBCHW - second.views_VBCHW.cpu()).abs()
        assert error.gt(1e-2).float().mean() < 1e-2  # a value at a threshold may fall on either side
    assert np.array_equal([b.step for b in found], range(9))

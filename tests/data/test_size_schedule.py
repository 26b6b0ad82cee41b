from __future__ import annotations

import numpy as np
import pytest
import torch
from test_loader import LOCAL, VIEW, assert_equal, image_set, loader

from hf_ssl_or.data.augmentation_sampling import ViewGroup
from hf_ssl_or.data.size_schedule import SizeSchedule, check_size_schedule, full_size
from hf_ssl_or.data.views import sample_parameters
from hf_ssl_or.errors import InputError
from hf_ssl_or.structures import ViewSpec

STEPS = [[0, 6], [0.5, 9], [0.8, 12]]


def schedule(steps: list = STEPS, full: int = 12, multiple: int = 1) -> SizeSchedule:
    return SizeSchedule(steps=steps, full_size=full, multiple=multiple)


def sizes(epochs: int, steps: list = STEPS) -> list[int]:
    return [schedule(steps).size(epoch, 7, 7 * epochs) for epoch in range(epochs)]


def test_an_epoch_has_the_size_of_the_last_step_that_begins_before_its_end():
    assert sizes(10) == [6] * 5 + [9] * 3 + [12] * 2
    assert sizes(100) == [6] * 50 + [9] * 30 + [12] * 20
    assert sizes(3) == [6, 9, 12]  # 1.5 and 2.4: within epochs 1 and 2
    assert sizes(1) == [12] and sizes(2) == [6, 12], "the last size is always reached"
    for epochs in range(2, 60):  # no share is lost to rounding: 0.29 * 100 is less than 29
        for start in range(1, epochs):
            found = sizes(epochs, [[0, 6], [start / epochs, 12]])
            assert found == [6] * start + [12] * (epochs - start)


def test_a_run_may_end_within_an_epoch():
    cut = schedule()
    assert [cut.size(epoch, 10, 25) for epoch in range(3)] == [6, 9, 12]  # from steps 12.5 and 20
    assert [cut.size(epoch, 10, 35) for epoch in range(4)] == [6, 9, 12, 12]  # 17.5 and 28
    assert cut.describe(10, 35) == "views of 6 pixels from epoch 0, 9 pixels from epoch 1, 12 pixels from epoch 2"


def test_all_views_shrink_by_one_factor_and_their_blur_with_them():
    views = [ViewSpec(blur_sigma=(0.2, 2.0)), ViewSpec(size=48, crop_scale=(0.05, 0.3))]
    half = schedule(full=96).resized(views, 48, 96)
    assert [spec.size for spec in half] == [48, 24]
    assert [spec.blur_sigma for spec in half] == [(0.1, 1.0), (0.05, 1.0)]
    assert half[1].crop_scale == (0.05, 0.3)
    patches = schedule(full=96, multiple=8)
    assert [[spec.size for spec in patches.resized(views, size, 96)] for size in (8, 40, 64, 128)] == [
        [8, 8],
        [40, 24],  # 20 pixels are two and a half patches
        [64, 32],
        [128, 64],
    ]


def test_the_full_size_changes_nothing():
    views = (VIEW, LOCAL)
    for spec, same in zip(views, schedule().resized(views, 12, 12), strict=True):
        assert vars(same) == {**vars(spec), "size": spec.size or 12}


def test_a_smaller_view_is_the_same_crop_with_the_same_colors():
    index = np.arange(20)
    small, large = (
        ViewGroup(specs=schedule().resized([VIEW, VIEW], size, 12), size=12, seed=1, epoch=2) for size in (6, 12)
    )
    found, wanted = (vars(sample_parameters(group, index, original_size=(40, 30))) for group in (small, large))
    assert (found.pop("size"), wanted.pop("size")) == (6, 12)
    assert found.pop("blur_radius") < wanted.pop("blur_radius")
    assert np.allclose(2 * found.pop("sigma_VB"), wanted.pop("sigma_VB"))
    for name, value in wanted.items():
        assert np.array_equal(found[name], value) if value is not None else found[name] is None, name


@pytest.mark.parametrize("side", [12, None])
def test_the_loader_follows_the_schedule_from_any_step_on_any_number_of_processes(side: int | None):
    images, shape = image_set(n=48, side=side), {"local_views": [LOCAL], "batch_size": 8}  # epochs of 6 steps

    def scheduled(**more: int):
        run = loader(images, **shape, **more)
        run.follow(schedule([[0, 6], [0.5, 12]]), 24)
        return run

    straight = list(scheduled().batches(0, 24))
    assert [batch.views_VBCHW.shape[-1] for batch in straight] == [6] * 12 + [12] * 12
    assert [batch.local_views_VBCHW.shape[-1] for batch in straight] == [3] * 12 + [6] * 12
    for wanted, found in zip(straight[12:], loader(images, **shape).batches(12, 24), strict=True):
        assert_equal(wanted, found)  # full size: as without a schedule
    for start in (4, 11, 12, 15):
        for wanted, found in zip(straight[start:], scheduled().batches(start, 24), strict=True):
            assert_equal(wanted, found)
    parts = [scheduled(rank=rank, world_size=2) for rank in range(2)]
    for wanted, *shards in zip(straight[10:14], *(part.batches(10, 14) for part in parts), strict=True):
        for name in ("views_VBCHW", "local_views_VBCHW"):
            assert torch.equal(torch.cat([getattr(s, name) for s in shards], dim=1), getattr(wanted, name))


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([], "pairs .* are wanted"),
        ({0: 16}, "pairs .* are wanted"),
        ([0, 16], "pairs .* are wanted"),
        ([[0, 16, 3]], "pairs .* are wanted"),
        ([["half", 16]], "pairs .* are wanted"),
        ([[True, 16]], "pairs .* are wanted"),
        ([[0, 0]], "a size is a number of pixels, at least 1, not 0"),
        ([[0, 16.5]], "at least 1, not 16.5"),
        ([[0, "16"]], "at least 1, not '16'"),
        ([[0, 16], [50, 32]], r"lies in \[0, 1\), not 50; epoch 50 of 100 begins at 0.5"),
        ([[0, 16], [1, 32]], r"lies in \[0, 1\), not 1"),
        ([[0, 16], [-0.5, 32]], "not -0.5"),
        ([[0, 16], [float("nan"), 32]], "not nan"),
        ([[0.5, 32]], "the first step begins at 0, not at 0.5"),
        ([[0, 16], [0.8, 32], [0.5, 24]], "begins after the one before, not at 0, 0.8, 0.5"),
        ([[0, 16], [0, 32]], "begins after the one before"),
    ],
)
def test_a_bad_schedule_is_one_line(steps: object, message: str):
    with pytest.raises(InputError, match=rf"^views\.size_schedule: .*{message}") as caught:
        check_size_schedule(steps)
    assert "\n" not in str(caught.value)


def test_callables_have_a_size_of_their_own():
    assert full_size([VIEW, ViewSpec(size=8)], 12) == 12 and full_size([ViewSpec(size=8)], 12) == 8
    with pytest.raises(InputError, match=r"views\.size_schedule: a callable makes views of its own size"):
        full_size([VIEW, lambda x: x], 12)

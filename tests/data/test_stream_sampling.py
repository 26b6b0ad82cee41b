from __future__ import annotations

import numpy as np
import pytest

from hf_ssl_or.data.sampling import WindowOrder
from hf_ssl_or.errors import InputError

MIB = 2**20


def window_order(
    rows: list[int], *, batch: int = 16, lanes: int = 4, window_mib: int = 24, seed: int = 0
) -> WindowOrder:
    """Blocks of 1 MiB each."""
    rows_K = np.array(rows)
    return WindowOrder(
        rows_K,
        np.full(len(rows), MIB),
        batch_size=batch,
        lanes=lanes,
        window_bytes=window_mib * MIB,
        seed=seed,
    )


def epoch(order: WindowOrder, number: int = 0, batch: int = 16) -> np.ndarray:
    steps = range(number * order.steps_per_epoch, (number + 1) * order.steps_per_epoch)
    return np.stack([order.indices(step, 0, batch) for step in steps])


UNEVEN = [7, 20, 1, 33, 12, 5, 40, 9, 28, 3, 16, 22, 2, 31]  # 229 rows
EVEN = [10] * 400


@pytest.mark.parametrize("lanes", [1, 2, 4, 16])
def test_an_epoch_takes_every_row_once_but_for_less_than_a_batch(lanes: int):
    order = window_order(UNEVEN, lanes=lanes, window_mib=2 * lanes)
    assert order.steps_per_epoch == 229 // 16
    left_out = set()
    for number in range(30):
        rows = epoch(order, number).ravel()
        assert len(set(rows.tolist())) == len(rows) == 224 and set(rows.tolist()) <= set(range(229))
        left_out |= set(range(229)) - set(rows.tolist())
    assert len(left_out) > 60, "another rest in each epoch"


def test_slices_of_any_number_of_processes_are_the_batch():
    order, fresh = window_order(UNEVEN), window_order(UNEVEN)
    for step in (0, 5, 13, 14, 40):
        whole = order.indices(step, 0, 16)
        for processes in (2, 4, 8, 16):
            size = 16 // processes
            parts = [fresh.indices(step, rank * size, size) for rank in range(processes)]
            assert np.array_equal(np.concatenate(parts), whole)


def test_epochs_seeds_and_lanes_have_orders_of_their_own():
    first = epoch(window_order(EVEN))
    assert np.array_equal(first, epoch(window_order(EVEN)))
    for other in (epoch(window_order(EVEN), 1), epoch(window_order(EVEN, seed=1)), epoch(window_order(EVEN, lanes=2))):
        assert not np.array_equal(first, other)


def test_a_lane_needs_few_blocks_at_a_time_and_shuffles_them_well():
    order = window_order(EVEN)  # 4 lanes of 6 blocks at a time
    lane = epoch(order)[:, :4].ravel()  # 1000 rows
    blocks = lane // 10
    for start in range(0, 1000 - 60, 60):
        assert len(set(blocks[start : start + 60])) == 6
        assert len(set(blocks[start : start + 12])) > 3, "not block by block"
    assert len(set(blocks)) == 100
    inside = lane[:60] % 10
    assert len(set(np.argsort(inside[blocks[:60] == blocks[0]]).tolist())) == 10
    assert not np.array_equal(inside[blocks[:60] == blocks[0]], np.arange(10))


def test_every_row_comes_equally_often_at_every_place():
    """Chi-squared over the quarters of an epoch, and over the lanes, for 20 rows in 400 epochs."""
    order, counts = window_order([5] * 8, batch=4, window_mib=8), np.zeros((40, 4, 4))
    for number in range(400):
        rows = epoch(order, number, batch=4)
        for quarter, part in enumerate(np.array_split(rows, 2)):
            for lane in range(4):
                np.add.at(counts[:, quarter, lane], part[:, lane], 1)
    counts = counts[:, :2].reshape(40, 8)
    assert np.array_equal(counts.sum(1), np.full(40, 400))
    deviation = ((counts - 50) ** 2 / 50).sum(1)
    assert deviation.max() < 35 and 4 < deviation.mean() < 11, "7 degrees of freedom"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lanes": 5}, "data.stream_lanes: 5 does not divide training.batch_size 16"),
        ({"window_mib": 3}, r"3 MiB for 4 lanes do not hold a row group of 1.0 MiB each; set at least 4, or fewer"),
    ],
)
def test_bad_settings_are_one_line(settings: dict, message: str):
    with pytest.raises(InputError, match=message):
        window_order(EVEN, **settings)

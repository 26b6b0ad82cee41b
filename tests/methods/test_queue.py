from __future__ import annotations

import pytest
import torch
from lightly.models.modules import NNMemoryBankModule
from lightly.models.modules.memory_bank import MemoryBankModule
from torch.nn import functional as F

from hf_ssl_or.errors import InputError
from hf_ssl_or.methods.queue import FeatureQueue


def rows(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_it_starts_with_random_unit_vectors():
    features_QD = FeatureQueue(12, 5).features_QD
    torch.testing.assert_close(features_QD.norm(dim=1), torch.ones(12))
    assert (features_QD @ features_QD.T).fill_diagonal_(0).abs().max() < 0.999


def test_it_keeps_what_lightly_keeps():
    queue, bank = FeatureQueue(12, 5), MemoryBankModule((12, 5))
    bank.bank.copy_(queue.features_QD)
    for step in range(7):
        features_ND = rows(4, 5, seed=step)
        queue.push(features_ND)
        bank(features_ND, update=True)
        assert torch.equal(queue.features_QD, bank.bank)
        assert queue.position == 4 * (step + 1) % 12


def test_the_oldest_are_replaced_first():
    queue = FeatureQueue(6, 1)
    for step in range(5):
        queue.push(torch.full((2, 1), float(step)))
    assert queue.features_QD.flatten().tolist() == [3, 3, 4, 4, 2, 2]


def test_a_queue_per_view_is_as_many_queues():
    together, apart = FeatureQueue(6, 5, per_view=True), [FeatureQueue(6, 5) for _ in range(3)]
    together.prepare(2, 3)
    assert together.features_QD.shape == (3, 6, 5)
    for step in range(4):
        features_VND = rows(3, 2, 5, seed=step)
        together.push(features_VND)
        for queue, features_ND in zip(apart, features_VND, strict=True):
            queue.push(features_ND)
    assert torch.equal(together.features_QD, torch.stack([queue.features_QD for queue in apart]))


@pytest.mark.parametrize("length", [1.0, 7.0])
def test_the_nearest_is_lightlys(length):
    queue, bank = FeatureQueue(64, 5), NNMemoryBankModule((64, 5))
    bank.bank.copy_(queue.features_QD)
    z_VBD = length * rows(3, 8, 5, seed=1)
    nearest_VBD = queue.nearest(z_VBD)
    assert nearest_VBD.shape == z_VBD.shape
    for z_BD, nearest_BD in zip(z_VBD, nearest_VBD, strict=True):
        assert torch.equal(nearest_BD, bank(z_BD))


def test_the_nearest_of_what_was_pushed_is_itself_without_gradient():
    queue, features_ND = FeatureQueue(64, 5), rows(8, 5)
    queue.push(features_ND)
    nearest_ND = queue.nearest((3 * features_ND).requires_grad_())
    assert torch.equal(nearest_ND, features_ND) and not nearest_ND.requires_grad


def test_the_nearest_is_found_in_full_precision_under_autocast():
    queue = FeatureQueue(4096, 8)
    z_BD = rows(256, 8, seed=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        nearest_BD = queue.nearest(z_BD)
        rough_BD = queue.features_QD[(z_BD @ queue.features_QD.T).argmax(1)]
    assert torch.equal(nearest_BD, queue.nearest(z_BD))
    assert not torch.equal(rough_BD, nearest_BD)


def test_half_precision_comes_in_the_queues_own():
    queue = FeatureQueue(4, 5).double()
    features_ND = (3 * rows(4, 5)).bfloat16()
    unit_ND = queue.unit(features_ND)
    assert unit_ND.dtype == torch.float64
    torch.testing.assert_close(unit_ND.norm(dim=1), torch.ones(4, dtype=torch.float64), rtol=1e-12, atol=0)
    queue.push(features_ND)
    assert torch.equal(queue.features_QD, features_ND.double())


def test_its_state_is_saved_with_its_position():
    queue, other = FeatureQueue(6, 5), FeatureQueue(6, 5)
    queue.push(rows(2, 5))
    other.load_state_dict(queue.state_dict())
    for each in (queue, other):
        each.push(rows(2, 5, seed=1))
    assert torch.equal(queue.features_QD, other.features_QD)
    assert torch.equal(queue.features_QD[2:4], rows(2, 5, seed=1))


@pytest.mark.parametrize(("size", "near"), [(3, 4), (10, 8), (11, 12)])
def test_a_size_that_is_no_multiple_of_the_batch_is_refused(size, near):
    message = rf"method\.queue_size: {size} is not a multiple of training\.batch_size, 4; {near} would be"
    with pytest.raises(InputError, match=message):
        FeatureQueue(size, 5).prepare(4)


def test_queues_per_view_start_by_the_seed_whenever_the_number_of_views_is_told():
    starts = []
    for _ in range(2):
        torch.manual_seed(0)
        queue = FeatureQueue(6, 5, per_view=True).double()
        torch.rand(len(starts))
        queue.prepare(2, 3)
        starts.append(queue.features_QD)
    assert starts[0].dtype == torch.float64 and torch.equal(*starts)
    queue.push(rows(3, 2, 5).double())
    queue.prepare(2, 3)
    assert torch.equal(queue.features_QD[:, 2:], starts[0][:, 2:]), "told again, the queues stay as they are"
    with pytest.raises(InputError, match="the queues are of 3 views, not 2; make a new method"):
        queue.prepare(2, 2)

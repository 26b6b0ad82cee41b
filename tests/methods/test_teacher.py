from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from hf_ssl_or.methods.teacher import MomentumTeacher, cosine_momentum


@pytest.fixture
def student(tiny_encoder):
    return tiny_encoder(), nn.Linear(16, 4)


def test_the_teacher_starts_as_a_copy_that_is_not_trained(student):
    teacher = MomentumTeacher(*student)
    for own, other in zip(teacher.parameters(), [p for part in student for p in part.parameters()], strict=True):
        assert torch.equal(own, other) and own is not other and not own.requires_grad


def test_it_moves_by_the_share_of_the_student(student):
    teacher = MomentumTeacher(*student)
    before = [p.clone() for p in teacher.parameters()]
    parameters = [p for part in student for p in part.parameters()]
    with torch.no_grad():
        for p in parameters:
            p += torch.randn_like(p)
    teacher.update(*student, 0.9)
    expected = [0.9 * old + 0.1 * p.detach() for old, p in zip(before, parameters, strict=True)]
    torch.testing.assert_close([p.detach() for p in teacher.parameters()], expected)


def test_batch_statistics_are_its_own(student):
    teacher = MomentumTeacher(*student)
    teacher.encoder(pixel_values=torch.randn(4, 3, 8, 8) + 5)
    own, other = teacher.encoder.layers[1].running_mean, student[0].layers[1].running_mean
    assert not torch.equal(own, other)
    before = own.clone()
    teacher.update(*student, 0.5)
    assert torch.equal(own, before)


def test_the_copy_keeps_its_hooks_and_leaves_the_student_alone(student):
    calls = []
    student[0].register_forward_hook(lambda module, *_: calls.append(module))
    teacher = MomentumTeacher(*student)
    teacher.encoder(pixel_values=torch.randn(2, 3, 8, 8))
    assert calls == [teacher.encoder]
    assert all(p.requires_grad for p in student[0].parameters())


def test_the_schedule_is_half_a_cosine():
    assert cosine_momentum(0.99, 1.0, 0, 100) == pytest.approx(0.99)
    assert cosine_momentum(0.99, 1.0, 50, 100) == pytest.approx(0.995)
    assert cosine_momentum(0.99, 1.0, 100, 100) == pytest.approx(1.0)
    published = 1 - (1 - 0.99) * (math.cos(math.pi * 30 / 100) + 1) / 2
    assert cosine_momentum(0.99, 1.0, 30, 100) == pytest.approx(published)

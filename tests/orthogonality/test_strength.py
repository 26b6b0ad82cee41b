from __future__ import annotations

from types import SimpleNamespace

import pytest
from torch import nn

from hf_ssl_or.errors import InputError
from hf_ssl_or.models.configuration_ssl import OrthogonalityConfig
from hf_ssl_or.orthogonality.strength import resolve_weight, schedule_factor


def encoder_of(architecture):
    encoder = nn.Linear(2, 2)
    encoder.config = SimpleNamespace(architecture=architecture)
    return encoder


@pytest.mark.parametrize(
    ("architecture", "penalty", "weight"),
    [
        ("resnet18", "so", 1e-6),
        ("resnet18.a1_in1k", "srip", 1e-3),
        ("resnet50", "srip", 1e-3),
        ("wide_resnet28_2", "srip", 1e-4),
        ("vit_tiny_patch16_224", "so", 1e-5),
        ("vit_small_patch4_32", "so", 1e-5),
        ("vit_base_patch16_224", "so", 1e-6),
    ],
)
def test_auto_weight_is_that_of_the_paper(architecture, penalty, weight):
    assert resolve_weight(encoder_of(architecture), OrthogonalityConfig(penalty=penalty)) == weight


@pytest.mark.parametrize(
    ("architecture", "settings", "message"),
    [
        ("vit_tiny_patch16_224", {"penalty": "srip"}, "none for srip on vit_tiny_patch16_224; set a number"),
        ("resnet18", {"penalty": "dso"}, "none for dso on resnet18"),
        ("resnet180", {}, "none for so on resnet180"),
        ("resnet18", {"normalize": True}, "normalize: false"),
        (None, {}, "config.architecture"),
    ],
)
def test_auto_weight_says_when_the_paper_has_none(architecture, settings, message):
    with pytest.raises(InputError, match=message):
        resolve_weight(encoder_of(architecture), OrthogonalityConfig(**settings))


def test_a_number_is_taken_as_it_is():
    assert resolve_weight(nn.Linear(2, 2), OrthogonalityConfig(weight=3)) == 3.0


def test_schedules():
    assert [schedule_factor("constant", step, 200) for step in (0, 100, 200)] == [1, 1, 1]
    assert [schedule_factor("cosine", step, 200) for step in (0, 100, 200)] == pytest.approx([1, 0.5, 0])
    steps = (0, 19, 20, 49, 50, 69, 70, 119, 120, 200)
    wanted = [1, 1, 1e-3, 1e-3, 1e-4, 1e-4, 1e-6, 1e-6, 0, 0]
    assert [schedule_factor("step", step, 200) for step in steps] == wanted
    assert [schedule_factor("step", 5 * step, 1000) for step in steps] == wanted

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from hf_ssl_or.errors import InputError
from hf_ssl_or.models.configuration_ssl import OrthogonalityConfig
from hf_ssl_or.orthogonality.selection import select_sites


def names(encoder, **settings):
    return [site.name for site in select_sites(encoder, OrthogonalityConfig(**settings))]


@pytest.mark.parametrize(("architecture", "count"), [("resnet18", 20), ("resnet50", 53), ("vit_tiny_patch16_224", 49)])
def test_all_convolution_and_linear_weights_and_nothing_else(architecture, count):
    encoder = timm.create_model(architecture, num_classes=0)
    found = names(encoder)
    assert len(found) == count
    tables = ("pos_embed", "cls_token")
    wanted = [name for name, p in encoder.named_parameters() if p.ndim > 1 and name not in tables]
    assert found == wanted


def test_patterns():
    encoder = timm.create_model("resnet18", num_classes=0)
    assert names(encoder, include=["conv1.weight"]) == ["conv1.weight"]
    assert len(names(encoder, include=["layer3.*", "layer4.*"])) == 10
    assert len(names(encoder, exclude=["conv1.weight", "*downsample*"])) == 16
    assert names(encoder, include=["layer1.*"], exclude=["layer1.1.*", "*conv2*"]) == ["layer1.0.conv1.weight"]


def test_wrong_selections_are_explained():
    encoder = timm.create_model("resnet18", num_classes=0)
    with pytest.raises(InputError, match=r"orthogonality.include pattern 'conv2.weight': did you mean 'conv1.weight'"):
        names(encoder, include=["conv2.weight"])
    with pytest.raises(InputError, match="orthogonality.exclude pattern 'bn1.weight'"):
        names(encoder, exclude=["bn1.weight"])
    with pytest.raises(InputError, match="no convolution or linear weight is selected"):
        names(encoder, exclude=["*"])
    with pytest.raises(InputError, match="no convolution or linear weight is selected"):
        names(nn.BatchNorm2d(3))
    with pytest.raises(InputError, match="split_qkv"):
        names(encoder, split_qkv=True)


def test_parametrised_weights_are_refused_unless_excluded():
    encoder = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 4))
    nn.utils.parametrizations.orthogonal(encoder[0])
    with pytest.raises(InputError, match=r"'0.weight' is parametrized"):
        names(encoder)
    assert names(encoder, exclude=["0.weight"]) == ["1.weight"]


def test_shared_weights_count_once():
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    assert names(nn.Sequential(first, second)) == ["0.weight"]


def test_fused_attention_weights_are_three_matrices():
    encoder = timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=2)
    parts = {s.name: s.parts for s in select_sites(encoder, OrthogonalityConfig(split_qkv=True))}
    assert {name for name, count in parts.items() if count == 3} == {f"blocks.{i}.attn.qkv.weight" for i in (0, 1)}
    assert set(parts.values()) == {1, 3}


def test_groups_are_matrices_of_their_own():
    conv = nn.Conv2d(6, 8, 3, groups=2)
    (site,) = select_sites(nn.Sequential(conv), OrthogonalityConfig())
    assert site.matrices().shape == (2, 4, 27)
    torch.testing.assert_close(site.matrices()[1], conv.weight[4:].flatten(1))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("kernel", [1, 3])
def test_matrices_are_views_and_updates_return_to_their_places(memory_format, kernel):
    conv = nn.Conv2d(3, 4, kernel).to(memory_format=memory_format)
    (site,) = select_sites(nn.Sequential(conv), OrthogonalityConfig())
    assert site.matrices().data_ptr() == conv.weight.data_ptr()
    torch.testing.assert_close(site.like_weight(site.matrices()), conv.weight, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_weights_without_inputs_or_outputs_are_left_out():
    empty = nn.Linear(0, 4), nn.Linear(4, 0), nn.Conv2d(0, 4, 3), nn.Conv2d(4, 0, 3), nn.Conv1d(4, 4, 0)
    encoder = nn.Sequential(*empty, nn.Linear(4, 4))
    assert names(encoder) == ["5.weight"]
    assert names(encoder, exclude=["0.weight"]) == ["5.weight"]
    with pytest.raises(InputError, match="no convolution or linear weight is selected"):
        names(encoder, include=["0.weight"])

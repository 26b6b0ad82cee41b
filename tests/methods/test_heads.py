from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hf_ssl_or.methods.heads import PredictionHead, ProjectionHead, PrototypeHead


def kinds(head):
    return [type(module).__name__ for module in head.mlp]


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_projection_is_linear_norm_relu_then_linear(layers):
    head = ProjectionHead(6, 10, 4, layers=layers)
    assert kinds(head) == ["Linear", "BatchNorm1d", "ReLU"] * (layers - 1) + ["Linear"]
    linears = [module for module in head.mlp if isinstance(module, nn.Linear)]
    assert [linear.bias is None for linear in linears] == [True] * (layers - 1) + [False]
    assert head(torch.randn(2, 5, 6)).shape == (2, 5, 4)


def test_last_norm_has_no_parameters_and_replaces_the_bias():
    head = ProjectionHead(6, 10, 4, last_norm=True)
    assert kinds(head)[-2:] == ["Linear", "BatchNorm1d"]
    assert head.mlp[-2].bias is None and head.mlp[-1].weight is None


def test_without_norm_and_with_gelu():
    assert kinds(ProjectionHead(6, 10, 4, layers=3, norm=False, gelu=True)) == [
        *["Linear", "GELU", "Linear", "GELU", "Linear"]
    ]


def test_all_views_share_one_batch_norm_call_in_view_major_order():
    head = ProjectionHead(6, 10, 4)
    x_VBF = torch.randn(3, 5, 6)
    out_VBD = head(x_VBF)
    torch.testing.assert_close(out_VBD, head.mlp(x_VBF.reshape(15, 6)).reshape(3, 5, 4))


def test_prediction_keeps_the_width():
    head = PredictionHead(4, 10)
    assert kinds(head) == ["Linear", "BatchNorm1d", "ReLU", "Linear"]
    assert head(torch.randn(2, 5, 4)).shape == (2, 5, 4)


def test_prototypes_give_cosines():
    head = PrototypeHead(4, 7)
    z_VBD = torch.randn(2, 5, 4)
    expected = F.cosine_similarity(z_VBD[:, :, None], head.weight, dim=-1)
    torch.testing.assert_close(head(z_VBD), expected)
    with torch.no_grad():
        head.weight *= 3
    torch.testing.assert_close(head(z_VBD * 2), expected)

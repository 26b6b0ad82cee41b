from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hf_ssl_or.methods.heads import PredictionHead, ProjectionHead, PrototypeHead, swapped_cross_entropy


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


def test_frozen_prototypes_get_a_gradient_of_zeros_and_their_input_the_usual_one():
    head = PrototypeHead(4, 7)
    z_VBD = torch.randn(2, 5, 4, requires_grad=True)
    gradients = {}
    for frozen in (True, False, True):  # no hook outlives its call
        scores_VBK = head(z_VBD, frozen=frozen)
        gradients[frozen] = torch.autograd.grad(scores_VBK.square().sum(), [head.weight, z_VBD])
    assert not gradients[True][0].any() and gradients[False][0].any()
    assert torch.equal(gradients[True][1], gradients[False][1]) and gradients[True][1].any()
    with torch.no_grad():
        assert torch.equal(head(z_VBD, frozen=True), head(z_VBD))


def test_cosines_are_exact_under_autocast():
    head = PrototypeHead(64, 7)
    z_VBD = torch.randn(2, 5, 64).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores_VBK = head(z_VBD)
    assert scores_VBK.dtype == torch.float32
    torch.testing.assert_close(scores_VBK, head(z_VBD.float()), rtol=0, atol=0)


@pytest.mark.parametrize(("views", "local"), [(2, 0), (2, 1), (3, 0), (4, 3), (1, 2)])
def test_swapped_cross_entropy_is_the_mean_over_pairs(views, local):
    torch.manual_seed(views)
    scores_SBK = torch.randn(views + local, 6, 9, dtype=torch.float64, requires_grad=True)
    targets_VBK = torch.randn(views, 6, 9, dtype=torch.float64).softmax(-1)
    loss, confidence = swapped_cross_entropy(scores_SBK, targets_VBK, 0.1)
    pairs = [
        -(targets_VBK[u] * (scores_SBK[v] / 0.1).log_softmax(-1)).sum(-1).mean()
        for u in range(views)
        for v in range(views + local)
        if v != u
    ]
    expected = torch.stack(pairs).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    gradients = torch.autograd.grad(loss, scores_SBK), torch.autograd.grad(expected, scores_SBK)
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(confidence, targets_VBK.max(-1).values.mean())
    exact, _ = swapped_cross_entropy(
        (0.1 * targets_VBK.log())[:1].repeat(3, 1, 1), targets_VBK[:1].repeat(2, 1, 1), 0.1
    )
    torch.testing.assert_close(exact, -(targets_VBK[0] * targets_VBK[0].log()).sum(-1).mean())  # entropy is the least
